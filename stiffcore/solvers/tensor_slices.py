"""Eigenvalues of all tensor slices (`stiffcore.eigen.windows`)."""

import numpy as np

from stiffcore.record import UnitPlan
from stiffcore.solvers.projection import (
    METADATA_BYTES,
    Machine,
    SolverEntry,
    open_bytes,
    operator_bytes,
    products_at_once,
    seconds_of,
    too_small,
)
from stiffcore.study import Build, Keep, Solver, Study, Unit

# Of tensor slices: numba, what it takes to compile its code for them (194 MiB, 115 where that is on disk), and a batch
# of squares with what is made of it; and the time that an eigenvalue takes.
SQUARES_BYTES = 256 << 20
SQUARE_SECONDS = 2e-7


def project(
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
    chunk = products_at_once(column_bytes)
    blocks = (unit.accumulated_items + 2 * unit.nonzeros) * itemsize or 2 * chunk * column_bytes
    stages = {
        "open": open_bytes(unit, column_bytes, itemsize),
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
        seconds=products + seconds_of(unit.accumulated_flops, machine) + SQUARE_SECONDS * unit.k,
        disk_bytes=kept,
        kept_bytes=kept,
        moved_bytes=kept,
    )
    if max(stages.values()) <= data_bytes:
        return plan, ""
    why = too_small(Solver.SLICES, unit, stages, machine, data_bytes)
    return plan, why + ("; --keep metrics needs less" if kept else "")


SOLVER = SolverEntry(Solver.SLICES, project)
