"""The spectrum of a transformer block, with LayerNorm before or after its two branches, in the complex plane.

`torch.nn.TransformerEncoderLayer` (Vaswani et al., Attention Is All You Need, 2017), untrained, at random tokens; all
tokens together are the state, so J is (tokens width) x (tokens width). Pre-norm is x + F(x): its branch F is the
right-hand side of x' = F(x), and the block's eigenvalues lie around 1. Post-norm ends in a LayerNorm: the sum goes
through it, so nothing is left that can be called a branch, and stiffcore refuses to guess one.

LayerNorm forgets the mean of each token (Ba et al., Layer Normalization, 2016). In post-norm the output has no mean, in
pre-norm F does not see it: either way one eigenvalue 0 a token, whose sign the certificate leaves open.
"""

import argparse

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

import stiffcore

TOKENS, WIDTH = 6, 16


def main(to):
    torch.manual_seed(0)
    x = torch.randn(1, TOKENS, WIDTH)
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    panels = iter(axes)
    for norm_first in (True, False):
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True, norm_first=norm_first)
        for function in ("block", "branch"):
            name = f"{'pre' if norm_first else 'post'}-norm {function}"
            try:
                s = stiffcore.spectrum(layer, x, function=function, name=name)
            except stiffcore.InputError as refused:
                print(f"{name}: refused: {refused}")
                continue
            zeros = np.sum(np.abs(s.values) <= 1e-12 * np.abs(s.values).max())
            print(f"{name}: {s.n} eigenvalues, {zeros} of them 0 to rounding; Re from", end=" ")
            print(f"{s.metrics['min_re']:.3f} to {s.metrics['abscissa']:.3f}; {s.verdict}")
            axis = next(panels)
            axis.plot(s.values.real, s.values.imag, "o", ms=4, alpha=0.6)
            centre = -1 if function == "branch" else 0
            axis.add_patch(plt.Circle((centre, 0), 1, fill=False, lw=0.8, ec="0.5"))
            axis.axvline(0, color="0.8", lw=0.5)
            title = name + (": Euler's disc |1 + l| = 1" if function == "branch" else ": unit circle")
            axis.set(title=title, xlabel="Re", ylabel="Im", xlim=(centre - 1.1, centre + 1.7), aspect="equal")
    figure.savefig(to, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", default="transformer_block.png", help="the picture")
    main(parser.parse_args().to)
