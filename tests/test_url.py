"""Claims about a run on an object store: all that holds on a folder, and the wire's own troubles told in a sentence."""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import stiffcore
from stiffcore import store as store_module
from stiffcore.errors import BusyError, DamagedError, InputError, NoRunError, StiffcoreError
from stiffcore.run import state_of
from stiffcore.store import RunStore, StoreError, TiledMatrix
from tests.records import a_header, a_record, put
from tests.runs import KILL_OPTIONS, OPTIONS, command, execute, sessions, spectra_bytes
from tests.test_store import HOLDER, fill, kill, start


@pytest.fixture
def url(bucket, tmp_path):
    """A place in the bucket where nothing is."""
    return f"{bucket.url}/{tmp_path.name}/run"


@pytest.fixture
def store(url):
    run = RunStore(url, create=True)
    run.header = a_header()
    return run


@pytest.fixture
def files(bucket):
    """The bucket as a file system of its own, that remembers nothing."""
    from s3fs import S3FileSystem

    return S3FileSystem(use_listings_cache=False, skip_instance_cache=True)


def run_elsewhere(code, *args):
    subprocess.run([sys.executable, "-c", code, *args], check=True, timeout=60)


def finish(process, seconds=120):
    out, errors = process.communicate(timeout=seconds)
    return process.returncode, out, errors


def test_a_run_on_a_url_gives_the_bytes_of_one_in_a_folder_and_is_read_like_it(small, url, files):
    options = OPTIONS | {"blocks": "4"}
    execute(small / "run", options)
    _, outcome = execute(url, options)
    assert outcome.failed == {}
    assert spectra_bytes(url) == spectra_bytes(small / "run")
    run = stiffcore.open_run(url)
    assert {state_of(r) for r in run.records().values()} == {"done"}
    here, there = run.metrics(), stiffcore.open_run(str(small / "run")).metrics()
    assert here.drop(columns="seconds").equals(there.drop(columns="seconds"))
    assert run.store.holder() is None
    assert run.store.free_bytes() is None
    left = [p for p in files.find(url) if "/units/" in p and p.split("/")[-2] not in ("0", "eigenvalues", "c")]
    assert all(p.endswith("zarr.json") for p in left), left
    execute(url, {})
    assert spectra_bytes(url) == spectra_bytes(small / "run")


def test_the_command_with_its_workers_gives_the_bytes_of_one_process_and_leaves_no_noise(small, url):
    execute(small / "run", KILL_OPTIONS)
    code, out, errors = finish(command("run", url, *(f"--{k}={v}" for k, v in KILL_OPTIONS.items()), cwd=small))
    assert code == 0, errors
    assert f"spectrum in {url}" in out
    assert "Unclosed" not in errors
    assert "Traceback" not in errors
    assert spectra_bytes(url) == spectra_bytes(small / "run")
    for name in ("status", "show"):
        code, out, errors = finish(command(name, url, cwd=small))
        assert code == 0, errors
        assert "layer2.2" in out or "1 of 1" in out or "done" in out, out
        assert "Unclosed" not in errors


@pytest.mark.parametrize(
    "share", [0.5, pytest.param(0.0, marks=pytest.mark.slow), pytest.param(1.0, marks=pytest.mark.slow)]
)
def test_killed_at_an_event_a_run_continues_to_the_same_bytes(small, url, share):
    _, kinds = sessions(small, (small / "whole", 0))
    events = len(kinds[small / "whole"])
    kills = (min(max(2, int(share * events)), events - 1),)
    statuses, _ = sessions(small, *[(f"{url}{at}", kill) for at in kills for kill in (at, 0)])
    for at in kills:
        assert statuses[Path(f"{url}{at}"), at] == signal.SIGKILL
        assert statuses[Path(f"{url}{at}"), 0] == 0
        assert spectra_bytes(f"{url}{at}") == spectra_bytes(small / "whole"), at


@pytest.mark.parametrize("at", [4])
def test_a_server_that_goes_away_stops_the_run_with_a_sentence_and_loses_nothing(small, url, bucket, at):
    execute(small / "whole", KILL_OPTIONS)
    seen = []

    def stop(event):
        seen.append(event)
        if len(seen) == at:
            bucket.stop()

    try:
        with pytest.raises(StiffcoreError, match=r"(?s)s3://.*Could not connect"):
            execute(url, KILL_OPTIONS, stop)
    finally:
        bucket.start()
    assert {r.failure for r in stiffcore.open_run(url).records().values()} == {None}
    _, outcome = execute(url, {})
    assert outcome.failed == {}
    assert spectra_bytes(url) == spectra_bytes(small / "whole")


@pytest.mark.parametrize("at", [20])
def test_a_write_that_is_refused_stops_the_run_with_a_sentence_and_loses_nothing(small, url, monkeypatch, at):
    execute(small / "whole", KILL_OPTIONS)
    write, seen = store_module.remote.FsspecStore.set, []

    async def refuse(store, key, *args):
        seen.append(key)
        if len(seen) >= at:
            raise PermissionError("Access Denied")
        await write(store, key, *args)

    with monkeypatch.context() as patch:
        patch.setattr(store_module.remote.FsspecStore, "set", refuse)
        with pytest.raises(StiffcoreError, match=r"s3://.* cannot be written: Access Denied"):
            execute(url, KILL_OPTIONS)
    assert len(seen) >= at
    _, outcome = execute(url, KILL_OPTIONS)
    assert outcome.failed == {}
    assert spectra_bytes(url) == spectra_bytes(small / "whole")


def test_a_held_run_is_refused_to_a_second_process(small, url):
    execute(url, KILL_OPTIONS)
    with RunStore(url).hold():
        code, _, errors = finish(command("run", url, cwd=small))
        assert code == 3, errors
        assert f"process {os.getpid()} on " in errors
        with pytest.raises(BusyError), RunStore(url).hold():
            pass
    with RunStore(url).hold():
        pass


def test_a_killed_holder_is_taken_over_at_once(store, url):
    process = start(HOLDER, url)
    try:
        assert store.holder()["pid"] == process.pid
        with pytest.raises(BusyError, match=f"process {process.pid} on "), store.hold():
            pass
    finally:
        kill(process)
    assert store.holder() is None
    with store.hold():
        assert store.holder()["pid"] == os.getpid()
    assert store.holder() is None


def test_of_two_that_begin_to_hold_at_once_one_is_refused(store, url):
    processes = [
        subprocess.Popen([sys.executable, "-c", TAKER, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout.readline().strip() == "ready"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert sorted(p.communicate(timeout=30)[0].strip() for p in processes) == ["busy", "held"]


TAKER = """
import sys, time
from stiffcore.errors import BusyError
from stiffcore.store import RunStore
store = RunStore(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
try:
    with store.hold():
        time.sleep(1)
        print("held", flush=True)
except BusyError:
    print("busy", flush=True)
"""


def test_a_slow_beginner_does_not_write_over_the_header_of_a_fast_one(url, monkeypatch):
    look = RunStore.check_new

    def slow(place):
        look(place)
        monkeypatch.undo()
        RunStore(place, create=True).header = a_header()

    monkeypatch.setattr(RunStore, "check_new", staticmethod(slow))
    assert RunStore(url, create=True).header == a_header()


def test_a_service_without_conditional_writes_will_do(url, monkeypatch):
    from s3fs import S3FileSystem

    write = S3FileSystem._pipe_file

    async def refuse(fs, path, data, **options):
        if options.get("mode") == "create":
            raise NotImplementedError
        return await write(fs, path, data, **options)

    monkeypatch.setattr(S3FileSystem, "_pipe_file", refuse)
    store = RunStore(url, create=True)
    store.header = a_header()
    with store.hold(), pytest.raises(BusyError), RunStore(url).hold():
        pass


def test_what_another_process_wrote_is_seen(store, url):
    a, b = put(store, "a"), put(store, "b")
    assert list(store.units()) == [a, b]
    code = f"import sys; from stiffcore.store import RunStore; RunStore(sys.argv[1]).update('{b}', failure='full')"
    run_elsewhere(code, url)
    assert store.units() == {a: a_record("a"), b: a_record("b", failure="full")}


def test_a_matrix_comes_back_and_is_dropped_without_a_rest(store, url, files):
    a = np.diag(np.arange(1.0, 10.0))
    fill(TiledMatrix.create(store.unit_group("u"), "matrix", (9, 9), a.dtype, 2, 4), a)
    assert np.array_equal(TiledMatrix(RunStore(url).unit_group("u"), "matrix").read(), a)
    store.drop("u", "matrix", "never_there")
    left = [p.removeprefix(url.removeprefix("s3://")) for p in files.find(url)]
    assert left == ["/units/u/zarr.json", "/units/zarr.json", "/zarr.json"]


def test_a_wire_that_fails_is_not_taken_for_damage(store, url, bucket):
    key = put(store)
    store.put_array("units/u", "a", np.ones(3), ("d",))
    group = store.unit_group("u")
    matrix = TiledMatrix.create(group, "matrix", (4, 4), np.dtype("f8"), 2, 2)
    fill(matrix, np.ones((4, 4)))
    bucket.stop()
    try:
        for work in (
            matrix.read,
            matrix.missing,
            lambda: matrix.write(0, np.ones((4, 2))),
            lambda: TiledMatrix(group, "matrix"),
            lambda: TiledMatrix.create(group, "matrix", (4, 4), np.dtype("f8"), 2, 2),
            lambda: store.get_array("units/u", "a"),
            lambda: store.put_array("units/u", "a", np.ones(3), ("d",)),
            lambda: store.update(key, failure="full"),
            lambda: store.record(key),
            lambda: store.drop("u", "matrix"),
            lambda: RunStore(url),
            lambda: RunStore.check_new(url),
            store.units,
            store.holder,
            store.hold().__enter__,
        ):
            with pytest.raises(StoreError, match="Could not connect") as caught:
                work()
            assert not isinstance(caught.value, (DamagedError, NoRunError))
    finally:
        bucket.start()
    assert np.array_equal(matrix.read(), np.ones((4, 4)))


def test_a_run_given_up_while_the_store_was_away_is_free_again_in_the_same_process(store, bucket):
    try:
        with store.hold():
            bucket.stop()
    finally:
        bucket.start()
    assert store.holder() is None
    with store.hold():
        pass


def test_a_place_with_something_else_in_it_is_refused_and_not_touched(url, files):
    files.pipe(f"{url}/images/holiday.png", b"mine")
    with pytest.raises(NoRunError):
        RunStore(url)
    for look in (RunStore.check_new, lambda place: RunStore(place, create=True)):
        with pytest.raises(InputError, match="not a run"):
            look(url)
    assert files.find(url) == [f"{url}/images/holiday.png".removeprefix("s3://")]


class TestTheDoor:
    """What is wrong with a URL is one sentence, before any work."""

    @pytest.fixture(autouse=True)
    def anew(self, bucket):
        from s3fs import S3FileSystem

        S3FileSystem.clear_instance_cache()
        yield
        S3FileSystem.clear_instance_cache()

    def refused(self, small, url, message, kind=StiffcoreError):
        with pytest.raises(kind, match=message) as caught:
            execute(url, OPTIONS)
        assert "\n" not in str(caught.value)

    def test_no_bucket(self, small):
        self.refused(small, "s3://nowhere/run", "there is no bucket nowhere")

    def test_no_credentials(self, small, url, monkeypatch):
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
        self.refused(small, url, f"{url}.*credentials")

    def test_no_server(self, small, url, bucket, monkeypatch):
        bucket.stop()
        try:
            self.refused(small, url, f"{url}.*Could not connect")
        finally:
            bucket.start()

    def test_no_s3fs(self, small, url, monkeypatch):
        fsspec_registry = importlib.import_module("fsspec.registry")

        monkeypatch.setitem(sys.modules, "s3fs", None)
        monkeypatch.delitem(fsspec_registry._registry, "s3", raising=False)
        self.refused(small, url, r"pip install 'stiffcore\[s3\]'", InputError)

    def test_no_such_scheme(self, small):
        self.refused(small, "floppy://a/run", "floppy://a/run cannot be opened", InputError)
