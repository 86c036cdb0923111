"""One unit, from its plan to its certified spectrum, in stages that each leave the store whole.

Stages, as the unit's record names the last one done: `planned`, `built` (matrix in the store), `reduced` (Hessenberg
form in the store), `solved` (its eigenvalues in the store), `counted` (where only the ends were solved: what is proved
of the rest), `done` (those of J, and the certificate). Tensor slices and singular values have one stage. A stage begins
from what the store holds and writes its arrays first, its record last; killed anywhere, it is begun again.
"""

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from scipy.sparse import csc_array, hstack
from scipy.sparse.linalg import LinearOperator
from threadpoolctl import threadpool_limits
from torch import nn

from stiffcore.eigen import certificate, dense, device, divide, panels, singular, union
from stiffcore.eigen.counting import Whole, ends_of
from stiffcore.eigen.deflation import Enclosure
from stiffcore.eigen.extremes import extremes
from stiffcore.eigen.inclusion import FULL_ORDER, MOST_ORDER
from stiffcore.eigen.numerical_range import logarithmic_norm, range_bounds
from stiffcore.eigen.panels import Each
from stiffcore.eigen.sparse import DenseMatrix
from stiffcore.eigen.windows import WindowSpectrum
from stiffcore.errors import DamagedError, DeviceFullError, StiffcoreError
from stiffcore.jacobian.colouring import ReachError
from stiffcore.jacobian.components import Components
from stiffcore.jacobian.factors import Factors
from stiffcore.jacobian.reduction import PROBE_TOLERANCE, Reduction, Route
from stiffcore.jacobian.slices import RandomCheck, Slices
from stiffcore.memory import moved_bytes, own_peak_bytes, release_free_memory, reset_peak
from stiffcore.metrics import HISTOGRAM_EDGES, Tally
from stiffcore.plan import DIVIDE_TILE_ROWS, TILE_ROWS, locate_bytes, operator_bytes, prove_bytes, proves_sparse
from stiffcore.record import (
    Converged,
    Divided,
    Event,
    FellBack,
    Reached,
    Restarted,
    SplitFacts,
    Stage,
    Step,
    UnitPlan,
    UnitRecord,
)
from stiffcore.spectra import Ends, Moments, certified_choice
from stiffcore.store import (
    COMPONENT,
    COMPONENTS,
    DIVISION,
    HISTOGRAM,
    SCRATCH,
    Lease,
    RunStore,
    StoredWorkspace,
    TiledMatrix,
    read_image,
    stored_spectrum,
)
from stiffcore.study import BlockFunction, Build, Keep, Kind, Solver, Unit, format_bytes, versions
from stiffcore.survey import image_input, open_network, operator_of
from stiffcore.trust import check_code

Emit = Callable[[Event], None]
Opener = Callable[[RunStore, UnitRecord, str], Reduction | Slices | Factors | Components]
# From this order on, or with a network of this size, a unit's memory matters more than the 0.2 s that finding all of
# it takes.
LARGE_ORDER = 1000
LARGE_NETWORK_BYTES = 16 << 20
# From this order on, a dense solve takes so long that opening the operator twice does not matter.
SLOW_ORDER = 2500
CUDA = "cuda"
_LIBRARY_FULL = re.compile(r"CUDA error: out of memory|_STATUS_ALLOC_FAILED")


def open_operator(
    store: RunStore, record: UnitRecord, device: str, module: nn.Module | None = None, trusted: str = ""
) -> Reduction | Slices | Factors | Components:
    """The operator of a stored unit, made again from the study's network and the stored image.

    Args:
        store: the run.
        record: of the unit.
        device: where it works.
        module: the network, where the study says `in memory`.
        trusted: the network whose code may be imported, see `stiffcore.trust`.

    Raises:
        UntrustedError: where the network is made by other code.
        StiffcoreError: where the weights are not those that the run began with.
    """
    header = store.settled()
    study, unit = header.study, record.unit
    check_code(study, trusted, store.url)
    network = open_network(study, module)
    if network.weights_digest != header.identity.weights:
        raise StiffcoreError(f"the weights at {network.weights} are no longer those that this run began with")
    x = image_input(read_image(store, unit.image, header.identity.images[unit.image]), study)
    by_component = unit.components > 0
    return operator_of(
        network.module, x, unit.block, unit.function, unit.kind, study.reduce, device, components=by_component
    )


@dataclass
class UnitRun:
    """The state of one unit while it is carried out.

    Attributes:
        store: the run.
        key: of the unit.
        emit: told of every step that the store has recorded.
        opener: makes the unit's operator.
        check: raises where the unit may no longer be written to; asked before every step.
        each: who works on the blocks of a matrix that is divided.
    """

    store: RunStore
    key: str
    emit: Emit
    opener: Opener
    check: Callable[[], None]
    each: Each

    def __post_init__(self) -> None:
        study = self.store.settled().study
        self.keep = study.keep
        self.dtype = np.dtype(study.dtype)
        self.record = self.store.record(self.key)
        self.solver = self.record.plan.solver
        self.device = CUDA if self.record.plan.device_bytes else "cpu"
        self.enclosures: tuple[Enclosure, ...] | None = None

    @property
    def plan(self) -> UnitPlan:
        """What was planned."""
        return self.record.plan

    @property
    def unit(self) -> Unit:
        """The facts of the unit."""
        return self.record.unit

    @cached_property
    def reduction(self) -> Reduction:
        """The operator, checked against what was planned.

        Raises:
            StiffcoreError: where it is not the one planned.
        """
        reduction = self.opener(self.store, self.record, self.device)
        assert isinstance(reduction, Reduction)
        planned = {name: getattr(self.unit, name) for name in ("n", "k", "ones", "zeros")}
        found = {name: getattr(reduction, name) for name in planned}
        if found != planned:
            raise StiffcoreError(f"{self.key}: planned {planned}, found {found}: was a library changed?")
        self.release()  # of the network, only the block is still needed
        return reduction

    @cached_property
    def function(self) -> Slices | Factors | Components:
        """What other kinds than `matrix`, and components, are computed from, checked against what was planned.

        Raises:
            StiffcoreError: where it is not the function planned.
        """
        opened = self.opener(self.store, self.record, self.device)
        if isinstance(opened, Reduction):
            raise StiffcoreError(f"{self.key}: kind {self.unit.kind} was opened as a matrix")
        planned, found = (self.unit.n, self.unit.m), (opened.jacobian.n, opened.jacobian.m)
        if found != planned:
            raise StiffcoreError(f"{self.key}: planned {planned}, found {found}: was a library changed?")
        self.release()
        return opened

    @cached_property
    def sparse(self) -> csc_array | LinearOperator:
        """The matrix without its zeros; where the plan has no room for it, its products."""
        if self.plan.matrix_free:
            operator, k = self.reduction, self.unit.k
            return LinearOperator(
                (k, k), operator.product, rmatvec=operator.transposed_product, dtype=np.dtype(np.float64)
            )
        if not self.plan.stored:
            return self.multiplied(_whole(self))
        with _undoing(self, Stage.PLANNED, "matrix"):
            return self.multiplied(self.matrix("matrix").read_sparse())

    def multiplied(self, matrix: csc_array) -> csc_array | LinearOperator:
        """The matrix, with its products on the device where the plan has room for it there."""
        if not self.plan.device_bytes:
            return matrix
        return device.DeviceMatrix(matrix.astype(np.float64), self.device)

    def release(self) -> None:
        """Give back what is not used any more."""
        large = self.unit.k >= LARGE_ORDER or self.unit.network_bytes >= LARGE_NETWORK_BYTES
        release_free_memory(cycles=large)

    def drop(self, name: str) -> None:
        """Give back the operator (`reduction`) or the `sparse` matrix; made again where it is needed once more."""
        self.__dict__.pop(name, None)
        self.release()

    def matrix(self, name: str) -> TiledMatrix:
        """The tiled matrix of that name, made where it is not there."""
        k, plan = self.unit.k, self.plan
        return TiledMatrix.create(self.store.unit_group(self.key), name, (k, k), self.dtype, TILE_ROWS, plan.shard)

    def reach(self, stage: Stage, **fields: Any) -> None:
        """Record a stage as done, and tell."""
        self.check()
        self.record = self.store.update(self.key, stage=stage, **fields)
        self.emit(Reached(self.key, stage))

    def step_seldom(self, stage: Stage) -> Callable[[int, int], None]:
        """As `step`, once a second at most."""
        last = time.monotonic()

        def tell(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= 1:
                last = time.monotonic()
                self.step(stage, done, total)

        return tell

    def step(self, stage: Stage, done: int, total: int) -> None:
        """Tell of progress inside a stage."""
        self.check()
        self.emit(Step(self.key, stage, done, total))


def carry_out(
    url: str,
    key: str,
    *,
    threads: int,
    emit: Emit,
    opener: Opener = open_operator,
    check: Callable[[], None] = lambda: None,
    each: Each = panels.one_by_one,
    held: Lease | None = None,
) -> str:
    """Bring one unit to `done`, from wherever its record says it is.

    Args:
        url: of the run.
        key: of the unit.
        threads: of BLAS and torch; decides the last bits of the results.
        emit: told of every step that the store has recorded.
        opener: makes the unit's operator.
        check: raises where the unit may no longer be written to; asked before every step.
        each: who works on the blocks of a matrix that is divided.
        held: the right to write, asked for before every write; None: the caller holds the run.

    Returns:
        The key.

    Raises:
        DeviceFullError: where the device is out of memory; the matrix is built, and another rung may take it.
        StiffcoreError: where it cannot be done; what is recorded stays.
    """
    with _threads(threads), threadpool_limits(threads):
        run = UnitRun(RunStore(url, lease=held), key, emit, opener, check, each)
        _restart_if_foreign(run)
        if run.record.stage is not Stage.DONE and run.record.metrics:  # of an earlier solve
            run.store.drop(key, *HISTOGRAM)
            run.record = run.store.update(key, metrics=None, values_kept=True)
        timing = dict(run.record.seconds)
        before = reset_peak()
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        for stage, work in _route(run):
            if run.record.stage.before(stage):
                start = time.perf_counter()
                run.step(stage, 0, 1)
                with _device_memory():
                    fields = work(run)
                release_free_memory()  # the next stage counts on it
                timing[stage] = timing.get(stage, 0.0) + time.perf_counter() - start
                run.reach(stage, **fields, seconds=timing, **_measured(run, before))
        if run.solver is Solver.DIVIDE:  # what it was divided into is far larger, and of no further use
            run.store.drop(key, DIVISION)
            run.store.update(key, division=None)
        if run.solver is not Solver.MATRIX_ONLY:
            _keep_metrics(run)
        if run.keep is not Keep.ALL and run.solver is not Solver.MATRIX_ONLY:
            run.store.update(key, kept=False)
            run.store.drop(key, *SCRATCH)
        else:
            run.store.update(key, kept=True)
    run.drop("reduction")  # the next unit's plan counts on it
    run.drop("function")
    return key


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    """Threads of torch for a unit; the caller's own process has as many afterwards as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measured(run: UnitRun, before: int | None) -> dict[str, int]:
    """Peaks of host and device memory, on top of what was held before; of all sessions."""
    found = {} if before is None else {"measured_bytes": max(0, own_peak_bytes() - before)}
    if run.device != "cpu":
        found["measured_device_bytes"] = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    return {name: max(value, getattr(run.record, name) or 0) for name, value in found.items()}


_Stages = list[tuple[Stage, Callable[[UnitRun], dict[str, Any]]]]


def _route(run: UnitRun) -> _Stages:
    if run.solver is Solver.SLICES:
        return [(Stage.DONE, _slice)]
    if run.solver is Solver.COMPONENTS:
        return [(Stage.DONE, _unite)]
    if run.unit.kind == Kind.SINGULAR:
        return [(Stage.DONE, _find_singular)]
    if run.solver is Solver.MATRIX_ONLY:
        return [(Stage.BUILT, _build), (Stage.DONE, _keep)] if run.unit.k else [(Stage.DONE, _keep)]
    if run.unit.k == 0:
        return [(Stage.SOLVED, _solve_nothing), (Stage.DONE, _certify)]
    if run.solver is Solver.EXTREMES:
        ends: _Stages = [(Stage.SOLVED, _find_ends), (Stage.COUNTED, _count), (Stage.DONE, _certify)]
        return ends if run.plan.matrix_free else [(Stage.BUILT, _build), *ends]
    if run.solver is Solver.CUDA_DENSE:
        return [(Stage.BUILT, _build), (Stage.SOLVED, _solve_on_device), (Stage.DONE, _certify)]
    if run.solver is Solver.DIVIDE:
        return [(Stage.BUILT, _build), (Stage.SOLVED, _divide), (Stage.DONE, _certify)]
    return [(Stage.BUILT, _build), (Stage.REDUCED, _reduce), (Stage.SOLVED, _solve), (Stage.DONE, _certify)]


def stored_by(record: UnitRecord) -> set[str]:
    """The arrays that a unit's record says are in the store."""
    plan, stage, found = record.plan, record.stage, set()
    all_values = plan.solver in (Solver.HOST_DENSE, Solver.CUDA_DENSE, Solver.DIVIDE)
    kept = stage is not Stage.DONE or record.kept
    if record.unit.kind is Kind.MATRIX and record.unit.k and kept and plan.works:
        if not stage.before(Stage.BUILT) and plan.stored:
            found.add("matrix")
        if not stage.before(Stage.REDUCED) and plan.solver is Solver.HOST_DENSE:
            found |= {"hessenberg", "tau", "scale"}
        if not stage.before(Stage.SOLVED) and (all_values or plan.solver is Solver.EXTREMES):
            found.add("reduced_eigenvalues")
            found |= set() if all_values else {"right_vectors", "left_vectors"}
    if stage is Stage.DONE and plan.solver is Solver.COMPONENTS and record.values_kept:
        found |= {COMPONENT, COMPONENTS}
    if stage is Stage.DONE and plan.solver not in (Solver.NONE, Solver.MATRIX_ONLY):
        found |= {"eigenvalues"} if record.values_kept else set(HISTOGRAM)
    return found


def _keep_metrics(run: UnitRun) -> None:
    """Of a study that keeps no spectra, what stands for them: metrics, and a histogram of real parts."""
    if run.keep is not Keep.METRICS or not run.record.values_kept:
        return
    spectrum = stored_spectrum(run.store, run.key)
    tally = Tally()
    tally.add(spectrum.computed.astype(complex))
    _store_histogram(run, tally)
    run.store.update(run.key, metrics=spectrum.metrics, values_kept=False)
    run.store.drop(run.key, "eigenvalues", COMPONENT, COMPONENTS)


def _store_histogram(run: UnitRun, tally: Tally) -> None:
    where = f"units/{run.key}"
    counts, edges = HISTOGRAM
    run.store.put_array(where, counts, tally.histogram, ("bin",), long_name="how many real parts are in each bin")
    run.store.put_array(where, edges, HISTOGRAM_EDGES, ("edge",))


def _slice(run: UnitRun) -> dict[str, Any]:
    """All eigenvalues of all tensor slices, and their certificate."""
    slices, chunk = run.function, run.plan.chunk
    assert isinstance(slices, Slices)
    found = WindowSpectrum(keep=run.keep is not Keep.METRICS)
    check = None if slices.accumulation is None else RandomCheck(slices)  # rows are products themselves
    for squares in slices.squares(chunk, run.step_seldom(Stage.DONE)):
        found.add(squares)
        if check is not None:
            check.add(squares)
    difference = 0.0 if check is None else check.difference()
    branch = run.unit.function == BlockFunction.BRANCH
    kept, zeros = found.tally.count, slices.count - found.tally.count
    fields: dict[str, Any] = {"ends": None, "shift": 0, "found": kept, "k": kept, "zeros": zeros}
    if found.keep:
        run.store.put_array(
            f"units/{run.key}",
            "eigenvalues",
            dense.sort_eigenvalues(found.values()),
            ("eigenvalue",),
            long_name="eigenvalues of the Jacobian tensor's slices that are not zero",
            order="ascending real part, then imaginary part",
            exact_zeros=zeros,
        )
    else:
        _store_histogram(run, found.tally)
        fields["values_kept"] = False
    # which signs are unsure is known here alone
    fields["metrics"] = found.tally.metrics(0, zeros, branch=branch)
    return fields | {"certificate": found.certificate(slices, difference)}


def _unite(run: UnitRun) -> dict[str, Any]:
    """The eigenvalues of all components, and their certificate; each is stored as it is solved."""
    components = run.function
    assert isinstance(components, Components)
    where, group = f"units/{run.key}", f"units/{run.key}/{DIVISION}"
    done = (run.record.division or {}).get("components", 0)
    parts = []
    with _undoing(run, Stage.PLANNED, DIVISION):
        for c in range(done):
            values = run.store.get_array(group, f"component-{c}")
            parts.append(union.Part.from_json(values, json.loads(run.store.get_text(group, f"component-{c}", "facts"))))
    tell = run.step_seldom(Stage.DONE)
    for c in range(done, len(components)):
        part = union.solve_part(components.reduction(c), run.plan.chunk)
        run.check()
        facts = json.dumps(part.to_json())
        run.store.put_array(group, f"component-{c}", part.values, ("eigenvalue",), facts=facts)
        run.store.update(run.key, division={"components": c + 1})
        parts.append(part)
        tell(c + 1, len(components))
    values, source, found = union.united(parts)
    moments, abscissa = union.united_moments(parts)
    ones, zeros = sum(part.ones for part in parts), sum(part.zeros for part in parts)
    run.store.put_array(
        where,
        "eigenvalues",
        values,
        ("eigenvalue",),
        long_name="computed eigenvalues of the Jacobian",
        order="ascending real part, then imaginary part",
        exact_ones=ones,
        exact_zeros=zeros,
    )
    run.store.put_array(where, COMPONENT, source, ("eigenvalue",), long_name="the component of each eigenvalue")
    table = np.array(
        [
            [members[0], len(members), part.ones, part.zeros, part.certificate.error]
            for members, part in zip(components.members, parts, strict=True)
        ]
    )
    run.store.put_array(
        where,
        COMPONENTS,
        table,
        ("component", "fact"),
        long_name="of each component: its first part, its parts, exact ones, exact zeros, its largest error",
        axis=components.axis,
    )
    run.store.drop(run.key, DIVISION)
    fields: dict[str, Any] = {"ends": None, "shift": 0, "found": len(values), "k": len(values), "ones": ones}
    fields |= {"zeros": zeros, "division": None, "moments": moments, "logarithmic_norm": abscissa}
    return fields | {"certificate": found, "distance": max(part.distance for part in parts)}


def _find_singular(run: UnitRun) -> dict[str, Any]:
    """All singular values, and their certificate."""
    divided: dict[str, Any] = {}
    factors, chunk = run.function, run.plan.chunk
    assert isinstance(factors, Factors)
    matrices = factors.matrices(chunk, run.step_seldom(Stage.DONE))
    if not all(np.isfinite(matrix.data).all() for matrix in matrices):
        raise StiffcoreError(f"{run.key}: the Jacobian is not finite")
    difference = factors.difference(matrices)
    release_free_memory()  # of building: what solves would come on top
    if run.solver is Solver.DIVIDE and run.unit.k:
        found, division = _divided_squares(run, factors, matrices)
        divided = {"divided": _told_of(division)}
    elif factors.reduction is not None:
        found = singular.by_waist(factors, *matrices)
    else:
        found = (singular.by_svd if run.solver is Solver.SVD else singular.by_gram)(factors, *matrices)
    del matrices
    run.store.put_array(
        f"units/{run.key}",
        "eigenvalues",
        found.values,
        ("value",),
        long_name="computed singular values of the Jacobian",
        order="ascending",
        exact_ones=found.ones,
        exact_zeros=found.zeros,
    )
    sizes = {"k": len(found.values), "found": len(found.values), "ones": found.ones, "zeros": found.zeros}
    certified = singular.certify(factors, found, difference)
    return {"ends": None, "shift": 0, **sizes, **divided, "certificate": certified}


def _divided_squares(
    run: UnitRun, factors: Factors, matrices: list[csc_array]
) -> tuple[singular.SingularValues, divide.Division]:
    """The singular values of J, by division of a symmetric matrix in the store."""
    plan, tell = run.plan, _teller(run, Stage.DONE)
    with _division(run, Stage.PLANNED) as space:
        return singular.by_division(factors, matrices, space, plan.leaf, at_once=plan.at_once, tell=tell, each=run.each)


def _told_of(division: divide.Division) -> Divided:
    """What the record has of a division."""
    splits = tuple(SplitFacts(**asdict(split)) for split in division.splits)
    return Divided(splits, division.error, division.right)


def _teller(run: UnitRun, stage: Stage) -> Callable[[str, int, int], None]:
    """Tells of the steps of a division, and what this process has read and written of it in this session."""
    begun = sum(moved_bytes())

    def tell(what: str, done: int, total: int) -> None:
        run.check()
        note = f"{what}; {format_bytes(sum(moved_bytes()) - begun)} moved"
        run.emit(Step(run.key, stage, done, total, note))

    return tell


@contextmanager
def _division(run: UnitRun, stage: Stage) -> Iterator[StoredWorkspace]:
    """Where a matrix is divided. One that cannot be is not tried again with the same sizes, and leaves nothing there.

    Raises:
        DivisionError: where it failed before.
    """
    failed = (run.record.division or {}).get("failed")
    if failed:
        raise divide.DivisionError(failed)
    with _undoing(run, stage, DIVISION):
        try:
            plan = run.plan
            yield StoredWorkspace(run.store, run.key, DIVIDE_TILE_ROWS, plan.panel, run.check)
        except divide.DivisionError as error:
            run.store.drop(run.key, DIVISION)  # seven matrices
            run.store.update(run.key, division={"failed": str(error)})
            raise


def _restart_if_foreign(run: UnitRun) -> None:
    """Begin again what other library versions left unfinished: their digits would mix in one spectrum."""
    made_with, now = run.record.made_with, versions()
    if made_with == now or run.record.stage is Stage.DONE:
        return
    if made_with is not None:
        run.store.update(run.key, stage=Stage.PLANNED, seconds={}, division=None)
        run.store.drop(run.key, *SCRATCH)
        run.emit(Restarted(run.key, f"begun by {made_with}"))
    run.record = run.store.update(run.key, made_with=now)


def _build(run: UnitRun) -> dict[str, Any]:
    if not run.plan.stored:
        run.sparse = run.multiplied(_whole(run))  # held from here on
        return {}
    with _undoing(run, Stage.PLANNED, "matrix"):
        matrix, chunk = run.matrix("matrix"), run.plan.chunk
        missing = matrix.missing()
    sparse = _sparse(run, chunk) if missing and run.plan.build != Build.COLUMNS else None
    for shard in missing:
        start, stop = matrix.columns(shard)
        block = _columns(run, start, stop, chunk) if sparse is None else sparse[:, start:stop]
        if not np.isfinite(block if sparse is None else block.data).all():
            raise StiffcoreError(f"{run.key}: columns {start} to {stop - 1} of the Jacobian are not finite")
        matrix.write(shard, block)
        run.step(Stage.BUILT, shard + 1, matrix.shards)
    if sparse is not None and run.solver is Solver.EXTREMES:
        run.sparse = run.multiplied(sparse)  # as it would be read
    return {}


def _columns(run: UnitRun, start: int, stop: int, chunk: int) -> np.ndarray:
    block = np.empty((run.reduction.k, stop - start), dtype=run.dtype, order="F")
    for at in range(start, stop, chunk):
        end = min(at + chunk, stop)
        block[:, at - start : end - start] = run.reduction.columns(at, end).cpu().numpy()
    return block


def _sparse(run: UnitRun, chunk: int) -> csc_array | None:
    """The whole matrix, sparse; None where it is not what the operator says."""
    build = run.plan.build
    note = f"on {run.device} its graph does not show what reaches where, as it did for the plan"
    if build in run.reduction.builds:
        try:
            return checked_sparse(run.reduction, chunk, run.step_seldom(Stage.BUILT), build)
        except ReachError as error:
            note = str(error)
    run.emit(FellBack(run.key, f"{note}: column by column"))
    return None


def _whole(run: UnitRun) -> csc_array:
    """The whole matrix in memory, without its zeros, where it does not go through the store."""
    chunk = run.plan.chunk
    matrix = _sparse(run, chunk)
    matrix = _by_columns(run.reduction, chunk) if matrix is None else matrix
    if not np.isfinite(matrix.data).all():
        raise StiffcoreError(f"{run.key}: the Jacobian is not finite")
    return matrix


def checked_sparse(
    reduction: Reduction,
    chunk: int,
    tell: Callable[[int, int], None] = lambda done, total: None,
    build: Build | None = None,
) -> csc_array:
    """The matrix as `Reduction.sparse` builds it, compared with its operator on random vectors.

    Raises:
        ReachError: where they differ, or the function is not local.
    """
    sparse = reduction.sparse(chunk, tell, build)
    check = reduction.check_sparse(sparse)
    if not check <= PROBE_TOLERANCE[reduction.jacobian.x.dtype]:
        raise ReachError(f"the sparse matrix is off by {check:.1e} on random vectors")
    return sparse


def sparse_matrix(reduction: Reduction, chunk: int) -> csc_array:
    """The whole matrix M without its zeros, in memory: sparse from the start where it can be, else column by column."""
    if reduction.builds[0] is not Build.COLUMNS:
        with suppress(ReachError):
            return checked_sparse(reduction, chunk)
    return _by_columns(reduction, chunk)


def _by_columns(reduction: Reduction, chunk: int) -> csc_array:
    """The whole matrix without its zeros, one chunk of columns after the other."""
    starts = range(0, reduction.k, chunk)
    return hstack(
        [csc_array(reduction.columns(at, min(at + chunk, reduction.k)).cpu().numpy()) for at in starts], "csc"
    )


@contextmanager
def _undoing(run: UnitRun, stage: Stage, *names: str) -> Iterator[None]:
    """Where what is read is damaged, drop it and go back to the stage before, so that it is made again."""
    try:
        yield
    except DamagedError:
        # where what it was made from was damaged, too, that went back further already
        now = run.store.record(run.key).stage
        gone = {"division": None} if DIVISION in names else {}
        run.store.update(run.key, stage=now if now.before(stage) else stage, **gone)
        run.store.drop(run.key, *names)
        raise


def _read_matrix(run: UnitRun) -> np.ndarray:
    with _undoing(run, Stage.PLANNED, "matrix"):
        return run.matrix("matrix").read()


def _reduce(run: UnitRun) -> dict[str, Any]:
    if _has_room_for_operator(run):
        run.release()
    else:
        run.drop("reduction")  # its tensors are not needed until the certificate
    run.store.drop(run.key, "hessenberg", "tau", "scale")  # of a session that was killed, maybe in part
    a = _read_matrix(run)
    moments = certificate.matrix_moments(a)
    growth = _growth(run, a, moments.frobenius)
    release_free_memory()  # of reading: LAPACK's work would come on top
    h = dense.to_hessenberg(a)
    target = run.matrix("hessenberg")
    for shard in range(target.shards):
        start, stop = target.columns(shard)
        target.write(shard, h.a[:, start:stop])
    where = f"units/{run.key}"
    run.store.put_array(where, "tau", h.tau, ("reflector",))
    run.store.put_array(where, "scale", h.scale, ("row",))
    return {"ilo": int(h.ilo), "ihi": int(h.ihi), "moments": moments, **growth}


def _divide(run: UnitRun) -> dict[str, Any]:
    """All eigenvalues, the matrix and what it is divided into in the store."""
    plan, k, first = run.plan, run.unit.k, -float(run.reduction.shift)
    run.drop("reduction")

    def arranged(space: StoredWorkspace) -> list[float]:
        a = space.matrix("whole", k, k)
        with _undoing(run, Stage.PLANNED, "matrix", DIVISION):
            panels.copy(run.matrix("matrix"), a)
        return [panels.trace(a), panels.square_trace(a), panels.norm(a)]

    with _division(run, Stage.BUILT) as space:
        moments = space.once("moments", lambda: arranged(space))
        whole = space.matrix("whole", k, k)
        growth = space.once("growth", lambda: _growth(run, _product_operator(whole), moments[2]))
        on_device: dict[str, Any] = {}
        if plan.device_bytes:
            on_device = {"device": run.device, "solve": partial(device.device_eigenvalues, device=run.device)}
        found = divide.eigenvalues(
            whole,
            space,
            plan.leaf,
            first=first,
            at_once=plan.at_once,
            tell=_teller(run, Stage.SOLVED),
            each=run.each,
            **on_device,
        )
    return _store_eigenvalues(run, found.values) | {"moments": Moments(*moments), "divided": _told_of(found)} | growth


def _product_operator(a: TiledMatrix) -> LinearOperator:
    """Products with a matrix in the store, which each reads all of it."""

    def product(x: np.ndarray) -> np.ndarray:
        return sum(a.read_shard(i) @ x[slice(*a.columns(i))] for i in range(a.shards))

    def transposed(x: np.ndarray) -> np.ndarray:
        return np.concatenate([a.read_shard(i).T @ x for i in range(a.shards)])

    return LinearOperator(a.shape, product, rmatvec=transposed, dtype=np.dtype(np.float64))


def _has_room_for_operator(run: UnitRun) -> bool:
    """Whether LAPACK's stages leave room for an operator that would take as long to open again as M to solve."""
    stages, itemsize = run.plan.stages or {}, run.dtype.itemsize
    operator = operator_bytes(run.unit.kernel_items, run.unit.column_items * itemsize, itemsize)
    room = max(stages["hessenberg"], stages["eigenvalues"]) + operator <= max(stages.values())
    return room and run.unit.k < SLOW_ORDER


def _growth(run: UnitRun, a: np.ndarray | LinearOperator, frobenius: float) -> dict[str, float]:
    """The logarithmic 2-norm of M, and bounds of its numerical range, from its sparse form where it has one."""
    matrix: csc_array | LinearOperator
    if run.plan.build != Build.COLUMNS:
        with _undoing(run, Stage.PLANNED, "matrix"):
            matrix = run.matrix("matrix").read_sparse()
    elif isinstance(a, LinearOperator):
        matrix = a
    else:

        def product(m: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
            return lambda x: (m @ x.astype(a.dtype)).astype(np.float64)

        matrix = LinearOperator(a.shape, product(a), rmatvec=product(a.T), dtype=np.dtype(np.float64))
    found = {"logarithmic_norm": logarithmic_norm(matrix)}
    if run.unit.k <= FULL_ORDER:
        return found
    split = run.unit.route == Route.WAIST and run.unit.function != BlockFunction.BRANCH  # only steps depend on it
    left, right = range_bounds(matrix, -1.0 if split else 0.0, frobenius)
    return found | {"range_left": left, "range_right": right}


def _hessenberg(run: UnitRun) -> dense.Hessenberg:
    where, ilo, ihi = f"units/{run.key}", run.record.ilo, run.record.ihi
    assert ilo is not None
    assert ihi is not None
    with _undoing(run, Stage.BUILT, "hessenberg", "tau", "scale"):
        found = dense.Hessenberg(
            a=run.matrix("hessenberg").read(),
            tau=run.store.get_array(where, "tau"),
            scale=run.store.get_array(where, "scale"),
            ilo=ilo,
            ihi=ihi,
        )
    release_free_memory()  # of reading: LAPACK's work would come on top
    return found


def _solve(run: UnitRun) -> dict[str, Any]:
    return _store_eigenvalues(run, dense.hessenberg_eigenvalues(_hessenberg(run)))


def _solve_on_device(run: UnitRun) -> dict[str, Any]:
    a = _read_matrix(run)
    moments = certificate.matrix_moments(a)
    growth = _growth(run, a, moments.frobenius)
    values = device.device_eigenvalues(a, run.device)
    return _store_eigenvalues(run, values) | {"moments": moments, **growth}


@contextmanager
def _device_memory() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch's own, and what CUDA's libraries say where they allocate themselves
        if not isinstance(error, torch.OutOfMemoryError) and not _LIBRARY_FULL.search(str(error)):
            raise
        raise DeviceFullError(f"the device is out of memory ({str(error).splitlines()[0]})") from error
    finally:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _keep(run: UnitRun) -> dict[str, Any]:
    return {}


def _solve_nothing(run: UnitRun) -> dict[str, Any]:
    empty = np.empty(0, dtype=np.result_type(run.dtype, np.complex64))
    return _store_eigenvalues(run, empty) | {"moments": Moments(0.0, 0.0, 0.0)}


def _store_eigenvalues(run: UnitRun, values: np.ndarray) -> dict[str, Any]:
    run.store.put_array(f"units/{run.key}", "reduced_eigenvalues", values, ("eigenvalue",))
    return {}


def _find_ends(run: UnitRun) -> dict[str, Any]:
    found = extremes(run.sparse, memory_bytes=run.plan.factor_bytes)
    run.enclosures = found.enclosures  # made again where the next stage is another session's
    where, moments = f"units/{run.key}", certificate.sparse_moments(run.sparse)
    for name, vectors in (("right", found.vectors.right), ("left", found.vectors.left)):
        run.store.put_array(where, f"{name}_vectors", vectors, ("row", "eigenvalue"))
    good = Converged(
        right_end=bool(found.converged_right),
        left_end=bool(found.converged_left),
        vectors=tuple(bool(v) for v in found.vectors.converged),
    )
    return _store_eigenvalues(run, found.values) | {"moments": moments, "how": found.note, "converged": good}


def _ends(run: UnitRun) -> tuple[np.ndarray, dense.Eigenvectors]:
    where, names = f"units/{run.key}", ("reduced_eigenvalues", "right_vectors", "left_vectors")
    before = Stage.PLANNED if run.plan.matrix_free else Stage.BUILT
    with _undoing(run, before, *names):
        values, right, left = (run.store.get_array(where, name) for name in names)
    assert run.record.converged is not None
    return values, dense.Eigenvectors(right, left, np.array(run.record.converged.vectors, bool))


def _count(run: UnitRun) -> dict[str, Any]:
    values, vectors = _ends(run)
    ends = ends_of(
        run.sparse,
        run.reduction.shift,
        (values, vectors.right),
        disc=run.unit.function == BlockFunction.BRANCH,
        memory_bytes=run.plan.factor_bytes,
        note=run.record.how or "",
        rounding=certificate.distance_of(run.reduction),
        enclosures=run.enclosures,
    )
    run.drop("sparse")
    return {"ends": ends}


def division_checks(record: UnitRecord) -> dict[str, Any]:
    """What a unit's division says of its eigenvalues, as `stiffcore.eigen.certificate.certify` takes it."""
    if record.plan.solver is not Solver.DIVIDE or not record.unit.k:
        return {}
    assert record.divided is not None
    return {"neglected": float(record.divided.error), "right": record.divided.right}


def _certify(run: UnitRun) -> dict[str, Any]:
    where, moments, ends = f"units/{run.key}", run.record.moments, None
    assert moments is not None
    if run.solver is Solver.EXTREMES and run.unit.k:
        values, vectors = _ends(run)
        good, ends = run.record.converged, run.record.ends
        assert good is not None
        assert ends is not None
        found = certificate.certify_ends(
            run.reduction, values, vectors, moments, ends, right_end=good.right_end, left_end=good.left_end
        )
    else:
        values, chosen, some = _solved(run)
        left, right = run.record.range_left, run.record.range_right
        between = None if left is None or right is None else (left, right)
        matrix = _located_matrix(run, between)
        found = certificate.certify(
            run.reduction,
            values,
            chosen,
            some,
            moments,
            matrix=matrix,
            real_parts=between,
            ends=None if matrix is not None else _whole_ends(run, values, chosen, some, between),
            **division_checks(run.record),
        )
    run.store.put_array(
        where,
        "eigenvalues",
        dense.sort_eigenvalues(values + values.dtype.type(run.reduction.shift)),
        ("eigenvalue",),
        long_name="computed eigenvalues of the Jacobian",
        order="ascending real part, then imaginary part",
        exact_ones=run.unit.ones,
        exact_zeros=run.unit.zeros,
    )
    return {"ends": ends, "certificate": found, "shift": run.reduction.shift, "found": len(values)} | {
        "distance": certificate.distance_of(run.reduction)
    }


def _located_matrix(run: UnitRun, real_parts: tuple[float, float] | None) -> np.ndarray | None:
    """M, where all of its eigenvalues are to be located: of a small order, or where nothing cheaper gives the signs."""
    k = run.unit.k
    if k > FULL_ORDER:
        needed = (run.plan.stages or {}).get("certify", 0) + locate_bytes(k, run.unit.kernel_items, run.dtype.itemsize)
        fits = k <= MOST_ORDER and needed <= run.plan.projected_bytes
        if not fits or certificate.side_of_axis(run.reduction, real_parts) is not None:
            return None
    return _read_matrix(run) if k else None


def _whole_ends(
    run: UnitRun,
    values: np.ndarray,
    chosen: np.ndarray,
    vectors: dense.Eigenvectors | None,
    real_parts: tuple[float, float] | None,
) -> Ends | None:
    """What is proved of the ends of a whole spectrum, where the plan has room for that beside the certificate."""
    if vectors is None or real_parts is None or "prove" not in (run.plan.stages or {}):
        return None
    matrix: csc_array | DenseMatrix
    if proves_sparse(run.unit):
        with _undoing(run, Stage.PLANNED, "matrix"):
            matrix = run.matrix("matrix").read_sparse().astype(np.float64)
    else:
        matrix = DenseMatrix(_read_matrix(run))
    found = ends_of(
        matrix,
        run.reduction.shift,
        (values[chosen].astype(np.complex128), vectors.right.astype(np.complex128)),
        disc=run.unit.function == BlockFunction.BRANCH,
        memory_bytes=run.plan.projected_bytes - prove_bytes(run.plan, run.dtype.itemsize),
        note="",
        rounding=certificate.distance_of(run.reduction),
        whole=Whole(values.real.astype(np.float64), real_parts, certificate.side_of_axis(run.reduction, real_parts)),
    )
    run.release()
    return found


def _solved(run: UnitRun) -> tuple[np.ndarray, np.ndarray, dense.Eigenvectors | None]:
    """All eigenvalues as stored, which of them to certify, and the eigenvectors of those."""
    on_device = run.solver is Solver.CUDA_DENSE
    with _undoing(run, Stage.REDUCED if run.solver is Solver.HOST_DENSE else Stage.BUILT, "reduced_eigenvalues"):
        values = run.store.get_array(f"units/{run.key}", "reduced_eigenvalues")
    chosen = certified_choice(values, run.reduction.shift)
    if not len(values):
        return values, chosen, None
    if run.solver is Solver.DIVIDE:
        run.drop("reduction")  # blocks of the matrix take all that there is
        return values, chosen, _divided_eigenvectors(run, values[chosen])
    if on_device:
        return values, chosen, device.device_eigenvectors(_read_matrix(run), values[chosen], run.device)
    return values, chosen, dense.hessenberg_eigenvectors(_hessenberg(run), values[chosen])


def _divided_eigenvectors(run: UnitRun, values: np.ndarray) -> dense.Eigenvectors:
    """Those of a few eigenvalues, by inverse iteration on the matrix in the store."""
    with _division(run, Stage.BUILT) as space:
        k, at_once = run.unit.k, run.plan.at_once
        whole = space.matrix("whole", k, k)
        return divide.eigenvectors(whole, space, values, at_once=at_once, tell=_teller(run, Stage.DONE), each=run.each)
