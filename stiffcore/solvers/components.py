"""Eigenvalues of a block triangular Jacobian, component by component (`stiffcore.eigen.union`)."""

import numpy as np

from stiffcore.eigen import dense
from stiffcore.eigen.inclusion import MOST_ORDER
from stiffcore.record import UnitPlan
from stiffcore.solvers.projection import (
    BLAS_BYTES,
    METADATA_BYTES,
    Machine,
    SolverEntry,
    certify_bytes,
    locate_bytes,
    open_bytes,
    operator_bytes,
    products_at_once,
    seconds_of,
    too_small,
)
from stiffcore.spectra import CERTIFIED_MOST
from stiffcore.study import Solver, Study, Unit


def project(
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
    chunk = min(products_at_once(column_bytes), unit.width)
    operator = operator_bytes(unit.kernel_items, column_bytes, itemsize)
    vectors = dense.hessenberg_eigenvectors_bytes(unit.width, CERTIFIED_MOST, itemsize)
    locate = locate_bytes(unit.width, unit.kernel_items, itemsize) if unit.width <= MOST_ORDER else 0
    kept = 2 * (2 * itemsize * unit.n + METADATA_BYTES)
    stages = {
        "open": open_bytes(unit, column_bytes, itemsize) + 2 * held,
        "solve": held
        + (3 * itemsize + 16) * unit.width**2
        + max(
            chunk * column_bytes,
            vectors + BLAS_BYTES,
            certify_bytes(CERTIFIED_MOST, block, column_bytes, itemsize) + locate,
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
        seconds=unit.column_s * unit.n + 2 * seconds_of(flops, machine),
        disk_bytes=2 * kept,
        kept_bytes=kept,
        moved_bytes=2 * kept,
    )
    if unit.width > dense.LAPACK_MAX_ORDER:
        return plan, f"components: order {unit.width:,} is over LAPACK's {dense.LAPACK_MAX_ORDER:,}"
    if max(stages.values()) <= data_bytes:
        return plan, ""
    return plan, too_small(Solver.COMPONENTS, unit, stages, machine, data_bytes)


SOLVER = SolverEntry(Solver.COMPONENTS, project, results=("component", "components"))
