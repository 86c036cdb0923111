"""A small network with blocks of six and of four channels; factories of variants that sleep, hoard and write."""

import time
from pathlib import Path

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


class SlowBlock(Block):
    def forward(self, x):
        time.sleep(0.2)
        return super().forward(x)


def make_slow():
    torch.manual_seed(5)
    net = Net()
    net.layer1[0].__class__ = SlowBlock
    return net


class HoardingBlock(SlowBlock):
    def forward(self, x):
        if Path("hoard").exists():
            self.held = torch.ones(1 << 27, dtype=torch.float64)
        return super().forward(x)


def make_hoarding():
    net = make_slow()
    net.layer1[0].__class__ = HoardingBlock
    return net


class WritingBlock(Block):
    def forward(self, x):
        Path("log").write_text(str(time.time()))
        time.sleep(1)
        return super().forward(x)


def make_writing():
    net = make()
    net.layer1[0].__class__ = WritingBlock
    return net
