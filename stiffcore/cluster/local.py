"""A Dask cluster on this machine that other users of the machine can neither use nor look at."""

from typing import Any

import distributed
from distributed import Nanny, Security, SpecCluster

# Other machines are no part of it, and every port takes only those who have the key.
HOST = "127.0.0.1"
PROTOCOL = "tls://"


class _Pageless:
    """Mixed into a node of Dask's: no HTTP server, unless the node is told where."""

    def start_http_server(
        self, routes: Any, dashboard_address: str | None, default_port: int = 0, ssl_options: Any = None
    ) -> None:
        """Nothing where no address is asked for: Dask would open a port all the same, and that one asks for no key."""
        if dashboard_address is not None:
            super().start_http_server(routes, dashboard_address, default_port, ssl_options)  # type: ignore[misc]


class Scheduler(_Pageless, distributed.Scheduler):
    """Dask's scheduler."""


class Worker(_Pageless, distributed.Worker):
    """Dask's worker."""


def start(*, dashboard: bool) -> SpecCluster:
    """One worker process of one thread, and what is needed to have more.

    The key of its ports is made here, and is in the memory of these processes alone.

    Args:
        dashboard: whether the scheduler serves Dask's pages, on this machine; they ask for no key.

    Raises:
        RuntimeError: where Dask cannot start it.
    """
    security = Security.temporary()
    common = {"host": HOST, "protocol": PROTOCOL, "security": security}
    pages = {"dashboard": dashboard, "dashboard_address": f"{HOST}:0" if dashboard else None}
    of_worker = {
        "nthreads": 1,
        "memory_limit": 1.0,  # all of the machine's, until `scale` is told what the plan allows
        "silence_logs": 50,
        "worker_class": Worker,
    }
    worker = {"cls": Nanny, "options": common | of_worker}
    return SpecCluster(
        scheduler={"cls": Scheduler, "options": {"port": 0} | common | pages},
        worker=worker,
        workers={0: worker},
        security=security,
        silence_logs=50,
    )
