"""S and the sign of the spectrum at ImageNet's size within 8 GiB: how long, how much memory, and what can be proved?

The first square block (n = 802,816) of the bundled CIFAR-10 checkpoint, at a test image enlarged to 112 x 112, so that
its layer1 works on 56 x 56 as ImageNet's does: minutes. With `--all`, too, all square blocks of torchvision's ResNet50,
7 x 7 stem, random weights, at a photograph of 224 x 224 pixels: minutes each. There the eigenvalues fill a disc that
reaches beyond 0. Where those beyond are few (layer4), they are counted; elsewhere the count is open, and how many
Arnoldi saw is said, unless no more vectors fit than show a few (layer1.2). One worker, one core. Each block is a run of
its own in store/imagenet-extremes: figures are written after each, and blocks that stand in them already are not run
again. (Of random weights, layer1.2 and layer4.1 are of commit 9743db4, layer2.2 of 4eb1cf3; the other ends of 5769af8,
with up to 200 restarts of the smaller spaces, and counts of b77ee83. The other core was busy all the time. The plan
allows for 160 vectors more since.)
"""

import json
import os
import sys
import time

import numpy as np
from common import HERE, RESULTS, stiffcore, write
from PIL import Image

from stiffcore import open_run
from stiffcore.networks.images import load_images

COMMON = ["--solver", "extremes", "--memory", "8GiB", "--workers", 1, "--device", "cpu"]
STORE = HERE.parent / "store" / "imagenet-extremes"
# The square blocks of a ResNet50, cheap ones first.
SQUARE = [16, 15, 13, 12, 11, 10, 9, 7, 6, 5, 3, 2]


def figures_of(folder):
    """What a run of one block says."""
    run = open_run(folder)
    (record,) = [r.to_json() for r in run.records().values()]
    (row,) = run.metrics().to_dict("records")
    left = record["ends"]["left_of_zero"]
    return (
        {name: row[name] for name in ("number", "block", "n", "k", "S_active", "S_active_error", "certified", "note")}
        | {"negative": left["count"], "basis": left["basis"], "margin": left["margin"], "why": left["note"]}
        | {"abscissa": row["abscissa"], "min_re_active": row["min_re_active"], "radius": row["radius"]}
        | {name: record["ends"][name] for name in ("range_left", "range_right")}
        | {"seconds": record["seconds"], "plan": record["plan"]["why"]}
        | {"projected_bytes": max(record["plan"]["stages"].values()), "measured_bytes": record["measured_bytes"]}
        # of the run, which may have been made before
        | {"date": time.strftime("%Y-%m-%d", time.localtime((folder / "zarr.json").stat().st_mtime))}
        | {"cores": len(os.sched_getaffinity(0))}
    )


if __name__ == "__main__":
    STORE.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(load_images("samples").x[0]).resize((112, 112), Image.Resampling.BILINEAR)
    np.savez(STORE / "large.npz", x=np.asarray(image)[None], y=load_images("samples").y)
    trained = ["--network", "resnet50", "--images", STORE / "large.npz", "--normalize", "cifar10"]
    random = ["--network", "torchvision.models:resnet50", "--images", "imagenet-samples", "--normalize", "imagenet"]
    asked = [("trained", trained, 2)]
    if "--all" in sys.argv:
        asked += [("random", random, number) for number in SQUARE]
    known = RESULTS / "imagenet_extremes.json"
    found = json.loads(known.read_text())["figures"] if known.exists() else {}
    figures = {"allowed_bytes": 8 << 30} | {name: found.get(name, []) for name in ("trained", "random")}
    for name, options, number in asked:
        if "--all" in sys.argv and any(b["number"] == number for b in figures[name]):
            continue
        folder = STORE / f"{name}-{number}"
        stiffcore("run", folder, *options, *COMMON, "--blocks", number)
        others = [b for b in figures[name] if b["number"] != number]
        figures[name] = sorted([*others, figures_of(folder)], key=lambda b: b["number"])
        write(__file__, figures)
