"""A module copied, with as much of what it holds as can be."""

import copy
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from stiffcore.errors import InputError

_ATOMS = (int, float, complex, str, bytes, type(None), type, FunctionType, BuiltinFunctionType, torch.dtype)


def copy_module(module: nn.Module) -> nn.Module:
    """A copy of a module that shares no parameter, buffer or submodule with it.

    Tensors that are results of others (kept activations, the weights that `weight_norm` and `prune` compute) are copied
    without their history, compiled modules as they were written. What nothing can copy (locks, Python modules,
    operators) is shared with the original.

    Args:
        module: any.

    Raises:
        InputError: where a part that only it can copy (a `ScriptModule`, say) fails to.
    """
    made = _Copies().of(_as_written(module))
    for part in made.modules():
        for name, child in list(part.named_children()):
            if (written := _as_written(child)) is not child:
                setattr(part, name, written)
        part._compiled_call_impl = None  # set by `Module.compile`, and bound to the original
    return made


def _as_written(module: nn.Module) -> nn.Module:
    found = module._modules.get("_orig_mod")  # of `torch.compile`
    return module if found is None else found


class _Copies:
    """Copies made so far, by the `id` of what they were made from: as `copy.deepcopy` keeps them."""

    def __init__(self) -> None:
        self.made: dict[int, Any] = {}
        self._kept: list[object] = []  # an id stays taken as long as its object lives

    def of(self, value: Any) -> Any:
        """The copy of a value, made where there is none yet."""
        if isinstance(value, _ATOMS):
            return value
        if id(value) in self.made:
            return self.made[id(value)]
        trial = dict(self.made)  # what fails half-way leaves half-made copies
        self._kept += [value, trial]
        try:
            made = copy.deepcopy(value, trial)
        except Exception as error:  # what a user's objects raise on copying is anything
            return self._by_parts(value, error)
        self.made.update(trial)
        return made

    def _by_parts(self, value: Any, error: Exception) -> Any:
        """What copies are made of, where `copy.deepcopy` fails with all of it at once."""
        if isinstance(value, nn.Module):
            return self._module(value, error)
        made = value
        if isinstance(value, Tensor):
            made = value.detach().clone()
        elif type(value) in (list, tuple, set):
            made = type(value)(self.of(item) for item in value)
        elif isinstance(value, dict):
            made = copy.copy(value)
            made.update((key, self.of(item)) for key, item in value.items())
        self.made[id(value)] = made
        return made

    def _module(self, module: nn.Module, error: Exception) -> nn.Module:
        cls = type(module)
        if hasattr(cls, "__deepcopy__"):
            raise InputError(
                f"{cls.__name__} cannot be copied ({type(error).__name__}: {error}): give it with plain parameters, "
                "or by name as package.module:factory"
            ) from error
        made = cls.__new__(cls)
        self.made[id(module)] = made
        made.__dict__.update((name, self.of(item)) for name, item in module.__dict__.items())
        return made
