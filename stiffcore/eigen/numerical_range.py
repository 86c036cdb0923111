"""The numerical range W(A) = {x^H A x : |x| = 1} of a sparse real matrix: its ends, its curve, a polygon around it.

Every eigenvalue lies in W(A), which is convex and, for a real A, symmetric about the real axis.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse as sp
from scipy.sparse.linalg import LinearOperator, eigsh

from stiffcore.eigen.sparse import (
    DENSE_ORDER,
    EPS,
    Array,
    FillError,
    Product,
    as_sparse,
    check_fits,
    estimated_fill,
    inertia_bytes,
    lanczos,
    lanczos_error,
    norm_bound,
    power_of_two,
    product,
    proved_least,
)

# Lanczos steps for a support line: the line is then about 3 % of the width of W(A) outside of it.
SUPPORT_STEPS = 100
# Those for both ends, the second where the first leave open what a second may decide.
BOUND_STEPS = (80, 240)
# How far left of the computed end inertia is tried, relative to the norm: first near, then where Lanczos was off.
_GAPS = (1e-6, 1e-3, 3e-2)


@dataclass(frozen=True)
class RangeEnd:
    """The left end of a numerical range.

    Attributes:
        value: as Lanczos found it: at the end, or right of it.
        bound: proved by inertia to be left of every point of the range; -inf where nothing was proved.
        note: why nothing was proved; empty where it was.
    """

    value: float
    bound: float
    note: str


def numerical_range_end(a: Any, *, right_of: float = -math.inf, memory_bytes: int | None = None) -> RangeEnd:
    """Find and prove the left end of W(A): the smallest eigenvalue of (A + A^T) / 2.

    Args:
        a: (k, k) real, sparse or dense.
        right_of: only a bound right of this is of interest: where the end is not, nothing is factored.
        memory_bytes: what the factorisation may take.

    Returns:
        The end; inf and inf for k = 0.

    Raises:
        InputError: where `a` is no such matrix.
    """
    a = as_sparse(a)
    k = a.shape[0]
    if k == 0:
        return RangeEnd(math.inf, math.inf, "")
    h = _symmetric_part(a)
    value = _extreme(h, "SA")
    if value <= right_of:
        return RangeEnd(value, -math.inf, f"the numerical range reaches {value:.6g}")
    try:
        check_fits(inertia_bytes(estimated_fill(h), h.nnz), memory_bytes, "the inertia of the symmetric part")
    except FillError as error:
        return RangeEnd(value, -math.inf, str(error))
    for gap in _GAPS:
        sigma = max(value - gap * norm_bound(h), (value + right_of) / 2)
        bound = proved_least(h, sigma)
        if bound is not None:
            return RangeEnd(value, bound, "")
    return RangeEnd(value, -math.inf, "the inertia of the symmetric part proved nothing")


def logarithmic_norm(a: Any) -> float:
    """The largest eigenvalue of (A + A^T) / 2: the initial growth rate of x' = A x. Converged, not proved.

    Args:
        a: (k, k) real, sparse or dense, or a `LinearOperator` with a transpose.

    Returns:
        The right end of W(A); -inf for k = 0.
    """
    a = a if isinstance(a, LinearOperator) else as_sparse(a)
    return _extreme(_symmetric_part(a), "LA") if a.shape[0] else -math.inf


def range_ends(a: Any) -> tuple[float, float]:
    """The least and the largest real part in W(A). Converged, not proved: either may be further out.

    Args:
        a: (k, k) real, sparse or dense, or a `LinearOperator` with a transpose.

    Returns:
        Both; inf and -inf for k = 0.
    """
    a = a if isinstance(a, LinearOperator) else as_sparse(a)
    if not a.shape[0]:
        return math.inf, -math.inf
    h = _symmetric_part(a)
    return _extreme(h, "SA"), _extreme(h, "LA")


def range_bounds(a: Any, line: float, size: float) -> tuple[float, float]:
    """Bounds of the real parts in W(A), from Lanczos steps: computed, see `stiffcore.eigen.sparse`.

    Args:
        a: (k, k) real, sparse or dense, or a `LinearOperator` with a transpose; k over `DENSE_ORDER`.
        line: where it matters: more steps are made only where they may tell on which side of it W(A) is.
        size: the Frobenius norm of A, for the rounding of products.

    Returns:
        The left and the right bound.
    """
    h = _symmetric_part(a if isinstance(a, LinearOperator) else as_sparse(a))
    k, low, high = h.shape[0], -math.inf, math.inf
    for steps in BOUND_STEPS:
        ritz = lanczos(lambda x: h @ x.ravel(), k, min(steps, k), np.dtype(float), np.random.default_rng(4))
        error = lanczos_error(k, min(steps, k))
        # either end may be missed by `error` times the true spread, which the Ritz values underestimate
        beyond = error * float(ritz[-1] - ritz[0]) / (1 - 2 * error) + 10 * k * EPS * size
        low, high = max(low, float(ritz[0]) - beyond), min(high, float(ritz[-1]) + beyond)
        if low > line or high < line or ritz[0] <= line <= ritz[-1]:
            break
    return low, high


def numerical_range(a: Any, angles: int = 72) -> tuple[Array, Array]:
    """Points on the boundary of W(A), counter-clockwise.

    The eigenvector of the largest eigenvalue of the Hermitian part of e^(-it) A gives the point where the support line
    with the normal e^(it) touches (Johnson, SIAM J. Numer. Anal. 15 (1978)). Converged to 1e-6, not proved.

    Args:
        a: (k, k) real, sparse or dense, k at least 1.
        angles: how many; even.

    Returns:
        (angles,) float64 in [0, 2 pi), and (angles,) complex128 points.
    """
    a = as_sparse(a)
    t = 2 * np.pi * np.arange(angles) / angles
    points = np.empty(angles, complex)
    for j in range(angles // 2 + 1):
        points[j] = _support_point(a, t[j])
        points[-j] = np.conj(points[j])  # and j = 0 twice, whose point need not be real on a flat side
    return t, points


def outer_polygon(a: sp.csc_array, angles: Array, rng: np.random.Generator) -> list[tuple[complex, float]]:
    """Half-planes around W(A): Re(conj(u) z) <= h. Computed: `stiffcore.eigen.sparse` says with what probability.

    Args:
        a: (k, k), k at least 1.
        angles: of the normals u.
        rng: draws the starts.

    Returns:
        One (u, h) an angle.
    """
    return [(complex(np.exp(1j * t)), _support_bound(a, t, rng)) for t in angles]


def _support_bound(a: sp.csc_array, t: float, rng: np.random.Generator) -> float:
    k = a.shape[0]
    if k <= DENSE_ORDER:
        rotated = np.exp(-1j * t) * a.toarray()
        top = float(scipy.linalg.eigvalsh((rotated + rotated.conj().T) / 2)[-1])
    else:
        steps = min(SUPPORT_STEPS, k)
        ritz = lanczos(_hermitian_part(a, t), k, steps, np.dtype(complex), rng)
        error = lanczos_error(k, steps)
        # either end may be missed by `error` times the true spread, which the Ritz values underestimate
        top = float(ritz[-1] + error * (ritz[-1] - ritz[0]) / (1 - 2 * error))
    return top + 10 * k * EPS * norm_bound(a)


def _support_point(a: sp.csc_array, t: float) -> complex:
    k = a.shape[0]
    if k <= DENSE_ORDER:
        rotated = np.exp(-1j * t) * a.toarray()
        x = scipy.linalg.eigh((rotated + rotated.conj().T) / 2)[1][:, -1]
    else:
        operator = LinearOperator((k, k), _hermitian_part(a, t), dtype=complex)
        start = np.random.default_rng(0).standard_normal(k).astype(complex)
        x = eigsh(operator, k=1, which="LA", tol=1e-6, v0=start)[1][:, 0]
    return complex(np.vdot(x, product(a, x)))


def _symmetric_part(a: sp.csc_array | LinearOperator) -> sp.csc_array | LinearOperator:
    if isinstance(a, LinearOperator):
        return (a + a.T) * 0.5
    h = sp.csc_array(a + a.T)
    h.data /= 2
    return h


def _hermitian_part(a: sp.csc_array, t: float) -> Product:
    turn, transpose = np.exp(-1j * t), a.T

    def apply(x: Array) -> Array:
        x = x.ravel()
        return (turn * product(a, x) + np.conj(turn) * product(transpose, x)) / 2

    return apply


def _extreme(h: sp.csc_array | LinearOperator, which: str) -> float:
    k = h.shape[0]
    if k <= DENSE_ORDER:
        full = h @ np.eye(k) if isinstance(h, LinearOperator) else h.toarray()
        return float(scipy.linalg.eigvalsh(full)[0 if which == "SA" else -1])
    start = np.random.default_rng(0).standard_normal(k)
    size = power_of_two(float(np.abs(h @ start).max()))
    if not size:
        return 0.0  # ARPACK finds no start in the range of a zero matrix
    # no second matrix; the division is exact
    scaled = LinearOperator(h.shape, lambda x: (h @ x) / size, dtype=np.dtype(np.float64))
    return size * float(eigsh(scaled, k=1, which=which, v0=start, tol=1e-9, return_eigenvectors=False)[0])
