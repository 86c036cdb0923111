"""Discs in which no matrix near enough to A has an eigenvalue: around z, of radius s(z) = the smallest singular value.

A + F with |F| < s(z) has no eigenvalue at z, and s changes by at most |z - z'|. So a line or circle that discs of
radius s - eps cover is crossed by no eigenvalue of A + t F, |F| <= eps, as t goes from 0 to 1: A and A + F have as many
eigenvalues on either side (Trefethen & Embree, Spectra and Pseudospectra, 2005).

A lower bound of s is computed, with one factorisation for each z: with R = (A - z)^-1 and a complex Gaussian x (of mean
square 1 an entry), |(R R^H)^p R x| >= |R|^(2 p + 1) |u^H x| with u the right singular vector, and |u^H x| < d fails to
hold with a probability of at most d^2; for `PROBES` of them together with its power `PROBES`, which is `FAILURE`. What
the solves are off by is measured by their residuals, and accounted for.
"""

import math
from typing import Protocol

import numpy as np
import scipy.linalg

from stiffcore.eigen.regions import Region
from stiffcore.eigen.sparse import EPS, FAILURE, Array

PROBES = 8
# Solves for a bound: an odd number. It is then under the truth by (sqrt(k) / d)^(1 / SOLVES) at most.
SOLVES = 5
# Up to this order all singular values are computed: it is as fast.
SMALL_ORDER = 40
MOST_DISCS = 600
"""Tried before a cover is given up."""

_POINTS = 512


class Shifted(Protocol):
    """A - zI, factored."""

    def solve(self, x: Array, *, adjoint: bool) -> Array:
        """(k, m): the solution with it, or with its adjoint; only nearly, as `residual` says."""

    def residual(self, x: Array, y: Array, *, adjoint: bool) -> Array:
        """(m,) upper bounds of the norms of x - (A - z) y, their own rounding included."""


class ShiftedTriangular:
    """T - zI of an upper triangular complex T."""

    def __init__(self, t: Array, z: complex) -> None:
        self._t = t - z * np.eye(len(t))
        self._off = 4 * len(t) * EPS * float(np.linalg.norm(self._t))

    def solve(self, x: Array, *, adjoint: bool) -> Array:
        """See `Shifted`."""
        return scipy.linalg.solve_triangular(self._t, x, trans="C" if adjoint else "N", check_finite=False)

    def residual(self, x: Array, y: Array, *, adjoint: bool) -> Array:
        """See `Shifted`."""
        image = (self._t.conj().T if adjoint else self._t) @ y
        return np.linalg.norm(x - image, axis=0) + self._off * np.linalg.norm(y, axis=0)


def least_singular(shifted: Shifted, k: int, rng: np.random.Generator) -> float:
    """A lower bound of the smallest singular value of A - zI; fails with a probability of at most `FAILURE`.

    Args:
        shifted: the factorisation.
        k: the order.
        rng: draws the probes.

    Returns:
        The bound; 0 where rounding leaves nothing to say.
    """
    seen = FAILURE ** (1 / (2 * PROBES))
    x = (rng.standard_normal((k, PROBES)) + 1j * rng.standard_normal((k, PROBES))) / math.sqrt(2)
    most, lost = 0.0, 0.0  # of |R| so far, and of what the last solution is off by
    with np.errstate(all="ignore"):
        for i in range(SOLVES):
            try:
                y = shifted.solve(x, adjoint=i % 2 == 1)
            except np.linalg.LinAlgError:  # exactly singular
                return 0.0
            wrong = float(shifted.residual(x, y, adjoint=i % 2 == 1).max())
            size = float(np.linalg.norm(y, axis=0).max())
            if i == 0:
                if not (wrong < seen / 2 and math.isfinite(size) and size > 0):
                    return 0.0
                first, most = wrong, size / (seen - wrong)
            else:
                # R is at most `most`: the part of the first residual is kept apart, that of the others adds up
                lost = most * (lost + wrong)
                if i % 2 == 0 and math.isfinite(size):
                    most = min(most, ((size + lost) / (seen - first)) ** (1 / (i + 1)))
            x = y
    return (1 - 1e-6) / most


def clear_boundary(t: Array, region: Region, distance: float, most: int = MOST_DISCS) -> int:
    """Whether no T + F, |F| <= distance, has an eigenvalue on the boundary of a region, shown by discs.

    Args:
        t: (q, q) complex, upper triangular; its spectrum, and what is asked of it, symmetric about the real axis.
        region: whose boundary.
        distance: at least 0.
        most: discs that are tried.

    Returns:
        How many singular values that took; 0 where it has, or where too many discs would be needed.
    """
    q, size = len(t), float(np.linalg.norm(t))
    eye, rng = np.eye(q), np.random.default_rng(3)
    allowed = 4 * q * EPS * size

    def least(z: complex) -> float:
        if q <= SMALL_ORDER:
            return float(scipy.linalg.svdvals(t - z * eye, check_finite=False)[-1]) - allowed
        return least_singular(ShiftedTriangular(t, z), q, rng)

    length, point = region.boundary(2 * size + distance)
    around = point(length * np.linspace(0, 1, _POINTS))
    values = np.diagonal(t)
    nearest = values[np.argmin(region.distance(values))]
    if least(complex(around[np.argmin(np.abs(around - nearest))])) <= distance:
        return 0
    pieces, tried = [(0.0, length)], 0
    while pieces:
        start, stop = pieces.pop()
        half = (stop - start) / 2
        z = complex(point(np.array(start + half)))
        if abs(z) - size - half > distance:
            continue
        tried += 1
        value = least(z)
        if value - half > distance:
            continue
        if value <= distance or tried >= most:
            return 0
        pieces += [(start, start + half), (start + half, stop)]
    return tried + 1
