"""A flipped byte anywhere in a run is found, and the next run makes just that anew."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import stiffcore
from stiffcore.asked import check_free
from stiffcore.cluster import InProcess
from stiffcore.errors import InputError
from stiffcore.record import Stage
from stiffcore.run import open_run
from stiffcore.session import carry_out_plan, prepare
from stiffcore.store import RunStore
from stiffcore.verify import verify
from tests.runs import OPTIONS, execute, ready, sessions, spectra_bytes

ASKED = OPTIONS | {"blocks": "4", "keep": "all", "count": 2}
# Who holds a run, and the lock for it, are no part of it.
ASIDE = (".lock", ".writers", "holder.json")


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in ASIDE)


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << (at % 8)
    path.write_bytes(bytes(data))


def damage_of(url):
    """What `verify` finds; a header that cannot be read is all that it can say."""
    try:
        return [finding.part for finding in verify(open_run(url)).findings]
    except stiffcore.StiffcoreError as error:
        return [str(error)]


def again(url, on_event=lambda event: None):
    """What `stiffcore run` does with a run that exists."""
    check_free(str(url))
    return execute(url, {}, on_event)


@pytest.fixture
def one(small):
    return ready(small / "run", ASKED | {"count": 1, "functions": "block"})


@pytest.fixture
def whole(small):
    return ready(small / "run", ASKED)


def test_a_whole_run_is_whole(whole):
    found = verify(open_run(str(whole)), certificates=True, trust=True)
    assert found.findings == []
    assert found.recomputed == 4
    assert found.parts > 4 * 5
    assert found.read_bytes > sum(p.stat().st_size for p in files(whole)) / 2


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_any_flipped_byte_of_metadata_is_found(whole, every):
    store = RunStore(str(whole))
    paths = [p for p in files(whole) if p.name == "zarr.json"]
    one = str(next(p for p in (whole / "units").iterdir() if p.is_dir()))
    for path in [p for p in paths if "units/0" not in str(p) or str(p).startswith(one)]:
        at, good = str(path.parent.relative_to(whole)), path.read_bytes()
        at = "" if at == "." else at
        assert store.read_metadata(at)[1] == ""
        for i in range(len(good) % every, len(good), every):
            path.write_bytes(good[:i] + bytes([good[i] ^ 1 << (i % 8)]) + good[i + 1 :])
            assert store.read_metadata(at)[1], (path, i)
        path.write_bytes(good)


# Each file is made anew once it is flipped, or once it is gone; both of all of them is slow.
HALVES = [pytest.param(2, id="half"), pytest.param(1, marks=pytest.mark.slow, id="all")]


@pytest.mark.parametrize("every", HALVES)
def test_a_flipped_byte_of_any_file_is_found_and_the_next_run_makes_it_anew(one, every):
    expected, rng = spectra_bytes(one), np.random.default_rng(0)
    before = {p: p.read_bytes() for p in files(one)}
    for number, (path, good) in enumerate(before.items()):
        for at in {len(good) - 1, int(rng.integers(len(good)))}:
            path.write_bytes(good)
            flip(path, at)
            assert damage_of(str(one)), (path, at)
        if number % every:
            path.write_bytes(good)
            continue
        # the last flip stands, and is recorded with its unit
        _, outcome = again(one)
        assert outcome.failed == {}
        assert damage_of(str(one)) == [], path
        assert spectra_bytes(one) == expected, path
    assert {p.relative_to(one) for p in files(one)} == {p.relative_to(one) for p in before}


@pytest.mark.parametrize("every", HALVES)
def test_a_file_that_is_gone_is_found_and_made_anew(one, every):
    expected = spectra_bytes(one)
    for number, path in enumerate(files(one)):
        good = path.read_bytes()
        path.unlink()
        assert damage_of(str(one)), path
        if every > 1 and number % every == 0:
            path.write_bytes(good)
            continue
        again(one)
        assert damage_of(str(one)) == [], path
        assert spectra_bytes(one) == expected, path


def test_what_is_damaged_alone_is_made_anew(whole):
    keys = list(open_run(str(whole)).records())
    matrix = next(p for p in (whole / "units" / keys[1] / "matrix" / "c").rglob("*") if p.is_file())
    flip(matrix, 20)
    flip(whole / "units" / keys[2] / "zarr.json", 300)
    assert len(damage_of(str(whole))) == 2
    events = []
    again(whole, events.append)
    assert {e.unit for e in events} == {keys[1], keys[2]}
    assert damage_of(str(whole)) == []


class Elsewhere(InProcess):
    """A worker in another folder than the client, as one of another machine is."""

    def submit(self, function, *args, gpu=False):
        here = os.getcwd()
        os.chdir("/")
        try:
            return super().submit(function, *args, gpu=gpu)
        finally:
            os.chdir(here)


def test_a_damaged_unit_is_made_anew_from_the_images_that_the_run_has(one, monkeypatch):
    """Their source may be gone, and the worker that looks at them in another folder than a relative name means."""

    def gone(study):
        raise InputError("there is no file six.npz")

    expected = spectra_bytes(one)
    monkeypatch.setattr("stiffcore.survey.open_images", gone)
    key = next(iter(open_run("run").records()))
    flip(one / "units" / key / "zarr.json", 300)
    executor = Elsewhere(lambda event: None)
    prepared = prepare("run", {}, executor, trust=True)
    assert carry_out_plan("run", prepared, executor, lambda event: None)[1].failed == {}
    assert spectra_bytes(one) == expected


def test_of_a_unit_under_way_the_stored_part_is_read_too(small):
    sessions(small, (small / "run", 3))
    assert damage_of(str(small / "run")) == []
    shard = next(p for p in (small / "run").rglob("matrix/c/**/*") if p.is_file())
    flip(shard, 11)
    assert len(damage_of(str(small / "run"))) == 1
    _, outcome = again(small / "run")
    assert outcome.failed == {}
    sessions(small, (small / "straight", 0))
    assert spectra_bytes(small / "run") == spectra_bytes(small / "straight")


def test_damage_that_checksums_cannot_see_is_seen_by_the_certificates(whole):
    run = open_run(str(whole))
    key = next(iter(run.records()))
    values = run.store.get_array(f"units/{key}", "eigenvalues")
    run.store.put_array(f"units/{key}", "eigenvalues", values * 1.0001, ("eigenvalue",))
    assert damage_of(str(whole)) == []
    assert [f.part for f in verify(run, certificates=True, trust=True).findings] == ["certificate"]


@pytest.mark.parametrize(
    "options", [{"kinds": "tensor-slices"}, {"kinds": "singular"}, {"keep": "metrics"}, {"solver": "extremes"}]
)
def test_other_kinds_and_solvers_are_certified_again(small, ends_are_cheap, options):
    run, _ = execute(small / "run", OPTIONS | {"blocks": "1", "functions": "block"} | options)
    found = verify(run, certificates=True, trust=True)
    assert found.findings == []
    assert found.recomputed == 1
    key = next(iter(run.records()))
    record = run.store.record(key)
    if record.metrics:
        run.store.update(key, metrics=record.metrics | {"S": 2.0, "nuclear_norm": 2.0})
        assert len(verify(run, certificates=True, trust=True).findings) == 1


def test_the_command_names_what_is_damaged_and_fails(whole):
    def command(*more):
        code = "from stiffcore.cli import main; main()"
        program = [sys.executable, "-c", code, "verify", str(whole), *more]
        return subprocess.run(program, cwd=whole.parent, capture_output=True, text=True, check=False)

    found = command()
    assert found.returncode == 0
    assert "all whole" in found.stdout
    key = next(iter(open_run(str(whole)).records()))
    flip(next(p for p in (whole / "units" / key / "eigenvalues" / "c").rglob("*") if p.is_file()), 3)
    found = command("--json")
    assert found.returncode == 1
    assert [f["unit"] for f in json.loads(found.stdout)["findings"]] == [key]
    assert "makes just these anew" in found.stderr


def test_a_certificate_that_cannot_be_made_again_is_no_damage(whole):
    source = whole.parent / "smallnet.py"
    text = source.read_text()
    source.write_text(text.replace("torch.manual_seed(5)", "torch.manual_seed(6)"))
    sys.modules.pop("smallnet", None)
    found = verify(open_run(str(whole)), certificates=True, trust=True)
    assert found.findings == []
    assert len(found.unchecked) == 4
    assert found.recomputed == 0
    source.write_text(text)
    sys.modules.pop("smallnet", None)
    events = []
    again(whole, events.append)
    assert events == []


def test_a_run_that_is_worked_on_is_not_verified(whole):
    with RunStore(str(whole)).hold(), pytest.raises(stiffcore.BusyError):
        verify(open_run(str(whole)))


def test_a_run_that_may_not_be_written_to_is_read_alone(one, monkeypatch):
    def refuse(lock, *args, **kwargs):
        raise PermissionError("a disk mounted to be read")

    key = next(iter(open_run(str(one)).records()))
    flip(next(p for p in (one / "units" / key / "eigenvalues" / "c").rglob("*") if p.is_file()), 3)
    monkeypatch.setattr("stiffcore.store.lock.FileLock.acquire", refuse)
    before = {p: p.read_bytes() for p in files(one)}
    found = verify(open_run(str(one)))
    assert (len(found.findings), found.recorded) == (1, False)
    assert {p: p.read_bytes() for p in files(one)} == before


def test_a_repair_that_was_killed_is_damage_too(one):
    expected = spectra_bytes(one)
    key = next(iter(open_run(str(one)).records()))
    store = RunStore(str(one))
    store.clear(f"units/{key}")
    assert damage_of(str(one))
    again(one)
    store.clear(f"units/{key}")
    store.unit_group(key)  # without its record
    assert damage_of(str(one))
    again(one)
    assert damage_of(str(one)) == []
    assert spectra_bytes(one) == expected


@pytest.mark.parametrize("name", ["matrix", "matrix_tiles"])
def test_metadata_of_a_matrix_under_way_that_cannot_be_read_is_made_anew(small, name):
    sessions(small, (small / "whole", 0), (small / "run", 4))
    path = next((small / "run").rglob(f"{name}/zarr.json"))
    path.write_bytes(path.read_bytes()[:40])
    again(small / "run")  # notices, and goes back
    _, outcome = again(small / "run")
    assert outcome.failed == {}
    assert spectra_bytes(small / "run") == spectra_bytes(small / "whole")


def test_a_damaged_unit_is_planned_again_within_the_budget(one):
    run = open_run(str(one))
    key = next(iter(run.records()))
    flip(next(p for p in (one / "units" / key / "eigenvalues" / "c").rglob("*") if p.is_file()), 3)
    with pytest.raises(stiffcore.InputError, match="--memory"):
        execute(one, {"memory": "1MiB"})
    assert run.store.record(key).stage is Stage.DONE


def test_other_pixels_than_those_of_the_header_are_read_again(one):
    store = RunStore(str(one))
    x = store.get_array("images", "x")
    store.put_array("images", "x", x ^ 1, ("image", "axis1", "axis2", "axis3"))
    assert damage_of(str(one)) == ["images/x"]
    again(one)
    assert damage_of(str(one)) == []
    assert np.array_equal(store.get_array("images", "x"), x)


def test_a_damaged_picture_goes_and_the_spectrum_stays(one):
    run = open_run(str(one))
    key = next(iter(run.records()))
    run.picture(block="4", trust=True)
    path = one / "units" / key / "numerical_range" / "zarr.json"
    flip(path, 50)
    assert damage_of(str(one)) == [f"units/{key}/numerical_range"]
    events = []
    again(one, events.append)
    assert events == []
    assert not path.exists()
    assert damage_of(str(one)) == []
