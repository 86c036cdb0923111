"""All eigenvalues of a matrix that no memory holds, by division in the store (`stiffcore.eigen.divide`).

Of kind `singular`, those of the symmetric matrix that singular values come from.
"""

import math
from dataclasses import replace
from functools import partial

import numpy as np

from stiffcore.eigen import dense
from stiffcore.record import Stage, UnitPlan
from stiffcore.solvers.projection import (
    BLAS_BYTES,
    Machine,
    SolverEntry,
    certify_bytes,
    kept_bytes_of,
    krylov_bytes,
    located_bytes,
    operator_bytes,
    seconds_of,
    shared_costs,
    with_proof,
)
from stiffcore.solvers.singular import SINGULAR_ENTRY_BYTES, singular_plan
from stiffcore.spectra import CERTIFIED_MOST
from stiffcore.study import Kind, Solver, Study, Unit

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


def project(
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
    flops = DIVIDE_FLOPS * unit.k**3
    base, matrix, vectors, why_not = shared_costs(
        Solver.DIVIDE, unit, study, machine, room, partial(_divide_stages, width, held, leaf, here), stored, flops
    )
    if why_not and here > 1:
        return project(unit, study, replace(machine, spread=here - 1), data_bytes, stored)
    on_device = 0
    if device_bytes is not None:
        stages = base.stages or {}
        on_device = max(divide_device_bytes(k, width, at_once, leaf), stages["build"], stages["certify"])
        if on_device > device_bytes:
            return project(unit, study, replace(machine, device_bytes=None), data_bytes, stored)
    among = (", on the device" if on_device else "") + (f", shared by {spread} workers" if spread > 1 else "")
    plan = replace(
        base,
        why=f"blocks of {width * at_once:,} columns, parts of {leaf:,} in memory{among}",
        stages=with_proof(base, np.dtype(study.dtype).itemsize, room),
        device_bytes=on_device,
        panel=width,
        at_once=at_once,
        leaf=leaf,
        spread=spread,
        seconds=base.seconds - (1 - 1 / spread) * seconds_of(base.flops, machine),
        disk_bytes=matrix + vectors + 6 * 8 * k * k,
        kept_bytes=vectors + kept_bytes_of(study, matrix),
        moved_bytes=divide_moved_bytes(k, width * at_once),
    )
    return plan, why_not


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
        "divide": max(here * (divide_held_bytes(k, width, held) + BLAS_BYTES), sparse + krylov_bytes(k)),
        "leaf": dense.to_hessenberg_bytes(leaf, 8) + 16 * width * leaf + BLAS_BYTES,
        "certify": certify_bytes(CERTIFIED_MOST, unit, column_bytes, itemsize) + located_bytes(unit.k),
    }


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
    plan, why_not = singular_plan(Solver.DIVIDE, unit, study, machine, data_bytes, held, flops)
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


SOLVER = SolverEntry(
    Solver.DIVIDE,
    project,
    arrays={Stage.BUILT: ("matrix",), Stage.SOLVED: ("reduced_eigenvalues",)},
)
