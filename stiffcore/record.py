"""What is recorded of a run, with its types: its header, the record of each unit, and the events of a session.

The store turns these into JSON and back (`to_json`, `from_json`), and nothing else does. What is read is checked here,
all of it: a field that is missing, of another type or out of range is refused by its name.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, PlainValidator

from stiffcore.spectra import Certificate, Ends, Moments, read_as, spelled, unspelled
from stiffcore.study import FAILED, LARGEST, Build, Flops, Identity, Kind, Size, Solver, Study, Unit

# Of the layout of a run and of what is recorded in it; a run of another one is refused.
FORMAT = 2

# All arrays that a unit may have; of a matrix, NAME_tiles too.
ARRAYS = frozenset(
    (
        *("matrix", "hessenberg", "tau", "scale", "reduced_eigenvalues", "right_vectors", "left_vectors", "division"),
        *("eigenvalues", "component", "components", "histogram", "histogram_edges"),
        *("numerical_range", "pseudospectrum", "pseudospectrum_re", "pseudospectrum_im"),
    )
)
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
AtLeastOne = Annotated[int, Field(ge=1, le=LARGEST)]


class Stage(StrEnum):
    """The last stage of a unit that is done; in order."""

    PLANNED = "planned"
    BUILT = "built"
    REDUCED = "reduced"
    SOLVED = "solved"
    COUNTED = "counted"
    DONE = "done"

    def before(self, other: "Stage") -> bool:
        """Whether this stage comes before another one; text has another order."""
        order = list(Stage)
        return order.index(self) < order.index(other)


@dataclass(frozen=True)
class UnitPlan:
    """What one unit will take.

    Attributes:
        unit: the facts.
        solver: the rung; `none` where the unit has no spectrum, or fits no rung.
        why: why the rungs above were passed over, and why this one, or none.
        refused: whether it has a spectrum but the budget holds no rung.
        chunk: columns built at once.
        shard: columns in one file.
        build: how the matrix is built.
        matrix_free: whether no matrix is built, only products with it are taken.
        stored: whether the matrix goes through the store; else it is built again where a killed unit needs it.
        factor_bytes: what a sparse factorisation may take, of what is projected.
        panel: where the matrix is divided in the store: columns of a panel.
        at_once: there, panels of a block, which is what memory holds.
        leaf: there, the largest order that is solved in memory.
        spread: there, workers that have a block each, at the same time.
        stages: projected bytes by stage, host memory on top of what is reserved.
        device_bytes: projected bytes on the device, on top of what is reserved there.
        disk_bytes: most bytes in the store while it runs.
        kept_bytes: bytes that stay in the store.
        moved_bytes: written to and read from the store, and copied to the device, where no tile is zero.
        flops: of the eigenvalue solve.
        seconds: estimate of build and solve.
    """

    unit: Unit
    solver: Solver
    why: str
    refused: bool = False
    chunk: AtLeastOne = 1
    shard: AtLeastOne = 1
    build: Build = Build.COLUMNS
    matrix_free: bool = False
    stored: bool = True
    factor_bytes: Size = 0
    panel: Size = 0
    at_once: AtLeastOne = 1
    leaf: Size = 0
    spread: AtLeastOne = 1
    stages: dict[str, Size] | None = None
    device_bytes: Size = 0
    disk_bytes: Size = 0
    kept_bytes: Size = 0
    moved_bytes: Flops = 0
    flops: Flops = 0
    seconds: Seconds = 0.0

    @property
    def projected_bytes(self) -> int:
        """Host memory at the fullest stage, on top of what is reserved."""
        return max((self.stages or {"": 0}).values())

    def to_json(self) -> dict[str, Any]:
        """As JSON values, without the unit's facts."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "unit"} | {
            "solver": str(self.solver),
            "build": str(self.build),
        }

    @classmethod
    def from_json(cls, unit: Unit, values: Mapping[str, Any]) -> "UnitPlan":
        """The inverse of `to_json`.

        Raises:
            ValueError: naming what is wrong.
        """
        return read_as(cls, {**values, "unit": unit.model_dump(mode="json")})

    @property
    def works(self) -> bool:
        """Whether there is something to compute."""
        return self.solver is not Solver.NONE


@dataclass(frozen=True)
class Converged:
    """Of a spectrum's ends: what two starts agree on.

    Attributes:
        right_end: whether they do on the largest real parts.
        left_end: on the smallest.
        vectors: of each eigenvalue found, whether both eigenvectors converged.
    """

    right_end: bool
    left_end: bool
    vectors: tuple[bool, ...]


@dataclass(frozen=True)
class SplitFacts:
    """One division of a part: the fields are those of `stiffcore.eigen.divide.Split`."""

    order: Size
    curve: str
    beyond: int
    steps: Size
    trace_error: float
    neglected: float
    norm: float
    failure: str


# What is known of a division on its way: by the end of a value's name, its type. Names of parts stand before it.
_ON_THE_WAY: dict[str, Any] = {
    "failed": str,
    "growth": dict[str, float],
    "moments": tuple[float, float] | tuple[float, float, float],
    "norms|made|right": tuple[float, float],
    "start|basis|left": AtLeastOne,
    "trace": float,
    r"change\d+": float | str,
    r"values|vectors\d+-\d+": Literal[True],
    "components": AtLeastOne,
    r"\d+": SplitFacts,
}


def _known_on_the_way(values: dict[str, Any]) -> dict[str, Any]:
    for name, value in values.items():
        kinds = [kind for end, kind in _ON_THE_WAY.items() if re.fullmatch(rf"([rl]*-(\d+-)?)?({end})", name)]
        if not kinds:
            raise ValueError(f"{name!r} is nothing that a division finds")
        try:
            read_as(kinds[0], spelled(value))
        except ValueError as error:
            raise ValueError(f"{name}: {str(error).lstrip('.: ')}") from error
    return values


@dataclass(frozen=True)
class Divided:
    """How a matrix was divided.

    Attributes:
        splits: each division of a part.
        error: the norm of what was neglected in all.
        right: how many eigenvalues of J have a positive real part by the division's own count; None where not known.
    """

    splits: tuple[SplitFacts, ...]
    error: Annotated[float, Field(ge=0)]
    right: Size | None = None


@dataclass(frozen=True)
class UnitRecord:
    """What is recorded of a unit: its facts and plan, the last stage that is done, and what the stages found.

    What is not known yet is None.

    Attributes:
        plan: with the unit's facts.
        stage: the last one done.
        made_with: versions that began the work; None where nothing was begun.
        seconds: by stage.
        measured_bytes: peak of the unit's process, on top of what it held before.
        measured_device_bytes: peak on the device.
        ilo: of balancing, of the Hessenberg form.
        ihi: likewise.
        moments: of the matrix.
        logarithmic_norm: of the matrix.
        range_left: left of every real part in the matrix's numerical range; None at orders that are solved once more.
        range_right: right of every one.
        how: the ends of the spectrum were found.
        converged: which of them.
        divided: how the matrix was divided, once it is.
        division: what is known of it on the way, by name, while it is divided.
        ends: of `extremes`, what is known of the rest of the spectrum.
        certificate: how far the eigenvalues can be trusted.
        shift: what was added to the eigenvalues of the matrix solved.
        distance: of the matrix solved from that of exact arithmetic, in the 2-norm: its rounding, and what the graph
            lost.
        found: how many eigenvalues are stored.
        metrics: where the eigenvalues alone do not say them.
        values_kept: whether the eigenvalues are stored; else a histogram of them is.
        kept: whether what is needed on the way only was kept, too.
        failure: why the unit failed.
        damaged: names of arrays that `stiffcore verify` found damaged.
    """

    plan: UnitPlan
    stage: Stage
    made_with: dict[str, str] | None = None
    seconds: dict[str, Seconds] = field(default_factory=dict)
    measured_bytes: Size | None = None
    measured_device_bytes: Size | None = None
    ilo: Size | None = None
    ihi: Size | None = None
    moments: Moments | None = None
    logarithmic_norm: float | None = None
    range_left: float | None = None
    range_right: float | None = None
    how: str | None = None
    converged: Converged | None = None
    divided: Divided | None = None
    division: Annotated[dict[str, Any], AfterValidator(_known_on_the_way)] | None = None
    ends: Ends | None = None
    certificate: Certificate | None = None
    shift: Annotated[int, Field(ge=0, le=1)] | None = None
    distance: float | None = None
    found: Size | None = None
    metrics: dict[str, float] | None = None
    values_kept: bool = True
    kept: bool | None = None
    failure: str | None = None
    damaged: tuple[str, ...] = ()

    @property
    def unit(self) -> Unit:
        """The facts."""
        return self.plan.unit

    @property
    def begun(self) -> bool:
        """Whether a session has worked on it."""
        return self.made_with is not None

    def changed(self, **found: Any) -> "UnitRecord":
        """The record with some fields changed, the unit's own by their names; a new plan changes none of these."""
        facts: dict[str, Any] = {name: found.pop(name) for name in Unit.model_fields.keys() & found.keys()}
        unit = self.unit.model_copy(update=facts) if facts else self.unit
        return replace(self, plan=replace(found.pop("plan", self.plan), unit=unit), **found)

    def to_json(self) -> dict[str, Any]:
        """As JSON values, the unit's facts beside the others; without what is not known."""
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("plan", "stage")}
        said = {name: value for name, value in known.items() if value not in (None, (), {}, NOT_SAID.get(name))}
        return {
            **self.unit.model_dump(mode="json"),
            "plan": self.plan.to_json(),
            "stage": str(self.stage),
            **_plain(said),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "UnitRecord":
        """The inverse of `to_json`.

        Raises:
            ValueError: naming what is wrong.
        """
        known = {name: value for name, value in values.items() if name in _NAMES and value is not None}
        known |= {name: unspelled(known[name]) for name in WITH_FLOATS & known.keys()}
        plan = values.get("plan")
        if not isinstance(plan, Mapping):
            raise ValueError("plan: not there" if plan is None else "plan: Input should be an object")
        facts = {name: values[name] for name in Unit.model_fields if name in values}
        found = read_as(cls, {**known, "plan": {**plan, "unit": facts}})
        problem = found._problem()
        if problem:
            raise ValueError(problem)
        return found

    def _problem(self) -> str:
        """What does not go together: a stage without what it finds, sizes that do not add up, an array of no name."""
        unit, plan, stage = self.unit, self.plan, self.stage
        strange = [name for name in self.damaged if name.removesuffix("_tiles") not in ARRAYS]
        if strange:
            return f"damaged: {strange[0]!r} is no array of a unit"
        total = unit.k + unit.ones + unit.zeros
        if unit.kind is Kind.MATRIX and unit.route not in ("none", FAILED) and not total == unit.n == unit.m:
            return "k, ones, zeros: do not add up to n"
        if unit.kind is Kind.SINGULAR and total > min(unit.n, unit.m):
            return "k, ones, zeros: more than there are singular values"
        if unit.k > unit.n * unit.m or (self.found or 0) > unit.k:
            return "k, found: more than there are eigenvalues"
        if not plan.works or plan.solver is Solver.MATRIX_ONLY:
            return ""
        known: dict[str, Any] = {}
        if unit.kind is Kind.MATRIX and not stage.before(Stage.SOLVED):
            known["moments"] = self.moments
        if unit.kind is Kind.MATRIX and unit.k:
            if plan.solver is Solver.HOST_DENSE and not stage.before(Stage.REDUCED):
                known |= {"ilo": self.ilo, "ihi": self.ihi, "moments": self.moments}
            if plan.solver is Solver.EXTREMES and not stage.before(Stage.SOLVED):
                known["converged"] = self.converged
            if plan.solver is Solver.EXTREMES and not stage.before(Stage.COUNTED):
                known["ends"] = self.ends
            if plan.solver is Solver.DIVIDE and not stage.before(Stage.SOLVED):
                known["divided"] = self.divided
        if stage is Stage.DONE:
            known |= {"certificate": self.certificate, "shift": self.shift}
            known |= {} if self.values_kept else {"metrics": self.metrics}
        missing = [name for name, value in known.items() if value is None]
        return f"{', '.join(missing)}: not there, though the stage is {stage!s}" if missing else ""


_NAMES = {f.name for f in fields(UnitRecord)}
# What is not written, beside what is None or empty.
NOT_SAID: dict[str, Any] = {"values_kept": True}
# Fields with numbers that may be infinite or nan, which strict JSON spells out.
WITH_FLOATS = {
    "moments",
    "logarithmic_norm",
    "distance",
    "range_left",
    "range_right",
    "divided",
    "division",
    "ends",
    "certificate",
    "metrics",
}


def _as_stored(options: Any) -> Study:
    """A study from JSON values. It takes options as users give them, too: what is stored is what it would store."""
    study = Study.model_validate(options)
    kept = study.model_dump(mode="json")
    other = [name for name, value in options.items() if (type(value), value) != (type(kept[name]), kept[name])]
    if other:
        raise ValueError(f"{', '.join(other)}: not as it is stored")
    return study


@dataclass(frozen=True)
class Header:
    """What made a run.

    Attributes:
        version: of the stiffcore that began it.
        study: what was asked.
        identity: what decides the results.
        description: of the network, one line.
        source: of the images, one line.
        versions: of the libraries that can change a digit, when the run began.
        threads: of each unit's arithmetic.
        units: the keys of all units.
        left_out: of `--blocks all`, see `Survey`; runs of earlier versions do not say it.
    """

    version: str
    study: Annotated[Study, PlainValidator(_as_stored)]
    identity: Identity
    description: str = ""
    source: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    threads: AtLeastOne = 1
    units: tuple[str, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As JSON values, with the format."""
        said = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "left_out" or self.left_out}
        return {
            **said,
            "study": self.study.model_dump(mode="json"),
            "identity": spelled(asdict(self.identity)),
            "units": list(self.units),
            "format": FORMAT,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Header":
        """The inverse of `to_json`.

        Raises:
            ValueError: naming what is wrong.
        """
        return read_as(cls, values)


@dataclass(frozen=True)
class Begun:
    """A unit was handed to who carries it out."""

    kind: ClassVar[str] = "begun"
    unit: str


@dataclass(frozen=True)
class Step:
    """A step inside a stage.

    Attributes:
        unit: key.
        stage: under way.
        done: steps.
        total: of them; 1 where they cannot be counted.
        note: what is done, in a few words.
    """

    kind: ClassVar[str] = "step"
    unit: str
    stage: Stage
    done: int
    total: int
    note: str = ""


@dataclass(frozen=True)
class Reached:
    """A stage of a unit is recorded as done."""

    kind: ClassVar[str] = "reached"
    unit: str
    stage: Stage


@dataclass(frozen=True)
class Restarted:
    """A unit (or the images) is begun again, and why."""

    kind: ClassVar[str] = "restarted"
    unit: str
    note: str


@dataclass(frozen=True)
class FellBack:
    """A unit goes on in another way, and why."""

    kind: ClassVar[str] = "fallback"
    unit: str
    note: str


@dataclass(frozen=True)
class Ended:
    """A unit is done."""

    kind: ClassVar[str] = "ended"
    unit: str


@dataclass(frozen=True)
class Failed:
    """A unit failed, and why; the others go on."""

    kind: ClassVar[str] = "failed"
    unit: str
    note: str


Event = Begun | Step | Reached | Restarted | FellBack | Ended | Failed
_KINDS: dict[str, type[Any]] = {c.kind: c for c in (Begun, Step, Reached, Restarted, FellBack, Ended, Failed)}


def event_to_json(event: Event) -> dict[str, Any]:
    """An event as JSON values, for a channel between processes."""
    # an enumeration's member is a text to JSON, but not to msgpack
    plain = {name: str(value) if isinstance(value, Stage) else value for name, value in asdict(event).items()}
    return {"kind": event.kind, **plain}


def event_from_json(values: Mapping[str, Any]) -> Event:
    """The inverse of `event_to_json`.

    Raises:
        ValueError: where it is none.
    """
    kind = _KINDS.get(values["kind"])
    if kind is None:
        raise ValueError(f"kind: {values['kind']!r} is no event")
    return read_as(kind, {name: value for name, value in values.items() if name != "kind"})


def _plain(said: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON values."""

    def plain(value: Any) -> Any:
        if hasattr(value, "to_json"):
            return value.to_json()
        return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value

    return spelled({name: plain(value) for name, value in said.items()})
