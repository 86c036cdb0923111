"""stiffcore from Python: one spectrum of any torch function, or a run over the blocks of a network."""

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stiffcore.asked import check_free
from stiffcore.cluster import InProcess, workers_at
from stiffcore.errors import InputError
from stiffcore.jacobian.components import open_matrix
from stiffcore.memory import tree_bytes
from stiffcore.networks.copying import copy_module
from stiffcore.networks.images import images_in_memory
from stiffcore.networks.zoo import check_tensors, settle
from stiffcore.plan import check_budget, make_plan
from stiffcore.record import Event, Header, Stage, UnitRecord
from stiffcore.run import Run
from stiffcore.session import carry_out_plan, prepare
from stiffcore.solvers.projection import Machine
from stiffcore.spectra import Spectrum
from stiffcore.store import RunStore, stored_spectrum
from stiffcore.study import IN_MEMORY, BlockFunction, Identity, Kind, Normalize, Solver, Study, unit_key
from stiffcore.survey import matrix_facts
from stiffcore.unit import carry_out
from stiffcore.version import __version__


def spectrum(
    f: Callable[[Tensor], Tensor] | nn.Module,
    x: Tensor,
    *,
    function: str = "block",
    dtype: Any = "float64",
    reduce: bool = True,
    solver: str | None = None,
    memory: str | int | None = None,
    scratch: str | Path | None = None,
    name: str | None = None,
) -> Spectrum:
    """All eigenvalues of the Jacobian of `f` at `x`, certified.

    The matrix that is solved goes through a temporary store on disk, column chunk by column chunk, as in a run.
    Not supported: functions of several tensors (bind the others), rectangular Jacobians (they have no eigenvalues).

    Args:
        f: with `f(x)` as many numbers as `x`. A module is copied, put in eval mode and cast to `dtype`; any other
            callable is taken as it is, and works in the dtype of `x`.
        x: the point, of any shape, with the batch axis `f` expects (of size 1).
        function: `block`, f itself; `branch`, the residual function F alone, where f(x) = act(F(x) + shortcut).
        dtype: `float64` or `float32`, for modules; as torch or NumPy spell it, too (`torch.float64`).
        reduce: False solves the full n x n matrix.
        solver: `host-dense`, or `extremes` (S, and a proof of how many are negative, alone); None: the first that fits.
        memory: most bytes this process may hold (`4GiB`); None: 80 % of what is free.
        scratch: folder for the temporary store; None: the system's.
        name: how messages call f.

    Returns:
        The spectrum; `values` are ascending by real part, then imaginary part (with `extremes`, maybe the ends alone).

    Raises:
        InputError: where f cannot be linearised, has no square Jacobian, is not deterministic, or the budget is too
            small; the message says what to do.
        StiffcoreError: where f is not finite, or a solver fails.
    """
    if not isinstance(x, Tensor):
        raise InputError(f"x must be a torch tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise InputError(f"x must be a floating tensor, got {x.dtype}: pass x.double()")
    if solver not in (None, Solver.HOST_DENSE, Solver.EXTREMES):
        raise InputError(f"solver must be one of {Solver.HOST_DENSE}, {Solver.EXTREMES}, got {solver!r}")
    options = {"dtype": dtype, "memory": memory, "solver": solver}
    study = Study.ask({"network": IN_MEMORY, "images": IN_MEMORY, **options})
    call: Callable[[Tensor], Tensor] = f
    if isinstance(f, nn.Module):
        torch_dtype = getattr(torch, study.dtype)
        check_tensors(f, type(f).__name__)
        module = copy_module(f)
        settle(module, torch_dtype, type(f).__name__)
        call, x = module, x.detach().to(torch_dtype)
    elif x.dtype in (torch.float32, torch.float64):
        study = study.with_options({"dtype": str(x.dtype).removeprefix("torch.")})
    label = name or str(getattr(f, "__name__", type(f).__name__))
    chosen = _choice(BlockFunction, function, "function")
    by_component = study.solver in (None, Solver.HOST_DENSE)
    operator = open_matrix(call, x, chosen, reduce=reduce, components=by_component, name=label)
    key = unit_key(0, label, function, Kind.MATRIX)
    identity = Identity(
        network=IN_MEMORY,
        weights=IN_MEMORY,
        normalize=str(Normalize.NONE),
        pool=str(study.pool),
        dtype=str(study.dtype),
        reduce=str(study.reduce),
        images=(IN_MEMORY,),
        blocks=(label,),
        functions=(function,),
        kinds=(str(Kind.MATRIX),),
    )
    common: dict[str, Any] = {
        "key": key,
        "image": 0,
        "label": -1,
        "number": 0,
        "block": label,
        "function": chosen,
    }
    unit = matrix_facts(operator, common | {"kind": Kind.MATRIX, "fingerprint": ""})
    machine = Machine(torch.get_num_threads(), tree_bytes(), 0, None, 1e10)
    plan = make_plan([unit], study, machine, workers=1)
    check_budget(plan)
    with tempfile.TemporaryDirectory(prefix="stiffcore-", dir=scratch) as folder:
        store = RunStore(folder, create=True)
        store.put_record(key, UnitRecord(plan.units[0], Stage.PLANNED))
        store.header = Header(__version__, study, identity, threads=plan.threads, units=(key,))
        carry_out(
            folder,
            key,
            threads=plan.threads,
            emit=lambda event: None,
            opener=lambda store, record, device: operator,
        )
        return stored_spectrum(store, key)


def analyze(
    network: str | nn.Module,
    images: str | Path | np.ndarray | Tensor = "samples",
    labels: Any = None,
    *,
    run: str | Path,
    workers: int | None = None,
    scheduler: str | None = None,
    security: Any = None,
    on_event: Callable[[Event], None] | None = None,
    **options: Any,
) -> Run:
    """Start or continue a run: the spectra of the blocks of a network at some images, stored and resumable.

    Args:
        network: as for `--network`, or a module (copied; put in eval mode, cast).
        images: as for `--images`; or an array or tensor: uint8 (N, H, W, 3), to be normalised, or floating
            (N, ...), as the network takes them.
        labels: (N,) whole numbers, -1 where unknown, where `images` is an array; None: all unknown.
        run: new folder or URL, or an existing run, which continues.
        workers: None works in this process, one unit at a time; a number starts at most so many processes (then a
            script needs the usual `if __name__ == "__main__":`).
        scheduler: address or scheduler file of a Dask cluster that runs already; `memory` is then each worker's.
        security: `distributed.Security` that the scheduler wants; None: as Dask's configuration says.
        on_event: told of every step, by one of the events of `stiffcore.record`.
        options: fields of `stiffcore.Study`: blocks, functions, dtype, memory, normalize, keep, device, ...

    Returns:
        The run. A unit that failed is in its metrics, with the reason.

    Raises:
        InputError: whatever is wrong with the request.
        BusyError: where another process works on the run.
        DamagedError: where the run is damaged beyond what is made anew.
        StiffcoreError: where the store cannot be written, or the cluster is lost.
    """
    given = dict(options)
    unknown = [name for name in given if name not in Study.model_fields]
    if unknown:
        raise InputError(f"unknown options: {', '.join(unknown)}; known: {', '.join(Study.model_fields)}")
    module = network if isinstance(network, nn.Module) else None
    given["network"] = network if module is None else IN_MEMORY
    in_memory = None
    if isinstance(images, (str, PathLike)):
        given["images"] = str(images)
        if labels is not None:
            raise InputError("labels are for images given as an array: those of a source have their own")
    else:
        given["images"] = IN_MEMORY
        in_memory = images_in_memory(images, labels)
        if in_memory.x.dtype != np.uint8 and given.get("normalize") is None:
            given["normalize"] = "none"
    tell = on_event or (lambda event: None)
    here = workers is None and scheduler is None
    context = nullcontext(InProcess(tell)) if here else workers_at(scheduler, tell, security=security)
    check_free(str(run))
    with context as executor:
        try:
            prepared = prepare(str(run), given, executor, module, in_memory, workers=workers)
            return carry_out_plan(str(run), prepared, executor, tell, module)[0]
        except TypeError as error:
            if module is None or here or "serialize" not in str(error):
                raise
            raise InputError(
                f"{type(module).__name__} cannot be sent to other processes (it holds a lock, or what else cannot be "
                "pickled): leave workers and scheduler out, or give it by name as package.module:factory"
            ) from error


def _choice(kind: Any, value: str, name: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise InputError(f"{name} must be one of {', '.join(kind)}, got {value!r}") from None
