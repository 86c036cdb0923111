"""The exact reduction: a k x k matrix M whose eigenvalues, with counted ones and zeros, are those of J (n x n).

With J = D (s I + U V), D the 0/1 mask of active outputs (index set S), V the derivative into a waist, U the
derivative from the waist to the sum, and s = 1 where the skip is the identity (else 0), Sylvester's identity
`eig(U V) = eig(V U)` up to zeros gives, for the active units a of the waist,

    eig(J) = {s + eig(V[a,S] U[S,a])}, |S| - k ones (where s = 1), and zeros for the rest.

Without a waist, `eig(J) = eig(J[S,S])` and n - |S| zeros. Every reduction is compared with J itself on random
tangents before it is used, and the next one is taken where they differ by more than their rounding, which is measured
(`stiffcore.jacobian.rounding`): what a function hides from autograd (`detach`) is in J and not in its graph. Units of
the waist that nothing reaches, or that reach nothing, are left out: their rows or columns of M are zero, and so are
their eigenvalues.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from scipy.sparse import csc_array
from torch import Tensor, fx

from stiffcore.errors import InputError
from stiffcore.jacobian.accumulation import Accumulation, Steps
from stiffcore.jacobian.colouring import Colouring, Integers, Reach, ReachError
from stiffcore.jacobian.derivatives import derivatives_of, differentiate
from stiffcore.jacobian.graph import FunctionGraph, Waist, by_position, live_items, reach_of
from stiffcore.jacobian.linearise import Function, Linearisation, Way, complex_product
from stiffcore.jacobian.modules import Untouched
from stiffcore.jacobian.rounding import (
    Comparison,
    Probes,
    Rows,
    few_at_once,
    is_of_one_precision,
    recast,
    rounding_of,
)
from stiffcore.study import PROBES, BlockFunction, Build

# What random tangents may disagree by, relative to the largest entry of J t; rounding stays far below it.
PROBE_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3}
# What an operation raises that knows one precision alone.
NO_TWIN = (RuntimeError, TypeError, InputError)


class NoSpectrumError(InputError):
    """The function has no eigenvalues to ask for: its Jacobian is rectangular, or it has no branch.

    Attributes:
        n: columns of the Jacobian.
        m: its rows.
    """

    def __init__(self, message: str, n: int, m: int) -> None:
        super().__init__(message)
        self.n, self.m = n, m

    def __reduce__(self) -> tuple[type, tuple[str, int, int]]:
        return type(self), (str(self), self.n, self.m)  # it crosses from a worker


class UntracedError(InputError):
    """The function cannot be traced, so that nothing is known of its parts."""


class Route(StrEnum):
    """Which matrix is built."""

    WAIST = "waist"
    ACTIVE = "active"
    FULL = "full"


@dataclass(frozen=True)
class Reduction:
    """A matrix M (k x k), known by its columns, and how its eigenvalues give those of J (n x n).

    `eig(J) = {shift + eig(M)}`, `ones` exact ones, `zeros` exact zeros; k + ones + zeros = n.

    Attributes:
        jacobian: J, of the original function.
        route: which matrix M is.
        shift: 1 where the identity skip was split off, else 0.
        index: (k,) the flat indices of M's rows and columns in the waist, or in the output.
        ones: exact eigenvalues 1.
        zeros: exact eigenvalues 0.
        reason: one line for people: why this route, and what it rests on.
        check: largest relative difference from J on random tangents.
        loss: a size (2-norm) of what the reduction lacks of J, beyond rounding, measured on random tangents.
        column_items: numbers alive at once while one column is computed.
        kernel_items: numbers in the largest kernel of the function, which a chunk of any width copies.
        head: V, input to waist (waist route only).
        tail: U, waist to sum (waist route only).
        mask: (n,) bool, S (waist route with shift only).
        coloured: which columns of M share products; None where that saves none, or the function is not local.
        accumulation: M from the function's kernels; None where it has other operations than those known there.
        traced: the graph of J's function; None where it has none, or the graph lacks something of J.
    """

    jacobian: Linearisation
    route: Route
    shift: int
    index: Tensor
    ones: int
    zeros: int
    reason: str
    check: float
    column_items: int
    kernel_items: int
    head: Linearisation | None = None
    tail: Linearisation | None = None
    mask: Tensor | None = None
    coloured: Colouring | None = None
    accumulation: Accumulation | None = None
    loss: float = 0.0
    traced: fx.GraphModule | None = None

    @property
    def n(self) -> int:
        """The order of J."""
        return self.jacobian.n

    @property
    def k(self) -> int:
        """The order of M."""
        return len(self.index)

    @cached_property
    def exact(self) -> "Reduction | None":
        """This reduction in float64, of the function with the weights as they are, nothing in it of lower precision.

        Itself, where it is that already; None where the function was not traced, or its graph cannot be run so.
        Memory: the function's numbers again, in float64.
        """
        if self.jacobian.x.dtype == torch.float64 and all(
            is_of_one_precision(module, torch.float64) for module in self._modules
        ):
            return self if self._modules else None
        return self._in(torch.float64)

    @cached_property
    def rounding(self) -> float:
        """How far M, as it is built, is from that of exact arithmetic with the weights as they are, in the 2-norm.

        Measured, no bound, see `stiffcore.jacobian.rounding`: of a float32 run, or of lower precision inside, against
        `exact`; of float64 from a twin in float32, or, where there is none, from the lack of linearity.
        """
        if not self.k:
            return 0.0
        exact = None if self.exact is None or self.exact is self else self.exact.rows
        below = None if self.exact is None else self._below
        return rounding_of(self.rows, self.jacobian.x, self.k, exact, below)

    def _below(self, stretch: float) -> tuple[Rows, Rows] | None:
        low = self._in(torch.float32, stretch)
        high = None if low is None else low._in(torch.float64)
        return None if low is None or high is None else (low.rows, high.rows)

    @property
    def _modules(self) -> tuple[fx.GraphModule, ...]:
        """The graphs that products with M go through; empty where the function was not traced."""
        parts = [self.traced] if self.head is None or self.tail is None else [self.traced, self.head.f, self.tail.f]
        return tuple(part for part in parts if isinstance(part, fx.GraphModule))

    def _in(self, dtype: torch.dtype, stretch: float = 1.0) -> "Reduction | None":
        """This reduction with all numbers and all arithmetic in another precision, at a point stretched by little."""
        if self.traced is None:
            return None
        try:
            x = (self.jacobian.x * stretch).to(dtype)
            weights: dict[int, tuple[Any, Any]] = {}
            whole = recast(self.traced, dtype, weights)
            found = replace(
                self,
                jacobian=Linearisation(whole, x, self.jacobian.name),
                traced=whole,
                coloured=None,
                accumulation=None,
            )
            if self.head is None or self.tail is None:
                return found
            head = Linearisation(recast(cast(fx.GraphModule, self.head.f), dtype, weights), x, self.head.name)
            tail = Linearisation(recast(cast(fx.GraphModule, self.tail.f), dtype, weights), head.value, self.tail.name)
            return replace(found, head=head, tail=tail)
        except torch.OutOfMemoryError:
            raise
        except NO_TWIN:
            return None

    def columns(self, start: int, stop: int) -> Tensor:
        """Columns start..stop-1 of M, by one forward-mode product each.

        Returns:
            (k, stop - start), of J's dtype and device; row-major of its transpose, so a column is contiguous.
        """
        at = self.index[start:stop]
        tangents = self.jacobian.x.new_zeros((len(at), self._units))
        tangents[torch.arange(len(at), device=at.device), at] = 1
        return self._rows(tangents)[:, self.index].T

    def columns_sparse(
        self, start: int, stop: int, chunk: int, tell: Callable[[int, int], None] = lambda done, total: None
    ) -> csc_array:
        """Columns start..stop-1 of M as a sparse matrix, by `products(start, stop)` forward-mode products.

        Memory: `chunk` times `column_items + 9 k` numbers, and twice the nonzeros with their indices (8 bytes each
        besides the number). On the CPU, glibc gives tensors above 32 MB fresh pages at every use: at n = 802,816 a
        product in chunks of 16 takes 93 ms of CPU, in chunks of 4 59 ms, and 35 ms where the heap keeps its pages.
        Compare the result with M itself (`check_sparse`) before using it.

        Args:
            start: the first column.
            stop: after the last one.
            chunk: products at once.
            tell: told of products done and products in all.

        Returns:
            (k, stop - start), of J's dtype, on the host; sorted, without stored zeros.

        Raises:
            ValueError: where M is not coloured.
            ReachError: where the function turns out not to be local; build `columns`.
        """
        columns, rows = self._host_index(start, stop), self._host_index(0, self.k)
        return self._colouring.matrix(self._rows, columns, rows, chunk, self.jacobian.x, tell)

    def sparse(
        self, chunk: int, tell: Callable[[int, int], None] = lambda done, total: None, build: Build | None = None
    ) -> csc_array:
        """Build all of M: accumulated (see `Accumulation.matrix`), or as `columns_sparse` does.

        Args:
            chunk: as for `columns_sparse`.
            tell: told of steps done and steps in all.
            build: how; None: the first of `builds`.

        Raises:
            ValueError: where M cannot be built so.
            ReachError: as for `columns_sparse`.
        """
        build = build or self.builds[0]
        if build is Build.ACCUMULATED and self.accumulation is not None:
            return self.accumulation.matrix(tell)
        return self.columns_sparse(0, self.k, chunk, tell)

    @property
    def builds(self) -> tuple[Build, ...]:
        """The ways to build M, from the fastest."""
        able = {Build.ACCUMULATED: self.accumulation, Build.SHARED: self.coloured, Build.COLUMNS: True}
        return tuple(build for build, can in able.items() if can is not None)

    def products(self, start: int, stop: int) -> int:
        """How many forward-mode products `columns_sparse(start, stop)` takes."""
        return self._colouring.products(self._host_index(start, stop))

    def nonzeros_bound(self) -> int:
        """How many entries of M are in reach, so that no more can be nonzero, cheap at any k; 0 where unknown."""
        if self.accumulation is not None:
            return self.accumulation.entries
        index = self._host_index(0, self.k)
        return 0 if self.coloured is None else self.coloured.entries(index, index)

    def fill_bound(self) -> int:
        """How many entries the triangular factors of M have at most, from the reach alone; k^2 where not coloured."""
        return self.k**2 if self.coloured is None else self.coloured.envelope(self._host_index(0, self.k))

    def product(self, vector: np.ndarray) -> np.ndarray:
        """M w, by one forward-mode product.

        Args:
            vector: (k,) real.

        Returns:
            (k,), of J's dtype.
        """
        return self._applied(self.rows, vector)

    def transposed_product(self, vector: np.ndarray) -> np.ndarray:
        """M^T w, by one reverse-mode product; see `product`."""
        return self._applied(self.transposed_rows, vector)

    def rows(self, vectors: Tensor) -> Tensor:
        """M w of each row w of (q, k), real and of J's dtype, as rows."""
        return self._rows(_scatter(vectors, self.index, self._units))[:, self.index]

    def transposed_rows(self, vectors: Tensor) -> Tensor:
        """M^T w, see `rows`."""
        return self._pulled(_scatter(vectors, self.index, self._units))[:, self.index]

    def _applied(self, product: Callable[[Tensor], Tensor], vector: np.ndarray) -> np.ndarray:
        x = self.jacobian.x
        row = torch.as_tensor(np.ascontiguousarray(vector.ravel()), dtype=x.dtype, device=x.device)[None]
        return product(row)[0].cpu().numpy()

    def check_sparse(self, matrix: csc_array, start: int = 0) -> float:
        """Compare columns of M with the operator they were made from, on random vectors in both directions.

        Args:
            matrix: (k, c), the columns start..start+c-1.
            start: the first of them.

        Returns:
            The largest relative difference; rounding, where it is not above `PROBE_TOLERANCE`.
        """
        columns = self.index[start : start + matrix.shape[1]]
        right = _probes(self.jacobian.x, len(columns))
        left = _probes(self.jacobian.x, self.k)
        forward = self._rows(_scatter(right, columns, self._units))[:, self.index]
        reverse = self.transposed_rows(left)[:, start : start + matrix.shape[1]]
        pairs = ((matrix @ right.cpu().numpy().T, forward), (matrix.T @ left.cpu().numpy().T, reverse))
        return max(relative_difference(torch.from_numpy(product.T), plain.cpu()) for product, plain in pairs)

    @property
    def _units(self) -> int:
        """Units of the layer that M acts on, active or not."""
        return self.jacobian.n if self.tail is None else self.tail.n

    @property
    def _colouring(self) -> Colouring:
        if self.coloured is None:
            raise ValueError(f"M of {self.jacobian.name} is not coloured: build its columns")
        return self.coloured

    def _host_index(self, start: int, stop: int) -> Integers:
        return self.index[start:stop].cpu().numpy()

    def _rows(self, tangents: Tensor) -> Tensor:
        if self.head is None or self.tail is None:
            return self.jacobian.jvp(tangents)
        return self.head.jvp(self._masked(self.tail.jvp(tangents)))

    def _pulled(self, cotangents: Tensor) -> Tensor:
        if self.head is None or self.tail is None:
            return self.jacobian.vjp(cotangents)
        return self.tail.vjp(self._masked(self.head.vjp(cotangents)))

    def _masked(self, rows: Tensor) -> Tensor:
        return rows if self.mask is None else rows.mul_(self.mask)

    def lift(self, right: Tensor, left: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvectors of J from those of M.

        For the waist route u = D U w, and v^T = z^T V D + mu z^T V (with shift) or z^T V (without): insert them
        in J = D (s I + U V) with M w = mu w, z^T M = mu z^T. For the active route u = [w; 0] and v^T = z^T J, which
        is mu z^T in the active columns. For the full one they are w and z themselves, at their places.

        Args:
            right: (q, k) complex, rows w with M w = mu w.
            left: (q, k) complex, rows z with z^T M = mu z^T (the conjugate of the usual left eigenvector).
            values: (q,) complex, mu.

        Returns:
            u: (q, n) complex with J u = (shift + mu) u.
            v: (q, n) complex with v^T J = (shift + mu) v^T; neither is normalised.
        """
        if self.route is Route.FULL:
            return _scatter(right, self.index, self.n), _scatter(left, self.index, self.n)
        head, tail = self.head, self.tail
        if head is None or tail is None:
            u = _scatter(right, self.index, self.n)
            v = complex_product(self.jacobian.vjp, _scatter(left, self.index, self.n))
            v[:, self.index] = values[:, None] * left  # not through J, where mu is at the level of rounding
            return u, v
        u = complex_product(lambda t: self._masked(tail.jvp(t)), _scatter(right, self.index, tail.n))
        v = complex_product(head.vjp, _scatter(left, self.index, head.m))
        if self.mask is not None:
            v = v * self.mask + values[:, None] * v
        return u, v


def reduce_jacobian(
    f: Function,
    x: Tensor,
    function: BlockFunction = BlockFunction.BLOCK,
    *,
    reduce: bool = True,
    name: str = "f",
) -> Reduction:
    """Find the smallest checked matrix with the eigenvalues of the Jacobian of `f`, or of its branch, at `x`.

    Args:
        f: takes and returns one tensor.
        x: the point, any shape, floating.
        function: `block`: f itself; `branch`: the residual function F alone, where f(x) = act(F(x) + shortcut).
        reduce: False takes the full matrix.
        name: how errors call f.

    Returns:
        The reduction; J in it is of the function asked for.

    Raises:
        NoSpectrumError: where J is rectangular, or there is no branch.
        InputError: where f cannot be linearised, or its forward and reverse derivatives disagree.
    """
    function = BlockFunction(function)
    return reduce_as_asked(open_function(f, x, function, name, square=True), function, reduce=reduce)


def reduce_as_asked(
    opened: tuple[Linearisation, FunctionGraph | None, str], function: BlockFunction, *, reduce: bool
) -> Reduction:
    """As `reduce_jacobian`, of what `open_function` returned."""
    jacobian, graph, untraced = opened
    if reduce:
        found = reduce_opened(jacobian, graph, untraced, function)
    else:
        found = _full(jacobian, "full matrix, as asked", graph)
    return replace(found, reason=jacobian.noted(found.reason))


def reduce_opened(
    jacobian: Linearisation, graph: FunctionGraph | None, untraced: str, function: BlockFunction
) -> Reduction:
    """As `reduce_jacobian`, of a square Jacobian from `open_function`."""
    if graph is None:
        return _active(jacobian, graph, untraced)
    if jacobian.way is Way.ROWS:  # whatever else: J is there
        return _full(jacobian, "full matrix", None)
    return _smallest(jacobian, graph, Probes(jacobian), split_skip=function is BlockFunction.BLOCK)


def open_function(
    f: Function, x: Tensor, function: BlockFunction, name: str, *, square: bool = False
) -> tuple[Linearisation, FunctionGraph | None, str]:
    """Linearise f, or its branch, and trace it.

    Args:
        f: takes and returns one tensor.
        x: the point.
        function: which of both.
        name: how errors call f.
        square: refuse a rectangular Jacobian.

    Returns:
        The Jacobian, the graph, and why there is none.

    Raises:
        NoSpectrumError: where the Jacobian should be square and is not, or there is no branch.
        InputError: where f cannot be linearised, or its forward and reverse derivatives disagree.
    """
    if x.is_floating_point() and x.dtype not in PROBE_TOLERANCE:
        raise InputError(f"{name}: its input is {str(x.dtype).removeprefix('torch.')}; give it as float32 or float64")
    untouched = Untouched(f)
    whole = Linearisation(untouched, x, name)
    if untouched.outputs > 1:
        whole.notes.append(f"of its {untouched.outputs} outputs, the first floating tensor")
    graph, untraced = _trace(untouched, x)
    branch = function is BlockFunction.BRANCH
    if branch:
        if graph is None:
            raise NoSpectrumError(
                f"{name}: its graph could not be traced for the branch ({untraced})", whole.n, whole.m
            )
        differentiate(whole, graph)
    jacobian = _branch(graph, whole) if branch and graph is not None else whole
    if square and jacobian.n != jacobian.m:
        raise NoSpectrumError(
            f"{jacobian.name} has a rectangular Jacobian ({jacobian.m} x {jacobian.n}), which has no eigenvalues",
            jacobian.n,
            jacobian.m,
        )
    if branch:
        graph, untraced = _trace(jacobian.f, x)
    else:
        differentiate(whole, graph)
    return jacobian, graph, f"{'branch ' if branch else ''}not traced ({untraced})" if graph is None else ""


def is_residual(f: Function, x: Tensor) -> bool:
    """Whether the output of `f` is a sum of two things that depend on `x`, up to elementwise operations.

    Raises:
        UntracedError: where it cannot be told.
    """
    graph, untraced = _trace(Untouched(f), x)
    if graph is None:
        raise UntracedError(f"not traced ({untraced})")
    identity, others = graph.residual_sum(graph.activation_start(graph.output))
    return len(identity) + len(others) > 1


def _trace(f: Function, x: Tensor) -> tuple[FunctionGraph | None, str]:
    try:
        if isinstance(f, Untouched):
            f.meet(x)
            if f.replaces:
                raise RuntimeError("it replaces the data of its parameters")
        return FunctionGraph(f, x), ""
    except Exception as error:  # any failure to trace only costs the reduction, never the result
        return None, f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"


def _branch(graph: FunctionGraph, whole: Linearisation) -> Linearisation:
    """The residual function: all terms of the sum but the shortcut, which is the identity or the shallowest."""
    end = graph.activation_start(graph.output)
    identity, others = graph.residual_sum(end)
    if len(identity) + len(others) < 2 or not others:
        raise NoSpectrumError(f"{whole.name} has no residual sum, so it has no branch", whole.n, whole.m)
    at = 0 if identity else max(range(len(others)), key=lambda i: (-graph.depth(others[i]), i))
    terms = [*identity, *others]
    shortcut = terms.pop(at)
    # traced again, for its own waists
    branch = Linearisation(graph.between(graph.input, terms, fast=False), whole.x, f"the branch of {whole.name}")
    rest = Linearisation(graph.between(graph.input, [shortcut]), whole.x, f"the shortcut of {whole.name}")
    if whole.way is not Way.TRANSFORMS:
        differentiate(branch, None)
        differentiate(rest, None)
    with derivatives_of(whole):
        probes, slope = Probes(whole), _chain_slope(graph, end).reshape(-1)
        parts = (few_at_once(part.jvp, probes.tangents) for part in (branch, rest))
        check = probes.compare(slope * sum(parts))
    if not check.same:
        raise NoSpectrumError(
            f"the branch of {whole.name}, as read from its graph, and its shortcut do not add up to it (relative "
            f"difference {check.relative:.1e}): does it hide anything from autograd, as detach() does?",
            whole.n,
            whole.m,
        )
    return branch


def _smallest(jacobian: Linearisation, graph: FunctionGraph, probes: Probes, *, split_skip: bool) -> Reduction:
    end = graph.activation_start(graph.output)
    try:
        slope = _chain_slope(graph, end)
    except InputError as error:
        return _active(jacobian, graph, str(error), probes=probes)
    identity, others = graph.residual_sum(end)
    active = int(torch.count_nonzero(slope))
    shift, ends, why_not = 0, [graph.output], ""
    if split_skip and identity and others:
        if bool(((slope == 0) | (slope == 1)).all()):
            shift, ends = 1, [*identity[1:], *others]
        else:
            why_not = "the outer activation's slope is neither 0 nor 1"
    elif split_skip and identity:
        why_not = "nothing but the skip depends on the input"
    if not why_not:
        for waist in graph.waists(ends):
            if len(waist.active) >= active:
                break
            try:
                found, check = _from_waist(jacobian, graph, probes, waist, ends, slope, shift)
            except torch.OutOfMemoryError:
                raise
            except (ValueError, RuntimeError) as error:  # costs the reduction, never the result
                why_not = f"the waist {waist.node.name} cannot be used ({str(error).splitlines()[0][:80]})"
                continue
            if check.same:
                return found
            why_not = f"the waist failed its check on random tangents ({check.relative:.1e})"
    return _active(jacobian, graph, why_not or "no waist smaller than the active outputs", slope, probes)


def _from_waist(
    jacobian: Linearisation,
    graph: FunctionGraph,
    probes: Probes,
    waist: Waist,
    ends: list,
    slope: Tensor,
    shift: int,
) -> tuple[Reduction, Comparison]:
    n, x = jacobian.n, jacobian.x
    into, out = graph.between(graph.input, [waist.node]), graph.between(waist.node, ends)
    head = Linearisation(into, x, "input to waist")
    tail = Linearisation(out, head.value, "waist to sum")
    mask = (slope != 0).reshape(-1) if shift else None
    interior = few_at_once(head.jvp, probes.tangents)
    pulled = tail.vjp(_probes(x, n) if mask is None else _probes(x, n) * mask)
    live = (interior != 0).any(dim=0) & (pulled != 0).any(dim=0)
    index = waist.active.to(x.device)
    index = index[live[index]]
    k = len(index)
    dropped = torch.ones_like(live).index_fill_(0, index, False)
    interior[:, dropped] = 0
    reduced = few_at_once(tail.jvp, interior) + shift * probes.tangents
    if mask is not None:
        reduced = reduced * mask
    check = probes.compare(reduced)
    ones = int(mask.sum()) - k if mask is not None else 0
    skip = "identity skip split off" if shift else "no skip to split off"
    found = Reduction(
        jacobian=jacobian,
        route=Route.WAIST,
        shift=shift,
        index=index,
        ones=ones,
        zeros=n - k - ones,
        reason=f"waist of {waist.size} units ({waist.node.name}), {k} active; {skip}",
        check=check.relative,
        column_items=max(live_items(into), live_items(out)) + waist.size + n,
        kernel_items=graph.kernel_items,
        head=head,
        tail=tail,
        mask=mask,
        loss=check.loss,
        traced=graph.between(graph.input, [graph.output]),
    )
    before, after = Steps.of(out, head.value), Steps.of(into, x)
    if before is not None and after is not None and before.destination == after.source:
        if mask is not None:
            before = before.masked(mask.to(x.dtype).cpu().numpy().reshape(before.destination))
        found = _accumulated(found, before.then(after))
    first, second = reach_of(out), reach_of(into)
    if first is None or second is None or first.destination != second.source:
        return found, check
    return _coloured(found, first.then(second)), check


def _active(
    jacobian: Linearisation,
    graph: FunctionGraph | None,
    why: str,
    slope: Tensor | None = None,
    probes: Probes | None = None,
) -> Reduction:
    if slope is None or bool((slope != 0).all()):
        return _full(jacobian, f"full matrix: {why}", graph, probes)
    mask = (slope != 0).reshape(-1)
    probes = probes or Probes(jacobian)
    check = probes.compare(probes.products * mask)
    if not check.same:
        note = f"{why}; rows of inactive outputs are not zero ({check.relative:.1e})"
        return _full(jacobian, f"full matrix: {note}", graph, probes)
    units = torch.nonzero(mask).reshape(-1)
    reason = f"active outputs, {len(units)} of {jacobian.n}: {why}"
    return _direct(jacobian, Route.ACTIVE, units, reason, structure(jacobian, graph, probes), check)


def _full(jacobian: Linearisation, reason: str, graph: FunctionGraph | None, probes: Probes | None = None) -> Reduction:
    units = torch.arange(jacobian.n, device=jacobian.x.device)
    return _direct(jacobian, Route.FULL, units, reason, structure(jacobian, graph, probes))


def _direct(
    jacobian: Linearisation,
    route: Route,
    units: Tensor,
    reason: str,
    known: "Structure",
    check: Comparison | None = None,
) -> Reduction:
    """J itself, at some of its rows and columns; all others are zero."""
    found = Reduction(
        jacobian=jacobian,
        route=route,
        shift=0,
        index=by_position(units, known.shape),
        ones=0,
        zeros=jacobian.n - len(units),
        reason=reason,
        check=0.0 if check is None else check.relative,
        column_items=known.column_items,
        kernel_items=known.kernel_items,
        loss=0.0 if check is None else check.loss,
        traced=known.module,
    )
    return _coloured(_accumulated(found, known.steps), known.reach)


@dataclass(frozen=True)
class Structure:
    """What a function's graph says of its Jacobian.

    Attributes:
        column_items: numbers alive while one product is computed.
        kernel_items: numbers in its largest kernel.
        shape: of its output, or of the feature map that its output is a view of: what orders its units.
        reach: from its input to its output; None where that is not known.
        steps: the same, for accumulation; None, too, where the graph lacks something of J.
        module: the function, as traced; None where it was not, or the graph lacks something of J.
    """

    column_items: int
    kernel_items: int
    shape: tuple[int, ...]
    reach: Reach | None
    steps: Steps | None
    module: fx.GraphModule | None


def structure(jacobian: Linearisation, graph: FunctionGraph | None, probes: Probes | None = None) -> Structure:
    """Read the structure of a function from its graph, where there is one."""
    shape = tuple(jacobian.value.shape)
    if graph is None:  # nothing to count: eight copies of input and output hold any block seen so far
        items = 8 * (jacobian.n + jacobian.m)
        return Structure(*jacobian.held(items, 0), shape, None, None, None)
    module = graph.between(graph.input, [graph.output])
    items, kernels = jacobian.held(live_items(module) + jacobian.n + jacobian.m, graph.kernel_items)
    reach, steps = reach_of(module), Steps.of(module, jacobian.x)
    if (local := steps or reach) is not None:
        shape = (1, *local.destination)
    whole = _is_graph_of(module, jacobian, probes or Probes(jacobian))
    return Structure(items, kernels, shape, reach, steps if whole else None, module if whole else None)


def rounding_of_function(jacobian: Linearisation, traced: fx.GraphModule | None) -> float:
    """How far products with J are from those of exact arithmetic, in the 2-norm; see `Reduction.rounding`."""
    x = jacobian.x
    if traced is None:
        return rounding_of(jacobian.jvp, x, jacobian.n)

    def twin(dtype: torch.dtype, at: Tensor, module: fx.GraphModule) -> Linearisation | None:
        try:
            return Linearisation(recast(module, dtype), at.to(dtype), jacobian.name)
        except torch.OutOfMemoryError:
            raise
        except NO_TWIN:
            return None

    def below(stretch: float) -> tuple[Rows, Rows] | None:
        low = twin(torch.float32, x * stretch, traced)
        high = None if low is None else twin(torch.float64, low.x, cast(fx.GraphModule, low.f))
        return None if low is None or high is None else (low.jvp, high.jvp)

    if x.dtype == torch.float64 and is_of_one_precision(traced, torch.float64):
        return rounding_of(jacobian.jvp, x, jacobian.n, None, below)
    exact = twin(torch.float64, x, traced)
    if exact is None:
        return rounding_of(jacobian.jvp, x, jacobian.n)
    return rounding_of(jacobian.jvp, x, jacobian.n, exact.jvp, below)


def _is_graph_of(module: fx.GraphModule, jacobian: Linearisation, probes: Probes) -> bool:
    """Whether a graph has the derivative J: what is hidden from autograd is in no graph."""
    try:
        products = Linearisation(module, jacobian.x, f"the graph of {jacobian.name}")
        return probes.compare(few_at_once(products.jvp, probes.tangents)).same
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError):  # an operation of the graph that has no forward derivative
        return False


def _accumulated(reduction: Reduction, steps: Steps | None) -> Reduction:
    """The reduction with its accumulation, where its steps lead from a map back to one of the same shape."""
    if steps is None or steps.source != steps.destination or not reduction.k:
        return reduction
    index = reduction._host_index(0, reduction.k)
    return replace(reduction, accumulation=Accumulation(steps, index, index))


def _coloured(reduction: Reduction, reach: Reach | None) -> Reduction:
    """The reduction with its colouring, where that saves products and a few columns keep within their reach."""
    if reach is None or reach.source != reach.destination:
        return reduction
    found = replace(reduction, coloured=Colouring(reach))
    if found.products(0, found.k) >= found.k:
        return reduction
    if found.accumulation is not None:  # every operation on the way is known
        return found
    try:
        for column in (0, found.k // 2, found.k - 1):
            found.columns_sparse(column, column + 1, chunk=1)
    except ReachError:
        return reduction
    return found


def _chain_slope(graph: FunctionGraph, end) -> Tensor:  # type: ignore[no-untyped-def]
    value = graph.values([end])[end]
    if end is graph.output:
        return torch.ones_like(value)
    chain = Linearisation(graph.between(end, [graph.output]), value, "outer activation")
    ones = value.new_ones((1, value.numel()))
    return chain.jvp(ones)[0].reshape(value.shape)


def _probes(x: Tensor, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((PROBES, n), generator=generator, dtype=x.dtype).to(x.device)


def relative_difference(a: Tensor, b: Tensor) -> float:
    """The largest |a - b|, relative to the largest |b| where that is not 0."""
    scale = float(b.abs().max()) if b.numel() else 0.0
    gap = float((a - b).abs().max()) if b.numel() else 0.0
    return gap if scale == 0 else gap / scale


def _scatter(rows: Tensor, index: Tensor, size: int) -> Tensor:
    out = rows.new_zeros((len(rows), size))
    out[:, index] = rows
    return out
