"""Hostile runs by the thousand: every field and path of a run that a stranger changed, by every command.

Each case is one change (`tests/strangers/hostile.py`) to a copy of a stored run, of every kind of run that there is,
and one command on it, in this process. There must be none with a traceback, an import, a socket, a change outside of
the run, or no error where the exit code says one. It goes on from what is there of the same sources (in `store/`), so
it can be killed and be run many times at once; the last one writes the figures. `--cases 20000` says when it is enough,
`--quick` is 200.
"""

import contextlib
import io
import os
import random
import shutil
import sys
import warnings
import zipfile
from collections import Counter, defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

from common import QUICK, Drawn, write

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from stiffcore.commands import working  # noqa: E402
from tests.runs import PROGRAMS  # noqa: E402
from tests.strangers import hostile  # noqa: E402

CASES = int(sys.argv[sys.argv.index("--cases") + 1]) if "--cases" in sys.argv else 200 if QUICK else 20_000
STORED = ROOT / "tests/data/runs-of-0.1.0.zip"
BATCH = 50  # cases of a seed
# What starts to compute takes seconds: each is drawn so many times less often.
DEAR = {"plan": 10, "run --trust": 40, "report": 5, "picture": 20}
COMMANDS = [command for command in hostile.COMMANDS for _ in range(40 // DEAR.get(command, 1))]


def attacked(seed: int) -> dict:
    """What the cases of a seed ended with: exit codes by command, and what may not be."""
    draw, ended, bad = random.Random(seed), defaultdict(Counter), []
    with TemporaryDirectory() as temporary, zipfile.ZipFile(STORED) as runs:
        folder = Path(temporary)
        shutil.copy(PROGRAMS / "smallnet.py", folder)
        (folder / "evil.py").write_text("raise SystemError('imported')")
        name = draw.choice(sorted({member.split("/")[0] for member in runs.namelist()}))
        runs.extractall(folder, [member for member in runs.namelist() if member.startswith(f"{name}/")])
        (folder / name).rename(folder / "original")
        every, before = list(hostile.changes(folder / "original")), Path.cwd()
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        try:
            for _ in range(BATCH):
                change, command = draw.choice(every), draw.choice(COMMANDS)
                said = io.StringIO()
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
                    code, problems = hostile.outcome_of(folder, change, command)
                if code and "error: " not in said.getvalue():
                    problems = [*problems, f"exit code {code} without an error"]
                ended[command][str(code)] += 1
                for problem in problems:
                    bad.append(f"{name}: {change.name}: {command}: {problem}")
                    print("MAY NOT BE:", bad[-1], flush=True)
        finally:
            os.chdir(before)
            sys.path.remove(str(folder))
    return {"run": name, "changes": len(every), "cases": BATCH, "ended": ended, "bad": bad}


def figures(parts: list[dict]) -> dict:
    """Sums over all seeds."""
    ended: dict[str, Counter] = {command: Counter() for command in hostile.COMMANDS}
    for part in parts:
        for command, codes in part["ended"].items():
            ended[command].update(codes)
    return {
        "cases": sum(part["cases"] for part in parts),
        "changes": {part["run"]: part["changes"] for part in sorted(parts, key=lambda part: part["run"])},
        "cpu_s": sum(part["cpu_s"] for part in parts),
        "ended": ended,
        "bad": [line for part in parts for line in part["bad"]],
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    working.workers_at = hostile.here
    arguments = sys.argv[:]
    drawn = Drawn("fuzz", attacked, hostile.__file__, __file__)
    drawn.until(CASES, lambda part: part["cases"], 1 if QUICK else 10)
    sys.argv[:] = arguments  # which are those of the last command
    found = figures(drawn.all())
    write(__file__, found)
    assert not found["bad"], f"{len(found['bad'])} may not be, of which {found['bad'][:20]}"
