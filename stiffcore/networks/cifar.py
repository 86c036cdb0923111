"""The ResNets that He et al. (2016, section 4.2) made for CIFAR-10: ResNet20 to ResNet110."""

import torch.nn.functional as F
from torch import Tensor, nn


class OptionABlock(nn.Module):
    """Two convolutions, and a shortcut without weights: every second pixel, missing channels zero (option A)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        """Make it with random weights.

        Args:
            channels: of the input.
            width: channels of the output, at least `channels`.
            stride: of the first convolution, 1 or 2.
        """
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.padded = stride, width - channels

    def forward(self, x: Tensor) -> Tensor:
        """(1, channels, H, W) to (1, width, H / stride, W / stride)."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        before = self.padded // 2
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.padded:
            x = F.pad(x, (0, 0, 0, 0, before, self.padded - before))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels, no max-pool; state-dict keys as pytorch_resnet_cifar10 has them."""

    def __init__(self, blocks: int, classes: int = 10) -> None:
        """Make it with random weights.

        Args:
            blocks: of each stage; 9 for ResNet56.
            classes: of the images.
        """
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(blocks, 16, 16)
        self.layer2 = _stage(blocks, 16, 32)
        self.layer3 = _stage(blocks, 32, 64)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, 32, 32) to logits (N, classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def _stage(blocks: int, channels: int, width: int) -> nn.Sequential:
    first = OptionABlock(channels, width, 1 if channels == width else 2)
    return nn.Sequential(first, *(OptionABlock(width, width, 1) for _ in range(blocks - 1)))
