"""A run that a stranger made cannot act: whatever is in it, a command reads it or ends with one error."""

import random
import zipfile
from pathlib import Path

import pytest

from stiffcore import cli
from tests.strangers.hostile import COMMANDS, Change, changes, here, outcome_of

# Of the thousands that there are; `bench/fuzz.py` takes the others.
CASES = 240


@pytest.fixture
def folder(small, monkeypatch):
    """A folder with a run to be harmed, and an `evil.py` that nobody imports."""
    with zipfile.ZipFile(Path(__file__).parents[1] / "data/runs-of-0.1.0.zip") as runs:
        runs.extractall(small, [name for name in runs.namelist() if name.startswith("metrics-half/")])
    (small / "metrics-half").rename(small / "original")
    (small / "evil.py").write_text("raise SystemError('imported')")
    monkeypatch.setattr(cli, "workers_at", here)
    monkeypatch.setattr("sys.argv", ["stiffcore"])
    return small


def said(capsys, folder, change, command):
    code, problems = outcome_of(folder, change, command)
    told = capsys.readouterr()
    assert problems == [], (change.name, command)
    lines = [line for line in told.err.splitlines() if line.strip()]
    assert "Traceback" not in told.out + told.err, (change.name, command)
    if code:
        assert any(line.startswith("error: ") for line in lines), (change.name, command, told.err[-500:])
    return code, told.out + told.err


@pytest.mark.parametrize("share", range(8))
def test_a_hostile_run_is_read_or_refused_and_nothing_else_happens(folder, capsys, share):
    every = list(changes(folder / "original"))
    assert len(every) > 5000
    commands = [name for name in COMMANDS if name != "picture"]
    chosen = random.Random(f"strangers {share}").sample(every, CASES // 8)
    for i, change in enumerate(chosen):
        said(capsys, folder, change, commands[i % len(commands)])


def test_what_is_not_harmed_is_read(folder, capsys):
    nothing = Change("nothing", lambda run: None)
    assert [said(capsys, folder, nothing, command)[0] for command in ("status", "show", "verify", "export")] == [0] * 4
