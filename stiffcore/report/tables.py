"""Tables for people, and rows for programs, of plans, states and metrics."""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
from rich.table import Table

from stiffcore.metrics import spell
from stiffcore.plan import Plan, UnitPlan
from stiffcore.run import Run, state_of
from stiffcore.study import format_bytes

DONE = ("done", "not certified")


def plan_table(plan: Plan) -> Table:
    """One row a unit, cheap first: what it is, how it will be solved, and what that takes."""
    images = len({p.unit.image for p in plan.units}) > 1
    table = _table("Plan", f"{plan.workers} side by side, {plan.threads} thread each")
    for name in (["image"] if images else []) + ["block", "function"]:
        table.add_column(name)
    for name in ("n", "k", "memory", "disk", "time"):
        table.add_column(name, justify="right")
    table.add_column("solver")
    table.add_column("why", overflow="fold")
    for p in plan.units:
        cells = [_block(p.unit.number, p.unit.block), str(p.unit.function), f"{p.unit.n:,}"]
        if p.works:
            cells += [f"{p.unit.k:,}", format_bytes(p.projected_bytes), format_bytes(p.disk_bytes), seconds(p.seconds)]
            cells += [str(p.solver), p.unit.reason]
        else:
            cells += [f"{p.unit.k:,}" if p.refused else "-", "-", "-", "-", "refused" if p.refused else "-", p.why]
        table.add_row(*([str(p.unit.image)] if images else []), *cells)
    return table


def plan_rows(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values, all bytes in integers."""
    return {
        "allowed_bytes": plan.allowed_bytes,
        "reserved_bytes": plan.reserved_bytes,
        "worker_bytes": plan.worker_bytes,
        "data_bytes": plan.data_bytes,
        "disk_bytes": plan.disk_bytes,
        "workers": plan.workers,
        "threads": plan.threads,
        "seconds": plan.seconds,
        "units": [_plan_row(p) for p in plan.units],
    }


def _plan_row(p: UnitPlan) -> dict[str, Any]:
    return p.unit.model_dump(mode="json") | p.to_json() | {"projected_bytes": p.projected_bytes}


def plan_summary(plan: Plan) -> str:
    """The run's totals in one sentence."""
    working = [p for p in plan.units if p.works]
    largest = max((p.projected_bytes for p in working), default=0)
    return (
        f"{len(working)} spectra to compute ({len(plan.units) - len(working)} units have none), about "
        f"{seconds(plan.seconds)}; memory: {format_bytes(plan.allowed_bytes)} allowed, "
        f"{format_bytes(plan.reserved_bytes)} reserved, largest unit {format_bytes(largest)}; "
        f"disk: at most {format_bytes(plan.disk_bytes)}"
    )


def status_table(records: Mapping[str, Mapping[str, Any]]) -> Table:
    """How many units are in which state, and what is known of those that are not simply done or planned."""
    states: dict[str, int] = {}
    for record in records.values():
        states[state_of(record)] = states.get(state_of(record), 0) + 1
    table = _table("Units", ", ".join(f"{count} {state}" for state, count in sorted(states.items())))
    for name in ("unit", "state", "stage"):
        table.add_column(name)
    table.add_column("note", overflow="fold")
    for key, record in records.items():
        if state_of(record) not in ("done", "planned", "no spectrum"):
            table.add_row(key, state_of(record), record["stage"], _note(record))
    return table


def status_rows(run: Run) -> dict[str, Any]:
    """The state of a run as JSON values."""
    records = run.records()
    return {
        "run": run.store.url,
        "holder": run.store.holder(),
        "study": run.header["study"],
        "units": [
            {"key": key, "state": state_of(r), "stage": r["stage"], "note": _note(r)} for key, r in records.items()
        ],
    }


def _note(record: Mapping[str, Any]) -> str:
    if record.get("failure"):
        return str(record["failure"])
    if record["stage"] == "done":
        return "; ".join(record["certificate"]["failures"])
    return str(record["reason"])


def metrics_table(rows: pd.DataFrame, kind: str = "matrix") -> Table:
    """One row a unit: S, S_active with its error, the shares by sign, the extremes, and whether it is certified."""
    images = rows["image"].nunique() > 1
    functions = ", ".join(sorted(set(rows["function"])))
    table = _table(f"{kind} spectra of {functions}", _images_caption(rows))
    for name in (["image"] if images else []) + ["block", "function"]:
        table.add_column(name)
    headers = ["n", "k", "S", "S active", "+-", "Re<0 %", "Re=0 %", "near axis", "max Re", "min Re active"]
    for name in [*headers, "error"]:
        table.add_column(name, justify="right")
    table.add_column("certified")
    for _, row in rows.iterrows():
        lead = ([str(row["image"])] if images else []) + [_block(row["number"], row["block"]), row["function"]]
        table.add_row(*lead, *_metric_cells(row))
    return table


def _metric_cells(row: pd.Series) -> list[str]:
    if row["state"] not in DONE:
        n = f"{row['n']:,}" if row["n"] == row["m"] else f"{row['m']:,} x {row['n']:,}"
        return [n, *["-"] * 10, row["state"]]
    return [
        f"{row['n']:,}",
        f"{row['k']:,}",
        spell(row["S"]),
        spell(row["S_active"], 7),
        spell(row["S_active_error"], 2),
        f"{100 * row['negative']:.3f}",
        f"{100 * row['zero']:.3f}",
        f"{int(row['near_axis'])}",
        spell(row["abscissa"]),
        spell(row["min_re_active"]),
        spell(row["value_error"], 2),
        "yes" if row["certified"] else f"NO: {row['note']}",
    ]


def means_table(rows: pd.DataFrame) -> Table:
    """Mean and standard deviation over images, by block and function, of the certified spectra."""
    certified = rows[(rows["state"] == "done")]
    table = _table("Mean over images (standard deviation), certified spectra only", "")
    for name in ("block", "function"):
        table.add_column(name)
    columns = {"S_active": 1, "negative": 100, "zero": 100, "abscissa": 1, "min_re_active": 1}
    for name in ("images", "S active", "Re<0 %", "Re=0 %", "max Re", "min Re active"):
        table.add_column(name, justify="right")
    for (number, block, function), group in certified.groupby(["number", "block", "function"]):
        cells = [_mean(group[name].to_numpy(float) * scale) for name, scale in columns.items()]
        table.add_row(_block(number, block), function, str(len(group)), *cells)
    return table


def _mean(values: Any) -> str:
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return "-"
    series = pd.Series(finite)
    spread = f" ({series.std():.2g})" if len(finite) > 1 else ""
    note = f" [{len(values) - len(finite)} infinite]" if len(finite) < len(values) else ""
    return f"{series.mean():.5g}{spread}{note}"


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
    first = json_rows(rows.drop_duplicates("image"))
    shown = [
        f"{r['image_index']} (label {r['label']}, predicted {r['prediction']}, loss {r['loss']:.3g})" for r in first
    ]
    more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
    return f"images: {', '.join(shown[:5])}{more}"


def _table(title: str, caption: str) -> Table:
    return Table(title=title, caption=caption, title_justify="left", caption_justify="left", header_style="bold")
