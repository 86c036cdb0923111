"""What runs functions: this process, or something that has workers."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from stiffcore.errors import StiffcoreError
from stiffcore.memory import keep_freed_pages
from stiffcore.record import Event

# How often a unit whose worker died, or what it had stored is damaged, is begun again in one session; and blocks that
# workers share: memory may have been short for a moment, but what kills its worker each time must not do so for ever.
DEATHS = 2


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
