"""A traced function at one position of a sequence: what a token's output is as a function of that token alone.

The graph is walked with one position of one axis in motion, and all else at the point. Operations that work position
by position are computed there alone. A product of matrices that sums over positions, as attention does over keys and
values, takes the other positions from the point: its part in motion is a product with one row. So a token's diagonal
block of J costs what a token costs, not what the sequence does.

A position after the moved one is taken as if it did not move. That is true of what reaches the output at the moved
position only where J is block triangular along the axis, and an operation may be misread; so whoever uses the result
compares it with products of the whole function (`stiffcore.jacobian.components`).
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx

from stiffcore.jacobian.graph import POINTWISE, FunctionGraph, name_of, writes
from stiffcore.jacobian.linearise import differentiable_kernels

NUMBERWISE = POINTWISE | frozenset(
    {"pow", "rsqrt", "reciprocal", "log", "log1p", "expm1", "sign", "tan", "sinh", "cosh", "square", "logical_not"}
    | {"gt", "lt", "ge", "le", "eq", "ne", "logical_and", "logical_or", "bitwise_and", "bitwise_or", "bitwise_not"}
    | {"masked_fill", "detach", "_to_copy", "clone", "alias", "lift_fresh", "contiguous", "log_sigmoid", "isnan"}
)
VIEWS = frozenset({"view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"})
# Those of one tensor along dimensions that the moved axis must not be among; where the dimensions stand, and whether
# the result keeps them.
ALONG = {"_softmax": 1, "_safe_softmax": 1, "softmax": 1, "_log_softmax": 1, "cumsum": 1, "flip": 1}
REDUCED = {"sum": 1, "mean": 1, "amax": 1, "amin": 1, "var": 1, "std": 1, "logsumexp": 1, "linalg_vector_norm": 2}
# Values of more numbers than so many times those of the input are kept only where a position needs them.
SMALL = 4


class UnknownError(Exception):
    """An operation is not known to work position by position."""


@dataclass
class Moved:
    """A node's value while one position moves.

    Attributes:
        axis: the axis that the position lies on; None: the whole value moves.
        at: the position.
        compute: the value at the position (of size 1 along the axis), or the whole one.
    """

    axis: int | None
    at: int
    compute: Callable[[], Any]

    @cached_property
    def value(self) -> Any:
        """What `compute` gives, computed where it is needed, once."""
        return self.compute()


class Positions:
    """The functions of single positions along one axis of a traced function of one tensor."""

    def __init__(self, graph: FunctionGraph, x: Tensor, axis: int) -> None:
        """Evaluate the graph once.

        Args:
            graph: of a function from a tensor to one of the same shape.
            x: the point.
            axis: of the positions.
        """
        self._graph, self._x, self._axis = graph, x, axis
        self._nodes = list(graph.module.graph.nodes)
        for node in self._nodes:  # norms are made of such; what they write to is read by nobody else
            if writes(node) and len(node.args[0].users) > 1:
                raise UnknownError(f"{node.target} writes to what is read elsewhere")
        self._asked: set[fx.Node] = set()
        self._point: dict[fx.Node, Any] = {}
        self._shapes: dict[fx.Node, tuple[int, ...]] = {}
        self._evaluate()
        # a position in the middle meets all kinds of operations: its demands are those of the others
        self.function(x.shape[axis] // 2)(x.narrow(axis, x.shape[axis] // 2, 1))
        self._forget()

    def function(self, at: int) -> Callable[[Tensor], Tensor]:
        """From the input at a position (of size 1 along the axis) to the output there.

        Raises:
            UnknownError: when it is called, where an operation is not known.
        """

        def function(z: Tensor) -> Tensor:
            known: dict[fx.Node, Any] = {self._graph.input: Moved(self._axis, at, lambda: z)}
            for node in self._nodes:
                if node in self._graph.dependent and node not in known and node.op == "call_function":
                    known[node] = self._moved(node, known)
            found = known.get(self._graph.output)
            if not isinstance(found, Moved) or found.axis != self._axis or found.at != at:
                raise UnknownError("the output does not move at the input's position alone")
            return found.value

        return function

    @property
    def held_bytes(self) -> int:
        """Bytes of the values at the point that are kept."""
        kept = [v for node, v in self._point.items() if isinstance(v, Tensor) and node.op != "get_attr"]
        return sum(v.numel() * v.element_size() for v in kept)

    def _evaluate(self) -> None:
        kept, shapes = self._point, self._shapes

        class Keep(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                value = super().run_node(n)
                kept[n] = value
                if isinstance(value, Tensor):
                    shapes[n] = tuple(value.shape)
                return value

            def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
                return super().call_function(_functional(target), args, kwargs)

        with differentiable_kernels():
            Keep(self._graph.module).run(self._x.clone())

    def _forget(self) -> None:
        most = SMALL * self._x.numel()
        for node, value in list(self._point.items()):
            large = isinstance(value, Tensor) and value.numel() > most and node in self._graph.dependent
            if (large and node not in self._asked) or (isinstance(value, (tuple, list))):
                del self._point[node]

    def _of_point(self, node: fx.Node) -> Any:
        """A node's value at the point."""
        self._asked.add(node)
        if node not in self._point:
            self._evaluate()
            self._forget()
        return self._point[node]

    def _moved(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        """What becomes of a node: `Moved`, a tuple with such in it, or None where it does not move."""
        if node.target is operator.getitem:
            source = known.get(node.all_input_nodes[0])
            if source is None:
                return None
            if isinstance(source, Moved):  # of an operation that returns several tensors
                return Moved(source.axis, source.at, lambda: source.value[node.args[1]])
            return source[node.args[1]]
        moving = [a for a in node.all_input_nodes if isinstance(known.get(a), Moved)]
        if any(isinstance(known.get(a), tuple) for a in node.all_input_nodes):
            raise UnknownError(f"{node.target} takes several tensors")
        if not moving:
            return None
        call = _Call(self, node, known)
        joins = call.name in ("cat", "stack")
        if not joins and all(known[a].axis is None for a in moving):
            return Moved(None, known[moving[0]].at, lambda: call.run(lambda a: call.whole(a)))
        return call.result()


class _Call:
    """One operation with something in motion."""

    def __init__(self, positions: Positions, node: fx.Node, known: dict[fx.Node, Any]) -> None:
        self.positions, self.node, self.known = positions, node, known
        self.args: Any = node.args
        self.name = name_of(node).removesuffix("_") if writes(node) else name_of(node)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return self.positions._shapes[node]

    def state(self, arg: Any) -> Moved | None:
        found = self.known.get(arg) if isinstance(arg, fx.Node) else None
        return found if isinstance(found, Moved) else None

    def fixed(self, node: fx.Node) -> Tensor:
        return self.positions._of_point(node)

    def whole(self, node: fx.Node) -> Any:
        """All of a value that moves as a whole or not at all."""
        state = self.state(node)
        return self.fixed(node) if state is None else state.value

    def run(self, value: Callable[[fx.Node], Any], *changed: Any) -> Any:
        """The operation on other values, or on other arguments (those given replace the first ones)."""
        args = fx.node.map_arg((*changed, *self.args[len(changed) :]), value)
        kwargs = fx.node.map_arg(self.node.kwargs, value)
        target: Any = torch.ops.aten.reshape.default if self.name == "view" else _functional(self.node.target)
        return target(*args, **kwargs)

    def result(self) -> Any:
        name = self.name
        if name in NUMBERWISE:
            return self._numberwise()
        if name in VIEWS:
            return self._view()
        rules: dict[str, Callable[[], Any]] = {
            "mm": lambda: self._product(self.args[0], self.args[1]),
            "bmm": lambda: self._product(self.args[0], self.args[1]),
            "addmm": self._addmm,
            "permute": self._permute,
            "transpose": self._transpose,
            "t": self._transpose,
            "expand": self._expand,
            "slice": self._slice,
            "select": self._select,
            "split": self._split,
            "split_with_sizes": self._split,
            "unbind": self._unbind,
            "cat": self._cat,
            "stack": self._stack,
            "native_layer_norm": self._norm,
            "_fused_rms_norm": self._norm,
            "rms_norm": self._norm,
            "constant_pad_nd": self._pad,
            "convolution": self._convolution,
            "view_as_complex": self._same,
            "view_as_real": self._same,
        }
        if name in ALONG:
            return self._along(self._dims(self.args[ALONG[name]]), keep=True)
        if name in REDUCED:
            at = REDUCED[name]
            dims = self.args[at] if len(self.args) > at else None
            keep = bool(self.args[at + 1]) if len(self.args) > at + 1 and name != "var" else False
            return self._along(self._dims(dims), keep=bool(self.node.kwargs.get("keepdim", keep)))
        if name not in rules:
            raise UnknownError(f"{name or self.node.target} is not known to work position by position")
        return rules[name]()

    def _source(self) -> tuple[fx.Node, Any]:
        """The first argument and its state, where it alone moves, along an axis."""
        node = self.args[0]
        state = self.state(node)
        moving = [a for a in self.node.all_input_nodes if self.state(a) is not None]
        if not isinstance(node, fx.Node) or state is None or state.axis is None or moving != [node]:
            raise UnknownError(f"{self.name} of several tensors in motion")
        return node, state

    def _dims(self, dims: Any) -> list[int]:
        rank = len(self.shape(self.args[0]))
        listed = list(range(rank)) if dims is None else [dims] if isinstance(dims, int) else list(dims)
        return [d % rank for d in (listed or range(rank))]

    def _numberwise(self) -> Moved:
        nodes = self.node.all_input_nodes
        states = [(a, s) for a in nodes if (s := self.state(a)) is not None and s.axis is not None]
        # an axis is told from the right, as broadcasting has it
        places = {(len(self.shape(a)) - s.axis, s.at) for a, s in states if s.axis is not None}
        if len(places) != 1:
            raise UnknownError(f"{self.name} of two axes in motion")
        right, at = places.pop()
        size = self.shape(states[0][0])[-right]

        def value(a: fx.Node) -> Any:
            state = self.state(a)
            if state is not None and state.axis is not None:
                return state.value
            found = self.whole(a)
            if isinstance(found, Tensor) and found.ndim >= right and found.shape[-right] == size:
                return found.narrow(found.ndim - right, at, 1)
            return found

        rank = len(self.shape(self.node))
        return Moved(rank - right, at, lambda: self.run(value))

    def _view(self) -> Moved:
        source, state = self._source()
        before, after = self.shape(source), self.shape(self.node)
        ahead, size = math.prod(before[: state.axis]), before[state.axis]
        for axis, found in enumerate(after):
            if found == size and math.prod(after[:axis]) == ahead:
                return Moved(axis, state.at, _reshaped(state, (*after[:axis], 1, *after[axis + 1 :])))
        raise UnknownError("a view mixes positions with something else")

    def _same(self) -> Moved:
        source, state = self._source()
        if state.axis == len(self.shape(source)) - 1:
            raise UnknownError(f"{self.name} along the positions")
        return Moved(state.axis, state.at, lambda: self.run(lambda a: state.value))

    def _along(self, dims: list[int], keep: bool) -> Moved:
        _, state = self._source()
        if state.axis in dims:
            raise UnknownError(f"{self.name} along the positions")
        axis = state.axis - (0 if keep else sum(d < state.axis for d in dims))
        return Moved(axis, state.at, lambda: self.run(lambda a: state.value if a is self.args[0] else self.fixed(a)))

    def _norm(self) -> Moved:
        source, state = self._source()
        sizes: Any = self.args[1]
        if state.axis >= len(self.shape(source)) - len(sizes):
            raise UnknownError(f"{self.name} over the positions")
        return Moved(state.axis, state.at, lambda: self.run(lambda a: state.value if a is source else self.fixed(a)))

    def _permute(self) -> Moved:
        _, state = self._source()
        order = self._dims(self.args[1])
        return Moved(order.index(state.axis), state.at, lambda: self.run(lambda a: state.value))

    def _transpose(self) -> Moved:
        _, state = self._source()
        first, second = self._dims([0, 1] if self.name == "t" else self.args[1:3])
        axis = {first: second, second: first}.get(state.axis, state.axis)
        return Moved(axis, state.at, lambda: self.run(lambda a: state.value))

    def _expand(self) -> Moved:
        source, state = self._source()
        after = self.shape(self.node)
        axis = len(after) - len(self.shape(source)) + state.axis
        shape = (*after[:axis], 1, *after[axis + 1 :])
        return Moved(axis, state.at, lambda: state.value.expand(shape))

    def _slice(self) -> Moved | None:
        source, state = self._source()
        given: tuple[Any, ...] = tuple(self.args[1:])
        dim, start, end, step = given + (0, None, None, 1)[len(given) :]
        if self._dims(dim) != [state.axis]:
            return Moved(state.axis, state.at, lambda: self.run(lambda a: state.value))
        size = self.shape(source)[state.axis]
        read = range(size)[slice(start, end, step)]
        return Moved(state.axis, read.index(state.at), lambda: state.value) if state.at in read else None

    def _select(self) -> Moved | None:
        source, state = self._source()
        dim, index = self._dims(self.args[1])[0], self.args[2]
        if dim != state.axis:
            axis = state.axis - (dim < state.axis)
            return Moved(axis, state.at, lambda: self.run(lambda a: state.value))
        if index % self.shape(source)[dim] != state.at:
            return None
        return Moved(None, state.at, lambda: state.value.select(dim, 0))

    def _split(self) -> tuple[Moved | None, ...]:
        source, state = self._source()
        dim = self._dims(self.args[2] if len(self.args) > 2 else 0)[0]
        size, wanted = self.shape(source)[dim], self.args[1]
        sizes: Any = wanted
        if isinstance(wanted, int):
            sizes = [min(wanted, size - at) for at in range(0, size, wanted)]
        found: list[Moved | None] = []
        at = 0
        for piece in sizes:
            if dim != state.axis:
                found.append(Moved(state.axis, state.at, _narrowed(state, dim, at, piece)))
            else:
                inside = at <= state.at < at + piece
                found.append(Moved(dim, state.at - at, lambda: state.value) if inside else None)
            at += piece
        return tuple(found)

    def _unbind(self) -> tuple[Moved | None, ...]:
        source, state = self._source()
        dim = self._dims(self.args[1] if len(self.args) > 1 else 0)[0]
        count, axis = self.shape(source)[dim], state.axis - (dim < state.axis)
        if dim != state.axis:
            return tuple(Moved(axis, state.at, _selected(state, dim, i)) for i in range(count))
        return tuple(Moved(None, i, _selected(state, dim, 0)) if i == state.at else None for i in range(count))

    def _cat(self) -> Moved:
        pieces: Any = self.args[0]
        dim = (self.args[1] if len(self.args) > 1 else 0) % len(self.shape(self.node))
        first = next(a for a in pieces if self.state(a) is not None)
        state: Any = self.state(first)
        if state.axis in (dim, None):
            return self._joined(pieces, dim)
        size = self.shape(first)[state.axis]

        def value(a: fx.Node) -> Tensor:
            found = self.state(a)
            if found is not None and (found.axis, found.at) != (state.axis, state.at):
                raise UnknownError("cat of different positions in motion")
            if found is not None:
                return found.value
            fixed = self.fixed(a)
            if fixed.shape[state.axis] != size:
                raise UnknownError("cat of different lengths")
            return fixed.narrow(state.axis, state.at, 1)

        return Moved(state.axis, state.at, lambda: self.run(value))

    def _joined(self, pieces: Sequence[fx.Node], dim: int) -> Moved:
        """Pieces one after the other along the positions: the first one that moves is where the output moves first."""
        offset = 0
        for piece in pieces:
            state = self.state(piece)
            if state is not None:
                if state.axis == dim or (state.axis is None and self.shape(piece)[dim] == 1):
                    return Moved(
                        dim, offset + (0 if state.axis is None else state.at), partial(getattr, state, "value")
                    )
                raise UnknownError("cat of something that moves as a whole")
            offset += self.shape(piece)[dim]
        raise UnknownError("cat of nothing that moves")

    def _stack(self) -> Moved:
        pieces: Any = self.args[0]
        dim = (self.args[1] if len(self.args) > 1 else 0) % len(self.shape(self.node))
        at = next(i for i, a in enumerate(pieces) if self.state(a) is not None)
        state = self.state(pieces[at])
        assert state is not None
        if state.axis is not None:
            raise UnknownError("stack of tensors with an axis of positions")
        return Moved(dim, at, lambda: state.value.unsqueeze(dim))

    def _pad(self) -> Moved:
        source, state = self._source()
        pads: Any = self.args[1]
        rank = len(self.shape(source))
        place = 2 * (rank - 1 - state.axis)
        if place >= len(pads):
            return Moved(state.axis, state.at, lambda: self.run(lambda a: state.value))
        if any(p for i, p in enumerate(pads) if i not in (place, place + 1)):
            raise UnknownError("a padding of positions and channels")
        return Moved(state.axis, state.at + pads[place], lambda: state.value)

    def _convolution(self) -> Moved:
        source, state = self._source()
        weight: Any = self.args[1]
        stride, padding, dilation, transposed = self.args[3:7]
        shape = self.shape(source)
        if state.axis != 2 or len(shape) != 3 or transposed or stride[0] != 1:
            raise UnknownError("a convolution along other than one axis of positions, or with strides")
        taps, gap = self.shape(weight)[2], dilation[0]
        # the first output that this position reaches
        at = state.at + padding[0] - gap * (taps - 1)
        if not 0 <= at < self.shape(self.node)[2]:
            raise UnknownError("a convolution that looks ahead")

        def compute() -> Tensor:
            fixed, read = self.fixed(source), [state.at - gap * (taps - 1 - i) for i in range(taps - 1)]
            columns = [fixed.narrow(2, j, 1) if j >= 0 else torch.zeros_like(fixed[:, :, :1]) for j in read]
            window = torch.cat([*columns, state.value], dim=2)
            bias = None if self.args[2] is None else self.fixed(self.args[2])
            return torch.nn.functional.conv1d(window, self.fixed(weight), bias, groups=self.args[8])

        return Moved(2, at, compute)

    def _addmm(self) -> Moved:
        if self.node.kwargs or self.state(self.args[0]) is not None:
            raise UnknownError("addmm with a term in motion")
        found = self._product(self.args[1], self.args[2])
        bias = self.fixed(self.args[0])
        axis = bias.ndim - 2 + int(found.axis or 0)
        if axis >= 0 and bias.shape[axis] > 1:
            bias = bias.narrow(axis, found.at, 1)
        return Moved(found.axis, found.at, lambda: found.value + bias)

    def _product(self, a: Any, b: Any) -> Moved:
        """a @ b, with rows, columns, the summed axis, or matrices of a batch in motion."""
        left: Any = self.state(a)
        right: Any = self.state(b)
        for state in (left, right):
            if state is not None and state.axis is None:
                raise UnknownError("a product with something that moves as a whole")
        rank = len(self.shape(a))
        rows, columns = rank - 2, rank - 1  # of a: rows and what is summed; of b: what is summed, and columns
        at = left.at if left is not None else right.at if right is not None else 0
        if left is not None and right is not None and left.at != right.at:
            raise UnknownError("a product of different positions")
        axes = (left and left.axis, right and right.axis)
        if rank == 3 and 0 in axes:
            if any(axis not in (0, None) for axis in axes):
                raise UnknownError("a product of a batch in motion")
            return Moved(0, at, lambda: torch.bmm(self._at(a, left, 0, at), self._at(b, right, 0, at)))
        if axes == (rows, None):
            return Moved(rows, at, lambda: left.value @ self.fixed(b))
        if axes == (None, columns):
            return Moved(columns, at, lambda: self.fixed(a) @ right.value)
        if axes == (rows, columns):
            return Moved(rows, at, lambda: self._across(left.value, b, right))
        square = self.shape(a)[rows] == self.shape(a)[columns]
        if axes == (rows, rows) or (axes == (None, rows) and square):
            return Moved(rows, at, lambda: self._summed(self._at(a, left, rows, at), b, right))
        if axes == (columns, columns) and right is not None:
            mirrored = self.shape(b)[rows] == self.shape(b)[columns]
            if mirrored:
                return Moved(columns, at, lambda: self._summed_left(a, left, right.value))
        raise UnknownError("a product that sums over positions")

    def _at(self, node: fx.Node, state: Moved | None, axis: int, at: int) -> Tensor:
        return self.fixed(node).narrow(axis, at, 1) if state is None else state.value

    def _across(self, row: Tensor, b: fx.Node, moved: Moved | None) -> Tensor:
        """A row times all columns, one of which moves: scores of one query."""
        assert moved is not None
        fixed, at = self.fixed(b), moved.at
        before, after = row @ fixed[..., :at], row @ fixed[..., at + 1 :]
        return torch.cat([before, row @ moved.value, after], dim=-1)

    def _summed(self, row: Tensor, b: fx.Node, moved: Moved | None) -> Tensor:
        """A row times all rows, one of which moves: what one query reads of the values."""
        assert moved is not None
        fixed, at = self.fixed(b), moved.at
        before, after = row[..., :at] @ fixed[..., :at, :], row[..., at + 1 :] @ fixed[..., at + 1 :, :]
        return before + row[..., at : at + 1] @ moved.value + after

    def _summed_left(self, a: fx.Node, moved: Moved | None, column: Tensor) -> Tensor:
        assert moved is not None
        fixed, at = self.fixed(a), moved.at
        before, after = fixed[..., :at] @ column[..., :at, :], fixed[..., at + 1 :] @ column[..., at + 1 :, :]
        return before + moved.value @ column[..., at : at + 1, :] + after


def _functional(target: Any) -> Any:
    """The operation that returns what this one writes."""
    schema = getattr(target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return target
    name = target.overloadpacket.__name__
    if not name.endswith("_"):
        raise UnknownError(f"{target} writes")
    return getattr(torch.ops.aten, name.removesuffix("_"))


def _reshaped(state: Moved, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    return lambda: state.value.reshape(shape)


def _narrowed(state: Moved, dim: int, start: int, length: int) -> Callable[[], Tensor]:
    return lambda: state.value.narrow(dim, start, length)


def _selected(state: Moved, dim: int, index: int) -> Callable[[], Tensor]:
    return lambda: state.value.select(dim, index)
