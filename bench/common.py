"""What every benchmark shares: the machine it ran on, and where its figures go."""

import json
import os
import platform
import subprocess
import sys
import time
import timeit
from pathlib import Path

import numpy as np
import psutil
import torch
from scipy.spatial import cKDTree
from threadpoolctl import threadpool_limits

from stiffcore.jacobian.reduction import is_residual
from stiffcore.networks.blocks import capture, residual_blocks
from stiffcore.networks.images import load_images, network_input
from stiffcore.networks.zoo import load_network
from stiffcore.plan import DIVIDE_TILE_ROWS
from stiffcore.record import Stage, UnitPlan, UnitRecord
from stiffcore.store import RunStore, StoredWorkspace
from stiffcore.study import Solver, Unit, unit_key, versions

HERE = Path(__file__).parent
RESULTS = HERE / "results"
if "--help" in sys.argv:  # of minutes or hours, most of them: not to be begun by mistake
    print(sys.modules["__main__"].__doc__)
    sys.exit()
# The smallest of each benchmark, for a look; its figures are not the page's.
QUICK = "--quick" in sys.argv


def device():
    """What `--device` says, `cpu` where it is not given."""
    return sys.argv[sys.argv.index("--device") + 1] if "--device" in sys.argv else "cpu"


def machine():
    """Facts of this machine, as JSON values."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        **versions(),
    }


def stiffcore(*args):
    """Run the command line in a fresh process: what it printed, and its seconds."""
    program = [sys.executable, "-c", "from stiffcore.cli import main; main()", *map(str, args)]
    start = time.perf_counter()
    found = subprocess.run(program, check=True, stdout=subprocess.PIPE, text=True)
    return found.stdout, time.perf_counter() - start


def block_calls(network, weights=None):
    """Every residual block of a network at the first sample image, in float64 on the device, by name."""
    opened = load_network(network, weights, torch.float64)
    opened.module.to(device())
    x = network_input(load_images("samples").x[0], opened.normalize, torch.float64).to(device())
    return capture(opened.module, x, residual_blocks(opened.module, x, is_residual))[0]


def product_rate(order=2048):
    """Operations a second of a float64 matrix product on one thread."""
    a = np.random.default_rng(0).standard_normal((order, order))
    with threadpool_limits(1):
        return 2 * order**3 / min(timeit.repeat(lambda: a @ a, number=1, repeat=4))


def distance(a, b):
    """The largest from a value of one spectrum to the nearest of the other."""
    a, b = (np.column_stack([v.real, v.imag]) for v in (a, b))
    return float(max(cKDTree(a).query(b)[0].max(), cKDTree(b).query(a)[0].max()))


def disk_rates(folder, size=256 << 20):
    """Bytes a second: written with fsync, and read again without the kernel's cache."""
    data, path = os.urandom(size), f"{folder}/probe"
    start = time.perf_counter()
    with open(path, "wb") as file:
        file.write(data)
        os.fsync(file.fileno())
    written = time.perf_counter() - start
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, size, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        file.read()
    return {"write": size / written, "read": size / (time.perf_counter() - start)}


def write(script, figures):
    """Write and print the figures of a benchmark; of another device than the host in a file of their own."""
    folder = RESULTS / "quick" if QUICK else RESULTS
    folder.mkdir(exist_ok=True, parents=True)
    command = " ".join([f"python bench/{Path(script).name}", *sys.argv[1:]])
    name = Path(script).stem + ("" if device() == "cpu" else f"-{device()}")
    result = {"command": command, "date": time.strftime("%Y-%m-%d"), "machine": machine(), "figures": figures}
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def workspace(folder, panel):
    """Where the panels of a division are: a unit of a run in a folder."""
    store = RunStore(f"{folder}/run", create=True)
    names = {"block": "divided", "function": "block", "kind": "matrix"}
    sizes = {"image": 0, "label": -1, "number": 0, "n": 1, "m": 1, "k": 1}
    unit = Unit(key=unit_key(0, **names), **names, **sizes, route="full", reason="", fingerprint="")
    if not store.units():
        store.put_record(unit.key, UnitRecord(UnitPlan(unit, Solver.DIVIDE, ""), Stage.BUILT))
    return StoredWorkspace(store, unit.key, DIVIDE_TILE_ROWS, panel)


def stored(space, name, columns, order):
    """The square matrix of that name, in panels; `columns` makes those from start to stop, dense."""
    matrix = space.matrix(name, order, order)
    for i in range(matrix.shards):
        matrix.write(i, np.asfortranarray(columns(*matrix.columns(i))))
    return matrix


def cpu_seconds(work):
    """What work() returns, and the seconds of the processor that it took."""
    start = time.process_time()
    return work(), time.process_time() - start
