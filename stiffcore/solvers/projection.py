"""What the projections of all solvers share: a machine, sizes that fit a budget, and bytes and seconds of each stage.

All in integers but seconds. A solver's own arithmetic is in its file; `stiffcore.solvers` has them all.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from stiffcore.eigen import dense
from stiffcore.eigen.deflation import CHEAP_WHOLE, WHOLE_BYTES
from stiffcore.eigen.inclusion import FULL_ORDER, inclusion_bytes
from stiffcore.eigen.sparse import DENSE_PANEL, DENSE_SHARE
from stiffcore.record import Stage, UnitPlan
from stiffcore.store import file_rows
from stiffcore.study import PROBES, BlockFunction, Build, Keep, Solver, Study, Unit, format_bytes

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
# What is reserved differs by 5 MiB in a dozen starts, but a budget that is named must be enough.
RESERVED_VARIES_BYTES = 16 << 20
TILE_ROWS = 256
ZARR_BYTES = 512 << 10
METADATA_BYTES = 4 << 10
# Share of one thread's product rate that gehrd and hseqr reach together: 27 of 38 GF/s at k = 7,386, two units side by
# side on two cores; less for small k.
DENSE_EFFICIENCY = 0.6
# Vectors of length k that `eigen.extremes` holds at most: 300 in ARPACK, and others that its runs returned.
# Vectors of length k that `eigen.extremes` holds at most: 300 in ARPACK, and others that its runs returned.
KRYLOV_VECTORS = 480
# Of an accumulated matrix, beside its flops: to find an entry, and to put it in its place.
ENTRY_SECONDS = 1e-7


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


Stages = Callable[[Unit, int, int, int], dict[str, int]]


Project = Callable[[Unit, Study, Machine, int, tuple[int, int] | None], tuple[UnitPlan, str]]


@dataclass(frozen=True)
class SolverEntry:
    """A solver, as the planner and the readers of a store know it.

    Attributes:
        name: of it, as `--solver` takes it and a plan records it.
        project: from a unit, a study, a machine, bytes that the unit may hold, and chunk and shard of a matrix that is
            begun: the unit's plan, and what it lacks, empty where it fits.
        arrays: by stage, those that it leaves in the store while a unit of kind `matrix` is under way.
        results: arrays that stay with the eigenvalues.
        spectrum: whether it answers with a spectrum.
    """

    name: Solver
    project: Project
    arrays: Mapping[Stage, tuple[str, ...]] = field(default_factory=dict)
    results: tuple[str, ...] = ()
    spectrum: bool = True


@dataclass(frozen=True)
class Sizes:
    """What `fitting` has found: chunk, shard, way of building, bytes by stage, and whether the budget holds them."""

    chunk: int
    shard: int
    build: Build
    stages: dict[str, int]
    fits: bool


def shared_costs(
    solver: Solver,
    unit: Unit,
    study: Study,
    machine: Machine,
    data_bytes: int,
    solving: "Stages",
    stored: tuple[int, int] | None,
    flops: int,
    seconds: float | None = None,
) -> tuple[UnitPlan, int, int, str]:
    """What the solvers of a stored matrix share: sizes that fit, and the costs of building and solving.

    The solve takes as long as its flops on a thread, or the `seconds` given.

    Returns:
        The plan, yet without its disk; bytes of the matrix and of two vectors in the store; and what the host's budget
        lacks, empty where it is enough.
    """
    itemsize = np.dtype(study.dtype).itemsize
    found = fitting(unit, itemsize, data_bytes, solving, stored)
    solve_seconds = seconds_of(flops, machine) if seconds is None else seconds
    plan = UnitPlan(
        unit,
        solver,
        "",
        chunk=found.chunk,
        shard=found.shard,
        build=found.build,
        stages=found.stages,
        flops=flops,
        seconds=build_seconds(unit, found.build, machine) + solve_seconds,
    )
    why_not = "" if found.fits else too_small(solver, unit, found.stages, machine, data_bytes)
    return plan, stored_bytes(unit.k, found.shard, itemsize), 2 * itemsize * unit.k, why_not


def fitting(unit: Unit, itemsize: int, data_bytes: int, solving: "Stages", stored: tuple[int, int] | None) -> Sizes:
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
            stages = {"open": open_bytes(unit, column_bytes, itemsize), "build": build_bytes}
            stages |= solving(unit, column_bytes, itemsize, shard)
            found = Sizes(chunk, shard, build, stages, max(stages.values()) <= data_bytes)
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


def open_bytes(unit: Unit, column_bytes: int, itemsize: int) -> int:
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
        chunk * column_bytes + 3 * kernel_items * itemsize + `shard_bytes`.
    """
    return chunk * column_bytes + KERNEL_COPIES * unit.kernel_items * itemsize + shard_bytes(rows, shard, itemsize)


def certify_bytes(vectors: int, unit: Unit, column_bytes: int, itemsize: int) -> int:
    """The operator, products of so many lifted vectors, right and left, each with its eigenvalue's pair."""
    lifted = 2 * vectors * (column_bytes + 2 * (unit.n + unit.k) * itemsize)
    return lifted + operator_bytes(unit.kernel_items, column_bytes, itemsize)


def located_bytes(k: int) -> int:
    """Of the certificate of a whole spectrum: what locates all eigenvalues, where that is always done."""
    return inclusion_bytes(k) if k <= FULL_ORDER else 0


def locate_bytes(k: int, kernel_items: int, itemsize: int) -> int:
    """On top of the certificate, where all eigenvalues of a larger order are located for their signs.

    `eigen.inclusion.inclusion_bytes`, and the twins in other precisions that M's rounding was measured with:
        + 3 * kernel_items * itemsize.
    """
    return inclusion_bytes(k) + KERNEL_COPIES * kernel_items * itemsize


def proves_sparse(unit: Unit) -> bool:
    """Whether the ends of a whole spectrum are proved with a sparse matrix: it is, or it is of a small order."""
    return 0 < unit.nonzeros < DENSE_SHARE * unit.k**2 or unit.k <= CHEAP_WHOLE


def prove_bytes(plan: UnitPlan, itemsize: int) -> int:
    """What proves the ends and the errors of a whole spectrum, beside what it is told that it may take.

    The operator, and the matrix while it is read; what the counts of `_extremes_stages` make of a sparse one, without
    factors; of a dense one a panel in double precision.
    """
    unit, k = plan.unit, plan.unit.k
    held = operator_bytes(unit.kernel_items, unit.column_items * itemsize, itemsize) + krylov_bytes(k)
    if proves_sparse(unit):
        parts = 10 if unit.function is BlockFunction.BRANCH else 5
        return held + parts * 12 * (unit.nonzeros or k * k)
    return held + k * k * itemsize + max(shard_bytes(k, plan.shard, itemsize), 2 * 8 * DENSE_PANEL * k)


def with_proof(base: UnitPlan, itemsize: int, data_bytes: int) -> dict[str, int]:
    """The stages of a whole spectrum, with `prove` where the budget has room: else it is found, not proved.

    That is done above the order up to which all eigenvalues are located.
    prove: `prove_bytes`; of a small order, the dense solve that is its last resort, too.
    """
    k, stages = base.unit.k, base.stages or {}
    needed = prove_bytes(base, itemsize) + (WHOLE_BYTES * k * k if k <= CHEAP_WHOLE else 0)
    return stages | {"prove": needed} if k > FULL_ORDER and needed <= data_bytes else stages


def krylov_bytes(k: int) -> int:
    """Vectors of Arnoldi's runs, in double precision: 8 * 480 * k + 16 MiB."""
    return 8 * KRYLOV_VECTORS * k + BLAS_BYTES


def operator_bytes(kernel_items: int, column_bytes: int, itemsize: int) -> int:
    """The operator that stays open: kernels with their copies, and the values it was linearised at."""
    return KERNEL_COPIES * kernel_items * itemsize + 2 * column_bytes


def shard_bytes(rows: int, shard: int, itemsize: int) -> int:
    """A shard while it is written or read: itself and three copies (measured), of whole tiles, and what Zarr adds."""
    return 4 * _padded(rows, TILE_ROWS) * min(shard, rows) * itemsize + ZARR_BYTES


def stored_bytes(k: int, shard: int, itemsize: int) -> int:
    """A matrix without a zero tile on disk: whole tiles, each with 4 bytes of checksum and 16 of index."""
    if k == 0:
        return 0
    shards, tiles = -(-k // shard), -(-k // TILE_ROWS)
    numbers = _padded(k, TILE_ROWS) * shards * min(shard, k) * itemsize
    bands = -(-k // file_rows(k, min(TILE_ROWS, k)))
    return numbers + shards * (20 * tiles + 4 * bands + tiles + 4) + METADATA_BYTES


def _padded(k: int, tile: int) -> int:
    return -(-k // min(tile, max(k, 1))) * min(tile, k)


def seconds_of(flops: int, machine: Machine) -> float:
    """What an eigenvalue solve of so many flops takes on one thread."""
    return flops / (machine.flops_per_s * DENSE_EFFICIENCY)


def build_seconds(unit: Unit, build: Build, machine: Machine) -> float:
    """What building the matrix takes, from the measured time of a product."""
    if build is Build.ACCUMULATED:
        return seconds_of(unit.accumulated_flops, machine) + ENTRY_SECONDS * unit.nonzeros
    return unit.column_s * (unit.products if build is Build.SHARED else unit.k)


def kept_bytes_of(study: Study, stored_bytes: int) -> int:
    """Of what is stored on the way, what a study keeps."""
    return stored_bytes if study.keep is Keep.ALL else 0


def too_small(solver: str, unit: Unit, stages: Mapping[str, int], machine: Machine, data_bytes: int) -> str:
    """Why a unit does not fit: its fullest stage, with the budget that would be enough."""
    largest = max(stages, key=lambda s: stages[s])
    total, budget = stages[largest] + machine.reserved_bytes, data_bytes + machine.reserved_bytes
    return (
        f"{solver} of {unit.block} needs {format_bytes(total)} ({largest} {format_bytes(stages[largest])}, "
        f"reserved {format_bytes(machine.reserved_bytes)}), budget {format_bytes(budget)}"
        f": use --memory {-(-(total + RESERVED_VARIES_BYTES) // (1 << 20))}MiB"
    )


def products_at_once(column_bytes: int) -> int:
    """Where nothing is built column by column into the store, so that only the cache counts."""
    return max(1, min(BUILD_TARGET_BYTES // max(1, column_bytes), CHUNK_COLUMNS))


def sparsity(unit: Unit) -> tuple[int, int]:
    """Entries of the matrix and of its triangular factors at most; all of them, where nothing is known."""
    return unit.nonzeros or unit.k**2, unit.fill or unit.k**2


def dense_flops(unit: Unit) -> int:
    """Reduction to Hessenberg form and QR iteration, see `eigen.dense`."""
    return dense.to_hessenberg_flops(unit.k) + dense.hessenberg_eigenvalues_flops(unit.k)
