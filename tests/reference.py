"""The naive truth that spectra are compared with: dense Jacobians by reverse mode, and numpy's eigenvalues.

Nothing here shares code with `stiffcore`: the Jacobian comes from `torch.func.jacrev`, row by row and in float64.
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn.attention import SDPBackend, sdpa_kernel


def dense_jacobian(f, x, chunk=None):
    """(m, n) float64, row-major flattened on both sides."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused transformer layer has no derivative
    try:
        with sdpa_kernel(SDPBackend.MATH):
            jacobian = torch.func.jacrev(lambda t: f(t.clone()), chunk_size=chunk)(x.detach().clone())
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return jacobian.detach().reshape(-1, x.numel()).double().numpy()


def dense_eigenvalues(f, x):
    """(n,) complex128, of the whole matrix."""
    return np.linalg.eigvals(dense_jacobian(f, x)).astype(complex)


def matched_distance(ours, theirs):
    """The largest |difference| over the pairing with the smallest sum: every eigenvalue is used once."""
    ours, theirs = np.asarray(ours, complex), np.asarray(theirs, complex)
    assert len(ours) == len(theirs)
    if not len(ours):
        return 0.0
    distance = np.abs(ours[:, None] - theirs[None, :])
    rows, columns = linear_sum_assignment(distance)
    return float(distance[rows, columns].max())


def assert_spectra_match(computed, zeros, ones, reference, tolerance=1e-8, radius=1e-6):
    """Eigenvalue by eigenvalue; the exact zeros and ones by count.

    A dense solver scatters multiple eigenvalues about 0 and 1. So the `zeros` reference values nearest 0 must lie
    within `radius` of it, likewise the `ones` nearest 1, and what remains is matched one to one with what was
    computed. That is sound: were an exact zero or one claimed too many or in the wrong place, a value further away
    than `radius` would have to be taken, or a computed eigenvalue would have no partner. Tolerances are relative
    to the spectral radius where that is above 1.

    Returns:
        The largest difference among the matched.
    """
    reference = np.asarray(reference, complex)
    assert len(computed) + zeros + ones == len(reference), "the counts do not add up to n"
    scale = max(1.0, float(np.abs(reference).max(initial=0)))
    left = reference
    for count, centre in ((zeros, 0), (ones, 1)):
        order = np.argsort(np.abs(left - centre), kind="stable")
        taken = np.abs(left[order[:count]] - centre)
        assert taken.max(initial=0) <= radius * scale, f"{count} claimed at {centre}: {taken.max():.2e} away"
        left = np.delete(left, order[:count])
    distance = matched_distance(computed, left)
    assert distance <= tolerance * scale, f"eigenvalues differ by {distance:.2e}"
    return distance
