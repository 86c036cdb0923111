"""Runs that a stranger made: each field of each record of each wrong kind, sealed; each path of another sort.

A change is a function of the run's folder, with a name that says what it does. `changes` lists all of them for one run;
`bench/fuzz.py` draws from them by the thousand, and `tests/strangers` some hundreds.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stiffcore import cli
from stiffcore.cluster import InProcess
from stiffcore.store.metadata import digest, metadata_digest

VICTIM = "../../../victim"
DEEP = "\x00deep"  # stands for JSON nested a million deep, which is written as text
WRONG: list[Any] = [
    *(None, True, -5, 99, 5.5, 1e30, 10**40, "", "5", "nan", [], {}, [1, [2]], {"a": {"b": 1}}),
    *(VICTIM, [VICTIM], "/etc/passwd", "evil:make", DEEP),
    *("[bold]x[/link=y]", "\x1b]0;mine\x07\x1b[2J", "=HYPERLINK(1)", "$\\evil$", "a\u202eb\ud800", "x" * 70_000),
]


@dataclass(frozen=True)
class Change:
    """Something that is done to a run.

    Attributes:
        name: what.
        make: does it to the folder.
    """

    name: str
    make: Callable[[Path], None]


def changes(run: Path) -> Iterator[Change]:
    """All of them, of one run."""
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        yield from _as_another_sort(name, folder=path.is_dir())
        if path.name == "zarr.json":
            fields = json.loads(path.read_text())
            for at in _paths(fields):
                for value in WRONG:
                    yield Change(f"{name} {'.'.join(map(str, at))} = {str(value)[:20]!r}", set_field(name, at, value))
                yield Change(f"{name} {'.'.join(map(str, at))} gone", set_field(name, at, KeyError))
    for name in (".lock", "holder.json", "images/x/c", "evil.py", "units/evil"):
        if not (run / name).exists():
            yield from _as_another_sort(name, folder=False)
    for value in WRONG:
        yield Change(f"holder.json {str(value)[:20]!r}", _holder(value))


def _paths(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """Every place in JSON, the first two of a list."""
    parts = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for name, part in parts:
        if name != "digest":
            yield (*at, name)
            yield from _paths(part, (*at, name))


def set_field(name: str, at: tuple, value: Any) -> Callable[[Path], None]:
    """What sets a field of a zarr.json, which `at` leads to, and seals it again; KeyError deletes it."""

    def make(run: Path) -> None:
        path = run / name
        fields = json.loads(path.read_text())
        inside = fields
        for part in at[:-1]:
            inside = inside[part]
        if value is KeyError:
            del inside[at[-1]]
        else:
            inside[at[-1]] = value
        text = json.dumps(sealed(fields), indent=2)
        deep = "[" * 1_000_000 + "]" * 1_000_000
        path.write_text(text.replace(json.dumps(DEEP), deep))
        if name == "zarr.json":  # of the header there is a copy, which would mend it
            shutil.copy(path, run / "units/zarr.json")

    return make


def sealed(fields: dict) -> dict:
    """A zarr.json with the digest that its content has now, where it has one at all."""
    attributes = fields.get("attributes")
    if isinstance(attributes, dict) and "digest" in attributes:
        try:
            array = "shape" in fields
            attributes["digest"] = metadata_digest(json.dumps(fields).encode()) if array else digest(attributes)
        except (ValueError, TypeError, AttributeError):
            pass
    return fields


def _holder(value: Any) -> Callable[[Path], None]:
    return lambda run: (run / "holder.json").write_text(json.dumps(dict.fromkeys(("pid", "host", "since"), value)))


def _as_another_sort(name: str, *, folder: bool) -> Iterator[Change]:
    """A path as a link, or of another sort."""

    def gone(run: Path) -> Path:
        path = run / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def moved(run: Path) -> None:
        path, aside = run / name, run.parent / "victim" / "moved"
        if path.exists():
            shutil.move(path, aside)
        else:
            aside.write_text("here")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(aside)

    victim = "victim" if folder else "victim/file"
    sorts: dict[str, Callable[[Path], Any]] = {
        "gone": gone,
        "a link to what it was": moved,
        "a link to a victim": lambda run: gone(run).symlink_to(run.parent / victim),
        "a dangling link": lambda run: gone(run).symlink_to(run.parent / "victim/new"),
        "a link to itself": lambda run: gone(run).symlink_to(name.split("/")[-1]),
        "a pipe": lambda run: os.mkfifo(gone(run)),
        "a file": lambda run: gone(run).write_bytes(b"{}"),
        "a folder": lambda run: gone(run).mkdir(),
        "an empty file": lambda run: gone(run).touch(),
        "a large file": lambda run: _sparse(gone(run), 1 << 40),
    }
    for what, make in sorts.items():
        yield Change(f"{name} is {what}", make)


def _sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


# --------------------------------------------------------------------------------------------- what may not happen

COMMANDS: dict[str, list[str]] = {
    "status": ["status", "RUN"],
    "status --json": ["status", "RUN", "--json"],
    "show": ["show", "RUN"],
    "verify": ["verify", "RUN"],
    "export": ["export", "RUN", "--to", "out.csv"],
    "export h5": ["export", "RUN", "--to", "out.h5"],
    "report": ["report", "RUN", "--to", "out.html"],
    "compare": ["compare", "RUN", "original"],
    "plan": ["plan", "RUN", "--trust"],
    "run": ["run", "RUN"],
    "run --trust": ["run", "RUN", "--trust"],
    "picture": ["picture", "RUN", "--block", "layer1.1", "--trust"],
}
_watched: list[str] | None = None


def _watch(event: str, args: tuple) -> None:
    if _watched is None:
        return
    if event in ("socket.connect", "socket.bind") or (event == "import" and "evil" in str(args[0])):
        _watched.append(f"{event} {args[:1]}")


sys.addaudithook(_watch)


@contextmanager
def watched() -> Iterator[list[str]]:
    """What is imported of a stranger, and which sockets are opened, while the context lasts."""
    global _watched
    _watched = []
    try:
        yield _watched
    finally:
        _watched = None


@contextmanager
def here(scheduler: str | None, on_event: Callable[[Any], None], **options: Any) -> Iterator[InProcess]:
    """In place of workers: this process, so that a case takes no seconds."""
    yield InProcess(on_event)


def snapshot(folder: Path) -> dict[str, Any]:
    """All that is there, and of files a few of their bytes."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        at = path.lstat()
        regular = path.is_file() and not path.is_symlink() and at.st_size < 1 << 20
        found[str(path)] = (at.st_mode, at.st_size, path.read_bytes() if regular else os.path.islink(path))
    return found


def outcome_of(folder: Path, change: Change, command: str) -> tuple[int, list[str]]:
    """Do a change to a copy of `folder`/original, carry out a command on it, and see.

    Returns:
        Its exit code, and what may not have happened; empty where nothing did.
    """
    run, victim = folder / "run", folder / "victim"
    for path in (run, victim):
        shutil.rmtree(path, ignore_errors=True)
    for out in folder.glob("out.*"):
        out.unlink()
    shutil.copytree(folder / "original", run)
    victim.mkdir()
    (victim / "file").write_text("precious")
    try:
        change.make(run)
    except (OSError, LookupError, TypeError):
        return 0, []  # it cannot be done to this run
    before, problems, code = snapshot(victim), [], 0
    sys.argv = ["stiffcore", *(str(run) if part == "RUN" else part for part in COMMANDS[command])]
    with watched() as seen:
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        except BaseException as error:
            problems.append(f"{type(error).__name__}: {str(error)[:300]}")
    problems += seen if "--trust" not in COMMANDS[command] else []
    if snapshot(victim) != before:
        problems.append("what is outside of the run was changed")
    if code not in (0, 1, 2, 3):
        problems.append(f"exit code {code}")
    return code, problems
