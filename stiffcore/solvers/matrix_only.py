"""The matrix, built and kept; no eigenvalue."""

from dataclasses import replace

from stiffcore.record import Stage, UnitPlan
from stiffcore.solvers.projection import Machine, SolverEntry, shared_costs
from stiffcore.study import Solver, Study, Unit


def project(
    unit: Unit, study: Study, machine: Machine, data_bytes: int, stored: tuple[int, int] | None
) -> tuple[UnitPlan, str]:
    """Build the matrix and keep it, whatever `keep` says. moved: the matrix, once."""
    base, matrix, _, why_not = shared_costs(Solver.MATRIX_ONLY, unit, study, machine, data_bytes, _no_stages, stored, 0)
    return replace(base, why="as asked", disk_bytes=matrix, kept_bytes=matrix, moved_bytes=matrix), why_not


def _no_stages(unit: Unit, column_bytes: int, itemsize: int, shard: int) -> dict[str, int]:
    return {}


SOLVER = SolverEntry(Solver.MATRIX_ONLY, project, arrays={Stage.BUILT: ("matrix",)}, spectrum=False)
