"""A cluster that is not ours: units go to its workers, and whatever dies, the run ends with the same bytes."""

import asyncio
import errno
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import dask
import numpy as np
import psutil
import pytest
from distributed import Security
from distributed.core import connect

import stiffcore
import stiffcore.cluster
from stiffcore.cluster import (
    ConnectionLostError,
    InProcess,
    Spread,
    WorkerDiedError,
    local_workers,
    spread,
    tls_security,
    workers_at,
)
from stiffcore.eigen import divide
from stiffcore.eigen.panels import SingularError, factor, one_by_one
from stiffcore.errors import StiffcoreError
from stiffcore.record import Stage, Step
from stiffcore.run import state_of
from stiffcore.session import carry_out_plan, prepare
from stiffcore.store import RunStore, StoredWorkspace
from tests.records import key_of, put, said
from tests.runs import OPTIONS, PROGRAMS, execute, spectra_bytes

# slow to certify, so that something can be killed meanwhile
ONE = OPTIONS | {"network": "smallnet:make_slow", "blocks": "1", "functions": "block", "memory": "4GiB"}


class Cluster:
    """`dask scheduler` and `dask worker` as a user starts them."""

    def __init__(self, folder, *security):
        self.security = security
        self.folder, self.file = folder, str(folder / "scheduler.json")
        here = str(Path(__file__).parents[1])
        path = os.pathsep.join([str(folder), here, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        self.scheduler = self.start("scheduler", "--port", "0", "--scheduler-file", self.file, "--no-dashboard")
        self.processes = [self.scheduler]
        deadline = time.monotonic() + 60
        while not os.path.exists(self.file) and time.monotonic() < deadline:
            time.sleep(0.1)

    def start(self, *args):
        program = [sys.executable, "-W", "ignore", "-m", "dask", *args, *self.security]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(program, cwd="/", env=self.environment, **quiet)

    def worker(self, *args):
        where = ("--scheduler-file", self.file, "--nthreads", "2", "--no-dashboard", "--no-nanny")
        self.processes.append(self.start("worker", *where, *args))

    def stop(self):
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def cluster(small):
    made = Cluster(small)
    yield made
    made.stop()


def on(cluster, url, options, watch=lambda event: None):
    with workers_at(cluster.file, watch) as executor:
        prepared = prepare(str(url), options, executor)
        return prepared, carry_out_plan(str(url), prepared, executor, watch)


def test_units_go_to_the_workers_and_give_the_bytes_of_one_process(small, cluster, monkeypatch):
    cluster.worker("--resources", "GPU=1")
    cluster.worker()
    events = []
    with workers_at(cluster.file, events.append) as executor:
        deadline = time.monotonic() + 60
        while len(executor.workers()) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert sorted(w.gpu for w in executor.workers()) == [False, True]
        # a relative name, from a folder that is not the workers'
        prepared = prepare("run", OPTIONS | {"memory": "3GiB", "device": "cpu"}, executor)
        plan = prepared.plan
        assert (plan.separate, plan.workers, plan.threads) == (True, 2, 2)
        assert plan.data_bytes == plan.allowed_bytes - plan.reserved_bytes
        assert plan.allowed_bytes == 3 << 30
        _, outcome = carry_out_plan("run", prepared, executor, events.append)
    assert outcome.failed == {}
    assert {said(e) for e in events} >= {"begun", "built", "reduced", "solved", "done", "ended"}
    one = InProcess(lambda event: None)
    prepared = prepare("one", OPTIONS | {"device": "cpu"}, one)
    prepared = replace(prepared, plan=replace(prepared.plan, threads=2))
    carry_out_plan("one", prepared, one, lambda event: None)
    assert spectra_bytes(small / "run")[0] == spectra_bytes(small / "one")[0]


def test_where_a_cuda_driver_is_loaded_workers_are_not_forked(small, monkeypatch):
    monkeypatch.setattr("stiffcore.cluster.connect.CUDA_DRIVER", "/dev/null")
    with local_workers(lambda event: None) as executor:
        assert executor.submit(_was_forked).result() is False
        prepared = prepare(str(small / "run"), ONE | {"device": "cpu"}, executor, workers=1)
        _, outcome = carry_out_plan(str(small / "run"), prepared, executor, lambda event: None)
    assert outcome.failed == {}


def _was_forked(emit):
    return "stiffcore.preload" in sys.modules or multiprocessing.get_start_method(allow_none=True) == "forkserver"


def listening(pid=None):
    """The ports on which a process (this one) and those it started listen, and addresses of other machines' way in."""
    found, top = set(), psutil.Process(pid)
    for process in [top, *top.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            found |= {(c.laddr.ip, c.laddr.port) for c in process.net_connections() if c.status == psutil.CONN_LISTEN}
    return found


async def asked(address, security):
    """What a node of Dask's answers to who has this."""
    comm = await connect(address, timeout=5, **security.get_connection_args("client"))
    try:
        await comm.write({"op": "identity", "reply": True})
        return await asyncio.wait_for(comm.read(), 5)
    finally:
        comm.abort()


@pytest.mark.parametrize("dashboard", [False, True])
def test_ports_are_of_this_machine_alone_and_answer_only_to_who_has_the_key(dashboard):
    before = listening()
    with local_workers(lambda event: None, dashboard=dashboard) as executor:
        executor.scale(2)
        ports = listening() - before
        assert {ip for ip, _ in ports} == {"127.0.0.1"}
        if dashboard:
            with urllib.request.urlopen(executor.dashboard, timeout=30) as page:
                assert page.status == 200
                assert "needs bokeh" not in page.read().decode()
            ports -= {("127.0.0.1", urllib.parse.urlsplit(executor.dashboard).port)}
        else:
            assert executor.dashboard == ""
        assert len(ports) == 5  # a scheduler; two workers, and who starts each of them
        for ip, port in ports:
            answer = asyncio.run(asked(f"tls://{ip}:{port}", executor._client.security))
            assert answer["type"] in ("Scheduler", "Worker", "Nanny")
            for protocol, key in (("tcp", Security()), ("tls", Security.temporary())):
                with pytest.raises((OSError, TimeoutError)):
                    asyncio.run(asked(f"{protocol}://{ip}:{port}", key))


def test_the_ports_of_a_run_command_are_of_this_machine_alone_and_refuse_who_has_no_key(small):
    options = ["--network", "smallnet:make_slow", "--images", "six.npz", "--blocks", "1", "--count", "2"]
    options += ["--workers", "2", "--memory", "4GiB"]
    command = [sys.executable, "-m", "stiffcore", "run", str(small / "run"), *options]
    here = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        command, cwd=small, env=os.environ | here, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    try:
        deadline, ports = time.monotonic() + 90, set()
        while len(ports) < 5 and process.poll() is None and time.monotonic() < deadline:
            ports |= listening(process.pid)  # a scheduler; two workers, and who starts each of them
            time.sleep(0.2)
        assert len(ports) >= 5, process.poll()
        assert {ip for ip, _ in ports} == {"127.0.0.1"}
        for ip, port in ports:
            for protocol, key in (("tcp", Security()), ("tls", Security.temporary())):
                with pytest.raises((OSError, TimeoutError)):
                    asyncio.run(asked(f"{protocol}://{ip}:{port}", key))
        assert process.poll() is None
    finally:
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Traceback" not in said.decode()


def test_a_cluster_that_asks_for_a_key_is_reached_with_one(small, monkeypatch):
    key = Security.temporary()
    for name, text in (("ca", key.tls_ca_file), ("cert", key.tls_client_cert), ("key", key.tls_client_key)):
        (small / f"{name}.pem").write_text(text)
    files = [str(small / f"{name}.pem") for name in ("ca", "cert", "key")]
    monkeypatch.setattr("stiffcore.cluster.connect.CONNECT_S", 3)
    with local_workers(lambda event: None) as ours:
        address = ours._client.scheduler.address
        with pytest.raises(stiffcore.InputError, match="cannot be reached"), workers_at(address, print):
            pass
        others = workers_at(address, print, security=tls_security(*files))
        with pytest.raises(stiffcore.InputError, match="cannot be reached"), others:
            pass
    options = [word for pair in zip(("--tls-ca-file", "--tls-cert", "--tls-key"), files, strict=True) for word in pair]
    made = Cluster(small, *options)
    try:
        made.worker()
        with workers_at(made.file, print, security=tls_security(*files)) as executor:
            assert len(executor.workers()) == 1
        with (
            dask.config.set(
                {
                    "distributed.comm.tls.ca-file": files[0],
                    "distributed.comm.tls.client.cert": files[1],
                    "distributed.comm.tls.client.key": files[2],
                }
            ),
            workers_at(made.file, print) as executor,
        ):
            assert len(executor.workers()) == 1
    finally:
        made.stop()
    with pytest.raises(stiffcore.InputError, match="--tls-cert is missing"):
        tls_security(files[0], None, None)


def test_a_worker_beyond_its_budget_is_ended(small):
    url = str(small / "run")
    options = OPTIONS | {"network": "smallnet:make_hoarding", "blocks": "1", "functions": "block", "index": (0,)}
    with local_workers(lambda event: None) as executor:
        prepared = prepare(url, options | {"memory": "2GiB"}, executor, workers=1)
        budget = prepared.plan.reserved_bytes + (128 << 20)
        prepared = prepare(url, options | {"memory": budget}, executor, workers=1)
        (small / "hoard").touch()  # 1 GiB that no plan knows of
        _, outcome = carry_out_plan(url, prepared, executor, lambda event: None)
    assert list(outcome.failed) == ["000000-layer1.0-block-matrix"]
    assert "beyond its budget" in outcome.failed["000000-layer1.0-block-matrix"]


def test_a_worker_that_dies_hands_its_unit_to_another(small, cluster):
    expected = execute(small / "whole", ONE)[0].spectrum(block="layer1.0").values
    cluster.worker()
    killed = []

    def kill(event):
        if said(event) == "done" and event.done == 0 and not killed:
            killed.extend(pids)
            os.kill(pids[0], signal.SIGKILL)
            cluster.worker()

    with workers_at(cluster.file, kill) as executor:
        prepared = prepare(str(small / "run"), ONE, executor)
        pids = [w.pid for w in executor.workers()]
        run, outcome = carry_out_plan(str(small / "run"), prepared, executor, lambda event: None)
    assert killed
    assert outcome.failed == {}
    assert abs(run.spectrum(block="layer1.0").values - expected).max() < 1e-12


def test_a_scheduler_that_is_gone_ends_the_session_and_the_run_continues(small, cluster, capfd, caplog):
    expected = execute(small / "whole", ONE)[0].spectrum(block="layer1.0").values
    cluster.worker()
    events = []

    def kill(event):
        events.append(event)
        if said(event) == "done" and event.done == 0:
            cluster.scheduler.kill()

    with pytest.raises(ConnectionLostError, match="run again to continue"):
        on(cluster, small / "run", ONE, kill)
    assert "Traceback" not in capfd.readouterr().err
    assert [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")] == []
    run = stiffcore.open_run(str(small / "run"))
    assert run.store.holder() is None
    assert {state_of(r) for r in run.records().values()} <= {"under way", "done"}
    run, outcome = execute(small / "run", {})
    assert outcome.failed == {}
    assert abs(run.spectrum(block="layer1.0").values - expected).max() < 1e-12


def test_work_of_a_session_that_is_over_stops_at_its_next_step(small):
    from stiffcore.unit import carry_out

    execute(small / "run", OPTIONS | {"blocks": "1"})
    store = RunStore(str(small / "run"))
    key = next(iter(store.units()))
    store.update(key, stage=Stage.PLANNED)
    with store.hold() as token:
        store.check_held(token)
        with pytest.raises(stiffcore.BusyError, match="is over"):
            carry_out(
                str(small / "run"), key, threads=1, emit=print, check=lambda: store.check_held("another session's")
            )
    with pytest.raises(stiffcore.BusyError, match="is over"):
        store.check_held(token)
    assert store.record(key).stage is Stage.PLANNED


@pytest.mark.slow
def test_within_half_a_minute_of_the_clients_death_no_worker_writes(small, cluster):
    cluster.worker()
    process = subprocess.Popen(
        [sys.executable, str(PROGRAMS / "cluster_client.py"), cluster.file], cwd=small, env=cluster.environment
    )
    deadline = time.monotonic() + 120
    while not list(small.glob("run/units/*/matrix/zarr.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    process.wait()
    killed = time.time()
    with stiffcore.open_run(str(small / "run")).store.hold():  # waits for the lease to lapse
        held = time.time()
        assert 5 < held - killed < 40
        before = {p: p.stat().st_mtime for p in (small / "run").rglob("*") if p.name != "holder.json"}
        time.sleep(10)
        assert {p: p.stat().st_mtime for p in (small / "run").rglob("*") if p.name != "holder.json"} == before
    assert max(t for p, t in before.items() if p.is_file() and p.name != ".writers") - killed < 30


# ------------------------------------------------------------------------------- the blocks of one unit, shared

ORDER, COLUMNS, TILE = 60, 10, 32


def workspace(folder):
    store = RunStore(folder, create=True)
    if key_of("u") not in store.units():
        put(store)
    return StoredWorkspace(store, key_of("u"), TILE, COLUMNS)


def written(folder, a):
    matrix = workspace(folder).matrix("a", *a.shape)
    for i in matrix.missing():
        matrix.write(i, np.asfortranarray(a[:, slice(*matrix.columns(i))]))
    return matrix


def divided(folder, emit, *, shared=True):
    """All eigenvalues of the matrix there, by division in blocks of a panel; tells of each that is written."""
    space = workspace(folder)
    each = spread(1, lambda: None) if shared else one_by_one
    assert isinstance(each, Spread) is shared
    found = divide.eigenvalues(
        space.matrix("a", ORDER, ORDER),
        space,
        45,
        first=0.0,
        tell=lambda what, done, total: emit(Step(str(os.getpid()), Stage.SOLVED, done, total, what)),
        each=each,
    )
    return found.values.tobytes(), [s.beyond for s in found.splits]


def factored(folder, emit):
    space = workspace(folder)
    return factor(space.matrix("a", ORDER, ORDER), space.matrix("lu", ORDER + 1, ORDER), each=spread(1, lambda: None))


def random_matrix():
    return np.random.default_rng(0).standard_normal((ORDER, ORDER))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What this process finds on its own."""
    folder = str(tmp_path_factory.mktemp("alone") / "run")
    written(folder, random_matrix())
    return divided(folder, lambda event: None, shared=False)


def test_workers_share_the_blocks_of_a_unit_and_write_the_same_bytes(tmp_path, alone):
    folder, events = str(tmp_path / "run"), []
    written(folder, random_matrix())
    with local_workers(events.append) as executor:
        executor.scale(2)
        assert executor.submit(divided, folder).result() == alone
        first = [e.done for e in events if "LU" in e.note][: ORDER // COLUMNS]
        assert first == list(range(1, ORDER // COLUMNS + 1))
        # a panel that depends on one that cannot be made is given up, and what is wrong is said
        a = random_matrix()
        a[:, 3 * COLUMNS] = 0
        written(str(tmp_path / "singular"), a)
        with pytest.raises(SingularError, match="columns 30 to 39"):
            executor.submit(factored, str(tmp_path / "singular")).result()


@pytest.mark.parametrize("leads", [False, True], ids=["one of them", "the one that leads"])
def test_a_worker_that_dies_leaves_its_block_to_the_others(tmp_path, alone, leads):
    folder, pids = str(tmp_path / "run"), []
    written(folder, random_matrix())

    def kill(event):
        if pids and "step 3 " in event.note and "LU" in event.note and event.done == 4:
            os.kill(next(pid for pid in pids if (pid == int(event.unit)) is leads), signal.SIGKILL)
            pids.clear()

    with local_workers(kill) as executor:
        executor.scale(2)
        pids += [worker.pid for worker in executor.workers()]
        if leads:
            with pytest.raises(WorkerDiedError):
                executor.submit(divided, folder).result()
        assert executor.submit(divided, folder).result() == alone
    assert not pids


def test_a_worker_of_a_cluster_that_dies_and_does_not_come_back(tmp_path, cluster, alone):
    folder, pids = str(tmp_path / "run"), []
    written(folder, random_matrix())

    def kill(event):
        if pids and "step 3 " in event.note and "inverse" in event.note:
            os.kill(next(pid for pid in pids if pid != int(event.unit)), signal.SIGKILL)
            pids.clear()

    cluster.worker()
    cluster.worker()
    with workers_at(cluster.file, kill) as executor:
        deadline = time.monotonic() + 60
        while len(executor.workers()) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
        pids += [worker.pid for worker in executor.workers()]
        assert executor.submit(divided, folder).result() == alone
        assert len(executor.workers()) == 1
    assert not pids


def test_a_run_shares_a_divided_unit_among_the_workers_asked_for(small):
    options = OPTIONS | {"blocks": "1", "functions": "block", "index": (0,)}
    expected = execute(small / "dense", options)[0].spectrum(block="layer1.0").values
    url = str(small / "run")
    with local_workers(lambda event: None) as executor:
        prepared = prepare(url, options | {"memory": "3GiB", "solver": "divide"}, executor, workers=2)
        (unit,) = prepared.plan.units
        assert (unit.spread, prepared.plan.workers) == (2, 2)
        assert not prepared.plan.holds(unit, [unit])
        unit = replace(unit, panel=16, at_once=1, leaf=len(expected) // 3)
        prepared = replace(prepared, plan=replace(prepared.plan, units=(unit,)))
        run, outcome = carry_out_plan(url, prepared, executor, lambda event: None)
    assert outcome.failed == {}
    assert len(run.spectrum(block="layer1.0").record.divided.splits) >= 1
    assert abs(run.spectrum(block="layer1.0").values - expected).max() < 1e-10


@pytest.mark.parametrize(
    ("scheduler", "says"),
    [
        ("nonsense", "neither an address"),
        ("tcp://127.0.0.1:9", "cannot be reached"),
        ("127.0.0.1:9", "cannot be reached"),
    ],
)
def test_a_scheduler_that_cannot_be_had_is_refused(scheduler, says, monkeypatch):
    monkeypatch.setattr("stiffcore.cluster.connect.CONNECT_S", 1)
    with pytest.raises(stiffcore.InputError, match=says), workers_at(scheduler, print):
        pass


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"], ids=["silent", "a page"])
def test_what_listens_but_is_no_scheduler_is_refused_in_time(says, monkeypatch):
    monkeypatch.setattr("stiffcore.cluster.connect.CONNECT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            with suppress(OSError):
                while True:
                    server.accept()[0].sendall(says)

        threading.Thread(target=answer, daemon=True).start()
        address, began = f"tcp://127.0.0.1:{server.getsockname()[1]}", time.monotonic()
        with pytest.raises(stiffcore.InputError, match=r"cannot be reached|no scheduler"), workers_at(address, print):
            pass
        assert time.monotonic() - began < 15
        server.shutdown(socket.SHUT_RDWR)


def _is_not(pid):
    if os.getpid() == pid:
        raise StiffcoreError("there is no run here")


def test_workers_that_cannot_be_used_are_named_and_get_nothing(cluster, monkeypatch):
    cluster.worker()
    cluster.worker()
    told = []
    with workers_at(cluster.file, print, tell=told.append) as executor:
        deadline = time.monotonic() + 60
        while len(executor.workers()) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
        first, second = (worker.pid for worker in executor.workers())
        executor.pass_over(_is_not, first)
        assert len(told) == 1
        assert "is not used: there is no run here" in told[0]
        assert [worker.pid for worker in executor.workers()] == [second]
        assert {executor.submit(_was_in).result() for _ in range(6)} == {second}
        with pytest.raises(StiffcoreError, match="no worker of the cluster can be used"):
            executor.pass_over(_is_not, second)
    monkeypatch.setattr("stiffcore.cluster.connect.__version__", "another")
    with (
        pytest.raises(StiffcoreError, match=r"it has stiffcore .* and here is another"),
        workers_at(cluster.file, print),
    ):
        pass


def _was_in(emit):
    return os.getpid()


def _wants(path):
    if not os.path.exists(path):
        raise StiffcoreError("there is no run here")


def _asleep(emit):
    time.sleep(600)


def test_what_waits_for_a_worker_that_is_gone_is_given_up_and_one_that_joins_is_looked_at(small, cluster, monkeypatch):
    cluster.worker()
    path, told = small / "wanted", []
    path.touch()
    with workers_at(cluster.file, print, tell=told.append) as executor:
        executor.pass_over(_wants, str(path))
        (first,) = (worker.pid for worker in executor.workers())
        waiting = executor.submit(_asleep)
        time.sleep(1)
        os.kill(first, signal.SIGKILL)
        with pytest.raises(WorkerDiedError):
            waiting.result(timeout=60)
        monkeypatch.setattr("stiffcore.cluster.workers.NONE_LEFT_S", 1)
        with pytest.raises(ConnectionLostError, match="no worker that can be used"):
            executor.submit(_was_in)
        path.unlink()
        cluster.worker()
        deadline = time.monotonic() + 60
        while not told and time.monotonic() < deadline:
            assert executor.workers() == []
            time.sleep(0.2)
        assert "is not used: there is no run here" in told[0]
        with pytest.raises(ConnectionLostError):
            executor.submit(_was_in)
        path.touch()
        cluster.worker()
        monkeypatch.setattr("stiffcore.cluster.workers.NONE_LEFT_S", 60)
        assert executor.submit(_was_in).result(timeout=60) != first


def test_no_space_in_shared_memory_is_not_blamed_on_a_script(monkeypatch):
    def start(**options):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("Nanny failed to start.") from error

    monkeypatch.setattr("stiffcore.cluster.local.start", start)
    with pytest.raises(StiffcoreError, match="No space left") as found, local_workers(print):
        pass
    assert "__main__" not in str(found.value)


def test_a_cluster_without_workers_is_refused(cluster, monkeypatch):
    monkeypatch.setattr("stiffcore.cluster.connect.WORKERS_S", 1)
    with pytest.raises(stiffcore.InputError, match="has no worker"), workers_at(cluster.file, print):
        pass


@pytest.mark.gpu
def test_a_worker_with_a_cuda_device_takes_the_units_that_are_planned_for_one(small, cluster):
    cluster.worker("--resources", "GPU=1")
    cluster.worker()
    prepared, (_, outcome) = on(cluster, small / "run", OPTIONS | {"memory": "6GiB", "device": "cuda"})
    assert outcome.failed == {}
    assert prepared.plan.gpus == 1
    run = stiffcore.open_run(small / "run")
    assert {r.plan.solver for r in run.records().values()} == {"cuda-dense"}
    assert all(r.measured_device_bytes > 0 for r in run.records().values())
    assert all(run.stored(key).certificate.passed for key in run.records())


def test_a_gpu_that_no_worker_declares_is_refused(small, cluster):
    cluster.worker()
    with pytest.raises(stiffcore.InputError, match="--resources GPU=1"):
        on(cluster, small / "run", OPTIONS | {"device": "cuda"})
    assert not (small / "run").exists()


def test_blocks_of_a_shared_unit_go_to_no_worker_that_joined_since(monkeypatch):
    monkeypatch.setattr(stiffcore.cluster.workers.Shared, "usable", frozenset({"tcp://a", "tcp://gone"}))
    assert stiffcore.cluster.workers.sharing({"tcp://joined": 1, "tcp://a": 2}) == ["tcp://a"]
    assert stiffcore.cluster.workers.sharing({"tcp://joined": 1}) == []
    monkeypatch.setattr(stiffcore.cluster.workers.Shared, "usable", None)  # our own cluster
    assert stiffcore.cluster.workers.sharing({"tcp://b": 1, "tcp://a": 2}) == ["tcp://a", "tcp://b"]
