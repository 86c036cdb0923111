"""Can the unreduced Jacobian of ResNet18's block 2 (16,384 x 16,384, 2 GiB) be built and stored within 1 GiB?"""

import tempfile
from pathlib import Path

from common import stiffcore, write

from stiffcore.memory import PeakMeter
from stiffcore.run import open_run
from stiffcore.store import TiledMatrix

OPTIONS = ["--network", "resnet18", "--images", "samples", "--blocks", "2", "--reduce", "none"]

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        with PeakMeter() as meter:
            before = meter.peak_bytes
            _, seconds = stiffcore(
                "run", f"{folder}/run", *OPTIONS, "--solver", "matrix-only", "--memory", "1GiB", "--device", "cpu"
            )
        run = open_run(f"{folder}/run")
        [(key, record)] = run.records().items()
        matrix = TiledMatrix(run.store.unit_group(key), "matrix")
        tiles = -(-record["k"] // matrix.tile) * matrix.shards
        write(
            __file__,
            {
                "order": record["k"],
                "allowed_bytes": 1 << 30,
                "peak_bytes": meter.peak_bytes - before,
                "projected_bytes": max(record["plan"]["stages"].values()),
                "measured_bytes": record["measured_bytes"],
                "wall_s": seconds,
                "dense_bytes": 8 * record["k"] ** 2,
                "stored_bytes": sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file()),
                "tiles": tiles,
                "stored_tiles": matrix.stored_tiles(),
            },
        )
