"""The commands that read runs."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from stiffcore.commands.terminal import err, out, print_json, refuse_damaged, say, with_trust
from stiffcore.errors import InputError, StiffcoreError
from stiffcore.report import tables
from stiffcore.run import Run, open_run, state_of, status_summary
from stiffcore.study import counted, format_bytes

if TYPE_CHECKING:
    from stiffcore.picture import Picture


def status(run: str, as_json: bool) -> None:
    """Say what is done, under way and failed in a run."""
    found = open_run(run)
    if as_json:
        print_json(tables.status_rows(found))
        refuse_damaged(found)
        return
    holder = found.store.holder()
    records, damaged = found.readable()
    left = {state_of(record) for record in records.values()} & {"planned", "under way"}
    if holder:
        by = f"being worked on by process {holder['pid']} on {holder['host']}"
    else:
        by = f"interrupted; `stiffcore run {run}` continues" if left else "nobody works on it now"
    say(out, f"{run}: {by}")
    say(out, status_summary(records, damaged, held=bool(holder)))
    for line in tables.left_out_lines(found.header.left_out):
        say(out, line)
    table = tables.status_table(records, damaged, held=bool(holder))
    if table.row_count:
        out.print_table(table)
    refuse_damaged(found)


def verify(run: str, certificates: bool, trust: bool, as_json: bool) -> None:
    """Read everything in a run again, and say what is damaged."""
    from rich.progress import Progress

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

    said = with_trust(read_all, trust)
    if as_json:
        print_json(asdict(said))
    else:
        for finding in [*said.findings, *said.unread]:
            say(out, f"{finding.unit or 'the run'}: {finding.part}: {finding.problem}")
        for key, why in said.unchecked.items():
            say(out, f"{key}: its certificate could not be made again: {why}")
        read = f"{said.parts} parts read, {format_bytes(said.read_bytes)}"
        made = f"; {counted(said.recomputed, 'certificate', 'certificates')} made again" if certificates else ""
        say(
            out,
            f"{read}{made}: {'damaged' if said.findings else 'not all could be read' if said.unread else 'all whole'}",
        )
    unread = f"{counted(len(said.unread), 'part', 'parts')} cannot be read now, of which nothing is known"
    if said.findings:
        anew = f"`stiffcore run {run}` makes just these anew" if said.recorded else "nothing could be recorded there"
        also = f"; {unread}" if said.unread else ""
        raise StiffcoreError(f"{counted(len(said.findings), 'part is', 'parts are')} damaged; {anew}{also}")
    if said.unread:
        raise StiffcoreError(f"{unread}: look at their permissions, and at the disk")
    if said.unchecked:
        raise StiffcoreError(f"{len(said.unchecked)} certificates could not be made again; what is stored stays")


def show(run: str, each: bool, as_json: bool) -> None:
    """Print the tables of a run: S, the shares by sign, the extremes, and the certificates; means and correlations."""
    found = open_run(run)
    if as_json:
        print_json(tables.json_rows(found.metrics()))
    else:
        show_tables(found, each=each)
    refuse_damaged(found)


def picture(
    run: str, block: str, image: int, function: str, grid: int, memory: str | None, to: Path | None, trust: bool
) -> None:
    """Compute the numerical range of one unit and, with --grid, its pseudospectrum; both stay in the run.

    They are of the matrix that was solved, which has the eigenvalues of the block's Jacobian in another basis.
    """
    from rich.progress import Progress

    if to is not None:
        from stiffcore.exports import check_target
        from stiffcore.spectra import drawing

        plot = drawing("plot")
        check_target(to, DRAWINGS)
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

    taken = with_trust(take, trust)
    curve = taken.numerical_range
    say(
        out,
        f"numerical range: real parts {curve.real.min():.6g} to {curve.real.max():.6g}, imaginary parts up to "
        f"{curve.imag.max():.6g}",
    )
    if taken.smallest.size:
        j, i = divmod(int(taken.smallest.argmin()), len(taken.re))
        at = complex(taken.re[i], taken.im[j])
        say(
            out,
            f"pseudospectrum on {len(taken.re)} x {len(taken.im)} points of the upper half plane: the smallest "
            f"singular value is {taken.smallest.min():.3g}, at {at:.4g}",
        )
    if to is not None:
        from stiffcore.exports import whole_file

        axis = plot(found.spectrum(image, block, function), picture=taken)
        with whole_file(to, f"--to {to}") as beside:
            axis.figure.savefig(beside, dpi=150)
        say(out, f"drawn in {to}")


def export(run: str, to: Path) -> None:
    """Write the metrics as CSV or parquet, one row a spectrum; or metrics and spectra as HDF5."""
    from stiffcore.exports import check_target
    from stiffcore.exports import export as write

    check_target(to)
    found = open_run(run)
    say(out, write(found, to))
    refuse_damaged(found)


def report(run: str, to: Path, figures: Path | None, shared: bool) -> None:
    """Write one self-contained page: spectra, S and P along depth and by label, correlations, certificates."""
    found = open_run(run)
    try:
        from stiffcore.report.page import write_report
    except ImportError as error:
        raise InputError(f"{error}; pip install 'stiffcore[report]'") from error

    say(out, write_report(found, to, figures, shared=shared))
    refuse_damaged(found)


def compare(runs: Sequence[str], to: Path | None) -> None:
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
        say(out, "none of these runs has a certified spectrum")
    if to is not None:
        with whole_file(to, f"--to {to}") as beside:
            with_texts(found, spreadsheet_cell).to_csv(beside, index=False, na_rep="nan")
        say(out, f"{counted(len(found), 'row', 'rows')} in {to}")
    for run in opened:
        refuse_damaged(run)


# What `picture --to` draws into.
DRAWINGS = (".png", ".svg", ".pdf")
# `show` lists every spectrum of a run of so many at most; `show --each` of any.
LISTED = 60


def show_tables(run: Run, *, each: bool = False) -> None:
    """Print the tables of a run.

    Args:
        run: to be shown.
        each: whether to list every spectrum of a large run, too.
    """
    import numpy as np

    from stiffcore.report.statistics import FEWEST

    rows = run.metrics()
    if rows.empty:
        say(out, "no unit is recorded in this run")
        return
    listed = each or len(rows) <= LISTED
    if not listed:
        say(out, run.summary + "; --each lists every spectrum")
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
        say(
            out,
            "S = max Re / min Re (Eq. 10) is infinite where outputs held at zero by a ReLU are the smallest; "
            "S active leaves these structural zeros out.",
        )
