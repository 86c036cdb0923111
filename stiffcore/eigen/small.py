"""Eigenvalues of one real matrix of order 1 to 8: scalar code that numba compiles, for a host's or a device's thread.

LAPACK's way of `geev` without vectors, for orders at which calling LAPACK takes longer than its arithmetic: rows and
columns that isolate an eigenvalue are permuted away (so that an eigenvalue that is 0 by structure is 0 exactly), the
rest is scaled by powers of two (Parlett & Reinsch, Numer. Math. 13 (1969)), reduced to Hessenberg form by reflections,
and taken apart by Francis' double shifted QR steps (Golub & Van Loan, Matrix Computations, 4th ed. 2013, section 7.5)
with the deflation criterion of Ahues & Tisseur (LAPACK Working Note 122, 1997). Backward stable: each value is an
eigenvalue of a matrix that differs by a small multiple of eps |A|.

Nothing is allocated here: the caller gives an (8, 8) array that is overwritten, and two of 8 numbers.
"""

import math
from typing import Any

import numpy as np

from stiffcore.eigen.compiled import compiled

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
def _stands_alone(a: Any, at: int, low: int, high: int, row: bool) -> bool:
    """Whether a row, or a column, is zero from `low` to `high` but for the diagonal."""
    for other in range(low, high + 1):
        entry = a[at, other] if row else a[other, at]
        if other != at and entry != 0.0:
            return False
    return True


@compiled
def _isolate(a: Any, n: int) -> tuple[int, int]:
    """Permute eigenvalues that stand alone to the diagonal's ends: first and last index of the rest."""
    low, high = 0, n - 1
    again = True
    while again and high > 0:  # rows that are zero but for their diagonal go to the bottom
        again = False
        for i in range(high, -1, -1):
            if _stands_alone(a, i, 0, high, True):
                if i != high:
                    _swap(a, n, i, high)
                high -= 1
                again = True
                break
    again = True
    while again and low < high:  # columns go to the left
        again = False
        for j in range(low, high + 1):
            if _stands_alone(a, j, low, high, False):
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
