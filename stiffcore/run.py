"""A run, read: its units, their states, spectra and metrics."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from html import escape
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from stiffcore.errors import DamagedError, InputError
from stiffcore.metrics import NAMES as METRIC_NAMES
from stiffcore.record import Stage, UnitRecord
from stiffcore.spectra import Certificate, Count, Spectrum, drawing
from stiffcore.store import IMAGES, RunStore, StoreError, stored_spectrum
from stiffcore.study import FAILED, Kind, Solver, Study, parse_bytes, unit_key
from stiffcore.text import encodable
from stiffcore.trust import trusted_network

if TYPE_CHECKING:
    import pandas as pd
    import xarray
    from matplotlib.figure import Figure

    from stiffcore.picture import Picture


# Columns of `Run.metrics` that come from the certificate, see `_certificate_row`.
CERTIFICATE_COLUMNS = (
    *("S_error", "S_active_error", "value_error", "near_axis"),
    *("max_residual", "max_condition", "trace_error", "square_error"),
)

# States of a unit that has a spectrum, see `state_of`.
DONE = ("done", "not certified")

# The state of one that has a record or a spectrum which cannot be read.
DAMAGED = "damaged"

# Blocks that an error names; a ResNet50 has sixteen.
LISTED = 20

# Arrays of the inputs: pixels, position in the source, label, and what the network makes of them.
IMAGE_ARRAYS = ("x", "index", "y", "prediction", "loss")


class Run:
    """A stored run, to be read; every call reads what the store holds at that moment."""

    def __init__(self, store: RunStore) -> None:
        """Open it.

        Args:
            store: with its header written.

        Raises:
            InputError: where it is not.
        """
        self.store = store
        self.header = store.settled()
        self.study: Study = self.header.study
        # what reading has found damaged so far, by unit
        self.damaged: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"Run({self.store.url}: {self.header.description}; {self.summary})"

    def _repr_html_(self) -> str:
        shown = ["image_index", "number", "block", "function", "n", "k", "S_active", "S_active_error", "negative"]
        rows = self.metrics()[[*shown, "certified", "state", "basis"]]
        return f"<p>{escape(repr(self))}</p>{rows.to_html(max_rows=40, index=False)}"

    def records(self) -> dict[str, UnitRecord]:
        """What is recorded of each unit, by key.

        Raises:
            DamagedError: where a record is not what was written.
        """
        return self.store.units()

    def readable(self) -> tuple[dict[str, UnitRecord], dict[str, str]]:
        """What is recorded of the units that can be read, by key; and what is wrong with each of the others."""
        records, damaged = self.store.whole_units(looking=True)
        self.damaged |= damaged
        return records, damaged

    @property
    def summary(self) -> str:
        """How many units are in which state."""
        records, damaged = self.readable()
        return status_summary(records, damaged)

    def spectrum(self, image: int = 0, block: str | int = 1, function: str = "block", kind: str = "matrix") -> Spectrum:
        """One stored spectrum.

        Args:
            image: position among the run's images.
            block: module path, or number among the residual blocks.
            function: `block` or `branch`.
            kind: see `Kind`.

        Raises:
            InputError: where there is no such unit, or it has no spectrum (yet), saying why.
            DamagedError: where what is stored is not what was written.
        """
        key = self._key(image, block, function, kind)
        record = self.store.record(key)
        if state_of(record) not in DONE:
            raise InputError(f"{key} has no spectrum: {state_of(record)}; {record.failure or record.unit.reason}")
        return self.stored(key)

    def _key(self, image: int, block: str | int, function: str, kind: str) -> str:
        named: dict[str, str] = {}
        for key, record in self.readable()[0].items():
            unit = record.unit
            if (unit.image, unit.function, unit.kind) == (image, function, kind):
                named.setdefault(unit.block, key)
                if unit.number:  # a module's path may be a number, too: then numbers count, as for --blocks
                    named[str(unit.number)] = key
        if str(block) in named:
            return named[str(block)]
        asked = f"the run has no unit of image {image}, block {block}, function {function}, kind {kind}"
        raise InputError(f"{asked}; it has {self._units_for_people()}")

    def _units_for_people(self) -> str:
        """Which images, blocks, functions and kinds there are."""
        units = [record.unit for record in self.readable()[0].values()]
        images = sorted({unit.image for unit in units})
        blocks = dict.fromkeys(f"{unit.number} {unit.block}" if unit.number else unit.block for unit in units)
        shown = [*list(blocks)[:LISTED], *([f"{len(blocks) - LISTED} more"] if len(blocks) > LISTED else [])]
        last = f" to {images[-1]}" if len(images) > 1 else ""
        return (
            f"image{'s' if last else ''} {images[0] if images else '-'}{last}, "
            f"blocks {', '.join(shown)}, functions {', '.join(dict.fromkeys(unit.function for unit in units))}, "
            f"kinds {', '.join(dict.fromkeys(unit.kind for unit in units))}"
        )

    def stored(self, key: str) -> Spectrum:
        """The spectrum of a unit that is done, by its key.

        Raises:
            DamagedError: where what is stored is not what was written.
        """
        return stored_spectrum(self.store, key)

    def picture(
        self,
        image: int = 0,
        block: str | int = 1,
        function: str = "block",
        *,
        grid: int = 0,
        memory: str | int | None = None,
        module: Any = None,
        trust: bool = False,
        tell: Callable[[int, int], None] = lambda done, total: None,
    ) -> "Picture":
        """The numerical range of one unit and, with a `grid`, its pseudospectrum; kept in the run.

        Args:
            image: as for `spectrum`.
            block: as for `spectrum`.
            function: as for `spectrum`.
            grid: points along the longer side; one sparse LU each.
            memory: what an LU may take; None: no limit.
            module: the network, where the run was made with one in memory.
            trust: whether code that the run names (`package.module:factory`) may be imported; needed where the
                matrix was not kept.
            tell: told of points done and points in all.

        Raises:
            InputError: where there is no such unit, or it has no matrix.
            UntrustedError: where code would be imported without `trust`.
            StiffcoreError: where an LU does not fit `memory`, or the weights are not those of the run.
        """
        from stiffcore.picture import take_picture

        key = self._key(image, block, function, Kind.MATRIX)
        allowed = parse_bytes(memory) if isinstance(memory, str) else memory
        trusted = trusted_network(self.study, trust=trust)
        return take_picture(self.store, key, grid, memory_bytes=allowed, module=module, trusted=trusted, tell=tell)

    def count_left(
        self,
        threshold: float,
        image: int = 0,
        block: str | int = 1,
        function: str = "block",
        *,
        memory: str | int | None = None,
        module: Any = None,
        trust: bool = False,
    ) -> Count:
        """How many of the n eigenvalues of one unit have a real part under a threshold: proved, or open.

        The matrix is read where it was kept, else built again; see `stiffcore.eigen.counting.count_left`.

        Args:
            threshold: any real number.
            image: as for `spectrum`.
            block: as for `spectrum`.
            function: as for `spectrum`.
            memory: what a sparse LU may take; None: no limit.
            module: the network, where the run was made with one in memory.
            trust: whether code that the run names (`package.module:factory`) may be imported; needed where the
                matrix was not kept.

        Returns:
            The count, exact ones and zeros with it, what it rests on, and its margin.

        Raises:
            InputError: where there is no such unit, it has no matrix, or the threshold is not finite.
            UntrustedError: where code would be imported without `trust`.
            StiffcoreError: where the weights are not those of the run.
        """
        from stiffcore.eigen.certificate import distance_of
        from stiffcore.eigen.counting import count_left
        from stiffcore.jacobian.reduction import Reduction
        from stiffcore.picture import shifted_matrix
        from stiffcore.unit import open_operator

        key = self._key(image, block, function, Kind.MATRIX)
        allowed = parse_bytes(memory) if isinstance(memory, str) else memory
        trusted = trusted_network(self.study, trust=trust)
        matrix, distance = shifted_matrix(self.store, key, module, trusted)
        if distance is None:
            operator = open_operator(self.store, self.store.record(key), "cpu", module, trusted)
            assert isinstance(operator, Reduction)
            distance = distance_of(operator)
        found = count_left(matrix, threshold, memory_bytes=allowed, rounding=distance)
        if found.count is None:
            return found
        unit = self.store.record(key).unit
        exact = [(value, number) for value, number in ((1, unit.ones), (0, unit.zeros)) if number]
        more = sum(number for value, number in exact if value < threshold)
        margin = min([found.margin, *(abs(value - threshold) for value, _ in exact)])
        return replace(found, count=found.count + more, margin=margin)

    def metrics(self) -> "pd.DataFrame":
        """One row a unit: what it is, its state, its metrics (nan where there is no spectrum), its certificate."""
        import pandas as pd

        images = {name: self._of_images(name) for name in IMAGE_ARRAYS[1:]}
        records, damaged = self.readable()
        rows = []
        for key in sorted(self.header.units or {*records, *damaged}):
            try:
                if key in damaged:
                    raise DamagedError(damaged[key])
                rows.append(self._row(records[key], images, self._spectrum_of(key, records[key])))
            except (DamagedError, StoreError) as error:
                self.damaged[key] = str(error)
                rows.append(self._damaged_row(key, records.get(key), images, str(error)))
        # tables of texts may be kept as UTF-8
        return pd.DataFrame([{n: encodable(v) if isinstance(v, str) else v for n, v in row.items()} for row in rows])

    def plot_depth(self, function: str = "block", kind: str | None = None) -> "Figure":
        """S active and the share of negative real parts along depth: median, quartiles and range over images.

        Args:
            function: block or branch.
            kind: of the spectra; None: the run's first.

        Raises:
            InputError: where no such spectrum is certified, or matplotlib is not installed.
        """
        return self._figure("depth", function, kind)

    def plot_labels(self, function: str = "block", kind: str | None = None) -> "Figure":
        """Means of S active by block and label; arguments and errors as `plot_depth`."""
        return self._figure("heat", function, kind)

    def _figure(self, name: str, function: str, kind: str | None) -> "Figure":
        rows = self.metrics()
        rows = rows[rows["kind"] == (kind or self.study.kinds[0])]
        given = (self.study.network,) if name == "depth" else ()
        figure = drawing(name)(rows, function, *given)
        if figure is None:
            raise InputError(f"nothing to draw of {function}: no certified spectra of several blocks or labels")
        return figure

    def to_xarray(self) -> "xarray.Dataset":
        """All metrics as a dataset over image, block, function and kind; nan where there is no spectrum.

        Returns:
            Variables: `stiffcore.metrics.NAMES`, those of the certificate, `n`, `m`, `elements`, `eigenvalues`, `k`,
            `ones`, `zeros`, `certified`, `state`, `basis`. Coordinates: `image` (position), `block` (module path),
            `function`, `kind`; along image `image_index`, `label`, `prediction`, `loss`, `correct`; along block
            `number`.

        Raises:
            InputError: where xarray is not installed.
        """
        try:
            import xarray
        except ImportError as error:
            raise InputError(f"{error}; pip install 'stiffcore[export]'") from error

        rows = self.metrics()
        dims = ["image", "block", "function", "kind"]
        # as the run has them, which is by depth
        order = {name: list(dict.fromkeys(rows[name])) for name in dims}
        indexed = rows.set_index(dims)
        sizes = ("n", "m", "elements", "eigenvalues", "k", "ones", "zeros")
        names = [*METRIC_NAMES, *CERTIFICATE_COLUMNS, *sizes, "certified", "state", "basis"]
        data = xarray.Dataset.from_dataframe(indexed[names]).reindex(order)
        by_image = rows.drop_duplicates("image").set_index("image").loc[order["image"]]
        for name in ("image_index", "label", "prediction", "loss", "correct"):
            data = data.assign_coords({name: ("image", by_image[name].to_numpy())})
        by_block = rows.drop_duplicates("block").set_index("block").loc[order["block"]]
        data = data.assign_coords(number=("block", by_block["number"].to_numpy()))
        return data.assign_attrs(description=self.header.description, source=self.header.source)

    def _of_images(self, name: str) -> np.ndarray:
        """One number of each image."""
        found, count = self.store.get_array(IMAGES, name), len(self.header.identity.images)
        if found.shape != (count,) or found.dtype.kind not in "iuf":
            raise DamagedError(f"{self.store.url}/{IMAGES}/{name}: not one number of each of {count} images")
        return found

    def _spectrum_of(self, key: str, record: UnitRecord) -> Spectrum | None:
        return self.stored(key) if state_of(record) in DONE else None

    def _damaged_row(
        self, key: str, record: UnitRecord | None, images: dict[str, np.ndarray], why: str
    ) -> dict[str, Any]:
        """The row of a unit of which not all can be read; its name says which it is."""
        if record is not None:
            return self._row(record, images, None) | {"state": DAMAGED, "note": why}
        asked = self.header.identity
        units = product(range(len(asked.images)), asked.blocks, asked.functions, asked.kinds)
        named = [of for of in units if unit_key(*of) == key]
        if not named:
            raise InputError(f"{self.store.url}: the header names a unit {key}, which the run cannot have")
        image, block, function, kind = named[0]
        facts = {"number": 0, "block": block, "function": function, "kind": kind, "m": 0, "n": 0, "k": 0}
        facts |= {"ones": 0, "zeros": 0, "route": "", "elements": 0, "eigenvalues": 0, "state": DAMAGED, "solver": ""}
        nothing = dict.fromkeys((*METRIC_NAMES, *CERTIFICATE_COLUMNS), float("nan"))
        rest = {"basis": "", "certified": False, "note": why, "seconds": 0.0}
        return _image_row(image, images) | facts | nothing | rest

    def _row(self, record: UnitRecord, images: dict[str, np.ndarray], spectrum: Spectrum | None) -> dict[str, Any]:
        unit = record.unit
        facts = ("number", "block", "function", "kind", "m", "n", "k", "ones", "zeros", "route")
        row = _image_row(unit.image, images) | {
            **{name: str(value) if isinstance(value, str) else value for name, value in unit if name in facts},
            "elements": unit.m * unit.n,
            "eigenvalues": unit.k + unit.ones + unit.zeros,
            "state": state_of(record),
            "solver": str(record.plan.solver),
        }
        if spectrum is None:
            nothing = dict.fromkeys((*METRIC_NAMES, *CERTIFICATE_COLUMNS), float("nan"))
            return (
                row | nothing | {"basis": "", "certified": False, "note": record.failure or unit.reason, "seconds": 0.0}
            )
        certificate = spectrum.certificate
        return (
            row
            | spectrum.metrics
            | dict(zip(CERTIFICATE_COLUMNS, _certificate_row(certificate), strict=True))
            | {
                "basis": spectrum.basis,
                "certified": certificate.passed,
                "note": "; ".join(certificate.failures or spectrum.doubts),
                "seconds": sum(record.seconds.values()),
            }
        )


def _image_row(i: int, images: dict[str, np.ndarray]) -> dict[str, Any]:
    return {
        "image": i,
        "image_index": int(images["index"][i]),
        "label": int(images["y"][i]),
        "prediction": int(images["prediction"][i]),
        "loss": float(images["loss"][i]),
        "correct": _correct(int(images["prediction"][i]), int(images["y"][i])),
    }


def _correct(prediction: int, label: int) -> float:
    """1 where an image is classified as it is labelled, 0 where not, nan where either is unknown."""
    return float(prediction == label) if min(prediction, label) >= 0 else float("nan")


def _certificate_row(certificate: Certificate) -> tuple[float, ...]:
    return (
        certificate.s_error,
        certificate.s_active_error,
        certificate.error,
        certificate.near_axis,
        max((c.residual for c in certificate.certified), default=0.0),
        max((c.condition for c in certificate.certified), default=0.0),
        certificate.trace_error,
        certificate.square_error,
    )


def state_of(record: UnitRecord) -> str:
    """A unit's state: `done`, `not certified`, `stored` (matrix), `failed`, `under way`, `planned` or `no spectrum`."""
    if not record.plan.works:
        return "failed" if record.unit.route == FAILED else "no spectrum"
    if record.stage is Stage.DONE and record.plan.solver is Solver.MATRIX_ONLY:
        return "stored"
    if record.stage is Stage.DONE:
        return "done" if record.certificate and record.certificate.passed else "not certified"
    if record.failure:
        return "failed"
    return "under way" if record.begun else "planned"


def state_now(record: UnitRecord, *, held: bool) -> str:
    """As `state_of`; of a unit that was begun, `interrupted` where nobody holds the run."""
    state = state_of(record)
    return "interrupted" if state == "under way" and not held else state


def status_summary(records: Mapping[str, UnitRecord], damaged: Mapping[str, str], *, held: bool = True) -> str:
    """How many units are in which state, those whose record cannot be read with them.

    Args:
        records: of the units that can be read.
        damaged: what is wrong with the others.
        held: whether somebody works on the run.
    """
    states = Counter([*(state_now(r, held=held) for r in records.values()), *[DAMAGED] * len(damaged)])
    return ", ".join(f"{number} {state}" for state, number in sorted(states.items()))


def open_run(url: str) -> Run:
    """Open a stored run to read it.

    Args:
        url: folder or URL.

    Raises:
        InputError: where there is none, or it is of another version's format.
        StoreError: where a URL cannot be reached.
        DamagedError: where its header is not what was written.
    """
    return Run(RunStore(str(url)))
