"""LAPACK by its own names, in place, without the interpreter's lock.

SciPy exposes ?hseqr and ?hsein only as capsules of `scipy.linalg.cython_lapack`, and its own wrappers hold
the global interpreter lock for the whole call, so that a worker's heartbeat stops for minutes. `ctypes` calls
the same capsules without the lock, and those of BLAS (`stiffcore.eigen.blas`). Here, real single and double precision
only; the prefix follows from the array's dtype.

All matrices are Fortran-ordered. Indices `ilo` and `ihi` are LAPACK's own: they count from 1 and include both
ends.
"""

import ctypes
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from scipy.linalg import cython_blas, cython_lapack

from stiffcore.errors import InputError, StiffcoreError

_PREFIXES = {"float32": "s", "float64": "d"}

_ARGUMENTS = {
    "gebal": "job n a lda ilo ihi scale info",
    "gehrd": "n ilo ihi a lda tau work lwork info",
    "hseqr": "job compz n ilo ihi h ldh wr wi z ldz work lwork info",
    "hsein": "side eigsrc initv select n h ldh wr wi vl ldvl vr ldvr mm m work ifaill ifailr info",
    "ormhr": "side trans m n ilo ihi a lda tau c ldc work lwork info",
    "gebak": "job side n ilo ihi scale m v ldv info",
    "getrf": "m n a lda ipiv info",
    "potrf": "uplo n a lda info",
    "gemm": "transa transb m n k alpha a lda b ldb beta c ldc",
    "trsm": "side uplo transa diag m n alpha a lda b ldb",
}
_OF_BLAS = ("gemm", "trsm")

_FAILURES = {
    "hseqr": "the QR iteration did not converge: only the eigenvalues after number {info} were found",
}

# Blocks of 64 columns and a 65 x 64 triangular factor are the most that ?ormqr and ?gehrd use (their NBMAX,
# LDT).
_BLOCK = 64
_TRIANGLE = (_BLOCK + 1) * _BLOCK

_python = ctypes.pythonapi
_capsule_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", _python))
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", _python)
)


def gebal(a: np.ndarray) -> tuple[int, int, np.ndarray]:
    """Balance `a` in place: permute isolated eigenvalues to its ends, then scale what is between.

    Args:
        a: (k, k) float32 or float64, Fortran-ordered; overwritten.

    Returns:
        `ilo`, `ihi` (rows and columns outside are upper triangular already) and `scale` (k,), which undoes
        it.

    Raises:
        InputError: where `a` is not what LAPACK can overwrite.
        StiffcoreError: where LAPACK refuses it (a NaN, from LAPACK 3.12).
    """
    order = _order(a)
    ilo, ihi = ctypes.c_int(), ctypes.c_int()
    scale = np.empty(order, a.dtype)
    _call("gebal", a.dtype, b"B", order, a, max(1, order), ilo, ihi, scale)
    return ilo.value, ihi.value, scale


def gehrd(a: np.ndarray, ilo: int, ihi: int) -> np.ndarray:
    """Reduce `a` in place to upper Hessenberg form; the Householder reflectors stay below the subdiagonal.

    Args:
        a: (k, k) float32 or float64, Fortran-ordered, as `gebal` left it; overwritten.
        ilo: first row to reduce.
        ihi: last row to reduce.

    Returns:
        `tau` (max(k - 1, 0),), the factors of the reflectors.

    Raises:
        InputError: where `a` is not what LAPACK can overwrite.
        StiffcoreError: where LAPACK refuses an argument.
    """
    order = _order(a)
    tau = np.empty(max(order - 1, 0), a.dtype)
    _call_with_work("gehrd", order, a.dtype, order, ilo, ihi, a, max(1, order), tau)
    return tau


def hseqr(h: np.ndarray, ilo: int, ihi: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the eigenvalues of an upper Hessenberg matrix, destroying it.

    What stands below the subdiagonal does not count as matrix, and is overwritten.

    Args:
        h: (k, k) float32 or float64, Fortran-ordered; overwritten.
        ilo: first row of the part that is not yet triangular.
        ihi: last row of it.

    Returns:
        Real and imaginary parts, each (k,), in LAPACK's order: the member of a pair with positive imaginary
        part first.

    Raises:
        InputError: where `h` is not what LAPACK can overwrite.
        StiffcoreError: where the QR iteration did not converge.
    """
    order = _order(h)
    lead = max(1, order)
    real, imag = np.empty(order, h.dtype), np.empty(order, h.dtype)
    _call_with_work("hseqr", order, h.dtype, b"E", b"N", order, ilo, ihi, h, lead, real, imag, None, 1)
    return real, imag


def hsein(h: np.ndarray, value: complex, left: np.ndarray, right: np.ndarray, work: np.ndarray) -> bool:
    """Find left and right eigenvector of an upper Hessenberg matrix for one eigenvalue, by inverse iteration.

    One eigenvalue a call, for ?hsein moves each eigenvalue away from close ones selected in the same call:
    here the answer for one value cannot depend on what else is asked.

    Args:
        h: (k, k) float32 or float64, Fortran-ordered; only the upper Hessenberg part is read.
        value: the eigenvalue; imaginary part zero or positive.
        left: (k, 2), same dtype, Fortran-ordered; overwritten. Real part in column 0, imaginary part in
            column 1, which is left alone where `value` is real.
        right: likewise.
        work: at least k * (k + 2) items, same dtype.

    Returns:
        Whether both converged. The vectors are written either way.

    Raises:
        InputError: where an array is not what LAPACK can overwrite, or a 1 x 1 matrix is asked for a complex
            value.
        StiffcoreError: where LAPACK refuses an argument (it refuses NaN in `h`).
    """
    order = _order(h)
    _check(left, h.dtype, (order, 2))
    _check(right, h.dtype, (order, 2))
    _check(work, h.dtype, (max(work.size, order * (order + 2)),))
    slots = 1 if value.imag == 0 else 2
    if slots > order:
        raise InputError(f"eigenvectors: a real {order} x {order} matrix has no complex eigenvalue, got {value}")
    select = np.zeros(order, np.intc)
    real, imag = np.zeros(order, h.dtype), np.zeros(order, h.dtype)
    select[0] = 1
    real[:slots] = value.real
    imag[:slots] = [value.imag, -value.imag][:slots]
    failed_left, failed_right = np.zeros(2, np.intc), np.zeros(2, np.intc)
    lead = max(1, order)
    vectors = (left, lead, right, lead, 2, ctypes.c_int())
    info = _info("hsein", h.dtype, b"B", b"N", b"N", select, order, h, lead, real, imag, *vectors,
                 work, failed_left, failed_right)  # fmt: skip
    _refuse("hsein", h.dtype, min(info, 0))
    return info == 0


def ormhr(a: np.ndarray, tau: np.ndarray, ilo: int, ihi: int, c: np.ndarray) -> None:
    """Multiply `c` in place by the orthogonal Q of a Hessenberg reduction: c = Q c.

    LAPACK borrows single entries of `a` while it runs and restores them: no other thread may use `a`
    meanwhile.

    Args:
        a: (k, k) as `gehrd` left it.
        tau: (max(k - 1, 0),) as `gehrd` returned it.
        ilo: as given to `gehrd`.
        ihi: as given to `gehrd`.
        c: (k, m), same dtype, Fortran-ordered; overwritten.

    Raises:
        InputError: where an array is not what LAPACK can overwrite.
        StiffcoreError: where LAPACK refuses an argument.
    """
    order = _order(a)
    columns = c.shape[1]
    _check(c, a.dtype, (order, columns))
    _check(tau, a.dtype, (max(order - 1, 0),))
    # ?ormhr's answer to a workspace query leaves out the triangular factor, and ?ormqr then falls back to
    # unblocked code (LAPACK 3.12): ask for what ?ormqr wants.
    work = np.empty(ormhr_items(columns), a.dtype)
    lead = max(1, order)
    _call("ormhr", a.dtype, b"L", b"N", order, columns, ilo, ihi, a, lead, tau, c, lead, work, work.size)


def ormhr_items(columns: int) -> int:
    """Workspace of `ormhr` in items: 64 per column, and 4160."""
    return _BLOCK * columns + _TRIANGLE


def gebak(v: np.ndarray, ilo: int, ihi: int, scale: np.ndarray, side: str) -> None:
    """Undo a balancing on eigenvectors, in place.

    Args:
        v: (k, m) float32 or float64, Fortran-ordered; overwritten.
        ilo: from `gebal`.
        ihi: from `gebal`.
        scale: (k,) from `gebal`, same dtype.
        side: "R" for right eigenvectors, "L" for left ones.

    Raises:
        InputError: where an array is not what LAPACK can overwrite.
        StiffcoreError: where LAPACK refuses an argument.
    """
    order, columns = v.shape
    _check(v, v.dtype, v.shape)
    _check(scale, v.dtype, (order,))
    _call("gebak", v.dtype, b"B", side.encode(), order, ilo, ihi, scale, columns, v, max(1, order))


def _call(routine: str, dtype: np.dtype, *arguments: Any) -> None:
    _refuse(routine, dtype, _info(routine, dtype, *arguments))


def _call_with_work(routine: str, least: int, dtype: np.dtype, *arguments: Any) -> None:
    """Call a routine whose last arguments are work, lwork and info, with the workspace it asks for.

    Never with less than `least` items: ?gehrd asks for one where it has nothing to reduce, then refuses that.
    """
    query = np.zeros(1, dtype)
    _call(routine, dtype, *arguments, query, -1)
    # The size comes back as a floating-point number, and float32 rounds one above 2^24 down as well as up.
    size = math.ceil(float(query[0]) * (1 + float(np.finfo(dtype).eps)))
    work = np.empty(max(1, least, size), dtype)
    _call(routine, dtype, *arguments, work, work.size)


def _info(routine: str, dtype: np.dtype, *arguments: Any) -> int:
    """Call and return info."""
    info = ctypes.c_int(0)
    call(routine, _prefix(dtype), *arguments, info)
    return info.value


def call(routine: str, prefix: str, *arguments: Any) -> None:
    """Call a routine of LAPACK or BLAS. Arguments that are not arrays are passed by reference, as Fortran wants them.

    Args:
        routine: without its prefix, one of those that this module knows.
        prefix: by the numbers: "s", "d" or "z".
        arguments: all of them; of a part of an array, where it begins is what counts.
    """
    _function(routine, prefix)(*(_pointer(argument) for argument in arguments))


def _pointer(argument: Any) -> Any:
    if argument is None or isinstance(argument, bytes):
        return argument
    if isinstance(argument, np.ndarray):
        return argument.ctypes.data_as(ctypes.c_void_p)  # keeps the array alive
    return ctypes.byref(argument if isinstance(argument, ctypes.c_int) else ctypes.c_int(argument))


@cache
def _function(routine: str, prefix: str) -> Callable[..., None]:
    """Bind one capsule, after a look at its signature: one with 64-bit integers must not be called so."""
    library = cython_blas if routine in _OF_BLAS else cython_lapack
    capsule = library.__pyx_capi__[prefix + routine]
    name = _capsule_name(capsule)
    signature = name.decode()
    expected = len(_ARGUMENTS[routine].split())
    if signature.count(",") + 1 != expected or "int *" not in signature:
        raise StiffcoreError(
            f"LAPACK {prefix}{routine}: SciPy offers {signature!r}, needed {expected} arguments with `int *`"
            " among them; use a scipy that stiffcore was tested with (1.14 to 1.17)"
        )
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * expected)(_capsule_pointer(capsule, name))


def _refuse(routine: str, dtype: np.dtype, info: int) -> None:
    if info == 0:
        return
    names = _ARGUMENTS[routine].split()
    if info < 0:
        meaning = f"argument {-info} ({names[-info - 1]}) is not acceptable: not finite, or out of range"
    else:
        meaning = _FAILURES.get(routine, "it did not succeed").format(info=info)
    raise StiffcoreError(f"LAPACK {_prefix(dtype)}{routine}: info = {info}: {meaning}")


def _prefix(dtype: np.dtype) -> str:
    prefix = _PREFIXES.get(dtype.name)
    if prefix is None:
        raise InputError(f"LAPACK: needed float32 or float64, got {dtype}")
    return prefix


def _order(a: np.ndarray) -> int:
    order = a.shape[0] if a.ndim == 2 else -1
    _check(a, a.dtype, (order, order))
    return order


def _check(array: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Refuse an array that LAPACK would misread: it sees a bare pointer."""
    _prefix(dtype)
    if array.dtype != dtype or array.shape != shape:
        raise InputError(f"LAPACK: needed {dtype} of shape {shape}, got {array.dtype} of shape {array.shape}")
    if not (array.flags.f_contiguous and array.flags.writeable and array.flags.aligned and dtype.isnative):
        raise InputError("LAPACK: needed a writable, aligned, Fortran-ordered array in native byte order")
