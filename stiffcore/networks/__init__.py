"""What comes in: checkpoints, networks, their blocks, and images."""
