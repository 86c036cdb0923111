"""Run every benchmark, one after the other, then make the page: `python bench/all.py`, minutes with `--quick`.

Options are handed on: `--quick` (the smallest of each, into bench/results/quick, not on the page), `--device cuda`.
"""

import subprocess
import sys
import time

from common import HERE, QUICK
from page import SECTIONS

# Left out of the quick mode: the long ones, and what is made of them.
SLOW = ("builds", "divide", "divide_cases", "divide_costs", "extremes", "imagenet_extremes", "imagenet_plan")
SLOW += ("divide_workers", "fuzz", "slices", "slicing", "unreduced", "workers")

ON_DEVICE = ("by_hand", "cost", "rates", "stages")

if __name__ == "__main__":
    failed = []
    for name in SECTIONS:
        if QUICK and name in SLOW:
            continue
        if "--device" in sys.argv and name not in ON_DEVICE:
            continue
        start = time.perf_counter()
        code = subprocess.run(
            [sys.executable, HERE / f"{name}.py", *sys.argv[1:]], stdout=subprocess.DEVNULL
        ).returncode
        print(f"{name}: {'failed' if code else 'done'} in {time.perf_counter() - start:.0f} s", flush=True)
        failed += [name] if code else []
    if not QUICK:
        subprocess.run([sys.executable, HERE / "page.py"], check=True)
    raise SystemExit(f"failed: {', '.join(failed)}" if failed else 0)
