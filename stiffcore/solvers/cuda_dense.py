"""All eigenvalues of a dense matrix by torch on a CUDA device (`stiffcore.eigen.device`)."""

from dataclasses import replace

import numpy as np

from stiffcore.eigen import dense
from stiffcore.record import Stage, UnitPlan
from stiffcore.solvers.projection import (
    Machine,
    SolverEntry,
    dense_flops,
    kept_bytes_of,
    shard_bytes,
    shared_costs,
    with_proof,
)
from stiffcore.spectra import CERTIFIED_MOST
from stiffcore.study import Solver, Study, Unit, format_bytes

# All eigenvalues of a dense matrix on a device, of each k and each k^2: within 25 % of what an H200 took at k = 1,024
# to 8,192 (`bench/rates.py`), where it does not come near the rate of its products.
DEVICE_SECONDS = (1.1e-4, 6.2e-8)


def project(
    unit: Unit, study: Study, machine: Machine, data_bytes: int, stored: tuple[int, int] | None
) -> tuple[UnitPlan, str]:
    """Eigenvalues and eigenvectors by torch on the device (`eigen.device`); host memory to read the matrix.

    device: dense.device_bytes + the build's chunk and kernels.
    moved: the matrix written, and read twice; and copied to the device twice.
    """
    seconds = DEVICE_SECONDS[0] * unit.k + DEVICE_SECONDS[1] * unit.k**2
    base, matrix, vectors, why_not = shared_costs(
        Solver.CUDA_DENSE, unit, study, machine, data_bytes, _device_stages, stored, dense_flops(unit), seconds
    )
    needed = dense.device_bytes(unit.k, np.dtype(study.dtype).itemsize) + (base.stages or {})["build"]
    plan = replace(
        base,
        why="fits the device",
        stages=with_proof(base, np.dtype(study.dtype).itemsize, data_bytes),
        device_bytes=needed,
        disk_bytes=matrix + vectors,
        kept_bytes=vectors + kept_bytes_of(study, matrix),
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


def _device_stages(unit: Unit, column_bytes: int, itemsize: int, shard: int) -> dict[str, int]:
    """Stages of the dense solve on the device: the matrix, and the shard that is read or the vectors that come back."""
    k = unit.k
    vectors = 4 * CERTIFIED_MOST * k * itemsize
    return {"solve": k * k * itemsize + max(shard_bytes(k, shard, itemsize), vectors)}


SOLVER = SolverEntry(
    Solver.CUDA_DENSE,
    project,
    arrays={Stage.BUILT: ("matrix",), Stage.SOLVED: ("reduced_eigenvalues",)},
)
