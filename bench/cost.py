"""What does a run cost: build, solve, certificate, memory, disk; and did the plan say so?

Every square block of ResNet18 and ResNet50 (bundled weights), and of ResNet34 with random ones, at one CIFAR-10
image, all eigenvalues, one unit after the other on one core. Seconds by stage and in all against the plan's, the
peak of each unit against what was planned for it, bytes in the store. `--quick`: the last blocks of ResNet18;
`--device cuda`: there; `--networks NAME,NAME`: these alone.
"""

import json
import sys
import tempfile
from pathlib import Path

from common import QUICK, device, stiffcore, write

from stiffcore import open_run

NETWORKS = {"resnet18": [], "resnet50": [], "resnet34": ["--weights", "random"]}
STAGES = ("built", "reduced", "solved", "done")


def blocks_of(network, options, folder):
    common = ["--images", "samples", "--memory", "6GiB", "--workers", 1, "--device", device()]
    asked = ["--blocks", "6,7,8"] if QUICK else []
    _, wall = stiffcore("run", folder, "--network", network, *options, *common, *asked)
    run = open_run(folder)
    found = []
    for key, record in [(key, r.to_json()) for key, r in run.records().items()]:
        if record["plan"]["solver"] == "none":
            continue
        assert record["stage"] == "done", record
        plan, certificate = record["plan"], run.stored(key).certificate
        found.append(
            {name: record[name] for name in ("block", "n", "k", "measured_bytes")}
            | {"planned_device_bytes": plan["device_bytes"]}
            | {"measured_device_bytes": record.get("measured_device_bytes", 0)}
            | {"solver": plan["solver"], "seconds": {s: record["seconds"].get(s, 0.0) for s in STAGES}}
            | {"planned_seconds": plan["seconds"], "planned_bytes": max(plan["stages"].values())}
            | {"planned_disk_bytes": plan["disk_bytes"], "planned_moved_bytes": plan["moved_bytes"]}
            | {"kept_bytes": sum(p.stat().st_size for p in (Path(folder) / "units" / key).rglob("*") if p.is_file())}
            | {"certified": certificate.passed, "error": certificate.error}
        )
    print(json.dumps({network: found}), flush=True)
    return {"wall_s": wall, "blocks": found}


if __name__ == "__main__":
    figures, networks = {}, list(NETWORKS)[: 1 if QUICK else None]
    if "--networks" in sys.argv:
        networks = sys.argv[sys.argv.index("--networks") + 1].split(",")
    for network in networks:
        with tempfile.TemporaryDirectory() as folder:
            figures[network] = blocks_of(network, NETWORKS[network], folder)
        write(__file__, figures)  # what is measured is kept, whatever ends the next
