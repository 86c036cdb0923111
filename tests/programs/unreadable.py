"""Commands on a run some of whose files and folders cannot be read: python unreadable.py FOLDER.

FOLDER has `original`, a run, and is the current folder. As JSON, for each case: the path, the command, its exit code,
what it wrote as output and as errors, and what may not have happened, or is gone.
"""

import contextlib
import ctypes
import io
import json
import os
import sys
from pathlib import Path

# Root reads everything, by CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH. A thread has its own: before others start.
DROPPED = 1 << 1 | 1 << 2
VERSION = 0x20080522
COMMANDS = ("status", "show", "verify", "export", "run --trust")
UNIT = "units/000000-layer1.1-block-matrix"
# A folder and a file of each sort that a run has.
PATHS = [
    *(".", ".lock", "zarr.json", "units", "units/zarr.json", "images", "images/loss/c", "images/loss/c/0"),
    *(UNIT, f"{UNIT}/zarr.json", f"{UNIT}/histogram", f"{UNIT}/histogram/c", f"{UNIT}/histogram_edges/zarr.json"),
]


def drop() -> None:
    """Read as any other user does."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(VERSION, 0), (ctypes.c_uint32 * 6)()
    for change in (libc.capget, libc.capset):
        if change(header, sets):
            raise OSError(ctypes.get_errno(), "capabilities")
        for at in range(3):
            sets[at] &= ~DROPPED


def main() -> None:
    if os.geteuid() == 0:
        drop()
    from stiffcore.commands import working
    from tests.strangers import hostile

    working.workers_at = hostile.here
    folder = Path(sys.argv[1])
    whole, answers = hostile.snapshot(folder / "original"), []
    for path in PATHS:
        (folder / "original" / path).chmod(0o700)
        change = hostile.Change(path, lambda run, path=path: (run / path).chmod(0))
        for command in COMMANDS:
            said, told = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(told):
                code, problems = hostile.outcome_of(folder, change, command)
            (folder / "run" / path).chmod(0o700)
            lost = [name for name in whole if not Path(name.replace("/original", "/run", 1)).exists()]
            answers.append([path, command, code, said.getvalue(), told.getvalue(), problems + lost])
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
