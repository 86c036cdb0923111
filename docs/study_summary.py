"""Make docs/study-summary.md and its three pictures, docs/pictures/*.png, from docs/data: never written by hand.

python docs/study_summary.py

Its third part rests on docs/data/training-resnet20-IMAGES.csv, each made by

    stiffcore run store/t --network resnet20 --weights resnet20-IMAGES.safetensors --normalize cifar10 \\
        --images cifar10_test_2000.npz --count 5 --kind tensor-slices
    stiffcore export store/t --to store/t.csv
    python docs/study_page.py add store/t.csv training-resnet20-IMAGES
"""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from study_page import SPOKEN, beyond_confidence, published, read, table_of

from stiffcore.report.statistics import SIGNIFICANT

HERE = Path(__file__).parent
PICTURES = HERE / "pictures"
OURS, THEIRS, TRUE, BRANCH = "#1f5fa8", "#a8326b", "#c2571a", "#3a8f6b"
PAGE = """# Are residual networks stiff? The study on one page

The paper takes the Jacobian of each residual block at an image, its eigenvalues, the stiffness index S = max Re / min
Re and the share P of eigenvalues with negative real part, and finds S and P correlated with accuracy and loss. We did
the same, with certified numbers, for ResNet18 at {images18} images, ResNet34 at {images34}, and the last block of
ResNet50 at {images50}, and then what the paper could not: the spectra of the Jacobian matrices themselves, of every
square block. All tables: [study.md](study.md). This page: `python docs/study_summary.py`.

## 1. The paper's numbers can be reproduced, but they are not eigenvalues of the Jacobian

![P along depth](pictures/study-depth.png)

Its published "eigenvalues" are those of all H x W slices of the Jacobian tensor, as their number shows (16,777,216 for
a block whose Jacobian has order 16,384). We find the same growth of P along depth in slices (blue; crosses: the
paper's). The Jacobian of the same blocks (orange) has no eigenvalue with negative real part in {none} of {square}
spectra, each with a proof; the branch F of x' = F(x) alone (green) has both signs. **A block is not stiff: without
structural zeros, S is {least} to {most}** in all blocks but the first of ResNet18.

## 2. What S and P say of the loss, the logits say

![Correlations with the loss, plain and with the margin held fixed](pictures/study-confidence.png)

{before} of {tests} metrics of blocks are correlated with the loss (after Holm's correction; filled points). Among
images of equal margin between the two largest logits, {after} are, and weakly: a network that is unsure of an image has
another Jacobian there, and a larger loss; the Jacobian adds next to nothing.

## 3. Random weights have the same S and P of slices

![S and P of tensor slices along depth, during a training](pictures/study-training.png)

A ResNet20 from random weights to {trained:,} images of training ({accuracy} % of {tested} test images correct; weights
by `python docs/study_training.py`), tensor slices of all blocks at {images} images. Random weights have S from
{random_s} and P growing along depth from {random_p} %; trained ones have S from {trained_s} and P from {trained_p} %.
**The pattern of the paper's tables is there before any training.** A likely reason: kernels have entries of either
sign, and the smaller the maps get, the more of a slice's entries stand on its diagonal.

Not covered: other data sets than CIFAR-10; our checkpoints are not the paper's, which are not public, and were trained
for 8 epochs; correlations say nothing of causes.
"""


def save(figure, name):
    PICTURES.mkdir(exist_ok=True)
    figure.savefig(PICTURES / name, dpi=110)


def done(name):
    rows = read(name)
    return rows[rows["state"] == "done"]


def draw_depth():
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axis, network in zip(figure.subplots(1, 2), ("resnet18", "resnet50"), strict=True):
        slices = done(f"slices-{network}").groupby("number")["negative"].mean() * 100
        axis.plot(slices.index, slices, "o-", color=OURS, label="tensor slices")
        paper = published(network, "by_block")
        axis.plot(list(paper), [100 * row["negative"] for row in paper.values()], "x", color=THEIRS, label="the paper")
        square = done(f"extremes-{network}").groupby("number")["negative"].mean() * 100
        axis.plot(square.index, square, "s", color=TRUE, label="Jacobian of the block")
        branch = done(f"spectra-{network}").query("function == 'branch'").groupby("number")["negative"].mean() * 100
        axis.plot(branch.index, branch, "^", color=BRANCH, label="Jacobian of the branch F")
        axis.set_title(network)
        axis.set_xlabel("block")
        axis.set_ylabel("P: negative real parts, %")
        axis.legend(fontsize=8)
    save(figure, "study-depth.png")


def draw_confidence(parts):
    rows = [
        (network, kind, SPOKEN[b["metric"]], b, a)
        for network, kind, plain, held in parts
        for b, a in zip(plain.to_dict("records"), held.to_dict("records"), strict=True)
    ]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axis, x = figure.subplots(), np.arange(len(rows))
    for place, colour, label in ((3, OURS, "plain"), (4, TRUE, "margin held fixed")):
        for i, row in zip(x, rows, strict=True):
            found = row[place]
            at = i + 0.2 * (place == 4)
            sure = found["spearman_holm"] < SIGNIFICANT
            axis.plot([at, at], [found["spearman_low"], found["spearman_high"]], color=colour, linewidth=0.8)
            axis.plot(
                [at], [found["spearman"]], "o", color=colour, markersize=4, markerfacecolor=colour if sure else "white"
            )
        axis.plot([], [], "o", color=colour, label=label)
    names = [f"{network} {kind}" for network, kind, *_ in rows]
    for i, name in enumerate(dict.fromkeys(names)):
        first = names.index(name)
        axis.axvline(first - 0.5, color="#bbbbbb", linewidth=0.8)
        axis.text(first - 0.3, 0.67 - 0.06 * (i % 2), name, fontsize=7, va="top")
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set_ylim(-0.55, 0.7)
    axis.set_xticks([])
    axis.set_xlabel("metrics of blocks, by depth: S and P of slices, S active and max Re of matrices")
    axis.set_ylabel("Spearman's rho with loss")
    axis.legend(fontsize=8, loc="lower right")
    save(figure, "study-confidence.png")


def draw_training(rows):
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    steps = sorted(set(rows["trained"]))
    shades = np.linspace(0.85, 0, len(steps))
    for axis, metric, factor, label in zip(
        figure.subplots(1, 2), ("S", "negative"), (1, 100), ("S of slices", "P of slices, %"), strict=True
    ):
        means = rows.groupby(["trained", "number"])[metric].mean() * factor
        for shade, step in zip(shades, steps, strict=True):
            name = f"{step:,} images" if step else "random weights"
            axis.plot(means[step].index, means[step], "o-", color=(shade, shade * 0.6, 1 - shade), label=name)
        axis.set_xlabel("block of a ResNet20")
        axis.set_ylabel(label)
        axis.legend(fontsize=7)
    save(figure, "study-training.png")


def main():
    draw_depth()
    parts = list(beyond_confidence())
    draw_confidence(parts)
    stored = {int(file.stem.rsplit("-", 1)[1]): file for file in (HERE / "data").glob("training-resnet20-*.csv")}
    training = pd.concat([table_of(stored[step]).assign(trained=step) for step in sorted(stored)], ignore_index=True)
    draw_training(training)
    square = pd.concat([done("extremes-resnet18").assign(net=18), done("extremes-resnet50").assign(net=50)])
    none = square[square["negative"] == 0]
    ratios = none[~((none["net"] == 18) & (none["number"] == 1))]["S_active"]
    means = training.groupby(["trained", "number"])[["S", "negative"]].mean()
    last = max(stored)
    tested = table_of(HERE / "data" / f"margins-resnet20-{last}.csv")
    ends = {
        f"{name}_{letter}": f"{factor * means.loc[step, metric].iloc[0]:.2g} to {factor * extreme:.2g}"
        for name, step in (("random", 0), ("trained", last))
        for letter, metric, factor, extreme in (
            ("s", "S", 1, means.loc[step, "S"].min()),
            ("p", "negative", 100, means.loc[step, "negative"].max()),
        )
    }
    page = PAGE.format(
        images18=f"{done('slices-resnet18')['image'].nunique():,}",
        images34=done("slices-resnet34")["image"].nunique(),
        images50=done("slices-resnet50").query("number == 16")["image"].nunique(),
        none=f"{len(none):,}",
        square=f"{len(square):,}",
        least=f"{ratios.min():.2g}",
        most=f"{ratios.max():.2g}",
        tests=sum(len(plain) for _, _, plain, _ in parts),
        before=sum((plain["spearman_holm"] < SIGNIFICANT).sum() for _, _, plain, _ in parts),
        after=sum((held["spearman_holm"] < SIGNIFICANT).sum() for *_, held in parts),
        trained=last,
        accuracy=f"{100 * (tested['margin_of_label'] > 0).mean():.1f}",
        tested=len(tested),
        images=training["image_index"].nunique(),
        **ends,
    )
    (HERE / "study-summary.md").write_text(page)


if __name__ == "__main__":
    main()
