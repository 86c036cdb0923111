"""Bytes, flops and seconds of every unit before any work, in integers; picks the solver and the chunk.

Four quantities, always in bytes, for the host and for the device: *allowed* (what the user gave), *reserved* (what is
held before any unit: interpreters and libraries, or the CUDA context; measured), *projected* (what a unit will hold at
its fullest stage, on top of that; computed here) and *measured* (the peak that was seen).

The ladder, from the top: `cuda-dense`, `host-dense`, `divide`. Each rung says what it would take, and why it is passed
over. `extremes` answers less, and is taken only where it is asked for.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from stiffcore.eigen import dense
from stiffcore.eigen.deflation import CHEAP_WHOLE, WHOLE_BYTES
from stiffcore.eigen.inclusion import FULL_ORDER, MOST_ORDER, inclusion_bytes
from stiffcore.eigen.sparse import DENSE_PANEL, DENSE_SHARE, device_matrix_bytes, factor_bytes, inertia_bytes
from stiffcore.errors import InputError
from stiffcore.memory import default_allowed_bytes
from stiffcore.record import UnitPlan
from stiffcore.spectra import CERTIFIED_MOST
from stiffcore.store import file_rows
from stiffcore.study import FAILED, PROBES, BlockFunction, Build, Device, Keep, Kind, Solver, Study, Unit, format_bytes

# Working sets near the cache are faster than large ones: 16 columns of ResNet50's block 2 (2 MB each) take 21 s
# for the whole matrix, 64 take 38 s (2 cores, float64). Late layers have small columns and large weights, which every
# chunk reads again: there, many columns at once.
BUILD_TARGET_BYTES = 32 << 20
CHUNK_COLUMNS = 256
# Twice as many where the matrix is sparse: there, the number of files is what writing takes.
SHARD_COLUMNS = 64
SHARD_COLUMNS_LEAST = 8
SHARD_TARGET_BYTES = 32 << 20
# What BLAS and LAPACK touch besides the workspace they ask for, and what malloc keeps: 2 to 5 MiB at k = 2,000, 14 at
# k = 3,700.
BLAS_BYTES = 16 << 20
# Copies of a kernel that forward and reverse products make, and pages that torch and MKL touch when a block is first
# linearised: 37 MiB at ResNet18's layer4.1 (kernel 18 MiB), and 18 MiB the first time.
KERNEL_COPIES = 3
LIBRARY_BYTES = 24 << 20
# Of an entry of the sparse matrices that singular values come from, while these are solved for: 12 in each, and what
# the allocator keeps (63 measured, block layer4.1 of ResNet50 in float64).
SINGULAR_ENTRY_BYTES = 4 * 16
# What is reserved differs by 5 MiB in a dozen starts, but a budget that is named must be enough.
RESERVED_VARIES_BYTES = 16 << 20
TILE_ROWS = 256
ZARR_BYTES = 512 << 10
METADATA_BYTES = 4 << 10
# Share of one thread's product rate that gehrd and hseqr reach together: 27 of 38 GF/s at k = 7,386, two units side by
# side on two cores; less for small k.
DENSE_EFFICIENCY = 0.6
# Of `eigen.extremes`: matrix products of all runs together, as seen on blocks of ResNets (600 to 2,500); vectors of
# length k that are held at most, 300 by ARPACK and others by what its runs returned; and eigenvalues that are kept at
# most, all with their vectors.
ARNOLDI_PRODUCTS = 2000
KRYLOV_VECTORS = 480
FOUND_MOST = 8
# A flop of a sparse product, in those of a dense one, where all cores take such products: they wait for memory.
PRODUCT_COST = 25
WHOLE_SPECTRUM = "the whole spectrum takes no longer than its ends"
# Of an accumulated matrix, beside its flops: to find an entry, and to put it in its place.
ENTRY_SECONDS = 1e-7
# All eigenvalues of a dense matrix on a device, of each k and each k^2: within 25 % of what an H200 took at k = 1,024
# to 8,192 (`bench/rates.py`), where it does not come near the rate of its products.
DEVICE_SECONDS = (1.1e-4, 6.2e-8)
# Of tensor slices: numba, what it takes to compile its code for them (194 MiB, 115 where that is on disk), and a batch
# of squares with what is made of it; and the time that an eigenvalue takes.
SQUARES_BYTES = 256 << 20
SQUARE_SECONDS = 2e-7
# Of `eigen.divide`: columns of a panel, wide ones where a block holds several; rows of its tiles; how often one that
# passes through a block is in memory beside it (one at work, and 4 times on its way to or from Zarr, or while LAPACK
# factors it); Newton's steps, and flops of all, in k^3.
DIVIDE_PANELS = (256, 128)
DIVIDE_PANEL_LEAST = 64
DIVIDE_PANELS_AT_ONCE = 4
DIVIDE_TILE_ROWS = 1024
DIVIDE_PASSING = 6
DIVIDE_STEPS = 16
DIVIDE_FLOPS = 80


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Attributes:
        units: cheap first.
        allowed_bytes: the budget for all processes together; for each worker, where they are `separate`.
        reserved_bytes: held before any unit, by the parent and the first worker; by a worker, where `separate`.
        worker_bytes: held by each further worker.
        device_allowed_bytes: the budget of each CUDA device; 0 where none is used.
        device_reserved_bytes: held on it before any unit.
        workers: how many units may run side by side.
        gpus: how many of them on a CUDA device each.
        separate: whether the workers are those of a cluster that is not ours, so that they share no budget.
        threads: of each unit's arithmetic.
        disk_bytes: most bytes that the run adds to the store.
    """

    units: tuple[UnitPlan, ...]
    allowed_bytes: int
    reserved_bytes: int
    worker_bytes: int
    device_allowed_bytes: int
    device_reserved_bytes: int
    workers: int
    gpus: int
    separate: bool
    threads: int
    disk_bytes: int

    @property
    def data_bytes(self) -> int:
        """What all units that run side by side may hold together; each of them, where the workers are separate."""
        shared = 0 if self.separate else (self.workers - 1) * self.worker_bytes
        return self.allowed_bytes - self.reserved_bytes - shared

    def holds(self, unit: UnitPlan, running: Iterable[UnitPlan]) -> bool:
        """Whether a unit may begin beside those that run."""
        beside = list(running)
        if len(beside) >= self.workers or (beside and any(p.spread > 1 for p in (unit, *beside))):
            return False
        if unit.device_bytes and sum(p.device_bytes > 0 for p in beside) >= self.gpus:
            return False
        held = 0 if self.separate else sum(p.projected_bytes for p in beside)
        return held + unit.projected_bytes <= self.data_bytes

    @property
    def seconds(self) -> float:
        """Estimate for the whole run: the work spread evenly, but never less than the longest unit."""
        each = [u.seconds for u in self.units]
        return max(sum(each) / self.workers, max(each, default=0.0))

    @property
    def refused(self) -> list[UnitPlan]:
        """The units that the budget does not hold."""
        return [u for u in self.units if u.refused]


@dataclass(frozen=True)
class Machine:
    """What a plan may count on.

    Attributes:
        cores: for arithmetic; of one worker, where they are `separate`.
        reserved_bytes: held by the parent and the first worker before any unit; by a worker, where `separate`.
        worker_bytes: held by each further worker.
        device_bytes: free on the CUDA device; None where it is not used.
        flops_per_s: rate of a float64 matrix product on one thread.
        device_reserved_bytes: held on the device already.
        gpus: CUDA devices, of one worker each.
        free_bytes: what may be used where no budget is given; None: see `default_allowed_bytes`.
        separate: how many workers there are, of a cluster that is not ours; None: as many as fit, on this machine.
        most_threads: of a unit, where the environment names a number (OMP_NUM_THREADS).
        spread: workers that may share a unit.
    """

    cores: int
    reserved_bytes: int
    worker_bytes: int
    device_bytes: int | None
    flops_per_s: float
    device_reserved_bytes: int = 0
    gpus: int = 1
    free_bytes: int | None = None
    separate: int | None = None
    most_threads: int | None = None
    spread: int = 1


def make_plan(
    units: Iterable[Unit],
    study: Study,
    machine: Machine,
    *,
    workers: int | None = None,
    recorded: Mapping[str, UnitPlan] | None = None,
    inputs_bytes: int = 0,
) -> Plan:
    """Plan all units: each one's solver, chunk and bytes, and how many run side by side.

    A unit starts when `Plan.holds` says that it fits beside those that run.

    Args:
        units: the facts.
        study: for the budgets, the dtype, the rung asked for and what is kept.
        machine: what there is.
        workers: at most so many; None: one a core. Never more than there are units, nor than memory allows. A unit
            that is divided is shared by all that are asked for, or that a cluster has: on one machine, one worker with
            all threads holds wider blocks.
        recorded: by key, earlier plans, which stay where they fit: a chunk's width can decide a result's last bits.
        inputs_bytes: of the images that are to be stored.
    """
    units = list(units)
    allowed = study.memory or machine.free_bytes or default_allowed_bytes()
    device = machine.device_bytes
    if device is not None and study.device_memory is not None:
        device = min(device, max(0, study.device_memory - machine.device_reserved_bytes))
    machine = replace(machine, device_bytes=device)
    single = allowed - machine.reserved_bytes
    most = workers or machine.separate or 1
    while True:
        machine = replace(machine, spread=min(most, machine.separate or most))
        plans = [_plan_unit(u, study, machine, single, (recorded or {}).get(u.key)) for u in units]
        plans.sort(key=lambda p: (p.works, p.seconds))
        busy = [p for p in plans if p.works]
        count = _workers(busy, machine, single, workers or machine.cores)
        if machine.separate or machine.spread <= count:
            break
        most = count  # the memory of so many workers is another unit's
    if machine.separate is None:
        threads = max(1, min(machine.cores // count, machine.most_threads or machine.cores))
    else:
        count, threads = max(1, min(machine.separate, workers or machine.separate)), max(1, machine.cores)
    return Plan(
        units=tuple(plans),
        allowed_bytes=allowed,
        reserved_bytes=machine.reserved_bytes,
        worker_bytes=machine.worker_bytes,
        device_allowed_bytes=0 if device is None else device + machine.device_reserved_bytes,
        device_reserved_bytes=machine.device_reserved_bytes,
        workers=count,
        gpus=machine.gpus if device is not None else 0,
        separate=machine.separate is not None,
        threads=threads,
        disk_bytes=inputs_bytes + _grown_bytes(plans, count, {}),
    )


def plan_below(plan: UnitPlan, study: Study, machine: Machine, data_bytes: int, why: str) -> UnitPlan:
    """A unit's plan once more, where its rung failed: the rungs below it, with the matrix as it is stored.

    Args:
        plan: what failed.
        study: as for `make_plan`.
        machine: as for `make_plan`.
        data_bytes: what a unit may hold.
        why: it failed.
    """
    if plan.solver is Solver.EXTREMES or (plan.solver is Solver.DIVIDE and plan.device_bytes):
        below: Sequence[Solver] = (plan.solver,)  # the same, without the device
        machine = replace(machine, device_bytes=None)
    else:
        below = LADDER[LADDER.index(plan.solver) + 1 :] if study.solver is None else ()
    found = _first_that_fits(plan.unit, study, machine, data_bytes, below, (plan.chunk, plan.shard))
    return replace(found, why="; ".join(filter(None, [f"{plan.solver}: {why}", found.why])))


def _workers(busy: Sequence[UnitPlan], machine: Machine, single: int, most: int) -> int:
    """As many as asked for, unless that would leave the largest unit no room."""
    largest = max((p.projected_bytes for p in busy), default=0)
    count = max(1, min(most, max(len(busy), *(p.spread for p in busy), 1)))
    while count > 1 and single - (count - 1) * machine.worker_bytes < largest:
        count -= 1
    return count


# What the planner tries, in this order, where no rung is asked for.
LADDER = (Solver.CUDA_DENSE, Solver.HOST_DENSE, Solver.DIVIDE)


def _plan_unit(
    unit: Unit, study: Study, machine: Machine, data_bytes: int, recorded: UnitPlan | None = None
) -> UnitPlan:
    if unit.route in ("none", FAILED):
        return UnitPlan(unit, Solver.NONE, unit.reason)
    asked: tuple[Solver, ...] = LADDER if study.solver is None else (study.solver,)
    if unit.kind is Kind.TENSOR_SLICES:
        asked = (Solver.SLICES,)
    if unit.kind is Kind.MATRIX and unit.components:
        asked = (Solver.COMPONENTS,)
    if unit.kind is Kind.SINGULAR:
        able: tuple[Solver, ...] = (
            *([] if unit.route == "factors" else [Solver.SVD]),
            Solver.SYMMETRIC,
            Solver.DIVIDE,
        )
        asked = (study.solver,) if study.solver in able else able
    if recorded is None or recorded.solver is Solver.NONE:
        return _first_that_fits(unit, study, machine, data_bytes, asked)
    device_gone = recorded.device_bytes and (machine.device_bytes is None or study.device is Device.CPU)
    stored = None if recorded.matrix_free else (recorded.chunk, recorded.shard)
    # what was asked for as `extremes` may be the whole spectrum
    as_asked = recorded.solver in asked or (Solver.EXTREMES in asked and recorded.why == WHOLE_SPECTRUM)
    if not as_asked or device_gone:
        return _first_that_fits(unit, study, machine, data_bytes, asked, stored)
    keeps = recorded.stored or study.keep is not Keep.ALL
    if recorded.projected_bytes <= data_bytes and not recorded.matrix_free and keeps:
        return recorded
    if Solver.EXTREMES in asked:  # with less room for factors
        return _first_that_fits(unit, study, machine, data_bytes, asked, stored)
    why = _too_small(recorded.solver, unit, recorded.stages or {}, machine, data_bytes)
    return replace(recorded, solver=Solver.NONE, refused=True, why=why)


def _first_that_fits(
    unit: Unit,
    study: Study,
    machine: Machine,
    data_bytes: int,
    rungs: Sequence[Solver],
    stored: tuple[int, int] | None = None,
) -> UnitPlan:
    """The first rung that fits, with what passed over those above it; else the last one, refused.

    Args:
        unit: the facts.
        study: as for `make_plan`.
        machine: as for `make_plan`.
        data_bytes: what a unit may hold.
        rungs: to try.
        stored: chunk and shard of a matrix that is begun already.
    """
    passed: list[str] = []
    found = UnitPlan(unit, Solver.NONE, "no rung is left", refused=True)
    for rung in rungs:
        found, why_not = RUNGS[rung](unit, study, machine, data_bytes, stored)
        if not why_not:
            return replace(found, why="; ".join([*passed, found.why]))
        passed.append(why_not)
    return replace(found, solver=Solver.NONE, refused=True, why="; ".join(passed) or found.why, seconds=0.0)


def _cuda_dense(
    unit: Unit, study: Study, machine: Machine, data_bytes: int, stored: tuple[int, int] | None
) -> tuple[UnitPlan, str]:
    """Eigenvalues and eigenvectors by torch on the device (`eigen.device`); host memory to read the matrix.

    device: dense.device_bytes + the build's chunk and kernels.
    moved: the matrix written, and read twice; and copied to the device twice.
    """
    base, matrix, vectors, why_not = _rung(Solver.CUDA_DENSE, unit, study, machine, data_bytes, _device_stages, stored)
    needed = dense.device_bytes(unit.k, np.dtype(study.dtype).itemsize) + (base.stages or {})["build"]
    plan = replace(
        base,
        why="fits the device",
        stages=_with_proof(base, np.dtype(study.dtype).itemsize, data_bytes),
        device_bytes=needed,
        disk_bytes=matrix + vectors,
        kept_bytes=vectors + _kept(study, matrix),
        moved_bytes=5 * matrix + 2 * vectors,
    )
    if machine.device_bytes is None:
        return plan, "cuda-dense: no CUDA device is used"
    if unit.k > dense.CUSOLVER_MAX_ORDER:
        return plan, f"cuda-dense: k = {unit.k:,} is over cuSOLVER's {dense.CUSOLVER_MAX_ORDER:,}"
    if needed > machine.device_bytes:
        return plan, (
            f"cuda-dense: needs {format_bytes(needed)} of the device, {format_bytes(machine.device_bytes)} may be used"
        )
    return plan, why_not


def _host_dense(
    unit: Unit, study: Study, machine: Machine, data_bytes: int, stored: tuple[int, int] | None
) -> tuple[UnitPlan, str]:
    """LAPACK in two stages (`eigen.dense`), the matrix and its Hessenberg form in the store.

    moved: the matrix written and read once, the Hessenberg form written once and read twice.
    """
    base, matrix, vectors, why_not = _rung(Solver.HOST_DENSE, unit, study, machine, data_bytes, _host_stages, stored)
    plan = replace(
        base,
        why="fits the host budget",
        stages=_with_proof(base, np.dtype(study.dtype).itemsize, data_bytes),
        disk_bytes=2 * (matrix + vectors),
        kept_bytes=vectors + _kept(study, 2 * matrix + vectors),
        moved_bytes=5 * matrix + 6 * vectors,
    )
    if unit.k > dense.LAPACK_MAX_ORDER:
        return plan, f"host-dense: k = {unit.k:,} is over 32-bit LAPACK's {dense.LAPACK_MAX_ORDER:,}"
    return plan, why_not


def divide_sizes(k: int, data_bytes: int, device_bytes: int | None = None) -> tuple[int, int, int]:
    """Columns of a panel, panels of a block, and the order of a part that is solved in memory, for a division.

    Args:
        k: order of the matrix.
        data_bytes: that the host may hold.
        device_bytes: that a device may hold, where blocks are worked on there; the host then holds panels, and a part.
    """
    room = max(0, data_bytes - BLAS_BYTES)
    columns = room // (8 * k)
    if device_bytes is None:
        able = (w for w in DIVIDE_PANELS if columns >= (DIVIDE_PASSING + DIVIDE_PANELS_AT_ONCE) * w)
        width = min(next(able, DIVIDE_PANEL_LEAST), k)
        at_once, most = columns // width - DIVIDE_PASSING, dense.LAPACK_MAX_ORDER
    else:
        able = (w for w in DIVIDE_PANELS if columns >= (DIVIDE_PASSING + 2) * w)
        width = min(next(able, DIVIDE_PANEL_LEAST), k)
        at_once = (device_bytes // (8 * width * k) - DIVIDE_PASSING) // 2
        most = min(dense.CUSOLVER_MAX_ORDER, math.isqrt(max(0, device_bytes - dense.device_bytes(0, 8)) // 40) - 64)
    leaf = math.isqrt(max(0, room - (1 << 20) - 16 * width * k) // 8) - 64  # see `dense.to_hessenberg_bytes`
    return width, max(1, min(at_once, -(-k // width))), max(width, min(k, leaf, most))


def divide_held_bytes(k: int, width: int, at_once: int) -> int:
    """What the kernels of a division hold (`eigen.panels`).

    A block, or two of half as many panels; and a panel six times: 8 * width * k * (max(at_once, 2) + 6).
    """
    return 8 * width * k * (max(at_once, 2) + DIVIDE_PASSING)


def divide_device_bytes(k: int, width: int, at_once: int, leaf: int) -> int:
    """What a division holds on a device: a block, twice while it is factored, and panels; or a part that is solved.

    8 * width * k * (2 * at_once + 6), or `dense.device_bytes`.
    """
    return max(8 * width * k * (2 * at_once + DIVIDE_PASSING), dense.device_bytes(leaf, 8))


def divide_moved_bytes(k: int, columns: int) -> int:
    """Bytes read and written by a division in blocks of so many columns.

    `DIVIDE_STEPS` steps, each with LU (blocks / 3 times the matrix read), an inverse (blocks times) and five matrices
    more; twice the blocks to part it; and a third of all that for the parts.
    """
    blocks, matrix = -(-k // columns), 8 * k * k
    step = matrix * (blocks / 3 + blocks + 5)
    return int(4 / 3 * (DIVIDE_STEPS * step + 2 * blocks * matrix))


def _divide(
    unit: Unit, study: Study, machine: Machine, data_bytes: int, stored: tuple[int, int] | None
) -> tuple[UnitPlan, str]:
    """Spectral divide and conquer in the store (`eigen.divide`), with blocks as wide as fit.

    They are worked on on the device, where there is one that holds a block. Where workers share the unit, each holds a
    block, of the budget's share that is left beside all of them.
    disk: the matrix, and while it is divided six of its order in float64.
    """
    if unit.kind is Kind.SINGULAR:
        return _divide_singular(unit, study, machine, data_bytes)
    k, device_bytes = max(unit.k, 1), machine.device_bytes
    spread = machine.spread if device_bytes is None else max(1, min(machine.spread, machine.gpus))
    here = 1 if machine.separate else spread  # blocks in one budget
    room = data_bytes - (here - 1) * machine.worker_bytes
    width, at_once, _ = divide_sizes(k, room // here, device_bytes)
    leaf = divide_sizes(k, room, device_bytes)[2]
    held = at_once if device_bytes is None else 1
    base, matrix, vectors, why_not = _rung(
        Solver.DIVIDE, unit, study, machine, room, partial(_divide_stages, width, held, leaf, here), stored
    )
    if why_not and here > 1:
        return _divide(unit, study, replace(machine, spread=here - 1), data_bytes, stored)
    on_device = 0
    if device_bytes is not None:
        stages = base.stages or {}
        on_device = max(divide_device_bytes(k, width, at_once, leaf), stages["build"], stages["certify"])
        if on_device > device_bytes:
            return _divide(unit, study, replace(machine, device_bytes=None), data_bytes, stored)
    among = (", on the device" if on_device else "") + (f", shared by {spread} workers" if spread > 1 else "")
    plan = replace(
        base,
        why=f"blocks of {width * at_once:,} columns, parts of {leaf:,} in memory{among}",
        stages=_with_proof(base, np.dtype(study.dtype).itemsize, room),
        device_bytes=on_device,
        panel=width,
        at_once=at_once,
        leaf=leaf,
        spread=spread,
        seconds=base.seconds - (1 - 1 / spread) * _seconds(base.flops, machine),
        disk_bytes=matrix + vectors + 6 * 8 * k * k,
        kept_bytes=vectors + _kept(study, matrix),
        moved_bytes=divide_moved_bytes(k, width * at_once),
    )
    return plan, why_not


def _factor_levels(nonzeros: int, fill: int) -> tuple[tuple[int, str], ...]:
    """Bytes that sparse factorisations take, and what they are for: from what proves most to none."""
    return (
        (inertia_bytes(fill, nonzeros), "ends by Arnoldi, counts by powers, inertia or discs"),
        (factor_bytes(fill, nonzeros, 16), "ends by Arnoldi, counts by powers or discs; no room for inertia"),
        (factor_bytes(fill, nonzeros, 8), "ends by Arnoldi, counts by powers or refined discs; no room for inertia"),
        (0, "ends by Arnoldi, counts by powers alone: no room for a sparse LU"),
    )


def _extremes(
    unit: Unit, study: Study, machine: Machine, data_bytes: int, stored: tuple[int, int] | None
) -> tuple[UnitPlan, str]:
    """Ends and counts on the sparse matrix (`eigen.extremes`, `eigen.counting`), with as much room for factors as fits.

    Where the whole spectrum takes no longer, that. Where not even the matrix fits, products alone. Products are taken
    on the device, where the matrix fits there.
    A matrix that is accumulated is not stored, unless it is to be kept: to write it takes longer than to build it.
    moved: the matrix, where it is stored, written and read once, and the vectors; and copied to the device twice.
    """
    itemsize = np.dtype(study.dtype).itemsize
    nonzeros, fill = _sparsity(unit)
    vectors = 2 * FOUND_MOST * 16 * unit.k
    whole_spectrum, too_much = _host_dense(unit, study, machine, data_bytes, stored)
    for needed, why in _factor_levels(nonzeros, fill):
        base, whole, _, why_not = _rung(
            Solver.EXTREMES, unit, study, machine, data_bytes, partial(_extremes_stages, needed), stored
        )
        if not why_not:
            matrix = min(whole, (fill + unit.k * (base.shard + 2 * TILE_ROWS)) * itemsize + METADATA_BYTES)
            if not too_much and whole_spectrum.seconds <= base.seconds:
                return replace(whole_spectrum, why=WHOLE_SPECTRUM), ""
            on_device = device_matrix_bytes(nonzeros, unit.k) + (base.stages or {})["build"]
            if machine.device_bytes is None or on_device > machine.device_bytes:
                on_device = 0
            through_store = base.build is not Build.ACCUMULATED or study.keep is Keep.ALL
            matrix = matrix if through_store else 0
            plan = replace(
                base,
                stored=through_store,
                why=why + ("; products on the device" if on_device else ""),
                factor_bytes=needed,
                device_bytes=on_device,
                disk_bytes=matrix + vectors,
                kept_bytes=vectors + _kept(study, matrix),
                moved_bytes=2 * matrix + 2 * vectors + (24 * nonzeros if on_device else 0),
            )
            return plan, ""
    if itemsize < 8:
        return base, why_not  # products in single precision are too coarse for proofs and vectors
    column_bytes = unit.column_items * itemsize
    stages = {
        "open": _open_bytes(unit, column_bytes, itemsize),
        "solve": _krylov_bytes(unit.k) + operator_bytes(unit.kernel_items, column_bytes, itemsize),
    }
    plan = replace(
        base,
        why="ends and counts from products alone: no room for the matrix",
        matrix_free=True,
        stored=False,
        build=Build.COLUMNS,
        stages=stages,
        seconds=unit.column_s * ARNOLDI_PRODUCTS,
        disk_bytes=vectors,
        kept_bytes=vectors,
        moved_bytes=2 * vectors,
    )
    return plan, "" if max(stages.values()) <= data_bytes else why_not


def _matrix_only(
    unit: Unit, study: Study, machine: Machine, data_bytes: int, stored: tuple[int, int] | None
) -> tuple[UnitPlan, str]:
    """Build the matrix and keep it, whatever `keep` says. moved: the matrix, once."""
    base, matrix, _, why_not = _rung(Solver.MATRIX_ONLY, unit, study, machine, data_bytes, _no_stages, stored)
    return replace(base, why="as asked", disk_bytes=matrix, kept_bytes=matrix, moved_bytes=matrix), why_not


def _slices(
    unit: Unit, study: Study, machine: Machine, data_bytes: int, stored: tuple[int, int] | None
) -> tuple[UnitPlan, str]:
    """Squares as they come, and their eigenvalues (`eigen.windows`).

    solve: blocks or a chunk of products, one position's squares twice, a batch with its eigenvalues, and the kernel's
        copies; where spectra are kept, all eigenvalues four times (parts, whole, sorted, written):
        (accumulated_items + 2 * nonzeros) * itemsize, or 2 * chunk * column_bytes; + 256 MiB
        + 3 * kernel_items * itemsize + 8 * column_bytes + 4 * 2 * itemsize * k.
    moved: what is kept, once.
    """
    itemsize = np.dtype(study.dtype).itemsize
    column_bytes = unit.column_items * itemsize
    kept = 0 if study.keep is Keep.METRICS else 2 * itemsize * unit.k + METADATA_BYTES
    chunk = _products_at_once(column_bytes)
    blocks = (unit.accumulated_items + 2 * unit.nonzeros) * itemsize or 2 * chunk * column_bytes
    stages = {
        "open": _open_bytes(unit, column_bytes, itemsize),
        "solve": blocks + SQUARES_BYTES + operator_bytes(unit.kernel_items, 4 * column_bytes, itemsize) + 4 * kept,
    }
    build = Build.ACCUMULATED if unit.accumulated_items else Build.COLUMNS
    products = 0.0 if unit.accumulated_items else unit.column_s * unit.m
    plan = UnitPlan(
        unit,
        Solver.SLICES,
        "squares fit the host budget" if unit.accumulated_items else "rows fit the host budget",
        chunk=chunk,
        build=build,
        stages=stages,
        flops=unit.accumulated_flops,
        seconds=products + _seconds(unit.accumulated_flops, machine) + SQUARE_SECONDS * unit.k,
        disk_bytes=kept,
        kept_bytes=kept,
        moved_bytes=kept,
    )
    if max(stages.values()) <= data_bytes:
        return plan, ""
    why = _too_small(Solver.SLICES, unit, stages, machine, data_bytes)
    return plan, why + ("; --keep metrics needs less" if kept else "")


def _products_at_once(column_bytes: int) -> int:
    """Where nothing is built column by column into the store, so that only the cache counts."""
    return max(1, min(BUILD_TARGET_BYTES // max(1, column_bytes), CHUNK_COLUMNS))


def _components(
    unit: Unit, study: Study, machine: Machine, data_bytes: int, stored: tuple[int, int] | None
) -> tuple[UnitPlan, str]:
    """The diagonal blocks of a block triangular Jacobian, one after the other (`eigen.union`).

    open: as of any unit, and what the search for components takes: products of the whole function.
    solve: a block's matrix thrice, and twice in float64; of a chunk of columns, LAPACK's eigenvectors and the
        certificate the largest.
    moved: what is kept, twice.
    """
    itemsize = np.dtype(study.dtype).itemsize
    column_bytes, held = unit.column_items * itemsize, unit.held_items * itemsize
    block = unit.model_copy(update={"k": unit.width, "n": unit.width, "m": unit.width})
    chunk = min(_products_at_once(column_bytes), unit.width)
    operator = operator_bytes(unit.kernel_items, column_bytes, itemsize)
    vectors = dense.hessenberg_eigenvectors_bytes(unit.width, CERTIFIED_MOST, itemsize)
    locate = locate_bytes(unit.width, unit.kernel_items, itemsize) if unit.width <= MOST_ORDER else 0
    kept = 2 * (2 * itemsize * unit.n + METADATA_BYTES)
    stages = {
        "open": _open_bytes(unit, column_bytes, itemsize) + 2 * held,
        "solve": held
        + (3 * itemsize + 16) * unit.width**2
        + max(
            chunk * column_bytes,
            vectors + BLAS_BYTES,
            _certify_bytes(CERTIFIED_MOST, block, column_bytes, itemsize) + locate,
        )
        + operator
        + 4 * kept,
    }
    flops = unit.components * (dense.to_hessenberg_flops(unit.width) + dense.hessenberg_eigenvalues_flops(unit.width))
    plan = UnitPlan(
        unit,
        Solver.COMPONENTS,
        f"{unit.components:,} components of order {unit.width:,} at most",
        chunk=chunk,
        stages=stages,
        flops=flops,
        seconds=unit.column_s * unit.n + 2 * _seconds(flops, machine),
        disk_bytes=2 * kept,
        kept_bytes=kept,
        moved_bytes=2 * kept,
    )
    if unit.width > dense.LAPACK_MAX_ORDER:
        return plan, f"components: order {unit.width:,} is over LAPACK's {dense.LAPACK_MAX_ORDER:,}"
    if max(stages.values()) <= data_bytes:
        return plan, ""
    return plan, _too_small(Solver.COMPONENTS, unit, stages, machine, data_bytes)


def _svd(
    unit: Unit, study: Study, machine: Machine, data_bytes: int, stored: tuple[int, int] | None
) -> tuple[UnitPlan, str]:
    """gesdd, values only (`eigen.singular`): J, sparse, and one dense copy. 8/3 k^2 (3 width - k) / 2 flops."""
    k, width = unit.k, unit.width
    dense_bytes = 8 * k * width + 8 * 80 * (k + width)
    return _singular(Solver.SVD, unit, study, machine, data_bytes, dense_bytes, 4 * k * k * (3 * width - k) // 3)


def _symmetric(
    unit: Unit, study: Study, machine: Machine, data_bytes: int, stored: tuple[int, int] | None
) -> tuple[UnitPlan, str]:
    """Eigenvalues of a symmetric matrix: of the Gram matrix, twice; or three matrices of the order of the factors."""
    k = unit.k
    if unit.route == "factors":
        return _singular(Solver.SYMMETRIC, unit, study, machine, data_bytes, 4 * 8 * k * k, 7 * k**3)
    flops = 4 * k**3 // 3 + k * k * unit.width
    return _singular(Solver.SYMMETRIC, unit, study, machine, data_bytes, 3 * 8 * k * k, flops)


def _divide_singular(unit: Unit, study: Study, machine: Machine, data_bytes: int) -> tuple[UnitPlan, str]:
    """The matrix that `_symmetric` solves, made and divided in the store; the sparse matrices stay in memory.

    solve: `divide_held_bytes`, or a part with its symmetric copies.
    flops: of the division, and of a Cholesky factorisation and a product before it.
    disk: the matrix, and while it is divided six of its order.
    """
    k, itemsize = max(unit.k, 1), np.dtype(study.dtype).itemsize
    operator = operator_bytes(unit.kernel_items, unit.column_items * itemsize, itemsize)
    width, at_once, leaf = divide_sizes(k, data_bytes - SINGULAR_ENTRY_BYTES * unit.nonzeros - operator)
    leaf = max(width, 4 * leaf // 7)  # three matrices of it, not one
    held = max(divide_held_bytes(k, width, at_once), 3 * 8 * leaf**2 + 16 * width * leaf)
    flops = (DIVIDE_FLOPS + 3) * k**3
    plan, why_not = _singular(Solver.DIVIDE, unit, study, machine, data_bytes, held, flops)
    plan = replace(
        plan,
        why=f"blocks of {width * at_once:,} columns, parts of {leaf:,} in memory",
        panel=width,
        at_once=at_once,
        leaf=leaf,
        disk_bytes=plan.disk_bytes + 7 * 8 * k * k,
        moved_bytes=divide_moved_bytes(k, width * at_once),
    )
    return plan, why_not


def _singular(
    solver: Solver, unit: Unit, study: Study, machine: Machine, data_bytes: int, dense_bytes: int, flops: int
) -> tuple[UnitPlan, str]:
    """What all ways to singular values share.

    build: blocks or a chunk of products, and the sparse matrices twice:
        accumulated_items * itemsize + 2 * nonzeros * (itemsize + 8), or chunk * column_bytes + 2 * nonzeros * ...
    solve: the sparse matrices in float64, as they are, scaled, turned, and products of them; and what is dense.
    """
    itemsize = np.dtype(study.dtype).itemsize
    column_bytes = unit.column_items * itemsize
    chunk = _products_at_once(column_bytes)
    operator = operator_bytes(unit.kernel_items, column_bytes, itemsize)
    blocks = unit.accumulated_items * itemsize or chunk * column_bytes
    stages = {
        "open": _open_bytes(unit, column_bytes, itemsize),
        "build": blocks + 2 * unit.nonzeros * (itemsize + 8) + operator + 6 * column_bytes,
        "solve": SINGULAR_ENTRY_BYTES * unit.nonzeros + dense_bytes + BLAS_BYTES + operator,
        "certify": 8 * 40 * min(unit.m, unit.n) + operator + 2 * column_bytes,
    }
    kept = 8 * unit.k + METADATA_BYTES
    build = Build.ACCUMULATED if unit.accumulated_items else Build.COLUMNS
    plan = UnitPlan(
        unit,
        solver,
        "a dense copy fits the host budget" if solver is Solver.SVD else "the squares fit the host budget",
        chunk=chunk,
        build=build,
        stages=stages,
        flops=flops,
        seconds=_build_seconds(unit, build, machine) + _seconds(flops, machine),
        disk_bytes=kept,
        kept_bytes=kept,
        moved_bytes=kept,
    )
    largest = max(unit.k, unit.width) if solver is Solver.SVD else unit.k
    if solver is not Solver.DIVIDE and largest > dense.LAPACK_MAX_ORDER:
        return plan, f"{solver}: order {largest:,} is over LAPACK's {dense.LAPACK_MAX_ORDER:,}"
    why = _too_small(solver, unit, stages, machine, data_bytes)
    return plan, "" if max(stages.values()) <= data_bytes else why


def _rung(
    solver: Solver,
    unit: Unit,
    study: Study,
    machine: Machine,
    data_bytes: int,
    solving: "Stages",
    stored: tuple[int, int] | None,
) -> tuple[UnitPlan, int, int, str]:
    """What all rungs share: sizes that fit, and the costs of building and solving.

    Returns:
        The plan, yet without its disk; bytes of the matrix and of two vectors in the store; and what the host's budget
        lacks, empty where it is enough.
    """
    itemsize = np.dtype(study.dtype).itemsize
    found = _fitting(unit, itemsize, data_bytes, solving, stored)
    flops = FLOPS[solver](unit)
    on_device = DEVICE_SECONDS[0] * unit.k + DEVICE_SECONDS[1] * unit.k**2
    solve_seconds = on_device if solver is Solver.CUDA_DENSE else _seconds(flops, machine)
    plan = UnitPlan(
        unit,
        solver,
        "",
        chunk=found.chunk,
        shard=found.shard,
        build=found.build,
        stages=found.stages,
        flops=flops,
        seconds=_build_seconds(unit, found.build, machine) + solve_seconds,
    )
    why_not = "" if found.fits else _too_small(solver, unit, found.stages, machine, data_bytes)
    return plan, _stored_bytes(unit.k, found.shard, itemsize), 2 * itemsize * unit.k, why_not


Rung = Callable[[Unit, Study, Machine, int, tuple[int, int] | None], tuple[UnitPlan, str]]
RUNGS: dict[Solver, Rung] = {
    Solver.CUDA_DENSE: _cuda_dense,
    Solver.HOST_DENSE: _host_dense,
    Solver.DIVIDE: _divide,
    Solver.EXTREMES: _extremes,
    Solver.MATRIX_ONLY: _matrix_only,
    Solver.SLICES: _slices,
    Solver.COMPONENTS: _components,
    Solver.SVD: _svd,
    Solver.SYMMETRIC: _symmetric,
}


def _sparsity(unit: Unit) -> tuple[int, int]:
    """Entries of the matrix and of its triangular factors at most; all of them, where nothing is known."""
    return unit.nonzeros or unit.k**2, unit.fill or unit.k**2


def _dense_flops(unit: Unit) -> int:
    return dense.to_hessenberg_flops(unit.k) + dense.hessenberg_eigenvalues_flops(unit.k)


def _extremes_flops(unit: Unit) -> int:
    """Products, far below the rate of dense ones, and one sparse LU: sum of squared columns of the factors."""
    nonzeros, fill = _sparsity(unit)
    return PRODUCT_COST * 2 * ARNOLDI_PRODUCTS * nonzeros + fill * fill // max(unit.k, 1)


FLOPS: dict[Solver, Callable[[Unit], int]] = {
    Solver.CUDA_DENSE: _dense_flops,
    Solver.HOST_DENSE: _dense_flops,
    Solver.DIVIDE: lambda unit: DIVIDE_FLOPS * unit.k**3,
    Solver.EXTREMES: _extremes_flops,
    Solver.MATRIX_ONLY: lambda unit: 0,
}


def _seconds(flops: int, machine: Machine) -> float:
    return flops / (machine.flops_per_s * DENSE_EFFICIENCY)


def _build_seconds(unit: Unit, build: Build, machine: Machine) -> float:
    if build is Build.ACCUMULATED:
        return _seconds(unit.accumulated_flops, machine) + ENTRY_SECONDS * unit.nonzeros
    return unit.column_s * (unit.products if build is Build.SHARED else unit.k)


def _kept(study: Study, stored_bytes: int) -> int:
    return stored_bytes if study.keep is Keep.ALL else 0


def _too_small(solver: str, unit: Unit, stages: Mapping[str, int], machine: Machine, data_bytes: int) -> str:
    largest = max(stages, key=lambda s: stages[s])
    total, budget = stages[largest] + machine.reserved_bytes, data_bytes + machine.reserved_bytes
    return (
        f"{solver} of {unit.block} needs {format_bytes(total)} ({largest} {format_bytes(stages[largest])}, "
        f"reserved {format_bytes(machine.reserved_bytes)}), budget {format_bytes(budget)}"
        f": use --memory {-(-(total + RESERVED_VARIES_BYTES) // (1 << 20))}MiB"
    )


@dataclass(frozen=True)
class _Sizes:
    chunk: int
    shard: int
    build: Build
    stages: dict[str, int]
    fits: bool


def _fitting(unit: Unit, itemsize: int, data_bytes: int, solving: "Stages", stored: tuple[int, int] | None) -> _Sizes:
    """The fastest chunk and shard whose stages fit the budget, else the smallest; those of a `stored` matrix stay.

    What the smallest need is what a refusal names, so that a budget of that size is always enough.
    """
    column_bytes = unit.column_items * itemsize
    found = None
    able = {Build.ACCUMULATED: unit.accumulated_items, Build.SHARED: unit.products, Build.COLUMNS: 1}
    for build in (build for build, can in able.items() if can):
        sparse = build is not Build.COLUMNS
        rows = file_rows(unit.k, TILE_ROWS) if sparse else unit.k  # a sparse shard is made dense file by file
        most = 2 * SHARD_COLUMNS if sparse else SHARD_COLUMNS
        sizes = _chunks_and_shards(unit.k, rows, most, column_bytes, itemsize, data_bytes)
        for chunk, shard in [stored] if stored else sizes:
            build_bytes = _build_bytes(unit, rows, column_bytes, itemsize, chunk, shard)
            build_bytes += _sparse_bytes(unit, build, itemsize, chunk) if sparse else 0
            stages = {"open": _open_bytes(unit, column_bytes, itemsize), "build": build_bytes}
            stages |= solving(unit, column_bytes, itemsize, shard)
            found = _Sizes(chunk, shard, build, stages, max(stages.values()) <= data_bytes)
            if found.fits:
                return found
    assert found is not None
    return found


def _sparse_bytes(unit: Unit, build: Build, itemsize: int, chunk: int) -> int:
    """What a sparse build takes beside a plain one: results of products with their owners, or blocks; and M twice.

    (9 * chunk * k or accumulated_items) * itemsize + 2 * nonzeros * (itemsize + 8).
    """
    items = unit.accumulated_items if build is Build.ACCUMULATED else 9 * chunk * unit.k
    return items * itemsize + 2 * unit.nonzeros * (itemsize + 8)


def _chunks_and_shards(
    k: int, rows: int, most: int, column_bytes: int, itemsize: int, data_bytes: int
) -> Iterator[tuple[int, int]]:
    """Columns built at once, and columns in one file of so many rows, best first, ever smaller.

    A shard is a whole number of chunks, about `most` columns, within 32 MiB; fewer than 8 would make too many files.
    """
    target = max(column_bytes, min(BUILD_TARGET_BYTES, max(data_bytes, 0) // 4))
    chunk = max(1, min(target // max(1, column_bytes), CHUNK_COLUMNS, k))
    columns = max(chunk, SHARD_COLUMNS_LEAST, min(most, SHARD_TARGET_BYTES // max(1, rows * itemsize)))
    while True:
        yield chunk, columns // chunk * chunk
        if chunk == 1 and columns <= SHARD_COLUMNS_LEAST:
            return
        if columns <= max(chunk, SHARD_COLUMNS_LEAST):
            chunk //= 2
        columns = max(chunk, SHARD_COLUMNS_LEAST, columns // 2)


def _open_bytes(unit: Unit, column_bytes: int, itemsize: int) -> int:
    """The stage before all others.

    The network and its checkpoint, its image, the probes of the reduction (three tangents through it, in and out),
    three copies of the largest kernel, and what libraries touch:
        network_bytes + image_bytes + 2 * 3 * column_bytes + 3 * kernel_items * itemsize + 24 MiB.
    """
    kernels = KERNEL_COPIES * unit.kernel_items * itemsize
    return unit.network_bytes + unit.image_bytes + 2 * PROBES * column_bytes + kernels + LIBRARY_BYTES


def _build_bytes(unit: Unit, rows: int, column_bytes: int, itemsize: int, chunk: int, shard: int) -> int:
    """To build column by column.

    A chunk of columns, the kernel's copies, and a shard with the copies that Zarr makes of it:
        chunk * column_bytes + 3 * kernel_items * itemsize + `_shard_bytes`.
    """
    return chunk * column_bytes + KERNEL_COPIES * unit.kernel_items * itemsize + _shard_bytes(rows, shard, itemsize)


def _certify_bytes(vectors: int, unit: Unit, column_bytes: int, itemsize: int) -> int:
    """The operator, products of so many lifted vectors, right and left, each with its eigenvalue's pair."""
    lifted = 2 * vectors * (column_bytes + 2 * (unit.n + unit.k) * itemsize)
    return lifted + operator_bytes(unit.kernel_items, column_bytes, itemsize)


def _located_bytes(k: int) -> int:
    """Of the certificate of a whole spectrum: what locates all eigenvalues, where that is always done."""
    return inclusion_bytes(k) if k <= FULL_ORDER else 0


def locate_bytes(k: int, kernel_items: int, itemsize: int) -> int:
    """On top of the certificate, where all eigenvalues of a larger order are located for their signs.

    `eigen.inclusion.inclusion_bytes`, and the twins in other precisions that M's rounding was measured with:
        + 3 * kernel_items * itemsize.
    """
    return inclusion_bytes(k) + KERNEL_COPIES * kernel_items * itemsize


Stages = Callable[[Unit, int, int, int], dict[str, int]]


def proves_sparse(unit: Unit) -> bool:
    """Whether the ends of a whole spectrum are proved with a sparse matrix: it is, or it is of a small order."""
    return 0 < unit.nonzeros < DENSE_SHARE * unit.k**2 or unit.k <= CHEAP_WHOLE


def prove_bytes(plan: UnitPlan, itemsize: int) -> int:
    """What proves the ends and the errors of a whole spectrum, beside what it is told that it may take.

    The operator, and the matrix while it is read; what the counts of `_extremes_stages` make of a sparse one, without
    factors; of a dense one a panel in double precision.
    """
    unit, k = plan.unit, plan.unit.k
    held = operator_bytes(unit.kernel_items, unit.column_items * itemsize, itemsize) + _krylov_bytes(k)
    if proves_sparse(unit):
        parts = 10 if unit.function is BlockFunction.BRANCH else 5
        return held + parts * 12 * (unit.nonzeros or k * k)
    return held + k * k * itemsize + max(_shard_bytes(k, plan.shard, itemsize), 2 * 8 * DENSE_PANEL * k)


def _with_proof(base: UnitPlan, itemsize: int, data_bytes: int) -> dict[str, int]:
    """The stages of a whole spectrum, with `prove` where the budget has room: else it is found, not proved.

    That is done above the order up to which all eigenvalues are located.
    prove: `prove_bytes`; of a small order, the dense solve that is its last resort, too.
    """
    k, stages = base.unit.k, base.stages or {}
    needed = prove_bytes(base, itemsize) + (WHOLE_BYTES * k * k if k <= CHEAP_WHOLE else 0)
    return stages | {"prove": needed} if k > FULL_ORDER and needed <= data_bytes else stages


def _no_stages(unit: Unit, column_bytes: int, itemsize: int, shard: int) -> dict[str, int]:
    return {}


def _device_stages(unit: Unit, column_bytes: int, itemsize: int, shard: int) -> dict[str, int]:
    """Stages of the dense solve on the device: the matrix, and the shard that is read or the vectors that come back."""
    k = unit.k
    vectors = 4 * CERTIFIED_MOST * k * itemsize
    return {"solve": k * k * itemsize + max(_shard_bytes(k, shard, itemsize), vectors)}


def _host_stages(unit: Unit, column_bytes: int, itemsize: int, shard: int) -> dict[str, int]:
    """Stages of the dense solve on the host: LAPACK's own (see `eigen.dense`) and 16 MiB, or what is read.

    hessenberg, before LAPACK: the matrix, its sparse form and its symmetric part (56 bytes a nonzero, measured).
    eigenvalues, before LAPACK: the Hessenberg form, and a shard of it.
    eigenvectors holds the operator too, for what follows: its kernels and the values it was linearised at:
        + 3 * kernel_items * itemsize + 2 * column_bytes.
    certify: after the matrices of the inverse iteration are gone; small orders are located (`_located_bytes`).
    locate: of a branch, whose numerical range holds 0 as a rule, all eigenvalues are located up to a larger order.
    """
    k, matrix, a_shard = unit.k, unit.k**2 * itemsize, _shard_bytes(unit.k, shard, itemsize)
    operator = operator_bytes(unit.kernel_items, column_bytes, itemsize)
    certify = _certify_bytes(CERTIFIED_MOST, unit, column_bytes, itemsize) + _located_bytes(unit.k)
    located = unit.function is BlockFunction.BRANCH and FULL_ORDER < k <= MOST_ORDER
    return {
        "hessenberg": max(
            dense.to_hessenberg_bytes(k, itemsize) + BLAS_BYTES, matrix + max(a_shard, 56 * unit.nonzeros + BLAS_BYTES)
        ),
        "eigenvalues": max(dense.hessenberg_eigenvalues_bytes(k, itemsize) + BLAS_BYTES, matrix + a_shard),
        "eigenvectors": dense.hessenberg_eigenvectors_bytes(k, CERTIFIED_MOST, itemsize) + BLAS_BYTES + operator,
        "certify": certify,
        **({"locate": certify + locate_bytes(k, unit.kernel_items, itemsize)} if located else {}),
    }


def _divide_stages(
    width: int, held: int, leaf: int, here: int, unit: Unit, column_bytes: int, itemsize: int, shard: int
) -> dict[str, int]:
    """Stages of the division: panels of all kernels (`eigen.panels`), a part in memory, the certificate's vectors.

    divide: `divide_held_bytes` of each block that the budget holds, of a panel where blocks are on a device; before it,
        the logarithmic norm: the sparse matrix, if any, and Krylov vectors.
    leaf: LAPACK's own, and a panel that is read.
    """
    k = unit.k
    sparse = 56 * unit.nonzeros
    return {
        "divide": max(here * (divide_held_bytes(k, width, held) + BLAS_BYTES), sparse + _krylov_bytes(k)),
        "leaf": dense.to_hessenberg_bytes(leaf, 8) + 16 * width * leaf + BLAS_BYTES,
        "certify": _certify_bytes(CERTIFIED_MOST, unit, column_bytes, itemsize) + _located_bytes(unit.k),
    }


def _extremes_stages(factors: int, unit: Unit, column_bytes: int, itemsize: int, shard: int) -> dict[str, int]:
    """Stages of the sparse solver, each with the matrix in columns of 12 bytes an entry, and the operator.

    read: the matrix twice and a shard: 2 * 12 * nonzeros + shard.
    ends: the matrix, what `extremes` keeps of products and vectors, and factors where shift-invert is needed.
    count: the matrix, its symmetric part and what makes it (4 matrices more; of a branch 9, for singular values), and
        the factors.
    """
    (nonzeros, _), k = _sparsity(unit), unit.k
    matrix = 12 * nonzeros + operator_bytes(unit.kernel_items, column_bytes, itemsize)
    parts = 9 if unit.function is BlockFunction.BRANCH else 4
    dense_copy = 8 * k * k if nonzeros >= DENSE_SHARE * k * k else 0
    return {
        "read": matrix + 12 * nonzeros + _shard_bytes(file_rows(k, TILE_ROWS), shard, itemsize),
        "ends": matrix + _krylov_bytes(k) + dense_copy + max(12 * nonzeros, factors),
        "count": matrix + parts * 12 * nonzeros + _krylov_bytes(k) + factors,
        "certify": _certify_bytes(FOUND_MOST, unit, column_bytes, itemsize),
    }


def _krylov_bytes(k: int) -> int:
    return 8 * KRYLOV_VECTORS * k + BLAS_BYTES


def operator_bytes(kernel_items: int, column_bytes: int, itemsize: int) -> int:
    """The operator that stays open: kernels with their copies, and the values it was linearised at."""
    return KERNEL_COPIES * kernel_items * itemsize + 2 * column_bytes


def _shard_bytes(rows: int, shard: int, itemsize: int) -> int:
    """A shard while it is written or read: itself and three copies (measured), of whole tiles, and what Zarr adds."""
    return 4 * _padded(rows, TILE_ROWS) * min(shard, rows) * itemsize + ZARR_BYTES


def _stored_bytes(k: int, shard: int, itemsize: int) -> int:
    """A matrix without a zero tile on disk: whole tiles, each with 4 bytes of checksum and 16 of index."""
    if k == 0:
        return 0
    shards, tiles = -(-k // shard), -(-k // TILE_ROWS)
    numbers = _padded(k, TILE_ROWS) * shards * min(shard, k) * itemsize
    bands = -(-k // file_rows(k, min(TILE_ROWS, k)))
    return numbers + shards * (20 * tiles + 4 * bands + tiles + 4) + METADATA_BYTES


def _padded(k: int, tile: int) -> int:
    return -(-k // min(tile, max(k, 1))) * min(tile, k)


def _grown_bytes(units: Iterable[UnitPlan], side_by_side: int, there: Mapping[str, int]) -> int:
    """Most bytes that the store grows by: what all units keep, and what those side by side need on the way.

    Of each, what is there already counts.
    """
    kept, on_the_way = 0, []
    for plan in units:
        stored = there.get(plan.unit.key, 0)
        more = max(0, plan.kept_bytes - stored)
        kept += more
        on_the_way.append(max(0, plan.disk_bytes - stored) - more)
    return kept + sum(sorted(on_the_way, reverse=True)[:side_by_side])


def check_disk(plan: Plan, free_bytes: int | None, there: Mapping[str, int] | None = None) -> None:
    """Refuse a run whose store would fill the disk.

    Args:
        plan: of what is to be done.
        free_bytes: where the store lies; None: unknown.
        there: by unit, bytes that are stored of it already.

    Raises:
        InputError: with what is needed and what is free.
    """
    saved = _grown_bytes(plan.units, plan.workers, {}) - _grown_bytes(plan.units, plan.workers, there or {})
    needed = plan.disk_bytes - saved
    if free_bytes is not None and needed > free_bytes:
        beside = f" beside the {format_bytes(saved)} that are stored already" if saved else ""
        raise InputError(
            f"the run needs up to {format_bytes(needed)} of disk while it works{beside}, "
            f"{format_bytes(free_bytes)} is free there: choose another place, or fewer --blocks"
        )


def check_budget(plan: Plan) -> None:
    """Refuse a run with units that the budget does not hold.

    Raises:
        InputError: naming each block once, with what would be enough.
    """
    # the largest of a block's units speaks for it: what is enough for that is enough for all
    lines = {u.unit.block: u.why for u in sorted(plan.refused, key=lambda u: u.projected_bytes)}
    if lines:
        head = "the budget is too small" if any("--memory" in why for why in lines.values()) else "no solver fits"
        less = "\nS, and a proof of how many are negative, need less: --solver extremes"
        hint = less if any(str(Solver.HOST_DENSE) in why for why in lines.values()) else ""
        raise InputError(f"{head}:\n" + "\n".join(f"  - {why}" for why in lines.values()) + hint)
