"""How a command ends at a signal: at any moment with one line, 128 + its number, and no process left behind.

The handler does not raise: an exception would be lost, or become a traceback, in whatever code it meets. It ends the
process where it stands, as a kill does, and a run outlives that at every step.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Signals that a terminal sends to all processes at once: workers are ended by their session.
OF_TERMINAL = (signal.SIGINT, signal.SIGHUP)
# What tidies up has so many seconds.
PATIENCE_S = 10.0
_ACTS: list[Callable[[], None]] = []
_SAYS = ["stopped"]


def handle() -> None:
    """End this command in good order at a signal, from here on; a signal that is ignored stays so (`nohup`)."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)


@contextmanager
def at_end(act: Callable[[], None], says: str = "") -> Iterator[None]:
    """Do something where a signal ends the command meanwhile, and say something else than that it stopped."""
    _ACTS.append(act)
    before, _SAYS[0] = _SAYS[0], says or _SAYS[0]
    try:
        yield
    finally:
        _ACTS.remove(act)
        _SAYS[0] = before


@contextmanager
def terminal_signals_blocked() -> Iterator[None]:
    """Have processes that are started meanwhile not see what a terminal sends."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, OF_TERMINAL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(number: int, frame: Any) -> None:
    code = 128 + number
    for each in SIGNALS:
        with suppress(ValueError):
            signal.signal(each, lambda again, frame: _at_once(code))
    watch = threading.Timer(PATIENCE_S, _at_once, [code])
    watch.daemon = True
    with suppress(RuntimeError):
        watch.start()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    said = 2
    with suppress(OSError):
        said = os.dup(2)
        nothing = os.open(os.devnull, os.O_WRONLY)
        # what other threads say of children that are gone
        for stream_number in (1, 2):
            os.dup2(nothing, stream_number)
    _kill_children()
    for act in reversed(_ACTS):
        with suppress(BaseException):
            act()
    _kill_children()
    with suppress(OSError):
        shown = "\x1b[?25h\r\x1b[2K" if os.isatty(said) else ""  # the cursor, which a bar had hidden
        os.write(said, f"{shown}{_SAYS[0]}\n".encode(errors="backslashreplace"))
    os._exit(code)


def _at_once(code: int) -> None:
    _kill_children()
    os._exit(code)


def _kill_children() -> None:
    """Kill the processes that this one started, and those that others of its threads go on to start."""
    with suppress(Exception):  # while psutil is being imported there are none
        import psutil

        end = time.monotonic() + PATIENCE_S / 4
        while time.monotonic() < end:
            children = psutil.Process().children(recursive=True)
            if not children:
                return
            for child in children:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            psutil.wait_procs(children, timeout=1)
