"""How far products with a Jacobian are from exact ones: measured on random tangents, in absolute size.

Two things are measured. *Noise*: derivatives are linear, so P(a) + P(b) - P(a + b), for a + b without rounding, is
nothing but rounding; it needs no graph, and sees cancellation and low precision inside of a function. *A twin*: the
traced graph with its numbers and its arithmetic in another precision. Against a twin in float64, a float32 run shows
its rounding in full, and a function that works in low precision inside shows what it loses. A float64 run is measured
a step below: its twin in float32 against the twin of that in float64 (with the very same weights), scaled by the ratio
of the unit roundoffs: rounding grows alike in both, by the same sums.

For a random Gaussian vector w, E|E w|^2 = |E|_F^2 >= |E|^2, and |E| <= a sqrt(2 / pi) max |E w_i| but with a
probability of a^-r, r vectors (Halko, Martinsson and Tropp 2011, lemma 4.1).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

# Random vectors, and what the root mean square of |E w| is multiplied with: all four of a matrix of rank 1 are below
# a fourth of |E| in 4 of 1,000 cases. Rounding has full rank, and |E|_F is above |E| by far.
DRAWS = 4
SAFETY = 4.0
# Numbers of E w that are looked at, at least: of a matrix of order 1, four would say little of its own rounding.
FEWEST = 64
# What two ways to a product may differ by, in their noise: below the first nothing says that they are two functions,
# above the second they are.
WITHIN, BEYOND = 16.0, 64.0
# Tangents have few binary digits, so that sums of two are exact.
GRID = 1024.0
# Products at once: no more memory than the look at a function has always taken.
AT_ONCE = 3

_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}


class Products(Protocol):
    """Products with an (m x n) map, row by row, as `Linearisation` has them."""

    x: Tensor
    n: int
    m: int

    def jvp(self, tangents: Tensor) -> Tensor:
        """(c, n) to (c, m)."""

    def vjp(self, cotangents: Tensor) -> Tensor:
        """(c, m) to (c, n)."""


def tangents(like: Tensor, n: int, count: int = DRAWS, seed: int = 0) -> Tensor:
    """(count, n) Gaussian numbers, rounded to multiples of 1 / 1024, of the dtype and device of `like`."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn((count, n), generator=generator, dtype=torch.float32)
    return (torch.round(drawn * GRID) / GRID).to(like.dtype).to(like.device)


def with_sums(rows: Tensor) -> Tensor:
    """An even number of rows, and the sum of each pair."""
    return torch.cat([rows, rows[::2] + rows[1::2]])


def few_at_once(product: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """A product of many rows, `AT_ONCE` at a time."""
    return torch.cat([product(part) for part in rows.split(AT_ONCE)])


def noise_of(products: Tensor) -> Tensor:
    """(pairs, m) the size of one product's rounding at each place, from products of `with_sums`."""
    pairs = len(products) // 3
    single, summed = products[: 2 * pairs].double(), products[2 * pairs :].double()
    return (single[::2] + single[1::2] - summed).abs() / 2  # of the sum, the rounding has twice the variance


def length(rows: Tensor) -> float:
    """The root mean square length of rows: of E w, the Frobenius norm of E."""
    return float(rows.double().square().sum(dim=1).mean().sqrt()) if len(rows) else 0.0


@dataclass(frozen=True)
class Comparison:
    """How two ways to products with J differ.

    Attributes:
        gap: the difference, as a Frobenius norm.
        noise: the rounding of both, the same way.
        ratio: the largest of gap to noise, of all rows, of rows scaled to one size, and of columns scaled so, too.
        relative: the largest difference, relative to the largest entry.
    """

    gap: float
    noise: float
    ratio: float
    relative: float

    @property
    def same(self) -> bool:
        """Whether they may be products with one matrix."""
        return self.ratio <= BEYOND

    @property
    def loss(self) -> float:
        """A size, as a 2-norm, of what one of them lacks; 0 where there is nothing but rounding."""
        return 0.0 if self.ratio <= WITHIN else SAFETY * self.gap


class Probes:
    """Random tangents, and products of J with them, that other ways to these products are compared with.

    One pair of tangents is plain. The other one is scaled so that all columns of J count alike, however small they are.

    Attributes:
        tangents: (6, n): two pairs, and the sum of each, which is exact.
        products: (6, m).
    """

    def __init__(self, jacobian: Products) -> None:
        drawn = tangents(jacobian.x, jacobian.n)
        columns = jacobian.vjp(tangents(jacobian.x, jacobian.m, 2, seed=1)).square().sum(dim=0).sqrt()
        drawn[2:] *= _power_of_two_below(columns)
        self.tangents = with_sums(drawn)
        self.products = few_at_once(jacobian.jvp, self.tangents)

    def compare(self, found: Tensor, true: Tensor | None = None) -> Comparison:
        """Compare products of the same tangents, (6, m), with those of J, or with `true`."""
        true = self.products if true is None else true
        a, b = found.double(), true.double()
        if not bool(torch.isfinite(a).all()):
            return Comparison(float("inf"), 0.0, float("inf"), float("inf"))
        eps = torch.finfo(true.dtype).eps
        gap, ratio = (a - b)[:4].abs(), 0.0
        noise = torch.hypot(noise_of(a), noise_of(b)) + eps / 2 * (b[:4:2].abs() + b[1:4:2].abs())
        for pair in (0, 1):
            of_pair, size = gap[2 * pair : 2 * pair + 2], torch.maximum(a.abs(), b.abs())[2 * pair : 2 * pair + 2]
            rows = size.square().sum(dim=0).sqrt()
            for weight in (torch.ones_like(rows), torch.where(rows > 0, 1 / rows, 0.0)):
                apart, allowed = length(of_pair * weight), length((noise[pair] * weight)[None])
                ratio = max(ratio, apart / allowed if allowed else float("inf") if apart else 0.0)
        scale = float(b.abs().max()) if b.numel() else 0.0
        largest = float((a - b).abs().max()) if b.numel() else 0.0
        plain = length(gap[:2]), length(noise[:1])
        return Comparison(*plain, ratio, largest / scale if scale else largest)


def _power_of_two_below(sizes: Tensor) -> Tensor:
    """1 / size, rounded to a power of two; 1 where a size is 0."""
    exponent = torch.where(sizes > 0, -torch.log2(sizes.double().clamp_min(1e-300)).round(), 0.0)
    return torch.exp2(exponent.clamp(-60, 60)).to(sizes.dtype)


def recast(
    module: fx.GraphModule, dtype: torch.dtype, cast_once: dict[int, tuple[Any, Any]] | None = None
) -> fx.GraphModule:
    """The same graph with all floating numbers and all arithmetic in `dtype`; what was cast inside no longer is.

    Args:
        module: the graph.
        dtype: floating.
        cast_once: weights cast before, and what became of them, by identity: parts of one function share theirs, and so
            do their twins. It is added to.
    """
    known = {} if cast_once is None else cast_once

    def argument(value: Any) -> Any:
        return _like(value, dtype) if isinstance(value, torch.dtype) else value

    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    constants: dict[str, Any] = {}
    for node in module.graph.nodes:
        copy = graph.node_copy(node, lambda n: copies[n])
        copy.args = fx.node.map_aggregate(copy.args, argument)
        copy.kwargs = fx.node.map_aggregate(copy.kwargs, argument)
        copies[node] = copy
        if node.op == "get_attr":
            value = _attribute(module, node.target)
            if id(value) not in known:
                known[id(value)] = value, _recast_constant(value, dtype)
            constants[node.target] = known[id(value)][1]
    return fx.GraphModule(constants, graph)


def is_of_one_precision(module: fx.GraphModule, dtype: torch.dtype) -> bool:
    """Whether nothing in a graph asks for another floating precision than `dtype`."""
    asked: list[torch.dtype] = []
    for node in module.graph.nodes:
        values = [*node.args, *node.kwargs.values()]
        asked += [v for v in values if isinstance(v, torch.dtype)]
        if node.op == "get_attr" and isinstance(tensor := _attribute(module, node.target), Tensor):
            asked.append(tensor.dtype)
    return all(_like(d, dtype) == d for d in asked)


def _like(asked: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    if asked.is_floating_point:
        return dtype
    return _COMPLEX.get(dtype, asked) if asked.is_complex else asked


def _recast_constant(value: Any, dtype: torch.dtype) -> Any:
    return value.detach().to(_like(value.dtype, dtype)) if isinstance(value, Tensor) else value


def _attribute(module: fx.GraphModule, target: Any) -> Any:
    found: Any = module
    for name in str(target).split("."):
        found = getattr(found, name)
    return found


Rows = Callable[[Tensor], Tensor]


def rounding_of(
    rows: Rows,
    like: Tensor,
    n: int,
    exact: Rows | None = None,
    below: Callable[[float], tuple[Rows, Rows] | None] | None = None,
) -> float:
    """How far products with a map are from those of exact arithmetic, as a 2-norm.

    Args:
        rows: products with each of (c, n) rows.
        like: gives rows their dtype and device.
        n: numbers in a row.
        exact: the same in float64, nothing in them of lower precision; None where they are that themselves, or none are
            to be had.
        below: at the point, or at one stretched by so much, products in float32 and in float64 with the very same
            numbers; None where there are none.
    """
    found = 0.0
    if like.dtype == torch.float64 or exact is None:
        found = _in_its_own_precision(exact or rows, like, n, below)
    if exact is not None:
        found += SAFETY * length(_apart(rows, exact, _drawn(like, n)))
        if n <= FEWEST:  # the columns themselves
            columns = _apart(rows, exact, torch.eye(n, dtype=like.dtype, device=like.device))
            found = max(found, float(torch.linalg.matrix_norm(columns, 2)))
    return found if found < float("inf") else _unlinear(rows, like, n)


def _in_its_own_precision(
    rows: Rows, like: Tensor, n: int, below: Callable[[float], tuple[Rows, Rows] | None] | None
) -> float:
    if below is None or like.dtype != torch.float64:
        return _unlinear(rows, like, n)
    drawn, found = _drawn(like, n), float("inf")
    size = length(few_at_once(rows, drawn))
    for stretch in (1.0, 1.0 + 2.0**-9):  # a unit at zero, but for rounding, is there at one of both points at most
        pair = below(stretch)
        if pair is None or not 0.5 * size <= length(few_at_once(pair[1], drawn)) <= 2 * size:
            continue  # numbers out of float32's range
        apart = SAFETY * length(_apart(*pair, drawn.to(torch.float32)))
        found = min(found, apart) if apart == apart else found
        if found <= 1e-3 * size:
            break
    if not found < float("inf"):
        return _unlinear(rows, like, n)
    return found * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps


def _unlinear(rows: Rows, like: Tensor, n: int) -> float:
    return SAFETY * length(noise_of(few_at_once(rows, with_sums(_drawn(like, n)))))


def _drawn(like: Tensor, n: int) -> Tensor:
    """An even number of random rows: more of them where they are short."""
    return tangents(like, n, max(DRAWS, 2 * -(-FEWEST // (2 * n))))


def _apart(rows: Rows, exact: Rows, drawn: Tensor) -> Tensor:
    return torch.cat([rows(row[None]).double() - exact(row[None].double()) for row in drawn])
