"""Margins of the study's images: the largest logit less the second, of each network at each image.

python docs/study_margins.py FOLDER_OF_WEIGHTS cifar10_test_2000.npz IMAGES

Writes docs/data/margins-NETWORK.csv for ResNet18, 34 and 50, with weights NETWORK_cifar10.safetensors of the folder.
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
    folder, images, count = Path(sys.argv[1]), np.load(sys.argv[2]), int(sys.argv[3])
    x, y = images["x"][:count], images["y"][:count]
    for network in ("resnet18", "resnet34", "resnet50"):
        rows = margins(network, folder / f"{network}_cifar10.safetensors", x, y)
        rows.to_csv(Path(__file__).parent / "data" / f"margins-{network}.csv", index=False, float_format="%.6g")
