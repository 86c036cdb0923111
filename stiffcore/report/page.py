"""The report: one self-contained page, from the stored run alone."""

import io
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from stiffcore.errors import InputError, writing_file
from stiffcore.exports import whole_file
from stiffcore.metrics import spell, spell_share
from stiffcore.report import figures
from stiffcore.report.statistics import FEWEST, SIGNIFICANT, certified, correlations, mean_groups
from stiffcore.report.tables import mean_cells, means_of, percent
from stiffcore.run import DONE, Run
from stiffcore.store import IMAGES
from stiffcore.study import Kind, Solver, counted, format_bytes
from stiffcore.text import visible


class Drawn(NamedTuple):
    """What is drawn: the figures that the page shows, what they show, and all in one as the file has it."""

    shown: list[Figure]
    caption: str
    file: Figure | None


# Spectra of so many images are drawn.
IMAGES_DRAWN = 1


def write_report(run: Run, to: Path, figures_folder: Path | None = None, *, shared: bool = False) -> str:
    """Write the report of a run as one HTML page that needs no network, and its figures as PNG and SVG files.

    Args:
        run: any, finished or not.
        to: the page, .html; must not exist.
        figures_folder: where figures go as files; made where it does not exist; None: nowhere.
        shared: whether the spectra of all blocks are drawn to one scale.

    Returns:
        What was written, for people.

    Raises:
        InputError: where the page or a figure exists, or cannot be written; where the run has no unit.
        StiffcoreError: where the disk is full or fails; nothing is left of what was written.
    """
    if to.suffix != ".html":
        raise InputError(f"--to {to}: the report is a page, give a name that ends in .html")
    if to.exists():
        raise InputError(f"--to {to} exists: give a new file")
    rows = run.metrics()
    if rows.empty:
        raise InputError(f"no unit is recorded in {run.store.url}: there is nothing to report")
    drawn = _figures(run, rows, shared=shared, files=figures_folder is not None)
    wanted = [(figures_folder or Path()) / f"{name}.{suffix}" for name in drawn for suffix in ("png", "svg")]
    existing = [str(path) for path in wanted if path.exists()]
    if figures_folder is not None and existing:
        raise InputError(f"--figures: {existing[0]} exists: give a new folder")
    page = render(run, rows, drawn)
    with ExitStack() as stack:  # all of it, or nothing; the page comes to its place last
        stack.enter_context(whole_file(to, f"--to {to}")).write_text(page, encoding="utf-8")
        if figures_folder is not None:
            stack.enter_context(_new_folder(figures_folder))
            for path in wanted:
                beside = stack.enter_context(whole_file(path, f"--figures {figures_folder}"))
                figure = drawn[path.stem].file
                assert figure is not None
                figure.savefig(beside, dpi=200)
    more = f", {len(drawn)} figures in {figures_folder}" if figures_folder is not None else ""
    return f"report in {to}{more}"


@contextmanager
def _new_folder(folder: Path) -> Iterator[None]:
    """A folder, made where it is not there, and gone again where what follows fails."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with writing_file(f"--figures {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in made:
            with suppress(OSError):  # somebody else has put something into it
                path.rmdir()
        raise


def render(run: Run, rows: pd.DataFrame, drawn: dict[str, Drawn]) -> str:
    """The page as text; `rows` from `Run.metrics`."""
    environment = jinja2.Environment(autoescape=True, finalize=_shown, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("stiffcore.report") / "page.html").read_text())
    has = rows[rows["state"].isin(DONE)]
    return template.render(
        run=run,
        name=_file_name(run.store.url),
        lines=summary_lines(rows),
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        header=run.header,
        source=run.header.source.replace(run.study.images, _file_name(run.study.images)),
        study=_settings(run),
        summary=run.summary,
        functions=sorted(set(rows["function"])),
        kinds=sorted(set(rows["kind"])),
        images=rows["image"].nunique(),
        figures={name: [_svg(one) for one in found.shown] for name, found in drawn.items()},
        captions={name: found.caption for name, found in drawn.items()},
        means=_means(rows),
        correlations=_correlations(rows) if rows["image"].nunique() >= FEWEST else [],
        units=[_unit(row) for row in rows.to_dict("records")],
        uncertified=has[~has["certified"].astype(bool)].to_dict("records"),
        failed=rows[rows["state"] == "failed"].to_dict("records"),
        infinite=bool(np.isinf(has["S"]).any()),
        ends=bool((has["solver"] == Solver.EXTREMES).any()),
    )


def _shown(value: Any) -> Any:
    """What stands in the page: text that others made, before it is escaped; not what is marked safe."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _file_name(path: str) -> str:
    """The last part of a path or URL: a page that is passed on says nothing of the folders of its maker."""
    return path.rstrip("/").rsplit("/", 1)[-1]


def _settings(run: Run) -> dict[str, Any]:
    """What was asked for, as people write it."""
    settings = run.study.model_dump(mode="json")
    for name in ("weights", "images", "data_root"):
        if isinstance(settings.get(name), str):
            settings[name] = _file_name(settings[name])
    return {
        name: format_bytes(value) if name.endswith("memory") and isinstance(value, int) else value
        for name, value in settings.items()
    }


def summary_lines(rows: pd.DataFrame) -> list[str]:
    """What a run says, in a sentence for each kind and function; `rows` from `Run.metrics`."""
    lines = []
    for (kind, function), part in rows[rows["state"].isin(DONE)].groupby(["kind", "function"], sort=False):
        sure = certified(part)
        text = f"{kind} of {function}: {len(sure)} of {counted(len(part), 'spectrum', 'spectra')} certified"
        if kind == Kind.SINGULAR:
            ends = _ends(sure, "condition")
            lines.append(f"{text}; condition {ends}." if ends else f"{text}.")
            continue
        ends, right = _ends(sure, "S_active"), _ends(sure, "abscissa")
        none = int((sure["negative"] == 0).sum())
        text += f"; S active {ends}" if ends else ""
        text += f"; largest real part {right}" if right else ""
        lines.append(f"{text}; no eigenvalue has a negative real part in {none} of them.")
    return lines


def _ends(rows: pd.DataFrame, metric: str) -> str:
    """From where to where a metric goes, and in which blocks; empty where it is not known."""
    known = rows[np.isfinite(rows[metric].to_numpy(float))].sort_values(metric)
    if known.empty:
        return ""
    low, high = known.iloc[0], known.iloc[-1]
    if len(known) == 1:
        return f"{spell(low[metric])} ({low['block']})"
    return f"from {spell(low[metric])} ({low['block']}) to {spell(high[metric])} ({high['block']})"


def _figures(run: Run, rows: pd.DataFrame, *, shared: bool, files: bool) -> dict[str, Drawn]:
    """By name; the panels of blocks are drawn in one figure only where that is shown, or goes to a file."""
    found: dict[str, Drawn] = {}
    network, index = run.study.network, run.store.get_array(IMAGES, "index")
    for (kind, function), part in rows.groupby(["kind", "function"]):
        what = f"{kind} of {function}"
        for image in sorted(set(rows["image"]))[:IMAGES_DRAWN]:
            text = f"Spectra, {what}, at image {index[image]}. "
            if kind == Kind.SINGULAR:
                text += "Singular values, from the largest on."
            else:
                text += "Blue: computed eigenvalues, the darker the more lie upon each other; bars: their real parts "
                text += "counted, on a logarithmic scale; orange: how many are exactly 0 and 1; the vertical line is "
                text += "the imaginary axis"
                text += "; dotted: where forward Euler with step 1 is stable" if function == "branch" else ""
                text += ". Green, where a picture was taken: the numerical range, and, with its logarithm, the "
                text += "smallest singular value of the matrix less z."
            whole = figures.spectra(run, image, function, kind, shared=shared) if shared or files else None
            panels = [whole] if shared else figures.panels(run, image, function, kind)
            found[f"spectra-{kind}-{function}-{image}"] = _drawn(panels, text, whole)
        singular = kind == Kind.SINGULAR
        text = "Condition number and effective rank" if singular else "S active and the share of negative real parts"
        text += f", {what}, along depth: median, quartiles (thick) and range (thin) over images"
        published = function == "block" and kind == Kind.TENSOR_SLICES and figures.paper_values(network)
        text += "; crosses: the paper's means." if published else "."
        depth = figures.depth(part, function, network)
        found[f"depth-{kind}-{function}"] = _drawn([depth], text, depth)
        text = f"{'Condition number' if singular else 'S active'}, {what}, mean over each label."
        heat = figures.heat(part, function)
        found[f"labels-{kind}-{function}"] = _drawn([heat], text, heat)
    return {name: drawn for name, drawn in found.items() if drawn.shown}


def _drawn(shown: Sequence[Figure | None], caption: str, file: Figure | None) -> Drawn:
    return Drawn([figure for figure in shown if figure is not None], caption, file)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _means(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Tables of means over images: by block and, where there are several labels, by block and label; kinds apart."""
    found = []
    for kind, part in certified(rows).groupby("kind", sort=False):
        for by in ("block", "label") if rows["label"].nunique() > 1 else ("block",):
            groups = [
                {"names": names, "images": len(some), "cells": mean_cells(some)}
                for names, some in mean_groups(part, by)
            ]
            firsts = ["block", "label", "function"] if by == "label" else ["block", "function"]
            headers = [h for h, _, _ in means_of(part)]
            if groups:
                found.append({"kind": kind, "by": by, "firsts": firsts, "headers": headers, "groups": groups})
    return found


def _correlations(rows: pd.DataFrame) -> list[dict[str, Any]]:
    found = []
    for (kind, function), part in rows.groupby(["kind", "function"]):
        for row in correlations(part).to_dict("records"):
            cells = []
            for test in ("pearson", "spearman"):
                known = row[test] == row[test]
                cells.append(
                    {
                        "text": f"{row[test]:.2f}" if known else "-",
                        "interval": f"[{row[f'{test}_low']:.2f}, {row[f'{test}_high']:.2f}]" if known else "",
                        "p": f"{row[f'{test}_p']:.2g}" if known else "-",
                        "holm": f"{row[f'{test}_holm']:.2g}" if known else "-",
                        "bh": f"{row[f'{test}_bh']:.2g}" if known else "-",
                        "bold": known and row[f"{test}_p"] < SIGNIFICANT,
                    }
                )
            found.append(row | {"kind": kind, "function": function, "cells": cells})
    return found


def _unit(row: dict[str, Any]) -> dict[str, Any]:
    done = row["state"] in DONE
    shown = {
        "S": spell(row["S"]),
        "S_active": spell(row["S_active"], 7),
        "error": spell(row["S_active_error"], 2),
        "negative": spell_share(row, "negative"),
        "zero": percent(row["zero"]),
        "abscissa": spell(row["abscissa"]),
        "min_re_active": spell(row["min_re_active"]),
        "residual": spell(row["max_residual"], 2),
        "condition": spell(row["max_condition"], 3),
    }
    if row["kind"] == Kind.SINGULAR:  # what it has no eigenvalues for
        has = ("residual", "zero")
        shown = {name: text if name in has else "-" for name, text in shown.items()}
    size = f"{row['n']:,}" if row["n"] == row["m"] else f"{row['m']:,} x {row['n']:,}"
    verdict = ("yes" if row["certified"] else "NO") if done else row["state"]
    return row | {"shown": shown if done else dict.fromkeys(shown, "-"), "size": size, "verdict": verdict}
