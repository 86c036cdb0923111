"""Bars of a run under way."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TimeElapsedColumn

from stiffcore.commands.terminal import err, say
from stiffcore.metrics import spell_share
from stiffcore.plan import UNIT_SECONDS, Plan
from stiffcore.record import Begun, Ended, Event, Failed, FellBack, Reached, Restarted, Step
from stiffcore.report import tables
from stiffcore.run import open_run, state_of
from stiffcore.store import IMAGES


@contextmanager
def looking(quiet: bool = False) -> Iterator[None]:
    """Say at a terminal, for the time of the context, that the look is taken."""
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


class Bars:
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
        self._planned: dict[str, float] = {}
        self._ended: set[str] = set()
        self._began = 0.0

    def begin(self, url: str, plan: Plan) -> None:
        """Show the run's bar."""
        self._url = url
        working = [p for p in plan.units if p.works]
        self._names = {p.unit.key: f"{p.unit.block} {p.unit.function}" for p in working}
        self._planned = {p.unit.key: p.seconds + UNIT_SECONDS for p in working}
        self._began = time.monotonic()
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
                if isinstance(event, Ended):
                    self._ended.add(key)
                else:
                    self._planned.pop(key, None)  # how long it took says nothing of the others
                self.bars.update(self._total, advance=1, note=self._left())
                if key in self._tasks:
                    self.bars.remove_task(self._tasks.pop(key))
                self._report(event)
            case Restarted(note=note) | FellBack(note=note):
                say(err, f"{key}: {event.kind}: {note}")
            case Reached(stage=stage) if key in self._tasks:
                self.bars.update(self._tasks[key], total=None, completed=1, note=STAGE_NAMES[stage])
            case Step(stage=stage, done=done, total=total) if key in self._tasks:
                # a stage that cannot be counted pulses
                note = event.note or STAGE_NAMES[stage]
                self.bars.update(self._tasks[key], total=total if total > 1 else None, completed=done, note=note)

    def _left(self) -> str:
        """What is left, as fast as what has ended went; the plan's rates were measured before."""
        done = sum(self._planned.get(key, 0.0) for key in self._ended)
        left = sum(self._planned.values()) - done
        passed = time.monotonic() - self._began
        about = f", about {tables.seconds(left * passed / done)} left" if done and left > 0 else ""
        return f"{len(self._names)} units{about}"

    def _report(self, event: Ended | Failed) -> None:
        key = event.unit
        if isinstance(event, Failed):
            say(err, f"{key} failed: {event.note}", style="bold red")
            return
        run = open_run(self._url)
        record = run.store.record(key)
        if state_of(record) == "stored":
            say(err, f"{key}: matrix of order {record.unit.k:,} stored")
            return
        spectrum = run.stored(key)
        index = run.store.get_array(IMAGES, "index")
        image = f"image {index[spectrum.record.unit.image]}, " if len(index) > 1 else ""
        m = spectrum.metrics
        say(
            err,
            f"{image}{spectrum.name} {spectrum.function}: n {spectrum.n:,}, k {spectrum.k:,}, "
            f"S active {m['S_active']:.7g} +- {spectrum.certificate.s_active_error:.1e}, "
            f"Re<0 {spell_share(m, 'negative')} %, {spectrum.verdict}",
        )
