"""A convolution as matrix products, for feature maps so small that torch's float64 kernel is slow on them."""

import torch
from torch import Tensor, fx

# torch's float64 convolution on the CPU multiplies image by image. At 4 x 4 pixels one product over the whole batch
# is 2.5 times as fast (20 against 8 GF/s, 512 channels, 1 thread); at 8 x 8 both are equal, at 16 x 16 it is slower.
SMALL_MAP_PIXELS = 16


def convolution_by_products(x: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int]) -> Tensor:
    """Correlate with stride and dilation 1: one product for each tap of the kernel, over all positions at once.

    Args:
        x: (N, C_in, H, W).
        weight: (C_out, C_in, kh, kw).
        bias: (C_out,), or None.
        padding: of H and of W, zeros.

    Returns:
        (N, C_out, H + 2 padding - kh + 1, W + 2 padding - kw + 1), as `torch.nn.functional.conv2d` up to rounding.
    """
    _, _, kh, kw = weight.shape
    last = x.permute(0, 2, 3, 1)
    if any(padding):
        last = torch.nn.functional.pad(last, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    height, width = last.shape[1] - kh + 1, last.shape[2] - kw + 1
    taps = ((i, j) for i in range(kh) for j in range(kw))
    # only a contiguous factor is folded into one product over the batch, also under vmap
    products = (last[:, i : i + height, j : j + width].contiguous() @ weight[:, :, i, j].T for i, j in taps)
    total = next(products)
    for product in products:
        total = total + product
    return (total if bias is None else total + bias).permute(0, 3, 1, 2)


def use_products(node: fx.Node) -> None:
    """Rewrite an `aten.convolution` node to `convolution_by_products` where that is faster."""
    x, weight, bias, stride, padding, dilation, transposed, _, groups = node.args
    shape = node.meta["shape"]
    plain = bool(not transposed and groups == 1 and all(s == 1 for s in (*stride, *dilation)))  # type: ignore[misc]
    small = len(shape) == 4 and shape[2] * shape[3] <= SMALL_MAP_PIXELS
    if plain and small:
        node.target = convolution_by_products
        node.args = (x, weight, bias, padding)


def products_items(x: tuple[int, ...], out: tuple[int, ...], padding: list[int]) -> int:
    """Numbers held besides input and output: the padded input, one tap's slice of it, its product, and the last sum."""
    padded = x[1] * (x[2] + 2 * padding[0]) * (x[3] + 2 * padding[1])
    return padded + x[1] * out[2] * out[3] + 2 * out[1] * out[2] * out[3]
