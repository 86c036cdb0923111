"""Does it fail honestly: is anything wrong that is called certified or proved?

The families of `tests/adversary.py`, drawn again and again: matrices and functions made to break what is said of them,
with the truth in 300 bits or by construction, each in single and in double precision, by all eigenvalues
(`host-dense`), by the ends (`extremes`), by division with leaves of half the order (`divide`), and as singular values
(`singular`). The ratio of a true error to the stated one is shown for every value that is certified; an answer is a
*lie* where a ratio is above 1, a count, or an interval of counts, misses the true one, or S is not within its error.
There must be none.

A seed draws each family once, those that take long only at every fifth or thirtieth. Whoever runs this takes the next
seeds that no one else works on, and goes on from what is there of the same sources (in `store/`), so it can be killed
and be run many times at once; the last one writes the figures. `--functions 20000` says when it is enough, `--quick` is
200. With fewer than are there already, it writes the figures of those.
"""

import math
import sys
from collections import Counter, defaultdict
from pathlib import Path

import torch
from common import QUICK, Drawn, write

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from stiffcore.errors import StiffcoreError  # noqa: E402
from tests import adversary  # noqa: E402

FUNCTIONS = int(sys.argv[sys.argv.index("--functions") + 1]) if "--functions" in sys.argv else 200 if QUICK else 20_000
# Every so many seeds, the families that take long: of more than a hundred rows, and of some dozens that are far from
# normal, of which one takes as long as several others.
TALL_EVERY, COSTLY_EVERY = 30, 5
AT_ONCE = 1 if QUICK else 10  # seeds, before it is counted how many functions that were
BINS = 4  # of ratios, a power of ten


def asked(seed: int) -> dict:
    """All answers of a seed, by family and solver."""
    rows: dict[tuple[str, str], Counter] = defaultdict(Counter)
    lies, functions = [], 0
    for case in adversary.cases(seed, tall=seed % TALL_EVERY == 0, costly=seed % COSTLY_EVERY == 0):
        functions += 1
        for solver in adversary.solvers_for(case):
            row = rows[case.family, solver]
            row["answers"] += 1
            try:
                found = adversary.judged(case, solver)
            except StiffcoreError:
                row["refused"] += 1
                continue
            row["certified"] += int(found.certified)
            row["plain"] += int(found.plain)
            row["lies"] += bool(found.lies)
            row["above"] += sum(bool(r > 1) for r in found.ratios)
            for ratio in found.ratios:
                row[f"ratio {binned(ratio)}"] += 1
            lies += [f"seed {seed}: {case.name}, {solver}: {lie}" for lie in found.lies]
    return {"functions": functions, "rows": [[*key, row] for key, row in rows.items()], "lies": lies}


def binned(ratio: float) -> int:
    """The quarter of a power of ten that a ratio is in; the first for all below 1e-15, the last for infinity."""
    if ratio < 1e-15:
        return -15 * BINS
    return math.ceil(BINS * math.log10(ratio)) if ratio < float("inf") else 99


def figures(parts: list[dict]) -> dict:
    """Sums of all that was asked."""
    total: dict[str, Counter] = defaultdict(Counter)
    lies, functions, cpu = [], 0, 0.0
    for part in parts:
        functions, cpu = functions + part["functions"], cpu + part["cpu_s"]
        lies += part["lies"]
        for family, solver, row in part["rows"]:
            for name in (family, solver, "all"):
                total[name].update(row)
    rows = {name: summed(row) for name, row in total.items()}
    return {"functions": functions, "cpu_s": cpu, "rows": rows, "lies": lies}


def summed(row: Counter) -> dict:
    """Counts, and the ratios' median, worst and share above 1; a ratio is known by its quarter of a power of ten."""
    ratios = sorted((int(name.split()[1]), count) for name, count in row.items() if name.startswith("ratio"))
    number, seen, median = sum(count for _, count in ratios), 0, None
    for place, count in ratios:
        seen += count
        if median is None and 2 * seen >= number:
            median = 10 ** (place / BINS)
    counts = {name: row[name] for name in ("answers", "refused", "certified", "plain", "lies", "above")}
    worst = 10 ** (ratios[-1][0] / BINS) if ratios else None
    return counts | {"values": number, "median_ratio": median, "worst_ratio": worst}


if __name__ == "__main__":
    torch.set_num_threads(1)
    drawn = Drawn("honesty", asked, adversary.__file__)
    drawn.until(FUNCTIONS, lambda part: part["functions"], AT_ONCE)
    found = figures(drawn.all())
    write(__file__, found)
    assert not found["lies"], f"{len(found['lies'])} lies, of which {found['lies'][:20]}"
