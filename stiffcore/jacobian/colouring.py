"""Sparse Jacobians of local functions of feature maps, from few products (Curtis, Powell and Reid, 1974).

Columns whose results do not meet can share one forward-mode product, and every row of the product belongs to the one
of them that reaches it. A reach is kept for rows (y) and columns (x) of the map apart, as intervals; channels all meet.
Nothing here knows what the matrix is for: it may be rectangular, and any choice of its rows and columns can be built.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csc_array
from torch import Tensor

Map = tuple[int, int, int]
Pair = tuple[int, int]
Integers = NDArray[np.int64]

# What a product may hold where nothing reaches, relative to its largest number: fast convolution algorithms (Winograd,
# FFT) leave rounding there, direct ones exact zeros.
STRAY_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}


class ReachError(RuntimeError):
    """A product is not zero where, by the reach, nothing can be: build the columns one by one."""


@dataclass(frozen=True)
class Reach:
    """Which positions of one feature map a position of another can influence: at most a rectangle.

    Attributes:
        source: (C, H, W) of the map it starts from.
        destination: (C, H, W) of the map it ends in.
        y: (2, H of the source) int64, first and last row that each row reaches; first > last where it reaches none.
        x: (2, W of the source) int64, the same for columns of the map.
    """

    source: Map
    destination: Map
    y: Integers
    x: Integers

    @classmethod
    def identity(cls, shape: Map) -> "Reach":
        """Every position reaches itself."""
        y, x = (np.stack([np.arange(size)] * 2) for size in shape[1:])
        return cls(shape, shape, y, x)

    def window(self, shape: Map, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> "Reach":
        """Follow a convolution or a pooling to a map of `shape`, whose o-th row reads rows o stride - padding + ..."""

        def follow(ends: Integers, size: int, k: int, s: int, p: int, d: int) -> Integers:
            return _within(ends, -(-(ends[0] + p - d * (k - 1)) // s), (ends[1] + p) // s, size)

        steps = zip((self.y, self.x), shape[1:], kernel, stride, padding, dilation, strict=True)
        y, x = (follow(*step) for step in steps)
        return replace(self, destination=shape, y=y, x=x)

    def transposed_window(self, shape: Map, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> "Reach":
        """Follow a transposed convolution, whose i-th row is written to rows i stride - padding + ..."""

        def follow(ends: Integers, size: int, k: int, s: int, p: int, d: int) -> Integers:
            return _within(ends, ends[0] * s - p, ends[1] * s - p + d * (k - 1), size)

        steps = zip((self.y, self.x), shape[1:], kernel, stride, padding, dilation, strict=True)
        y, x = (follow(*step) for step in steps)
        return replace(self, destination=shape, y=y, x=x)

    def union(self, other: "Reach") -> "Reach":
        """What either reaches (and what lies between), for two ways from one map to another."""

        def hull(a: Integers, b: Integers) -> Integers:
            return np.stack([np.minimum(a[0], b[0]), np.maximum(a[1], b[1])])

        return replace(self, y=hull(self.y, other.y), x=hull(self.x, other.x))

    def then(self, other: "Reach") -> "Reach":
        """What is reached through a map in the middle: `other` starts where this ends.

        Raises:
            ValueError: where it does not.
        """
        if self.destination != other.source:
            raise ValueError(f"a reach into {self.destination} cannot go on from {other.source}")

        def follow(ends: Integers, after: Integers, size: int) -> Integers:
            found = [after[:, a : b + 1] for a, b in ends.T]
            return np.array([(f[0].min(initial=size), f[1].max(initial=-1)) for f in found]).T

        y, x = (follow(*step) for step in zip((self.y, self.x), (other.y, other.x), other.destination[1:], strict=True))
        return Reach(self.source, other.destination, y, x)


class Colouring:
    """Positions of the source that share products, and the position that each row of a product belongs to.

    Rows of the map are coloured so that rows of one colour reach disjoint intervals, with the fewest colours (greedily,
    by the first row reached, which is optimal for intervals); columns of the map likewise. Positions that agree
    in both colours never meet. A product is one pair of colours and one channel of the source.

    Units are flat, row-major indices into (C, H, W).

    Attributes:
        reach: what it was made from.
    """

    def __init__(self, reach: Reach) -> None:
        self.reach = reach
        _, height, width = reach.destination
        self._y, self._y_owner = colour_intervals(reach.y, height)
        self._x, self._x_owner = colour_intervals(reach.x, width)

    def products(self, columns: Integers) -> int:
        """How many products it takes to build these columns.

        Args:
            columns: (c,) int64, units of the source.
        """
        return len(np.unique(self._product(columns)))

    def entries(self, columns: Integers, rows: Integers) -> int:
        """How many pairs of these units are in reach: no matrix of these columns and rows has more nonzeros.

        Args:
            columns: (c,) int64, units of the source.
            rows: (r,) int64, units of the destination.
        """
        _, height, width = self.reach.destination
        _, y, x = _split(rows, self.reach.destination)
        before = np.zeros((height + 1, width + 1), dtype=np.int64)  # rows above and to the left of a corner
        np.add.at(before[1:, 1:], (y, x), 1)
        before = before.cumsum(axis=0).cumsum(axis=1)
        _, y, x = _split(columns, self.reach.source)
        (top, bottom), (left, right) = self.reach.y[:, y], self.reach.x[:, x]
        found = (top <= bottom) & (left <= right)
        top, bottom, left, right = top[found], bottom[found] + 1, left[found], right[found] + 1
        return int((before[bottom, right] - before[top, right] - before[bottom, left] + before[top, left]).sum())

    def envelope(self, units: Integers) -> int:
        """A bound of the entries that elimination without pivoting leaves in the factors of the square matrix.

        Of these rows and columns, in this order: those between the first and the last entry in reach of each row and
        column, made symmetric (the envelope, which no fill leaves; George & Liu 1981, section 4.2).

        Args:
            units: (k,) int64, units of the source and of the destination, which have one shape; ordered by position.

        Raises:
            ValueError: where they are not so ordered.
        """
        _, _, width = self.reach.source
        _, y, x = _split(units, self.reach.source)
        position = y * width + x
        if self.reach.source != self.reach.destination or (np.diff(position) < 0).any():
            raise ValueError("an envelope needs one map, and units ordered by position")
        (top, bottom), (left, right) = self.reach.y[:, y], self.reach.x[:, x]
        here = np.arange(len(units))
        found = (top <= bottom) & (left <= right)
        first = np.where(found, np.searchsorted(position, top * width + left), here)
        last = np.where(found, np.searchsorted(position, bottom * width + right, side="right") - 1, here)
        across = np.searchsorted(np.maximum.accumulate(last), here)  # first column that reaches this row
        return int(len(units) + 2 * (here - np.minimum(np.minimum(first, across), here)).sum())

    def matrix(
        self,
        operator: Callable[[Tensor], Tensor],
        columns: Integers,
        rows: Integers,
        chunk: int,
        like: Tensor,
        tell: Callable[[int, int], None] = lambda done, total: None,
    ) -> csc_array:
        """Build columns of a Jacobian, by `products(columns)` forward-mode products.

        Memory: the operator's own for `chunk` products, up to nine words for each of their `chunk * len(rows)`
        results, and twice the nonzeros with their indices (8 bytes each besides the number).

        Args:
            operator: tangents (c, C H W of the source) to results (c, C H W of the destination), row by row.
            columns: (c,) int64, different units of the source.
            rows: (r,) int64, different units of the destination.
            chunk: products at once.
            like: gives the tangents their dtype and device.
            tell: told of products done and products in all.

        Returns:
            (r, c), in the order of `rows` and `columns`; sorted, without stored zeros.

        Raises:
            ReachError: where a result is not zero out of reach.
        """
        channels, height, width = self.reach.source
        # one more row and column, which index -1 finds: what nothing owns belongs to no column
        number = np.full((channels, height + 1, width + 1), -1, dtype=np.int32)
        number[_split(columns, self.reach.source)] = np.arange(len(columns))
        _, y, x = _split(rows, self.reach.destination)
        wanted = torch.from_numpy(rows).to(like.device)
        products, which = np.unique(self._product(columns), return_inverse=True)
        order = np.argsort(which, kind="stable")
        bounds = np.searchsorted(which[order], np.arange(len(products) + 1))
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for start in range(0, len(products), chunk):
            done = products[start : start + chunk]
            members = order[bounds[start] : bounds[start + len(done)]]
            tangents = like.new_zeros((len(done), channels * height * width))
            tangents[torch.from_numpy(which[members] - start), torch.from_numpy(columns[members])] = 1
            results = operator(tangents)[:, wanted].cpu().numpy()
            product, row = np.nonzero(results)
            values = results[product, row]
            y_colour, x_colour, channel = np.unravel_index(done, self._counts)
            owner = (self._y_owner[y_colour[product], y[row]], self._x_owner[x_colour[product], x[row]])
            column = number[channel[product], *owner]
            mine = column >= 0
            if not mine.all():
                _refuse_stray(values[~mine], values)
                values, row, column = values[mine], row[mine], column[mine]
            parts.append((values, row.astype(np.int32), column))
            tell(start + len(done), len(products))
        if not parts:
            return csc_array((len(rows), len(columns)), dtype=torch.empty(0, dtype=like.dtype).numpy().dtype)
        values, row, column = (np.concatenate(part) for part in zip(*parts, strict=True))
        parts.clear()  # before the second copy
        return csc_array((values, (row, column)), shape=(len(rows), len(columns)))

    @property
    def _counts(self) -> Map:
        return len(self._y_owner), len(self._x_owner), self.reach.source[0]

    def _product(self, columns: Integers) -> Integers:
        channel, y, x = _split(columns, self.reach.source)
        return np.ravel_multi_index((self._y[y], self._x[x], channel), self._counts)


def _within(before: Integers, first: Integers, last: Integers, size: int) -> Integers:
    """Intervals cut to a map's size; those that are or were empty become (size, -1), neutral in a union."""
    first, last = np.maximum(first, 0), np.minimum(last, size - 1)
    empty = (before[0] > before[1]) | (first > last)
    return np.stack([np.where(empty, size, first), np.where(empty, -1, last)])


def colour_intervals(ends: Integers, size: int) -> tuple[Integers, Integers]:
    """Colour intervals so that those of one colour are disjoint, with the fewest colours.

    Args:
        ends: (2, intervals) int64, first and last place of each; first > last where it is empty.
        size: places.

    Returns:
        (intervals,) the colours, and (colours, size) the interval of each colour that holds each place, or -1.
    """
    colour = np.zeros(ends.shape[1], dtype=np.int64)
    last: list[int] = []  # of each colour
    for i in np.argsort(ends[0], kind="stable"):
        free = (c for c, end in enumerate(last) if end < ends[0, i])
        colour[i] = next(free, len(last))
        last[colour[i] : colour[i] + 1] = [ends[1, i]]
    owner = np.full((len(last), size), -1, dtype=np.int64)
    for i, (a, b) in enumerate(ends.T):
        owner[colour[i], a : b + 1] = i
    return colour, owner


def _split(units: Integers, shape: Map) -> tuple[Integers, Integers, Integers]:
    channel, y, x = np.unravel_index(units, shape)
    return channel, y, x


def _refuse_stray(stray: np.ndarray, values: np.ndarray) -> None:
    largest, scale = float(np.abs(stray).max()), float(np.abs(values).max())
    tolerance = STRAY_TOLERANCE[torch.from_numpy(values[:0]).dtype]
    if not largest <= tolerance * scale:
        raise ReachError(f"a product holds {largest:.1e} (of at most {scale:.1e}) where nothing should reach")
