"""What does an image cost in tensor slices, and are they what torch computes from the whole Jacobian tensor?

All blocks of ResNet18, ResNet34 (random weights: none are bundled) and ResNet50 at one CIFAR-10 image, float64,
one thread: seconds of the processor to open a block (once for all images of a run), for its squares, for comparing all
of them with products of the function, and for their eigenvalues with all that is counted of them. Where the whole
Jacobian tensor fits (`--direct`: up to so many elements), `torch.linalg.eigvals` of `torch.func.jacrev`, value by
value. `--before FOLDER`: the same by an older stiffcore, a checkout of its sources, in turn. (`--quick`: ResNet18's
last two; `--device cuda`: products and small squares there.)
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from common import QUICK, block_calls, device, write
from threadpoolctl import threadpool_limits

from stiffcore.eigen.windows import WindowSpectrum
from stiffcore.jacobian.slices import RandomCheck, Squares, open_slices
from stiffcore.memory import keep_freed_pages

NETWORKS = ("resnet18",) if QUICK else ("resnet18", "resnet50", "resnet34")


def calls(network):
    found = block_calls(network, Path("random") if network == "resnet34" else None)
    return dict([*found.items()][-2:]) if QUICK else found


def on_device():
    """What takes the small squares, with `--device cuda`; the host's code otherwise."""
    if device() == "cpu":
        return {}
    from stiffcore.eigen import small_cuda

    return {"take": small_cuda.take}


def by_windows(call):
    times = [time.process_time()]
    slices = open_slices(call.function, call.x, name=call.name)
    times.append(time.process_time())
    found, check = WindowSpectrum(keep=True, **on_device()), RandomCheck(slices)
    seconds = {"opened": times[1] - times[0], "squares": 0.0, "compared": 0.0, "eigenvalues": 0.0}
    for squares in slices.squares(32):
        times = [times[-1], time.process_time()]
        found.add(squares)
        times.append(time.process_time())
        check.add(squares)
        times.append(time.process_time())
        for name, spent in zip(("squares", "eigenvalues", "compared"), np.diff(times), strict=True):
            seconds[name] += float(spent)
    seconds["squares"] += time.process_time() - times[-1]
    start = time.process_time()
    certificate = found.certificate(slices, check.difference())
    seconds["compared"] += time.process_time() - start
    assert certificate.passed, certificate.failures
    metrics = found.tally.metrics(0, slices.count - found.tally.count, branch=False)
    figures = {
        "block": call.name,
        "elements": slices.jacobian.m * slices.jacobian.n,
        "eigenvalues": slices.count,
        "not_zero": found.tally.count,
        "unsure": found.near_axis,
        "S": metrics["S"],
        "negative": metrics["negative"],
        "seconds": seconds,
    }
    return figures, found.values()


def direct(call, values):
    """Seconds of the direct route, how many of its values are not zero, and the largest difference of the sorted."""
    start = time.process_time()
    jacobian = torch.func.jacrev(call.function, chunk_size=128)(call.x)
    everything = torch.linalg.eigvals(jacobian).reshape(-1).cpu().numpy()
    seconds = time.process_time() - start
    everything = everything[everything != 0]
    # conjugates and near equals in one order, whatever their last digits
    one, other = (z[np.lexsort((z.imag, np.round(z.real, 12)))] for z in (values, everything))
    same = len(one) == len(other)
    return {
        "direct_s": seconds,
        "direct_not_zero": len(other),
        "largest_difference": float(np.abs(one - other).max()) if same else None,
    }


def measured(network, most):
    found = []
    for call in calls(network).values():
        figures, values = by_windows(call)
        if figures["elements"] <= most:
            figures |= direct(call, values)
        found.append(figures)
        print({"network": network} | figures, file=sys.stderr, flush=True)
    return found


def in_process(network, most, sources):
    """In a process of its own, with the stiffcore of these sources."""
    command = [
        sys.executable,
        __file__,
        "--only",
        network,
        "--direct",
        str(most),
        "--device",
        device(),
        *["--quick"] * QUICK,
    ]
    environment = os.environ | ({"PYTHONPATH": sources} if sources else {})
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--direct", type=float, default=5e6, help="elements of the largest tensor that torch is given")
    parser.add_argument("--before", help="a checkout of an older stiffcore")
    parser.add_argument("--only", choices=NETWORKS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.only:
        keep_freed_pages()  # as the workers of a run do
        torch.set_num_threads(1)
        warm = np.random.default_rng(0).standard_normal((2, 3, 3, 2))
        for values in (warm, warm[:, :2, :2]):  # what is compiled on the way is no image's
            WindowSpectrum(keep=True, **on_device()).add(Squares(np.arange(2), 0, values.transpose(0, 3, 1, 2)))
        with threadpool_limits(1):
            print(json.dumps(measured(options.only, options.direct)))
        sys.exit()
    figures = {}
    for network in NETWORKS:
        before = in_process(network, 0, options.before) if options.before else []
        figures[network] = in_process(network, options.direct, None)
        for block, old in zip(figures[network], before, strict=bool(before)):
            same = ("block", "eigenvalues", "not_zero", "unsure")
            assert [block[name] for name in same] == [old[name] for name in same], (block, old)
            assert abs(block["S"] - old["S"]) <= 1e-9 * abs(old["S"])
            block["before"] = old["seconds"]
        write(__file__, figures)  # what is measured is kept, whatever ends the next
