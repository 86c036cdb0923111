"""How much more do two workers finish than one, each with its core, on a study of many units?

One worker, then two, on the same units, one thread each; the time from the plan to the last spectrum.
"""

import tempfile
import time

from common import write

from stiffcore.cluster import local_workers
from stiffcore.session import carry_out_plan, prepare

OPTIONS = {"network": "resnet18", "images": "samples", "count": 12, "blocks": "layer4.1"}


def seconds(workers, folder):
    with local_workers(lambda event: None) as executor:
        prepared = prepare(folder, OPTIONS | {"memory": "6GiB", "device": "cpu"}, executor, workers=workers)
        assert (prepared.plan.workers, prepared.plan.threads) == (workers, 1)
        executor.scale(workers)  # a worker starts once a session, whatever the number of units
        start = time.perf_counter()
        _, outcome = carry_out_plan(folder, prepared, executor, lambda event: None)
        assert not outcome.failed, outcome.failed
        return time.perf_counter() - start


if __name__ == "__main__":
    taken = {}
    for workers in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            taken[workers] = seconds(workers, f"{folder}/run")
    ratio = taken[1] / taken[2]
    write(__file__, {"units": 12, "one_worker_s": taken[1], "two_workers_s": taken[2], "throughput_ratio": ratio})
