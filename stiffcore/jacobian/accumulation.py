"""Sparse Jacobians of convolutional functions from their kernels, operation by operation, without any product.

Forward accumulation (Griewank & Walther, Evaluating Derivatives, 2nd ed. 2008, chapter 3) with two things that a
forward-mode product cannot use: a unit touches a window of positions only, and units that a ReLU holds at zero pass
nothing on. The derivative of each operation's result is kept as one dense block for each position: its active channels,
against the columns at the positions that reach it. A convolution is then one matrix product for each position. What is
known are convolutions and what works number by number; whoever uses the result compares it with products.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csc_array, csr_array
from torch import Tensor, fx

from stiffcore.jacobian.colouring import Integers, Map, Pair
from stiffcore.jacobian.graph import IDENTITY, POINTWISE, is_first_item, is_fixed_norm, name_of, plain_convolution
from stiffcore.jacobian.linearise import differentiable_kernels

Array = NDArray[Any]
# First and last row, first and last column of a map.
Rectangle = tuple[int, int, int, int]


@dataclass(frozen=True)
class Step:
    """One operation on feature maps: a convolution of one earlier result, or a weighted sum of some.

    Attributes:
        shape: (C, H, W) of its result.
        sources: which earlier steps it takes; the first step is the input, and takes none.
        slopes: of a sum, (C, H, W) for each source.
        kernel: of a convolution, (C, C of the source, kh, kw).
        stride: of a convolution.
        padding: of a convolution, by zeros.
        dilation: of a convolution.
    """

    shape: Map
    sources: tuple[int, ...] = ()
    slopes: tuple[Array, ...] = ()
    kernel: Array | None = None
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)


class _UnknownError(Exception):
    """An operation that has no place here."""


class _Recorder(fx.Interpreter):
    """Runs a graph at a point, and notes the steps that its input takes."""

    def __init__(self, module: fx.GraphModule, shape: Map) -> None:
        super().__init__(module)
        self.steps = [Step(shape)]
        self.at: dict[fx.Node, int] = {}
        self.moving: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "placeholder":
            self.at[n] = 0
            self.moving.add(n)
        elif n.op not in ("output", "get_attr") and any(a in self.moving for a in n.all_input_nodes):
            self.moving.add(n)
            sources = [a for a in n.all_input_nodes if a in self.moving]
            if all(a in self.at for a in sources):
                self._note(n, value)
            elif isinstance(value, Tensor) and value.is_floating_point():
                raise _UnknownError
        return value

    def _note(self, n: fx.Node, value: Any) -> None:
        name, args = name_of(n), [self.env[a] if isinstance(a, fx.Node) else a for a in n.args]
        moving = [i for i, a in enumerate(n.args) if isinstance(a, fx.Node) and a in self.at]
        if any(isinstance(a, fx.Node) for a in n.kwargs.values()) or not moving:
            raise _UnknownError
        sources = [self.at[a] for a in n.args if isinstance(a, fx.Node) and a in self.at]
        first = sources[0]
        if is_first_item(n) or (name in IDENTITY and moving == [0]):
            self.at[n] = first
        elif moving == [0] and (geometry := plain_convolution(n)):
            self.at[n] = self._add(self._convolution(args, value, first, geometry))
        elif name in POINTWISE or is_fixed_norm(n):
            self.at[n] = self._add(self._sum(n, args, value, moving, sources))
        elif isinstance(value, Tensor) and not value.is_floating_point():
            return  # what uses it is not known
        else:
            raise _UnknownError

    def _add(self, step: Step) -> int:
        self.steps.append(step)
        return len(self.steps) - 1

    def _convolution(self, args: list[Any], value: Tensor, source: int, geometry: tuple[Pair, Pair, Pair]) -> Step:
        kernel = args[1].detach()
        if tuple(args[0].shape) != (1, *self.steps[source].shape):  # a view
            raise _UnknownError
        stride, padding, dilation = geometry
        c, h, w = value.shape[1:]
        return Step((c, h, w), (source,), (), kernel.cpu().numpy(), stride, padding, dilation)

    def _sum(self, n: fx.Node, args: list[Any], value: Any, moving: list[int], sources: list[int]) -> Step:
        result = value[0] if isinstance(value, (tuple, list)) else value
        target = cast(Callable[..., Any], n.target)
        shape = self.steps[sources[0]].shape
        pairs = zip(moving, sources, strict=True)
        if any(args[i].shape != result.shape or self.steps[s].shape != shape for i, s in pairs):
            raise _UnknownError

        def slope(i: int) -> Array:
            def call(v: Tensor) -> Tensor:
                found = target(*args[:i], v, *args[i + 1 :], **n.kwargs)
                return found[0] if isinstance(found, (tuple, list)) else found

            return (
                torch.func.jvp(call, (args[i],), (torch.ones_like(args[i]),))[1].detach().reshape(shape).cpu().numpy()
            )

        return Step(shape, tuple(sources), tuple(slope(i) for i in moving))


@dataclass(frozen=True)
class Steps:
    """A function of one feature map as steps; the last one is its result."""

    steps: tuple[Step, ...]

    @classmethod
    def of(cls, module: fx.GraphModule, x: Tensor) -> "Steps | None":
        """Read them from a graph.

        Args:
            module: from `FunctionGraph.between`.
            x: (1, C, H, W), the point; the steps have their numbers on the host, wherever it is.

        Returns:
            None where an operation is not known, or the input is no such map.
        """
        if x.dim() != 4 or x.shape[0] != 1:
            return None
        _, channels, height, width = x.shape
        recorder = _Recorder(module, (channels, height, width))
        try:
            with differentiable_kernels():
                recorder.run(x.clone())
        except _UnknownError:
            return None
        result = next(n for n in module.graph.nodes if n.op == "output").all_input_nodes[0]
        if result not in recorder.at:
            return None
        last = recorder.at[result]
        return cls(tuple(recorder.steps[: last + 1]))

    @property
    def source(self) -> Map:
        """(C, H, W) of the input."""
        return self.steps[0].shape

    def reached(self) -> Integers:
        """(4, H, W of the result): the rectangle of the input (rows, columns) that reaches each position."""
        return _reached(self.steps)[-1]

    @property
    def destination(self) -> Map:
        """(C, H, W) of the result."""
        return self.steps[-1].shape

    def masked(self, mask: Array) -> "Steps":
        """The result, multiplied by (C, H, W) numbers."""
        return Steps((*self.steps, Step(self.destination, (len(self.steps) - 1,), (mask,))))

    def then(self, other: "Steps") -> "Steps":
        """Another function, of the result.

        Raises:
            ValueError: where it starts from another map.
        """
        if self.destination != other.source:
            raise ValueError(f"steps into {self.destination} cannot go on from {other.source}")
        shift = len(self.steps) - 1
        more = (replace(step, sources=tuple(s + shift for s in step.sources)) for step in other.steps[1:])
        return Steps((*self.steps, *more))


class _Columns:
    """Which columns lie at which positions of the input, and where they stand in a block."""

    def __init__(self, columns: Integers, shape: Map) -> None:
        _, height, self.width = shape
        _check_order(columns, shape)
        counts = np.bincount(columns % (height * self.width), minlength=height * self.width)
        self.first = np.concatenate([[0], counts.cumsum()])  # the column that a position begins with
        self._integral = np.zeros((height + 1, self.width + 1), dtype=np.int64)
        self._integral[1:, 1:] = counts.reshape(height, self.width).cumsum(0).cumsum(1)
        self._frames: dict[Rectangle, tuple[list[int], list[int], list[int]]] = {}

    def within(self, rectangles: Integers) -> Integers:
        """How many columns lie in each of (4, ...) rectangles."""
        top, bottom, left, right = rectangles
        empty = (top > bottom) | (left > right)
        top, bottom, left, right = (np.where(empty, 0, a) for a in (top, bottom + 1, left, right + 1))
        s = self._integral
        return s[bottom, right] - s[top, right] - s[bottom, left] + s[top, left]

    def frame(self, rectangle: Rectangle) -> tuple[list[int], list[int], list[int]]:
        """For each row of a rectangle: its first column, the one after its last, and where it begins in the block."""
        found = self._frames.get(rectangle)
        if found is None:
            top, bottom, left, right = rectangle
            rows = np.arange(top, bottom + 1 if left <= right else top) * self.width
            start, stop = self.first[rows + left], self.first[rows + right + 1]
            offset = np.concatenate([[0], (stop - start).cumsum()])
            found = self._frames[rectangle] = (start.tolist(), stop.tolist(), offset.tolist())
        return found

    def size(self, rectangle: Rectangle) -> int:
        """How many columns lie in a rectangle."""
        return self.frame(rectangle)[2][-1]

    def numbers(self, rectangle: Rectangle) -> Integers:
        """(columns in the rectangle,) int32, their numbers."""
        start, stop, _ = self.frame(rectangle)
        return np.concatenate([np.arange(a, b, dtype=np.int32) for a, b in zip(start, stop, strict=True)])

    def place(self, target: Array, rectangle: Rectangle, block: Array, of: Rectangle) -> None:
        """Add a block over the columns of one rectangle to a target over another's, where both have them."""
        if rectangle == of:
            target += block
            return
        left, right = max(rectangle[2], of[2]), min(rectangle[3], of[3])
        if left > right:
            return
        there, here, first = self.frame(rectangle)[2], self.frame(of)[2], self.first
        for y in range(max(rectangle[0], of[0]), min(rectangle[1], of[1]) + 1):
            row = y * self.width
            a, b = first[row + left], first[row + right + 1]
            to = there[y - rectangle[0]] + a - first[row + rectangle[2]]
            start = here[y - of[0]] + a - first[row + of[2]]
            target[:, to : to + b - a] += block[:, start : start + b - a]

    def product(self, weights: Array, parts: list[tuple[Rectangle, Array]], rectangle: Rectangle) -> Array:
        """Weights times blocks that stand below each other, over the columns of one rectangle.

        No zeros are multiplied: each run of columns takes the blocks that have it.

        Args:
            weights: (a, rows of all blocks).
            parts: blocks, each over its own rectangle.
            rectangle: of the result.
        """
        if all(of == rectangle for of, _ in parts):
            return weights @ (parts[0][1] if len(parts) == 1 else np.concatenate([block for _, block in parts]))
        target = np.zeros((len(weights), self.size(rectangle)), dtype=weights.dtype)
        ends = np.cumsum([0] + [len(block) for _, block in parts]).tolist()
        for y in range(rectangle[0], rectangle[1] + 1):
            here = [i for i, (of, _) in enumerate(parts) if of[0] <= y <= of[1]]
            edges = {x for i in here for x in (parts[i][0][2], parts[i][0][3] + 1)} | {rectangle[2], rectangle[3] + 1}
            inside = sorted(x for x in edges if rectangle[2] <= x <= rectangle[3] + 1)
            for left, after in pairwise(inside):
                run = target[:, self._run(rectangle, y, left, after)]
                chosen = [i for i in here if parts[i][0][2] <= left < parts[i][0][3] + 1]
                if not chosen or not run.shape[1]:
                    continue
                for first, last in _runs(chosen):
                    blocks = [block[:, self._run(of, y, left, after)] for of, block in parts[first : last + 1]]
                    run += weights[:, ends[first] : ends[last + 1]] @ (
                        blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
                    )
        return target

    def picked(self, weights: Array, parts: list[tuple[Rectangle, Array]], rectangle: Rectangle) -> Array:
        """As `product`, where the blocks are of the identity, at a position each: nothing is multiplied."""
        target = np.zeros((len(weights), self.size(rectangle)), dtype=weights.dtype)
        start = 0
        for (y, _, x, _), block in parts:
            rows = weights[:, start : start + len(block)]
            start += len(block)
            if rectangle[0] <= y <= rectangle[1] and rectangle[2] <= x <= rectangle[3]:
                here = target[:, self._run(rectangle, y, x, x + 1)]
                here[:, ... if len(block) == block.shape[1] else block.argmax(axis=1)] += rows
        return target

    def _run(self, rectangle: Rectangle, y: int, left: int, after: int) -> slice:
        """Where the columns at some positions of a row stand in a block over a rectangle."""
        row, first = y * self.width, self.first
        start = self.frame(rectangle)[2][y - rectangle[0]] - first[row + rectangle[2]]
        return slice(int(start + first[row + left]), int(start + first[row + after]))


class Accumulation:
    """Some rows and columns of the Jacobian of `Steps`, ready to be computed.

    Units are flat, row-major indices into the maps, ordered by position, then channel (`graph.by_position`).

    Attributes:
        destination: (C, H, W) of the map that the rows belong to.
        items: numbers in slopes, and in all blocks that are alive at once, at most.
        entries: numbers in the result's blocks: no more of its entries can be nonzero.
        flops: of all products.
    """

    def __init__(self, steps: Steps, columns: Integers, rows: Integers, windows: Integers | None = None) -> None:
        """Find what is needed of each step, and what it takes.

        Args:
            steps: the function.
            columns: (c,) int64, different units of the source.
            rows: (r,) int64, different units of the destination.
            windows: (4, H, W of the destination) int64, the only positions of the source (first and last row, first
                and last column) that are asked for at each position; None: all that reach it.

        Raises:
            ValueError: where units are not ordered by position.
        """
        _check_order(rows, steps.destination)
        self._steps, self._rows = steps.steps, len(rows)
        self.destination = steps.destination
        self._columns, self._column_units = _Columns(columns, steps.source), columns
        wanted = _mask(rows, steps.destination)
        self._wanted = _Positions(wanted)
        self._used = [_Positions(used) for used in self._needed(_mask(columns, steps.source), wanted)]
        self._rectangles = _reached(self._steps)
        if windows is not None:
            self._narrow(windows)
        self._last_use = {s: i for i, step in enumerate(self._steps) for s in step.sources}
        self.items, self.entries, self.flops = self._costs()

    def _needed(self, columns: Array, rows: Array) -> list[Array]:
        """Units of each step that depend on the columns, and that the rows depend on."""
        live = [columns]
        for step in self._steps[1:]:
            if step.kernel is None:
                pairs = zip(step.slopes, step.sources, strict=True)
                live.append(np.logical_or.reduce([(slope != 0) & live[s] for slope, s in pairs]))
            else:
                seen: Array = np.any(live[step.sources[0]], axis=0)
                seen = np.logical_or.reduce([_tap(step, seen, tap, False) for tap in _taps(step)])
                live.append(np.broadcast_to(seen, step.shape))
        need = [np.zeros(step.shape, dtype=bool) for step in self._steps]
        need[-1] |= rows
        for step, wanted, alive in reversed([*zip(self._steps, need, live, strict=True)]):
            for slope, s in zip(step.slopes, step.sources, strict=step.kernel is None):
                need[s] |= wanted & (slope != 0)
            if step.kernel is not None:
                need[step.sources[0]] |= _untap(step, np.any(wanted & alive, axis=0), need[step.sources[0]].shape[1:])
        return [a & b for a, b in zip(live, need, strict=True)]

    @property
    def used_rows(self) -> Integers:
        """(a,) the rows that depend on the columns, in order of position."""
        used = self._used[-1]
        position = np.repeat(np.arange(used.size), used.counts.reshape(-1))
        return used.all_channels * used.size + position

    @property
    def live_rows(self) -> Integers:
        """(H, W) how many rows at each position depend on the columns."""
        return self._used[-1].counts

    def _narrow(self, windows: Integers) -> None:
        """Ask for less of the result, and of each step for what some result needs of it: all else is waste."""
        nothing = np.array([np.iinfo(int).max, -1, np.iinfo(int).max, -1])[:, None, None]
        wanted = [np.broadcast_to(nothing, r.shape).copy() for r in self._rectangles]
        wanted[-1] = windows
        for i in range(len(self._steps) - 1, 0, -1):
            step, asked = self._steps[i], wanted[i]
            for s in step.sources:
                wanted[s] = _around([wanted[s], asked if step.kernel is None else _spread(step, asked, wanted[s])])
        for at, (old, asked) in enumerate(zip(self._rectangles, wanted, strict=True)):
            if at:  # the identity is small
                self._rectangles[at] = _within([old, asked])

    def _costs(self) -> tuple[int, int, int]:
        counts = [used.counts for used in self._used]
        columns = [self._columns.within(r) for r in self._rectangles]
        totals = [int((a * b).sum()) for a, b in zip(counts, columns, strict=True)]
        flops, held, most = 0, totals[0], totals[0]
        for i, step in enumerate(self._steps[1:], 1):
            new = totals[i] if i < len(self._steps) - 1 else int((counts[i] * columns[i]).max(initial=0))
            freed = sum(totals[s] for s in set(step.sources) if self._last_use[s] == i)
            if step.kernel is not None:
                stacked = np.zeros_like(columns[i])
                for tap in _taps(step):
                    rows = _tap(step, counts[step.sources[0]], tap, 0)
                    of = _within([self._rectangles[i], _tap(step, self._rectangles[step.sources[0]], tap, -1)])
                    stacked += rows
                    if step.sources[0] == 0:
                        continue
                    flops += int(2 * (counts[i] * rows * self._columns.within(of)).sum())
                largest = (stacked * (counts[i] + columns[i]) + counts[i] * columns[i]).max(initial=0)
                most = max(most, held + new + int(largest) + step.kernel.size)
            else:
                most = max(most, held + new - (freed if len(step.sources) == 1 else 0))
            held += totals[i] - freed
        slopes = sum(slope.size for step in self._steps for slope in step.slopes)
        return most + slopes, totals[-1], flops

    def blocks(
        self, tell: Callable[[int, int], None] = lambda done, total: None
    ) -> Iterator[tuple[int, Integers, Rectangle, Array]]:
        """The Jacobian, position by position of its rows.

        Args:
            tell: told of positions done, of all steps, and of how many there are.

        Yields:
            A position of the destination, y W + x; the (a,) channels of the rows there, ascending; the rectangle of the
            source that reaches it; and (a, columns in the rectangle), in order of position and of the columns there.
            Positions and channels that nothing reaches are left out.
        """
        kept: list[_Blocks] = [self._identity()]
        total = sum(step.shape[1] * step.shape[2] for step in self._steps)
        done = len(kept[0])
        for i, step in enumerate(self._steps[1:], 1):
            work = self._convolved if step.kernel is not None else self._summed
            last = i == len(self._steps) - 1
            found: _Blocks = []
            for at, block in enumerate(work(i, kept)):
                done += 1
                tell(done, total)
                if last and block is not None:
                    yield at, self._used[i].channels(at), *block
                elif not last:
                    found.append(block)
            kept.append(found)
            for s in step.sources:
                if self._last_use[s] == i:
                    kept[s] = []
        if len(self._steps) == 1:
            yield from ((at, self._used[0].channels(at), *b) for at, b in enumerate(kept[0]) if b is not None)

    def matrix(self, tell: Callable[[int, int], None] = lambda done, total: None) -> csc_array:
        """The Jacobian as a sparse matrix.

        Memory: `items`, and for each of `entries` its number twice, with 8 bytes of indices each time.

        Returns:
            (r, c), in the order of the rows and columns; sorted, without stored zeros.
        """
        data: list[Array] = [np.zeros(0, self._dtype)]
        indices: list[Array] = [np.zeros(0, np.int32)]
        counts = np.zeros(self._rows + 1, dtype=np.int64)
        for at, channels, rectangle, block in self.blocks(tell):
            row, column = np.nonzero(block)
            here = self._wanted.first[at] + np.searchsorted(self._wanted.channels(at), channels)
            counts[here + 1] = np.bincount(row, minlength=len(channels))
            data.append(block[row, column])
            indices.append(self._columns.numbers(rectangle)[column])
        parts = np.concatenate(data), np.concatenate(indices)
        data.clear()  # before the second copy
        indices.clear()
        return csr_array((*parts, counts.cumsum()), shape=(self._rows, len(self._column_units))).tocsc()

    @property
    def _dtype(self) -> Any:
        arrays = [a for step in self._steps for a in (*step.slopes, step.kernel) if a is not None]
        return np.result_type(*arrays) if arrays else np.dtype(np.float64)

    def _rectangle(self, i: int, at: int) -> Rectangle:
        top, bottom, left, right = self._rectangles[i].reshape(4, -1)[:, at].tolist()
        return top, bottom, left, right

    def _identity(self) -> "_Blocks":
        given = _Positions(_mask(self._column_units, self._steps[0].shape))
        found: _Blocks = []
        for at in range(given.size):
            used = self._used[0].channels(at)
            block = np.zeros((len(used), len(given.channels(at))), dtype=self._dtype)
            block[np.arange(len(used)), np.searchsorted(given.channels(at), used)] = 1
            found.append((self._rectangle(0, at), block) if len(used) else None)
        return found

    def _convolved(self, i: int, kept: "list[_Blocks]") -> "Iterator[_Block]":
        step, columns, used = self._steps[i], self._columns, self._used[i]
        assert step.kernel is not None
        source, blocks = self._used[step.sources[0]], kept[step.sources[0]]
        inside = self._steps[step.sources[0]].shape
        numbers = np.arange(inside[1] * inside[2]).reshape(inside[1:])
        # the position of the source that each tap reads, for every position; -1 outside of the map
        places = np.stack([_tap(step, numbers, tap, -1).reshape(-1) for tap in _taps(step)])
        # (C, taps, C of the source), so that the channels of one tap stand together
        kernel = np.ascontiguousarray(step.kernel.transpose(0, 2, 3, 1)).reshape(len(step.kernel), -1)
        for at in range(used.size):
            rectangle = self._rectangle(i, at)
            size, channels = columns.size(rectangle), used.channels(at)
            parts: list[tuple[Rectangle, Array]] = []
            taken: list[Integers] = []
            for tap, place in enumerate(places[:, at].tolist()):
                if place >= 0 and (part := blocks[place]) is not None:
                    parts.append(part)
                    taken.append(tap * inside[0] + source.channels(place))
            if not len(channels) or not parts or not size:
                yield None
                continue
            product = columns.picked if step.sources[0] == 0 else columns.product
            yield rectangle, product(kernel[np.ix_(channels, np.concatenate(taken))], parts, rectangle)

    def _summed(self, i: int, kept: "list[_Blocks]") -> "Iterator[_Block]":
        step, columns, used = self._steps[i], self._columns, self._used[i]
        slopes = [slope.reshape(len(slope), -1) for slope in step.slopes]
        free = [self._last_use[s] == i and step.sources.count(s) == 1 for s in step.sources]
        for at in range(used.size):
            rectangle, channels = self._rectangle(i, at), used.channels(at)
            total: Array | None = None
            for slope, s, last in zip(slopes, step.sources, free, strict=True):
                part, there = kept[s][at], self._used[s].channels(at)
                if part is None or not len(channels):
                    continue
                of, block = part
                found = np.isin(channels, there, assume_unique=True)
                factors, whole = slope[channels[found], at][:, None], bool(found.all())
                if not (whole and len(there) == len(channels)):
                    block, last = block[np.searchsorted(there, channels[found])], True
                mine = np.multiply(block, factors, out=block if last else None)
                if total is None and whole and of == rectangle:
                    total = mine
                    continue
                total = np.zeros((len(channels), columns.size(rectangle)), self._dtype) if total is None else total
                if whole:
                    columns.place(total, rectangle, mine, of)
                    continue
                padded = np.zeros((len(mine), total.shape[1]), self._dtype)
                columns.place(padded, rectangle, mine, of)
                total[found] += padded
            if len(step.sources) == 1 and free[0]:
                kept[step.sources[0]][at] = None
            yield None if total is None else (rectangle, total)


class _Positions:
    """The chosen units of a map, by position.

    Attributes:
        counts: (H, W), how many at each.
        first: (H W + 1,), how many before each.
        size: H W.
        all_channels: those at every position, one after another.
    """

    def __init__(self, mask: Array) -> None:
        flat = mask.reshape(len(mask), -1).T
        self.counts = mask.sum(axis=0)
        self.first = np.concatenate([[0], self.counts.reshape(-1).cumsum()])
        self.size = len(flat)
        self.all_channels = np.nonzero(flat)[1]

    def channels(self, at: int) -> Integers:
        """Those at a position, ascending."""
        return self.all_channels[self.first[at] : self.first[at + 1]]


def _reached(steps: tuple[Step, ...]) -> list[Integers]:
    """(4, H, W) for each step: first and last row, first and last column of the input that reach each position."""
    _, height, width = steps[0].shape
    y, x = np.mgrid[:height, :width]
    found = [np.stack([y, y, x, x])]
    for step in steps[1:]:
        parts = [found[s] for s in step.sources]
        if step.kernel is not None:
            nothing = np.array([height, -1, width, -1])
            parts = [_tap(step, parts[0], tap, nothing[:, None, None]) for tap in _taps(step)]
        found.append(_around(parts))
    return found


_Read = tuple[Integers, Integers]
_Block = tuple[Rectangle, Array] | None
_Blocks = list[_Block]


def _around(rectangles: list[Integers]) -> Integers:
    """The least rectangles that hold all."""
    return np.stack([(np.max if i % 2 else np.min)([r[i] for r in rectangles], axis=0) for i in range(4)])


def _within(rectangles: list[Integers]) -> Integers:
    """The rectangles that are in all."""
    return np.stack([(np.min if i % 2 else np.max)([r[i] for r in rectangles], axis=0) for i in range(4)])


def _spread(step: Step, asked: Integers, like: Integers) -> Integers:
    """What a convolution needs of each position that it reads, for the rectangles that are asked of its result."""
    found = like.copy()
    for tap in _taps(step):
        (y, from_y), (x, from_x) = _reads(step, tap, like.shape[1:])
        old, new = found[:, from_y[:, None], from_x], asked[:, y[:, None], x]
        empty = (new[0] > new[1]) | (new[2] > new[3])
        found[:, from_y[:, None], from_x] = np.where(empty, old, _around([old, new]))
    return found


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """First and last of each run of consecutive numbers."""
    breaks = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1]
    return [(numbers[a], numbers[b - 1]) for a, b in zip([0, *breaks], [*breaks, len(numbers)], strict=True)]


def _check_order(units: Integers, shape: Map) -> None:
    plane = shape[1] * shape[2]
    if (np.diff((units % plane) * shape[0] + units // plane) <= 0).any():
        raise ValueError("units must be ordered by position, then channel, and none twice")


def _mask(units: Integers, shape: Map) -> Array:
    mask = np.zeros(shape, dtype=bool)
    mask.reshape(-1)[units] = True
    return mask


def _taps(step: Step) -> list[Pair]:
    assert step.kernel is not None
    return [(i, j) for i in range(step.kernel.shape[2]) for j in range(step.kernel.shape[3])]


def _reads(step: Step, tap: Pair, inside: tuple[int, ...]) -> tuple["_Read", "_Read"]:
    """For the rows and the columns of a result: those whose tap lies in the source, and where."""
    found = []
    for axis in (0, 1):
        at = np.arange(step.shape[1 + axis])
        read = at * step.stride[axis] - step.padding[axis] + tap[axis] * step.dilation[axis]
        good = (read >= 0) & (read < inside[axis])
        found.append((at[good], read[good]))
    return found[0], found[1]


def _tap(step: Step, values: Array, tap: Pair, nothing: Any) -> Array:
    """What one tap of a convolution reads at each position of its result, of (..., H, W of the source)."""
    (y, from_y), (x, from_x) = _reads(step, tap, values.shape[-2:])
    found = np.broadcast_to(np.asarray(nothing, dtype=values.dtype), (*values.shape[:-2], *step.shape[1:])).copy()
    found[..., y[:, None], x] = values[..., from_y[:, None], from_x]
    return found


def _untap(step: Step, wanted: Array, inside: tuple[int, ...]) -> Array:
    """The positions of the source that a convolution reads for the wanted ones of its result."""
    found = np.zeros(inside, dtype=bool)
    for tap in _taps(step):
        (y, from_y), (x, from_x) = _reads(step, tap, inside)
        found[from_y[:, None], from_x] |= wanted[y[:, None], x]
    return found
