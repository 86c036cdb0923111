"""The pictures of a report, as matplotlib figures: no window, no global state."""

import json
from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stiffcore.errors import DamagedError, InputError
from stiffcore.picture import Picture, stored_picture
from stiffcore.report.statistics import certified, metrics_of, spread
from stiffcore.run import DONE, Run, state_of
from stiffcore.spectra import Spectrum
from stiffcore.store import StoreError
from stiffcore.study import Kind
from stiffcore.text import visible

INK, COMPUTED, EXACT, RANGE, PAPER = "#222222", "#1f5fa8", "#c2571a", "#3a8f6b", "#a8326b"
COLUMNS = 4
# Points of a spectrum in one picture.
DRAWN_MOST = 20_000
PANEL_INCHES = (3.1, 2.7)
# Bars of a histogram of real parts; fewer eigenvalues have none.
BARS = 60


def spectra(run: Run, image: int, function: str, kind: str = "matrix", *, shared: bool = False) -> Figure | None:
    """The spectra of all blocks of one image in the complex plane, a panel a block; None where there is none.

    Args:
        run: any.
        image: position among its images.
        function: block or branch.
        kind: of the spectra.
        shared: whether all panels show the same part of the plane.

    Where a picture was taken (`stiffcore picture`), the numerical range and the pseudospectrum are drawn too; what is
    what: see `draw_spectrum`.
    """
    found = _of_image(run, image, function, kind)
    if not found:
        return None
    rows = -(-len(found) // COLUMNS)
    columns = min(COLUMNS, len(found))
    figure = Figure(figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axis in axes[len(found) :]:
        axis.axis("off")
    limits = _limits(np.concatenate([_shown_points(spectrum) for _, spectrum in found])) if shared else None
    for axis, (key, spectrum) in zip(axes, found, strict=False):
        draw_spectrum(axis, spectrum, stored_picture(run.store, key), limits)
    return figure


def panels(run: Run, image: int, function: str, kind: str = "matrix") -> list[Figure]:
    """As `spectra`, a figure a block."""
    made = []
    for key, spectrum in _of_image(run, image, function, kind):
        figure = Figure(figsize=PANEL_INCHES)
        axis = figure.subplots()
        draw_spectrum(axis, spectrum, stored_picture(run.store, key))
        width, height = PANEL_INCHES
        if axis.get_aspect() != "auto":  # as high as the box is, with its title and labels
            shape = np.diff(axis.get_ylim())[0] / np.diff(axis.get_xlim())[0]
            height = 0.65 + 0.8 * width * shape
            figure.set_figheight(height)
        figure.subplots_adjust(left=0.17, right=0.97, bottom=0.42 / height, top=1 - 0.23 / height)
        made.append(figure)
    return made


def _of_image(run: Run, image: int, function: str, kind: str) -> list[tuple[str, Spectrum]]:
    keys = [
        key
        for key, record in run.readable()[0].items()
        if (record.unit.image, record.unit.function, record.unit.kind) == (image, function, kind)
    ]
    return [(key, spectrum) for key in keys if (spectrum := _spectrum_of(run, key)) is not None]


def _plain(text: str) -> str:
    """A name, as matplotlib draws it: a dollar sign begins no formula."""
    return visible(text).replace("$", r"\$")


def _spectrum_of(run: Run, key: str) -> Spectrum | None:
    """A spectrum to draw; None where there is none, or it cannot be read."""
    try:
        record = run.store.record(key)
        return run.stored(key) if state_of(record) in DONE and record.values_kept else None
    except (DamagedError, StoreError):
        return None


def _drawn(z: np.ndarray) -> np.ndarray:
    """All eigenvalues; of very many the outermost, and every so many-th of the others, which are in order."""
    if len(z) <= DRAWN_MOST:
        return z
    return np.concatenate([z[:100], z[100 : -100 : len(z) // DRAWN_MOST], z[-100:]])


def draw_spectrum(
    axis: Axes, spectrum: Spectrum, picture: Picture | None = None, limits: tuple[float, ...] | None = None
) -> None:
    """Draw eigenvalues in the complex plane, both axes to the same scale; singular values by size.

    Blue points are computed eigenvalues, the darker the more of them lie upon each other; blue bars at the lower edge
    count real parts, on a logarithmic scale. Orange: how many eigenvalues are exactly 0 and 1. The imaginary axis is
    drawn, and for a branch, dotted, the disc in which forward Euler with step 1 is stable. Of a picture, the numerical
    range is the green curve, and the level lines say log10 of the smallest singular value of the matrix less z.

    Args:
        axis: to draw on.
        spectrum: any.
        picture: of it.
        limits: left, right and upper end of the part of the plane that is shown; None: as the eigenvalues need.
    """
    number = spectrum.record.unit.number
    title = _plain(f"{number} {spectrum.name}" if number else spectrum.name)
    axis.tick_params(labelsize=7)
    if spectrum.kind == Kind.SINGULAR:
        values = np.concatenate([spectrum.computed, np.ones(spectrum.ones)])
        axis.semilogy(np.sort(values[values > 0])[::-1], color=COMPUTED)
        axis.set_title(f"{title}, {spectrum.n:,} values, {spectrum.zeros:,} zeros", fontsize=8)
        axis.set_xlabel("index", fontsize=7)
        axis.set_ylabel("singular value", fontsize=7)
        return
    if spectrum.function == "branch":
        t = np.linspace(0, 2 * np.pi, 181)
        axis.plot(np.cos(t) - 1, np.sin(t), color=INK, linewidth=0.8, linestyle=":")
    if picture is not None:
        _draw_picture(axis, picture)
    axis.axvline(0, color=INK, linewidth=0.8)
    z = _drawn(spectrum.computed)
    points = _shown_points(spectrum)
    if picture is not None:
        points = np.concatenate([points, picture.numerical_range])
    left, right, top = limits or _limits(points)
    axis.plot(z.real, z.imag, ".", color=COMPUTED, markersize=3, alpha=_opacity(len(z)), mew=0, rasterized=len(z) > 500)
    exact = [(0, spectrum.zeros, 0.07, "left"), (1, spectrum.ones, 0.97, "right")]
    for value, count, at, side in exact:
        if count:
            axis.plot([value], [0], "o", color=EXACT, markersize=4, zorder=4)
            text = f"{count:,} exactly {value}"
            axis.text(at, 0.97, text, ha=side, va="top", fontsize=7, color=EXACT, transform=axis.transAxes)
    axis.set_xlim(left, right)
    axis.set_ylim(-top, top)
    axis.set_aspect("equal", adjustable="box")
    if len(spectrum.computed) > BARS:
        _draw_bars(axis, spectrum.computed.real, left, right)
    if spectrum.ends is not None:
        only = " (ends only)"
    else:
        only = f" ({len(z):,} drawn)" if len(z) < len(spectrum.computed) else ""
    axis.set_title(f"{title}, n = {spectrum.n:,}{only}", fontsize=8)
    axis.set_xlabel("Re", fontsize=7)
    axis.set_ylabel("Im", fontsize=7)


def _draw_picture(axis: Axes, picture: Picture) -> None:
    curve = np.append(picture.numerical_range, picture.numerical_range[0])
    axis.plot(curve.real, curve.imag, color=RANGE, linewidth=1)
    if min(picture.smallest.shape) > 1:
        im, values = np.concatenate([-picture.im[:0:-1], picture.im]), picture.smallest
        both = np.concatenate([values[:0:-1], values])
        levels = np.floor(np.log10(max(values.max(), 1e-300))) - np.arange(4)[::-1]
        lines = axis.contour(picture.re, im, np.log10(np.maximum(both, 1e-300)), levels, colors=RANGE, linewidths=0.5)
        axis.clabel(lines, fmt="%d", fontsize=6)


def _draw_bars(axis: Axes, real: np.ndarray, left: float, right: float) -> None:
    counts, edges = np.histogram(real, bins=BARS, range=(left, right))
    below = axis.inset_axes((0, 0, 1, 0.2))
    below.bar(edges[:-1], np.log10(1 + counts), width=np.diff(edges), align="edge", color=COMPUTED, alpha=0.3)
    below.set_xlim(left, right)
    below.axis("off")


def _opacity(points: int) -> float:
    return float(np.clip(60 / np.sqrt(max(points, 1)), 0.15, 0.9))


def _shown_points(spectrum: Spectrum) -> np.ndarray:
    """What a panel has to hold: eigenvalues, and 0."""
    if spectrum.kind == Kind.SINGULAR:
        return np.zeros(1, complex)
    return np.concatenate([spectrum.computed, [0, *([1] if spectrum.ones else [])]]).astype(complex)


def _limits(points: np.ndarray) -> tuple[float, float, float]:
    """Left, right and upper end of a part of the plane that holds points; neither direction is much thinner."""
    left, right, top = points.real.min(), points.real.max(), np.abs(points.imag).max()
    middle, half = (left + right) / 2, (right - left) / 2
    half = 1.06 * max(half, 0.7 * top, 1e-9)
    return float(middle - half), float(middle + half), float(max(1.15 * top, 0.6 * half))


def plot(spectrum: Spectrum, axis: Axes | None = None, picture: Picture | None = None) -> Axes:
    """See `Spectrum.plot`; with the picture of it, where there is one."""
    axis = axis if axis is not None else Figure(figsize=(5, 4), layout="constrained").subplots()
    draw_spectrum(axis, spectrum, picture)
    return axis


def depth(rows: pd.DataFrame, function: str, network: str = "") -> Figure | None:
    """S active and the negative share along depth: median, quartiles and range over images.

    Args:
        rows: from `Run.metrics`, of one kind.
        function: block or branch.
        network: where the paper has it, and the kind is that of its tables (tensor-slices), its means stand beside.
    """
    chosen = rows[rows["function"] == function]
    if not len(certified(chosen)):
        return None
    figure = Figure(figsize=(9, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    names_of = {"S_active": ("S active", 1), "negative": ("Re < 0, %", 100)}
    names_of |= {"condition": ("condition", 1), "effective_rank": ("effective rank", 1)}
    shown = metrics_of(chosen)
    table = spread(chosen, ["number", "block"], shown)
    unnumbered = bool((chosen["number"] == 0).any())  # blocks that are no residual ones
    sliced = set(chosen["kind"]) == {Kind.TENSOR_SLICES}
    published = paper_values(network) if function == "block" and sliced and not unnumbered else []
    first = chosen.drop_duplicates("block")
    place = {row["block"]: i + 1 if unnumbered else row["number"] for i, row in enumerate(first.to_dict("records"))}
    for axis, metric in zip((upper, lower), shown, strict=True):
        name, factor = names_of[metric]
        part = table[table["metric"] == metric]
        part = part[part["values"] > 0]
        x, median = part["block"].map(place).to_numpy(), factor * part["median"].to_numpy()
        below, above = median - factor * part["q25"].to_numpy(), factor * part["q75"].to_numpy() - median
        axis.vlines(x, factor * part["min"], factor * part["max"], color=COMPUTED, linewidth=0.8)
        axis.errorbar(x, median, yerr=[below, above], fmt="o", color=COMPUTED, linewidth=3, markersize=5)
        key = "S" if metric == "S_active" else "negative"
        if published:
            axis.plot([p["block"] for p in published], [factor * p[key] for p in published], "x", color=PAPER)
        axis.axhline(0, color=INK, linewidth=0.5)
        axis.set_ylabel(name)
        if metric == "negative" and factor * part["max"].max() < 1:
            axis.set_ylim(-0.05, 1)
        if not len(part) and not published:
            axis.text(0.5, 0.6, "open: needs the spectra", ha="center", transform=axis.transAxes)
            axis.set_yticks([])
    names = {at: name for name, at in place.items()} if unnumbered else {}
    numbers = sorted(set(place.values()) | {p["block"] for p in published})
    lower.set_xticks(numbers, [_plain(names.get(number, str(number))) for number in numbers])
    lower.set_xlabel("block")
    return figure


def plot_compare(found: pd.DataFrame, function: str = "block") -> Figure:
    """Draw what `stiffcore.compare` found: means of each run along depth, with standard deviations.

    Args:
        found: from `stiffcore.compare`; its metrics are drawn below each other.
        function: block or branch.

    Raises:
        InputError: where no run has such a spectrum.
    """
    part = found[found["function"] == function]
    metrics, runs = list(dict.fromkeys(part["metric"])), list(dict.fromkeys(part["run"]))
    if not metrics:
        raise InputError(f"nothing to draw of {function}: no run has a certified spectrum of it")
    figure = Figure(figsize=(9, 2.5 * len(metrics)), layout="constrained")
    blocks = list(dict.fromkeys(part.sort_values("number")["block"]))
    for axis, metric in zip(np.atleast_1d(figure.subplots(len(metrics), 1, sharex=True)), metrics, strict=True):
        for i, run in enumerate(runs):
            rows = part[(part["metric"] == metric) & (part["run"] == run)]
            place = rows["block"].map(blocks.index) + 0.5 * (i + 1) / (len(runs) + 1) - 0.25
            deviation = rows["std"].fillna(0)
            axis.errorbar(place, rows["mean"], yerr=deviation, fmt="o", markersize=4, label=_plain(run))
        axis.axhline(0, color=INK, linewidth=0.5)
        axis.set_ylabel(metric)
    axis.set_xticks(range(len(blocks)), list(map(_plain, blocks)), rotation=45, ha="right", fontsize=8)
    figure.axes[0].legend(fontsize=8)
    return figure


def heat(rows: pd.DataFrame, function: str) -> Figure | None:
    """Means of the first of `metrics_of` by block and label; None where there is one label, or one image of each."""
    chosen = certified(rows[(rows["function"] == function) & (rows["label"] >= 0)])
    if chosen["label"].nunique() < 2:
        return None
    metric = metrics_of(chosen)[0]
    table = spread(chosen, ["label"], [metric])
    if table["mean"].isna().all():
        return None
    names = [str(number) if number else block for number, block in zip(table["number"], table["block"], strict=True)]
    order = list(dict.fromkeys(names))
    grid = table.assign(name=names).pivot(index="name", columns="label", values="mean").loc[order]
    figure = Figure(figsize=(1.5 + 0.6 * grid.shape[1], 1.2 + 0.35 * grid.shape[0]), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(grid.to_numpy(float), aspect="auto", cmap="viridis")
    axis.set_xticks(range(grid.shape[1]), [str(label) for label in grid.columns])
    axis.set_yticks(range(grid.shape[0]), list(map(_plain, grid.index)))
    axis.set_xlabel("label")
    axis.set_ylabel("block")
    figure.colorbar(image, label="S active, mean" if metric == "S_active" else f"{metric}, mean")
    return figure


def paper_values(network: str, table: str = "by_block") -> list[dict[str, Any]]:
    """Rows of a table of the paper; empty where it has none of this network.

    Args:
        network: `resnet18`, `resnet34` or `resnet50`.
        table: means of S and of the negative share `by_block` and `by_label`; `correlations`; `sizes`.
    """
    networks = json.loads((files("stiffcore.report") / "paper.json").read_text())["networks"]
    return list(networks.get(network, {}).get(table, []))
