"""Eigenvalues of one dense matrix on a torch device, by cuSOLVER's Xgeev on CUDA; and products with a sparse one.

The tests run every line with device "cpu", where torch calls its own LAPACK; those marked `gpu` run it on CUDA.
A device that runs out of memory raises `torch.OutOfMemoryError`, which is the caller's cue to fall back.
"""

import math
import warnings

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import LinearOperator

from stiffcore.eigen.dense import CUSOLVER_MAX_ORDER, Eigenvectors, check_matrix, sort_eigenvalues
from stiffcore.errors import InputError

MAX_ITERATIONS = 3
"""Steps of inverse iteration at most; the best iterate counts.

One step from a random start nearly always does. A second improves vectors of a nearly normal matrix, and
spoils those of a far from normal one (Golub & Van Loan, 4th ed., section 7.6.1).
"""

_GOOD_EPS = 10.0
_ENOUGH_EPS = 1000.0
_PAIR_EPS = 1000.0


def check_cusolver_order(k: int) -> None:
    """Refuse a matrix too large for cuSOLVER's Xgeev.

    Args:
        k: order of the matrix.

    Raises:
        InputError: where `k` is over `CUSOLVER_MAX_ORDER`.
    """
    if k > CUSOLVER_MAX_ORDER:
        raise InputError(
            f"eig on the device: a matrix of order {k:,} has more entries than cuSOLVER can count (order"
            f" {CUSOLVER_MAX_ORDER:,} at most): use --solver host-dense, or divide"
        )


def device_eigenvalues(a: np.ndarray, device: str) -> np.ndarray:
    """Find all eigenvalues of a matrix on a torch device.

    Memory there is `dense.device_bytes`.

    Args:
        a: (k, k) float32 or float64, Fortran-ordered, finite; only read, though torch wants it writable.
        device: a torch device, "cuda:0" or "cpu".

    Returns:
        (k,) complex64 or complex128, in the order of `sort_eigenvalues`. Conjugate pairs are exact where the
        backend gives as many values above the real axis as below, equal up to rounding.

    Raises:
        InputError: where `a` is not such a matrix, or is over `CUSOLVER_MAX_ORDER`.
        torch.OutOfMemoryError: where it does not fit.
        torch.linalg.LinAlgError: where the backend did not converge.
    """
    check_matrix(a)
    check_cusolver_order(len(a))
    values = torch.linalg.eigvals(_to_device(a, device)).cpu().numpy()
    return sort_eigenvalues(_with_exact_pairs(values))


def device_eigenvectors(a: np.ndarray, values: np.ndarray, device: str) -> Eigenvectors:
    """Find right and left eigenvectors for a few eigenvalues, by inverse iteration with one LU a value.

    The shift is the value moved by eps * norm(A), pivots smaller than that are raised to it, and the start is
    the same pseudo-random vector each time, so that equal requests give equal vectors (Golub & Van Loan, 4th
    ed., section 7.6.1). A pair of vectors has converged when both residuals, norm(A x - lambda x) and
    norm(y^H A - lambda y^H), are at most 1000 eps norm(A) in the Frobenius norm. Unlike ?hsein this does not
    rescale inside the triangular solves: a large Jordan block overflows, and is flagged. Memory there is
    `dense.device_bytes`.

    Args:
        a: (k, k) float32 or float64, Fortran-ordered, finite; only read, though torch wants it writable.
        values: (m,) complex, some of the eigenvalues.
        device: a torch device, "cuda:0" or "cpu".

    Returns:
        The vectors, complex64 or complex128, in the order of `values`; those of a conjugate are the
        conjugates.

    Raises:
        InputError: where `a` or `values` is not what is needed.
        torch.OutOfMemoryError: where it does not fit.
    """
    check_matrix(a)
    check_cusolver_order(len(a))
    values = np.asarray(values)
    if values.ndim != 1 or not np.isfinite(values).all() or (len(values) and len(a) == 0):
        raise InputError(f"eigenvectors: needed finite eigenvalues of this matrix, got shape {values.shape}")
    matrix = _to_device(a, device)
    dtype = np.result_type(a.dtype, np.complex64)
    right = np.zeros((len(a), len(values)), dtype, order="F")
    left = np.zeros_like(right)
    converged = np.zeros(len(values), bool)
    for j, value in enumerate(values):
        upper = complex(value.real, abs(value.imag))
        x, y, converged[j] = _eigenpair(matrix, upper)
        right[:, j] = x.conj() if value.imag < 0 else x
        left[:, j] = y.conj() if value.imag < 0 else y
    return Eigenvectors(right, left, converged)


class DeviceMatrix(LinearOperator):
    """A sparse real matrix whose products are taken on a torch device; vectors come and go.

    Memory there is `stiffcore.eigen.sparse.device_matrix_bytes`.

    Attributes:
        host: (k, k) the matrix itself, for what has no routine on a device: sparse LU.

    Args:
        a: (k, k) float64.
        device: a torch device, "cuda:0" or "cpu".

    Raises:
        torch.OutOfMemoryError: where it does not fit.
    """

    def __init__(self, a: sp.csc_array, device: str) -> None:
        super().__init__(np.dtype(np.float64), a.shape)
        self.host, self._device = a, device
        self._by_row, self._by_column = (_to_sparse_device(m, device) for m in (a.tocsr(), a.T.tocsr()))

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return self._product(self._by_row, x)

    def _rmatvec(self, x: np.ndarray) -> np.ndarray:
        return self._product(self._by_column, x)

    def _product(self, matrix: torch.Tensor, x: np.ndarray) -> np.ndarray:
        x = np.asarray(x).ravel()
        if np.iscomplexobj(x):
            return self._product(matrix, x.real) + 1j * self._product(matrix, x.imag)
        there = torch.from_numpy(np.ascontiguousarray(x, np.float64)).to(self._device)
        return (matrix @ there).cpu().numpy()


def _to_sparse_device(a: sp.csr_array, device: str) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse", category=UserWarning)  # in beta, and not checked
        pointers, indices, data = (torch.from_numpy(part).to(device) for part in (a.indptr, a.indices, a.data))
        return torch.sparse_csr_tensor(pointers, indices, data, size=a.shape, check_invariants=False)


def _to_device(a: np.ndarray, device: str) -> torch.Tensor:
    """Move without a copy on the host: torch takes the Fortran order as strides."""
    return torch.from_numpy(a).to(device)


def _with_exact_pairs(values: np.ndarray) -> np.ndarray:
    """Make conjugate pairs exact that are so up to rounding: a backend may solve in complex numbers."""
    upper = sort_eigenvalues(values[values.imag > 0])
    lower = sort_eigenvalues(values[values.imag < 0].conj())
    if len(upper) != len(lower) or len(upper) == 0:
        return values
    tolerance = _PAIR_EPS * float(np.finfo(values.dtype).eps) * float(np.abs(values).max())
    if not np.abs(upper - lower).max() <= tolerance:
        return values
    return np.concatenate([values[values.imag == 0], upper, upper.conj()])


def _eigenpair(matrix: torch.Tensor, value: complex) -> tuple[np.ndarray, np.ndarray, bool]:
    """Right and left vector for one value on or above the real axis, and whether both converged."""
    eps = torch.finfo(matrix.dtype).eps
    norm = float(torch.linalg.vector_norm(matrix))
    step = eps * (norm or 1.0)
    factors, pivots = _shifted_lu(matrix, value, step)
    start = _start(len(matrix), factors)
    good = _GOOD_EPS * eps * norm
    x, right_residual = _iterate(matrix, factors, pivots, value, start, False, good)
    y, left_residual = _iterate(matrix, factors, pivots, value, start, True, good)
    return x, y, max(right_residual, left_residual) <= _ENOUGH_EPS * eps * norm


def _shifted_lu(matrix: torch.Tensor, value: complex, step: float) -> tuple[torch.Tensor, torch.Tensor]:
    """LU of A - (value + step) I without tiny pivots; real where the value is, at half the memory."""
    if value.imag == 0:
        shifted = matrix.clone()
        shifted.diagonal().sub_(value.real + step)
    else:
        shifted = matrix.to(torch.promote_types(matrix.dtype, torch.complex64))
        shifted.diagonal().sub_(value + step)
    factors, pivots, _ = torch.linalg.lu_factor_ex(shifted)
    diagonal = factors.diagonal()
    diagonal.masked_fill_(diagonal.abs() < step, step)
    return factors, pivots


def _start(k: int, like: torch.Tensor) -> torch.Tensor:
    """Start vector (k, 1): pseudo-random, for a constant one is orthogonal to many an eigenvector."""
    drawn = np.random.default_rng(0).standard_normal((k, 1))
    return torch.from_numpy(drawn).to(device=like.device, dtype=like.dtype)


def _iterate(
    matrix: torch.Tensor,
    factors: torch.Tensor,
    pivots: torch.Tensor,
    value: complex,
    x: torch.Tensor,
    adjoint: bool,
    good: float,
) -> tuple[np.ndarray, float]:
    """Best unit vector and its residual; the left one with A^H and the conjugate value. Ends when good."""
    operator, target = (matrix.mT, value.conjugate()) if adjoint else (matrix, value)
    best, least = x, math.inf
    for _ in range(MAX_ITERATIONS):
        x = torch.linalg.lu_solve(factors, pivots, x, adjoint=adjoint)
        x = x / torch.linalg.vector_norm(x, ord=float("inf"))
        x = x / torch.linalg.vector_norm(x)
        residual = _residual(operator, target, x)
        if residual < least:
            best, least = x, residual
        if residual <= good:
            break
    return best[:, 0].cpu().numpy(), least


def _residual(operator: torch.Tensor, value: complex, x: torch.Tensor) -> float:
    """Norm of A x - value x, multiplying the real A with real and imaginary parts: no complex copy of A."""
    if not x.is_complex():
        return float(torch.linalg.vector_norm(operator @ x - value.real * x))
    image = torch.view_as_complex((operator @ torch.view_as_real(x[:, 0])).contiguous())
    return float(torch.linalg.vector_norm(image - value * x[:, 0]))
