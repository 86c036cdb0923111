"""Linearisation of functions, and the exact reduction of their Jacobians."""
