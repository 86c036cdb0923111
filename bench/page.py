"""Make bench/README.md from the JSON in bench/results: never written by hand."""

import ast
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import tabulate

HERE = Path(__file__).parent
HEAD = """# Benchmarks

One question a script; `python bench/NAME.py` answers it anew and rewrites its figures in `bench/results/NAME.json`,
with the machine, the versions and the command. This page is made from those by `python bench/page.py`. `python
bench/all.py` runs them all, `python bench/all.py --quick` the smallest of each in minutes. With `--device cuda`,
`by_hand.py`, `cost.py`, `rates.py` and `stages.py` go into files of their own, `NAME-cuda.json`, and stand here beside
the host's where a device was there.
"""


table = partial(tabulate, tablefmt="github", disable_numparse=True)

# Of all eigenvalues, as recorded: for people.
DENSE_STAGES = {"built": "build", "reduced": "Hessenberg", "solved": "eigenvalues", "done": "certificate"}


def mib(count: float) -> str:
    return f"{count / (1 << 20):,.0f}"


def seconds(value: float) -> str:
    return f"{value:,.1f}"


def total(stages: dict[str, float]) -> float:
    return sum(stages.values())


def workers(f: dict[str, Any]) -> str:
    row = [f["units"], seconds(f["one_worker_s"]), seconds(f["two_workers_s"]), f"{f['throughput_ratio']:.2f}"]
    return table([row], ["units", "one worker, s", "two workers, s", "ratio"])


def unreduced(f: dict[str, Any]) -> str:
    header = ["order", "dense, MiB", "allowed, MiB", "peak, MiB", "stored, MiB", "tiles", "of these stored", "s"]
    sizes = [mib(f[name]) for name in ("dense_bytes", "allowed_bytes", "peak_bytes", "stored_bytes")]
    return table([[f"{f['order']:,}", *sizes, f["tiles"], f["stored_tiles"], seconds(f["wall_s"])]], header)


def imagenet_plan(f: dict[str, Any]) -> str:
    rows = [
        [u["block"], f"{u['n']:,}", f"{u['k']:,}" if u["k"] else "-", u["solver"], f"{u['flops']:.1e}", u["why"]]
        for u in f["units"]
    ]
    return f"Planned in {seconds(f['wall_s'])} s.\n\n" + table(rows, ["block", "n", "k", "solver", "flops", "why"])


def extremes(f: dict[str, Any]) -> str:
    parts = []
    for network, g in f.items():
        parts.append(
            f"{network}: {g['units']} units; S active differs by {g['largest_relative_difference_of_S_active']:.1e} at "
            f"most (relative); the share of negative real parts was claimed for {g['negative_share_claimed']}, and "
            f"{g['of_these_equal']} of these are those of the whole spectrum. At the first image, seconds and MiB:"
        )
        rows = []
        for b in g["blocks"]:
            s = b["seconds"]
            row = [b["block"], f"{b['n']:,}", f"{b['k']:,}"]
            row += [seconds(s[name]) for name in ("build", "ends", "counts", "certificate")]
            row += [seconds(b["dense_solve_s"]), f"{b['ratio']:.1f}"]
            row += [mib(b["measured_bytes"]), mib(b["dense_measured_bytes"]), b["basis"].removeprefix("ends; ")]
            rows.append(row)
        header = ["block", "n", "k", "build", "ends", "counts", "certificate", "dense solve", "dense / (ends + counts)"]
        parts.append(table(rows, [*header, "MiB", "dense, MiB", "negative share"]))
    return "\n\n".join(parts)


def imagenet_extremes(f: dict[str, Any]) -> str:
    titles = {
        "trained": "ResNet50 trained on CIFAR-10, a test image enlarged to 112 x 112:",
        "random": "ResNet50 of torchvision, random weights, a photograph of 224 x 224:",
    }
    parts = []
    for name, title in titles.items():
        if not f[name]:
            continue
        rows = []
        for b in f[name]:
            proof = f"{b['negative']} ({b['basis']}, margin {b['margin']:.2g})"
            row = [b["block"], f"{b['n']:,}", f"{b['k']:,}", f"{b['S_active']:.7g}", f"{b['S_active_error']:.1e}"]
            row += ["yes" if b["certified"] else f"NO: {b['note']}", b["why"] if b["negative"] is None else proof]
            row += [seconds(b["seconds"][s]) for s in ("built", "solved", "counted", "done")]
            row += [seconds(total(b["seconds"])), mib(b["measured_bytes"]), mib(b["projected_bytes"]), b["date"]]
            rows.append(row)
        header = ["block", "n", "k", "S active", "+-", "certified", "negative"]
        header += ["build", "ends", "counts", "certificate"]
        parts += [title, table(rows, [*header, "sum, s", "measured, MiB", "projected, MiB", "on"])]
    return "\n\n".join(parts)


def builds(f: dict[str, Any]) -> str:
    parts = []
    for network, blocks in f.items():
        rows = []
        for b in blocks:
            s = b["seconds"]
            row = [b["block"], f"{b['k']:,}", f"{b['nonzeros']:,}", f"{s['accumulated']:.2f}"]
            row += [f"{s['shared']:.1f}" if "shared" in s else "-", seconds(s["columns"])]
            row += [f"{s['columns'] / s['accumulated']:.0f}", f"{b['largest_difference']:.0e}"]
            rows.append([*row, f"{b['largest_entry']:.2f}"])
        header = ["block", "k", "nonzeros", "accumulated, s", "shared products, s", "columns, s"]
        header += ["columns / accumulated", "largest difference", "largest entry"]
        parts += [f"{network}:", table(rows, header)]
    return "\n\n".join(parts)


def slices(f: dict[str, Any]) -> str:
    parts = []
    for network, blocks in f.items():
        rows = []
        for b in blocks:
            row = [b["block"], f"{b['elements']:,}", f"{b['eigenvalues']:,}", f"{b['not_zero']:,}", str(b["unsure"])]
            row += [f"{b['S']:.4f}", f"{100 * b['negative']:.3f}", *(f"{s:.2f}" for s in b["seconds"].values())]
            row += [f"{total(b['before']):.2f}"] if "before" in b else ["-"]
            if "direct_s" in b:
                row += [seconds(b["direct_s"]), f"{b['direct_not_zero']:,}", f"{b['largest_difference']:.0e}"]
            rows.append(row + ["-"] * (15 - len(row)))
        header = ["block", "elements", "eigenvalues", "not zero", "unsure", "S", "Re<0 %"]
        header += [f"{name}, s" for name in blocks[0]["seconds"]] + ["before, s"]
        header += ["direct, s", "not zero there", "largest difference"]
        said = []
        for when in ("before", "seconds"):
            if all(when in b for b in blocks):
                spent = {name: sum(b[when][name] for b in blocks) for name in blocks[0][when]}
                each = ", ".join(f"{name} {seconds(s)}" for name, s in spent.items())
                said.append(f"{'before' if when == 'before' else 'now'} {seconds(total(spent))} s ({each})")
        parts += [f"{network}, {len(blocks)} blocks: {'; '.join(said)}.", table(rows, header)]
    return "\n\n".join(parts)


def ratio(value: float) -> str:
    return f"{value:,.2g}" if value < 10 else f"{value:,.0f}"


def by_hand(f: dict[str, Any]) -> str:
    rows = []
    for b in f["blocks"]:
        ours = b["stiffcore"]
        row = [b["block"], f"{b['n']:,}", seconds(total(ours["seconds"])), mib(ours["peak_bytes"])]
        for way in ("torch", "numpy"):
            theirs = b[way]
            row += [seconds(total(theirs["seconds"])), mib(theirs["peak_bytes"])]
            row += [ratio(total(theirs["seconds"]) / total(ours["seconds"])), f"{theirs['largest_difference']:.0e}"]
        rows.append(row)
    header = ["block", "n", "stiffcore, s", "MiB"]
    for way in ("torch", "NumPy"):
        header += [f"{way}, s", "MiB", "times", "largest difference"]
    n = f["needed"]
    said = f"{n['hours']:,.0f} hours and {n['bytes'] / (1 << 30):,.0f} GiB"
    return table(rows, header) + f"\n\nBy hand n = {n['n']:,} would take {said}, from n = {n['from_n']:,}."


def cost(f: dict[str, Any]) -> str:
    parts = []
    for network, g in f.items():
        rows = []
        for b in g["blocks"]:
            s = b["seconds"]
            row = [b["block"], f"{b['n']:,}", f"{b['k']:,}", *(seconds(s[name]) for name in s)]
            row += [seconds(total(s)), seconds(b["planned_seconds"]), mib(b["measured_bytes"]), mib(b["planned_bytes"])]
            rows.append(
                [*row, f"{b['kept_bytes'] / 1024:,.0f}", "yes" if b["certified"] else "NO", f"{b['error']:.0e}"]
            )
        header = ["block", "n", "k", *DENSE_STAGES.values(), "all, s", "planned, s", "MiB"]
        parts += [f"{network}: {seconds(g['wall_s'])} s from command to prompt."]
        parts += [table(rows, [*header, "planned, MiB", "kept, KiB", "certified", "error"])]
    return "\n\n".join(parts)


def growth(f: dict[str, Any]) -> str:
    orders = [[f"{o['n']:,}", f"{o['seconds']:.2f}"] for o in f["orders"]]
    waists = []
    for w in f["waists"]:
        stages_ = (f"{w['stages'].get(name, 0):.2f}" for name in DENSE_STAGES)
        waists.append([f"{w['n']:,}", f"{w['k']:,}", f"{w['seconds']:.2f}", *stages_])
    images = [[i["images"], seconds(i["seconds"]), f"{i['seconds'] / i['images']:.2f}"] for i in f["images"]]
    parts = []
    for d in f["divided"]:
        sizes = [mib(d[name]) for name in ("read_bytes", "written_bytes")]
        row = [
            d["columns"],
            d["leaf"],
            f"{d['held_bytes'] / (1 << 20):.1f}",
            d["splits"],
            seconds(d["seconds"]["solved"]),
        ]
        parts.append([*row, *sizes, f"{d['error']:.0e}"])
    budgets = []
    for b in f["budgets"]:
        if "refused" in b:
            budgets.append([b["memory"], *["-"] * 4, f"refused: use {b['refused'].partition(': use ')[2]}"])
        else:
            row = [b["memory"], b["workers"], seconds(b["seconds"]), mib(b["peak_bytes"]), mib(b["moved_bytes"])]
            budgets.append([*row, f"chunks of {b['chunk']} columns"])
    return "\n\n".join(
        [
            table(orders, ["n", "s"]),
            f"Seconds grow as n to the power {f['slope']:.2f} between the last two.",
            table(waists, ["n", "k", "s", *DENSE_STAGES.values()]),
            table(images, ["images", "s", "s an image"]),
            table(parts, ["block", "leaf", "held, MiB", "divisions", "s", "read, MiB", "written, MiB", "neglected"]),
            table(budgets, ["allowed", "workers", "s", "peak, MiB", "moved by plan, MiB", ""]),
        ]
    )


def honesty(f: dict[str, Any]) -> str:
    def row(name: str) -> list[str]:
        r = f["rows"][name]
        ratios = ["-", "-"] if r["median_ratio"] is None else [f"{r['median_ratio']:.1e}", f"{r['worst_ratio']:.2g}"]
        counts = [f"{r[n]:,}" for n in ("answers", "refused", "certified", "plain", "values")]
        return [name, *counts, *ratios, f"{r['above']:,}", f"{r['lies']:,}"]

    header = [
        "",
        "answers",
        "refused",
        "certified",
        "nothing open",
        "values",
        "median ratio",
        "worst",
        "above 1",
        "lies",
    ]
    said = (
        f"{f['functions']:,} matrices and functions, {f['rows']['all']['answers']:,} answers, "
        f"{f['cpu_s'] / 3600:.1f} hours of the processor. A ratio is a true error over the stated one, rounded up to a "
        "quarter of a power of ten."
    )
    return "\n\n".join([said, table([row(name) for name in f["rows"]], header)])


def stages(f: dict[str, Any]) -> str:
    rows = []
    for name, c in f["cases"].items():
        spent = total(c["seconds"])
        shares = ", ".join(f"{stage} {s:.2f} s ({100 * s / spent:.0f} %)" for stage, s in c["seconds"].items())
        rows.append([name, c["block"], f"{c['k']:,}", f"{spent:.2f}", shares, mib(c["planned_moved_bytes"])])
    rates = f["disk_bytes_per_s"]
    said = ", ".join(f"{name} {100 * share:.0f} %" for name, share in f["share_of_product_rate"].items())
    return "\n\n".join(
        [
            f"Product {f['product_flops_per_s'] / 1e9:.1f} GFlop/s; disk {mib(rates['write'])} MiB/s written, "
            f"{mib(rates['read'])} MiB/s read.",
            table(rows, ["solved", "block", "k", "stages, s", "of which", "moved by plan, MiB"]),
            f"Of the product rate, the dense stages reach: {said}. Where an accumulated matrix goes through the store, "
            f"the ends of block 2 take {f['stored_over_held']:.2f} times as long.",
        ]
    )


def divide(f: dict[str, Any]) -> str:
    d, w, matrix = f["divided"], f["dense"], mib(f["matrix_bytes"])
    moved = [f"{d[name] / 1e9:,.1f}" for name in ("read_bytes", "written_bytes")]
    share = f"{100 * d['share_of_product_rate']:.0f} %"
    rows = [
        ["whole, LAPACK", matrix, "-", mib(w["peak_bytes"]), "-", "-", seconds(w["seconds"]), "-"],
        ["divided", matrix, mib(d["allowed_bytes"]), mib(d["peak_bytes"]), *moved, seconds(d["seconds"]), share],
    ]
    header = ["way", "matrix, MiB", "allowed, MiB", "peak, MiB", "read, GB", "written, GB", "s", "of the product rate"]
    said = (
        f"{f['network']} {f['block']}, k = {f['k']:,}. Blocks of {d['columns']:,} columns, parts of {d['leaf']:,} "
        f"solved by LAPACK; {d['operations']:.1e} operations ({d['operations'] / f['k'] ** 3:.0f} k^3); planned to "
        f"move {d['planned_moved_bytes'] / 1e9:,.0f} GB. The largest distance from an eigenvalue of one way to the "
        f"nearest of the other is {f['largest_difference']:.1e}, the largest eigenvalue {f['largest_eigenvalue']:.3g}, "
        f"the sum of what was neglected {d['error']:.1e}. Writing takes "
        f"{100 * d['writing_seconds'] / d['seconds']:.0f} % of the seconds. The divisions:"
    )
    splits = []
    for s in d["splits"]:
        verdict = s["failure"] or ("yes" if 0 < s["beyond"] < s["order"] else "all on one side")
        small = [f"{s[name]:.0e}" for name in ("trace_error", "neglected")]
        splits.append([f"{s['order']:,}", s["curve"], f"{s['beyond']:,}", s["steps"], *small, verdict])
    names = ["order", "curve", "beyond", "steps", "trace off", "neglected / norm", "divided"]
    return "\n\n".join([table(rows, header), said, table(splits, names)])


def divide_cases(f: dict[str, Any]) -> str:
    rows = []
    for m in f["matrices"]:
        row = [m["matrix"], f"{m['order']:,}"]
        if m["verdict"] == "refused":
            rows.append([*row, "-", "-", "-", "-", "-", "-", m["verdict"]])
            continue
        steps = f"{min(m['steps'])} to {max(m['steps'])}" if m["steps"] else "-"
        row += [f"{m['divisions']} of {m['tried']}", steps]
        row += [f"{m[name]:.0e}" for name in ("trace_error", "neglected", "distance")]
        rows.append([*row, f"{m['lapack_distance']:.0e}" if "lapack_distance" in m else "-", m["verdict"]])
    said = ", ".join(f"{number} {verdict}" for verdict, number in f["counts"].items())
    header = ["matrix", "order", "divisions of tried", "steps", "trace off", "neglected / norm", "furthest, relative"]
    return f"Of {len(f['matrices'])} matrices: {said}.\n\n" + table(rows, [*header, "LAPACK's", "verdict"])


def divide_steps(f: dict[str, Any]) -> str:
    kernels = ", ".join(
        f"{name} {s:.2f} s ({100 * f['share_of_product_rate'][name]:.0f} % of the product rate)"
        for name, s in f["seconds"].items()
    )
    rows = [[s["iteration"], f"{s['step_s']:.2f}", f"{s['doubling_s']:.2f}"] for s in f["steps"]]
    return f"Order {f['order']:,}: {kernels}.\n\n" + table(rows, ["iteration", "a step, s", "digits doubled in, s"])


def divide_workers(f: dict[str, Any]) -> str:
    rows = []
    for w in f["ways"]:
        relative = f["ways"][0]["seconds"] / w["seconds"]
        rows.append([w["way"], *(f"{w[name]:.1f}" for name in ("LU_s", "inverse_s", "seconds")), f"{relative:.2f}"])
    same = "the same" if f["same"] else "not the same"
    return (
        f"{f['network']} {f['block']}, k = {f['k']:,}, blocks of {f['columns']:,} columns. What one and two workers "
        f"wrote is {same}.\n\n" + table(rows, ["way", "LU, s", "inverse, s", "both, s", "times as fast"])
    )


def slicing(f: dict[str, Any]) -> str:
    rows = []
    for b in f["blocks"]:
        for s in b["slices"]:
            row = [f"{b['network']} {b['block']}", f"{b['k']:,}", seconds(b["dense_s"]), s["at"]]
            row += [f"{s['found']} of {s['wanted']}", seconds(s["factor_s"]), seconds(s["arnoldi_s"])]
            row += [mib(s["factor_bytes"]), f"{s['found'] / (s['factor_s'] + s['arnoldi_s']):.1f}"]
            rows.append([*row, seconds(s["all_s"]), f"{s['all_s'] / b['dense_s']:.1f}"])
    header = ["block", "k", "LAPACK, s", "shift", "found", "LU, s", "Arnoldi, s", "factors, MiB", "yield, 1/s"]
    return table(rows, [*header, "all at least, s", "beside LAPACK"])


def divide_costs(f: dict[str, Any]) -> str:
    rows = []
    for r in f["rows"]:
        row = [r["block"], f"{r['k']:,}", f"{r['matrix_bytes'] / 1e9:,.1f}", r["machine"], f"{r['columns']:,}"]
        row += [f"{r['operations']:.1e}", f"{r['moved_bytes'] / 1e12:,.1f}"]
        row += [f"{r[name] / 3600:,.2g}" for name in ("arithmetic_s", "moving_s")]
        rows.append(row)
    header = ["block", "k", "matrix, GB", "machine", "columns of a block", "operations", "moved, TB"]
    return table(rows, [*header, "arithmetic, h", "moving, h"])


def fuzz(f: dict[str, Any]) -> str:
    codes = sorted({code for ended in f["ended"].values() for code in ended})
    rows = [
        [command, f"{sum(ended.values()):,}", *(f"{ended.get(code, 0):,}" for code in codes)]
        for command, ended in f["ended"].items()
    ]
    said = (
        f"{f['cases']:,} hostile runs, drawn from {sum(f['changes'].values()):,} changes of {len(f['changes'])} "
        f"stored runs, {f['cpu_s'] / 60:,.0f} minutes of the processor. {len(f['bad']):,} ended with a traceback, an "
        "import, a socket, a change outside of the run, or an exit code without an error."
    )
    return "\n\n".join([said, table(rows, ["command", "cases", *(f"exit {code}" for code in codes)])])


def rates(f: dict[str, Any]) -> str:
    rows = [[name.replace("_", " "), f"{rate / 1e9:,.1f}"] for name, rate in f["flops_per_s"].items()]
    parts = [f"{f['device'] or 'The host'}, order {f['order']:,}:", table(rows, ["kernel", "GF/s"])]
    rows = []
    for e in f["eigenvalues"]:
        row = [f"{e['k']:,}", f"{e['seconds']:.2f}", f"{e['flops_per_s'] / 1e9:,.1f}"]
        if f["device"]:
            row += [f"{e['vectors_seconds']:.3f}", mib(e["values_taken_bytes"]), mib(e["vectors_taken_bytes"])]
            row += [mib(e["planned_bytes"])]
        rows.append(row)
    header = ["order", "all eigenvalues, s", "GF/s"]
    header += ["vectors of one, s", "taken, MiB", "taken for vectors, MiB", "planned, MiB"] if f["device"] else []
    rows_of_bytes = [[name.replace("_", " "), f"{rate / 1e9:,.2f}"] for name, rate in f["bytes_per_s"].items()]
    return "\n\n".join([*parts, table(rows, header), table(rows_of_bytes, ["bytes", "GB/s"])])


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "by_hand": by_hand,
    "cost": cost,
    "growth": growth,
    "honesty": honesty,
    "fuzz": fuzz,
    "stages": stages,
    "rates": rates,
    "builds": builds,
    "extremes": extremes,
    "imagenet_extremes": imagenet_extremes,
    "slices": slices,
    "workers": workers,
    "unreduced": unreduced,
    "imagenet_plan": imagenet_plan,
    "divide": divide,
    "divide_cases": divide_cases,
    "divide_steps": divide_steps,
    "divide_workers": divide_workers,
    "slicing": slicing,
    "divide_costs": divide_costs,
}


def _axes(title: str, x: str, y: str) -> Axes:
    axes = Figure(figsize=(5.5, 3.4), layout="constrained").subplots()
    axes.set(title=title, xlabel=x, ylabel=y, xscale="log", yscale="log")
    axes.grid(visible=True, which="major", color="0.9")
    return axes


def draw_by_hand(f: dict[str, Any]) -> Axes:
    axes = _axes("One block of ResNet18, all eigenvalues", "n", "seconds (lines), MiB (dashed)")
    n = [b["n"] for b in f["blocks"]]
    for colour, way in zip(("C0", "C1", "C2"), ("stiffcore", "torch", "numpy"), strict=True):
        axes.plot(n, [total(b[way]["seconds"]) for b in f["blocks"]], "o-", color=colour, label=way)
        axes.plot(n, [b[way]["peak_bytes"] / (1 << 20) for b in f["blocks"]], "s--", color=colour, mfc="none")
    axes.legend()
    return axes


def draw_cost(f: dict[str, Any]) -> Axes:
    axes = _axes("What was planned, and what it took", "planned: seconds (dots), MiB (squares)", "measured")
    least, most = math.inf, 0.0
    for colour, (network, g) in zip(("C0", "C1", "C2"), f.items(), strict=False):
        pairs = [(b["planned_seconds"], total(b["seconds"])) for b in g["blocks"]]
        bytes_ = [(b["planned_bytes"] / (1 << 20), b["measured_bytes"] / (1 << 20)) for b in g["blocks"]]
        axes.plot(*zip(*pairs, strict=True), "o", color=colour, label=network)
        axes.plot(*zip(*bytes_, strict=True), "s", color=colour, mfc="none")
        least = min([least, *(min(pair) for pair in pairs + bytes_)])
        most = max([most, *(max(pair) for pair in pairs + bytes_)])
    axes.plot([least, most], [least, most], color="0.6", lw=1)
    axes.legend()
    return axes


def draw_growth(f: dict[str, Any]) -> Axes:
    axes = _axes(f"One dense function of n inputs: n to the power {f['slope']:.2f}", "n", "seconds")
    axes.plot([o["n"] for o in f["orders"]], [o["seconds"] for o in f["orders"]], "o-")
    return axes


def draw_extremes(f: dict[str, Any]) -> Axes:
    axes = _axes("All eigenvalues, and the ends with their proof", "order k of the matrix", "seconds")
    for colour, (network, g) in zip(("C0", "C1"), f.items(), strict=False):
        k = [b["k"] for b in g["blocks"]]
        axes.plot(k, [b["dense_solve_s"] for b in g["blocks"]], "o", color=colour, label=f"{network}, all")
        ends = [b["seconds"]["ends"] + b["seconds"]["counts"] for b in g["blocks"]]
        axes.plot(k, ends, "o", color=colour, mfc="none", label=f"{network}, ends")
    axes.legend()
    return axes


PICTURES: dict[str, Callable[[dict[str, Any]], Axes]] = {
    "by_hand": draw_by_hand,
    "cost": draw_cost,
    "growth": draw_growth,
    "extremes": draw_extremes,
}


def draw() -> None:
    """Write the pictures of the page, the same bytes from the same figures."""
    (HERE / "figures").mkdir(exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "stiffcore", "svg.fonttype": "none"}):
        for name, picture in PICTURES.items():
            result = HERE / f"results/{name}.json"
            if result.exists():
                figure = picture(json.loads(result.read_text())["figures"]).figure
                figure.savefig(HERE / f"figures/{name}.svg", metadata={"Date": None})


def page() -> str:
    parts = [HEAD]
    for name, section in SECTIONS.items():
        results = [HERE / f"results/{name}{device}.json" for device in ("", "-cuda")]
        results = [result for result in results if result.exists()]
        if not results:
            continue
        question, _, rest = (ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text())) or "").partition("\n\n")
        parts += [f"## {question}", rest]
        for found in (json.loads(result.read_text()) for result in results):
            machine = found["machine"]
            versions = ", ".join(f"{k} {machine[k]}" for k in ("python", "stiffcore", "torch", "numpy", "scipy"))
            where = f"{machine['cores']} cores of {machine['cpu']}, {mib(machine['memory_bytes'])} MiB"
            ran = f"{found['date']}, {where}; {versions}"
            parts += [f"`{found['command']}`, {ran}.", section(found["figures"])]
        parts += [f"![{question}](figures/{name}.svg)"] if name in PICTURES else []
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


if __name__ == "__main__":
    draw()
    (HERE / "README.md").write_text(page())
