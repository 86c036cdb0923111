"""A function at a point as a linear operator: products with its Jacobian and with the transpose."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stiffcore.errors import InputError

Function = Callable[[Tensor], Tensor]


@contextmanager
def differentiable_kernels() -> Iterator[None]:
    """Use only attention kernels that have forward-mode derivatives, inside the context.

    The fused transformer layer and flash attention have none (torch 2.14); both compute what their plain
    versions compute.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class Linearisation:
    """The Jacobian J (m x n) of `f` at `x`, known by its products; rows and columns are row-major flattened.

    Products run all at once under `vmap`, or one after another where `f` uses an operation that it cannot batch.
    Not supported: functions of several tensors (bind the others first), complex or integer tensors.

    Attributes:
        n: numbers in `x`, the columns of J.
        m: numbers in `f(x)`, the rows of J.
        value: `f(x)`, detached.
    """

    def __init__(self, f: Function, x: Tensor, name: str = "the function") -> None:
        """Evaluate `f` at `x` twice, and refuse what cannot be linearised.

        Args:
            f: takes a tensor like `x`, returns one floating tensor.
            x: the point, any shape, floating.
            name: how error messages call `f`.

        Raises:
            InputError: where `x` or `f(x)` is not a finite floating tensor, or two evaluations differ.
        """
        self.f, self.x, self.name = f, x.detach(), name
        if not x.is_floating_point():
            raise InputError(f"{name}: its input must be a floating tensor, got {x.dtype}")
        if not x.numel():
            raise InputError(f"{name}: its input is empty, of shape {tuple(x.shape)}")
        if not bool(torch.isfinite(x).all()):
            raise InputError(f"{name}: its input has values that are not finite")
        with differentiable_kernels():
            first, second = self._call(self.x.clone()), self._call(self.x.clone())
        if not torch.equal(first, second):
            if not bool(torch.isfinite(first).all()):
                raise InputError(f"{name}: its output has values that are not finite")
            raise InputError(
                f"{name} is not deterministic: two evaluations at the same input differ by up to "
                f"{float((first - second).abs().max()):.3g}. Is dropout left on? Call .eval(), or pass training=False."
            )
        if not bool(torch.isfinite(first).all()):
            raise InputError(f"{name}: its output has values that are not finite")
        self.n, self.m, self.value = x.numel(), first.numel(), first
        self._batched = True

    @property
    def dtype(self) -> np.dtype:
        """Of `x`, as numpy has it."""
        return np.dtype("f8" if self.x.dtype == torch.float64 else "f4")

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

        def product(tangent: Tensor) -> Tensor:
            # f may work in place on its input: the clone inside keeps x and the tangent unchanged
            return torch.func.jvp(lambda x: self.f(x.clone()), (self.x,), (tangent.reshape(self.x.shape),))[1].reshape(
                -1
            )

        with differentiable_kernels():
            return self._map(product, tangents.to(self.x.dtype), self.m)

    def vjp(self, cotangents: Tensor) -> Tensor:
        """Return `cotangents @ J`: one reverse-mode product per row.

        Args:
            cotangents: (c, m), of the dtype and device of `x`.

        Returns:
            (c, n).
        """
        with differentiable_kernels(), torch.enable_grad():
            pull = torch.func.vjp(lambda x: self.f(x.clone()), self.x)[1]

            def product(cotangent: Tensor) -> Tensor:
                return pull(cotangent.reshape(self.value.shape))[0].reshape(-1)

            return self._map(product, cotangents.to(self.value.dtype), self.n).detach()

    def _map(self, product: Callable[[Tensor], Tensor], rows: Tensor, size: int) -> Tensor:
        if not len(rows):
            return rows.new_zeros((0, size))
        if self._batched:
            try:
                return torch.func.vmap(product)(rows)
            except RuntimeError as error:
                if not _is_about_batching(error):
                    raise
                self._batched = False
        return torch.stack([product(row) for row in rows])


def _is_about_batching(error: RuntimeError) -> bool:
    text = str(error).lower()
    return ("vmap" in text or "batching rule" in text) and "random" not in text


def complex_product(product: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """A real product of complex rows: of their real and imaginary parts, all at once."""
    both = product(torch.cat([rows.real, rows.imag]).contiguous())
    return torch.complex(both[: len(rows)], both[len(rows) :])
