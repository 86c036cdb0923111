"""Errors a user can act on: each says the stage, what was needed, what was found and what to change."""

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# What the system says where a path, not the disk, is at fault.
_PATH_ERRORS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR),
    *(errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
}
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


class StiffcoreError(Exception):
    """Anything stiffcore refuses or cannot do; the command line prints it without a traceback.

    Attributes:
        exit_code: what the command line exits with.
    """

    exit_code = 1


class InputError(StiffcoreError, ValueError):
    """The request itself is wrong: raised at the door, before any work, naming every offender at once."""

    exit_code = 2


class UntrustedError(InputError):
    """A stored run asks for what only a user may order: code that it names, to be imported."""


class NoRunError(InputError):
    """There is no run at the place that was named."""


class BusyError(StiffcoreError):
    """Another process is working on the run."""

    exit_code = 3


class DeviceFullError(StiffcoreError):
    """The CUDA device lacks the memory that was planned for: the next solver may take the unit."""


class DamagedError(StiffcoreError):
    """Something stored cannot be trusted: a checksum failed, or a recorded tile is not there."""


@contextmanager
def writing_store() -> Iterator[None]:
    """Whatever the system refuses while a run is written is one `StiffcoreError`.

    Raises:
        StiffcoreError: with the reason, and what to do.
    """
    try:
        yield
    except OSError as error:
        room = "free some space, then " if _is_full(error) else ""
        # an error of ours says what was done to which file, and that may have been to read it
        said = error if isinstance(error, StiffcoreError) else f"the store cannot be written: {error}"
        raise StiffcoreError(f"{said}; {room}run again to continue") from error


@contextmanager
def writing_file(option: str) -> Iterator[None]:
    """Whatever the system refuses while a file is written is one error.

    Args:
        option: that named the file, and the name.

    Raises:
        InputError: where the path is at fault.
        StiffcoreError: where the disk is.
    """
    try:
        yield
    except StiffcoreError:
        raise
    except (OSError, RuntimeError) as error:  # HDF5 raises the latter where a file cannot be closed
        number = getattr(error, "errno", None)
        kind = InputError if number in _PATH_ERRORS else StiffcoreError
        # HDF5 says it in many words, over several lines
        reason = os.strerror(number) if number in _DISK_ERRORS else " ".join(str(error).split())
        room = ": free some space and try again" if _is_full(error) else ""
        raise kind(f"{option}: {reason}; nothing was written{room}") from error


def _is_full(error: Exception) -> bool:
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)


def refuse(problems: Iterable[str], title: str = "") -> None:
    """Raise one `InputError` that lists every problem; do nothing where there is none.

    Args:
        problems: one sentence each.
        title: the line above them, where there are several.

    Raises:
        InputError: where `problems` is not empty.
    """
    lines = list(problems)
    if not lines:
        return
    if len(lines) == 1:
        raise InputError(lines[0])
    raise InputError("\n".join([title or f"{len(lines)} things are wrong:", *(f"  - {line}" for line in lines)]))
