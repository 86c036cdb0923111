"""Worker processes of a Dask cluster: who is there, who may be used, and what each is given to do."""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from typing import Any

import psutil

from stiffcore.cluster.executor import ConnectionLostError, Worker, WorkerDiedError
from stiffcore.errors import StiffcoreError
from stiffcore.memory import default_allowed_bytes, keep_freed_pages, own_bytes, own_peak_bytes
from stiffcore.record import Event, event_from_json, event_to_json

# Of a cluster that is not ours: how often it is looked whether the workers that units wait for are there; and how long
# is waited for one, where none is left.
LOOK_S = 2.0
NONE_LEFT_S = 120.0
# A worker maps more of its libraries as it goes; these pages are shared and reserved already.
MAPPED_BYTES = 256 << 20


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
        gpus = self._client.run_on_scheduler(with_gpu)
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


def with_gpu(dask_scheduler: Any) -> set[str]:
    """The workers that declare a `GPU`, asked of the scheduler."""
    return {address for address, w in dask_scheduler.workers.items() if w.resources.get("GPU", 0) >= 1}


# One unit at a time in a process: its memory and threads are planned so.
_BUSY = threading.Lock()


class Shared:
    """Who may have blocks of the unit under way, by address; None: all."""

    usable: frozenset[str] | None = None


def sharing(there: Iterable[str]) -> list[str]:
    """The workers that are there and may have blocks. Nobody has looked at one that joined after the unit was begun."""
    return sorted(there if Shared.usable is None else Shared.usable.intersection(there))


def _with_events(
    topic: str, parent: int | None, usable: frozenset[str] | None, function: Callable[..., Any], args: tuple
) -> Any:
    from distributed import get_worker

    Shared.usable = usable
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
