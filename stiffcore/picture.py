"""The wider picture of one unit, on request: its numerical range, and the pseudospectrum on a grid.

Both are of the matrix that was solved, with the skip added (shift I + M): it has the eigenvalues of J, but another
basis, so its numerical range and pseudospectrum are not those of the unreduced Jacobian.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from stiffcore.eigen.certificate import distance_of
from stiffcore.eigen.numerical_range import numerical_range
from stiffcore.eigen.sparse import EPS, smallest_singular_value
from stiffcore.errors import DamagedError, InputError, writing_store
from stiffcore.jacobian.reduction import Reduction
from stiffcore.store import RunStore, TiledMatrix, is_there
from stiffcore.unit import open_operator, sparse_matrix

# How far beyond the numerical range the grid reaches, relative to its size.
BORDER = 0.1
ARRAYS = ("numerical_range", "pseudospectrum_re", "pseudospectrum_im", "pseudospectrum")
DIMENSIONS = (("angle",), ("re",), ("im",), ("im", "re"))


@dataclass(frozen=True)
class Picture:
    """What surrounds a spectrum.

    Attributes:
        numerical_range: (72,) complex, points on its boundary, counter-clockwise.
        re: (p,) real parts of the grid, ascending.
        im: (q,) imaginary parts, from 0 on: below the axis is the mirror image.
        smallest: (q, p) the smallest singular value of shift I + M - z I at z = re + i im; empty where not asked for.
    """

    numerical_range: np.ndarray
    re: np.ndarray
    im: np.ndarray
    smallest: np.ndarray


def take_picture(
    store: RunStore,
    key: str,
    grid: int = 0,
    *,
    memory_bytes: int | None = None,
    module: Any = None,
    trusted: str = "",
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Picture:
    """Compute the picture of a unit and keep it in the store; what is stored already is taken from there.

    The matrix is read where it was kept, else built again. One sparse LU a point of the grid.

    Args:
        store: the run.
        key: of the unit.
        grid: points along the longer side of the numerical range; 0 leaves the pseudospectrum as it is.
        memory_bytes: what a sparse LU may take.
        module: the network, where the run has it in memory.
        trusted: the network whose code may be imported, see `stiffcore.trust`.
        tell: told of points done and points in all.

    Returns:
        The picture, as it is stored.

    Raises:
        InputError: where the unit has no matrix.
        FillError: where no LU fits.
        StiffcoreError: where the store cannot be written.
    """
    before = stored_picture(store, key)
    if before is not None and (not grid or _has_grid(before, grid)):
        return before
    a, _ = shifted_matrix(store, key, module, trusted)
    _, curve = numerical_range(a)
    taken = Picture(curve, *_pseudospectrum(a, curve, grid, memory_bytes, tell))
    with writing_store():
        _keep(store, key, taken, before)
    return taken


def _has_grid(picture: Picture, grid: int) -> bool:
    """Whether its pseudospectrum is that of the grid."""
    re, im = _axes(picture.numerical_range, grid)
    return np.array_equal(picture.re, re) and np.array_equal(picture.im, im)


def _keep(store: RunStore, key: str, taken: Picture, before: Picture | None) -> None:
    """Write what is not stored yet; where that fails, of the picture nothing stays."""
    values = (taken.numerical_range, taken.re, taken.im, taken.smallest)
    stored = (before.numerical_range, before.re, before.im, before.smallest) if before else (None,) * len(ARRAYS)
    try:
        for name, now, old, dims in zip(ARRAYS, values, stored, DIMENSIONS, strict=True):
            if old is None or not np.array_equal(now, old):
                store.put_array(f"units/{key}", name, now, dims)
    except BaseException:
        store.drop(key, *ARRAYS)
        raise


def _pseudospectrum(
    a: sp.csc_array, curve: np.ndarray, grid: int, memory_bytes: int | None, tell: Callable[[int, int], None]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    re, im = _axes(curve, grid)
    smallest = np.empty((len(im), len(re)))
    for done, (j, i) in enumerate(np.ndindex(*smallest.shape)):
        smallest[j, i] = smallest_singular_value(a, complex(re[i], im[j]), memory_bytes=memory_bytes)
        tell(done + 1, smallest.size)
    return re, im, smallest


def stored_picture(store: RunStore, key: str) -> Picture | None:
    """The picture of a unit, where one was taken."""
    try:
        found = Picture(*(store.get_array(f"units/{key}", name) for name in ARRAYS))
    except DamagedError:
        return None
    values = (found.numerical_range, found.re, found.im, found.smallest)
    for one, kind, axes in zip(values, "cfff", DIMENSIONS, strict=True):
        if (one.dtype.kind, one.ndim) != (kind, len(axes)):
            return None
    whole = found.smallest.shape == (len(found.im), len(found.re))
    return found if whole else None  # it was being written when its process was killed


def shifted_matrix(
    store: RunStore, key: str, module: Any = None, trusted: str = ""
) -> tuple[sp.csc_array, float | None]:
    """shift I + M of a unit, which has k of the eigenvalues of J, as kept or built again; and how far it may be off.

    That is in the 2-norm, from the matrix in exact arithmetic; None where M was kept by a version that did not record
    it.

    Raises:
        InputError: where the unit has no matrix.
    """
    record = store.record(key)
    if not record.unit.k:
        raise InputError(f"{key} has no matrix: {record.unit.reason}")
    if record.unit.components:
        raise InputError(f"{key} was solved by components: there is no one matrix to look at")
    shift, distance = record.shift, record.distance
    if record.kept and shift is not None and is_there(store.unit_group(key), "matrix"):
        matrix = TiledMatrix(store.unit_group(key), "matrix").read_sparse()
    else:
        reduction = open_operator(store, record, "cpu", module, trusted)
        assert isinstance(reduction, Reduction)
        shift, matrix = reduction.shift, sparse_matrix(reduction, record.plan.chunk)
        distance = distance_of(reduction)  # known once M is built
    exactly = matrix.astype(np.float64)
    shifted = sp.csc_array(exactly + shift * sp.eye_array(record.unit.k, format="csc"))
    rounded = EPS * float(np.abs(shifted.diagonal()).max()) if shift else 0.0
    return shifted, None if distance is None else distance + rounded


def _axes(curve: np.ndarray, grid: int) -> tuple[np.ndarray, np.ndarray]:
    left, right, top = float(curve.real.min()), float(curve.real.max()), float(curve.imag.max())
    border = BORDER * max(right - left, top, 1e-300)
    step = (max(right - left, top) + 2 * border) / max(grid - 1, 1)
    if grid < 2:
        return np.zeros(0), np.zeros(0)
    re = np.arange(left - border, right + border + step / 2, step)
    return re, np.arange(0, top + border + step / 2, step)
