"""Answers from matrices: spectra, their ends, counts with proofs, singular values, and certificates."""
