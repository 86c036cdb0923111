"""The images of a run: one a chunk, so that who needs one reads one. Earlier versions wrote all in one chunk."""

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import zarr

from stiffcore.errors import DamagedError
from stiffcore.store.metadata import UNREADABLE, check_memory, create_array, open_array
from stiffcore.store.runs import IMAGES, RunStore
from stiffcore.study import image_digest

PIXELS = "x"
# Images that are written together: as many as take so much, or one.
WRITTEN_BYTES = 4 << 20


def write_images(store: RunStore, images: Iterable[np.ndarray], count: int) -> None:
    """Write the pixels of a run's images, replacing those there are, as they come.

    Args:
        store: the run.
        images: of one shape and dtype.
        count: how many there will be.
    """
    array, done, waiting = None, 0, list[np.ndarray]()
    for image in images:
        if array is None:
            array = create_array(
                store.root.require_group(IMAGES),
                PIXELS,
                shape=(count, *image.shape),
                dtype=image.dtype,
                chunks=(1, *(max(1, s) for s in image.shape)),
                dimension_names=("image", *(f"axis{i}" for i in range(1, image.ndim + 1))),
                config={"write_empty_chunks": True},
            )
        waiting.append(image)
        if len(waiting) * image.nbytes >= WRITTEN_BYTES or done + len(waiting) == count:
            array[done : done + len(waiting)] = np.stack(waiting)
            done, waiting = done + len(waiting), []


def read_image(store: RunStore, i: int, digest: str) -> np.ndarray:
    """The image at a position, alone.

    Args:
        store: the run.
        i: position among the run's images.
        digest: of the image that the run began with.

    Raises:
        DamagedError: where it cannot be read, or is another one.
    """
    for found in _images(store, [i]):
        if image_digest(found) == digest:
            return found
    raise DamagedError(f"{store.url}/{IMAGES}/{PIXELS}: image {i} is not the one that the run began with")


def same_images(store: RunStore, digests: Sequence[str]) -> bool:
    """Whether the stored images have these digests; one at a time.

    Raises:
        DamagedError: where one cannot be read.
    """
    count = len(digests)
    found = (image_digest(image) for image in _images(store, range(count)))
    return _array(store).shape[0] == count and all(a == b for a, b in zip(found, digests, strict=True))


def images_chunk_bytes(store: RunStore) -> int:
    """What is read from the store where one image is: its own bytes, or where one chunk holds all, those of all."""
    array = _array(store)
    return math.prod(array.chunks) * array.dtype.itemsize


def _array(store: RunStore) -> zarr.Array:
    return open_array(store.root, f"{IMAGES}/{PIXELS}")


def _images(store: RunStore, positions: Iterable[int]) -> Iterator[np.ndarray]:
    """Images by position; those that share a chunk are read once where they follow each other.

    A chunk that is not there reads as zeros: who asks compares digests.
    """
    try:
        array = _array(store)
        step, first, held = array.chunks[0], -1, np.zeros(0)
        check_memory(math.prod(array.chunks) * array.dtype.itemsize, array.path)
        for i in positions:
            if i // step != first:
                first = i // step
                held = np.asarray(array[first * step : (first + 1) * step])
            yield held[i - first * step]
    except (*UNREADABLE, IndexError) as error:
        raise DamagedError(f"{store.url}/{IMAGES}/{PIXELS}: {error}") from error
