"""All eigenvalues of a dense matrix by LAPACK on the host, in two stages (`stiffcore.eigen.dense`)."""

from dataclasses import replace

import numpy as np

from stiffcore.eigen import dense
from stiffcore.eigen.inclusion import FULL_ORDER, MOST_ORDER
from stiffcore.record import Stage, UnitPlan
from stiffcore.solvers.projection import (
    BLAS_BYTES,
    Machine,
    SolverEntry,
    certify_bytes,
    dense_flops,
    kept_bytes_of,
    locate_bytes,
    located_bytes,
    operator_bytes,
    shard_bytes,
    shared_costs,
    with_proof,
)
from stiffcore.spectra import CERTIFIED_MOST
from stiffcore.study import BlockFunction, Solver, Study, Unit


def project(
    unit: Unit, study: Study, machine: Machine, data_bytes: int, stored: tuple[int, int] | None
) -> tuple[UnitPlan, str]:
    """LAPACK in two stages (`eigen.dense`), the matrix and its Hessenberg form in the store.

    moved: the matrix written and read once, the Hessenberg form written once and read twice.
    """
    base, matrix, vectors, why_not = shared_costs(
        Solver.HOST_DENSE, unit, study, machine, data_bytes, _host_stages, stored, dense_flops(unit)
    )
    plan = replace(
        base,
        why="fits the host budget",
        stages=with_proof(base, np.dtype(study.dtype).itemsize, data_bytes),
        disk_bytes=2 * (matrix + vectors),
        kept_bytes=vectors + kept_bytes_of(study, 2 * matrix + vectors),
        moved_bytes=5 * matrix + 6 * vectors,
    )
    if unit.k > dense.LAPACK_MAX_ORDER:
        return plan, f"host-dense: k = {unit.k:,} is over 32-bit LAPACK's {dense.LAPACK_MAX_ORDER:,}"
    return plan, why_not


def _host_stages(unit: Unit, column_bytes: int, itemsize: int, shard: int) -> dict[str, int]:
    """Stages of the dense solve on the host: LAPACK's own (see `eigen.dense`) and 16 MiB, or what is read.

    hessenberg, before LAPACK: the matrix, its sparse form and its symmetric part (56 bytes a nonzero, measured).
    eigenvalues, before LAPACK: the Hessenberg form, and a shard of it.
    eigenvectors holds the operator too, for what follows: its kernels and the values it was linearised at:
        + 3 * kernel_items * itemsize + 2 * column_bytes.
    certify: after the matrices of the inverse iteration are gone; small orders are located (`located_bytes`).
    locate: of a branch, whose numerical range holds 0 as a rule, all eigenvalues are located up to a larger order.
    """
    k, matrix, a_shard = unit.k, unit.k**2 * itemsize, shard_bytes(unit.k, shard, itemsize)
    operator = operator_bytes(unit.kernel_items, column_bytes, itemsize)
    certify = certify_bytes(CERTIFIED_MOST, unit, column_bytes, itemsize) + located_bytes(unit.k)
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


SOLVER = SolverEntry(
    Solver.HOST_DENSE,
    project,
    arrays={
        Stage.BUILT: ("matrix",),
        Stage.REDUCED: ("hessenberg", "tau", "scale"),
        Stage.SOLVED: ("reduced_eigenvalues",),
    },
)
