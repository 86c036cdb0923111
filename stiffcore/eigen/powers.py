"""Proofs from powers of a matrix, by products alone: no eigenvalue outside of an ellipse, none left of a line.

Where |B^m| < 1 for some m, every |lambda(B)| < 1, however far from normal B is. With B = I - (A - t I) / c, c > 0,
that puts every eigenvalue of A into the disc of radius c around t + c, which touches the line Re = t from the right.
m = 1 is the test of the norm; a larger m forgets the transient growth that the numerical range sees.

A tall spectrum has no such disc of a useful size. The Faber polynomials F_m of an ellipse do for it what powers do for
a disc: with z = s + w + c / w, the ellipse where |w| <= r,

    F_m(z) = w^m + (c / w)^m,  F_1 = z - s,  F_2 = (z - s) F_1 - 2 c,  F_(m+1) = (z - s) F_m - c F_(m-1).

For c = 0 they are powers. Let q = |c| / r^2 < 1. Outside of the ellipse |F_m| >= r^m (1 - q^m), so where
|F_m(A)| < r^m (1 - q^m) there is no eigenvalue; and as F_m(z) - F_m(A) = (z - A) sum of G_(m-1-j)(z) F_j(A) over
j < m, with |G_i| <= |w|^i (1 + q + ... + q^i) (Chebyshev polynomials of the second kind), there

    |(A - z)^-1| <= sum over j < m of (1 + ... + q^(m-1-j)) f_j / (1 - q^m - f_m) / r,  f_j = |F_j(A)| / r^j.

A matrix within the inverse of that of A has no eigenvalue there, either.
The f_j are bounded from `PROBES` random vectors, which go through all powers together: for a Gaussian x,
|B x| >= t |B| fails with a probability of at most sqrt(2 / pi) t, and for all of them with its power `PROBES`.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import LinearOperator

from stiffcore.eigen.sparse import (
    EPS,
    FAILURE,
    Arnoldi,
    Array,
    Product,
    host_matrix,
    identity,
    lanczos,
    lanczos_error,
    longest_sum,
    norm_bound,
    product,
)

# Arnoldi steps for a picture of where the spectrum lies, Lanczos steps for a proved norm.
HULL_STEPS = 60
PROOF_STEPS = 22
# Of the power before it is given up: products cost as much as a factorisation by then.
MOST_POWER = 160
# Random vectors, and the norm of a power that is enough.
PROBES = 12
ENOUGH = 0.3
# Of entries multiplied for the powers of a tall spectrum, and powers at most.
AFFORDABLE = 1e10
MOST_AFFORDABLE = 40_000
# Powers after which their rate is looked at.
LOOKED_AT = 50
# What products of a function's derivatives may be off by, relative to their norm.
OPERATOR_ROUNDING = 1e-12
# Ellipses that are tried: the right end, relative to that of the spectrum; and how tall, relative to how wide.
REACHES = (1.0, 1.15, 1.4, 1.8, 2.5, 4.0, 8.0)
ASPECTS = (0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 5.0, 8.0, 15.0, 30.0, 60.0, 120.0, 250.0)


@dataclass(frozen=True)
class Ellipse:
    """An ellipse with axes along the real and the imaginary direction.

    Attributes:
        centre: real.
        along: half the axis in the real direction.
        across: half the other one.
    """

    centre: float
    along: float
    across: float

    @property
    def radius(self) -> float:
        """The r of the module's docstring."""
        return (self.along + self.across) / 2

    @property
    def focal(self) -> float:
        """Its c: a quarter of the squared distance of a focus from the centre; negative where it is tall."""
        return (self.along - self.across) * (self.along + self.across) / 4

    def level(self, values: Array) -> Array:
        """|w| / r of values: below 1 inside; at least sqrt(q)."""
        z = np.asarray(values, complex) - self.centre
        root = np.sqrt(z * z - 4 * self.focal)
        return np.maximum(np.abs(z + root), np.abs(z - root)) / 2 / self.radius


def ritz_values(apply: Product, k: int, rng: np.random.Generator) -> Array:
    """Eigenvalues of the Hessenberg matrix of `HULL_STEPS` Arnoldi steps: the spectrum's hull, from inside."""
    space = Arnoldi(apply, k, min(HULL_STEPS, k), rng)
    space.extend(HULL_STEPS)
    return space.ritz()[0]


def norm_from_below(square: Product, k: int, steps: int, rng: np.random.Generator) -> float:
    """The 2-norm of a matrix B, as so many Lanczos steps with B^T B, of order k, find it."""
    return math.sqrt(max(float(lanczos(square, k, steps, np.dtype(float), rng)[-1]), 0.0))


def norm_from_above(square: Product, k: int, rng: np.random.Generator) -> float:
    """An upper bound of it, from `PROOF_STEPS` steps: computed, see `stiffcore.eigen.sparse`."""
    return norm_from_below(square, k, PROOF_STEPS, rng) / math.sqrt(1 - lanczos_error(k, PROOF_STEPS)) * (1 + 1e-6)


def ellipse_right_of(line: float, values: Array) -> tuple[Ellipse, float]:
    """An ellipse that touches a line from the right and holds values with most room.

    Returns:
        The ellipse, and the largest level of a value.
    """
    right = float(values.real.max(initial=line)) - line
    if not right > 0:
        return Ellipse(line + 1.0, 1.0, 1.0), math.inf
    tried = [Ellipse(line + c, c, c * aspect) for c in (reach * right / 2 for reach in REACHES) for aspect in ASPECTS]
    return roomiest(tried, values)


def roomiest(tried: list[Ellipse], values: Array) -> tuple[Ellipse, float]:
    """Of some ellipses the one whose largest level of a value is smallest, and that level."""
    levels = [float(ellipse.level(values).max(initial=0.0)) for ellipse in tried]
    best = int(np.argmin(levels))
    return tried[best], levels[best]


@dataclass(frozen=True)
class Operator:
    """What is multiplied with: A and its transpose, and how exactly.

    Attributes:
        apply: the product with A (real), of one vector or of many.
        transposed: with its transpose.
        k: the order.
        norm: an upper bound of |A|, or an estimate where there is no matrix.
        rounding: what a product may be off by, relative to |A| and the vector's norm.
        ritz: see `ritz_values`.
        affordable: powers that are worth their time, of a spectrum that is tall.
    """

    apply: Product
    transposed: Product
    k: int
    norm: float
    rounding: float
    ritz: Array
    affordable: int = 600

    @classmethod
    def of(cls, a: sp.csc_array | LinearOperator, rng: np.random.Generator) -> "Operator":
        """Of a matrix, or of something that multiplies with one and its transpose."""
        k, host = a.shape[0], host_matrix(a)
        if isinstance(a, LinearOperator):
            apply, transposed = a.dot, a.rmatvec
        else:
            apply, transposed = partial(product, a), partial(product, a.T)
        if host is not None:
            norm, rounding = norm_bound(host), longest_sum(host) * EPS
            affordable = int(min(max(AFFORDABLE / (PROBES * max(host.nnz, 1)), 600), MOST_AFFORDABLE))
        else:
            affordable = 600
            norm = 2 * norm_from_below(lambda x: transposed(apply(x)), k, min(PROOF_STEPS, k), rng)
            rounding = OPERATOR_ROUNDING
        return cls(apply, transposed, k, norm, rounding, ritz_values(apply, k, rng), affordable)

    def negative(self) -> "Operator":
        """Of -A."""
        return replace(
            self,
            apply=lambda x: -self.apply(x),
            transposed=lambda x: -self.transposed(x),
            ritz=-self.ritz,
        )


def powers_needed(rate: float, k: int) -> float:
    """Until a norm that falls at a rate is small enough."""
    if rate <= 0:
        return 1
    return math.log(_overlooked(100) * math.sqrt(k) / ENOUGH) / -math.log(rate) if rate < 1 else math.inf


def _overlooked(power: int) -> float:
    """What a norm may be larger by than what the longest of `PROBES` vectors shows; for all powers with `FAILURE`."""
    return math.sqrt(2 / math.pi) / (0.6 * FAILURE / max(power, 1) ** 2) ** (1 / PROBES)


@dataclass(frozen=True)
class Decay:
    """What the powers of a matrix prove.

    Attributes:
        margin: all eigenvalues keep this distance from the ellipse.
        power: the one whose norm is under 1.
        radius: of the ellipse.
        terms: (power,), the sum in the bound of the resolvent; see the module.
        least: what it is divided by.
    """

    margin: float
    power: int
    radius: float
    terms: Array
    least: float

    def resolvent(self, level: float = 1.0) -> float:
        """An upper bound of |(A - z)^-1| where the level is at least so large, from 1 on."""
        with np.errstate(under="ignore"):
            weights = level ** -np.arange(1.0, self.power + 1)
        return float(self.terms @ weights) / self.least / self.radius * (1 + 1e-6)

    @property
    def tolerated(self) -> float:
        """A matrix within this distance of A, in the 2-norm, has no eigenvalue on the ellipse or outside of it."""
        return 1 / self.resolvent()


def margin_right_of(a: Operator, line: float, rng: np.random.Generator) -> Decay | None:
    """Prove that all eigenvalues are right of a line; see `decay`."""
    ellipse, rate = ellipse_right_of(line, a.ritz)
    return decay(a, ellipse, rng, rate, MOST_POWER)


def margin_inside(a: Operator, centre: float, radius: float, rng: np.random.Generator) -> Decay | None:
    """Prove that all eigenvalues are inside of a circle; see `decay`."""
    ellipse = Ellipse(centre, radius, radius)
    return decay(a, ellipse, rng, float(ellipse.level(a.ritz).max(initial=0.0)), MOST_POWER)


def decay(
    a: Operator,
    ellipse: Ellipse,
    rng: np.random.Generator,
    rate: float,
    most: int,
    project: Product = identity,
    off: float = 0.0,
) -> Decay | None:
    """Prove that every eigenvalue lies within an ellipse, by the norms of its Faber polynomials.

    Args:
        a: what is multiplied with.
        ellipse: where.
        rng: draws the vectors.
        rate: the level where the spectrum is guessed to end; nothing is tried from 1 on, or where it takes too many
            powers.
        most: powers before it is given up.
        project: an orthogonal projector P; then it is of P A P on the range of P.
        off: what a projection may be off by, relative to what it is of.

    Returns:
        What was proved: a computed bound, see `stiffcore.eigen.sparse`. None where nothing was.
    """
    needed = powers_needed(rate, a.k)
    if needed > most:
        return None
    r, turn = ellipse.radius, ellipse.focal / ellipse.radius**2
    q = abs(turn)
    # what a step may be off by, relative to the two that it is made of
    longer = max(1.0, (a.norm + abs(ellipse.centre)) / r) + 2 * q
    step = a.rounding * a.norm / r + longer * (off + 8 * EPS)
    x, before = project(rng.standard_normal((a.k, PROBES))), np.zeros((a.k, PROBES))
    # norms seen, their bounds f_j, what an error of a step grows to (the sums of f_j q^i), and these errors
    seen, bounds, growth, errors = np.ones((4, most + 2))
    seen[0] = np.linalg.norm(x, axis=0).max()
    with np.errstate(over="ignore", invalid="ignore"):  # where powers grow, that is seen
        for m in range(1, most + 1):
            after = (a.apply(x) - ellipse.centre * x) / r
            if turn and m > 1:
                after -= (2 * turn if m == 2 else turn) * before
            before, x = x, project(after)
            seen[m] = np.linalg.norm(x, axis=0).max()
            errors[m] = step * (seen[m - 1] + (seen[m - 2] if m > 1 else 0.0))
            lost = float(growth[m - 1 :: -1] @ errors[1 : m + 1])
            bounds[m] = _overlooked(m) * (seen[m] + lost)
            growth[m] = bounds[m] + (q * growth[m - 2] if m > 1 else 0.0)
            if not math.isfinite(bounds[m]):
                return None
            if bounds[m] <= ENOUGH * (1 - q**m):
                return _decayed(ellipse, bounds[: m + 1], q)
            if not seen[m] > 0:
                return None
            if m >= max(LOOKED_AT, needed / 4) and m % LOOKED_AT == 0:
                found = (seen[m] / seen[m - LOOKED_AT // 2]) ** (2 / LOOKED_AT)
                if m + powers_needed(found, 1) > most:
                    return None
    return None


def _decayed(ellipse: Ellipse, bounds: Array, q: float) -> Decay:
    m = len(bounds) - 1
    with np.errstate(under="ignore"):
        sums = (1 - q ** np.arange(m, 0, -1.0)) / (1 - q)
    last = float(bounds[m])
    level = max(((last + math.sqrt(last**2 + 4 * q**m)) / 2) ** (1 / m), math.sqrt(q))
    inside = ellipse.radius * ((1 - level) - q * (1 / level - 1)) if level > 0 else ellipse.radius
    found = Decay(inside * (1 - 1e-6), m, ellipse.radius, sums * bounds[:m], 1 - q**m - last)
    return replace(found, margin=max(found.margin, found.tolerated))
