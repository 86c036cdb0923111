"""Margins of the study's images: the largest logit less the second, of each network at each image.

python docs/study_margins.py cifar10_test_2000.npz IMAGES WEIGHTS ...

Writes docs/data/margins-NAME.csv for each file of weights, NAME.safetensors or NAME_cifar10.safetensors; the network is
what stands before the first hyphen of NAME (resnet20 of resnet20-100000). The study's: resnet18, resnet34 and
resnet50 at 1,000 images; resnet20-100000 at 500.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from stiffcore.networks.zoo import load_network

MEAN, DEVIATION = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2471, 0.2435, 0.2616])
BATCH = 50


def margins(network, weights, x, y):
    """One row an image: margin of the classification, whatever the label; margin of the label; loss."""
    module = load_network(network, weights, dtype=torch.float32).module
    x = torch.from_numpy((x / 255.0 - MEAN) / DEVIATION).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        logits = torch.cat([module(part) for part in x.split(BATCH)])
    labels = torch.from_numpy(y.astype(np.int64))
    first, second = logits.topk(2, dim=1).values.T
    own = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], -torch.inf).max(dim=1).values
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    columns = {"margin": first - second, "margin_of_label": own - others, "loss": loss}
    found = pd.DataFrame({name: values.numpy() for name, values in columns.items()})
    return found.assign(image_index=range(len(found)))[["image_index", *columns]]


if __name__ == "__main__":
    images, count = np.load(sys.argv[1]), int(sys.argv[2])
    x, y = images["x"][:count], images["y"][:count]
    for weights in map(Path, sys.argv[3:]):
        name = weights.stem.removesuffix("_cifar10")
        rows = margins(name.split("-")[0], weights, x, y)
        rows.to_csv(Path(__file__).parent / "data" / f"margins-{name}.csv", index=False, float_format="%.6g")
