"""The solver `extremes`: S and P as the whole spectrum gives them, resumable, honest where something stays open."""

import dataclasses
import json
import math
import re
import signal

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from rich.console import Console
from scipy.sparse.linalg import LinearOperator

import stiffcore
from stiffcore.eigen.certificate import certify_ends, distance_of, sparse_moments
from stiffcore.eigen.counting import ends_of
from stiffcore.eigen.device import DeviceMatrix
from stiffcore.eigen.extremes import extremes
from stiffcore.eigen.inclusion import FULL_ORDER
from stiffcore.errors import InputError
from stiffcore.jacobian.reduction import reduce_jacobian
from stiffcore.plan import make_plan
from stiffcore.report.tables import metrics_table
from stiffcore.solvers import extremes as planning
from stiffcore.spectra import Ends
from stiffcore.study import Precision, Solver, Study
from tests.records import said
from tests.runs import OPTIONS, execute, last_of_each, sessions, spectra_bytes
from tests.test_plan import MIB, machine, planned, unit

pytestmark = pytest.mark.usefixtures("ends_are_cheap")

FROM_ENDS = ("S", "S_active", "abscissa", "min_re", "min_re_active", "radius", "numerical_abscissa")
FROM_COUNTS = ("negative", "positive", "zero", "euler_stable")


def assert_same_metrics(ends, full):
    assert ends.n == full.n
    assert (ends.k, ends.ones, ends.zeros) == (full.k, full.ones, full.zeros)
    for name in FROM_ENDS:
        assert ends.metrics[name] == pytest.approx(full.metrics[name], rel=1e-8, nan_ok=True), name
    for name in FROM_COUNTS:
        known = not math.isnan(ends.metrics[name])
        assert not known or ends.metrics[name] == full.metrics[name], name
    assert math.isnan(ends.metrics["max_im"])
    distance = np.abs(ends.computed[:, None] - full.computed[None, :]).min(axis=1)
    assert distance.max(initial=0.0) < 1e-8


@pytest.mark.parametrize(("count", "least"), [(1, 6), pytest.param(3, 20, marks=pytest.mark.slow)])
def test_the_ends_give_the_metrics_of_the_whole_spectrum(small, count, least):
    full, _ = execute(small / "full", OPTIONS | {"count": count})
    run, outcome = execute(small / "run", OPTIONS | {"count": count, "solver": "extremes"})
    assert outcome.failed == {}
    proved = 0
    for key, record in run.records().items():
        found = run.stored(key)
        assert record.plan.solver == "extremes"
        assert found.certificate.passed, found.verdict
        assert_same_metrics(found, full.stored(key))
        proved += not math.isnan(found.metrics["negative"])
        with pytest.raises(InputError, match="only the ends"):
            _ = found.values
        repr(found)
    assert proved >= least  # of 8 an image
    rows = run.metrics()
    assert rows["basis"].str.startswith("ends; ").all()
    assert set(full.metrics()["basis"]) == {"all eigenvalues"}
    assert not list((small / "run").rglob("*_vectors"))


def test_a_unit_solved_at_its_ends_can_be_solved_whole_later_and_not_the_other_way(small):
    options = OPTIONS | {"blocks": "2,4", "functions": "block"}
    execute(small / "straight", options)
    execute(small / "run", options | {"solver": "extremes"})
    events = []
    run, _ = execute(small / "run", {}, events.append)
    assert events == []
    run, outcome = execute(small / "run", {"solver": "host-dense"}, events.append)
    assert outcome.failed == {}
    assert events
    assert spectra_bytes(small / "run") == spectra_bytes(small / "straight")
    assert all(run.stored(key).ends is None for key in run.records())
    events.clear()
    execute(small / "run", {"solver": "extremes"}, events.append)
    assert events == []
    assert spectra_bytes(small / "run") == spectra_bytes(small / "straight")


def check_killed(small, chosen, block):
    options = {"solver": "extremes", "blocks": block, "cheap": True}
    _, kinds = sessions(small, (small / "whole", 0), **options)
    (kinds,) = kinds.values()
    assert len(kinds) > 8
    assert {r.plan.solver for r in stiffcore.open_run(str(small / "whole")).records().values()} == {"extremes"}
    events = chosen(kinds)
    asked = [(small / f"run{at}", kill) for at in events for kill in (at, 0)]
    statuses, _ = sessions(small, *asked, **options)
    assert {status for (_, at), status in statuses.items() if at} == {signal.SIGKILL}
    expected = spectra_bytes(small / "whole")
    for at in events:
        assert spectra_bytes(small / f"run{at}") == expected, at


def test_killed_at_an_event_of_each_kind_the_ends_are_the_same_bytes(small):
    check_killed(small, last_of_each, "4")


@pytest.mark.slow
def test_killed_at_any_event_the_ends_are_the_same_bytes(small):
    check_killed(small, lambda kinds: range(1, len(kinds) + 1), "1")


def test_a_matrix_that_is_accumulated_is_stored_only_where_it_is_to_be_kept(small):
    options, seen = OPTIONS | {"blocks": "1", "functions": "block", "solver": "extremes"}, []

    def look(event):
        seen.extend(p for p in (small / "run").rglob("matrix*") if said(event) == "counted")

    run, _ = execute(small / "run", options, look)
    assert {(r.plan.build, r.plan.stored) for r in run.records().values()} == {("accumulated", False)}
    assert seen == []
    kept, _ = execute(small / "kept", options | {"keep": "all"})
    for key, record in kept.records().items():
        assert record.plan.stored
        matrix = stiffcore.store.TiledMatrix(kept.store.unit_group(key), "matrix").read()
        assert matrix.shape == (record.unit.k, record.unit.k)
        assert kept.stored(key).computed.tobytes() == run.stored(key).computed.tobytes()


def test_where_the_matrix_does_not_fit_products_alone_give_the_ends(small, monkeypatch):
    full, _ = execute(small / "full", OPTIONS | {"blocks": "1"})
    monkeypatch.setattr(planning, "_factor_levels", lambda nonzeros, fill: ((1 << 50, ""),))
    run, outcome = execute(small / "run", OPTIONS | {"blocks": "1", "solver": "extremes"})
    assert outcome.failed == {}
    assert not list((small / "run").rglob("matrix"))
    for key, record in run.records().items():
        assert record.plan.matrix_free
        found = run.stored(key)
        assert found.certificate.passed, found.verdict
        assert_same_metrics(found, full.stored(key))
    # later, with room, the whole spectrum
    execute(small / "run", {"solver": "host-dense"})
    assert spectra_bytes(small / "run") == spectra_bytes(small / "full")


def test_products_on_the_device_give_the_ends_of_the_host(small, supposed_device):
    options = OPTIONS | {"solver": "extremes", "blocks": "2,4"}
    there, outcome = execute(small / "device", options)
    assert outcome.failed == {}
    here, _ = execute(small / "host", options | {"device": "cpu"})
    for key, record in there.records().items():
        assert record.plan.device_bytes > 0
        assert here.records()[key].plan.device_bytes == 0
        a, b = there.stored(key), here.stored(key)
        assert a.certificate.passed
        assert np.allclose(a.computed, b.computed, atol=1e-10)
        assert a.ends.left_of_zero.count == b.ends.left_of_zero.count


def test_a_device_without_room_for_the_matrix_leaves_its_products_to_the_host(small, supposed_device, monkeypatch):
    def full(a, device):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr("stiffcore.eigen.device._to_sparse_device", full)
    events = []
    run, outcome = execute(small / "run", OPTIONS | {"solver": "extremes", "blocks": "1"}, events.append)
    assert outcome.failed == {}
    assert {e.note for e in events if e.kind == "fallback"} == {"the device is out of memory (full): extremes takes it"}
    assert all(record.plan.device_bytes == 0 for record in run.records().values())
    assert all(run.stored(key).certificate.passed for key in run.records())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_matrix_on_a_device_multiplies_as_it_does(device):
    a = sp.csc_array(sp.random_array((150, 150), density=0.05, rng=np.random.default_rng(0)))
    there = DeviceMatrix(a, device)
    x = np.random.default_rng(1).standard_normal(150)
    z = x + 1j * x[::-1]
    assert np.allclose(there @ x, a @ x, atol=1e-14)
    assert np.allclose(there.rmatvec(x), a.T @ x, atol=1e-14)
    assert np.allclose(there.T @ x, a.T @ x, atol=1e-14)
    assert np.allclose(there @ z, a @ z, atol=1e-14)


@pytest.mark.gpu
def test_on_a_cuda_device_the_ends_are_those_of_the_host(small):
    options = OPTIONS | {"solver": "extremes"}
    there, outcome = execute(small / "device", options | {"device": "cuda"})
    assert outcome.failed == {}
    here, _ = execute(small / "host", options | {"device": "cpu"})
    for key in there.records():
        assert np.allclose(there.stored(key).computed, here.stored(key).computed, atol=1e-10)


def test_damaged_vectors_are_noticed_and_the_ends_found_again_in_the_same_session(small):
    options = OPTIONS | {"blocks": "1", "functions": "block", "solver": "extremes"}
    execute(small / "good", options)
    hit, notes = [], []

    def damage(event):
        notes.append(getattr(event, "note", ""))
        if event.kind == "reached" and said(event) == "solved" and not hit:
            path = next(p for p in (small / "run").rglob("right_vectors/c/**/*") if p.is_file())
            data = bytearray(path.read_bytes())
            data[10] ^= 1
            path.write_bytes(data)
            hit.append(path)

    _, outcome = execute(small / "run", options, damage)
    assert hit
    assert outcome.failed == {}
    assert [note for note in notes if note.endswith("made anew")]
    assert spectra_bytes(small / "run") == spectra_bytes(small / "good")


def test_a_smaller_budget_leaves_less_room_for_factors_and_says_what_remains():
    one = unit(7000, items=1_000_000).model_copy(update={"products": 500, "nonzeros": 1_700_000, "fill": 6_000_000})
    found = {}
    for memory in range(3000, 440, -10):
        plan = planned([one], memory * MIB, solver="extremes").units[0]
        if plan.works:
            found.setdefault((plan.factor_bytes, plan.matrix_free), plan)
            assert plan.projected_bytes <= memory * MIB - machine().reserved_bytes
            assert plan.solver is Solver.EXTREMES
    assert len(found) == 5
    rooms = [factors for factors, _ in found]
    assert rooms == sorted(rooms, reverse=True)
    whys = [plan.why for plan in found.values()]
    assert "inertia" in whys[0]
    assert "discs" in whys[1]
    assert "powers alone" in whys[3]
    assert "products alone" in whys[4]
    # never taken without being asked for
    assert planned([one], 600 * MIB).units[0].refused


def test_where_the_whole_spectrum_takes_no_longer_it_is_planned_and_stays_planned(small, monkeypatch):
    monkeypatch.setattr(planning, "PRODUCT_COST", 25)
    options = OPTIONS | {"blocks": "1", "functions": "block"}
    run, _ = execute(small / "run", options | {"solver": "extremes"})
    [record] = run.records().values()
    assert record.plan.solver == "host-dense"
    assert "takes no longer" in record.plan.why
    assert run.metrics()["basis"].tolist() == ["all eigenvalues"]
    execute(small / "straight", options)
    assert spectra_bytes(small / "run") == spectra_bytes(small / "straight")
    large = unit(7000).model_copy(update={"nonzeros": 1_700_000, "fill": 6_000_000})
    assert planned([large], 4000 * MIB, solver="extremes").units[0].solver is Solver.EXTREMES


def test_a_function_s_ends_alone():
    weight = torch.diag(torch.linspace(0.5, 3.0, 150, dtype=torch.float64))
    x = torch.zeros(150, dtype=torch.float64)
    found = stiffcore.spectrum(lambda v: v @ weight, x, solver="extremes")
    assert found.ends is not None
    assert found.metrics["S"] == pytest.approx(6)
    assert found.metrics["negative"] == 0
    with pytest.raises(InputError, match="solver must be one of"):
        stiffcore.spectrum(lambda v: v @ weight, x, solver="fast")


def test_the_store_needs_no_more_than_the_band():
    one = unit(100_000, items=1_000_000).model_copy(
        update={"products": 3000, "nonzeros": 28_000_000, "fill": 400_000_000}
    )
    plan = planned([one], 64 << 30, solver="extremes").units[0]
    assert plan.disk_bytes < 8e9 / 2


def reduction_and_ends(a):
    weight = torch.as_tensor(a)
    reduction = reduce_jacobian(lambda x: x @ weight.T, torch.zeros(len(a), dtype=torch.float64), reduce=False)
    sparse = stiffcore.eigen.sparse.as_sparse(a)
    found = extremes(sparse)
    known = (found.values, found.vectors.right)
    ends = ends_of(sparse, 0, known, disc=True, memory_bytes=None, note=found.note)
    return reduction, found, sparse_moments(sparse), ends


def certified(reduction, found, moments, ends, right=True, left=True):
    return certify_ends(reduction, found.values, found.vectors, moments, ends, right_end=right, left_end=left)


def test_what_did_not_converge_or_contradicts_itself_is_not_certified():
    a = np.diag(np.linspace(0.5, 2.5, 120)) + np.diag(np.full(119, 0.1), 1)
    reduction, found, moments, ends = reduction_and_ends(a)
    assert ends.left_of_zero.count == 0
    assert ends.outside_disc.count == 120
    assert certified(reduction, found, moments, ends).passed
    lines = certified(reduction, found, moments, ends, left=False).failures
    assert "do not agree on the smallest" in lines[0]
    lines = certified(reduction, found, moments, ends, right=False).failures
    assert "do not agree on the largest" in lines[0]
    wrong = dataclasses.replace(ends, left_of_zero=dataclasses.replace(ends.left_of_zero, count=2))
    assert "proved to be negative" in certified(reduction, found, moments, wrong).failures[0]
    wrong = dataclasses.replace(ends, range_right=2.0)
    assert "outside of the numerical range" in certified(reduction, found, moments, wrong).failures[0]
    spoilt = dataclasses.replace(found, values=found.values + 1e-6)
    assert any("residual" in line for line in certified(reduction, spoilt, moments, ends).failures)


def test_a_missed_negative_eigenvalue_contradicts_the_proof():
    a = np.diag(np.concatenate([[-1.0], np.linspace(0.5, 2.5, 119)]))
    reduction, found, moments, ends = reduction_and_ends(a)
    assert ends.left_of_zero.count == 1
    kept = np.flatnonzero(found.values.real > 0)
    vectors = stiffcore.eigen.dense.Eigenvectors(
        found.vectors.right[:, kept], found.vectors.left[:, kept], found.vectors.converged[kept]
    )
    missed = dataclasses.replace(found, values=found.values[kept], vectors=vectors)
    assert "proved to be negative" in certified(reduction, missed, moments, ends).failures[0]


def test_an_end_is_proved_by_the_eigenvalues_certified_beyond_a_line_or_by_a_line_with_none():
    a = np.diag(np.linspace(0.5, 2.5, 120)) + np.diag(np.full(119, 0.01), 1)
    reduction, found, moments, ends = reduction_and_ends(a)
    between, beyond = ends.left_lines
    assert (between.count, beyond.count) == (int((a.diagonal() < between.threshold).sum()), 0)
    exact = certified(reduction, found, moments, ends)
    assert exact.unproved == ()
    assert exact.s_error < 1e-9
    lined = certified(reduction, found, moments, dataclasses.replace(ends, left_lines=(beyond,)))
    assert lined.unproved == ()
    assert 2.5 / 0.5**2 * (0.5 - beyond.threshold) <= lined.s_error * (1 + 1e-6)
    bare = certified(reduction, found, moments, dataclasses.replace(ends, left_lines=()))
    assert bare.unproved == ("smallest",)
    assert bare.passed
    assert bare.error >= 0.5 - ends.range_left
    assert bare.s_error >= 2.5 / ends.range_left - 5 - 1e-6
    assert bare.negative == (0, 0)  # proved all the same
    more = dataclasses.replace(between, count=between.count + 1)
    missed = certified(reduction, found, moments, dataclasses.replace(ends, left_lines=(more,)))
    assert missed.unproved == ("smallest",)
    fewer = dataclasses.replace(between, count=0)
    wrong = certified(reduction, found, moments, dataclasses.replace(ends, left_lines=(fewer,)))
    assert "found beyond" in wrong.failures[0]


def test_where_the_count_is_open_the_share_is_between_what_is_certified():
    a = np.diag(np.linspace(-0.5, 2.5, 120))
    reduction, found, moments, ends = reduction_and_ends(a)
    open_count = dataclasses.replace(ends.left_of_zero, count=None)
    ends = dataclasses.replace(ends, left_of_zero=open_count)
    low, high = certified(reduction, found, moments, ends).negative
    assert 0 < low < int((a.diagonal() < 0).sum()) < high < 120


def test_what_is_found_and_not_proved_says_so(small, monkeypatch):
    monkeypatch.setattr("stiffcore.eigen.counting._lines", lambda *_: ())
    run, outcome = execute(small / "run", OPTIONS | {"blocks": "1", "functions": "block", "solver": "extremes"})
    assert outcome.failed == {}
    for key in run.records():
        found = run.stored(key)
        assert found.certificate.unproved == ("largest", "smallest")
        assert "the smallest real part is found, not proved: the numerical range reaches" in found.verdict


@pytest.mark.parametrize("seed", range(2))
def test_no_count_is_proved_of_a_rounded_matrix_where_the_exact_one_has_another(seed):
    """x + s W2 relu(W1 x), whose products in float32 are off by more than the eigenvalue nearest to 0."""
    g = np.random.default_rng(seed)
    k, n = 110, 220
    w1 = (g.standard_normal((k, n)) / n**0.5).astype(np.float32)
    wanted = np.concatenate([-np.linspace(1.5, 3, 6), [-1.0], g.uniform(-0.6, 0.6, k - 7)])
    x, inverse = np.linalg.qr(g.standard_normal((k, k)))[0], np.linalg.pinv(w1.astype(float))
    free = (np.eye(n) - inverse @ w1) @ g.standard_normal((n, k)) * 3
    w2 = (inverse @ (x @ np.diag(wanted) @ x.T) + free).astype(np.float32)
    mu = np.linalg.eigvals(w1.astype(float) @ w2.astype(float))
    scale = np.float32(-1 / mu[np.abs(mu + 1).argmin()].real)
    for off in (-1, 0, 1):
        s = np.float32(scale + off * np.spacing(scale))
        true = int((1 + float(s) * mu.real < 0).sum())
        first, second = torch.tensor(w1), torch.tensor(float(s) * w2)
        reduction = reduce_jacobian(lambda z, a=first, b=second: z + b @ torch.relu(a @ z + 5), torch.zeros(n))
        a = stiffcore.eigen.sparse.as_sparse(reduction.columns(0, reduction.k).numpy().astype(float))
        found = extremes(a)
        known, rounding = (found.values, found.vectors.right), distance_of(reduction)
        ends = ends_of(a, 1, known, disc=False, memory_bytes=None, note="", rounding=rounding)
        assert ends.left_of_zero.count in (None, true)
        assert rounding > 1e-8
        assert all(count.tolerated > rounding for count in (*ends.left_lines, *ends.right_lines))


def test_ends_survive_json():
    a = np.diag(np.linspace(0.5, 2.5, 120))
    ends = reduction_and_ends(a)[3]
    ends = dataclasses.replace(ends, radius=math.inf)
    assert Ends.from_json(json.loads(json.dumps(ends.to_json(), allow_nan=False))) == ends


def test_an_operator_has_the_norm_of_its_matrix_nearly():
    a = np.random.default_rng(1).standard_normal((300, 300))
    sparse = stiffcore.eigen.sparse.as_sparse(a)
    exact, estimate = sparse_moments(sparse), sparse_moments(torch_operator(a))
    assert estimate.frobenius == pytest.approx(exact.frobenius, rel=0.2)
    assert exact.trace == pytest.approx(np.trace(a))
    assert exact.trace_square == pytest.approx(np.trace(a @ a))


def torch_operator(a):
    reduction = reduce_jacobian(
        lambda x: x @ torch.as_tensor(a).T, torch.zeros(len(a), dtype=torch.float64), reduce=False
    )
    assert np.allclose(reduction.transposed_product(np.ones(len(a))), a.T @ np.ones(len(a)))
    return LinearOperator(a.shape, reduction.product, rmatvec=reduction.transposed_product, dtype=np.dtype(float))


def test_the_table_says_what_a_count_rests_on(small):
    run, _ = execute(small / "run", OPTIONS | {"blocks": "1", "solver": "extremes"})
    console = Console(record=True, width=200)
    console.print(metrics_table(run.metrics()))
    printed = console.export_text()
    assert re.search(r"yes \(\d", printed)
    assert re.search(r"\(\d\) ends; proved", printed)


def test_a_switch_to_another_solver_that_is_interrupted_loses_no_result(small):
    options = OPTIONS | {"blocks": "1,4", "functions": "block"}
    execute(small / "run", options | {"solver": "extremes"})
    ended = []

    def stop(event):
        if event.kind == "ended":
            ended.append(event.unit)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(small / "run", {"solver": "host-dense"}, stop)
    rows = stiffcore.open_run(str(small / "run")).metrics()
    assert rows["state"].tolist() == ["done", "done"]
    assert sorted(rows["solver"]) == ["extremes", "host-dense"]
    _, outcome = execute(small / "run", {})
    assert outcome.failed == {}
    assert set(stiffcore.open_run(str(small / "run")).metrics()["solver"]) == {"host-dense"}


def test_matrices_that_were_kept_and_dropped_are_not_taken_to_be_there(small):
    options = OPTIONS | {"blocks": "1", "functions": "block"}
    execute(small / "run", options | {"solver": "matrix-only"})
    execute(small / "run", {"solver": "extremes"})
    run, outcome = execute(small / "run", {"solver": "host-dense"})
    assert outcome.failed == {}
    [record] = run.records().values()
    assert set(record.seconds) == {"built", "reduced", "solved", "done"}


def test_what_was_begun_is_planned_anew_where_there_is_less_room():
    one = unit(7000, items=1_000_000).model_copy(update={"products": 500, "nonzeros": 1_700_000, "fill": 6_000_000})
    study = Study(memory=3000 * MIB, solver="extremes")
    [first] = make_plan([one], study, machine()).units
    needed = first.projected_bytes + machine().reserved_bytes
    study = Study(memory=needed - MIB, solver="extremes")
    [less] = make_plan([one], study, machine(), recorded={one.key: first}).units
    assert less.works
    assert less.factor_bytes < first.factor_bytes
    assert (less.chunk, less.shard) == (first.chunk, first.shard)
    # a dense solve that another solver had begun is not what `extremes` asks for
    [dense] = make_plan([one], Study(memory=3000 * MIB), machine()).units
    study = Study(memory=3000 * MIB, solver="extremes")
    [again] = make_plan([one], study, machine(), recorded={one.key: dense}).units
    assert again.solver is Solver.EXTREMES


def test_single_precision_is_not_solved_by_products_alone():
    one = unit(7000, items=1000).model_copy(update={"products": 500, "nonzeros": 1_700_000, "fill": 6_000_000})
    found = {precision: planned([one], 445 * MIB, solver="extremes", dtype=precision) for precision in Precision}
    assert found["float64"].units[0].matrix_free
    assert found["float32"].units[0].refused


def test_a_unit_of_a_larger_order_has_its_ends_proved(small, monkeypatch):
    for name in (
        *("solvers.projection.FULL_ORDER", "solvers.host_dense.FULL_ORDER", "unit.FULL_ORDER"),
        *("eigen.certificate.FULL_ORDER", "unit.MOST_ORDER"),
    ):
        monkeypatch.setattr(f"stiffcore.{name}", 50)
    run, outcome = execute(small / "run", OPTIONS | {"blocks": "1", "solver": "host-dense", "functions": "block"})
    assert outcome.failed == {}
    found = run.spectrum(block=1)
    assert found.k > 50
    assert found.certificate.unproved == ()
    assert found.certificate.s_active_error < 1e-6 * abs(found.metrics["S_active"])
    assert found.negative_between[0] == found.negative_between[1]


def test_an_eigenvalue_without_a_disc_has_no_error_that_is_called_a_bound():
    """Condition times residual is of first order, however well conditioned: nothing is promised by it."""
    a = np.diag(np.linspace(0.5, 2.5, 420)) + np.diag(np.full(419, 0.001), 1)
    assert len(a) > FULL_ORDER  # up to that order, all eigenvalues are located
    reduction, found, moments, ends = reduction_and_ends(a)
    bare = certified(reduction, found, moments, dataclasses.replace(ends, discs=()))
    assert all(c.error == np.inf and c.estimate < 1e-9 for c in bare.certified)
    assert bare.unproved == ("largest", "smallest")
    assert bare.s_error > 0.01
