"""A run in the formats of others: metrics as CSV or parquet, spectra as HDF5."""

import errno
import json
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from stiffcore.errors import InputError, writing_file
from stiffcore.run import DONE, Run
from stiffcore.store import IMAGES
from stiffcore.study import counted
from stiffcore.text import spreadsheet_cell, visible

# Of the layout that `write_hdf5` documents.
HDF5_LAYOUT = 1
# Facts of a unit that become attributes of its spectrum.
FACTS = ("block", "number", "function", "kind", "image", "image_index", "label", "n", "k", "ones", "zeros", "solver")


def export(run: Run, to: Path) -> str:
    """Write a run to a new file, in the format of its suffix: .csv, .parquet, or .h5 and .hdf5.

    Control characters in names and messages become escapes, as `\\x1b`; a text in a CSV file that a spreadsheet would
    take for a formula begins with an apostrophe.

    Args:
        run: any.
        to: must not exist; its folder must.

    Returns:
        What was written, for people.

    Raises:
        InputError: where the suffix is unknown, the file exists or cannot be written, or a package is missing.
        StiffcoreError: where the disk is full or fails; nothing is left of the file.
    """
    check_target(to)
    with whole_file(to, f"--to {to}") as beside:
        try:
            return f"{WRITERS[to.suffix](run, beside)} in {to}"
        except ImportError as error:
            raise InputError(f"--to {to}: {error}; pip install 'stiffcore[export]'") from error


@contextmanager
def whole_file(to: Path, option: str) -> Iterator[Path]:
    """A new file that is there whole or not at all: it is written beside its place, and takes it when the context ends.

    Args:
        to: must not exist.
        option: that named it, for errors.

    Yields:
        Where to write it; of the same suffix.

    Raises:
        InputError: where it exists, or its path is at fault.
        StiffcoreError: where the disk is full or fails.
    """
    beside = to.with_name(f".{uuid.uuid4().hex[:12]}{to.suffix}")
    try:
        with writing_file(option):
            yield beside
            with beside.open("rb") as file:
                os.fsync(file.fileno())  # some file systems say only here that they are full
            try:
                os.link(beside, to)  # unlike a rename, it replaces nothing
            except FileExistsError:
                raise
            except OSError:  # a file system without links
                if to.exists():
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
                beside.rename(to)
    finally:
        beside.unlink(missing_ok=True)


def check_target(to: Path, suffixes: Sequence[str] = ()) -> None:
    """Refuse a file that cannot be written, before anything is read.

    Args:
        to: must not exist; its folder must.
        suffixes: that it may have; none: those of `export`.

    Raises:
        InputError: as `export`.
    """
    known = suffixes or tuple(WRITERS)
    if to.suffix not in known:
        raise InputError(f"--to {to}: known are {', '.join(known)}")
    if to.exists():
        raise InputError(f"--to {to} exists: give a new file")
    if not to.parent.is_dir():
        raise InputError(f"--to {to}: there is no folder {to.parent}")


def _write_csv(run: Run, to: Path) -> str:
    rows = with_texts(run.metrics(), spreadsheet_cell)
    rows.to_csv(to, index=False, na_rep="nan")
    return counted(len(rows), "row", "rows")


def _write_parquet(run: Run, to: Path) -> str:
    rows = with_texts(run.metrics(), visible)
    rows.to_parquet(to, index=False, engine="pyarrow")
    return counted(len(rows), "row", "rows")


def write_hdf5(run: Run, to: Path) -> str:
    """Write spectra and metrics as HDF5, of plain numbers and strings that MATLAB, Julia and R read.

    Layout, version 1:

        /                       attributes: layout, stiffcore (version), description, source, study (JSON)
        /metrics/COLUMN         (units,) every column of `Run.metrics`: float64, int64, or UTF-8 strings
        /spectra/KEY/real       (m,) float, the computed eigenvalues, ascending; attributes: see `FACTS`, and
        /spectra/KEY/imag       (m,) `complete` (1 where m = k, 0 where they are the ends alone) and `certified`
        /images/NAME            (images,) index, y (label), prediction, loss

    n is m + ones + zeros where complete: so many more eigenvalues are exactly 1 and exactly 0.
    """
    rows, written = run.metrics(), 0
    keys = sorted(run.header.units)
    # through Python's file: HDF5's own ends in a segmentation fault where a full disk keeps it from closing
    with to.open("x+b") as stream, h5py.File(stream, "w") as file:
        file.attrs.update(
            {
                "layout": HDF5_LAYOUT,
                "stiffcore": run.header.version,
                "description": visible(run.header.description),
                "source": visible(run.header.source),
                "study": json.dumps(run.study.model_dump(mode="json")),
            }
        )
        for name in rows:
            file[f"metrics/{name}"] = _column(rows[name])
        for name in ("index", "y", "prediction", "loss"):
            file[f"{IMAGES}/{name}"] = run.store.get_array(IMAGES, name)
        for key, row in zip(keys, rows.to_dict("records"), strict=True):
            if row["state"] not in DONE:
                continue
            spectrum = run.stored(key)
            group = file.create_group(f"spectra/{key}")
            group["real"], group["imag"] = spectrum.computed.real, spectrum.computed.imag
            facts = {name: row[name] for name in FACTS}
            group.attrs.update({name: visible(v) if isinstance(v, str) else v for name, v in facts.items()})
            complete = spectrum.ends is None and spectrum.has_values
            group.attrs.update({"complete": int(complete), "certified": int(spectrum.certificate.passed)})
            written += 1
    return counted(written, "spectrum", "spectra")


WRITERS: dict[str, Callable[[Run, Path], str]] = {
    ".csv": _write_csv,
    ".parquet": _write_parquet,
    ".h5": write_hdf5,
    ".hdf5": write_hdf5,
}


def _column(values: pd.Series) -> Any:
    if values.dtype == bool:
        return values.to_numpy(np.int64)
    if values.dtype.kind in "iuf":
        return values.to_numpy()
    return values.astype(str).map(visible).to_numpy(object)


def with_texts(rows: pd.DataFrame, shown: Callable[[str], str]) -> pd.DataFrame:
    """The rows with each text as a format takes it; numbers stay."""
    texts = {name: rows[name].astype(str).map(shown) for name in rows if rows[name].dtype.kind not in "biuf"}
    return rows.assign(**texts)
