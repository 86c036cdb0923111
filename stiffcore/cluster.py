"""Who does the work: this process, or worker processes under Dask. The one place that imports dask."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, Protocol

import psutil

from stiffcore.errors import StiffcoreError

Event = dict[str, Any]
TOPIC = "stiffcore"
# For the process that workers are forked from: libraries that each allocate a pool of threads, unless told not to
# before they are imported; and Python's resource tracker, which warns of what a killed worker could not give back.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore::UserWarning:multiprocessing.resource_tracker",
}


class Executor(Protocol):
    """Runs functions of the form `function(*args, emit=...)`; `emit` takes an event."""

    def submit(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> "Future[Any]":
        """Start `function`, with `emit` added to its arguments."""

    def scale(self, workers: int) -> None:
        """Have so many workers, and wait for them."""

    def worker_pids(self) -> list[int]:
        """The processes that do the work, this one not among them."""

    def stop(self) -> None:
        """End all workers at once, and wait until they are gone; nothing can be submitted any more."""


class InProcess:
    """Runs each function at once, in this process."""

    def __init__(self, on_event: Callable[[Event], None]) -> None:
        """Run here.

        Args:
            on_event: told of every event.
        """
        self._on_event = on_event

    def submit(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> "Future[Any]":
        """Run `function` to its end; the future is done."""
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **kwargs, emit=self._on_event))
        except Exception as error:
            future.set_exception(error)
        return future

    def scale(self, workers: int) -> None:
        """Nothing to do: there is this process."""

    def worker_pids(self) -> list[int]:
        """None."""
        return []

    def stop(self) -> None:
        """Nothing to do: what was submitted is over."""


class DaskWorkers:
    """Runs functions on a Dask cluster on this machine, one process a worker.

    Workers are forked from one server process that has imported torch once, so that its 0.4 GB is shared.
    """

    def __init__(self, client: Any, on_event: Callable[[Event], None]) -> None:
        """Run on a cluster.

        Args:
            client: of distributed.
            on_event: told of every event, from another thread.
        """
        self._client = client
        client.subscribe_topic(TOPIC, lambda event: on_event(event[1]))

    def submit(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> "Future[Any]":
        """Start `function` on a free worker."""
        done: Future[Any] = Future()
        task = self._client.submit(_with_events, os.getpid(), function, args, kwargs, pure=False, retries=0)

        def finish(finished: Any) -> None:
            try:
                done.set_result(finished.result())
            except Exception as error:
                done.set_exception(_readable(error))
            finished.release()

        task.add_done_callback(finish)
        return done

    def scale(self, workers: int) -> None:
        """Have so many workers, and wait for them."""
        self._client.cluster.scale(workers)
        self._client.wait_for_workers(workers, timeout=120)

    def worker_pids(self) -> list[int]:
        """The workers' processes."""
        return list(self._client.run(os.getpid).values())

    def stop(self) -> None:
        """End all workers at once, and wait until they are gone."""
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


def _with_events(parent: int, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    from distributed import get_worker

    _die_with(parent)
    worker = get_worker()
    return function(*args, **kwargs, emit=lambda event: worker.log_event(TOPIC, event))


def _readable(error: Exception) -> Exception:
    from distributed.scheduler import KilledWorker

    if isinstance(error, KilledWorker):
        return StiffcoreError("the worker died (out of memory, or killed): what it had recorded stays, run again")
    return error


@contextmanager
def local_workers(on_event: Callable[[Event], None]) -> Iterator[DaskWorkers]:
    """A Dask cluster on this machine for the time of the context, of one worker until it is scaled.

    Its workers die with this process.

    Args:
        on_event: told of every event.
    """
    import dask
    from distributed import Client, LocalCluster
    from distributed.utils import get_mp_context

    settings = {
        "distributed.worker.multiprocessing-method": "forkserver",
        "distributed.scheduler.allowed-failures": 0,
        "distributed.scheduler.worker-ttl": None,
        "distributed.admin.low-level-log-length": 1000,
        "logging": {"distributed": "error"},
    }
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    with dask.config.set(settings):
        get_mp_context().set_forkserver_preload(["distributed", "stiffcore.preload"])
        os.environ.update(ENVIRONMENT)
        try:
            cluster = LocalCluster(
                n_workers=1,
                threads_per_worker=1,
                processes=True,
                memory_limit=0,
                dashboard_address=":0",
                host="127.0.0.1",
                silence_logs=50,
            )
        except RuntimeError as error:
            raise StiffcoreError(
                f"worker processes could not be started ({str(error).splitlines()[0]}): in a script, what starts them "
                'must stand under `if __name__ == "__main__":`'
            ) from error
        finally:
            for name, value in before.items():
                os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
        with cluster, Client(cluster) as client:
            yield DaskWorkers(client, on_event)


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
