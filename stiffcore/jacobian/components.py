"""A Jacobian that is block triangular along an axis of its input: its eigenvalues are those of its diagonal blocks.

Parts are the positions of one axis of x (tokens, time steps, channels). Part i of the output depends on part j of the
input or does not: a directed graph, whose strongly connected components, in the order of dependence, make J block
triangular (Duff and Reid 1978). So eig(J) is the union of the eigenvalues of the components' diagonal blocks, exactly;
what is off the diagonal has no part in it, however large. A causal sequence has a component a token.

The zeros are seen, not declared: products with a random tangent on one part (forward) and with a random cotangent on
one part (reverse) have exact zeros elsewhere. A leak of 1e-9 is no zero, and then J is taken as a whole.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from stiffcore.errors import InputError
from stiffcore.jacobian.graph import FunctionGraph
from stiffcore.jacobian.linearise import Function, Linearisation, differentiable_kernels
from stiffcore.jacobian.positions import Positions, UnknownError
from stiffcore.jacobian.reduction import (
    PROBE_TOLERANCE,
    Reduction,
    open_function,
    reduce_as_asked,
    reduce_jacobian,
    relative_difference,
)
from stiffcore.study import BlockFunction

# A sequence has so many axes at most, the batch among them.
SEQUENCE_AXES = 3
# With so many parts, an order that is not that of the axis is looked for, too (masks of masked autoregressive layers).
ANY_ORDER_PARTS = 64
# Numbers of x in all products at once, at most.
NUMBERS_AT_ONCE = 1 << 16
# A leak below this share of a product is told of: it is meant to be zero.
LEAK = 1e-3


@dataclass(frozen=True)
class Components:
    """The strongly connected components of a square Jacobian along one axis of its input.

    Attributes:
        jacobian: of the whole function f at x; x and f(x) have one shape.
        axis: of x, whose positions are the parts.
        members: the parts of each component, ascending; components in the order of dependence, so that J is block lower
            triangular.
        tangents: (parts, ...), a random tangent on each part alone, of the part's shape.
        products: the same shape, the product of J with each, at the same part.
        reason: one line for people.
        positions: f at one position, from its graph; None where an operation is not known.
    """

    jacobian: Linearisation
    axis: int
    members: tuple[np.ndarray, ...]
    tangents: Tensor = field(repr=False)
    products: Tensor = field(repr=False)
    reason: str
    positions: Positions | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.members)

    @property
    def n(self) -> int:
        """The order of J."""
        return self.jacobian.n

    @property
    def held_items(self) -> int:
        """Numbers that stay in memory: the point's values at all positions."""
        kept = 0 if self.positions is None else self.positions.held_bytes // self.jacobian.x.element_size()
        return kept + 4 * self.n

    @property
    def order(self) -> int:
        """Of the largest diagonal block."""
        return self.n // self.jacobian.x.shape[self.axis] * max(map(len, self.members))

    def point(self, c: int) -> Tensor:
        """x at the parts of component c."""
        return self.jacobian.x.index_select(self.axis, self._index(c))

    def function(self, c: int) -> Function:
        """f at the parts of component c, as a function of these alone, all others at x.

        It is computed at the position alone where the graph allows for it, else by the whole of f.
        """
        if self.positions is not None and len(self.members[c]) == 1:
            return self.positions.function(int(self.members[c][0]))
        return self._through_the_whole(c)

    def reduction(self, c: int, *, reduce: bool = True) -> Reduction:
        """The diagonal block of component c, reduced on its own; compared with products of the whole where it can be.

        Its value is compared with that of f at its parts, and, of one part, a product with that of J.

        Args:
            c: which component.
            reduce: False takes the block itself.

        Raises:
            InputError: where it cannot be linearised, or the comparison fails for what is not computed by the whole.
        """
        name = f"{self.jacobian.name}, {self.label(c)}"
        found = reduce_jacobian(self.function(c), self.point(c), BlockFunction.BLOCK, reduce=reduce, name=name)
        gap = self._difference(found.jacobian, c)
        tolerance = PROBE_TOLERANCE[self.jacobian.x.dtype]
        if gap > tolerance and self.positions is not None:
            slow = replace(self, positions=None)
            found = reduce_jacobian(slow.function(c), self.point(c), BlockFunction.BLOCK, reduce=reduce, name=name)
            found = replace(found, reason=f"{found.reason}; at its position alone it was off by {gap:.1e}")
            gap = self._difference(found.jacobian, c)
        if gap > tolerance:
            raise InputError(f"{name}: it differs from the whole function by {gap:.1e}")
        return replace(found, check=max(found.check, gap))

    def reductions(self) -> Iterator[Reduction]:
        """That of each component, one after the other."""
        return (self.reduction(c) for c in range(len(self)))

    def label(self, c: int) -> str:
        """Where component c is, for people: `position 5 of axis 1`."""
        parts = self.members[c]
        if len(parts) == 1:
            return f"position {parts[0]} of axis {self.axis}"
        listed = ", ".join(map(str, parts[:3])) + (", ..." if len(parts) > 3 else "")
        return f"positions {listed} of axis {self.axis}"

    def _index(self, c: int) -> Tensor:
        return torch.from_numpy(np.asarray(self.members[c], dtype=np.int64)).to(self.jacobian.x.device)

    def _through_the_whole(self, c: int) -> Function:
        f, x, axis, index = self.jacobian.f, self.jacobian.x, self.axis, self._index(c)

        def function(z: Tensor) -> Tensor:
            return f(x.index_copy(axis, index, z)).index_select(axis, index)

        return function

    def _difference(self, block: Linearisation, c: int) -> float:
        value = self.jacobian.value.index_select(self.axis, self._index(c))
        scale = float(self.jacobian.value.abs().max()) or 1.0
        gap = float((block.value - value).abs().max()) / scale
        if len(self.members[c]) > 1:
            return gap
        part = int(self.members[c][0])
        product = block.jvp(self.tangents[part].reshape(1, -1))
        return max(gap, relative_difference(product, self.products[part].reshape(1, -1)))


def find_components(
    f: Function,
    x: Tensor,
    function: BlockFunction = BlockFunction.BLOCK,
    *,
    axis: int | None = None,
    name: str = "f",
) -> tuple[Components | None, str]:
    """The components of the Jacobian of f, or of its branch, along an axis of x that has more than one.

    Args:
        f: takes and returns one tensor, of the same shape.
        x: the point.
        function: f itself, or its branch.
        axis: of x; None: that with the smallest components.
        name: how errors call f.

    Returns:
        The components, or None; and in words what was seen where they are none: a leak.

    Raises:
        NoSpectrumError, InputError: as `stiffcore.jacobian.reduction.open_function`.
    """
    jacobian, graph, _ = open_function(f, x, BlockFunction(function), name, square=True)
    return components_of(jacobian, graph, axis=axis)


def components_of(
    jacobian: Linearisation, graph: FunctionGraph | None, *, axis: int | None = None
) -> tuple[Components | None, str]:
    """As `find_components`, of what `open_function` returns."""
    shape = jacobian.x.shape
    if jacobian.value.shape != shape:
        return None, "input and output differ in shape"
    axes = range(len(shape)) if axis is None else [range(len(shape))[axis]]
    looks = [_Look(jacobian, graph, a) for a in axes if shape[a] > 1]
    found = [look for look in looks if look.may_divide]
    notes = [look.leak for look in looks if look.leak]
    # the most parts have the smallest blocks
    best: Components | None = None
    for look in sorted(found, key=lambda look: -shape[look.axis]):
        if best is not None and best.order * shape[look.axis] <= jacobian.n:
            break  # no block of that axis is smaller
        components = look.components()
        if len(components) > 1 and (best is None or components.order < best.order):
            best = components
    return best, "; ".join(notes)


def open_matrix(
    f: Function,
    x: Tensor,
    function: BlockFunction = BlockFunction.BLOCK,
    *,
    reduce: bool = True,
    components: bool = True,
    name: str = "f",
) -> Reduction | Components:
    """The components of the Jacobian of f, or of its branch, at x, where it has more than one; else its reduction.

    Components are looked for where x is a sequence: two of its axes, of three at most, are longer than 1. A feature
    map of four axes is reduced as a whole.

    Args:
        f: takes and returns one tensor.
        x: the point.
        function: f itself, or its branch.
        reduce: False takes the full matrix.
        components: False takes J as a whole.
        name: how errors call f.

    Raises:
        NoSpectrumError, InputError: as `stiffcore.jacobian.reduction.reduce_jacobian`.
    """
    function = BlockFunction(function)
    opened = open_function(f, x, function, name, square=True)
    jacobian, graph, _ = opened
    leak = ""
    if reduce and components and x.ndim <= SEQUENCE_AXES and sum(size > 1 for size in x.shape) > 1:
        found, leak = components_of(jacobian, graph)
        if found is not None:
            return replace(found, reason=jacobian.noted(found.reason))
    whole = reduce_as_asked(opened, function, reduce=reduce)
    return replace(whole, reason=f"{whole.reason}; {leak}") if leak else whole


class _Look:
    """What depends on what along one axis."""

    def __init__(self, jacobian: Linearisation, graph: FunctionGraph | None, axis: int) -> None:
        self.jacobian, self.graph, self.axis = jacobian, graph, axis
        self.parts = jacobian.x.shape[axis]
        self.leak = ""
        self.may_divide = self._may_divide()

    def _may_divide(self) -> bool:
        """Whether there may be more than one component, at the cost of four products."""
        parts = np.arange(self.parts)
        half = parts < self.parts // 2
        there = self._sizes(self.jacobian.jvp, np.stack([~half, half, parts == 0]))
        back = self._sizes(self.jacobian.vjp, (parts == 0)[None])[0]
        shares = [float(there[i][~inside].max()) for i, inside in enumerate((~half, half))]
        least = min(shares) / (float(there[:2].max()) or 1.0)
        if least == 0:
            return True
        if least < LEAK:
            self.leak = (
                f"along axis {self.axis} one half of the output depends on the other half of the input by {least:.1e} "
                "only, which is not zero: taken as a whole"
            )
        # where the first part reaches all and all reach it, there is one component
        return self.parts <= ANY_ORDER_PARTS and not (there[2].all() and back.all())

    def components(self) -> Components:
        """The components along the axis."""
        positions = self._positions()
        reach = np.eye(self.parts, dtype=bool)
        # every part, however many: a leak that no product sees would make the union wrong
        every = np.arange(self.parts)
        shares = np.array_split(every, -(-self.parts // self._at_once))
        seeing = "exact zeros in products with random tangents on each part alone"
        tangents, products = [], []
        for some in shares:
            drawn, found = self._on_parts(some)
            for part, tangent, product in zip(some.tolist(), drawn, found, strict=True):
                tangents.append(tangent.narrow(self.axis, part, 1).clone())
                products.append(product.narrow(self.axis, part, 1).clone())
                reach[:, part] |= self._parts_of(product[None])[0] != 0
        if positions is not None and not self._same(positions, tangents, products):
            positions = None  # the graph lacks something of J
        for some in shares:
            reach[some] |= self._sizes(self.jacobian.vjp, every[None] == some[:, None]) != 0
        members = _ordered(reach)
        alone = sum(len(m) == 1 for m in members)
        way = "each at its position alone" if positions is not None and alone else "by products of the whole"
        reason = f"{len(members)} components along axis {self.axis} ({seeing}), {way}"
        return Components(
            self.jacobian, self.axis, members, torch.stack(tangents), torch.stack(products), reason, positions
        )

    def _positions(self) -> Positions | None:
        if self.graph is None:
            return None
        try:
            found = Positions(self.graph, self.jacobian.x, self.axis)
            for at in sorted({0, self.parts // 2, self.parts - 1}):
                value = found.function(at)(self.jacobian.x.narrow(self.axis, at, 1))
                true = self.jacobian.value.narrow(self.axis, at, 1)
                if value.shape != true.shape:
                    return None
            return found
        except torch.OutOfMemoryError:
            raise
        except (UnknownError, RuntimeError, ValueError, TypeError, IndexError, KeyError, StopIteration):
            return None  # costs time, never the result

    def _same(self, positions: Positions, tangents: list[Tensor], products: list[Tensor]) -> bool:
        """Whether positions alone have the derivatives that J has there."""
        try:
            for part, (tangent, product) in enumerate(zip(tangents, products, strict=True)):
                z = self.jacobian.x.narrow(self.axis, part, 1)
                with differentiable_kernels():
                    found = torch.func.jvp(positions.function(part), (z,), (tangent,))[1]
                if not relative_difference(found, product) <= PROBE_TOLERANCE[z.dtype]:
                    return False
            return True
        except torch.OutOfMemoryError:
            raise
        except (UnknownError, RuntimeError, ValueError):
            return False

    @property
    def _at_once(self) -> int:
        return max(1, min(self.parts, NUMBERS_AT_ONCE // self.jacobian.n))

    def _on_parts(self, parts: np.ndarray) -> tuple[Tensor, Tensor]:
        """Random tangents on one part each, and J's products with them, both of (parts, the shape of x)."""
        tangents = self._masked(np.arange(self.parts)[None] == parts[:, None])
        return tangents, self.jacobian.jvp(tangents.reshape(len(parts), -1)).reshape(tangents.shape)

    def _sizes(self, product: Callable[[Tensor], Tensor], inside: np.ndarray) -> np.ndarray:
        """(c, parts) to (c, parts): the largest of each part of a product with random numbers on the parts inside."""
        rows = self._masked(inside)
        return self._parts_of(product(rows.reshape(len(rows), -1)).reshape(rows.shape))

    def _masked(self, inside: np.ndarray) -> Tensor:
        x = self.jacobian.x
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype).to(x.device)
        shape = [len(inside)] + [1] * x.ndim
        shape[self.axis + 1] = self.parts
        return drawn * torch.from_numpy(inside).to(x).reshape(shape)

    def _parts_of(self, products: Tensor) -> np.ndarray:
        """(c, ...) to (c, parts), the largest of each part; what is not finite counts as not zero."""
        moved = products.movedim(self.axis + 1, 1).reshape(len(products), self.parts, -1)
        return moved.abs().amax(dim=2).nan_to_num(nan=torch.inf).cpu().double().numpy()


def _ordered(reach: np.ndarray) -> tuple[np.ndarray, ...]:
    """The strongly connected components of a graph, by its (parts, parts) matrix, in the order of dependence."""
    count, labels = connected_components(csr_array(reach), connection="strong")
    between = np.zeros((count, count), dtype=bool)
    rows, columns = np.nonzero(reach)
    between[labels[rows], labels[columns]] = True
    np.fill_diagonal(between, False)
    # those that depend on nothing that is not yet there come first; of these, by their first part
    first = np.array([np.flatnonzero(labels == c)[0] for c in range(count)])
    order: list[int] = []
    waiting = between.sum(axis=1)
    left = set(range(count))
    while left:
        ready = min((c for c in left if waiting[c] == 0), key=lambda c: first[c])
        order.append(ready)
        left.remove(ready)
        waiting -= between[:, ready]
    return tuple(np.flatnonzero(labels == c) for c in order)
