"""What a study of many images says: means by block and label, and correlations with accuracy and loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from stiffcore.errors import InputError
from stiffcore.metrics import NAMES as METRIC_NAMES
from stiffcore.run import DONE, Run
from stiffcore.study import Kind

if TYPE_CHECKING:
    import pandas as pd

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
# Below so many images, p-values are of so many permutations, since Student's t is then a guess for skewed losses.
FEW = 100
PERMUTATIONS = 9_999
# Resamples of the images behind an interval of 95 %.
RESAMPLES = 1_999


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
    import pandas as pd

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


def compare(runs: Sequence[Run], metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """Compare runs block by block, at the same images: before and after training, seeds, weights.

    Runs are called by their folders' names, by their whole paths where two are the same. Images are the same where the
    network is given the same numbers, whatever file or position they came from.

    Args:
        runs: two or more; the first is what the others are compared with.
        metrics: names of `stiffcore.metrics.NAMES`; None: those of the kind, and the spectral abscissa.

    Returns:
        As `compared`.

    Raises:
        InputError: for fewer than two runs, the same run twice, a run without a unit, or an unknown metric.
    """
    urls = [run.store.url for run in runs]
    if len(urls) < 2 or len(set(urls)) < len(urls):
        raise InputError(f"two different runs or more can be compared, got {', '.join(urls) or 'none'}")
    unknown = sorted(set(metrics or ()) - set(METRIC_NAMES))
    if unknown:
        raise InputError(f"unknown metrics: {', '.join(unknown)}; known are {', '.join(METRIC_NAMES)}")
    short = [url.rstrip("/").rsplit("/", 1)[-1] for url in urls]
    frames = {}
    for name, run in zip(short if len(set(short)) == len(short) else urls, runs, strict=True):
        rows, digests = run.metrics(), run.header.identity.images
        if rows.empty:
            raise InputError(f"no unit is recorded in {run.store.url}: there is nothing to compare")
        frames[name] = rows.assign(image_digest=[digests[i] for i in rows["image"]])
    return compared(frames, metrics)


def compared(runs: Mapping[str, pd.DataFrame], metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """Each metric of each block in several runs: means, and differences from the first run at the same images.

    Args:
        runs: by name, in order; rows from `Run.metrics`, with `image_digest`, by which images are known again.
        metrics: names of `stiffcore.metrics.NAMES`; None: those of the kind, and the spectral abscissa.

    Returns:
        One row a kind, block, function, metric and run: `kind`, `number`, `block`, `function`, `metric`, `run`,
        `images` (with a finite certified value), `mean` and `std` over these (`std` nan of one). Of all but the
        first run, over `common` images, which have a finite certified value in both: `difference`, the mean of the
        value less that in the first run, and `difference_low`, `difference_high`, its interval of 95 % by Student's t
        (nan of one).
    """
    import pandas as pd

    found = []
    frames = {name: certified(rows).set_index(["kind", *BLOCK, "function"]).sort_index() for name, rows in runs.items()}
    units = sorted(set().union(*(frame.index for frame in frames.values())))
    for unit in units:
        parts = {name: frame.loc[[unit]] for name, frame in frames.items() if unit in frame.index}
        chosen = metrics or (SINGULAR_METRICS if unit[0] == Kind.SINGULAR else (*METRICS, "abscissa"))
        for metric in chosen:
            values = {name: _finite(part.set_index("image_digest")[metric]) for name, part in parts.items()}
            first = values.get(next(iter(runs)), pd.Series(dtype=float))
            for name, series in values.items():
                common = first.index.intersection(series.index) if name != next(iter(runs)) else first.index[:0]
                found.append(
                    dict(zip(("kind", *BLOCK, "function"), unit, strict=True))
                    | {"metric": metric, "run": name, "images": len(series)}
                    | dict(zip(("mean", "std"), _mean_and_deviation(series), strict=True))
                    | {"common": len(common)}
                    | _difference(series[common] - first[common])
                )
    return pd.DataFrame(found)


def _finite(values: pd.Series) -> pd.Series:
    values = values[~values.index.duplicated()].astype(float)
    return values[np.isfinite(values)]


def _mean_and_deviation(values: pd.Series) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1))  # of one value, itself and nan; of none, nan


def _difference(values: pd.Series) -> dict[str, float]:
    from scipy import stats

    mean, deviation = _mean_and_deviation(values)
    half = float(stats.t.ppf(0.975, max(len(values) - 1, 1)) * deviation / np.sqrt(max(len(values), 1)))
    return {"difference": mean, "difference_low": mean - half, "difference_high": mean + half}


def correlations(
    rows: pd.DataFrame,
    metrics: Sequence[str] | None = None,
    outcomes: Sequence[str] = OUTCOMES,
    held: str | None = None,
) -> pd.DataFrame:
    """Correlate each metric of each block with accuracy (an image classified correctly, 1 or 0) and loss.

    Pearson's r and Spearman's rho, each with an interval of 95 % (percentiles over resamples of the images, Efron's
    bootstrap) and a p-value: of the t-test (as the paper has it) from 100 images on, of fewer by permutation. The
    p-values of all tests of the table are corrected for their number: Holm's, which bounds the chance of any false one
    (Scand. J. Stat. 6 (1979)), and Benjamini and Hochberg's, which bounds the share of false ones (J. R. Stat. Soc. B
    57 (1995)).

    Args:
        rows: from `Run.metrics`, of one kind and one function.
        metrics: names of `stiffcore.metrics.NAMES`; None: those of the kind, see `metrics_of`.
        outcomes: columns that the metrics are correlated with.
        held: a column that is held fixed: coefficients are partial ones, between what linear regressions on it leave
            of metric and outcome (of their ranks, for Spearman's); one degree of freedom less. None: plain ones.

    Returns:
        One row a block, metric and outcome: `number`, `block`, `metric`, `outcome`, `images` (with both finite),
        `pearson`, `spearman`, and of each `_p`, `_low`, `_high`, `_holm`, `_bh`. Coefficients are nan where there are
        fewer than 20 images, one side is constant, or fewer than 3 images are classified correctly or fewer than 3
        wrongly.
    """
    import pandas as pd

    found = []
    for (number, block), part in certified(rows).groupby(["number", "block"], sort=True):
        for metric in metrics or metrics_of(rows):
            for outcome in outcomes:
                columns = part[[metric, outcome, *([held] if held else [])]].to_numpy(float)
                columns = columns[np.isfinite(columns).all(axis=1)]
                row = {"number": number, "block": block, "metric": metric, "outcome": outcome, "images": len(columns)}
                found.append(row | _coefficients(columns))
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
    from scipy import stats  # takes half a second

    corrected, known = np.full(len(p), np.nan), ~np.isnan(p)
    if known.any():
        corrected[known] = stats.false_discovery_control(p[known], method="bh")
    return corrected


def _coefficients(columns: np.ndarray) -> dict[str, float]:
    """Coefficients of the first two columns, with the third, if there is one, held fixed."""
    counts = np.unique(columns[:, 1], return_counts=True)[1]
    too_few = len(columns) < FEWEST or (len(counts) == 2 and counts.min() < FEWEST_EACH)
    known = not too_few and (np.ptp(columns, axis=0) > 0).all()
    found: dict[str, float] = {}
    for name, ranked in (("pearson", False), ("spearman", True)):
        values = _coefficient(columns, ranked) if known else (float("nan"),) * 4
        found |= dict(zip((name, f"{name}_p", f"{name}_low", f"{name}_high"), values, strict=True))
    return found


def _coefficient(columns: np.ndarray, ranked: bool) -> tuple[float, float, float, float]:
    """Coefficient, p-value, and the ends of its interval of 95 %; the same at every call."""
    images, variables = columns.shape
    rng = np.random.default_rng(0)
    value = float(_correlation(columns[None], ranked)[0])
    if images < FEW:  # what is permuted is the metric, or what the regression on the column held fixed leaves of it
        left = _left(columns[None], ranked)[0]
        orders = rng.permuted(np.tile(left[:, 0], (PERMUTATIONS, 1)), axis=1)
        samples = np.stack([orders, np.broadcast_to(left[:, 1], orders.shape)], axis=2)
        beyond = np.abs(_correlation(samples, False)) >= abs(value) * (1 - 1e-12)
        p = float((1 + beyond.sum()) / (1 + PERMUTATIONS))
    else:
        from scipy import stats

        freedom = images - variables
        p = float(2 * stats.t.sf(abs(value) * np.sqrt(freedom / max(1 - value * value, 1e-300)), freedom))
    resampled = _correlation(columns[rng.integers(images, size=(RESAMPLES, images))], ranked)
    low, high = np.nanpercentile(resampled, (2.5, 97.5))  # a resample in which one side is constant has none
    return value, p, float(low), float(high)


def _correlation(samples: np.ndarray, ranked: bool) -> np.ndarray:
    """Of samples (samples, images, variables): the correlation of the first two variables, the third held fixed."""
    left = _left(samples, ranked)
    x, y = left[..., 0], left[..., 1]
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))


def _left(samples: np.ndarray, ranked: bool) -> np.ndarray:
    """The first two variables of each sample less their means, and less their regressions on the third."""
    from scipy import stats

    values = stats.rankdata(samples, axis=1) if ranked else samples
    values = values - values.mean(axis=1, keepdims=True)
    if values.shape[2] == 2:
        return values
    given = values[..., 2:]
    with np.errstate(invalid="ignore", divide="ignore"):
        return values[..., :2] - given * ((values[..., :2] * given).sum(1) / (given * given).sum(1))[:, None]
