"""A run whose store fails at any operation, by an error, a kill or a torn write, continues to the same bytes."""

import ast
import shutil
import subprocess
import sys
from contextlib import suppress

import pytest

from stiffcore.errors import DamagedError, NoRunError
from stiffcore.run import open_run, state_of
from stiffcore.verify import verify
from tests.runs import printed, spectra_bytes


def sessions(small, asked):
    return printed("faulty_store.py", [(str(url), at, how) for url, at, how in asked], cwd=small)


def ended(lines):
    return [int(line.split()[1]) for line in lines if line.startswith("ENDED")]


def check(small, chosen):
    lines = sessions(small, [(small / "whole", 0, "never")])
    assert ended(lines) == [0], lines
    expected = spectra_bytes(small / "whole")
    operations = int(next(line for line in lines if line.startswith("COUNT")).split()[1])
    assert operations > 100
    ways = {"error": (4, 5, 0), "kill": (-9,), "torn": (-9,)}
    asked = [(small / f"{how}{at}", at, how) for how, at in chosen(list(ways), operations)]
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
    # at every 41st operation, in each of the ways by turns
    check(small, lambda ways, operations: [(ways[at % 3], at) for at in range(1, operations + 1, 41)])


@pytest.mark.slow
def test_a_store_that_fails_at_any_operation_loses_nothing(small):
    check(small, lambda ways, operations: [(how, at) for how in ways for at in range(1, operations + 1)])


def on_a_full_disk(small, asked):
    """Exit code, writes and output of commands; each with the write that fails, and how long a file may be."""
    return [ast.literal_eval(line) for line in printed("full_disk.py", asked, cwd=small)]


def said_once(code, said):
    """Whether a command ended with exit code 1 and one clear line."""
    last = said.strip().splitlines()[-1]
    why = "No space left" in last or "File too large" in last or "errno = 27" in last
    return code == 1 and last.startswith("error: ") and why and "Traceback" not in said


RUN = ("--network", "smallnet:make", "--images", "six.npz", "--blocks", "4", "--count", "1")


def check_run_on_a_full_disk(small, places):
    runs = [(at, 0, ("run", f"full{at}", *RUN)) for at in places]
    retries = [(0, *asked[1:]) for asked in runs]
    whole, *said = on_a_full_disk(small, [(0, 0, ("run", "whole", *RUN)), *runs, *retries])
    assert whole[0] == 0, whole
    expected = spectra_bytes(small / "whole")
    for at, (code, writes, text) in zip(places, said[: len(places)], strict=True):
        # threads that make the same folder differ in how often they try
        assert said_once(code, text) or (code == 0 and writes < at), (at, code, text)
    assert [code for code, _, _ in said].count(1) >= len(places) - 10
    for at, (code, _, text) in zip(places, said[len(places) :], strict=True):
        assert code == 0, (at, text)
        assert spectra_bytes(small / f"full{at}") == expected, at
        assert verify(open_run(str(small / f"full{at}"))).findings == [], at
        left = [p.name for p in (small / f"full{at}").rglob("*") if p.name.endswith(".partial")]
        assert left == [], at


# What else writes, where its last file comes to be, and whether in Python: outside of the run, or into it.
WRITERS = {
    "csv": (("export", "run", "--to", "out/m.csv"), "out/m.csv", True),
    "parquet": (("export", "run", "--to", "out/m.parquet"), "out/m.parquet", False),
    "h5": (("export", "run", "--to", "out/s.h5"), "out/s.h5", False),
    "report": (("report", "run", "--to", "out/r.html", "--figures", "out/figures/of/it"), "out/r.html", True),
    "picture": (("picture", "run", "--trust", "--block", "4", "--grid", "3"), "", True),
}


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture
def run(small):
    """A finished run beside an empty folder."""
    (small / "out").mkdir()
    [(code, _, said)] = on_a_full_disk(small, [(0, 0, ("run", "run", *RUN))])
    assert code == 0, said
    return small / "run"


def check_faults(small, faults):
    before = tree(small / "run"), tree(small / "out")
    for fault, (code, _, said) in zip(faults, on_a_full_disk(small, faults), strict=True):
        assert said_once(code, said), (fault, code, said)
    assert (tree(small / "run"), tree(small / "out")) == before
    commands = list(dict.fromkeys(command for _, _, command in faults))
    ends = on_a_full_disk(small, [(0, 0, command) for command in commands])
    assert [code for code, _, _ in ends] == [0] * len(commands), ends


def test_a_run_on_a_disk_that_fills_says_so_and_goes_on_when_there_is_room(small):
    check_run_on_a_full_disk(small, [1, 40, 120])


def test_what_is_written_from_a_run_on_a_disk_that_fills_is_whole_or_not_there(small, run):
    in_python = [(at, 0, command) for command, _, python in WRITERS.values() if python for at in (1, 2)]
    check_faults(small, in_python + [(0, 1, WRITERS[name][0]) for name in ("parquet", "h5")])


@pytest.mark.slow
def test_a_run_on_a_disk_that_fills_at_any_write(small):
    [(_, writes, _)] = on_a_full_disk(small, [(0, 0, ("run", "first", *RUN))])
    check_run_on_a_full_disk(small, list(range(1, writes + 1)))


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_what_is_written_from_a_run_on_a_disk_that_fills_at_any_write(small, run, name):
    command, to, in_python = WRITERS[name]
    shutil.copytree(run, small / "copy")
    [(code, writes, said)] = on_a_full_disk(small, [(0, 0, command)])
    assert code == 0, said
    size = (small / to).stat().st_size if to else 0
    for folder in (run, small / "out"):
        shutil.rmtree(folder)
    (small / "out").mkdir()
    (small / "copy").rename(run)
    assert writes > 1 or not in_python
    faults = [(at, 0, command) for at in range(1, writes + 1)] if in_python else []
    check_faults(small, faults + [(0, 1 + i * (size - 2) // 19, command) for i in range(20) if size])


def test_an_output_that_takes_nothing_is_one_clear_error(run):
    program = [sys.executable, "-W", "ignore", "-c", "from stiffcore.cli import main; main()"]
    for command in (("show", "run"), ("show", "run", "--json")):
        with open("/dev/full", "w") as full:
            found = subprocess.run([*program, *command], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert said_once(found.returncode, found.stderr), (command, found.stderr)
        assert len(found.stderr.splitlines()) == 1
    # who closes a pipe has what was wanted
    quiet = subprocess.run(
        f"{sys.executable} -W ignore -c 'from stiffcore.cli import main; main()' show run --json | head -c 1",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (quiet.stdout, quiet.stderr) == ("[", "")
