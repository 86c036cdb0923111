"""What every benchmark shares: the machine it ran on, and where its figures go."""

import fcntl
import hashlib
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
from stiffcore.record import Stage, UnitPlan, UnitRecord
from stiffcore.solvers.divide import DIVIDE_TILE_ROWS
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


class Drawn:
    """What was found by seed, with the program as it is: kept in `store/`, where many processes add to it.

    A process that is killed loses the seed that it is at; one that starts takes seeds that no other is at.
    """

    def __init__(self, name, find, *more):
        """Find by seed, as JSON values; it is another place when `stiffcore` or the files `more` change."""
        root = HERE.parent
        files = [*sorted((root / "stiffcore").rglob("*.py")), *map(Path, more)]
        digest = hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()[:12]
        self.find, self.folder = find, root / "store" / f"{name}-{digest}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def all(self):
        """Everything so far."""
        return [json.loads(p.read_text()) for p in sorted(self.folder.glob("*.json"))]

    def until(self, enough, count, at_once=10):
        """Take seeds until `count` of everything is `enough`; it is summed after so many seeds."""
        seed = 0
        while (so_far := sum(map(count, self.all()))) < enough:
            print(f"{so_far:,} of {enough:,}", flush=True)
            for at in range(seed, seed + at_once):
                self._take(at)
            seed += at_once

    def _take(self, seed):
        done, mark = self.folder / f"{seed}.json", self.folder / f"{seed}.lock"
        if done.exists():
            return
        with mark.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return
            if not done.exists():
                found, spent = cpu_seconds(lambda: self.find(seed))
                partial = self.folder / f"{seed}.partial"
                partial.write_text(json.dumps(found | {"cpu_s": spent}))
                partial.rename(done)
        mark.unlink(missing_ok=True)
