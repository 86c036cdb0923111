"""Make docs/extremes-study.md and docs/study.md from the exported metrics in docs/data: never written by hand.

python docs/study_page.py                         writes the pages
python docs/study_summary.py                      writes the page of one page, and its pictures
python docs/study_page.py add EXPORT.csv NAME     adds the rows of an export to docs/data/NAME.csv first
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from tabulate import tabulate

from stiffcore.report.figures import paper_values
from stiffcore.report.statistics import FEWEST, SIGNIFICANT, correlations, labelled, spread
from stiffcore.run import DONE

HERE = Path(__file__).parent
NETWORKS = ("resnet18", "resnet34", "resnet50")
EXTREMES_HEAD = """# Are the residual blocks of ResNets stiff? S and the sign of the spectrum at many images

The true spectra (`matrix`: eigenvalues of each block's n x n Jacobian, skip and last ReLU included) of all square
blocks, at CIFAR-10 test images, with checkpoints trained for this project (ResNet18 84.2 %, ResNet50 77.7 % correct).
Rectangular blocks have no eigenvalues. S active is max Re / min Re without structural zeros; with them, S is infinite
wherever no eigenvalue is negative. How S and the sign are found and what proves them: [extremes.md](extremes.md).

    stiffcore run store/NETWORK --network NETWORK --weights NETWORK_cifar10.safetensors --normalize cifar10 \\
        --images cifar10_test_2000.npz --count 200 --solver extremes --memory 6GiB
    stiffcore export store/NETWORK --to store/NETWORK.csv
    python docs/study_page.py add store/NETWORK.csv extremes-NETWORK

Each file in `docs/data` holds rows of such exports, the columns that this page needs. Images are the first of the
test set.
"""
STUDY_HEAD = """# The paper's tables, reproduced, and the true spectra beside them

"Block-level stiffness analysis of residual networks" gives, for CIFAR-10 ResNets, the stiffness index S = max Re / min
Re and the share P of eigenvalues with negative real part, per block and per label, and correlates both with accuracy
and loss. Its numbers are spectra of tensor slices ([why](theory.md#two-kinds-of-spectrum)). This page has the same
tables from checkpoints of our own at real test images, the paper's values beside, and then the spectra of the Jacobian
matrices of the same blocks (`matrix`) and of the right-hand sides F of x' = F(x) (`branch`).

    stiffcore run store/slices --network NETWORK --weights NETWORK_cifar10.safetensors --normalize cifar10 \\
        --images cifar10_test_2000.npz --count IMAGES --kind tensor-slices --keep metrics --memory 6GiB
    stiffcore run store/spectra --network NETWORK --weights NETWORK_cifar10.safetensors --normalize cifar10 \\
        --images cifar10_test_2000.npz --count IMAGES --function branch --memory 6GiB
    stiffcore export store/slices --to store/slices.csv
    stiffcore export store/spectra --to store/spectra.csv
    python docs/study_page.py add store/slices.csv slices-NETWORK
    python docs/study_page.py add store/spectra.csv spectra-NETWORK

The spectra of the blocks themselves (function `block`) are those of the [study of S and the sign](extremes-study.md).
The checkpoints were trained for this project (ResNet18 84.2 %, ResNet34 83.5 %, ResNet50 77.7 % correct); they are not
the paper's, which are not public, so values need not agree. Images are the first of `cifar10_test_2000.npz`, in which
any ten in a row have each label once. Values are means over images with the standard deviation in brackets, of
certified spectra only. Correlations are over images, Pearson's r as in the paper, in brackets its interval of 95 % over
resampled images, with p as it stands, and corrected by Holm and by Benjamini and Hochberg for the number of tests in
the table; bold: p < 0.05 as it stands.
"""
FINDINGS = """## What agrees with the paper, what does not, and why

**The sizes agree to the digit.** The numbers of elements and of "eigenvalues" of Tables 10 and 11 are those of all
tensor slices, of square and rectangular blocks alike: block 1 of ResNet18 has 268,435,456 elements, as a
16,384 x 16,384 Jacobian has, and 268,435,456 / 16 = 16,777,216 eigenvalues of 16 x 16 slices. The Jacobian has 16,384.

**S agrees in sign, order of size and pattern.** It is negative everywhere, -1 to -2 in blocks with a projection
shortcut, {identity} here and {theirs_identity} in the paper in those with an identity (ResNet18 and ResNet34), and of
large size towards the end. It hardly depends on the image (the standard deviation is {varies} % of the mean at most) or
on the label, here as in the paper. The values of single blocks differ by up to a factor of {factor}, as the weights do:
ours were trained for 8 epochs. In the one block of ResNet50 that the paper reached, the last, S is {theirs_last} there
and {ours_last} here.

**P agrees in its growth along depth,** from 3 % (ResNet50: 1 %) to a fifth and more. In the blocks between, ours is up
to {share} times the paper's. P counts exact zeros in its denominator, and how many there are depends on how many
outputs ReLU holds at zero, so on the training; whether that is all of it, these checkpoints cannot say.

**Correlations with accuracy and loss.** The paper finds {theirs} of its p-values for single blocks of ResNet18 under
0.05. Here {raw} of {tests} are, at {images} images, and {holm} after Holm's correction. P of block 8 and accuracy: r =
{last} (p = {last_p}), in the paper {paper_last}. With so many tests, a coefficient that is small and significant as
it stands says little; the corrected columns are the ones to read. What our checkpoints show is a property of these
checkpoints.

**What slices say, and what they do not.** A slice is the map from one channel of the input to one number of the output,
with no reading as the right-hand side of an ODE: its rows and columns are the height and width of the image. Its
eigenvalues come in both signs because kernels do, whatever the block does as a whole. The Jacobian matrix of the same
blocks tells another story: of {square} spectra of square blocks of ResNet18 and ResNet50 ([study of S and the
sign](extremes-study.md)), {none} are proved to have no eigenvalue with negative real part, and the {negative} others
are all of {block} of ResNet18, the first block. Where no real part is negative, Eq. 10 gives S = infinity, by the
structural zeros of the last ReLU; without them S is {least} to {most}, and in that first block up to {first}. The
negative shares of the paper's tables are those of slices; they do not carry over to the Jacobian.

**The branches F, alone, have both signs.** In the reading x' = F(x), what decides is the spectrum of F's Jacobian
(`branch`). In {branches} of them, {shares} of the eigenvalues
(means of blocks) have a negative real part, about as many a positive one, and the rest are zeros. The largest real part
is {right} (means of blocks), the smallest {left}: F has growing modes beside decaying ones, and S is between
{ratio}. Slices have the signs that F has and the block does not; but their numbers are not those of F.
"""
COLUMNS = ["image_index", "label", "prediction", "loss", "correct", "number", "block", "function", "kind", "n", "k"]
COLUMNS += ["elements", "eigenvalues", "state", "certified", "S", "S_active", "S_active_error", "negative", "zero"]
COLUMNS += ["abscissa", "min_re_active", "basis", "seconds"]
UNIT = ["image_index", "number", "function"]


table = partial(tabulate, tablefmt="github", disable_numparse=True)


def read(name):
    """The rows of docs/data/NAME.csv; none where there is no such file."""
    file = HERE / "data" / f"{name}.csv"
    rows = table_of(file) if file.exists() else pd.DataFrame(columns=COLUMNS)
    return rows.assign(image=rows["image_index"])


def table_of(file):
    return pd.read_csv(file, na_values=["nan"], keep_default_na=False)


def add(export, name):
    """Add finished units of an export to docs/data/NAME.csv; one that stands there already is replaced."""
    file, found = HERE / "data" / f"{name}.csv", table_of(export)
    found = found[found["state"].isin(DONE)]
    if file.exists():
        columns = table_of(file).columns
        found = pd.concat([table_of(file), found[columns]], ignore_index=True)
    else:
        found = found[COLUMNS]
    found = found.drop_duplicates(UNIT, keep="last").sort_values(UNIT)
    found.to_csv(file, index=False, float_format="%.10g", na_rep="nan")


def counts(rows, done):
    doubtful, accuracy = (rows["state"] == "not certified").sum(), done.drop_duplicates("image")["correct"].mean()
    return (
        f"{len(done)} certified spectra ({doubtful} not certified) at {done['image'].nunique()} images, of which "
        f"{100 * accuracy:.1f} % are classified correctly."
    )


def distribution(rows):
    found = spread(rows, ["number", "block"], ["S_active"])
    header = ["block", "n", "images", "mean", "sd", "min", "quartile", "median", "quartile", "max"]
    lines = []
    for row in found.to_dict("records"):
        part = rows[rows["block"] == row["block"]]
        numbers = [f"{row[name]:.4g}" for name in ("mean", "std", "min", "q25", "median", "q75", "max")]
        none = f"{int((part['negative'] == 0).sum())} of {len(part)}"
        error = f"{part['S_active_error'].max():.1e}"
        name = f"{row['number']} {row['block']}"
        lines.append([name, f"{part['n'].iloc[0]:,}", row["images"], *numbers, error, none])
    return table(lines, [*header, "worst error of S", "no negative: proved"])


def coefficient(row, test):
    text = f"{row[test]:.2f} [{row[f'{test}_low']:.2f}, {row[f'{test}_high']:.2f}]"
    corrected = [f"{row[f'{test}_{which}']:.2g}" for which in ("p", "holm", "bh")]
    return [f"**{text}**" if row[f"{test}_p"] < SIGNIFICANT else text, *corrected]


def related(rows):
    found = correlations(rows, ["S_active"])
    lines = []
    for row in found.to_dict("records"):
        cells = [cell for test in ("pearson", "spearman") for cell in coefficient(row, test)]
        lines.append([f"{row['number']} {row['block']}", row["outcome"], row["images"], *cells])
    header = ["block", "S active with", "images", "Pearson", "p", "Holm", "BH", "Spearman", "p", "Holm", "BH"]
    return table(lines, header)


def extremes_page():
    parts = [EXTREMES_HEAD]
    for network in ("resnet18", "resnet50"):
        rows = read(f"extremes-{network}")
        done = rows[rows["state"] == "done"]
        if not len(done):
            continue
        bases = done["basis"].str.replace(r", margin.*", "", regex=True).value_counts()
        spoken = ", ".join(f"{count} by {name}" for name, count in bases.items())
        parts += [
            f"## {network}",
            f"{counts(rows, done)} What the sign rests on: {spoken}.",
            distribution(done),
            "Correlation over images with accuracy (correct, 1 or 0) and loss; p as it stands, and corrected by Holm "
            "and by Benjamini and Hochberg for the number of tests in this table; bold: p < 0.05 as it stands.",
            related(done),
        ]
    return "\n\n".join(part.strip() for part in [*parts, again()]) + "\n"


def again():
    """What the rules of today say of some of these spectra, drawn at random."""
    rows = table_of(HERE / "data" / "extremes-again.csv")
    off = (rows["S_active"] - rows["S_active_then"]).abs()
    allowed = rows["S_active_error"] + rows["S_active_error_then"] + 1e-11 * rows["S_active"].abs()  # digits kept
    moved, blocks = int((off > allowed).sum()), rows.groupby(["network", "number"]).ngroups
    plain = rows["verdict"] == "certified"
    said = rows[~plain].groupby("verdict").size()
    others = "".join(f"; {count} is {verdict!r}" for verdict, count in said.items())
    none = int(((rows["negative_low"] == 0) & (rows["negative_high"] == 0)).sum())
    lines = []
    for (network, number), part in rows.groupby(["network", "number"]):
        errors = [f"{part[name].max():.1e}" for name in ("S_active_error_then", "S_active_error")]
        apart = f"{(off / rows['S_active'].abs())[part.index].max():.1e}"
        certified = f"{int(plain[part.index].sum())} of {len(part)}"
        lines.append([network, number, len(part), certified, *errors, apart])
    header = ["network", "block", "images", "certified", "worst error then", "now", "largest change of S, relative"]
    return f"""
## Looked at again

The spectra above were found before anything certified had to be proved beyond first order ([trust](trust.md)): counts
hold of J and not only of M as it was rounded, ends are those beyond which none is counted, and an error is a bound.
{len(rows)} of them, drawn at random from each of the {blocks} blocks, were computed again by these rules, at commit
33fa088 (`docs/data/extremes-again.csv`; of the others nothing is said). {int(plain.sum())} are certified with nothing
open{others}. {none} are proved to have no eigenvalue with negative real part. S differs by more than both errors and
rounding in {moved}. The tables above are as they were found, with errors to first order.

{table(lines, header)}
"""


def mean(values, factor=1.0, digits=4):
    """Mean and standard deviation; how many are infinite or unknown is said."""
    values = values.astype(float) * factor
    finite = values[values.abs() < float("inf")]
    text = f"{finite.mean():.{digits}g}" + (f" ({finite.std(ddof=1):.2g})" if len(finite) > 1 else "")
    others = len(values) - len(finite)
    return (text if len(finite) else "") + (f" {others} infinite or unknown" if others else "")


def published(network, which):
    """The paper's rows of one table, by block or label."""
    return {row.get("block", row.get("label")): row for row in paper_values(network, which)}


def by_block(network, rows):
    paper, sizes, lines = published(network, "by_block"), published(network, "sizes"), []
    for (number, block), part in rows.groupby(["number", "block"]):
        theirs, size = paper.get(number), sizes.get(number)
        line = [f"{number} {block}", part["image"].nunique(), mean(part["S"])]
        line += [f"{theirs['S']:.2f}" if theirs else "-", mean(part["negative"], 100, 3)]
        line += [f"{100 * theirs['negative']:.2f}" if theirs else "-"]
        for name in ("elements", "eigenvalues"):
            line += [f"{part[name].iloc[0]:,}", f"{size[name]:,}" if size else "-"]
        lines.append(line)
    header = ["block", "images", "S", "S, paper", "P %", "P %, paper", "elements", "paper", "eigenvalues", "paper"]
    return table(lines, header)


def by_label(network, rows):
    paper, lines = published(network, "by_label"), []
    if network == "resnet50":  # the paper has its last block alone
        rows = rows[rows["number"] == 16]
    # as the paper: means over blocks, image by image
    each = labelled(rows).groupby(["label", "image"])[["S", "negative"]].mean().reset_index()
    for label, part in each.groupby("label"):
        theirs = paper[label]
        line = [label, len(part), mean(part["S"]), f"{theirs['S']:.2f}"]
        lines.append([*line, mean(part["negative"], 100, 3), f"{100 * theirs['negative']:.2f}"])
    return table(lines, ["label", "images", "S", "S, paper", "P %", "P %, paper"])


def correlated(network, rows):
    rows = rows.groupby("number").filter(lambda block: block["image"].nunique() >= FEWEST)
    if rows.empty:
        return f"None: fewer than {FEWEST} images."
    paper, lines = published(network, "correlations"), []
    names = {("S", "correct"): "acc_S", ("negative", "correct"): "acc_P"}
    names |= {("S", "loss"): "loss_S", ("negative", "loss"): "loss_P"}
    for row in correlations(rows, ["S", "negative"]).to_dict("records"):
        theirs = paper.get(row["number"], {}).get(names[row["metric"], row["outcome"]])
        letter = "P" if row["metric"] == "negative" else "S"
        cells = [*coefficient(row, "pearson"), *coefficient(row, "spearman")]
        cells += [f"{theirs['r']:.2f}", f"{theirs['p']:.2f}"] if theirs else ["-", "-"]
        outcome = "accuracy" if row["outcome"] == "correct" else "loss"
        lines.append([f"{row['number']} {row['block']}", f"{letter} with {outcome}", row["images"], *cells])
    header = ["block", "what", "images", "Pearson", "p", "Holm", "BH", "Spearman", "p", "Holm", "BH"]
    return table(lines, [*header, "r, paper", "p, paper"])


def true_spectra(rows):
    lines = []
    for (number, block, function), part in rows.groupby(["number", "block", "function"]):
        line = [f"{number} {block}", function, f"{part['n'].iloc[0]:,}", part["image"].nunique()]
        line += [mean(part["S_active"]), mean(part["negative"], 100, 3), mean(part["zero"], 100, 3)]
        line += [mean(part["min_re_active"]), mean(part["abscissa"]), f"{part['S_active_error'].max():.1e}"]
        lines.append(line)
    header = ["block", "function", "n", "images", "S active", "P %", "zero %", "min Re, active", "max Re"]
    return table(lines, [*header, "worst error of S"])


def findings():
    """What agrees with the paper, what does not, and why; the figures in it from the tables below."""
    rows = read("slices-resnet18")
    done = rows[(rows["state"] == "done") & (rows["kind"] == "tensor-slices")]
    paper = published("resnet18", "correlations")
    tests = correlations(done, ["S", "negative"])
    theirs = [test["p"] < SIGNIFICANT for row in paper.values() for name, test in row.items() if name != "block"]
    last = tests[(tests["number"] == 8) & (tests["outcome"] == "correct") & (tests["metric"] == "negative")].iloc[0]
    slices = pd.concat([read(f"slices-{n}").assign(network=n) for n in NETWORKS], ignore_index=True)
    slices = slices[(slices["state"] == "done") & (slices["kind"] == "tensor-slices")]
    each = slices.groupby(["network", "number"])[["S", "negative"]].agg(["mean", "std"])
    varies = (each["S", "std"] / each["S", "mean"].abs()).max()
    beside = pd.DataFrame(
        [
            {"network": n, "number": number, "S": row["S"], "negative": row["negative"]}
            for n in NETWORKS
            for number, row in published(n, "by_block").items()
        ]
    ).set_index(["network", "number"])
    ours = each.xs("mean", axis=1, level=1).loc[beside.index]
    ratio, with_identity = ours["S"] / beside["S"], ours["S"] < -2
    small = beside.index.get_level_values("network") != "resnet50"
    identity = [
        f"{s[with_identity & small].max():.0f} to {s[with_identity & small].min():.0f}"
        for s in (ours["S"], beside["S"])
    ]
    square = pd.concat([read("extremes-resnet18"), read("extremes-resnet50")], ignore_index=True)
    square = square[square["state"] == "done"]
    none, doubtful = int((square["negative"] == 0).sum()), square["negative"].isna().sum()
    block, ratios = square[square["negative"] > 0]["block"].iloc[0], square[square["negative"] == 0]["S_active"]
    others = square.loc[ratios.index, "block"] != block
    branch = pd.concat([read(f"spectra-{n}").assign(network=n) for n in NETWORKS], ignore_index=True)
    branch = branch[(branch["function"] == "branch") & (branch["state"] == "done")]
    means = branch.groupby(["network", "block"])[["negative", "abscissa", "min_re_active", "S_active"]].mean()
    ends = {name: (means[name].min(), means[name].max()) for name in means}
    shares = (100 * means["negative"]).groupby("network").agg(["min", "max"])
    return FINDINGS.format(
        images=done["image"].nunique(),
        varies=f"{100 * varies:.0f}",
        identity=identity[0],
        theirs_identity=identity[1],
        factor=f"{pd.concat([ratio[small], 1 / ratio[small]]).max():.1f}",
        share=f"{(ours['negative'] / beside['negative']).max():.1f}",
        ours_last=f"{ours['S'].iloc[-1]:.0f}",
        theirs_last=f"{beside['S'].iloc[-1]:.0f}",
        tests=len(tests),
        raw=int((tests["pearson_p"] < SIGNIFICANT).sum()),
        holm=int((tests["pearson_holm"] < SIGNIFICANT).sum()),
        theirs=f"{sum(theirs)} of {len(theirs)}",
        last=f"{last['pearson']:.2f}",
        last_p=f"{last['pearson_p']:.2g}",
        paper_last=f"{paper[8]['acc_P']['r']:.2f}",
        square=f"{len(square):,}",
        none=f"{none:,}",
        negative=f"{len(square) - none - doubtful:,}",
        block=block,
        least=f"{ratios[others].min():.2g}",
        most=f"{ratios[others].max():.2g}",
        first=f"{ratios[~others].max():,.0f}",
        branches=f"{len(branch):,}",
        shares=" and ".join(f"{low:.3g} to {high:.3g} % ({name})" for name, low, high in shares.itertuples()),
        right="{:.2g} to {:.2g}".format(*ends["abscissa"]),
        left="{:.2g} to {:.2g}".format(*ends["min_re_active"]),
        ratio="{:.2g} and {:.2g}".format(*ends["S_active"]),
    )


BEYOND = """## Does stiffness say anything beyond confidence?

A network that is sure of its answer has a wide margin between its two largest logits, and mostly a small loss. So a
metric that follows the margin correlates with the loss, and adds nothing that the logits do not say. The table has
Spearman's rho with the loss, first plain, then with the margin held fixed (the partial coefficient of the ranks; the
margins are those of `python docs/study_margins.py`), in brackets intervals of 95 %, p corrected by Holm within each
network and kind.

{verdicts}

So {before} of {tests} metrics of blocks follow the loss, and {after} still do among images of equal margin, weakly
({largest} at most): in these checkpoints, almost all that stiffness has to say of the loss, confidence says."""


SPOKEN = {"S": "S", "S_active": "S active", "negative": "P", "abscissa": "max Re"}


def with_margins(network, rows):
    margins = table_of(HERE / "data" / f"margins-{network}.csv")
    return rows.merge(margins[["image_index", "margin"]], on="image_index")


def beyond_confidence():
    """Of each network and kind with enough images: correlations with the loss, plain and with the margin held fixed."""
    for network, kind, name, metrics in (
        ("resnet18", "tensor-slices", "slices-resnet18", ["S", "negative"]),
        ("resnet50", "tensor-slices", "slices-resnet50", ["S", "negative"]),
        ("resnet18", "matrix", "extremes-resnet18", ["S_active", "abscissa"]),
        ("resnet50", "matrix", "extremes-resnet50", ["S_active", "abscissa"]),
    ):
        rows = with_margins(network, read(name))
        rows = rows.groupby("number").filter(lambda block: block["image"].nunique() >= FEWEST)
        yield network, kind, correlations(rows, metrics, ["loss"]), correlations(rows, metrics, ["loss"], held="margin")


def beyond():
    lines, verdicts, totals, largest = [], [], np.zeros(3, int), 0.0
    for network, kind, plain, held in beyond_confidence():
        for before, after in zip(plain.to_dict("records"), held.to_dict("records"), strict=True):
            line = [network, kind, f"{before['number']} {before['block']}", SPOKEN[before["metric"]], before["images"]]
            for row in (before, after):
                text, _, corrected, _ = coefficient(row, "spearman")
                line += [text, corrected]
            lines.append(line)
        sure = [part["spearman_holm"] < SIGNIFICANT for part in (plain, held)]
        totals += [len(plain), *(part.sum() for part in sure)]
        largest = max([largest, *held["spearman"][sure[1]].abs()])
        verdicts.append(
            f"- {network}, {kind}: {sure[0].sum()} of {len(plain)} are significant after Holm's correction, "
            f"{sure[1].sum()} with the margin held fixed."
        )
    header = ["network", "kind", "block", "metric", "images", "rho with loss", "Holm", "margin held fixed", "Holm"]
    tests, before, after = totals
    text = BEYOND.format(
        verdicts="\n".join(verdicts), tests=tests, before=before, after=after, largest=f"{largest:.2f}"
    )
    return [text, table(lines, header)]


def study_page():
    parts = [STUDY_HEAD, findings(), *beyond()]
    for network in NETWORKS:
        for kind, name in (("tensor-slices", f"slices-{network}"), ("matrix", f"spectra-{network}")):
            rows = read(name)
            if kind == "matrix" and len(rows):
                rows = pd.concat([read(f"extremes-{network}"), rows], ignore_index=True)
            done = rows[(rows["state"] == "done") & (rows["kind"] == kind)]
            if not len(done):
                continue
            if kind == "matrix":
                parts += [f"## {network}: the Jacobian matrices", counts(rows, done), true_spectra(done)]
                continue
            parts += [f"## {network}: tensor slices", counts(rows, done), by_block(network, done)]
            parts += ["By label, means over blocks:" if network != "resnet50" else "By label, block 16:"]
            parts += [by_label(network, done), "Correlations:", correlated(network, done)]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


if __name__ == "__main__":
    if sys.argv[1:2] == ["add"]:
        add(*sys.argv[2:])
    (HERE / "extremes-study.md").write_text(extremes_page())
    (HERE / "study.md").write_text(study_page())
