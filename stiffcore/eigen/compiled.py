"""numba's compiler, and where what it made is kept. Importing this imports numba: only who has small squares does."""

import hashlib
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache

# What is compiled, all together: numba would not see that a function of another file has changed.
SOURCES = ("compiled.py", "small.py", "squares.py")


def compiled_folder() -> Path | None:
    """Where compiled code of these versions of `SOURCES` is kept; None where no folder is safe, or none can be written.

    numba keeps pickles, which do whatever they say when they are read. So the folder is below the user's own cache
    folder, and used only where nobody else can put anything into it, or another folder in its place.
    """
    sources = b"".join((Path(__file__).parent / name).read_bytes() for name in SOURCES)
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = (Path(base) if os.path.isabs(base) else Path.home() / ".cache").resolve()
        folder = root / "stiffcore" / f"numba-{numba.__version__}-{hashlib.sha256(sources).hexdigest()[:16]}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        safe = folder.resolve() == folder and all(_is_closed(f) for f in (folder, *folder.parents))
        return folder if safe and os.lstat(folder).st_uid == os.geteuid() and os.access(folder, os.W_OK) else None
    except (OSError, RuntimeError):  # RuntimeError: no home
        return None


def _is_closed(folder: Path) -> bool:
    """Whether a folder is this user's or the system's, and others cannot replace what is in it."""
    found = os.lstat(folder)
    others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX
    return stat.S_ISDIR(found.st_mode) and found.st_uid in (0, os.geteuid()) and not others


class _Kept(FunctionCache):
    """Compiled code on disk, which is a convenience: where it cannot be read or written, it is compiled again."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # a pickle that is damaged raises anything
            with suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):  # a full disk
            super().save_overload(sig, data)


_FOLDER = compiled_folder()


def compiled(function: Callable[..., Any]) -> Any:
    """Compile for the host at the first call, without the GIL; numbers are IEEE's, a division by 0 included."""
    found: Any = numba.njit(nogil=True, error_model="numpy")(function)
    config: Any = numba.config
    if _FOLDER is not None:
        before, config.CACHE_DIR = config.CACHE_DIR, str(_FOLDER)
        try:
            found._cache = _Kept(function)
        finally:
            config.CACHE_DIR = before
    return found
