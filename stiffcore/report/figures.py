"""The pictures of a report, as matplotlib figures: no window, no global state."""

import json
from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stiffcore.errors import DamagedError
from stiffcore.picture import Picture, stored_picture
from stiffcore.report.statistics import METRICS, certified, metrics_of, spread
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


def spectra(run: Run, image: int, function: str, kind: str = "matrix") -> Figure | None:
    """The spectra of all blocks of one image in the complex plane; None where there is none.

    Blue: computed eigenvalues; orange: exact ones and zeros, with how many. The imaginary axis is drawn, and for a
    branch the disc in which forward Euler with step 1 is stable. Where a picture was taken (`stiffcore picture`), the
    numerical range is the green curve, and the pseudospectrum is drawn as level lines.
    """
    keys = [
        key
        for key, record in run.readable()[0].items()
        if (record.unit.image, record.unit.function, record.unit.kind) == (image, function, kind)
    ]
    found = [(key, spectrum) for key in keys if (spectrum := _spectrum_of(run, key)) is not None]
    if not found:
        return None
    rows = -(-len(found) // COLUMNS)
    columns = min(COLUMNS, len(found))
    figure = Figure(figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axis in axes[len(found) :]:
        axis.axis("off")
    for axis, (key, spectrum) in zip(axes, found, strict=False):
        _spectrum(axis, spectrum, stored_picture(run.store, key))
    return figure


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


def _spectrum(axis: Axes, spectrum: Spectrum, picture: Picture | None) -> None:
    if spectrum.function == "branch":
        t = np.linspace(0, 2 * np.pi, 181)
        axis.plot(np.cos(t) - 1, np.sin(t), color=INK, linewidth=0.8, linestyle=":")
    if picture is not None:
        curve = np.append(picture.numerical_range, picture.numerical_range[0])
        axis.plot(curve.real, curve.imag, color=RANGE, linewidth=1)
        if min(picture.smallest.shape) > 1:
            im, values = np.concatenate([-picture.im[:0:-1], picture.im]), picture.smallest
            both = np.concatenate([values[:0:-1], values])
            levels = np.floor(np.log10(max(values.max(), 1e-300))) - np.arange(4)[::-1]
            axis.contour(picture.re, im, np.log10(np.maximum(both, 1e-300)), levels, colors=RANGE, linewidths=0.5)
    if spectrum.kind == Kind.SINGULAR:
        values = np.concatenate([spectrum.computed, np.ones(spectrum.ones)])
        axis.semilogy(np.sort(values[values > 0])[::-1], color=COMPUTED)
        axis.set_title(f"{_plain(spectrum.name)}, {spectrum.n:,} values, {spectrum.zeros:,} zeros", fontsize=8)
        axis.set_xlabel("index", fontsize=7)
        axis.set_ylabel("singular value", fontsize=7)
        axis.tick_params(labelsize=7)
        return
    axis.axvline(0, color=INK, linewidth=0.8)
    z = _drawn(spectrum.computed)
    axis.plot(z.real, z.imag, ".", color=COMPUTED, markersize=2, rasterized=len(z) > 500)
    for value, count in ((1, spectrum.ones), (0, spectrum.zeros)):
        if count:
            axis.plot([value], [0], "o", color=EXACT, markersize=4)
            axis.annotate(f"{count:,}", (value, 0), xytext=(2, 5), textcoords="offset points", fontsize=7, color=EXACT)
    number = spectrum.record.unit.number
    title = _plain(f"{number} {spectrum.name}" if number else spectrum.name)
    if spectrum.ends is not None:
        only = " (ends only)"
    else:
        only = f" ({len(z):,} drawn)" if len(z) < len(spectrum.computed) else ""
    axis.set_title(f"{title}, n = {spectrum.n:,}{only}", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.set_xlabel("Re", fontsize=7)
    axis.set_ylabel("Im", fontsize=7)
    axis.margins(0.08)


def depth(rows: pd.DataFrame, function: str, network: str = "") -> Figure | None:
    """S active and the negative share along depth: median, quartiles and range over images, the paper's values beside.

    Args:
        rows: from `Run.metrics`, of one kind.
        function: block or branch.
        network: where the paper has it, its means of S and of the negative share are drawn; they are of tensor slices.
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
    stiffness = metrics_of(chosen) == METRICS
    published = paper_values(network) if function == "block" and stiffness and not unnumbered else []
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
        if not len(part) and not published:
            axis.text(0.5, 0.6, "open: needs the spectra", ha="center", transform=axis.transAxes)
            axis.set_yticks([])
    names = {at: name for name, at in place.items()} if unnumbered else {}
    numbers = sorted(set(place.values()) | {p["block"] for p in published})
    lower.set_xticks(numbers, [_plain(names.get(number, str(number))) for number in numbers])
    lower.set_xlabel("block")
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
