"""Make docs/extremes-study.md from the exported metrics in docs/data: never written by hand.

python docs/study_page.py
"""

from functools import partial
from pathlib import Path

import pandas as pd
from tabulate import tabulate

from stiffcore.report.statistics import correlations, spread

HERE = Path(__file__).parent
HEAD = """# Are the residual blocks of ResNets stiff? S and the sign of the spectrum at many images

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
COLUMNS = ["image_index", "label", "prediction", "loss", "correct", "number", "block", "function", "kind", "n", "k"]
COLUMNS += [
    "state",
    "certified",
    "S_active",
    "S_active_error",
    "negative",
    "abscissa",
    "min_re_active",
    "zero",
    "basis",
]


table = partial(tabulate, tablefmt="github", disable_numparse=True)


def read(network):
    """All exports of a network as one table; a unit that stands in several counts once."""
    files = sorted((HERE / "data").glob(f"{network}*.csv"))
    if not files:
        return pd.DataFrame(columns=COLUMNS)
    rows = pd.concat([pd.read_csv(file, na_values=["nan"], keep_default_na=False) for file in files])
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


def related(rows):
    found = correlations(rows, ["S_active"])
    lines = []
    for row in found.to_dict("records"):
        cells = []
        for test in ("pearson", "spearman"):
            text = f"{row[test]:.2f}"
            cells += [f"**{text}**" if row[f"{test}_p"] < 0.05 else text]
            cells += [f"{row[f'{test}_{which}']:.2g}" for which in ("p", "holm", "bh")]
        lines.append([f"{row['number']} {row['block']}", row["outcome"], row["images"], *cells])
    header = ["block", "S active with", "images", "Pearson", "p", "Holm", "BH", "Spearman", "p", "Holm", "BH"]
    return table(lines, header)


def page():
    parts = [HEAD]
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


if __name__ == "__main__":
    (HERE / "extremes-study.md").write_text(page())
