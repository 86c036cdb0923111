"""Discs without eigenvalues, laid over the part of a numerical range that is in doubt, and along a boundary.

For each z, no eigenvalue of A is nearer to z than the smallest singular value of A - zI, which changes by |z - z'| at
most. Eigenvalues that are there are found and deflated first: with A Q = Q T + R, Q an orthonormal basis of a few
eigenvectors, the eigenvalues of A' = A - R Q^T are those of T and those of A compressed to the complement of Q. The
discs are of that compression. They prove that it has none in the doubtful part; and as no eigenvalue of A' + s R Q^T
meets the boundary while s goes from 0 to 1, A has as many on the counted side as T.
"""

import heapq
import math
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.sparse as sp

from stiffcore.eigen.extremes import nearest
from stiffcore.eigen.numerical_range import numerical_range_end, outer_polygon
from stiffcore.eigen.regions import Region, clipped
from stiffcore.eigen.sparse import EPS, Array, Shifted, complement, longest_sum, norm_bound, singular_bound

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
# Of the boundary of a small dense matrix, before its count is given up.
MOST_PIECES = 3000
# Of them whose singular values are computed together.
PIECES_AT_ONCE = 16


class OpenError(Exception):
    """Why a count stays open."""


@dataclass(frozen=True)
class SchurForm:
    """A small real matrix, solved: it is similar to T + E, |E| at most `error`.

    Balancing changes the norm in which a solver is backward stable: A with blocks t^2 C and C' is solved as if they
    were t C and t C', and may be off by eps |C'| / t. So it is not used here (LAPACK's gees permutes only), and no
    stability is taken for granted: `error` is from the computed |A Q - Q T| and |Q^T Q - I|.

    Attributes:
        t: (k, k), upper triangular but for blocks of order 2 on the diagonal.
        values: (k,) complex, its eigenvalues.
        error: see above.
        tilt: an upper bound of |Q^T Q - I|: a change F of A is one of at most |F| (1 + 2 tilt) of T.
    """

    t: Array
    values: Array
    error: float
    tilt: float

    @classmethod
    def of(cls, a: Array) -> "SchurForm":
        """Solve a (k, k) real matrix.

        Raises:
            LinAlgError: where LAPACK fails.
        """
        k = len(a)
        if k == 0:
            return cls(a, np.zeros(0, complex), 0.0, 0.0)
        t, q = scipy.linalg.schur(a, output="real")
        off = np.append(np.diagonal(t, -1), 0.0)
        # of a block of order 2, whose diagonal is equal, on both of its rows
        product = off * np.append(np.diagonal(t, 1), 0.0)
        product += np.concatenate([[0.0], product[:-1]])
        values = np.diagonal(t) + np.sqrt(product.astype(complex))
        values = np.where(np.concatenate([[0.0], off[:-1]]) != 0, values.conj(), values)
        size, rounded = float(np.linalg.norm(a)), (k + 4) * math.sqrt(k) * EPS
        tilt = float(np.linalg.norm(q.T @ q - np.eye(k))) + 2 * rounded
        left = float(np.linalg.norm(a @ q - q @ t)) + 3 * rounded * (size + float(np.linalg.norm(t)))
        return cls(t, values, left * (1 + 2 * tilt), tilt)


def boundary_distance(t: Array, region: Region, reach: float, least: float) -> float:
    """A lower bound of the smallest singular value of T - zI over the boundary, by bisection.

    Zero where it may be under `least`, or takes too many pieces. It changes by at most |z - z'|; beyond `reach`, a
    bound of |T|, it is at least the distance from there. The pieces with the smallest values are halved first: where
    an eigenvalue is in the way, they lead there.
    """
    if len(t) == 0:
        return math.inf
    eye, allowed = np.eye(len(t)), 20 * len(t) * EPS * reach
    least = max(least, 2 * allowed)
    length, point = region.boundary(2 * reach + least)
    distance, tried, pieces = reach + least, 0, [(0.0, 0.0, length)]
    while pieces:
        taken = [heapq.heappop(pieces) for _ in range(min(PIECES_AT_ONCE, len(pieces)))]
        ends = np.array([piece[1:] for piece in taken])
        middles, halves = ends.mean(axis=1), (ends[:, 1] - ends[:, 0]) / 2
        values = np.linalg.svd(t - point(middles)[:, None, None] * eye, compute_uv=False)[:, -1] - allowed
        tried += len(taken)
        clear = (values >= 2 * halves) | (values >= halves + distance)
        distance = min(distance, float((values - halves)[clear].min(initial=math.inf)))
        if (~clear & ((values <= least) | (halves <= least / 4))).any() or tried > MOST_PIECES:
            return 0.0
        for value, half, middle in zip(values[~clear], halves[~clear], middles[~clear], strict=True):
            for start in (middle - half, middle):
                heapq.heappush(pieces, (float(value), float(start), float(start + half)))
    return distance


@dataclass(frozen=True)
class Covered:
    """What discs prove.

    Attributes:
        count: of eigenvalues on the counted side.
        margin: no eigenvalue is nearer to the boundary, nor of any matrix within this distance of A on it.
        discs: how many were laid.
        deflated: how many eigenvalues were found first.
    """

    count: int
    margin: float
    discs: int
    deflated: int


class Cover:
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
            OpenError: where that fails.
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
                raise OpenError("an eigenvalue or a singular value is too near to the boundary for discs")
            self._lay_disc(piece)
            if not self._covered(piece):
                pieces += _halves(piece)

    def count(self) -> Covered:
        """The count after `cover`: by T, where the way from A' to A is clear.

        Raises:
            OpenError: where it is not.
            LinAlgError: where LAPACK fails.
        """
        aq = self.a @ self.q
        t = self.q.T @ aq
        m, distance = len(t), math.inf
        form = SchurForm.of(t)
        # what was computed of R, and the rounding of it and of Q
        rounding = (longest_sum(self.a) + 20 * m + 10) * EPS * self.norm + form.error
        residual = float(np.linalg.norm(aq - self.q @ t)) + rounding if m else 0.0
        if m:
            distance = boundary_distance(form.t, self.region, self.norm, 2 * rounding) - form.error
        slack = min(self.slack, INFLATION * self.norm)
        # | (A' - zI)^-1 | on the boundary, A' block triangular with T, the compression, and a block of norm |A| at most
        inverse = (1 / distance if distance > 0 else math.inf) + 1 / slack
        inverse += self.norm / slack / distance if distance > 0 else math.inf
        margin = min(1 / inverse - 2 * residual, slack)
        if not margin > 0:
            raise OpenError("an eigenvalue found is within its error of the boundary")
        return Covered(int(self.region.has(form.values).sum()), margin, len(self.discs), m)

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
            raise OpenError(f"more than {MOST_COUNTED} eigenvalues are there: needs the spectrum")

    def _check_progress(self, left: float) -> None:
        laid = len(self.discs) + self.singular
        hopeless = laid >= FIRST_DISCS and (1 - left) * MOST_DISCS < laid / 4
        if laid >= MOST_DISCS or hopeless:
            raise OpenError(f"{laid} discs cover {100 * (1 - left):.2g} % of the doubtful part")


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
