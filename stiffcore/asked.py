"""What is refused at once: before a worker is started, or a network loaded."""

from collections.abc import Callable, Mapping
from typing import Any

from stiffcore.errors import NoRunError, refuse, writing_store
from stiffcore.networks.names import RANDOM, block_problems, images_problems, network_problems, weights_problems
from stiffcore.store import RunStore
from stiffcore.study import IN_MEMORY, Study


def check_free(url: str, tell: Callable[[str], None] = lambda text: None) -> None:
    """Say at once where another process works on the run, before anything is loaded.

    A damaged header is written again from its copy.

    Args:
        url: of the run, which may exist.
        tell: told what is waited for, where the session before this one ended without a word.

    Raises:
        BusyError: where one does.
    """
    with writing_store():
        RunStore.restore(url)
        store = existing(url)
        if store:
            with store.hold(tell=tell):
                pass


def existing(url: str) -> RunStore | None:
    """A run that may exist; where it does not, the place is one for a new run."""
    try:
        return RunStore(url)
    except NoRunError:
        RunStore.check_new(url)
        return None


def check_request(url: str, options: Mapping[str, Any], *, here: bool = True) -> bool:
    """Refuse what is surely wrong with a request by names alone; `session.prepare` looks at the rest.

    Args:
        url: of the run, which may exist.
        options: fields of `Study`; None means not given.
        here: whether files are looked for on this machine, and not on those of a cluster.

    Returns:
        Whether the run exists.

    Raises:
        InputError: naming everything that is wrong.
        NoRunError: where there is no run, and no network is given.
    """
    store = existing(url)
    header = store.header if store else None
    given = {name: value for name, value in options.items() if value is not None}
    study = header.study.with_options(given) if header else Study.ask(given)
    refuse_no_run(url, exists=header is not None, given=given)
    if study.network == IN_MEMORY:
        return header is not None
    named = {name: getattr(study, name) if name in given and here else None for name in ("weights", "images")}
    of_network = network_problems(study.network) + weights_problems(named["weights"])
    of_images = images_problems(named["images"])
    of_blocks = block_problems(study.blocks, study.network) if "blocks" in given else []
    # one error says all that is wrong: what only a look finds of the other of network and images is waited for
    network_open = ":" in study.network or study.weights not in (None, RANDOM)
    images_open = study.images != "samples" or bool(given.keys() & {"index", "count", "per_label"})
    either = (of_network and not images_open) or (of_images and not network_open)
    if of_blocks or either or (of_network and of_images):
        refuse([*of_network, *of_images, *of_blocks])
    return header is not None


def refuse_no_run(url: str, *, exists: bool, given: Mapping[str, Any]) -> None:
    """Refuse to begin a run of no network.

    Raises:
        NoRunError: where it is so.
    """
    if not exists and "network" not in given:
        raise NoRunError(f"there is no run at {url}: to start one, give at least --network")
