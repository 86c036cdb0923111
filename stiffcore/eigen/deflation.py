"""How many eigenvalues of a real matrix are beyond a line or a circle, by products alone, where they are some hundreds.

Arnoldi's method finds those furthest out. Let Q (k, p) be an orthonormal basis of what it found, A Q = Q T + R, and C
the compression of A to the complement of Q. A' = A - R Q^T is block triangular, with T and C on the diagonal. T, which
is small, is solved densely: T = X L X^-1. Powers prove that C has nothing on the counted side: where B = (C - s) / r,
for a circle about s of radius r in which everything else is to lie, and |B^m| < 1, then beyond that circle

    |(C - z)^-1| <= (|I| + |B| + ... + |B^(m-1)|) / (1 - |B^m|) / r.

With |(T - z)^-1| <= sum of c_i / |l_i - z|, c_i the condition numbers of T's eigenvalues l_i, this bounds the
resolvent of A' on the boundary. As long as that times |R| is under 1, no eigenvalue meets the boundary on the way from
A' to A, so that A has as many on the counted side as T.

The norms of powers are bounded from `PROBES` random vectors, which go through all powers together: for a Gaussian x,
|B x| >= t |B| fails with a probability of at most sqrt(2 / pi) t, and for all of them with its power `PROBES`.
"""

import math
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from stiffcore.eigen.powers import Operator, norm_from_above
from stiffcore.eigen.regions import Region
from stiffcore.eigen.sparse import EPS, FAILURE, Arnoldi, Array, complement

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
PROBES = 24
# Powers of the compression before it is given up, and the norm that is enough.
MOST_POWERS = 600
ENOUGH = 0.3
# Powers after which their rate is looked at.
LOOKED_AT = 50
# Points of the boundary for the resolvent of T.
POINTS = 4000
# Columns that are multiplied at once.
COLUMNS = 32


@dataclass(frozen=True)
class Deflated:
    """What came of it.

    Attributes:
        count: of eigenvalues on the counted side; None where there are too many.
        margin: no eigenvalue is nearer to the boundary; 0 without a count.
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
            centre, radius, rate = region.circle(values[~found], scale)
            if _powers_needed(rate, math.sqrt(a.k)) <= MOST_POWERS:
                break
        if done:
            return None
        steps *= 2
    basis = space.schur_vectors(values, found)
    del space
    size = norm_from_above(lambda x: a.transposed(a.apply(x)), a.k, rng)
    return _Inner.of(a, basis, size).counted(a, region, centre, radius, rng)


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


def _powers_needed(rate: float, norm: float) -> float:
    """Until a norm that falls at a rate is small enough."""
    if rate <= 0:
        return 1
    return math.log(_overlooked() * norm / ENOUGH) / -math.log(rate) if rate < 1 else math.inf


def _overlooked() -> float:
    """What the norm of any power may be larger by than what the longest of `PROBES` random vectors shows."""
    return math.sqrt(2 / math.pi) / (FAILURE / MOST_POWERS) ** (1 / PROBES)


@dataclass(frozen=True)
class _Inner:
    """A nearly invariant space, solved.

    Attributes:
        q: (k, p), orthonormal.
        values: (p,) complex, the eigenvalues of T.
        conditions: (p,), theirs, rounded up.
        residual: an upper bound of |R|, with all roundings.
        unsolved: an upper bound of |T - X L X^-1|.
        tilt: an upper bound of |Q - Q'|, Q' orthonormal exactly; long sums are off by sqrt(k) eps (Higham & Mary 2019).
        size: an upper bound of |A|.
    """

    q: Array
    values: Array
    conditions: Array
    residual: float
    unsolved: float
    tilt: float
    size: float

    @classmethod
    def of(cls, a: Operator, basis: Array, size: float) -> "_Inner":
        if basis.shape[1]:
            basis, _ = scipy.linalg.qr(basis, mode="economic", overwrite_a=True)
        q = basis
        p = q.shape[1]
        if p == 0:
            return cls(q, np.zeros(0), np.zeros(0), 0.0, 0.0, 0.0, size)
        t, square = np.zeros((p, p)), 0.0
        for start in range(0, p, COLUMNS):
            at = slice(start, start + COLUMNS)
            aq = a.apply(np.ascontiguousarray(q[:, at]))
            t[:, at] = q.T @ aq
            square += float(np.linalg.norm(aq - q @ t[:, at]) ** 2)
        values, vectors = np.linalg.eig(t)
        if not np.linalg.cond(vectors) * p * EPS < 1e-3:
            raise np.linalg.LinAlgError("its eigenvectors are no basis")
        inverse = np.linalg.inv(vectors)
        # of sums of p products, whose factors have norms of sqrt(p) and of T
        small = (p + 4) * math.sqrt(p) * EPS * float(np.linalg.norm(t))
        tilt = float(np.linalg.norm(q.T @ q - np.eye(p))) + p * math.sqrt(a.k) * EPS
        residual = math.sqrt(square) + a.rounding * a.norm * math.sqrt(p) + small + 2 * tilt * size
        inverse *= 1.01  # by far more than it is off
        unsolved = (float(np.linalg.norm(t @ vectors - vectors * values)) + small) * float(np.linalg.norm(inverse, 2))
        conditions = np.linalg.norm(vectors, axis=0) * np.linalg.norm(inverse, axis=1)
        return cls(q, values, conditions, residual, unsolved, tilt, size)

    def counted(
        self, a: Operator, region: Region, centre: float, radius: float, rng: np.random.Generator
    ) -> Deflated | None:
        """The count, where powers prove that all else lies in the circle, and no eigenvalue meets the boundary."""
        powers = self._powers(a, centre, radius, rng)
        if powers is None:
            return None
        outer, power = powers
        inner = self._resolvent(region)
        if not inner * self.unsolved < 1:
            return None
        inner /= 1 - inner * self.unsolved
        # A' - z is block triangular; its corner is at most of the norm of A
        margin = 1 / (inner + outer + self.size * inner * outer) - 2 * self.residual
        margin = min(margin, float(region.distance(self.values).min(initial=np.inf)))
        if not margin > 0:
            return None
        note = f"{len(self.values)} eigenvalues deflated, of the rest the norm of power {power} is under 1"
        return Deflated(int(region.has(self.values).sum()), margin, note)

    def _resolvent(self, region: Region) -> float:
        """An upper bound of |(T - z)^-1| over the boundary."""
        reach = 2 * float(np.abs(self.values).max(initial=0.0))
        if reach == 0:
            least = float(region.distance(self.values).min(initial=math.inf))
            return float(self.conditions.sum()) / least if least else math.inf
        length, point = region.boundary(reach)
        half = length / POINTS / 2
        nearest = region.distance(self.values)
        most = float(self.conditions.sum()) / (reach / 2)  # beyond the reach
        for z in point(half * (2 * np.arange(POINTS) + 1)):
            with np.errstate(divide="ignore"):
                away = np.maximum(np.abs(self.values - z) - half, nearest)
                most = max(most, float((self.conditions / away).sum()))
        return most

    def _powers(self, a: Operator, centre: float, radius: float, rng: np.random.Generator) -> tuple[float, int] | None:
        """An upper bound of |(C - z)^-1| beyond the circle, and the power whose norm shows it."""
        q, factor = self.q, _overlooked()
        # what a step may be off by, relative to what it starts from: its product, its projection, and sums
        longer = max(1.0, (self.size + abs(centre)) / radius)
        off = a.rounding * a.norm / radius + longer * (4 * self.tilt + EPS * (8 + 2 * a.k * math.sqrt(q.shape[1])))
        x = complement(rng.standard_normal((a.k, PROBES)), q)
        seen, bounds = [float(np.linalg.norm(x, axis=0).max())], [1.0]
        with np.errstate(over="ignore", invalid="ignore"):  # where powers grow, that is seen
            while len(bounds) <= MOST_POWERS:
                x = complement((a.apply(x) - centre * x) / radius, q)
                seen.append(float(np.linalg.norm(x, axis=0).max()))
                lost = off * float(np.dot(bounds[::-1], seen[:-1]))
                bounds.append(factor * (seen[-1] + lost))
                if not math.isfinite(bounds[-1]):
                    return None
                if bounds[-1] <= ENOUGH:
                    return sum(bounds[:-1]) / (1 - bounds[-1]) / radius, len(bounds) - 1
                if not seen[-1] > 0:
                    return None
                if len(seen) % LOOKED_AT == 0:
                    rate = (seen[-1] / seen[-LOOKED_AT // 2]) ** (2 / LOOKED_AT)
                    if len(seen) + _powers_needed(rate, seen[-1]) > MOST_POWERS:
                        return None
        return None
