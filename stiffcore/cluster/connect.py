"""How a cluster is reached that runs already, and how one on this machine is started."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

from stiffcore.cluster.workers import DaskWorkers
from stiffcore.ending import terminal_signals_blocked
from stiffcore.errors import InputError, StiffcoreError, refuse
from stiffcore.record import Event
from stiffcore.version import __version__

CONNECT_S = 10
WORKERS_S = 30
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
