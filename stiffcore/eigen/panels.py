"""Linear algebra on matrices that fit no memory, in column panels: products, LU, inverse, QR, transposes.

A matrix is a sequence of column panels, each written once. Every function here writes the panels that its result still
lacks, in order, from what its arguments hold: a few panels are in memory at once, whatever the order, and a call that
was cut off is finished by the same call. LU and QR look left: a panel takes all that went before it, and is written
when it is done with.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
from scipy.linalg import get_lapack_funcs, solve_triangular

from stiffcore.errors import StiffcoreError

Tell = Callable[[int, int], None]


class Panels(Protocol):
    """A (rows, columns) matrix in column panels, each written once; `stiffcore.store.TiledMatrix` is one."""

    shape: tuple[int, int]
    dtype: np.dtype

    @property
    def shards(self) -> int:
        """How many panels there are."""

    def columns(self, shard: int) -> tuple[int, int]:
        """First and one past the last column of a panel."""

    def missing(self) -> list[int]:
        """The panels that are not written yet, ascending."""

    def read_shard(self, shard: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows of a panel, Fortran-ordered; the reader's own."""

    def write(self, shard: int, block: np.ndarray) -> int:
        """Write a panel whole, and record it as done."""


class SingularError(StiffcoreError):
    """A matrix has no inverse, to working precision."""


def _silent(done: int, total: int) -> None:
    pass


def copy(a: Panels, out: Panels, *, shift: complex = 0.0, first: int = 0, tell: Tell = _silent) -> None:
    """out = a[first:, first:] + shift I, as much of it as `out` is large; panels may differ in width."""
    for j in out.missing():
        start, stop = out.columns(j)
        block = np.zeros((out.shape[0], stop - start), out.dtype, order="F")
        for i in range(a.shards):
            left, right = a.columns(i)
            low, high = max(left, start + first), min(right, stop + first)
            if low < high:
                rows = a.read_shard(i, first, first + out.shape[0])
                block[:, low - first - start : high - first - start] = rows[:, low - left : high - left]
        block[np.arange(start, stop), np.arange(stop - start)] += shift
        out.write(j, block)
        tell(j + 1, out.shards)


def transpose(a: Panels, out: Panels, tell: Tell = _silent) -> None:
    """out = a^T."""
    for j in out.missing():
        start, stop = out.columns(j)
        block = np.empty((out.shape[0], stop - start), order="F")
        for i in range(a.shards):
            block[slice(*a.columns(i))] = a.read_shard(i, start, stop).T
        out.write(j, block)
        tell(j + 1, out.shards)


def product(
    a: Panels,
    b: Panels | Callable[[int, int], np.ndarray],
    out: Panels,
    *,
    shift: float = 0.0,
    tell: Tell = _silent,
) -> None:
    """out = (a + shift I) b; b is stored, or a function that makes columns start..stop-1 of it.

    Memory: three panels. Each panel of `out` reads all of a.
    """
    for j in out.missing():
        right = b(*out.columns(j)) if callable(b) else b.read_shard(j)
        block = shift * right if shift else np.zeros((out.shape[0], right.shape[1]), order="F")
        for i in range(a.shards):
            block += a.read_shard(i) @ right[slice(*a.columns(i))]
        out.write(j, block)
        tell(j + 1, out.shards)


def trace(a: Panels) -> float:
    """The sum of the diagonal."""
    return float(sum(np.trace(a.read_shard(i, *a.columns(i))) for i in range(a.shards)))


def square_trace(a: Panels) -> float:
    """The trace of a^2."""
    total = 0.0
    for j in range(a.shards):
        right, (start, stop) = a.read_shard(j), a.columns(j)
        for i in range(a.shards):
            total += float(np.einsum("ij,ji->", a.read_shard(i, start, stop), right[slice(*a.columns(i))]))
    return total


def norm(
    a: Panels,
    rows: tuple[int, int] | None = None,
    columns: tuple[int, int] | None = None,
    *,
    shift: float = 0.0,
) -> float:
    """The Frobenius norm of a + shift I; of the rows and columns given, of a alone."""
    first, last = columns or (0, a.shape[1])
    squares = 0.0
    for i in range(a.shards):
        start, stop = a.columns(i)
        low, high = max(first, start), min(last, stop)
        if low < high:
            block = a.read_shard(i, *(rows or (0, a.shape[0])))
            if shift:
                block[np.arange(start, stop), np.arange(stop - start)] += shift
            squares += float(np.sum(block[:, low - start : high - start] ** 2))
    return float(np.sqrt(squares))


def distance(a: Panels, b: Panels) -> float:
    """The Frobenius norm of a - b."""
    return float(np.sqrt(sum(np.sum((a.read_shard(i) - b.read_shard(i)) ** 2) for i in range(a.shards))))


def factor(a: Panels, lu: Panels, tell: Tell = _silent) -> None:
    """P a = L U by partial pivoting (Golub and Van Loan, 3.2.11, in its left-looking form).

    Args:
        a: (n, n).
        lu: (n + 1, n), like a: L below the diagonal, each panel's rows in the order in which it was factored, U above,
            and in the last row the pivots: the row that was swapped with each.
        tell: told of panels done and panels in all.

    Raises:
        SingularError: where a pivot is zero, or not finite.
    """
    n = a.shape[0]
    for j in lu.missing():
        start, stop = lu.columns(j)
        block = a.read_shard(j)
        for i in range(j):
            _eliminate(block, lu, i)
        (getrf,) = get_lapack_funcs(("getrf",), (block,))
        found, pivots, info = getrf(block[start:])
        if info > 0 or not np.isfinite(found).all():
            raise SingularError(f"a pivot of columns {start} to {stop - 1} is zero, or not finite")
        whole = np.empty((n + 1, stop - start), block.dtype, order="F")
        whole[:start], whole[start:n], whole[n] = block[:start], found, start + pivots
        lu.write(j, whole)
        tell(j + 1, lu.shards)


def _eliminate(block: np.ndarray, lu: Panels, i: int) -> None:
    """Take panel i of L, with its row exchanges, through a block, in place."""
    start, stop = lu.columns(i)
    left = lu.read_shard(i, start)
    _exchange(block, start, left[-1])
    block[start:stop] = solve_triangular(left[: stop - start], block[start:stop], lower=True, unit_diagonal=True)
    block[stop:] -= left[stop - start : -1] @ block[start:stop]


def _exchange(block: np.ndarray, start: int, pivots: np.ndarray, *, back: bool = False) -> None:
    """Swap rows start, start + 1, ... with those that the pivots name, in this order or `back`, in place."""
    swaps = list(enumerate(pivots.real.astype(int), start))
    order = np.arange(len(block))
    for row, other in reversed(swaps) if back else swaps:
        order[[row, other]] = order[[other, row]]
    moved = np.flatnonzero(order != np.arange(len(block)))
    block[moved] = block[order[moved]]


def log_determinant(lu: Panels) -> float:
    """log |det a|, from its factors."""
    diagonals = (np.diagonal(lu.read_shard(i, *lu.columns(i))) for i in range(lu.shards))
    return float(sum(np.log(np.abs(d)).sum() for d in diagonals))


def solve(lu: Panels, block: np.ndarray) -> np.ndarray:
    """a^-1 block, from a's factors, in the memory of `block` (n, any)."""
    for i in range(lu.shards):
        _eliminate(block, lu, i)
    for i in reversed(range(lu.shards)):
        start, stop = lu.columns(i)
        right = lu.read_shard(i, 0, stop)
        block[start:stop] = solve_triangular(right[start:], block[start:stop])
        block[:start] -= right[:start] @ block[start:stop]
    return block


def solve_adjoint(lu: Panels, block: np.ndarray) -> np.ndarray:
    """a^-H block, as `solve`."""
    for i in range(lu.shards):
        start, stop = lu.columns(i)
        right = lu.read_shard(i, 0, stop)
        block[start:stop] -= right[:start].conj().T @ block[:start]
        block[start:stop] = solve_triangular(right[start:], block[start:stop], trans="C")
    for i in reversed(range(lu.shards)):
        start, stop = lu.columns(i)
        left = lu.read_shard(i, start)
        block[start:stop] -= left[stop - start : -1].conj().T @ block[stop:]
        lower = left[: stop - start]
        block[start:stop] = solve_triangular(lower, block[start:stop], lower=True, unit_diagonal=True, trans="C")
        _exchange(block, start, left[-1], back=True)
    return block


def inverse(
    lu: Panels,
    out: Panels,
    *,
    scale: float = 1.0,
    shift: float = 0.0,
    beside: tuple[float, Panels] | None = None,
    tell: Tell = _silent,
) -> None:
    """out = scale a^-1 + shift I + weight b, from a's factors; `beside` is (weight, b).

    Memory: three panels. Each panel of `out` reads the factors twice.
    """
    for j in out.missing():
        start, stop = out.columns(j)
        block = np.zeros((out.shape[0], stop - start), order="F")
        block[np.arange(start, stop), np.arange(stop - start)] = 1
        block = solve(lu, block)
        block *= scale
        if beside is not None:
            block += beside[0] * beside[1].read_shard(j)
        block[np.arange(start, stop), np.arange(stop - start)] += shift
        out.write(j, block)
        tell(j + 1, out.shards)


def orthogonalise(a: Panels, qr: Panels, tell: Tell = _silent) -> None:
    """a = Q R by Householder reflectors (Golub and Van Loan, 5.2.2), of which Q is kept.

    Args:
        a: (n, r), r <= n.
        qr: (n + width of a panel, r): the reflectors V of each panel, lower trapezoidal with a unit diagonal, and below
            them T^-1, upper triangular, for which the panel's reflectors together are I - V T V^T.
        tell: told of panels done and panels in all.
    """
    n = a.shape[0]
    for j in qr.missing():
        start, stop = qr.columns(j)
        block = a.read_shard(j)
        for i in range(j):
            _reflect(block, qr.read_shard(i), n, transposed=True)
        compact, tau = np.linalg.qr(block[start:], mode="raw")
        v = np.tril(compact.T, -1)
        v[np.arange(stop - start), np.arange(stop - start)] = 1
        v[:, tau == 0] = 0  # no reflector at all
        whole = np.zeros((qr.shape[0], stop - start), order="F")
        whole[start:n] = v
        # Joffrain et al. 2006: T^-1 + T^-T = V^T V
        whole[n : n + stop - start] = np.triu(v.T @ v, 1) + np.diag(1 / np.where(tau == 0, 1, tau))
        qr.write(j, whole)
        tell(j + 1, qr.shards)


def _reflect(block: np.ndarray, panel: np.ndarray, n: int, *, transposed: bool) -> None:
    """Take the reflectors of one panel through a block, in place: Q^T block, or Q block."""
    v, inverse = panel[:n], panel[n : n + panel.shape[1]]
    block -= v @ solve_triangular(inverse, v.T @ block, trans=1 if transposed else 0)


def rotate(qr: Panels, a: Panels, out: Panels, tell: Tell = _silent) -> None:
    """out = Q^T a, Q all n x n of it, from `orthogonalise`."""
    n = a.shape[0]
    for j in out.missing():
        block = a.read_shard(j)
        for i in range(qr.shards):
            _reflect(block, qr.read_shard(i), n, transposed=True)
        out.write(j, block)
        tell(j + 1, out.shards)
