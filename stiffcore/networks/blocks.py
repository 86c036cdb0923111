"""The blocks of a network: which modules are residual blocks, and each one as a function at an image."""

import random
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from stiffcore.errors import InputError, StiffcoreError, refuse
from stiffcore.jacobian.linearise import differentiable_kernels
from stiffcore.networks.names import listed_blocks

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Of a network that draws random numbers: what it does one time in ten goes unseen one time in a thousand.
PASSES = 64
# One forward pass at a time is watched: what it is watched by is of the whole process.
_WATCH = threading.RLock()


@dataclass(frozen=True)
class BlockCall:
    """One call of a module in a forward pass: its function of the first tensor, and that tensor.

    Attributes:
        name: module path.
        function: the module with its hooks, its other arguments as they were.
        x: the first tensor among its arguments, as the network hands it over; a copy.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    x: Tensor


def capture(
    network: nn.Module, x: Tensor, names: Sequence[str], missed: dict[str, str] | None = None
) -> tuple[dict[str, BlockCall], Any]:
    """Run the network once, and take what it hands to some of its modules.

    A module's function is what the network applies there: its hooks are part of it, each once.

    Args:
        network: in eval mode.
        x: one image, with its batch axis.
        names: module paths.
        missed: filled with the modules that cannot be had, and why; None: they are refused.

    Returns:
        The calls by name, and the network's output.

    Raises:
        InputError: naming every module that does not exist, was not reached, ran more than once, or takes no tensor;
            or the image's shape, where the network refuses it.
    """
    modules = dict(network.named_modules())
    refuse(f"the network has no module {name!r}" for name in names if name not in modules)
    calls, output = _watch(network, x, {name: modules[name] for name in names})
    problems = {name: text for name, found in calls.items() if (text := _problem(name, found))}
    if missed is None:
        refuse(problems.values(), "some blocks cannot be analysed:")
    else:
        missed.update(problems)
    return {name: found[0] for name, found in calls.items() if name not in problems and found[0] is not None}, output


def _problem(name: str, calls: Sequence[BlockCall | None]) -> str:
    if len(calls) != 1:
        return f"block {name} runs {len(calls)} times in one pass; it must run once"
    return "" if calls[0] is not None else f"block {name} takes no tensor"


def refuse_random(network: nn.Module, x: Tensor, calls: Mapping[str, BlockCall], passes: int = PASSES) -> None:
    """Run the network again, and refuse it where a module gets another input than before.

    Once more is enough for most; where random numbers are drawn on the way, it is run several times.

    Args:
        network: in eval mode.
        x: the image that the calls are of.
        calls: from `capture`.
        passes: how many times, where random numbers are drawn.

    Raises:
        InputError: naming the module in which two passes part, and the block that they lead to.
    """
    before = _random_state()
    for again in range(passes):
        found, _ = capture(network, x, list(calls))
        differing = [name for name, call in calls.items() if not _same(call.x, found[name].x)]
        if differing:
            raise InputError(
                f"block {differing[0]} is given another input each time that the network is run on the same image: "
                f"{_parting(network, x)} is not deterministic. Is dropout or noise left on (F.dropout needs "
                "training=self.training)? Does it count its calls?"
            )
        if again == 0 and _random_state() == before:
            return


def _parting(network: nn.Module, x: Tensor) -> str:
    """The module in which two passes part: it is given the same twice, and hands on something else."""
    first = _trail(network, x)
    for _ in range(PASSES):
        for (name, within, value), (_, _, other) in zip(first, _trail(network, x), strict=False):
            if len(value) != len(other) or not all(map(_same, value, other)):
                if not name:
                    return "the network's own forward"
                return f"the forward of module {name}" if within else f"module {name}"
    return "the network"


def _trail(network: nn.Module, x: Tensor) -> list[tuple[str, bool, list[Tensor]]]:
    """What each module is given, under the name of the one within which it runs, and what each hands on, in order."""
    names = {module: name for name, module in network.named_modules()}
    trail: list[tuple[str, bool, list[Tensor]]] = []
    inside: list[str] = [""]

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        trail.append((inside[-1], True, _tensors(_copied((args, kwargs)))))
        inside.append(names[module])

    def leave(module: nn.Module, output: Any) -> None:
        trail.append((inside.pop(), False, _tensors(_copied(output))))

    _run(network, x, names, enter, leave)
    return trail


def residual_blocks(
    network: nn.Module,
    x: Tensor,
    is_residual: Callable[[Callable, Tensor], bool],
    left_out: dict[str, str] | None = None,
) -> list[str]:
    """The paths of the residual blocks, in the order of the modules.

    A residual block is an innermost module whose output is a sum of two things that depend on its input, up to
    elementwise operations after the sum; plain containers and single layers are none.

    Args:
        network: in eval mode.
        x: one image, with its batch axis.
        is_residual: tells it of a function at a point; raises `InputError` where it cannot.
        left_out: filled with the modules that may be residual blocks, or are, but cannot be had, and why.

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
    why: dict[str, str] = {}
    for name in reversed(list(inner)):  # children come after their parents
        call = next(iter(calls[name]), None)
        if any(other.startswith(name + ".") for other in found):
            continue
        if call is None:
            if calls[name]:
                why[name] = _problem(name, calls[name])
            continue
        try:
            residual = is_residual(call.function, call.x)
        except InputError as error:
            if not any(other.startswith(name + ".") for other in why):  # of which it is made
                why[name] = f"block {name} cannot be told to be residual: {error}"
            continue
        if residual and len(calls[name]) > 1:
            why[name] = _problem(name, calls[name])
        elif residual:
            found.append(name)
            why = {other: text for other, text in why.items() if not other.startswith(name + ".")}
    if left_out is not None:
        left_out.update(dict(reversed(why.items())))
    return found[::-1]


def _watch(
    network: nn.Module, x: Tensor, modules: dict[str, nn.Module]
) -> tuple[dict[str, list[BlockCall | None]], Any]:
    calls: dict[str, list[BlockCall | None]] = {name: [] for name in modules}
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in modules.items():
        names[module].append(name)

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        for name in names[module]:
            calls[name].append(_call(name, module, args, kwargs))

    return calls, _run(network, x, names, enter, lambda module, output: None)


def _run(
    network: nn.Module,
    x: Tensor,
    watched: Container[nn.Module],
    enter: Callable[[nn.Module, tuple, dict[str, Any]], None],
    leave: Callable[[nn.Module, Any], None],
) -> Any:
    """Run the network once, telling what some modules are called with, before any hook of theirs, and return.

    Modules are watched as `torch.fx` does it: a forward pre-hook would come after those that are registered for all
    modules. Buffers are as before afterwards, whatever the pass writes into them.
    """
    plain = nn.Module.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if module not in watched:
            return plain(module, *args, **kwargs)
        enter(module, args, kwargs)
        output = plain(module, *args, **kwargs)
        leave(module, output)
        return output

    with _WATCH:
        nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            with differentiable_kernels(), _same_buffers(network):
                return network(x.clone())  # a network may work in place on its image
        except (StiffcoreError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # what a network or a hook of it raises is anything
            reason = _reason(error, x)
            raise InputError(f"the network does not take an image of shape {tuple(x.shape)}: {reason}") from error
        finally:
            nn.Module.__call__ = plain  # type: ignore[method-assign]


@contextmanager
def _same_buffers(network: nn.Module) -> Iterator[None]:
    held = [(m, name, b, b.clone()) for m in network.modules() for name, b in m._buffers.items() if b is not None]
    try:
        yield
    finally:
        for module, name, buffer, before in held:
            if buffer.shape == before.shape and not _same(buffer, before):
                buffer.copy_(before)
            module._buffers[name] = buffer if buffer.shape == before.shape else before


def _call(name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> BlockCall | None:
    """The call as a function of its first tensor; what else it is given is copied, since the network may change it."""
    given: dict[int | str, Any] = {}
    given.update(enumerate(args))
    given.update(kwargs)
    at = next((place for place, value in given.items() if isinstance(value, Tensor)), None)
    if at is None:
        return None
    x = given.pop(at).detach().clone()
    rest = {place: _copied(value) for place, value in given.items()}

    def function(t: Tensor) -> Tensor:
        now = {at: t} | {place: _copied(value) for place, value in rest.items()}
        return module(*(now[i] for i in range(len(args))), **{key: now[key] for key in kwargs})

    return BlockCall(name, function, x)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts: Iterable[Any] = ()
    if isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, (tuple, list)):
        parts = value
    elif is_dataclass(value) and not isinstance(value, type):
        parts = (getattr(value, field.name) for field in fields(value))
    return [tensor for part in parts for tensor in _tensors(part)]


def _copied(value: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.detach().clone(), value)


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(torch.equal(a, b) or (a.is_floating_point() and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))))


def _random_state() -> tuple[object, ...]:
    """Of all generators that a forward pass may draw from on the host."""
    _, numbers, place, *_ = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), np.asarray(numbers).tobytes(), place


def _reason(error: Exception, x: Tensor) -> str:
    """What an exception says, in one line, and what would help where the network mixes precisions."""
    text = next(iter(str(error).splitlines()), "")
    kind = type(error).__name__
    reason = text if isinstance(error, (RuntimeError, ValueError)) and text else f"{kind}: {text}" if text else kind
    words = str(error).lower()
    if x.dtype == torch.float64 and "double" in words and re.search(r"(?<!b)float(?!ing|16|8)", words):
        reason += "; it has numbers in float32 inside, which a float64 image does not go with: use --dtype float32"
    return reason


def choose_blocks(
    spec: str, found: Sequence[str], network: nn.Module, left_out: Mapping[str, str] | None = None
) -> list[str]:
    """The blocks that `--blocks` names.

    Args:
        spec: `all`, or comma-separated numbers (1-based, among `found`) and module paths.
        found: the residual blocks.
        network: whose modules a path may name.
        left_out: from `residual_blocks`, for the message.

    Returns:
        Paths, each once, in the order asked for.

    Raises:
        InputError: naming every part that is neither, with the list of blocks.
    """
    if spec.strip() == "all":
        none = "no residual block was found in the network: name modules, as in --blocks layer1.1"
        refuse([] if found else [none, *(left_out or {}).values()], "--blocks all is nothing:")
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
        refuse([*(problems or ["--blocks names no block"]), listed_blocks(found)])
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
