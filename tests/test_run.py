"""A run ends with the same bytes however often it was killed, and refuses what it cannot do before it begins."""

import errno
import os
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import scipy.linalg
import torch
from torch import nn
from zarr.storage import LocalStore

import stiffcore
from stiffcore.cluster import InProcess, local_workers
from stiffcore.memory import tree_bytes
from stiffcore.record import Stage
from stiffcore.run import state_of
from stiffcore.session import carry_out_plan, prepare
from stiffcore.store import read_image
from stiffcore.verify import verify
from tests.cases import Basic
from tests.records import said
from tests.runs import KILL_OPTIONS, OPTIONS, command, execute, last_of_each, sessions, spectra_bytes


def test_a_run_gives_every_block_its_spectrum_and_equals_the_direct_call(small):
    run, outcome = execute(small / "run", OPTIONS | {"count": 2})
    assert outcome.failed == {}
    assert outcome.done == len(run.records()) == 2 * 4 * 2
    module = stiffcore.networks.zoo.load_network("smallnet:make", None, torch.float64).module
    x = torch.tensor(run.store.get_array("images", "x")[1]).permute(2, 0, 1)[None].double() / 255
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2471, 0.2435, 0.2616])
    x = (x - mean.double().view(1, 3, 1, 1)) / std.double().view(1, 3, 1, 1)
    inside = module.layer1[0](torch.relu(module.stem(x)))
    direct = stiffcore.spectrum(module.layer1[1], inside)
    stored = run.spectrum(image=1, block="layer1.1")
    assert np.allclose(stored.values, direct.values, atol=1e-6)  # to the float32 of the means
    rows = run.metrics()
    assert list(rows["state"]) == ["done"] * 16
    assert set(rows["label"]) == {0, 1}
    assert np.isfinite(rows["loss"]).all()


def test_a_finished_run_continues_to_nothing_and_changes_nothing(small):
    execute(small / "run", OPTIONS | {"blocks": "2,4"})
    before = spectra_bytes(small / "run")
    events = []
    _, outcome = execute(small / "run", {}, events.append)
    assert outcome.done == 4
    assert events == []
    assert spectra_bytes(small / "run") == before


def test_the_same_blocks_named_otherwise_are_the_same_settings(small):
    execute(small / "run", OPTIONS | {"blocks": "1,4", "functions": "block"})
    before = spectra_bytes(small / "run")
    execute(small / "run", {"blocks": "layer1.0,layer2.2"})
    assert spectra_bytes(small / "run") == before


def test_settings_that_disagree_are_refused_by_name_and_memory_may_change(small):
    options = OPTIONS | {"blocks": "4"}
    execute(small / "run", options)
    before = spectra_bytes(small / "run")
    with pytest.raises(stiffcore.InputError) as caught:
        execute(small / "run", {"dtype": "float32", "blocks": "1", "index": "3"})
    message = str(caught.value)
    assert all(f"- {name}:" in message for name in ("dtype", "blocks", "images"))
    assert "weights" not in message
    execute(small / "run", {"memory": "3GiB", "keep": "all"})
    execute(small / "run", options)
    assert spectra_bytes(small / "run") == before


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"blocks": "layer1.7,2,nonsense"}, ["'layer1.7'", "'nonsense'", "1 layer1.0", "4 layer2.2"]),
        ({"blocks": "9"}, ["'9'"]),
        ({"dtype": "float16", "kinds": "vector", "count": 0}, ["--dtype", "--kind", "--count"]),
        ({"count": 1, "index": "2"}, ["--count", "--index"]),
        ({"index": "2,99"}, ["99"]),
        ({"memory": "1MiB"}, ["budget is too small", "--memory"]),
        ({"memory": "much"}, ["not a size"]),
        ({"network": "resnet99"}, ["resnet18"]),
        ({"network": "resnet18", "weights": "nothing.pt"}, ["nothing.pt"]),
        ({"images": "nowhere.npz"}, ["nowhere.npz"]),
        pytest.param(
            {"device": "cuda"},
            ["no CUDA device"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(small, options, parts):
    with pytest.raises(stiffcore.InputError) as caught:
        execute(small / "run", OPTIONS | options)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert not (small / "run").exists()


def test_a_folder_with_something_else_in_it_is_left_alone(small):
    (small / "other").mkdir()
    (small / "other" / "thesis.tex").write_text("years")
    with pytest.raises(stiffcore.InputError, match="not a run"):
        execute(small / "other", OPTIONS)
    assert [p.name for p in (small / "other").iterdir()] == ["thesis.tex"]


def test_too_little_disk_is_refused_with_both_figures(small, monkeypatch):
    monkeypatch.setattr(stiffcore.store.RunStore, "free_bytes", lambda self: 1000)
    with pytest.raises(stiffcore.InputError, match="disk"):
        execute(small / "run", OPTIONS)


def test_what_a_run_has_stored_already_counts_for_the_disk_that_it_needs(small, monkeypatch):
    def stop(event):
        if said(event) == "built":
            raise KeyboardInterrupt

    options = OPTIONS | {"blocks": "1", "functions": "block", "keep": "all"}
    with pytest.raises(KeyboardInterrupt):
        execute(small / "run", options, stop)
    plan = prepare(str(small / "run"), {}, InProcess(print), trust=True).plan
    [unit] = plan.units
    there = stiffcore.store.RunStore(str(small / "run")).stored_bytes(unit.unit.key)
    assert 0 < there < plan.disk_bytes
    monkeypatch.setattr(stiffcore.store.RunStore, "free_bytes", lambda self: plan.disk_bytes - there - 1)
    with pytest.raises(stiffcore.InputError, match="stored already"):
        execute(small / "run", {})
    monkeypatch.setattr(stiffcore.store.RunStore, "free_bytes", lambda self: plan.disk_bytes - there)
    assert execute(small / "run", {})[1].failed == {}


def test_a_rectangular_block_has_no_spectrum_and_says_so(small):
    module = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU())

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = module

        def forward(self, x):
            return self.body(x).mean((2, 3))

    run = stiffcore.analyze(Net(), torch.ones(1, 3, 4, 4), run=str(small / "run"), blocks="body.0,body.1")
    assert {r.unit.block: state_of(r) for r in run.records().values()} == {"body.0": "no spectrum", "body.1": "done"}
    with pytest.raises(stiffcore.InputError, match="rectangular"):
        run.spectrum(block="body.0")
    assert np.isnan(run.metrics().set_index("block").loc["body.0", "S"])


def check_killed(small, chosen):
    _, kinds = sessions(small, (small / "whole", 0))
    (kinds,) = kinds.values()
    assert len(kinds) > 8
    expected = spectra_bytes(small / "whole")
    events = chosen(kinds)
    asked = [(small / f"run{at}", kill) for at in events for kill in (at, 0)]
    statuses, _ = sessions(small, *asked)
    assert {status for (_, at), status in statuses.items() if at} == {signal.SIGKILL}
    assert {status for (_, at), status in statuses.items() if not at} == {0}
    for at in events:
        assert spectra_bytes(small / f"run{at}") == expected, at


def test_killed_at_an_event_of_each_kind_a_run_continues_to_the_same_bytes(small):
    check_killed(small, last_of_each)


@pytest.mark.slow
def test_killed_at_any_event_a_run_continues_to_the_same_bytes(small):
    check_killed(small, lambda kinds: range(1, len(kinds) + 1))


def test_killed_again_and_again_a_run_gets_on_and_ends_with_the_same_bytes(small):
    sessions(small, (small / "whole", 0))
    # three events on, at least one more stage is recorded than before
    sessions(small, *[(small / "run", 3)] * 6)
    run = stiffcore.open_run(str(small / "run"))
    assert {state_of(r) for r in run.records().values()} == {"done"}
    assert spectra_bytes(small / "run") == spectra_bytes(small / "whole")


def test_matrices_are_dropped_once_certified_and_kept_on_request(small):
    run, _ = execute(small / "spare", OPTIONS | {"blocks": "1"})
    assert not list((small / "spare").rglob("matrix"))
    run, _ = execute(small / "all", OPTIONS | {"blocks": "1", "keep": "all"})
    key = next(iter(run.records()))
    matrix = stiffcore.store.TiledMatrix(run.store.unit_group(key), "matrix").read()
    computed = np.sort_complex(np.linalg.eigvals(matrix) + run.records()[key].shift)
    assert np.allclose(np.sort_complex(run.spectrum().computed), computed, atol=1e-9)
    found = run.spectrum().metrics
    symmetric = np.linalg.eigvalsh((matrix + matrix.T) / 2)
    assert found["numerical_abscissa"] == pytest.approx(run.records()[key].shift + symmetric[-1], rel=1e-8)
    strict = np.triu(scipy.linalg.schur(matrix, output="complex")[0], 1)
    assert found["departure"] == pytest.approx(np.linalg.norm(strict), rel=1e-6)


def test_changed_weights_fail_the_unit_and_not_the_run(small):
    path = small / "weights.pt"
    import smallnet

    torch.save(smallnet.make().state_dict(), path)
    options = OPTIONS | {"weights": str(path), "blocks": "1"}
    executor = InProcess(lambda event: None)
    prepared = prepare(str(small / "run"), options, executor)
    state = smallnet.make().state_dict()
    torch.save({k: v * 1.01 for k, v in state.items()}, path)
    run, outcome = carry_out_plan(str(small / "run"), prepared, executor, lambda event: None)
    assert len(outcome.failed) == 2
    assert all("no longer those" in why for why in outcome.failed.values())
    assert {state_of(r) for r in run.records().values()} == {"failed"}
    torch.save(state, path)
    _, outcome = execute(small / "run", {})
    assert outcome.failed == {}
    assert outcome.done == 2


def test_a_damaged_matrix_is_noticed_and_made_anew_in_the_same_session(small):
    expected = execute(small / "good", OPTIONS | {"blocks": "1"})[0].spectrum().values
    damaged, notes = False, []

    def damage(event):
        nonlocal damaged
        notes.append(getattr(event, "note", ""))
        if event.kind == "reached" and said(event) == "built" and not damaged:
            for path in (small / "run").rglob("matrix/c/**/*"):
                if path.is_file() and not damaged:
                    data = bytearray(path.read_bytes())
                    data[10] ^= 1
                    path.write_bytes(data)
                    damaged = True

    run, outcome = execute(small / "run", OPTIONS | {"blocks": "1"}, damage)
    assert damaged
    assert outcome.failed == {}
    assert [note for note in notes if "checksum" in note and note.endswith("made anew")]
    assert np.array_equal(run.spectrum().values, expected)


def test_what_other_versions_left_unfinished_begins_again(small):
    sessions(small, (small / "run", 5))
    run = stiffcore.open_run(str(small / "run"))
    begun = [k for k, r in run.records().items() if r.begun and r.stage is not Stage.DONE]
    assert begun
    run.store.update(begun[0], made_with={"torch": "1.0"})
    events = []
    execute(small / "run", {}, events.append)
    assert [e.unit for e in events if e.kind == "restarted"] == begun[:1]


def test_two_workers_give_the_bytes_of_one_process(small):
    one = prepare(str(small / "one"), OPTIONS, InProcess(print), workers=1)
    carry_out_plan(str(small / "one"), one, InProcess(print), lambda event: None)
    events = []
    with local_workers(events.append) as executor:
        prepared = prepare(str(small / "two"), OPTIONS | {"memory": "4GiB"}, executor, workers=2)
        _, outcome = carry_out_plan(str(small / "two"), prepared, executor, events.append)
    assert outcome.failed == {}
    assert (prepared.plan.workers, prepared.plan.threads) == (2, 1)
    assert spectra_bytes(small / "one")[0] == spectra_bytes(small / "two")[0]
    assert {said(e) for e in events} >= {"begun", "built", "reduced", "solved", "done", "ended"}


def facts(prepared):
    units = [p.unit.model_dump(exclude={"column_s"}) for p in prepared.plan.units]
    return sorted(units, key=lambda unit: unit["key"])


def test_on_one_thread_or_two_the_values_agree_within_their_errors_and_a_run_keeps_its_number(small):
    """Sums in another order have other last bits: the number of threads is part of a run, and stays as it began."""

    def on(threads, name, on_event=lambda event: None):
        prepared = prepare(str(small / name), OPTIONS | {"blocks": "2,4"}, InProcess(print))
        prepared = replace(prepared, plan=replace(prepared.plan, threads=threads))
        return carry_out_plan(str(small / name), prepared, InProcess(print), on_event)[0]

    runs = [on(1, "on1"), on(2, "on2")]
    assert [run.header.threads for run in runs] == [1, 2]
    for key in runs[0].records():
        one, two = (run.stored(key) for run in runs)
        allowed = one.certificate.error + two.certificate.error + 1e-12
        assert np.abs(one.computed - two.computed).max(initial=0.0) <= allowed

    def stop(event):
        if event.kind == "ended":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        on(1, "begun", stop)
    assert on(2, "begun").header.threads == 1
    assert spectra_bytes(small / "begun") == spectra_bytes(small / "on1")


def test_many_images_are_looked_at_by_all_workers_and_seen_as_by_one(small, monkeypatch):
    options = OPTIONS | {"count": 6, "memory": "4GiB"}
    one = prepare(str(small / "one"), options, InProcess(print))
    monkeypatch.setattr("stiffcore.session.IMAGES_A_LOOK", 3)
    with local_workers(lambda event: None) as executor:
        two = prepare(str(small / "two"), options, executor, workers=2)
        assert len(executor.workers()) == 2
        assert two.machine.worker_bytes > 0
        # two workers are there, and one is counted
        assert two.machine.reserved_bytes < tree_bytes() - two.machine.worker_bytes / 2
    assert facts(one) == facts(two)
    assert one.survey.identity == two.survey.identity
    for name, values in one.survey.images.items():
        assert np.array_equal(values, two.survey.images[name]), name
    assert [u.key for u in one.survey.units] == [u.key for u in two.survey.units]


def test_images_that_an_earlier_version_stored_in_one_chunk_are_read_counted_and_gone_on_from(small):
    options = OPTIONS | {"count": 3, "blocks": "1"}
    run, _ = execute(small / "run", options)
    assert len(list((small / "run/images/x/c").iterdir())) == 3
    before, x = spectra_bytes(small / "run"), run.store.get_array("images", "x")
    run.store.put_array("images", "x", x, ("image", "axis1", "axis2", "axis3"))
    assert verify(run).findings == []
    key = next(key for key, record in run.records().items() if record.unit.image == 2)
    record = run.store.record(key).changed(stage=Stage.PLANNED)
    before_it_was_counted = record.unit.model_copy(update={"image_bytes": 0})
    run.store.put_record(key, replace(record, plan=replace(record.plan, unit=before_it_was_counted)))
    run.store.drop(key, "eigenvalues")
    prepared = prepare(str(small / "run"), {}, InProcess(print), trust=True)
    assert not prepared.damaged
    [plan] = prepared.plan.units
    assert plan.unit.image_bytes >= x.nbytes
    assert plan.stages["open"] >= plan.unit.network_bytes + x.nbytes
    execute(small / "run", {})
    assert spectra_bytes(small / "run") == before


@pytest.mark.parametrize("fault", ["gone", "another"])
def test_an_image_that_is_not_the_one_it_was_is_found_and_stored_again(small, fault):
    run, _ = execute(small / "run", OPTIONS | {"count": 3, "blocks": "1"})
    before, x = spectra_bytes(small / "run"), run.store.get_array("images", "x")
    chunk = small / "run/images/x/c/1/0/0/0"
    if fault == "gone":
        chunk.unlink()
    else:
        chunk.write_bytes((small / "run/images/x/c/2/0/0/0").read_bytes())
    with pytest.raises(stiffcore.DamagedError):
        read_image(run.store, 1, run.header.identity.images[1])
    assert np.array_equal(read_image(run.store, 2, run.header.identity.images[2]), x[2])
    execute(small / "run", {})
    assert np.array_equal(run.store.get_array("images", "x"), x)
    assert spectra_bytes(small / "run") == before


def test_a_source_that_changes_between_the_look_and_the_store_is_refused(small):
    executor = InProcess(print)
    prepared = prepare(str(small / "run"), OPTIONS, executor)
    np.savez(small / "six.npz", x=np.zeros((6, 6, 6, 3), dtype=np.uint8), y=np.arange(6))
    with pytest.raises(stiffcore.InputError, match="changed while it was looked at"):
        carry_out_plan(str(small / "run"), prepared, executor, print)


def test_a_second_process_is_told_who_holds_the_run(small):
    execute(small / "run", KILL_OPTIONS)
    with stiffcore.open_run(str(small / "run")).store.hold():
        second = command("run", small / "run", cwd=small)
        _, errors = second.communicate(timeout=120)
    assert second.returncode == 3, errors
    assert str(os.getpid()) in errors


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_command_cleanly_and_the_run_continues(small, number, code):
    args = ["--network", "resnet18", "--images", "samples", "--blocks", "layer4.1,layer3.1"]
    process = command("run", small / "run", *args, cwd=small)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(Path(small / "run").glob("units/*layer*/matrix/c")):
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert f"stiffcore run {small / 'run'}" in errors
    assert "Traceback" not in errors
    run = stiffcore.open_run(str(small / "run"))
    assert run.store.holder() is None
    assert {state_of(r) for r in run.records().values()} <= {"done", "under way", "planned"}
    with run.store.hold():
        pass


def test_a_worker_killed_in_the_middle_is_replaced_and_its_unit_goes_on_to_the_same_bytes(small):
    options = OPTIONS | {"network": "smallnet:make_slow", "blocks": "1", "functions": "block", "memory": "4GiB"}
    execute(small / "whole", options)
    killed, stages, told = [], [], []

    def kill(event):
        stages.append((said(event), getattr(event, "done", 1)))
        if said(event) == "done" and getattr(event, "done", 1) == 0 and not killed:
            killed.append(workers[0])
            os.kill(workers[0], signal.SIGKILL)

    with local_workers(kill) as executor:
        prepared = prepare(str(small / "run"), options, executor)
        workers = [w.pid for w in executor.workers()]
        _, outcome = carry_out_plan(str(small / "run"), prepared, executor, told.append)
    assert killed
    assert outcome.failed == {}
    assert ["its worker died" in e.note for e in told if e.kind == "restarted"] == [True]
    # what was recorded was not done again
    assert [stages.count((stage, 0)) for stage in ("built", "reduced", "solved", "done")] == [1, 1, 1, 2]
    assert spectra_bytes(small / "run") == spectra_bytes(small / "whole")


def test_a_unit_that_kills_its_worker_each_time_fails_and_the_run_continues(small):
    options = OPTIONS | {"blocks": "1", "functions": "block", "memory": "4GiB"}
    deaths = []

    def kill(event):
        if said(event) == "done" and getattr(event, "done", 1) == 0:
            for worker in executor.workers():
                deaths.append(worker.pid)
                os.kill(worker.pid, signal.SIGKILL)

    def aside(event):  # not in the client's own thread, which must go on meanwhile
        threading.Thread(target=kill, args=(event,)).start()

    with local_workers(aside) as executor:
        prepared = prepare(str(small / "run"), options, executor)
        run, outcome = carry_out_plan(str(small / "run"), prepared, executor, lambda event: None)
    assert len(deaths) == 3
    assert ["worker died" in why for why in outcome.failed.values()] == [True]
    assert [state_of(r) for r in run.records().values()] == ["failed"]
    run, outcome = execute(small / "run", {})
    assert outcome.failed == {}


def test_of_two_processes_that_begin_the_same_run_with_other_settings_the_later_is_refused(small):
    executor = InProcess(lambda event: None)
    first, second = (
        prepare(str(small / "run"), OPTIONS | {"blocks": "4", "dtype": d}, executor) for d in ("float64", "float32")
    )
    carry_out_plan(str(small / "run"), first, executor, lambda event: None)
    before = spectra_bytes(small / "run")
    with pytest.raises(stiffcore.InputError, match="dtype"):
        carry_out_plan(str(small / "run"), second, executor, lambda event: None)
    assert stiffcore.open_run(str(small / "run")).study.dtype == "float64"
    assert spectra_bytes(small / "run") == before


def test_a_unit_that_is_gone_is_named_and_it_and_one_whose_spectrum_is_damaged_are_made_again(small):
    run, _ = execute(small / "run", OPTIONS | {"blocks": "4"})
    expected = spectra_bytes(small / "run")
    first, second = run.records()
    chunk = next(p for p in (small / "run" / "units" / first / "eigenvalues" / "c").rglob("*") if p.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"?")
    events = []
    _, outcome = execute(small / "run", {}, events.append)
    assert [e.unit for e in events if e.kind == "restarted"] == [first]
    assert outcome.done == 2
    assert spectra_bytes(small / "run") == expected
    (small / "run" / "units" / second / "zarr.json").unlink()
    with pytest.raises(stiffcore.DamagedError, match=second):
        run.records()
    events.clear()
    execute(small / "run", {}, events.append)
    assert {e.unit for e in events} == {second}
    assert spectra_bytes(small / "run") == expected


def test_a_smaller_budget_is_refused_for_a_unit_under_way_too(small):
    sessions(small, (small / "run", 5))
    with pytest.raises(stiffcore.InputError, match="--memory"):
        execute(small / "run", {"memory": "10MiB"})


def test_workers_are_gone_before_the_run_is_released(small):
    """A writer that outlived the lock could write into another process's session."""
    pids = []

    def interrupt(event):
        if event.kind == "begun":
            pids.extend(w.pid for w in executor.workers())
            raise KeyboardInterrupt

    with local_workers(lambda event: None) as executor:
        prepared = prepare(
            str(small / "run"), {"network": "resnet18", "blocks": "layer4.1", "memory": "4GiB"}, executor
        )
        hold = stiffcore.store.RunStore.hold
        alive_at_release = []

        @contextmanager
        def watched(store, **how):
            with hold(store, **how) as token:
                try:
                    yield token
                finally:
                    alive_at_release.extend(p for p in pids if psutil.pid_exists(p))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stiffcore.store.RunStore, "hold", watched)
            with pytest.raises(KeyboardInterrupt):
                carry_out_plan(str(small / "run"), prepared, executor, interrupt)
    assert pids
    assert alive_at_release == []


@pytest.mark.gpu
def test_on_a_cuda_device_a_run_gives_the_spectra_of_the_host(small):
    options = {"network": "resnet18", "blocks": "layer3.1,layer4.1", "functions": "block,branch"}
    host, _ = execute(small / "host", options | {"device": "cpu"})
    cuda, outcome = execute(small / "cuda", options | {"device": "cuda"})
    assert outcome.failed == {}
    for key, record in cuda.records().items():
        assert record.plan.solver == "cuda-dense"
        assert cuda.stored(key).certificate.passed
        assert np.allclose(cuda.stored(key).computed.real, host.stored(key).computed.real, atol=1e-8)
        assert 0 < record.measured_device_bytes <= record.plan.device_bytes


@pytest.mark.gpu
def test_a_cuda_device_that_is_full_hands_the_unit_to_the_host(small):
    execute(small / "host", OPTIONS | {"blocks": "1", "solver": "host-dense"})
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    held = torch.cuda.memory_reserved()
    events = []
    try:
        torch.cuda.set_per_process_memory_fraction((held + (64 << 10)) / total)
        run, outcome = execute(small / "run", OPTIONS | {"blocks": "1", "device": "cuda"}, events.append)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert outcome.failed == {}
    assert {said(e) for e in events} >= {"fallback"}
    assert {r.plan.solver for r in run.records().values()} == {"host-dense"}
    for key in run.records():
        assert run.stored(key).certificate.passed


def test_the_solver_cuda_dense_gives_the_spectra_of_the_host(small, supposed_device):
    options = OPTIONS | {"blocks": "2,4"}
    cuda, outcome = execute(small / "cuda", options)
    assert outcome.failed == {}
    host, _ = execute(small / "host", options | {"solver": "host-dense"})
    for key, record in cuda.records().items():
        assert record.plan.solver == "cuda-dense"
        assert host.records()[key].plan.solver == "host-dense"
        assert "cuda-dense" not in host.records()[key].plan.why
        assert cuda.stored(key).certificate.passed
        assert np.allclose(cuda.stored(key).values.real, host.stored(key).values.real, atol=1e-10)


def test_a_device_that_runs_out_of_memory_hands_the_unit_to_the_host(small, supposed_device, monkeypatch):
    options = OPTIONS | {"blocks": "2,4"}
    execute(small / "host", options | {"solver": "host-dense"})

    def full(a, device):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr("stiffcore.eigen.device.device_eigenvalues", full)
    events = []
    run, outcome = execute(small / "run", options, events.append)
    assert outcome.failed == {}
    assert {e.note for e in events if e.kind == "fallback"} == {
        "the device is out of memory (full): host-dense takes it"
    }
    assert {r.plan.solver for r in run.records().values()} == {"host-dense"}
    assert all("out of memory (full)" in r.plan.why for r in run.records().values())
    assert spectra_bytes(small / "run") == spectra_bytes(small / "host")


def test_a_device_that_runs_out_of_memory_fails_the_unit_where_only_it_was_asked_for(
    small, supposed_device, monkeypatch
):
    def full(a, values, device):
        raise torch.OutOfMemoryError("full")

    with monkeypatch.context() as patch:
        patch.setattr("stiffcore.eigen.device.device_eigenvectors", full)
        _, outcome = execute(small / "run", OPTIONS | {"solver": "cuda-dense", "blocks": "1"})
    assert ["cuda-dense: the device is out of memory (full)" in why for why in outcome.failed.values()] == [True] * 2
    run, outcome = execute(small / "run", {"solver": "host-dense"})
    assert outcome.failed == {}
    assert {state_of(r) for r in run.records().values()} == {"done"}


def test_matrices_alone_are_stored_and_can_be_solved_later(small):
    execute(small / "straight", OPTIONS | {"blocks": "1,4"})
    run, outcome = execute(small / "run", OPTIONS | {"blocks": "1,4", "solver": "matrix-only"})
    assert outcome.failed == {}
    assert {state_of(r) for r in run.records().values()} == {"stored"}
    assert run.metrics()["S"].isna().all()
    for key, record in run.records().items():
        matrix = stiffcore.store.TiledMatrix(run.store.unit_group(key), "matrix").read()
        assert matrix.shape == (record.unit.k, record.unit.k)
    with pytest.raises(stiffcore.InputError, match="stored"):
        run.spectrum(block="1")
    events = []
    execute(small / "run", {}, events.append)
    assert events == []
    execute(small / "run", {"solver": "auto"}, events.append)
    assert "built" not in {said(e) for e in events}
    assert spectra_bytes(small / "run") == spectra_bytes(small / "straight")


def test_unreduced_matrices_have_the_same_spectra_and_cost_no_disk_where_they_are_zero(small):
    reduced, _ = execute(small / "reduced", OPTIONS | {"blocks": "1,4"})
    run, outcome = execute(small / "run", OPTIONS | {"blocks": "1,4", "reduce": "none"})
    assert outcome.failed == {}
    for key, record in run.records().items():
        assert (record.unit.route, record.unit.k) == ("full", record.unit.n)
        a, b = (np.sort_complex(np.round(r.stored(key).values, 7)) for r in (run, reduced))
        assert np.allclose(a, b, atol=1e-6)
    with pytest.raises(stiffcore.InputError, match="reduce"):
        execute(small / "run", {"reduce": "auto"})


def test_a_disk_that_is_full_half_way_ends_the_session_and_the_run_continues_to_the_same_bytes(small, monkeypatch):
    write, writes, room = LocalStore.set, [], 1 << 60

    async def full(store, key, value, *args):
        writes.append(key)
        if len(writes) > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return await write(store, key, value, *args)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "set", full)
        execute(small / "whole", KILL_OPTIONS)
        total = len(writes)
        for part in (0.5, 0.7, 0.9):
            writes, room = [], int(part * total)
            with pytest.raises(stiffcore.StiffcoreError, match=r"cannot be written.*No space left.*run again"):
                execute(small / f"run{part}", KILL_OPTIONS)
    for part in (0.5, 0.7, 0.9):
        execute(small / f"run{part}", KILL_OPTIONS)
        assert spectra_bytes(small / f"run{part}") == spectra_bytes(small / "whole")


def test_what_images_in_memory_or_from_a_source_do_not_take_is_refused(tmp_path):
    network, images = nn.Sequential(Basic(3)).double().eval(), torch.rand(1, 3, 4, 4).double()
    with pytest.raises(stiffcore.InputError, match="use normalize 'none', not 'imagenet'"):
        stiffcore.analyze(network, images, run=tmp_path / "run", blocks="0", normalize="imagenet")
    with pytest.raises(stiffcore.InputError, match="labels are for images given as an array"):
        stiffcore.analyze("resnet18", "samples", [0], run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_unit_leaves_the_callers_threads_as_they_were(tmp_path, monkeypatch):
    network, images = nn.Sequential(Basic(3)).double().eval(), torch.rand(1, 3, 4, 4).double()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        run = stiffcore.analyze(network, images, run=tmp_path / "run", blocks="0")
        assert torch.get_num_threads() == 3
        assert run.header.threads == 1
    finally:
        torch.set_num_threads(before)
