"""The hierarchy of one run: its header, images and units, who holds it, and what is damaged in it."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.core.sync import sync

from stiffcore.errors import DamagedError, InputError, NoRunError
from stiffcore.metrics import NAMES
from stiffcore.record import FORMAT, Header, UnitRecord
from stiffcore.spectra import Parts, Spectrum
from stiffcore.store.lock import Holder, Lease, LeasedStore
from stiffcore.store.metadata import (
    BEGUN,
    COPY,
    DIGEST,
    GROUP_KEYS,
    ROOT,
    UNREADABLE,
    check_memory,
    check_numbers,
    checked,
    create_array,
    digest,
    foreign,
    group_buffer,
    header_in,
    metadata_digest,
    names_in,
    only_begun,
    open_array,
    open_group,
    parsed,
    read_raw,
    torn,
)
from stiffcore.store.place import StoreError, open_folder
from stiffcore.store.remote import open_store, open_url
from stiffcore.store.tiles import TiledMatrix
from stiffcore.study import Kind, unit_key

# The group of what a matrix is divided into, and the field of a unit's record that says what is known of it.
DIVISION = "division"
# Arrays of a unit that are not needed once its spectrum is certified.
SCRATCH = ("matrix", "hessenberg", "tau", "scale", "reduced_eigenvalues", "right_vectors", "left_vectors", DIVISION)
# What a unit keeps of real parts where its spectrum is not kept.
COMPONENT, COMPONENTS = "component", "components"
HISTOGRAM = ("histogram", "histogram_edges")
# The group of the inputs.
IMAGES = "images"


@dataclass(frozen=True)
class Part:
    """Something stored that was read again.

    Attributes:
        path: in the run.
        size: bytes read.
        problem: what is wrong with it; empty where nothing is.
        unread: whether that is only that it cannot be read now, by permissions or a fault of the disk.
    """

    path: str
    size: int
    problem: str
    unread: bool = False


class RunStore(Holder):
    """The hierarchy of one run."""

    @staticmethod
    def check_new(url: str) -> None:
        """Refuse a place where a new run would touch what is not its own; a run that was only begun is no obstacle.

        Raises:
            InputError: where a file, or a folder with something else in it, is there.
            StoreError: where a URL cannot be reached, or its bucket does not exist.
        """
        if "://" in url:
            store = open_url(url)
            names = sync(store.names())
            if foreign(names, read_raw(store, ROOT)):
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
            header = read_raw(open_folder(folder), ROOT)
        if foreign((p.name for p in folder.iterdir()), header):
            raise InputError(f"{url} exists and is not a run: give a new folder")

    def __init__(self, url: str, *, create: bool = False, lease: Lease | None = None) -> None:
        """Open a run.

        Args:
            url: a folder, or a URL that fsspec knows.
            create: make it where it does not exist; never touches one that does.
            lease: asked before every write; None: whoever opens it holds it, or only reads.

        Raises:
            NoRunError: where there is no run.
            InputError: where something else is there, or a newer stiffcore made it.
            StoreError: where a URL cannot be reached.
        """
        self.url = str(url)
        self._header: Header | None = None
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
        self._store = open_store(self.url)
        if lease is not None:
            self._store = LeasedStore(self._store, lease)
        try:
            self.root = open_group(self._store)
        except FileNotFoundError:
            if self.local is None or self.local.exists():  # reading would make the folder
                self._refuse_damaged("is gone")
            if not create:
                raise self._no_run() from None
            if self.local is None:
                self.check_new(self.url)
            self.root = self._create()
        except StoreError as error:
            # zarr makes the folder to look at it
            refused = isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError, PermissionError))
            if create and refused and self.local is not None and not self.local.exists():
                raise InputError(f"{self.url} cannot be made: {error}") from error
            raise
        except (ValueError, TypeError, KeyError) as error:
            self._refuse_damaged(str(error))
            if torn(read_raw(self._store, ROOT)):
                if not create:
                    raise self._no_run() from None
                self.check_new(self.url)
                sync(self._store.delete(ROOT))
                self.root = self._create()
                return
            raise InputError(f"{self.url} holds something that is not a run: {error}") from error
        attributes = dict(self.root.attrs)
        if attributes == BEGUN:
            if not create:
                raise self.nothing_recorded()
        elif attributes.get(DIGEST) != digest(attributes) or "stiffcore" not in attributes:
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
        if header_in(read_raw(self._store, COPY)) is not None:
            raise DamagedError(f"{self.url}/zarr.json: {why}; `stiffcore run {self.url}` restores it from its copy")

    def _refuse_other(self, attributes: Mapping[str, Any]) -> None:
        found = self._format(attributes)
        begun = attributes.get("stiffcore_begun")
        if found is None and attributes.keys() == BEGUN.keys() and isinstance(begun, int) and begun != FORMAT:
            raise InputError(f"{self.url} was begun by another stiffcore, and holds nothing: give a new folder")
        if found is None and not BEGUN.keys() & attributes.keys():
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
        store = open_store(url)
        root, copy = read_raw(store, ROOT), read_raw(store, COPY)
        found = {ROOT: header_in(root), COPY: header_in(copy)}
        whole = [attributes for attributes in found.values() if attributes is not None]
        if len(whole) != 1 or only_begun(root):
            return False
        damaged = next(name for name, attributes in found.items() if attributes is None)
        sync(store.set(damaged, group_buffer(whole[0])))
        return True

    def _create(self) -> zarr.Group:
        # zarr looks first and writes then: a slow process would write over the header of the run of a fast one
        try:
            sync(self._store.set_if_not_exists(ROOT, group_buffer(BEGUN)))
            return open_group(self._store)
        except OSError as error:
            raise InputError(f"{self.url} cannot be made: {error}") from error

    def _no_run(self) -> NoRunError:
        return NoRunError(f"there is no run at {self.url}: `stiffcore run {self.url} --network ...` starts one")

    def nothing_recorded(self) -> NoRunError:
        """The error of a run that was killed before its header was written."""
        return NoRunError(f"{self.url} was begun, but nothing is recorded in it: start the run again")

    @property
    def header(self) -> Header | None:
        """What made the run; None until it is written.

        Raises:
            InputError: where this version does not understand it.
        """
        if self._header is None and "stiffcore" in self.root.attrs:
            found: Any = self.root.attrs["stiffcore"]
            try:
                self._header = Header.from_json(found)
            except ValueError as error:
                made_by = found.get("version", "?")
                raise InputError(
                    f"{self.url}: the run's header (stiffcore {made_by}) is not understood here: {error}"
                ) from error
        return self._header

    @header.setter
    def header(self, value: Header) -> None:
        fields = {**BEGUN, "stiffcore": value.to_json()}
        fields[DIGEST] = digest(fields)
        # the copy first: without a header in the root it counts for nothing
        sync(self._store.set(COPY, group_buffer(fields)))
        self.root = self.root.update_attributes(fields)
        self._header = value

    def settled(self) -> Header:
        """The header of a run that has one.

        Raises:
            NoRunError: where it is not written yet.
        """
        if self.header is None:
            raise self.nothing_recorded()
        return self.header

    def unit_group(self, key: str) -> zarr.Group:
        """The group of a unit, made where it does not exist."""
        return self.root.require_group(f"units/{key}")

    def record(self, key: str) -> UnitRecord:
        """What is recorded of a unit, as it stands on disk now.

        Raises:
            DamagedError: where it cannot be read, or is not what was written.
        """
        where = f"{self.url}/units/{key}/zarr.json"
        try:
            attributes = open_group(self._store, f"units/{key}").attrs
            record = UnitRecord.from_json(checked(dict(attributes), where))
            unit = record.unit
            if not key == unit.key == unit_key(unit.image, unit.block, unit.function, unit.kind):
                raise DamagedError(f"{where}: holds the record of another unit")
            return record
        except UNREADABLE as error:
            raise DamagedError(f"{where}: {error}") from error

    def put_record(self, key: str, record: UnitRecord) -> None:
        """Write what is recorded of a unit, in one atomic write."""
        fields = record.to_json()
        sync(self._store.set(f"units/{key}/zarr.json", group_buffer({**fields, DIGEST: digest(fields)})))

    def update(self, key: str, /, **found: Any) -> UnitRecord:
        """Change fields of a unit's record, in one atomic write; the record as it is then."""
        now = self.record(key).changed(**found)
        self.put_record(key, now)
        return now

    def clear(self, group: str) -> None:
        """Delete all that is stored of a group, so that it can be made anew; its metadata may be damaged."""
        sync(self._store.delete_dir(group))

    def units(self) -> dict[str, UnitRecord]:
        """The records of all units, by key.

        Raises:
            DamagedError: where one cannot be read, is not what was written, or is not there though the header names it.
        """
        found, damaged = self.whole_units()
        if damaged:
            shown = "; ".join(list(damaged.values())[:3])
            raise DamagedError(f"{len(damaged)} units are damaged: {shown}. `stiffcore run {self.url}` makes them anew")
        return found

    def whole_units(self, *, looking: bool = False) -> tuple[dict[str, UnitRecord], dict[str, str]]:
        """The records that can be trusted, by key; and what is wrong with each of the others.

        Args:
            looking: whether what cannot be read now, by permissions or a fault of the disk, is told of like damage;
                who makes damaged units anew would lose what may be whole.
        """
        count = len(self.header.identity.images) if self.header else 0
        keys = list(self.header.units if self.header else ()) or sync(names_in(self._store, "units"))
        found: dict[str, UnitRecord] = {}
        damaged: dict[str, str] = {}
        for key in sorted(keys):
            try:
                found[key] = self.record(key)
                if self.header and found[key].unit.image >= count:
                    raise DamagedError(f"{self.url}/units/{key}: image: the run has {count}")
            except DamagedError as error:
                found.pop(key, None)
                damaged[key] = str(error)
            except StoreError as error:
                if self.local is None or not looking:
                    raise
                damaged[key] = str(error)
        return found, damaged

    def put_array(
        self, group: str, name: str, values: np.ndarray, dims: tuple[str, ...], **attributes: str | int
    ) -> None:
        """Write a small array whole, with a checksum, replacing one of that name; attributes are for its readers."""
        array = create_array(
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

    def get_text(self, group: str, name: str, attribute: str) -> str:
        """An attribute of an array written by `put_array`.

        Raises:
            DamagedError: where the array's metadata is not what was written.
        """
        problem = self.read_metadata(f"{group}/{name}")[1]
        if problem:
            raise DamagedError(f"{self.url}/{group}/{name}: {problem}")
        return str(open_array(self.root, f"{group}/{name}").attrs[attribute])

    def get_array(self, group: str, name: str) -> np.ndarray:
        """Read an array written by `put_array`.

        Raises:
            DamagedError: where its checksum fails or it is not there.
        """
        where = f"{self.url}/{group}/{name}"
        try:
            array = open_array(self.root, f"{group}/{name}")
            check_numbers(array, where)
            check_memory(array.nbytes, where)
            return np.asarray(array[...])
        except UNREADABLE as error:
            raise DamagedError(f"{where}: {error}") from error

    def read_again(self, group: str, expected: Iterable[str]) -> Iterator[Part]:
        """Read a group's metadata and all of its arrays, against their digests and checksums.

        Args:
            group: path, of a group that holds arrays alone.
            expected: arrays that must be there, whole.

        Yields:
            The metadata, and each array.
        """
        try:
            yield Part(group, *self.read_metadata(group))
            names, expected = sorted(sync(names_in(self._store, group))), set(expected)
        except (DamagedError, StoreError) as error:
            if self.local is None and isinstance(error, StoreError):
                raise
            yield Part(group, 0, str(error), unread=isinstance(error, StoreError))
            return
        yield from (Part(f"{group}/{name}", 0, "is gone") for name in sorted(expected.difference(names)))
        for name in names:
            if name.endswith("_tiles") and name.removesuffix("_tiles") in names:
                continue
            if name in SCRATCH and name not in expected and f"{name}_tiles" not in names:
                continue  # of a stage that was not finished: made again
            parts = [part for part in (name, f"{name}_tiles") if part in names]
            size, problem, unread = 0, "", False
            try:
                checks = [self.read_metadata(f"{group}/{part}") for part in parts]
                size, problem = sum(c[0] for c in checks), "; ".join(c[1] for c in checks if c[1])
                if len(parts) == 2:
                    size += TiledMatrix(open_group(self._store, group), name).check(complete=name in expected)
                else:
                    size += self._read_through(f"{group}/{name}")
            except (*UNREADABLE, DamagedError, StoreError) as error:
                if self.local is None and isinstance(error, StoreError):
                    raise
                unread = not problem and isinstance(error, StoreError)
                problem = problem or str(error)
            yield Part(f"{group}/{name}", size, problem, unread)

    def _read_through(self, path: str) -> int:
        """Read an array against its checksums, a chunk's rows at a time.

        Returns:
            Its bytes.

        Raises:
            DamagedError: where some are not there; zarr reads these as zeros.
        """
        array = open_array(self.root, path)
        check_numbers(array, f"{self.url}/{path}")
        check_memory(
            array.nbytes // max(1, array.shape[0]) * min(array.chunks[0], array.shape[0]), f"{self.url}/{path}"
        )
        for first in range(0, array.shape[0], max(1, array.chunks[0])):
            np.asarray(array[first : first + array.chunks[0]])
        return array.nbytes

    def read_metadata(self, path: str) -> tuple[int, str]:
        """Bytes of the zarr.json of a group or array, and what is wrong with it, or nothing; white space counts, too.

        Args:
            path: of it; empty for the root.
        """
        name = f"{path}/zarr.json".lstrip("/")
        try:
            raw = read_raw(self._store, name)
        except DamagedError as error:
            return 0, str(error)
        if raw is None:
            return 0, f"{name} is gone"
        try:
            found = parsed(raw)
            if json.dumps(found, indent=2).encode() != raw:
                return len(raw), f"{name}: not what was written"
            if found["node_type"] == "group":
                if path != IMAGES or found["attributes"]:  # the group of the inputs has none
                    checked(found["attributes"], name)
                if (found["zarr_format"], found.keys() - {"consolidated_metadata"}) != (3, GROUP_KEYS):
                    return len(raw), f"{name}: not what was written"
            elif found["attributes"][DIGEST] != metadata_digest(raw):
                return len(raw), f"{name}: not what was written"
        except (*UNREADABLE, DamagedError):
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
            for part in (IMAGES, "units"):
                self.clear(part)
        if self.local is None:
            return 0
        orphans = list(self.local.rglob("*.partial"))
        for path in orphans:
            path.unlink(missing_ok=True)
        return len(orphans)

    def free_bytes(self) -> int | None:
        """Free space where the run lies; None where it cannot be known."""
        return None if self.local is None else shutil.disk_usage(self.local).free

    def stored_bytes(self, key: str) -> int:
        """Bytes of the files of a unit; 0 on a URL, of which no free space is known either."""
        folder = None if self.local is None else self.local / "units" / key
        return 0 if folder is None else sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file())

    def _refresh(self) -> None:
        # who held the run before may have written a header since it was opened
        self.root, self._header = open_group(self._store), None


def stored_spectrum(store: RunStore, key: str) -> Spectrum:
    """The spectrum of a unit that is `done`.

    Raises:
        DamagedError: where its eigenvalues cannot be read.
    """
    record = store.record(key)
    unit, certificate, shift = record.unit, record.certificate, record.shift
    if certificate is None or shift is None:
        raise DamagedError(f"{store.url}, {key}: its certificate is not recorded")
    values = store.get_array(f"units/{key}", "eigenvalues") if record.values_kept else np.zeros(0, complex)
    if record.values_kept and (values.ndim != 1 or values.dtype.kind != ("f" if unit.kind is Kind.SINGULAR else "c")):
        raise DamagedError(f"{store.url}, {key}: what is stored are no eigenvalues")
    expected = unit.k if record.found is None else record.found  # fewer than k where only the ends were solved
    if record.values_kept and len(values) != expected:
        raise DamagedError(f"{store.url}, {key}: {len(values)} eigenvalues are stored of {expected}")
    growth = float("nan") if record.logarithmic_norm is None else record.logarithmic_norm
    return Spectrum(
        computed=values,
        ones=unit.ones,
        zeros=unit.zeros,
        k=unit.k,
        kind=unit.kind,
        function=unit.function,
        name=unit.block,
        solver=record.plan.solver,
        reason=unit.reason,
        certificate=certificate,
        record=record,
        ends=record.ends,
        shift=shift,
        frobenius=record.moments.frobenius if record.moments else float("nan"),
        numerical_abscissa=shift + growth,
        given=record.metrics and {name: record.metrics.get(name, float("nan")) for name in NAMES},
        has_values=record.values_kept,
        components=_stored_parts(store, key, len(values)) if unit.components and record.values_kept else None,
    )


def _stored_parts(store: RunStore, key: str, count: int) -> Parts:
    where = f"units/{key}"
    source, table = store.get_array(where, COMPONENT), store.get_array(where, COMPONENTS)
    whole = source.shape == (count,) and source.dtype.kind == "i" and table.ndim == 2 and table.shape[1] == 5
    if not whole or (count and not 0 <= source.min() <= source.max() < len(table)):
        raise DamagedError(f"{store.url}, {key}: what is stored are no components")
    axis = int(store.get_text(where, COMPONENTS, "axis"))
    position, size, ones, zeros = table[:, :4].astype(np.int64).T
    return Parts(axis, position, size, ones, zeros, table[:, 4], source)
