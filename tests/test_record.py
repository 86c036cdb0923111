"""What the store holds has a type: runs of earlier versions are read, and records are the same JSON again."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import stiffcore
from stiffcore.cli import app
from stiffcore.commands.progress import Bars
from stiffcore.record import (
    Begun,
    Ended,
    Failed,
    FellBack,
    Reached,
    Restarted,
    Stage,
    Step,
    UnitRecord,
    event_from_json,
    event_to_json,
)
from stiffcore.run import state_of
from stiffcore.spectra import Certificate, Moments
from stiffcore.verify import verify
from tests.records import a_header, a_record
from tests.runs import OPTIONS, execute

# Made by stiffcore 0.1.0, and stopped in the middle where they are named so: `stiffcore.analyze` of the network and
# images of the fixture `small`, with OPTIONS and these.
STORED = {
    "all-half": {"kinds": "matrix,tensor-slices,singular", "blocks": "2,3", "count": 1, "keep": "all"},
    "spectra-half": {"kinds": "matrix,tensor-slices,singular", "functions": "block", "blocks": "2,4", "count": 2},
    "extremes-half": {"solver": "extremes", "blocks": "2,3", "count": 1},
    "metrics-half": {"keep": "metrics", "kinds": "matrix,tensor-slices,singular", "functions": "block", "blocks": "2"},
    "divide-half": {"solver": "divide", "blocks": "2", "functions": "block", "memory": "3GiB"},
    "only-whole": {"solver": "matrix-only", "blocks": "2,1", "functions": "block"},
}
STATES = {
    "all-half": {"done": 1, "under way": 1, "planned": 10},
    "spectra-half": {"done": 1, "under way": 1, "planned": 10},
    "extremes-half": {"done": 2, "under way": 1, "planned": 1},
    "metrics-half": {"done": 1, "under way": 1, "planned": 1},
    "divide-half": {"under way": 1},
    "only-whole": {"stored": 2},
}


@pytest.fixture
def stored(small):
    """Runs of stiffcore 0.1.0 in the current folder, and what they were made of."""
    with zipfile.ZipFile(Path(__file__).parent / "data/runs-of-0.1.0.zip") as runs:
        runs.extractall(small)
    return small


def within(old, new):
    """Whether all that was stored is stored again; a newer version may know more."""
    if isinstance(old, dict):
        return all(within(value, new.get(name)) for name, value in old.items())
    if isinstance(old, list) and old and isinstance(old[0], dict):
        return len(old) == len(new) and all(map(within, old, new))
    return old == new


@pytest.mark.parametrize("name", STORED)
def test_a_run_of_an_earlier_version_is_read_verified_and_continued(stored, name, ends_are_cheap):
    run = stiffcore.open_run(name)
    records = run.records()
    states = [state_of(record) for record in records.values()]
    assert {state: states.count(state) for state in states} == STATES[name]
    for key, record in records.items():
        on_disk = json.loads((stored / f"{name}/units/{key}/zarr.json").read_text())["attributes"]
        del on_disk["digest"]
        assert within(on_disk, record.to_json())
    on_disk = json.loads((stored / f"{name}/zarr.json").read_text())["attributes"]["stiffcore"]
    assert run.header.to_json() == on_disk
    assert verify(run).findings == []
    done = {key: run.stored(key).computed for key, record in records.items() if state_of(record) == "done"}
    run, outcome = execute(name, {})
    assert outcome.failed == {}
    assert {state_of(record) for record in run.records().values()} == {"done" if name != "only-whole" else "stored"}
    assert all(np.array_equal(run.stored(key).computed, values) for key, values in done.items())
    assert verify(run).findings == []
    if name == "all-half":  # the others take no other way
        return
    fresh, _ = execute("fresh", OPTIONS | STORED[name])
    assert fresh.records().keys() == records.keys()
    for key, record in fresh.records().items():
        if state_of(record) == "done":
            one, other = run.stored(key), fresh.stored(key)
            assert np.allclose(one.computed, other.computed, rtol=0, atol=1e-9)
            assert one.certificate.failures == other.certificate.failures == ()


CERTIFICATE = Certificate((), 0.0, 0.0, 0.0, 1e-9, np.inf, 1e-9, 0, 0.0, ())
FLOATS = st.floats() | st.sampled_from([np.inf, -np.inf, np.nan])


@settings(max_examples=60, deadline=None)
@given(
    moments=st.none() | st.builds(Moments, FLOATS, FLOATS, FLOATS),
    growth=st.none() | FLOATS,
    metrics=st.none() | st.dictionaries(st.sampled_from(["S", "negative"]), FLOATS, min_size=1),
    stage=st.sampled_from(Stage),
    failure=st.none() | st.text(min_size=1),
    kept=st.none() | st.booleans(),
)
def test_a_record_survives_strict_json(moments, growth, metrics, stage, failure, kept):
    found = {}  # what each stage records, without which it is none
    if not stage.before(Stage.REDUCED):
        moments, found = moments or Moments(1.0, 2.0, 3.0), {"ilo": 0, "ihi": 8}
    if stage is Stage.DONE:
        found |= {"shift": 1, "certificate": CERTIFICATE}
    before = a_record(
        **found, stage=stage, moments=moments, logarithmic_norm=growth, metrics=metrics, failure=failure, kept=kept
    )
    after = UnitRecord.from_json(json.loads(json.dumps(before.to_json(), allow_nan=False)))
    assert repr(after) == repr(before)


def test_sizes_that_a_stage_finds_are_facts_of_the_unit_and_no_plan_changes_them():
    record = a_record()
    found = record.changed(k=3, zeros=6, stage=Stage.DONE)
    assert (found.unit.k, found.unit.zeros, found.unit.n, found.plan.unit) == (3, 6, 9, found.unit)
    again = found.changed(plan=replace(record.plan, chunk=4))
    assert (again.plan.chunk, again.unit.k) == (4, 3)


def test_stages_are_in_order_though_their_names_are_not():
    assert [a.before(b) for a, b in zip(Stage, [*Stage][1:], strict=False)] == [True] * 5
    assert not Stage.DONE.before(Stage.BUILT)
    assert not Stage.BUILT.before(Stage.BUILT)


EVENTS = [
    Begun("u"),
    Step("u", Stage.BUILT, 1, 3, "note"),
    Reached("u", Stage.DONE),
    Restarted("u", "why"),
    FellBack("u", "why"),
    Failed("u", "why"),
    Ended("u"),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda e: e.kind)
def test_an_event_passes_between_processes(event):
    assert event_from_json(msgpack.loads(msgpack.dumps(event_to_json(event), strict_types=True))) == event
    Bars().event(event)  # before there is a bar


def test_what_is_no_event_is_refused():
    with pytest.raises(ValueError, match="no event"):
        event_from_json({"kind": "party", "unit": "u"})
    with pytest.raises(ValueError, match="done: Input should be a valid integer"):
        event_from_json({**event_to_json(EVENTS[1]), "done": "1"})


def test_a_header_survives_json():
    header = a_header(units=("a", "b"), threads=2)
    assert type(header).from_json(json.loads(json.dumps(header.to_json()))) == header


def test_a_run_that_nobody_works_on_and_that_is_not_done_is_interrupted(stored):
    found = CliRunner().invoke(app, ["status", "all-half"])
    said = " ".join(found.output.split())
    assert "all-half: interrupted; `stiffcore run all-half` continues" in said
    assert "1 done, 1 interrupted, 10 planned" in said
    assert "under way" not in said
    assert "nobody works on it now" in CliRunner().invoke(app, ["status", "only-whole"]).output
