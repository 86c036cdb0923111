"""A run whose store fails at any operation, by an error, a kill or a torn write, continues to the same bytes."""

import subprocess
import sys
from contextlib import suppress

import pytest

from stiffcore.errors import DamagedError, NoRunError
from stiffcore.run import open_run, state_of
from stiffcore.verify import verify
from tests.test_run import spectra_bytes

# Forks a child for every session, so that the imports are paid once. The store of a session fails at its `at`-th
# operation, in one of three ways, or never (0).
FAULTY = """
import errno, os, signal, sys
sys.path.insert(0, {folder!r})
import stiffcore.preload
from zarr.storage import LocalStore
from stiffcore.cluster import InProcess
from stiffcore.errors import NoRunError, StiffcoreError
from stiffcore.session import carry_out_plan, check_free, prepare
from stiffcore.store import RunStore

OPTIONS = {{"network": "smallnet:make", "images": "six.npz", "blocks": "4", "count": 1}}
OPERATIONS = ("get", "set", "set_if_not_exists", "exists", "delete", "delete_dir", "list", "list_dir", "list_prefix")
count = 0

def tear(store, name, args):
    if name in ("set", "set_if_not_exists"):
        path, data = store.root / args[0], args[1].to_bytes()
        if name == "set_if_not_exists" and path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data[:len(data) // 2])
    if name == "delete_dir":
        for path in [p for p in (store.root / args[0]).rglob("*") if p.is_file()][::2]:
            path.unlink()

def wrapped(name, at, how):
    inner = getattr(LocalStore, name)
    def due(store, args):
        global count
        count += 1
        if count == at and how == "error":
            raise OSError(errno.EIO, "a fault of the store")
        if count == at:
            if how == "torn":
                tear(store, name, args)
            os.kill(os.getpid(), signal.SIGKILL)
    if name.startswith("list"):
        async def operation(self, *args, **kwargs):
            due(self, args)
            async for key in inner(self, *args, **kwargs):
                yield key
    else:
        async def operation(self, *args, **kwargs):
            due(self, args)
            return await inner(self, *args, **kwargs)
    return operation

def begun(url):
    try:
        return RunStore(url).header is not None
    except NoRunError:
        return False

def session(url, at, how):
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for name in OPERATIONS:
        setattr(LocalStore, name, wrapped(name, at, how))
    try:
        executor = InProcess(lambda event: None)
        check_free(url)
        # what was killed before its header was written is no run yet: its command starts it once more
        prepared = prepare(url, {{}} if begun(url) else OPTIONS, executor, trust=True)
        failed = carry_out_plan(url, prepared, executor, lambda event: None)[1].failed
    except (StiffcoreError, OSError) as error:
        print("SAID", url, at, how, str(error).replace(chr(10), " "), flush=True)
        os._exit(4)
    if failed:
        print("FAILED", url, at, how, str(failed).replace(chr(10), " "), flush=True)
    print("COUNT", count, flush=True)
    os._exit(5 if failed else 0)

for url, at, how in {sessions!r}:
    print("ENDED", session(url, at, how), url, at, how, flush=True)
"""


def sessions(small, asked):
    code = FAULTY.format(folder=str(small), sessions=[(str(url), at, how) for url, at, how in asked])
    program = [sys.executable, "-W", "ignore", "-c", code]
    found = subprocess.run(program, cwd=small, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return found.stdout.splitlines()


def ended(lines):
    return [int(line.split()[1]) for line in lines if line.startswith("ENDED")]


def check(small, start, step):
    lines = sessions(small, [(small / "whole", 0, "never")])
    assert ended(lines) == [0], lines
    expected = spectra_bytes(small / "whole")
    operations = int(next(line for line in lines if line.startswith("COUNT")).split()[1])
    assert operations > 100
    ways = {"error": (4, 5, 0), "kill": (-9,), "torn": (-9,)}
    asked = [(small / f"{how}{at}", at, how) for how in ways for at in range(start, operations + 1, step)]
    for (url, at, how), code in zip(asked, ended(sessions(small, asked)), strict=True):
        assert code in ways[how], (how, at)
        # what is said of it is true: a unit that is done has its spectrum, and what is damaged is named
        untold = (NoRunError, DamagedError) if how == "torn" else NoRunError
        with suppress(untold):
            run = open_run(str(url))
            for key in [key for key, record in run.records().items() if state_of(record) == "done"]:
                assert run.store.get_array(f"units/{key}", "eigenvalues").tobytes() == expected[0][key], (how, at)
    lines = sessions(small, [(url, 0, "after") for url, _, _ in asked])
    assert ended(lines) == [0] * len(asked), [line for line in lines if line.startswith(("SAID", "FAILED"))]
    for url, at, how in asked:
        assert spectra_bytes(url) == expected, (how, at)
        assert verify(open_run(str(url))).findings == [], (how, at)
        left = [p.name for p in url.rglob("*") if p.name.endswith(".partial") or p.name == "holder.json"]
        assert left == [], (how, at)


def test_a_store_that_fails_at_some_operation_loses_nothing(small):
    check(small, 1, 29)


@pytest.mark.slow
def test_a_store_that_fails_at_any_operation_loses_nothing(small):
    check(small, 1, 1)
