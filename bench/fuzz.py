"""Hostile runs by the thousand: every field and path of a run that a stranger changed, by every command.

    python bench/fuzz.py [--cases 10000] [--seed 0] [--run metrics-half]

Each case is one change (tests/strangers/hostile.py) to a copy of a stored run, and one command on it, in this process.
It ends with how many cases ended with which exit code, and 1 where anything happened that may not: a traceback, an
import, a socket, a change outside of the run, or no error where the exit code says one.
"""

import argparse
import contextlib
import io
import os
import random
import shutil
import sys
import time
import warnings
import zipfile
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
# A case of those that start to compute takes seconds: each is taken so many times less often.
DEAR = {"plan": 10, "run --trust": 40, "report": 5, "picture": 20}


def main(cases, seed, name):
    from stiffcore.commands import working
    from tests.runs import PROGRAMS
    from tests.strangers import hostile

    working.workers_at = hostile.here
    draw, codes, bad = random.Random(seed), Counter(), []
    commands = [command for command in hostile.COMMANDS for _ in range(40 // DEAR.get(command, 1))]
    with TemporaryDirectory() as temporary, zipfile.ZipFile(ROOT / "tests/data/runs-of-0.1.0.zip") as runs:
        folder = Path(temporary)
        shutil.copy(PROGRAMS / "smallnet.py", folder)
        (folder / "evil.py").write_text("raise SystemError('imported')")
        runs.extractall(folder, [member for member in runs.namelist() if member.startswith(f"{name}/")])
        (folder / name).rename(folder / "original")
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        every, begun = list(hostile.changes(folder / "original")), time.monotonic()
        for _ in range(cases):
            change, command = draw.choice(every), draw.choice(commands)
            said = io.StringIO()
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
                code, problems = hostile.outcome_of(folder, change, command)
            if code and "error: " not in said.getvalue():
                problems = [*problems, f"exit code {code} without an error"]
            codes[f"{command}: {code}"] += 1
            if problems:
                bad.append((command, change.name, problems))
                print("MAY NOT BE:", *bad[-1], flush=True)
        print(f"{cases} of {len(every)} changes, {time.monotonic() - begun:.0f} s, {len(bad)} may not be")
    print("\n".join(f"  {what} x {number}" for what, number in sorted(codes.items())))
    return 1 if bad else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", default="metrics-half", help="one of tests/data/runs-of-0.1.0.zip")
    asked = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    warnings.simplefilter("ignore")
    sys.exit(main(asked.cases, asked.seed, asked.run))
