"""A matrix in tiles, written once, column shard by column shard.

Its transpose is what Zarr holds, row-major, so that columns come and go as LAPACK has them: to turn a panel takes
longer than to read it.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr.core.sync import sync

from stiffcore.errors import DamagedError
from stiffcore.store.metadata import CHECKSUM_BYTES, UNREADABLE, check_memory, create_array, is_there, open_array

if TYPE_CHECKING:
    import scipy.sparse

# Of one file; a panel of a taller matrix is several, of which those that are all zero are not written.
ROWS_IN_SHARD = 16_384
# Rows of each of these: a sparse matrix of order 100,000 is written in 16 s in bands of 4,096, in 53 s of 16,384.
BAND_ROWS = 4096
# In a file of several tiles, of each: where it begins, and how long it is.
INDEX_BYTES = 16
# Of the array. Matrices of earlier versions have them the other way round, and are read so.
AXES = ("column", "row")


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
        self._data = open_array(group, name)
        self._tiles = open_array(group, f"{name}_tiles")
        self._by_column = getattr(self._data.metadata, "dimension_names", None) == AXES
        if self._data.ndim != 2 or self._tiles.ndim != 2 or self._data.dtype.kind not in "fc":
            raise DamagedError(f"{self._data.store_path}: not a matrix")
        self.shape: tuple[int, int] = self._turned(self._data.shape)
        self.dtype: np.dtype = self._data.dtype
        self.tile, self.shard = self._turned(self._data.chunks)
        self._band = self._turned(self._data.shards or self._data.shape)[0]
        tiles, where = (-(-self.shape[0] // self.tile), -(-self.shape[1] // self.shard)), self._data.store_path
        if self._tiles.shape != tiles or self._tiles.chunks != (tiles[0], 1) or self._tiles.dtype != np.uint8:
            raise DamagedError(f"{where}: its tiles are not those of NAME_tiles")
        check_memory(tiles[0] * tiles[1], f"{where}_tiles")

    @classmethod
    def create(
        cls, group: zarr.Group, name: str, shape: tuple[int, int], dtype: np.dtype, tile: int, shard: int
    ) -> TiledMatrix:
        """Create the matrix, or open it as it is where the same one exists (its shards stay).

        Args:
            group: the unit's group.
            name: of the array.
            shape: (rows, columns), both at least 1.
            dtype: of the numbers.
            tile: rows of a tile.
            shard: columns of a shard.
        """
        if not is_there(group, f"{name}_tiles"):
            rows, columns = shape
            tile, shard = min(tile, rows), min(shard, columns)
            row_tiles = -(-rows // tile)
            band = file_rows(rows, tile)
            create_array(
                group,
                name,
                shape=(columns, rows),
                dtype=dtype,
                chunks=(shard, tile),
                shards=(shard, band),
                fill_value=0,
                dimension_names=AXES,
            )
            # of a half-deleted one, chunks may be left that would vouch for shards not there: they are deleted
            create_array(
                group,
                f"{name}_tiles",
                shape=(row_tiles, -(-columns // shard)),
                dtype="uint8",
                chunks=(row_tiles, 1),
                fill_value=int(Tile.MISSING),
                dimension_names=("row_tile", "column_shard"),
            )
        found = cls(group, name)
        if found.shape != shape or found.dtype != dtype:
            stored = f"{found.shape} of {found.dtype} are stored"
            raise DamagedError(f"{found._data.store_path}: {stored}, and {shape} of {dtype} are recorded")
        return found

    def _turned(self, of_axes: tuple[Any, ...]) -> tuple[Any, Any]:
        """What is said of rows and columns, as the array has its axes; and back."""
        first, second = of_axes
        return (second, first) if self._by_column else (first, second)

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

    def has(self, shard: int) -> bool:
        """Whether a shard is recorded as done.

        Raises:
            DamagedError: where the record cannot be read.
        """
        return bool((self._states(shard) != Tile.MISSING).all())

    def write(self, shard: int, block: np.ndarray | scipy.sparse.csc_array) -> int:
        """Write one shard whole, then record it as done.

        Args:
            shard: its number.
            block: (rows, columns of the shard), of the matrix's dtype, best column-major; not kept. Where a whole tile
                of a dense one is zero, its negative zeros become positive, in place. Of a sparse one, one band at a
                time is made dense.

        Returns:
            How many of its tiles are zero and cost nothing.
        """
        start = self.columns(shard)[0]
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
                self._put(first, start, band)
        self._tiles[:, shard : shard + 1] = states[:, None]
        return int((states == Tile.ZERO).sum())

    def _put(self, first: int, start: int, band: np.ndarray) -> None:
        where = self._turned((slice(first, first + len(band)), slice(start, start + band.shape[1])))
        numbers = band.T if self._by_column else band
        try:
            self._data[where] = numbers
        except (
            ValueError,
            DamagedError,
        ):  # Zarr looks into the file that it replaces, which a writer may have left torn
            sync((self._data.store_path / self._file(first // self._band, start // self.shard)).delete())
            self._data[where] = numbers

    def _file(self, band: int, shard: int) -> str:
        """The name, in the array, of the file of a band of a shard."""
        return self._data.metadata.encode_chunk_key(self._turned((band, shard)))

    def _check_file(self, band: int, shard: int, where: str) -> None:
        """Refuse a file with more in it than its tiles, their checksums and where each begins."""
        tiles = self._band // self.tile
        most = tiles * (self.tile * self.shard * self.dtype.itemsize + CHECKSUM_BYTES + INDEX_BYTES) + CHECKSUM_BYTES
        path = self._data.store_path / self._file(band, shard)
        size = sync(path.store.size(path.path))  # type: ignore[attr-defined]  # the stores of a run have it
        if size > most:
            raise DamagedError(f"{where}: a file has {size:,} bytes, and its tiles have {most:,} at most")

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
                yield first, band.toarray(order="F")

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

    def read_shard(self, shard: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows of a shard, Fortran-ordered; of a file, only the tiles that hold them are read.

        Args:
            shard: its number.
            start: the first row.
            stop: after the last one; None: to the end.

        Raises:
            DamagedError: as `read`.
        """
        first, last = self.columns(shard)
        stop = self.shape[0] if stop is None else stop
        out: np.ndarray | None = None
        for at, block in self._stored(shard, self._states(shard)[:, 0], start, stop):
            if at == start and len(block) == stop - start and block.flags.f_contiguous:
                return block  # there is no more
            if out is None:
                out = np.zeros((stop - start, last - first), dtype=self.dtype, order="F")
            low, high = max(at, start), min(at + len(block), stop)
            out[low - start : high - start] = block[low - at : high - at]
        return np.zeros((stop - start, last - first), dtype=self.dtype, order="F") if out is None else out

    def read_sparse(self) -> scipy.sparse.csc_array:
        """The whole matrix without its zeros, canonical; its indices are of 32 bits where they fit.

        It takes twice the memory of the result, and the stored rows of one band of a shard.

        Raises:
            DamagedError: as `read`.
        """
        import scipy.sparse

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

    def _states(self, shard: int | None = None) -> np.ndarray:
        """Of all shards, or of one."""
        try:
            states = np.asarray(self._tiles[:] if shard is None else self._tiles[:, shard : shard + 1])
        except UNREADABLE as error:
            raise DamagedError(f"{self._tiles.store_path}: {error}") from error
        if not np.isin(states, list(Tile)).all():
            raise DamagedError(f"{self._tiles.store_path}: holds what is no state of a tile")
        return states

    def _read_into(self, out: np.ndarray, shard: int, states: np.ndarray) -> None:
        for first, block in self._stored(shard, states):
            out[first : first + len(block)] = block

    def _stored(
        self, shard: int, states: np.ndarray, low: int = 0, high: int | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """The rows of each band of a shard from its first stored tile to its last, with the first one's number.

        Only tiles that hold some of the rows low..high-1.
        """
        start, stop = self.columns(shard)
        wanted = range(low // self.tile, -(-(self.shape[0] if high is None else high) // self.tile))
        where = f"{self._data.store_path}, columns {start} to {stop - 1}"
        if (states == Tile.MISSING).any():
            raise DamagedError(f"{where}: not written yet")
        of_band = self._band // self.tile
        for band in range(0, len(states), of_band):
            stored = band + np.flatnonzero(states[band : band + of_band] == Tile.STORED)
            stored = stored[(stored >= wanted.start) & (stored < wanted.stop)]
            if not len(stored):
                continue
            first = int(stored[0]) * self.tile
            rows_read = min((int(stored[-1]) + 1) * self.tile, self.shape[0]) - first
            check_memory(rows_read * (stop - start) * self.dtype.itemsize, where)
            self._check_file(first // self._band, shard, where)
            part = self._turned((slice(first, (int(stored[-1]) + 1) * self.tile), slice(start, stop)))
            try:
                numbers = np.asarray(self._data[part])
            except UNREADABLE as error:
                raise DamagedError(f"{where}: {error}") from error
            block = numbers.T if self._by_column else numbers
            for tile in range(int(stored[0]), int(stored[-1]) + 1):
                rows = block[tile * self.tile - first :][: self.tile]
                if bool(rows.any()) != (states[tile] == Tile.STORED):
                    raise DamagedError(
                        f"{where}: rows {tile * self.tile} and on are recorded as {Tile(states[tile]).name}"
                    )
            yield first, block
