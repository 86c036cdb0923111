"""Modules as functions: calls that leave them as they were, and what of their results is taken."""

import functools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stiffcore.errors import InputError


class _State:
    """What a module holds, to be put back."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.attributes = module, dict(vars(module))
        self.parameters, self.buffers = dict(module._parameters), dict(module._buffers)
        self.children = dict(module._modules)

    def put_back(self) -> None:
        _put_back(self.module._parameters, self.parameters)
        _put_back(self.module._buffers, self.buffers)
        _put_back(self.module._modules, self.children)
        _put_back(vars(self.module), self.attributes)


class Untouched:
    """A function of one tensor that leaves the modules it uses as they were, and returns one tensor.

    In each call, the buffers that the function changes (counters, running statistics) are copies, and attributes that
    it sets (kept activations, counts) are put back: all calls see the same state. The modules are those that
    can be found from the function: itself, its object, and what it closes over, is bound to, or names.

    Attributes:
        f: the function.
        modules: theirs and their submodules.
        replaces: whether it gives tensors new data (`.data = ...`), which ends a process inside of `torch.func` (2.14);
            known after the first call.
        outputs: how many things it returned, of which the first floating tensor is taken; 1 where it was a tensor.
    """

    def __init__(self, f: Callable[[Tensor], Any]) -> None:
        written: Any = _modules_of(f).get("_orig_mod", f) if isinstance(f, nn.Module) else f
        self.f: Callable[[Tensor], Any] = getattr(written, "_torchdynamo_orig_callable", written)
        self.modules = list({id(m): m for root in modules_of(f) for m in root.modules()}.values())
        self.replaces, self.outputs = False, 1
        self._lent: list[tuple[nn.Module, str]] | None = None  # known after the first call
        self._before: list[_State] | None = None
        # what `torch.compile` and `Module.compile` made goes by its original
        self._originals = [(m, name, child._orig_mod) for m, name, child in self._compiled_children()]

    def _compiled_children(self) -> Iterator[tuple[nn.Module, str, Any]]:
        for m in self.modules:
            yield from ((m, name, child) for name, child in m._modules.items() if "_orig_mod" in _modules_of(child))

    def meet(self, x: Tensor) -> None:
        """Call it once, where it was not yet, so that what it changes is known."""
        if self._lent is None:
            with torch.no_grad():
                self(x.clone())

    @contextmanager
    def held(self) -> Iterator[None]:
        """Put back what the calls inside have changed at the end only: backward passes may use it (hooks do)."""
        if self._before is not None:
            yield
            return
        self._before = [_State(m) for m in self.modules]
        try:
            yield
        finally:
            for state in self._before:
                state.put_back()
            self._before = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return `f(x)`, or the first floating tensor in it."""
        with self.held():
            assert self._before is not None
            for state in self._before:  # what an earlier call has changed
                state.put_back()
                state.module._compiled_call_impl = None
            for m, name, original in self._originals:
                m._modules[name] = original
            if self._lent is None:
                return self._first(self._first_call(x, self._before))
            self._lend(self._lent)
            return self._first(self.f(x))

    def _lend(self, places: Iterable[tuple[nn.Module, str]]) -> dict[tuple[nn.Module, str], Tensor]:
        copies = {}
        for m, name in places:
            if (p := m._parameters.get(name)) is not None:
                m._parameters[name] = nn.Parameter(p.detach(), requires_grad=p.requires_grad)
            elif (buffer := m._buffers.get(name)) is not None:
                copies[m, name] = m._buffers[name] = buffer.detach().clone()
        return copies

    def _first_call(self, x: Tensor, before: "list[_State]") -> Any:
        """With copies of all buffers; find out which are changed, and which parameters are given other data."""
        held = [((s.module, name), p) for s in before for name, p in s.parameters.items() if p is not None]
        data = {at: (p, p.data) for at, p in held if _is_plain(p)}
        copies = self._lend((s.module, name) for s in before for name in s.buffers)
        starts = {at: _start(t) for at, t in copies.items()}
        found = self.f(x)
        originals = {(s.module, name): b for s in before for name, b in s.buffers.items()}
        changed = [at for at, t in copies.items() if _changed(at[0]._buffers.get(at[1]), t, originals[at])]
        moved = [at for at, (p, old) in data.items() if p.data_ptr() != old.data_ptr()]
        for at in moved:
            data[at][0].data = data[at][1]
        self.replaces = bool(moved) or any(_start(t) != starts[at] for at, t in copies.items())
        self._lent = changed + moved
        return found

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of all modules, each once or more."""
        return (p for m in self.modules for p in m._parameters.values() if p is not None)

    def _first(self, found: Any) -> Tensor:
        if isinstance(found, Tensor):
            return found
        parts = list(_parts(found))
        self.outputs = len(parts)
        first = next((p for p in parts if isinstance(p, Tensor) and p.is_floating_point()), None)
        if first is None:
            raise InputError(f"it must return a floating tensor, or several things of which one is; got {_kind(found)}")
        return first


def _changed(now: Tensor | None, copy: Tensor, original: Tensor | None) -> bool:
    return now is not copy or original is None or copy._version > 0 or not torch.equal(copy, original)


def _modules_of(module: nn.Module | None) -> dict[str, Any]:
    return {} if module is None else module._modules


def _is_plain(t: Tensor) -> bool:
    return type(t) in (nn.Parameter, Tensor) and t.layout == torch.strided and not t.is_meta


def _start(t: Tensor) -> int:
    return t.data_ptr() if _is_plain(t) else 0


def _put_back(held: dict[str, Any], saved: dict[str, Any]) -> None:
    for name in [name for name in held if name not in saved]:
        del held[name]
    for name, value in saved.items():
        if held.get(name, held) is not value:
            held[name] = value


def _parts(found: Any) -> Iterator[Any]:
    """What is in tuples, lists, dictionaries and data classes, in order."""
    if isinstance(found, Mapping):
        inside: Iterable[Any] = found.values()
    elif isinstance(found, (tuple, list)):
        inside = found
    elif is_dataclass(found) and not isinstance(found, type):
        inside = [getattr(found, field.name) for field in fields(found)]
    else:
        yield found
        return
    for part in inside:
        yield from _parts(part)


def _kind(found: Any) -> str:
    return type(found).__name__


def modules_of(f: Any, depth: int = 4) -> Iterator[nn.Module]:
    """The modules that a callable is, is bound to, closes over, holds or names, some more than once."""
    if isinstance(f, nn.Module):
        yield f
    elif not depth or isinstance(f, (type, types.ModuleType)):
        return
    elif isinstance(f, (list, tuple)):
        for part in f:
            yield from modules_of(part, depth - 1)
    elif isinstance(f, functools.partial):
        yield from modules_of([f.func, *f.args, *f.keywords.values()], depth - 1)
    elif isinstance(f, types.MethodType):
        yield from modules_of([f.__self__, f.__func__], depth - 1)
    elif isinstance(f, types.FunctionType):
        cells = [_cell(cell) for cell in f.__closure__ or ()]
        named = [f.__globals__[name] for name in f.__code__.co_names if name in f.__globals__]
        # of the functions that it names, those of its own file
        near = [
            value
            for value in named
            if isinstance(value, nn.Module)
            or (isinstance(value, types.FunctionType) and value.__globals__ is f.__globals__ and value is not f)
        ]
        yield from modules_of([*cells, *(f.__defaults__ or ()), *(f.__kwdefaults__ or {}).values(), *near], depth - 1)
    elif callable(f) and hasattr(f, "__dict__"):
        yield from modules_of(list(vars(f).values()), depth - 1)


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None
