"""What was asked: a frozen, validated study, its units of work, and the fingerprint that says what made a result."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cache
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from stiffcore.errors import InputError, refuse
from stiffcore.version import __version__


class BlockFunction(StrEnum):
    """Which function of a block is analysed: the whole block, or its residual branch F alone."""

    BLOCK = "block"
    BRANCH = "branch"


class Kind(StrEnum):
    """Which spectrum.

    `matrix`: the eigenvalues of the n x n Jacobian. `tensor-slices`: those of the last two axes of the Jacobian tensor,
    all output units and input channels together, as the source paper's tables have them. `singular`: the singular
    values of the Jacobian, rectangular or not.
    """

    MATRIX = "matrix"
    TENSOR_SLICES = "tensor-slices"
    SINGULAR = "singular"


class Precision(StrEnum):
    """The arithmetic of everything: network, Jacobian, eigenvalues."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"


class Device(StrEnum):
    """Where Jacobians are built and eigenvalues computed; `auto` takes CUDA where there is one."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Reduce(StrEnum):
    """Which matrix is solved: the smallest with the same eigenvalues (`auto`), or the n x n Jacobian itself."""

    AUTO = "auto"
    NONE = "none"


class Solver(StrEnum):
    """The rungs of the ladder, from the top; then those that are taken only where they are asked for.

    `divide` finds the whole spectrum of a matrix that fits no memory, in the store, by spectral divide and conquer,
    slowly: the last rung.
    `extremes` finds the ends of the spectrum and proves how many eigenvalues are left of 0, without the rest;
    `matrix-only` builds and keeps the matrix and solves nothing. `slices` is the way of all tensor slices;
    `components` solves the diagonal blocks of a block triangular Jacobian, one after the other.
    `svd` and `symmetric` (eigenvalues of a symmetric matrix, the squares) are those of singular values.
    """

    CUDA_DENSE = "cuda-dense"
    HOST_DENSE = "host-dense"
    DIVIDE = "divide"
    EXTREMES = "extremes"
    MATRIX_ONLY = "matrix-only"
    SVD = "svd"
    SYMMETRIC = "symmetric"
    SLICES = "slices"
    COMPONENTS = "components"
    NONE = "none"


class Build(StrEnum):
    """How the matrix is built, from the fastest; which of them a function and a budget allow, the plan says.

    `accumulated`: from the kernels themselves, operation by operation; `shared`: by forward-mode products that columns
    share; `columns`: by one product each. The first two hold the matrix sparse.
    """

    ACCUMULATED = "accumulated"
    SHARED = "shared"
    COLUMNS = "columns"


class Keep(StrEnum):
    """What stays in the store: the metrics with a histogram of real parts, the spectra, or the matrices too."""

    METRICS = "metrics"
    SPECTRA = "spectra"
    ALL = "all"


class Normalize(StrEnum):
    """How 8-bit images become the network's input."""

    CIFAR10 = "cifar10"
    IMAGENET = "imagenet"
    NONE = "none"


class Pool(StrEnum):
    """Whether a ResNet's stem keeps its max-pool; `auto` follows the checkpoint's layout."""

    AUTO = "auto"
    MAX = "max"
    NONE = "none"


IN_MEMORY = "in memory"
# The route of a unit whose block cannot be had.
FAILED = "failed"
# Random tangents on which a reduction, or a matrix, is compared with the function itself.
PROBES = 3
MAX_NAME = 120


class Study(BaseModel):
    """One question, fully stated. Frozen; validated when made.

    Raises:
        pydantic.ValidationError: where an option is wrong; `analyze` says so by an InputError.

    Attributes:
        network: `resnet18`, `resnet34`, `resnet50`, `package.module:factory`, or `in memory`.
        weights: checkpoint file; None takes the bundled one, or the factory's own; `random` initialises.
        images: `samples`, `imagenet-samples`, `cifar10`, a .npz, a folder of class folders, or `in memory`.
        data_root: where `cifar10` lies.
        download: whether torchvision may download it.
        count: the first so many images (1 where neither count, index nor per_label is given).
        index: these images.
        per_label: the first so many of each label.
        normalize: None lets the network choose.
        pool: see `Pool`.
        blocks: `all`, numbers among all (1-based), or module paths, comma-separated.
        functions: see `BlockFunction`.
        kinds: see `Kind`.
        dtype: see `Precision`.
        reduce: see `Reduce`.
        solver: the one rung to use; None lets the planner take the first that fits.
        memory: bytes that the run's processes may use together, or each worker of a cluster that is not ours; None:
            what the machine or container has left.
        device_memory: bytes that a unit may use of a CUDA device; None: what is free.
        device: see `Device`.
        keep: see `Keep`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    network: str = "resnet50"
    weights: str | None = None
    images: str = "samples"
    data_root: str | None = None
    download: bool = False
    count: int | None = Field(default=None, ge=1)
    index: tuple[int, ...] | None = None
    per_label: int | None = Field(default=None, ge=1)
    normalize: Normalize | None = None
    pool: Pool = Pool.AUTO
    blocks: str = "all"
    functions: tuple[BlockFunction, ...] = (BlockFunction.BLOCK,)
    kinds: tuple[Kind, ...] = (Kind.MATRIX,)
    dtype: Precision = Precision.FLOAT64
    reduce: Reduce = Reduce.AUTO
    solver: Solver | None = None
    memory: int | None = Field(default=None, gt=0)
    device_memory: int | None = Field(default=None, gt=0)
    device: Device = Device.AUTO
    keep: Keep = Keep.SPECTRA

    @field_validator("solver", mode="before")
    @classmethod
    def _chosen(cls, value: Any) -> Any:
        if value in (Solver.NONE, Solver.SLICES, Solver.COMPONENTS):
            raise ValueError(f"Input should be 'auto', {', '.join(repr(str(s)) for s in list(Solver)[:-2])}")
        return None if value == "auto" else value

    @field_validator("memory", "device_memory", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        return parse_bytes(value) if isinstance(value, str) else value

    @field_validator("dtype", mode="before")
    @classmethod
    def _dtype_name(cls, value: Any) -> Any:
        """As torch and NumPy spell it, too: `torch.float64`, `np.float64`, `np.dtype("float64")`."""
        if isinstance(value, type):
            return value.__name__
        return str(value).removeprefix("torch.")

    @field_validator("index", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        wrong = [part for part in _split(value) if not part.isdecimal()]
        if wrong:
            raise ValueError(f"{', '.join(map(repr, wrong))}: write numbers, as 0,5,7")
        return [int(part) for part in _split(value)]

    @field_validator("blocks", mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        return ",".join(str(v) for v in value) if isinstance(value, (list, tuple)) else value

    @field_validator("functions", "kinds", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return _split(value) if isinstance(value, str) else value

    @field_validator("functions", "kinds", "index")
    @classmethod
    def _once(cls, value: tuple | None) -> tuple | None:
        if value is not None and (not value or len(set(value)) < len(value)):
            raise ValueError("give at least one, and none twice")
        return value

    @field_validator("weights", "data_root", mode="before")
    @classmethod
    def _absolute(cls, value: Any) -> Any:
        # a run is continued from anywhere
        known = not isinstance(value, (str, PathLike)) or value in ("random", IN_MEMORY)
        return value if known else str(Path(value).expanduser().absolute())

    @field_validator("images", mode="before")
    @classmethod
    def _absolute_images(cls, value: Any) -> Any:
        known = not isinstance(value, (str, PathLike)) or value in ("samples", "imagenet-samples", "cifar10", IN_MEMORY)
        return value if known else str(Path(value).expanduser().absolute())

    @model_validator(mode="after")
    def _go_together(self) -> "Study":
        chosen = ["--" + n.replace("_", "-") for n in ("count", "index", "per_label") if getattr(self, n) is not None]
        of_singular = self.solver in (Solver.SVD, Solver.SYMMETRIC)
        if len(chosen) > 1:
            raise ValueError(f"give one of {', '.join(chosen)}, not several")
        # an option that would do nothing is refused
        if chosen and self.images == IN_MEMORY:
            raise ValueError(f"{chosen[0]}: for images from a source; of an array, give those that are wanted")
        if self.images != "cifar10" and (self.data_root is not None or self.download):
            raise ValueError("--data-root and --download are for --images cifar10")
        if self.network == IN_MEMORY and (self.weights not in (None, IN_MEMORY) or self.pool is not Pool.AUTO):
            raise ValueError("--weights and --pool are for a network by name: a module in memory has its own")
        if of_singular and self.kinds != (Kind.SINGULAR,):
            raise ValueError(f"--solver {self.solver} is for --kind singular alone")
        if Kind.MATRIX not in self.kinds:
            divided = self.solver is Solver.DIVIDE and Kind.SINGULAR in self.kinds
            if self.solver is not None and not (of_singular or divided):
                raise ValueError(f"--solver {self.solver} is for --kind matrix")
            if self.reduce is Reduce.NONE:
                raise ValueError("--reduce none is for --kind matrix")
        return self

    @classmethod
    def ask(cls, options: Mapping[str, Any]) -> "Study":
        """A study from options as a user gives them; None means not given.

        Raises:
            InputError: naming every option that is wrong, and what it may be.
        """
        try:
            return cls(**{k: v for k, v in options.items() if v is not None})
        except ValidationError as error:
            refuse((_problem(e) for e in error.errors()), "some options are wrong:")
            raise

    def with_options(self, options: Mapping[str, Any]) -> "Study":
        """The study with some options changed; None means not given. One way to choose images replaces another."""
        given = {k: v for k, v in options.items() if v is not None}
        base = self.model_dump(mode="json")
        if {"count", "index", "per_label"} & given.keys():
            base |= {"count": None, "index": None, "per_label": None}
        return Study.ask(base | given)


# No network has so many of anything: what is read must be a size, not only a number.
LARGEST = 1 << 48
Size = Annotated[int, Field(ge=0, le=LARGEST)]
Order = Annotated[int, Field(ge=0, lt=2**31)]
Flops = Annotated[int, Field(ge=0, le=LARGEST**2)]


class Unit(BaseModel):
    """One spectrum to find, with the facts its plan follows from.

    Attributes:
        key: its name in the store.
        image: position among the run's images.
        label: of the image; -1 where unknown.
        number: of the block among all residual blocks, from 1; 0 where it is none of them.
        block: module path.
        function: see `BlockFunction`.
        kind: see `Kind`.
        n: columns of J.
        m: rows of J.
        width: columns of the matrix to solve, where it is not square (singular values); of components, the order of the
            largest one.
        k: order of the matrix to solve; of tensor slices, how many eigenvalues are not zero (until they are found, at
            most).
        ones: exact eigenvalues 1.
        zeros: exact eigenvalues 0.
        components: how many diagonal blocks are solved, where J is block triangular; else 0. Their ones and zeros are
            not known until they are found; until then, k is n.
        route: which matrix is solved (`waist`, `active`, `full`), or `components`; `none` where there is no spectrum;
            `FAILED` where the block cannot be had (n and m are 0 where they are not known).
        reason: why, in one line.
        column_items: numbers alive at once while one column is computed.
        column_s: seconds a column took when tried.
        products: forward-mode products for all columns, where some share one (colouring); 0 where each takes its own.
        accumulated_items: numbers alive at once where the matrix is accumulated; 0 where that is not possible.
        accumulated_flops: of that.
        nonzeros: at most so many of the matrix's entries are not zero; 0 where unknown.
        fill: entries of the triangular factors of the matrix at most; 0 where unknown.
        kernel_items: numbers in the largest kernel of the function, which a chunk of any width copies.
        held_items: numbers that stay in memory to compute the diagonal blocks of components.
        image_bytes: to read the image and make it the network's input, see `image_bytes`; 0: not counted.
        network_bytes: parameters and buffers of the network, and of the checkpoint or module that it is made from.
        fingerprint: sha256 of all that decides the result, for the record: a run goes on by its header and `made_with`.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    key: str
    image: Annotated[int, Field(ge=0, lt=10**9)]
    label: Annotated[int, Field(ge=-(2**63), lt=2**63)]
    number: Size
    block: str
    function: BlockFunction
    kind: Kind
    n: Order
    m: Order
    width: Size = 0
    components: Size = 0
    k: Size = 0
    ones: Size = 0
    zeros: Size = 0
    route: str
    reason: str
    column_items: Size = 0
    kernel_items: Size = 0
    held_items: Size = 0
    column_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    products: Size = 0
    accumulated_items: Size = 0
    accumulated_flops: Flops = 0
    nonzeros: Size = 0
    fill: Size = 0
    image_bytes: Size = 0
    network_bytes: Size = 0
    fingerprint: str


@dataclass(frozen=True)
class Identity:
    """What decides the results of a run; it is continued with the same alone.

    Attributes:
        network: by name.
        weights: sha256.
        normalize: of images, see `Normalize`.
        pool: see `Pool`.
        dtype: see `Precision`.
        reduce: see `Reduce`.
        images: `image_digest` of each.
        blocks: module paths.
        functions: see `BlockFunction`.
        kinds: see `Kind`.
    """

    network: str
    weights: str
    normalize: str
    pool: str
    dtype: str
    reduce: str
    images: tuple[str, ...]
    blocks: tuple[str, ...]
    functions: tuple[str, ...]
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Survey:
    """What a study turns out to be, once network and images are looked at: plain data, for any process.

    Attributes:
        study: with weights and normalisation filled in.
        identity: a run refuses to continue with another one.
        description: of the network, one line.
        source: of the images, one line.
        images: arrays by name, each with one entry an image: `y` labels (-1 unknown), `index` in the source,
            `prediction` (-1 where the network is no classifier), `loss` (cross-entropy, nan where the label is
            unknown). Their pixels stay where they are.
        pixel_bytes: of all images together.
        units: in order of image, block, function.
        left_out: of `--blocks all`: the modules that may be residual blocks, or are, but cannot be had, and why.
    """

    study: Study
    identity: Identity
    description: str
    source: str
    images: dict[str, np.ndarray]
    pixel_bytes: int
    units: tuple[Unit, ...]
    left_out: dict[str, str] = field(default_factory=dict)


def merged(parts: Sequence[Survey]) -> Survey:
    """Put surveys of every so many-th image, the first of them first, together."""
    images = {name: _interleaved([part.images[name] for part in parts]) for name in parts[0].images}
    digests = _interleaved([np.array(part.identity.images, dtype=object) for part in parts])
    units = sorted((unit for part in parts for unit in part.units), key=lambda unit: unit.image)
    return replace(
        parts[0],
        identity=replace(parts[0].identity, images=tuple(digests.tolist())),
        images=images,
        pixel_bytes=sum(part.pixel_bytes for part in parts),
        units=tuple(units),
    )


def _interleaved(parts: Sequence[np.ndarray]) -> np.ndarray:
    found = np.empty(sum(map(len, parts)), parts[0].dtype)
    for first, part in enumerate(parts):
        found[first :: len(parts)] = part
    return found


def image_bytes(read: int, as_input: int) -> int:
    """What one image takes until it is the network's input.

    Args:
        read: bytes read from the store, which are held as they come, as an array, and as a copy of it.
        as_input: bytes of the input, which is normalised in three arrays.
    """
    return 3 * read + 3 * as_input


def parse_bytes(text: str) -> int:
    """Bytes from text like `4GiB`, `500MB` or `1073741824`.

    Raises:
        InputError: where it is not a size.
    """
    try:
        if not re.fullmatch(r"\s*\d*\.?\d+\s*[A-Za-z]*\s*", text):  # ByteSize overlooks what follows
            raise ValueError
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValueError:
        raise InputError(f"{text!r} is not a size: write 4GiB, 500MiB or a number of bytes") from None


def counted(number: int, one: str, many: str) -> str:
    """A number with its noun."""
    return f"{number} {one if number == 1 else many}"


def format_bytes(count: float) -> str:
    """Bytes for people, in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def versions() -> dict[str, str]:
    """The versions that can change a digit of a result."""
    return {"stiffcore": __version__, **{name: _installed(name) for name in ("torch", "numpy", "scipy")}}


@cache
def _installed(name: str) -> str:
    """A package's version, which takes 10 ms to read, and is asked for every unit."""
    return version(name)


def fingerprint(parts: Mapping[str, Any]) -> str:
    """sha256 of what made a result, as canonical JSON; the same parts in any order give the same text."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def image_digest(image: np.ndarray) -> str:
    """sha256 of the dtype, shape and bytes of one image."""
    image = np.ascontiguousarray(image)
    return hashlib.sha256(f"{image.dtype}\0{image.shape}\0".encode() + image.tobytes()).hexdigest()


def unit_key(image: int, block: str, function: str, kind: str) -> str:
    """The name of a unit in the store: one spectrum of one block's function at one image.

    A block that is no plain module path, or is too long for a file name, is told apart by a digest.
    """
    safe = re.sub(r"[^A-Za-z0-9_.]", "_", block)[:MAX_NAME]
    if safe != block:
        safe += "-" + hashlib.sha256(block.encode()).hexdigest()[:12]
    return f"{image:06d}-{safe}-{function}-{kind}"


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _problem(error: Any) -> str:
    name = "--" + str(error["loc"][0]).replace("_", "-") if error["loc"] else ""
    name = {"--functions": "--function", "--kinds": "--kind"}.get(name, name)
    message = error["msg"].removeprefix("Value error, ")
    got = f", got {error['input']!r}" if name and repr(error["input"]) not in message else ""
    return f"{name}: {message}{got}".lstrip(": ")
