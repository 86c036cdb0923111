"""Who does the work: this process, or worker processes under Dask. The one place that imports dask."""

from stiffcore.cluster.connect import local_workers, tls_security, workers_at
from stiffcore.cluster.executor import DEATHS, ConnectionLostError, Executor, InProcess, Worker, WorkerDiedError
from stiffcore.cluster.spread import AbandonedError, Spread, spread
from stiffcore.cluster.workers import DaskWorkers

__all__ = [
    "DEATHS",
    "AbandonedError",
    "ConnectionLostError",
    "DaskWorkers",
    "Executor",
    "InProcess",
    "Spread",
    "Worker",
    "WorkerDiedError",
    "local_workers",
    "spread",
    "tls_security",
    "workers_at",
]
