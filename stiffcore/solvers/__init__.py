"""The solvers, one file each: what a unit will take, what it leaves in the store; and the table of them.

A file has a function `project`, which says what a unit would take (memory by stage, disk, bytes moved, flops, seconds),
and a `SolverEntry`. What all share is in `stiffcore.solvers.projection`. The planner loads no torch for any of them.
"""

from stiffcore.record import Stage, UnitRecord
from stiffcore.solvers.components import SOLVER as COMPONENTS
from stiffcore.solvers.cuda_dense import SOLVER as CUDA_DENSE
from stiffcore.solvers.divide import SOLVER as DIVIDE
from stiffcore.solvers.extremes import SOLVER as EXTREMES
from stiffcore.solvers.host_dense import SOLVER as HOST_DENSE
from stiffcore.solvers.matrix_only import SOLVER as MATRIX_ONLY
from stiffcore.solvers.projection import SolverEntry
from stiffcore.solvers.singular import SVD, SYMMETRIC
from stiffcore.solvers.tensor_slices import SOLVER as TENSOR_SLICES
from stiffcore.store import HISTOGRAM
from stiffcore.study import Kind, Solver

SOLVERS: dict[Solver, SolverEntry] = {
    entry.name: entry
    for entry in (
        CUDA_DENSE,
        HOST_DENSE,
        DIVIDE,
        EXTREMES,
        MATRIX_ONLY,
        TENSOR_SLICES,
        COMPONENTS,
        SVD,
        SYMMETRIC,
    )
}

# What the planner tries, in this order, where no solver is asked for.
LADDER = (Solver.CUDA_DENSE, Solver.HOST_DENSE, Solver.DIVIDE)


def answers(record: UnitRecord) -> bool:
    """Whether a unit that is done has a spectrum."""
    entry = SOLVERS.get(record.plan.solver)
    return entry is not None and entry.spectrum


def stored_by(record: UnitRecord) -> set[str]:
    """The arrays that a unit's record says are in the store."""
    unit, plan, stage = record.unit, record.plan, record.stage
    found: set[str] = set()
    if not plan.works:
        return found
    entry = SOLVERS[plan.solver]
    if unit.kind is Kind.MATRIX and unit.k and (stage is not Stage.DONE or record.kept):
        found |= {name for made, names in entry.arrays.items() if not stage.before(made) for name in names}
        found -= set() if plan.stored else {"matrix"}
    if stage is Stage.DONE and entry.spectrum:
        found |= {"eigenvalues", *entry.results} if record.values_kept else set(HISTOGRAM)
    return found
