"""Claims about bench/device.sh, with a stand-in for Python: a step that fails or hangs loses nothing."""

import json
import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
STAND_IN = r"""#!/usr/bin/env bash
results=bench/results
case "$*" in
    *rates.py*) echo '{"figures": 1}' > $results/rates-cuda.json ;;
    *pytest*)
        echo '[gw0] [ 20%] PASSED tests/test_a.py::test_one '
        echo '[gw1] [ 40%] PASSED tests/test_a.py::test_two '
        echo '[gw0] [ 60%] FAILED tests/test_a.py::test_three '
        echo '[gw3] [100%] SKIPPED tests/test_a.py::test_four '
        exit 1 ;;
    *by_hand.py*) echo '{"figures": 2}' > $results/by_hand-cuda.json; [ -z "$HANGS" ] || { sleep 60 & sleep 60; } ;;
    *cost.py*) head -c 17000000 /dev/zero > $results/cost-cuda.json ;;
    *slices.py*) echo "no kernel image" >&2; exit 3 ;;
    *divide_device.py*) echo '{"figures": 3}' > $results/divide_device-cuda.json ;;
esac
"""


def carried_out(folder, limit, hangs):
    """The script in a folder of its own, with seconds in all: the steps by name, and the names of what it left."""
    (folder / "bench" / "results").mkdir(parents=True)
    script = shutil.copy(ROOT / "bench" / "device.sh", folder / "bench")
    python = folder / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "LIMIT": str(limit), "HANGS": hangs}
    done = subprocess.run([script, folder / "out"], env=environment, capture_output=True, timeout=120, check=False)
    assert done.returncode == 1  # not all is well
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert summary["limit"] == limit >= summary["seconds"]
    return {step["step"]: step for step in summary["steps"]}, {path.name for path in (folder / "out").iterdir()}


def test_the_limits_of_all_steps_are_eight_minutes():
    script = (ROOT / "bench" / "device.sh").read_text()
    limits = [int(line.split()[2]) for line in script.splitlines() if line.startswith("step ")]
    assert len(limits) == 6
    assert sum(limits) + 8 <= 480


def test_a_step_that_fails_or_writes_too_much_loses_nothing(tmp_path):
    steps, left = carried_out(tmp_path, 300, "")
    states = {name: step["state"] for name, step in steps.items()}
    assert states.pop("tests") == states.pop("slices") == "failed"
    assert states.pop("cost") == "done, too large"
    assert states == dict.fromkeys(("rates", "by_hand", "divide_device"), "done")
    assert [steps["tests"][what] for what in ("passed", "failed", "skipped")] == [2, 1, 1]
    assert left == {"summary.json", "log.txt", "rates.json", "by_hand.json", "divide_device.json"}
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "test_three" in log
    assert "no kernel image" in log


def test_a_step_that_hangs_is_ended_and_what_it_wrote_is_kept(tmp_path):
    steps, left = carried_out(tmp_path, 14, "yes")
    assert [step["state"] for step in steps.values()] == ["done", "failed", "out of time", *["left out"] * 3]
    assert left == {"summary.json", "log.txt", "rates.json", "by_hand.json"}


def test_a_dry_run_says_what_it_would_do(tmp_path):
    command = [ROOT / "bench" / "device.sh", "--dry", tmp_path]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(said) == 6
    for line in said:  # each is there, and has what it is told
        words = line.split(": python ")[1].split()
        if words[0] != "-m":
            source = (ROOT / words[0]).read_text()
            assert all(f'"{word}"' in source + COMMON for word in words[1:] if word.startswith("--"))


COMMON = (ROOT / "bench" / "common.py").read_text()
