"""Linear algebra on matrices that fit no memory, in column panels: products, LU, Cholesky, inverse, QR, transposes.

A matrix is a sequence of column panels, each written once. Every function here writes the panels that its result still
lacks, in order, from what its arguments hold, and a call that was cut off is finished by the same call, to the same
bits. LU, Cholesky and QR look left: a panel takes all that went before it, and is written when it is done with.

Memory is a block, `at_once` panels of the result side by side, and panels that pass through it, each read while the one
before is at work: each works on the whole block, so the wider the block, the fewer bytes are read for the same
arithmetic, 4 / columns bytes an operation. That is why no block is written while the next one is worked on: two of them
in memory would be half as wide, and twice as much read, to hide a small share (`bench/divide.py`). Blocks begin at
multiples of `at_once`: what is written in one session or several is the same.

Who works on the blocks is `each`: this process, one after the other (`one_by_one`), or several workers at once, each on
a block. A block of these three takes in the panels before its own as they are written. The panels are the same, to the
bit.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Protocol

import numpy as np

from stiffcore.eigen import blas
from stiffcore.eigen.blas import HOST, Array
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

    def has(self, shard: int) -> bool:
        """Whether a panel is written."""

    def read_shard(self, shard: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows of a panel, Fortran-ordered; the reader's own."""

    def write(self, shard: int, block: np.ndarray) -> int:
        """Write a panel whole, and record it as done."""


class SingularError(StiffcoreError):
    """A matrix has no inverse, to working precision."""


def _whole(panel: int) -> tuple[int, int | None]:
    """All rows of it."""
    return 0, None


def _from_diagonal(a: Panels, panel: int) -> tuple[int, int | None]:
    """Rows of its diagonal block, and all below."""
    return a.columns(panel)[0], None


def _to_diagonal(a: Panels, panel: int) -> tuple[int, int | None]:
    """Rows of its diagonal block, and all above."""
    return 0, a.columns(panel)[1]


def _silent(done: int, total: int) -> None:
    pass


# Waits until a panel is written, where another worker writes it.
Await = Callable[[Panels, int], None]
# Works on panels first..last-1 of a result, and writes them. Others may be under way: `Await` is for those it needs.
Work = Callable[[int, int, Await], None]


class Each(Protocol):
    """Carries out the work on all blocks, begun in this order, and returns when all is written."""

    def __call__(self, work: Work, blocks: Sequence[tuple[int, int]], finished: Callable[[int, int], None]) -> None:
        """Do so.

        Args:
            work: a function that can be pickled, with arguments that can.
            blocks: first and one past the last panel of each.
            finished: told of each block that is written.
        """


def one_by_one(work: Work, blocks: Sequence[tuple[int, int]], finished: Callable[[int, int], None]) -> None:
    """Each block in this process, in order; see `Each`."""
    for first, last in blocks:
        work(first, last, lambda a, panel: None)
        finished(first, last)


def _carry_out(work: Work, out: Panels, at_once: int, tell: Tell, each: Each) -> None:
    """Have the blocks of `out` written that are not."""
    missing = set(out.missing())
    starts = range(0, out.shards, at_once)
    blocks = [(first, min(first + at_once, out.shards)) for first in starts]
    blocks = [block for block in blocks if not missing.isdisjoint(range(*block))]
    done = out.shards - sum(last - first for first, last in blocks)

    def finished(first: int, last: int) -> None:
        nonlocal done
        done += last - first
        tell(done, out.shards)

    each(work, blocks, finished)


def _span(a: Panels, first: int, last: int) -> tuple[int, int]:
    return a.columns(first)[0], a.columns(last - 1)[1]


def _read(a: Panels, first: int, last: int, device: str, *, more: int = 0) -> Array:
    """Panels side by side, with some rows of zeros more below them."""
    start, stop = _span(a, first, last)
    block = blas.zeros(a.shape[0] + more, stop - start, a.dtype, device)
    for j in range(first, last):
        left, right = a.columns(j)
        block[: a.shape[0], left - start : right - start] = blas.to_device(a.read_shard(j), device)
    return block


def _write(out: Panels, first: int, last: int, block: Array) -> None:
    """Those of a block's panels that are not written yet."""
    start = out.columns(first)[0]
    for j in range(first, last):
        if not out.has(j):
            left, right = out.columns(j)
            out.write(j, blas.to_host(block[:, left - start : right - start]))


def _passing(
    a: Panels,
    numbers: Iterable[int],
    rows: Callable[[int], tuple[int, int | None]],
    device: str,
    ready: Await | None = None,
) -> Iterator[tuple[int, Array]]:
    """Panels, the given rows of each, read while the ones before are worked on; with `ready`, those that are there."""
    left = list(numbers)
    with ThreadPoolExecutor(1) as reader:
        ahead: Future[np.ndarray] | None = None
        while left:
            i = left.pop(0)
            if ahead is None and ready is not None:
                ready(a, i)
            panel = a.read_shard(i, *rows(i)) if ahead is None else ahead.result()
            follows = bool(left) and (ready is None or a.has(left[0]))
            ahead = reader.submit(a.read_shard, left[0], *rows(left[0])) if follows else None
            yield i, blas.to_device(panel, device)


def copy(a: Panels, out: Panels, *, shift: complex = 0.0, first: int = 0) -> None:
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


def transpose(a: Panels, out: Panels, *, tell: Tell = _silent, each: Each = one_by_one) -> None:
    """out = a^T. Memory: panels."""
    _carry_out(partial(_transpose, a, out), out, 1, tell, each)


def _transpose(a: Panels, out: Panels, first: int, last: int, ready: Await) -> None:
    start, stop = _span(out, first, last)
    block = np.empty((out.shape[0], stop - start), order="F")
    for i, panel in _passing(a, range(a.shards), lambda i: (start, stop), HOST):
        block[slice(*a.columns(i))] = panel.T
    _write(out, first, last, block)


def product(
    a: Panels,
    b: Panels | Callable[[int, int], np.ndarray],
    out: Panels,
    *,
    shift: float = 0.0,
    at_once: int = 1,
    tell: Tell = _silent,
    each: Each = one_by_one,
    device: str = HOST,
) -> None:
    """out = (a + shift I) b; b is stored, in panels like those of `out`, or makes columns start..stop-1 of it.

    Memory: two blocks of half as many panels, and panels. Each block reads all of a.
    """
    _carry_out(partial(_product, a, b, out, shift, device), out, max(1, at_once // 2), tell, each)


def _product(
    a: Panels,
    b: Panels | Callable[[int, int], np.ndarray],
    out: Panels,
    shift: float,
    device: str,
    first: int,
    last: int,
    ready: Await,
) -> None:
    if callable(b):
        right = blas.to_device(np.asfortranarray(b(*_span(out, first, last))), device)
    else:
        right = _read(b, first, last, device)
    block = shift * right if shift else blas.zeros(out.shape[0], right.shape[1], out.dtype, device)
    for i, panel in _passing(a, range(a.shards), _whole, device):
        blas.add_product(block, 1.0, panel, right[slice(*a.columns(i))])
    _write(out, first, last, block)


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
            with np.errstate(over="ignore"):  # infinite, which whoever asked looks at
                squares += float(np.sum(block[:, low - start : high - start] ** 2))
    return float(np.sqrt(squares))


def distance(a: Panels, b: Panels) -> float:
    """The Frobenius norm of a - b."""
    with np.errstate(over="ignore"):
        return float(np.sqrt(sum(np.sum((a.read_shard(i) - b.read_shard(i)) ** 2) for i in range(a.shards))))


def factor(
    a: Panels, lu: Panels, *, at_once: int = 1, tell: Tell = _silent, each: Each = one_by_one, device: str = HOST
) -> None:
    """P a = L U by partial pivoting (Golub and Van Loan, 3.2.11, in its left-looking form).

    Memory: a block, and panels.

    Args:
        a: (n, n).
        lu: (n + 1, n), like a: L below the diagonal, each panel's rows in the order in which it was factored, U above,
            and in the last row the pivots: the row that was swapped with each.
        at_once: panels of a block.
        tell: told of panels done and panels in all.
        each: who works on the blocks.
        device: of torch, where they are worked on; else the host.

    Raises:
        SingularError: where a pivot is zero, or not finite.
    """
    _carry_out(partial(_factor, a, lu, device), lu, at_once, tell, each)


def _factor(a: Panels, lu: Panels, device: str, first: int, last: int, ready: Await) -> None:
    n, (start, stop) = a.shape[0], _span(lu, first, last)
    block = _read(a, first, last, device, more=1)
    for i, panel in _passing(lu, range(first), partial(_from_diagonal, lu), device, ready):
        _eliminate(block[:n], panel, lu.columns(i))
    pivots, regular = blas.factor(block[start:n])
    if not regular or not blas.finite(block[start:n]):
        raise SingularError(f"a pivot of columns {start} to {stop - 1} is zero, or not finite")
    pivots = start + pivots
    block[n] = blas.to_device(pivots.astype(lu.dtype), device)
    for j in range(first, last - 1):  # exchanges of later panels have not been when this one was factored
        left, right = (column - start for column in lu.columns(j))
        _exchange(block[:n, left:right], start + right, pivots[right:], back=True)
    _write(lu, first, last, block)


def _eliminate(block: Array, left: Array, columns: tuple[int, int]) -> None:
    """Take a panel of L, from its first row on, with its row exchanges, through a block, in place."""
    start, stop = columns
    _exchange(block, start, blas.to_host(left[-1]))
    blas.solve_triangular(left[: stop - start], block[start:stop], lower=True, unit=True)
    blas.add_product(block[stop:], -1.0, left[stop - start : -1], block[start:stop])


def _exchange(block: Array, start: int, pivots: np.ndarray, *, back: bool = False) -> None:
    """Swap rows start, start + 1, ... with those that the pivots name, in this order or `back`, in place."""
    swaps = list(enumerate(pivots.real.astype(int), start))
    order = np.arange(len(block))
    for row, other in reversed(swaps) if back else swaps:
        order[[row, other]] = order[[other, row]]
    moved = np.flatnonzero(order != np.arange(len(block)))
    block[moved] = block[order[moved]]


def cholesky(
    a: Panels,
    root: Panels,
    *,
    shift: float = 0.0,
    at_once: int = 1,
    tell: Tell = _silent,
    each: Each = one_by_one,
    device: str = HOST,
) -> None:
    """a + shift I = R^T R, R upper triangular (Golub and Van Loan, 4.2.5, by columns of R).

    Memory: a block, and panels.

    Args:
        a: (n, n), symmetric; the upper triangle counts.
        root: (n, n), like a: R.
        shift: see above.
        at_once: panels of a block.
        tell: told of panels done and panels in all.
        each: who works on the blocks.
        device: of torch, where they are worked on; else the host.

    Raises:
        SingularError: where a + shift I is not positive definite.
    """
    _carry_out(partial(_cholesky, a, root, shift, device), root, at_once, tell, each)


def _cholesky(a: Panels, root: Panels, shift: float, device: str, first: int, last: int, ready: Await) -> None:
    start, stop = _span(root, first, last)
    block = _read(a, first, last, device)
    block[stop:] = 0
    for i, panel in _passing(root, range(first), partial(_to_diagonal, root), device, ready):
        above, below = root.columns(i)
        blas.add_product(block[above:below], -1.0, panel[:above].T, block[:above])
        blas.solve_triangular(panel[above:], block[above:below], trans="T")
    diagonal = block[start:stop]
    diagonal[np.arange(stop - start), np.arange(stop - start)] += shift
    blas.add_product(diagonal, -1.0, block[:start].T, block[:start])
    if not blas.cholesky(diagonal) or not blas.finite(block):
        raise SingularError(f"the matrix is not positive definite at columns {start} to {stop - 1}")
    for column in range(stop - start):  # LAPACK leaves what was there
        diagonal[column + 1 :, column] = 0
    _write(root, first, last, block)


def log_determinant(lu: Panels) -> float:
    """log |det a|, from its factors."""
    diagonals = (np.diagonal(lu.read_shard(i, *lu.columns(i))) for i in range(lu.shards))
    return float(sum(np.log(np.abs(d)).sum() for d in diagonals))


def solve(lu: Panels, block: Array, device: str = HOST) -> Array:
    """a^-1 block, from a's factors, in the memory of `block` (n, any), which is on the device."""
    for i, left in _passing(lu, range(lu.shards), partial(_from_diagonal, lu), device):
        _eliminate(block, left, lu.columns(i))
    for i, right in _passing(lu, reversed(range(lu.shards)), partial(_to_diagonal, lu), device):
        start, stop = lu.columns(i)
        blas.solve_triangular(right[start:], block[start:stop])
        blas.add_product(block[:start], -1.0, right[:start], block[start:stop])
    return block


def solve_adjoint(lu: Panels, block: np.ndarray) -> np.ndarray:
    """a^-H block, as `solve`, on the host."""
    for i, right in _passing(lu, range(lu.shards), partial(_to_diagonal, lu), HOST):
        start, stop = lu.columns(i)
        block[start:stop] -= right[:start].conj().T @ block[:start]
        blas.solve_triangular(right[start:], block[start:stop], trans="C")
    for i, left in _passing(lu, reversed(range(lu.shards)), partial(_from_diagonal, lu), HOST):
        start, stop = lu.columns(i)
        block[start:stop] -= left[stop - start : -1].conj().T @ block[stop:]
        blas.solve_triangular(left[: stop - start], block[start:stop], lower=True, unit=True, trans="C")
        _exchange(block, start, left[-1], back=True)
    return block


def inverse(
    lu: Panels,
    out: Panels,
    *,
    scale: float = 1.0,
    shift: float = 0.0,
    beside: tuple[float, Panels] | None = None,
    at_once: int = 1,
    tell: Tell = _silent,
    each: Each = one_by_one,
    device: str = HOST,
) -> None:
    """out = scale a^-1 + shift I + weight b, from a's factors; `beside` is (weight, b).

    Memory: a block, and panels. Each block reads the factors once, half of them on the way down and half up.
    """
    _carry_out(partial(_inverse, lu, out, scale, shift, beside, device), out, at_once, tell, each)


def _inverse(
    lu: Panels,
    out: Panels,
    scale: float,
    shift: float,
    beside: tuple[float, Panels] | None,
    device: str,
    first: int,
    last: int,
    ready: Await,
) -> None:
    start, stop = _span(out, first, last)
    diagonal = np.arange(start, stop), np.arange(stop - start)
    block = blas.zeros(out.shape[0], stop - start, out.dtype, device)
    block[diagonal] = 1
    block = solve(lu, block, device)
    if not blas.finite(block):
        raise SingularError(f"columns {start} to {stop - 1} of the inverse are not finite")
    block *= scale
    if beside is not None:
        for j in range(first, last):
            left, right = (column - start for column in out.columns(j))
            block[:, left:right] += beside[0] * blas.to_device(beside[1].read_shard(j), device)
    block[diagonal] += shift
    _write(out, first, last, block)


def orthogonalise(
    a: Panels, qr: Panels, *, at_once: int = 1, tell: Tell = _silent, each: Each = one_by_one, device: str = HOST
) -> None:
    """a = Q R by Householder reflectors (Golub and Van Loan, 5.2.2), of which Q is kept.

    Memory: a block, and panels.

    Args:
        a: (n, r), r <= n.
        qr: (n + width of a panel, r): the reflectors V of each panel, lower trapezoidal with a unit diagonal, and below
            them T^-1, upper triangular, for which the panel's reflectors together are I - V T V^T.
        at_once: panels of a block.
        tell: told of panels done and panels in all.
        each: who works on the blocks.
        device: of torch, where they are worked on; else the host.
    """
    _carry_out(partial(_orthogonalise, a, qr, device), qr, at_once, tell, each)


def _orthogonalise(a: Panels, qr: Panels, device: str, first: int, last: int, ready: Await) -> None:
    n, begin = a.shape[0], qr.columns(first)[0]
    block = _read(a, first, last, device)
    for _, panel in _passing(qr, range(first), _whole, device, ready):
        _reflect(block, panel, n, device)
    for j in range(first, last):
        start, stop = qr.columns(j)
        made = _reflectors(blas.to_host(block[start:, start - begin : stop - begin]), qr.shape[0], start)
        _reflect(block[:, stop - begin :], blas.to_device(made, device), n, device)
        if not qr.has(j):
            qr.write(j, made)


def _reflectors(panel: np.ndarray, rows: int, start: int) -> np.ndarray:
    """The reflectors that make a panel, from row `start` on, upper triangular, as `orthogonalise` stores them."""
    below, columns = panel.shape
    compact, tau = np.linalg.qr(panel, mode="raw")
    v = np.tril(compact.T, -1)
    v[np.arange(columns), np.arange(columns)] = 1
    v[:, tau == 0] = 0  # no reflector at all
    made, n = np.zeros((rows, columns), order="F"), start + below
    made[start:n] = v
    # Joffrain et al. 2006: T^-1 + T^-T = V^T V
    made[n : n + columns] = np.triu(v.T @ v, 1) + np.diag(1 / np.where(tau == 0, 1, tau))
    return made


def _reflect(block: Array, panel: Array, n: int, device: str) -> None:
    """Q^T block, Q of one panel's reflectors, in place."""
    v, inverse = panel[:n], panel[n : n + panel.shape[1]]
    across = blas.zeros(panel.shape[1], block.shape[1], np.dtype(float), device)
    blas.add_product(across, 1.0, v.T, block)
    blas.solve_triangular(inverse, across, trans="T")
    blas.add_product(block, -1.0, v, across)


def rotate(
    qr: Panels,
    a: Panels,
    out: Panels,
    *,
    at_once: int = 1,
    tell: Tell = _silent,
    each: Each = one_by_one,
    device: str = HOST,
) -> None:
    """out = Q^T a, Q all n x n of it, from `orthogonalise`. Memory: a block, and panels."""
    _carry_out(partial(_rotate, qr, a, out, device), out, at_once, tell, each)


def _rotate(qr: Panels, a: Panels, out: Panels, device: str, first: int, last: int, ready: Await) -> None:
    block = _read(a, first, last, device)
    for _, panel in _passing(qr, range(qr.shards), _whole, device):
        _reflect(block, panel, a.shape[0], device)
    _write(out, first, last, block)
