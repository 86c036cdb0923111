"""Every zarr.json with a digest of what is in it; the header of a run, which stands twice."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import zarr
from zarr.abc.store import Store
from zarr.codecs import Crc32cCodec
from zarr.core.array import AsyncArray
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.group import AsyncGroup, GroupMetadata
from zarr.core.metadata import ArrayV3Metadata
from zarr.core.sync import sync
from zarr.storage import MemoryStore, StorePath

from stiffcore.errors import DamagedError
from stiffcore.memory import default_allowed_bytes
from stiffcore.record import FORMAT
from stiffcore.study import LARGEST, fingerprint

# What zarr raises for stored bytes that are not what they should be: the checksum codec, and JSON, a ValueError;
# metadata with a key changed or gone, the others.
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, FileNotFoundError, ArithmeticError)
# What may be read without a look at what is free.
SMALL_BYTES = 64 << 20
# In the attributes of each zarr.json, see `digest`.
DIGEST = "digest"
# In the root from its first byte on, so that a run killed before its header was written is known as one.
BEGUN = {"stiffcore_begun": FORMAT}
ROOT, COPY = "zarr.json", "units/zarr.json"
GROUP_KEYS = {"attributes", "zarr_format", "node_type"}
# What a run that was killed before it wrote anything may leave.
_LEFT = re.compile(r"\.lock|\.writers|holder\.json|(zarr|holder)\.[0-9a-f]{32}\.partial")


def json_buffer(value: Mapping[str, Any]) -> Buffer:
    """JSON as zarr writes it."""
    return default_buffer_prototype().buffer.from_bytes(json.dumps(value, indent=2).encode())


def group_buffer(attributes: Mapping[str, Any]) -> Buffer:
    """The zarr.json of a group."""
    return json_buffer({"attributes": attributes, "zarr_format": 3, "node_type": "group"})


# Of JSON in a run: what is nested more deeply was not written here, and takes more stack than there is.
DEEPEST = 64


def parsed(raw: bytes) -> dict[str, Any]:
    """The object that JSON holds.

    Raises:
        ValueError: where it is none, or nested deeply.
    """
    try:
        found = json.loads(raw)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("not an object")
    level: list[Any] = [found]
    for _ in range(DEEPEST):
        level = [part for value in level if isinstance(value, (dict, list)) for part in _parts(value)]
        if not level:
            return found
    raise ValueError("nested too deeply")


def _parts(value: dict | list) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def read_raw(store: Store, name: str) -> bytes | None:
    """What a file or object holds; None where it is not there."""
    found = sync(store.get(name, default_buffer_prototype()))
    return None if found is None else found.to_bytes()


async def names_in(store: Store, folder: str) -> list[str]:
    """The groups and arrays in a group."""
    return [name async for name in store.list_dir(folder) if not name.endswith(".json")]


def is_there(group: zarr.Group, name: str) -> bool:
    """Whether a group has something of that name.

    Raises:
        DamagedError: where its metadata cannot be read.
    """
    try:
        raw = read_raw(group.store, f"{group.path}/{name}/zarr.json".lstrip("/"))
        return raw is not None and bool(parsed(raw))
    except UNREADABLE as error:
        raise DamagedError(f"{group.store_path}/{name}/zarr.json: {error}") from error


def open_group(store: Store, path: str = "") -> zarr.Group:
    """A group that says of itself what those here do; nothing else in it is believed, as consolidated metadata.

    Raises:
        FileNotFoundError: where it is not there.
        ValueError: where it cannot be read.
    """
    raw = read_raw(store, f"{path}/zarr.json".lstrip("/"))
    if raw is None:
        raise FileNotFoundError("not there")
    found = parsed(raw)
    if (found.get("zarr_format"), found.get("node_type")) != (3, "group"):
        raise ValueError("not a Zarr group of format 3")
    attributes = found.get("attributes")
    if not isinstance(attributes, dict):
        raise ValueError("attributes: not an object")
    return zarr.Group(AsyncGroup(GroupMetadata(attributes=attributes), StorePath(store, path)))


def open_array(group: zarr.Group, name: str) -> zarr.Array:
    """An array that is as it was made, in one of the layouts that are made here.

    Raises:
        DamagedError: where it is not there, cannot be read, or is not what was written.
    """
    where = f"{group.store_path}/{name}"
    path = f"{group.path}/{name}".lstrip("/")
    try:
        # as stored, not as this version of zarr would write it
        raw = read_raw(group.store, f"{path}/zarr.json")
        if raw is None:
            raise DamagedError(f"{where}: not there")
        fields = parsed(raw)
        if fields["attributes"].get(DIGEST) != metadata_digest(raw):
            raise DamagedError(f"{where}/zarr.json: not what was written")
        problem = layout_problem(fields)
        if problem:
            raise DamagedError(f"{where}/zarr.json: {problem}")
        return zarr.Array(AsyncArray(ArrayV3Metadata.from_dict(fields), StorePath(group.store, path)))
    except UNREADABLE as error:
        raise DamagedError(f"{where}: {error}") from error


TYPES = {f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}
TYPES |= {"bool", "float16", "float32", "float64", "complex64", "complex128"}
AXES_MOST = 8
CHECKSUM_BYTES = 4
_ENDIAN = {"name": "bytes", "configuration": {"endian": "little"}}
_PLAIN = [[{"name": "bytes"}, {"name": "crc32c"}], [_ENDIAN, {"name": "crc32c"}]]


def layout_problem(fields: Mapping[str, Any]) -> str:
    """What the metadata of an array have that those made here have not; nothing else is given to Zarr to act on."""
    shape, grid, codecs = fields.get("shape"), fields.get("chunk_grid"), fields.get("codecs")
    if (fields.get("zarr_format"), fields.get("node_type")) != (3, "array"):
        return "not a Zarr array of format 3"
    if fields.get("data_type") not in TYPES:
        return "data_type: not one of a run"
    if not (isinstance(shape, list) and 0 < len(shape) <= AXES_MOST and all(map(_is_size, shape))):
        return "shape: not one of a run"
    chunks = grid["configuration"].get("chunk_shape") if isinstance(grid, dict) and grid.get("name") == "regular" else 0
    if not _is_chunk(chunks, shape):
        return "chunk_grid: not one of a run"
    if fields.get("chunk_key_encoding") != {"name": "default", "configuration": {"separator": "/"}}:
        return "chunk_key_encoding: not one of a run"
    if fields.get("storage_transformers") not in (None, []):
        return "storage_transformers: there are none in a run"
    if codecs in _PLAIN:
        return ""
    whole = isinstance(codecs, list) and len(codecs) == 1 and codecs[0].get("name") == "sharding_indexed"
    inner = codecs[0].get("configuration") if whole and isinstance(codecs, list) else None
    if not isinstance(inner, dict) or not _is_chunk(inner.get("chunk_shape"), shape):
        return "codecs: not those of a run"
    parts = inner.get("codecs") in _PLAIN and inner.get("index_codecs") in _PLAIN
    if not parts or inner.get("index_location") != "end":
        return "codecs: not those of a run"
    return ""


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


def _is_chunk(chunks: Any, shape: Sequence[int]) -> bool:
    return isinstance(chunks, list) and len(chunks) == len(shape) and all(_is_size(c) and c > 0 for c in chunks)


def check_numbers(array: zarr.Array, where: str) -> None:
    """Hold the files of an array of plain chunks against what its metadata declare, before anything is read.

    Raises:
        DamagedError: where one is not there (zarr reads it as zeros), or has another size.
    """
    count = math.prod(-(-size // chunk) for size, chunk in zip(array.shape, array.chunks, strict=True))
    declared = math.prod(array.chunks) * array.dtype.itemsize + CHECKSUM_BYTES
    sizes = sync(array.store.sizes(f"{array.path}/c"))  # type: ignore[attr-defined]  # both stores of a run have it
    if len(sizes) < count:
        raise DamagedError(f"{where}: its numbers are not there")
    other = [size for size in sizes.values() if size != declared]
    if other and array.shards is None:
        raise DamagedError(f"{where}: a chunk has {other[0]:,} bytes, and its metadata declare {declared:,}")


def check_memory(count: int, where: str) -> None:
    """Refuse to read what this machine cannot hold.

    Raises:
        DamagedError: where it would be more bytes than are free.
    """
    if count > SMALL_BYTES and count > default_allowed_bytes():
        raise DamagedError(f"{where}: declares {count:,} bytes, more than are free")


def create_array(group: zarr.Group, name: str, **layout: Any) -> zarr.Array:
    """An array with a checksum on its numbers and, among its attributes, a digest of its metadata; replaces one."""
    layout |= {"compressors": (Crc32cCodec(),), "filters": None}
    draft = zarr.create_array(MemoryStore(), zarr_format=3, **layout)
    raw = draft.metadata.to_buffer_dict(default_buffer_prototype())["zarr.json"].to_bytes()
    attributes = {**layout.pop("attributes", {}), DIGEST: metadata_digest(raw)}
    return group.create_array(name, attributes=attributes, overwrite=True, **layout)


def metadata_digest(raw: bytes) -> str:
    """Of an array's zarr.json, without the attribute that holds it."""
    fields = parsed(raw)
    fields["attributes"].pop(DIGEST, None)
    return digest(fields)


def digest(fields: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values, whatever their order; of all but the digest itself."""
    return fingerprint({name: value for name, value in fields.items() if name != DIGEST})


def checked(attributes: dict[str, Any], where: str) -> dict[str, Any]:
    """The attributes of a group without their digest.

    Raises:
        DamagedError: where they are not what was written.
    """
    if attributes.get(DIGEST) != digest(attributes):
        raise DamagedError(f"{where}: not what was written")
    return {name: value for name, value in attributes.items() if name != DIGEST}


def header_in(raw: bytes | None) -> dict[str, Any] | None:
    """The attributes of a root or of its copy; None where they hold no whole header."""
    try:
        found = parsed(raw or b"")
        attributes, header = found["attributes"], found["attributes"]["stiffcore"]
        whole = attributes[DIGEST] == digest(attributes) and header["format"] == FORMAT
        whole = whole and (found["zarr_format"], found["node_type"]) == (3, "group")
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    return attributes if whole else None


def only_begun(header: bytes | None) -> bool:
    """Whether a root is that of a run whose header was not written yet."""
    try:
        return parsed(header or b"")["attributes"] == BEGUN
    except (ValueError, LookupError, TypeError):
        return False


def _is_begun(header: bytes | None) -> bool:
    try:
        return BEGUN.keys() <= parsed(header or b"")["attributes"].keys()
    except (ValueError, LookupError, TypeError, AttributeError):
        return False


def torn(header: bytes | None) -> bool:
    """Whether the first write of a root was cut off."""
    return header is not None and group_buffer(BEGUN).to_bytes().startswith(header)


def foreign(names: Iterable[str], header: bytes | None) -> bool:
    """Whether a place with these names in it, and that root, is not that of a run."""
    ours = {ROOT} if torn(header) else set()
    return not _is_begun(header) and any(not _LEFT.fullmatch(name) for name in set(names) - ours)
