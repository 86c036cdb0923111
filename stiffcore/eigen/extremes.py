"""The eigenvalues of largest and of smallest real part of a sparse or matrix-free real matrix, and their vectors.

Arnoldi finds the ends of a spectrum fast where they stand apart, and may miss one from an unlucky start, or two alike:
of a tall spectrum it finds those of large imaginary part first. So `stiffcore.eigen.deflation` looks for what holds all
eigenvalues, and what it finds further out is taken up. Where that is nothing, every end is found twice, from different
starts in different spaces: with A, and with its transpose, which gives the left vectors too. Where the two do not
agree, or do not converge, they are repeated in larger spaces, and then by shift-invert; that two agree is no proof.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse as sp
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigs

from stiffcore.eigen.deflation import Enclosure, enclosures_of, left_vectors
from stiffcore.eigen.dense import Eigenvectors, sort_eigenvalues
from stiffcore.eigen.numerical_range import logarithmic_norm
from stiffcore.eigen.sparse import (
    DENSE_ORDER,
    DENSE_SHARE,
    EPS,
    Array,
    FillError,
    Product,
    Shifted,
    as_sparse,
    host_matrix,
    identity,
    norm_bound,
    power_of_two,
    product,
)
from stiffcore.spectra import EACH_END

# Asked for beyond `EACH_END`: a converged neighbour further in shows that nothing further out was passed over.
SPARE = 3
# Of ARPACK, relative to each eigenvalue: a Rayleigh quotient of both vectors then has an error of its square.
ARNOLDI_TOLERANCE = 1e-10
# Vectors kept by the two runs of a try, and restarts allowed in each. The larger spaces are for spectra that fill a
# disc: blocks with random weights, where 3,200 products found what 10,000 with 60 vectors had not (k = 47,046).
TRIES = (((60, 84), 30), ((270, 300), 25))
# Two runs agree within this, relative to the largest eigenvalue, or within their error estimate.
AGREEMENT = 1e-8
WORST_AGREEMENT = 1e-4


@dataclass(frozen=True)
class Extremes:
    """The ends of a spectrum.

    Attributes:
        values: (m,) complex, ascending by real part, then imaginary part; conjugate pairs are complete and exact, real
            eigenvalues have imaginary part zero. `EACH_END` of them at either end at least, where there are so many.
        vectors: right and left eigenvectors (k, m) of unit norm; the left ones NaN, and `converged` false, where A has
            no transpose.
        converged_right: whether two starts agree on the eigenvalues of largest real part.
        converged_left: the same of the smallest.
        note: how they were found, and what did not converge.
        enclosures: what holds all eigenvalues of A, from which `stiffcore.eigen.counting.ends_of` proves that none was
            missed; empty where nothing was proved.
    """

    values: Array
    vectors: Eigenvectors
    converged_right: bool
    converged_left: bool
    note: str
    enclosures: tuple[Enclosure, ...] = ()


# value, right and left vector, the larger of both residuals
_Column = tuple[complex, Array, Array, float]


@dataclass(frozen=True)
class _Run:
    """Eigenpairs from one start or more: imaginary parts not negative, and what the iteration said of itself."""

    values: Array
    vectors: Array
    converged: bool


@dataclass(frozen=True)
class _Side:
    """One end: a run of A, the vectors of A^T that belong to it (NaN where there are none), and how it went."""

    run: _Run
    left: Array
    converged: bool
    note: str = ""


def extremes(a: Any, *, memory_bytes: int | None = None) -> Extremes:
    """Find the eigenvalues of largest and of smallest real part.

    Two starts that agree are evidence, not a proof: `stiffcore.eigen.counting.ends_of` proves. Of a multiple eigenvalue
    fewer copies may be found than there are.

    Args:
        a: (k, k) real: sparse, dense, or a `LinearOperator` (with `rmatvec` for left vectors). Shift-invert needs a
            matrix: see `stiffcore.eigen.sparse.host_matrix`.
        memory_bytes: what a sparse LU may take; where it does not fit, Arnoldi's answer stands and the note says so.

    Returns:
        The ends. Memory: about 300 vectors of length k, a dense copy where a third of the matrix is not zero, and the
        LU where one is needed.

    Raises:
        InputError: where `a` is no such matrix.
    """
    matrix = a if isinstance(a, LinearOperator) else as_sparse(a)
    k = matrix.shape[0]
    if k <= max(DENSE_ORDER, 4 * (EACH_END + SPARE)):
        dense = _to_dense(matrix)
        return _dense_extremes(dense, enclosures_of(as_sparse(dense), memory_bytes) if k else ())
    products = _products(matrix)
    enclosures = enclosures_of(matrix, memory_bytes) if products[1] is not None else ()
    if any(enclosure.ellipse is None for enclosure in enclosures):  # nothing less held them all
        return _dense_extremes(_to_dense(matrix), enclosures)
    sides = {}
    for which in ("SR", "LR"):
        rng = np.random.default_rng([0, which == "LR"])
        held = next((e for e in enclosures if e.holds(1 if which == "SR" else -1)), None)
        if held is None:
            sides[which] = _search(products, matrix, which, rng, memory_bytes)
        else:
            sides[which] = _held_side(held, which, products, rng, memory_bytes)
    left, right = sides["SR"], sides["LR"]
    found = _assembled(
        products,
        _Run(
            np.concatenate([left.run.values, right.run.values]),
            np.concatenate([left.run.vectors, right.run.vectors], axis=1),
            True,
        ),
        np.concatenate([left.left, right.left], axis=1),
        (right.converged, left.converged),
        f"left end: {left.note}; right end: {right.note}",
    )
    return replace(found, enclosures=tuple(enclosure.light() for enclosure in enclosures))


def _held_side(
    enclosure: Enclosure,
    which: str,
    products: tuple[Product, Product | None],
    rng: np.random.Generator,
    memory_bytes: int | None,
) -> _Side:
    """The end that is deflated, so that all others lie further in, with the vectors of A^T that belong to it."""
    values, transposed = enclosure.inner.values, products[1]
    assert transposed is not None
    upper = np.flatnonzero(values.imag >= 0)
    outer = upper[_outermost(_Run(values[upper], np.zeros((0, 0)), True), which)]
    run, ((_, space), restarts) = _Run(*enclosure.pairs(outer), True), TRIES[0]
    k = len(run.vectors)
    other = _arnoldi(transposed, k, which, EACH_END + SPARE, space, restarts, rng)
    side = _compared(run, other, which, f"deflation, and Arnoldi of the transpose, {space} vectors", paired=True)
    if side.converged:
        return side
    left = left_vectors(run.values, transposed, k, memory_bytes, float(np.abs(values).max()))
    note = "deflation, and Arnoldi of the transpose in a space as large"
    return _Side(run, left, bool(np.isfinite(left).all()), note)


def spectral_radius(a: Any) -> float:
    """The largest |lambda|, by Arnoldi from two starts: the larger of both. Not proved.

    Args:
        a: (k, k) real: sparse, dense or a `LinearOperator`.

    Returns:
        The radius; 0 for k = 0, NaN where Arnoldi did not converge.

    Raises:
        InputError: where `a` is no such matrix.
    """
    matrix = a if isinstance(a, LinearOperator) else as_sparse(a)
    k = matrix.shape[0]
    if k <= DENSE_ORDER:
        return float(np.abs(np.linalg.eigvals(_to_dense(matrix))).max(initial=0.0))
    rng = np.random.default_rng(0)
    apply, _ = _products(matrix)
    for spaces, restarts in TRIES:
        runs = [_arnoldi(apply, k, "LM", SPARE, space, restarts, rng) for space in spaces]
        if all(run.converged for run in runs):
            return max(float(np.abs(run.values).max()) for run in runs)
    return math.nan


def nearest(
    shifted: Shifted,
    count: int,
    rng: np.random.Generator,
    project: Product = identity,
    *,
    adjoint: bool = False,
) -> tuple[Array, Array]:
    """Eigenvalues of P A P nearest to the shift, by Arnoldi with the inverse.

    Args:
        shifted: A - zI, factored.
        count: how many.
        rng: draws the start.
        project: P; see `Shifted.solve`.
        adjoint: of A^H, nearest to the conjugate of the shift.

    Returns:
        (m,) complex values and (k, m) right vectors: those that converged, so m may be under `count`.
    """
    k = shifted.a.shape[0]
    operator = LinearOperator((k, k), lambda x: shifted.solve(x.ravel(), project, adjoint=adjoint), dtype=shifted.dtype)
    start = project(rng.standard_normal(k).astype(shifted.dtype))
    try:
        inverse, vectors = eigs(operator, k=count, which="LM", v0=start, ncv=4 * count + 6, tol=1e-12, maxiter=100)
    except ArpackNoConvergence as error:
        inverse, vectors = error.eigenvalues, error.eigenvectors
    except (ArpackError, ZeroDivisionError):
        inverse, vectors = np.zeros(0), np.zeros((k, 0))
    good = inverse != 0
    z = np.conj(shifted.z) if adjoint else shifted.z
    return z + 1 / inverse[good].astype(complex), vectors[:, good].astype(complex)


def _to_dense(matrix: sp.csc_array | LinearOperator) -> Array:
    if not isinstance(matrix, LinearOperator):
        return matrix.toarray()
    order = matrix.shape[0]
    return matrix @ np.eye(order) if order else np.zeros((0, 0))  # SciPy's product of no columns fails


def _products(matrix: sp.csc_array | LinearOperator) -> tuple[Product, Product | None]:
    if not isinstance(matrix, LinearOperator):
        if matrix.nnz >= DENSE_SHARE * matrix.shape[0] ** 2:
            dense = matrix.toarray()
            return _real_product(dense.__matmul__), _real_product(dense.T.__matmul__)
        return partial(product, matrix), partial(product, matrix.T)
    try:
        matrix.rmatvec(np.zeros(matrix.shape[0]))
    except (NotImplementedError, TypeError):  # SciPy calls None where no rmatvec was given
        return _real_product(matrix.matvec), None
    return _real_product(matrix.matvec), _real_product(matrix.rmatvec)


def _real_product(apply: Product) -> Product:
    return lambda x: apply(x.real) + 1j * apply(x.imag) if np.iscomplexobj(x) else apply(x)


def _arnoldi(
    apply: Product,
    k: int,
    which: str,
    count: int,
    space: int,
    restarts: int,
    rng: np.random.Generator,
    tolerance: float = ARNOLDI_TOLERANCE,
) -> _Run:
    start = rng.standard_normal(k)
    size = power_of_two(float(np.abs(apply(start)).max())) or 1.0
    operator = LinearOperator((k, k), lambda x: apply(x.ravel()) / size, dtype=np.dtype(np.float64))
    converged = True
    try:
        values, vectors = eigs(
            operator,
            k=count,
            which=which,
            ncv=min(space, k - 1),
            v0=start,
            tol=tolerance,
            maxiter=restarts,
        )
    except ArpackNoConvergence as error:
        values, vectors, converged = error.eigenvalues, error.eigenvectors, False
    except ArpackError:  # no start outside of an invariant subspace, as with A = 0
        values, vectors, converged = np.zeros(0), np.zeros((k, 0)), False
    return _upper(size * values, vectors, converged)


def _upper(values: Array, vectors: Array, converged: bool) -> _Run:
    """One of each conjugate pair, which ARPACK may return in part, and each value once."""
    values, vectors = values.astype(complex), vectors.astype(complex)
    vectors = np.where(values.imag < 0, vectors.conj(), vectors)
    values = values.real + 1j * np.abs(values.imag)
    near = AGREEMENT / 100 * np.abs(values).max(initial=0.0)
    keep = [i for i in range(len(values)) if not (np.abs(values[:i] - values[i]) <= near).any()]
    return _Run(values[keep], vectors[:, keep], converged)


def _outermost(run: _Run, which: str) -> Array:
    """Indices of the outermost, a pair counted as two, `EACH_END` at least where there are."""
    order = np.argsort(run.values.real * (1 if which == "SR" else -1), kind="stable")
    before = np.concatenate([[0], np.cumsum(1 + (run.values[order].imag > 0))])[:-1]
    return order[before < EACH_END]


def _search(
    products: tuple[Product, Product | None],
    matrix: sp.csc_array | LinearOperator,
    which: str,
    rng: np.random.Generator,
    memory_bytes: int | None,
) -> _Side:
    """Arnoldi, in a larger space where that does not converge, and then shift-invert where an LU fits."""
    for spaces, restarts in TRIES:
        side = _arnoldi_side(products, matrix.shape[0], which, spaces, restarts, rng)
        if side.converged:
            return side
    host = host_matrix(matrix)
    if host is None:
        return side
    try:
        inverted = _shift_invert_side(host, which, rng, memory_bytes)
    except (FillError, ZeroDivisionError) as error:
        return replace(side, note=f"{side.note}; no shift-invert: {error}")
    return inverted if inverted.converged or len(inverted.run.values) >= len(side.run.values) else side


def _arnoldi_side(
    products: tuple[Product, Product | None],
    k: int,
    which: str,
    spaces: tuple[int, int],
    restarts: int,
    rng: np.random.Generator,
) -> _Side:
    apply, transposed = products
    run = _arnoldi(apply, k, which, EACH_END + SPARE, spaces[0], restarts, rng)
    other = _arnoldi(transposed or apply, k, which, EACH_END + SPARE, spaces[1], restarts, rng)
    note = f"Arnoldi, two starts, {spaces[0]} and {spaces[1]} vectors"
    return _compared(run, other, which, note, paired=transposed is not None)


def _compared(run: _Run, other: _Run, which: str, note: str, *, paired: bool) -> _Side:
    """Hold the outermost of two runs against each other; `paired` where the other one is of the transpose."""
    outer = _outermost(run, which)
    left = np.full((len(run.vectors), len(outer)), np.nan, complex)
    agree = run.converged and other.converged and len(outer) > 0 and len(other.values) > 0
    scale = np.abs(np.concatenate([run.values, other.values])).max(initial=0.0)
    for column, i in enumerate(outer if len(other.values) else []):
        j = int(np.argmin(np.abs(other.values - run.values[i])))
        allowed = AGREEMENT
        if paired:
            # an eigenvector of A^T is the conjugate of a left one of A
            left[:, column] = other.vectors[:, j].conj()
            overlap = abs(np.vdot(left[:, column], run.vectors[:, i]))
            allowed = min(max(AGREEMENT, 20 * ARNOLDI_TOLERANCE / max(overlap, EPS)), WORST_AGREEMENT)
        agree &= bool(abs(other.values[j] - run.values[i]) <= allowed * scale)
    for j in _outermost(other, which):
        agree &= bool(np.abs(run.values - other.values[j]).min(initial=np.inf) <= WORST_AGREEMENT * scale)
    kept = _Run(run.values[outer], run.vectors[:, outer], run.converged)
    return _Side(kept, left, bool(agree), note if agree else note + ", which did not find the same eigenvalues")


def _shift_invert_side(matrix: sp.csc_array, which: str, rng: np.random.Generator, memory_bytes: int | None) -> _Side:
    """From shifts outside of the spectrum, and once more, of the transpose, from shifts beside what that found."""
    sign = 1 if which == "LR" else -1
    norm = norm_bound(matrix) or 1.0
    apply, (spaces, restarts) = partial(product, matrix), TRIES[1]
    rough = _arnoldi(apply, matrix.shape[0], which, EACH_END + SPARE, spaces[0], restarts, rng, 1e-2)
    outside = sign * (logarithmic_norm(sign * matrix) + 1e-3 * norm)
    runs = []
    for adjoint, distance in ((False, 1e-2), (True, 1e-3)):
        best = rough.values[_outermost(rough, which)]
        targets = [complex(outside + sign * distance * norm), *(best + sign * distance * norm)]
        found = [nearest(Shifted(matrix, z, memory_bytes), EACH_END + SPARE, rng, adjoint=adjoint) for z in targets]
        values, vectors = (np.concatenate([pair[i] for pair in found], axis=-1) for i in (0, 1))
        values[np.abs(values) <= EPS * norm] = 0  # smaller than its rounding
        rough = _upper(values, vectors, True)
        runs.append(rough)
    return _compared(runs[0], runs[1], which, "shift-invert, twice", paired=True)


def _dense_extremes(a: Array, enclosures: tuple[Enclosure, ...] = ()) -> Extremes:
    """From all eigenvalues, so that there are no starts to agree."""
    if len(a) == 0:
        empty = np.zeros((0, 0), complex)
        return Extremes(np.zeros(0, complex), Eigenvectors(empty, empty, np.zeros(0, bool)), True, True, "order 0")
    values, left, right = scipy.linalg.eig(a, left=True, right=True)
    upper = np.flatnonzero(values.imag >= 0)
    run = _Run(values[upper], right[:, upper].astype(complex), True)
    chosen = np.unique(np.concatenate([_outermost(run, which) for which in ("SR", "LR")]))
    kept = _Run(run.values[chosen], run.vectors[:, chosen], True)
    apply, transposed = partial(product, sp.csc_array(a)), partial(product, sp.csc_array(a.T))
    found = _assembled((apply, transposed), kept, left[:, upper[chosen]].astype(complex), (True, True), "dense")
    return replace(found, enclosures=enclosures)


def _assembled(
    products: tuple[Product, Product | None], run: _Run, left: Array, converged: tuple[bool, bool], note: str
) -> Extremes:
    """Rayleigh quotients of both vectors, residuals, conjugates, order."""
    apply, transposed = products
    scale = np.abs(run.values).max(initial=0.0)
    columns: list[_Column] = []
    for i, found in enumerate(run.values):
        real = found.imag <= AGREEMENT / 100 * scale
        x, y = (_unit(v, real) for v in (run.vectors[:, i], left[:, i]))
        ax = apply(x)
        overlap = np.vdot(y, x)
        value = np.vdot(y, ax) / overlap if abs(overlap) > AGREEMENT else found
        value = found if abs(value - found) > AGREEMENT * scale else value
        value = complex(value.real, 0.0 if real else abs(value.imag))
        ya = transposed(y.conj()).conj() if transposed is not None else np.full_like(y, np.nan)
        # nan stays, unlike with max()
        residual = float(np.maximum(np.linalg.norm(ax - value * x), np.linalg.norm(ya - np.conj(value) * y)))
        columns.append((value, x, y, residual))
        if not real:
            columns.append((value.conjugate(), x.conj(), y.conj(), residual))
    columns = _once(columns)
    values = np.array([c[0] for c in columns], complex)
    shape = (len(left), len(columns))
    right_vectors, left_vectors = (np.array([c[i] for c in columns], complex).T.reshape(shape) for i in (1, 2))
    good = np.array([c[3] for c in columns]) <= AGREEMENT * scale
    vectors = Eigenvectors(right_vectors, left_vectors, good)
    return Extremes(sort_eigenvalues(values), vectors, *converged, note)


def _once(columns: list[_Column]) -> list[_Column]:
    """In the order of `sort_eigenvalues`; what both ends found is kept once."""
    ordered = sorted(columns, key=lambda c: (c[0].real, c[0].imag))
    scale = max((abs(c[0]) for c in ordered), default=0.0)
    kept: list[_Column] = []
    for c in ordered:
        alike = [d for d in kept if abs(d[0] - c[0]) <= AGREEMENT / 100 * scale and abs(np.vdot(d[1], c[1])) > 0.99]
        if not alike:
            kept.append(c)
    return kept


def _unit(x: Array, real: bool) -> Array:
    if not np.isfinite(x).all():
        return np.full_like(x, np.nan)
    if real:
        # the vector of a real eigenvalue is real but for a factor
        x = (x * np.conj(x[np.argmax(np.abs(x))])).real.astype(complex)
    return x / np.linalg.norm(x)
