"""What a study of many images says: means by block and label, and correlations with accuracy and loss."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from stiffcore.run import DONE
from stiffcore.study import Kind

METRICS = ("S_active", "negative")
SINGULAR_METRICS = ("condition", "effective_rank")
OUTCOMES = ("correct", "loss")
# Columns that name a block.
BLOCK = ("number", "block")
# Images that a coefficient takes at least: its p-value rests on large samples, and with 20, one of 0.44 is the smallest
# with p < 0.05. Of right and wrong classifications, so many on either side.
FEWEST = 20
FEWEST_EACH = 3
# Images that a mean and its standard deviation take at least.
FEWEST_OF_MEAN = 2
SIGNIFICANT = 0.05


def metrics_of(rows: pd.DataFrame) -> tuple[str, ...]:
    """The metrics that a study of this kind is about: stiffness and signs, or of singular values the condition."""
    return SINGULAR_METRICS if set(rows.get("kind", ())) == {str(Kind.SINGULAR)} else METRICS


def certified(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of `Run.metrics` whose spectra are certified: all statistics are of these."""
    return rows[(rows["state"].isin(DONE)) & rows["certified"].astype(bool)]


def labelled(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of images whose label is known."""
    return rows[rows["label"] >= 0]


def mean_groups(rows: pd.DataFrame, by: str) -> list[tuple[list[str], pd.DataFrame]]:
    """Rows of which means are taken, by block and function, or by block, label and function: always within a block.

    Args:
        rows: from `Run.metrics`, of one kind.
        by: `block` or `label`.

    Returns:
        For each group the cells that name it, and its certified rows, each of another image; none where no group has
        the images that a mean takes.
    """
    names = [*BLOCK, *(["label"] if by == "label" else []), "function"]
    chosen = certified(rows)
    groups = (labelled(chosen) if by == "label" else chosen).groupby(names)
    found = [([f"{g[0]} {g[1]}" if g[0] else str(g[1]), *map(str, g[2:])], part) for g, part in groups]
    return found if any(len(part) >= FEWEST_OF_MEAN for _, part in found) else []


def spread(rows: pd.DataFrame, by: Sequence[str], metrics: Sequence[str] = METRICS) -> pd.DataFrame:
    """Means, standard deviations and quantiles of metrics over images, within each block.

    Args:
        rows: from `Run.metrics`, of one kind and one function.
        by: columns that make a group, as `label`; the block belongs to every group, and its columns come first.
        metrics: names of `stiffcore.metrics.NAMES`.

    Returns:
        One row a group and metric: the columns of `by`, `metric`, `images` (different ones), `values` (finite ones),
        `infinite` (of either sign), `unknown` (nan), `mean`, `std` (n - 1 in the denominator; both nan of fewer than
        2 values), `min`, `q25`, `median`, `q75`, `max` of the finite ones; `mean_low` and `mean_high`, between which
        the mean is certain to be where single values are open within an interval; else nan.
    """
    found, by = [], [*BLOCK, *(name for name in by if name not in BLOCK)]
    for group, part in certified(rows).groupby(by, sort=True):
        for metric in metrics:
            values = part[metric].to_numpy(float)
            finite = values[np.isfinite(values)]
            quantiles = np.quantile(finite, (0, 0.25, 0.5, 0.75, 1)) if len(finite) else np.full(5, np.nan)
            found.append(
                dict(zip(by, group, strict=True))
                | {
                    "metric": metric,
                    "images": part["image"].nunique(),
                    "values": len(finite),
                    "infinite": int(np.isinf(values).sum()),
                    "unknown": int(np.isnan(values).sum()),
                    "mean": float(finite.mean()) if len(finite) >= FEWEST_OF_MEAN else float("nan"),
                    "std": float(finite.std(ddof=1)) if len(finite) >= FEWEST_OF_MEAN else float("nan"),
                }
                | dict(zip(("min", "q25", "median", "q75", "max"), map(float, quantiles), strict=True))
                | dict(zip(("mean_low", "mean_high"), mean_between(part, metric), strict=True))
            )
    return pd.DataFrame(found)


def mean_between(rows: pd.DataFrame, metric: str) -> tuple[float, float]:
    """The mean of what a metric is at least, and at most, over rows; nan where it is no interval, or not known."""
    ends = [f"{metric}_low", f"{metric}_high"]
    if not set(ends) <= set(rows) or rows.empty:
        return float("nan"), float("nan")
    low, high = (float(rows[end].to_numpy(float).mean()) for end in ends)
    return low, high


def correlations(rows: pd.DataFrame, metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """Correlate each metric of each block with accuracy (an image classified correctly, 1 or 0) and loss.

    Pearson's r with the p-value of the t-test (as the paper has it), Spearman's rho, and the p-values of all tests of
    the table corrected for their number: Holm's, which bounds the chance of any false one (Scand. J. Stat. 6 (1979)),
    and Benjamini and Hochberg's, which bounds the share of false ones (J. R. Stat. Soc. B 57 (1995)).

    Args:
        rows: from `Run.metrics`, of one kind and one function.
        metrics: names of `stiffcore.metrics.NAMES`; None: those of the kind, see `metrics_of`.

    Returns:
        One row a block, metric and outcome: `number`, `block`, `metric`, `outcome`, `images` (with both finite),
        `pearson`, `pearson_p`, `spearman`, `spearman_p`, and `pearson_holm`, `pearson_bh`, `spearman_holm`,
        `spearman_bh`. Coefficients are nan where there are fewer than 20 images, one side
        is constant, or fewer than 3 images are classified correctly or fewer than 3 wrongly.
    """
    found = []
    for (number, block), part in certified(rows).groupby(["number", "block"], sort=True):
        for metric in metrics or metrics_of(rows):
            for outcome in OUTCOMES:
                pair = part[[metric, outcome]].astype(float)
                pair = pair[np.isfinite(pair).all(axis=1)]
                x, y = pair[metric].to_numpy(), pair[outcome].to_numpy()
                row = {"number": number, "block": block, "metric": metric, "outcome": outcome, "images": len(pair)}
                found.append(row | _coefficients(x, y))
    table = pd.DataFrame(found)
    for test in ("pearson", "spearman"):
        p = table[f"{test}_p"].to_numpy(float) if len(table) else np.zeros(0)
        table[f"{test}_holm"], table[f"{test}_bh"] = holm(p), benjamini_hochberg(p)
    return table


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's step-down correction of p-values; nan stays, and counts as no test."""
    corrected, known = np.full(len(p), np.nan), np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    steps = np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * steps), 1)
    return corrected


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Benjamini and Hochberg's step-up correction of p-values; nan stays, and counts as no test."""
    corrected, known = np.full(len(p), np.nan), ~np.isnan(p)
    if known.any():
        corrected[known] = stats.false_discovery_control(p[known], method="bh")
    return corrected


def _coefficients(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    counts = np.unique(y, return_counts=True)[1]
    too_few = len(x) < FEWEST or (len(counts) == 2 and counts.min() < FEWEST_EACH)
    if too_few or np.ptp(x) == 0 or np.ptp(y) == 0:
        return dict.fromkeys(("pearson", "pearson_p", "spearman", "spearman_p"), float("nan"))
    pearson, spearman = stats.pearsonr(x, y), stats.spearmanr(x, y)
    return {
        "pearson": float(pearson.statistic),
        "pearson_p": float(pearson.pvalue),
        "spearman": float(spearman.statistic),
        "spearman_p": float(spearman.pvalue),
    }
