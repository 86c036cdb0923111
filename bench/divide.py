"""What does the full spectrum of a matrix cost that is four times what memory holds: seconds, bytes moved, digits?

ResNet50's block 2 (bundled weights, the first sample image, k = 7,386; `--quick`: ResNet18's layer4.1, k = 939), solved
by division in a store within a quarter of the matrix, in a fresh process of one thread (as a worker of a run is),
against LAPACK's Hessenberg reduction and QR iteration on the whole matrix in another. Seconds are of the processor:
others used it, too. Memory is the process's peak above what it held before. Bytes are those that it asked the kernel to
read and write (/proc/self/io), mostly served from the page cache where that holds them. Operations are counted from the
divisions made: 8/3 n^3 a Newton step (and for a circle), 2 n^2 s for the projector of the smaller part s, 2 s^2 (n -
s/3) for its QR and 8 n^2 s for both rotations, 10 n^3 for what LAPACK solves in the end. The product rate is that of a
2,048 x 2,048 product on the same thread, before the solve. Writing is what the panels of results cost when they are
written, while no other work goes on.
"""

import json
import subprocess
import sys
import tempfile
import time
from unittest import mock

import numpy as np
from common import QUICK, block_calls, cpu_seconds, distance, product_rate, stored, workspace, write
from scipy.sparse import csc_array
from threadpoolctl import threadpool_limits

from stiffcore.eigen import dense, divide
from stiffcore.jacobian.reduction import reduce_jacobian
from stiffcore.memory import keep_freed_pages, moved_bytes, own_peak_bytes, release_free_memory, reset_peak
from stiffcore.solvers.divide import divide_moved_bytes, divide_sizes
from stiffcore.store import TiledMatrix
from stiffcore.unit import sparse_matrix

NETWORK, BLOCK = ("resnet18", "layer4.1") if QUICK else ("resnet50", "layer1.1")
SHARE = 4


def sizes(k):
    """What is allowed; columns of a panel, panels of a block and order of a part within that, as the plan has it."""
    return 8 * k * k // SHARE, *divide_sizes(k, 8 * k * k // SHARE)


def make(folder):
    """The matrix, panel by panel, as the store has it; and what is added to its eigenvalues."""
    call = block_calls(NETWORK)[BLOCK]
    reduction = reduce_jacobian(call.function, call.x)
    matrix = csc_array(sparse_matrix(reduction, 256))
    space = workspace(folder, sizes(reduction.k)[1])
    stored(space, "whole", lambda start, stop: matrix[:, start:stop].toarray(), reduction.k)
    return {"n": reduction.n, "k": reduction.k, "nonzeros": matrix.nnz, "shift": reduction.shift}


def solve_dense(folder, k):
    """LAPACK on the whole matrix, which is read before the clock starts."""
    a = workspace(folder, sizes(k)[1]).matrix("whole", k, k).read()
    before = reset_peak()
    values, seconds = cpu_seconds(lambda: dense.hessenberg_eigenvalues(dense.to_hessenberg(a)))
    found = {"seconds": seconds, "peak_bytes": a.nbytes + own_peak_bytes() - before}
    np.save(f"{folder}/dense.npy", dense.sort_eigenvalues(values))
    return found


def solve_divided(folder, k, first):
    """Division within a quarter of the matrix, as the plan sizes its blocks and parts."""
    budget, width, at_once, leaf = sizes(k)
    space = workspace(folder, width)
    rate = product_rate()
    release_free_memory()  # of the product: what is kept for later use would hide the division's peak
    writing, write = 0.0, TiledMatrix.write

    def timed(self, shard, block):
        nonlocal writing
        start = time.process_time()
        zeros = write(self, shard, block)
        writing += time.process_time() - start
        return zeros

    io, before, whole = moved_bytes(), reset_peak(), space.matrix("whole", k, k)
    with mock.patch.object(TiledMatrix, "write", timed):
        found, seconds = cpu_seconds(lambda: divide.eigenvalues(whole, space, leaf, first=first, at_once=at_once))
    read, written = (b - a for a, b in zip(io, moved_bytes(), strict=True))
    np.save(f"{folder}/divided.npy", found.values)
    splits = [
        {"order": s.order, "curve": s.curve, "beyond": s.beyond, "steps": s.steps, "trace_error": s.trace_error}
        | {"neglected": s.neglected / s.norm if s.norm else 0.0, "failure": s.failure}
        for s in found.splits
    ]
    return {
        "seconds": seconds,
        "writing_seconds": writing,
        "allowed_bytes": budget,
        "peak_bytes": own_peak_bytes() - before,
        "columns": at_once * width,
        "planned_moved_bytes": divide_moved_bytes(k, at_once * width),
        "leaf": leaf,
        "read_bytes": read,
        "written_bytes": written,
        "product_rate": rate,
        "error": found.error,
        "splits": splits,
    }


def operations(k, splits):
    """Counted from the splits made: see above."""
    total, parts = 0.0, [k]
    for s in splits:
        n, small = s["order"], min(s["beyond"], s["order"] - s["beyond"])
        total += 8 / 3 * n**3 * (s["steps"] + ("|" in s["curve"]))
        if small:
            total += 10 * n * n * small + 2 * small * small * (n - small / 3)
        if small and not s["failure"]:
            parts.remove(n)
            parts += [s["beyond"], n - s["beyond"]]
    return total + sum(10 * n**3 for n in parts)


def in_process(step, *args):
    """Run one step in a fresh process."""
    program = [sys.executable, __file__, *(["--quick"] if QUICK else []), "step", step, *map(str, args)]
    return json.loads(subprocess.run(program, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


if __name__ == "__main__":
    if "step" in sys.argv:
        keep_freed_pages()  # first of all, as a worker: how freed memory is used again decides the peak
        step, folder, *rest = sys.argv[sys.argv.index("step") + 1 :]
        with threadpool_limits(1):
            work = {"make": make, "dense": solve_dense, "divide": solve_divided}[step]
            print(json.dumps(work(folder, *(int(value) for value in rest))))
        raise SystemExit
    with tempfile.TemporaryDirectory() as folder:
        size = in_process("make", folder)
        whole = in_process("dense", folder, size["k"])
        parts = in_process("divide", folder, size["k"], -size["shift"])
        values, found = (np.load(f"{folder}/{name}.npy") for name in ("dense", "divided"))
    parts["operations"] = operations(size["k"], parts["splits"])
    parts["share_of_product_rate"] = parts["operations"] / parts["seconds"] / parts["product_rate"]
    figures = {"network": NETWORK, "block": BLOCK, **size, "matrix_bytes": 8 * size["k"] ** 2, "dense": whole}
    figures |= {"divided": parts, "largest_difference": distance(values, found)}
    write(__file__, figures | {"largest_eigenvalue": float(np.abs(values).max())})
