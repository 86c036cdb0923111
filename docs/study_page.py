"""Make docs/extremes-study.md and docs/study.md from the exported metrics in docs/data: never written by hand.

python docs/study_page.py
"""

import json
from functools import partial
from importlib.resources import files
from pathlib import Path

import pandas as pd
from tabulate import tabulate

from stiffcore.report.statistics import correlations, labelled, spread

HERE = Path(__file__).parent
NETWORKS = ("resnet18", "resnet34", "resnet50")
EXTREMES_HEAD = """# Are the residual blocks of ResNets stiff? S and the sign of the spectrum at many images

The true spectra (`matrix`: eigenvalues of each block's n x n Jacobian, skip and last ReLU included) of all square
blocks, at CIFAR-10 test images, with checkpoints trained for this project (ResNet18 84.2 %, ResNet50 77.7 % correct).
Rectangular blocks have no eigenvalues. S active is max Re / min Re without structural zeros; with them, S is infinite
wherever no eigenvalue is negative. How S and the sign are found and what proves them: [extremes.md](extremes.md).

    stiffcore run store/NETWORK --network NETWORK --weights NETWORK_cifar10.safetensors --normalize cifar10 \\
        --images cifar10_test_2000.npz --count 200 --solver extremes --memory 6GiB
    stiffcore export store/NETWORK --to docs/data/NETWORK.csv
    python docs/study_page.py

Each file in `docs/data` holds rows of such an export, the columns that this page needs. Images are the first of the
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
        --images cifar10_test_2000.npz --count IMAGES --function block,branch --memory 6GiB
    stiffcore export store/slices --to docs/data/slices-NETWORK.csv
    stiffcore export store/spectra --to docs/data/spectra-NETWORK.csv
    python docs/study_page.py

The checkpoints were trained for this project (ResNet18 84.2 %, ResNet34 83.5 %, ResNet50 77.7 % correct); they are not
the paper's, which are not public, so values need not agree. Images are the first of `cifar10_test_2000.npz`, in which
any ten in a row have each label once. Values are means over images with the standard deviation in brackets, of
certified spectra only. Correlations are over images, Pearson's r as in the paper, with p as it stands, and corrected by
Holm and by Benjamini and Hochberg for the number of tests in the table; bold: p < 0.05 as it stands.
"""
COLUMNS = ["image_index", "label", "prediction", "loss", "correct", "number", "block", "function", "kind", "n", "k"]
COLUMNS += ["elements", "eigenvalues", "state", "certified", "S", "S_active", "S_active_error", "negative", "zero"]
COLUMNS += ["abscissa", "min_re_active", "spectral_radius", "euler_stable", "largest_step", "basis", "seconds"]


table = partial(tabulate, tablefmt="github", disable_numparse=True)


def read(name):
    """All exports of that name as one table; a unit that stands in several counts once."""
    found = sorted((HERE / "data").glob(f"{name}*.csv"))
    if not found:
        return pd.DataFrame(columns=COLUMNS)
    rows = pd.concat([pd.read_csv(file, na_values=["nan"], keep_default_na=False) for file in found])
    rows = rows.drop_duplicates(["image_index", "block", "function"])
    return rows.assign(image=rows["image_index"])


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
    text = f"{row[test]:.2f}"
    corrected = [f"{row[f'{test}_{which}']:.2g}" for which in ("p", "holm", "bh")]
    return [f"**{text}**" if row[f"{test}_p"] < 0.05 else text, *corrected]


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
        rows = read(network)
        done = rows[rows["state"] == "done"]
        if not len(done):
            continue
        doubtful = rows[rows["state"] == "not certified"]
        bases = done["basis"].str.replace(r", margin.*", "", regex=True).value_counts()
        spoken = ", ".join(f"{count} by {name}" for name, count in bases.items())
        accuracy = done.drop_duplicates("image")["correct"].mean()
        parts += [
            f"## {network}",
            f"{len(done)} certified spectra ({len(doubtful)} not certified) at {done['image'].nunique()} images, of "
            f"which {100 * accuracy:.1f} % are classified correctly. What the sign rests on: {spoken}.",
            distribution(done),
            "Correlation over images with accuracy (correct, 1 or 0) and loss; p as it stands, and corrected by Holm "
            "and by Benjamini and Hochberg for the number of tests in this table; bold: p < 0.05 as it stands.",
            related(done),
        ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def mean(values, factor=1.0, digits=4):
    """Mean and standard deviation; how many are infinite or unknown is said."""
    values = values.astype(float) * factor
    finite = values[values.abs() < float("inf")]
    text = f"{finite.mean():.{digits}g}" + (f" ({finite.std(ddof=1):.2g})" if len(finite) > 1 else "")
    others = len(values) - len(finite)
    return (text if len(finite) else "") + (f" {others} infinite or unknown" if others else "")


def published(network, which):
    """The paper's rows of one table, by block or label."""
    rows = json.loads((files("stiffcore.report") / "paper.json").read_text())["networks"][network][which]
    return {row.get("block", row.get("label")): row for row in rows}


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


def study_page(findings):
    parts = [STUDY_HEAD, findings]
    for network in NETWORKS:
        for kind, name in (("tensor-slices", f"slices-{network}"), ("matrix", f"spectra-{network}")):
            rows = read(name)
            done = rows[(rows["state"] == "done") & (rows["kind"] == kind)]
            if not len(done):
                continue
            doubtful = int((rows["state"] == "not certified").sum())
            accuracy = done.drop_duplicates("image")["correct"].mean()
            counted = f"{len(done)} certified spectra ({doubtful} not certified) at {done['image'].nunique()} images, "
            counted += f"of which {100 * accuracy:.1f} % are classified correctly."
            if kind == "matrix":
                parts += [f"## {network}: the Jacobian matrices", counted, true_spectra(done)]
                continue
            parts += [f"## {network}: tensor slices", counted, by_block(network, done)]
            parts += ["By label, means over blocks:" if network != "resnet50" else "By label, block 16:"]
            parts += [by_label(network, done), "Correlations:", correlated(network, done)]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


if __name__ == "__main__":
    (HERE / "extremes-study.md").write_text(extremes_page())
    if len(read("slices-resnet18")):
        (HERE / "study.md").write_text(study_page((HERE / "study-findings.md").read_text()))
