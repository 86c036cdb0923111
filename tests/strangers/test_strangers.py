"""A run that a stranger made cannot act: whatever is in it, a command reads it or ends with one error."""

import inspect
import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from zarr.storage import LocalStore

from stiffcore.commands import working
from stiffcore.store.place import StrangeError, open_folder
from tests.strangers.hostile import DEEP, VICTIM, Change, changes, here, outcome_of, set_field

# Of the thousands that there are; `bench/fuzz.py` takes the others. What starts to compute takes seconds.
CASES, SHARES = 120, 4
CHEAP = ("status", "show", "verify", "export", "status --json", "run", "compare")
DEAR = ("plan", "export h5", "report", "run --trust")
UNIT = "units/000000-layer1.1-block-matrix"
WAITING = "units/000000-layer1.1-block-singular"


@pytest.fixture
def folder(small, monkeypatch):
    """A folder with a run to be harmed, and an `evil.py` that nobody imports."""
    with zipfile.ZipFile(Path(__file__).parents[1] / "data/runs-of-0.1.0.zip") as runs:
        runs.extractall(small, [name for name in runs.namelist() if name.startswith("metrics-half/")])
    (small / "metrics-half").rename(small / "original")
    (small / "evil.py").write_text("raise SystemError('imported')")
    monkeypatch.setattr(working, "workers_at", here)
    monkeypatch.setattr("sys.argv", ["stiffcore"])
    return small


def said(capsys, folder, change, command):
    code, problems = outcome_of(folder, change, command)
    told = capsys.readouterr()
    assert problems == [], (change.name, command)
    assert "Traceback" not in told.out + told.err, (change.name, command)
    if code:
        lines = [line for line in told.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, (change.name, command, told.err[-500:])
    return code, told.out + told.err


@pytest.mark.parametrize("share", range(SHARES))
def test_a_hostile_run_is_read_or_refused_and_nothing_else_happens(folder, capsys, share):
    every = list(changes(folder / "original"))
    assert len(every) > 5000
    for i, change in enumerate(random.Random(f"strangers {share}").sample(every, CASES // SHARES)):
        said(capsys, folder, change, CHEAP[i % len(CHEAP)])
    said(capsys, folder, random.Random(f"dear {share}").choice(every), DEAR[share])


def test_what_is_not_harmed_is_read(folder, capsys):
    nothing = Change("nothing", lambda run: None)
    assert [said(capsys, folder, nothing, command)[0] for command in ("status", "show", "verify", "export")] == [0] * 4


def link(name):
    def make(run):
        target = run.parent / "victim" / "moved"
        if (run / name).exists():
            (run / name).rename(target)
        else:
            target.write_text("here")
        (run / name).symlink_to(target)

    return Change(f"{name} is a link", make)


def field(name, at, value):
    return Change(f"{name} {at} = {value!r}", set_field(f"{name}/zarr.json".lstrip("/"), tuple(at.split(".")), value))


CODES = {
    # what would reach beyond the run: it is not touched, and the unit is made anew
    ("run --trust", field(UNIT, "attributes.damaged", [VICTIM])): (0, "no array of a unit"),
    # what would be written to or deleted through a link is not
    ("run --trust", link(WAITING)): (1, "symbolic link"),
    ("run --trust", link("units")): (1, "symbolic link"),
    ("run", link(".lock")): (1, "symbolic link"),
    ("status", link(UNIT)): (1, "symbolic link"),
    ("verify", link("images")): (1, "symbolic link"),
    # without a list of its units, a run has those that are there
    ("show", Change("no list of units", set_field("zarr.json", ("attributes", "stiffcore", "units"), KeyError))): (
        0,
        "2 layer1.1",
    ),
    # one bad unit is named, and the others go on
    ("status", field(UNIT, "attributes.stage", 5)): (1, "stage: Input should be"),
    ("show", field(UNIT, "attributes.n", 1e30)): (1, "n: Input should be a valid integer"),
    ("show", field(UNIT, "attributes.k", -5)): (1, "k: Input should be greater than or equal to 0"),
    ("status", field(UNIT, "attributes.image", 99)): (1, f"{UNIT}"),
    ("export", field(UNIT, "attributes.certificate", [])): (1, "certificate: Input should be"),
    ("status", field(UNIT, "attributes.plan.solver", "magic")): (1, "plan.solver: Input should be"),
    ("verify", field(UNIT, "attributes.plan", None)): (1, "plan: not there"),
    ("status", field(UNIT, "attributes.block", DEEP)): (1, "nested too deeply"),
    # declared sizes
    ("show", field("images/loss", "shape", [10**11])): (1, "numbers are not there"),
    ("verify", field(f"{UNIT}/histogram", "chunk_grid.configuration.chunk_shape", [10**12])): (1, "declare"),
    ("verify", field(f"{UNIT}/histogram", "codecs", [{"name": "gzip"}])): (1, "codecs: not those of a run"),
    ("status", field("", "attributes.stiffcore", DEEP)): (2, "nested too deeply"),
}


@pytest.mark.parametrize("case", CODES, ids=lambda case: f"{case[0]}: {case[1].name[:60]}")
def test_each_kind_of_hostile_run_has_its_own_error(folder, capsys, case):
    code, text = said(capsys, folder, case[1], case[0])
    assert (code, CODES[case][1] in " ".join(text.split())) == (CODES[case][0], True), text[-1500:]


def test_a_run_without_a_unit_is_read(folder, capsys):
    def none(run):
        set_field("zarr.json", ("attributes", "stiffcore", "units"), [])(run)
        for unit in (run / "units").iterdir():
            if unit.is_dir():
                shutil.rmtree(unit)

    for command in ("status", "show", "export", "report", "verify", "compare"):
        said(capsys, folder, Change("no unit", none), command)


def test_a_holder_of_the_wrong_types_holds_nothing(folder, capsys):
    for value in ("5", [], 1e300, -1, None):
        text = json.dumps({"pid": value, "host": "here", "since": 1.0, "heartbeat": 1.0, "token": "t"})
        change = Change(f"pid {value!r}", lambda run, text=text: (run / "holder.json").write_text(text))
        assert said(capsys, folder, change, "status")[0] == 0


def test_every_operation_of_zarrs_store_goes_through_the_one_place():
    """Those that a later version of zarr adds, too."""
    place = type(open_folder(Path("/nowhere")))
    operations = inspect.getmembers(LocalStore, inspect.isfunction)
    takes = {name: {*inspect.signature(method).parameters} for name, method in operations if not name.startswith("_")}
    reach = [name for name in takes if {"key", "prefix", "key_ranges", "dest_root"} & takes[name]]
    assert {"get", "get_sync", "set", "delete", "delete_dir", "list_dir", "list_prefix", "exists"} <= set(reach)
    # these go by the ones above
    assert [n for n in reach if n not in vars(place)] == ["getsize_prefix", "is_empty"]


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "a//x", "a/./x", "", "a\\..\\x", "a\0"])
def test_a_name_that_leaves_the_run_is_refused_by_every_store(tmp_path, name):
    from zarr.core.sync import sync

    from stiffcore.store.remote import open_store

    for url in (str(tmp_path), f"file://{tmp_path}", "memory://strangers/run"):
        store = open_store(url)
        for work in (store.delete, store.exists):
            if name:
                with pytest.raises(StrangeError):
                    sync(work(name))


def test_what_cannot_be_read_is_said_to_be_so_and_not_taken_for_damage(folder):
    """Its permissions may come back: it is not made anew, and nothing of it is deleted."""
    root = Path(__file__).parents[2]
    found = subprocess.run(
        [sys.executable, root / "tests/programs/unreadable.py", folder],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(root)},
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    refused = 0
    for path, command, code, said, told, problems in json.loads(found.stdout):
        case, lines = (path, command, said, told), told.splitlines()
        assert problems == [], case
        assert "Traceback" not in said + told, case
        assert sum(line.startswith("error: ") for line in lines) == (code != 0), case
        if code:
            assert "cannot be read" in said + told or "Permission denied" in told, case
            assert "makes just these anew" not in told, case
            refused += 1
    assert refused > 40
