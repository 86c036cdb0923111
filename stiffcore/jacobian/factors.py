"""The nonzero part of a Jacobian, rectangular or not, as sparse matrices: for its singular values.

Where the reduction has a waist that every path passes, J = D (s I + U V) on the rows S that the outer activation lets
through (`stiffcore.jacobian.reduction`), and U (|S| x k) and V (k x n) are small. Else J itself, without its zero rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
import torch
from scipy.sparse import csc_array, hstack
from torch import Tensor, fx

from stiffcore.jacobian.accumulation import Accumulation, Steps
from stiffcore.jacobian.colouring import Integers
from stiffcore.jacobian.graph import by_position
from stiffcore.jacobian.linearise import Function, Linearisation
from stiffcore.jacobian.reduction import (
    Reduction,
    Route,
    open_function,
    reduce_opened,
    relative_difference,
    rounding_of_function,
    structure,
)
from stiffcore.study import PROBES, BlockFunction


@dataclass(frozen=True)
class Factors:
    """A Jacobian J (m x n), by its rows that are not zero.

    Attributes:
        jacobian: J.
        rows: (r,) units of the output, the others' rows are zero; in order of position.
        columns: (c,) units of the input, the others' columns are zero.
        reduction: with a waist, where J is built from U and V; None: J itself is built.
        parts: accumulations of U (r x k) and V (k x n), or of J (r x c); empty where an operation is not known.
        column_items: as `Reduction.column_items`.
        kernel_items: as `Reduction.kernel_items`.
        reason: one line for people.
        traced: the graph of J's function; None where it has none, or the graph lacks something of J.
    """

    jacobian: Linearisation
    rows: Integers
    columns: Integers
    reduction: Reduction | None
    parts: tuple[Accumulation, ...]
    column_items: int
    kernel_items: int
    reason: str
    traced: fx.GraphModule | None = None

    @property
    def count(self) -> int:
        """Singular values of J: min(m, n)."""
        return min(self.jacobian.m, self.jacobian.n)

    @property
    def order(self) -> int:
        """Of the symmetric matrix whose eigenvalues give the squares: 2 k or k with a waist, else min(r, c)."""
        if self.reduction is not None:
            return self.reduction.k * (2 if self.reduction.shift else 1)
        return min(len(self.rows), len(self.columns))

    @property
    def ones(self) -> int:
        """Singular values that are exactly 1: rows that only the skip fills, beside those that W K W^T may move."""
        return len(self.rows) - self.order if self.reduction is not None and self.reduction.shift else 0

    def matrices(self, chunk: int, tell: Callable[[int, int], None] = lambda done, total: None) -> list[csc_array]:
        """U and V (its columns as they are in the input), or J without its zero rows and columns.

        Args:
            chunk: columns at once, where products build J.
            tell: told of what is done and of how much there is.
        """
        if self.reduction is not None:
            u, v = (part.matrix(tell) for part in self.parts)
            return [u, v[:, np.argsort(self.columns)]]
        if self.parts:
            return [part.matrix(tell) for part in self.parts]
        blocks = []
        for start in range(0, len(self.columns), chunk):
            at = self.columns[start : start + chunk]
            tangents = self.jacobian.x.new_zeros((len(at), self.jacobian.n))
            tangents[torch.arange(len(at)), torch.from_numpy(at).to(tangents.device)] = 1
            products = self.jacobian.jvp(tangents)[:, torch.from_numpy(self.rows).to(tangents.device)]
            blocks.append(csc_array(products.cpu().numpy().T))
            tell(start + len(at), len(self.columns))
        return [_hstacked(blocks, len(self.rows))]

    @cached_property
    def rounding(self) -> float:
        """How far J, as it is computed, is from that of exact arithmetic: see `Reduction.rounding`.

        So far may a singular value be off (Weyl: none moves by more than the 2-norm of what is added).
        """
        return rounding_of_function(self.jacobian, self.traced)

    def difference(self, matrices: list[csc_array]) -> float:
        """Compare J J^T, on random vectors, with products of the function; the largest relative difference."""
        x = self.jacobian.x
        generator = torch.Generator().manual_seed(0)
        inside = torch.zeros(PROBES, self.jacobian.m, dtype=x.dtype)
        inside[:, self.rows] = torch.randn(PROBES, len(self.rows), generator=generator, dtype=x.dtype)
        pulled = self.jacobian.vjp(inside.to(x.device))
        # squares of numbers below 1e-162 are zero: J^T r is scaled, by a power of two
        scale = 2.0 ** -np.clip(np.frexp(float(pulled.abs().max()))[1], -1000, 1000)
        pulled *= scale
        expected = self.jacobian.jvp(pulled).cpu().double().numpy()
        r = inside[:, self.rows].double().numpy().T
        wide = [m.astype(np.float64) for m in matrices]
        if self.reduction is None:
            back = np.zeros((self.jacobian.n, PROBES))
            back[self.columns] = wide[0].T @ r * scale
            found = wide[0] @ back[self.columns]
        else:
            u, v = wide
            back = v.T @ (u.T @ r)
            if self.reduction.shift:
                back[self.rows] += r
            back *= scale
            found = u @ (v @ back) + (back[self.rows] if self.reduction.shift else 0)
        everywhere = np.zeros_like(expected)
        everywhere[:, self.rows] = found.T
        pairs = ((everywhere, torch.from_numpy(expected)), (back.T, pulled.cpu().double()))
        return float(np.max([relative_difference(torch.from_numpy(a), b) for a, b in pairs]))  # nan stays


def open_factors(f: Function, x: Tensor, function: BlockFunction = BlockFunction.BLOCK, *, name: str = "f") -> Factors:
    """What gives the singular values of the Jacobian of `f`, or of its branch, at `x`.

    Args:
        f: takes and returns one tensor; its Jacobian may be rectangular.
        x: the point, any shape, floating.
        function: as for `reduce_jacobian`.
        name: how errors call f.

    Raises:
        NoSpectrumError: where there is no branch.
        InputError: where f cannot be linearised, or its forward and reverse derivatives disagree.
    """
    jacobian, graph, untraced = open_function(f, x, function, name)
    known = structure(jacobian, graph)
    steps, items, kernels = known.steps, known.column_items, known.kernel_items
    if jacobian.n == jacobian.m and steps is not None:
        found = _by_waist(reduce_opened(jacobian, graph, untraced, function), items, kernels)
        if found is not None:
            return found
    rows, columns = np.arange(jacobian.m), np.arange(jacobian.n)
    if steps is None:
        why = f"not traced ({untraced})" if graph is None else "an operation is not known"
        reason = jacobian.noted(f"J itself, by products: {why}")
        return Factors(jacobian, rows, columns, None, (), items, kernels, reason, known.module)
    rows = by_position(torch.from_numpy(rows), (1, *steps.destination)).numpy()
    columns = by_position(torch.from_numpy(columns), (1, *steps.source)).numpy()
    everything = Accumulation(steps, columns, rows)
    used = everything.used_rows
    part = Accumulation(steps, columns, used)
    reason = jacobian.noted(f"J itself: {len(used)} of {jacobian.m} rows are not zero")
    return Factors(jacobian, used, columns, None, (part,), items, kernels, reason, known.module)


def _by_waist(reduction: Reduction, items: int, kernels: int) -> Factors | None:
    """Through the waist of the reduction, where that makes a matrix of less than half the order of J without zeros."""
    if reduction.route is not Route.WAIST or reduction.head is None or reduction.tail is None:
        return None
    # a waist's two sides were cut from the graph
    tail, head = (Steps.of(cast(fx.GraphModule, r.f), r.x) for r in (reduction.tail, reduction.head))
    if tail is None or head is None:
        return None
    n = reduction.n
    rows = np.arange(n) if reduction.mask is None else torch.nonzero(reduction.mask).reshape(-1).numpy()
    rows = by_position(torch.from_numpy(rows), (1, *tail.destination)).numpy()
    columns = by_position(torch.arange(n), (1, *head.source)).numpy()
    index = reduction.index.numpy()
    parts = (Accumulation(tail, index, rows), Accumulation(head, columns, index))
    reason = f"U ({len(rows)} x {len(index)}) and V ({len(index)} x {n}) of the {reduction.reason}"
    reason = reduction.jacobian.noted(reason)
    found = Factors(reduction.jacobian, rows, columns, reduction, parts, items, kernels, reason, reduction.traced)
    return found if 2 * found.order <= len(rows) else None


def _hstacked(blocks: list[csc_array], rows: int) -> csc_array:
    return csc_array(hstack(blocks, format="csc")) if blocks else csc_array((rows, 0))
