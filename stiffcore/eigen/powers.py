"""Proofs from powers of a matrix, by products alone: no eigenvalue outside of a disc, none left of a line.

Where |B^m| < 1 for some m, every |lambda(B)| < 1, however far from normal B is. With B = I - (A - t I) / c, c > 0,
that puts every eigenvalue of A into the disc of radius c around t + c, which touches the line Re = t from the right.
m = 1 is the test of the norm; a larger m forgets the transient growth that the numerical range sees.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import LinearOperator

from stiffcore.eigen.sparse import (
    EPS,
    Arnoldi,
    Array,
    Product,
    host_matrix,
    lanczos,
    lanczos_error,
    longest_sum,
    norm_bound,
    product,
)

# Arnoldi steps for a picture of where the spectrum lies, Lanczos steps for a first and for the proved norm of a power.
HULL_STEPS = 60
FIRST_STEPS = 5
PROOF_STEPS = 22
# Of the power before it is given up: products cost as much as a factorisation by then.
MOST_POWER = 160
# From this power on, the norm must fall.
TRANSIENT = 40
# A norm that Lanczos puts under this is worth the proof, whose bound is 1.6 times as large at k = 100,000.
PROMISING = 0.5
# What products of a function's derivatives may be off by, relative to their norm.
OPERATOR_ROUNDING = 1e-12
# What a power does to a random vector, times this and sqrt(k), is what it does to any but for one vector in a hundred.
UNSEEN = 100
# Centres that are tried: the right end of the disc, relative to that of the spectrum.
REACHES = (1.0, 1.15, 1.4, 1.8, 2.5, 4.0, 8.0)


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


def centre_right_of(line: float, ritz: Array) -> tuple[float, float]:
    """The c of a disc around t + c, t the line, that holds the Ritz values with most room.

    Returns:
        c, and their largest |1 - (z - t) / c|.
    """
    right = float(ritz.real.max(initial=line)) - line
    if not right > 0:
        return 1.0, math.inf
    tried = [(float(np.abs(1 - (ritz - line) / c).max()), c) for c in (reach * right / 2 for reach in REACHES)]
    rate, c = min(tried)
    return c, rate


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
    """

    apply: Product
    transposed: Product
    k: int
    norm: float
    rounding: float
    ritz: Array

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
        else:
            norm = 2 * norm_from_below(lambda x: transposed(apply(x)), k, min(PROOF_STEPS, k), rng)
            rounding = OPERATOR_ROUNDING
        return cls(apply, transposed, k, norm, rounding, ritz_values(apply, k, rng))

    def negative(self) -> "Operator":
        """Of -A."""
        return replace(
            self,
            apply=lambda x: -self.apply(x),
            transposed=lambda x: -self.transposed(x),
            ritz=-self.ritz,
        )


@dataclass(frozen=True)
class Contraction:
    """What a power proves.

    Attributes:
        margin: all eigenvalues keep this distance from the circle.
        tolerated: a matrix within this distance of A, in the 2-norm, has none on the circle or outside of it.
        power: the one whose norm is under 1.
    """

    margin: float
    tolerated: float
    power: int


def margin_right_of(a: Operator, line: float, rng: np.random.Generator) -> Contraction | None:
    """Prove that all eigenvalues are right of a line; see `contraction` for what is returned."""
    c, rate = centre_right_of(line, a.ritz)
    return contraction(a, line + c, c, rate, rng)


def margin_inside(a: Operator, centre: float, radius: float, rng: np.random.Generator) -> Contraction | None:
    """Prove that all eigenvalues are inside of a circle; see `contraction` for what is returned."""
    return contraction(a, centre, radius, float(np.abs(a.ritz - centre).max(initial=0.0)) / radius, rng)


def contraction(a: Operator, centre: float, radius: float, rate: float, rng: np.random.Generator) -> Contraction | None:
    """Prove that every eigenvalue of A lies within a circle, by the norm of a power of (A - centre) / radius.

    Args:
        a: what is multiplied with.
        centre: of the circle.
        radius: of the circle.
        rate: where the spectral radius of (A - centre) / radius is guessed to be; nothing is tried from 1 on.
        rng: draws the starts.

    Returns:
        What was proved: a computed bound, see `stiffcore.eigen.sparse`. None where nothing was.
    """
    if not rate < 1 or a.k <= PROOF_STEPS:
        return None
    growth = [1.0]

    def power(multiply: Product, x: Array, m: int) -> Array:
        for _ in range(m):
            x = (multiply(x) - centre * x) / radius
            growth[0] = max(growth[0], float(np.linalg.norm(x)))
        return x

    def square(m: int, x: Array) -> Array:
        return power(a.transposed, power(a.apply, x, m), m)

    m, before = 4, math.inf
    while m <= MOST_POWER:
        growth[0] = 1.0
        found = norm_from_below(partial(square, m), a.k, FIRST_STEPS, rng)
        if found <= PROMISING:
            bound = norm_from_above(partial(square, m), a.k, rng)
            # |fl(B^m x) - B^m x|: a sum over the steps, of what is before, times rounding, times what is after; no
            # power in between is larger than that of the norm, nor much larger than what became of random vectors
            least = max(1.0, (a.norm + abs(centre)) / radius)
            largest = min(math.exp(min(m * math.log(least), 700)), math.sqrt(a.k) * UNSEEN * growth[0])
            bound += m * largest**2 * least * (a.rounding + 4 * EPS)
            if bound < 1:
                # |(A - z)^-1| <= (|I| + |B| + ... + |B^(m-1)|) / (1 - |B^m|) / radius on the circle and beyond it
                with np.errstate(over="ignore"):
                    before = float((np.float64(least) ** np.arange(m)).sum())
                return Contraction(radius * (1 - bound ** (1 / m)) * (1 - 1e-6), radius * (1 - bound) / before, m)
        if not math.isfinite(found) or (found >= before and m > TRANSIENT):
            return None  # the spectrum reaches further than the Ritz values, or the matrix is too far from normal
        before = found
        m += max(4, math.ceil(math.log(max(found, PROMISING) / (0.8 * PROMISING)) / -math.log(max(rate, 0.1))))
    return None
