"""Checkpoints in: any container to one flat dictionary of finite tensors, its digest, and a filled module."""

import hashlib
import mmap
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from stiffcore.errors import InputError
from stiffcore.memory import default_allowed_bytes
from stiffcore.study import format_bytes

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".th", ".tar", ".t7", ".pkl")
"""Usual names of checkpoints; what a file holds decides how it is read."""

NESTS = (
    *("state_dict", "model_state_dict", "net", "model", "model_state", "network", "module", "weights", "params"),
    *("model_ema", "state_dict_ema", "ema_state_dict", "ema", "params_ema"),
)
"""Where a state dict lies in a dictionary; the first that is there is taken."""

PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
"""Of wrappers; digests are of the names without them."""

WRAPPERS = (
    *PREFIXES,
    *("_module.", "_forward_module.", "backbone.", "resnet.", "network.", "encoder.", "base_model.", "ema_model."),
)
"""Of these, too, a state is freed where the module that it is for does not carry them; digests are not."""

# buffers that profilers of operations (thop) leave behind in a module
_PROFILED = ("total_ops", "total_params")
# What may lie beside the state: a stand-in takes its place, so that nothing of these is called.
_INERT = (
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray", "argparse.Namespace", "torch.torch_version.TorchVersion"),
    *(f"{home}.{name}Path" for home in ("pathlib", "pathlib._local") for name in ("Posix", "Windows")),
    *(f"datetime.{name}" for name in ("datetime", "date", "timedelta")),
)
# what lies where a checkpoint was meant, by how it begins
_STRANGERS = {
    b"version h": "a pointer of Git LFS, not the file itself: fetch that with git lfs pull",
    b"\x89HDF": "an HDF5 file: load it where it was made, and save its tensors as .safetensors",
    b"<": "a page of the web, not what it links to: fetch the file again",
}
_ZIP, _PICKLE, _SAFETENSORS_HEADER = b"PK\x03\x04", b"\x80\x02", 9
# Lightning inside a trainer's dictionary is two deep; the bound stops a dictionary that contains itself.
_DEEPEST_NEST = 4
_LISTED = 3


def read_checkpoint(path: Path, allowed: int | None = None) -> dict[str, Tensor]:
    """A checkpoint file becomes one flat dictionary of finite CPU tensors; nothing in it is ever executed.

    Reads safetensors, and what `torch.save` writes, whatever the file's name. A state dict nested under one of `NESTS`,
    or else under the only key that holds one, is taken out; what lies beside it (epoch, accuracy, numpy's numbers) is
    ignored. A prefix of `PREFIXES` that every key carries is stripped. Pickled modules are not supported.

    Args:
        path: the file.
        allowed: bytes that tensors may take beyond those of the file (a number that is expanded to a large shape, an
            archive to unpack); None: 80 % of what is free.

    Returns:
        Tensors by name, in the file's order and dtype. They may be backed by the file (memory-mapped), so it
        must not be rewritten while they are in use.

    Raises:
        InputError: the file is missing, a folder, damaged, would run code, holds no tensors or something else
            than tensors, declares more than `allowed`, or has values that are not finite.
    """
    path = Path(path)
    allowed = default_allowed_bytes() if allowed is None else allowed
    _check_file(path)
    content = _read_safetensors(path) if _is_safetensors(path) else _read_torch(path, allowed)
    state = _only_tensors(_unnest(content, path), path)
    _check_size(state, path, allowed)
    refuse_nonfinite(state, str(path))
    prefix = common_prefix(state)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def common_prefix(names: Iterable[str], prefixes: Sequence[str] = PREFIXES) -> str:
    """The wrappers' prefix that every name carries, such as `module._orig_mod.`; empty where there is none.

    Args:
        names: the keys of a state dict.
        prefixes: those that it may be made of.
    """
    names, prefix = list(names), ""
    if not names:
        return prefix
    # A key may not vanish altogether, so a prefix must leave something of every name.
    while found := next((p for p in prefixes if all(_continues(name, prefix + p) for name in names)), None):
        prefix += found
    return prefix


def aligned(state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """A state under the names of a module: the wrappers' prefixes of either side, and profilers' buffers, do not count.

    Args:
        state: tensors by name.
        names: the keys of the module's state dict.
    """
    names = list(names)
    counted = {_last(name) for name in names}
    kept = {name: t for name, t in state.items() if _last(name) not in _PROFILED or _last(name) in counted}
    theirs, own = common_prefix(kept, WRAPPERS), common_prefix(names, WRAPPERS)
    return {own + name.removeprefix(theirs): tensor for name, tensor in kept.items()}


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Equal names, dtypes, shapes and bits give equal digests, whatever the container or the keys' order.

    Args:
        state: tensors by name, of any dtype, shape and device.

    Returns:
        The SHA-256 in hexadecimal. Memory: a copy of one tensor at most, and only of one that is not
        contiguous or not on the CPU.
    """
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().resolve_conj().resolve_neg().contiguous()
        sha.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def refuse_nonfinite(state: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights with NaN or infinite values: no spectrum follows from them.

    Args:
        state: tensors by name.
        where: what they belong to, for the message.

    Raises:
        InputError: naming the first such tensor, its count of such values, and how many other tensors have
            some.
    """
    counts = {name: bad for name, tensor in state.items() if (bad := _count_nonfinite(tensor))}
    if not counts:
        return
    first, bad = next(iter(counts.items()))
    others = f" ({len(counts) - 1} other tensors have some too)" if len(counts) > 1 else ""
    raise InputError(
        f"{where}: {first} has {bad} of {state[first].numel()} values that are NaN or infinite{others}: "
        "use weights from before the training diverged, or a wider dtype where only the cast overflows"
    )


def fit_state(module: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype, where: str) -> None:
    """After this the module holds `state` in the precision of `dtype`, and no parameter asks for a gradient.

    The module may have been built on the meta device, but then must have no buffer outside its state dict:
    nothing could fill it. `num_batches_tracked` may be missing and becomes 0. The module never shares memory
    with `state`.

    Args:
        module: what is filled, in place; untouched where the state does not fit.
        state: tensors by name, of the shapes of `module.state_dict()`.
        dtype: floating dtype of the result.
        where: what the state is, for the message (a path, say).

    Raises:
        InputError: the state does not fit; the message has the first offending key with both shapes, the
            number of the others, and the first missing and unexpected keys. Or a value overflows in `dtype`.

    Memory: one model in `dtype` and one tensor, beside `state` and what the module held before.
    """
    expected = {name: t for name, t in module.state_dict().items() if isinstance(t, Tensor)}
    _check_meta_buffers(module, expected, where)
    _check_fit(expected, state, where)
    cast = {name: _cast(name, state, wanted, dtype) for name, wanted in expected.items()}
    refuse_nonfinite(cast, f"{where} in {_short(dtype)}")
    try:
        # assign, not copy: a copy into meta tensors is a silent no-op
        module.load_state_dict(cast, strict=True, assign=True)
    except RuntimeError as error:
        raise InputError(f"{where} does not fit {type(module).__name__}: {_first_line(error)}") from error
    module.requires_grad_(False)


# ----------------------------------------------------------------------------------------------- reading


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise InputError(f"{path} is a folder: name the checkpoint file inside it ({', '.join(SUFFIXES)})")
    if not path.exists():
        raise InputError(f"there is no checkpoint {path}: check the path")
    if not path.is_file():  # a pipe or a device may never end
        raise InputError(f"{path} is no regular file: name the checkpoint itself")
    strange = next((what for begin, what in _STRANGERS.items() if _start(path).startswith(begin)), None)
    if strange:
        raise InputError(f"{path} is {strange}")


def _is_safetensors(path: Path) -> bool:
    """By what it holds: the length of a header, then a brace; by its name, where it is too damaged to tell."""
    start = _start(path)
    if start.startswith(_ZIP):
        return False
    fits = int.from_bytes(start[:8], "little") <= path.stat().st_size - 8
    return (start[8:] == b"{" and fits) or (path.suffix.lower() == ".safetensors" and not start.startswith(_PICKLE))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path, device="cpu")
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(_damaged(path, error)) from error


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_SAFETENSORS_HEADER)


class _Inert:
    """Stands for a value beside the state, whatever it was made of."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _read_torch(path: Path, allowed: int) -> Any:
    try:
        # Only the zip container can be mapped, and only where nothing in it is compressed; the older format (before
        # torch 1.6) has to be read whole.
        mapped = _check_archive(path, allowed) if _start(path).startswith(_ZIP) else _check_pickle(path)
        # torch takes what is called .safetensors for one, unless it gets the open file, which it cannot map
        mapped = mapped and path.suffix.lower() != ".safetensors"
        names: list[Any] = [(_Inert, name) for name in _INERT]
        with warnings.catch_warnings(), torch.serialization.safe_globals(names), path.open("rb") as file:
            # torch warns of unusual pickle protocols just before it refuses them; one message is enough
            warnings.simplefilter("ignore")
            return torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        raise InputError(_unsafe(path, error)) from error
    except Exception as error:  # a damaged pickle raises nearly anything: KeyError, EOFError, OSError, ...
        raise InputError(_damaged(path, error)) from error


def _check_archive(path: Path, allowed: int) -> bool:
    """Refuse an archive that unpacks to too much, or holds a program; return whether nothing in it is compressed."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        unpacked = sum(member.file_size for member in members)
        if packed and unpacked > allowed:
            raise InputError(
                f"{path} ({path.stat().st_size} bytes) unpacks to {format_bytes(unpacked)}, {format_bytes(allowed)} "
                "are allowed: unpack it, or give more --memory"
            )
        if any(member.filename.lower().endswith("/constants.pkl") for member in members):
            raise InputError(
                f"{path} is a TorchScript program: save the tensors alone, as "
                "torch.save(torch.jit.load(...).state_dict(), ...)"
            )
        for member in members:
            if member.filename.lower().endswith("data.pkl"):
                _check_instructions(archive.read(member), path)
    return not packed


def _check_pickle(path: Path) -> bool:
    if path.stat().st_size:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _check_instructions(data, path)
    return False


def _check_instructions(pickled: bytes | mmap.mmap, path: Path) -> None:
    # torch takes it for harmless, but it fills as many bytes as it is told
    if pickled.find(b"\nbytearray\n") >= 0:
        raise InputError(_unsafe(path, ValueError("GLOBAL bytearray")))


def _check_size(state: Mapping[str, Tensor], path: Path, allowed: int) -> None:
    declared, held = sum(t.numel() * t.element_size() for t in state.values()), path.stat().st_size
    if declared > max(held, allowed):
        raise InputError(
            f"{path} ({held} bytes) declares tensors of {format_bytes(declared)} in all, {format_bytes(allowed)} are "
            "allowed: save the tensors as they are, without expand(), or give more --memory"
        )


def _unsafe(path: Path, error: Exception) -> str:
    found = re.search(r"GLOBAL (\S+)", str(error))
    what = (
        f"it refers to {found[1]}" if found else "it has pickle instructions that torch.save does not write by itself"
    )
    return (
        f"{path} is a pickle that could run code when it is loaded ({what}): refused, and nothing was run. "
        "Save the tensors alone with torch.save(model.state_dict(), ...), without pickle_protocol, or as .safetensors"
    )


def _damaged(path: Path, error: Exception) -> str:
    reason = f"{type(error).__name__}: {_first_line(error)}".rstrip(": ")
    return (
        f"{path} ({path.stat().st_size} bytes) is cut short, damaged or no checkpoint ({reason}): read are safetensors "
        f"and what torch.save writes, as {', '.join(SUFFIXES)} mostly are; fetch or save it again"
    )


def _unnest(content: Any, path: Path) -> Mapping[Any, Any]:
    for _ in range(_DEEPEST_NEST):
        if not isinstance(content, Mapping):
            break
        inner = next((key for key in NESTS if isinstance(content.get(key), Mapping)), None) or _only_state(content)
        if inner is None:
            return content
        content = content[inner]
    raise InputError(
        f"{path} holds {_a(content)}, not a dictionary of tensors: save model.state_dict(), "
        f"plain or under one of {', '.join(NESTS)}"
    )


def _only_state(content: Mapping[Any, Any]) -> Any:
    """The key of the only state dict among other things; None where there is none, or several."""
    found = [key for key, value in content.items() if isinstance(value, Mapping) and _is_state(value)]
    return found[0] if len(found) == 1 and not _is_state(content) else None


def _is_state(content: Mapping[Any, Any]) -> bool:
    return bool(content) and all(_is_named_tensor(key, value) for key, value in content.items())


def _only_tensors(content: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    if not content:
        raise InputError(f"{path} holds an empty dictionary: save model.state_dict() into it")
    strangers = [f"{key!r} ({_a(value)})" for key, value in content.items() if not _is_named_tensor(key, value)]
    if strangers:
        raise InputError(
            f"{path} holds entries that are not dense tensors with a name: {_some(strangers)}. "
            f"Save model.state_dict() alone, or under one of {', '.join(NESTS)} beside the rest"
        )
    return {key: value.detach() for key, value in content.items()}


def _is_named_tensor(key: Any, value: Any) -> bool:
    dense = isinstance(value, Tensor) and value.layout == torch.strided and not (value.is_quantized or value.is_nested)
    return isinstance(key, str) and dense and not value.is_meta


def _continues(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and len(name) > len(prefix)


def _count_nonfinite(tensor: Tensor) -> int:
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.is_meta or not tensor.numel():
        return 0
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    # the eight-bit formats have no arithmetic of their own
    wide = real.float() if real.element_size() == 1 else real
    # The extremes carry any NaN or infinity; counting takes 20 times as long, so only on suspicion.
    if all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(wide.flatten())):
        return 0
    return tensor.numel() - int(torch.isfinite(tensor.float() if wide is not real else tensor).sum())


# ----------------------------------------------------------------------------------------------- fitting


def _check_meta_buffers(module: nn.Module, expected: Mapping[str, Tensor], where: str) -> None:
    lost = [name for name, buffer in module.named_buffers() if buffer.is_meta and name not in expected]
    if lost:
        raise InputError(
            f"{where} cannot fill {type(module).__name__}: its buffers {_some(lost)} are on the meta device "
            "and in no state dict. Build the module on the CPU"
        )


def _check_fit(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str) -> None:
    offenders = [text for name, wanted in expected.items() if (text := _offence(name, wanted, state.get(name)))]
    missing = [name for name in expected if name not in state and not _is_counter(name)]
    unexpected = [name for name in state if name not in expected]
    offenders += [f"{name}: the network has none, found {_shape(state[name])}" for name in unexpected]
    if not offenders:
        return
    others = f"; {len(offenders) - 1} other keys do not fit either" if len(offenders) > 1 else ""
    lists = [f"{title}: {_some(names)}" for title, names in (("missing", missing), ("unexpected", unexpected)) if names]
    details = f" ({'; '.join(lists)})" if lists else ""
    raise InputError(f"{where} does not fit the network: first {offenders[0]}{others}{details}")


def _offence(name: str, wanted: Tensor, found: Tensor | None) -> str:
    """One clause where the two do not go together, otherwise nothing."""
    if found is None:
        return "" if _is_counter(name) else f"{name}: the network needs {_shape(wanted)}, the checkpoint has none"
    if wanted.shape != found.shape:
        return f"{name}: the network needs {_shape(wanted)}, found {_shape(found)}"
    differ = _kind(wanted) != _kind(found)
    if differ or (_kind(wanted) == "integer" and not torch.equal(found.to(wanted.dtype).to(found.dtype), found)):
        return f"{name}: the network needs {_short(wanted.dtype)} {_shape(wanted)}, found {_short(found.dtype)}"
    return ""


def _cast(name: str, state: Mapping[str, Tensor], wanted: Tensor, dtype: torch.dtype) -> Tensor:
    target = precision(wanted, dtype)
    if name not in state:
        return torch.zeros(wanted.shape, dtype=target)
    # A copy even where the dtype already agrees: the state may be mapped from a file, and a file rewritten in
    # the hours of a run would change the weights or end the process with a bus error.
    return state[name].detach().to(target, copy=True)


def precision(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What a tensor of a network becomes in `dtype`: complex numbers become those of that precision.

    Args:
        tensor: any; integers and booleans keep their type.
        dtype: floating.
    """
    if tensor.is_complex():
        return dtype.to_complex()
    return dtype if tensor.is_floating_point() else tensor.dtype


def _kind(tensor: Tensor) -> str:
    return "complex" if tensor.is_complex() else "floating" if tensor.is_floating_point() else "integer"


def _is_counter(name: str) -> bool:
    return _last(name) == "num_batches_tracked"


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


# ---------------------------------------------------------------------------------------------- wording


def _some(items: list[str]) -> str:
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(items[:_LISTED]) + more


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _a(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")
