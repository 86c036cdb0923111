"""Runs of the small network of `tests/programs/smallnet.py`, carried out here, by a command, or killed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import stiffcore
from stiffcore.cluster import InProcess
from stiffcore.session import carry_out_plan, prepare

PROGRAMS = Path(__file__).parent / "programs"
OPTIONS = {"network": "smallnet:make", "images": "six.npz", "normalize": "cifar10", "functions": "block,branch"}
KILL_OPTIONS = {"network": "smallnet:make", "images": "six.npz", "blocks": "4"}


def execute(url, options, on_event=lambda event: None):
    """Plan a run and carry it out in this process: the run and its outcome."""
    executor = InProcess(on_event)
    prepared = prepare(str(url), options, executor, trust=True)
    return carry_out_plan(str(url), prepared, executor, on_event)


_MADE = TemporaryDirectory(prefix="stiffcore-tests-")
_FOLDERS: dict[str, Path] = {}


def ready(place, options):
    """A run that is done, at that place: carried out once in a process, and copied for all who ask for the same."""
    asked = json.dumps(options, sort_keys=True)
    if asked in _FOLDERS:
        return Path(shutil.copytree(_FOLDERS[asked], place))
    execute(place, options)
    _FOLDERS[asked] = Path(shutil.copytree(place, Path(_MADE.name) / str(len(_FOLDERS))))
    return Path(place)


def spectra_bytes(url):
    """The eigenvalues and the certificate of every unit, as they are stored."""
    run = stiffcore.open_run(str(url))
    arrays = {k: run.store.get_array(f"units/{k}", "eigenvalues").tobytes() for k in run.records()}
    return arrays, {k: json.dumps(r.certificate.to_json(), sort_keys=True) for k, r in run.records().items()}


def command(*args, cwd, **kwargs):
    """`stiffcore` with these arguments, begun."""
    program = [sys.executable, "-c", "from stiffcore.cli import main; main()", *map(str, args)]
    return subprocess.Popen(program, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def printed(name, asked, cwd):
    """The lines that a program of `tests/programs` prints, once it has ended well."""
    program = [sys.executable, "-W", "ignore", str(PROGRAMS / name), json.dumps(asked)]
    found = subprocess.run(program, cwd=cwd, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return found.stdout.splitlines()


def sessions(small, *asked, cheap=False, **options):
    """Sessions in children, each killed at its `at`-th event (0: not at all).

    Args:
        small: the folder of the network.
        asked: (run, at) of each session, in this order.
        cheap: the solver `extremes` takes small orders too.
        options: of every session, beside `KILL_OPTIONS`.

    Returns:
        The status of each child by (run, at), and the kinds of the events by run, of children that ended well.
    """
    asked = [(str(url), at) for url, at in asked]
    lines = printed("killed.py", {"options": KILL_OPTIONS | options, "sessions": asked, "cheap": cheap}, cwd=small)
    found = [json.loads(line) for line in lines]
    statuses = {(Path(line["url"]), line["at"]): line["status"] for line in found if "status" in line}
    return statuses, {Path(line["url"]): line["kinds"] for line in found if "kinds" in line}


def last_of_each(kinds):
    """The number of the last event of each kind: where a run is killed by default; a slow test takes all."""
    return sorted({kind: at for at, kind in enumerate(kinds, 1)}.values())
