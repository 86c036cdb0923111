"""How many eigenvalues of a real matrix are beyond a line or a circle, by products alone, where they are some hundreds.

Arnoldi's method finds those furthest out. Let Q (k, p) be an orthonormal basis of what it found, A Q = Q T + R, and C
the compression of A to the complement of Q. A' = A - R Q^T is block triangular, with T and C on the diagonal. T, which
is small, is solved densely: T = X L X^-1. Powers prove that C has nothing outside of an ellipse, and bound |(C - z)^-1|
there (`stiffcore.eigen.powers`). With |(T - z)^-1| <= sum of c_i / |l_i - z|, c_i the condition numbers of T's
eigenvalues l_i, this bounds the resolvent of A' on any boundary beside the ellipse. As long as that times |R| is under
1, no eigenvalue meets the boundary on the way from A' to A, so that A has as many on the counted side as T.

The ellipse holds all eigenvalues but those found, so that both ends of a spectrum may be proved by one.
"""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import scipy.linalg

from stiffcore.eigen.powers import Decay, Ellipse, Operator, decay, norm_from_above, powers_needed, roomiest
from stiffcore.eigen.regions import Region
from stiffcore.eigen.sparse import EPS, Arnoldi, Array, complement

# Steps of Arnoldi after which it is looked whether they are enough, doubled until they are the most.
FIRST_STEPS = 150
MOST_STEPS = 1200
# Vectors of length k that are free beside the memory for factors (`stiffcore.plan.KRYLOV_VECTORS`, of which others have
# some).
FREE_VECTORS = 250
# Residuals of Ritz values that are taken for eigenvalues, of all together, relative to the largest value; and of one
# that is roughly an eigenvalue.
FOUND = 1e-10
ROUGH = 5e-2
# So many on the counted side, and more than this share of all steps: their number grows with the steps.
CROWD = 30
CROWD_SHARE = 0.2
# Powers of the compression before it is given up.
MOST_POWERS = 600
# More steps are made where they are cheaper than the powers that they save: where there are more than this share.
POWERS_SHARE = 0.5
# Points of the boundary for the resolvent of T, and so many at once.
POINTS = 4000
POINTS_AT_ONCE = 250
# Columns that are multiplied at once.
COLUMNS = 32
# Ellipses that are tried: centres between both ends, and how tall, relative to how wide.
CENTRES = np.linspace(0.05, 0.95, 37)
ASPECTS = np.geomspace(0.05, 200, 50)


@dataclass(frozen=True)
class Deflated:
    """What came of it.

    Attributes:
        count: of eigenvalues on the counted side; None where there are too many.
        margin: no eigenvalue is nearer to the boundary, nor is one of a matrix within this distance on it; 0 without a
            count.
        note: how many were deflated and what power proved the rest, or how many were seen, of a matrix far from normal
            not all eigenvalues.
    """

    count: int | None
    margin: float
    note: str


def count_beyond(a: Operator, region: Region, memory_bytes: int | None, rng: np.random.Generator) -> Deflated | None:
    """Count the eigenvalues in a region by Arnoldi and powers of the rest.

    Args:
        a: what is multiplied with; its order is over 100.
        region: where.
        memory_bytes: what a sparse LU may take, which is not held meanwhile; None for no limit.
        rng: draws the starts.

    Returns:
        The count, or that there are too many; None where neither can be said.

    Raises:
        LinAlgError: where LAPACK fails, or what was found has no basis of eigenvectors.
    """
    most = _steps(a.k, memory_bytes)
    space = Arnoldi(a.apply, a.k, most, rng)
    steps = FIRST_STEPS
    while True:
        space.extend(min(steps, most))
        values, residuals = space.ritz()
        scale = float(np.abs(values).max(initial=0.0))
        found, counted = _smallest(residuals, FOUND * scale), region.has(values)
        sure = int((counted & (residuals <= ROUGH * scale)).sum())
        done = space.size == most or space.exhausted
        missing = bool((counted & ~found).any())
        if missing and sure > CROWD and (sure > CROWD_SHARE * space.size or done):
            return Deflated(None, 0.0, f"some {sure} are seen there already: needs the spectrum")
        if not missing:
            ellipse, rate = region.ellipse(values[~found], scale)
            if powers_needed(rate, a.k) <= MOST_POWERS:
                break
        if done:
            return None
        steps *= 2
    basis = space.schur_vectors(values, found)
    del space
    enclosure = _enclosed(a, basis, ellipse, rate, MOST_POWERS, rng)
    return None if enclosure is None else enclosure.count(region)


def enclose(a: Operator, memory_bytes: int | None, rng: np.random.Generator) -> "Enclosure | None":
    """Find the outermost eigenvalues, and an ellipse between both ends that holds all others.

    Args:
        a: what is multiplied with; its order is over 100.
        memory_bytes: as for `count_beyond`.
        rng: draws the starts.

    Returns:
        What was found and proved; None where nothing was.

    Raises:
        LinAlgError: as `count_beyond`.
    """
    most = _steps(a.k, memory_bytes)
    space = Arnoldi(a.apply, a.k, most, rng)
    steps = FIRST_STEPS
    while True:
        space.extend(min(steps, most))
        values, residuals = space.ritz()
        scale = float(np.abs(values).max(initial=0.0))
        found = _smallest(residuals, FOUND * scale)
        done = space.size == most or space.exhausted
        ellipse, rate = _between(values, found)
        needed = powers_needed(rate, a.k)
        if needed <= (a.affordable if done else POWERS_SHARE * space.size):
            break
        if done:
            return None
        steps *= 2
    basis = space.schur_vectors(values, found)
    del space
    return _enclosed(a, basis, ellipse, rate, max(MOST_POWERS, a.affordable), rng)


def _between(values: Array, found: Array) -> tuple[Ellipse, float]:
    """An ellipse inside of both ends of the values found, that holds all others with most room, and its level."""
    others, real = values[~found], np.sort(np.unique(values[found].real))
    if not len(real) or (len(others) and not real[0] < others.real.min() <= others.real.max() < real[-1]):
        return Ellipse(0.0, 1.0, 1.0), math.inf
    # inside of the second eigenvalue, too, where that leaves as much room: a line fits between both
    inner = [x for x in real[1:3] if not len(others) or x < (real[0] + others.real.min()) / 2]
    low = inner[-1] if inner else real[0]
    inner = [x for x in real[-3:-1] if not len(others) or x > (real[-1] + others.real.max()) / 2]
    high = inner[0] if inner else real[-1]
    width = max(high - low, EPS * abs(high))
    tried = [
        Ellipse(low + share * width, min(share, 1 - share) * width, min(share, 1 - share) * width * aspect)
        for share in CENTRES
        for aspect in ASPECTS
    ]
    return roomiest(tried, others)


def _enclosed(
    a: Operator, basis: Array, ellipse: Ellipse, rate: float, most: int, rng: np.random.Generator
) -> "Enclosure | None":
    size = norm_from_above(lambda x: a.transposed(a.apply(x)), a.k, rng)
    inner = Inner.of(a, basis, size)
    q = inner.q
    off = 4 * inner.tilt + 2 * a.k * math.sqrt(q.shape[1]) * EPS
    found = decay(a, ellipse, rng, min(rate, 1 - EPS), most, partial(complement, q=q), off)
    return None if found is None else Enclosure(inner, ellipse, found)


def _steps(k: int, memory_bytes: int | None) -> int:
    """Steps of `Arnoldi` that are worth their time, and fit.

    bytes: s vectors and at most as many that are made of them, and what is solved of their order: 16 k s + 64 s^2.

    Args:
        k: the order.
        memory_bytes: what a sparse LU may take, which is not held meanwhile; None for no limit.
    """
    if memory_bytes is None:
        return min(k, MOST_STEPS)
    vector = 16 * k
    most = (math.sqrt(vector**2 + 4 * 64 * (8 * k * FREE_VECTORS + max(memory_bytes, 0))) - vector) / (2 * 64)
    return min(k, MOST_STEPS, int(most))


def _smallest(residuals: Array, most: float) -> Array:
    """Which residuals, from the smallest on, are of a norm together that is at most so large."""
    order = np.argsort(residuals, kind="stable")
    few = np.empty(len(residuals), bool)
    few[order] = np.cumsum(residuals[order] ** 2) <= most**2
    return few


@dataclass(frozen=True)
class Inner:
    """A nearly invariant space, solved.

    Attributes:
        q: (k, p), orthonormal.
        values: (p,) complex, the eigenvalues of T.
        vectors: (p, p) complex, its eigenvectors.
        conditions: (p,), of the values, rounded up.
        residual: an upper bound of |R|, with all roundings.
        unsolved: an upper bound of |T - X L X^-1|.
        tilt: an upper bound of |Q - Q'|, Q' orthonormal exactly; long sums are off by sqrt(k) eps (Higham & Mary 2019).
        size: an upper bound of |A|.
    """

    q: Array
    values: Array
    vectors: Array
    conditions: Array
    residual: float
    unsolved: float
    tilt: float
    size: float

    @classmethod
    def of(cls, a: Operator, basis: Array, size: float) -> "Inner":
        """Of the span of (k, p), which A maps nearly to itself.

        Raises:
            LinAlgError: where LAPACK fails, or there is no basis of eigenvectors.
        """
        if basis.shape[1]:
            basis, _ = scipy.linalg.qr(basis, mode="economic", overwrite_a=True)
        q = basis
        p = q.shape[1]
        if p == 0:
            return cls(q, np.zeros(0), np.zeros((0, 0)), np.zeros(0), 0.0, 0.0, 0.0, size)
        t, square = np.zeros((p, p)), 0.0
        for start in range(0, p, COLUMNS):
            at = slice(start, start + COLUMNS)
            aq = a.apply(np.ascontiguousarray(q[:, at]))
            t[:, at] = q.T @ aq
            square += float(np.linalg.norm(aq - q @ t[:, at]) ** 2)
        tilt = float(np.linalg.norm(q.T @ q - np.eye(p))) + p * math.sqrt(a.k) * EPS
        # of sums of p products, whose factors have norms of sqrt(p) and of T
        small = (p + 4) * math.sqrt(p) * EPS * float(np.linalg.norm(t))
        residual = math.sqrt(square) + a.rounding * a.norm * math.sqrt(p) + small + 2 * tilt * size
        values, vectors, conditions, unsolved = _solved(t, small)
        return cls(q, values, vectors, conditions, residual, unsolved, tilt, size)

    def resolvent(self, region: Region) -> float:
        """An upper bound of |(T - z)^-1| over the boundary."""
        reach = 2 * float(np.abs(self.values).max(initial=0.0))
        if reach == 0:
            least = float(region.distance(self.values).min(initial=math.inf))
            return float(self.conditions.sum()) / least if least else math.inf
        length, point = region.boundary(reach)
        half = length / POINTS / 2
        nearest = region.distance(self.values)
        most = float(self.conditions.sum()) / (reach / 2)  # beyond the reach
        points = point(half * (2 * np.arange(POINTS) + 1))
        for start in range(0, POINTS, POINTS_AT_ONCE):
            z = points[start : start + POINTS_AT_ONCE, None]
            with np.errstate(divide="ignore"):
                away = np.maximum(np.abs(self.values - z) - half, nearest)
                most = max(most, float((1 / away @ self.conditions).max()))
        return most


def _solved(t: Array, rounding: float) -> tuple[Array, Array, Array, float]:
    """Eigenvalues and vectors of T, condition numbers, and an upper bound of |T - X L X^-1|; see `Inner`."""
    values, vectors = np.linalg.eig(t)
    if not np.linalg.cond(vectors) * len(t) * EPS < 1e-3:
        raise np.linalg.LinAlgError("its eigenvectors are no basis")
    inverse = 1.01 * np.linalg.inv(vectors)  # by far more than it is off
    left = float(np.linalg.norm(t @ vectors - vectors * values)) + rounding
    unsolved = left * float(np.linalg.norm(inverse, 2))
    return values, vectors, np.linalg.norm(vectors, axis=0) * np.linalg.norm(inverse, axis=1), unsolved


@dataclass(frozen=True)
class Enclosure:
    """All eigenvalues of A: those of T, and others within an ellipse.

    Attributes:
        inner: Q and T.
        ellipse: what holds the others; None where Q spans everything.
        decay: what proves that.
    """

    inner: Inner
    ellipse: Ellipse | None
    decay: Decay | None

    def count(self, region: Region) -> Deflated | None:
        """The count, where the ellipse is beside the region and no eigenvalue meets the boundary."""
        t, outer = self.inner, 0.0
        if self.ellipse is not None and self.decay is not None:
            if not region.beside(self.ellipse):
                return None
            outer = self.decay.resolvent
        inner = t.resolvent(region)
        if not inner * t.unsolved < 1:
            return None
        inner /= 1 - inner * t.unsolved
        # A' - z is block triangular; its corner is at most of the norm of A
        margin = 1 / (inner + outer + t.size * inner * outer) - 2 * t.residual
        margin = min(margin, float(region.distance(t.values).min(initial=np.inf)))
        if not margin > 0:
            return None
        note = f"{len(t.values)} eigenvalues deflated"
        if self.decay is not None:
            note += f", of the rest the norm of power {self.decay.power} is under 1"
        return Deflated(int(region.has(t.values).sum()), margin, note)
