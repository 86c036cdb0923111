"""Bytes, flops and seconds of every unit before any work, in integers; picks the solver and the chunk.

Four quantities, always in bytes, for the host and for the device: *allowed* (what the user gave), *reserved* (what is
held before any unit: interpreters and libraries, or the CUDA context; measured), *projected* (what a unit will hold at
its fullest stage, on top of that; computed here) and *measured* (the peak that was seen).

The ladder, from the top: `cuda-dense`, `host-dense`, `divide`. Each solver (see `stiffcore.solvers`) says what it would
take, and why it is passed over. `extremes` answers less, and is taken only where it is asked for.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from stiffcore.errors import InputError
from stiffcore.memory import default_allowed_bytes
from stiffcore.record import UnitPlan
from stiffcore.solvers import LADDER, SOLVERS
from stiffcore.solvers.extremes import WHOLE_SPECTRUM
from stiffcore.solvers.projection import Machine, too_small
from stiffcore.study import FAILED, Device, Keep, Kind, Solver, Study, Unit, format_bytes

# What a unit takes besides its arithmetic: to open, trace and check it, and its certificate. 24 spectra of ResNet50 by
# `extremes`, estimated at 1.8 min without it, took 4.0 min (two cores of an AMD EPYC, one of them busy).
UNIT_SECONDS = 3.0


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Attributes:
        units: cheap first.
        allowed_bytes: the budget for all processes together; for each worker, where they are `separate`.
        reserved_bytes: held before any unit, by the parent and the first worker; by a worker, where `separate`.
        worker_bytes: held by each further worker.
        device_allowed_bytes: the budget of each CUDA device; 0 where none is used.
        device_reserved_bytes: held on it before any unit.
        workers: how many units may run side by side.
        gpus: how many of them on a CUDA device each.
        separate: whether the workers are those of a cluster that is not ours, so that they share no budget.
        threads: of each unit's arithmetic.
        disk_bytes: most bytes that the run adds to the store.
    """

    units: tuple[UnitPlan, ...]
    allowed_bytes: int
    reserved_bytes: int
    worker_bytes: int
    device_allowed_bytes: int
    device_reserved_bytes: int
    workers: int
    gpus: int
    separate: bool
    threads: int
    disk_bytes: int

    @property
    def data_bytes(self) -> int:
        """What all units that run side by side may hold together; each of them, where the workers are separate."""
        shared = 0 if self.separate else (self.workers - 1) * self.worker_bytes
        return self.allowed_bytes - self.reserved_bytes - shared

    def holds(self, unit: UnitPlan, running: Iterable[UnitPlan]) -> bool:
        """Whether a unit may begin beside those that run."""
        beside = list(running)
        if len(beside) >= self.workers or (beside and any(p.spread > 1 for p in (unit, *beside))):
            return False
        if unit.device_bytes and sum(p.device_bytes > 0 for p in beside) >= self.gpus:
            return False
        held = 0 if self.separate else sum(p.projected_bytes for p in beside)
        return held + unit.projected_bytes <= self.data_bytes

    @property
    def seconds(self) -> float:
        """Estimate for the whole run: the work spread evenly, but never less than the longest unit."""
        each = [u.seconds + UNIT_SECONDS for u in self.units if u.works]
        return max(sum(each) / self.workers, max(each, default=0.0))

    @property
    def refused(self) -> list[UnitPlan]:
        """The units that the budget does not hold."""
        return [u for u in self.units if u.refused]


def make_plan(
    units: Iterable[Unit],
    study: Study,
    machine: Machine,
    *,
    workers: int | None = None,
    recorded: Mapping[str, UnitPlan] | None = None,
    inputs_bytes: int = 0,
) -> Plan:
    """Plan all units: each one's solver, chunk and bytes, and how many run side by side.

    A unit starts when `Plan.holds` says that it fits beside those that run.

    Args:
        units: the facts.
        study: for the budgets, the dtype, the rung asked for and what is kept.
        machine: what there is.
        workers: at most so many; None: one a core. Never more than there are units, nor than memory allows. A unit
            that is divided is shared by all that are asked for, or that a cluster has: on one machine, one worker with
            all threads holds wider blocks.
        recorded: by key, earlier plans, which stay where they fit: a chunk's width can decide a result's last bits.
        inputs_bytes: of the images that are to be stored.
    """
    units = list(units)
    allowed = study.memory or machine.free_bytes or default_allowed_bytes()
    device = machine.device_bytes
    if device is not None and study.device_memory is not None:
        device = min(device, max(0, study.device_memory - machine.device_reserved_bytes))
    machine = replace(machine, device_bytes=device)
    single = allowed - machine.reserved_bytes
    most = workers or machine.separate or 1
    while True:
        machine = replace(machine, spread=min(most, machine.separate or most))
        plans = [_plan_unit(u, study, machine, single, (recorded or {}).get(u.key)) for u in units]
        plans.sort(key=lambda p: (p.works, p.seconds))
        busy = [p for p in plans if p.works]
        count = _workers(busy, machine, single, workers or machine.cores)
        if machine.separate or machine.spread <= count:
            break
        most = count  # the memory of so many workers is another unit's
    if machine.separate is None:
        threads = max(1, min(machine.cores // count, machine.most_threads or machine.cores))
    else:
        count, threads = max(1, min(machine.separate, workers or machine.separate)), max(1, machine.cores)
    return Plan(
        units=tuple(plans),
        allowed_bytes=allowed,
        reserved_bytes=machine.reserved_bytes,
        worker_bytes=machine.worker_bytes,
        device_allowed_bytes=0 if device is None else device + machine.device_reserved_bytes,
        device_reserved_bytes=machine.device_reserved_bytes,
        workers=count,
        gpus=machine.gpus if device is not None else 0,
        separate=machine.separate is not None,
        threads=threads,
        disk_bytes=inputs_bytes + _grown_bytes(plans, count, {}),
    )


def plan_below(plan: UnitPlan, study: Study, machine: Machine, data_bytes: int, why: str) -> UnitPlan:
    """A unit's plan once more, where its rung failed: the rungs below it, with the matrix as it is stored.

    Args:
        plan: what failed.
        study: as for `make_plan`.
        machine: as for `make_plan`.
        data_bytes: what a unit may hold.
        why: it failed.
    """
    if plan.solver is Solver.EXTREMES or (plan.solver is Solver.DIVIDE and plan.device_bytes):
        below: Sequence[Solver] = (plan.solver,)  # the same, without the device
        machine = replace(machine, device_bytes=None)
    else:
        below = LADDER[LADDER.index(plan.solver) + 1 :] if study.solver is None else ()
    found = _first_that_fits(plan.unit, study, machine, data_bytes, below, (plan.chunk, plan.shard))
    return replace(found, why="; ".join(filter(None, [f"{plan.solver}: {why}", found.why])))


def _workers(busy: Sequence[UnitPlan], machine: Machine, single: int, most: int) -> int:
    """As many as asked for, unless that would leave the largest unit no room."""
    largest = max((p.projected_bytes for p in busy), default=0)
    count = max(1, min(most, max(len(busy), *(p.spread for p in busy), 1)))
    while count > 1 and single - (count - 1) * machine.worker_bytes < largest:
        count -= 1
    return count


def _plan_unit(
    unit: Unit, study: Study, machine: Machine, data_bytes: int, recorded: UnitPlan | None = None
) -> UnitPlan:
    if unit.route in ("none", FAILED):
        return UnitPlan(unit, Solver.NONE, unit.reason)
    asked: tuple[Solver, ...] = LADDER if study.solver is None else (study.solver,)
    if unit.kind is Kind.TENSOR_SLICES:
        asked = (Solver.SLICES,)
    if unit.kind is Kind.MATRIX and unit.components:
        asked = (Solver.COMPONENTS,)
    if unit.kind is Kind.SINGULAR:
        able: tuple[Solver, ...] = (
            *([] if unit.route == "factors" else [Solver.SVD]),
            Solver.SYMMETRIC,
            Solver.DIVIDE,
        )
        asked = (study.solver,) if study.solver in able else able
    if recorded is None or recorded.solver is Solver.NONE:
        return _first_that_fits(unit, study, machine, data_bytes, asked)
    device_gone = recorded.device_bytes and (machine.device_bytes is None or study.device is Device.CPU)
    stored = None if recorded.matrix_free else (recorded.chunk, recorded.shard)
    # what was asked for as `extremes` may be the whole spectrum
    as_asked = recorded.solver in asked or (Solver.EXTREMES in asked and recorded.why == WHOLE_SPECTRUM)
    if not as_asked or device_gone:
        return _first_that_fits(unit, study, machine, data_bytes, asked, stored)
    keeps = recorded.stored or study.keep is not Keep.ALL
    if recorded.projected_bytes <= data_bytes and not recorded.matrix_free and keeps:
        return recorded
    if Solver.EXTREMES in asked:  # with less room for factors
        return _first_that_fits(unit, study, machine, data_bytes, asked, stored)
    why = too_small(recorded.solver, unit, recorded.stages or {}, machine, data_bytes)
    return replace(recorded, solver=Solver.NONE, refused=True, why=why)


def _first_that_fits(
    unit: Unit,
    study: Study,
    machine: Machine,
    data_bytes: int,
    rungs: Sequence[Solver],
    stored: tuple[int, int] | None = None,
) -> UnitPlan:
    """The first rung that fits, with what passed over those above it; else the last one, refused.

    Args:
        unit: the facts.
        study: as for `make_plan`.
        machine: as for `make_plan`.
        data_bytes: what a unit may hold.
        rungs: to try.
        stored: chunk and shard of a matrix that is begun already.
    """
    passed: list[str] = []
    found = UnitPlan(unit, Solver.NONE, "no rung is left", refused=True)
    for rung in rungs:
        found, why_not = SOLVERS[rung].project(unit, study, machine, data_bytes, stored)
        if not why_not:
            return replace(found, why="; ".join([*passed, found.why]))
        passed.append(why_not)
    return replace(found, solver=Solver.NONE, refused=True, why="; ".join(passed) or found.why, seconds=0.0)


def _grown_bytes(units: Iterable[UnitPlan], side_by_side: int, there: Mapping[str, int]) -> int:
    """Most bytes that the store grows by: what all units keep, and what those side by side need on the way.

    Of each, what is there already counts.
    """
    kept, on_the_way = 0, []
    for plan in units:
        stored = there.get(plan.unit.key, 0)
        more = max(0, plan.kept_bytes - stored)
        kept += more
        on_the_way.append(max(0, plan.disk_bytes - stored) - more)
    return kept + sum(sorted(on_the_way, reverse=True)[:side_by_side])


def check_disk(plan: Plan, free_bytes: int | None, there: Mapping[str, int] | None = None) -> None:
    """Refuse a run whose store would fill the disk.

    Args:
        plan: of what is to be done.
        free_bytes: where the store lies; None: unknown.
        there: by unit, bytes that are stored of it already.

    Raises:
        InputError: with what is needed and what is free.
    """
    saved = _grown_bytes(plan.units, plan.workers, {}) - _grown_bytes(plan.units, plan.workers, there or {})
    needed = plan.disk_bytes - saved
    if free_bytes is not None and needed > free_bytes:
        beside = f" beside the {format_bytes(saved)} that are stored already" if saved else ""
        raise InputError(
            f"the run needs up to {format_bytes(needed)} of disk while it works{beside}, "
            f"{format_bytes(free_bytes)} is free there: choose another place, or fewer --blocks"
        )


def check_budget(plan: Plan) -> None:
    """Refuse a run with units that the budget does not hold.

    Raises:
        InputError: naming each block once, with what would be enough.
    """
    # the largest of a block's units speaks for it: what is enough for that is enough for all
    lines = {u.unit.block: u.why for u in sorted(plan.refused, key=lambda u: u.projected_bytes)}
    if lines:
        head = "the budget is too small" if any("--memory" in why for why in lines.values()) else "no solver fits"
        less = "\nS, and a proof of how many are negative, need less: --solver extremes"
        hint = less if any(str(Solver.HOST_DENSE) in why for why in lines.values()) else ""
        raise InputError(f"{head}:\n" + "\n".join(f"  - {why}" for why in lines.values()) + hint)
