"""What is known of networks and images by their names, without loading anything."""

from collections.abc import Sequence
from pathlib import Path

RESNETS = ("resnet18", "resnet34", "resnet50")
CIFAR_RESNETS = {f"resnet{6 * blocks + 2}": blocks for blocks in (3, 5, 7, 9, 18)}
"""Those with three stages, of 16, 32 and 64 channels, by blocks a stage: see `cifar.CifarResNet`."""

RANDOM = "random"
FACTORY_FORM = "package.module:factory"
SOURCES = "samples, imagenet-samples, cifar10, a .npz file with x and y, or a folder of class folders"
_STAGES = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}


def network_problems(network: str) -> list[str]:
    """What is wrong with the name of a network: nothing, or one line."""
    if ":" in network or network in (*RESNETS, *CIFAR_RESNETS):
        return []
    return [f"unknown network {network!r}: use one of {', '.join((*RESNETS, *CIFAR_RESNETS))}, or {FACTORY_FORM}"]


def residual_names(network: str) -> list[str]:
    """The residual blocks of a network by name, in order; none where only the network itself knows."""
    stages = _STAGES.get(network) or (CIFAR_RESNETS.get(network, 0),) * 3
    return [f"layer{stage}.{block}" for stage, blocks in enumerate(stages, 1) for block in range(blocks)]


def block_problems(spec: str, network: str) -> list[str]:
    """What is surely wrong with `--blocks`: numbers and blocks that a network by name does not have.

    Other paths, as `layer1.0.conv1` or `fc`, only the network itself knows.

    Args:
        spec: as `blocks.choose_blocks` has it.
        network: any.
    """
    found = residual_names(network)
    if not found:
        return []
    wrong = []
    for part in filter(None, map(str.strip, spec.split(","))):
        numbered = part.isdecimal() and not 1 <= int(part) <= len(found)
        stage, _, rest = part.partition(".")
        named = stage.startswith("layer") and rest.isdecimal() and part not in found
        if numbered or named:
            wrong.append(f"unknown block {part!r}")
    return [*wrong, listed_blocks(found)] if wrong else []


def listed_blocks(found: Sequence[str]) -> str:
    """What `--blocks` may name."""
    listed = ", ".join(f"{i} {name}" for i, name in enumerate(found, 1))
    return f"the residual blocks are: {listed}; or any module path"


def weights_problems(weights: str | None) -> list[str]:
    """What is wrong with `Study.weights` before they are opened: nothing (of None, too), or that they are not there."""
    if weights in (None, RANDOM) or Path(weights).exists():
        return []
    return [f"there is no checkpoint {weights}: check the path"]


def images_problems(images: str | None) -> list[str]:
    """What is wrong with `Study.images` before they are opened: nothing (of None, too), or that they are not there."""
    if images in (None, "samples", "imagenet-samples", "cifar10") or Path(images).exists():
        return []
    npz = Path(images).suffix.lower() == ".npz"
    return [f"there is no file {images}: check the path" if npz else f"no images at {images!r}: use {SOURCES}"]
