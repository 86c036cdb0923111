"""Fixtures that several test files share."""

import gc
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from tests.runs import PROGRAMS


def pytest_configure(config):
    """Each process of xdist keeps to its own core: torch's threads spin, and two on one core take ten times as long.

    What the imports above loaded has counted all cores already, and is told; what is loaded later counts one.
    """
    process = os.environ.get("PYTEST_XDIST_WORKER", "")
    if process:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(process.removeprefix("gw")) % len(cores)]})
        torch.set_num_threads(1)
        threadpool_limits(1)


# files of mathematics alone: no test in them starts a process
QUICK = ("accumulation", "blas", "colouring", "components", "inclusion", "metrics", "rounding", "statistics")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """`pytest -m quick` takes what is not slow of the files that are named above."""
    for item in items:
        if item.path.stem.removeprefix("test_") in QUICK and not any(item.iter_markers("slow")):
            item.add_marker("quick")


def pytest_collection_finish(session):
    """What is imported by now stays: the collections of the runs here need not look at it, which costs each 0.3 s."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item):
    # the README says what this leaves out: code on CUDA has no other place to run than a CUDA device
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with a network factory and six images, which is the current folder."""
    shutil.copy(PROGRAMS / "smallnet.py", tmp_path)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "six.npz", x=rng.integers(0, 256, (6, 6, 6, 3), dtype=np.uint8), y=np.arange(6))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("smallnet", None)
    return tmp_path


@dataclass
class Bucket:
    """An S3 bucket on a server in this process; what is in it outlives the server's stops."""

    port: int = 0
    url: str = "s3://stiffcore-tests"
    _server: Any = field(default=None, repr=False)

    def start(self) -> None:
        from moto.server import ThreadedMotoServer

        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self._server.start()
        self.port = self._server.get_host_and_port()[1]

    def stop(self) -> None:
        self._server.stop()


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    """A bucket that this process and its children find at its URL."""
    pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    from s3fs import S3FileSystem

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request costs as much as the request
    made = Bucket()
    made.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")  # of a server that is stopped, patience shows nothing
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{made.port}")
        S3FileSystem.clear_instance_cache()
        # what is in it outlives the server, also from one use of this fixture to the next in one process
        S3FileSystem().makedirs(made.url, exist_ok=True)
        yield made
    made.stop()
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def ends_are_cheap(monkeypatch):
    """The solver `extremes` plans ends at any order; at those of small tests it would plan the whole spectrum."""
    monkeypatch.setattr("stiffcore.plan.PRODUCT_COST", 0)


@pytest.fixture
def supposed_device(monkeypatch):
    """What is planned for a CUDA device, all of it, on the CPU: torch runs the same lines there."""

    def memory(device, supposed=None):
        return None if device == "cpu" else (8 << 30, 1 << 20)

    monkeypatch.setattr("stiffcore.unit.CUDA", "cpu")
    monkeypatch.setattr("stiffcore.survey.device_memory", memory)
