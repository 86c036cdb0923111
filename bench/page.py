"""Make bench/README.md from the JSON in bench/results: never written by hand."""

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
HEAD = """# Benchmarks

One question a script; `python bench/NAME.py` answers it anew and rewrites its figures in `bench/results/NAME.json`,
with the machine, the versions and the command. This page is made from those by `python bench/page.py`.
"""


def table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def mib(count: float) -> str:
    return f"{count / (1 << 20):,.0f}"


def seconds(value: float) -> str:
    return f"{value:,.1f}"


def total(stages: dict[str, float]) -> float:
    return sum(stages.values())


def workers(f: dict[str, Any]) -> str:
    row = [f["units"], seconds(f["one_worker_s"]), seconds(f["two_workers_s"]), f"{f['throughput_ratio']:.2f}"]
    return table(["units", "one worker, s", "two workers, s", "ratio"], [row])


def unreduced(f: dict[str, Any]) -> str:
    header = ["order", "dense, MiB", "allowed, MiB", "peak, MiB", "stored, MiB", "tiles", "of these stored", "s"]
    sizes = [mib(f[name]) for name in ("dense_bytes", "allowed_bytes", "peak_bytes", "stored_bytes")]
    return table(header, [[f"{f['order']:,}", *sizes, f["tiles"], f["stored_tiles"], seconds(f["wall_s"])]])


def imagenet_plan(f: dict[str, Any]) -> str:
    rows = [
        [u["block"], f"{u['n']:,}", f"{u['k']:,}" if u["k"] else "-", u["solver"], f"{u['flops']:.1e}", u["why"]]
        for u in f["units"]
    ]
    return f"Planned in {seconds(f['wall_s'])} s.\n\n" + table(["block", "n", "k", "solver", "flops", "why"], rows)


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
        parts.append(table([*header, "MiB", "dense, MiB", "negative share"], rows))
    return "\n\n".join(parts)


def imagenet_extremes(f: dict[str, Any]) -> str:
    titles = {
        "trained": "ResNet50 trained on CIFAR-10, a test image enlarged to 112 x 112:",
        "random": "ResNet50 of torchvision, random weights, a photograph of 224 x 224:",
    }
    parts = []
    for name, title in titles.items():
        if name not in f:
            continue
        rows = []
        for b in f[name]["blocks"]:
            proof = f"{b['negative']} ({b['basis']}, margin {b['margin']:.2g})"
            row = [b["block"], f"{b['n']:,}", f"{b['k']:,}", f"{b['S_active']:.7g}", f"{b['S_active_error']:.1e}"]
            row += ["yes" if b["certified"] else f"NO: {b['note']}", b["why"] if b["negative"] is None else proof]
            row += [seconds(b["seconds"][s]) for s in ("built", "solved", "counted", "done")]
            row += [seconds(total(b["seconds"])), mib(b["measured_bytes"]), mib(b["projected_bytes"])]
            rows.append(row)
        header = ["block", "n", "k", "S active", "+-", "certified", "negative"]
        header += ["build", "ends", "counts", "certificate"]
        parts.append(f"{title} {seconds(f[name]['wall_s'])} s in all.")
        parts.append(table([*header, "sum, s", "measured, MiB", "projected, MiB"], rows))
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
        parts += [f"{network}:", table(header, rows)]
    return "\n\n".join(parts)


def slices(f: dict[str, Any]) -> str:
    parts = []
    for network, blocks in f.items():
        rows, spent = [], sum(total(b["seconds"]) for b in blocks)
        for b in blocks:
            row = [b["block"], f"{b['elements']:,}", f"{b['eigenvalues']:,}", f"{b['not_zero']:,}", f"{b['S']:.4f}"]
            row += [f"{100 * b['negative']:.3f}"]
            row += [f"{b['seconds'][name]:.2f}" for name in ("squares", "eigenvalues")]
            if "direct_s" in b:
                row += [seconds(b["direct_s"]), f"{b['direct_not_zero']:,}", f"{b['largest_difference']:.0e}"]
            rows.append(row + ["-"] * (11 - len(row)))
        header = ["block", "elements", "eigenvalues", "not zero", "S", "Re<0 %", "squares, s", "eigenvalues, s"]
        header += ["direct, s", "not zero there", "largest difference"]
        parts += [f"{network}, {len(blocks)} blocks: {seconds(spent)} s.", table(header, rows)]
    return "\n\n".join(parts)


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "builds": builds,
    "extremes": extremes,
    "imagenet_extremes": imagenet_extremes,
    "slices": slices,
    "workers": workers,
    "unreduced": unreduced,
    "imagenet_plan": imagenet_plan,
}


def page() -> str:
    parts = [HEAD]
    for name, section in SECTIONS.items():
        result = HERE / f"results/{name}.json"
        if not result.exists():
            continue
        found = json.loads(result.read_text())
        question, _, rest = (ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text())) or "").partition("\n\n")
        machine = found["machine"]
        versions = ", ".join(f"{k} {machine[k]}" for k in ("python", "stiffcore", "torch", "numpy", "scipy"))
        where = f"{machine['cores']} cores of {machine['cpu']}, {mib(machine['memory_bytes'])} MiB"
        ran = f"{found['date']}, {where}; {versions}"
        parts += [f"## {question}", rest, f"`{found['command']}`, {ran}.", section(found["figures"])]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


if __name__ == "__main__":
    (HERE / "README.md").write_text(page())
