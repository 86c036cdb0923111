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
"""

import json
import os
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import zarr
from filelock import FileLock, Timeout
from zarr.codecs import Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.errors import ContainsGroupError
from zarr.storage import FsspecStore, LocalStore

from stiffcore.errors import BusyError, DamagedError, InputError, NoRunError

FORMAT = 1
# Arrays of a unit that are not needed once its spectrum is certified.
SCRATCH = ("matrix", "hessenberg", "tau", "scale", "reduced_eigenvalues")
HEARTBEAT_S = 15.0
DEAD_AFTER_S = 60.0

# Zarr's own pools would multiply under several workers on one machine.
zarr.config.set({"async.concurrency": 4, "threading.max_workers": 2})
# What zarr raises for stored bytes that are not what they should be: the checksum codec, and JSON, a ValueError;
# metadata with a key changed or gone, the others.
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError)
# In the root from its first byte on, so that a run killed before its header was written is known as one.
_BEGUN = {"stiffcore_begun": FORMAT}


class Tile(IntEnum):
    """What is known of a tile of a matrix."""

    ZERO = 0
    STORED = 1
    MISSING = 255


class TiledMatrix:
    """A (rows, columns) matrix written once, column shard by column shard, whose all-zero tiles cost nothing.

    A shard is one file (one object) of all rows and `shard` columns, tiles of `tile` rows inside it, each with
    a checksum. `NAME_tiles` (row tiles, shards) holds a `Tile` each.
    """

    def __init__(self, group: zarr.Group, name: str) -> None:
        """Open a matrix that exists in `group`; see `create`."""
        self._data = _array(group, name)
        self._tiles = _array(group, f"{name}_tiles")
        self.shape: tuple[int, int] = self._data.shape  # type: ignore[assignment]
        self.dtype: np.dtype = self._data.dtype
        self.tile, self.shard = self._data.chunks

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
        if f"{name}_tiles" not in group:
            rows, columns = shape
            tile, shard = min(tile, rows), min(shard, columns)
            row_tiles = -(-rows // tile)
            group.create_array(
                name,
                shape=shape,
                dtype=dtype,
                chunks=(tile, shard),
                shards=(row_tiles * tile, shard),
                fill_value=0,
                compressors=(Crc32cCodec(),),
                filters=None,
                dimension_names=("row", "column"),
                overwrite=True,
            )
            group.create_array(
                f"{name}_tiles",
                shape=(row_tiles, -(-columns // shard)),
                dtype="uint8",
                chunks=(row_tiles, 1),
                fill_value=int(Tile.MISSING),
                compressors=(Crc32cCodec(),),
                filters=None,
                dimension_names=("row_tile", "column_shard"),
                overwrite=True,  # of a half-deleted one, chunks may be left that would vouch for shards not there
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

    def write(self, shard: int, block: np.ndarray) -> int:
        """Write one shard whole, then record it as done.

        Args:
            shard: its number.
            block: (rows, columns of the shard), of the matrix's dtype; not kept. Where a whole tile is zero, its
                negative zeros become positive, in place.

        Returns:
            How many of its tiles are zero and cost nothing.
        """
        start, stop = self.columns(shard)
        if not block.flags.writeable:
            block = block.copy(order="K")
        states = []
        for row in range(0, self.shape[0], self.tile):
            rows = block[row : row + self.tile]
            states.append(Tile.STORED if rows.any() else Tile.ZERO)
            if states[-1] is Tile.ZERO:
                rows[...] = 0  # Zarr does not count -0.0 as the fill value, and would store the tile
        self._data[:, start:stop] = block
        self._tiles[:, shard : shard + 1] = np.array(states, dtype="uint8")[:, None]
        return states.count(Tile.ZERO)

    def read(self) -> np.ndarray:
        """The whole matrix, Fortran-ordered: one copy, plus one shard while it is read.

        Raises:
            DamagedError: where a shard is not done, a checksum fails, or a recorded tile is not there.
        """
        out = np.empty(self.shape, dtype=self.dtype, order="F")
        states = self._states()
        for shard in range(self.shards):
            start, stop = self.columns(shard)
            out[:, start:stop] = self._read_shard(shard, states[:, shard])
        return out

    def _states(self) -> np.ndarray:
        try:
            states = np.asarray(self._tiles[:])
        except _UNREADABLE as error:
            raise DamagedError(f"{self._tiles.store_path}: {error}") from error
        if not np.isin(states, list(Tile)).all():
            raise DamagedError(f"{self._tiles.store_path}: holds what is no state of a tile")
        return states

    def _read_shard(self, shard: int, states: np.ndarray) -> np.ndarray:
        start, stop = self.columns(shard)
        where = f"{self._data.store_path}, columns {start} to {stop - 1}"
        if (states == Tile.MISSING).any():
            raise DamagedError(f"{where}: not written yet")
        if (states == Tile.ZERO).all():
            return np.zeros((self.shape[0], stop - start), dtype=self.dtype)
        try:
            block = np.asarray(self._data[:, start:stop])
        except _UNREADABLE as error:
            raise DamagedError(f"{where}: {error}") from error
        for tile, state in enumerate(states):
            rows = block[tile * self.tile : (tile + 1) * self.tile]
            if bool(rows.any()) != (state == Tile.STORED):
                raise DamagedError(f"{where}: rows {tile * self.tile} and on are recorded as {Tile(state).name}")
        return block


class RunStore:
    """The hierarchy of one run."""

    @staticmethod
    def check_new(url: str) -> None:
        """Refuse a place where a new run would touch what is not its own; a run that was only begun is no obstacle.

        Raises:
            InputError: where a file, or a folder with something else in it, is there.
        """
        folder = Path(url).expanduser().absolute() if "://" not in url else None
        if folder is None:
            return
        if not folder.exists():
            above = next(p for p in folder.parents if p.exists())
            if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
                raise InputError(f"{url} cannot be made: {above} is not a folder that may be written to")
            return
        if not folder.is_dir():
            raise InputError(f"{url} exists and is not a folder: give a new one")
        # left by a run that was killed before it wrote anything
        left = re.compile(r"\.lock|holder\.json|(zarr|holder)\.[0-9a-f]{32}\.partial")
        if not _is_begun(folder) and any(not left.fullmatch(p.name) for p in folder.iterdir()):
            raise InputError(f"{url} exists and is not a run: give a new folder")

    def __init__(self, url: str, *, create: bool = False) -> None:
        """Open a run.

        Args:
            url: a folder, or a URL that fsspec knows.
            create: make it where it does not exist; never touches one that does.

        Raises:
            NoRunError: where there is no run.
            InputError: where something else is there, or a newer stiffcore made it.
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
        # only local files need, and know, this option
        options = {"auto_mkdir": True} if self.url.startswith(("file://", "local://")) else None
        try:
            self._store = (
                LocalStore(self.local) if self.local else FsspecStore.from_url(self.url, storage_options=options)
            )
        except (ValueError, ImportError) as error:
            raise InputError(f"{self.url} cannot be opened: {error}") from error
        try:
            self.root = zarr.open_group(store=self._store, mode="r+", zarr_format=3)
        except FileNotFoundError:
            if not create:
                raise self._no_run() from None
            self.root = self._create()
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{self.url} holds something that is not a run: {error}") from error
        found = self.header
        if found is None and not (create and _BEGUN.keys() <= self.root.attrs.keys()):
            if not create:
                raise NoRunError(f"{self.url} is a Zarr group, but not a run of stiffcore")
            raise InputError(f"{self.url} is a Zarr group, but not a run of stiffcore: give a new folder")
        if found is not None and found["format"] > FORMAT:
            raise InputError(
                f"{self.url} was made by a newer stiffcore ({found['version']}): update stiffcore to read it"
            )

    def _create(self) -> zarr.Group:
        try:
            return zarr.create_group(store=self._store, zarr_format=3, attributes=dict(_BEGUN))
        except ContainsGroupError:  # another process was faster; who holds the run is decided later
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
        self.root.attrs["stiffcore"] = {"format": FORMAT, **value}

    def unit_group(self, key: str) -> zarr.Group:
        """The group of a unit, made where it does not exist."""
        return self.root.require_group(f"units/{key}")

    def record(self, key: str) -> dict[str, Any]:
        """What is recorded of a unit, as it stands on disk now."""
        return dict(zarr.open_group(store=self._store, path=f"units/{key}", mode="r").attrs)

    def update(self, key: str, /, **fields: Any) -> None:
        """Add fields to a unit's record, in one atomic write."""
        # not attrs.update: that writes one field after the other
        self.unit_group(key).update_attributes(fields)

    def units(self) -> dict[str, dict[str, Any]]:
        """The records of all units, by key.

        Raises:
            DamagedError: where one cannot be read, or a unit that the header names is not there.
        """
        if "units" not in self.root:
            return {}
        try:
            found = {key: dict(group.attrs) for key, group in sorted(self.root["units"].groups())}  # type: ignore[union-attr]
        except _UNREADABLE as error:
            raise DamagedError(f"{self.url}: the record of a unit cannot be read: {error}") from error
        lost = [key for key in (self.header or {}).get("units", []) if key not in found]
        if lost:
            raise DamagedError(f"{self.url}: {len(lost)} units of the run are gone: {', '.join(lost[:5])}")
        return found

    def put_array(
        self, group: str, name: str, values: np.ndarray, dims: tuple[str, ...], **attributes: str | int
    ) -> None:
        """Write a small array whole, with a checksum, replacing one of that name; attributes are for its readers."""
        array = self.root.require_group(group).create_array(
            name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=tuple(max(1, s) for s in values.shape),
            compressors=(Crc32cCodec(),),
            filters=None,
            dimension_names=dims,
            attributes=dict(attributes),
            overwrite=True,
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
            array = self.root[f"{group}/{name}"]
            if not isinstance(array, zarr.Array):
                raise DamagedError(f"{where}: not an array")
            # zarr reads a chunk that is not there as zeros
            if array.nchunks_initialized < array.nchunks:
                raise DamagedError(f"{where}: its numbers are not there")
            return np.asarray(array[...])
        except _UNREADABLE as error:
            raise DamagedError(f"{where}: {error}") from error

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
    def hold(self) -> Iterator[None]:
        """Hold the run against other processes while the context lasts.

        On a folder the lock is the operating system's, and ends with its process. On a URL it is a record with
        a heartbeat, taken over where the heartbeat stopped.

        Raises:
            BusyError: where another process holds it; the message says who.
        """
        if self.local is not None:
            lock = FileLock(self.local / ".lock", timeout=0)
            try:
                lock.acquire()
            except Timeout:
                raise BusyError(self._who()) from None
            try:
                self._write_json("holder.json", _me())
                self._refresh()
                yield
            finally:
                sync(self._store.delete("holder.json"))
                lock.release()
            return
        yield from self._hold_by_heartbeat()

    def _hold_by_heartbeat(self) -> Iterator[None]:
        holder = self._read_json("holder.json")
        if holder and not self._dead(holder):
            raise BusyError(self._who())
        me = _me()
        self._write_json("holder.json", me)
        time.sleep(0.5)  # of two that write at once, the later one is left, and the other sees it here
        if (self._read_json("holder.json") or {}).get("token") != me["token"]:
            raise BusyError(self._who())
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
            yield
        finally:
            stop.set()
            thread.join()
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

    def _dead(self, holder: Mapping[str, Any]) -> bool:
        # the holder of a folder does not beat: its lock is the operating system's
        silent = self.local is None and time.time() - holder["heartbeat"] >= DEAD_AFTER_S
        return silent or _dead_here(holder)

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        data = json.dumps(value).encode()
        sync(self._store.set(name, default_buffer_prototype().buffer.from_bytes(data)))

    def _read_json(self, name: str) -> dict[str, Any] | None:
        for attempt in range(3):
            found = sync(self._store.get(name, default_buffer_prototype()))
            if found is None:
                return None
            try:
                return json.loads(found.to_bytes())
            except ValueError:
                # a URL's file may be seen half written; one that stays so was left by a killed writer
                time.sleep(0.05 * (attempt + 1))
        return None


def _array(group: zarr.Group, name: str) -> zarr.Array:
    found = group.get(name)
    if not isinstance(found, zarr.Array):
        raise DamagedError(f"{group.store_path}/{name}: not there")
    return found


def _is_begun(folder: Path) -> bool:
    try:
        return _BEGUN.keys() <= json.loads((folder / "zarr.json").read_bytes())["attributes"].keys()
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
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
    try:
        # a process started after the holder was written only has its number
        process = psutil.Process(holder["pid"])
        return process.create_time() > holder["since"] or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
