"""How far a computed spectrum can be trusted: residuals on the original function, condition numbers, traces.

The error of a simple eigenvalue under a perturbation E of J is at most `|E| |u| |v| / |v^H u|` to first order
(Golub & Van Loan, section 7.2.2; LAPACK Users' Guide, section 4.8). Here |E| is the residual of the lifted
eigenvector on the unreduced function, plus the rounding of the arithmetic, `eps |M|_F`. The same holds of M with its
own eigenvectors, and the smaller of the two counts: where M has an eigenvalue 0, J has it as a defective one as a rule,
with no finite condition, which says nothing of the eigenvalue of M.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.sparse import csc_array
from scipy.sparse.linalg import LinearOperator

from stiffcore.eigen.dense import Eigenvectors
from stiffcore.eigen.inclusion import FULL_ORDER, Inclusion, inclusion
from stiffcore.eigen.regions import LeftOf, OutsideOf
from stiffcore.eigen.sparse import host_matrix
from stiffcore.jacobian.linearise import complex_product
from stiffcore.jacobian.reduction import Reduction
from stiffcore.metrics import stiffness_error
from stiffcore.spectra import Certificate, Certified, Count, Ends, Moments

PANEL = 32
# Residual, relative to `_scale`: rounding gives about k eps; a wrong eigenvalue gives a number near 1.
RESIDUAL_TOLERANCE = {np.dtype("f8"): 1e-9, np.dtype("f4"): 2e-3}
# Relative to the Frobenius norm F of M (squared for the squares). Solvers are backward stable: they find the
# eigenvalues of M + E with |E| a small multiple of eps F, so the sum misses by trace(E), at most sqrt(k) |E|. The sum
# of |l| would not do as a measure: it can be tiny for a far from normal M.
TRACE_TOLERANCE = {np.dtype("f8"): 1e-10, np.dtype("f4"): 1e-3}
# What an end of the numerical range may be short of, relative to `_scale`: Lanczos approaches it from inside.
RANGE_SLACK = 1e-6
# Random vectors for the norm of an operator.
NORM_DRAWS = 3


def matrix_moments(a: np.ndarray) -> Moments:
    """Trace, trace of the square and Frobenius norm of `a` (k, k), in float64, a panel of 32 columns at a time.

    Takes two panels of float64 beside the matrix, less than a shard and its copies.
    """
    k = len(a)
    trace_square = squares = 0.0
    for start in range(0, k, PANEL):
        panel = a[:, start : start + PANEL].astype(np.float64)
        rows = a[start : start + PANEL, :].T.astype(np.float64)
        trace_square += float(np.einsum("ij,ij->", panel, rows))
        squares += float(np.einsum("ij,ij->", panel, panel))
    return Moments(float(np.diagonal(a).astype(np.float64).sum()), trace_square, float(np.sqrt(squares)))


def sparse_moments(a: csc_array | LinearOperator) -> Moments:
    """The moments of a sparse matrix; of an operator, only an estimate of its Frobenius norm, from random vectors."""
    host = host_matrix(a)
    if host is None:
        draws = np.random.default_rng(0).standard_normal((NORM_DRAWS, a.shape[0]))
        squares = [float(np.linalg.norm(a.matvec(x))) ** 2 for x in draws]  # each has the mean |A|_F^2
        return Moments(float("nan"), float("nan"), float(np.sqrt(np.mean(squares))))
    exactly = host.astype(np.float64)
    return Moments(
        float(exactly.trace()), float(exactly.multiply(exactly.T).sum()), float(np.linalg.norm(exactly.data))
    )


def certify_ends(
    reduction: Reduction,
    values: np.ndarray,
    vectors: Eigenvectors,
    moments: Moments,
    ends: Ends,
    *,
    right_end: bool,
    left_end: bool,
) -> Certificate:
    """Check the ends of a spectrum, and what is said of the rest.

    Args:
        reduction: what M is, and the function it came from.
        values: (m,) complex, eigenvalues of M.
        vectors: of M, for all of them.
        moments: of M.
        ends: of J.
        right_end: whether two starts agree on the largest real parts.
        left_end: the same of the smallest.

    Returns:
        As `certify`; there are no traces to compare with, so these are nan. An end that is proved is the outermost of
        the eigenvalues that are certified beyond a line, where these are as many as are counted there; or it is as far
        out as a line with none beyond it. Any other is as far out as the numerical range.
    """
    upper = np.flatnonzero(values.imag >= 0)
    some = Eigenvectors(vectors.right[:, upper], vectors.left[:, upper], vectors.converged[upper])
    around = replace(ends, discs=tuple(ends.discs[at] for at in upper) if ends.discs else ())
    located = _located(reduction, None) if 0 < reduction.k <= FULL_ORDER else None
    found = certify(reduction, values, upper, some, moments, complete=False, ends=around, located=located)
    failures = list(found.failures)
    for name, agreed in (("largest", right_end), ("smallest", left_end)):
        if not agreed:
            failures.append(f"two starts do not agree on the {name} real parts ({ends.note})")
    if not len(values):
        return replace(found, failures=(*failures, f"no eigenvalue converged ({ends.note})"))
    real = reduction.shift + values.real
    slack = RANGE_SLACK * _scale(reduction, values, moments) + found.estimated_error
    if ((real < ends.range_left - slack) | (real > ends.range_right + slack)).any():
        failures.append(
            f"an eigenvalue lies outside of the numerical range {ends.range_left:.6g}, {ends.range_right:.6g}"
        )
    count, negative = ends.left_of_zero.count, int((real < -slack).sum())
    if count is not None and (negative > count or (count and not (real < slack).any())):
        failures.append(f"{count} eigenvalues are proved to be negative, but the smallest found is {real.min():.6g}")
    bounded = _bounded(reduction, values, replace(found, failures=tuple(failures)), ends, slack)
    return replace(
        bounded,
        negative=_negative_between(found.certified, ends, reduction.k),
        near_axis=found.near_axis if count is None else 0,
    )


def _bounded(
    reduction: Reduction, values: np.ndarray, found: Certificate, ends: Ends | None, slack: float
) -> Certificate:
    """The certificate with errors that reach as far as the ends of the spectrum may."""
    right_lines: tuple[Count, ...] = ()
    left_lines: tuple[Count, ...] = ()
    right, left = np.inf, -np.inf
    if ends is not None:
        right_lines, left_lines, right, left = ends.right_lines, ends.left_lines, ends.range_right, ends.range_left
    reaches = {"largest": _reach(found.certified, right_lines, right + slack, 1)}
    reaches["smallest"] = _reach(found.certified, left_lines, -left + slack, -1)
    between = [(reach.least, reach.bound) for reach in reaches.values()]
    return replace(
        found,
        error=max(found.error, *(reach.bound - reach.outermost for reach in reaches.values())),
        s_error=ratio_error(reduction, values, *between, structural=True),
        s_active_error=ratio_error(reduction, values, *between, structural=False),
        unproved=tuple(name for name, reach in reaches.items() if not reach.proved),
        failures=(*found.failures, *(reach.contradiction for reach in reaches.values() if reach.contradiction)),
    )


@dataclass(frozen=True)
class _Reach:
    """How far out one end of a spectrum may be.

    Attributes:
        outermost: what was found; of the left end the negative, as all that follows.
        least: nothing that is certified is further out, by its error, and something is as far.
        bound: nothing lies further out.
        proved: whether that is from a count, and not from the numerical range.
        contradiction: between what was found and what was counted.
    """

    outermost: float
    least: float
    bound: float
    proved: bool
    contradiction: str = ""


def _reach(certified: tuple[Certified, ...], lines: tuple[Count, ...], range_end: float, sign: int) -> _Reach:
    outermost = max((sign * c.value.real for c in certified), default=-np.inf)
    least = max((sign * c.value.real - c.error for c in certified), default=-np.inf)
    for count in lines:
        line = sign * count.threshold
        beyond = [c for c in certified if sign * c.value.real > line]
        number = sum(_copies(c) for c in beyond)
        if number > (count.count or 0):
            said = f"{number} eigenvalues were found beyond {count.threshold:.6g}, where {count.count} are proved to be"
            return _Reach(outermost, least, max(range_end, outermost), proved=False, contradiction=said)
        clear = all(sign * c.value.real - c.error > line for c in beyond)
        if number == count.count and clear and len(_apart(beyond)) == len(beyond):
            bound = max((sign * c.value.real + c.error for c in beyond), default=line)
            return _Reach(outermost, least, bound, proved=bool(np.isfinite(least)))
    return _Reach(outermost, least, max(range_end, outermost), proved=False)


def _copies(c: Certified) -> int:
    """An eigenvalue, or both of a pair."""
    return 2 if c.value.imag else 1


def _apart(certified: Sequence[Certified]) -> list[Certified]:
    """Some whose errors do not meet, nor those of a pair: each is another eigenvalue."""
    kept: list[Certified] = []
    for c in certified:
        alone = not c.value.imag or abs(c.value.imag) > c.error
        if (
            c.converged
            and np.isfinite(c.error)
            and alone
            and all(abs(c.value - d.value) > c.error + d.error for d in kept)
        ):
            kept.append(c)
    return kept


def _negative_between(certified: tuple[Certified, ...], ends: Ends, k: int) -> tuple[int, int]:
    """How many of k eigenvalues have a negative real part, at least and at most: by proof, or by those certified."""
    proved = ends.left_of_zero.count
    if proved is not None:
        return proved, proved
    apart = _apart(certified)
    low = sum(_copies(c) for c in apart if c.value.real < -c.error)
    positive = sum(_copies(c) for c in apart if c.value.real > c.error)
    low = max([low, *(count.count or 0 for count in ends.left_lines if count.threshold <= 0)])
    positive = max([positive, *(count.count or 0 for count in ends.right_lines if count.threshold >= 0)])
    return low, k - positive


def certify(
    reduction: Reduction,
    values: np.ndarray,
    chosen: np.ndarray,
    vectors: Eigenvectors | None,
    moments: Moments,
    *,
    complete: bool = True,
    neglected: float = 0.0,
    right: int | None = None,
    matrix: np.ndarray | None = None,
    real_parts: tuple[float, float] | None = None,
    ends: Ends | None = None,
    located: Inclusion | None = None,
) -> Certificate:
    """Check a spectrum.

    Args:
        reduction: what M is, and the function it came from.
        values: (k,) complex, all eigenvalues of M.
        chosen: (q,) indices from `certified_choice`.
        vectors: of M, for the chosen ones; None where k = 0.
        moments: of M.
        complete: whether `values` are all, so that they are held against traces.
        neglected: the norm of what the solver left out (`stiffcore.eigen.divide.Division.error`): a backward error, as
            rounding is.
        right: how many eigenvalues of J have a positive real part, where the solver counted them in another way, by a
            projector's trace. Values that may lie on either side, by their errors, may differ from that.
        matrix: (k, k) M, where the whole spectrum is to be located; where k is at most
            `stiffcore.eigen.inclusion.FULL_ORDER`, it is made again where it is not given.
        real_parts: bounds of those in the numerical range of M: at larger orders, what signs are certified by.
        ends: what is proved of the ends and of the chosen eigenvalues (`stiffcore.eigen.counting`); what it does not
            prove is open. None where all eigenvalues are located.
        located: what `locate` found, where that is known already.

    Returns:
        The certificate; a check that fails is listed in it, never raised.
    """
    dtype = reduction.jacobian.dtype
    if complete and located is None:
        located = locate(reduction, values, matrix)
    discs = _discs(ends, len(chosen))
    certified = (
        () if vectors is None else _certified(reduction, values[chosen], vectors, moments, neglected, located, discs)
    )
    # float32 would lose the squares of small eigenvalues, and the digits of long sums
    exactly = values.astype(np.complex128)
    norm = max(moments.frobenius, float(np.finfo(np.float64).tiny))
    trace_error = square_error = float("nan")
    if complete:
        trace_error = float(abs(complex(exactly.sum()) - moments.trace)) / norm
        square_error = float(abs(complex(((exactly / norm) ** 2).sum()) - moments.trace_square / norm / norm))
    signs = _signs(reduction, values, certified, located, real_parts, complete, ends)
    failures = _failures(
        reduction,
        values,
        certified,
        trace_error,
        square_error,
        _scale(reduction, values, moments),
        dtype,
        complete=complete,
    )
    if complete:
        failures += _miscounted(reduction, values, signs, right)
    between = ends_between(reduction, certified, located)
    found = Certificate(
        certified=certified,
        trace_error=trace_error,
        square_error=square_error,
        reduction_check=reduction.check,
        error=max((c.error for c in certified if c.estimate is None), default=0.0),
        s_error=ratio_error(reduction, values, *between, structural=True),
        s_active_error=ratio_error(reduction, values, *between, structural=False),
        near_axis=signs.unsure,
        axis_error=signs.axis_error,
        failures=tuple(failures),
        negative=signs.negative if complete else None,
        outside=_outside(reduction, located, ends if complete else None),
        near_first=signs.near_first,
    )
    if not complete or located is not None or not certified:
        return found
    found = _bounded(reduction, values, found, ends, distance_of(reduction))
    return (
        replace(found, real_parts=(ends.range_left, ends.range_right)) if ends is not None and found.unproved else found
    )


# Of one eigenvalue: radii and margins, see `stiffcore.spectra.Ends`.
_Discs = tuple[tuple[float, float], ...]


def _discs(ends: Ends | None, number: int) -> tuple[_Discs, ...]:
    return ends.discs if ends is not None and ends.discs else ((),) * number


def distance_of(reduction: Reduction) -> float:
    """How far M, as built, is from that of J in exact arithmetic, in the 2-norm: what every margin allows for."""
    return float(reduction.rounding) + float(reduction.loss)


def locate(reduction: Reduction, values: np.ndarray, matrix: np.ndarray | None) -> Inclusion | None:
    """Where all eigenvalues of M are, where its order allows for that."""
    k = reduction.k
    if not k or len(values) != k or not np.isfinite(values).all() or (matrix is None and k > FULL_ORDER):
        return None
    return _located(reduction, matrix)


def _located(reduction: Reduction, matrix: np.ndarray | None) -> Inclusion:
    if matrix is None:
        starts = range(0, reduction.k, PANEL)
        stops = (min(at + PANEL, reduction.k) for at in starts)
        matrix = np.hstack([reduction.columns(*at).cpu().numpy() for at in zip(starts, stops, strict=True)])
    return inclusion(matrix.astype(np.float64), distance_of(reduction))


def side_of_axis(reduction: Reduction, real_parts: tuple[float, float] | None) -> int | None:
    """How many eigenvalues of M, shifted, are negative, where its numerical range is on one side: none or all.

    Args:
        reduction: what M is.
        real_parts: bounds of those in its numerical range; None where unknown.
    """
    axis, allowed = -float(reduction.shift), distance_of(reduction)
    if real_parts is not None and real_parts[0] - allowed > axis:
        return 0
    return reduction.k if real_parts is not None and real_parts[1] + allowed < axis else None


@dataclass(frozen=True)
class _Signs:
    """Of how many eigenvalues of M, shifted, the real part is negative.

    Attributes:
        negative: at least and at most.
        axis_error: no eigenvalue whose sign is open has a larger |Re|; 0 where none is.
        near_first: see `stiffcore.spectra.Certificate`.
    """

    negative: tuple[int, int]
    axis_error: float
    near_first: int | None = None

    @property
    def unsure(self) -> int:
        """How many signs are open."""
        return self.negative[1] - self.negative[0]


def _signs(
    reduction: Reduction,
    values: np.ndarray,
    certified: tuple[Certified, ...],
    located: Inclusion | None,
    real_parts: tuple[float, float] | None,
    complete: bool,
    ends: Ends | None,
) -> _Signs:
    real, k, axis = np.asarray(values.real, float) + reduction.shift, reduction.k, -float(reduction.shift)
    if not k:
        return _Signs((0, 0), 0.0)
    if located is not None:
        low, high = located.counted(LeftOf(axis))
        if low == high:
            return _Signs((low, high), 0.0)
        open_ones = [abs(x) for x, value in zip(real, values, strict=True) if located.error(complex(value)) >= abs(x)]
        return _Signs((low, high), float(max(open_ones, default=np.abs(real).max())))
    side = side_of_axis(reduction, real_parts)
    if side is not None:
        return _Signs((side, side), 0.0)
    errors = [(c.error if c.estimate is None else c.estimate, abs(c.value.real)) for c in certified]
    axis_error = max((error for error, away in errors if error >= away), default=0.0)
    near = int(np.count_nonzero(np.abs(real) <= axis_error))
    if not complete:
        return _Signs((0, near), axis_error)
    low, high = (0, k) if ends is None else _negative_between(certified, ends, k)
    return _Signs((low, high), axis_error, near) if low < high else _Signs((low, high), 0.0)


def _outside(reduction: Reduction, located: Inclusion | None, ends: Ends | None) -> tuple[int, int] | None:
    """How many eigenvalues of M, shifted, have |1 + l| > 1, at least and at most."""
    if ends is not None and ends.outside_disc is not None:
        count = ends.outside_disc.count
        return None if count is None else (count, count)
    return None if located is None else located.counted(OutsideOf(-1.0 - reduction.shift, 1.0))


def _miscounted(reduction: Reduction, values: np.ndarray, signs: _Signs, right: int | None) -> list[str]:
    """What contradicts the count: the values themselves, and the solver's own count of positive real parts."""
    lines, (low, high) = [], signs.negative
    real = np.asarray(values.real, float) + reduction.shift
    found = int(np.count_nonzero(real < 0))
    if len(values) == reduction.k and not low <= found <= high:
        lines.append(f"{found:,} real parts are negative, but {low:,} to {high:,} must be")
    positive = reduction.k - high
    if right is not None and not positive <= right <= positive + signs.unsure:
        doubtful = f" and {signs.unsure:,} may be" if signs.unsure else ""
        lines.append(f"{positive:,} real parts are positive{doubtful}, but the division counted {right:,}")
    return lines


def _certified(
    reduction: Reduction,
    values: np.ndarray,
    vectors: Eigenvectors,
    moments: Moments,
    neglected: float,
    located: Inclusion | None,
    discs: tuple[_Discs, ...],
) -> tuple[Certified, ...]:
    x, dtype = reduction.jacobian.x, reduction.jacobian.dtype
    complex_dtype = torch.complex128 if x.dtype == torch.float64 else torch.complex64
    right = torch.as_tensor(np.ascontiguousarray(vectors.right.T), dtype=complex_dtype, device=x.device)
    left = torch.as_tensor(np.ascontiguousarray(vectors.left.conj().T), dtype=complex_dtype, device=x.device)
    mu = torch.as_tensor(values, dtype=complex_dtype, device=x.device)
    of_m = _checked(reduction.rows, reduction.transposed_rows, _unit(right), _unit(left), mu)
    u, v = map(_unit, reduction.lift(right, left, mu))  # those of other lengths are gone before products are taken
    of_j = _checked(reduction.jacobian.jvp, reduction.jacobian.vjp, u, v, reduction.shift + mu.to(torch.complex128))
    # of M, and of the skip that was split off: J = s + M is rounded even where M is tiny
    eps = float(np.finfo(dtype).eps)
    rounding = eps * (moments.frobenius + reduction.shift) + distance_of(reduction) + neglected
    found = []
    for value, around, ok, outer, inner in zip(values, discs, vectors.converged, of_j, of_m, strict=True):
        shifted = complex(reduction.shift + value)
        error, condition = min((_finite(c * (r + rounding)), c) for r, c, _ in (outer, inner))
        estimate = error if located is None else None
        if located is not None:
            condition = inner[1]
            error = located.error(complex(value)) + eps * abs(shifted)
        if reduction.loss:
            error += _finite(outer[1] * reduction.loss)
        # nor is more lost, where it is isolated: the margins allow for all that M is off
        isolated = _isolated_error(around, inner[1], inner[2], rounding) + eps * abs(shifted)
        if estimate is not None or (located is None and np.isfinite(isolated)):
            error, estimate = isolated, None if np.isfinite(isolated) else estimate
        found.append(Certified(shifted, outer[0], condition, _finite(error), bool(ok), estimate))
    return tuple(found)


def _isolated_error(discs: _Discs, condition: float, residual: float, rounding: float) -> float:
    """The error of the one eigenvalue in each of some discs; inf where there is none.

    The matrix that is meant, B, is within `rounding` of A. With D, |D| <= the larger of both residuals of B, which is
    that computed and `rounding`, B + D has the value and its vectors exactly (Kahan, Parlett, Jiang, SIAM J. Numer.
    Anal. 19 (1982)). The eigenvalue of B + D - t D in the disc of radius r is analytic in t as long as that is within
    the margin around A, for |t| < T, and stays in there. So Cauchy's bounds of its Taylor coefficients say how far it
    is from the first order at t = 1: r (T^-2 + T^-3 + ...).
    """
    off, least = residual + rounding, float("inf")
    for radius, margin in discs:
        if not margin > rounding:
            continue
        far, error = (margin - rounding) / off - 1 if off else float("inf"), radius
        if far > 1 and np.isfinite(condition):
            error = min(radius, 1.01 * condition * off + radius / (far * (far - 1)))
        least = min(least, error)
    return least


def _unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows of length 1, rounded as products take them, so that a residual is of the very same vector."""
    exactly = rows.to(torch.complex128)  # the squares of float32 numbers below 1e-19 are zero
    return (exactly / torch.linalg.vector_norm(exactly, dim=1, keepdim=True)).to(rows.dtype)


def _checked(
    product: Callable[[torch.Tensor], torch.Tensor],
    transposed: Callable[[torch.Tensor], torch.Tensor],
    u: torch.Tensor,
    v: torch.Tensor,
    values: torch.Tensor,
) -> list[tuple[float, float, float]]:
    """Of each eigenvalue of a map, from unit rows u and v^T: the smaller residual, the condition, the larger one."""
    of_u, of_v = _residual(product, u, values), _residual(transposed, v, values)
    condition = 1 / torch.abs((v.to(torch.complex128) * u.to(torch.complex128)).sum(dim=1))
    found = torch.fmin(of_u, of_v), condition, torch.maximum(of_u, of_v)
    return [(_finite(r), _finite(c), _finite(w)) for r, c, w in zip(*(x.tolist() for x in found), strict=True)]


def _residual(
    product: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    image = complex_product(product, rows).to(torch.complex128)
    return torch.linalg.vector_norm(image - values[:, None] * rows.to(torch.complex128), dim=1)


def _finite(value: float) -> float:
    # a lifted vector of length zero divides 0 by 0: nothing is known of that eigenvalue
    return float(value) if np.isfinite(value) else float("inf")


def ends_between(
    reduction: Reduction, certified: tuple[Certified, ...], located: Inclusion | None
) -> tuple[tuple[float, float], tuple[float, float]]:
    """What the largest real part is between, and the negative of the smallest: by what is located, else by errors."""
    found = []
    for sign in (1, -1):
        if located is None:
            real = [(sign * c.value.real - c.error, sign * c.value.real + c.error) for c in certified]
            least, most = (max((x[side] for x in real), default=-np.inf) for side in (0, 1))
        else:
            parts = located.rightmost() if sign > 0 else located.leftmost()
            least, most = sorted(sign * (reduction.shift + x) for x in parts)
            off = float(np.finfo(reduction.jacobian.dtype).eps) * max(abs(least), abs(most)) + reduction.loss
            least, most = least - off, most + off
        found.append((least, most))
    return found[0], found[1]


def ratio_error(
    reduction: Reduction,
    values: np.ndarray,
    right: tuple[float, float],
    left: tuple[float, float],
    *,
    structural: bool,
) -> float:
    """The error of S, or of S_active, from what its two ends are between (`ends_between`).

    An exact one or zero cannot move, but an eigenvalue beside it may lie further out than it was found.
    """
    real = np.asarray(reduction.shift + values.real)
    exact = [1.0] * min(reduction.ones, 1) + [0.0] * min(reduction.zeros, 1 if structural else 0)
    if not len(real) and not exact:
        return float("nan")
    computed = [float(real.max()), float(real.min())] if len(real) else []
    ends = {"max": max([*computed, *exact]), "min": min([*computed, *exact])}
    errors = {}
    for end, sign, between in (("max", 1.0, right), ("min", -1.0, left)):
        value = sign * ends[end]
        low, high = (max([x, *(sign * y for y in exact)]) for x in between) if len(real) else (value, value)
        errors[end] = max(high - value, value - low, 0.0)
    if ends["min"] == 0.0 and errors["min"] == 0.0:
        return 0.0  # S is infinite, or undefined, exactly
    return stiffness_error(ends, errors["max"], errors["min"])


def _scale(reduction: Reduction, values: np.ndarray, moments: Moments) -> float:
    """The size of J that residuals are held against: never above |J| by much, and scaled as J is.

    The largest of the skip's 1, the largest |l|, and the root mean square singular value of M. The 2-norm would be the
    measure, and the Frobenius norm overstates it by up to sqrt(k), which lets a wrong eigenvalue of a large M pass.
    """
    if not len(values):
        return float(reduction.shift)
    largest = float(np.abs(reduction.shift + values.astype(np.complex128)).max())
    return max(float(reduction.shift), largest, moments.frobenius / reduction.k**0.5)


def _failures(
    reduction: Reduction,
    values: np.ndarray,
    certified: tuple[Certified, ...],
    trace_error: float,
    square_error: float,
    scale: float,
    dtype: np.dtype,
    *,
    complete: bool,
) -> list[str]:
    lines = []
    if complete and len(values) != reduction.k:
        lines.append(f"there are {len(values)} eigenvalues of a matrix of order {reduction.k}")
    for c in certified:
        if not c.converged:
            lines.append(f"no eigenvector found for {c.value:.6g}")
        elif not c.residual <= RESIDUAL_TOLERANCE[dtype] * scale + distance_of(reduction):
            lines.append(f"residual of {c.value:.6g} is {c.residual:.1e}")
    if complete and not trace_error <= TRACE_TOLERANCE[dtype]:
        lines.append(f"the eigenvalues' sum misses the trace by {trace_error:.1e}")
    if complete and not square_error <= TRACE_TOLERANCE[dtype]:
        lines.append(f"the squares' sum misses the trace of the square by {square_error:.1e}")
    return lines
