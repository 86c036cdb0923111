"""Eigenvalues of one dense matrix in memory, in stages between which everything can be stored.

The matrix is balanced and reduced to Hessenberg form in its own memory (`to_hessenberg`), and the eigenvalues
are read from that (`hessenberg_eigenvalues`). A few eigenvectors for a certificate come from the same
Hessenberg matrix (`hessenberg_eigenvectors`); the eigenvalue stage destroys it, so whoever wants both keeps a
copy, in a store.
"""

import math
from dataclasses import dataclass

import numpy as np

from stiffcore.eigen import lapack
from stiffcore.errors import InputError, refuse

LAPACK_MAX_ORDER = 46_340
"""Largest order whose k * k entries a signed 32-bit integer can count, as SciPy's LAPACK does."""

CUSOLVER_MAX_ORDER = 46_340
"""Largest order that Xgeev is trusted with: 2^31 - 1 entries are reported as its limit (CUDA 12.8)."""

CUBLAS_BYTES = 32 << 20
"""Workspace that torch gives cuBLAS on a Hopper GPU; a quarter of it on older ones."""

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Hessenberg:
    """A matrix reduced to upper Hessenberg form, with what undoes the reduction: A = P D Q H Q^T D^-1 P^T.

    Attributes:
        a: (k, k) float32 or float64, Fortran-ordered: H, and below its subdiagonal the Householder reflectors
            of Q.
        tau: (max(k - 1, 0),) same dtype: the factors of the reflectors.
        scale: (k,) same dtype: permutation P and diagonal scaling D, as ?gebal encodes them.
        ilo: first row and column, counted from 1, of the part that balancing left to be reduced.
        ihi: last row and column of that part.
    """

    a: np.ndarray
    tau: np.ndarray
    scale: np.ndarray
    ilo: int
    ihi: int


@dataclass(frozen=True)
class Eigenvectors:
    """Right and left eigenvectors of unit 2-norm: A x = lambda x and y^H A = lambda y^H.

    Attributes:
        right: (k, m) complex, one x a column, in the order of the values asked for.
        left: (k, m) complex, one y a column.
        converged: (m,) bool: whether the iteration for x and the one for y both converged.
    """

    right: np.ndarray
    left: np.ndarray
    converged: np.ndarray


def check_lapack_order(k: int) -> None:
    """Refuse a matrix too large for a LAPACK with 32-bit integers.

    Args:
        k: order of the matrix.

    Raises:
        InputError: where `k` is over `LAPACK_MAX_ORDER`.
    """
    if k > LAPACK_MAX_ORDER:
        raise InputError(
            f"dense eig: a matrix of order {k:,} has more entries than 32-bit LAPACK can count (order"
            f" {LAPACK_MAX_ORDER:,} at most): choose a smaller block, or --solver divide"
        )


def to_hessenberg(a: np.ndarray) -> Hessenberg:
    """Balance a matrix and reduce it to upper Hessenberg form, both in its own memory (?gebal, ?gehrd).

    Peak memory is `to_hessenberg_bytes`: no second copy of the matrix.

    Args:
        a: (k, k) float32 or float64, Fortran-ordered, finite; overwritten, and part of the result.

    Returns:
        The reduced matrix.

    Raises:
        InputError: where `a` is not such a matrix, or is over `LAPACK_MAX_ORDER`.
    """
    check_matrix(a)
    check_lapack_order(len(a))
    ilo, ihi, scale = lapack.gebal(a)
    tau = lapack.gehrd(a, ilo, ihi)
    return Hessenberg(a, tau, scale, ilo, ihi)


def hessenberg_eigenvalues(h: Hessenberg) -> np.ndarray:
    """Find all eigenvalues of a reduced matrix, destroying `h.a` (?hseqr, values only).

    The reflectors below the subdiagonal need not be cleared first: ?geev passes ?gehrd's result on as it is,
    too. A matrix with entries so large or small that their squares leave the floating-point range is scaled
    by a power of two, as ?geev does. Peak memory is `hessenberg_eigenvalues_bytes`.

    Args:
        h: from `to_hessenberg`; `h.a` is overwritten.

    Returns:
        (k,) complex64 or complex128, in the order of `sort_eigenvalues`. The members of a conjugate pair are
        exact conjugates of each other; real eigenvalues have imaginary part exactly zero.

    Raises:
        StiffcoreError: where the QR iteration did not converge.
    """
    exponent = _scale_into_range(h.a)
    real, imag = lapack.hseqr(h.a, h.ilo, h.ihi)
    values = np.empty(real.shape, _complex(h.a.dtype))
    values.real = np.ldexp(real, exponent)
    values.imag = np.ldexp(imag, exponent)
    return sort_eigenvalues(values)


def hessenberg_eigenvectors(h: Hessenberg, values: np.ndarray) -> Eigenvectors:
    """Find right and left eigenvectors for a few eigenvalues, by inverse iteration on the reduced matrix.

    ?hsein once for each value, then back through ?ormhr and ?gebak. The vectors for a value do not depend on
    the other values asked for, but for rounding. For a value asked for twice, and for a multiple eigenvalue,
    the same vector comes back: this does not give a basis of an eigenspace. The vectors of a conjugate are
    the conjugate vectors.

    Convergence speaks of the balanced matrix. Where balancing scaled rows by very different factors,
    residuals with the original one can be large all the same: a certificate must compute them.

    Only ask for computed eigenvalues: ?hsein gives up on any other value after k steps, 8 k^3 operations of
    slow scalar code (measured: about 25 s a value at k = 1500).

    `h.a` is as before when this returns; meanwhile no other thread may use it (`lapack.ormhr`). Peak memory
    is `hessenberg_eigenvectors_bytes`, twice the matrix.

    Args:
        h: from `to_hessenberg`, before `hessenberg_eigenvalues` destroyed it.
        values: (m,) complex, some of the eigenvalues, in any order, members of a conjugate pair together or
            alone.

    Returns:
        The vectors, complex64 or complex128, in the order of `values`. A value that inverse iteration did not
        converge for is flagged, not raised.

    Raises:
        InputError: where `values` is not a finite vector, or holds what a matrix of this order cannot have.
    """
    asked = _check_values(values, len(h.a)).astype(_complex(h.a.dtype))
    shape = (len(h.a), 2 * len(asked))
    left, right = np.zeros(shape, h.a.dtype, order="F"), np.zeros(shape, h.a.dtype, order="F")
    converged = _iterate(h, asked, left, right)
    below = asked.imag < 0
    x = _back_transformed(h, right, "R", below)
    y = _back_transformed(h, left, "L", below)
    converged &= np.isfinite(x).all(axis=0) & np.isfinite(y).all(axis=0)
    return Eigenvectors(x, y, converged)


def sort_eigenvalues(values: np.ndarray) -> np.ndarray:
    """Order eigenvalues by ascending real part, then by ascending imaginary part.

    Equal sets give equal bits: negative zeros become positive ones.

    Args:
        values: (k,) complex, finite.

    Returns:
        A new array, (k,), same dtype.
    """
    plain = values + np.zeros(1, values.dtype)
    return plain[np.lexsort((plain.imag, plain.real))]


def check_matrix(a: np.ndarray) -> None:
    """Refuse what the dense solvers cannot work on in place.

    Args:
        a: needed: (k, k) float32 or float64, Fortran-ordered, writable, every entry finite.

    Raises:
        InputError: naming everything that is wrong.
    """
    problems = []
    if a.ndim != 2 or a.shape[0] != a.shape[1]:
        problems.append(f"dense eig needs a square matrix, got shape {a.shape}")
    if a.dtype not in (np.float32, np.float64):
        problems.append(f"dense eig needs float32 or float64, got {a.dtype}")
    if not a.flags.f_contiguous:
        problems.append("dense eig needs a Fortran-ordered matrix: make it with order='F'")
    if not a.flags.writeable:
        problems.append("dense eig overwrites the matrix, and this one is read-only")
    refuse(problems)
    if not is_finite(a):
        raise InputError("dense eig needs finite entries: the matrix holds NaN or infinity")


def is_finite(a: np.ndarray) -> bool:
    """Whether every entry of a Fortran-ordered matrix is finite; takes about 1 MiB whatever its size."""
    step = max(1, _BLOCK_BYTES // max(1, len(a)))
    return all(bool(np.isfinite(a[:, j : j + step]).all()) for j in range(0, a.shape[1], step))


def to_hessenberg_bytes(k: int, itemsize: int) -> int:
    """Peak memory of `to_hessenberg`: itemsize * (k^2 + 2 k + 64 k + 4160) bytes, plus 1 MiB.

    That is the matrix, `tau` and `scale`, and the workspace ?gehrd asks for with blocks of 64 columns at most
    (OpenBLAS asks for blocks of 32); the MiB is for `is_finite`. The buffers BLAS keeps for good are not in
    it.

    Args:
        k: order of the matrix.
        itemsize: 4 or 8.
    """
    return itemsize * (k * k + 66 * k + 4160) + _BLOCK_BYTES


def hessenberg_eigenvalues_bytes(k: int, itemsize: int) -> int:
    """Peak memory of `hessenberg_eigenvalues`: itemsize * (k^2 + 12 k + 32768) bytes.

    That is the matrix, `tau` and `scale`, and then k + 32768 items of workspace (?hseqr asks for k at least,
    and for its deflation window of 384 columns at most; OpenBLAS asks for 16865 items at k = 8000), or the
    values while they are sorted (two real and up to three complex vectors of length k, and their order as
    integers).

    Args:
        k: order of the matrix.
        itemsize: 4 or 8.
    """
    return itemsize * (k * k + 12 * k + 32768)


def hessenberg_eigenvectors_bytes(k: int, m: int, itemsize: int) -> int:
    """Peak memory of `hessenberg_eigenvectors`: itemsize * (k^2 + k (k + 2) + 8 k m + 12 k + 128 m + 4160).

    That is the matrix, the workspace of ?hsein, the vectors (real and imaginary parts apart, then complex: 4
    k m items each for both sides), vectors of length k, and the workspace of ?ormhr.

    Args:
        k: order of the matrix.
        m: how many eigenvalues.
        itemsize: 4 or 8.
    """
    return itemsize * (k * k + k * (k + 2) + 8 * k * m + 12 * k + lapack.ormhr_items(2 * m))


def device_bytes(k: int, itemsize: int) -> int:
    """Estimate device memory of the functions of `eigen.device`: itemsize * (5 k^2 + 64 k) bytes and 32 MiB.

    Eigenvectors take most: the matrix, the shifted one in complex numbers (two) and its LU (two); eigenvalues
    took two matrices. The 32 MiB are cuBLAS's workspace, as torch asks for it on Hopper. Measured by
    `bench/rates.py --device cuda` on one H200 (torch 2.11) at k = 1,024 to 8,192.

    Args:
        k: order of the matrix.
        itemsize: 4 or 8.
    """
    return itemsize * (5 * k * k + 64 * k) + CUBLAS_BYTES


def to_hessenberg_flops(k: int) -> int:
    """Floating-point operations of `to_hessenberg`: 10/3 k^3 (Golub & Van Loan, 4th ed., section 7.4.3)."""
    return 10 * k**3 // 3


def hessenberg_eigenvalues_flops(k: int) -> int:
    """Floating-point operations of `hessenberg_eigenvalues`: 20/3 k^3.

    Eigenvalues alone take about 10 k^3 in all (Golub & Van Loan, 4th ed., section 7.5.6), of which the
    reduction is 10/3 k^3. An estimate: the number of QR sweeps depends on the matrix.
    """
    return 20 * k**3 // 3


def _iterate(h: Hessenberg, values: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Fill two real columns for each value with the eigenvectors of H; return which converged."""
    k = len(h.a)
    work = np.empty(k * (k + 2) if len(values) else 0, h.a.dtype)
    converged = np.zeros(len(values), bool)
    for j, value in enumerate(values):
        upper = complex(value.real, abs(value.imag))
        pair = slice(2 * j, 2 * j + 2)
        converged[j] = lapack.hsein(h.a, upper, left[:, pair], right[:, pair], work)
    return converged


def _back_transformed(h: Hessenberg, parts: np.ndarray, side: str, below: np.ndarray) -> np.ndarray:
    """Turn eigenvectors of H into those of A, complex and of unit norm; conjugate where `below` says so."""
    if parts.size == 0:
        return np.zeros((len(h.a), parts.shape[1] // 2), _complex(h.a.dtype), order="F")
    lapack.ormhr(h.a, h.tau, h.ilo, h.ihi, parts)
    lapack.gebak(parts, h.ilo, h.ihi, h.scale, side)
    vectors = np.empty((len(h.a), parts.shape[1] // 2), _complex(h.a.dtype), order="F")
    for j in range(vectors.shape[1]):
        x = vectors[:, j]
        x.real = parts[:, 2 * j]
        x.imag = -parts[:, 2 * j + 1] if below[j] else parts[:, 2 * j + 1]
        _normalise(x)
    return vectors


def _normalise(x: np.ndarray) -> None:
    """Scale to unit 2-norm in place; first by the largest entry, for its square may be out of range."""
    peak = float(np.abs(x).max())
    if 0 < peak < math.inf:
        x /= peak
        x /= np.linalg.norm(x)


def _scale_into_range(a: np.ndarray) -> int:
    """Scale H in place by a power of two where ?geev would; return the exponent that undoes it."""
    limits = np.finfo(a.dtype)
    smallest = math.sqrt(float(limits.tiny)) / float(limits.eps)
    # Column by column to H's last entry: below are reflectors, whose size says nothing about the matrix.
    peak = max((float(np.abs(a[: j + 2, j]).max()) for j in range(len(a))), default=0.0)
    if peak == 0 or smallest <= peak <= 1 / smallest:
        return 0
    exponent = math.frexp(peak)[1]
    for j in range(len(a)):
        np.ldexp(a[: j + 2, j], -exponent, out=a[: j + 2, j])
    return exponent


def _check_values(values: np.ndarray, k: int) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise InputError(f"eigenvectors: needed a finite vector of eigenvalues, got shape {values.shape}")
    if len(values) and k == 0:
        raise InputError(f"eigenvectors: a matrix of order 0 has no eigenvalue, got {len(values)}")
    return values


def _complex(dtype: np.dtype) -> np.dtype:
    return np.result_type(dtype, np.complex64)
