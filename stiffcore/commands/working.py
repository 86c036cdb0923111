"""The commands that work on a run, or plan that."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from stiffcore.cluster import Executor, tls_security, workers_at
from stiffcore.commands.progress import Bars, looking
from stiffcore.commands.reading import show_tables
from stiffcore.commands.terminal import err, out, print_json, say, tell, with_trust
from stiffcore.ending import at_end
from stiffcore.errors import StiffcoreError
from stiffcore.plan import check_budget
from stiffcore.report import tables
from stiffcore.run import state_of
from stiffcore.session import Outcome, Prepared, carry_out_plan, prepare
from stiffcore.study import counted, format_bytes


def plan(
    url: str,
    options: Mapping[str, Any],
    workers: int | None,
    scheduler: str | None,
    tls: tuple[str | None, str | None, str | None],
    *,
    trust: bool,
    as_json: bool,
) -> None:
    """Say what `run` with the same options would take."""
    security = tls_security(*tls)
    with workers_at(scheduler, lambda event: None, security=security, tell=tell) as executor:
        look = partial(_looked, url, options, executor, workers, quiet=as_json, suppose=True)
        prepared = with_trust(look, trust)
    for key, why in {**prepared.damaged, **prepared.unreadable}.items():
        say(err, f"{key}: {why}: `run` makes it anew")
    if as_json:
        print_json(tables.plan_rows(prepared.plan, prepared.left_out))
    else:
        _announce(prepared)
        out.print_table(tables.plan_table(prepared.plan, out.width))
        say(out, tables.plan_summary(prepared.plan))
    if not any(p.works for p in prepared.plan.units):
        check_budget(prepared.plan)


def run(
    url: str,
    options: Mapping[str, Any],
    workers: int | None,
    scheduler: str | None = None,
    tls: tuple[str | None, str | None, str | None] = (None, None, None),
    *,
    dashboard: bool = False,
    trust: bool = False,
) -> None:
    """Start a run, or continue one."""
    security = tls_security(*tls)
    show = Bars()
    continued = f"stopped; what is done is kept. To continue: stiffcore run {url}"
    with (
        at_end(show.bars.stop, continued),
        workers_at(scheduler, show.event, security=security, dashboard=dashboard, tell=tell) as executor,
    ):
        if executor.dashboard:
            say(out, f"dashboard: {executor.dashboard}")
        prepared = with_trust(partial(_looked, url, options, executor, workers), trust)
        _announce(prepared)
        say(out, tables.plan_summary(prepared.plan))
        show.begin(url, prepared.plan)
        with show.bars:
            found, outcome = carry_out_plan(url, prepared, executor, show.event)
    show_tables(found)
    spectra = counted(outcome.done, "spectrum", "spectra")
    allowed = format_bytes(prepared.plan.allowed_bytes)
    say(
        out,
        f"{spectra} in {url}; this session took {tables.seconds(outcome.wall_s)}, "
        f"peak memory {_peaks(outcome)} of {allowed} allowed",
    )
    uncertain = [key for key, record in found.records().items() if state_of(record) == "not certified"]
    if uncertain:
        say(err, f"{len(uncertain)} spectra are NOT certified: {', '.join(uncertain)}", style="bold red")
    if outcome.failed:
        lines = "\n".join(f"  - {key}: {why}" for key, why in outcome.failed.items())
        raise StiffcoreError(f"{len(outcome.failed)} units failed:\n{lines}\n`stiffcore run {url}` tries them again")


def _peaks(outcome: Outcome) -> str:
    if not outcome.worker_peak_bytes:
        return format_bytes(outcome.peak_bytes)
    return (
        f"{format_bytes(outcome.peak_bytes)} here, and of the largest worker {format_bytes(outcome.worker_peak_bytes)}"
    )


def _announce(prepared: Prepared) -> None:
    if prepared.survey:
        say(out, f"network: {prepared.study.network}, {prepared.survey.description}")
        say(out, f"weights: {prepared.study.weights}")
        say(out, f"images: {len(prepared.survey.images['y'])} of {prepared.survey.source}")
        say(out, f"normalisation: {prepared.study.normalize}; arithmetic: {prepared.study.dtype}")
    for line in tables.left_out_lines(prepared.left_out):
        say(out, line)


def _looked(
    url: str,
    options: Mapping[str, Any],
    executor: Executor,
    workers: int | None,
    trust: bool,
    *,
    quiet: bool = False,
    suppose: bool = False,
) -> Prepared:
    with looking(quiet):
        return prepare(url, options, executor, workers=workers, suppose=suppose, trust=trust)
