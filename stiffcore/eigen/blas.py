"""BLAS and LAPACK in place, on parts of column-major arrays, which SciPy's own wrappers copy; or on a torch device.

On the host, the routines are those of the library that SciPy comes with (`stiffcore.eigen.lapack`), so that all
arithmetic on panels is one library's: NumPy comes with another one, and the threads of both would wait for each other.
Where an array is a torch tensor, torch does the same on its device. The tests run every line with device "cpu".
"""

import ctypes
from typing import Any

import numpy as np

from stiffcore.eigen.lapack import call

HOST = ""
# Of NumPy on the host, of torch on a device.
Array = Any

_PREFIXES = {np.dtype(np.float64): "d", np.dtype(np.complex128): "z"}


def _apart(a: np.ndarray) -> int:
    """How far the columns of a column-major array or a part of one are apart, in numbers."""
    rows, columns = a.shape
    apart = a.strides[1] // a.itemsize if columns > 1 else rows
    if (rows > 1 and a.strides[0] != a.itemsize) or apart < rows:
        raise ValueError(f"an array of shape {a.shape} and strides {a.strides} is not column-major")
    return max(1, apart)


def zeros(rows: int, columns: int, dtype: np.dtype, device: str) -> Array:
    """A column-major array of zeros, on a torch device or the `HOST`."""
    if device == HOST:
        return np.zeros((rows, columns), dtype, order="F")
    import torch  # which the command line does not load

    return torch.zeros((columns, rows), dtype=torch.from_numpy(np.empty(0, dtype)).dtype, device=device).T


def to_device(a: np.ndarray, device: str) -> Array:
    """An array of the host where it is needed; the same one, where that is the `HOST`."""
    if device == HOST:
        return a
    import torch

    return torch.from_numpy(a).to(device)


def to_host(a: Array) -> np.ndarray:
    """The inverse of `to_device`."""
    return a if isinstance(a, np.ndarray) else a.cpu().numpy()


def finite(a: Array) -> bool:
    """Whether all numbers are."""
    if isinstance(a, np.ndarray):
        return all(np.isfinite(a[:, j]).all() for j in range(a.shape[1]))
    return bool(a.isfinite().all())


def add_product(c: Array, factor: float, a: Array, b: Array) -> None:
    """c += factor a b, in place.

    Args:
        c: (m, n), float64 or complex128, a part of a column-major array, as the others.
        factor: any.
        a: (m, k), or its transpose as NumPy has it.
        b: (k, n).
    """
    (m, n), k = c.shape, a.shape[1]
    if not (m and n and k):
        return
    if not isinstance(c, np.ndarray):
        c.addmm_(a, b, alpha=factor)
        return
    across = b"N" if a.strides[0] == a.itemsize else b"T"
    apart = _apart(a if across == b"N" else a.T), _apart(b), _apart(c)
    alpha, beta = np.array(factor, c.dtype), np.array(1, c.dtype)
    call("gemm", _PREFIXES[c.dtype], across, b"N", m, n, k, alpha, a, apart[0], b, apart[1], beta, c, apart[2])


def solve_triangular(a: Array, b: Array, *, lower: bool = False, unit: bool = False, trans: str = "N") -> None:
    """b = a^-1 b, or a^-T b (`trans` is "T") or a^-H b ("C"), in place; of `a`, the other triangle is not looked at.

    Args:
        a: (n, n), triangular, a part of a column-major array, as b.
        b: (n, columns).
        lower: whether a is lower triangular; else upper.
        unit: whether its diagonal is taken to be 1.
        trans: see above.
    """
    n, columns = b.shape
    if not (n and columns):
        return
    if not isinstance(b, np.ndarray):
        import torch

        turned = {"N": a, "T": a.T, "C": a.mH}[trans]
        b.copy_(torch.linalg.solve_triangular(turned, b, upper=lower == (trans != "N"), unitriangular=unit))
        return
    triangle, diagonal, one = b"L" if lower else b"U", b"U" if unit else b"N", np.array(1, b.dtype)
    of_a = triangle, trans.encode(), diagonal
    call("trsm", _PREFIXES[b.dtype], b"L", *of_a, n, columns, one, a, _apart(a), b, _apart(b))


def factor(a: Array) -> tuple[np.ndarray, bool]:
    """P a = L U by partial pivoting, in place.

    Args:
        a: (m, n), m >= n, a part of a column-major array; becomes L and U.

    Returns:
        (n,) the rows that each row was swapped with, from 0 on; and whether no pivot is zero.
    """
    m, n = a.shape
    if not isinstance(a, np.ndarray):
        import torch

        factors, swapped, failed = torch.linalg.lu_factor_ex(a)
        a.copy_(factors)
        return swapped.cpu().numpy() - 1, not int(failed)
    pivots, info = np.zeros(n, np.intc), ctypes.c_int(0)
    call("getrf", _PREFIXES[a.dtype], m, n, a, _apart(a), pivots, info)
    return pivots - 1, info.value == 0


def cholesky(a: Array) -> bool:
    """a = R^T R, R upper triangular, in place; the other triangle is not looked at.

    Args:
        a: (n, n), symmetric, a part of a column-major array; its upper triangle becomes R.

    Returns:
        Whether a is positive definite; else a is spoilt.
    """
    if not isinstance(a, np.ndarray):
        import torch

        root, failed = torch.linalg.cholesky_ex(a, upper=True)
        a.copy_(root)
        return not int(failed)
    info = ctypes.c_int(0)
    call("potrf", _PREFIXES[a.dtype], b"U", len(a), a, _apart(a), info)
    return info.value == 0
