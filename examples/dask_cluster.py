"""A run on a Dask cluster: its workers take the units of a run, and a picture of when each unit ran.

The cluster here is `dask.distributed.LocalCluster`, two worker processes on this machine, as a stand-in for
`dask_jobqueue.SLURMCluster` or `dask scheduler` with workers elsewhere: stiffcore knows of it only the scheduler's
address. Workers import the network by its name, so that the module must lie where they find it, and the run's folder
must be one that all of them see. `memory` is what each worker may hold.

`on_event` tells of every step of every unit. A unit that is "begun" is with the scheduler; a worker has it from its
next event on, and it has "ended" when the scheduler has it back. Read more: docs.dask.org, "Deploy Dask Clusters".
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import torch
from dask.distributed import LocalCluster
from torch import nn
from torchvision.models.resnet import BasicBlock

import stiffcore

DEPTH, CHANNELS, SIZE = 4, 6, 8


def factory():
    return nn.Sequential(*(BasicBlock(CHANNELS, CHANNELS) for _ in range(DEPTH)), nn.Flatten())


def main(to, quick):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1 if quick else 2, CHANNELS, SIZE, SIZE, generator=generator)
    seen = {}

    def note(event):
        # of each unit: when each stage was first told of
        seen.setdefault(event.unit, {}).setdefault(getattr(event, "stage", event.kind), time.perf_counter())

    with (
        TemporaryDirectory() as folder,
        LocalCluster(n_workers=2, threads_per_worker=1, memory_limit="3GiB", dashboard_address=None) as cluster,
    ):
        print(f"scheduler at {cluster.scheduler_address}, {len(cluster.workers)} workers")
        run = stiffcore.analyze(
            f"{Path(__file__).stem}:factory",
            x,
            run=f"{folder}/run",
            memory="2GiB",
            scheduler=cluster.scheduler_address,
            on_event=note,
        )
        table = run.metrics()
    print(table[["image", "block", "n", "k", "S_active", "state", "certified"]].to_string(index=False))

    spans = {}
    for unit, stages in seen.items():
        if "ended" in stages:
            spans[unit] = (min(at for stage, at in stages.items() if stage != "begun"), stages["ended"])
    origin = min(start for start, _ in spans.values())
    figure, axis = plt.subplots(figsize=(8, 0.4 * len(spans) + 1.2), layout="constrained")
    for row, (unit, (start, end)) in enumerate(sorted(spans.items(), key=lambda item: item[1])):
        axis.barh(row, end - start, left=start - origin, color="tab:blue")
        axis.text(start - origin, row, f" {unit}", va="center", fontsize="small", color="white")
    busy = sum(end - start for start, end in spans.values())
    whole = max(end for _, end in spans.values()) - origin
    print(f"{len(spans)} units in {whole:.1f} s: {busy / whole:.2f} at a time, on average")
    axis.set(xlabel="seconds", yticks=[], title="when each unit ran, by its events")
    figure.savefig(to, dpi=120)


# workers are started by importing this file again
if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", default="dask_cluster.png", help="the picture")
    parser.add_argument("--quick", action="store_true", help="one image, not two")
    main(**vars(parser.parse_args()))
