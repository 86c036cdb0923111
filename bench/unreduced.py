"""Can the unreduced Jacobian of ResNet18's block 2 (16,384 x 16,384, 2 GiB) be built and stored within 1 GiB?"""

import tempfile
import time
from pathlib import Path

from common import write

from stiffcore import analyze
from stiffcore.memory import PeakMeter
from stiffcore.store import TiledMatrix

OPTIONS = {"network": "resnet18", "images": "samples", "blocks": "2", "reduce": "none", "solver": "matrix-only"}

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        # in this process: a scheduler and a worker of their own would hold most of the 1 GiB
        with PeakMeter() as meter:
            run = analyze(run=f"{folder}/run", memory="1GiB", device="cpu", **OPTIONS)
        seconds = time.perf_counter() - start
        [(key, record)] = [(key, r.to_json()) for key, r in run.records().items()]
        matrix = TiledMatrix(run.store.unit_group(key), "matrix")
        tiles = -(-record["k"] // matrix.tile) * matrix.shards
        write(
            __file__,
            {
                "order": record["k"],
                "allowed_bytes": 1 << 30,
                "peak_bytes": meter.peak_bytes,
                "projected_bytes": max(record["plan"]["stages"].values()),
                "measured_bytes": record["measured_bytes"],
                "wall_s": seconds,
                "dense_bytes": 8 * record["k"] ** 2,
                "stored_bytes": sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file()),
                "tiles": tiles,
                "stored_tiles": matrix.stored_tiles(),
            },
        )
