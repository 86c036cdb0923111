"""How many eigenvalues of a sparse real matrix lie left of a line, or outside of a disc: proved, or left open.

Powers of the matrix prove, by products alone, that all eigenvalues lie on one side (`stiffcore.eigen.powers`), where
they do. Every eigenvalue lies in the numerical range, too. Where neither decides, those that are there are found and
deflated, and powers prove that there are no more (`stiffcore.eigen.deflation`). Where that fails, the doubtful part of
the range is covered by discs: for each z, no eigenvalue is nearer to z than the smallest singular value of A - zI.
Eigenvalues that are there are found and deflated first, here, too: with A Q = Q T + R, Q an orthonormal basis of a few
eigenvectors, the eigenvalues of A' = A - R Q^T are those of T and those of A compressed to the complement of Q. The
discs are of that compression. They prove that it has none in the doubtful part; and as no eigenvalue of A' + s R Q^T
meets the boundary while s goes from 0 to 1, A has as many on the counted side as T.
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse as sp
from scipy.sparse.linalg import LinearOperator

from stiffcore.eigen.deflation import count_beyond
from stiffcore.eigen.extremes import nearest, spectral_radius
from stiffcore.eigen.numerical_range import numerical_range_end, outer_polygon, range_ends
from stiffcore.eigen.powers import Operator, margin_inside, margin_right_of
from stiffcore.eigen.regions import LeftOf, OutsideOf, Region, clipped
from stiffcore.eigen.sparse import (
    DENSE_ORDER,
    EPS,
    Array,
    FillError,
    Shifted,
    as_sparse,
    complement,
    host_matrix,
    norm_bound,
    product,
    singular_bound,
)
from stiffcore.errors import InputError
from stiffcore.spectra import Count, Ends

OPEN = "open"
DEFLATED = "proved: found and deflated"
NO_MATRIX = "no matrix was built, and products do not decide"
# Factorisations before a count is given up, and those after which it is asked whether so many will do.
MOST_DISCS = 200
FIRST_DISCS = 24
# Columns of Q, and eigenvalues on the counted side: beyond these the spectrum is cheaper.
MOST_DEFLATED = 60
MOST_COUNTED = 30
# A piece is covered when it lies within this share of a disc's radius: the rest keeps the boundary away.
COVERED = 0.9
# The polygon around the numerical range is moved out by this share of the norm, so that margins hold beside it.
INFLATION = 1e-3
# Where a disc is that small, relative to its piece, the eigenvalues nearest to its centre are deflated,
BLOCKED = 0.5
# and only those within this share of the piece of the counted side.
NEAR = 0.25
# Residual of a deflated vector, relative to the norm.
INVARIANT = 1e-10
SMALLEST_PIECE = 1e-7
# Squares of smaller norms, and of larger than the inverse, vanish or overflow.
LEAST_NORM = 1e-140
# Of the boundary of a small dense matrix, before its count is given up.
MOST_PIECES = 3000


def count_left(
    a: Any,
    threshold: float = 0.0,
    *,
    memory_bytes: int | None = None,
    known: tuple[Array, Array] | None = None,
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
    found = _by_powers(operator, threshold, sides, rng)
    if found is None and host is not None:
        found = _by_range(host, threshold, sides, memory_bytes)
    if found is not None:
        return found
    # where most eigenvalues are left of the line, the others are counted; none is on it where this is proved
    if k > DENSE_ORDER and _middle_of_all(operator, host) < threshold:
        turned = operator.negative() if operator else None
        right = _by_search(turned, None if host is None else -host, LeftOf(-threshold), threshold, memory_bytes, None)
        return right if right.count is None else replace(right, count=k - right.count)
    return _by_search(operator, host, LeftOf(threshold), threshold, memory_bytes, known)


def count_outside_disc(
    a: Any,
    centre: float = -1.0,
    radius: float = 1.0,
    *,
    memory_bytes: int | None = None,
    known: tuple[Array, Array] | None = None,
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
        return Count(radius, 0, "proved: norm", math.inf, computed=False)
    sides = ((1, centre + radius, k), (-1, radius - centre, k))
    rng = np.random.default_rng(0)
    operator, host, region = _multiplied(a, rng), host_matrix(a), OutsideOf(centre, radius)
    found = _by_powers(operator, radius, sides, rng, centre=centre)
    if found is not None:
        return found
    if host is None:
        return _by_search(operator, None, region, radius, memory_bytes, known)
    shifted = sp.csc_array(host - centre * sp.eye_array(k, format="csc"))
    # its eigenvalues are the singular values and their negatives
    both = sp.csc_array(sp.block_array([[None, shifted], [shifted.T, None]]))
    end = numerical_range_end(both, right_of=-radius, memory_bytes=memory_bytes)
    if end.bound > -radius:
        margin = radius + end.bound - 2 * EPS * abs(centre)
        if margin > 0:
            return Count(radius, 0, "proved: norm", margin, computed=False)
    found = _by_range(host, radius, sides, memory_bytes)
    if found is not None:
        return found
    return _by_search(operator, host, region, radius, memory_bytes, known)


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
        if found is not None:
            margin, power = found
            note = f"the norm of power {power} is under 1"
            return Count(threshold, count, "proved: powers", margin, computed=True, note=note)
    return None


def _by_range(a: sp.csc_array, threshold: float, sides: _Sides, memory_bytes: int | None) -> Count | None:
    """The count, where the numerical range proves one of the sides."""
    for sign, line, count in sides:
        end = numerical_range_end(a if sign == 1 else -a, right_of=line, memory_bytes=memory_bytes)
        if end.bound > line:
            return Count(threshold, count, "proved: numerical range", end.bound - line, computed=False)
    return None


def _open(threshold: float, note: str) -> Count:
    return Count(threshold, None, OPEN, 0.0, computed=True, note=note)


def ends_of(
    a: Any,
    shift: int,
    known: tuple[Array, Array],
    *,
    disc: bool,
    memory_bytes: int | None,
    note: str,
) -> Ends:
    """What can be said of shift + A where only the ends of its spectrum are known.

    Args:
        a: (k, k) real, sparse or dense, or a `LinearOperator` with a transpose.
        shift: what is added.
        known: eigenvalues and right eigenvectors of A; see `count_left`.
        disc: whether to count outside of |1 + l| = 1, too.
        memory_bytes: what a sparse LU may take.
        note: how the ends were found.
    """
    a = _matrix_or_operator(a)
    apply = a.dot if isinstance(a, LinearOperator) else partial(product, a)
    shifted = LinearOperator(a.shape, lambda x: apply(x.ravel()) + shift * x.ravel(), dtype=np.dtype(np.float64))
    left = count_left(a, -shift, memory_bytes=memory_bytes, known=known)
    outside = count_outside_disc(a, -1.0 - shift, memory_bytes=memory_bytes, known=known) if disc else None
    range_left, range_right = range_ends(a)
    return Ends(
        left_of_zero=replace(left, threshold=0.0),
        outside_disc=outside,
        radius=spectral_radius(shifted),
        range_left=shift + range_left,
        range_right=shift + range_right,
        note=note,
    )


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
    threshold: float,
    memory_bytes: int | None,
    known: tuple[Array, Array] | None,
) -> Count:
    """Find what is in the region, and prove that there is no more: by powers of the rest, or by discs."""
    if operator is not None:
        try:
            found = count_beyond(operator, region, memory_bytes, np.random.default_rng(2))
        except np.linalg.LinAlgError:
            found = None
        if found is not None:
            basis = DEFLATED if found.count is not None else OPEN
            return Count(threshold, found.count, basis, found.margin, computed=True, note=found.note)
    return _open(threshold, NO_MATRIX) if a is None else _by_discs(a, region, threshold, memory_bytes, known)


def _by_discs(
    a: sp.csc_array,
    region: Region,
    threshold: float,
    memory_bytes: int | None,
    known: tuple[Array, Array] | None,
) -> Count:
    rng = np.random.default_rng(0)
    if a.shape[0] <= DENSE_ORDER:
        return _dense_count(a.toarray(), region, threshold)
    search = _Search(a, region, memory_bytes, rng)
    if not LEAST_NORM < search.norm < 1 / LEAST_NORM:
        note = "every eigenvalue is 0" if search.norm == 0 else f"a norm of {search.norm:.0e} leaves no room to compute"
        return _open(threshold, note)
    if known is not None:
        search.deflate(*known)
    try:
        search.cover()
    except (_OpenError, FillError) as error:
        return _open(threshold, str(error))
    return search.count(threshold)


def _dense_count(a: Array, region: Region, threshold: float) -> Count:
    """Count computed eigenvalues: they are those of A + E, and none meets the boundary on the way to A."""
    k = len(a)
    allowed = 20 * k * EPS * float(np.linalg.norm(a))
    distance = _boundary_distance(a, region, float(np.linalg.norm(a)), 2 * allowed)
    if distance <= 2 * allowed:
        return _open(threshold, "an eigenvalue may be within rounding of the boundary")
    count = int(region.has(np.linalg.eigvals(a)).sum())
    return Count(threshold, count, "proved: dense spectrum", distance - allowed, computed=True)


def _boundary_distance(t: Array, region: Region, reach: float, least: float) -> float:
    """A lower bound of the smallest singular value of T - zI over the boundary, by bisection.

    Zero where it may be under `least`, or takes too many pieces. It changes by at most |z - z'|; beyond `reach`, a
    bound of |T|, it is at least the distance from there.
    """
    if len(t) == 0:
        return math.inf
    eye, allowed = np.eye(len(t)), least / 2
    length, point = region.boundary(2 * reach + least)
    distance, pieces, tried = reach + least, [(0.0, length)], 0
    while pieces:
        start, stop = pieces.pop()
        tried += 1
        half = (stop - start) / 2
        value = float(scipy.linalg.svdvals(t - point(np.array(start + half)) * eye)[-1]) - allowed
        if value >= 2 * half or value >= half + distance:
            distance = min(distance, value - half)
        elif value <= least or half <= least / 4 or tried > MOST_PIECES:
            return 0.0
        else:
            pieces += [(start, start + half), (start + half, stop)]
    return distance


class _OpenError(Exception):
    """Why a count stays open."""


class _Search:
    """The discs laid so far and the eigenvectors deflated so far, of one matrix and one region."""

    def __init__(self, a: sp.csc_array, region: Region, memory_bytes: int | None, rng: np.random.Generator) -> None:
        self.a, self.region, self.memory_bytes, self.rng = a, region, memory_bytes, rng
        self.norm = norm_bound(a)
        self.q = np.zeros((a.shape[0], 0))
        self.discs: list[tuple[complex, float]] = []
        self.slack = math.inf
        self.singular = 0

    def project(self, x: Array) -> Array:
        """Onto the complement of Q."""
        return complement(x, self.q) if self.q.shape[1] else x

    def deflate(self, values: Array, vectors: Array) -> int:
        """Add eigenvectors of the compression to Q, as far as A Q stays in Q; returns how many columns."""
        before = self.q.shape[1]
        for value, x in zip(values, vectors.T, strict=True):
            if value.imag < 0 or not np.isfinite(x).all():
                continue
            new = np.stack([x.real, x.imag], axis=1)
            for _ in range(2):
                new = complement(new, self.q)
            # the two columns of a real eigenvalue, or what Q has already, leave small singular values
            basis, sizes, _ = scipy.linalg.svd(new, full_matrices=False)
            basis = basis[:, sizes > 1e-6]
            trial = np.hstack([self.q, basis])
            outside = complement(self.a @ basis, trial)
            if basis.shape[1] and np.linalg.norm(outside) <= INVARIANT * self.norm:
                self.q = trial
        return self.q.shape[1] - before

    def cover(self) -> None:
        """Cover the counted part of the numerical range's upper half.

        Raises:
            _OpenError: where that fails.
            FillError: where no factorisation fits.
        """
        start = self.region.clip(self._range())
        whole, left = _area(start), 0.0
        pieces = [start]
        while pieces:
            piece = self.region.clip(pieces.pop())
            if len(piece) == 0 or self._covered(piece):
                continue
            left = _area(piece) + sum(map(_area, pieces))
            self._check_progress(left / whole if whole else 1.0)
            if np.abs(piece - _middle(piece)).max() <= SMALLEST_PIECE * self.norm:
                raise _OpenError("an eigenvalue or a singular value is too near to the boundary for discs")
            self._lay_disc(piece)
            if not self._covered(piece):
                pieces += _halves(piece)

    def count(self, threshold: float) -> Count:
        """The count after `cover`: by T, where the way from A' to A is clear."""
        basis = "proved: discs" if self.discs else "proved: numerical range"
        basis = DEFLATED if self.q.shape[1] else basis
        aq = self.a @ self.q
        t = self.q.T @ aq
        m, longest = len(t), int(np.bincount(self.a.indices).max(initial=0))
        # what was computed of R, and the rounding of it, of Q and of the eigenvalues of T
        rounding = (longest + 40 * m + 10) * EPS * self.norm
        residual = float(np.linalg.norm(aq - self.q @ t)) + rounding if m else 0.0
        distance = _boundary_distance(t, self.region, self.norm, 2 * rounding) if m else math.inf
        slack = min(self.slack, INFLATION * self.norm)
        # | (A' - zI)^-1 | on the boundary, A' block triangular with T, the compression, and a block of norm |A| at most
        inverse = (1 / distance if distance else math.inf) + 1 / slack
        inverse += self.norm / slack / distance if distance else math.inf
        margin = min(1 / inverse - 2 * residual, slack)
        if not margin > 0:
            note = "an eigenvalue found is within its error of the boundary"
            return _open(threshold, note)
        count = int(self.region.has(np.linalg.eigvals(t)).sum()) if m else 0
        note = f"{len(self.discs)} discs, {m} eigenvalues deflated"
        return Count(threshold, count, basis, margin, computed=True, note=note)

    def _range(self) -> Array:
        """The upper half of a polygon around the numerical range, a little larger."""
        r = 2 * self.norm
        polygon = np.array([complex(-r, 0), complex(r, 0), complex(r, r), complex(-r, r)])
        normals = self.region.normals
        # a real LU for a left end without Lanczos' 3 %: there every disc saved is a complex one
        end = numerical_range_end(self.a, memory_bytes=self.memory_bytes)
        if math.isfinite(end.bound):
            polygon = clipped(polygon, -1, -end.bound + INFLATION * self.norm)
        else:
            normals = (*normals, 180)
        for normal, height in outer_polygon(self.a, np.radians(normals), self.rng):
            polygon = clipped(polygon, normal, height + INFLATION * self.norm)
        return polygon

    def _covered(self, piece: Array) -> bool:
        """Whether one disc holds a piece with room to spare; keeps the least room."""
        for centre, radius in self.discs:
            far = float(np.abs(piece - centre).max())
            if far <= COVERED * radius:
                self.slack = min(self.slack, radius - far)
                return True
        return False

    def _lay_disc(self, piece: Array) -> None:
        centre = _middle(piece)
        half = float(np.abs(piece - centre).max())
        try:
            shifted = Shifted(self.a, centre, self.memory_bytes)
        except ZeroDivisionError:
            self.singular += 1
            return
        radius = singular_bound(shifted, self.norm, self.rng, self.project)
        while radius < BLOCKED * half and self._deflate_nearest(shifted, half):
            radius = singular_bound(shifted, self.norm, self.rng, self.project)
        self.discs.append((centre, radius))

    def _deflate_nearest(self, shifted: Shifted, half: float) -> bool:
        """Deflate what is nearest to a centre, and counted or near to what is; whether there was any."""
        if self.q.shape[1] >= MOST_DEFLATED:
            return False
        values, vectors = nearest(shifted, 6, self.rng, self.project)
        around = NEAR * half * np.array([-1 - 1j, 1 - 1j, 1 + 1j, -1 + 1j])
        chosen = [len(self.region.clip(v + around)) > 0 for v in values]
        added = self.deflate(values[chosen], vectors[:, chosen])
        self._check_found()
        return added > 0

    def _check_found(self) -> None:
        t = self.q.T @ (self.a @ self.q)
        if self.region.has(np.linalg.eigvals(t)).sum() > MOST_COUNTED:
            raise _OpenError(f"more than {MOST_COUNTED} eigenvalues are there: needs the spectrum")

    def _check_progress(self, left: float) -> None:
        laid = len(self.discs) + self.singular
        hopeless = laid >= FIRST_DISCS and (1 - left) * MOST_DISCS < laid / 4
        if laid >= MOST_DISCS or hopeless:
            raise _OpenError(f"{laid} discs cover {100 * (1 - left):.2g} % of the doubtful part")


def _middle(piece: Array) -> complex:
    """Of the bounding box; on the real axis where the piece reaches it: a real LU, and a disc of twice the use."""
    x = (piece.real.min() + piece.real.max()) / 2
    bottom, top = piece.imag.min(), piece.imag.max()
    on_axis = bottom <= 0 and 2 * top <= 1.5 * (piece.real.max() - piece.real.min())
    return complex(x, 0.0 if on_axis else (bottom + top) / 2)


def _halves(piece: Array) -> list[Array]:
    """Cut across the longer side of the bounding box; the upper half plane's mirror image counts at the real axis."""
    width = piece.real.max() - piece.real.min()
    bottom, top = piece.imag.min(), piece.imag.max()
    if width >= (2 * top if bottom <= 0 else top - bottom):
        x = (piece.real.min() + piece.real.max()) / 2
        return [clipped(piece, 1, x), clipped(piece, -1, -x)]
    y = (bottom + top) / 2
    return [clipped(piece, 1j, y), clipped(piece, -1j, -y)]


def _area(piece: Array) -> float:
    return abs(float((np.conj(piece) * np.roll(piece, -1)).imag.sum())) / 2
