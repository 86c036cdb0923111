"""How does a run grow: with the order, the waist, the number of images, the budget; what is moved in a small one?

Order: one dense function of n inputs, nothing to reduce, n doubled again and again; seconds and the slope in log-log.
Waist: a residual block relu(x + B relu(A x)) of random matrices, its waist doubled at one n, then n at one waist.
Images: one block of ResNet18 at 1, 2, 4, 8 images, one worker. Budget: the same eight images in budgets from the
least up; how many units work side by side, the time, the peak of all processes. Divided: the same block at one image by
`--solver divide`, its matrix (k = 939, 6.7 MiB) in ever narrower blocks, as ever smaller budgets have them: seconds of
the solve, and bytes that its process has read and written meanwhile (/proc/self/io). `--quick` takes the smaller half.
"""

import math
import tempfile
import time
from dataclasses import replace

import torch
from common import QUICK, write

import stiffcore
from stiffcore.cluster import InProcess, local_workers
from stiffcore.errors import InputError
from stiffcore.memory import moved_bytes
from stiffcore.session import carry_out_plan, prepare
from stiffcore.solvers.divide import divide_held_bytes

ORDERS = (256, 512, 1024, 2048)
# n, and units of the waist, of which about half are active.
WAISTS = ((4096, 512), (4096, 1024), (4096, 2048), (4096, 4096), (8192, 1024), (16384, 1024))
IMAGES = (1, 2, 4, 8)
BUDGETS = ("1300MiB", "1500MiB", "1700MiB", "2GiB", "4GiB")
# Panels of a block, and order of the parts that are solved in memory.
BLOCKS = ((8, 500), (4, 500), (2, 250), (1, 125))
OPTIONS = {"network": "resnet18", "images": "samples", "blocks": "layer4.1", "device": "cpu"}


def at_order(n):
    matrix = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / math.sqrt(n)
    start = time.perf_counter()
    found = stiffcore.spectrum(lambda x: x @ matrix.T, torch.zeros(n, dtype=torch.float64))
    assert found.certificate.passed
    return {"n": n, "seconds": time.perf_counter() - start, "stages": found.record.seconds}


class Residual(torch.nn.Module):
    def __init__(self, n, waist):
        super().__init__()
        self.down = torch.nn.Linear(n, waist, bias=False, dtype=torch.float64)
        self.up = torch.nn.Linear(waist, n, bias=False, dtype=torch.float64)

    def forward(self, x):
        return torch.relu(x + self.up(torch.relu(self.down(x))))


def at_waist(n, waist):
    torch.manual_seed(0)
    block, x = Residual(n, waist), torch.randn(1, n, dtype=torch.float64)
    start = time.perf_counter()
    found = stiffcore.spectrum(block, x)
    assert found.certificate.passed
    return {"n": n, "k": found.k, "seconds": time.perf_counter() - start, "stages": found.record.seconds}


def session(options, workers=None):
    with tempfile.TemporaryDirectory() as folder, local_workers(lambda event: None) as executor:
        prepared = prepare(folder + "/run", OPTIONS | options, executor, workers=workers)
        start = time.perf_counter()
        run, outcome = carry_out_plan(folder + "/run", prepared, executor, lambda event: None)
        assert not outcome.failed, outcome.failed
        plans = [record.plan for record in run.records().values()]
        return {
            "images": options["count"],
            "seconds": time.perf_counter() - start,
            "workers": prepared.plan.workers,
            "peak_bytes": outcome.peak_bytes,
            "allowed_bytes": prepared.plan.allowed_bytes,
            "moved_bytes": sum(plan.moved_bytes for plan in plans),
            "chunk": plans[0].chunk,
        }


def divided(at_once, leaf):
    with tempfile.TemporaryDirectory() as folder:
        executor = InProcess(lambda event: None)
        prepared = prepare(folder + "/run", OPTIONS | {"count": 1, "solver": "divide", "memory": "6GiB"}, executor)
        [unit] = prepared.plan.units
        unit = replace(unit, at_once=at_once, leaf=leaf)
        prepared = replace(prepared, plan=replace(prepared.plan, units=(unit,)))
        before = moved_bytes()
        run, outcome = carry_out_plan(folder + "/run", prepared, executor, lambda event: None)
        assert not outcome.failed, outcome.failed
        read, written = (b - a for a, b in zip(before, moved_bytes(), strict=True))
        [record] = run.records().values()
        return {
            "columns": at_once * unit.panel,
            "leaf": leaf,
            "held_bytes": max(divide_held_bytes(record.unit.k, unit.panel, at_once), 8 * leaf**2),
            "splits": len(record.divided.splits),
            "error": record.divided.error,
            "seconds": record.seconds,
            "read_bytes": read,
            "written_bytes": written,
        }


def in_budget(memory, count):
    try:
        return {"memory": memory, **session({"memory": memory, "count": count})}
    except InputError as error:
        return {"memory": memory, "refused": " ".join(line.strip(" -") for line in str(error).splitlines()[:2])}


def slope(first, last):
    return math.log(last["seconds"] / first["seconds"]) / math.log(last["n"] / first["n"])


if __name__ == "__main__":
    # sessions first: what this process holds is reserved, and counts
    images = [session({"memory": "4GiB", "count": count}, workers=1) for count in IMAGES[: 2 if QUICK else None]]
    budgets = [in_budget(memory, 2 if QUICK else 8) for memory in BUDGETS]
    at_order(ORDERS[0])  # what is imported at a first solve
    orders = [at_order(n) for n in ORDERS[: 2 if QUICK else None]]
    waists = [at_waist(n, waist) for n, waist in WAISTS[: 2 if QUICK else None]]
    parts = [divided(*sizes) for sizes in BLOCKS[: 2 if QUICK else None]]
    grown = {"orders": orders, "slope": slope(*orders[-2:]), "waists": waists, "divided": parts}
    write(__file__, grown | {"images": images, "budgets": budgets})
