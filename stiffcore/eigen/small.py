"""Eigenvalues of one real matrix of order 1 to 8: scalar code that numba compiles, for a host's or a device's thread.

LAPACK's way of `geev` without vectors, for orders at which calling LAPACK takes longer than its arithmetic: rows and
columns that isolate an eigenvalue are permuted away (so that an eigenvalue that is 0 by structure is 0 exactly), the
rest is scaled by powers of two (Parlett & Reinsch, Numer. Math. 13 (1969)), reduced to Hessenberg form by reflections,
and taken apart by Francis' double shifted QR steps (Golub & Van Loan, Matrix Computations, 4th ed. 2013, section 7.5)
with the deflation criterion of Ahues & Tisseur (LAPACK Working Note 122, 1997). Backward stable: each value is an
eigenvalue of a matrix that differs by a small multiple of eps |A|.

Nothing is allocated here: the caller gives an (8, 8) array that is overwritten, and two of 8 numbers. Importing this
module imports numba; only who has such matrices does. What is compiled is kept in a folder of the user's own, see
`compiled_folder`.
"""

import hashlib
import math
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba.core.caching import FunctionCache

from stiffcore.metrics import HISTOGRAM_EDGES

# Of the largest matrix; a device's thread has arrays of a fixed size.
MOST_ORDER = 8
# Between these largest entries no square of what is not negligible underflows or overflows.
SMALLEST, LARGEST = 1e-120, 1e120
# What one_spectrum() says of a matrix.
ZERO, FOUND, DOUBTFUL = 0, 1, 2
_EPS = float(np.finfo(np.float64).eps)
_TINY = float(np.finfo(np.float64).tiny)
# Francis steps for one eigenvalue, and after how many a shift is no longer by the book (LAPACK's dlahqr).
_STEPS = 300
_EXCEPTIONAL = 10


def compiled_folder() -> Path | None:
    """Where compiled code of this version of this file is kept; None where no folder is safe, or none can be written.

    numba keeps pickles, which do whatever they say when they are read. So the folder is below the user's own cache
    folder, and used only where nobody else can put anything into it, or another folder in its place.
    """
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = (Path(base) if os.path.isabs(base) else Path.home() / ".cache").resolve()
        folder = root / "stiffcore" / f"numba-{numba.__version__}-{source}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        safe = folder.resolve() == folder and all(_is_closed(f) for f in (folder, *folder.parents))
        return folder if safe and os.lstat(folder).st_uid == os.geteuid() and os.access(folder, os.W_OK) else None
    except (OSError, RuntimeError):  # RuntimeError: no home
        return None


def _is_closed(folder: Path) -> bool:
    """Whether a folder is this user's or the system's, and others cannot replace what is in it."""
    found = os.lstat(folder)
    others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX
    return stat.S_ISDIR(found.st_mode) and found.st_uid in (0, os.geteuid()) and not others


class _Kept(FunctionCache):
    """Compiled code on disk, which is a convenience: where it cannot be read or written, it is compiled again."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # a pickle that is damaged raises anything
            with suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):  # a full disk
            super().save_overload(sig, data)


_FOLDER = compiled_folder()


def compiled(function: Callable[..., Any]) -> Any:
    """Compile for the host at the first call, without the GIL; numbers are IEEE's, a division by 0 included."""
    found: Any = numba.njit(nogil=True, error_model="numpy")(function)
    config: Any = numba.config
    if _FOLDER is not None:
        before, config.CACHE_DIR = config.CACHE_DIR, str(_FOLDER)
        try:
            found._cache = _Kept(function)
        finally:
            config.CACHE_DIR = before
    return found


@compiled
def two_by_two(a: float, b: float, c: float, d: float) -> tuple[float, float, float, float]:
    """Eigenvalues of ((a, b), (c, d)): real and imaginary part of the one, then of the other.

    LAPACK's dlanv2: the rotation that makes it standard, without the rotation.
    """
    if c == 0.0 or b == 0.0:
        return a, 0.0, d, 0.0
    p = 0.5 * (a - d)
    opposite = (b > 0.0) != (c > 0.0)
    if p == 0.0 and opposite:
        imaginary = math.sqrt(abs(b)) * math.sqrt(abs(c))
        return a, imaginary, a, -imaginary
    most, least = max(abs(b), abs(c)), min(abs(b), abs(c))
    if opposite:
        least = -least
    scale = max(abs(p), most)
    z = p / scale * p + most / scale * least
    if z >= 4.0 * _EPS * scale:  # two real ones, well apart
        z = p + math.copysign(math.sqrt(scale) * math.sqrt(z), p)
        return d + z, 0.0, d - most / z * least, 0.0
    sigma = b + c
    tau = math.hypot(sigma, 2.0 * p)
    cs = math.sqrt(0.5 * (1.0 + abs(sigma) / tau))
    sn = -p / (tau * cs) * math.copysign(1.0, sigma)
    aa, bb = a * cs + b * sn, b * cs - a * sn
    cc, dd = c * cs + d * sn, d * cs - c * sn
    middle = 0.5 * ((aa * cs + cc * sn) + (dd * cs - bb * sn))
    b, c = bb * cs + dd * sn, cc * cs - aa * sn
    if b == 0.0 or c == 0.0:
        return middle, 0.0, middle, 0.0
    root = math.sqrt(abs(b)) * math.sqrt(abs(c))
    if (b > 0.0) == (c > 0.0):
        return middle + root, 0.0, middle - root, 0.0
    return middle, root, middle, -root


@compiled
def _swap(a: Any, n: int, i: int, j: int) -> None:
    """Rows and columns i and j change places."""
    for k in range(n):
        a[i, k], a[j, k] = a[j, k], a[i, k]
    for k in range(n):
        a[k, i], a[k, j] = a[k, j], a[k, i]


@compiled
def _isolate(a: Any, n: int) -> tuple[int, int]:
    """Permute eigenvalues that stand alone to the diagonal's ends: first and last index of the rest."""
    low, high = 0, n - 1
    again = True
    while again and high > 0:  # rows that are zero but for their diagonal go to the bottom
        again = False
        for i in range(high, -1, -1):
            alone = True
            for j in range(high + 1):
                if j != i and a[i, j] != 0.0:
                    alone = False
                    break
            if alone:
                if i != high:
                    _swap(a, n, i, high)
                high -= 1
                again = True
                break
    again = True
    while again and low < high:  # columns go to the left
        again = False
        for j in range(low, high + 1):
            alone = True
            for i in range(low, high + 1):
                if i != j and a[i, j] != 0.0:
                    alone = False
                    break
            if alone:
                if j != low:
                    _swap(a, n, j, low)
                low += 1
                again = True
                break
    return low, high


@compiled
def _scale(a: Any, low: int, high: int) -> None:
    """Scale rows and columns, by powers of two that are each other's inverse, until their 1-norms are alike."""
    again = True
    while again:
        again = False
        for i in range(low, high + 1):
            c = r = 0.0
            for j in range(low, high + 1):
                if j != i:
                    c += abs(a[j, i])
                    r += abs(a[i, j])
            if c < _TINY or r < _TINY:  # what underflowed stays
                continue
            before, f = c + r, 1.0
            while c < 0.5 * r and f < 1e100:
                f *= 2.0
                c *= 4.0
            while c >= 2.0 * r and f > 1e-100:
                f *= 0.5
                c *= 0.25
            if c + r < 0.95 * before * f:
                again = True
                for j in range(low, high + 1):
                    a[i, j] /= f
                for j in range(low, high + 1):
                    a[j, i] *= f


@compiled
def _to_hessenberg(a: Any, low: int, high: int) -> None:
    """Reflections from the left and the right; what is below the subdiagonal is not looked at again."""
    for m in range(low, high - 1):
        alpha, tail = a[m + 1, m], 0.0
        for i in range(m + 2, high + 1):
            tail += a[i, m] * a[i, m]
        if tail == 0.0:
            continue
        beta = -math.copysign(math.sqrt(alpha * alpha + tail), alpha)
        first = alpha - beta
        tau, inverse = -first / beta, 1.0 / first
        for i in range(m + 2, high + 1):  # the reflection is I - tau v v', v = (1, a[m + 2:, m])
            a[i, m] *= inverse
        for j in range(m + 1, high + 1):
            t = a[m + 1, j]
            for i in range(m + 2, high + 1):
                t += a[i, m] * a[i, j]
            t *= tau
            a[m + 1, j] -= t
            for i in range(m + 2, high + 1):
                a[i, j] -= t * a[i, m]
        for i in range(low, high + 1):
            t = a[i, m + 1]
            for j in range(m + 2, high + 1):
                t += a[i, j] * a[j, m]
            t *= tau
            a[i, m + 1] -= t
            for j in range(m + 2, high + 1):
                a[i, j] -= t * a[j, m]
        a[m + 1, m] = beta


@compiled
def _is_negligible(below: float, above: float, first: float, second: float, beside: float) -> bool:
    """Whether a subdiagonal entry may be 0 (Ahues & Tisseur).

    Args:
        below: the entry.
        above: the one that it faces.
        first: the diagonal's before it.
        second: and after it.
        beside: the subdiagonal's next to it, in modulus and together.
    """
    small = abs(below)
    if small <= _TINY:
        return True
    test = abs(first) + abs(second)
    if test == 0.0:
        test = beside
    if small > _EPS * test:
        return False
    other, apart = abs(above), abs(first - second)
    least, most = min(small, other), max(small, other)
    one, two = max(abs(second), apart), min(abs(second), apart)
    s = one + most
    return least * (most / s) <= max(_TINY, _EPS * (two * (one / s)))


@compiled
def _three_by_three(a: Any, re: Any, im: Any) -> bool:
    """The eigenvalues of most matrices of order 3, in registers; False, and `a` as it was, where more care is needed.

    As for larger ones, but that nothing is permuted or scaled: what has a zero beside its diagonal is not taken, nor
    what differs by more than 16 from a matrix that is scaled.
    """
    a00, a01, a02 = a[0, 0], a[0, 1], a[0, 2]
    a10, a11, a12 = a[1, 0], a[1, 1], a[1, 2]
    a20, a21, a22 = a[2, 0], a[2, 1], a[2, 2]
    r0, r1, r2 = abs(a01) + abs(a02), abs(a10) + abs(a12), abs(a20) + abs(a21)
    c0, c1, c2 = abs(a10) + abs(a20), abs(a01) + abs(a21), abs(a02) + abs(a12)
    if min(min(abs(a01), abs(a02)), min(abs(a10), abs(a12)), min(abs(a20), abs(a21))) == 0.0:
        return False
    if max(r0, c0) > 16.0 * min(r0, c0) or max(r1, c1) > 16.0 * min(r1, c1) or max(r2, c2) > 16.0 * min(r2, c2):
        return False
    # to Hessenberg form, by the rotation that takes a20 away
    s = 1.0 / math.sqrt(a10 * a10 + a20 * a20)
    c, s = a10 * s, a20 * s
    h00, h01, h02 = a00, a01 * c + a02 * s, a02 * c - a01 * s
    h10 = a10 * c + a20 * s
    b11, b12, b21, b22 = a11 * c + a21 * s, a12 * c + a22 * s, a21 * c - a11 * s, a22 * c - a12 * s
    h11, h12, h21, h22 = b11 * c + b12 * s, b12 * c - b11 * s, b21 * c + b22 * s, b22 * c - b21 * s
    for _ in range(_EXCEPTIONAL):
        if _is_negligible(h21, h12, h11, h22, abs(h10)):
            re[0], im[0], re[1], im[1] = two_by_two(h00, h01, h10, h11)
            re[2], im[2] = h22, 0.0
            return True
        if _is_negligible(h10, h01, h00, h11, abs(h21)):
            re[0], im[0] = h00, 0.0
            re[1], im[1], re[2], im[2] = two_by_two(h11, h12, h21, h22)
            return True
        product, half = h12 * h21, 0.5 * (h11 - h22)
        d = half * half + product
        if d < 0.0:
            p = (h00 - h11) * (h00 - h22) - product
            q = h00 - h22
        else:
            root = half + math.copysign(math.sqrt(d), half)
            shift = h22 - product / root if root != 0.0 else h22
            p = (h00 - shift) * (h00 - shift)
            q = (h00 - shift) + (h11 - shift)
        p, q, r = p + h01 * h10, q * h10, h10 * h21
        s = 1.0 / (abs(p) + abs(q) + abs(r))
        p, q, r = p * s, q * s, r * s
        s = math.copysign(math.sqrt(p * p + q * q + r * r), p)
        inverse, p = 1.0 / s, p + s
        x, y, z = p * inverse, q * inverse, r * inverse
        inverse = 1.0 / p
        q, r = q * inverse, r * inverse
        t = h00 + q * h10
        h00, h10, h20 = h00 - t * x, h10 - t * y, -t * z
        t = h01 + q * h11 + r * h21
        h01, h11, h21 = h01 - t * x, h11 - t * y, h21 - t * z
        t = h02 + q * h12 + r * h22
        h02, h12, h22 = h02 - t * x, h12 - t * y, h22 - t * z
        t = x * h00 + y * h01 + z * h02
        h00, h01, h02 = h00 - t, h01 - t * q, h02 - t * r
        t = x * h10 + y * h11 + z * h12
        h10, h11, h12 = h10 - t, h11 - t * q, h12 - t * r
        t = x * h20 + y * h21 + z * h22
        h20, h21, h22 = h20 - t, h21 - t * q, h22 - t * r
        # back to Hessenberg form, by a rotation
        s = h10 * h10 + h20 * h20
        if s > 0.0:
            s = 1.0 / math.sqrt(s)
            c, s = h10 * s, h20 * s
            h10 = h10 * c + h20 * s
            b11, b12, b21, b22 = h11 * c + h21 * s, h12 * c + h22 * s, h21 * c - h11 * s, h22 * c - h12 * s
            h01, h02 = h01 * c + h02 * s, h02 * c - h01 * s
            h11, h12, h21, h22 = b11 * c + b12 * s, b12 * c - b11 * s, b21 * c + b22 * s, b22 * c - b21 * s
    return False


@compiled
def _francis_step(a: Any, top: int, end: int, trace: float, determinant: float) -> None:
    """One implicit double shifted QR step on rows and columns top to end, three of them at least."""
    # where two subdiagonal entries in a row are small enough together, the bulge can start there
    m = end - 2
    p = q = r = 0.0
    while True:
        z = a[m, m]
        p = (z * z - trace * z + determinant) / a[m + 1, m] + a[m, m + 1]
        q = z + a[m + 1, m + 1] - trace
        r = a[m + 2, m + 1]
        s = 1.0 / (abs(p) + abs(q) + abs(r))
        p, q, r = p * s, q * s, r * s
        if m == top:
            break
        near = abs(a[m - 1, m - 1]) + abs(z) + abs(a[m + 1, m + 1])
        if abs(a[m, m - 1]) * (abs(q) + abs(r)) <= _EPS * abs(p) * near:
            break
        m -= 1
    for k in range(m, end):
        last = k == end - 1
        if k > m:
            p, q, r = a[k, k - 1], a[k + 1, k - 1], 0.0 if last else a[k + 2, k - 1]
        s = math.copysign(math.sqrt(p * p + q * q + r * r), p)
        if s == 0.0:
            continue
        if k > m:
            a[k, k - 1] = -s
        elif m > top:
            a[k, k - 1] = -a[k, k - 1]
        p += s
        x, y, z = p / s, q / s, r / s
        inverse = 1.0 / p
        q, r = q * inverse, r * inverse
        if last:
            for j in range(k, end + 1):
                t = a[k, j] + q * a[k + 1, j]
                a[k, j] -= t * x
                a[k + 1, j] -= t * y
            for i in range(top, end + 1):
                t = x * a[i, k] + y * a[i, k + 1]
                a[i, k] -= t
                a[i, k + 1] -= t * q
        else:
            for j in range(k, end + 1):
                t = a[k, j] + q * a[k + 1, j] + r * a[k + 2, j]
                a[k, j] -= t * x
                a[k + 1, j] -= t * y
                a[k + 2, j] -= t * z
            for i in range(top, min(end, k + 3) + 1):
                t = x * a[i, k] + y * a[i, k + 1] + z * a[i, k + 2]
                a[i, k] -= t
                a[i, k + 1] -= t * q
                a[i, k + 2] -= t * r
        if k > m:
            a[k + 1, k - 1] = 0.0
            if not last:
                a[k + 2, k - 1] = 0.0


@compiled
def _take_apart(a: Any, low: int, high: int, re: Any, im: Any) -> bool:
    """Eigenvalues of a Hessenberg matrix, rows and columns low to high; False where a step too many was needed."""
    for k in range(low + 2, high + 1):
        for j in range(low, k - 1):
            a[k, j] = 0.0
    end, steps = high, 0
    while end >= low:
        top = end
        while top > low:
            beside = abs(a[top - 1, top - 2]) if top - 2 >= low else 0.0
            beside += abs(a[top + 1, top]) if top + 1 <= high else 0.0
            if _is_negligible(a[top, top - 1], a[top - 1, top], a[top - 1, top - 1], a[top, top], beside):
                break
            top -= 1
        if top > low:
            a[top, top - 1] = 0.0
        if top == end:
            re[end], im[end] = a[end, end], 0.0
            end, steps = end - 1, 0
            continue
        if top == end - 1:
            re[top], im[top], re[end], im[end] = two_by_two(a[top, top], a[top, end], a[end, top], a[end, end])
            end, steps = end - 2, 0
            continue
        if steps == _STEPS:
            return False
        steps += 1
        if steps % _EXCEPTIONAL == 0:  # from the top and the bottom in turn
            at = end if steps % (2 * _EXCEPTIONAL) == 0 else top + 2
            s = abs(a[at, at - 1]) + abs(a[at - 1, at - 2])
            x = 0.75 * s + (a[end, end] if at == end else a[top, top])
            trace, determinant = 2.0 * x, x * x + 0.4375 * s * s
        else:
            last, product = a[end, end], a[end - 1, end] * a[end, end - 1]
            half = 0.5 * (a[end - 1, end - 1] - last)
            if half * half + product < 0.0:
                trace, determinant = a[end - 1, end - 1] + last, a[end - 1, end - 1] * last - product
            else:  # of two real shifts the nearer one, twice: with both, a few matrices never converge
                root = math.copysign(math.sqrt(half * half + product), half)
                if half + root != 0.0:
                    last -= product / (half + root)
                trace, determinant = 2.0 * last, last * last
        _francis_step(a, top, end, trace, determinant)
    return True


@compiled
def small_eigenvalues(a: Any, n: int, re: Any, im: Any) -> int:
    """All eigenvalues of a small matrix; conjugates stand beside each other.

    Args:
        a: (8, 8) float64, the matrix in its first n rows and columns, largest entry between `SMALLEST` and `LARGEST`;
            overwritten.
        n: 1 to 8.
        re: (8,) float64, gets n real parts.
        im: (8,) float64, gets n imaginary parts.

    Returns:
        How many of them are 0 by the places of the matrix's zeros; -1: not all were found.
    """
    if n == 2 and a[0, 1] != 0.0 and a[1, 0] != 0.0:
        re[0], im[0], re[1], im[1] = two_by_two(a[0, 0], a[0, 1], a[1, 0], a[1, 1])
        return 0
    if n == 3 and _three_by_three(a, re, im):
        return 0
    low, high = _isolate(a, n)
    zeros = 0
    for i in range(n):
        if i < low or i > high or low == high:
            re[i], im[i] = a[i, i], 0.0
            zeros += a[i, i] == 0.0
    if high <= low:
        return zeros
    _scale(a, low, high)
    _to_hessenberg(a, low, high)
    return zeros if _take_apart(a, low, high, re, im) else -1


@compiled
def _is_doubtful(n: int, zeros: int, re: Any, im: Any, norm: float, trace: float, rounding: float) -> bool:
    """Whether a sign may be within the rounding of its matrix, by bounds that are cheap and never too small.

    A value that is 0, and not one of so many that must be, is rounding, too.

    An eigenvalue moves by norm (rounding / norm)^(1/n) at most, whatever its condition; and by rounding times its
    condition, to first order, which is the norm of the adjugate of A - l I over the product of the distances to the
    other eigenvalues: at most (|A - l I|_F / sqrt(n - 1))^(n - 1) over that product (by the inequality of the means,
    for singular values). Both with room, because what is doubtful is looked at again, by its eigenvectors; where two
    values are the same and those may not be told apart, nothing is certain.
    """
    unit = 1.0 / norm
    for i in range(n):
        if re[i] == 0.0 and im[i] == 0.0:
            zeros -= 1
            continue
        x = abs(re[i]) * unit
        power = x
        for _ in range(n - 1):
            power *= x
        if power > 4.0 * rounding * unit:
            continue
        square = 1.0 - 2.0 * (re[i] * unit) * (trace * unit) + n * (x * x + (im[i] * unit) ** 2)
        spread = max(square, 1e-14) / max(n - 1, 1)
        condition = 1.0
        for j in range(n):
            if j != i:
                u, v = (re[i] - re[j]) * unit, (im[i] - im[j]) * unit
                condition *= spread / (u * u + v * v)
        if not abs(re[i]) > 8.0 * rounding * max(math.sqrt(condition), 1.0):  # nan, too
            return True
        for j in range(n):
            for k in range(j):
                if abs(re[j] - re[k]) + abs(im[j] - im[k]) <= 1e-12 * norm:
                    return True
    return zeros < 0


@compiled
def one_spectrum(a: Any, n: int, scale: float, eps: float, sums: Any, re: Any, im: Any) -> int:
    """The eigenvalues of one small matrix, where there is no doubt about them.

    Args:
        a: as for `small_eigenvalues`, of any size.
        n: 1 to 8.
        scale: its entries are right to 4 eps of this.
        eps: and each to this, relative to the matrix.
        sums: (3,) float64, gets the trace, that of the square, and the square of the Frobenius norm.
        re: as for `small_eigenvalues`.
        im: as there.

    Returns:
        `ZERO`: the matrix is 0. `FOUND`. `DOUBTFUL`: a number is out of the range of this code or not finite, a value
        was not found, or may be on either side of the imaginary axis.
    """
    largest = trace = trace_square = square = 0.0
    for i in range(n):
        trace += a[i, i]
        for j in range(n):
            largest = max(largest, abs(a[i, j]))
            square += a[i, j] * a[i, j]
            trace_square += a[i, j] * a[j, i]
    if square == 0.0 and largest == 0.0:
        return ZERO
    if not SMALLEST < largest < LARGEST or not square < LARGEST * LARGEST:
        return DOUBTFUL
    sums[0], sums[1], sums[2] = trace, trace_square, square
    zeros = small_eigenvalues(a, n, re, im)
    if zeros < 0:
        return DOUBTFUL
    norm = math.sqrt(square)
    if _is_doubtful(n, zeros, re, im, norm, trace, eps * (n * norm + 4.0 * scale)):
        return DOUBTFUL
    return FOUND


@compiled
def _bin_of(x: float, edges: Any, of_exponent: Any) -> int:
    """The bin of a histogram, a bin without its right edge, from that of the power of two below |x|."""
    at = 0
    if x != 0.0:
        bits: Any = np.float64(x).view(np.int64)
        exponent = (bits >> 52 & 0x7FF) - 1022
        at = min(max(exponent - FIRST_EXPONENT, 0), len(of_exponent) - 1)
    i = of_exponent[at]
    if x < 0.0:
        i = len(edges) - 2 - i
    while x >= edges[i + 1]:
        i += 1
    while x < edges[i]:
        i -= 1
    return i


@compiled
def _put_end(values: Any, places: Any, key: float, re: float, im: float, place: int) -> None:
    """Insert an eigenvalue among the few whose key is least."""
    k = len(places) - 1
    while k > 0 and key < values[k - 1, 0]:
        values[k] = values[k - 1]
        places[k] = places[k - 1]
        k -= 1
    values[k, 0], values[k, 1], values[k, 2], places[k] = key, re, im, place


# What take_spectra() counts, sums and keeps of ends, by position.
COUNTED = ("found", "negative", "positive", "inside", "doubtful")
SUMMED = ("values", "squares", "trace", "trace_square", "norm_square", "modulus_square")
ENDS = ("max_re", "-min_re", "radius", "im", "slowest", "-step")
# The least power of two that a histogram's edges are looked up by.
FIRST_EXPONENT = -60


@compiled
def take_spectra(
    squares: Any,
    start: int,
    stop: int,
    scale: float,
    eps: float,
    solved: Any,
    work: Any,
    found: Any,
    doubtful: Any,
    counts: Any,
    sums: Any,
    ends: Any,
    few: Any,
    few_places: Any,
    histogram: Any,
    edges: Any,
    of_exponent: Any,
) -> None:
    """The eigenvalues of some of very many squares, and all that is asked of them, in one pass.

    What is doubtful is not counted anywhere but in `doubtful`.

    Args:
        squares: (a, n, n, c) float32 or float64: number by number, as they come.
        start: the first, as an index into the a x c of them.
        stop: after the last.
        scale: the largest entry that they were summed from.
        eps: of their numbers.
        solved: of each what `one_spectrum` says, its three sums, and its real and imaginary parts, where a device has
            found them: (stop - start,) int64, (stop - start, 3) and (stop - start, n, 2) float64. Empty: all is found
            here.
        work: (11, 8) float64.
        found: ((stop - start) n, 2) in their precision, gets real and imaginary parts of eigenvalues that are not 0.
        doubtful: (stop - start,) int64, gets their indices.
        counts: (5,) int64, see `COUNTED`.
        sums: (6,) float64, see `SUMMED`.
        ends: (6,) float64, largest ones so far, see `ENDS`.
        few: (2, b, 3) float64, keys, real and imaginary parts of those furthest to the right, and to the left.
        few_places: (2, b) int64, the squares they are of; -1: none.
        histogram: (bins,) int64, how many real parts lie in each bin.
        edges: (bins + 1,) its edges, the outermost ones infinite, symmetric to 0.
        of_exponent: int64, the bin of 2^e / 2, by e - `FIRST_EXPONENT`; the first of them that of 0.
    """
    n, channels = squares.shape[1], squares.shape[3]
    re, im, three = work[8], work[9], work[10]
    states, all_sums, values = solved
    count = 0
    for at in range(start, stop):
        if len(states):
            state = states[at - start]
            three[:3] = all_sums[at - start]
            re[:n], im[:n] = values[at - start, :, 0], values[at - start, :, 1]
        else:
            unit, channel = at // channels, at % channels
            for i in range(n):
                for j in range(n):
                    work[i, j] = squares[unit, i, j, channel]
            state = one_spectrum(work, n, scale, eps, three, re, im)
        if state == ZERO:
            continue
        if state == DOUBTFUL:
            doubtful[counts[4]] = at
            counts[4] += 1
            continue
        for k in range(3):
            sums[2 + k] += three[k]
        for k in range(n):
            found[count, 0], found[count, 1] = re[k], im[k]
            x, y = float(found[count, 0]), float(found[count, 1])
            if x == 0.0 and y == 0.0:
                continue
            count += 1
            modulus = x * x + y * y
            sums[0] += x
            sums[1] += x * x - y * y
            sums[5] += modulus
            outside = modulus + 2.0 * x
            if abs(outside) < 1e-12:
                outside = math.hypot(1.0 + x, y) - 1.0
            if outside <= 0.0:
                counts[3] += 1
            if x < 0.0:
                counts[1] += 1
                ends[4] = max(ends[4], x)
                if 2.0 * x > ends[5] * modulus:
                    ends[5] = max(ends[5], 2.0 * (x / modulus))
            elif x > 0.0:
                counts[2] += 1
            ends[0], ends[1] = max(ends[0], x), max(ends[1], -x)
            ends[2], ends[3] = max(ends[2], modulus), max(ends[3], abs(y))
            histogram[_bin_of(x, edges, of_exponent)] += 1
            for end in range(2):
                key = x if end else -x
                if few_places[end, -1] < 0 or key < few[end, -1, 0]:
                    _put_end(few[end], few_places[end], key, x, y, at)
    counts[0] += count


@compiled
def largest_entry(squares: Any) -> float:
    """The largest modulus in some squares, as `take_spectra` has them; nan where one is not finite."""
    most = nothing = 0.0
    for i in range(squares.shape[0]):
        for j in range(squares.shape[1]):
            for k in range(squares.shape[2]):
                for c in range(squares.shape[3]):
                    x = float(squares[i, j, k, c])
                    most = max(most, abs(x))
                    nothing += x - x
    return most + nothing


_NOTHING = np.zeros(0, np.int64), np.zeros((0, 3)), np.zeros((0, 1, 2))


@dataclass(frozen=True)
class Taken:
    """What `take_spectra` found in some squares, but for the doubtful ones.

    Attributes:
        values: (m,) complex, the eigenvalues that are not 0.
        doubtful: (d,) indices of squares that are left to the caller.
        counts: by name, see `COUNTED`.
        ends: by name, those of `ENDS` that there are; and `modulus_square`, the sum of |l|^2.
        sums: (4,) of the values, of their squares (both real), and the traces that these must be.
        norm: Frobenius norm of all squares together.
        few: for `right` and `left`, the eigenvalues furthest there, each with its square's index.
        histogram: how many real parts are in each bin of `HISTOGRAM_EDGES`.
    """

    values: np.ndarray
    doubtful: np.ndarray
    counts: dict[str, int]
    ends: dict[str, float]
    sums: np.ndarray
    norm: float
    few: dict[str, list[tuple[complex, int]]]
    histogram: np.ndarray


def take(
    squares: np.ndarray,
    start: int,
    stop: int,
    scale: float,
    few: int,
    solved: tuple[np.ndarray, np.ndarray, np.ndarray] = _NOTHING,
) -> Taken:
    """The eigenvalues of some squares, and what is counted of them, on the host.

    Args:
        squares: (a, n, n, c) float32 or float64, n at most `MOST_ORDER`.
        start: the first, as an index into the a x c of them.
        stop: after the last.
        scale: the largest entry of what they are parts of, to which their numbers are rounded.
        few: how many eigenvalues to keep with their squares, at either end.
        solved: as for `take_spectra`.
    """
    n, size = squares.shape[1], stop - start
    found, doubtful = np.empty((size * n, 2), squares.dtype), np.empty(size, np.int64)
    counts, sums, ends = np.zeros(len(COUNTED), np.int64), np.zeros(len(SUMMED)), np.full(len(ENDS), -np.inf)
    furthest, places = np.zeros((2, few, 3)), np.full((2, few), -1)
    histogram = np.zeros(len(HISTOGRAM_EDGES) - 1, np.int64)
    eps = float(np.finfo(squares.dtype).eps)
    work = np.zeros((MOST_ORDER + 3, MOST_ORDER))
    parts = (found, doubtful, counts, sums, ends, furthest, places, histogram, HISTOGRAM_EDGES, _BINS)
    take_spectra(squares, start, stop, scale, eps, solved, work, *parts)
    ends[2] = math.sqrt(max(ends[2], 0.0))
    named = {name: float(value) for name, value in zip(ENDS, ends, strict=True) if value > -math.inf}
    return Taken(
        values=found[: counts[0]].reshape(-1).view(np.result_type(squares.dtype, np.complex64)),
        doubtful=doubtful[: counts[4]],
        counts={name: int(count) for name, count in zip(COUNTED, counts, strict=True)},
        ends=named | {"modulus_square": float(sums[5])},
        sums=sums[:4],
        norm=math.sqrt(sums[4]),
        few={
            name: [(complex(*furthest[i, k, 1:]), int(places[i, k])) for k in range(few) if places[i, k] >= 0]
            for i, name in enumerate(("right", "left"))
        },
        histogram=histogram,
    )


def bins_by_exponent(edges: np.ndarray) -> np.ndarray:
    """The bin of each power of two, as `take_spectra` looks it up."""
    last = int(math.frexp(edges[-2])[1]) + 1
    powers = 0.5 * 2.0 ** np.arange(FIRST_EXPONENT, last)
    powers[0] = 0.0
    return np.searchsorted(edges, powers, side="right") - 1


_BINS = bins_by_exponent(HISTOGRAM_EDGES)
