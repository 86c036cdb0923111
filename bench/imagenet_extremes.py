"""S and the sign of the spectrum at ImageNet's size within 8 GiB: how long, how much memory, and what can be proved?

The first square block (n = 802,816) of the bundled CIFAR-10 checkpoint, at a test image enlarged to 112 x 112, so that
its layer1 works on 56 x 56 as ImageNet's does: minutes. With `--all`, too, all square blocks of torchvision's ResNet50,
7 x 7 stem, random weights, at a photograph of 224 x 224 pixels: an hour or two. One worker, one core.
"""

import json
import sys
import tempfile

import numpy as np
from common import stiffcore, write
from PIL import Image

from stiffcore import open_run
from stiffcore.networks.images import load_images

COMMON = ["--solver", "extremes", "--memory", "8GiB", "--workers", 1, "--device", "cpu"]


def blocks_of(folder, *options):
    _, seconds = stiffcore("run", folder, *options, *COMMON)
    run = open_run(folder)
    found = []
    for key, row in zip(run.records(), run.metrics().to_dict("records"), strict=True):
        record = run.store.record(key)
        if row["state"] not in ("done", "not certified"):
            continue
        left = record["ends"]["left_of_zero"]
        found.append(
            {name: row[name] for name in ("block", "n", "k", "S_active", "S_active_error", "certified", "note")}
            | {"negative": left["count"], "basis": left["basis"], "margin": left["margin"], "why": left["note"]}
            | {"abscissa": row["abscissa"], "min_re_active": row["min_re_active"], "radius": row["radius"]}
            | {name: record["ends"][name] for name in ("range_left", "range_right")}
            | {"seconds": record["seconds"], "plan": record["plan"]["why"]}
            | {"projected_bytes": max(record["plan"]["stages"].values()), "measured_bytes": record["measured_bytes"]}
        )
    print(json.dumps(found, indent=1), file=sys.stderr, flush=True)
    return {"wall_s": seconds, "blocks": found}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        image = Image.fromarray(load_images("samples").x[0]).resize((112, 112), Image.Resampling.BILINEAR)
        np.savez(f"{folder}/large.npz", x=np.asarray(image)[None], y=load_images("samples").y)
        trained = ["--network", "resnet50", "--images", f"{folder}/large.npz", "--normalize", "cifar10"]
        trained = blocks_of(f"{folder}/trained", *trained, "--blocks", "2")
        figures = {"allowed_bytes": 8 << 30, "trained": trained}
        if "--all" in sys.argv:
            random = ["--network", "torchvision.models:resnet50", "--images", "imagenet-samples"]
            figures["random"] = blocks_of(f"{folder}/random", *random, "--normalize", "imagenet")
    write(__file__, figures)
