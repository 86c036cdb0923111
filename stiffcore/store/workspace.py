"""The matrices that a unit divides its own into, and what is known of them, in the unit's group."""

from collections.abc import Callable
from typing import Any

import numpy as np

from stiffcore.errors import DamagedError
from stiffcore.store.runs import DIVISION, RunStore
from stiffcore.store.tiles import TiledMatrix

FLOAT64 = np.dtype(np.float64)


class StoredWorkspace:
    """A `stiffcore.eigen.divide.Workspace` in a run: matrices in one group of the unit, values in its record.

    What is recorded is never computed again, and a matrix keeps the panels that it has, so that a killed division goes
    on where it was.
    """

    def __init__(
        self, store: RunStore, key: str, tile: int, panel: int, check: Callable[[], None] = lambda: None
    ) -> None:
        """Open it, or begin it.

        Args:
            store: the run.
            key: of the unit.
            tile: rows of a tile.
            panel: columns of a panel of float64; wider numbers have fewer.
            check: raises where the unit may no longer be written to; asked before every value is recorded.
        """
        self._store, self._key, self._tile, self._panel, self._check = store, key, tile, panel, check
        self._group = store.root.require_group(f"units/{key}/{DIVISION}")
        self._known: dict[str, Any] = dict(store.record(key).division or {})

    def matrix(self, name: str, rows: int, columns: int, dtype: np.dtype = FLOAT64) -> TiledMatrix:
        """The matrix of that name; see `TiledMatrix.create`."""
        width = max(1, self._panel * FLOAT64.itemsize // dtype.itemsize)
        return TiledMatrix.create(self._group, name, (rows, columns), dtype, self._tile, width)

    def drop(self, *names: str) -> None:
        """Delete matrices, where they are there."""
        self._store.drop(self._key, *(f"{DIVISION}/{name}" for name in names))

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """A JSON value, computed where it is not recorded; recorded before it is returned."""
        if name not in self._known:
            found = compute()
            self._check()
            self._known[name] = found
            self._store.update(self._key, division=dict(self._known))
        return self._known[name]

    def once_array(self, name: str, shape: tuple[int, ...], compute: Callable[[], np.ndarray]) -> np.ndarray:
        """As `once`, of an array of that shape.

        Raises:
            DamagedError: where what is stored is of another one.
        """
        group = f"units/{self._key}/{DIVISION}"

        def written() -> bool:
            values = compute()
            self._check()
            self._store.put_array(group, name, values, tuple(f"axis{i}" for i in range(values.ndim)))
            return True

        self.once(name, written)
        found = self._store.get_array(group, name)
        if found.shape != shape or found.dtype.kind not in "fc":
            raise DamagedError(f"{self._store.url}/{group}/{name}: {found.dtype} of {found.shape}, not of {shape}")
        return found
