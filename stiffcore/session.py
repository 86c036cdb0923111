"""A session of a run: it is begun or continued, planned for this machine, and carried out under its budget."""

import json
import os
import time
import timeit
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import psutil
from threadpoolctl import threadpool_limits

from stiffcore.asked import existing, refuse_no_run
from stiffcore.cluster import DEATHS, ConnectionLostError, Executor, Worker, WorkerDiedError, spread
from stiffcore.errors import (
    BusyError,
    DamagedError,
    DeviceFullError,
    InputError,
    StiffcoreError,
    refuse,
    writing_store,
)
from stiffcore.memory import PeakMeter, default_allowed_bytes, release_free_memory, tree_bytes
from stiffcore.plan import Plan, check_budget, check_disk, make_plan, plan_below
from stiffcore.record import Begun, Ended, Event, Failed, FellBack, Header, Restarted, Stage, UnitPlan, UnitRecord
from stiffcore.run import DONE, IMAGE_ARRAYS, Run, state_of
from stiffcore.solvers.projection import Machine
from stiffcore.store import (
    DIVISION,
    HISTOGRAM,
    IMAGES,
    PIXELS,
    SCRATCH,
    RunStore,
    StoreError,
    images_chunk_bytes,
    lease,
    same_images,
    stored_spectrum,
    write_images,
)
from stiffcore.study import (
    FAILED,
    IN_MEMORY,
    Device,
    Keep,
    Solver,
    Study,
    Survey,
    Unit,
    fingerprint,
    image_bytes,
    image_digest,
    merged,
    versions,
)
from stiffcore.trust import check_code, trusted_network, without_downloads

OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class Outcome:
    """How carrying out a run ended.

    Attributes:
        done: units with a spectrum, those of earlier sessions too.
        failed: reasons by unit.
        wall_s: seconds of this session.
        peak_bytes: most memory seen in the process tree, see `tree_bytes`.
        worker_peak_bytes: most that a worker of a cluster that is not ours held; 0 without one.
    """

    done: int
    failed: dict[str, str]
    wall_s: float
    peak_bytes: int
    worker_peak_bytes: int = 0


@dataclass(frozen=True)
class Prepared:
    """A study ready to be carried out: its plan, and what the store will begin with.

    Attributes:
        study: settled.
        plan: of the units that are not done, for this machine.
        machine: what the plan counts on.
        survey: None where the run exists and continues as first asked.
        damaged: of the run that exists: what is wrong with records of units, by key, and with its images (`IMAGES`);
            these are written again.
        unreadable: what is wrong with the arrays of units that were done, by key; these are computed again.
        images: `Images`, where they are in memory.
        left_out: see `Survey`.
    """

    study: Study
    plan: Plan
    machine: Machine
    survey: Survey | None
    damaged: Mapping[str, str]
    unreadable: Mapping[str, str]
    images: Any = None
    left_out: Mapping[str, str] = field(default_factory=dict)


def prepare(
    url: str,
    options: Mapping[str, Any],
    executor: Executor,
    module: Any = None,
    images: Any = None,
    *,
    workers: int | None = None,
    suppose: bool = False,
    trust: bool = False,
) -> Prepared:
    """Look at a study before any work; writes nothing.

    Args:
        url: of the run, which may exist.
        options: fields of `Study`; None means not given.
        executor: where the look is taken.
        module: the network, where it is in memory.
        images: `Images`, where they are in memory.
        workers: at most so many processes; None: one a core.
        suppose: plan for a CUDA device of `device_memory` bytes where there is none.
        trust: whether the run, where it exists, may have code imported and images fetched, see `stiffcore.trust`.

    Raises:
        InputError: whatever is wrong with the request, or disagrees with what the run began with.
        UntrustedError: where the run names code that would be imported, without `trust` or the same network given.
        NoRunError: where there is none, and no network is given.
    """
    store = existing(url)
    header = store.header if store else None
    units, damaged = _trusted(store) if store else ({}, {})
    # what could not be had is looked at again: the block, or what it needs, may have changed
    damaged = {key: r.unit.reason for key, r in units.items() if r.unit.route == FAILED} | damaged
    given = {name: value for name, value in options.items() if value is not None}
    begun = header.study if header else None
    study = without_downloads(begun, trust=trust).with_options(given) if begun else Study.ask(given)
    # a network that is given is the user's own word; a study of none that exists is all of it
    trusted = trusted_network(begun, trust=trust, given=given) if begun else study.network
    refuse_no_run(url, exists=header is not None, given=given)
    found: Survey | None = None
    if not header or damaged or given.keys() - {"memory", "keep", "solver", "device_memory"}:
        check_code(study, given.get("network", trusted), url)
        others = given.keys() & {"images", "index", "count", "per_label", "data_root", "download"}
        has_them = header is not None and IMAGES not in damaged and not others and study.images != IN_MEMORY
        stored = str(store.local or store.url) if store and has_them else None  # for workers in any folder
        found = _surveyed(executor, study, module, images, workers, stored)
        if header:
            _check_same(asdict(header.identity), asdict(found.identity), url)
        study = found.study
        facts = list(found.units)
        _refuse_all_failed(found)
    else:
        facts = [record.unit for record in units.values()]
    chunk_bytes = images_chunk_bytes(store) if store and header and IMAGES not in damaged else 0
    facts = [_with_image(unit, chunk_bytes) for unit in facts]
    unreadable = _unreadable(store, units) if store else {}
    ended = {key for key, record in units.items() if _ended(record, study.solver)} - unreadable.keys()
    kept = {key for key, record in units.items() if record.begun or not given.keys() & {"device", "solver"}}
    recorded = {u.key: _counted(units[u.key].plan, u) for u in facts if u.key in kept}
    pending = [u for u in facts if u.key not in ended]
    processes = executor.workers()
    machine = _machine(executor, processes, study, workers, suppose=suppose)
    # this process carries out one unit at a time
    most = workers if processes else 1
    inputs = found.pixel_bytes if found and (not header or IMAGES in damaged) else 0
    plan = make_plan(pending, study, machine, workers=most, recorded=recorded, inputs_bytes=inputs)
    if any(p.works for p in plan.units):
        check_code(study, trusted, url)
    left_out = found.left_out if found else header.left_out if header else {}
    return Prepared(study, plan, machine, found, damaged, unreadable, images, left_out)


def _refuse_all_failed(found: Survey) -> None:
    """Refuse a study none of whose blocks can be had, before anything is written."""
    reasons = {unit.block: unit.reason for unit in found.units if unit.route == FAILED}
    if all(unit.route == FAILED for unit in found.units):
        refuse(reasons.values(), "no block can be analysed:")


def _with_image(unit: Unit, chunk_bytes: int) -> Unit:
    """The facts with what its image takes as it is stored: an earlier version wrote all images in one chunk."""
    return unit.model_copy(update={"image_bytes": max(unit.image_bytes, image_bytes(chunk_bytes, 0))})


def _counted(plan: UnitPlan, unit: Unit) -> UnitPlan:
    """A recorded plan with what its image takes, where the version that made it did not count that."""
    more = unit.image_bytes - plan.unit.image_bytes
    plan = replace(plan, unit=unit)
    stages = dict(plan.stages or {})
    if more <= 0 or "open" not in stages:
        return plan
    return replace(plan, stages={**stages, "open": stages["open"] + more})


def _trusted(store: RunStore) -> tuple[dict[str, UnitRecord], dict[str, str]]:
    """The records that can be trusted, and what is wrong with the others, and with the images."""
    units, damaged = store.whole_units()
    parts = [part for part in store.read_again(IMAGES, IMAGE_ARRAYS) if part.problem]
    for part in parts:
        if part.unread:  # and may be whole: nothing is made in its place
            raise StoreError(part.problem)
    problems = [f"{part.path}: {part.problem}" for part in parts]
    if not problems and not same_images(store, store.settled().identity.images):
        problems = [f"{IMAGES}/{PIXELS}: not the images that the run began with"]
    return units, damaged | ({IMAGES: problems[0]} if problems else {})


def _unreadable(store: RunStore, units: Mapping[str, UnitRecord]) -> dict[str, str]:
    """What is wrong with units that are done, by key: found now, or by `stiffcore verify`."""
    found = {}
    for key, record in units.items():
        if record.stage is not Stage.DONE or not record.plan.works:
            continue
        damaged = {*SCRATCH, "eigenvalues", *HISTOGRAM} & set(record.damaged)
        if damaged:
            found[key] = f"{', '.join(sorted(damaged))}: damaged"
            continue
        try:
            if record.plan.solver is not Solver.MATRIX_ONLY:
                stored_spectrum(store, key)
            for name in () if record.values_kept else HISTOGRAM:
                store.get_array(f"units/{key}", name)
        except DamagedError as error:
            found[key] = str(error)
    return found


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], url: str) -> None:
    differing = [name for name in before if before[name] != now.get(name)]
    if differing:
        shown = "\n".join(f"  - {n}: {_short(before[n])} in the run, {_short(now.get(n))} asked for" for n in differing)
        raise InputError(f"{url} was made by other settings:\n{shown}\nGive a new RUN, or leave these options out.")


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)) and len(json.dumps(value)) > 60:
        return f"{len(value)} of them (digest {fingerprint({'': value})[:12]})"
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


# Seconds between two looks at whether the session still holds the run.
HELD_S = 5.0
# Images that are worth another worker to look at them.
IMAGES_A_LOOK = 8
# What a look takes beside what its worker holds already: the network in float64, its checkpoint, and an image's graphs.
LOOK_BYTES = 400 << 20


def _surveyed(
    executor: Executor, study: Study, module: Any, images: Any, workers: int | None, stored: str | None
) -> Survey:
    """Look at network and images: in one worker, or where there are many images in as many as will work on them.

    Of images in memory, each gets its own; those of the run `stored` are read there.
    """
    asked = len(images) if images is not None else study.count or len(study.index or ()) or 10 * (study.per_label or 0)
    parts = min(_lookers(executor, study, workers), asked // IMAGES_A_LOOK)
    if parts <= 1:
        return executor.submit(_survey, study, module, images, stored, 0, 1).result()
    executor.scale(parts)
    shares = [None if images is None else images.every(part, parts) for part in range(parts)]
    looks = [executor.submit(_survey, study, module, share, stored, part, parts) for part, share in enumerate(shares)]
    return merged([look.result() for look in looks])


def _lookers(executor: Executor, study: Study, workers: int | None) -> int:
    """As many workers as may look at the same time, of those that the budget holds."""
    there = executor.workers()
    if not there or executor.separate:
        return min(workers or len(there), len(there))
    room = (study.memory or default_allowed_bytes()) - tree_bytes() + there[0].reserved_bytes
    return min(workers or len(psutil.Process().cpu_affinity()), room // (there[0].reserved_bytes + LOOK_BYTES))


def _survey(study: Study, module: Any, images: Any, stored: str | None, part: int, parts: int, emit: OnEvent) -> Survey:
    from stiffcore.survey import stored_images, survey

    images = stored_images(stored, study) if stored else images
    found = survey(study, module, images, part, parts)
    release_free_memory(cycles=True)  # what this process holds from here on is reserved
    return found


def _machine(
    executor: Executor, found: Sequence[Worker], study: Study, workers: int | None, *, suppose: bool
) -> Machine:
    gpus = sum(w.gpu for w in found)
    device = None
    if not executor.separate or gpus:
        supposed = study.device_memory if suppose else None
        device = executor.submit(_device, study.device, supposed, gpu=bool(gpus)).result()
    elif study.device is Device.CUDA:
        raise InputError("--device cuda: no worker of the cluster declares a GPU: start one with `--resources GPU=1`")
    rate = executor.submit(_product_rate).result()
    common = {
        "device_bytes": device and device[0],
        "device_reserved_bytes": device[1] if device else 0,
        "flops_per_s": rate,
    }
    if executor.separate:
        on_host = Counter(w.host for w in found)
        return Machine(
            cores=min(w.threads for w in found),
            reserved_bytes=max(w.reserved_bytes for w in found),
            worker_bytes=0,
            gpus=gpus,
            free_bytes=min(w.free_bytes // on_host[w.host] + w.reserved_bytes for w in found),
            separate=len(found),
            **common,
        )
    cores, threads = len(psutil.Process().cpu_affinity()), os.environ.get("OMP_NUM_THREADS", "")
    return Machine(
        most_threads=int(threads) if threads.isdecimal() and int(threads) else None,
        cores=min(cores, workers or cores),
        reserved_bytes=tree_bytes() - sum(w.reserved_bytes for w in found[1:]),
        worker_bytes=max((w.reserved_bytes for w in found), default=0),
        **common,
    )


def _device(device: Device, supposed: int | None, emit: OnEvent) -> tuple[int, int] | None:
    from stiffcore.survey import device_memory

    return device_memory(device, supposed)


def _product_rate(emit: OnEvent) -> float:
    order = 512
    a = np.random.default_rng(0).standard_normal((order, order))
    with threadpool_limits(1):
        # the best of a few: the first makes BLAS ready, and others of the machine may be busy
        return 2 * order**3 / min(timeit.repeat(lambda: a @ a, number=1, repeat=6))


def carry_out_plan(
    url: str, prepared: Prepared, executor: Executor, on_event: OnEvent, module: Any = None
) -> tuple[Run, Outcome]:
    """Create the run or open it, and bring every unit to its end.

    Args:
        url: of the run.
        prepared: from `prepare`.
        executor: where units are worked on.
        on_event: told when units begin and end, in this thread; the units' own events come through the executor.
        module: the network, where it is in memory.

    Returns:
        The run, and how it ended. A unit that fails is recorded as failed, and the others go on.

    Raises:
        InputError: where budget or disk do not hold the plan.
        BusyError: where another process holds the run.
        StiffcoreError: where the store cannot be written.
    """
    check_budget(prepared.plan)
    with writing_store():
        return _carry_out_plan(RunStore(url, create=True), prepared, executor, on_event, module)


def _carry_out_plan(
    store: RunStore, prepared: Prepared, executor: Executor, on_event: OnEvent, module: Any
) -> tuple[Run, Outcome]:
    with store.hold(leased=executor.separate) as token, PeakMeter() as meter:
        start = time.perf_counter()
        store.sweep()
        there = {plan.unit.key: store.stored_bytes(plan.unit.key) for plan in prepared.plan.units}
        check_disk(prepared.plan, store.free_bytes(), there)
        for key, why in {**prepared.damaged, **prepared.unreadable}.items():
            note = f"{why}: {'read' if key == IMAGES else 'computed'} again"
            on_event(Restarted(key, note))
        try:
            _write_beginning(store, prepared, executor, token)
            executor.pass_over(_sees, str(store.local or store.url), token)
            executor.scale(prepared.plan.workers, prepared.plan.data_bytes)
            missed = {p.unit.key: p.why for p in prepared.plan.units if p.unit.route == FAILED}
            failed = missed | _work(store, prepared, executor, on_event, module, token)
        except BaseException:
            executor.stop()  # while the run is held: nobody else may begin as long as a worker of ours writes
            raise
        run = Run(RunStore(store.url))
        done = sum(state_of(r) in DONE for r in run.records().values())
        return run, Outcome(done, failed, time.perf_counter() - start, meter.peak_bytes, executor.peak_bytes)


def _write_beginning(store: RunStore, prepared: Prepared, executor: Executor, token: str) -> None:
    """Inputs, then units, then the header, which makes it a run; of one that exists, only what may change."""
    study, found = prepared.study, prepared.survey
    if store.header is not None:
        # another process may have begun or changed the run since it was looked at
        if found is not None:
            _check_same(asdict(store.header.identity), asdict(found.identity), store.url)
        else:
            _check_same(_settings(store.header.study), _settings(study), store.url)
        if store.whole_units()[1].keys() - prepared.damaged.keys():
            raise DamagedError(f"{store.url} was damaged while it was being opened: run again")
        if found is not None and IMAGES in prepared.damaged:
            _write_images(store, prepared, executor, token)
        for plan in prepared.plan.units:
            if plan.unit.key in prepared.damaged:
                store.clear(f"units/{plan.unit.key}")
                store.put_record(plan.unit.key, UnitRecord(plan, Stage.PLANNED))
        store.header = replace(store.header, study=study)
        return
    if found is None:
        raise StiffcoreError(f"{store.url} was emptied while it was being opened")
    _write_images(store, prepared, executor, token)
    for plan in prepared.plan.units:
        store.put_record(plan.unit.key, UnitRecord(plan, Stage.PLANNED))
    store.header = Header(
        version=versions()["stiffcore"],
        study=study,
        identity=found.identity,
        description=found.description,
        source=found.source,
        left_out=dict(found.left_out),
        versions=versions(),
        threads=prepared.plan.threads,
        units=tuple(plan.unit.key for plan in prepared.plan.units),
    )


def _write_images(store: RunStore, prepared: Prepared, executor: Executor, token: str) -> None:
    """Store the images: a worker reads them from their source again, one at a time; those in memory are here."""
    found = prepared.survey
    assert found is not None
    store.clear(IMAGES)
    digests = found.identity.images
    if prepared.images is not None:
        write_images(store, prepared.images, len(digests))
    else:
        where = str(store.local or store.url)
        executor.submit(_store_images, where, found.study, digests, token).result()
    for name, values in found.images.items():
        store.put_array(IMAGES, name, values, ("image",))


def _store_images(url: str, study: Study, digests: Sequence[str], token: str, emit: OnEvent) -> None:
    from stiffcore.survey import open_images

    store = RunStore(url, create=True)  # it was begun, and has no header yet

    def unchanged() -> Iterator[np.ndarray]:
        images, checked = open_images(study), 0.0
        for i, (image, digest) in enumerate(zip(images, digests, strict=True)):
            if image_digest(image) != digest:
                raise InputError(
                    f"image {images.index[i]} of {images.source} changed while it was looked at: run again"
                )
            if time.monotonic() > checked + HELD_S:  # a session that is over writes nothing more
                store.check_held(token)
                checked = time.monotonic()
            yield image

    write_images(store, unchanged(), len(digests))
    release_free_memory(cycles=True)


def _settings(study: Study) -> dict[str, Any]:
    """Of a study, what a process that continues it without looking again must agree with."""
    names = ("network", "normalize", "pool", "blocks", "functions", "kinds", "dtype", "reduce")
    return study.model_dump(mode="json", include=set(names))


def _work(
    store: RunStore, prepared: Prepared, executor: Executor, on_event: OnEvent, module: Any, token: str
) -> dict[str, str]:
    records = store.units()
    threads = store.settled().threads
    again = prepared.unreadable.keys()
    pending = [
        p for p in prepared.plan.units if p.works and (p.unit.key in again or not _ended(records[p.unit.key], p.solver))
    ]
    begun = {plan.unit.key for plan in pending}
    for key, record in records.items():
        _settle(store, key, record, prepared.study, again=key in again, begun=key in begun)
    where = str(store.local or store.url)  # a worker elsewhere has another current folder
    running: dict[Future, UnitPlan] = {}
    failed: dict[str, str] = {}
    deaths: Counter[str] = Counter()

    while pending or running:
        for plan in list(pending):
            if prepared.plan.holds(plan, running.values()) or not running:
                key = plan.unit.key
                pending.remove(plan)
                if plan.works:
                    _record_plan(store, store.record(key), plan)
                on_event(Begun(key))
                if records[key].failure:
                    store.update(key, failure=None)
                gpu = plan.device_bytes > 0
                unit = (where, key, threads, module, prepared.study.network, (token, executor.separate))
                running[executor.submit(_carry_out, *unit, gpu=gpu)] = plan
        # a time-out, so that signals are seen while a long solve goes on
        finished, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
        for future in finished:
            plan = running.pop(future)
            key, error = plan.unit.key, future.exception()
            if isinstance(error, WorkerDiedError) and deaths[key] < DEATHS:
                deaths[key] += 1
                on_event(Restarted(key, "its worker died: another one goes on from what is stored"))
                pending.insert(0, plan)
                continue
            if isinstance(error, DamagedError) and deaths[key] < DEATHS:
                deaths[key] += 1
                on_event(Restarted(key, f"{error}: made anew"))  # it was deleted where it was found
                pending.insert(0, plan)
                continue
            if isinstance(error, DeviceFullError):
                below = plan_below(plan, prepared.study, prepared.machine, prepared.plan.data_bytes, str(error))
                if below.works:
                    on_event(FellBack(key, f"{error}: {below.solver} takes it"))
                    _record_plan(store, store.record(key), below)
                    pending.insert(0, below)
                    continue
                failed[key] = below.why
            elif error is not None:
                failed[key] = _failure(error)
            if key in failed:
                store.update(key, failure=failed[key])
            on_event(Failed(key, failed[key]) if key in failed else Ended(key))
    return failed


def _ended(record: UnitRecord, solver: Solver | None) -> bool:
    """Whether there is nothing more to do; a matrix that was only stored, or solved at its ends, may yet be solved."""
    if record.stage is not Stage.DONE:
        return False
    less = {Solver.MATRIX_ONLY: (Solver.MATRIX_ONLY,), Solver.EXTREMES: (Solver.MATRIX_ONLY, Solver.EXTREMES)}
    found = record.plan.solver
    return found not in less or solver in less[found]


def _record_plan(store: RunStore, record: UnitRecord, plan: UnitPlan) -> None:
    """Record the plan of a unit; what another solver had begun goes back to the matrix, which all solvers share."""
    fields: dict[str, Any] = {"plan": plan}
    if record.begun:
        before = record.plan
        ways = {
            (p.solver, p.device_bytes > 0, p.factor_bytes, p.panel, p.at_once, p.leaf, p.matrix_free, p.stored)
            for p in (before, plan)
        }
        if len(ways) == 1:
            return
        if record.division:
            fields["division"] = None
            store.drop(plan.unit.key, DIVISION)
        if plan.stored and not before.stored:
            fields["stage"] = Stage.PLANNED
        if before.solver is not plan.solver and Stage.BUILT.before(record.stage):
            gone = not before.stored or (record.stage is Stage.DONE and not record.kept)
            fields["stage"] = Stage.PLANNED if gone else Stage.BUILT
            fields["seconds"] = {} if gone else {"built": record.seconds.get("built", 0.0)}
    store.update(plan.unit.key, **fields)


def _settle(store: RunStore, key: str, record: UnitRecord, study: Study, *, again: bool, begun: bool) -> None:
    """Of what is stored of a unit, delete what is damaged and not computed again, and what is not to be kept.

    Eigenvalues stay until others are written.
    """
    damaged = set(record.damaged)
    if again or (begun and damaged):
        store.update(key, stage=Stage.PLANNED, damaged=())
        store.drop(key, *SCRATCH)
    elif damaged:
        store.update(key, damaged=())
    store.drop(key, *damaged.difference(SCRATCH, HISTOGRAM, ["eigenvalues"]))  # pictures, which are taken on request
    spare = record.stage is Stage.DONE and not begun and record.plan.solver not in (Solver.NONE, Solver.MATRIX_ONLY)
    # matrices that were kept on request stay, whatever is asked of later units
    if spare and study.keep is not Keep.ALL and not record.kept:
        store.drop(key, *SCRATCH)


def _sees(url: str, token: str) -> None:
    """Whether this process has the run before it; a folder of that name on another disk is not the run."""
    RunStore(url).check_held(token)


def _carry_out(
    url: str, key: str, threads: int, module: Any, network: str, held: tuple[str, bool], emit: OnEvent
) -> str:
    from stiffcore.unit import carry_out, open_operator

    store = RunStore(url)
    check, opener = partial(store.check_held, held[0]), partial(open_operator, module=module, trusted=network)
    plan = store.record(key).plan
    from stiffcore.eigen.panels import one_by_one

    each = spread(threads, check, gpu=plan.device_bytes > 0) if plan.spread > 1 else one_by_one
    common: dict[str, Any] = {"threads": threads, "emit": emit, "opener": opener, "check": check, "each": each}
    return carry_out(url, key, **common, held=lease(url, *held))


def _failure(error: BaseException) -> str:
    """Why a unit failed; raises where the whole session ends with it."""
    if isinstance(error, (ConnectionLostError, BusyError, OSError)):
        raise error
    if isinstance(error, (StiffcoreError, MemoryError)):
        return str(error) or type(error).__name__
    return f"{type(error).__name__}: {error}"
