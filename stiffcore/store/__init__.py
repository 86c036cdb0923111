"""The run on disk or on a URL: a Zarr v3 hierarchy that knows what is done. The one place that imports zarr.

Layout:

    RUN/zarr.json                      attributes: format, study, identity, versions
    RUN/holder.json                    who works on it now
    RUN/images/{x,y,index,...}         the inputs: pixels, an image a chunk; labels, places in the source, outcomes
    RUN/units/UNIT/zarr.json           attributes: the unit's record, its stage among it
    RUN/units/UNIT/{matrix,hessenberg} (k, k), while needed; beside each, NAME_tiles says what is written
    RUN/units/UNIT/division            what a matrix is divided into, by `--solver divide`, while needed
    RUN/units/UNIT/eigenvalues         (k,) complex, the computed ones of J; the exact ones and zeros are attributes

Nothing is inferred from files. A matrix's column shard is done when its column in NAME_tiles says so, written
after the shard; a stage is done when the unit's record says so, written after its arrays.

No flipped byte goes unseen: numbers have checksums, and each zarr.json has a digest of the rest of it among its
attributes. What makes the run stands twice, in the root and in RUN/units/zarr.json.
"""

import zarr

from stiffcore.store.inputs import PIXELS, images_chunk_bytes, read_image, same_images, write_images
from stiffcore.store.lock import Lease, lease
from stiffcore.store.metadata import is_there
from stiffcore.store.place import StoreError
from stiffcore.store.runs import (
    COMPONENT,
    COMPONENTS,
    DIVISION,
    HISTOGRAM,
    IMAGES,
    SCRATCH,
    Part,
    RunStore,
    stored_spectrum,
)
from stiffcore.store.tiles import TiledMatrix, file_rows
from stiffcore.store.workspace import StoredWorkspace

__all__ = [
    "COMPONENT",
    "COMPONENTS",
    "DIVISION",
    "HISTOGRAM",
    "IMAGES",
    "PIXELS",
    "SCRATCH",
    "Lease",
    "Part",
    "RunStore",
    "StoreError",
    "StoredWorkspace",
    "TiledMatrix",
    "file_rows",
    "images_chunk_bytes",
    "is_there",
    "lease",
    "read_image",
    "same_images",
    "stored_spectrum",
    "write_images",
]

# Zarr's own pools would multiply under several workers on one machine.
zarr.config.set({"async.concurrency": 4, "threading.max_workers": 2})
