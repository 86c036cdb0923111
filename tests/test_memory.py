"""What a unit holds at its peak is at most what its plan projected, and the projection at most twice that."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from stiffcore.memory import PeakMeter, release_free_memory, tree_bytes

# Like a worker: the libraries loaded, the network looked at and let go; then one unit, at its peak.
UNIT = """
import json, sys
import stiffcore.preload
from stiffcore.cluster import InProcess
from stiffcore.memory import release_free_memory
from stiffcore.session import prepare, carry_out_plan
url, network, block, dtype, memory = sys.argv[1:]

def status(name):
    return next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith(name))

executor = InProcess(lambda event: None)
prepared = prepare(url, dict(network=network, blocks=block, dtype=dtype, memory=memory), executor)
[unit] = prepared.plan.units
release_free_memory(cycles=True)
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before = status("VmRSS")
_, outcome = carry_out_plan(url, prepared, executor, lambda event: None)
assert not outcome.failed, outcome.failed
print(json.dumps(dict(projected=unit.projected_bytes, measured=status("VmHWM") - before, stages=unit.stages)))
"""


def peak_of_unit(folder, network, block, dtype, memory):
    args = [sys.executable, "-W", "ignore", "-c", UNIT, str(folder / "run"), network, block, dtype, memory]
    found = subprocess.run(args, capture_output=True, text=True, check=False, timeout=900)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def assert_projected(found):
    shown = {name: f"{value / 2**20:.1f} MiB" for name, value in found.items() if name != "stages"}
    assert found["measured"] <= found["projected"], (shown, found["stages"])
    assert found["projected"] <= 2 * found["measured"], (shown, found["stages"])


@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow)])
def test_a_small_unit_holds_at_most_what_its_plan_says(tmp_path, dtype):
    assert_projected(peak_of_unit(tmp_path, "resnet18", "layer4.1", dtype, "4GiB"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "block"),
    [("resnet18", "layer3.1"), ("resnet18", "layer2.1"), ("resnet50", "layer3.1"), ("resnet50", "layer2.1")],
)
def test_a_large_unit_holds_at_most_what_its_plan_says(tmp_path, network, block):
    assert_projected(peak_of_unit(tmp_path, network, block, "float64", "4GiB"))


# As UNIT, within so much on top of what is reserved that the matrix must be divided.
DIVIDED = """
import json, sys
import numpy as np
import stiffcore.preload
from stiffcore.cluster import InProcess
from stiffcore.memory import release_free_memory
from stiffcore.session import prepare, carry_out_plan
folder, size, data = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) << 20
sys.path.insert(0, folder)

def status(name):
    return next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith(name))

x = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), dtype=np.uint8)
np.savez(folder + "/one.npz", x=x, y=np.arange(1))
options = dict(network="net:make", blocks="layer1.0", images=folder + "/one.npz")
executor, url = InProcess(lambda event: None), folder + "/run"
reserved = prepare(url, options | dict(memory="4GiB"), executor).plan.reserved_bytes
prepared = prepare(url, options | dict(memory=reserved + data), executor)
[unit] = prepared.plan.units
release_free_memory(cycles=True)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
run, outcome = carry_out_plan(url, prepared, executor, lambda event: None)
assert not outcome.failed, outcome.failed
[record] = run.records().values()
print(json.dumps(dict(
    k=unit.unit.k, solver=unit.solver, why=unit.why, divisions=len(record.divided.splits), stages=unit.stages,
    projected=unit.projected_bytes, measured=status("VmHWM") - before, passed=run.spectrum(block=1).certificate.passed,
)))
"""
NET = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(12, 12, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return torch.relu(x + self.conv2(torch.relu(self.conv1(x))))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.layer1 = nn.Conv2d(3, 12, 3, padding=1), nn.Sequential(Block())

    def forward(self, x):
        return self.layer1(self.stem(x)).mean((1, 2, 3))[:, None] * torch.ones(10)

def make():
    torch.manual_seed(5)
    return Net()
"""


@pytest.mark.parametrize(("size", "data_mib"), [(14, 27), pytest.param(16, 32, marks=pytest.mark.slow)])
def test_a_unit_that_no_dense_rung_holds_is_divided_within_its_budget(tmp_path, size, data_mib):
    (tmp_path / "net.py").write_text(NET)
    args = [sys.executable, "-W", "ignore", "-c", DIVIDED, str(tmp_path), str(size), str(data_mib)]
    found = subprocess.run(args, capture_output=True, text=True, check=False, timeout=900)
    assert found.returncode == 0, found.stderr
    unit = json.loads(found.stdout)
    assert unit["solver"] == "divide"
    assert "host-dense of layer1.0 needs" in unit["why"]
    assert unit["divisions"] >= 1
    assert unit["passed"]
    assert unit["projected"] <= data_mib << 20
    assert_projected({name: unit[name] for name in ("projected", "measured", "stages")})


def test_the_meter_sees_a_peak_that_is_over_before_it_is_asked():
    with PeakMeter() as meter:
        before = tree_bytes()
        block = bytearray(200 << 20)
        block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])
        import time

        time.sleep(0.6)
        del block
        release_free_memory()
    assert meter.peak_bytes >= before + (180 << 20)


# Like UNIT, several units side by side if there are workers, at a budget that is tight; what the whole tree held.
TREE = """
import sys
from stiffcore.cluster import local_workers
from stiffcore.memory import PeakMeter
from stiffcore.solvers.projection import RESERVED_VARIES_BYTES
from stiffcore.session import prepare, carry_out_plan
from stiffcore.errors import InputError

if __name__ == "__main__":
    url, blocks, workers, factor = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    options = dict(network="resnet18", blocks=blocks, functions="block,branch")
    with PeakMeter() as meter, local_workers(lambda event: None) as executor:
        loose = prepare(url, options | dict(memory="8GiB"), executor, workers=workers)
        # the smallest budget that holds the largest unit beside what is reserved, then more
        single = max(p.projected_bytes for p in loose.plan.units)
        together = single + (workers - 1) * (single + loose.plan.worker_bytes)
        allowed = loose.plan.reserved_bytes + int(factor * together) + RESERVED_VARIES_BYTES
        prepared = prepare(url, options | dict(memory=allowed), executor, workers=workers)
        _, outcome = carry_out_plan(url, prepared, executor, lambda event: None)
        assert not outcome.failed, outcome.failed
        assert prepared.plan.workers == workers, prepared.plan
    print(allowed, outcome.peak_bytes, meter.peak_bytes)
"""


@pytest.mark.parametrize(
    ("workers", "factor"), [*(pytest.param(1, factor, marks=pytest.mark.slow) for factor in (1.0, 1.5)), (2, 1.0)]
)
def test_the_process_tree_holds_at_most_what_is_allowed(tmp_path, workers, factor):
    script = tmp_path / "tree.py"
    script.write_text(TREE)
    args = [sys.executable, "-W", "ignore", str(script), str(tmp_path / "run"), "layer4.1", str(workers), str(factor)]
    found = subprocess.run(args, capture_output=True, text=True, check=False, timeout=900)
    assert found.returncode == 0, found.stderr
    allowed, measured, whole_session = map(int, found.stdout.split())
    assert measured <= allowed
    assert whole_session <= allowed


# The kernel refuses every byte of data beyond what the plan allows this process.
LIMITED = """
import json, resource, sys
import stiffcore.preload
from stiffcore.cluster import InProcess
from stiffcore.memory import release_free_memory
from stiffcore.session import prepare, carry_out_plan
url, share = sys.argv[1], float(sys.argv[2])

def status(name):
    return next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith(name))

executor = InProcess(lambda event: None)
prepared = prepare(url, dict(network="resnet18", blocks="layer4.1", memory="4GiB"), executor, workers=1)
[unit] = prepared.plan.units
release_free_memory(cycles=True)
limit = status("VmData") + int(share * unit.projected_bytes)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
_, outcome = carry_out_plan(url, prepared, executor, lambda event: None)
print(json.dumps([outcome.done, list(outcome.failed.values())]))
"""


def limited(folder, share):
    args = [sys.executable, "-W", "ignore", "-c", LIMITED, str(folder / "run"), str(share)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    found = subprocess.run(args, capture_output=True, text=True, check=False, timeout=900, env=environment)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def test_a_unit_ends_under_a_limit_of_its_plan_that_the_kernel_enforces(tmp_path):
    done, failed = limited(tmp_path, 0.2)  # near the limit OpenBLAS waits for memory without end
    assert done == 0
    assert len(failed) == 1
    assert limited(tmp_path, 1.0) == [1, []]


# Pictures of which all together, as pixels or as floats, are far more than what one takes.
POOLED = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return torch.relu(x + self.conv(torch.relu(x)))

def make():
    torch.manual_seed(5)
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), Block(), nn.Flatten())
"""


def many_images(folder, count, size):
    (folder / "pooled.py").write_text(POOLED)
    x = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    np.savez(folder / "many.npz", x=x, y=np.arange(count) % 10)
    return x.nbytes


# One process that plans and carries out a study of all images, after one of a few.
GROWTH = """
import json, sys
import stiffcore.preload
from stiffcore.cluster import InProcess
from stiffcore.memory import release_free_memory
from stiffcore.session import prepare, carry_out_plan
folder, count = sys.argv[1], int(sys.argv[2])
sys.path.insert(0, folder)

def status(name):
    return next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith(name))

def session(name, images):
    executor, url = InProcess(lambda event: None), f"{folder}/{name}"
    options = dict(network="pooled:make", blocks="1", images=folder + "/many.npz", count=images, memory="8GiB")
    prepared = prepare(url, options, executor)
    assert prepared.plan.disk_bytes > prepared.survey.pixel_bytes
    assert all(p.unit.image_bytes > 0 for p in prepared.plan.units)
    assert not carry_out_plan(url, prepared, executor, lambda event: None)[1].failed
    prepare(url, {}, executor)  # which reads the images again

session("few", 2)
release_free_memory(cycles=True)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
session("all", count)
print(status("VmHWM") - before)
"""


def test_a_study_of_many_images_holds_one_at_a_time(tmp_path):
    pixels = many_images(tmp_path, 24, 640)
    args = [sys.executable, "-W", "ignore", "-c", GROWTH, str(tmp_path), "24"]
    found = subprocess.run(args, capture_output=True, text=True, check=False, timeout=900)
    assert found.returncode == 0, found.stderr
    # 43 MiB measured: 33 for one image until it is the input; all of them as floats are 225
    assert int(found.stdout) < 2 * pixels, (int(found.stdout), pixels)


# `plan`, then `run`, in a tree of processes, as the command line has it; the peaks of both.
MANY = """
import sys
from stiffcore.cluster import local_workers
from stiffcore.memory import PeakMeter
from stiffcore.session import prepare, carry_out_plan

if __name__ == "__main__":
    folder, count, workers, memory = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    sys.path.insert(0, folder)
    options = dict(network="pooled:make", blocks="1", images=folder + "/many.npz", count=count, memory=memory)
    with PeakMeter() as meter, local_workers(lambda event: None) as executor:
        prepared = prepare(folder + "/run", options, executor, workers=workers)
        planned = meter.peak_bytes
        assert prepared.plan.workers == workers, prepared.plan.workers
        _, outcome = carry_out_plan(folder + "/run", prepared, executor, lambda event: None)
        assert not outcome.failed, outcome.failed
    print(planned, meter.peak_bytes, prepared.plan.allowed_bytes)
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_thousand_photographs_are_planned_and_carried_out_within_the_budget(tmp_path, workers):
    many_images(tmp_path, 1000, 224)
    script = tmp_path / "many.py"
    script.write_text(MANY)
    args = [sys.executable, "-W", "ignore", str(script), str(tmp_path), "1000", str(workers), "1500MiB"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    found = subprocess.run(args, capture_output=True, text=True, check=False, timeout=3000, env=environment)
    assert found.returncode == 0, found.stderr
    planned, measured, allowed = map(int, found.stdout.split())
    print(planned, measured)
    assert planned <= measured <= allowed
