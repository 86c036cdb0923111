"""Errors a user can act on: each says the stage, what was needed, what was found and what to change."""

from collections.abc import Iterable


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
    """The CUDA device has not the memory that was planned for: the next rung may take the unit."""


class DamagedError(StiffcoreError):
    """Something stored cannot be trusted: a checksum failed, or a recorded tile is not there."""


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
