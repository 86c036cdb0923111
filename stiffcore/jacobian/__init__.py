"""Linearisation of functions: products, graphs, exact reductions, sparse matrices, tensor slices, and factors."""
