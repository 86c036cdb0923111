"""What do S and the sign of the spectrum cost without the spectrum, and are they those of the spectrum?

All square blocks of ResNet18 and ResNet50 at three CIFAR-10 images: solver `extremes`, then every eigenvalue by LAPACK,
one worker on one core each. Seconds and bytes of every block at the first image; the largest relative difference
of S active, and whether the share of negative real parts is the same, over all three.
"""

import json
import tempfile

from common import stiffcore, write

from stiffcore import open_run

IMAGES = 3
COMMON = ["--images", "samples", "--count", IMAGES, "--memory", "6GiB", "--workers", 1, "--device", "cpu"]


def rows(folder, network, solver):
    stiffcore("run", folder, "--network", network, "--solver", solver, *COMMON)
    run = open_run(folder)
    return {row["key"]: row | run.store.record(row["key"]).to_json() for row in keyed(run)}


def keyed(run):
    metrics = run.metrics().to_dict("records")
    return [row | {"key": key} for key, row in zip(run.records(), metrics, strict=True) if row["state"] == "done"]


def compared(ends, full):
    # a small matrix is solved whole
    seconds = {"build": ends["seconds"]["built"], "ends": ends["seconds"]["solved"]}
    seconds["ends"] += ends["seconds"].get("reduced", 0.0)
    seconds |= {"counts": ends["seconds"].get("counted", 0.0), "certificate": ends["seconds"]["done"]}
    solve = full["seconds"]["reduced"] + full["seconds"]["solved"]
    return {
        "block": ends["block"],
        "n": ends["n"],
        "k": ends["k"],
        "seconds": seconds,
        "dense_solve_s": solve,
        "ratio": solve / (seconds["ends"] + seconds["counts"]),
        "measured_bytes": ends["measured_bytes"],
        "dense_measured_bytes": full["measured_bytes"],
        "S_active": ends["S_active"],
        "basis": ends["basis"],
    }


if __name__ == "__main__":
    figures = {}
    for network in ("resnet50", "resnet18"):
        with tempfile.TemporaryDirectory() as folder:
            ends = rows(f"{folder}/ends", network, "extremes")
            full = rows(f"{folder}/full", network, "host-dense")
        assert ends.keys() == full.keys()
        claimed = [key for key in ends if ends[key]["negative"] == ends[key]["negative"]]
        figures[network] = {
            "units": len(ends),
            "largest_relative_difference_of_S_active": max(
                abs(ends[key]["S_active"] - full[key]["S_active"]) / abs(full[key]["S_active"]) for key in ends
            ),
            "negative_share_claimed": len(claimed),
            "of_these_equal": sum(ends[key]["negative"] == full[key]["negative"] for key in claimed),
            "blocks": [compared(ends[key], full[key]) for key in ends if ends[key]["image"] == 0],
        }
        print(json.dumps(figures[network], indent=1), flush=True)
    write(__file__, figures)
