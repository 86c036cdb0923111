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
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import scipy.linalg
import scipy.sparse as sp
from scipy.sparse.linalg import LinearOperator

from stiffcore.eigen.powers import (
    Decay,
    Ellipse,
    Operator,
    decay,
    ellipse_right_of,
    norm_from_above,
    powers_needed,
    roomiest,
)
from stiffcore.eigen.regions import Around, Region
from stiffcore.eigen.sparse import DENSE_ORDER, EPS, Arnoldi, Array, Product, complement, host_matrix, norm_bound

# Steps of Arnoldi after which it is looked whether they are enough, doubled until they are the most.
FIRST_STEPS = 150
MOST_STEPS = 1200
# Vectors of length k that are free beside the memory for factors (`KRYLOV_VECTORS` of
# `stiffcore.solvers.projection`, of which others have some).
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
# Points of the boundary for the resolvent of T, so many at once, and those of a small disc.
POINTS = 4000
POINTS_AT_ONCE = 250
AROUND_POINTS = 200
# Columns that are multiplied at once.
COLUMNS = 32
# Ellipses that are tried: centres between both ends, and how tall, relative to how wide.
CENTRES = np.linspace(0.05, 0.95, 37)
HEIGHTS = np.geomspace(0.05, 200, 50)
# A dense matrix of this order at most is solved whole, where all else fails. Squares of smaller norms than this, and of
# larger than its inverse, vanish or overflow.
MOST_WHOLE = 3000
WHOLE_BYTES = 96
# Of this order at once, and of this one rather than by more than the usual number of powers.
QUICK_WHOLE = 250
CHEAP_WHOLE = 1000
LEAST_NORM = 1e-140
# Times that a disc around an eigenvalue is made four times as wide.
WIDER = 10


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
    for space, done in _growing(a.apply, a.k, memory_bytes, rng):
        values, residuals = space.ritz()
        scale = float(np.abs(values).max(initial=0.0))
        found, counted = _smallest(residuals, FOUND * scale), region.has(values)
        sure = int((counted & (residuals <= ROUGH * scale)).sum())
        missing = bool((counted & ~found).any())
        if missing and sure > CROWD and (sure > CROWD_SHARE * space.size or done):
            return Deflated(None, 0.0, f"some {sure} are seen there already: needs the spectrum")
        if not missing:
            ellipse, rate = region.ellipse(values[~found], scale)
            if powers_needed(rate, a.k) <= MOST_POWERS:
                break
        if done:
            return None
    basis = space.schur_vectors(values, found)
    del space
    size = norm_from_above(lambda x: a.transposed(a.apply(x)), a.k, rng)
    enclosure = _enclosed(a, Inner.of(a, basis, size), ellipse, rate, MOST_POWERS, rng)
    return None if enclosure is None else enclosure.count(region)


def enclosures_of(a: sp.csc_array | LinearOperator, memory_bytes: int | None) -> "tuple[Enclosure, ...]":
    """Find the outermost eigenvalues, and what holds all others: an ellipse between both ends, or one beside each.

    Where there is none, and the order allows for it, everything is found, densely.

    Args:
        a: (k, k), sparse, or with products by it and its transpose.
        memory_bytes: as for `count_beyond`.

    Returns:
        Any of them holds all eigenvalues; none where nothing was proved.
    """
    k, host = a.shape[0], host_matrix(a)
    found: tuple[Enclosure, ...] = ()
    if host is not None and not LEAST_NORM < norm_bound(host) < 1 / LEAST_NORM:
        return found
    whole = host is not None and k <= MOST_WHOLE
    whole &= memory_bytes is None or WHOLE_BYTES * k * k <= memory_bytes
    if whole and k <= QUICK_WHOLE:
        found = _whole(host)
    if not found and k > DENSE_ORDER:
        with suppress(np.linalg.LinAlgError):
            operator = Operator.of(a, np.random.default_rng(0))
            if whole and k <= CHEAP_WHOLE:
                operator = replace(operator, affordable=MOST_POWERS)
            found = _enclosures(operator, memory_bytes, np.random.default_rng(2))
    if all(any(enclosure.holds(sign) for enclosure in found) for sign in (1, -1)):
        return found
    return (_whole(host) if whole and k > QUICK_WHOLE else ()) or found


def _whole(a: sp.csc_array) -> "tuple[Enclosure, ...]":
    with suppress(np.linalg.LinAlgError):
        return (Enclosure(Inner.whole(a.toarray()), None, None),)
    return ()


def left_vectors(values: Array, transposed: Product, k: int, memory_bytes: int | None, scale: float) -> Array:
    """Left eigenvectors, (k, m) complex, by Arnoldi with the transpose; nan where none is found.

    Args:
        values: (m,) complex, outermost eigenvalues.
        transposed: the product with the transpose.
        k: the order.
        memory_bytes: as for `count_beyond`.
        scale: the largest eigenvalue's modulus.
    """
    for space, _ in _growing(transposed, k, memory_bytes, np.random.default_rng(3)):
        left, off = space.vectors(values)
        good = off <= 10 * FOUND * scale
        if good.all():
            break
    return np.where(good, left, np.nan).conj()


def _enclosures(a: Operator, memory_bytes: int | None, rng: np.random.Generator) -> "tuple[Enclosure, ...]":
    for space, done in _growing(a.apply, a.k, memory_bytes, rng):
        values, residuals = space.ritz()
        found = _smallest(residuals, FOUND * float(np.abs(values).max(initial=0.0)))
        tried = [_between(values, found)]
        needed = powers_needed(tried[0][1], a.k)
        if needed <= POWERS_SHARE * space.size:
            break
        if done:
            if needed > a.affordable:
                tried = [_beside(values, found, sign) for sign in (1, -1)]
                if all(powers_needed(rate, a.k) > a.affordable for _, rate in tried):
                    return ()
            break
    basis = space.schur_vectors(values, found)
    del space
    size = norm_from_above(lambda x: a.transposed(a.apply(x)), a.k, rng)
    inner, most = Inner.of(a, basis, size), max(MOST_POWERS, a.affordable)
    if basis.shape[1] == a.k:
        return (Enclosure(inner, None, None),)
    proved = [_enclosed(a, inner, ellipse, rate, most, rng) for ellipse, rate in tried]
    return tuple(enclosure for enclosure in proved if enclosure is not None)


def _lowest(values: Array, found: Array) -> float:
    """Where an ellipse of all values that were not found may begin, from the left; nan where that is no end."""
    real, others = np.unique(values[found].real), values[~found].real
    if not len(real) or (len(others) and not real[0] < others.min()):
        return math.nan
    # right of the second eigenvalue, or the third, where that leaves as much room: a line fits between them
    half = (real[0] + others.min()) / 2 if len(others) else -math.inf
    fitting = [x for x in real[1:3] if x < half]
    # else between the first and what is next, so that a line and a disc fit beside the first
    return float(fitting[-1] if fitting else (real[0] + min([*real[1:2], half])) / 2 if len(others) else real[0])


def _between(values: Array, found: Array) -> tuple[Ellipse, float]:
    """An ellipse inside of both ends of the values found, that holds all others with most room, and its level."""
    low, high = _lowest(values, found), -_lowest(-values, found)
    if not low < high:  # nor where one is nan
        return Ellipse(0.0, 1.0, 1.0), math.inf
    halves = [(low + share * (high - low), min(share, 1 - share) * (high - low)) for share in CENTRES]
    return roomiest([Ellipse(s, half, half * aspect) for s, half in halves for aspect in HEIGHTS], values[~found])


def _beside(values: Array, found: Array, sign: int) -> tuple[Ellipse, float]:
    """The same, beside the left end (1) or the right one (-1) alone."""
    low = _lowest(sign * values, found)
    if math.isnan(low):
        return Ellipse(0.0, 1.0, 1.0), math.inf
    ellipse, rate = ellipse_right_of(low, sign * values[~found])
    return Ellipse(sign * ellipse.centre, ellipse.along, ellipse.across), rate


def _enclosed(
    a: Operator, inner: "Inner", ellipse: Ellipse, rate: float, most: int, rng: np.random.Generator
) -> "Enclosure | None":
    q = inner.q
    off = 4 * inner.tilt + 2 * a.k * math.sqrt(q.shape[1]) * EPS
    found = decay(a, ellipse, rng, min(rate, 1 - EPS), most, partial(complement, q=q), off)
    return None if found is None else Enclosure(inner, ellipse, found)


def _growing(
    apply: Product, k: int, memory_bytes: int | None, rng: np.random.Generator
) -> Iterator[tuple[Arnoldi, bool]]:
    """A Krylov space, at each look twice as large as at the one before, and whether it grows no more."""
    most = _steps(k, memory_bytes)
    space, steps, done = Arnoldi(apply, k, most, rng), FIRST_STEPS, False
    while not done:
        space.extend(min(steps, most))
        done = space.size == most or space.exhausted
        yield space, done
        steps *= 2


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
        skew: |X| |X^-1|, rounded up: |(T - z)^-1| is at most that over the distance to the nearest value, too.
        residual: an upper bound of |R|, with all roundings.
        unsolved: an upper bound of |T - X L X^-1|.
        tilt: an upper bound of |Q - Q'|, Q' orthonormal exactly; long sums are off by sqrt(k) eps (Higham & Mary 2019).
        size: an upper bound of |A|.
    """

    q: Array
    values: Array
    vectors: Array
    conditions: Array
    skew: float
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
            return cls(q, np.zeros(0), np.zeros((0, 0)), np.zeros(0), 1.0, 0.0, 0.0, 0.0, size)
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
        values, vectors, conditions, skew, unsolved = _solved(t, small)
        return cls(q, values, vectors, conditions, skew, residual, unsolved, tilt, size)

    @classmethod
    def whole(cls, a: Array) -> "Inner":
        """Of all of a dense (k, k) matrix.

        Raises:
            LinAlgError: as `of`.
        """
        values, vectors, conditions, skew, unsolved = _solved(a, 0.0)
        nothing, size = np.zeros((len(a), 0)), float(np.linalg.norm(a))
        return cls(nothing, values, vectors, conditions, skew, 0.0, unsolved, 0.0, size)

    def resolvent(self, region: Region | Around, points: int = POINTS) -> float:
        """An upper bound of |(T - z)^-1| over the boundary, from so many of its points."""
        reach = 2 * float(np.abs(self.values).max(initial=0.0))
        if reach == 0:
            least = float(region.distance(self.values).min(initial=math.inf))
            return float(self.conditions.sum()) / least if least else math.inf
        length, point = region.boundary(reach)
        half = length / points / 2
        nearest = region.distance(self.values)
        most = float(self.conditions.sum()) / (reach / 2)  # beyond the reach
        middles = point(half * (2 * np.arange(points) + 1))
        for start in range(0, points, POINTS_AT_ONCE):
            z = middles[start : start + POINTS_AT_ONCE, None]
            with np.errstate(divide="ignore"):
                away = np.maximum(np.abs(self.values - z) - half, nearest)
                bounds = np.minimum(1 / away @ self.conditions, self.skew / away.min(axis=1))
            most = max(most, float(bounds.max()))
        return most


def _solved(t: Array, rounding: float) -> tuple[Array, Array, Array, float, float]:
    """Values, vectors, conditions, skew, and an upper bound of |T - X L X^-1|, `rounding` of T in it; see `Inner`."""
    p = len(t)
    values, vectors = np.linalg.eig(t)
    inverse = np.linalg.inv(vectors)
    skew = 1.01 * float(np.linalg.norm(vectors, 2) * np.linalg.norm(inverse, 2))
    if not skew * p * EPS < 1e-3:  # or the inverse is off by more than a hundredth
        raise np.linalg.LinAlgError("its eigenvectors are no basis")
    product = (p + 4) * EPS * (float(np.linalg.norm(t)) + float(np.abs(values).max())) * math.sqrt(p)
    left = float(np.linalg.norm(t @ vectors - vectors * values)) + product + rounding
    unsolved = 1.01 * left * float(np.linalg.norm(inverse, 2))
    conditions = 1.01 * np.linalg.norm(vectors, axis=0) * np.linalg.norm(inverse, axis=1)
    return values, vectors, conditions, skew, unsolved


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

    def light(self) -> "Enclosure":
        """Without vectors, which counts do not need."""
        inner = replace(self.inner, q=self.inner.q[:, :0], vectors=np.zeros((0, 0)))
        return replace(self, inner=inner)

    def negative(self) -> "Enclosure":
        """Of -A."""
        ellipse = self.ellipse and replace(self.ellipse, centre=-self.ellipse.centre)
        return replace(self, inner=replace(self.inner, values=-self.inner.values), ellipse=ellipse)

    def edge(self, sign: int) -> float:
        """The left end of the ellipse (1), or the negative of the right one (-1); inf where there is none."""
        return math.inf if self.ellipse is None else sign * self.ellipse.centre - self.ellipse.along

    def holds(self, sign: int) -> bool:
        """Whether it says how far out the left end (1), or the right one (-1), is."""
        return self.ellipse is None or bool((sign * self.inner.values.real < self.edge(sign)).any())

    def pairs(self, which: Array) -> tuple[Array, Array]:
        """(m,) of the eigenvalues found, by their indices, and their right eigenvectors (k, m)."""
        return self.inner.values[which], self.inner.q @ self.inner.vectors[:, which]

    def radius(self, shift: float) -> float:
        """The largest |lambda + shift|; nan where it may be inside of the ellipse."""
        found = float(np.abs(self.inner.values + shift).max(initial=0.0))
        if self.ellipse is None:
            return found
        reach = math.hypot(abs(self.ellipse.centre + shift) + self.ellipse.along, self.ellipse.across)
        return found if found >= reach else math.nan

    def discs(self, value: complex, rounding: float) -> tuple[tuple[float, float], ...]:
        """Discs around a number that hold one eigenvalue exactly: radii and margins, from the smallest on.

        A matrix nearer than the margin, in the 2-norm, has one there, too. Margins are above `rounding`.
        """
        t, found = self.inner, []
        if not len(t.values):
            return ()
        condition = float(t.conditions[np.abs(t.values - value).argmin()])
        radius = 2 * condition * (rounding + 2 * t.residual + t.unsolved) + float(np.abs(t.values - value).min())
        for _ in range(WIDER):
            counted = self.count(Around(value, radius), AROUND_POINTS) if 0 < radius < math.inf else None
            if counted is not None and counted.count == 1 and counted.margin > rounding:
                found.append((radius, counted.margin))
            elif found or (counted is not None and counted.count != 1):
                break
            radius *= 4
        return tuple(found)

    def count(self, region: Region | Around, points: int = POINTS) -> Deflated | None:
        """The count, where the ellipse is beside the region and no eigenvalue meets the boundary."""
        t, outer = self.inner, 0.0
        if self.ellipse is not None and self.decay is not None:
            level = region.level(self.ellipse)
            if level < 1:
                return None
            outer = self.decay.resolvent(level)
        inner = t.resolvent(region, points)
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
