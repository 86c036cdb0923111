"""What memory there is, and what the processes of a run hold."""

import threading
from pathlib import Path

import psutil

# The share of what is free that a run may take where no budget is given.
DEFAULT_SHARE = 0.8
SAMPLE_S = 0.25


def default_allowed_bytes() -> int:
    """What a run may use where no budget is given: 80 % of what is free, in the container or on the machine."""
    free = psutil.virtual_memory().available
    limit = _cgroup_free_bytes()
    return int(DEFAULT_SHARE * (free if limit is None else min(free, limit)))


def _cgroup_free_bytes() -> int | None:
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            root = Path("/sys/fs/cgroup")
            text = (root / limit).read_text().strip()
            # without a limit, version 2 says max and version 1 a number near 2^63
            return None if text == "max" or int(text) > 1 << 60 else int(text) - int((root / used).read_text())
        except (OSError, ValueError):
            continue
    return None


def tree_bytes(pid: int | None = None) -> int:
    """What a process and its children hold now: proportional set size, so that shared pages count once.

    Args:
        pid: of the root; None for this process.
    """
    total = 0
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied, AttributeError):
            continue
    return total


def own_bytes(pid: int | None = None) -> int:
    """What would be freed if a process ended: its unique set size."""
    return int(psutil.Process(pid).memory_full_info().uss)


class PeakMeter:
    """Samples `tree_bytes` four times a second while a context lasts.

    Attributes:
        peak_bytes: the largest sample so far.
    """

    def __enter__(self) -> "PeakMeter":
        self.peak_bytes = tree_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="stiffcore-memory")
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self.peak_bytes = max(self.peak_bytes, tree_bytes())

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
