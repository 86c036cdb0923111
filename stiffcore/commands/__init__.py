"""What the commands do; `stiffcore.cli` has their options, and imports each of these where it is called."""
