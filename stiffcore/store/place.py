"""The one place through which every read, write and deletion of a run goes: nothing outside of the run is reached.

A run is data, and may be a stranger's. A name that leaves it, a symbolic link on the way, and anything that is neither
file nor folder is refused, whatever asked for it. Who can write to the folder while a run is worked on is trusted.
"""

import asyncio
import os
import stat
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any

from zarr.abc.store import ByteRequest, RangeByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from stiffcore.errors import DamagedError, StiffcoreError

# Of a zarr.json: the header of 100,000 units has 10 MB.
METADATA_MOST = 64 << 20


class StoreError(StiffcoreError, OSError):
    """A run could not be reached, read or written: the network, the credentials, the bucket, permissions, a disk."""

    def __init__(self, message: str, cause: BaseException | None = None) -> None:
        super().__init__(message)
        self.errno = getattr(cause, "errno", None)

    def __str__(self) -> str:
        return str(self.args[0])


class StrangeError(DamagedError):
    """Something in a run is of no sort that a run has: a link, a folder for a file, a name that leaves the run."""


def check_name(name: str, where: object) -> None:
    """Refuse a name that is not one inside a run.

    Raises:
        StrangeError: where it leaves the run, or can be read in two ways.
    """
    if any(part in ("", ".", "..") or "\0" in part or "\\" in part for part in name.split("/")):
        raise StrangeError(f"{where}: {name!r} is no name in a run")


def check_path(root: Path, name: str, sort: str = "") -> None:
    """Refuse what is reached by a link, or is of another sort than expected; what is not there is no obstacle.

    Args:
        root: of the run, which may be a link itself: its user named it.
        name: in it; empty for the root.
        sort: `file` or `folder`; empty for either.

    Raises:
        StrangeError: where it is.
    """
    if not name:
        return
    check_name(name, root)
    path, parts = str(root), name.split("/")
    for number, part in enumerate(parts, 1):
        path = f"{path}/{part}"
        try:
            mode = os.lstat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror}", error) from error
        if stat.S_ISLNK(mode):
            raise StrangeError(f"{path} is a symbolic link, and a run has none: remove it")
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            raise StrangeError(f"{path} is neither a file nor a folder: remove it")
        wanted = "folder" if number < len(parts) else sort
        if wanted and wanted != ("folder" if stat.S_ISDIR(mode) else "file"):
            is_there = "folder" if stat.S_ISDIR(mode) else "file"
            raise StrangeError(f"{path} is a {is_there}, where a run has a {wanted}: remove it")


def check_metadata_size(path: Path) -> None:
    """Refuse to read what is far too large for metadata.

    Raises:
        StrangeError: where it is.
    """
    size = file_size(path)
    if size > METADATA_MOST:
        raise StrangeError(f"{path} has {size:,} bytes, which no metadata of a run have: remove it")


def file_size(path: Path) -> int:
    """Bytes of a file; 0 where it is not there, or cannot be seen: whoever reads it says so."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def check_range(path: Path, part: ByteRequest | None) -> None:
    """Refuse to read what does not lie in a file: the index of a shard may say anything.

    Raises:
        StrangeError: where a range begins before it, or ends behind it.
    """
    if isinstance(part, RangeByteRequest) and not 0 <= part.start <= part.end <= file_size(path):
        raise StrangeError(f"{path}: bytes {part.start} to {part.end} are asked for, and it has {file_size(path):,}")


def files_below(root: Path, prefix: str) -> Iterator[str]:
    """The files in a folder of a run and in all folders in it, by name in the run.

    Raises:
        StoreError: where one of the folders cannot be listed: what is in it is not gone.
    """

    def unlisted(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise StoreError(f"{error.filename} cannot be read: {error.strerror}", error) from error

    for folder, _, names in os.walk(root / prefix, onerror=unlisted):
        paths = (Path(folder) / name for name in names)
        yield from (path.relative_to(root).as_posix() for path in paths if path.is_file())


class _LocalPlace(LocalStore):
    """A run in a folder. What goes wrong in reading is a `StoreError`; in writing, what the system says."""

    def _file(self, key: str) -> None:
        check_path(self.root, key, "file")
        if key.endswith(".json"):
            check_metadata_size(self.root / key)

    def _unread(self, key: str, error: OSError) -> StoreError:
        return StoreError(f"{self.root / key} cannot be read: {error.strerror or error}", error)

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        self._file(key)
        check_range(self.root / key, byte_range)
        try:
            return await super().get(key, prototype, byte_range)
        except OSError as error:
            raise self._unread(key, error) from error

    def get_sync(
        self, key: str, *, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        self._file(key)
        check_range(self.root / key, byte_range)
        try:
            return super().get_sync(key, prototype=prototype, byte_range=byte_range)
        except OSError as error:
            raise self._unread(key, error) from error

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges))

    async def set(self, key: str, value: Buffer) -> None:
        self._file(key)
        await super().set(key, value)

    def set_sync(self, key: str, value: Buffer) -> None:
        self._file(key)
        super().set_sync(key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        self._file(key)
        await super().set_if_not_exists(key, value)

    async def exists(self, key: str) -> bool:
        self._file(key)
        return await super().exists(key)

    async def delete(self, key: str) -> None:
        self._file(key)
        await super().delete(key)

    def delete_sync(self, key: str) -> None:
        self._file(key)
        super().delete_sync(key)

    async def delete_dir(self, prefix: str) -> None:
        check_path(self.root, prefix)
        path = self.root / prefix
        if path.is_file():  # where a run has a folder
            path.unlink()
            return
        await super().delete_dir(prefix)

    async def sizes(self, prefix: str) -> dict[str, int]:
        """Bytes of each file below a folder, by name."""
        return {key: await self.getsize(key) async for key in self.list_prefix(prefix)}

    async def size(self, key: str) -> int:
        """Bytes of a file; 0 where it is not there."""
        self._file(key)
        return file_size(self.root / key)

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        check_path(self.root, prefix.rstrip("/"), "folder")
        for key in files_below(self.root, prefix.rstrip("/")):
            yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        check_path(self.root, prefix.rstrip("/"), "folder")
        try:
            async for key in super().list_dir(prefix):
                yield key
        except OSError as error:
            raise self._unread(prefix, error) from error

    async def getsize(self, key: str) -> int:
        self._file(key)
        return await super().getsize(key)

    async def clear(self) -> None:
        raise NotImplementedError("a run is not deleted")

    async def move(self, dest_root: Path | str) -> None:
        raise NotImplementedError("a run is not moved")


def local_folder(fs: Any, path: str) -> Path | None:
    """The folder that a URL names on this machine's own file system; None where it is elsewhere."""
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    return Path(path) if {"file", "local"} & set(protocols) else None


def open_folder(folder: Path) -> _LocalPlace:
    """The store of a run in a folder; it need not exist."""
    return _LocalPlace(folder)
