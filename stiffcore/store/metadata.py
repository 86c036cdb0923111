"""Every zarr.json with a digest of what is in it; the header of a run, which stands twice."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import zarr
from zarr.abc.store import Store
from zarr.codecs import Crc32cCodec
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from stiffcore.errors import DamagedError
from stiffcore.record import FORMAT
from stiffcore.study import fingerprint

# What zarr raises for stored bytes that are not what they should be: the checksum codec, and JSON, a ValueError;
# metadata with a key changed or gone, the others.
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError)
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
        return name in group
    except UNREADABLE as error:
        raise DamagedError(f"{group.store_path}/{name}/zarr.json: {error}") from error


def open_array(group: zarr.Group, name: str) -> zarr.Array:
    """An array that is as it was made.

    Raises:
        DamagedError: where it is not there, cannot be read, or is not what was written.
    """
    where = f"{group.store_path}/{name}"
    try:
        found = group.get(name)
        if not isinstance(found, zarr.Array):
            raise DamagedError(f"{where}: not there")
        # as stored, not as this version of zarr would write it
        raw = read_raw(group.store, f"{found.path}/zarr.json")
        if found.attrs.get(DIGEST) != metadata_digest(raw or b""):
            raise DamagedError(f"{where}/zarr.json: not what was written")
    except UNREADABLE as error:
        raise DamagedError(f"{where}: {error}") from error
    return found


def create_array(group: zarr.Group, name: str, **layout: Any) -> zarr.Array:
    """An array with a checksum on its numbers and, among its attributes, a digest of its metadata; replaces one."""
    layout |= {"compressors": (Crc32cCodec(),), "filters": None}
    draft = zarr.create_array(MemoryStore(), zarr_format=3, **layout)
    raw = draft.metadata.to_buffer_dict(default_buffer_prototype())["zarr.json"].to_bytes()
    attributes = {**layout.pop("attributes", {}), DIGEST: metadata_digest(raw)}
    return group.create_array(name, attributes=attributes, overwrite=True, **layout)


def metadata_digest(raw: bytes) -> str:
    """Of an array's zarr.json, without the attribute that holds it."""
    fields = json.loads(raw)
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
        found = json.loads(raw or b"")
        attributes, header = found["attributes"], found["attributes"]["stiffcore"]
        whole = attributes[DIGEST] == digest(attributes) and header["format"] == FORMAT
        whole = whole and (found["zarr_format"], found["node_type"]) == (3, "group")
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    return attributes if whole else None


def only_begun(header: bytes | None) -> bool:
    """Whether a root is that of a run whose header was not written yet."""
    try:
        return json.loads(header or b"")["attributes"] == BEGUN
    except (ValueError, LookupError, TypeError):
        return False


def _is_begun(header: bytes | None) -> bool:
    try:
        return BEGUN.keys() <= json.loads(header or b"")["attributes"].keys()
    except (ValueError, LookupError, TypeError, AttributeError):
        return False


def torn(header: bytes | None) -> bool:
    """Whether the first write of a root was cut off."""
    return header is not None and group_buffer(BEGUN).to_bytes().startswith(header)


def foreign(names: Iterable[str], header: bytes | None) -> bool:
    """Whether a place with these names in it, and that root, is not that of a run."""
    ours = {ROOT} if torn(header) else set()
    return not _is_begun(header) and any(not _LEFT.fullmatch(name) for name in set(names) - ours)
