"""The graph of a function at a point: its residual sum, its waists, and the functions between its nodes.

The function is traced once, at the point itself, into ATen operations (`make_fx` with functionalisation), so
that hand-written control flow, in-place activations and third-party blocks all look alike. Numbers that python takes
out of tensors on the way (`float(x.sum()) > 0`) become constants. What a function hides from autograd (`detach`) is
lost in the graph: whoever uses it compares it with the function's own derivative.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from stiffcore.jacobian.colouring import Map, Pair, Reach
from stiffcore.jacobian.kernels import convolution_by_products, products_items, use_products
from stiffcore.jacobian.linearise import Function, differentiable_kernels

# Operations whose Jacobian is diagonal, of one tensor (other arguments are numbers).
ELEMENTWISE = frozenset(
    {"relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "threshold", "leaky_relu", "elu", "celu", "selu"}
    | {"gelu", "silu", "sigmoid", "tanh", "softplus", "softsign", "hardsigmoid", "hardswish", "mish"}
    | {"erf", "exp", "abs", "neg", "sqrt", "sin", "cos", "atan"}
)
# Operations that keep the numbers and their row-major order.
IDENTITY = frozenset(
    {"alias", "clone", "view", "_unsafe_view", "reshape", "lift_fresh", "_to_copy", "contiguous"}
    | {"flatten", "unflatten", "squeeze", "unsqueeze"}
)
# Operations of one tensor or several that work number by number, where their shapes agree.
POINTWISE = ELEMENTWISE | {"add", "sub", "rsub", "mul", "div", "maximum", "minimum", "where", "_prelu_kernel"}


@dataclass(frozen=True)
class Waist:
    """An interior node that every path from the input to the branch's end passes through.

    Attributes:
        node: the node in the graph.
        active: (k,) int64, its units whose own derivative is not zero, ordered by position, then channel.
        size: all its units.
    """

    node: fx.Node
    active: Tensor
    size: int


class FunctionGraph:
    """The traced graph of `f` at `x`."""

    def __init__(self, f: Function, x: Tensor) -> None:
        """Trace `f`.

        Args:
            f: takes and returns one tensor.
            x: the point it is traced at.

        Raises:
            Exception: whatever tracing raises; the caller goes on without a graph.
        """
        # without cuDNN the operations are the same ones on a device as on the host
        with differentiable_kernels(), torch.backends.cudnn.flags(enabled=False):
            try:
                # of one argument: make_fx would ask for those that f has defaults for
                self.module = _traced(torch.func.functionalize(lambda v: f(v)), x)
            except (
                Exception
            ):  # functions of the old style cannot be functionalised: unless they write, they need not be
                self.module = _traced(lambda v: f(v), x)
                if any(writes(node) for node in self.module.graph.nodes):
                    raise
        nodes = list(self.module.graph.nodes)
        self.input = next(n for n in nodes if n.op == "placeholder")
        result = nodes[-1].args[0]
        self.output = result[0] if isinstance(result, (tuple, list)) else result
        self._point = x
        for node in nodes:  # the traced values are not needed, and hold memory
            value = node.meta.get("val")
            node.meta = {"shape": _shape(value)}
            if isinstance(value, Tensor) and value.is_complex():
                node.meta["complex_items"] = 2 * value.numel()

    @cached_property
    def kernel_items(self) -> int:
        """Numbers in the largest constant: products copy, transpose and pack such a kernel, whatever the chunk."""
        shapes = [n.meta["shape"] for n in self.module.graph.nodes if n.op == "get_attr" and _is_tensor(n)]
        return max((math.prod(shape) for shape in shapes), default=0)

    @cached_property
    def dependent(self) -> frozenset[fx.Node]:
        """The nodes that depend on the input."""
        found = {self.input}
        for node in self.module.graph.nodes:
            if any(a in found for a in node.all_input_nodes):
                found.add(node)
        return frozenset(found)

    def between(self, start: fx.Node, ends: Sequence[fx.Node], *, fast: bool = True) -> fx.GraphModule:
        """The function from the value of `start` to the sum of the values of `ends`, sharing all parameters.

        Args:
            start: the node whose value it takes.
            ends: the nodes whose values it adds.
            fast: take convolutions of small maps as products; not for what will be traced again, since these are then
                no convolutions any more.

        Raises:
            ValueError: where an end depends on the input by another way than `start`.
        """
        needed: set[fx.Node] = set()
        stack = list(ends)
        while stack:
            node = stack.pop()
            if node in needed or node is start:
                continue
            needed.add(node)
            stack.extend(node.all_input_nodes)
        if self.input in needed:
            raise ValueError(f"{start} does not dominate {list(ends)}")
        graph = fx.Graph()
        copies = {start: graph.placeholder("start")}
        for node in self.module.graph.nodes:
            if node in needed:
                copies[node] = graph.node_copy(node, lambda n: copies[n])
                copies[node].meta = dict(node.meta)
                if name_of(node) in ("view", "_unsafe_view"):  # a product's strides need not be those of the trace
                    copies[node].target = torch.ops.aten.reshape.default
                if fast and name_of(node) == "convolution" and self._point.device.type == "cpu":
                    use_products(copies[node])
        copies[start].meta = dict(start.meta)
        total = copies[ends[0]]
        for end in ends[1:]:
            total = graph.call_function(torch.ops.aten.add.Tensor, (total, copies[end]))
            total.meta = dict(end.meta)
        graph.output(total)
        return fx.GraphModule(self.module, graph)

    def values(self, nodes: Sequence[fx.Node]) -> dict[fx.Node, Tensor]:
        """The values of some nodes at the point, from one evaluation."""
        wanted = set(nodes)
        kept: dict[fx.Node, Tensor] = {}

        class Keep(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                value = super().run_node(n)
                if n in wanted:
                    kept[n] = value
                return value

        with differentiable_kernels():
            Keep(self.module).run(self._point.clone())
        return kept

    def activation_start(self, end: fx.Node) -> fx.Node:
        """The node before the chain of elementwise operations that ends in `end` (`end` where there is none)."""
        node = end
        while name_of(node) in ELEMENTWISE | IDENTITY and _single_tensor(node):
            node = node.all_input_nodes[0]
        return node

    def residual_sum(self, end: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
        """The terms of the sum at `end`: those that are the input itself, and the others; nested sums are opened."""
        identity: list[fx.Node] = []
        others: list[fx.Node] = []
        stack = [end]
        while stack:
            node = stack.pop()
            terms = self._terms(node)
            if terms:
                stack.extend(reversed(terms))
            elif node in self.dependent:
                (identity if self._is_input(node) else others).append(node)
        return identity, others

    def _terms(self, node: fx.Node) -> list[fx.Node]:
        if name_of(node) != "add" or node.kwargs.get("alpha", 1) != 1:
            return []
        terms = [a for a in node.args[:2] if isinstance(a, fx.Node)]
        same = all(t.meta.get("shape") == node.meta.get("shape") for t in terms)
        return terms if len(terms) == 2 and same and all(t in self.dependent for t in terms) else []

    def _is_input(self, node: fx.Node) -> bool:
        while node is not self.input and name_of(node) in IDENTITY and _single_tensor(node):
            node = node.all_input_nodes[0]
        return node is self.input

    def depth(self, node: fx.Node) -> int:
        """How many dependent nodes lie above `node`: the residual path is the deeper side of its sum."""
        seen: set[fx.Node] = set()
        stack = [node]
        while stack:
            current = stack.pop()
            if current in self.dependent and current not in seen:
                seen.add(current)
                stack.extend(current.all_input_nodes)
        return len(seen)

    def waists(self, ends: Sequence[fx.Node]) -> list[Waist]:
        """The waists between the input and the sum of `ends`, smallest first.

        A node is one where removing it leaves no path from the input to any end (a dominator of the ends).
        """
        candidates = [n for n in self.dependent if n is not self.input and _is_tensor(n) and n not in ends]
        found = [n for n in candidates if not self._reaches(ends, without=n)]
        diagonal = [n for n in found if name_of(n) in ELEMENTWISE and _single_tensor(n)]
        before = self.values([n.all_input_nodes[0] for n in diagonal])
        waists = []
        for node in found:
            size = math.prod(node.meta["shape"])
            if node in diagonal:
                slope = _slope(node, before[node.all_input_nodes[0]]).reshape(-1)
                active = torch.nonzero(slope).reshape(-1)
            else:
                active = torch.arange(size)
            waists.append(Waist(node, by_position(active.cpu(), node.meta["shape"]), size))
        order = {node: i for i, node in enumerate(self.module.graph.nodes)}
        return sorted(waists, key=lambda w: (len(w.active), order[w.node]))

    def _reaches(self, ends: Sequence[fx.Node], without: fx.Node) -> bool:
        seen: set[fx.Node] = set()
        stack = list(ends)
        while stack:
            node = stack.pop()
            if node is self.input:
                return True
            if node is not without and node in self.dependent and node not in seen:
                seen.add(node)
                stack.extend(node.all_input_nodes)
        return False


def _traced(f: Function, x: Tensor) -> fx.GraphModule:
    return make_fx(f, tracing_mode="real", _error_on_data_dependent_ops=False)(x.clone())


def writes(node: fx.Node) -> bool:
    """Whether an operation changes a tensor that it was given."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def by_position(index: Tensor, shape: Sequence[int]) -> Tensor:
    """Order flat indices of a (1, C, H, W) tensor by (y, x, channel), so that local operators are banded.

    Args:
        index: (k,) int64, ascending.
        shape: of the tensor they index; other than four axes, the order stays.

    Returns:
        (k,) int64, a permutation of `index`.
    """
    if len(shape) != 4 or shape[0] != 1:
        return index
    plane = shape[2] * shape[3]
    return index[torch.argsort((index % plane) * shape[1] + index // plane)]


def live_items(module: fx.GraphModule) -> int:
    """The most numbers alive at once while `module` runs, the unfolded input of convolutions included.

    Every node's tensor lives from its creation to its last use. Kernels of more than one tap on the CPU unfold
    their input into C_in * kh * kw * H_out * W_out numbers (slow_conv2d, the only float64 path).

    Args:
        module: from `FunctionGraph.between`; its dependent nodes know their shapes.

    Returns:
        A count of numbers for one tangent.
    """
    nodes = list(module.graph.nodes)
    moving = set()
    for node in nodes:
        if node.op == "placeholder" or any(a in moving for a in node.all_input_nodes):
            moving.add(node)
    last = {a: i for i, n in enumerate(nodes) for a in n.all_input_nodes}
    live, peak = 0, 0
    for i, node in enumerate(nodes):
        if node not in moving or node.op == "output":
            continue
        size = _items(node)
        peak = max(peak, live + size + _unfolded_items(node))
        live += size
        for a in {a for a in node.all_input_nodes if a in moving and last[a] == i}:
            live -= _items(a)
    return peak


def reach_of(module: fx.GraphModule) -> Reach | None:
    """Which positions of its result a position of its input can influence, for a function of one feature map.

    Known are convolutions, pooling windows, paddings by constants, batch norm in eval mode, and what works number by
    number; a global pool, a norm over positions, attention and everything else has none.

    Args:
        module: from `FunctionGraph.between`; its dependent nodes know their shapes.

    Returns:
        The reach; its maps have the input's and the result's row-major order. None where it is not known, or the
        input is no (1, C, H, W) map.
    """
    # a tensor may be a view of the map that its reach ends in, with the same numbers in the same order
    known: dict[fx.Node, Reach] = {}
    moving: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "output":
            return known.get(node.all_input_nodes[0])
        if node.op == "placeholder":
            if (shape := _map_shape(node)) is None:
                return None
            known[node] = Reach.identity(shape)
        elif not any(a in moving for a in node.all_input_nodes):
            continue
        elif _is_tensor(node):
            if (found := _reach(node, known, moving)) is None:
                return None
            known[node] = found
        moving.add(node)
    return None


def _reach(node: fx.Node, known: dict[fx.Node, Reach], moving: set[fx.Node]) -> Reach | None:
    """The reach into `node` from the reaches into its arguments."""
    call: Any = node.args[0] if is_first_item(node) else node
    sources = [a for a in call.all_input_nodes if a in moving]
    if not sources or any(a not in known for a in sources):
        return None
    first, name, shape = known[sources[0]], name_of(call), _map_shape(node)
    if name in POINTWISE:
        return _united(node, [known[a] for a in sources], sources)
    if len(sources) > 1 or sources[0] is not call.args[0]:
        return None
    if name in IDENTITY:
        return first
    # the others work on positions, so their argument must be the map itself
    if shape is None or _map_shape(sources[0]) != first.destination:
        return None
    if is_fixed_norm(call):
        return first
    if name == "constant_pad_nd":
        pads = (*call.args[1], 0, 0)  # left, right, top, bottom, then those of the channels and of the batch
        return first.window(shape, (1, 1), (1, 1), (pads[2], pads[0]), (1, 1)) if len(pads) <= 8 else None
    follow = first.transposed_window if name == "convolution" and call.args[6] else first.window
    geometry = _window(call, name)
    return follow(shape, *geometry) if geometry else None


def _united(node: fx.Node, reaches: list[Reach], sources: list[fx.Node]) -> Reach | None:
    one_shape = all(a.meta["shape"] == node.meta["shape"] for a in sources)
    if not one_shape or any(r.destination != reaches[0].destination for r in reaches):
        return None
    return reduce(Reach.union, reaches)


def _window(node: fx.Node, name: str) -> tuple[Pair, Pair, Pair, Pair] | None:
    """Kernel, stride, padding and dilation; one number in a list counts for both axes."""
    args: Any = node.args
    if node.target is convolution_by_products:
        found = [args[1].meta["shape"][2:], (1,), args[3], (1,)]
    elif name == "convolution":
        found = [args[1].meta["shape"][2:], *args[3:6]]
    elif name in ("max_pool2d_with_indices", "avg_pool2d"):
        stride = args[2] if len(args) > 2 and args[2] else args[1]
        padding = args[3] if len(args) > 3 else (0,)
        dilation = args[4] if len(args) > 4 and name != "avg_pool2d" else (1,)
        found = [args[1], stride, padding, dilation]
    else:
        return None
    pairs: Any = tuple((f[0], f[-1]) for f in found)
    return pairs


def plain_convolution(node: fx.Node) -> tuple[Pair, Pair, Pair] | None:
    """Stride, padding and dilation of a convolution that is neither transposed nor grouped; None of anything else."""
    if name_of(node) == "convolution" and (node.args[6] or node.args[8] != 1):
        return None
    if name_of(node) != "convolution" and node.target is not convolution_by_products:
        return None
    geometry = _window(node, name_of(node))
    return None if geometry is None else geometry[1:]


def is_fixed_norm(node: fx.Node) -> bool:
    """Whether it is a batch norm in eval mode, which scales each channel."""
    return name_of(node) in ("native_batch_norm", "cudnn_batch_norm") and node.args[5] is False


def is_first_item(node: fx.Node) -> bool:
    """Whether it takes the result of an operation that returns several tensors, as batch norm and max-pool do."""
    return bool(node.target is operator.getitem and node.args[1] == 0)


def _map_shape(node: fx.Node) -> Map | None:
    shape = node.meta["shape"]
    return shape[1:] if shape is not None and len(shape) == 4 and shape[0] == 1 else None


def _items(node: fx.Node) -> int:
    # a view holds no numbers of its own, and a tuple's items are counted once they are taken out
    if name_of(node) in IDENTITY - {"clone"} or not _is_tensor(node):
        return node.meta.get("complex_items", 0)
    return math.prod(node.meta["shape"])


def _unfolded_items(node: fx.Node) -> int:
    if node.target is convolution_by_products:
        return products_items(node.all_input_nodes[0].meta["shape"], node.meta["shape"], node.args[3])  # type: ignore[arg-type]
    if name_of(node) != "convolution":
        return 0
    source, weight = node.all_input_nodes[0].meta["shape"], node.all_input_nodes[1].meta["shape"]
    taps = math.prod(weight[2:])
    if taps == 1:
        return 0
    return source[1] * taps * math.prod(node.meta["shape"][2:])


def _slope(node: fx.Node, value: Tensor) -> Tensor:
    target: Callable[..., Any] = node.target  # type: ignore[assignment]

    def call(v: Tensor) -> Tensor:
        return target(v, *node.args[1:], **node.kwargs)

    with differentiable_kernels():
        return torch.func.jvp(call, (value,), (torch.ones_like(value),))[1]


def name_of(node: fx.Node) -> str:
    """The ATen operation of a node, without its overload; empty where it is none."""
    packet = getattr(node.target, "overloadpacket", None)
    return packet.__name__ if packet is not None else ""


def _single_tensor(node: fx.Node) -> bool:
    # counted with repetitions: clamp(h, h) is not a function of one tensor and numbers
    nodes = [a for a in [*node.args, *node.kwargs.values()] if isinstance(a, fx.Node)]
    return len(nodes) == len(node.all_input_nodes) == 1 and nodes[0] is node.args[0] and _is_tensor(node)


def _is_tensor(node: fx.Node) -> bool:
    return node.meta.get("shape") is not None


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) and value.is_floating_point() else None
