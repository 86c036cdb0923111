"""Hundreds of units in one session: the parent's memory stays flat, no file stays open, none is left behind."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

# Notes memory, open files and temporary files of the process that leads the run, at every unit that ends.
LONG = """
import gc, json, os, sys, tempfile
import psutil

def main():
    sys.path.insert(0, {folder!r})
    from contextlib import nullcontext
    from stiffcore.cluster import InProcess, local_workers
    from stiffcore.session import carry_out_plan, prepare
    process, found = psutil.Process(), []

    def on_event(event):
        if event.kind == "ended":
            memory = process.memory_info()
            found.append([memory.rss - memory.shared, process.num_fds(), len(os.listdir(tempfile.gettempdir()))])

    options = {{"network": "smallnet:make", "images": "many.npz", "count": {count}, "functions": "block,branch"}}
    with nullcontext(InProcess(on_event)) if {here} else local_workers(on_event) as executor:
        prepared = prepare("run", options, executor, workers=2)
        outcome = carry_out_plan("run", prepared, executor, on_event)[1]
    assert outcome.failed == {{}}
    print(json.dumps(found))

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("here", [True, False])
def test_the_parent_stays_flat_over_hundreds_of_units(small, here):
    count = 50
    rng = np.random.default_rng(0)
    np.savez(small / "many.npz", x=rng.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8), y=np.zeros(count, int))
    (small / "tmp").mkdir()
    (small / "long.py").write_text(LONG.format(folder=str(small), count=count, here=here))
    environment = {**os.environ, "TMPDIR": str(small / "tmp")}
    program = [sys.executable, "-W", "ignore", "long.py"]
    done = subprocess.run(program, cwd=small, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    memory, handles, temporary = np.array(json.loads(done.stdout)).T
    assert len(memory) == count * 4 * 2
    # from a quarter on, when pools and caches are filled, to the end: 300 units
    quarter = len(memory) // 4
    growth = np.median(memory[-20:]) - np.median(memory[quarter : quarter + 20])
    assert growth < 8 << 20, growth
    assert np.median(handles[-20:]) <= np.median(handles[quarter : quarter + 20])
    assert temporary[quarter:].max() <= temporary[:quarter].max()
    # torch and Dask make folders of their own, and keep locks there
    assert [p for p in (small / "tmp").rglob("*") if p.is_file() and p.suffix != ".lock"] == []
