"""A run is data: what a stranger's names is not imported, and not fetched, without a word of the user's own."""

import os
import pty
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

import stiffcore
from stiffcore.cluster import InProcess
from stiffcore.errors import UntrustedError
from stiffcore.record import Stage
from stiffcore.session import prepare
from stiffcore.store import RunStore
from stiffcore.trust import module_file
from stiffcore.verify import verify
from tests.runs import OPTIONS, execute

ONE = OPTIONS | {"blocks": "4", "functions": "block"}
EVIL = """
from pathlib import Path
Path("acted").touch()
from smallnet import make
"""


def renamed(url, **study):
    """The run with another study, sealed as any program can seal it."""
    store = RunStore(str(url))
    store.header = replace(store.header, study=store.header.study.model_copy(update=study))


@pytest.fixture
def strange(small):
    """A finished run, and one to go on with, both of which name `evil:make` for their network."""
    (small / "evil.py").write_text(EVIL)
    for name in ("done", "begun"):
        execute(small / name, ONE)
        renamed(small / name, network="evil:make")
    store = RunStore(str(small / "begun"))
    store.update(next(iter(store.units())), stage=Stage.PLANNED)
    store.drop(next(iter(store.units())), "eigenvalues")
    return small


def command(*args, cwd, **kwargs):
    program = [sys.executable, "-c", "from stiffcore.cli import main; main()", *map(str, args)]
    return subprocess.run(program, cwd=cwd, capture_output=True, text=True, check=False, timeout=300, **kwargs)


COMMANDS = [
    ("run", "begun"),
    ("verify", "done", "--certificates"),
    ("picture", "done", "--block", "4"),
]


@pytest.mark.parametrize("args", COMMANDS, ids=" ".join)
def test_code_that_a_run_names_is_not_imported_unless_trusted(strange, args):
    found = command(*args, cwd=strange)
    assert found.returncode == 2, found.stderr
    assert str(strange / "evil.py") in found.stderr
    assert "--trust" in found.stderr
    assert "Traceback" not in found.stderr
    assert not (strange / "acted").exists()


def test_from_python_code_is_not_imported_unless_trusted(strange):
    done, calls = stiffcore.open_run(strange / "done"), []
    for act in (
        lambda **trust: prepare(str(strange / "begun"), {}, InProcess(calls.append), **trust),
        # this one looks at network and images again
        lambda **trust: prepare(str(strange / "begun"), {"blocks": "4"}, InProcess(calls.append), **trust),
        lambda **trust: verify(done, certificates=True, **trust),
        lambda **trust: done.picture(block="4", **trust),
        lambda **trust: done.count_left(0.5, block="4", **trust),
    ):
        with pytest.raises(UntrustedError, match=r"evil\.py"):
            act()
        with pytest.raises(UntrustedError):
            act(trust=False)
    assert not (strange / "acted").exists()
    assert "evil" not in sys.modules
    assert done.count_left(0.5, block="4", trust=True) == done.count_left(0.5, block="4", trust=True)
    assert (strange / "acted").exists()
    sys.modules.pop("evil")


def test_what_only_reads_asks_for_no_trust(strange):
    run = stiffcore.open_run(strange / "done")
    assert len(run.metrics()) == 1
    assert verify(run).findings == []
    # nothing is left to do: nothing is imported
    prepared = prepare(str(strange / "done"), {}, InProcess(print))
    assert not any(unit.works for unit in prepared.plan.units)
    assert not (strange / "acted").exists()


def test_a_word_of_the_user_is_enough(small):
    execute(small / "run", ONE)
    store = RunStore(str(small / "run"))
    store.update(next(iter(store.units())), stage=Stage.PLANNED)
    assert prepare(str(small / "run"), {"network": "smallnet:make"}, InProcess(print)).plan.units
    with pytest.raises(UntrustedError, match=r"smallnet\.py"):
        prepare(str(small / "run"), {}, InProcess(print))
    found = command("run", "run", "--trust", cwd=small)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("answer", ["n", "y"])
def test_at_a_terminal_the_question_is_asked(strange, answer):
    master, terminal = pty.openpty()
    program = [sys.executable, "-c", "from stiffcore.cli import main; main()", "picture", "done", "--block", "4"]
    process = subprocess.Popen(program, cwd=strange, stdin=terminal, stdout=subprocess.PIPE, stderr=terminal)
    os.close(terminal)
    os.write(master, f"{answer}\n".encode())
    said = b""
    with suppress(OSError):  # how the end of a terminal reads
        while part := os.read(master, 4096):
            said += part
    os.close(master)
    process.communicate(timeout=120)
    assert b"evil.py" in said
    assert (process.returncode, (strange / "acted").exists()) == ((2, False) if answer == "n" else (0, True)), said


def test_a_module_is_found_without_importing_a_parent(small):
    (small / "pack").mkdir()
    (small / "pack" / "__init__.py").write_text("from pathlib import Path\nPath('acted').touch()\n")
    assert module_file("pack.inner.most") == str(small / "pack" / "__init__.py")
    assert "no module nothing_of_the_kind" in module_file("nothing_of_the_kind")
    assert not (small / "acted").exists()


def test_images_that_a_run_would_fetch_are_not_fetched_unless_asked_for(small, monkeypatch):
    asked = []

    class Cifar:
        base_folder = "cifar-10-batches-py"

        def __init__(self, root, train, download):
            asked.append(download)
            if download:
                Path(root).mkdir(parents=True)
            raise RuntimeError("not found")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Cifar)
    execute(small / "run", ONE)
    renamed(small / "run", images="cifar10", download=True, data_root=str(small / "elsewhere"), network="smallnet:make")
    # damaged images are read again from their source
    next(p for p in (small / "run" / "images" / "x").rglob("*") if p.is_file() and p.name != "zarr.json").unlink()
    given = {"network": "smallnet:make"}
    with pytest.raises(stiffcore.InputError, match="--download"):
        prepare(str(small / "run"), given, InProcess(print))
    assert asked == [False]
    assert not (small / "elsewhere").exists()
    for more in ({"options": given | {"download": True}}, {"options": given, "trust": True}):
        with pytest.raises(stiffcore.InputError, match="the download failed"):
            prepare(str(small / "run"), executor=InProcess(print), **more)
        (small / "elsewhere").rmdir()
    assert asked == [False, True, True]


def test_torchvision_makes_nothing_where_it_may_not_download(tmp_path):
    from torchvision.datasets import CIFAR10

    with pytest.raises(RuntimeError):
        CIFAR10(str(tmp_path / "data"), train=False, download=False)
    assert list(tmp_path.iterdir()) == []


def test_a_header_that_is_changed_meanwhile_names_nothing_that_a_worker_would_import(strange):
    from stiffcore.unit import open_operator

    store = RunStore(str(strange / "done"))
    (record,) = store.units().values()
    with pytest.raises(UntrustedError):
        open_operator(store, record, "cpu", trusted="smallnet:make")
    assert not (strange / "acted").exists()
