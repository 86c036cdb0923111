"""Arrays of .npz files: read whole where they are small, one entry at a time where they are images."""

import math
import struct
import zipfile
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np

from stiffcore.study import format_bytes

# What deflate makes of its input at most, and a header of numpy's.
_MOST_INFLATED, _HEADER_BYTES = 1032, 16384
_LOCAL_HEADER = struct.Struct("<26xHH")
_READ_BYTES = 1 << 20


class Member:
    """An array in a .npz file, whose entries along the first axis are read when they are asked for.

    Of an array that is not compressed, an entry is read where it lies. Of a compressed one, what lies before it is
    inflated first, from the entry read last on: cheap in ascending order.

    Attributes:
        shape: as declared.
        dtype: as declared.
        fortran: whether the array is column-major, so that no entry lies in one piece.
    """

    def __init__(self, path: Path, key: str) -> None:
        """Read the array's header.

        Raises:
            ValueError: an array of objects, or a header that numpy did not write.
            Exception: of any kind, where the archive is damaged.
        """
        self.path, self.key = path, key
        with zipfile.ZipFile(path) as archive:
            self._info = archive.getinfo(f"{key}.npy")
            with archive.open(self._info) as stream:
                major, _ = np.lib.format.read_magic(stream)
                read_header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
                self.shape, self.fortran, self.dtype = read_header(stream)
                self._begin = stream.tell()
        if self.dtype.hasobject:
            raise ValueError(f"{key} is an array of objects")

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array, as declared."""
        return math.prod(self.shape) * self.dtype.itemsize

    def problem(self) -> str:
        """Why the array cannot be what it declares: its bytes are fewer; empty where there is nothing."""
        info = self._info
        inflated = _MOST_INFLATED * min(info.compress_size, self.path.stat().st_size) + _HEADER_BYTES
        held = min(info.file_size, inflated) - self._begin
        if self.nbytes > held:
            declared = f"{self.key} declares {format_bytes(self.nbytes)}"
            return f"{self.path}: {declared}, the file holds {format_bytes(max(held, 0))} at most: damaged"
        return ""

    def check(self) -> None:
        """Read all of it once, against the archive's checksum.

        Raises:
            Exception: of any kind, where it is damaged.
        """
        with zipfile.ZipFile(self.path) as archive, archive.open(self._info) as stream:
            while stream.read(_READ_BYTES):
                pass

    def __getitem__(self, i: int) -> np.ndarray:
        size = self.nbytes // self.shape[0]
        self._stream.seek(self._offset + i * size)
        return np.frombuffer(self._stream.read(size), self.dtype).reshape(self.shape[1:])

    @cached_property
    def _stream(self) -> IO[bytes]:
        if self._info.compress_type == zipfile.ZIP_STORED:
            return self.path.open("rb")
        return zipfile.ZipFile(self.path).open(self._info)

    @cached_property
    def _offset(self) -> int:
        """Where the first entry begins in the stream."""
        if self._info.compress_type != zipfile.ZIP_STORED:
            return self._begin
        self._stream.seek(self._info.header_offset)
        name, extra = _LOCAL_HEADER.unpack(self._stream.read(_LOCAL_HEADER.size))
        return self._info.header_offset + _LOCAL_HEADER.size + name + extra + self._begin


def whole(path: Path, key: str) -> np.ndarray:
    """An array of the archive, all of it; no Python objects."""
    with np.load(path, allow_pickle=False) as stored:
        return stored[key]


def names(path: Path) -> list[str]:
    """The arrays of the archive."""
    with zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]
