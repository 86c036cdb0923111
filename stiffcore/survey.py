"""The look before the work: network, images and blocks of a study, and the facts of each unit."""

import time
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from stiffcore.errors import InputError, refuse
from stiffcore.jacobian.components import Components, open_matrix
from stiffcore.jacobian.factors import Factors, open_factors
from stiffcore.jacobian.linearise import Way
from stiffcore.jacobian.reduction import NoSpectrumError, Reduction, is_residual
from stiffcore.jacobian.slices import Slices, open_slices
from stiffcore.networks.blocks import (
    PASSES,
    BlockCall,
    capture,
    choose_blocks,
    loss_and_prediction,
    refuse_random,
    residual_blocks,
)
from stiffcore.networks.images import Images, Pixels, load_images, network_input
from stiffcore.networks.zoo import Network, load_network, wrap_network
from stiffcore.store import IMAGES, RunStore, read_image
from stiffcore.study import (
    FAILED,
    IN_MEMORY,
    BlockFunction,
    Device,
    Identity,
    Kind,
    Reduce,
    Solver,
    Study,
    Survey,
    Unit,
    fingerprint,
    image_bytes,
    image_digest,
    unit_key,
    versions,
)

# The route of a block triangular Jacobian.
COMPONENTS = "components"
# Enough that a column costs what it costs in a chunk, few enough to be over soon.
COLUMNS_TRIED = 16


def survey(
    study: Study, module: nn.Module | None = None, images: Images | None = None, part: int = 0, parts: int = 1
) -> Survey:
    """Load everything once, and look at every unit; no eigenvalue is computed.

    Args:
        study: what was asked.
        module: the network, where the study says `in memory`.
        images: those of this part, where the study says `in memory`; of a run that has its images, all of them
            (`stored_images`); None: from their source.
        part: look only at every so many-th image from this one on.
        parts: how many there are; `study.merged` puts them together.

    Images are read and made the network's input one at a time, and none is kept.

    Raises:
        InputError: whatever is wrong with the request.
    """
    network, images = _open_both(study, module, images)
    settled = study.with_options({"normalize": study.normalize or network.normalize, "weights": network.weights})
    left_out: dict[str, str] = {}
    found = residual_blocks(network.module, image_input(images.x[0], settled), is_residual, left_out)
    blocks = choose_blocks(study.blocks, found, network.module, left_out)
    made_of = {
        "network": network.name,
        "weights": network.weights_digest,
        "normalize": str(settled.normalize),
        "pool": str(study.pool),
        "dtype": str(study.dtype),
        "reduce": str(study.reduce),
    }
    checkpoint = Path(network.weights)
    # what it is made from: a file, or a module, in float32 as they mostly are
    source_bytes = checkpoint.stat().st_size if checkpoint.is_file() else _bytes_of(network.module, 4)
    network_bytes = _bytes_of(network.module) + source_bytes
    units: list[Unit] = []
    seconds: dict[tuple[str, BlockFunction], float] = {}
    of_part = range(len(images)) if study.images == IN_MEMORY else range(part, len(images), parts)
    digests, predictions, losses, pixel_bytes = [], [], [], 0
    for j, at in enumerate(of_part):
        i, pixels = part + j * parts, images.x[at]
        x = image_input(pixels, settled)
        digest = image_digest(pixels)
        digests.append(digest)
        pixel_bytes += pixels.nbytes
        missed: dict[str, str] = {}
        calls, output = capture(network.module, x, blocks, missed)
        refuse_random(network.module, x, calls, passes=1 if j else PASSES)
        loss, prediction = loss_and_prediction(output, int(images.y[at]))
        predictions.append(prediction)
        losses.append(loss)
        for block, function, kind in product(blocks, study.functions, study.kinds):
            asked = {"image": digest, "block": block, "function": function, "kind": kind}
            common: dict[str, Any] = {
                "key": unit_key(i, block, function, kind),
                "image": i,
                "label": int(images.y[at]),
                "number": found.index(block) + 1 if block in found else 0,
                "block": block,
                "function": function,
                "kind": kind,
                "network_bytes": network_bytes,
                "image_bytes": image_bytes(pixels.nbytes, pixels.size * x.element_size()),
                "fingerprint": fingerprint(made_of | asked | {"versions": versions()}),
            }
            if block in missed:
                units.append(Unit(**common, n=0, m=0, route=FAILED, reason=missed[block]))
            else:
                by_component = study.solver in (None, Solver.HOST_DENSE)
                units.append(_look(calls[block], function, study.reduce, common, seconds, components=by_component))
    identity = Identity(
        **made_of,
        images=tuple(digests),
        blocks=tuple(blocks),
        functions=tuple(map(str, study.functions)),
        kinds=tuple(map(str, study.kinds)),
    )
    return Survey(
        study=settled,
        identity=identity,
        description=network.description,
        source=images.source,
        images={
            "y": images.y[of_part],
            "index": images.index[of_part],
            "prediction": np.array(predictions, dtype=np.int64),
            "loss": np.array(losses, dtype=np.float64),
        },
        pixel_bytes=pixel_bytes,
        units=tuple(units),
        left_out={name: why for name, why in left_out.items() if name not in blocks},
    )


def _open_both(study: Study, module: nn.Module | None, images: Images | None) -> tuple[Network, Images]:
    """Network and images; where both cannot be had, one error says so of both."""
    network, problems = None, []
    try:
        network = open_network(study, module)
    except InputError as error:
        problems.append(str(error))
    try:
        images = images if images is not None else open_images(study)
    except InputError as error:
        problems.append(str(error))
    refuse(problems)
    assert network is not None
    assert images is not None
    return network, images


def open_network(study: Study, module: nn.Module | None = None) -> Network:
    """The study's network; `module` is it where the study says `in memory`.

    Raises:
        InputError: where it cannot be had: see `stiffcore.networks.zoo`.
    """
    dtype = getattr(torch, study.dtype)
    if study.network == IN_MEMORY:
        if module is None:
            raise InputError(
                "this run was made from Python with a network in memory: continue it there, with stiffcore.analyze"
            )
        return wrap_network(module, dtype)
    weights = None if study.weights in (None, IN_MEMORY) else Path(study.weights)
    return load_network(study.network, weights, dtype, study.pool, study.memory)


def open_images(study: Study) -> Images:
    """The study's images, from their source.

    Raises:
        InputError: where they cannot be had: see `stiffcore.networks.images.load_images`.
    """
    if study.images == IN_MEMORY:
        raise InputError("this run was made from Python with images in memory: continue it with stiffcore.analyze")
    root = Path(study.data_root) if study.data_root else None
    return load_images(
        study.images,
        data_root=root,
        download=study.download,
        count=study.count,
        index=study.index,
        per_label=study.per_label,
        allowed=study.memory,
    )


def stored_images(url: str, study: Study) -> Images:
    """The images of a run, as it has them, read one at a time: their source may be gone since.

    Raises:
        DamagedError: where they cannot be read.
    """
    store = RunStore(url)
    y, index = (store.get_array(IMAGES, name) for name in ("y", "index"))
    digests = store.settled().identity.images
    first = read_image(store, 0, digests[0])
    pixels = Pixels((len(digests), *first.shape), lambda i: read_image(store, i, digests[i]))
    return Images(pixels, y, index, study.images)


def image_input(image: np.ndarray, study: Study) -> torch.Tensor:
    """One image as the network takes it."""
    return network_input(image, str(study.normalize), getattr(torch, study.dtype))


def device_memory(device: Device, supposed: int | None = None) -> tuple[int, int] | None:
    """Bytes free and bytes held on the CUDA device that a study would use; None where it uses none.

    Args:
        device: asked for.
        supposed: bytes of a device to plan for where there is none.

    Raises:
        InputError: where CUDA is asked for and there is none.
    """
    if device is Device.CPU:
        return None
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return int(free), int(total - free)
    if supposed is not None:
        return supposed, 0
    if device is Device.CUDA:
        raise InputError("--device cuda: torch finds no CUDA device here; leave --device out, or use cpu")
    return None


def operator_of(
    network: nn.Module,
    x: torch.Tensor,
    block: str,
    function: BlockFunction,
    kind: Kind = Kind.MATRIX,
    reduce: Reduce = Reduce.AUTO,
    device: str = "cpu",
    *,
    components: bool = False,
) -> Reduction | Slices | Factors | Components:
    """The operator of one block's function at one image; what it does not need of the network is let go."""
    calls, _ = capture(network, x, [block])
    call = calls[block]
    if kind is Kind.TENSOR_SLICES:
        return open_slices(call.function, call.x, function, name=block)
    if kind is Kind.SINGULAR:
        return open_factors(call.function, call.x, function, name=block)
    if device != "cpu":
        dict(network.named_modules())[block].to(device)
    return open_matrix(
        call.function,
        call.x.to(device),
        function,
        reduce=reduce is Reduce.AUTO,
        components=components,
        name=block,
    )


def _look(
    call: BlockCall,
    function: BlockFunction,
    reduce: Reduce,
    common: dict[str, Any],
    seconds: dict[tuple[str, BlockFunction], float],
    *,
    components: bool,
) -> Unit:
    """The facts of one unit, or why it has none; `seconds` a column took at the first image are those of the others."""
    try:
        if common["kind"] is Kind.TENSOR_SLICES:
            return _slices_facts(open_slices(call.function, call.x, function, name=call.name), common)
        if common["kind"] is Kind.SINGULAR:
            return _factors_facts(open_factors(call.function, call.x, function, name=call.name), common)
        found = open_matrix(
            call.function, call.x, function, reduce=reduce is Reduce.AUTO, components=components, name=call.name
        )
        facts = matrix_facts(found, common, seconds.get((call.name, function)))
    except NoSpectrumError as error:
        return Unit(**common, n=error.n, m=error.m, route="none", reason=str(error))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what a user's block raises is anything; the other blocks go on
        reason = str(error) if isinstance(error, InputError) else f"block {call.name}: {type(error).__name__}: {error}"
        return Unit(**common, n=call.x.numel(), m=0, route=FAILED, reason=reason)
    if facts.column_s:
        seconds[call.name, function] = facts.column_s
    return facts


def _slices_facts(slices: Slices, common: dict[str, Any]) -> Unit:
    accumulation = slices.accumulation
    start = time.perf_counter()
    if accumulation is None:
        slices.rows(np.arange(min(COLUMNS_TRIED, slices.jacobian.m)))
    return Unit(
        **common,
        n=slices.jacobian.n,
        m=slices.jacobian.m,
        k=slices.bound,
        zeros=slices.count - slices.bound,
        route="windows" if accumulation else "rows",
        reason=slices.reason,
        column_items=slices.column_items,
        kernel_items=slices.kernel_items,
        column_s=(time.perf_counter() - start) / COLUMNS_TRIED,
        accumulated_items=accumulation.items if accumulation else 0,
        accumulated_flops=accumulation.flops if accumulation else 0,
        nonzeros=slices.entries,
    )


def _factors_facts(factors: Factors, common: dict[str, Any]) -> Unit:
    rows, columns = len(factors.rows), len(factors.columns)
    start = time.perf_counter()
    if not factors.parts:
        factors.jacobian.jvp(factors.jacobian.x.new_zeros((COLUMNS_TRIED, factors.jacobian.n)))
    return Unit(
        **common,
        n=factors.jacobian.n,
        m=factors.jacobian.m,
        k=factors.order,
        width=0 if factors.reduction is not None else max(rows, columns),
        ones=factors.ones,
        zeros=factors.count - factors.order - factors.ones,
        route="factors" if factors.reduction is not None else "whole",
        reason=factors.reason,
        column_items=factors.column_items,
        kernel_items=factors.kernel_items,
        column_s=(time.perf_counter() - start) / COLUMNS_TRIED,
        accumulated_items=max((part.items for part in factors.parts), default=0),
        accumulated_flops=sum(part.flops for part in factors.parts),
        nonzeros=sum(part.entries for part in factors.parts) or rows * columns,
    )


def matrix_facts(found: Reduction | Components, common: dict[str, Any], column_s: float | None = None) -> Unit:
    """The facts of a unit of eigenvalues; see `unit_facts`. Of components, those of one in the middle stand for all."""
    if isinstance(found, Reduction):
        return unit_facts(found, common, column_s)
    largest = max(range(len(found)), key=lambda c: (len(found.members[c]), -abs(c - len(found) // 2)))
    one = found.reduction(largest)
    return Unit(
        **common,
        n=found.n,
        m=found.n,
        k=found.n,
        width=found.order,
        components=len(found),
        route=COMPONENTS,
        reason=found.reason,
        column_items=one.column_items,
        kernel_items=one.kernel_items,
        held_items=found.held_items,
        column_s=_column_seconds(one) if column_s is None else column_s,
    )


def unit_facts(reduction: Reduction, common: dict[str, Any], column_s: float | None = None) -> Unit:
    """The facts of a unit that has a spectrum.

    Args:
        reduction: its operator.
        common: the fields of `Unit` that do not follow from it.
        column_s: seconds that a column takes; None: some are timed.
    """
    return Unit(
        **common,
        n=reduction.n,
        m=reduction.n,
        k=reduction.k,
        ones=reduction.ones,
        zeros=reduction.zeros,
        route=reduction.route,
        reason=reduction.reason,
        column_items=reduction.column_items,
        kernel_items=reduction.kernel_items,
        column_s=_column_seconds(reduction) if column_s is None else column_s,
        products=reduction.products(0, reduction.k) if reduction.coloured else 0,
        accumulated_items=reduction.accumulation.items if reduction.accumulation else 0,
        accumulated_flops=reduction.accumulation.flops if reduction.accumulation else 0,
        nonzeros=reduction.nonzeros_bound(),
        fill=reduction.fill_bound() if reduction.coloured else 0,
    )


def _column_seconds(reduction: Reduction) -> float:
    if reduction.k == 0:
        return 0.0
    columns = min(COLUMNS_TRIED, reduction.k)
    start = time.perf_counter()
    if reduction.jacobian.way is Way.ROWS:  # columns come from all rows of J, of which some are tried
        reduction.jacobian.vjp(reduction.jacobian.value.new_zeros((columns, reduction.jacobian.m)))
        return (time.perf_counter() - start) / columns * reduction.jacobian.m / reduction.k
    reduction.columns(0, columns)
    return (time.perf_counter() - start) / columns


def _bytes_of(module: nn.Module, itemsize: int | None = None) -> int:
    tensors = chain(module.parameters(), module.buffers())
    return sum(t.numel() * (itemsize or t.element_size()) for t in tensors)
