"""Spectra from matrices: dense solvers, and the certificate."""
