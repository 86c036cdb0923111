"""How much more do two workers finish than one, each with its core, on a study of many units?

Alternates one and two workers, in one process, on the same units; the ratio of the medians is the figure.
"""

import statistics
import tempfile
import time

from common import write

from stiffcore.cluster import local_workers
from stiffcore.run import carry_out_plan, prepare

# 8 images, 2 blocks of about 3 s each
OPTIONS = {"network": "resnet18", "images": "samples", "count": 8, "blocks": "layer4.1", "functions": "block,branch"}
REPEATS = 3


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
    taken = {1: [], 2: []}
    for _ in range(REPEATS):
        for workers in taken:
            with tempfile.TemporaryDirectory() as folder:
                taken[workers].append(seconds(workers, f"{folder}/run"))
    one, two = (statistics.median(values) for values in taken.values())
    write(__file__, {"units": 16, "one_worker_s": taken[1], "two_workers_s": taken[2], "throughput_ratio": one / two})
