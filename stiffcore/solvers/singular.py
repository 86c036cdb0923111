"""Singular values in memory, of the matrix itself or from squares: `svd`, `symmetric` (`stiffcore.eigen.singular`)."""

import numpy as np

from stiffcore.eigen import dense
from stiffcore.record import UnitPlan
from stiffcore.solvers.projection import (
    BLAS_BYTES,
    METADATA_BYTES,
    Machine,
    SolverEntry,
    build_seconds,
    open_bytes,
    operator_bytes,
    products_at_once,
    seconds_of,
    too_small,
)
from stiffcore.study import Build, Solver, Study, Unit

# Of an entry of the sparse matrices that singular values come from, while these are solved for: 12 in each, and what
# the allocator keeps (63 measured, block layer4.1 of ResNet50 in float64).
SINGULAR_ENTRY_BYTES = 4 * 16


def singular_plan(
    solver: Solver, unit: Unit, study: Study, machine: Machine, data_bytes: int, dense_bytes: int, flops: int
) -> tuple[UnitPlan, str]:
    """What all ways to singular values share.

    build: blocks or a chunk of products, and the sparse matrices twice:
        accumulated_items * itemsize + 2 * nonzeros * (itemsize + 8), or chunk * column_bytes + 2 * nonzeros * ...
    solve: the sparse matrices in float64, as they are, scaled, turned, and products of them; and what is dense.
    """
    itemsize = np.dtype(study.dtype).itemsize
    column_bytes = unit.column_items * itemsize
    chunk = products_at_once(column_bytes)
    operator = operator_bytes(unit.kernel_items, column_bytes, itemsize)
    blocks = unit.accumulated_items * itemsize or chunk * column_bytes
    stages = {
        "open": open_bytes(unit, column_bytes, itemsize),
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
        seconds=build_seconds(unit, build, machine) + seconds_of(flops, machine),
        disk_bytes=kept,
        kept_bytes=kept,
        moved_bytes=kept,
    )
    largest = max(unit.k, unit.width) if solver is Solver.SVD else unit.k
    if solver is not Solver.DIVIDE and largest > dense.LAPACK_MAX_ORDER:
        return plan, f"{solver}: order {largest:,} is over LAPACK's {dense.LAPACK_MAX_ORDER:,}"
    why = too_small(solver, unit, stages, machine, data_bytes)
    return plan, "" if max(stages.values()) <= data_bytes else why


def _svd(
    unit: Unit, study: Study, machine: Machine, data_bytes: int, stored: tuple[int, int] | None
) -> tuple[UnitPlan, str]:
    """gesdd, values only (`eigen.singular`): J, sparse, and one dense copy. 8/3 k^2 (3 width - k) / 2 flops."""
    k, width = unit.k, unit.width
    dense_bytes = 8 * k * width + 8 * 80 * (k + width)
    return singular_plan(Solver.SVD, unit, study, machine, data_bytes, dense_bytes, 4 * k * k * (3 * width - k) // 3)


def _symmetric(
    unit: Unit, study: Study, machine: Machine, data_bytes: int, stored: tuple[int, int] | None
) -> tuple[UnitPlan, str]:
    """Eigenvalues of a symmetric matrix: of the Gram matrix, twice; or three matrices of the order of the factors."""
    k = unit.k
    if unit.route == "factors":
        return singular_plan(Solver.SYMMETRIC, unit, study, machine, data_bytes, 4 * 8 * k * k, 7 * k**3)
    flops = 4 * k**3 // 3 + k * k * unit.width
    return singular_plan(Solver.SYMMETRIC, unit, study, machine, data_bytes, 3 * 8 * k * k, flops)


SVD = SolverEntry(Solver.SVD, _svd)
SYMMETRIC = SolverEntry(Solver.SYMMETRIC, _symmetric)
