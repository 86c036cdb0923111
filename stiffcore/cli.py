"""The command line: its options. What a command does is imported once it is called, see `stiffcore.commands`."""

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from stiffcore.ending import handle
from stiffcore.errors import StiffcoreError
from stiffcore.version import __version__

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Exact, certified eigenvalue spectra of the Jacobians of network blocks; stored, and resumable.",
)

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A new folder or URL, or one that exists.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Network = Annotated[
    str | None,
    typer.Option(
        help="resnet18 | 34 | 50, CIFAR-10's resnet20 | 32 | 44 | 56 | 110, package.module:factory; a new run needs it"
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        help="Checkpoint: .safetensors, .pt, .pth; `random`; not given: the bundled one (resnet18, resnet50)."
    ),
]
ImagesOption = Annotated[
    str | None,
    typer.Option(
        help="samples (20 CIFAR-10 test images, with the demo extra) | imagenet-samples (20 photographs, 224 x 224, "
        "too) | cifar10 (with --data-root) | FILE.npz (x uint8 N,H,W,3 and y) | a folder of class folders",
        show_default="samples",
    ),
]
DataRoot = Annotated[str | None, typer.Option(help="Where torchvision's CIFAR-10 lies, or goes.")]
Download = Annotated[bool | None, typer.Option("--download", help="Allow torchvision to download CIFAR-10.")]
Normalize = Annotated[str | None, typer.Option(help="cifar10 | imagenet | none", show_default="as the network wants")]
Count = Annotated[int | None, typer.Option(help="The first N images", show_default="1")]
Index = Annotated[str | None, typer.Option(help="These images: 0,5,7")]
PerLabel = Annotated[int | None, typer.Option(help="The first N images of each label.")]
Blocks = Annotated[
    str | None, typer.Option(help="all | 1,2,16 | layer1.1,encoder.3 (any module path)", show_default="all")
]
Function = Annotated[str | None, typer.Option(help="block | branch | block,branch", show_default="block")]
Kind = Annotated[
    str | None,
    typer.Option(
        help="matrix: the eigenvalues of the n x n Jacobian | tensor-slices: those of the Jacobian tensor's last two "
        "axes, which the paper's tables show | singular: singular values | several, with commas",
        show_default="matrix",
    ),
]
Dtype = Annotated[str | None, typer.Option(help="float64 | float32", show_default="float64")]
Pool = Annotated[str | None, typer.Option(help="Max-pool of a ResNet's stem: auto | max | none", show_default="auto")]
ReduceOption = Annotated[
    str | None,
    typer.Option(
        "--reduce",
        help="auto: the smallest matrix with the same eigenvalues | none: the n x n Jacobian itself",
        show_default="auto",
    ),
]
SolverOption = Annotated[
    str | None,
    typer.Option(
        "--solver",
        help="auto: the first that fits | cuda-dense | host-dense | extremes (S, and a proof of how many eigenvalues "
        "are negative, without the others: seconds) | divide (all eigenvalues of a matrix that no budget holds, in the "
        "store) | matrix-only (build and keep, solve nothing); of singular values "
        "svd | symmetric",
        show_default="auto",
    ),
]
DeviceMemory = Annotated[
    str | None,
    typer.Option(help="What a unit may hold on a CUDA device, as 80GB; `plan` takes it for a device that is not here."),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        help="Address or scheduler file of a Dask cluster that runs already; --memory is then each worker's",
        show_default="workers on this machine",
    ),
]
TlsCa = Annotated[str | None, typer.Option(help="Certificate that those of the Dask cluster are signed with.")]
TlsCert = Annotated[str | None, typer.Option(help="Certificate to reach the Dask cluster with.")]
TlsKey = Annotated[str | None, typer.Option(help="Its key", show_default="in the same file")]
Dashboard = Annotated[
    bool,
    typer.Option("--dashboard", help="Serve Dask's pages of the workers here, to all users of this machine."),
]
Memory = Annotated[
    str | None, typer.Option(help="What all processes may hold together, as 4GiB", show_default="80 % of what is free")
]
Device = Annotated[str | None, typer.Option(help="auto | cpu | cuda", show_default="auto")]
Keep = Annotated[str | None, typer.Option(help="metrics | spectra | all (the matrices too)", show_default="spectra")]
Trust = Annotated[
    bool,
    typer.Option("--trust", help="Let a RUN that exists import the code, and fetch the images, that it names."),
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="At most so many units side by side", show_default="one a core")
]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"stiffcore {__version__}")
        raise typer.Exit


@app.command()
def run(
    run: RunArgument,
    network: Network = None,
    weights: Weights = None,
    images: ImagesOption = None,
    data_root: DataRoot = None,
    download: Download = None,
    normalize: Normalize = None,
    count: Count = None,
    index: Index = None,
    per_label: PerLabel = None,
    blocks: Blocks = None,
    function: Function = None,
    kind: Kind = None,
    dtype: Dtype = None,
    pool: Pool = None,
    reduce: ReduceOption = None,
    solver: SolverOption = None,
    memory: Memory = None,
    device_memory: DeviceMemory = None,
    device: Device = None,
    keep: Keep = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    dashboard: Dashboard = False,
    trust: Trust = False,
) -> None:
    """Compute spectra: start a run, or continue one.

    A RUN that exists continues from its last whole chunk or stage: with no options as first asked; --memory, --device,
    --device-memory, --solver, --keep, --workers and --scheduler may change, any other option that disagrees is refused.
    Ctrl-C stops it cleanly.
    """
    options = _options(locals())
    _check_run(run, options, here=scheduler is None)
    from stiffcore.commands import working

    working.run(run, options, workers, scheduler, (tls_ca, tls_cert, tls_key), dashboard=dashboard, trust=trust)


@app.command()
def demo(
    run: Annotated[str, typer.Argument(metavar="[RUN]", help="Folder of the run.")] = "store/demo",
    memory: Memory = "3GiB",
    workers: Workers = None,
) -> None:
    """The main job on an embedded default: all sixteen blocks of a ResNet50 at one CIFAR-10 test image.

    Minutes on two cores. The same as `stiffcore run store/demo --network resnet50 --images samples --memory 3GiB`.
    """
    options = {"network": "resnet50", "images": "samples", "blocks": "all", "memory": memory}
    _check_run(run, options)
    from stiffcore.commands import working

    working.run(run, options, workers)


@app.command()
def plan(
    run: RunArgument,
    network: Network = None,
    weights: Weights = None,
    images: ImagesOption = None,
    data_root: DataRoot = None,
    download: Download = None,
    normalize: Normalize = None,
    count: Count = None,
    index: Index = None,
    per_label: PerLabel = None,
    blocks: Blocks = None,
    function: Function = None,
    kind: Kind = None,
    dtype: Dtype = None,
    pool: Pool = None,
    reduce: ReduceOption = None,
    solver: SolverOption = None,
    memory: Memory = None,
    device_memory: DeviceMemory = None,
    device: Device = None,
    keep: Keep = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Say what `run` with the same options would take, unit by unit: k, solver, memory, disk, time; write nothing.

    Exit code 2 where the budget holds no unit.
    """
    options = _options(locals())
    from stiffcore.asked import check_request

    check_request(run, options, here=scheduler is None)
    from stiffcore.commands import working

    working.plan(run, options, workers, scheduler, (tls_ca, tls_cert, tls_key), trust=trust, as_json=as_json)


@app.command()
def status(run: RunArgument, as_json: Json = False) -> None:
    """Say what is done, under way and failed in a run."""
    from stiffcore.commands import reading

    reading.status(run, as_json)


@app.command()
def verify(
    run: RunArgument,
    certificates: Annotated[
        bool, typer.Option("--certificates", help="Make the certificates again, too, from network and images.")
    ] = False,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Read everything in a run again: checksums, records, fingerprints; say what is damaged, for `run` to make anew.

    Exit code 1 where anything is.
    """
    from stiffcore.commands import reading

    reading.verify(run, certificates, trust, as_json)


@app.command()
def show(
    run: RunArgument,
    each: Annotated[bool, typer.Option("--each", help="List every spectrum, however many there are.")] = False,
    as_json: Json = False,
) -> None:
    """Print the tables of a run: S, the shares by sign, the extremes, and the certificates; means and correlations."""
    from stiffcore.commands import reading

    reading.show(run, each, as_json)


@app.command()
def picture(
    run: RunArgument,
    block: Annotated[str, typer.Option(help="Its number, or module path.")] = "1",
    image: Annotated[int, typer.Option(help="Position among the run's images.")] = 0,
    function: Annotated[str, typer.Option(help="block | branch")] = "block",
    grid: Annotated[int, typer.Option(help="Pseudospectrum: points along the longer side, one sparse LU each.")] = 0,
    memory: Annotated[
        str | None, typer.Option(help="What a sparse LU may take, as 4GiB", show_default="no limit")
    ] = None,
    to: Annotated[
        Path | None, typer.Option(help="Draw it, and the eigenvalues, in this new file: .png, .svg or .pdf")
    ] = None,
    trust: Trust = False,
) -> None:
    """Compute the numerical range of one unit and, with --grid, its pseudospectrum; both stay in the run.

    They are of the matrix that was solved, which has the eigenvalues of the block's Jacobian in another basis. What is
    there already is not computed again.
    """
    from stiffcore.commands import reading

    reading.picture(run, block, image, function, grid, memory, to, trust)


@app.command()
def export(
    run: RunArgument,
    to: Annotated[Path, typer.Option(help="The file to write, .csv, .parquet or .h5; it must not exist.")],
) -> None:
    """Write the metrics as CSV or parquet, one row a spectrum; or metrics and spectra as HDF5."""
    from stiffcore.commands import reading

    reading.export(run, to)


@app.command()
def report(
    run: RunArgument,
    to: Annotated[Path, typer.Option(help="The page to write, .html; it must not exist.")],
    figures: Annotated[Path | None, typer.Option(help="Folder for the figures as PNG and SVG files.")] = None,
    shared: Annotated[bool, typer.Option("--shared-axes", help="Draw the spectra of all blocks to one scale.")] = False,
) -> None:
    """Write one self-contained page: spectra, S and P along depth and by label, correlations, certificates."""
    from stiffcore.commands import reading

    reading.report(run, to, figures, shared)


@app.command()
def compare(
    runs: Annotated[
        list[str], typer.Argument(help="Two or more, paths or URLs; the first is what others differ from.")
    ],
    to: Annotated[Path | None, typer.Option(help="A file for the rows, .csv; it must not exist.")] = None,
) -> None:
    """Compare runs block by block, at the same images: before and after training, seeds, weights."""
    from stiffcore.commands import reading

    reading.compare(runs, to)


def _options(given: dict[str, Any]) -> dict[str, Any]:
    from stiffcore.study import Study

    renamed = {"function": "functions", "kind": "kinds"}
    options = {renamed.get(name, name): value for name, value in given.items()}
    return {name: options[name] for name in Study.model_fields if name in options}


def _check_run(url: str, options: dict[str, Any], *, here: bool = True) -> None:
    """Refuse what can be refused before what works on a run is imported, which takes seconds."""
    from stiffcore.asked import check_free, check_request
    from stiffcore.commands.terminal import tell

    check_free(url, tell)
    exists = check_request(url, options, here=here)
    tell(f"{url}: {'goes on' if exists else 'a new run'}; libraries and network are being loaded")


def main() -> None:
    """Run the command line; errors are one message; exit codes 2 wrong input, 1 failure, 3 busy."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.showwarning = _warned
    handle()
    try:
        try:
            app()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # a full disk is said here, not by the interpreter's end
    except StiffcoreError as error:
        _end(f"error: {error}", error.exit_code)
    except BrokenPipeError:
        _end("", 1)
    except OSError as error:
        _end(f"error: {error}", 1)


def _warned(message: Warning | str, *_: Any, **__: Any) -> None:
    """What a library warns of, as a line of text like others: it may quote what a stranger named."""
    from stiffcore.commands.terminal import tell

    tell(f"warning: {message}")


def _end(text: str, code: int) -> None:
    from stiffcore.commands.terminal import tell

    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            if stream is sys.stderr and text:
                tell(text)
            stream.flush()
        except OSError:  # what waits for a full disk, or a closed pipe, goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)
