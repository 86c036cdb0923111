"""The blocks of a network: which modules are residual blocks, and each one as a function at an image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stiffcore.errors import InputError, refuse
from stiffcore.jacobian.linearise import differentiable_kernels

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class BlockCall:
    """One call of a module in a forward pass: its function of the first tensor, and that tensor.

    Attributes:
        name: module path.
        function: the module, with its other arguments as they were.
        x: the first argument, a copy.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    x: Tensor


def capture(network: nn.Module, x: Tensor, names: Sequence[str]) -> tuple[dict[str, BlockCall], Any]:
    """Run the network once, and take the inputs of some of its modules.

    Args:
        network: in eval mode.
        x: one image, with its batch axis.
        names: module paths.

    Returns:
        The calls by name, and the network's output.

    Raises:
        InputError: naming every module that does not exist, was not reached, ran more than once, or takes no tensor;
            or the image's shape, where the network refuses it.
    """
    modules = dict(network.named_modules())
    refuse(f"the network has no module {name!r}" for name in names if name not in modules)
    calls, output = _watch(network, x, {name: modules[name] for name in names})
    problems = []
    for name, found in calls.items():
        if len(found) != 1:
            problems.append(f"block {name} runs {len(found)} times in one pass; it must run once")
        elif found[0] is None:
            problems.append(f"block {name} takes no tensor as its first argument")
    refuse(problems, "some blocks cannot be analysed:")
    return {name: found[0] for name, found in calls.items() if found[0] is not None}, output


def _call(name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> BlockCall | None:
    if not args or not isinstance(args[0], Tensor):
        return None
    rest = args[1:]
    return BlockCall(name, lambda t: module(t, *rest, **kwargs), args[0].detach().clone())


def residual_blocks(network: nn.Module, x: Tensor, is_residual: Callable[[Callable, Tensor], bool]) -> list[str]:
    """The paths of the residual blocks, in the order of the modules.

    A residual block is an innermost module whose output is a sum of two things that depend on its input, up to
    elementwise operations after the sum; plain containers and single layers are none.

    Args:
        network: in eval mode.
        x: one image, with its batch axis.
        is_residual: tells it of a function at a point.

    Raises:
        InputError: where the network does not take the image.
    """
    inner = {
        name: module
        for name, module in network.named_modules()
        if name and not isinstance(module, CONTAINERS) and any(True for _ in module.children())
    }
    calls, _ = _watch(network, x, inner)
    found: list[str] = []
    for name in reversed(list(inner)):  # children come after their parents
        call = calls[name][0] if len(calls[name]) == 1 else None
        nested = any(other.startswith(name + ".") for other in found)
        if call is not None and not nested and is_residual(call.function, call.x):
            found.append(name)
    return found[::-1]


def _watch(
    network: nn.Module, x: Tensor, modules: dict[str, nn.Module]
) -> tuple[dict[str, list[BlockCall | None]], Any]:
    calls: dict[str, list[BlockCall | None]] = {name: [] for name in modules}

    def hook(name: str) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            calls[name].append(_call(name, module, args, kwargs))

        return before

    handles = [m.register_forward_pre_hook(hook(name), with_kwargs=True) for name, m in modules.items()]
    try:
        with differentiable_kernels():
            return calls, network(x.clone())  # a network may work in place on its image
    except (RuntimeError, ValueError, TypeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"the network does not take an image of shape {tuple(x.shape)}: {reason}") from error
    finally:
        for handle in handles:
            handle.remove()


def choose_blocks(spec: str, found: Sequence[str], network: nn.Module) -> list[str]:
    """The blocks that `--blocks` names.

    Args:
        spec: `all`, or comma-separated numbers (1-based, among `found`) and module paths.
        found: the residual blocks.
        network: whose modules a path may name.

    Returns:
        Paths, each once, in the order asked for.

    Raises:
        InputError: naming every part that is neither, with the list of blocks.
    """
    if spec.strip() == "all":
        refuse([] if found else ["no residual block was found in the network: name modules, as in --blocks layer1.1"])
        return list(found)
    modules = dict(network.named_modules())
    chosen: list[str] = []
    problems = []
    for part in (p.strip() for p in spec.split(",") if p.strip()):
        if part.isdecimal() and 1 <= int(part) <= len(found):
            chosen.append(found[int(part) - 1])
        elif part in modules and part:
            chosen.append(part)
        else:
            problems.append(f"unknown block {part!r}")
    if problems or not chosen:
        listed = ", ".join(f"{i} {name}" for i, name in enumerate(found, 1))
        refuse(
            [
                *(problems or ["--blocks names no block"]),
                f"the residual blocks are: {listed}; or any module path",
            ]
        )
    return list(dict.fromkeys(chosen))


def loss_and_prediction(output: Any, label: int) -> tuple[float, int]:
    """Cross-entropy and the predicted class, from (1, classes) logits; nan and -1 where the output is none."""
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != 1:
        return float("nan"), -1
    known = 0 <= label < output.shape[1]
    loss = (
        torch.nn.functional.cross_entropy(output, torch.tensor([label], device=output.device)) if known else torch.nan
    )
    return float(loss), int(output.argmax())
