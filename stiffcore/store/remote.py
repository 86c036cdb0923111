"""The store of a URL, of which everything that goes wrong on the wire is one error."""

from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zarr.abc.store import ByteRequest, RangeByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore

from stiffcore.errors import InputError
from stiffcore.store.place import (
    METADATA_MOST,
    StoreError,
    StrangeError,
    check_metadata_size,
    check_name,
    check_path,
    check_range,
    file_size,
    files_below,
    local_folder,
    open_folder,
)


class _RemoteStore(FsspecStore):
    """Zarr's store of a URL, of which everything that goes wrong on the wire is a `StoreError`.

    What s3fs and botocore raise is of many types, some of them no OSError. None may reach zarr as it is: it takes
    some for an absent key, and this module a ValueError for damage, which is deleted and made again.
    """

    @contextmanager
    def _wire(self, doing: str, key: str = "", sort: str = "file") -> Iterator[None]:
        name = key.rstrip("/") if sort == "folder" else key
        folder = local_folder(self.fs, self.path)
        if name and folder is None:
            check_name(name, self.path)
        elif name and folder is not None:
            check_path(folder, name, "" if doing == "deleted" else sort)
            if name.endswith(".json"):
                check_metadata_size(folder / name)
        try:
            yield
        except Exception as error:
            raise StoreError(f"{self._place(key)} cannot be {doing}: {error or type(error).__name__}", error) from error

    def _place(self, key: str) -> str:
        return f"{self.fs.unstrip_protocol(self.path)}/{key}".rstrip("/")

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        bounded = byte_range is None and key.endswith(".json")
        folder = local_folder(self.fs, self.path)
        if folder is not None:
            check_range(folder / key, byte_range)
        with self._wire("read", key):
            # one byte too many is enough to know, without a second request for the size
            part = RangeByteRequest(0, METADATA_MOST + 1) if bounded else byte_range
            found = await super().get(key, prototype, part)
        if bounded and found is not None and len(found) > METADATA_MOST:
            raise StrangeError(f"{self._place(key)} has more bytes than any metadata of a run: remove it")
        return found

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        ranges, folder = list(key_ranges), local_folder(self.fs, self.path)
        for key, part in ranges:
            with self._wire("read", key):
                pass
            if folder is not None:
                check_range(folder / key, part)
        with self._wire("read"):
            return await super().get_partial_values(prototype, ranges)

    async def set(self, key: str, value: Buffer, byte_range: tuple[int, int] | None = None) -> None:
        with self._wire("written", key):
            await super().set(key, value, byte_range)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        with self._wire("written", key):
            pass
        try:
            await self.fs._pipe_file(f"{self.path}/{key}", value.to_bytes(), mode="create")
        except FileExistsError:
            return
        except Exception:  # of many types where a service knows no conditional writes
            with self._wire("written", key):
                await super().set_if_not_exists(key, value)

    async def exists(self, key: str) -> bool:
        with self._wire("read", key):
            return await super().exists(key)

    async def delete(self, key: str) -> None:
        with self._wire("deleted", key):
            await super().delete(key)

    async def delete_dir(self, prefix: str) -> None:
        with self._wire("deleted", prefix, "folder"):
            await super().delete_dir(prefix)

    async def list(self) -> AsyncIterator[str]:
        with self._wire("listed"):
            async for key in super().list():
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        with self._wire("listed", prefix, "folder"):
            async for key in super().list_dir(prefix):
                yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        with self._wire("listed", prefix, "folder"):
            folder = local_folder(self.fs, self.path)
            if folder is not None:  # fsspec leaves out what cannot be listed
                for key in files_below(folder, prefix.rstrip("/")):
                    yield key
                return
            async for key in super().list_prefix(prefix):
                yield key

    async def sizes(self, prefix: str) -> dict[str, int]:
        """Bytes of each object below a prefix, by name."""
        with self._wire("listed", prefix, "folder"):
            folder = local_folder(self.fs, self.path)
            if folder is not None:
                return {key: file_size(folder / key) for key in files_below(folder, prefix.rstrip("/"))}
            found = await self.fs._find(f"{self.path}/{prefix}", detail=True, withdirs=False)
        return {name: int(facts["size"]) for name, facts in found.items()}

    async def size(self, key: str) -> int:
        """Bytes of an object; 0 where it is not there: whoever reads it says so."""
        with self._wire("read", key):
            folder = local_folder(self.fs, self.path)
            if folder:
                return file_size(folder / key)
            try:
                return int((await self.fs._info(f"{self.path}/{key}"))["size"])
            except FileNotFoundError:
                return 0

    async def names(self) -> tuple[str, ...]:
        """What lies at the root; the place need not exist, but its bucket must."""
        found = tuple([name async for name in self.list_dir("")])
        bucket = self.path.split("/")[0]  # a path in a file system begins with a slash
        with self._wire("used"):
            if not found and bucket and not await self.fs._exists(bucket):
                raise FileNotFoundError(f"there is no bucket {bucket}, or it is not open to these credentials")
        return found


def open_store(url: str) -> Store:
    """The store in a folder, or at a URL.

    Raises:
        InputError: as `open_url`.
    """
    return open_url(url) if "://" in url else open_folder(Path(url).expanduser().absolute())


def open_url(url: str) -> _RemoteStore:
    """The store at a URL that fsspec knows.

    Raises:
        InputError: where it cannot be opened, or a package is missing.
    """
    # others list too: what is remembered of a folder would hide what they wrote
    options: dict[str, Any] = {"use_listings_cache": False}
    s3 = url.startswith(("s3://", "s3a://"))
    if s3:
        options["max_concurrency"] = 1  # else each read is two requests, the first for the size alone
    if url.startswith(("file://", "local://")):
        options = {"auto_mkdir": True}
    try:
        # from_url makes one of its own class, which its annotation does not say
        return _RemoteStore.from_url(url, storage_options=options)  # type: ignore[return-value]
    except ImportError as error:
        extra = ": pip install 'stiffcore[s3]'" if s3 else ""
        raise InputError(f"{url} cannot be opened: {error}{extra}") from error
    except Exception as error:  # of many types, whatever a file system makes of its options and surroundings
        raise InputError(f"{url} cannot be opened: {error}") from error
