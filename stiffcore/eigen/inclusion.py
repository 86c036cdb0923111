"""Where the eigenvalues of a dense matrix lie, and those of every matrix within a given distance of it.

Nothing here is to first order, and nothing rests on LAPACK's backward stability: what LAPACK computes (eigenvectors,
Schur forms) is taken as a change of basis whose residual is measured, with the rounding of the measurement.

Let A be the matrix, balanced, and E any matrix with |E| <= eps. With the well-conditioned eigenvectors X (right) and Y
(left), Y^H X = I, and an orthonormal basis N of the complement of Y, A + E is similar to

    ( L + Y^H (R + E X)        Y^H (A + E) N      )
    ( N^H P (R + E X)     C + N^H P E N - ...     )      R = A X - X L,  P = I - X Y^H,  C = N^H A N.

Where the smallest singular value of C - l I, over all l in L, is large beside the blocks off the diagonal, both parts
come apart exactly (Stewart, SIAM Review 15 (1973), theorem 4.11): the eigenvalues are those of L + F1 and of C + F2,
with bounds of the rows of F1 and of |F2|. The first are in Gershgorin's discs around L, as many in each connected
component as it has discs. The second, the *rest*, is what is far from normal: Elsner's theorem says how far its
eigenvalues move (Linear Algebra Appl. 71 (1985)), and discs in which no matrix so near has an eigenvalue say which
lines and circles they do not cross (`stiffcore.eigen.pseudospectra`).
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.linalg
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from stiffcore.eigen.pseudospectra import clear_boundary
from stiffcore.eigen.regions import LeftOf, Region
from stiffcore.eigen.sparse import EPS, Array

FULL_ORDER = 400
"""Up to this order a whole spectrum is located: some 60 k^3 operations, five times those of its eigenvalues."""

MOST_ORDER = 1_500
"""Up to this one, where nothing cheaper says what the signs are."""

# Radii of discs that are worth having, relative to the norm, and conditions of eigenvalues that are told from the rest.
_USEFUL = 1e-4
_MODERATE = 1e4
# How much larger a gap's square must be than the coupling across it, where four times is enough.
_ROOM = 100
# Times that those which do not come apart from the rest are left to it.
_SELECTIONS = 3
# Entries of the rest's order cubed, times eigenvalues beside it, for which singular values are computed.
_MOST_SEPARATED = 2e9
# Discs for the lines that are tried, each four times nearer to an end of the rest than the one before.
_FEW_DISCS = 120


@dataclass(frozen=True)
class Rest:
    """The part of a matrix that is far from normal, or that has no basis of eigenvectors.

    Attributes:
        t: (q, q) complex, upper triangular: a Schur form.
        distance: the eigenvalues in question are those of T + F, |F| <= distance.
    """

    t: Array
    distance: float

    @property
    def values(self) -> Array:
        """(q,) complex, the eigenvalues of T."""
        return np.diagonal(self.t)

    @cached_property
    def reach(self) -> float:
        """How far from the nearest eigenvalue of T one of T + F may be, and the reverse (Elsner 1985)."""
        q = len(self.t)
        if not math.isfinite(self.distance):
            return math.inf
        size = float(np.linalg.norm(self.t, 2)) * (1 + 1e-10)
        return (2 * size + self.distance) ** (1 - 1 / q) * self.distance ** (1 / q)

    def keeps(self, region: Region) -> bool:
        """Whether no eigenvalue of T + F can be on another side of the region's boundary than that of T is."""
        if (region.distance(self.values) > self.reach).all():
            return True
        return math.isfinite(self.distance) and clear_boundary(self.t, region, self.distance) > 0

    def rightmost(self) -> tuple[float, float]:
        """Between which numbers the largest real part of T + F lies."""
        end = float(self.values.real.max())
        if not math.isfinite(self.reach):
            return -math.inf, math.inf
        return end - self._nearest_line(end, -1), end + self._nearest_line(end, 1)

    def _nearest_line(self, end: float, side: int) -> float:
        """How far beside an end there is a line that no eigenvalue crosses."""
        away, left = self.reach, _FEW_DISCS
        while left > 0 and away > self.distance:
            used = clear_boundary(self.t, LeftOf(end + side * away / 4), self.distance, left)
            if not used:
                break
            away, left = away / 4, left - used
        return away

    def turned(self) -> "Rest":
        """Of -A."""
        return Rest(-self.t, self.distance)


@dataclass(frozen=True)
class Inclusion:
    """Where the k eigenvalues of every matrix near enough to A are.

    Attributes:
        values: (p,) complex, the centres of discs.
        radii: (p,) each connected component of the discs holds as many eigenvalues as it has discs.
        own: (p,) radius of a smaller disc with one eigenvalue exactly; inf where it is not apart from the others.
        component: (p,) int, the component of each disc.
        rest: where the other k - p are; None where p = k.
    """

    values: Array
    radii: Array
    own: Array
    component: Array
    rest: Rest | None

    def _components(self) -> list[Array]:
        """The discs of each component."""
        order = np.argsort(self.component, kind="stable")
        return np.split(order, np.cumsum(np.bincount(self.component))[:-1]) if len(order) else []

    def error(self, value: complex) -> float:
        """How far a number is, at most, from the nearest eigenvalue."""
        away = np.abs(self.values - value)
        best = float((away + self.own).min(initial=math.inf))
        if len(away):
            farthest = np.full(int(self.component.max()) + 1, -math.inf)
            np.maximum.at(farthest, self.component, away + self.radii)
            best = min(best, float(farthest.min()))
        if self.rest is not None:
            best = min(best, float(np.abs(self.rest.values - value).min()) + self.rest.reach)
        return best * (1 + 4 * EPS)

    def counted(self, region: Region) -> tuple[int, int]:
        """How many eigenvalues are on the counted side, at least and at most."""
        low = high = 0
        inside, away = region.has(self.values), region.distance(self.values)
        for here in self._components():
            alone = np.isfinite(self.own[here])
            inner, sure = inside[here], away[here] > self.radii[here]
            if sure.all() and inner.all() == inner.any():
                low, high = low + int(inner.sum()), high + int(inner.sum())
                continue
            # one that is apart has an eigenvalue of its own, whatever the others do
            sure = alone & (away[here] > self.own[here])
            low += int((sure & inner).sum())
            high += len(here) - int((sure & ~inner).sum())
        if self.rest is not None:
            found = int(region.has(self.rest.values).sum())
            kept = self.rest.keeps(region)
            low, high = low + (found if kept else 0), high + (found if kept else len(self.rest.t))
        return low, high

    def rightmost(self) -> tuple[float, float]:
        """Between which numbers the largest real part lies."""
        low = high = -math.inf
        for here in self._components():
            real, own, radii = self.values[here].real, self.own[here], self.radii[here]
            high = max(high, float((real + (own if np.isfinite(own).all() else radii)).max()))
            low = max(low, float((real - own).max()), float((real - radii).min()))
        if self.rest is not None:
            rest = self.rest.rightmost()
            low, high = max(low, rest[0]), max(high, rest[1])
        return low, high

    def leftmost(self) -> tuple[float, float]:
        """Between which numbers the smallest real part lies."""
        rest = None if self.rest is None else self.rest.turned()
        low, high = Inclusion(-self.values, self.radii, self.own, self.component, rest).rightmost()
        return -high, -low


def inclusion(a: Array, distance: float) -> Inclusion:
    """Locate the eigenvalues of all A + E, |E| <= distance in the 2-norm.

    The matrix is balanced first, by powers of two, exactly; in that basis E is larger by the largest ratio of them.

    Args:
        a: (k, k) real, dense, k at least 1.
        distance: at least 0.

    Returns:
        Discs and the rest; where nothing can be said, the rest is everything, at distance inf.
    """
    a = np.asarray(a, np.float64)
    size = float(np.abs(a).max())
    if size == 0:
        nothing, radii = np.zeros(len(a)), np.full(len(a), distance)
        own = radii if len(a) == 1 else np.full(len(a), math.inf)
        return Inclusion(nothing.astype(complex), radii, own, np.zeros(len(a), int), None)
    if not 1e-140 < size < 1e140:  # squares vanish or overflow
        scaled = 2.0 ** -math.frexp(size)[1]
        return _scaled(inclusion(a * scaled, distance * scaled), 1 / scaled)
    balanced, (scale, _) = scipy.linalg.matrix_balance(a, separate=True)
    distance = float(distance * (scale.max() / scale.min()))
    if not math.isfinite(distance):
        return Inclusion(*_NOTHING, _rest(balanced, math.inf))
    try:
        values, left, right = scipy.linalg.eig(balanced, left=True)
        return _with_basis(balanced, distance, values, left, right)
    except (np.linalg.LinAlgError, ValueError):  # no convergence, or no finite basis
        return Inclusion(*_NOTHING, _rest(balanced, distance))


def inclusion_bytes(k: int) -> int:
    """Peak memory of `inclusion`: 140 k^2 bytes and 1 MiB.

    Eight complex matrices (left and right eigenvectors, the basis, residuals and what they are made of) and a real one;
    measured 108 to 126 k^2.
    """
    return 140 * k * k + (1 << 20)


_NOTHING = (np.zeros(0, complex), np.zeros(0), np.zeros(0), np.zeros(0, int))


def _scaled(found: Inclusion, factor: float) -> Inclusion:
    rest = found.rest and Rest(found.rest.t * factor, found.rest.distance * factor)
    return Inclusion(found.values * factor, found.radii * factor, found.own * factor, found.component, rest)


def _with_basis(a: Array, distance: float, values: Array, left: Array, right: Array) -> Inclusion:
    """With as many eigenvectors as give useful discs."""
    k, size = len(a), float(np.linalg.norm(a))
    with np.errstate(divide="ignore"):
        conditions = 1 / np.abs((left.conj() * right).sum(axis=0))
    # members of a pair have the same, but for rounding
    conditions = np.maximum(conditions, conditions[_conjugates(values)])
    useful = _USEFUL / (k * (distance / size + k * EPS))
    if conditions.max() <= useful:
        found = _apart(a, distance, values, left, right)
        if found is not None and found.radii.max() <= _USEFUL * size:
            return found
    chosen = conditions <= min(_MODERATE, useful)
    for _ in range(_SELECTIONS):
        if chosen.all() or not chosen.any():
            break
        apart = np.zeros(int(chosen.sum()), bool)
        found = _apart(a, distance, values[chosen], left[:, chosen], right[:, chosen], apart)
        if found is not None:
            return found
        chosen[chosen] = apart
    return Inclusion(*_NOTHING, _rest(a, distance))


def _conjugates(values: Array) -> Array:
    """The place of each value's conjugate."""
    index = np.arange(len(values))
    upper = np.flatnonzero(values.imag > 0)  # LAPACK has the other one next
    index[upper], index[upper + 1] = upper + 1, upper
    return index


def _apart(
    a: Array, distance: float, values: Array, left: Array, right: Array, apart: Array | None = None
) -> Inclusion | None:
    """Discs around these values, and the rest; None where these vectors do not come apart from it, or are no basis.

    `apart`, of these values, is then set to those that may do so without the others.
    """
    k, p = right.shape
    size = float(np.linalg.norm(a))
    off = (k / 2 + 6) * EPS * size  # of A x - l x, relative to |x|: sums of k real products, at half of EPS each
    y = left @ np.linalg.inv(left.conj().T @ right).conj().T
    y = y @ (2 * np.eye(p) - right.conj().T @ y)  # once more: what it misses Y^H X = I by is squared
    lengths, spread = np.linalg.norm(y, axis=0), float(np.linalg.norm(right, 2))
    # rows of the first block column, and of Y^H X - I
    residual = y.conj().T @ (a @ right - right * values)
    diagonal = np.abs(np.diagonal(residual)) + lengths * (distance + off)
    rows = np.abs(residual).sum(axis=1) + lengths * (math.sqrt(p) * spread * distance + p * off)
    missed = np.abs(y.conj().T @ right - np.eye(p)).sum(axis=1) + 2 * k * p * EPS * lengths
    worst = float(missed.max())
    if not worst < 0.1:
        return None
    rest, coupled, most = None, np.zeros(p), float(rows.max())
    if p < k:
        missed = missed + lengths * k * EPS * spread
        basis = scipy.linalg.qr(np.hstack([y.real, y.imag]), pivoting=True)[0][:, p:]
        beside = np.linalg.norm(y.conj().T @ (a @ basis), axis=1) + lengths * (distance + off) + missed * size
        projector = 1 + spread * float(np.linalg.norm(y, 2))
        below = projector * (float(np.linalg.norm(a @ right - right * values)) + math.sqrt(p) * (distance + off))
        across = float(np.linalg.norm(beside))
        rest = _rest(basis.T @ a @ basis, projector * (distance + off) + spread * (across + worst * size))
        gaps = _separations(rest, values) - rest.distance - most
        gap = float(gaps.min())
        if not (gap > 0 and 4 * below * across < gap**2):
            if apart is not None:
                apart[:] = (gaps > 0) & (gaps**2 > _ROOM * below * across)
            return None
        rest = Rest(rest.t, rest.distance + 2 * below * across / gap)
        coupled = math.sqrt(p) * beside * 2 * below / gap
        most = max(most, below)
    slack = missed * most / (1 - worst) + coupled
    radii = (rows + slack) * (1 + 1e-6)
    if not np.isfinite(radii).all():
        return None
    away = np.abs(values[:, None] - values[None, :])
    touching = csr_array(away <= radii[:, None] + radii[None, :])
    component = connected_components(touching, directed=False)[1]
    entries = np.abs(residual) + (lengths * (distance + off) + slack)[:, None]
    own = _own(away, radii, diagonal + slack, entries)
    own = np.where(np.bincount(component)[component] == 1, np.minimum(own, radii), own)
    return Inclusion(values, radii, own, component, rest)


def _own(away: Array, radii: Array, alone: Array, entries: Array) -> Array:
    """Radii of Gershgorin's discs after a diagonal scaling that makes one of them small (Wilkinson 1965, section 2.14).

    Row i is multiplied by t < 1 and column i divided by it: its radius falls to |F_ii| + t sum |F_ij|, and that of row
    j grows by |F_ji| / t, with the largest t that keeps it from the disc of i.
    """
    p = len(radii)
    own = np.full(p, math.inf)
    for i in range(p):
        others = np.arange(p) != i
        room = float((away[i] - radii)[others].min(initial=math.inf))
        if not room > 0:
            continue
        t = 2 * float(entries[others, i].max(initial=0.0)) / room if math.isfinite(room) else 0.0
        radius = (alone[i] + t * radii[i]) * (1 + 1e-6)
        if t < 1 and radius < room / 2:
            own[i] = radius
    return own


def _rest(a: Array, distance: float) -> Rest:
    """The Schur form of a real matrix, what it misses added to the distance."""
    t, z = scipy.linalg.schur(a.astype(complex), output="complex")
    t = np.triu(t)
    q, size = len(a), float(np.linalg.norm(a))
    tilted = float(np.linalg.norm(z.conj().T @ z - np.eye(q))) + q * EPS * math.sqrt(q)
    missed = float(np.linalg.norm(a @ z - z @ t)) + 2 * q * EPS * size
    # A = Z T Z^-1 + M Z^-1: of Z = U S, S within `tilted` of I, U^H A U = S T S^-1 + ...
    missed = (missed + 2 * tilted * size) * (1 + 2 * tilted)
    return Rest(t, distance + missed if math.isfinite(distance) else math.inf)


def _separations(rest: Rest, values: Array) -> Array:
    """Lower bounds of the smallest singular value of T - l I; the least is sep(L, T), L the diagonal matrix of all."""
    q, found = len(rest.t), np.zeros(len(values))
    if len(values) * float(q) ** 3 > _MOST_SEPARATED:
        return found
    eye, rounding = np.eye(q), 4 * q * EPS * float(np.linalg.norm(rest.t))
    for i, value in enumerate(values):
        if value.imag >= 0:
            found[i] = float(scipy.linalg.svdvals(rest.t - value * eye)[-1]) - rounding
        else:
            found[i] = found[i - 1]  # LAPACK has a conjugate after its own
    return found
