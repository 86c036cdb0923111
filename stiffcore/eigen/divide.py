"""All eigenvalues of a matrix that fits no memory: spectral divide and conquer by the matrix sign function.

A curve that no eigenvalue lies on divides the spectrum: a line Re = c, or a circle around a real point. The sign
function of the matrix, moved so that the curve becomes the imaginary axis, gives the spectral projector of the part
beyond; an orthogonal Q whose first columns span the projector's range makes Q^T A Q block triangular, with a part of
the spectrum in each diagonal block; these are divided in turn, until LAPACK solves them in memory (Bai and Demmel
1998, "Using the matrix sign function to compute invariant subspaces").

The sign is found by Newton's iteration X <- (mu X + (mu X)^-1) / 2 with Byers' scaling mu = |det X|^(-1/n). Its one
inverse takes 8/3 n^3 operations a step; a Newton-Schulz step, products alone, 4 n^3, and Halley's, of third order,
14/3 n^3. By the digits gained in a second the three are within a tenth of each other (`bench/divide_steps.py`), and
Newton's needs no start that is near.

Nothing is believed: the trace of each projector must be an integer, and the block that should vanish must be small
beside the matrix. Its norm is a backward error: the eigenvalues found are those of a matrix so far from the one given.
A division that fails is tried on other curves, and after some, given up with its figures.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from stiffcore.eigen import panels
from stiffcore.eigen.blas import HOST
from stiffcore.eigen.dense import Eigenvectors, hessenberg_eigenvalues, sort_eigenvalues, to_hessenberg
from stiffcore.eigen.panels import Each, Panels, SingularError, one_by_one
from stiffcore.eigen.sparse import EPS
from stiffcore.errors import StiffcoreError
from stiffcore.memory import release_free_memory

# The block that should vanish, beside the matrix (Frobenius norms).
SPLIT_TOLERANCE = 1e-10
# The trace of a projector, off an integer by.
TRACE_TOLERANCE = 1e-4
# A step that changes X by so much, relative to it, is the last: what is left is its square.
CHANGE_TOLERANCE = 1e-8
# Until here, steps are scaled; from here on, one that does not come closer has met rounding.
NEAR = 1e-2
MOST_STEPS = 60
SEED = 0
SMALLEST = 1e-120
# Of inverse iteration: beside the eigenvalue, for factors that are not singular, relative to the norm. First no further
# off than rounding, so that of two close eigenvalues each has its own vectors; further off where that meets a zero
# pivot, or where vectors of a defective one overflow.
OFFSETS = (4 * EPS, 1e-13, 1e-10)
ITERATIONS = 3


class Workspace(Protocol):
    """Where the matrices of a division are, and what is known of them already."""

    def matrix(self, name: str, rows: int, columns: int, dtype: np.dtype = ...) -> Panels:
        """The matrix of that name, with the panels it has; made where it is not there, of float64 as a rule."""

    def drop(self, *names: str) -> None:
        """Delete matrices, where they are there."""

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """A JSON value, computed where it is not recorded; recorded before it is returned."""

    def once_array(self, name: str, shape: tuple[int, ...], compute: Callable[[], np.ndarray]) -> np.ndarray:
        """As `once`, of an array of that shape."""


@dataclass(frozen=True)
class Curve:
    """What divides a spectrum: a line Re = centre, or a circle around it.

    Attributes:
        centre: real.
        radius: of the circle; 0 where it is a line.
    """

    centre: float
    radius: float = 0.0

    def __str__(self) -> str:
        return f"|z - {self.centre:.6g}| = {self.radius:.6g}" if self.radius else f"Re = {self.centre:.6g}"


@dataclass(frozen=True)
class Split:
    """One division of a spectrum, and how well it went.

    Attributes:
        order: of the matrix.
        curve: that was tried, for people.
        beyond: how many eigenvalues lie right of the line, or outside of the circle.
        steps: of Newton's iteration.
        trace_error: of the projector, off an integer by.
        neglected: the Frobenius norm of the block that should vanish.
        norm: that of the matrix.
        failure: why it was not accepted; empty where it was.
    """

    order: int
    curve: str
    beyond: int = 0
    steps: int = 0
    trace_error: float = 0.0
    neglected: float = 0.0
    norm: float = 0.0
    failure: str = ""


@dataclass(frozen=True)
class Division:
    """All eigenvalues by division.

    Attributes:
        values: (n,) complex, in the order of `sort_eigenvalues`.
        splits: all that were tried.
        error: the sum of what was neglected, and of how far parts are from the multiples of 1 that they were taken for,
            Frobenius norms: these are the eigenvalues of a matrix so far from the one given, beside the rounding of
            orthogonal transformations and of LAPACK.
        right: how many eigenvalues lie right of the line that was asked for, by the trace of its projector; None where
            that failed, or was not needed.
    """

    values: np.ndarray
    splits: tuple[Split, ...]
    error: float
    right: int | None


class DivisionError(StiffcoreError):
    """A spectrum that no curve tried divides."""


def _dense_eigenvalues(a: np.ndarray) -> np.ndarray:
    return hessenberg_eigenvalues(to_hessenberg(a))


def eigenvalues(
    a: Panels,
    space: Workspace,
    most: int,
    *,
    first: float | None = None,
    at_once: int = 1,
    tell: Callable[[str, int, int], None] = lambda what, done, total: None,
    each: Each = one_by_one,
    device: str = HOST,
    solve: Callable[[np.ndarray], np.ndarray] = _dense_eigenvalues,
) -> Division:
    """All eigenvalues of a.

    Args:
        a: (n, n) float64.
        space: of its intermediate matrices; one that is used again goes on where it was left.
        most: order that LAPACK may solve in memory.
        first: the line Re = first is tried before others, so that the eigenvalues left of it are counted on the way.
        at_once: panels of a block, see `stiffcore.eigen.panels`.
        tell: told of what is done, panels done and panels in all.
        each: who works on the blocks.
        device: of torch, where blocks are worked on; else the host.
        solve: all eigenvalues of a part, Fortran-ordered, which it may write to.

    Raises:
        DivisionError: where no curve divides the matrix, or a part of it; or where squares of its numbers, or of what
            is neglected beside them, are out of the floating-point range.
    """
    size = panels.norm(a)
    if size and not SMALLEST < size < 1 / SMALLEST:
        raise DivisionError(f"a matrix of norm {size:.1e} is too far from 1 to be divided: scale the function")
    work = _Work(space, most, at_once, tell, each, device, solve, [], [])
    values = list(_divided(work, "", lambda: a, a.shape[0], first))
    neglected = sum(s.neglected for s in work.splits if not s.failure) + sum(work.levelled)
    asked = work.splits[0] if first is not None and work.splits else None
    right = None if asked is None or asked.failure else asked.beyond
    return Division(sort_eigenvalues(np.concatenate(values)), tuple(work.splits), neglected, right)


def eigenvectors(
    a: Panels,
    space: Workspace,
    values: np.ndarray,
    *,
    at_once: int = 1,
    tell: Callable[[str, int, int], None] = lambda what, done, total: None,
    each: Each = one_by_one,
) -> Eigenvectors:
    """Right and left eigenvectors for a few eigenvalues, by inverse iteration with one LU each.

    Args:
        a: (n, n).
        space: as for `eigenvalues`.
        values: (m,) complex, eigenvalues that were found.
        at_once: panels of a block.
        tell: as for `eigenvalues`.
        each: as for `eigenvalues`.

    Returns:
        Unit vectors; those that are not finite are flagged.
    """
    n, size = a.shape[0], panels.norm(a) or 1.0
    start = np.random.default_rng(SEED).standard_normal((2, n))

    def pair(number: int, name: str, offset: float) -> np.ndarray:
        value = values[number]
        shift = (value if value.imag else value.real) + offset * size
        dtype = np.dtype(complex if value.imag else float)
        moved, lu = space.matrix(f"moved{name}", n, n, dtype), space.matrix(f"lu{name}", n + 1, n, dtype)
        panels.copy(a, moved, shift=-shift)
        try:
            told = partial(tell, f"eigenvector {number + 1} of {len(values)}")
            panels.factor(moved, lu, at_once=at_once, tell=told, each=each)
            sides = [_iterated(solve, lu, start[i]) for i, solve in enumerate((panels.solve, panels.solve_adjoint))]
        except SingularError:
            sides = [np.full(n, np.nan)] * 2
        return np.array(sides, complex)

    found = np.empty((2, n, len(values)), complex)
    for number in range(len(values)):
        for i, offset in enumerate(OFFSETS):
            name = f"{number}-{i}"
            found[:, :, number] = space.once_array(f"vectors{name}", (2, n), partial(pair, number, name, offset))
            space.drop(f"moved{name}", f"lu{name}")
            if np.isfinite(found[:, :, number]).all():
                break
    return Eigenvectors(found[0], found[1], np.asarray(np.isfinite(found).all(axis=(0, 1))))


def _iterated(solve: Callable[[Panels, np.ndarray], np.ndarray], lu: Panels, x: np.ndarray) -> np.ndarray:
    """The iterate that grew most, so of the least residual: where an eigenvalue is defective, later ones get worse."""
    found, most = np.full(len(x), np.nan), 0.0
    for _ in range(ITERATIONS):
        with np.errstate(over="ignore", invalid="ignore"):  # not finite then, and not taken
            x = solve(lu, np.array(x[:, None], dtype=lu.dtype, order="F"))[:, 0]
            largest = np.abs(x).max()
            x = x / largest
            length = np.linalg.norm(x)
            x = x / length
            if largest * length > most:
                found, most = x, largest * length
    return found


@dataclass(frozen=True)
class _Work:
    space: Workspace
    most: int
    at_once: int
    tell: Callable[[str, int, int], None]
    each: Each
    device: str
    solve: Callable[[np.ndarray], np.ndarray]
    splits: list[Split]
    levelled: list[float]  # how far parts are from the multiples of 1 that they were taken for

    def told(self, what: str) -> dict[str, Any]:
        """How a kernel is called: in which blocks, what it tells, and who works on them where."""
        told = partial(self.tell, what)
        return {"at_once": self.at_once, "tell": told, "each": self.each, "device": self.device}


def _divided(
    work: _Work, name: str, opened: Callable[[], Panels], n: int, first: float | None = None
) -> Iterator[np.ndarray]:
    """The eigenvalues of a part, in parts."""
    space = work.space
    if n <= work.most:

        def solved() -> np.ndarray:
            release_free_memory()  # of blocks: a part would come on top
            return work.solve(_in_memory(opened()))

        yield space.once_array(f"{name}-values", (n,), solved)
        return
    mean, spread, away = space.once(f"{name}-moments", lambda: _moments(opened()))
    if not spread:
        work.levelled.append(away * np.sqrt(n))
        yield np.full(n, complex(mean))
        return
    tried = []
    for number, curve in enumerate(_curves(mean, spread, away, first)):
        split = Split(**space.once(f"{name}-{number}", partial(_split, work, name, number, opened, n, curve)))
        tried.append(split)
        work.splits.append(split)
        if not split.failure and 0 < split.beyond < n:
            break
    else:
        said = "; ".join(f"{s.curve}: {s.failure or 'all on one side'}" for s in tried)
        raise DivisionError(f"none of {len(tried)} curves divides a matrix of order {n:,}: {said}")
    if name:  # its two parts are there, and nothing needs it whole
        space.drop(name)
    for side, order in (("r", split.beyond), ("l", n - split.beyond)):
        yield from _divided(work, name + side, partial(space.matrix, name + side, order, order), order)
        space.drop(name + side)


def _in_memory(a: Panels) -> np.ndarray:
    whole = np.empty(a.shape, order="F")
    for i in range(a.shards):
        whole[:, slice(*a.columns(i))] = a.read_shard(i)
    return whole


def _moments(a: Panels) -> tuple[float, float, float]:
    """The mean of the eigenvalues, and how far they are from it, guessed and at most; guessed 0 for a multiple of 1."""
    n, mean = a.shape[0], panels.trace(a) / a.shape[0]
    away = panels.norm(a, shift=-mean) / np.sqrt(n)
    if away <= n * EPS * abs(mean):
        return mean, 0.0, float(away)
    # the guess holds where eigenvalues are real, or all on a vertical line; else it is too small
    return mean, float(np.sqrt(abs(panels.square_trace(a) / n - mean**2)) or away), float(away)


def _curves(mean: float, spread: float, away: float, first: float | None) -> Iterator[Curve]:
    """Those to try: the one asked for, then lines and circles around the mean, where half of a spectrum may lie."""
    if first is not None:
        yield Curve(first)
    yield Curve(mean)
    yield Curve(mean, spread)
    for factor in (0.25, 0.5):
        yield Curve(mean + factor * spread)
        yield Curve(mean - factor * spread)
        yield Curve(mean, spread * (1 + factor))
        yield Curve(mean, spread * (1 - factor))
    for factor in (0.25, 0.5):
        yield Curve(mean + factor * away)
        yield Curve(mean - factor * away)


def _split(work: _Work, name: str, number: int, opened: Callable[[], Panels], n: int, curve: Curve) -> dict[str, Any]:
    """Divide, and write the two parts as the matrices NAMEr and NAMEl, where that succeeds."""
    space, tried, where = work.space, Split(n, str(curve)), f"{name}-{number}-"
    try:
        space.once(f"{where}start", lambda: _start(work, where, opened(), curve))
        steps = _sign(work, where, n)
    except SingularError as error:
        return asdict(replace(tried, failure=str(error)))
    x = partial(space.matrix, f"{where}x{steps}", n, n)
    trace = space.once(f"{where}trace", lambda: panels.trace(x()))
    beyond = round((n + trace) / 2)
    tried = replace(tried, beyond=beyond, steps=steps, trace_error=abs((n + trace) / 2 - beyond))
    if tried.trace_error > TRACE_TOLERANCE or not 0 <= beyond <= n:
        tried = replace(tried, failure=f"the projector's trace is off an integer by {tried.trace_error:.1e}")
    elif 0 < beyond < n:
        tried = _parted(work, name, where, opened, x, tried)
    space.drop(f"{where}x{steps}")
    return asdict(tried)


def _start(work: _Work, where: str, a: Panels, curve: Curve) -> int:
    """X_0: a - c I; of a circle (a - (c + r) I)^-1 (a - (c - r) I), which takes it to the imaginary axis."""
    space, n = work.space, a.shape[0]
    x = space.matrix(f"{where}x0", n, n)
    if not curve.radius:
        panels.copy(a, x, shift=-curve.centre)
        return n
    moved, lu = space.matrix(f"{where}moved", n, n), space.matrix(f"{where}lu", n + 1, n)
    panels.copy(a, moved, shift=-curve.centre - curve.radius)
    try:
        panels.factor(moved, lu, **work.told(f"circle of order {n:,}, LU"))
        panels.inverse(lu, x, scale=2 * curve.radius, shift=1.0, **work.told(f"circle of order {n:,}, inverse"))
    except SingularError:
        space.drop(f"{where}moved", f"{where}lu", f"{where}x0")
        raise
    space.drop(f"{where}moved", f"{where}lu")
    return n


def _sign(work: _Work, where: str, n: int) -> int:
    """Newton's iteration from x0 on: how many steps it took, and so the number of the last iterate."""
    space, before = work.space, float("inf")

    def step(number: int, before: float) -> float | str:
        """By how much it changed, or why it cannot be made: recorded like a value, before anything is deleted."""
        old, new = (space.matrix(f"{where}x{number + i}", n, n) for i in (0, 1))
        came = f" after a change of {before:.0e}" if number else ""
        lu, what = space.matrix(f"{where}lu{number}", n + 1, n), f"sign of order {n:,}, step {number + 1}{came}, "
        try:
            panels.factor(old, lu, **work.told(what + "LU"))
            mu = float(np.exp(-panels.log_determinant(lu) / n)) if before > NEAR else 1.0
            panels.inverse(lu, new, scale=1 / (2 * mu), beside=(mu / 2, old), **work.told(what + "inverse"))
        except SingularError as error:
            return str(error)
        size = panels.norm(new)
        return panels.distance(old, new) / size if size else "a step ends at zero"

    for number in range(MOST_STEPS):
        # each step has names of its own: what a next one has begun is not taken for what is left of this one
        spent = (f"{where}lu{number}", f"{where}x{number}")
        change = space.once(f"{where}change{number}", partial(step, number, before))
        if isinstance(change, str):
            space.drop(*spent, f"{where}x{number + 1}")
            raise SingularError(change)
        space.drop(*spent)
        if change <= CHANGE_TOLERANCE or (before <= NEAR and change >= before):
            return number + 1
        before = change
    space.drop(f"{where}x{MOST_STEPS}")
    raise SingularError(f"after {MOST_STEPS} steps the last one changed the sign by {before:.1e} of it")


def _parted(
    work: _Work, name: str, where: str, opened: Callable[[], Panels], x: Callable[[], Panels], tried: Split
) -> Split:
    """Q^T a Q block triangular; its diagonal blocks, transposed, become NAMEr and NAMEl.

    The columns of (X + I) G, G random, span the invariant subspace beyond the curve, those of (X - I) G the other one:
    the smaller of the two is taken.
    """
    space, n, r = work.space, tried.order, tried.beyond
    small, sign = min(r, n - r), 1.0 if r <= n - r else -1.0
    y, qr, turned, across, both = (where + part for part in ("y", "qr", "turned", "across", "both"))

    def basis() -> int:
        spanned = space.matrix(y, n, small)
        panels.product(x(), partial(_gaussian, n), spanned, shift=sign, **work.told(f"projector of order {n:,}"))
        width = spanned.columns(0)[1]
        panels.orthogonalise(spanned, space.matrix(qr, n + width, small), **work.told(f"QR of {n:,} x {small:,}"))
        return width

    def left() -> int:
        panels.rotate(reflectors, opened(), space.matrix(turned, n, n), **work.told(f"rotation of order {n:,}, left"))
        panels.transpose(space.matrix(turned, n, n), space.matrix(across, n, n), each=work.each)
        return n

    def right() -> tuple[float, float]:
        done = space.matrix(both, n, n)  # (Q^T a Q)^T
        panels.rotate(reflectors, space.matrix(across, n, n), done, **work.told(f"rotation of order {n:,}, right"))
        return panels.norm(done), panels.norm(done, rows=(0, small), columns=(small, n))

    width = space.once(f"{where}basis", basis)
    space.drop(y)
    reflectors = space.matrix(qr, n + width, small)
    space.once(f"{where}left", left)
    space.drop(turned)
    norm, neglected = space.once(f"{where}right", right)
    space.drop(across, qr)
    found = replace(tried, norm=norm, neglected=neglected)
    if not neglected <= SPLIT_TOLERANCE * norm:
        found = replace(found, failure=f"the block that should vanish is {neglected / norm:.1e} of the matrix")
    else:
        names = ("r", "l") if sign > 0 else ("l", "r")
        for side, first, order in zip(names, (0, small), (small, n - small), strict=True):
            panels.copy(space.matrix(both, n, n), space.matrix(name + side, order, order), first=first)
    space.drop(both)
    return found


def _gaussian(n: int, start: int, stop: int) -> np.ndarray:
    """Columns of a random matrix, each the same whatever the panel that it is in."""
    columns = np.empty((n, stop - start), order="F")
    for j in range(start, stop):
        columns[:, j - start] = np.random.default_rng((SEED, j)).standard_normal(n)
    return columns
