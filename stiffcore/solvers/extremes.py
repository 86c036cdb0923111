"""The extremal eigenvalues, and a proof of how many are negative.

The work is that of `stiffcore.eigen.extremes` and `stiffcore.eigen.counting`.
It answers less than the others, and is taken only where it is asked for.
"""

from dataclasses import replace
from functools import partial

import numpy as np

from stiffcore.eigen.sparse import DENSE_SHARE, device_matrix_bytes, factor_bytes, inertia_bytes
from stiffcore.record import Stage, UnitPlan
from stiffcore.solvers.host_dense import project as project_host
from stiffcore.solvers.projection import (
    METADATA_BYTES,
    TILE_ROWS,
    Machine,
    SolverEntry,
    certify_bytes,
    kept_bytes_of,
    krylov_bytes,
    open_bytes,
    operator_bytes,
    shard_bytes,
    shared_costs,
    sparsity,
)
from stiffcore.store import file_rows
from stiffcore.study import BlockFunction, Build, Keep, Solver, Study, Unit

# Matrix products of all runs together, as seen on blocks of ResNets (600 to 2,500); and eigenvalues that are kept at
# most, all with their vectors.
ARNOLDI_PRODUCTS = 2000
FOUND_MOST = 8
# A flop of a sparse product, in those of a dense one, where all cores take such products: they wait for memory.
PRODUCT_COST = 25
WHOLE_SPECTRUM = "the whole spectrum takes no longer than its ends"


def project(
    unit: Unit, study: Study, machine: Machine, data_bytes: int, stored: tuple[int, int] | None
) -> tuple[UnitPlan, str]:
    """Ends and counts on the sparse matrix (`eigen.extremes`, `eigen.counting`), with as much room for factors as fits.

    Where the whole spectrum takes no longer, that. Where not even the matrix fits, products alone. Products are taken
    on the device, where the matrix fits there.
    A matrix that is accumulated is not stored, unless it is to be kept: to write it takes longer than to build it.
    moved: the matrix, where it is stored, written and read once, and the vectors; and copied to the device twice.
    """
    itemsize = np.dtype(study.dtype).itemsize
    nonzeros, fill = sparsity(unit)
    vectors = 2 * FOUND_MOST * 16 * unit.k
    whole_spectrum, too_much = project_host(unit, study, machine, data_bytes, stored)
    flops = _extremes_flops(unit)
    for needed, why in _factor_levels(nonzeros, fill):
        base, whole, _, why_not = shared_costs(
            Solver.EXTREMES, unit, study, machine, data_bytes, partial(_extremes_stages, needed), stored, flops
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
                kept_bytes=vectors + kept_bytes_of(study, matrix),
                moved_bytes=2 * matrix + 2 * vectors + (24 * nonzeros if on_device else 0),
            )
            return plan, ""
    if itemsize < 8:
        return base, why_not  # products in single precision are too coarse for proofs and vectors
    column_bytes = unit.column_items * itemsize
    stages = {
        "open": open_bytes(unit, column_bytes, itemsize),
        "solve": krylov_bytes(unit.k) + operator_bytes(unit.kernel_items, column_bytes, itemsize),
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


def _factor_levels(nonzeros: int, fill: int) -> tuple[tuple[int, str], ...]:
    """Bytes that sparse factorisations take, and what they are for: from what proves most to none."""
    return (
        (inertia_bytes(fill, nonzeros), "ends by Arnoldi, counts by powers, inertia or discs"),
        (factor_bytes(fill, nonzeros, 16), "ends by Arnoldi, counts by powers or discs; no room for inertia"),
        (factor_bytes(fill, nonzeros, 8), "ends by Arnoldi, counts by powers or refined discs; no room for inertia"),
        (0, "ends by Arnoldi, counts by powers alone: no room for a sparse LU"),
    )


def _extremes_stages(factors: int, unit: Unit, column_bytes: int, itemsize: int, shard: int) -> dict[str, int]:
    """Stages of the sparse solver, each with the matrix in columns of 12 bytes an entry, and the operator.

    read: the matrix twice and a shard: 2 * 12 * nonzeros + shard.
    ends: the matrix, what `extremes` keeps of products and vectors, and factors where shift-invert is needed.
    count: the matrix, its symmetric part and what makes it (4 matrices more; of a branch 9, for singular values), and
        the factors.
    """
    (nonzeros, _), k = sparsity(unit), unit.k
    matrix = 12 * nonzeros + operator_bytes(unit.kernel_items, column_bytes, itemsize)
    parts = 9 if unit.function is BlockFunction.BRANCH else 4
    dense_copy = 8 * k * k if nonzeros >= DENSE_SHARE * k * k else 0
    return {
        "read": matrix + 12 * nonzeros + shard_bytes(file_rows(k, TILE_ROWS), shard, itemsize),
        "ends": matrix + krylov_bytes(k) + dense_copy + max(12 * nonzeros, factors),
        "count": matrix + parts * 12 * nonzeros + krylov_bytes(k) + factors,
        "certify": certify_bytes(FOUND_MOST, unit, column_bytes, itemsize),
    }


def _extremes_flops(unit: Unit) -> int:
    """Products, far below the rate of dense ones, and one sparse LU: sum of squared columns of the factors."""
    nonzeros, fill = sparsity(unit)
    return PRODUCT_COST * 2 * ARNOLDI_PRODUCTS * nonzeros + fill * fill // max(unit.k, 1)


SOLVER = SolverEntry(
    Solver.EXTREMES,
    project,
    arrays={Stage.BUILT: ("matrix",), Stage.SOLVED: ("reduced_eigenvalues", "right_vectors", "left_vectors")},
)
