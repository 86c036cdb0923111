"""How many eigenvalues of a sparse real matrix lie left of a line, or outside of a disc: proved, or left open.

Powers of the matrix prove, by products alone, that all eigenvalues lie on one side (`stiffcore.eigen.powers`), where
they do. Every eigenvalue lies in the numerical range, too. Where neither decides, those that are there are found and
deflated, and powers prove that there are no more (`stiffcore.eigen.deflation`). Where that fails, the doubtful part of
the range is covered by discs (`stiffcore.eigen.discs`).

A count is one of every matrix within a distance of A, its `tolerated`: the smallest singular value of A - zI on the
boundary is larger than that, so that no eigenvalue meets the boundary on the way there. Where A itself was rounded, by
no more than `rounding` in the 2-norm, a proof that tolerates less than that proves nothing.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import LinearOperator

from stiffcore.eigen.deflation import LEAST_NORM, Enclosure, count_beyond, enclosures_of
from stiffcore.eigen.discs import Cover, OpenError, SchurForm, boundary_distance
from stiffcore.eigen.extremes import spectral_radius
from stiffcore.eigen.numerical_range import numerical_range_end, range_ends
from stiffcore.eigen.powers import Operator, margin_inside, margin_right_of
from stiffcore.eigen.regions import LeftOf, OutsideOf, Region
from stiffcore.eigen.sparse import (
    DENSE_ORDER,
    EPS,
    Array,
    FillError,
    as_sparse,
    estimated_fill,
    host_matrix,
    norm_bound,
    product,
)
from stiffcore.errors import InputError
from stiffcore.spectra import EACH_END, Count, Ends

OPEN = "open"
DEFLATED = "proved: found and deflated"
NO_MATRIX = "no matrix was built, and products do not decide"
# How far beyond an end a line is laid where none fits between its eigenvalues, relative to the largest one.
BEYOND = (1e-10, 1e-8, 1e-6, 1e-4)
# Real parts that are nearer, relative to it, are taken for one.
APART = 1e-8
# Of a spectrum that is computed as a whole, discs are tried where factors have at most this share of all entries: up to
# 200 factorisations then take a tenth of a dense solve.
DISC_FILL = 1 / 25


def count_left(
    a: Any,
    threshold: float = 0.0,
    *,
    memory_bytes: int | None = None,
    known: tuple[Array, Array] | None = None,
    rounding: float = 0.0,
) -> Count:
    """Count the eigenvalues with a real part under a threshold, with a proof, or leave the count open.

    Powers decide where all eigenvalues lie on one side of the line, the numerical range where it does. Otherwise up to
    1,200 Arnoldi steps and powers of the rest; and where these do not decide, one sparse LU a disc, 200 at most. It is
    open where there are more eigenvalues than Arnoldi finds, or where the matrix is so far from normal, or an
    eigenvalue so near to the line, that discs vanish. Orders up to 100 are solved densely.

    Args:
        a: (k, k) real, sparse or dense; of a `LinearOperator` with a transpose, products alone decide.
        threshold: the line.
        memory_bytes: what a sparse LU, or vectors instead, may take; open where it does not fit.
        known: (m,) eigenvalues and (k, m) right eigenvectors, where some are known: they are deflated from the start.
        rounding: how far `a` may be, in the 2-norm, from the matrix that is meant: the count is of each within that.

    Returns:
        The count and what it rests on.

    Raises:
        InputError: where `a` is no such matrix, or the threshold is not finite.
    """
    a = _matrix_or_operator(a)
    if not math.isfinite(threshold):
        raise InputError(f"count_left needs a finite threshold, got {threshold}")
    k = a.shape[0]
    sides = ((1, threshold, 0), (-1, -threshold, k))
    rng = np.random.default_rng(0)
    operator, host = _multiplied(a, rng), host_matrix(a)
    found = _by_powers(operator, threshold, sides, rng, rounding)
    if found is None and host is not None:
        found = _by_range(host, threshold, sides, memory_bytes, rounding)
    if found is not None:
        return found
    # where most eigenvalues are left of the line, the others are counted; none is on it where this is proved
    turn = k > DENSE_ORDER and _middle_of_all(operator, host) < threshold
    if turn:
        operator = operator.negative() if operator else None
        host, known = None if host is None else -host, None
    region = LeftOf(-threshold if turn else threshold)
    found = replace(_by_search(operator, host, region, memory_bytes, known, rounding), threshold=threshold)
    return replace(found, count=k - found.count) if turn and found.count is not None else found


def count_outside_disc(
    a: Any,
    centre: float = -1.0,
    radius: float = 1.0,
    *,
    memory_bytes: int | None = None,
    known: tuple[Array, Array] | None = None,
    rounding: float = 0.0,
) -> Count:
    """Count the eigenvalues with |lambda - centre| > radius, with a proof, or leave the count open.

    With the default disc: those for which a step of the explicit Euler method of length 1 is not stable. The norm of
    A - centre decides where inertia proves it under the radius, the numerical range where it is beside the disc;
    otherwise as in `count_left`. Before these, powers, where all are inside or all on one side of the disc.

    Args:
        a: as for `count_left`.
        centre: of the disc, on the real axis.
        radius: positive.
        memory_bytes: what a sparse LU may take; open where it does not fit.
        known: as for `count_left`.
        rounding: as for `count_left`.

    Returns:
        The count and what it rests on; its threshold is the radius.

    Raises:
        InputError: where `a` is no such matrix, or the disc is none.
    """
    a = _matrix_or_operator(a)
    if not (math.isfinite(centre) and 0 < radius < math.inf):
        raise InputError(f"count_outside_disc needs a finite centre and a positive radius, got {centre} and {radius}")
    k = a.shape[0]
    if k == 0:
        return Count(radius, 0, "proved: norm", math.inf, computed=False, tolerated=math.inf)
    sides = ((1, centre + radius, k), (-1, radius - centre, k))
    rng = np.random.default_rng(0)
    operator, host, region = _multiplied(a, rng), host_matrix(a), OutsideOf(centre, radius)
    found = _by_powers(operator, radius, sides, rng, rounding, centre)
    if found is not None:
        return found
    if host is None:
        return replace(_by_search(operator, None, region, memory_bytes, known, rounding), threshold=radius)
    shifted = sp.csc_array(host - centre * sp.eye_array(k, format="csc"))
    # its eigenvalues are the singular values and their negatives
    both = sp.csc_array(sp.block_array([[None, shifted], [shifted.T, None]]))
    end = numerical_range_end(both, right_of=-radius, memory_bytes=memory_bytes)
    if end.bound > -radius:
        margin = radius + end.bound - 2 * EPS * abs(centre)
        if margin > rounding:
            return Count(radius, 0, "proved: norm", margin, computed=False, tolerated=margin)
    found = _by_range(host, radius, sides, memory_bytes, rounding)
    found = found or _by_search(operator, host, region, memory_bytes, known, rounding)
    return replace(found, threshold=radius)


def _matrix_or_operator(a: Any) -> sp.csc_array | LinearOperator:
    if not isinstance(a, LinearOperator):
        return as_sparse(a)
    return as_sparse(a @ np.eye(a.shape[0])) if a.shape[0] <= DENSE_ORDER else a


def _moderate(a: sp.csc_array | LinearOperator) -> bool:
    """Whether squares of the norm neither vanish nor overflow; taken for granted where there is no matrix."""
    host = host_matrix(a)
    return host is None or LEAST_NORM < norm_bound(host) < 1 / LEAST_NORM


# All eigenvalues of A (1) or of -A (-1) lie right of a line: then so many are counted.
_Sides = tuple[tuple[int, float, int], ...]


def _multiplied(a: sp.csc_array | LinearOperator, rng: np.random.Generator) -> Operator | None:
    """What proofs by products multiply with; None where they are of no use."""
    return Operator.of(a, rng) if a.shape[0] > DENSE_ORDER and _moderate(a) else None


def _by_powers(
    operator: Operator | None,
    threshold: float,
    sides: _Sides,
    rng: np.random.Generator,
    rounding: float,
    centre: float | None = None,
) -> Count | None:
    """The count, where powers prove one of the sides; with a centre first none, where all are inside the circle."""
    if operator is None:
        return None
    proofs = [(partial(margin_inside, operator, centre, threshold), 0)] if centre is not None else []
    for sign, line, count in sides:
        proofs.append((partial(margin_right_of, operator if sign == 1 else operator.negative(), line), count))
    for prove, count in proofs:
        found = prove(rng)
        if found is not None and found.tolerated > rounding:
            note = f"the norm of power {found.power} is under 1"
            return Count(threshold, count, "proved: powers", found.margin, True, note, found.tolerated)
    return None


def _by_range(
    a: sp.csc_array, threshold: float, sides: _Sides, memory_bytes: int | None, rounding: float
) -> Count | None:
    """The count, where the numerical range proves one of the sides."""
    for sign, line, count in sides:
        end = numerical_range_end(a if sign == 1 else -a, right_of=line, memory_bytes=memory_bytes)
        margin = end.bound - line  # nor does a matrix that near have an eigenvalue there: its range moves as far
        if margin > rounding:
            return Count(threshold, count, "proved: numerical range", margin, computed=False, tolerated=margin)
    return None


def _open(threshold: float, note: str) -> Count:
    return Count(threshold, None, OPEN, 0.0, computed=True, note=note)


def _searched(basis: str, count: int, margin: float, note: str, rounding: float) -> Count:
    """What a search found, where it holds of every matrix within `rounding`."""
    if not margin > rounding:
        return _open(math.nan, f"the matrix is rounded by up to {rounding:.1e}, and the proof tolerates {margin:.1e}")
    return Count(math.nan, count, basis, margin, computed=True, note=note, tolerated=margin)


@dataclass(frozen=True)
class Whole:
    """What is known of a spectrum that was computed as a whole.

    Attributes:
        real: (k,) real parts of all eigenvalues of A.
        real_parts: bounds of those in the numerical range of A.
        negative: how many eigenvalues of shift + A are negative, where the range says it.
    """

    real: Array
    real_parts: tuple[float, float]
    negative: int | None


def ends_of(
    a: Any,
    shift: int,
    known: tuple[Array, Array],
    *,
    disc: bool,
    memory_bytes: int | None,
    note: str,
    rounding: float = 0.0,
    enclosures: tuple[Enclosure, ...] | None = None,
    whole: Whole | None = None,
) -> Ends:
    """What can be proved of shift + A from the ends of its spectrum.

    Args:
        a: (k, k) real, sparse or dense, or a `LinearOperator` with a transpose.
        shift: what is added.
        known: eigenvalues and right eigenvectors of A; see `count_left`.
        disc: whether to count outside of |1 + l| = 1, too.
        memory_bytes: what a sparse LU may take.
        note: how the ends were found.
        rounding: as for `count_left`.
        enclosures: of A, where they are at hand: `stiffcore.eigen.deflation.enclosures_of`.
        whole: of a spectrum that was computed as a whole.
    """
    a = _matrix_or_operator(a)
    if enclosures is None:
        enclosures = enclosures_of(a, memory_bytes)
    host = host_matrix(a)
    few = memory_bytes
    if whole is not None and host is not None and estimated_fill(host) > DISC_FILL * host.shape[0] ** 2:
        few = 0
    given: dict[str, Any] = {"memory_bytes": few, "known": known, "rounding": rounding}
    left = _enclosed_count(enclosures, LeftOf(-shift), 0.0, rounding)
    if left is None and whole is not None and whole.negative is not None:
        left = Count(0.0, whole.negative, "proved: numerical range", 0.0, computed=True)
    left = left or count_left(a, -shift, **given)
    outside = None
    if disc:
        outside = _enclosed_count(enclosures, OutsideOf(-1.0 - shift, 1.0), 1.0, rounding)
        outside = outside or count_outside_disc(a, -1.0 - shift, **given)
    range_left, range_right = range_ends(a) if whole is None else whole.real_parts
    turned = tuple(enclosure.negative() for enclosure in enclosures)
    real = known[0].real if whole is None else whole.real
    lines = _lines(enclosures, host, real, few, rounding)
    right_lines = _lines(turned, None if host is None else -host, -real, few, rounding)
    discs = tuple(
        max((enclosure.discs(complex(value), rounding) for enclosure in enclosures), key=len, default=())
        for value in known[0]
    )
    return Ends(
        left_of_zero=replace(left, threshold=0.0),
        outside_disc=outside,
        radius=math.nan if whole is not None else _radius(a, shift, enclosures),
        range_left=shift + range_left,
        range_right=shift + range_right,
        note=note,
        left_lines=tuple(replace(c, threshold=float(shift + c.threshold)) for c in lines),
        right_lines=tuple(replace(c, threshold=float(shift - c.threshold)) for c in right_lines),
        discs=discs,
    )


def _radius(a: sp.csc_array | LinearOperator, shift: int, enclosures: tuple[Enclosure, ...]) -> float:
    for enclosure in enclosures:
        radius = enclosure.radius(shift)
        if not math.isnan(radius):
            return radius
    apply = a.dot if isinstance(a, LinearOperator) else partial(product, a)
    shifted = LinearOperator(a.shape, lambda x: apply(x.ravel()) + shift * x.ravel(), dtype=np.dtype(np.float64))
    return spectral_radius(shifted)


def _enclosed_count(
    enclosures: tuple[Enclosure, ...], region: Region, threshold: float, rounding: float
) -> Count | None:
    """The count by what holds all eigenvalues, from whichever tolerates most."""
    found = [deflated for deflated in (enclosure.count(region) for enclosure in enclosures) if deflated is not None]
    best = max(found, key=lambda deflated: deflated.margin, default=None)
    if best is None or not best.margin > rounding:
        return None
    return replace(_searched(DEFLATED, best.count or 0, best.margin, best.note, rounding), threshold=threshold)


def _lines(
    enclosures: tuple[Enclosure, ...],
    a: sp.csc_array | None,
    real: Array,
    memory_bytes: int | None,
    rounding: float,
) -> tuple[Count, ...]:
    """Counts left of lines near to the left end: between eigenvalues that were found, and beyond them all.

    Args:
        enclosures: of A.
        a: A, where there is a matrix.
        real: the real parts that were found.
        memory_bytes: what a sparse LU may take.
        rounding: as for `count_left`.

    Returns:
        At most one of either kind; see `stiffcore.spectra.Ends`.
    """
    if not len(real):
        return ()
    scale = max(float(np.abs(e.inner.values).max(initial=0.0)) for e in enclosures) if enclosures else 0.0
    scale = max(scale, float(np.abs(real).max()))
    parts = np.sort(real)
    parts = parts[np.concatenate([[True], np.diff(parts) > APART * scale])]

    def counted(line: float) -> Count | None:
        found = _enclosed_count(enclosures, LeftOf(line), line, rounding)
        if found is None and a is not None and a.shape[0] <= DENSE_ORDER:
            dense = replace(_dense_count(a.toarray(), LeftOf(line), rounding), threshold=line)
            found = None if dense.count is None else dense
        return found

    middles = list((parts[:-1] + parts[1:])[:EACH_END] / 2)
    # and between the outermost and an ellipse that holds the next one
    edges = [edge for edge in (enclosure.edge(1) for enclosure in enclosures) if parts[0] < edge < math.inf]
    middles += [(float(parts[0]) + edge) / 2 for edge in edges if len(parts) == 1 or edge < parts[1]]
    # of no use where one of those counted was not found
    between = [count for count in map(counted, middles) if count and count.count == (real < count.threshold).sum()]
    found = [max(between, key=lambda count: count.tolerated)] if between else []
    tried = (counted(float(parts[0]) - share * scale) for share in BEYOND)
    beyond = next((count for count in tried if count is not None and count.count == 0), None)
    if beyond is None and not between and a is not None:
        beyond = _range_line(a, float(parts[0]) - BEYOND[-1] * scale, memory_bytes, rounding)
    return tuple(found if beyond is None else [*found, beyond])


def _range_line(a: sp.csc_array, least: float, memory_bytes: int | None, rounding: float) -> Count | None:
    """A line that the numerical range is right of, unless that is further left than `least`."""
    end = numerical_range_end(a, right_of=least, memory_bytes=memory_bytes)
    if not end.bound > least:
        return None
    line = max(least, end.bound - (2 * rounding + (end.bound - least) / 100))
    margin = end.bound - line
    if not margin > rounding:
        return None
    return Count(line, 0, "proved: numerical range", margin, computed=False, tolerated=margin)


def _middle_of_all(operator: Operator | None, a: sp.csc_array | None) -> float:
    """The mean of all eigenvalues; where there is no matrix, of Ritz values."""
    if a is not None:
        return float(a.trace()) / a.shape[0]
    assert operator is not None
    return float(operator.ritz.real.mean())


def _by_search(
    operator: Operator | None,
    a: sp.csc_array | None,
    region: Region,
    memory_bytes: int | None,
    known: tuple[Array, Array] | None,
    rounding: float,
) -> Count:
    """Find what is in the region, and prove that there is no more: by powers of the rest, or by discs."""
    if operator is not None:
        try:
            found = count_beyond(operator, region, memory_bytes, np.random.default_rng(2))
        except np.linalg.LinAlgError:
            found = None
        if found is not None:
            if found.count is None:
                return _open(math.nan, found.note)
            return _searched(DEFLATED, found.count, found.margin, found.note, rounding)
    return _open(math.nan, NO_MATRIX) if a is None else _by_discs(a, region, memory_bytes, known, rounding)


def _by_discs(
    a: sp.csc_array, region: Region, memory_bytes: int | None, known: tuple[Array, Array] | None, rounding: float
) -> Count:
    if a.shape[0] <= DENSE_ORDER:
        return _dense_count(a.toarray(), region, rounding)
    cover = Cover(a, region, memory_bytes, np.random.default_rng(0))
    if not LEAST_NORM < cover.norm < 1 / LEAST_NORM:
        note = "every eigenvalue is 0" if cover.norm == 0 else f"a norm of {cover.norm:.0e} leaves no room to compute"
        return _open(math.nan, note)
    if known is not None:
        cover.deflate(*known)
    try:
        cover.cover()
        found = cover.count()
    except (OpenError, FillError) as error:
        return _open(math.nan, str(error))
    except np.linalg.LinAlgError:
        return _open(math.nan, "LAPACK failed on the eigenvalues found")
    basis = DEFLATED if found.deflated else "proved: discs" if found.discs else "proved: numerical range"
    note = f"{found.discs} discs, {found.deflated} eigenvalues deflated"
    return _searched(basis, found.count, found.margin, note, rounding)


def _dense_count(a: Array, region: Region, rounding: float) -> Count:
    """The count of a Schur form T, which A is near to: no eigenvalue meets the boundary on the way."""
    try:
        form = SchurForm.of(a)
        distance = boundary_distance(form.t, region, float(np.linalg.norm(a)), 2 * form.error)
    except np.linalg.LinAlgError:
        return _open(math.nan, "LAPACK failed")
    margin = (distance - form.error) * (1 - 2 * form.tilt) if len(a) else math.inf
    if not margin > 0:
        return _open(math.nan, "an eigenvalue may be within rounding of the boundary")
    return _searched("proved: dense spectrum", int(region.has(form.values).sum()), margin, "", rounding)
