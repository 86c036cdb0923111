"""Images in: the few that are asked for, with their labels and their place in the source."""

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from stiffcore.errors import InputError, refuse
from stiffcore.memory import default_allowed_bytes
from stiffcore.networks import archive
from stiffcore.networks.decode import OTHER_SUFFIXES, SUFFIXES, read_image
from stiffcore.networks.names import SOURCES
from stiffcore.study import format_bytes, image_digest

_Triple = tuple[float, float, float]

NORMALIZE: dict[str, tuple[_Triple, _Triple]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
"""Mean and standard deviation of each colour, by name, for values in [0, 1]."""


_LISTED = 5


class Pixels:
    """Images of a source, read one at a time when they are asked for; otherwise as an array of them.

    Attributes:
        shape: (N, H, W, 3).
        dtype: uint8.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, shape: Sequence[int], read: Callable[[int], np.ndarray]) -> None:
        """Of so many images; `read` gives the one at a position, (H, W, 3) uint8."""
        self.shape = tuple(shape)
        self.ndim = len(self.shape)
        self._read = read

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, at: Any) -> np.ndarray:
        i, *inside = at if isinstance(at, tuple) else (at,)
        if not isinstance(i, (int, np.integer)):
            return np.asarray(self)[at]
        if inside:
            return self[i][tuple(inside)]
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self._read(int(i))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.stack([self[i] for i in range(len(self))]).astype(dtype or self.dtype, copy=False)


@dataclass(frozen=True, eq=False)
class Images:
    """A few images, their labels, and where each lies in its source; checked on construction.

    Attributes:
        x: (N, H, W, 3) uint8, of a source read one at a time (`x[i]`); or floating (N, ...) where given from Python,
            already as the network takes them.
        y: (N,) int64, -1 where unknown.
        index: (N,) int64, index in the source.
        source: one line for people.

    Raises:
        InputError: an array of the wrong dtype or shape, or values that are not finite.
    """

    x: np.ndarray | Pixels
    y: NDArray[np.int64]
    index: NDArray[np.int64]
    source: str

    def __post_init__(self) -> None:
        problems = [] if len(self.x.shape) and len(self.x) else ["x holds no image"]
        problems += _pixel_problems(self.x, axis=1, what="x")
        for name, values in (("y", self.y), ("index", self.index)):
            if values.dtype != np.int64 or values.shape != self.x.shape[:1]:
                problems.append(
                    f"{name} is {values.dtype} {values.shape}, it must be int64 {self.x.shape[:1]}, one an image"
                )
        refuse(problems, f"the images of {self.source} are not usable:")

    def __len__(self) -> int:
        return len(self.x)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.x[i] for i in range(len(self)))

    def every(self, first: int, step: int) -> "Images":
        """Every so many-th image of an array, from one on; no image is copied."""
        assert isinstance(self.x, np.ndarray)
        return Images(self.x[first::step], self.y[first::step], self.index[first::step], self.source)

    def digest(self, i: int) -> str:
        """SHA-256, in hexadecimal, of the dtype, shape and bytes of one image.

        Args:
            i: position among these images (not the index in the source).
        """
        return image_digest(self.x[i])


def network_input(image: np.ndarray, normalize: str, dtype: torch.dtype) -> Tensor:
    """One image as the network takes it: a batch of one, normalised in `dtype`.

    Args:
        image: (H, W, 3) uint8; or floating of any shape, which is passed through.
        normalize: a key of `NORMALIZE`; "none" for a floating image.
        dtype: floating dtype of the result.

    Returns:
        (1, 3, H, W), or (1, ...) of a floating image, in `dtype`, contiguous.

    Raises:
        InputError: an unknown normalisation, one for a floating image, or an array of the wrong dtype or
            shape.
    """
    problems = _pixel_problems(image, axis=0, what="the image")
    if normalize not in NORMALIZE:
        problems.append(f"unknown normalize {normalize!r}: use one of {', '.join(NORMALIZE)}")
    elif image.dtype != np.uint8 and normalize != "none":
        problems.append(f"a {image.dtype} image is taken as it is: use normalize 'none', not {normalize!r}")
    refuse(problems)
    # a copy, so that neither a read-only array nor a later change to it matters
    values = torch.from_numpy(np.array(image, order="C")).to(dtype).unsqueeze(0)
    if image.dtype != np.uint8:
        return values
    mean, std = (torch.tensor(v, dtype=dtype).view(1, 3, 1, 1) for v in NORMALIZE[normalize])
    return ((values.permute(0, 3, 1, 2) / 255 - mean) / std).contiguous()


def load_images(
    source: str,
    *,
    data_root: Path | None = None,
    download: bool = False,
    count: int | None = None,
    index: Sequence[int] | None = None,
    per_label: int | None = None,
    allowed: int | None = None,
) -> Images:
    """The asked-for images of a source, and no others: only those are decoded, one at a time, and none is kept.

    Each is decoded here once, so that what is wrong is known at once, and again where it is asked for.

    Args:
        source: "samples" (the first twenty CIFAR-10 test images, from foolbox); "imagenet-samples" (its photographs
            with ImageNet labels, 224 x 224: shorter side to 256, then the centre); "cifar10" (the CIFAR-10 test
            set); a `.npz` file with `x` (N, H, W, 3) uint8 and `y` (N,) integers; or a folder of class
            folders, labelled 0, 1, ... in sorted order, whose chosen images have one size. See `decode.read_image`
            for what becomes of an image file; images of other formats are passed over, and `source` says so.
        data_root: the folder of `cifar-10-batches-py`, for "cifar10" only.
        download: fetch CIFAR-10 into `data_root` where it is not there.
        count: the first so many; 1 where nothing is asked for.
        index: these, in this order.
        per_label: the first so many of each known label in the source, in source order.
        allowed: bytes that an image may take while it is decoded; None: 80 % of what is free. A file that declares
            more is refused before anything is allocated.

    Raises:
        InputError: more than one of `count`, `index` and `per_label`; a source that is unknown, not there or
            malformed; or a choice that the source cannot meet.
    """
    _check_choice(count, index, per_label)
    found = _open(str(source), data_root, download, default_allowed_bytes() if allowed is None else allowed)
    chosen = _choose(found, count, index, per_label)
    return Images(found.read(chosen), found.labels[chosen], chosen, found.name)


# ----------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True)
class _Source:
    """Labels (N,) int64 of everything there is, and how to read the images at some positions, which are checked."""

    name: str
    labels: NDArray[np.int64]
    read: Callable[[NDArray[np.int64]], Pixels]


def _open(source: str, data_root: Path | None, download: bool, allowed: int) -> _Source:
    if source == "samples":
        return _open_samples(source, "cifar10_[0-9][0-9]_[0-9].png", allowed)
    if source == "imagenet-samples":
        return _open_samples(source, "imagenet_[0-9][0-9]_*.jpg", allowed, _to_imagenet)
    if source == "cifar10":
        return _open_cifar10(data_root, download)
    path = Path(source)
    if path.suffix.lower() == ".npz":
        return _open_npz(path, allowed)
    if path.is_dir():
        return _open_folder(path, allowed)
    raise InputError(f"no images at {source!r}: use {SOURCES}")


def _open_samples(
    name: str, pattern: str, allowed: int, prepare: Callable[[Image.Image], Image.Image] | None = None
) -> _Source:
    # Found without importing foolbox, which pulls in other frameworks.
    spec = importlib.util.find_spec("foolbox")
    roots = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(path for root in roots for path in Path(root, "data").glob(pattern))
    if not files:
        raise InputError("the samples come with foolbox, which is not installed: pip install 'stiffcore[demo]'")
    labels = [int(path.stem.rsplit("_", 1)[1]) for path in files]
    return _files_source(f"{name} (foolbox {_version('foolbox')})", files, labels, allowed, prepare)


def _to_imagenet(image: Image.Image) -> Image.Image:
    """The usual evaluation crop: shorter side to 256 (bilinear), then 224 x 224 from the centre."""
    from torchvision.transforms import CenterCrop, Compose, Resize

    return Compose([Resize(256), CenterCrop(224)])(image)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _open_cifar10(data_root: Path | None, download: bool) -> _Source:
    if data_root is None:
        raise InputError("cifar10 needs --data-root: the folder that has cifar-10-batches-py, or shall have it")
    # Imported here: torchvision takes seconds, and no other source needs it.
    from torchvision.datasets import CIFAR10

    try:
        # checks the MD5 sum of each file before it unpickles any
        data = CIFAR10(str(data_root), train=False, download=download)
    except Exception as error:  # absent or damaged files, network, permissions, a full disk
        wish = "the download failed; try again, or put" if download else "use --download, or put"
        raise InputError(
            f"CIFAR-10 is not (or not intact) in {data_root} ({type(error).__name__}: {error}): {wish} "
            f"the files of cifar-10-python.tar.gz in {Path(data_root, CIFAR10.base_folder)}"
        ) from error
    return _Source("cifar10 test set", np.asarray(data.targets, dtype=np.int64), partial(_chosen, data.data))


def _chosen(x: np.ndarray | archive.Member, chosen: NDArray[np.int64]) -> Pixels:
    return Pixels((len(chosen), *x.shape[1:]), lambda i: x[int(chosen[i])])


def _open_npz(path: Path, allowed: int) -> _Source:
    if not path.is_file():
        raise InputError(f"there is no file {path}: check the path")
    try:
        x, y, problems = _read_npz(path, allowed)
    except Exception as error:  # a damaged archive raises nearly anything
        raise InputError(
            f"{path} is damaged, or holds Python objects, which are not read ({error}): save plain arrays"
        ) from error
    refuse(problems, f"{path} is not usable:")
    return _Source(str(path), _whole(y, f"{path}: labels"), partial(_chosen, x))


def _read_npz(path: Path, allowed: int) -> tuple[Any, np.ndarray, list[str]]:
    """x, which is read entry by entry where it can be; y; and what is wrong with them."""
    names, nothing = archive.names(path), np.zeros(0)
    absent = [key for key in ("x", "y") if key not in names]
    if absent:
        there = f"it has {', '.join(map(repr, names)) or 'none'}"
        shown = [f"{path} has no array {key!r} ({there}): save x (N, H, W, 3) uint8 and y (N,)" for key in absent]
        return None, nothing, shown
    x, labels = (archive.Member(path, key) for key in ("x", "y"))
    problems = [problem for member in (x, labels) if (problem := member.problem())]
    held = labels.nbytes + (x.nbytes if x.fortran else x.nbytes // max([1, *x.shape[:1]]))
    if not problems and held > allowed:
        taken = f"{'x, column-major, takes' if x.fortran else 'an image and y take'} {format_bytes(held)}"
        problems = [f"{path}: {taken}, {format_bytes(allowed)} are allowed: save less, or give more --memory"]
    if problems:
        return None, nothing, problems
    problems = _npz_problems(x, labels)
    if problems:
        return None, nothing, problems
    x.check()
    return archive.whole(path, "x") if x.fortran else x, archive.whole(path, "y"), []


def _npz_problems(x: archive.Member, y: archive.Member) -> list[str]:
    problems = []
    if x.dtype != np.uint8 or len(x.shape) != 4 or x.shape[-1] != 3 or 0 in x.shape:
        problems.append(f"x is {x.dtype} {x.shape}, it must be uint8 (N, H, W, 3)")
    if y.dtype.kind not in "iuf" or len(y.shape) != 1:
        problems.append(f"y is {y.dtype} {y.shape}, it must be whole numbers (N,)")
    elif y.shape != x.shape[:1]:
        problems.append(f"y has {y.shape[0]} labels for an x of shape {x.shape}: one label an image")
    return problems


def _open_folder(root: Path, allowed: int) -> _Source:
    classes = [path for path in _listed(root) if path.is_dir()]
    found: list[tuple[Path, int]] = []
    loose = [path for path in _listed(root) if _suffix(path) in SUFFIXES + OTHER_SUFFIXES and not path.is_dir()]
    passed = list(loose)
    for label, folder in enumerate(classes):
        for path in _listed(folder):
            if _suffix(path) in SUFFIXES:
                found.append((path, label))
            elif _suffix(path) in OTHER_SUFFIXES or path.is_dir():
                passed.append(path)
    if not found:
        moved = " (the images lie in it directly: move them into one)" if loose else ""
        raise InputError(f"{root} has no class folder with an image{moved}: {', '.join(SUFFIXES)} are read")
    name = f"{root} ({len(classes)} classes)"
    if passed:
        some = _some([str(path.relative_to(root)) for path in passed])
        name += f"; passed over, as no {', '.join(SUFFIXES)} in a class folder: {some}"
    return _files_source(name, [path for path, _ in found], [label for _, label in found], allowed)


def _listed(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _suffix(path: Path) -> str:
    return path.suffix.lower()


def _files_source(
    name: str,
    files: list[Path],
    labels: list[int],
    allowed: int,
    prepare: Callable[[Image.Image], Image.Image] | None = None,
) -> _Source:
    def read(chosen: NDArray[np.int64]) -> Pixels:
        paths = [files[i] for i in chosen]
        shape = _shape_of_all(paths, allowed, prepare)
        return Pixels((len(paths), *shape), lambda i: read_image(paths[i], allowed, prepare))

    return _Source(name, np.asarray(labels, dtype=np.int64), read)


def _shape_of_all(
    paths: list[Path], allowed: int, prepare: Callable[[Image.Image], Image.Image] | None
) -> tuple[int, ...]:
    first = None
    for path in paths:
        image = read_image(path, allowed, prepare)
        first = image if first is None else first
        if image.shape != first.shape:
            raise InputError(
                f"{path} is {_size(image)} but {paths[0]} is {_size(first)}: all images must have one size"
            )
    assert first is not None
    return first.shape


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"


# ------------------------------------------------------------------------------------------------ choice


def _check_choice(count: int | None, index: Sequence[int] | None, per_label: int | None) -> None:
    given = {"count": count, "index": index, "per_label": per_label}
    named = [name for name, value in given.items() if value is not None]
    problems = []
    if len(named) > 1:
        problems.append(f"{' and '.join(named)} exclude each other: give one of count, index and per_label")
    problems += [
        f"{name} is {given[name]}: it must be at least 1" for name in ("count", "per_label") if _low(given[name])
    ]
    if index is not None and len(index) == 0:
        problems.append("index is empty: name at least one image")
    refuse(problems)


def _low(value: object) -> bool:
    return isinstance(value, int) and value < 1


def _choose(found: _Source, count: int | None, index: Sequence[int] | None, per_label: int | None) -> NDArray[np.int64]:
    if index is not None:
        return _by_index(found, index)
    if per_label is not None:
        return _by_label(found, per_label)
    wanted, total = count or 1, len(found.labels)
    if wanted > total:
        raise InputError(f"{found.name} has {total} images, {wanted} were asked for: use count {total} or less")
    return np.arange(wanted, dtype=np.int64)


def _by_index(found: _Source, index: Sequence[int]) -> NDArray[np.int64]:
    wanted, total = [int(i) for i in index], len(found.labels)
    outside = [i for i in wanted if not 0 <= i < total]
    twice = sorted({i for i in wanted if wanted.count(i) > 1})
    problems = []
    if outside:
        problems.append(f"{found.name} has {total} images, index 0 to {total - 1}: not {_some(outside)}")
    if twice:
        problems.append(f"index names an image twice: {_some(twice)}")
    refuse(problems)
    return np.asarray(wanted, dtype=np.int64)


def _by_label(found: _Source, per_label: int) -> NDArray[np.int64]:
    known = np.unique(found.labels[found.labels >= 0])
    if not known.size:
        raise InputError(f"{found.name} has no known label: use count or index, not per_label")
    places = {int(label): np.flatnonzero(found.labels == label) for label in known}
    short = [f"label {label} has {len(at)}" for label, at in places.items() if len(at) < per_label]
    if short:
        fewest = min(len(at) for at in places.values())
        raise InputError(
            f"{found.name} has fewer than {per_label} images of some labels ({_some(short)}): "
            f"use per_label {fewest} or less, or index"
        )
    return np.sort(np.concatenate([at[:per_label] for at in places.values()])).astype(np.int64)


# ---------------------------------------------------------------------------------------------- checking


def images_in_memory(x: Any, labels: Any = None) -> Images:
    """Images given from Python, checked.

    Args:
        x: array or tensor, uint8 (N, H, W, 3) or floating (N, ...); bfloat16 becomes float32, which holds its numbers.
        labels: (N,) whole numbers, -1 where unknown; None: all unknown.

    Raises:
        InputError: what is no such array, or labels that are no whole numbers.
    """
    pixels = _plain(x)
    count = len(pixels) if pixels.ndim else 0
    known = np.full(count, -1, dtype=np.int64) if labels is None else _whole(_plain(labels))
    return Images(pixels, known, np.arange(count, dtype=np.int64), "in memory")


def _plain(values: Any) -> np.ndarray:
    """As a numpy array in the machine's byte order."""
    if np.ma.is_masked(values):
        raise InputError("images and labels must be arrays whose every number is known, got a masked one: fill it")
    try:
        if isinstance(values, Tensor):
            values = values.detach().cpu().resolve_conj().resolve_neg()
            return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged, sparse, quantised, of 8 bits, without values
        raise InputError(f"images and labels must be arrays: {error}") from error
    if array.dtype.name == "bfloat16":
        return array.astype(np.float32)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _whole(labels: np.ndarray, what: str = "labels") -> NDArray[np.int64]:
    if labels.dtype.kind not in "iuf":
        shown = _some(labels.reshape(-1).tolist())
        raise InputError(f"{what} are whole numbers, got {labels.dtype} ({shown}): number the classes 0, 1, ...")
    wrong = [v for v in labels.reshape(-1).tolist() if not (-(2**63) <= v < 2**63 and v == int(v))]
    if wrong:
        raise InputError(f"{what} are whole numbers, -1 where unknown, got {_some(wrong)}")
    return labels.astype(np.int64)


def _pixel_problems(array: np.ndarray | Pixels, axis: int, what: str) -> list[str]:
    """What keeps `array` from being images, whose own axes begin at `axis`."""
    shape = "(N, H, W, 3)" if axis else "(H, W, 3)"
    if array.dtype == np.uint8:
        if array.ndim == axis + 3 and array.shape[-1] == 3:
            return []
        first = array.ndim == axis + 3 and array.shape[axis] == 3
        hint = f"; its channels come first: give {what}.transpose({'0, 2, 3, 1' if axis else '1, 2, 0'})"
        return [f"{what} is uint8 {array.shape}, it must be {shape}{hint if first else ''}"]
    if array.dtype not in (np.float16, np.float32, np.float64) or not array.ndim:
        hint = ": scale its numbers to 0..255 as uint8" if array.dtype.kind in "iu" else ""
        return [f"{what} is {array.dtype} {array.shape}, it must be uint8 {shape} or floating{hint}"]
    assert isinstance(array, np.ndarray)
    bad = sum(int(values.size - np.isfinite(values).sum()) for values in (array if axis else array[None]))
    return [f"{what} has {bad} values that are NaN or infinite"] if bad else []


def _some(values: Sequence[object]) -> str:
    more = f" and {len(values) - _LISTED} more" if len(values) > _LISTED else ""
    return ", ".join(map(str, values[:_LISTED])) + more
