"""What of a stored run may act: it is data, made by anyone, and for more than data it needs its reader's word."""

import importlib.util
import os
from collections.abc import Mapping
from importlib.machinery import PathFinder
from typing import Any

from stiffcore.errors import UntrustedError
from stiffcore.study import Study


def code_of(study: Study) -> str:
    """The module that a network is imported from (`package.module`); empty where it is one of stiffcore's own."""
    return study.network.partition(":")[0] if ":" in study.network else ""


def trusted_network(study: Study, *, trust: bool, given: Mapping[str, Any] | None = None) -> str:
    """The network of a stored run, where the user stands for its code: by a word, or by naming it; else nothing.

    Args:
        study: as the run holds it.
        trust: the word.
        given: options of the user's own.
    """
    return study.network if trust or (given or {}).get("network") == study.network else ""


def check_code(study: Study, trusted: str, url: str) -> None:
    """Refuse to import what only a stored run names.

    Args:
        study: as the run holds it.
        trusted: the network whose code may be imported, see `trusted_network`.
        url: of the run.

    Raises:
        UntrustedError: naming the module and its file.
    """
    code = code_of(study)
    if code and study.network != trusted:
        raise UntrustedError(
            f"{url} names code to make its network with: {study.network}. Going on would import {code} "
            f"({module_file(code)}) and run it with your rights. If you trust who made this run: --trust, or "
            f"--network {study.network} again; from Python, trust=True"
        )


def module_file(name: str) -> str:
    """The file that importing a module would begin with, found without importing anything.

    Args:
        name: of it; of `package.module`, only the package is looked for.
    """
    top = name.partition(".")[0]
    try:
        # as `networks.zoo` imports it: the current folder is searched first
        spec = PathFinder.find_spec(top, [os.getcwd()]) or importlib.util.find_spec(top)
    except (ImportError, ValueError, OSError):
        spec = None
    if spec is None:
        return f"no module {top} is found from here"
    places = [spec.origin, *(spec.submodule_search_locations or [])]
    return next((place for place in places if place), top)


def without_downloads(study: Study, *, trust: bool) -> Study:
    """A stored study, which fetches nothing from elsewhere unless the user says so again (`--download`)."""
    return study if trust else study.model_copy(update={"download": False})
