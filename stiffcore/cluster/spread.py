"""One unit on all workers of its cluster: the blocks of its matrices are shared out."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from threadpoolctl import threadpool_limits

from stiffcore.cluster.executor import DEATHS, WorkerDiedError
from stiffcore.cluster.workers import sharing, with_gpu
from stiffcore.errors import StiffcoreError
from stiffcore.memory import release_free_memory

if TYPE_CHECKING:
    from stiffcore.eigen.panels import Each, Panels, Work

# How often who waits for a panel looks; how often the worker that leads says that it is
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
            able = client.run_on_scheduler(with_gpu) if self._gpu else client.nthreads()
            free, waiting = sharing(able), list(left)
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
