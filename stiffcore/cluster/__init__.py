"""Who does the work: this process, or worker processes under Dask. The one place that imports dask."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import psutil
from threadpoolctl import threadpool_limits

from stiffcore.ending import terminal_signals_blocked
from stiffcore.errors import InputError, StiffcoreError, refuse
from stiffcore.memory import default_allowed_bytes, keep_freed_pages, own_bytes, own_peak_bytes, release_free_memory
from stiffcore.record import Event, event_from_json, event_to_json
from stiffcore.version import __version__

if TYPE_CHECKING:
    from stiffcore.eigen.panels import Each, Panels, Work

CONNECT_S = 10
WORKERS_S = 30
# Of a cluster that is not ours: how often it is looked whether the workers that units wait for are there; and how long
# is waited for one, where none is left.
LOOK_S = 2.0
NONE_LEFT_S = 120.0
# A worker maps more of its libraries as it goes; these pages are shared and reserved already.
MAPPED_BYTES = 256 << 20
# There where an NVIDIA driver is loaded. A process that has asked for devices cannot use one after a fork, and the
# first trace asks: workers are started anew there, each with its own 0.4 GB of torch.
CUDA_DRIVER = "/dev/nvidiactl"
# For the process that workers are forked from: libraries that each allocate a pool of threads, unless told not to
# before they are imported; and Python's resource tracker, which warns of what a killed worker could not give back.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore::UserWarning:multiprocessing.resource_tracker",
}


class WorkerDiedError(StiffcoreError):
    """The process that worked on a unit is gone; what it had recorded stays."""


class ConnectionLostError(StiffcoreError):
    """The scheduler of the cluster is gone, or cannot be reached."""


class Executor(Protocol):
    """Runs functions of the form `function(*args, emit=...)`; `emit` takes an event.

    Attributes:
        separate: whether the workers belong to a cluster that is not ours: other machines, each with its own memory.
        dashboard: address of the cluster's dashboard; empty where there is none.
        peak_bytes: most memory that a worker of such a cluster was seen to hold.
    """

    separate: bool
    dashboard: str
    peak_bytes: int

    def submit(self, function: Callable[..., Any], *args: Any, gpu: bool = False) -> Future[Any]:
        """Start `function`, with `emit` added to its arguments; with `gpu` on a worker that has one."""

    def scale(self, workers: int, unit_bytes: int | None = None) -> None:
        """Have so many workers, and wait for them; one that holds `unit_bytes` more than it does now is ended."""

    def workers(self) -> list[Worker]:
        """The processes that do the work, this one not among them."""

    def pass_over(self, able: Callable[..., Any], *args: Any) -> None:
        """Give no unit to workers of other machines on which `able(*args)` raises, and say which and why."""

    def stop(self) -> None:
        """End what was submitted; our own workers at once, and wait until they are gone."""


@dataclass(frozen=True)
class Worker:
    """A process of a cluster.

    Attributes:
        host: where it runs.
        pid: its number there.
        threads: it may use.
        gpu: whether it declares a `GPU` resource.
        reserved_bytes: it holds before any unit.
        free_bytes: what may be used of its machine.
    """

    host: str
    pid: int
    threads: int
    gpu: bool
    reserved_bytes: int
    free_bytes: int


class InProcess:
    """Runs each function at once, in this process."""

    separate = False
    dashboard = ""
    peak_bytes = 0

    def __init__(self, on_event: Callable[[Event], None]) -> None:
        """Run here.

        Args:
            on_event: told of every event.
        """
        self._on_event = on_event
        keep_freed_pages()  # as in workers, and before the store's threads begin: later it does not hold for theirs

    def submit(self, function: Callable[..., Any], *args: Any, gpu: bool = False) -> Future[Any]:
        """Run `function` to its end; the future is done."""
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, emit=self._on_event))
        except Exception as error:
            future.set_exception(error)
        return future

    def scale(self, workers: int, unit_bytes: int | None = None) -> None:
        """Nothing to do: there is this process."""

    def workers(self) -> list[Worker]:
        """None."""
        return []

    def pass_over(self, able: Callable[..., Any], *args: Any) -> None:
        """Nothing to do: there is this process."""

    def stop(self) -> None:
        """Nothing to do: what was submitted is over."""


class DaskWorkers:
    """Runs functions on a Dask cluster: its scheduler places them, the run's own records say what is done.

    On this machine workers are forked from one server process that has imported torch once, so that its 0.4 GB is
    shared (where there is no CUDA driver), and die with this process. A worker of a cluster that is not ours carries
    out one unit at a time, whatever its number of threads.
    """

    def __init__(
        self, client: Any, on_event: Callable[[Event], None], *, separate: bool, tell: Callable[[str], None] = print
    ) -> None:
        """Run on a cluster.

        Args:
            client: of distributed.
            on_event: told of every event, from another thread.
            separate: whether the cluster is not ours.
            tell: told of workers that are not used.
        """
        self._client, self._tell = client, tell
        self._known: set[str] = set()  # by address, the workers that were looked at
        self._passed_over: set[str] = set()
        self._checks: list[tuple[Callable[..., Any], tuple]] = []
        self._looking, self._over = threading.Lock(), threading.Event()
        self.peak_bytes = 0
        self.separate = separate
        self.dashboard = ""
        with suppress(KeyError):  # a scheduler may serve none
            self.dashboard = client.dashboard_link or ""
        if not (separate or find_spec("bokeh")):
            # all but this table of workers and tasks is drawn by bokeh
            self.dashboard = self.dashboard.replace("/status", "/info/main/workers.html")
        # of this session only: a cluster may serve several
        self._topic = f"stiffcore-{uuid.uuid4().hex}"
        self._tasks: dict[Any, tuple[Future[Any], list[str] | None]] = {}
        client.subscribe_topic(self._topic, lambda told: on_event(event_from_json(told[1])))
        if separate:
            threading.Thread(target=self._attend, daemon=True, name="stiffcore-attend").start()

    def submit(self, function: Callable[..., Any], *args: Any, gpu: bool = False) -> Future[Any]:
        """Start `function` on a free worker.

        Raises:
            ConnectionLostError: where the cluster has none left that can be used.
        """
        done: Future[Any] = Future()
        able = self._awaited()
        parent = None if self.separate else os.getpid()
        resources = {"GPU": 1} if gpu and self.separate else None
        task = self._client.submit(
            _with_events,
            *(self._topic, parent, None if able is None else frozenset(able), function, args),
            pure=False,
            retries=0,
            resources=resources,
            workers=able,
            allow_other_workers=False,
        )
        self._tasks[task] = done, able

        def finish(finished: Any) -> None:
            if self._tasks.pop(finished, None) is None:
                return  # given up
            try:
                found, peak = finished.result()
                if self.separate:
                    self.peak_bytes = max(self.peak_bytes, peak)
                done.set_result(found)
            except Exception as error:
                done.set_exception(_readable(error))
            finished.release()

        task.add_done_callback(finish)
        return done

    def scale(self, workers: int, unit_bytes: int | None = None) -> None:
        """Have so many workers, and wait for them; a cluster that is not ours has what it has, and its own limits."""
        if self.separate:
            return
        cluster = self._client.cluster
        if unit_bytes is not None:
            self._client.wait_for_workers(1, timeout=120)
            resident = self._client.run(lambda: psutil.Process().memory_info().rss)
            limit = max(resident.values()) + unit_bytes + MAPPED_BYTES
            cluster.new_spec["options"]["memory_limit"] = limit
            for nanny in cluster.workers.values():
                nanny.memory_manager.memory_limit = limit
        cluster.scale(workers)
        self._client.wait_for_workers(workers, timeout=120)

    def workers(self) -> list[Worker]:
        """The workers there are now, as each sees itself."""
        able = self._able()
        found = self._client.run(_describe, workers=able) if able != [] else {}
        gpus = self._client.run_on_scheduler(_with_gpu)
        return [Worker(**facts, gpu=address in gpus) for address, facts in found.items()]

    def pass_over(self, able: Callable[..., Any], *args: Any) -> None:
        """Give no unit to workers of another cluster on which `able(*args)` raises, and say which and why.

        Raises:
            StiffcoreError: where none is left.
        """
        if not self.separate:
            return
        with self._looking:
            self._checks.append((able, args))
            there = set(self._client.nthreads()) - self._passed_over
            wrong = self._wrong(self._checks[-1:], there & self._known) | self._wrong(self._checks, there - self._known)
        lines = [f"the worker at {address} is not used: {error}" for address, error in wrong.items()]
        if wrong and len(wrong) == len(there):
            raise StiffcoreError("no worker of the cluster can be used:\n" + "\n".join(f"  - {line}" for line in lines))
        for line in lines:
            self._tell(line)

    def _wrong(
        self, checks: Sequence[tuple[Callable[..., Any], tuple]], addresses: set[str]
    ) -> dict[str, BaseException]:
        """Of some workers, those that cannot be used, and why."""
        wrong: dict[str, BaseException] = {}
        for able, args in checks:
            left = sorted(addresses - wrong.keys())
            found = self._client.run(able, *args, on_error="return", workers=left) if left else {}
            wrong |= {address: error for address, error in found.items() if isinstance(error, BaseException)}
        self._known |= addresses
        self._passed_over |= wrong.keys()
        return wrong

    def _able(self) -> list[str] | None:
        """The workers that units may go to, those that joined since looked at first; None: all."""
        if not self.separate:
            return None
        with self._looking:
            there = set(self._client.nthreads())
            for address, error in self._wrong(self._checks, there - self._known).items():
                self._tell(f"the worker at {address} is not used: {error}")
            return sorted(there - self._passed_over)

    def _awaited(self) -> list[str] | None:
        """As `_able`, once there is one."""
        end = time.monotonic() + NONE_LEFT_S
        while (able := self._able()) == []:
            if time.monotonic() > end:
                raise ConnectionLostError(
                    f"the cluster has had no worker that can be used for {NONE_LEFT_S:.0f} s: what is done is kept; "
                    "start some, then run again to continue"
                )
            time.sleep(LOOK_S / 4)
        return able

    def _attend(self) -> None:
        """Give up what waits for workers that are gone: its scheduler would keep it until they are there again."""
        while not self._over.wait(LOOK_S):
            with suppress(Exception):  # where the scheduler is gone, its client says so of each task
                there = set(self._client.nthreads())
                lost = [task for task, (_, able) in list(self._tasks.items()) if not there.intersection(able or there)]
                for task in lost:
                    given_up = self._tasks.pop(task, None)
                    if given_up is not None:
                        given_up[0].set_exception(_died())
                        task.cancel(force=True)

    def close(self) -> None:
        """Look no longer whether workers are there."""
        self._over.set()

    def stop(self) -> None:
        """End our own workers at once, and wait until they are gone; elsewhere, tasks end with their next step."""
        if self.separate:
            with suppress(Exception):  # the scheduler may be what is gone
                self._client.cancel(list(self._tasks), force=True)
            return
        workers = []
        for nanny in self._client.cluster.workers.values():
            nanny.auto_restart = False
            if nanny.pid:
                with suppress(psutil.NoSuchProcess):
                    workers.append(psutil.Process(nanny.pid))
        for process in workers:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(workers, timeout=10)


def _describe(dask_worker: Any) -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "threads": dask_worker.state.nthreads,
        "reserved_bytes": own_bytes(),
        "free_bytes": default_allowed_bytes(),
    }


def _with_gpu(dask_scheduler: Any) -> set[str]:
    return {address for address, w in dask_scheduler.workers.items() if w.resources.get("GPU", 0) >= 1}


# How often a unit whose worker died, or what it had stored is damaged, is begun again in one session; and blocks that
# workers share: memory may have been short for a moment, but what kills its worker each time must not do so for ever.
DEATHS = 2
# Of blocks that workers share: how often who waits for a panel looks; how often the worker that leads says that it is
# there, and after how long without that the others stop.
POLL_S = 0.02
RENEW_S = 1.0
SILENT_S = 60.0
_OVER = -1


class AbandonedError(StiffcoreError):
    """The others that work on a matrix have stopped: a block of it waits in vain."""


class Spread:
    """Carries out blocks of one unit's matrices on all workers of its cluster, an `Each` of `stiffcore.eigen.panels`.

    It leads from the worker that works on the unit; that one and every other one have a block at a time, in order, so
    that the first one under way never waits. What a block needs and what it makes is in the store. Where a worker
    dies, the blocks under way are given up, and those that are not written are begun again by the workers that are
    left. On a cluster that is not ours, a worker that joins has its part from the next unit on, once it was looked at.
    """

    def __init__(self, threads: int, check: Callable[[], None], *, gpu: bool = False) -> None:
        """Lead.

        Args:
            threads: of each block's arithmetic.
            check: raises where the unit may no longer be written to; asked every second.
            gpu: whether only workers that declare a `GPU` can have a block.
        """
        self._threads, self._check, self._gpu = threads, check, gpu

    def __call__(self, work: Work, blocks: Sequence[tuple[int, int]], finished: Callable[[int, int], None]) -> None:
        """As `stiffcore.eigen.panels.Each`.

        Raises:
            WorkerDiedError: where workers die again and again.
        """
        left = list(blocks)
        for _ in range(DEATHS + 1):
            left = self._begun(work, left, finished)
            if not left:
                return
        raise WorkerDiedError("workers that share a unit died again and again: what is written stays, run again")

    def _begun(
        self, work: Work, blocks: Sequence[tuple[int, int]], finished: Callable[[int, int], None]
    ) -> list[tuple[int, int]]:
        """Carry out blocks until all are, or a worker dies; those that are left."""
        from distributed import CancelledError, Variable, wait, worker_client
        from distributed.scheduler import KilledWorker

        left, died, beats = sorted(blocks), False, 0
        errors: dict[tuple[int, int], Exception] = {}
        running: dict[Any, tuple[str, tuple[int, int]]] = {}
        with worker_client() as client:
            lease = Variable(f"stiffcore-{uuid.uuid4().hex}", client)
            lease.set(beats)
            able = client.run_on_scheduler(_with_gpu) if self._gpu else client.nthreads()
            free, waiting = _sharing(able), list(left)
            try:
                while running or (waiting and not (errors or died)):
                    while free and waiting and not (errors or died):
                        worker, block = free.pop(0), waiting.pop(0)
                        task = client.submit(
                            _carry_out_block,
                            work,
                            block,
                            lease.name,
                            self._threads,
                            pure=False,
                            retries=0,
                            workers=[worker],
                            allow_other_workers=False,
                        )
                        running[task] = worker, block
                    with suppress(TimeoutError):
                        wait(list(running), timeout=RENEW_S, return_when="FIRST_COMPLETED")
                    self._check()
                    there = client.nthreads()
                    for task, (worker, block) in list(running.items()):
                        if task.done():
                            error = task.exception()
                        elif worker in there:
                            continue
                        else:  # elsewhere than on our own cluster, its task waits for it
                            error = WorkerDiedError(f"the worker at {worker} is gone")
                        del running[task]
                        task.release()
                        if error is None:
                            left.remove(block)
                            finished(*block)
                            free.append(worker)
                        elif isinstance(error, (KilledWorker, CancelledError, WorkerDiedError)):
                            died = True
                        elif not isinstance(error, AbandonedError):
                            errors[block] = error
                    beats = _OVER if errors or died else beats + 1
                    lease.set(beats)
            finally:
                lease.set(_OVER)
                lease.delete()
        if errors:  # the first block's: of what this depends on, nothing else was under way
            raise errors[min(errors)]
        return left


def spread(threads: int, check: Callable[[], None], *, gpu: bool = False) -> Each:
    """Who works on the blocks of a unit that is spread: all workers, where this process is one of a cluster's.

    With `gpu`, all that declare one.
    """
    from distributed import get_worker

    from stiffcore.eigen.panels import one_by_one

    try:
        get_worker()
    except ValueError:
        return one_by_one
    return Spread(threads, check, gpu=gpu)


def _carry_out_block(work: Work, block: tuple[int, int], lease: str, threads: int) -> None:
    """One block, in the process that has it."""
    from distributed import Variable

    led = Variable(lease)
    heard, beats = time.monotonic(), None

    def still_led() -> None:
        nonlocal heard, beats
        with suppress(TimeoutError):
            found = led.get(timeout=RENEW_S)
            if found == _OVER:
                raise AbandonedError("the blocks before this one are not carried out")
            if found != beats:
                heard, beats = time.monotonic(), found
        if time.monotonic() - heard > SILENT_S:
            raise AbandonedError("the worker that leads is silent")

    def ready(a: Panels, panel: int) -> None:
        asked = time.monotonic()
        while not a.has(panel):
            if time.monotonic() - asked > RENEW_S:
                still_led()
                asked = time.monotonic()
            time.sleep(POLL_S)

    with threadpool_limits(threads):
        work(*block, ready)
    release_free_memory()  # what leads counts on it


# One unit at a time in a process: its memory and threads are planned so.
_BUSY = threading.Lock()


class _Shared:
    """Who may have blocks of the unit under way, by address; None: all."""

    usable: frozenset[str] | None = None


def _sharing(there: Iterable[str]) -> list[str]:
    """The workers that are there and may have blocks. Nobody has looked at one that joined after the unit was begun."""
    return sorted(there if _Shared.usable is None else _Shared.usable.intersection(there))


def _with_events(
    topic: str, parent: int | None, usable: frozenset[str] | None, function: Callable[..., Any], args: tuple
) -> Any:
    from distributed import get_worker

    _Shared.usable = usable
    if parent is None:
        keep_freed_pages()  # as stiffcore.preload does for our own workers
    else:
        _die_with(parent)
    worker = get_worker()
    with _BUSY:
        found = function(*args, emit=lambda event: worker.log_event(topic, event_to_json(event)))
    return found, own_peak_bytes()


def _died() -> WorkerDiedError:
    return WorkerDiedError(
        "the worker died (beyond its budget, out of memory, or killed): what it had recorded stays, run again"
    )


def _readable(error: Exception) -> Exception:
    from distributed.comm import CommClosedError
    from distributed.scheduler import KilledWorker

    if isinstance(error, KilledWorker):
        return _died()
    if isinstance(error, (CancelledError, CommClosedError)):
        return ConnectionLostError(
            "the connection to Dask's scheduler is lost: what is done is kept; run again to continue"
        )
    return error


def tls_security(ca: str | None, cert: str | None, key: str | None) -> Any:
    """What a cluster that asks for a key is reached with, a `distributed.Security`; None where nothing is given.

    Then Dask's own configuration (`distributed.comm.tls`) decides.

    Args:
        ca: file of the certificate that the cluster's are signed with.
        cert: file of our own, signed by the same.
        key: file of its key; None where `cert` holds it.

    Raises:
        InputError: where one is missing, or is no such file.
    """
    given = {"--tls-ca": ca, "--tls-cert": cert, "--tls-key": key}
    if not any(given.values()):
        return None
    problems = [f"{name} is missing" for name in ("--tls-ca", "--tls-cert") if not given[name]]
    problems += [
        f"{name} {path}: there is no such file" for name, path in given.items() if path and not Path(path).is_file()
    ]
    refuse(problems, "the cluster cannot be reached with this:")
    from distributed import Security

    return Security(require_encryption=True, tls_ca_file=ca, tls_client_cert=cert, tls_client_key=key)


def _address(scheduler: str) -> str:
    """Where a scheduler listens, from what `--scheduler` may be."""
    if Path(scheduler).is_file():
        try:
            return str(json.loads(Path(scheduler).read_text())["address"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"--scheduler {scheduler} is no scheduler file of Dask's: {error}") from error
    if "://" not in scheduler and not re.fullmatch(r"[\w.-]+:\d+", scheduler):
        raise InputError(f"--scheduler {scheduler}: neither an address, as tcp://host:8786, nor a scheduler file")
    return scheduler


async def _identity(address: str, security: Any) -> dict[str, Any]:
    """What says of itself who listens there; Dask's client would wait for one that says nothing for ever."""
    from distributed.comm import connect

    comm = await connect(address, timeout=CONNECT_S, **security.get_connection_args("client"))
    try:
        await comm.write({"op": "identity", "reply": True})
        return await asyncio.wait_for(comm.read(), CONNECT_S)
    finally:
        comm.abort()


def _check_scheduler(scheduler: str, address: str, security: Any) -> None:
    """Refuse what cannot be reached, says nothing, or is no scheduler.

    Raises:
        InputError: where it is so.
    """
    from distributed import Security

    try:
        found = asyncio.run(asyncio.wait_for(_identity(address, security or Security()), 3 * CONNECT_S))
    except TypeError as error:  # of distributed, without a word to its user
        raise InputError(f"--scheduler {scheduler} cannot be reached without --tls-ca and --tls-cert") from error
    except TimeoutError as error:
        raise InputError(f"--scheduler {scheduler} cannot be reached: no answer of a scheduler in time") from error
    except (OSError, ValueError) as error:
        raise InputError(f"--scheduler {scheduler} cannot be reached: {error}") from error
    except MemoryError:  # the first bytes of another protocol, read as a length
        found = None
    if not isinstance(found, dict) or found.get("type") != "Scheduler":
        raise InputError(f"--scheduler {scheduler}: what listens there is no scheduler of Dask's")


# Run where stiffcore may not be installed, so that no function of it can be named: pickled by value.
_SAME_VERSION = """
def same_version(expected):
    try:
        from stiffcore.version import __version__
    except ImportError as error:
        raise RuntimeError(f"it has no stiffcore ({error})") from None
    if __version__ != expected:
        raise RuntimeError(f"it has stiffcore {__version__}, and here is {expected}")
"""


def _same_version() -> Callable[[str], None]:
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(_SAME_VERSION, names)
    return names["same_version"]


@contextmanager
def _quiet() -> Iterator[None]:
    """Dask's words about connections that are lost, below the one line that says so."""
    told = [name for name in logging.root.manager.loggerDict if name.startswith("distributed.")]  # some have levels
    loggers = [logging.getLogger(name) for name in ("distributed", "tornado", "asyncio", *told)]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextmanager
def workers_at(
    scheduler: str | None,
    on_event: Callable[[Event], None],
    *,
    security: Any = None,
    dashboard: bool = False,
    tell: Callable[[str], None] = lambda text: warnings.warn(text, stacklevel=2),
) -> Iterator[DaskWorkers]:
    """The workers of a Dask cluster, for the time of the context.

    Args:
        scheduler: address (`tcp://host:8786`) or scheduler file of one that runs already; None: see `local_workers`.
        on_event: told of every event.
        security: `distributed.Security` that the scheduler wants; None: as Dask's configuration says.
        dashboard: whether our own scheduler is to serve Dask's pages.
        tell: told of workers that are not used: those without stiffcore, or with another version.

    Raises:
        InputError: where it cannot be reached, or has no worker.
        StiffcoreError: where it has none that can be used.
    """
    if scheduler is None:
        if security is not None:
            raise InputError("a key is given, but no scheduler: workers on this machine have one of their own")
        with local_workers(on_event, dashboard=dashboard) as ours:
            yield ours
        return
    from distributed import Client

    address = _address(scheduler)
    _check_scheduler(scheduler, address, security)
    with _quiet():
        try:
            client = Client(address, timeout=CONNECT_S, set_as_default=False, security=security)
        except (OSError, TimeoutError, ValueError) as error:
            raise InputError(f"--scheduler {scheduler} cannot be reached: {error}") from error
        with client:
            try:
                client.wait_for_workers(1, timeout=WORKERS_S)
            except TimeoutError:
                raise InputError(f"the cluster at {scheduler} has no worker: start some, then run again") from None
            found = DaskWorkers(client, on_event, separate=True, tell=tell)
            try:
                found.pass_over(_same_version(), __version__)
                yield found
            finally:
                found.close()


@contextmanager
def local_workers(on_event: Callable[[Event], None], *, dashboard: bool = False) -> Iterator[DaskWorkers]:
    """A Dask cluster on this machine for the time of the context, of one worker until it is scaled.

    Its workers die with this process. Its ports are open to this machine alone, and to who has the key of this session.

    Args:
        on_event: told of every event.
        dashboard: whether to serve Dask's pages on this machine; every user of it can read them.

    Raises:
        StiffcoreError: where no process can be started.
    """
    import dask
    from distributed import Client
    from distributed.utils import get_mp_context

    from stiffcore.cluster.local import start

    forked = not Path(CUDA_DRIVER).exists()
    settings = {
        "distributed.worker.multiprocessing-method": "forkserver" if forked else "spawn",
        "distributed.scheduler.allowed-failures": 0,
        "distributed.scheduler.worker-ttl": None,
        "distributed.admin.low-level-log-length": 1000,
        # what Dask does by the clock would take a tenth of a core from two workers with a core each
        "distributed.admin.tick.interval": "1s",
        "distributed.admin.system-monitor.interval": "5s",
        "distributed.scheduler.work-stealing-interval": "1s",
        "distributed.scheduler.active-memory-manager.start": False,
        "distributed.worker.profile.enabled": False,
        # workers keep no results of which Dask could know; beyond its limit one is ended
        **{f"distributed.worker.memory.{name}": False for name in ("target", "spill", "pause")},
        "distributed.worker.memory.terminate": 1.0,
        # of Dask's pages, where they are asked for: those that only show
        "distributed.scheduler.http.routes": [f"distributed.http.{name}" for name in ("scheduler.info", "statics")],
        "logging": {"distributed": "error"},
    }
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    with dask.config.set(settings):
        if forked:
            get_mp_context().set_forkserver_preload(["stiffcore.cluster.local", "stiffcore.preload"])
        os.environ.update(ENVIRONMENT)
        try:
            if forked:
                resource_tracker.ensure_running()  # it unblocks signals again
                with terminal_signals_blocked():
                    forkserver.ensure_running()
            cluster = start(dashboard=dashboard)
        except (RuntimeError, OSError) as error:
            found: BaseException | None = error
            while found is not None and not isinstance(found, OSError):
                found = found.__cause__ or found.__context__
            if found is not None:  # no space in shared memory, no more processes: what the system says
                raise StiffcoreError(f"worker processes could not be started: {found}") from error
            raise StiffcoreError(
                f"worker processes could not be started ({str(error).splitlines()[0]}): in a script, what starts them "
                'must stand under `if __name__ == "__main__":`'
            ) from error
        finally:
            for name, value in before.items():
                os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
        with cluster, Client(cluster) as client:
            yield DaskWorkers(client, on_event, separate=False)


@cache
def _die_with(parent: int) -> None:
    """Have this worker end when the run's process is gone: a killed run leaves no writer behind."""
    process = psutil.Process(parent)

    def alive() -> bool:
        try:
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def watch() -> None:
        while alive():
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="stiffcore-watch").start()
