"""Fixtures that several test files share."""

import sys

import numpy as np
import pytest

SMALL = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + x)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.layer1 = nn.Sequential(Block(6), Block(6))
        self.down = nn.Conv2d(6, 4, 1)
        self.layer2 = nn.Sequential(Block(4), nn.MaxPool2d(2), Block(4))
        self.head = nn.Linear(4 * 3 * 3, 10)

    def forward(self, x):
        x = self.layer2(self.down(self.layer1(torch.relu(self.stem(x)))))
        return self.head(x.flatten(1))

def make():
    torch.manual_seed(5)
    return Net()
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with a network factory and six images, which is the current folder."""
    (tmp_path / "smallnet.py").write_text(SMALL)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "six.npz", x=rng.integers(0, 256, (6, 6, 6, 3), dtype=np.uint8), y=np.arange(6))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("smallnet", None)
    return tmp_path
