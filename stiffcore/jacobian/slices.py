"""Slices of a Jacobian that was not flattened: the matrices that the source paper's published tables are spectra of.

`torch.linalg.eigvals(torch.func.jacrev(f)(x))` takes the last two axes of the Jacobian tensor (C_out, H_out, W_out,
C_in, H, W) as matrices and the others as a batch: one H x W "slice" for each output unit and input channel. It says how
a number of the output depends on one channel, and is no linear map of a space to itself; but it has eigenvalues where
H = W, and a published stiffness is one of these.

A slice is zero but in the rows and columns of its output unit's receptive field, R x C. An eigenvector with l != 0
lives in the rows R, and only its part in C counts, so the nonzero eigenvalues are those of the *square*, the slice
restricted to R and C both. All others are zero: exactly, and counted.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stiffcore.jacobian.accumulation import Accumulation
from stiffcore.jacobian.colouring import Integers, colour_intervals
from stiffcore.jacobian.graph import by_position
from stiffcore.jacobian.linearise import Function, Linearisation
from stiffcore.jacobian.reduction import NoSpectrumError, open_function, structure
from stiffcore.study import BlockFunction

Array = NDArray[np.floating]
# Reverse products of a certificate that are taken together: four take half the time of four.
PRODUCTS_AT_ONCE = 4


@dataclass(frozen=True)
class Squares:
    """The squares of some output units, of one size.

    Attributes:
        units: (a,) flat indices into the output.
        first: the first row and column of the slice that they hold.
        values: (a, channels, w, w).
    """

    units: Integers
    first: int
    values: Array


@dataclass(frozen=True)
class Slices:
    """The slices of a function's Jacobian at a point.

    Attributes:
        jacobian: of the function.
        side: H = W of the input.
        accumulation: gives the squares, where all operations are known to it; None: one reverse product a row.
        bound: at most so many eigenvalues are not zero.
        entries: numbers of the largest block that is alive at once, beside the accumulation's own.
        column_items: numbers alive while one product is computed.
        kernel_items: as `Reduction.kernel_items`.
        reason: one line for people.
        reached: (4, H, W of the output) the rectangle of the input that reaches each position; None: not known.
    """

    jacobian: Linearisation
    side: int
    accumulation: Accumulation | None
    bound: int
    entries: int
    column_items: int
    kernel_items: int
    reason: str
    reached: Integers | None = None

    @property
    def channels(self) -> int:
        """Input axes before the last two, as one."""
        return self.jacobian.n // self.side**2

    @property
    def count(self) -> int:
        """All eigenvalues of all slices."""
        return self.jacobian.m * self.channels * self.side

    def squares(self, chunk: int, tell: Callable[[int, int], None] = lambda done, total: None) -> Iterator[Squares]:
        """Every square that is not zero by structure.

        Args:
            chunk: output units at once, where rows come from products.
            tell: told of what is done and of how much there is.

        Yields:
            Each output unit once, or not at all where its squares are zero.
        """
        if self.accumulation is None:
            yield from self._by_rows(chunk, tell)
            return
        plane = int(np.prod(self.accumulation.destination[1:]))
        for at, channels, (top, bottom, left, right), block in self.accumulation.blocks(tell):
            shape = (len(channels), bottom - top + 1, right - left + 1, self.channels)
            yield Squares(channels * plane + at, top, block.reshape(shape).transpose(0, 3, 1, 2))

    def _by_rows(self, chunk: int, tell: Callable[[int, int], None]) -> Iterator[Squares]:
        m = self.jacobian.m
        for start in range(0, m, chunk):
            units = np.arange(start, min(start + chunk, m))
            slices = self.rows(units)
            present = np.any(slices, axis=1)
            ends = []
            for axis in (2, 1):  # rows that are not zero, then columns
                line: NDArray[np.bool_] = np.any(present, axis=axis)
                ends.append((line.argmax(axis=1), self.side - 1 - line[:, ::-1].argmax(axis=1)))
            first, last = (f(ends[0][i], ends[1][i]) for i, f in enumerate((np.maximum, np.minimum)))
            last = np.where(np.any(present, axis=(1, 2)), last, -1)
            for a, b in sorted({(a, b) for a, b in zip(first.tolist(), last.tolist(), strict=True) if a <= b}):
                mine = (first == a) & (last == b)
                yield Squares(units[mine], a, slices[mine][:, :, a : b + 1, a : b + 1])
            tell(int(units[-1]) + 1, m)

    def rows(self, units: Integers) -> Array:
        """(a, channels, H, W): the slices of some output units, by one reverse-mode product each."""
        x = self.jacobian.x
        cotangents = torch.zeros((len(units), self.jacobian.m), dtype=self.jacobian.value.dtype, device=x.device)
        cotangents[torch.arange(len(units)), torch.from_numpy(units).to(x.device)] = 1
        return self.jacobian.vjp(cotangents).reshape(len(units), -1, self.side, self.side).cpu().numpy()


class RandomCheck:
    """Squares by windows, weighted at random, against reverse-mode products of the function: all of them.

    Positions of the output that are reached from disjoint rectangles of the input share a product, so that few products
    cover every position and every channel, also those that the accumulation takes to be zero.
    """

    def __init__(self, slices: Slices) -> None:
        """For slices that are accumulated."""
        self._slices = slices
        self._weights = np.random.default_rng(0).standard_normal(slices.jacobian.m)
        self._sums: dict[int, Array] = {}

    def add(self, squares: Squares) -> None:
        """Take the squares of one position."""
        assert self._slices.reached is not None
        position = int(squares.units[0]) % self._slices.reached[0].size
        # as the numbers lie in memory, so that none is copied
        found = np.tensordot(self._weights[squares.units], squares.values.transpose(0, 2, 3, 1), 1)
        self._sums[position] = found.transpose(2, 0, 1)

    def difference(self) -> float:
        """The largest difference, where squares are and where nothing reaches, relative to the largest entry."""
        slices, reached = self._slices, self._slices.reached
        assert reached is not None
        _, height, width = reached.shape
        # rows of a rectangle follow from its row, columns from its column
        row_colour, _ = colour_intervals(reached[:2, :, 0], slices.side)
        column_colour, _ = colour_intervals(reached[2:, 0, :], slices.side)
        weights = self._weights.reshape(-1, height, width)
        colours = np.ndindex(row_colour.max(initial=-1) + 1, column_colour.max(initial=-1) + 1)
        chosen = [np.outer(row_colour == y, column_colour == x) for y, x in colours]
        worst = largest = 0.0
        for start in range(0, len(chosen), PRODUCTS_AT_ONCE):
            part = chosen[start : start + PRODUCTS_AT_ONCE]
            cotangents = torch.as_tensor(np.stack([weights * c for c in part]), dtype=slices.jacobian.value.dtype)
            rows = slices.jacobian.vjp(cotangents.reshape(len(part), -1).to(slices.jacobian.x.device))
            for at, row in zip(part, rows.reshape(len(part), -1, slices.side, slices.side), strict=True):
                found = row.cpu().double().numpy()
                expected, known = np.zeros_like(found), np.ones(found.shape[1:], dtype=bool)
                for position in np.flatnonzero(at):
                    top, bottom, left, right = reached.reshape(4, -1)[:, position]
                    known[top : bottom + 1, left : right + 1] = False
                    both = slice(max(top, left), min(bottom, right) + 1)
                    known[both, both] = True
                    if (square := self._sums.get(int(position))) is not None:
                        expected[:, both, both] = square
                # nan stays, unlike with max()
                worst = float(np.maximum(worst, np.abs((found - expected)[:, known]).max(initial=0)))
                largest = float(np.maximum(largest, np.abs(found).max(initial=0)))
        return worst / (largest or 1.0)


def open_slices(f: Function, x: Tensor, function: BlockFunction = BlockFunction.BLOCK, *, name: str = "f") -> Slices:
    """The slices of the Jacobian of `f`, or of its branch, at `x`.

    Args:
        f: takes and returns one tensor.
        x: the point, any shape whose last two axes are equal, floating.
        function: as for `reduce_jacobian`.
        name: how errors call f.

    Raises:
        NoSpectrumError: where the last two axes differ, or there is no branch.
        InputError: where f cannot be linearised, or its forward and reverse derivatives disagree.
    """
    jacobian, graph, untraced = open_function(f, x, function, name)
    if x.dim() < 2 or x.shape[-1] != x.shape[-2]:
        raise NoSpectrumError(
            f"the slices of {name} are no square matrices: its input is of shape {tuple(x.shape)}",
            jacobian.n,
            jacobian.m,
        )
    side, channels = x.shape[-1], x.numel() // x.shape[-1] ** 2
    known = structure(jacobian, graph)
    steps, items, kernels = known.steps, known.column_items, known.kernel_items
    if steps is None:
        why = f"not traced ({untraced})" if graph is None else "an operation has no window that is known"
        bound = jacobian.m * channels * side
        return Slices(
            jacobian,
            side,
            None,
            bound,
            0,
            items,
            kernels,
            jacobian.noted(f"one reverse product for each output: {why}"),
        )
    reached = steps.reached()
    first, last = np.maximum(reached[0], reached[2]), np.minimum(reached[1], reached[3])
    plane = first.size
    units = np.flatnonzero(np.broadcast_to((first <= last).reshape(-1), (jacobian.m // plane, plane)).reshape(-1))
    rows = by_position(torch.from_numpy(units), (1, *steps.destination)).numpy()
    columns = by_position(torch.arange(jacobian.n), (1, *steps.source)).numpy()
    found = Accumulation(steps, columns, rows, np.stack([first, last, first, last]))
    width = np.maximum(last - first + 1, 0)
    live, widest = found.live_rows, int(width.max(initial=0))
    return Slices(
        jacobian,
        side,
        found,
        int((live * width).sum()) * channels,
        int((live * width**2).max(initial=0)) * channels,
        items,
        kernels,
        jacobian.noted(f"squares of up to {widest} x {widest} where windows meet the diagonal"),
        reached,
    )
