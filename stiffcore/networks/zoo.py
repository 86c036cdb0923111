"""Networks by name: torchvision's ResNets from a checkpoint, a user's own factory, or a module in memory."""

import copy
import importlib
import importlib.resources
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from stiffcore.errors import InputError, refuse
from stiffcore.networks.checkpoint import (
    aligned,
    fit_state,
    precision,
    read_checkpoint,
    refuse_nonfinite,
    weights_digest,
)
from stiffcore.networks.cifar import CifarResNet
from stiffcore.networks.copying import copy_module
from stiffcore.networks.names import CIFAR_RESNETS, FACTORY_FORM, RANDOM, RESNETS, network_problems
from stiffcore.study import Pool

_RANDOM_CLASSES = 10
_RANDOM_SEED = 0
# the stem's kernel decides what its training images were normalised with
_NORMALIZE = {3: "cifar10", 7: "imagenet"}
# blocks in each stage, and whether a block has a third convolution; 101 and 152 only to be told apart
_LAYOUTS = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}


@dataclass(frozen=True)
class Network:
    """A network ready to be linearised: on the CPU, in eval mode, in one dtype, without gradients.

    Attributes:
        module: the network itself.
        name: what was asked for (`resnet18`, `package.module:factory`), or the class of a module given from
            Python.
        weights: path of the checkpoint; "random"; or "in memory" where the module came with its own.
        weights_digest: SHA-256 of the weights as they were given, before any renaming or cast.
        normalize: the network's natural normalisation of images: "cifar10", "imagenet" or "none".
        description: one line for people.
    """

    module: nn.Module
    name: str
    weights: str
    weights_digest: str
    normalize: str
    description: str


def bundled_weights(network: str) -> Path | None:
    """The checkpoint that stiffcore ships for a network, or None where it ships none.

    Args:
        network: any network name.
    """
    if network not in RESNETS:
        return None
    weights = importlib.resources.files("stiffcore.networks") / "weights" / f"{network}_cifar10.safetensors"
    path = Path(str(weights))
    return path if path.is_file() else None


def load_network(
    network: str, weights: Path | None, dtype: torch.dtype, pool: str = "auto", allowed: int | None = None
) -> Network:
    """A name and a checkpoint become a network; equal arguments give equal weights, random ones included.

    A ResNet's stem (3x3 or 7x7) and number of classes come from the checkpoint's shapes. The key names of
    kuangliu/pytorch-cifar (`shortcut`, `linear`) are understood, and mean that there is no max-pool. A
    factory is called without arguments; CPU random numbers it draws have a fixed seed, so a second process
    gets the same network. The current folder is importable for it, as under `python -m`.

    Args:
        network: one of `RESNETS` or `CIFAR_RESNETS`, or `package.module:factory`.
        weights: a checkpoint (`checkpoint.read_checkpoint`); None for the bundled one, or for a factory's
            own; the word "random" for a ResNet with random weights of seed 0, a 3x3 stem and ten classes.
        dtype: floating dtype of the result.
        pool: "max" or "none" forces a ResNet's max-pool; "auto" keeps it but for pytorch-cifar checkpoints.
        allowed: bytes, see `checkpoint.read_checkpoint`.

    Raises:
        InputError: an unknown name or option, a checkpoint that cannot be read or does not fit, or a factory
            that cannot be imported, fails, or does not return a module.

    Memory: the checkpoint's pages and one model in `dtype`; a factory's module beside these.
    """
    is_factory, is_random = ":" in network, weights is not None and str(weights) == RANDOM
    _check_request(network, dtype, pool, is_factory, is_random)
    if is_factory:
        return _load_factory(network, weights, dtype, allowed)
    if network in CIFAR_RESNETS:
        return _load_cifar_resnet(network, weights, dtype, allowed)
    if is_random:
        return _random_resnet(network, dtype, pool)
    return _load_resnet(network, weights or _bundled(network), dtype, pool, allowed)


def wrap_network(module: nn.Module, dtype: torch.dtype) -> Network:
    """A module given from Python becomes a network; the module itself is copied and never changed.

    Args:
        module: any module whose parameters are finite.
        dtype: floating dtype of the copy; complex parameters and buffers take the complex type of that precision.

    Raises:
        InputError: not a module, not copyable, on the meta device, or with values that are not finite.

    Memory: one copy of the module in its own dtype, cast tensor by tensor.
    """
    name = type(module).__name__
    if not isinstance(module, nn.Module):
        raise InputError(f"a network must be a torch.nn.Module, found a {name}")
    refuse(_dtype_problems(dtype))
    check_tensors(module, name)
    digest = weights_digest(_tensors(module))
    copied = copy_module(module)
    settle(copied, dtype, name)
    return Network(copied, name, "in memory", digest, "none", _describe(copied, name))


# ------------------------------------------------------------------------------------------- the request


def _check_request(network: str, dtype: torch.dtype, pool: str, is_factory: bool, is_random: bool) -> None:
    problems = _dtype_problems(dtype)
    problems += network_problems(network)
    if pool not in list(Pool):
        problems.append(f"unknown pool {pool!r}: use one of {', '.join(Pool)}")
    elif network in CIFAR_RESNETS and pool == "max":
        problems.append(f"pool 'max' is for {', '.join(RESNETS)} only: {network} has no max-pool")
    elif is_factory and pool != "auto":
        problems.append(f"pool {pool!r} is for {', '.join(RESNETS)} only: let {network} build its own pooling")
    if is_factory and is_random:
        problems.append(f"weights 'random' is for {', '.join(RESNETS)} only: leave it out for what {network} draws")
    refuse(problems, "this network cannot be loaded:")


def _dtype_problems(dtype: torch.dtype) -> list[str]:
    return [] if dtype.is_floating_point else [f"{dtype} is not a floating dtype: use float32 or float64"]


def _bundled(network: str) -> Path:
    path = bundled_weights(network)
    if path is None:
        shipped = [name for name in RESNETS if bundled_weights(name)]
        raise InputError(
            f"stiffcore ships no checkpoint for {network} (only for {', '.join(shipped) or 'none'}): "
            "give one with --weights, or --weights random"
        )
    return path


# ----------------------------------------------------------------------------------------------- resnets


def _load_resnet(network: str, path: Path, dtype: torch.dtype, pool: str, allowed: int | None) -> Network:
    original = read_checkpoint(path, allowed)
    # The digest is of the names as found: they decide on the max-pool, so they are part of what was given.
    digest = weights_digest(original)
    state, is_renamed = _from_pytorch_cifar(aligned(original, ()), path)
    kernel, classes = _stem_and_classes(state, path)
    pooled = pool == "max" or (pool == "auto" and not is_renamed)
    module = copy.deepcopy(_empty(network, kernel, classes, pooled))
    try:
        fit_state(module, state, dtype, str(path))
    except InputError as error:
        raise InputError(f"{error}{_hint(network, state)}") from error
    return _resnet(module.eval(), network, str(path), digest, kernel)


def _random_resnet(network: str, dtype: torch.dtype, pool: str) -> Network:
    with _seeded():
        module = _build(network, 3, _RANDOM_CLASSES, pooled=pool != "none")
    digest = weights_digest(module.state_dict())
    settle(module, dtype, network)
    return _resnet(module, network, RANDOM, digest, 3)


def _load_cifar_resnet(network: str, path: Path | None, dtype: torch.dtype, allowed: int | None) -> Network:
    if path is None:
        raise InputError(f"stiffcore ships no checkpoint for {network}: give one with --weights, or --weights random")
    state = None if str(path) == RANDOM else read_checkpoint(path, allowed)
    given = {} if state is None else aligned(state, ())
    head = given.get("linear.weight")
    classes = _RANDOM_CLASSES if head is None or head.ndim != 2 else len(head)
    with _seeded():
        module = CifarResNet(CIFAR_RESNETS[network], classes)
    digest = weights_digest(module.state_dict() if state is None else state)
    if state is not None:
        fit_state(module, given, dtype, str(path))
    settle(module, dtype, network)
    # as pytorch_resnet_cifar10, whose checkpoints are in use, has normalised its images
    details = _describe(module, f"{network}: three stages, shortcuts without weights, {classes} classes")
    return Network(module, network, str(path), digest, "imagenet", details)


def _resnet(module: nn.Module, network: str, weights: str, digest: str, kernel: int) -> Network:
    pooling = "no max-pool" if isinstance(module.maxpool, nn.Identity) else "max-pool"
    classes = module.get_submodule("fc").out_features
    details = f"{network}: {kernel}x{kernel} stem, {pooling}, {classes} classes"
    return Network(module, network, weights, digest, _NORMALIZE[kernel], _describe(module, details))


@lru_cache(maxsize=1)
def _empty(network: str, kernel: int, classes: int, pooled: bool) -> nn.Module:
    """On the meta device: no memory for a second model. To make it takes 0.5 s of a ResNet50, to copy it little."""
    with torch.device("meta"):
        return _build(network, kernel, classes, pooled)


def _build(network: str, kernel: int, classes: int, pooled: bool) -> nn.Module:
    # Imported here: torchvision takes seconds, and a module given from Python needs none of it.
    import torchvision.models

    module = getattr(torchvision.models, network)(weights=None, num_classes=classes)
    if kernel == 3:
        module.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
        # as torchvision draws every other convolution
        nn.init.kaiming_normal_(module.conv1.weight, mode="fan_out", nonlinearity="relu")
    if not pooled:
        module.maxpool = nn.Identity()
    return module


def _from_pytorch_cifar(state: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], bool]:
    """The state under torchvision's names, and whether it had those of kuangliu/pytorch-cifar."""
    if not any(name.startswith("linear.") or ".shortcut." in name for name in state):
        return dict(state), False
    renamed = {re.sub(r"^linear\.", "fc.", name).replace(".shortcut.", ".downsample."): name for name in state}
    if len(renamed) < len(state):
        raise InputError(f"{path} mixes the names of pytorch-cifar (linear, shortcut) and torchvision (fc, downsample)")
    return {new: state[old] for new, old in renamed.items()}, True


def _stem_and_classes(state: Mapping[str, Tensor], path: Path) -> tuple[int, int]:
    missing = [key for key in ("conv1.weight", "fc.weight") if key not in state]
    if missing:
        raise InputError(
            f"{path} is no ResNet's checkpoint: it has no {' and no '.join(missing)} "
            f"(its first keys: {', '.join(list(state)[:3])})"
        )
    problems = []
    stem, head = tuple(state["conv1.weight"].shape), tuple(state["fc.weight"].shape)
    if stem not in {(64, 3, kernel, kernel) for kernel in _NORMALIZE}:
        problems.append(f"{path}: conv1.weight has shape {stem}, a ResNet's is (64, 3, 3, 3) or (64, 3, 7, 7)")
    if len(head) != 2 or 0 in head:
        problems.append(f"{path}: fc.weight has shape {head}, not (classes, features)")
    refuse(problems)
    return stem[-1], head[0]


def _hint(network: str, state: Mapping[str, Tensor]) -> str:
    blocks = [re.match(r"layer([1-4])\.(\d+)\.", name) for name in state]
    found = {(int(match[1]), int(match[2])) for match in blocks if match}
    a, b, c, d = (sum(stage == wanted for stage, _ in found) for wanted in (1, 2, 3, 4))
    looks = _LAYOUTS.get(((a, b, c, d), "layer1.0.conv3.weight" in state))
    if looks is None or looks == network:
        return ""
    return f". This looks like a {looks}" + ("" if looks in RESNETS else ", which stiffcore does not know")


# --------------------------------------------------------------------------------------------- factories


def _load_factory(name: str, path: Path | None, dtype: torch.dtype, allowed: int | None) -> Network:
    with _seeded():
        module = _call_factory(name)
    if path is None:
        check_tensors(module, name)
        digest = weights_digest(_tensors(module))
    else:
        state = read_checkpoint(path, allowed)
        digest = weights_digest(state)
        fit_state(module, aligned(state, module.state_dict()), dtype, str(path))
    settle(module, dtype, name)
    details = f"{type(module).__name__} from {name}"
    return Network(module, name, str(path or "in memory"), digest, "none", _describe(module, details))


def _call_factory(name: str) -> nn.Module:
    factory = _import_factory(name)
    try:
        module = factory()
    except Exception as error:  # what a user's factory raises is anything
        raise InputError(f"{name}() failed: {type(error).__name__}: {error}") from error
    if not isinstance(module, nn.Module):
        raise InputError(f"{name}() returned a {type(module).__name__}: it must return a torch.nn.Module")
    return module


def _import_factory(name: str) -> Callable[[], Any]:
    where, _, attribute = name.partition(":")
    if not re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", name):
        raise InputError(f"{name!r} is not of the form {FACTORY_FORM}")
    # Stays: what the factory imports later, and a pickled module elsewhere, is looked up in the same place.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(where)
    except Exception as error:  # the module's own code runs here
        raise InputError(f"importing {where} for {name} failed: {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise InputError(f"{where} ({getattr(found, '__file__', None) or 'built in'}) has no {attribute}")
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"{name} is a {type(found).__name__}: it must be callable without arguments")
    return found


@contextmanager
def _seeded() -> Iterator[None]:
    """CPU random numbers from a fixed seed inside; the caller's own stream goes on undisturbed after."""
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed, which would also reseed every CUDA device
        torch.random.default_generator.manual_seed(_RANDOM_SEED)
        yield


# ------------------------------------------------------------------------------------------------ common


def settle(module: nn.Module, dtype: torch.dtype, name: str) -> None:
    """Put a module on the CPU, in eval mode, in one precision and without gradients, in place.

    Args:
        module: with values (see `check_tensors`).
        dtype: floating; complex parameters and buffers take the complex type of that precision.
        name: how messages call it.

    Raises:
        InputError: where a value overflows in `dtype`.
    """
    infinite = _infinite_buffers(module)
    # not module.to(dtype), which drops imaginary parts
    module._apply(lambda t: t.to(device="cpu", dtype=precision(t, dtype)))
    module.requires_grad_(False).eval()
    finite = {key: tensor for key, tensor in _tensors(module).items() if key not in infinite}
    refuse_nonfinite(finite, f"{name} in {str(dtype).removeprefix('torch.')}")


def check_tensors(module: nn.Module, name: str) -> None:
    """Refuse a module whose parameters or buffers have no values, or none that a spectrum follows from.

    Args:
        module: any. Infinities in a buffer, as masks of attention hold them, are values like others.
        name: how messages call it.

    Raises:
        InputError: where some are on the meta device, not made yet (`LazyLinear`), or not finite.
    """
    lazy = [key for key, tensor in chain(module.named_parameters(), module.named_buffers()) if is_lazy(tensor)]
    if lazy:
        raise InputError(f"{name}: {lazy[0]} is not made yet: run {name} once on an image")
    tensors = _tensors(module)
    meta = [key for key, tensor in tensors.items() if tensor.is_meta]
    if meta:
        raise InputError(f"{name}: {meta[0]} is on the meta device ({len(meta)} such tensors): give it values first")
    infinite = _infinite_buffers(module)
    refuse_nonfinite({key: tensor for key, tensor in tensors.items() if key not in infinite}, name)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every tensor that the forward pass may use: the state dict, and the buffers that are left out of it."""
    state = {name: t for name, t in module.state_dict().items() if isinstance(t, Tensor)}
    return state | {name: buffer.detach() for name, buffer in module.named_buffers()}


def _infinite_buffers(module: nn.Module) -> set[str]:
    """The buffers with infinities, and nothing else that is not a number."""
    floating = [(name, b) for name, b in module.named_buffers() if b.is_floating_point() and b.element_size() > 1]
    return {name for name, b in floating if bool(torch.isinf(b).any()) and not bool(torch.isnan(b).any())}


def _describe(module: nn.Module, details: str) -> str:
    return f"{details}, {sum(p.numel() for p in module.parameters()):,} parameters"
