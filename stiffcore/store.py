"""The run on disk or on a URL: a Zarr v3 hierarchy that knows what is done. The one place that imports zarr.

Layout:

    RUN/zarr.json                      attributes: format, study, identity, versions
    RUN/holder.json                    who works on it now
    RUN/images/{x,y,index,...}         the inputs
    RUN/units/UNIT/zarr.json           attributes: the unit's record, its stage among it
    RUN/units/UNIT/{matrix,hessenberg} (k, k), while needed; beside each, NAME_tiles says what is written
    RUN/units/UNIT/eigenvalues         (k,) complex, the computed ones of J; the exact ones and zeros are attributes

Nothing is inferred from files. A matrix's column shard is done when its column in NAME_tiles says so, written
after the shard; a stage is done when the unit's record says so, written after its arrays.

No flipped byte goes unseen: numbers have checksums, and each zarr.json has a digest of the rest of it among its
attributes. What makes the run stands twice, in the root and in RUN/units/zarr.json.
"""

import hashlib
import json
import os
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import scipy.sparse
import zarr
from filelock import FileLock, Timeout
from zarr.abc.store import ByteRequest, Store
from zarr.codecs import Crc32cCodec
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore, MemoryStore

from stiffcore.errors import BusyError, DamagedError, InputError, NoRunError, StiffcoreError
from stiffcore.spectra import Certificate, Ends, Spectrum, unspelled

FORMAT = 2
# Arrays of a unit that are not needed once its spectrum is certified.
SCRATCH = ("matrix", "hessenberg", "tau", "scale", "reduced_eigenvalues", "right_vectors", "left_vectors")
# What a unit keeps of real parts where its spectrum is not kept.
HISTOGRAM = ("histogram", "histogram_edges")
# Of one file; a panel of a taller matrix is several, of which those that are all zero are not written.
ROWS_IN_SHARD = 16_384
# Rows of each of these: a sparse matrix of order 100,000 is written in 16 s in bands of 4,096, in 53 s of 16,384.
BAND_ROWS = 4096
HEARTBEAT_S = 15.0
DEAD_AFTER_S = 60.0

# Zarr's own pools would multiply under several workers on one machine.
zarr.config.set({"async.concurrency": 4, "threading.max_workers": 2})
# What zarr raises for stored bytes that are not what they should be: the checksum codec, and JSON, a ValueError;
# metadata with a key changed or gone, the others.
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError)
# In the attributes of each zarr.json, see `_digest`.
DIGEST = "digest"
# In the root from its first byte on, so that a run killed before its header was written is known as one.
_BEGUN = {"stiffcore_begun": FORMAT}
_IMAGES = "images"
_ROOT, _COPY = "zarr.json", "units/zarr.json"
_GROUP_KEYS = {"attributes", "zarr_format", "node_type"}
# Tokens of the runs that this process holds.
_HELD: set[str] = set()
# What a run that was killed before it wrote anything may leave.
_LEFT = re.compile(r"\.lock|holder\.json|(zarr|holder)\.[0-9a-f]{32}\.partial")


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


class Tile(IntEnum):
    """What is known of a tile of a matrix."""

    ZERO = 0
    STORED = 1
    MISSING = 255


def file_rows(rows: int, tile: int) -> int:
    """Rows of a matrix that share a file, whole tiles: all of them, or a band where there are many."""
    if rows <= ROWS_IN_SHARD:
        return -(-rows // tile) * tile
    return max(1, min(BAND_ROWS, ROWS_IN_SHARD) // tile) * tile


class TiledMatrix:
    """A (rows, columns) matrix written once, column shard by column shard, whose all-zero tiles cost nothing.

    A shard is `shard` columns: one file (one object), or where there are more than `ROWS_IN_SHARD` rows one for each
    band of `BAND_ROWS`; inside are tiles of `tile` rows, each with a checksum. `NAME_tiles` (row tiles, shards) holds a
    `Tile` each.
    """

    def __init__(self, group: zarr.Group, name: str) -> None:
        """Open a matrix that exists in `group`; see `create`."""
        self._data = _array(group, name)
        self._tiles = _array(group, f"{name}_tiles")
        self.shape: tuple[int, int] = self._data.shape  # type: ignore[assignment]
        self.dtype: np.dtype = self._data.dtype
        self.tile, self.shard = self._data.chunks
        self._band = (self._data.shards or self.shape)[0]

    @classmethod
    def create(
        cls, group: zarr.Group, name: str, shape: tuple[int, int], dtype: np.dtype, tile: int, shard: int
    ) -> "TiledMatrix":
        """Create the matrix, or open it as it is where the same one exists (its shards stay).

        Args:
            group: the unit's group.
            name: of the array.
            shape: (rows, columns), both at least 1.
            dtype: of the numbers.
            tile: rows of a tile.
            shard: columns of a shard.
        """
        if not _there(group, f"{name}_tiles"):
            rows, columns = shape
            tile, shard = min(tile, rows), min(shard, columns)
            row_tiles = -(-rows // tile)
            band = file_rows(rows, tile)
            _create_array(
                group,
                name,
                shape=shape,
                dtype=dtype,
                chunks=(tile, shard),
                shards=(band, shard),
                fill_value=0,
                dimension_names=("row", "column"),
            )
            # of a half-deleted one, chunks may be left that would vouch for shards not there: they are deleted
            _create_array(
                group,
                f"{name}_tiles",
                shape=(row_tiles, -(-columns // shard)),
                dtype="uint8",
                chunks=(row_tiles, 1),
                fill_value=int(Tile.MISSING),
                dimension_names=("row_tile", "column_shard"),
            )
        return cls(group, name)

    @property
    def shards(self) -> int:
        """How many column shards there are."""
        return self._tiles.shape[1]

    def columns(self, shard: int) -> tuple[int, int]:
        """First and one past the last column of a shard."""
        return shard * self.shard, min((shard + 1) * self.shard, self.shape[1])

    def missing(self) -> list[int]:
        """The shards that are not recorded as done, ascending.

        Raises:
            DamagedError: where the record cannot be read.
        """
        done = (self._states() != Tile.MISSING).all(axis=0)
        return [int(i) for i in np.flatnonzero(~done)]

    def write(self, shard: int, block: np.ndarray | scipy.sparse.csc_array) -> int:
        """Write one shard whole, then record it as done.

        Args:
            shard: its number.
            block: (rows, columns of the shard), of the matrix's dtype; not kept. Where a whole tile of a dense one is
                zero, its negative zeros become positive, in place. Of a sparse one, one band at a time is made dense.

        Returns:
            How many of its tiles are zero and cost nothing.
        """
        start, stop = self.columns(shard)
        states = np.full(self._tiles.shape[0], Tile.ZERO, dtype="uint8")
        for first, band in self._bands(block):
            of_band = states[first // self.tile :][: -(-len(band) // self.tile)]
            for tile in range(len(of_band)):
                rows = band[tile * self.tile : (tile + 1) * self.tile]
                if rows.any():
                    of_band[tile] = Tile.STORED
                else:
                    rows[...] = 0  # Zarr does not count -0.0 as the fill value, and would store the tile
            if of_band.any():
                self._data[first : first + len(band), start:stop] = band
        self._tiles[:, shard : shard + 1] = states[:, None]
        return int((states == Tile.ZERO).sum())

    def _bands(self, block: np.ndarray | scipy.sparse.csc_array) -> Iterator[tuple[int, np.ndarray]]:
        """The bands of a block that may hold a nonzero, dense and writeable, each with its first row."""
        if isinstance(block, np.ndarray):
            if not block.flags.writeable:
                block = block.copy(order="K")
            for first in range(0, self.shape[0], self._band):
                yield first, block[first : first + self._band]
            return
        by_row = block.tocsr()
        for first in range(0, self.shape[0], self._band):
            band = by_row[first : first + self._band]
            if band.nnz:
                yield first, band.toarray()  # by row, as Zarr cuts its tiles

    def read(self) -> np.ndarray:
        """The whole matrix, Fortran-ordered: one copy, plus one shard while it is read.

        Raises:
            DamagedError: where a shard is not done, a checksum fails, or a recorded tile is not there.
        """
        out = np.zeros(self.shape, dtype=self.dtype, order="F")
        states = self._states()
        for shard in range(self.shards):
            self._read_into(out[:, slice(*self.columns(shard))], shard, states[:, shard])
        return out

    def read_sparse(self) -> scipy.sparse.csc_array:
        """The whole matrix without its zeros, canonical; its indices are of 32 bits where they fit.

        It takes twice the memory of the result, and the stored rows of one band of a shard.

        Raises:
            DamagedError: as `read`.
        """
        states = self._states()
        data, indices, counts = [], [], []
        for shard in range(self.shards):
            width = self.columns(shard)[1] - self.columns(shard)[0]
            rows, columns, values = [], [], []
            for first, block in self._stored(shard, states[:, shard]):
                column, row = np.nonzero(block.T)
                rows.append((row + first).astype(np.int32 if self.shape[0] < 2**31 else np.int64))
                columns.append(column)
                values.append(block.T[column, row])
            if rows:
                column = np.concatenate(columns)
                order = np.argsort(column, kind="stable")  # bands ascend, so the rows of a column do
                indices.append(np.concatenate(rows)[order])
                data.append(np.concatenate(values)[order])
                counts.append(np.bincount(column, minlength=width))
            else:
                counts.append(np.zeros(width, dtype=np.int64))
        pointers = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
        kind = np.int32 if max(pointers[-1], *self.shape) < 2**31 else np.int64
        numbers = np.concatenate(data) if data else np.empty(0, dtype=self.dtype)
        positions = np.concatenate(indices).astype(kind, copy=False) if indices else np.empty(0, dtype=kind)
        found = scipy.sparse.csc_array((numbers, positions, pointers.astype(kind)), shape=self.shape)
        found.has_canonical_format = True
        return found

    def check(self, *, complete: bool) -> int:
        """Read every shard, one at a time.

        Args:
            complete: whether one that is not recorded as done is damage; else it is passed over.

        Returns:
            Bytes of the tiles read.

        Raises:
            DamagedError: as `read`.
        """
        states = self._states()
        done = np.arange(self.shards) if complete else np.flatnonzero((states != Tile.MISSING).all(axis=0))
        return sum(block.nbytes for shard in done for _, block in self._stored(int(shard), states[:, shard]))

    def stored_tiles(self) -> int:
        """How many tiles are stored, each of `tile` x `shard` numbers.

        Raises:
            DamagedError: where the record cannot be read.
        """
        return int((self._states() == Tile.STORED).sum())

    def _states(self) -> np.ndarray:
        try:
            states = np.asarray(self._tiles[:])
        except _UNREADABLE as error:
            raise DamagedError(f"{self._tiles.store_path}: {error}") from error
        if not np.isin(states, list(Tile)).all():
            raise DamagedError(f"{self._tiles.store_path}: holds what is no state of a tile")
        return states

    def _read_into(self, out: np.ndarray, shard: int, states: np.ndarray) -> None:
        for first, block in self._stored(shard, states):
            out[first : first + len(block)] = block

    def _stored(self, shard: int, states: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """The rows of each band of a shard from its first stored tile to its last, with the first one's number."""
        start, stop = self.columns(shard)
        where = f"{self._data.store_path}, columns {start} to {stop - 1}"
        if (states == Tile.MISSING).any():
            raise DamagedError(f"{where}: not written yet")
        of_band = self._band // self.tile
        for band in range(0, len(states), of_band):
            stored = band + np.flatnonzero(states[band : band + of_band] == Tile.STORED)
            if not len(stored):
                continue
            first = int(stored[0]) * self.tile
            try:
                block = np.asarray(self._data[first : (int(stored[-1]) + 1) * self.tile, start:stop])
            except _UNREADABLE as error:
                raise DamagedError(f"{where}: {error}") from error
            for tile in range(int(stored[0]), int(stored[-1]) + 1):
                rows = block[tile * self.tile - first :][: self.tile]
                if bool(rows.any()) != (states[tile] == Tile.STORED):
                    raise DamagedError(
                        f"{where}: rows {tile * self.tile} and on are recorded as {Tile(states[tile]).name}"
                    )
            yield first, block


class RunStore:
    """The hierarchy of one run."""

    @staticmethod
    def check_new(url: str) -> None:
        """Refuse a place where a new run would touch what is not its own; a run that was only begun is no obstacle.

        Raises:
            InputError: where a file, or a folder with something else in it, is there.
            StoreError: where a URL cannot be reached, or its bucket does not exist.
        """
        if "://" in url:
            store = _open_store(url)
            names = sync(store.names())
            if _foreign(names, _read(store, _ROOT)):
                raise InputError(f"{url} holds something that is not a run: give a new place")
            return
        folder = Path(url).expanduser().absolute()
        if not folder.exists():
            above = next(p for p in folder.parents if p.exists())
            if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
                raise InputError(f"{url} cannot be made: {above} is not a folder that may be written to")
            return
        if not folder.is_dir():
            raise InputError(f"{url} exists and is not a folder: give a new one")
        header = None
        with suppress(OSError):
            header = (folder / "zarr.json").read_bytes()
        if _foreign((p.name for p in folder.iterdir()), header):
            raise InputError(f"{url} exists and is not a run: give a new folder")

    def __init__(self, url: str, *, create: bool = False) -> None:
        """Open a run.

        Args:
            url: a folder, or a URL that fsspec knows.
            create: make it where it does not exist; never touches one that does.

        Raises:
            NoRunError: where there is no run.
            InputError: where something else is there, or a newer stiffcore made it.
            StoreError: where a URL cannot be reached.
        """
        self.url = str(url)
        self.local = None if "://" in self.url else Path(self.url).expanduser().absolute()
        if self.local is not None:
            # zarr would make the folder that it is asked to look at
            if create:
                if not (self.local / "zarr.json").exists():
                    self.check_new(self.url)
            elif not self.local.exists():
                raise self._no_run()
            elif not self.local.is_dir():
                raise InputError(f"{self.url} is not a folder, so it is no run")
        self._store = LocalStore(self.local) if self.local else _open_store(self.url)
        try:
            self.root = zarr.open_group(store=self._store, mode="r+", zarr_format=3)
        except FileNotFoundError:
            if self.local is None or self.local.exists():  # reading would make the folder
                self._refuse_damaged("is gone")
            if not create:
                raise self._no_run() from None
            if self.local is None:
                self.check_new(self.url)
            self.root = self._create()
        except (ValueError, TypeError, KeyError) as error:
            self._refuse_damaged(str(error))
            if _torn(_read(self._store, _ROOT)):
                if not create:
                    raise self._no_run() from None
                self.check_new(self.url)
                sync(self._store.delete(_ROOT))
                self.root = self._create()
                return
            raise InputError(f"{self.url} holds something that is not a run: {error}") from error
        attributes = dict(self.root.attrs)
        if attributes == _BEGUN:
            if not create:
                raise NoRunError(f"{self.url} is a Zarr group, but not a run of stiffcore")
        elif attributes.get(DIGEST) != _digest(attributes) or "stiffcore" not in attributes:
            self._refuse_damaged("not what was written")
            self._refuse_other(attributes)
        elif self._format(attributes) != FORMAT:
            self._refuse_other(attributes)

    @staticmethod
    def _format(attributes: Mapping[str, Any]) -> int | None:
        header = attributes.get("stiffcore")
        found = header.get("format") if isinstance(header, Mapping) else None
        return found if isinstance(found, int) else None

    def _refuse_damaged(self, why: str) -> None:
        if _header_in(_read(self._store, _COPY)) is not None:
            raise DamagedError(f"{self.url}/zarr.json: {why}; `stiffcore run {self.url}` restores it from its copy")

    def _refuse_other(self, attributes: Mapping[str, Any]) -> None:
        found = self._format(attributes)
        begun = attributes.get("stiffcore_begun")
        if found is None and attributes.keys() == _BEGUN.keys() and isinstance(begun, int) and begun != FORMAT:
            raise InputError(f"{self.url} was begun by another stiffcore, and holds nothing: give a new folder")
        if found is None and not _BEGUN.keys() & attributes.keys():
            raise InputError(f"{self.url} is a Zarr group, but not a run of stiffcore: give a new folder")
        if found is None or found == FORMAT:
            raise DamagedError(f"{self.url}/zarr.json: not what was written, and no whole copy of it is there")
        older, version = found < FORMAT, attributes["stiffcore"].get("version")
        raise InputError(
            f"{self.url} was made by {'an older' if older else 'a newer'} stiffcore ({version}): "
            + ("export it with that one, or start a new run" if older else "update stiffcore to read it")
        )

    @staticmethod
    def restore(url: str) -> bool:
        """Of what makes the run and its copy, write the damaged one from the other.

        Returns:
            Whether one was damaged and the other not.

        Raises:
            StoreError: where a URL cannot be reached.
        """
        folder = Path(url).expanduser().absolute()
        if "://" not in url and not folder.is_dir():
            return False
        store = LocalStore(folder) if "://" not in url else _open_store(url)
        root, copy = _read(store, _ROOT), _read(store, _COPY)
        found = {_ROOT: _header_in(root), _COPY: _header_in(copy)}
        whole = [attributes for attributes in found.values() if attributes is not None]
        if len(whole) != 1 or _only_begun(root):
            return False
        damaged = next(name for name, attributes in found.items() if attributes is None)
        sync(store.set(damaged, _group_buffer(whole[0])))
        return True

    def _create(self) -> zarr.Group:
        # zarr looks first and writes then: a slow process would write over the header of the run of a fast one
        try:
            sync(self._store.set_if_not_exists(_ROOT, _group_buffer(_BEGUN)))
            return zarr.open_group(store=self._store, mode="r+", zarr_format=3)
        except OSError as error:
            raise InputError(f"{self.url} cannot be made: {error}") from error

    def _no_run(self) -> NoRunError:
        return NoRunError(f"there is no run at {self.url}: `stiffcore run {self.url} --network ...` starts one")

    @property
    def header(self) -> dict[str, Any] | None:
        """What made the run (study, identity, versions); None until it is written."""
        return self.root.attrs.get("stiffcore")  # type: ignore[return-value]

    @header.setter
    def header(self, value: Mapping[str, Any]) -> None:
        fields = {**_BEGUN, "stiffcore": {**value, "format": FORMAT}}
        fields[DIGEST] = _digest(fields)
        # the copy first: without a header in the root it counts for nothing
        sync(self._store.set(_COPY, _group_buffer(fields)))
        self.root = self.root.update_attributes(fields)

    def unit_group(self, key: str) -> zarr.Group:
        """The group of a unit, made where it does not exist."""
        return self.root.require_group(f"units/{key}")

    def record(self, key: str) -> dict[str, Any]:
        """What is recorded of a unit, as it stands on disk now.

        Raises:
            DamagedError: where it cannot be read, or is not what was written.
        """
        where = f"{self.url}/units/{key}/zarr.json"
        try:
            attributes = zarr.open_group(store=self._store, path=f"units/{key}", mode="r", zarr_format=3).attrs
        except _UNREADABLE as error:
            raise DamagedError(f"{where}: {error}") from error
        return _checked(dict(attributes), where)

    def update(self, key: str, /, **fields: Any) -> None:
        """Add fields to a unit's record, in one atomic write."""
        name = f"units/{key}/zarr.json"
        now = self.record(key) if _read(self._store, name) is not None else {}
        now |= fields
        sync(self._store.set(name, _group_buffer({**now, DIGEST: _digest(now)})))

    def clear(self, group: str) -> None:
        """Delete all that is stored of a group, so that it can be made anew; its metadata may be damaged."""
        sync(self._store.delete_dir(group))

    def units(self) -> dict[str, dict[str, Any]]:
        """The records of all units, by key.

        Raises:
            DamagedError: where one cannot be read, is not what was written, or is not there though the header names it.
        """
        found, damaged = self.whole_units()
        if damaged:
            shown = "; ".join(list(damaged.values())[:3])
            raise DamagedError(f"{len(damaged)} units are damaged: {shown}. `stiffcore run {self.url}` makes them anew")
        return found

    def whole_units(self) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """The records that can be trusted, by key; and what is wrong with each of the others."""
        keys = (self.header or {}).get("units") or sync(_names(self._store, "units"))
        found, damaged = {}, {}
        for key in sorted(keys):
            try:
                found[key] = self.record(key)
            except DamagedError as error:
                damaged[key] = str(error)
        return found, damaged

    def put_array(
        self, group: str, name: str, values: np.ndarray, dims: tuple[str, ...], **attributes: str | int
    ) -> None:
        """Write a small array whole, with a checksum, replacing one of that name; attributes are for its readers."""
        array = _create_array(
            self.root.require_group(group),
            name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=tuple(max(1, s) for s in values.shape),
            dimension_names=dims,
            attributes=dict(attributes),
            config={"write_empty_chunks": True},
        )
        array[...] = values

    def get_array(self, group: str, name: str) -> np.ndarray:
        """Read an array written by `put_array`.

        Raises:
            DamagedError: where its checksum fails or it is not there.
        """
        where = f"{self.url}/{group}/{name}"
        try:
            array = _array(self.root, f"{group}/{name}")
            # zarr reads a chunk that is not there as zeros
            if array.nchunks_initialized < array.nchunks:
                raise DamagedError(f"{where}: its numbers are not there")
            return np.asarray(array[...])
        except _UNREADABLE as error:
            raise DamagedError(f"{where}: {error}") from error

    def read_again(self, group: str, expected: Iterable[str]) -> Iterator[tuple[str, int, str]]:
        """Read a group's metadata and all of its arrays, against their digests and checksums.

        Args:
            group: path, of a group that holds arrays alone.
            expected: arrays that must be there, whole.

        Yields:
            The path of a thing, its bytes, and what is wrong with it, or nothing.
        """
        yield (group, *self.read_metadata(group))
        names, expected = sorted(sync(_names(self._store, group))), set(expected)
        yield from ((f"{group}/{name}", 0, "is gone") for name in sorted(expected.difference(names)))
        for name in names:
            if name.endswith("_tiles") and name.removesuffix("_tiles") in names:
                continue
            if name in SCRATCH and name not in expected and f"{name}_tiles" not in names:
                continue  # of a stage that was not finished: made again
            parts = [part for part in (name, f"{name}_tiles") if part in names]
            checks = [self.read_metadata(f"{group}/{part}") for part in parts]
            size, problem = sum(c[0] for c in checks), "; ".join(c[1] for c in checks if c[1])
            try:
                if len(parts) == 2:
                    size += TiledMatrix(self.root[group], name).check(complete=name in expected)  # type: ignore[arg-type]
                else:
                    size += self.get_array(group, name).nbytes
            except (*_UNREADABLE, DamagedError) as error:
                problem = problem or str(error)
            yield f"{group}/{name}", size, problem

    def read_metadata(self, path: str) -> tuple[int, str]:
        """Bytes of the zarr.json of a group or array, and what is wrong with it, or nothing; white space counts, too.

        Args:
            path: of it; empty for the root.
        """
        name = f"{path}/zarr.json".lstrip("/")
        raw = _read(self._store, name)
        if raw is None:
            return 0, f"{name} is gone"
        try:
            found = json.loads(raw)
            if json.dumps(found, indent=2).encode() != raw:
                return len(raw), f"{name}: not what was written"
            if found["node_type"] == "group":
                if path != _IMAGES or found["attributes"]:  # the group of the inputs has none
                    _checked(found["attributes"], name)
                if (found["zarr_format"], found.keys() - {"consolidated_metadata"}) != (3, _GROUP_KEYS):
                    return len(raw), f"{name}: not what was written"
            else:
                if found["attributes"][DIGEST] != _metadata_digest(raw):
                    return len(raw), f"{name}: not what was written"
        except (*_UNREADABLE, DamagedError):
            return len(raw), f"{name}: not what was written"
        return len(raw), ""

    def drop(self, key: str, *names: str) -> None:
        """Delete arrays of a unit, their bookkeeping first, so that a half-deleted one counts as not there."""
        for name in names:
            for part in (f"{name}_tiles", name):
                # not by the group: one whose metadata a killed session deleted first would keep its chunks for good
                sync(self._store.delete_dir(f"units/{key}/{part}"))

    def sweep(self) -> int:
        """Delete what a killed writer left behind; only for who holds the run.

        That is the images and units of a run whose header was never written (the next beginning may be of other
        units), and the `*.partial` files of zarr's local store.

        Returns:
            How many of those files there were.
        """
        if self.header is None:
            for part in ("images", "units"):
                sync(self._store.delete_dir(part))
        if self.local is None:
            return 0
        orphans = list(self.local.rglob("*.partial"))
        for path in orphans:
            path.unlink(missing_ok=True)
        return len(orphans)

    def free_bytes(self) -> int | None:
        """Free space where the run lies; None where it cannot be known."""
        return None if self.local is None else shutil.disk_usage(self.local).free

    @contextmanager
    def hold(self) -> Iterator[str]:
        """Hold the run against other processes while the context lasts.

        On a folder the lock is the operating system's, and ends with its process. On a URL it is a record with
        a heartbeat, taken over where the heartbeat stopped.

        Yields:
            The session's token, see `check_held`.

        Raises:
            BusyError: where another process holds it; the message says who.
        """
        if self.local is not None:
            lock = FileLock(self.local / ".lock", timeout=0)
            try:
                lock.acquire()
            except Timeout:
                raise BusyError(self._who()) from None
            me = _me()
            try:
                _HELD.add(me["token"])
                self._write_json("holder.json", me)
                self._refresh()
                yield me["token"]
            finally:
                _HELD.discard(me["token"])
                sync(self._store.delete("holder.json"))
                lock.release()
            return
        yield from self._hold_by_heartbeat()

    def _hold_by_heartbeat(self) -> Iterator[str]:
        holder = self._read_json("holder.json")
        if holder and not self._dead(holder):
            raise BusyError(self._who())
        me = _me()
        if holder is not None:
            sync(self._store.delete("holder.json"))
        sync(self._store.set_if_not_exists("holder.json", _json_buffer(me)))
        # not every service can refuse to write over what is there, and two may have deleted a dead one's:
        # of two that write at once, the later one is left, and the other sees it here
        time.sleep(0.5)
        if (self._read_json("holder.json") or {}).get("token") != me["token"]:
            raise BusyError(self._who())
        _HELD.add(me["token"])
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(HEARTBEAT_S):
                try:
                    if (self._read_json("holder.json") or me)["token"] != me["token"]:
                        return  # this process slept too long and was taken for dead: the run is another's now
                    self._write_json("holder.json", {**me, "heartbeat": time.time()})
                except OSError:
                    continue  # a network's hiccup; the next beat may come through in time

        thread = threading.Thread(target=beat, daemon=True, name="stiffcore-heartbeat")
        thread.start()
        try:
            self._refresh()
            yield me["token"]
        finally:
            stop.set()
            thread.join()
            _HELD.discard(me["token"])
            # what cannot be reached any more keeps the record of a holder that will be silent, or dead
            with suppress(OSError):
                if (self._read_json("holder.json") or me)["token"] == me["token"]:
                    sync(self._store.delete("holder.json"))

    def _refresh(self) -> None:
        # who held the run before may have written a header since it was opened
        self.root = zarr.open_group(store=self._store, mode="r+", zarr_format=3)

    def _who(self) -> str:
        holder = self._read_json("holder.json") or {}
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.get("since", time.time())))
        return (
            f"{self.url} is being worked on by process {holder.get('pid', '?')} on {holder.get('host', '?')}, "
            f"since {since}: wait for it, or stop it; `stiffcore status {self.url}` shows how far it is"
        )

    def holder(self) -> dict[str, Any] | None:
        """Who holds the run now, if a living process does."""
        holder = self._read_json("holder.json")
        return holder if holder and not self._dead(holder) else None

    def check_held(self, token: str) -> None:
        """Refuse to go on where the session with this token is over, so that a late worker spoils no other's work.

        Raises:
            BusyError: where nobody holds the run, or somebody else does.
        """
        if (self._read_json("holder.json") or {}).get("token") != token:
            raise BusyError(f"the session that began this on {self.url} is over")

    def _dead(self, holder: Mapping[str, Any]) -> bool:
        # the holder of a folder does not beat: its lock is the operating system's
        silent = self.local is None and time.time() - holder["heartbeat"] >= DEAD_AFTER_S
        return silent or _dead_here(holder)

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        sync(self._store.set(name, _json_buffer(value)))

    def _read_json(self, name: str) -> dict[str, Any] | None:
        """What a JSON file holds: None where it is not there, nothing where a killed writer left it half written."""
        for attempt in range(3):
            found = _read(self._store, name)
            if found is None:
                return None
            try:
                return json.loads(found)
            except ValueError:
                # a URL's file may be seen half written
                time.sleep(0.05 * (attempt + 1))
        return {}


def _open_store(url: str) -> _RemoteStore:
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


def _torn(header: bytes | None) -> bool:
    """Whether the first write of a root was cut off."""
    return header is not None and _group_buffer(_BEGUN).to_bytes().startswith(header)


def _foreign(names: Iterable[str], header: bytes | None) -> bool:
    """Whether a place with these names in it, and that root, is not that of a run."""
    ours = {_ROOT} if _torn(header) else set()
    return not _is_begun(header) and any(not _LEFT.fullmatch(name) for name in set(names) - ours)


def _json_buffer(value: Mapping[str, Any]) -> Buffer:
    return default_buffer_prototype().buffer.from_bytes(json.dumps(value, indent=2).encode())


def _group_buffer(attributes: Mapping[str, Any]) -> Buffer:
    return _json_buffer({"attributes": attributes, "zarr_format": 3, "node_type": "group"})


def _read(store: Store, name: str) -> bytes | None:
    found = sync(store.get(name, default_buffer_prototype()))
    return None if found is None else found.to_bytes()


async def _names(store: Store, folder: str) -> list[str]:
    return [name async for name in store.list_dir(folder) if not name.endswith(".json")]


def _there(group: zarr.Group, name: str) -> bool:
    """Whether a group has something of that name.

    Raises:
        DamagedError: where its metadata cannot be read.
    """
    try:
        return name in group
    except _UNREADABLE as error:
        raise DamagedError(f"{group.store_path}/{name}/zarr.json: {error}") from error


def _array(group: zarr.Group, name: str) -> zarr.Array:
    where = f"{group.store_path}/{name}"
    try:
        found = group.get(name)
        if not isinstance(found, zarr.Array):
            raise DamagedError(f"{where}: not there")
        # as stored, not as this version of zarr would write it
        raw = _read(group.store, f"{found.path}/zarr.json")
        if found.attrs.get(DIGEST) != _metadata_digest(raw or b""):
            raise DamagedError(f"{where}/zarr.json: not what was written")
    except _UNREADABLE as error:
        raise DamagedError(f"{where}: {error}") from error
    return found


def _create_array(group: zarr.Group, name: str, **layout: Any) -> zarr.Array:
    """An array with a checksum on its numbers and, among its attributes, a digest of its metadata; replaces one."""
    layout |= {"compressors": (Crc32cCodec(),), "filters": None}
    draft = zarr.create_array(MemoryStore(), zarr_format=3, **layout)
    raw = draft.metadata.to_buffer_dict(default_buffer_prototype())["zarr.json"].to_bytes()
    attributes = {**layout.pop("attributes", {}), DIGEST: _metadata_digest(raw)}
    return group.create_array(name, attributes=attributes, overwrite=True, **layout)


def _metadata_digest(raw: bytes) -> str:
    """Of an array's zarr.json, without the attribute that holds it."""
    fields = json.loads(raw)
    fields["attributes"].pop(DIGEST, None)
    return _digest(fields)


def _digest(fields: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values, whatever their order; of all but the digest itself."""
    rest = {name: value for name, value in fields.items() if name != DIGEST}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _checked(attributes: dict[str, Any], where: str) -> dict[str, Any]:
    """The attributes of a group without their digest.

    Raises:
        DamagedError: where they are not what was written.
    """
    if attributes.get(DIGEST) != _digest(attributes):
        raise DamagedError(f"{where}: not what was written")
    return {name: value for name, value in attributes.items() if name != DIGEST}


def _header_in(raw: bytes | None) -> dict[str, Any] | None:
    """The attributes of a root or of its copy; None where they hold no whole header."""
    try:
        found = json.loads(raw or b"")
        attributes, header = found["attributes"], found["attributes"]["stiffcore"]
        whole = attributes[DIGEST] == _digest(attributes) and header["format"] == FORMAT
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    return attributes if whole and (found["zarr_format"], found["node_type"]) == (3, "group") else None


def _only_begun(header: bytes | None) -> bool:
    try:
        return json.loads(header or b"")["attributes"] == _BEGUN
    except (ValueError, LookupError, TypeError):
        return False


def _is_begun(header: bytes | None) -> bool:
    try:
        return _BEGUN.keys() <= json.loads(header or b"")["attributes"].keys()
    except (ValueError, LookupError, TypeError, AttributeError):
        return False


def _me() -> dict[str, Any]:
    now = time.time()
    return {
        "token": uuid.uuid4().hex,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": now,
        "heartbeat": now,
    }


def _dead_here(holder: Mapping[str, Any]) -> bool:
    if holder["host"] != socket.gethostname():
        return False
    if holder["pid"] == os.getpid():
        return holder["token"] not in _HELD  # given up where it could not be deleted
    try:
        # a process started after the holder was written only has its number
        process = psutil.Process(holder["pid"])
        return process.create_time() > holder["since"] or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def stored_spectrum(store: RunStore, key: str) -> Spectrum:
    """The spectrum of a unit that is `done`.

    Raises:
        DamagedError: where its eigenvalues cannot be read.
    """
    record = store.record(key)
    if "certificate" not in record:
        raise DamagedError(f"{store.url}, {key}: its certificate is not recorded")
    has_values = record.get("values_kept", True)
    values = store.get_array(f"units/{key}", "eigenvalues") if has_values else np.zeros(0, complex)
    expected = record.get("found", record["k"])  # fewer than k where only the ends were solved
    if has_values and len(values) != expected:
        raise DamagedError(f"{store.url}, {key}: {len(values)} eigenvalues are stored of {expected}")
    return Spectrum(
        computed=values,
        ones=record["ones"],
        zeros=record["zeros"],
        k=record["k"],
        kind=record["kind"],
        function=record["function"],
        name=record["block"],
        solver=record["plan"]["solver"],
        reason=record["reason"],
        certificate=Certificate.from_json(record["certificate"]),
        record=record,
        ends=Ends.from_json(record["ends"]) if record.get("ends") else None,
        shift=record["shift"],
        frobenius=record.get("moments", {}).get("frobenius", float("nan")),
        numerical_abscissa=record["shift"] + record.get("logarithmic_norm", float("nan")),
        given=unspelled(record["metrics"]) if record.get("metrics") else None,
        has_values=has_values,
    )
