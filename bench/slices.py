"""What does an image cost in tensor slices, and are they what torch computes from the whole Jacobian tensor?

All blocks of ResNet18 and ResNet50 at one CIFAR-10 image, float64, one thread: seconds of the squares and of their
eigenvalues. Where the whole Jacobian tensor fits (`--direct`: up to so many elements), `torch.linalg.eigvals` of
`torch.func.jacrev`, value by value.
"""

import argparse
import time

import numpy as np
import torch
from common import block_calls, write
from threadpoolctl import threadpool_limits

from stiffcore.eigen.windows import WindowSpectrum
from stiffcore.jacobian.slices import open_slices


def by_windows(call):
    start = time.perf_counter()
    slices = open_slices(call.function, call.x, name=call.name)
    found, solving = WindowSpectrum(keep=True), 0.0
    for squares in slices.squares(32):
        before = time.perf_counter()
        found.add(squares)
        solving += time.perf_counter() - before
    certificate = found.certificate(slices, 0.0)
    assert certificate.passed, certificate.failures
    total = time.perf_counter() - start
    metrics = found.tally.metrics(0, slices.count - found.tally.count, branch=False)
    figures = {
        "block": call.name,
        "elements": slices.jacobian.m * slices.jacobian.n,
        "eigenvalues": slices.count,
        "not_zero": found.tally.count,
        "S": metrics["S"],
        "negative": metrics["negative"],
        "seconds": {"squares": total - solving, "eigenvalues": solving},
    }
    return figures, found.values()


def direct(call, values):
    """Seconds of the direct route, how many of its values are not zero, and the largest difference of the sorted."""
    start = time.perf_counter()
    jacobian = torch.func.jacrev(call.function, chunk_size=128)(call.x)
    everything = torch.linalg.eigvals(jacobian).reshape(-1).numpy()
    seconds = time.perf_counter() - start
    everything = everything[everything != 0]
    # conjugates and near equals in one order, whatever their last digits
    one, other = (z[np.lexsort((z.imag, np.round(z.real, 12)))] for z in (values, everything))
    same = len(one) == len(other)
    return {
        "direct_s": seconds,
        "direct_not_zero": len(other),
        "largest_difference": float(np.abs(one - other).max()) if same else None,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--direct", type=float, default=1e8, help="elements of the largest tensor that torch is given")
    most = parser.parse_args().direct
    torch.set_num_threads(1)
    figures = {}
    with threadpool_limits(1):
        for network in ("resnet18", "resnet50"):
            figures[network] = []
            for call in block_calls(network).values():
                found, values = by_windows(call)
                if found["elements"] <= most:
                    found |= direct(call, values)
                figures[network].append(found)
                print(found, flush=True)
    write(__file__, figures)
