"""What the commands say, and ask."""

import json
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from stiffcore.errors import DamagedError, InputError, UntrustedError
from stiffcore.report.terminal import Terminal

if TYPE_CHECKING:
    from stiffcore.run import Run

T = TypeVar("T")

# tables keep their columns in a file or a pipe, where rich would assume 80
out = Terminal(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 180)
err = Terminal(stderr=True)


def say(console: Terminal, text: str, style: str | None = None) -> None:
    """Print a sentence, with no line break inside a path."""
    console.print(text, style=style, soft_wrap=True)


def tell(text: str) -> None:
    """Print a sentence to standard error."""
    say(err, text)


def print_json(value: Any) -> None:
    """Print a value for programs."""
    print(json.dumps(value, indent=1, allow_nan=False))


def with_trust(do: Callable[[bool], T], trust: bool) -> T:
    """Do what may need the user's word for the code of a run; at a terminal, ask for it."""
    try:
        return do(trust)
    except UntrustedError as error:
        if trust or not (sys.stdin and sys.stdin.isatty() and err.is_terminal):
            raise
        say(err, str(error))
        import typer

        if not typer.confirm("Do you trust it?", err=True):
            raise InputError("not trusted: nothing was imported") from None
    return do(True)


def refuse_damaged(found: "Run") -> None:
    """End with what could not be read, once the rest was said."""
    from stiffcore.study import counted

    if found.damaged:
        lines = "\n".join(f"  - {key}: {why}" for key, why in found.damaged.items())
        raise DamagedError(
            f"{counted(len(found.damaged), 'unit is', 'units are')} damaged:\n{lines}\n"
            f"`stiffcore run {found.store.url}` makes anew what is damaged, and leaves what cannot be read now"
        )
