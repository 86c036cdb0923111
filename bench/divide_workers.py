"""One matrix, divided by one worker or shared by two: what do the second core and the second worker bring?

ResNet50's layer3.1 (bundled weights, the first sample image), `--solver divide` with 64 MiB for blocks and what passes
through them, in parts of at most a quarter of its order: by one worker with a thread, by one with two, by two with one
each, which share the 64 MiB, and by two with 64 MiB each, as on a cluster. Seconds are those of the division (the stage
`solved`). The eigenvalues may differ by rounding alone: blocks are of other widths. Needs both cores idle. (`--quick`:
ResNet18's layer4.1 within 32 MiB.)
"""

import os
import tempfile
from dataclasses import replace

import numpy as np
from common import QUICK, distance, write

from stiffcore.cluster import local_workers
from stiffcore.plan import DIVIDE_PASSING
from stiffcore.session import carry_out_plan, prepare

NETWORK, BLOCK, DATA = ("resnet18", "layer4.1", 32 << 20) if QUICK else ("resnet50", "layer3.1", 64 << 20)
PANEL = 128
OPTIONS = {"network": NETWORK, "images": "samples", "count": 1, "blocks": BLOCK, "solver": "divide"}
WAYS = {
    "one worker, one thread": (1, 1, DATA),
    "one worker, two threads": (1, 2, DATA),
    "two workers, a thread each": (2, 1, DATA // 2),
    "two workers, a thread and as much memory each": (2, 1, DATA),
}


def solved(workers, threads, data):
    os.environ["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryDirectory() as folder, local_workers(lambda event: None) as executor:
        loose = prepare(f"{folder}/run", OPTIONS | {"memory": "6GiB"}, executor, workers=workers)
        (unit,) = loose.plan.units
        room = max(workers * data, unit.stages["open"], unit.stages["build"])
        allowed = loose.plan.reserved_bytes + (loose.plan.workers - 1) * loose.plan.worker_bytes + room
        prepared = prepare(f"{folder}/run", OPTIONS | {"memory": allowed + (8 << 20)}, executor, workers=workers)
        (unit,) = prepared.plan.units
        # what else the unit does needs more room than its division is to have
        at_once = max(1, data // (8 * PANEL * unit.unit.k) - DIVIDE_PASSING)
        unit = replace(unit, panel=PANEL, at_once=at_once, leaf=unit.unit.k // 4, spread=workers)
        prepared = replace(prepared, plan=replace(prepared.plan, units=(unit,), workers=workers, threads=threads))
        run, outcome = carry_out_plan(f"{folder}/run", prepared, executor, lambda event: None)
        assert not outcome.failed, outcome.failed
        (record,) = run.records().values()
        return run.spectrum(block=BLOCK).values, {
            "k": record["k"],
            "columns": at_once * PANEL,
            "seconds": record["seconds"]["solved"],
            "divisions": len(record["divided"]["splits"]),
            "peak_bytes": outcome.peak_bytes,
            "allowed_bytes": prepared.plan.allowed_bytes,
        }


if __name__ == "__main__":
    found = {way: solved(*numbers) for way, numbers in WAYS.items()}
    values = [spectrum for spectrum, _ in found.values()]
    rows = [{"way": way, **figures} for way, (_, figures) in found.items()]
    apart = max(distance(values[0], other) for other in values[1:])
    write(__file__, {"network": NETWORK, "block": BLOCK, "ways": rows, "largest_difference": apart})
    assert apart < 1e-8 * np.abs(values[0]).max()
