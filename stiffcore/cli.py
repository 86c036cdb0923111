"""The command line: parses, calls, prints."""

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import numpy as np
import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TimeElapsedColumn

from stiffcore.cluster import Executor, tls_security, workers_at
from stiffcore.ending import at_end, handle
from stiffcore.errors import DamagedError, InputError, StiffcoreError, UntrustedError
from stiffcore.metrics import spell_share
from stiffcore.plan import Plan, check_budget
from stiffcore.record import Begun, Ended, Event, Failed, FellBack, Reached, Restarted, Step
from stiffcore.report import tables
from stiffcore.report.statistics import FEWEST
from stiffcore.report.terminal import Terminal
from stiffcore.run import Run, open_run, state_of, status_summary
from stiffcore.session import Outcome, Prepared, carry_out_plan, check_free, prepare
from stiffcore.store import IMAGES
from stiffcore.study import Study, counted, format_bytes
from stiffcore.version import __version__

if TYPE_CHECKING:
    from stiffcore.picture import Picture

T = TypeVar("T")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Exact, certified eigenvalue spectra of the Jacobians of network blocks; stored, and resumable.",
)
# tables keep their columns in a file or a pipe, where rich would assume 80
out = Terminal(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 180)
err = Terminal(stderr=True)

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
        "too) | cifar10 (with --data-root) | FILE.npz (x uint8 N,H,W,3 and y) | a folder of class folders "
        "[default: samples]"
    ),
]
DataRoot = Annotated[str | None, typer.Option(help="Where torchvision's CIFAR-10 lies, or goes.")]
Download = Annotated[bool | None, typer.Option("--download", help="Allow torchvision to download CIFAR-10.")]
Normalize = Annotated[str | None, typer.Option(help="cifar10 | imagenet | none [default: as the network wants]")]
Count = Annotated[int | None, typer.Option(help="The first N images [default: 1]")]
Index = Annotated[str | None, typer.Option(help="These images: 0,5,7")]
PerLabel = Annotated[int | None, typer.Option(help="The first N images of each label.")]
Blocks = Annotated[str | None, typer.Option(help="all | 1,2,16 | layer1.1,encoder.3 (any module path) [default: all]")]
Function = Annotated[str | None, typer.Option(help="block | branch | block,branch [default: block]")]
Kind = Annotated[
    str | None,
    typer.Option(
        help="matrix: the eigenvalues of the n x n Jacobian | tensor-slices: those of the Jacobian tensor's last two "
        "axes, which the paper's tables show | singular: singular values | several, with commas [default: matrix]"
    ),
]
Dtype = Annotated[str | None, typer.Option(help="float64 | float32 [default: float64]")]
Pool = Annotated[str | None, typer.Option(help="Max-pool of a ResNet's stem: auto | max | none [default: auto]")]
ReduceOption = Annotated[
    str | None,
    typer.Option(
        "--reduce",
        help="auto: the smallest matrix with the same eigenvalues | none: the n x n Jacobian itself [default: auto]",
    ),
]
SolverOption = Annotated[
    str | None,
    typer.Option(
        "--solver",
        help="auto: the first that fits | cuda-dense | host-dense | extremes (S, and a proof of how many eigenvalues "
        "are negative, without the others: seconds) | divide (all eigenvalues of a matrix that no budget holds, in the "
        "store) | matrix-only (build and keep, solve nothing); of singular values "
        "svd | symmetric [default: auto]",
    ),
]
DeviceMemory = Annotated[
    str | None,
    typer.Option(help="What a unit may hold on a CUDA device, as 80GB; `plan` takes it for a device that is not here."),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        help="Address or scheduler file of a Dask cluster that runs already; --memory is then each worker's "
        "[default: workers on this machine]"
    ),
]
TlsCa = Annotated[str | None, typer.Option(help="Certificate that those of the Dask cluster are signed with.")]
TlsCert = Annotated[str | None, typer.Option(help="Certificate to reach the Dask cluster with.")]
TlsKey = Annotated[str | None, typer.Option(help="Its key [default: in the same file]")]
Dashboard = Annotated[
    bool,
    typer.Option("--dashboard", help="Serve Dask's pages of the workers here, to all users of this machine."),
]
Memory = Annotated[
    str | None, typer.Option(help="What all processes may hold together, as 4GiB [default: 80 % of what is free]")
]
Device = Annotated[str | None, typer.Option(help="auto | cpu | cuda [default: auto]")]
Keep = Annotated[str | None, typer.Option(help="metrics | spectra | all (the matrices too) [default: spectra]")]
Trust = Annotated[
    bool,
    typer.Option("--trust", help="Let a RUN that exists import the code, and fetch the images, that it names."),
]
Workers = Annotated[int | None, typer.Option(min=1, help="At most so many units side by side [default: one a core]")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        _say(out, f"stiffcore {__version__}")
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
    cluster = {"scheduler": scheduler, "security": tls_security(tls_ca, tls_cert, tls_key), "dashboard": dashboard}
    _run(run, _options(locals()), workers, cluster, trust=trust)


@app.command()
def demo(
    run: Annotated[str, typer.Argument(metavar="[RUN]", help="Folder of the run.")] = "store/demo",
    memory: Memory = "3GiB",
    workers: Workers = None,
) -> None:
    """The main job on an embedded default: all sixteen blocks of a ResNet50 at one CIFAR-10 test image.

    Minutes on two cores. The same as `stiffcore run store/demo --network resnet50 --images samples --memory 3GiB`.
    """
    _run(run, {"network": "resnet50", "images": "samples", "blocks": "all", "memory": memory}, workers)


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
    security = tls_security(tls_ca, tls_cert, tls_key)
    with workers_at(scheduler, lambda event: None, security=security, tell=_tell) as executor:
        look = partial(_looked, run, options, executor, workers, quiet=as_json, suppose=True)
        prepared = _with_trust(look, trust)
    for key, why in {**prepared.damaged, **prepared.unreadable}.items():
        _say(err, f"{key}: {why}: `run` makes it anew")
    if as_json:
        _print_json(tables.plan_rows(prepared.plan, prepared.left_out))
    else:
        _announce(prepared)
        out.print_table(tables.plan_table(prepared.plan))
        _say(out, tables.plan_summary(prepared.plan))
    if not any(p.works for p in prepared.plan.units):
        check_budget(prepared.plan)


@app.command()
def status(run: RunArgument, as_json: Json = False) -> None:
    """Say what is done, under way and failed in a run."""
    found = open_run(run)
    if as_json:
        _print_json(tables.status_rows(found))
        _refuse_damaged(found)
        return
    holder = found.store.holder()
    by = f"being worked on by process {holder['pid']} on {holder['host']}" if holder else "nobody works on it now"
    _say(out, f"{run}: {by}")
    records, damaged = found.readable()
    _say(out, status_summary(records, damaged))
    for line in tables.left_out_lines(found.header.left_out):
        _say(out, line)
    table = tables.status_table(records, damaged)
    if table.row_count:
        out.print_table(table)
    _refuse_damaged(found)


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
    from stiffcore.verify import Verification
    from stiffcore.verify import verify as read_again

    found = open_run(run)

    def read_all(trusting: bool) -> Verification:
        with Progress(console=err, transient=True) as bars:
            bar = bars.add_task("units read", total=None)
            return read_again(
                found,
                certificates=certificates,
                trust=trusting,
                tell=lambda done, total: bars.update(bar, completed=done, total=total),
            )

    said = _with_trust(read_all, trust)
    if as_json:
        _print_json(asdict(said))
    else:
        for finding in said.findings:
            _say(out, f"{finding.unit or 'the run'}: {finding.part}: {finding.problem}")
        for key, why in said.unchecked.items():
            _say(out, f"{key}: its certificate could not be made again: {why}")
        read = f"{said.parts} parts read, {format_bytes(said.read_bytes)}"
        made = f"; {counted(said.recomputed, 'certificate', 'certificates')} made again" if certificates else ""
        _say(out, f"{read}{made}: {'all whole' if not said.findings else 'damaged'}")
    if said.findings:
        anew = f"`stiffcore run {run}` makes just these anew" if said.recorded else "nothing could be recorded there"
        raise StiffcoreError(f"{len(said.findings)} parts are damaged; {anew}")
    if said.unchecked:
        raise StiffcoreError(f"{len(said.unchecked)} certificates could not be made again; what is stored stays")


@app.command()
def show(
    run: RunArgument,
    each: Annotated[bool, typer.Option("--each", help="List every spectrum, however many there are.")] = False,
    as_json: Json = False,
) -> None:
    """Print the tables of a run: S, the shares by sign, the extremes, and the certificates; means and correlations."""
    found = open_run(run)
    if as_json:
        _print_json(tables.json_rows(found.metrics()))
    else:
        _show(found, each=each)
    _refuse_damaged(found)


@app.command()
def picture(
    run: RunArgument,
    block: Annotated[str, typer.Option(help="Its number, or module path.")] = "1",
    image: Annotated[int, typer.Option(help="Position among the run's images.")] = 0,
    function: Annotated[str, typer.Option(help="block | branch")] = "block",
    grid: Annotated[int, typer.Option(help="Pseudospectrum: points along the longer side, one sparse LU each.")] = 0,
    memory: Annotated[str | None, typer.Option(help="What a sparse LU may take, as 4GiB [default: no limit]")] = None,
    trust: Trust = False,
) -> None:
    """Compute the numerical range of one unit and, with --grid, its pseudospectrum; both stay in the run.

    They are of the matrix that was solved, which has the eigenvalues of the block's Jacobian in another basis.
    """
    found = open_run(run)

    def take(trusting: bool) -> "Picture":
        with Progress(console=err, transient=True) as bars:
            bar = bars.add_task("picture", total=None)
            return found.picture(
                image,
                block,
                function,
                grid=grid,
                memory=memory,
                trust=trusting,
                tell=lambda done, total: bars.update(bar, completed=done, total=total),
            )

    taken = _with_trust(take, trust)
    curve = taken.numerical_range
    _say(
        out,
        f"numerical range: real parts {curve.real.min():.6g} to {curve.real.max():.6g}, imaginary parts up to "
        f"{curve.imag.max():.6g}",
    )
    if taken.smallest.size:
        j, i = divmod(int(taken.smallest.argmin()), len(taken.re))
        at = complex(taken.re[i], taken.im[j])
        _say(
            out,
            f"pseudospectrum on {len(taken.re)} x {len(taken.im)} points of the upper half plane: the smallest "
            f"singular value is {taken.smallest.min():.3g}, at {at:.4g}",
        )


@app.command()
def export(
    run: RunArgument,
    to: Annotated[Path, typer.Option(help="The file to write, .csv, .parquet or .h5; it must not exist.")],
) -> None:
    """Write the metrics as CSV or parquet, one row a spectrum; or metrics and spectra as HDF5."""
    from stiffcore.exports import check_target
    from stiffcore.exports import export as write

    check_target(to)
    found = open_run(run)
    _say(out, write(found, to))
    _refuse_damaged(found)


@app.command()
def report(
    run: RunArgument,
    to: Annotated[Path, typer.Option(help="The page to write, .html; it must not exist.")],
    figures: Annotated[Path | None, typer.Option(help="Folder for the figures as PNG and SVG files.")] = None,
    shared: Annotated[bool, typer.Option("--shared-axes", help="Draw the spectra of all blocks to one scale.")] = False,
) -> None:
    """Write one self-contained page: spectra, S and P along depth and by label, correlations, certificates."""
    found = open_run(run)
    try:
        from stiffcore.report.page import write_report
    except ImportError as error:
        raise InputError(f"{error}; pip install 'stiffcore[report]'") from error

    _say(out, write_report(found, to, figures, shared=shared))
    _refuse_damaged(found)


@app.command()
def compare(
    runs: Annotated[
        list[str], typer.Argument(help="Two or more, paths or URLs; the first is what others differ from.")
    ],
    to: Annotated[Path | None, typer.Option(help="A file for the rows, .csv; it must not exist.")] = None,
) -> None:
    """Compare runs block by block, at the same images: before and after training, seeds, weights."""
    from stiffcore.exports import check_target, spreadsheet_cell, whole_file, with_texts
    from stiffcore.report.statistics import compare as compare_spectra

    if to is not None:
        check_target(to, (".csv",))
    opened = [open_run(url) for url in runs]
    found = compare_spectra(opened)
    for kind in dict.fromkeys(found["kind"]) if len(found) else ():
        out.print_table(tables.comparison_table(found, kind))
    if found.empty:
        _say(out, "none of these runs has a certified spectrum")
    if to is not None:
        with whole_file(to, f"--to {to}") as beside:
            with_texts(found, spreadsheet_cell).to_csv(beside, index=False, na_rep="nan")
        _say(out, f"{counted(len(found), 'row', 'rows')} in {to}")
    for run in opened:
        _refuse_damaged(run)


def _refuse_damaged(found: Run) -> None:
    """End with what could not be read, once the rest was said."""
    if found.damaged:
        lines = "\n".join(f"  - {key}: {why}" for key, why in found.damaged.items())
        raise DamagedError(
            f"{counted(len(found.damaged), 'unit is', 'units are')} damaged:\n{lines}\n"
            f"`stiffcore run {found.store.url}` makes them anew"
        )


def _say(console: Terminal, text: str, style: str | None = None) -> None:
    """Print a sentence, with no line break inside a path."""
    console.print(text, style=style, soft_wrap=True)


def _tell(text: str) -> None:
    _say(err, text)


def _options(given: dict[str, Any]) -> dict[str, Any]:
    renamed = {"function": "functions", "kind": "kinds"}
    options = {renamed.get(name, name): value for name, value in given.items()}
    return {name: options[name] for name in Study.model_fields if name in options}


def _run(
    url: str,
    options: dict[str, Any],
    workers: int | None,
    cluster: dict[str, Any] | None = None,
    *,
    trust: bool = False,
) -> None:
    check_free(url, _tell)
    show = _Progress()
    continued = f"stopped; what is done is kept. To continue: stiffcore run {url}"
    with (
        at_end(show.bars.stop, continued),
        workers_at(**{"scheduler": None} | (cluster or {}), on_event=show.event, tell=_tell) as executor,
    ):
        if executor.dashboard:
            _say(out, f"dashboard: {executor.dashboard}")
        prepared = _with_trust(partial(_looked, url, options, executor, workers), trust)
        _announce(prepared)
        _say(out, tables.plan_summary(prepared.plan))
        show.begin(url, prepared.plan)
        with show.bars:
            run, outcome = carry_out_plan(url, prepared, executor, show.event)
    _show(run)
    spectra = counted(outcome.done, "spectrum", "spectra")
    allowed = format_bytes(prepared.plan.allowed_bytes)
    _say(
        out,
        f"{spectra} in {url}; this session took {tables.seconds(outcome.wall_s)}, "
        f"peak memory {_peaks(outcome)} of {allowed} allowed",
    )
    uncertain = [key for key, record in run.records().items() if state_of(record) == "not certified"]
    if uncertain:
        _say(err, f"{len(uncertain)} spectra are NOT certified: {', '.join(uncertain)}", style="bold red")
    if outcome.failed:
        lines = "\n".join(f"  - {key}: {why}" for key, why in outcome.failed.items())
        raise StiffcoreError(f"{len(outcome.failed)} units failed:\n{lines}\n`stiffcore run {url}` tries them again")


def _peaks(outcome: Outcome) -> str:
    if not outcome.worker_peak_bytes:
        return format_bytes(outcome.peak_bytes)
    return (
        f"{format_bytes(outcome.peak_bytes)} here, and of the largest worker {format_bytes(outcome.worker_peak_bytes)}"
    )


# `show` lists every spectrum of a run of so many at most; `show --each` of any.
LISTED = 60


def _show(run: Run, *, each: bool = False) -> None:
    rows = run.metrics()
    listed = each or len(rows) <= LISTED
    if not listed:
        _say(out, run.summary + "; --each lists every spectrum")
    images = rows["image"].nunique()
    for kind, part in rows.groupby("kind", sort=False):
        if listed:
            out.print_table(tables.metrics_table(part, out.width, kind))
        for by in ("block", "label") if rows["label"].nunique() > 1 else ("block",):
            means = tables.means_table(part, by)
            if means.row_count > 0 and (listed or means.row_count <= LISTED):
                out.print_table(means)
        if images >= FEWEST:
            for function in sorted(set(part["function"])):
                out.print_table(tables.correlations_table(part, function))
    if np.isinf(rows["S"]).any():
        _say(
            out,
            "S = max Re / min Re (Eq. 10) is infinite where outputs held at zero by a ReLU are the smallest; "
            "S active leaves these structural zeros out.",
        )


def _announce(prepared: Prepared) -> None:
    if prepared.survey:
        _say(out, f"network: {prepared.study.network}, {prepared.survey.description}")
        _say(out, f"weights: {prepared.study.weights}")
        _say(out, f"images: {len(prepared.survey.images['y'])} of {prepared.survey.source}")
        _say(out, f"normalisation: {prepared.study.normalize}; arithmetic: {prepared.study.dtype}")
    for line in tables.left_out_lines(prepared.left_out):
        _say(out, line)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, allow_nan=False))


def _looked(
    url: str,
    options: dict[str, Any],
    executor: Executor,
    workers: int | None,
    trust: bool,
    *,
    quiet: bool = False,
    suppose: bool = False,
) -> Prepared:
    with _looking(quiet):
        return prepare(url, options, executor, workers=workers, suppose=suppose, trust=trust)


def _with_trust(do: Callable[[bool], T], trust: bool) -> T:
    """Do what may need the user's word for the code of a run; at a terminal, ask for it."""
    try:
        return do(trust)
    except UntrustedError as error:
        if trust or not (sys.stdin and sys.stdin.isatty() and err.is_terminal):
            raise
        _say(err, str(error))
        if not typer.confirm("Do you trust it?", err=True):
            raise InputError("not trusted: nothing was imported") from None
    return do(True)


@contextmanager
def _looking(quiet: bool = False) -> Iterator[None]:
    if quiet or not err.is_terminal:
        yield
        return
    with err.status("looking at network, images and blocks"):
        yield


STAGE_NAMES = {
    "built": "Jacobian",
    "reduced": "Hessenberg",
    "solved": "eigenvalues",
    "counted": "counts",
    "done": "certificate",
}


class _Progress:
    """Bars for the run and for the units under way; a line for each unit that ends."""

    def __init__(self) -> None:
        self.bars = Progress(
            SpinnerColumn(),
            "{task.description}",  # strings: the console shows them as they are, a `TextColumn` would read markup
            BarColumn(),
            "{task.fields[note]}",
            TimeElapsedColumn(),
            console=err,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._url = ""
        self._total: TaskID | None = None
        self._names: dict[str, str] = {}

    def begin(self, url: str, plan: Plan) -> None:
        """Show the run's bar."""
        self._url = url
        working = [p for p in plan.units if p.works]
        self._names = {p.unit.key: f"{p.unit.block} {p.unit.function}" for p in working}
        note = f"{len(working)} units, about {tables.seconds(plan.seconds)}"
        self._total = self.bars.add_task("all units", total=len(working), note=note)

    def event(self, event: Event) -> None:
        """Follow an event, from any thread."""
        key = event.unit
        if self._total is None:
            return
        match event:
            case Begun():
                if key in self._tasks:  # begun again
                    self.bars.remove_task(self._tasks.pop(key))
                self._tasks[key] = self.bars.add_task(str(self._names.get(key, key)), total=None, note="opening")
            case Ended() | Failed():
                self.bars.advance(self._total)
                if key in self._tasks:
                    self.bars.remove_task(self._tasks.pop(key))
                self._report(event)
            case Restarted(note=note) | FellBack(note=note):
                _say(err, f"{key}: {event.kind}: {note}")
            case Reached(stage=stage) if key in self._tasks:
                self.bars.update(self._tasks[key], total=None, completed=1, note=STAGE_NAMES[stage])
            case Step(stage=stage, done=done, total=total) if key in self._tasks:
                # a stage that cannot be counted pulses
                note = event.note or STAGE_NAMES[stage]
                self.bars.update(self._tasks[key], total=total if total > 1 else None, completed=done, note=note)

    def _report(self, event: Ended | Failed) -> None:
        key = event.unit
        if isinstance(event, Failed):
            _say(err, f"{key} failed: {event.note}", style="bold red")
            return
        run = open_run(self._url)
        record = run.store.record(key)
        if state_of(record) == "stored":
            _say(err, f"{key}: matrix of order {record.unit.k:,} stored")
            return
        spectrum = run.stored(key)
        index = run.store.get_array(IMAGES, "index")
        image = f"image {index[spectrum.record.unit.image]}, " if len(index) > 1 else ""
        m = spectrum.metrics
        _say(
            err,
            f"{image}{spectrum.name} {spectrum.function}: n {spectrum.n:,}, k {spectrum.k:,}, "
            f"S active {m['S_active']:.7g} +- {spectrum.certificate.s_active_error:.1e}, "
            f"Re<0 {spell_share(m, 'negative')} %, {spectrum.verdict}",
        )


def main() -> None:
    """Run the command line; errors are one message; exit codes 2 wrong input, 1 failure, 3 busy."""
    warnings.filterwarnings("ignore", category=FutureWarning)
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


def _end(text: str, code: int) -> None:
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            if stream is sys.stderr and text:
                _say(err, text)
            stream.flush()
        except OSError:  # what waits for a full disk, or a closed pipe, goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)
