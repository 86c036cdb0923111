"""Sparse real matrices: fill, factorisations that are checked, singular values, and what a few Lanczos steps prove.

Two kinds of bounds are told apart everywhere. A bound by *inertia* holds but for bugs: the rounding of the
factorisation is in it. A *computed* bound rests on Lanczos steps from a random start, and fails with a probability of
at most `FAILURE` (Kuczynski & Wozniakowski, SIAM J. Matrix Anal. Appl. 13 (1992), theorem 4.2).
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse as sp
from scipy.sparse.csgraph import reverse_cuthill_mckee
from scipy.sparse.linalg import LinearOperator, SuperLU, eigsh, splu

from stiffcore.errors import InputError, StiffcoreError, refuse

EPS = float(np.finfo(np.float64).eps)
DENSE_ORDER = 100
"""Up to this order everything is dense: it costs nothing, and Krylov spaces have little room there."""
FAILURE = 1e-12
LANCZOS_STEPS = 30
# From this share of entries that are not zero, a dense copy multiplies faster, 2.5 times at 3/4 (k = 2,000).
DENSE_SHARE = 1 / 3
# Columns of a matrix in single precision that are made double at once.
DENSE_PANEL = 256
# A solve whose residual, relative to its right-hand side, is larger is refined; Lanczos allows for this much.
SOLVE_TOLERANCE = 1e-6
REFINEMENTS = 3

Array = np.ndarray
Product = Callable[[Array], Array]


class FillError(StiffcoreError):
    """A sparse factorisation would not fit the memory it was given."""


def as_sparse(a: Any) -> sp.csc_array:
    """Take a square real matrix, sparse or dense, as float64 in sorted columns.

    Raises:
        InputError: where it is not square, real and finite.
    """
    if isinstance(a, np.ndarray) or sp.issparse(a):
        shape, dtype = a.shape, a.dtype
    else:
        raise InputError(f"sparse eig needs a SciPy sparse matrix or a NumPy array, got {type(a).__name__}")
    problems = []
    if len(shape) != 2 or shape[0] != shape[1]:
        problems.append(f"sparse eig needs a square matrix, got shape {shape}")
    if dtype.kind not in "fiu":
        problems.append(f"sparse eig needs a real matrix, got {dtype}")
    refuse(problems)
    matrix = sp.csc_array(a, dtype=np.float64)
    matrix.sum_duplicates()
    if not np.isfinite(matrix.data).all():
        raise InputError("sparse eig needs finite entries: the matrix holds NaN or infinity")
    return matrix


def host_matrix(a: Any) -> sp.csc_array | None:
    """The matrix itself: of a `LinearOperator` its attribute `host`, where it has one; of anything else `as_sparse`."""
    return getattr(a, "host", None) if isinstance(a, LinearOperator) else as_sparse(a)


class DenseMatrix(LinearOperator):
    """Products with a dense real matrix, in double precision whatever its own is, without a copy of it.

    Args:
        a: (k, k) float32 or float64, Fortran-ordered.
    """

    def __init__(self, a: Array) -> None:
        super().__init__(np.dtype(np.float64), a.shape)
        self._a = a

    def _panels(self) -> Iterator[tuple[slice, Array]]:
        wide = len(self._a) if self._a.dtype == np.float64 else DENSE_PANEL
        for start in range(0, len(self._a), wide):
            columns = slice(start, start + wide)
            yield columns, self._a[:, columns].astype(np.float64, copy=False)

    def _matvec(self, x: Array) -> Array:
        return sum(panel @ x[columns] for columns, panel in self._panels())

    _matmat = _matvec

    def _rmatvec(self, x: Array) -> Array:
        return np.concatenate([panel.T @ x for _, panel in self._panels()])

    _rmatmat = _rmatvec


def product(a: sp.csc_array | sp.csr_array, x: Array) -> Array:
    """A x for a real A and a real or complex vector, without a complex copy of A."""
    if not np.iscomplexobj(x):
        return a @ x
    # two real products were measured to be faster than one with two columns
    return a @ np.ascontiguousarray(x.real) + 1j * (a @ np.ascontiguousarray(x.imag))


def norm_bound(a: sp.csc_array) -> float:
    """An upper bound of the 2-norm of |A|: sqrt(|A|_1 |A|_inf)."""
    if a.shape[0] == 0:
        return 0.0
    sizes = abs(a)
    return float(np.sqrt(sizes.sum(axis=0).max()) * np.sqrt(sizes.sum(axis=1).max())) * (1 + 1e-10)


def estimated_fill(a: sp.csc_array) -> int:
    """Entries of L + U of a sparse LU of A - zI, estimated from the envelope of A + A^T, without a factorisation.

    An elimination without pivoting fills the envelope at most. The smaller of two envelopes is taken: of the order as
    it is, and of reverse Cuthill-McKee. SuperLU's minimum degree fills less: the estimate was 1.11 to 1.34 times the
    truth on the reduced matrices of ResNets (k = 1,900 to 8,000); on a five-point grid of order 90,000 it is 7 times.
    Time is proportional to the entries.

    Args:
        a: (k, k).

    Returns:
        A number of entries, k^2 at most.
    """
    k = a.shape[0]
    if k == 0:
        return 0
    pattern = sp.csr_array((np.ones(a.nnz, np.int8), a.indices, a.indptr), shape=a.shape)
    pattern = sp.csr_array(pattern + pattern.T)
    order = reverse_cuthill_mckee(sp.csr_matrix(pattern), symmetric_mode=True)
    position = np.empty(k, np.int64)
    position[order] = np.arange(k)
    rows = np.repeat(np.arange(k), np.diff(pattern.indptr))
    return min(_envelope(rows, pattern.indices, k), _envelope(position[rows], position[pattern.indices], k))


def _envelope(rows: Array, columns: Array, k: int) -> int:
    first = np.arange(k)
    np.minimum.at(first, rows, columns)
    return int(k + 2 * (np.arange(k) - first).sum())


def factor_bytes(fill: int, nnz: int, itemsize: int) -> int:
    """Memory of SuperLU's factors and of their making: fill (itemsize + 4) + nnz (itemsize + 12) bytes.

    The two terms are the factors with their compressed row indices, and the copy that is factored with the work on its
    pattern. Measured: 10.3 to 17.1 bytes per entry of the fill in float64, and 18.4 to 25.1 in complex128.
    """
    return fill * (itemsize + 4) + nnz * (itemsize + 12)


def inertia_bytes(fill: int, nnz: int) -> int:
    """Memory of `proved_least`: the factors, and both of them as sparse matrices, with two more halves."""
    return factor_bytes(fill, nnz, 8) + 24 * fill


def device_matrix_bytes(nonzeros: int, k: int) -> int:
    """Device memory of a `stiffcore.eigen.device.DeviceMatrix`: the matrix by row and by column, and a few vectors."""
    return 2 * 12 * nonzeros + 8 * 8 * k


def check_fits(needed: int, memory_bytes: int | None, what: str) -> None:
    """Refuse what would not fit.

    Raises:
        FillError: where `needed` is over `memory_bytes`; None is no limit.
    """
    if memory_bytes is not None and needed > memory_bytes:
        raise FillError(f"{what} needs about {needed / 1e9:.2g} GB, over the {memory_bytes / 1e9:.2g} GB given")


def identity(x: Array) -> Array:
    """The projector onto everything."""
    return x


class Shifted:
    """A - zI, factored: solves with it and with its adjoint, each checked by its residual.

    Real arithmetic where z is real; complex64 factors, refined in double, where complex128 ones do not fit.

    Args:
        a: (k, k) float64.
        z: the shift.
        memory_bytes: what the factors may take; None for no limit.

    Raises:
        FillError: where the factors would not fit; nothing was factored.
        ZeroDivisionError: where A - zI is exactly singular.
    """

    def __init__(self, a: sp.csc_array, z: complex, memory_bytes: int | None = None) -> None:
        self.a, self.transpose = a, a.T
        self.z: complex | float = complex(z) if complex(z).imag else complex(z).real
        self.dtype = np.dtype(np.result_type(type(self.z)))
        self._factored = self._fitting_dtype(memory_bytes)
        eye = sp.eye_array(a.shape[0], dtype=self._factored, format="csc")
        try:
            self._lu = _splu(a.astype(self._factored) - self._factored.type(self.z) * eye, pivoting=0.01)
        except RuntimeError as error:  # "Factor is exactly singular"
            raise ZeroDivisionError(f"A - ({z})I is singular") from error

    def _fitting_dtype(self, memory_bytes: int | None) -> np.dtype:
        if memory_bytes is None:
            return self.dtype
        fill, single = estimated_fill(self.a), np.dtype(np.complex64)
        if self.dtype.kind == "c" and factor_bytes(fill, self.a.nnz, 16) > memory_bytes:
            check_fits(factor_bytes(fill, self.a.nnz, single.itemsize), memory_bytes, "a sparse LU")
            return single
        check_fits(factor_bytes(fill, self.a.nnz, self.dtype.itemsize), memory_bytes, "a sparse LU")
        return self.dtype

    def solve(self, x: Array, project: Product = identity, *, adjoint: bool = False) -> Array:
        """The y in the range of an orthogonal projector P with P (A - zI) y = x, or with the adjoint.

        The null space of P must be (nearly) invariant under A: then y is the projection of the solution without P, for
        in a basis of null space and range A is block triangular.

        Args:
            x: (k,), in the range of P, of `dtype`.
            project: P.
            adjoint: solve with (A - zI)^H.

        Raises:
            ZeroDivisionError: where refinement does not bring the residual under `SOLVE_TOLERANCE` |x|.
        """
        matrix, z = (self.transpose, np.conj(self.z)) if adjoint else (self.a, self.z)
        allowed = SOLVE_TOLERANCE * np.linalg.norm(x)
        y, r = np.zeros_like(x), x
        with np.errstate(over="ignore", invalid="ignore"):  # beside an eigenvalue; the residual says so
            for _ in range(1 + REFINEMENTS):
                y = y + project(self._raw(r, adjoint))
                r = project(x - product(matrix, y) + z * y)
                if np.linalg.norm(r) <= allowed:
                    return y
        raise ZeroDivisionError(f"A - ({self.z})I is singular to working precision")

    def _raw(self, x: Array, adjoint: bool) -> Array:
        size = np.abs(x).max(initial=0.0) or 1.0  # complex64 has a short range
        y = self._lu.solve((x / size).astype(self._factored), "H" if adjoint else "N")
        return y.astype(self.dtype) * size


def singular_bound(shifted: Shifted, norm: float, rng: np.random.Generator, project: Product = identity) -> float:
    """A computed lower bound of the smallest singular value of P (A - zI) P on the range of P.

    `LANCZOS_STEPS` Lanczos steps with the inverse of B B^H give a lower bound t of 1 / s^2 that is off by a factor of
    at most 1 - e with probability 1 - `FAILURE`: s >= sqrt((1 - e) / t).

    Args:
        shifted: the factorisation; k over `DENSE_ORDER`.
        norm: from `norm_bound`.
        rng: draws the start.
        project: P; see `Shifted.solve`.

    Returns:
        The bound; 0 where nothing can be said.
    """
    k = shifted.a.shape[0]

    def inverse(x: Array) -> Array:
        return shifted.solve(shifted.solve(x, project, adjoint=True), project)

    try:
        ritz = lanczos(inverse, k, LANCZOS_STEPS, shifted.dtype, rng, project)
    except ZeroDivisionError:
        return 0.0
    # a residual is at most its tolerance: each step is that accurate relative to 1 / s^2
    allowance = 1 - 10 * LANCZOS_STEPS * SOLVE_TOLERANCE
    bound = math.sqrt((1 - lanczos_error(k, LANCZOS_STEPS)) / ritz[-1]) * allowance
    # below, the rounding of the residuals themselves is no longer small against their tolerance
    return bound if bound * SOLVE_TOLERANCE > 10 * longest_sum(shifted.a) * EPS * norm else 0.0


def lanczos_error(k: int, steps: int) -> float:
    """What a Ritz value may fall short of the largest eigenvalue of a k x k matrix, relative to its spread.

    1.648 sqrt(n) exp(-sqrt(e) (2 m - 1)) is the probability that m steps from a random start leave an error over e
    (Kuczynski & Wozniakowski 1992, theorem 4.2); n = 2k, for a complex Hermitian matrix is a real one of twice the
    order.

    Returns:
        The e with the probability `FAILURE`; below 1, or nothing is bounded.
    """
    return (math.log(1.648 * math.sqrt(2 * k) / FAILURE) / (2 * steps - 1)) ** 2


def lanczos(
    apply: Product, k: int, steps: int, dtype: np.dtype, rng: np.random.Generator, project: Product = identity
) -> Array:
    """Ritz values of a Hermitian operator after so many steps from a random start, fully orthogonalised.

    Where the Krylov space is exhausted, it goes on from another random vector.

    Args:
        apply: the operator, on the range of `project`.
        k: its order.
        steps: at most the dimension of that range. Memory: so many vectors.
        dtype: float64 or complex128.
        rng: draws the start.
        project: an orthogonal projector.

    Returns:
        (steps,) float64, ascending.
    """
    basis = np.zeros((steps, k), dtype)
    diagonal, off = np.zeros(steps), np.zeros(max(steps - 1, 0))
    v = project(_random(k, dtype, rng))
    v /= np.linalg.norm(v)
    for j in range(steps):
        basis[j] = v
        w = apply(v)
        diagonal[j] = np.vdot(v, w).real
        size = np.linalg.norm(w)
        w, _ = _orthogonalised(w, basis[: j + 1])
        if j + 1 == steps:
            break
        off[j] = np.linalg.norm(w)
        if off[j] <= 100 * EPS * size:
            off[j] = 0.0
            w, _ = _orthogonalised(project(_random(k, dtype, rng)), basis[: j + 1])
        v = project(w / np.linalg.norm(w))  # what rounding left outside of the range would grow from step to step
    return scipy.linalg.eigvalsh_tridiagonal(diagonal, off)


class Arnoldi:
    """A Krylov space of a real operator from a random start, extended step by step, fully orthogonalised.

    Args:
        apply: the operator.
        k: its order.
        most: steps at most. Memory: so many vectors, as they are made.
        rng: draws the start.

    Attributes:
        size: steps made: the dimension of the space.
        exhausted: whether the space is invariant, so that there are no more.
    """

    def __init__(self, apply: Product, k: int, most: int, rng: np.random.Generator) -> None:
        self.apply, self.size, self.exhausted = apply, 0, most == 0
        self._basis, self._h = np.zeros((most + 1, k)), np.zeros((most + 1, most))
        start = rng.standard_normal(k)
        self._basis[0] = start / (np.linalg.norm(start) or 1.0)

    def extend(self, steps: int) -> None:
        """Make so many steps in all."""
        basis, h = self._basis, self._h
        while self.size < min(steps, h.shape[1]) and not self.exhausted:
            j = self.size
            w, h[: j + 1, j] = _orthogonalised(self.apply(basis[j]), basis[: j + 1])
            h[j + 1, j] = np.linalg.norm(w)
            self.size += 1
            self.exhausted = bool(h[j + 1, j] <= 100 * EPS * np.abs(h[: j + 2, : j + 1]).max())
            if not self.exhausted:
                basis[j + 1] = w / h[j + 1, j]

    def ritz(self) -> tuple[Array, Array]:
        """The eigenvalues of the operator's compression, (size,) complex, and the residuals of their vectors."""
        values, vectors = scipy.linalg.eig(self._h[: self.size, : self.size])
        last = self._h[self.size, self.size - 1] if self.size else 0.0
        return values, last * np.abs(vectors[-1:]).sum(axis=0)

    def vectors(self, wanted: Array) -> tuple[Array, Array]:
        """(k, m) complex, of the Ritz values nearest to (m,) wanted ones; and how far they are off, or their residuals.

        The larger of both.
        """
        values, vectors = scipy.linalg.eig(self._h[: self.size, : self.size])
        nearest = np.argmin(np.abs(values[:, None] - wanted[None, :]), axis=0)
        residuals = self._h[self.size, self.size - 1] * np.abs(vectors[-1, nearest])
        off = np.maximum(np.abs(values[nearest] - wanted), residuals)
        return (vectors[:, nearest].T @ self._basis[: self.size]).T, off

    def schur_vectors(self, values: Array, chosen: Array) -> Array:
        """(k, p), by columns: an orthonormal basis of what belongs to some of the Ritz values; of pairs, both.

        Args:
            values: all, from `ritz`.
            chosen: which, (size,) bool.

        Raises:
            LinAlgError: where LAPACK cannot bring them to the front.
        """

        def wanted(re: float, im: float = 0.0) -> bool:
            return bool(chosen[np.argmin(np.abs(values - complex(re, im)))])

        if not chosen.any():
            return np.zeros((self._basis.shape[1], 0), order="F")
        _, vectors, p = scipy.linalg.schur(self._h[: self.size, : self.size], output="real", sort=wanted)
        return (vectors[:, :p].T @ self._basis[: self.size]).T


def complement(x: Array, q: Array) -> Array:
    """What is left of x, one column or many, outside of the columns of an orthonormal q."""
    return x - q @ (q.T @ x)


def _orthogonalised(w: Array, basis: Array) -> tuple[Array, Array]:
    """What is left of w outside of the rows of a basis, and its coefficients in them."""
    coefficients = np.zeros(len(basis), np.result_type(w, basis))
    for _ in range(2):  # twice is enough (Giraud et al. 2005)
        part = basis.conj() @ w
        w = w - basis.T @ part
        coefficients += part
    return w, coefficients


def _random(k: int, dtype: np.dtype, rng: np.random.Generator) -> Array:
    x = rng.standard_normal(k)
    return x + 1j * rng.standard_normal(k) if dtype.kind == "c" else x


def proved_least(s: sp.csc_array, sigma: float) -> float | None:
    """Prove by inertia that no eigenvalue of a symmetric matrix S is under about sigma.

    S - sigma I = L U without pivoting, and D = diag(U). Where every d > 0, L D L^T has no negative eigenvalue, so by
    Weyl's inequality those of S are at least sigma - delta, with delta a bound of |S - sigma I - L D L^T|. That is at
    most |S - sigma I - L U| + |L (U - D L^T)|: the first is under gamma |L| |U| entry by entry, gamma for the longest
    sum (Higham, Accuracy and Stability, theorem 9.3), the second is computed. As the difference is symmetric, the
    inf-norm bounds the 2-norm.

    Args:
        s: (k, k), symmetric but for one rounding of its entries.
        sigma: the shift.

    Returns:
        sigma - delta, a lower bound of all eigenvalues; None where a pivot is negative or nothing is proved.
    """
    k = s.shape[0]
    shifted = sp.csc_array(s - sigma * sp.eye_array(k, format="csc"))
    try:
        lu = _splu(shifted, pivoting=0.0)
    except RuntimeError:  # a pivot is exactly zero
        return None
    if not np.array_equal(lu.perm_r, lu.perm_c):
        return None
    lower, upper = sp.csc_array(lu.L), sp.csc_array(lu.U)
    del lu
    pivots = upper.diagonal()
    if not (pivots > 0).all():
        return None
    asymmetry = abs(upper - sp.csc_array(sp.diags_array(pivots) @ lower.T))
    longest = int(np.bincount(lower.indices, minlength=k).max())
    np.abs(lower.data, out=lower.data)
    np.abs(upper.data, out=upper.data)
    ones = np.ones(k)
    gamma = (longest + 5) * EPS / (1 - (longest + 5) * EPS)
    rounding = gamma * (lower @ (upper @ ones)) + lower @ (asymmetry @ ones) + 4 * EPS * (abs(shifted) @ ones)
    # the bound is itself rounded; underflow loses at most the smallest normal number an operation
    delta = float(rounding.max()) * (1 + 1e-6) + k * longest * float(np.finfo(np.float64).tiny)
    return sigma - delta - EPS * abs(sigma) if math.isfinite(delta) else None


def smallest_singular_value(a: Any, z: complex, *, memory_bytes: int | None = None) -> float:
    """The smallest singular value of A - zI, by inverse Lanczos iteration; converged, not a bound.

    Args:
        a: (k, k) real, sparse or dense, k at least 1.
        z: the shift.
        memory_bytes: what the factorisation may take.

    Returns:
        The distance from A - zI to the nearest singular matrix in the 2-norm; 0 where that is below working precision,
        inf for k = 0.

    Raises:
        FillError: where the factorisation does not fit.
        InputError: where `a` is no such matrix.
    """
    a = as_sparse(a)
    k = a.shape[0]
    if k == 0:
        return math.inf
    if k <= DENSE_ORDER:
        return float(scipy.linalg.svdvals(a.toarray() - complex(z) * np.eye(k))[-1])
    try:
        shifted = Shifted(a, z, memory_bytes)
        operator = LinearOperator(
            (k, k), lambda x: shifted.solve(shifted.solve(x.ravel(), adjoint=True)), dtype=shifted.dtype
        )
        start = _random(k, shifted.dtype, np.random.default_rng(0))
        largest = eigsh(operator, k=1, which="LA", v0=start, tol=1e-10, return_eigenvectors=False)
    except ZeroDivisionError:
        return 0.0
    return 1 / math.sqrt(float(largest[0]))


def power_of_two(size: float) -> float:
    """Of a matrix's size, what to divide it by, exactly: ARPACK takes values under 1e-10 for zero; 0 for 0 alone."""
    if not 0 < size < math.inf:
        return 0.0 if size == 0 else 1.0  # ARPACK says what is wrong with it
    return 2.0 ** min(max(round(math.log2(size)), -1000), 1000)


def longest_sum(a: sp.csc_array) -> int:
    """Terms of the longest sum in a product with A or with its transpose."""
    return int(max(np.bincount(a.indices).max(initial=0), np.diff(a.indptr).max(initial=0))) + 2


def _splu(a: sp.csc_array, pivoting: float) -> SuperLU:
    # the pattern is nearly symmetric, and the order of A + A^T keeps the diagonal as pivots
    return splu(
        sp.csc_array(a), permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=pivoting, options={"SymmetricMode": True}
    )
