"""How is the matrix built fastest: accumulated from kernels, by products that columns share, or by one product each?

The reduced matrix M of all square blocks of ResNet18 and ResNet50 at one CIFAR-10 image, float64, one thread: seconds
of each way, and how far the matrices differ.
"""

import time

import numpy as np
import torch
from common import block_calls, write
from threadpoolctl import threadpool_limits

from stiffcore.jacobian.reduction import NoSpectrumError, reduce_jacobian

CHUNK_BYTES = 32 << 20


def seconds_of(work):
    start = time.perf_counter()
    found = work()
    return found, time.perf_counter() - start


def compared(reduction):
    found, seconds = {}, {}
    chunk = max(1, min(256, CHUNK_BYTES // (8 * reduction.column_items)))
    for build in reduction.builds[:-1]:
        matrix, seconds[str(build)] = seconds_of(lambda build=build: reduction.sparse(chunk, build=build))
        found[str(build)] = matrix
    matrix, difference, spent = found["accumulated"], 0.0, 0.0
    for start in range(0, reduction.k, chunk):
        stop = min(start + chunk, reduction.k)
        columns, taken = seconds_of(lambda start=start, stop=stop: reduction.columns(start, stop).numpy())
        spent += taken
        difference = max(difference, float(np.abs(matrix[:, start:stop].toarray() - columns).max()))
    seconds["columns"] = spent
    return {
        "k": reduction.k,
        "nonzeros": matrix.nnz,
        "seconds": seconds,
        "largest_difference": difference,
        "largest_entry": float(np.abs(matrix.data).max()),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    figures = {}
    with threadpool_limits(1):
        for network in ("resnet18", "resnet50"):
            figures[network] = []
            for block, call in block_calls(network).items():
                try:
                    reduction = reduce_jacobian(call.function, call.x, name=block)
                except NoSpectrumError:
                    continue
                figures[network].append({"block": block, **compared(reduction)})
                print(figures[network][-1], flush=True)
    write(__file__, figures)
