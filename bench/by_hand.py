"""What is gained over doing it by hand: `jacrev` and a dense eigenvalue solver on the unreduced block?

The same square block of ResNet18 (bundled weights) at the same CIFAR-10 image in float64, one fresh process each:
`torch.func.jacrev(chunk_size=64)`, then `torch.linalg.eigvals`, or NumPy's; against `stiffcore.analyze` in one
process. Seconds without imports, the peak of each process (`ru_maxrss`), and the largest distance from an eigenvalue
of one to the nearest of the other. From the largest by hand, what n = 65,536 would take: n products, n^3 operations,
n^2 numbers. `--quick` solves n = 2,048, `--long` adds 16,384 (half an hour in all); `--blocks NAME,NAME` those alone;
`--device cuda` does all on the device, without NumPy.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import QUICK, block_calls, device, distance, write

from stiffcore import analyze

SIZES = {"layer4.1": 2048, "layer3.1": 4096, "layer2.1": 8192, "layer1.1": 16384}
CHUNK = 64


def by_hand(block, library):
    call = block_calls("resnet18")[block]
    x, n, function = call.x, call.x.numel(), call.function
    start = time.perf_counter()
    jacobian = torch.func.jacrev(lambda v: function(v.view_as(x)).flatten(), chunk_size=CHUNK)(x.flatten())
    built = time.perf_counter() - start
    assert jacobian.shape == (n, n)
    if library == "torch":
        values = torch.linalg.eigvals(jacobian.detach()).cpu().numpy()
    else:
        values = np.linalg.eigvals(jacobian.detach().cpu().numpy())
    return values, {"built": built, "solved": time.perf_counter() - start - built}


def by_stiffcore(block):
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run = analyze("resnet18", "samples", run=f"{folder}/run", blocks=block, device=device(), memory="8GiB")
        seconds = time.perf_counter() - start
        spectrum = run.spectrum(block=block)
        assert spectrum.certificate.passed
        return spectrum.values, {"all": seconds}


def child(way, block, to):
    values, seconds = by_stiffcore(block) if way == "stiffcore" else by_hand(block, way)
    np.save(to, values)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    print(json.dumps({"seconds": seconds, "peak_bytes": peak}))


def in_process(way, block, to):
    program = [sys.executable, __file__, "--child", way, block, to, *(["--device", device()])]
    return json.loads(subprocess.run(program, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def compared(block, n, folder):
    found = {"block": block, "n": n}
    ways = ("torch", "numpy") if device() == "cpu" else ("torch",)  # NumPy has the host's solver wherever J was built
    for way in ("stiffcore", *ways):
        found[way] = in_process(way, block, f"{folder}/{way}.npy")
    ours = np.load(f"{folder}/stiffcore.npy")
    for way in ways:
        theirs = np.load(f"{folder}/{way}.npy")
        assert len(theirs) == len(ours) == n
        found[way]["largest_difference"] = distance(ours, theirs)
    print(json.dumps(found), flush=True)
    return found


def needed(largest, n=65536):
    """What the largest solved by hand would take at order n: n products, each as long; n^3 operations; n^2 numbers."""
    scale, seconds = n / largest["n"], largest["torch"]["seconds"]
    return {
        "n": n,
        "from_n": largest["n"],
        "hours": (seconds["built"] * scale + seconds["solved"] * scale**3) / 3600,
        "bytes": largest["torch"]["peak_bytes"] * scale**2,
    }


if __name__ == "__main__":
    if "--child" in sys.argv:
        child(*sys.argv[sys.argv.index("--child") + 1 :][:3])
        raise SystemExit
    sizes = list(SIZES.items())[: 1 if QUICK else 4 if "--long" in sys.argv else 3]
    if "--blocks" in sys.argv:
        sizes = [(name, SIZES[name]) for name in sys.argv[sys.argv.index("--blocks") + 1].split(",")]
    blocks = []
    with tempfile.TemporaryDirectory() as folder:
        for block, n in sizes:
            blocks.append(compared(block, n, Path(folder)))
            write(__file__, {"blocks": blocks, "needed": needed(blocks[-1])})  # whatever ends the next
