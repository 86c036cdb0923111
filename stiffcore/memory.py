"""What memory there is, and what the processes of a run hold."""

import ctypes
import gc
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

# The share of what is free that a run may take where no budget is given.
DEFAULT_SHARE = 0.8
SAMPLE_S = 0.25
RESAMPLE_S = 5.0
GROWN_BYTES = 4 << 20
CGROUP_ROOT = Path("/sys/fs/cgroup")
PROC_CGROUP = Path("/proc/self/cgroup")


def default_allowed_bytes() -> int:
    """What a run may use where no budget is given: 80 % of what is free, in the container or on the machine."""
    free = psutil.virtual_memory().available
    limit = _cgroup_free_bytes()
    return int(DEFAULT_SHARE * (free if limit is None else min(free, limit)))


def _cgroup_free_bytes() -> int | None:
    """What the tightest limit of this process's control groups leaves; None without one."""
    free = [
        found for folder, limit, used, cache in _cgroups() if (found := _left(folder, limit, used, cache)) is not None
    ]
    return min(free, default=None)


def _cgroups() -> Iterator[tuple[Path, str, str, str]]:
    """Folders of this process's control groups and all above them, with the names of their files."""
    try:
        lines = PROC_CGROUP.read_text().splitlines()
    except OSError:
        lines = []
    # id:controllers:path, of which version 2 has one line without controllers
    paths = {
        tuple(controllers.split(",")): path
        for _, controllers, path in (x.split(":", 2) for x in lines if x.count(":") > 1)
    }
    one = next((path for controllers, path in paths.items() if "memory" in controllers), "/")
    for root, path, names in (
        (CGROUP_ROOT, paths.get(("",), "/"), ("memory.max", "memory.current", "inactive_file")),
        (CGROUP_ROOT / "memory", one, ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    ):
        folder = root / path.strip("/")
        # inside a container the path may be the host's, which is not there, but the root is the container's own
        yield from ((f, *names) for f in (folder, *folder.parents) if f == root or root in f.parents)


def _left(folder: Path, limit: str, used: str, cache: str) -> int | None:
    try:
        text = (folder / limit).read_text().strip()
        # without a limit, version 2 says max and version 1 a number near 2^63
        if text == "max" or int(text) > 1 << 60:
            return None
        held = int((folder / used).read_text())
    except (OSError, ValueError):
        return None
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        held -= int(stat.get(cache, 0))  # files read once, which the kernel gives up first
    except (OSError, ValueError):
        pass
    return max(0, int(text) - max(0, held))


def keep_freed_pages() -> None:
    """Have this process, and those forked from it, reuse freed memory instead of mapping it anew.

    A worker's tasks run in a second thread, whose glibc arena gives every temporary tensor back to the system and
    faults it in again: with one arena and these thresholds, columns of ResNet50's block 16 take 0.28 s a chunk instead
    of 0.48 s (2 cores). `release_free_memory` gives back what is left between stages.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        arena_max, trim_threshold, mmap_threshold = -8, -1, -3  # malloc.h
        mallopt(arena_max, 1)
        mallopt(trim_threshold, 512 << 20)
        mallopt(mmap_threshold, 64 << 20)


def release_free_memory(*, cycles: bool = False) -> None:
    """Give freed memory back to the system: glibc keeps blocks of up to 32 MiB for later use.

    Args:
        cycles: free what only refers to itself first, as traced graphs do; takes 0.2 s with torch's objects around.
    """
    if cycles:
        gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def tree_bytes() -> int:
    """What this process and its children hold now, shared pages once.

    Data as proportional set size; mapped files (libraries) as what the process with most of them has mapped, since the
    kernel's proportion of those depends on who else on the machine has mapped the same files, and for how long.
    """
    return _together(_held(p) for p in _tree())


def _tree() -> list[psutil.Process]:
    root = psutil.Process()
    return [root, *root.children(recursive=True)]


def _together(held: Iterable[tuple[int, int]]) -> int:
    """All processes' data, and the largest part that is mapped files."""
    data, files = zip(*held, strict=True)
    return sum(data) + max(files)


def _held(process: psutil.Process) -> tuple[int, int]:
    """Data of one process (its share of pages that others have too), and what it has mapped of files."""
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        rollup = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines[1:]}
        return rollup["Pss_Anon"] + rollup["Pss_Shmem"], _status(process.pid)["RssFile"]
    except (OSError, LookupError):
        pass
    try:  # other systems, older kernels, another user's process
        return int(process.memory_info().rss), 0
    except psutil.Error:
        return 0, 0  # it has ended


def _resident(process: psutil.Process) -> tuple[int, int]:
    """As `_held`, but pages that processes share count in each: a hundredth of the time, as no page is looked at."""
    try:
        status = _status(process.pid)
        return status["RssAnon"] + status["RssShmem"], status["RssFile"]
    except (OSError, LookupError):
        return _held(process)


def own_bytes() -> int:
    """What would be freed if this process ended: its unique set size."""
    return int(psutil.Process().memory_full_info().uss)


def reset_peak() -> int | None:
    """Have `own_peak_bytes` count from now on.

    Returns:
        The resident set of this process now; None where the kernel does not allow it.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status()["VmRSS"]
    except (OSError, LookupError):
        return None


def moved_bytes() -> tuple[int, int]:
    """Bytes that this process has asked to read, and to write, so far; 0 where the system does not count them."""
    counted = psutil.Process().io_counters() if hasattr(psutil.Process, "io_counters") else None
    return getattr(counted, "read_chars", 0), getattr(counted, "write_chars", 0)


def own_peak_bytes() -> int:
    """The largest resident set of this process since `reset_peak`: exact, no sample."""
    return _status()["VmHWM"]


def _status(pid: int | None = None) -> dict[str, int]:
    """What the kernel says of a process, where it is bytes."""
    lines = Path(f"/proc/{pid or 'self'}/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.endswith(" kB")}


class PeakMeter:
    """Samples `tree_bytes` while a context lasts: four times a second, where what is resident has grown.

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
        resident, sampled = 0, 0.0
        while not self._stop.wait(SAMPLE_S):
            now = _together(_resident(p) for p in _tree())
            # a sample looks at every page, which takes 20 ms a GB of a core that may be at work; pages that processes
            # share become their own without any growth, hence a sample from time to time
            if now > resident + GROWN_BYTES or time.monotonic() > sampled + RESAMPLE_S:
                resident, sampled = max(resident, now), time.monotonic()
                self.peak_bytes = max(self.peak_bytes, tree_bytes())

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
