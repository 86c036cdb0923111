"""A function at a point as a linear operator: products with its Jacobian and with the transpose."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from enum import StrEnum
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stiffcore.errors import InputError, StiffcoreError
from stiffcore.jacobian.modules import Untouched

Function = Callable[[Tensor], Tensor]
# Rows at once where J is held, and what a record holds for one, in the numbers that are alive in forward mode.
ROWS_AT_ONCE = 16
RECORD_COPIES = 2


class Way(StrEnum):
    """How products are computed; what forward mode and `torch.func` cannot differentiate takes a later one."""

    TRANSFORMS = "forward and reverse mode"
    TWICE = "reverse mode, and forward products by differentiating it"
    TRACE = "reverse mode, and forward products of its graph"
    ROWS = "all rows of J by reverse mode, held in memory"


@contextmanager
def differentiable_kernels() -> Iterator[None]:
    """Use only kernels that have forward-mode derivatives, inside the context, and no compiled functions.

    The fused transformer layer and flash attention have none (torch 2.14); both compute what their plain
    versions compute.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with ExitStack() as stack:
            if "torch._dynamo" in sys.modules:  # something was compiled; the import takes seconds
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(torch.no_grad())
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class Linearisation:
    """The Jacobian J (m x n) of `f` at `x`, known by its products; rows and columns are row-major flattened.

    Products run all at once under `vmap`, or one after another where `f` uses an operation that it cannot batch.
    Not supported: functions of several tensors (bind the others first), complex or integer tensors; complex numbers
    inside are.

    Attributes:
        n: numbers in `x`, the columns of J.
        m: numbers in `f(x)`, the rows of J.
        value: `f(x)`, detached.
        way: how products are computed.
        graph: a function with the same forward products, for `Way.TRACE`.
        notes: what is unusual about the function and its products, for people.
    """

    def __init__(self, f: Function, x: Tensor, name: str = "the function") -> None:
        """Evaluate `f` at `x` twice, and refuse what cannot be linearised.

        Args:
            f: takes a tensor like `x`, returns one floating tensor.
            x: the point, any shape, floating.
            name: how error messages call `f`.

        Raises:
            InputError: where `x` or `f(x)` is not a finite floating tensor, two evaluations differ, or `f` fails.
        """
        self.f, self.x, self.name = f, x.detach(), name
        if not x.is_floating_point():
            raise InputError(f"{name}: its input must be a floating tensor, got {x.dtype}")
        if not x.numel():
            raise InputError(f"{name}: its input is empty, of shape {tuple(x.shape)}")
        if not bool(torch.isfinite(x).all()):
            raise InputError(f"{name}: its input has values that are not finite")
        self._recording = False
        first, second = self._first_call(), self._first_call()
        if not torch.equal(first, second):
            if not bool(torch.isfinite(first).all()):
                raise InputError(f"{name}: its output has values that are not finite")
            raise InputError(
                f"{name} is not deterministic: two evaluations at the same input differ by up to "
                f"{float((first - second).abs().max()):.3g}. Is dropout left on (call .eval(), or pass "
                "training=False)? Does its forward change a parameter in place (do it once, before)?"
            )
        if not bool(torch.isfinite(first).all()):
            raise InputError(f"{name}: its output has values that are not finite")
        self.n, self.m, self.value = x.numel(), first.numel(), first
        self.notes: list[str] = []
        self.take(Way.TRANSFORMS)

    def take(self, way: Way, graph: Function | None = None) -> None:
        """Compute products in another way.

        Args:
            way: which.
            graph: for `Way.TRACE`.
        """
        self.way, self.graph = way, graph
        self._batches: dict[str, bool] = {}  # whether products of this kind may go all at once

    @property
    def dtype(self) -> np.dtype:
        """Of `x`, as numpy has it."""
        return np.dtype("f8" if self.x.dtype == torch.float64 else "f4")

    def evaluate(self, x: Tensor) -> Tensor:
        """Return `f(x)`, detached; recorded by autograd where `f` cannot do without (it registers hooks)."""
        with differentiable_kernels():
            if not self._recording:
                try:
                    return self._call(x.clone()).detach()
                except (StiffcoreError, torch.OutOfMemoryError):
                    raise
                except Exception:
                    found = self._recorded_value(x)
                    self._recording = True
                    return found
            return self._recorded_value(x)

    def _recorded_value(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return self._call(x.clone().requires_grad_().clone()).detach()

    def noted(self, reason: str) -> str:
        """A line for people, and the notes after it."""
        return "; ".join([reason, *self.notes])

    def held(self, column_items: int, kernel_items: int) -> tuple[int, int]:
        """Numbers alive while one product is computed, and in the largest kernel, from those of forward mode.

        Autograd's record keeps every value, of both passes where it is differentiated again. J counts as a third of a
        kernel: the plan makes room for a kernel and two copies.
        """
        if self.way is Way.TRANSFORMS:
            return column_items, kernel_items
        if self.way is Way.ROWS:
            return RECORD_COPIES * column_items, kernel_items + -(-self.m * self.n // 3)
        return RECORD_COPIES * column_items, kernel_items

    def _first_call(self) -> Tensor:
        try:
            return self.evaluate(self.x)
        except (StiffcoreError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise InputError(f"{self.name} fails at its input: {reason_of(error, self.x.dtype)}") from error

    def _call(self, x: Tensor) -> Tensor:
        y = self.f(x)
        if not isinstance(y, Tensor) or not y.is_floating_point():
            got = y.dtype if isinstance(y, Tensor) else type(y).__name__
            raise InputError(f"{self.name} must return one floating tensor, got {got}")
        return y

    def jvp(self, tangents: Tensor) -> Tensor:
        """Return `tangents @ J.T`: one forward-mode product per row, all at once.

        Args:
            tangents: (c, n), of the dtype and device of `x`.

        Returns:
            (c, m).
        """
        tangents = tangents.to(self.x.dtype)
        if self.way is Way.ROWS:
            return tangents.to(self._matrix.dtype) @ self._matrix.T
        f = self.f if self.graph is None else self.graph

        def product(tangent: Tensor) -> Tensor:
            # f may work in place on its input: the clone inside keeps x and the tangent unchanged
            return torch.func.jvp(lambda x: f(x.clone()), (self.x,), (tangent.reshape(self.x.shape),))[1].reshape(-1)

        with differentiable_kernels():
            make = self._differentiated if self.way is Way.TWICE else lambda: product
            return self._map("jvp", make, tangents, self.m)

    def vjp(self, cotangents: Tensor) -> Tensor:
        """Return `cotangents @ J`: one reverse-mode product per row.

        Args:
            cotangents: (c, m), of the dtype and device of `x`.

        Returns:
            (c, n).
        """
        with differentiable_kernels(), torch.enable_grad():
            make = self._transformed if self.way is Way.TRANSFORMS else self._recorded
            return self._map("vjp", make, cotangents.to(self.value.dtype), self.n).detach()

    def _transformed(self) -> Callable[[Tensor], Tensor]:
        pull = torch.func.vjp(lambda x: self.f(x.clone()), self.x)[1]
        return lambda cotangent: pull(cotangent.reshape(self.value.shape))[0].reshape(-1)

    def _recorded(self) -> Callable[[Tensor], Tensor]:
        """A product by autograd's record of one evaluation."""
        x, y = self._evaluated()
        if not y.requires_grad:
            return lambda cotangent: self.x.new_zeros(self.n)

        def product(cotangent: Tensor) -> Tensor:
            row = cotangent.reshape(y.shape)
            try:
                found = torch.autograd.grad(y, x, row, allow_unused=True, materialize_grads=True)[0]
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                if "use_reentrant" not in str(error):
                    raise
                found = self._accumulated(row)  # one kind of checkpoint knows no `grad`
            return found.reshape(-1)

        return product

    def _evaluated(self) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = self.x.clone().requires_grad_()
            return x, self._call(x.clone())

    def _accumulated(self, cotangent: Tensor) -> Tensor:
        """A reverse product by `backward`, which also adds to the gradients of parameters: these are put back."""
        parameters = list(self.f.parameters()) if isinstance(self.f, Untouched) else []
        before = [(p, p.grad) for p in parameters]
        try:
            x, y = self._evaluated()
            y.backward(cotangent)
        finally:
            for p, gradient in before:
                p.grad = gradient
        assert x.grad is not None
        return x.grad

    def _differentiated(self) -> Callable[[Tensor], Tensor]:
        """J v, the derivative of J^T u by u along v; J^T u is linear in u, so that any u serves."""
        generator = torch.Generator().manual_seed(0)
        u = torch.randn(self.value.shape, generator=generator, dtype=self.value.dtype).to(self.x.device)
        with torch.enable_grad():
            u.requires_grad_()
            x, y = self._evaluated()
            pulled = torch.autograd.grad(y, x, u, create_graph=True)[0].reshape(-1)
        return lambda tangent: torch.autograd.grad(pulled, u, tangent)[0].reshape(-1)

    @cached_property
    def _matrix(self) -> Tensor:
        """J (m x n), from one reverse product a row."""
        found = self.x.new_empty((self.m, self.n))
        for start in range(0, self.m, ROWS_AT_ONCE):
            rows = range(start, min(start + ROWS_AT_ONCE, self.m))
            cotangents = self.value.new_zeros((len(rows), self.m))
            cotangents[torch.arange(len(rows)), torch.arange(rows.start, rows.stop)] = 1
            found[rows.start : rows.stop] = self.vjp(cotangents)
        return found

    def _map(self, which: str, make: Callable[[], Callable[[Tensor], Tensor]], rows: Tensor, size: int) -> Tensor:
        """A product for each row: all from one record, or each from its own, as a hook may be gone after its first."""
        if not len(rows):
            return rows.new_zeros((0, size))
        with self.f.held() if isinstance(self.f, Untouched) else nullcontext():
            return self._mapped(which, make, rows)

    def _mapped(self, which: str, make: Callable[[], Callable[[Tensor], Tensor]], rows: Tensor) -> Tensor:
        if self._batches.get(which, True):
            try:
                found = torch.func.vmap(make())(rows)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # whatever it is, a single product either works or says what is wrong
                found = self._single(make, rows)
                self._batches[which] = False
                return found
            # plain autograd's backward passes were not all made for batches: that of cdist is wrong in one (torch 2.14)
            if self.way is Way.TRANSFORMS or which in self._batches:
                return found
            single = self._single(make, rows[-1:])
            apart = float((found[-1:] - single).abs().max())
            self._batches[which] = apart <= torch.finfo(found.dtype).eps ** 0.75 * float(single.abs().max())
            if self._batches[which]:
                return found
        return self._single(make, rows)

    @staticmethod
    def _single(make: Callable[[], Callable[[Tensor], Tensor]], rows: Tensor) -> Tensor:
        return torch.stack([make()(row) for row in rows])


def reason_of(error: BaseException, dtype: torch.dtype) -> str:
    """One line of an error that a function raised at a point of `dtype`, with a remedy where precisions were mixed."""
    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    if not isinstance(error, RuntimeError) and lines:
        reason = f"{type(error).__name__}: {reason}"
    if re.search(r"\b(dtype|scalar type|same type|Float|Double|FloatTensor|DoubleTensor)\b", reason):
        other = "float32" if dtype == torch.float64 else "float64"
        reason += (
            f". Does it make numbers of its own in {other}, or cast to it? Ask for --dtype {other} "
            f"(from Python: dtype='{other}', or x.{'float' if other == 'float32' else 'double'}())"
        )
    return reason


def complex_product(product: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """A real product of complex rows: of their real and imaginary parts, all at once."""
    both = product(torch.cat([rows.real, rows.imag]).contiguous())
    return torch.complex(both[: len(rows)], both[len(rows) :])
