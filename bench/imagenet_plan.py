"""What would all blocks of a ResNet50 at 224 x 224 take, under 16 GiB of host memory and a device of 80 GB?

Weights as torchvision draws them, and a smooth random image: the plan depends on the share of active units, no more.
"""

import json
import tempfile

import numpy as np
from common import stiffcore, write

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        coarse = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3))
        image = np.kron(coarse, np.ones((1, 28, 28, 1))).astype(np.uint8)
        np.savez(f"{folder}/image.npz", x=image, y=np.zeros(1, int))
        options = ["--network", "torchvision.models:resnet50", "--images", f"{folder}/image.npz"]
        options += ["--normalize", "imagenet", "--memory", "16GiB", "--device-memory", "80GB", "--json"]
        printed, seconds = stiffcore("plan", f"{folder}/run", *options)
        found = json.loads(printed)
        names = ("block", "n", "m", "k", "nonzeros", "products", "solver", "projected_bytes", "device_bytes")
        names += ("disk_bytes", "moved_bytes", "flops", "seconds", "why")
        units = sorted(found.pop("units"), key=lambda u: u["number"])
        figures = {"wall_s": seconds, **found}
        write(__file__, figures | {"units": [{name: unit[name] for name in names} for unit in units]})
