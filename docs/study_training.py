"""Train a ResNet20 on CIFAR-10 and keep its weights along the way: what the study follows along training.

python docs/study_training.py cifar10_train_jpeg.npz FOLDER

The file holds `jpeg` (all bytes of the JPEG files one after another), `offsets` and labels `y`. Some 20 minutes of one
core. The folder then holds resnet20-IMAGES.safetensors after 0, 5,000, ... images.
"""

import io
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from stiffcore.networks.cifar import CifarResNet

KEPT = (0, 5_000, 20_000, 50_000, 100_000)
BATCH, RATE = 128, 0.1
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


def images(file):
    """All images, (count, 3, 32, 32) float32 normalised, and labels."""
    stored = np.load(file)
    jpeg, offsets = stored["jpeg"], stored["offsets"]
    pixels = [np.asarray(Image.open(io.BytesIO(jpeg[a:b].tobytes()))) for a, b in pairwise(offsets)]
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]
    return x, torch.from_numpy(stored["y"].astype(np.int64))


def batches(x, y, total):
    """Batches of `total` images, shuffled epoch by epoch, half of them mirrored."""
    seen = 0
    while True:
        for part in torch.randperm(len(x)).split(BATCH):
            if seen >= total:
                return
            mirrored = torch.rand(len(part), 1, 1, 1) < 0.5
            yield torch.where(mirrored, x[part].flip(3), x[part]), y[part]
            seen += len(part)


def train(file, folder):
    """Train by SGD with one cycle of the learning rate; write the weights each time an entry of KEPT is passed."""
    torch.manual_seed(0)
    x, y = images(file)
    network, left = CifarResNet(3), list(KEPT)
    optimiser = torch.optim.SGD(network.parameters(), RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = KEPT[-1] // BATCH + 1
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, steps + 1)
    save_file(network.state_dict(), folder / f"resnet20-{left.pop(0)}.safetensors")
    for step, (inputs, labels) in enumerate(batches(x, y, KEPT[-1]), 1):
        loss = torch.nn.functional.cross_entropy(network(inputs), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rate.step()
        if step % 50 == 0:
            print(step, steps, f"{loss.item():.3f}", flush=True)
        if left and step * BATCH >= left[0]:
            save_file(network.state_dict(), folder / f"resnet20-{left.pop(0)}.safetensors")


if __name__ == "__main__":
    Path(sys.argv[2]).mkdir(parents=True, exist_ok=True)
    train(sys.argv[1], Path(sys.argv[2]))
