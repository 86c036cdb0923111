"""Tables for people, and rows for programs, of plans, states and metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from stiffcore.metrics import spell, spell_share
from stiffcore.record import UnitPlan, UnitRecord
from stiffcore.report.statistics import FEWEST_OF_MEAN, SIGNIFICANT, correlations, mean_between, mean_groups
from stiffcore.run import DAMAGED, DONE, Run, state_now, state_of
from stiffcore.study import FAILED, Kind, Solver, counted, format_bytes

if TYPE_CHECKING:  # each takes a third of a second and more to import
    import pandas as pd

    from stiffcore.plan import Plan


# Columns of the plan: header, rank (those of the highest are left out first where not all fit, of 0 never), what of a
# unit that is worked on.
PLAN_COLUMNS: tuple[tuple[str, int, Callable[[UnitPlan], str]], ...] = (
    ("n", 0, lambda p: f"{p.unit.n:,}"),
    ("k", 1, lambda p: f"{p.unit.k:,}"),
    ("memory", 0, lambda p: format_bytes(p.projected_bytes)),
    ("device", 2, lambda p: format_bytes(p.device_bytes) if p.device_bytes else "-"),
    ("disk", 3, lambda p: format_bytes(p.disk_bytes)),
    ("moved", 5, lambda p: format_bytes(p.moved_bytes)),
    ("flops", 4, lambda p: f"{p.flops:.1e}"),
    ("time", 0, lambda p: seconds(p.seconds)),
    ("solver", 0, lambda p: str(p.solver)),
)


def plan_table(plan: Plan, width: int = 180) -> Table:
    """One row a unit, cheap first: what it is, how it will be solved, what that takes, and below the table why.

    Args:
        plan: of a run.
        width: of the console; where not all columns fit, those are left out that matter least.
    """
    device = any(p.device_bytes for p in plan.units)
    columns = [column for column in PLAN_COLUMNS if column[0] != "device" or device]
    notes: dict[str, int] = {}
    rows = []
    for p in plan.units:
        unit = p.unit
        lead = [str(unit.image), _block(unit.number, unit.block), str(unit.function)]
        why = f"{p.why}; {unit.reason}" if p.works else p.why
        number = notes.setdefault(why, len(notes) + 1)
        if p.works:
            rows.append((lead, [show(p) for _, _, show in columns], f"({number})"))
            continue
        cells = ["-"] * (len(columns) - 1)
        cells[0] = "-" if unit.route == FAILED else f"{unit.n:,}"
        cells[1] = f"{unit.k:,}" if p.refused else "-"
        state = "refused" if p.refused else "failed" if unit.route == FAILED else "-"
        rows.append((lead, [*cells, state], f"({number})"))
    caption = [f"{plan.workers} side by side, {counted(plan.threads, 'thread', 'threads')} each", *_below(notes)]
    return _fitted("Plan", caption, [(header, rank) for header, rank, _ in columns], "why", rows, width)


def left_out_lines(left_out: Mapping[str, str]) -> list[str]:
    """A sentence for each module that `--blocks all` leaves out, and why."""
    return [f"left out of --blocks all: {why}" for why in left_out.values()]


def plan_rows(plan: Plan, left_out: Mapping[str, str]) -> dict[str, Any]:
    """The plan as JSON values, all bytes in integers, and what `--blocks all` leaves out."""
    return {
        "allowed_bytes": plan.allowed_bytes,
        "reserved_bytes": plan.reserved_bytes,
        "worker_bytes": plan.worker_bytes,
        "device_allowed_bytes": plan.device_allowed_bytes,
        "device_reserved_bytes": plan.device_reserved_bytes,
        "data_bytes": plan.data_bytes,
        "disk_bytes": plan.disk_bytes,
        "workers": plan.workers,
        "gpus": plan.gpus,
        "separate": plan.separate,
        "threads": plan.threads,
        "seconds": plan.seconds,
        "left_out": dict(left_out),
        "units": [_plan_row(p) for p in plan.units],
    }


def _plan_row(p: UnitPlan) -> dict[str, Any]:
    return p.unit.model_dump(mode="json") | p.to_json() | {"projected_bytes": p.projected_bytes}


def plan_summary(plan: Plan) -> str:
    """The run's totals in one sentence."""
    working, refused = [p for p in plan.units if p.works], len(plan.refused)
    failed = sum(p.unit.route == FAILED for p in plan.units)
    without = len(plan.units) - len(working) - refused - failed
    largest = max((p.projected_bytes for p in working), default=0)
    return (
        f"to compute: {counted(len(working), 'spectrum', 'spectra')}"
        + (f" ({counted(without, 'unit has', 'units have')} none)" if without else "")
        + (f"; refused: {counted(refused, 'unit', 'units')}, the budget is too small" if refused else "")
        + (f"; {counted(failed, 'unit', 'units')} cannot be had" if failed else "")
        + f"; about {seconds(plan.seconds)} by rates measured now, {plan.workers} side by side; "
        f"memory{' of each worker' if plan.separate else ''}: {format_bytes(plan.allowed_bytes)} allowed, "
        f"{format_bytes(plan.reserved_bytes)} reserved, "
        f"largest unit {format_bytes(largest)}{_device(plan)}; disk: at most {format_bytes(plan.disk_bytes)}"
    )


def _device(plan: Plan) -> str:
    if not plan.device_allowed_bytes:
        return ""
    largest = max((p.device_bytes for p in plan.units), default=0)
    return (
        f"; device: {format_bytes(plan.device_allowed_bytes)} allowed, "
        f"{format_bytes(plan.device_reserved_bytes)} reserved, largest unit {format_bytes(largest)}"
    )


def status_table(records: Mapping[str, UnitRecord], damaged: Mapping[str, str], *, held: bool = True) -> Table:
    """The units that are not simply done or planned, and what is known of them."""
    table = _table("", "")
    for name in ("unit", "state", "stage"):
        table.add_column(name)
    table.add_column("note", overflow="fold")
    for key, record in records.items():
        if state_of(record) not in ("done", "stored", "planned", "no spectrum"):
            table.add_row(key, state_now(record, held=held), record.stage, _note(record))
    for key, why in damaged.items():
        table.add_row(key, DAMAGED, "", why)
    return table


def status_rows(run: Run) -> dict[str, Any]:
    """The state of a run as JSON values."""
    records, damaged = run.readable()
    return {
        "run": run.store.url,
        "holder": run.store.holder(),
        "study": run.study.model_dump(mode="json"),
        "left_out": run.header.left_out,
        "units": [
            *(
                {"key": key, "state": state_of(r), "stage": str(r.stage), "note": _note(r)}
                for key, r in records.items()
            ),
            *({"key": key, "state": DAMAGED, "stage": "", "note": why} for key, why in damaged.items()),
        ],
    }


def _note(record: UnitRecord) -> str:
    if record.failure:
        return record.failure
    if record.certificate and state_of(record) in DONE:
        return "; ".join(record.certificate.failures)
    return record.unit.reason


# Columns of the metrics table: header, rank (those of the highest are left out first, of 0 never), how a row is shown.
COLUMNS: tuple[tuple[str, int, Callable[[pd.Series], str]], ...] = (
    ("n", 0, lambda row: f"{row['n']:,}"),
    ("k", 3, lambda row: f"{row['k']:,}"),
    ("S", 2, lambda row: spell(row["S"])),
    ("S active", 0, lambda row: spell(row["S_active"], 7)),
    ("+-", 0, lambda row: spell(row["S_active_error"], 2)),
    ("Re<0 %", 0, lambda row: spell_share(row, "negative")),
    ("Re=0 %", 3, lambda row: percent(row["zero"])),
    ("near axis", 1, lambda row: f"{int(row['near_axis'])}"),
    ("max Re", 4, lambda row: spell(row["abscissa"])),
    ("min Re active", 5, lambda row: spell(row["min_re_active"])),
    ("error", 5, lambda row: spell(row["value_error"], 2)),
)


SINGULAR_COLUMNS: tuple[tuple[str, int, Callable[[pd.Series], str]], ...] = (
    ("m x n", 0, lambda row: f"{row['m']:,} x {row['n']:,}"),
    ("largest", 0, lambda row: spell(row["radius"], 7)),
    ("condition", 0, lambda row: spell(row["condition"], 7)),
    ("+-", 0, lambda row: spell(row["S_active_error"], 2)),
    ("zero %", 1, lambda row: percent(row["zero"])),
    ("effective rank", 1, lambda row: spell(row["effective_rank"])),
    ("nuclear", 2, lambda row: spell(row["nuclear_norm"])),
    ("Frobenius", 2, lambda row: spell(row["frobenius_norm"])),
    ("error", 5, lambda row: spell(row["value_error"], 2)),
)


def metrics_table(rows: pd.DataFrame, width: int = 180, kind: str = "matrix") -> Table:
    """One row a unit: S, S_active with its error, the shares by sign, the extremes, and whether it is certified.

    What the verdicts rest on, and what they leave open, stands below the table, each once.

    Args:
        rows: from `Run.metrics`.
        width: of the console; where not all columns fit, those are left out that matter least.
        kind: of the spectra.
    """
    chosen = SINGULAR_COLUMNS if kind == Kind.SINGULAR else COLUMNS
    sliced = kind == Kind.TENSOR_SLICES
    if sliced:  # as Tables 10 and 11 of the paper; S is as S active wherever an eigenvalue is negative
        sizes = tuple((name, 0, _thousands(name)) for name in ("elements", "eigenvalues"))
        chosen = sizes + tuple(column for column in chosen if column[0] not in ("n", "S"))
    notes: dict[str, int] = {}
    shown = []
    for _, row in rows.iterrows():
        lead = [str(row["image_index"]), _block(row["number"], row["block"]), row["function"]]
        if row["state"] in DONE:
            shown.append((lead, [show(row) for _, _, show in chosen], _verdict(row, notes)))
        else:
            n = f"{row['n']:,}" if row["n"] == row["m"] else f"{row['m']:,} x {row['n']:,}"
            n = "-" if row["route"] == FAILED else n
            shown.append((lead, [n, *["-"] * (len(chosen) - 1)], row["state"]))
    title = f"{kind} spectra of {', '.join(sorted(set(rows['function'])))}"
    caption = [_images_caption(rows), *([SLICES_CAPTION] if sliced else []), *_below(notes)]
    return _fitted(title, caption, [(header, rank) for header, rank, _ in chosen], "certified", shown, width)


def _verdict(row: pd.Series, notes: dict[str, int]) -> str:
    """Whether a spectrum is certified, with the numbers of the notes that go with it, new ones added."""
    basis = row["basis"].split(", margin ")[0] if row["solver"] == Solver.EXTREMES else ""
    where = f"{_block(row['number'], row['block'])} {row['function']}, image {row['image_index']}"
    said = [basis, f"{where}: {row['note']}" if row["note"] else ""]
    numbers = [str(notes.setdefault(text, len(notes) + 1)) for text in said if text]
    return ("yes" if row["certified"] else "NO") + (f" ({', '.join(numbers)})" if numbers else "")


# Of a table of units: image, block and function; the cells of its columns; what stands last.
_Row = tuple[list[str], list[str], str]


def _below(notes: Mapping[str, int]) -> list[str]:
    """Notes as lines below a table."""
    return [f"({number}) {text}" for text, number in notes.items()]


def _fitted(
    title: str,
    caption: Sequence[str],
    columns: Sequence[tuple[str, int]],
    last: str,
    rows: Sequence[_Row],
    width: int,
) -> Table:
    """A table of units with as many columns as fit; nothing in it is cropped.

    Args:
        title: above it; it names the function where all units have the same.
        caption: lines below it.
        columns: headers and ranks: of those that do not fit, the highest rank is left out first, and 0 never.
        last: header of the last column, which stays.
        rows: of it.
        width: of the console.
    """
    leads = [name for at, name in enumerate(("image", "block", "function")) if at == 1 or _several(rows, at)]
    at_lead = [("image", "block", "function").index(name) for name in leads]
    kept = list(range(len(columns)))

    def taken() -> int:
        shown = [*leads, *(columns[at][0] for at in kept), last]
        cells = [[*(r[0][at] for at in at_lead), *(r[1][at] for at in kept), r[2]] for r in rows]
        return 1 + sum(3 + max(map(len, column)) for column in zip(shown, *cells, strict=True))

    while taken() > width and any(columns[at][1] for at in kept):
        kept.remove(max(kept, key=lambda at: (columns[at][1], at)))
    table = _table(title, "\n".join(caption))
    fold: Callable[[str], str] = str
    if taken() > width:
        fold = _folded
        table.box, table.show_edge, table.pad_edge, table.collapse_padding = SIMPLE_HEAD, False, False, True
    for name in leads:
        table.add_column(name, overflow="fold")
    for at in kept:
        table.add_column(columns[at][0], justify="right")
    table.add_column(last, no_wrap=True)
    for lead, cells, end in rows:
        table.add_row(*(lead[at] for at in at_lead), *(fold(cells[at]) for at in kept), end)
    return table


def _several(rows: Sequence[_Row], at: int) -> bool:
    return len({lead[at] for lead, _, _ in rows}) > 1


def _folded(text: str) -> str:
    """A share with its interval, or two sizes, a line each."""
    return text.replace(" (", "\n(").replace(" to ", " to\n").replace(" x ", " x\n")


def _thousands(name: str) -> Callable[[pd.Series], str]:
    return lambda row: f"{row[name]:,}"


def percent(share: float) -> str:
    """A share for people, in per cent; `open` where it is not known."""
    return "open" if math.isnan(share) else f"{100 * share:.3f}"


SLICES_CAPTION = (
    "eigenvalues = elements of the Jacobian / W: one W x W matrix for each output number and input channel; k of "
    "them are not zero. They are no eigenvalues of the Jacobian itself (kind matrix)."
)

# Of the tables of means: header, metric, factor.
MEANS = (
    ("S active", "S_active", 1),
    ("Re<0 %", "negative", 100),
    ("Re=0 %", "zero", 100),
    ("max Re", "abscissa", 1),
    ("min Re active", "min_re_active", 1),
)


SINGULAR_MEANS = (
    ("condition", "condition", 1),
    ("effective rank", "effective_rank", 1),
    ("zero %", "zero", 100),
    ("largest", "radius", 1),
    ("nuclear", "nuclear_norm", 1),
)


def means_of(rows: pd.DataFrame) -> tuple[tuple[str, str, int], ...]:
    """What the tables of means show of this kind: header, metric, factor."""
    return SINGULAR_MEANS if set(rows["kind"]) == {str(Kind.SINGULAR)} else MEANS


def means_table(rows: pd.DataFrame, by: str = "block") -> Table:
    """Mean and standard deviation over images of the certified spectra, by block, or by block and label."""
    title = f"Mean over images (standard deviation) by {by}, certified {_kind(rows)} spectra only"
    table = _table(title, "")
    for name in (["block", "label"] if by == "label" else ["block"]) + ["function"]:
        table.add_column(name)
    for name in ("images", *(header for header, _, _ in means_of(rows))):
        table.add_column(name, justify="right")
    for names, part in mean_groups(rows, by):
        table.add_row(*names, str(len(part)), *mean_cells(part))
    return table


def mean_cells(rows: pd.DataFrame) -> list[str]:
    """Of each of `means_of`: mean (standard deviation) over rows, and how many of them are infinite or open.

    Where single values are open within an interval, what the mean is between.
    """
    return [
        _mean(rows[name].to_numpy(float) * factor) + _between(rows, name, factor) for _, name, factor in means_of(rows)
    ]


def _between(rows: pd.DataFrame, name: str, factor: int) -> str:
    low, high = mean_between(rows, name)
    return f" [{low * factor:.5g} to {high * factor:.5g}]" if low < high and len(rows) >= FEWEST_OF_MEAN else ""


def correlations_table(rows: pd.DataFrame, function: str) -> Table:
    """Correlations of the metrics of `metrics_of` with accuracy and loss, block by block; see `correlations`."""
    found = correlations(rows[rows["function"] == function])
    table = _table(
        f"Correlation over images, certified {_kind(rows)} spectra of {function}: coefficient [95 %] (p; p by Holm)",
        "[95 %]: interval over resampled images; bold: p < 0.05 as it stands, without regard to the number of tests; "
        "an asterisk: by Holm, too",
    )
    table.add_column("block", no_wrap=True)
    for name in ("metric", "with"):
        table.add_column(name)
    for name in ("images", "Pearson", "Spearman"):
        table.add_column(name, justify="right", no_wrap=True)
    for _, row in found.iterrows():
        cells = [_coefficient(row, test) for test in ("pearson", "spearman")]
        names = [str(row["metric"]), str(row["outcome"]), str(row["images"])]
        table.add_row(_block(row["number"], row["block"]), *names, *cells)
    return table


def _coefficient(row: pd.Series, test: str) -> str | Text:
    value, p, corrected = row[test], row[f"{test}_p"], row[f"{test}_holm"]
    if math.isnan(value):
        return "-"
    interval = f"[{row[f'{test}_low']:.2f}, {row[f'{test}_high']:.2f}]"
    text = f"{value:.2f} {interval} ({p:.2g}; {corrected:.2g}){'*' if corrected < SIGNIFICANT else ''}"
    return Text(text, style="bold") if p < SIGNIFICANT else text


def _kind(rows: pd.DataFrame) -> str:
    return ", ".join(sorted(set(rows["kind"])))


def _mean(values: Any) -> str:
    finite = [v for v in values if math.isfinite(v)]
    numbers = {"infinite": sum(map(math.isinf, values)), "open": sum(map(math.isnan, values))}
    notes = [f"{number} {name}" for name, number in numbers.items() if number]
    if not finite:
        return ", ".join(name for name, number in numbers.items() if number) or "-"
    import pandas as pd

    series = pd.Series(finite)
    mean = f"{series.mean():.5g} ({series.std():.2g})" if len(finite) >= FEWEST_OF_MEAN else "-"
    return mean + (f" [{', '.join(notes)}]" if notes else "")


def comparison_table(found: pd.DataFrame, kind: str) -> Table:
    """What `compared` found of one kind: a line a block and metric, a column a run."""
    names = list(dict.fromkeys(found["run"]))
    table = _table(
        f"Mean over images (standard deviation) of certified {kind} spectra, run by run",
        f"difference from {names[0]} at the images of both, [95 %]: its interval by Student's t",
    )
    table.add_column("block", no_wrap=True)
    for name in ("function", "metric"):
        table.add_column(name)
    for i, name in enumerate(names):
        table.add_column(name, justify="right")
        if i:
            table.add_column(f"{name} less {names[0]}", justify="right")
    part = found[found["kind"] == kind]
    for unit, rows in part.groupby(["number", "block", "function", "metric"], sort=False):
        by_run, cells = {row["run"]: row for row in rows.to_dict("records")}, []
        for i, name in enumerate(names):
            row = by_run.get(name)
            cells.append(_mean_of(row) if row else "-")
            if i:
                cells.append(_difference_of(row) if row else "-")
        table.add_row(_block(unit[0], unit[1]), str(unit[2]), str(unit[3]), *cells)
    return table


def _mean_of(row: Mapping[str, Any]) -> str:
    if math.isnan(row["mean"]):
        return "-"
    deviation = "" if math.isnan(row["std"]) else f" ({row['std']:.2g})"
    return f"{row['mean']:.5g}{deviation}, {counted(row['images'], 'image', 'images')}"


def _difference_of(row: Mapping[str, Any]) -> str:
    if math.isnan(row["difference"]):
        return "-"
    few = math.isnan(row["difference_low"])
    interval = "" if few else f" [{row['difference_low']:.2g}, {row['difference_high']:.2g}]"
    return f"{row['difference']:+.3g}{interval}, {counted(row['common'], 'image', 'images')}"


def json_rows(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as strict JSON: missing values are null, infinities spelled out."""
    return [{k: _json_value(v) for k, v in row.items()} for row in rows.to_dict("records")]


def _json_value(value: Any) -> Any:
    if isinstance(value, float) or hasattr(value, "dtype"):
        value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return spell(value) if math.isinf(value) else value
    return value


def seconds(value: float) -> str:
    """A duration for people."""
    if value < 60:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    minutes = value / 60
    return f"{minutes:.1f} min" if minutes < 60 else f"{minutes / 60:.1f} h"


def _block(number: int, block: str) -> str:
    return f"{number} {block}" if number else block


def _images_caption(rows: pd.DataFrame) -> str:
    shown = [
        f"{r['image_index']} (label {r['label']}, predicted {r['prediction']}, loss {spell(r['loss'], 3)})"
        for r in rows.drop_duplicates("image").to_dict("records")
    ]
    more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
    return f"images: {', '.join(shown[:5])}{more}"


def _table(title: str, caption: str) -> Table:
    return Table(title=title, caption=caption, title_justify="left", caption_justify="left", header_style="bold")
