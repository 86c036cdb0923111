"""One matrix, one worker or two: what do a second thread and a second worker bring to a step of a division?

A step of Newton's iteration, an LU and an inverse, on the reduced matrix of ResNet50's block 2 (bundled weights, the
first sample image, k = 7,386; `--quick`: ResNet18's layer4.1, k = 939) in a store, in blocks of 768 columns (`--quick`:
256): by one worker with one thread, by one with two, and by two with a thread and a block each. The panels they write
must be the same, to the bit where the number of threads is the same. Needs both cores idle.
"""

import tempfile
import time

import numpy as np
from common import QUICK, block_calls, stored, workspace, write
from scipy.sparse import csc_array
from threadpoolctl import threadpool_limits

from stiffcore.cluster import local_workers, spread
from stiffcore.eigen import panels
from stiffcore.jacobian.reduction import reduce_jacobian
from stiffcore.unit import sparse_matrix

NETWORK, BLOCK = ("resnet18", "layer4.1") if QUICK else ("resnet50", "layer1.1")
PANEL, AT_ONCE = 128, 2 if QUICK else 6
WAYS = {
    "one worker, one thread": (1, 1),
    "one worker, two threads": (1, 2),
    "two workers, a thread each": (2, 1),
}


def step(folder, k, name, workers, threads, emit):
    """One step, led from this worker: its seconds."""
    space = workspace(folder, PANEL)
    each = spread(threads, lambda: None) if workers > 1 else panels.one_by_one
    a, lu, out = (space.matrix(n, k + (n[0] == "l"), k) for n in ("a", f"lu{name}", f"x{name}"))
    start = time.perf_counter()
    with threadpool_limits(threads):
        panels.factor(a, lu, at_once=AT_ONCE, each=each)
        half = time.perf_counter()
        panels.inverse(lu, out, at_once=AT_ONCE, each=each)
    return {"LU_s": half - start, "inverse_s": time.perf_counter() - half}


if __name__ == "__main__":
    call = block_calls(NETWORK)[BLOCK]
    reduction = reduce_jacobian(call.function, call.x)
    matrix, k = csc_array(sparse_matrix(reduction, 256)), reduction.k
    with tempfile.TemporaryDirectory() as folder:
        space = workspace(folder, PANEL)
        stored(space, "a", lambda start, stop: matrix[:, start:stop].toarray(), k)
        rows = []
        for number, (way, (workers, threads)) in enumerate(WAYS.items()):
            with local_workers(lambda event: None) as executor:
                executor.scale(workers)
                found = executor.submit(step, folder, k, number, workers, threads).result()
            rows.append({"way": way, **found, "seconds": sum(found.values())})
            print(rows[-1], flush=True)
        first, last = (space.matrix(f"x{number}", k, k) for number in (0, 2))
        same = all(np.array_equal(first.read_shard(i), last.read_shard(i)) for i in range(first.shards))
    write(
        __file__, {"network": NETWORK, "block": BLOCK, "k": k, "columns": PANEL * AT_ONCE, "ways": rows, "same": same}
    )
    assert same
