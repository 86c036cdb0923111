"""A trained checkpoint of your own: the spectra of its blocks, as a table of S per block and a picture along depth.

A small residual CNN learns to tell gratings of four orientations apart (drawn here, with noise), its weights are saved,
and `stiffcore.analyze` reads them back: `package.module:factory` names a function that builds the network, `weights`
the file. Here module and factory are this script's own; the folder of the script is where Python looks for them.
S is the stiffness index max Re / min Re (Eq. 10 of "Block-level stiffness analysis of residual networks"), "S active"
the same without the structural zeros of the last ReLU; of the branch F, `stable_step` is the largest step at which
explicit Euler damps what decays in x' = F(x). A branch that has eigenvalues on both sides of 0 has a negative S.

A study that takes hours would keep its folder, to go on after a kill: here it is temporary.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

import stiffcore

SIZE, CHANNELS, CLASSES, DEPTH = 8, 6, 4, 3


def factory():
    """The network, as `stiffcore run --network own_checkpoint:factory` would also find it."""
    blocks = [BasicBlock(CHANNELS, CHANNELS) for _ in range(DEPTH)]
    stem = [nn.Conv2d(1, CHANNELS, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, CLASSES))


def gratings(count, generator):
    """Images (count, 1, SIZE, SIZE) of stripes at 0, 45, 90 and 135 degrees, and which."""
    labels = torch.randint(CLASSES, (count,), generator=generator)
    phase, noise = torch.rand(count, 1, 1, generator=generator), torch.randn(count, SIZE, SIZE, generator=generator)
    at = torch.arange(SIZE) / SIZE
    angle = (labels * torch.pi / CLASSES)[:, None, None]
    along = at[None, None, :] * angle.cos() + at[None, :, None] * angle.sin()
    return ((2 * torch.pi * (2 * along + phase)).sin() + 0.5 * noise)[:, None], labels


def train(steps, generator, file):
    network = factory()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(steps):
        x, labels = gratings(64, generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), labels).backward()
        optimizer.step()
    torch.save(network.state_dict(), file)


def main(to, quick):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "gratings.pt"
        train(60 if quick else 300, generator, file)
        x, labels = gratings(1 if quick else 3, generator)
        run = stiffcore.analyze(
            "own_checkpoint:factory",
            x,
            labels,
            run=f"{folder}/run",
            weights=file,
            functions="block,branch",
            memory="2GiB",
        )
        table = run.metrics()
    what = ["image", "correct", "number", "block", "function", "n", "k"]
    found = ["S", "S_active", "negative", "stable_step", "certified"]
    print(table[what + found].to_string(index=False, float_format="{:.4g}".format))
    print(f"{int(table.certified.sum())} of {len(table)} spectra certified")

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    whole, branch = (table[table.function == function] for function in ("block", "branch"))
    for axis, part, column, title in (
        (axes[0], whole, "S_active", "block: S active"),
        (axes[1], branch, "stable_step", "branch: stable step of Euler"),
    ):
        axis.plot(part.number, part[column], "o", color="tab:blue", alpha=0.6)
        axis.set(title=title, xlabel="block", xticks=np.unique(part.number))
    style = {"lw": 6, "alpha": 0.4}
    axes[2].vlines(whole.number, whole.min_re_active, whole.abscissa, color="tab:blue", label="block", **style)
    axes[2].vlines(branch.number + 0.2, branch.min_re, branch.abscissa, color="tab:red", label="branch", **style)
    axes[2].axhline(0, color="0.6", lw=0.5)
    axes[2].set(title="from min Re to max Re", xlabel="block", xticks=np.unique(whole.number))
    axes[2].legend()
    figure.suptitle("along depth; one mark an image")
    figure.savefig(to, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", default="own_checkpoint.png", help="the picture")
    parser.add_argument("--quick", action="store_true", help="train for 60 steps, not 300; one image, not three")
    main(**vars(parser.parse_args()))
