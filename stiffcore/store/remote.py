"""The store of a URL, of which everything that goes wrong on the wire is one error."""

from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore

from stiffcore.errors import InputError, StiffcoreError


class StoreError(StiffcoreError, OSError):
    """A run on a URL could not be reached, read or written: the network, the credentials, the bucket."""


class _RemoteStore(FsspecStore):
    """Zarr's store of a URL, of which everything that goes wrong on the wire is a `StoreError`.

    What s3fs and botocore raise is of many types, some of them no OSError. None may reach zarr as it is: it takes
    some for an absent key, and this module a ValueError for damage, which is deleted and made again.
    """

    @contextmanager
    def _wire(self, doing: str, key: str = "") -> Iterator[None]:
        try:
            yield
        except Exception as error:
            place = f"{self.fs.unstrip_protocol(self.path)}/{key}".rstrip("/")
            raise StoreError(f"{place} cannot be {doing}: {error or type(error).__name__}") from error

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        with self._wire("read", key):
            return await super().get(key, prototype, byte_range)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        with self._wire("read"):
            return await super().get_partial_values(prototype, key_ranges)

    async def set(self, key: str, value: Buffer, byte_range: tuple[int, int] | None = None) -> None:
        with self._wire("written", key):
            await super().set(key, value, byte_range)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
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
        with self._wire("deleted", prefix):
            await super().delete_dir(prefix)

    async def list(self) -> AsyncIterator[str]:
        with self._wire("listed"):
            async for key in super().list():
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        with self._wire("listed", prefix):
            async for key in super().list_dir(prefix):
                yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        with self._wire("listed", prefix):
            async for key in super().list_prefix(prefix):
                yield key

    async def names(self) -> tuple[str, ...]:
        """What lies at the root; the place need not exist, but its bucket must."""
        found = tuple([name async for name in self.list_dir("")])
        bucket = self.path.split("/")[0]  # a path in a file system begins with a slash
        with self._wire("used"):
            if not found and bucket and not await self.fs._exists(bucket):
                raise FileNotFoundError(f"there is no bucket {bucket}, or it is not open to these credentials")
        return found


def open_store(url: str) -> _RemoteStore:
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
