"""Claims about singular values: those of a dense SVD, exact ones and zeros counted, lost digits said."""

import math
from collections import OrderedDict
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ortho_group
from torch import nn

import stiffcore
from stiffcore.eigen import singular
from stiffcore.errors import InputError
from stiffcore.jacobian.factors import open_factors
from stiffcore.metrics import singular_metrics
from stiffcore.networks.blocks import capture
from stiffcore.networks.images import load_images, network_input
from stiffcore.networks.zoo import load_network
from stiffcore.plan import make_plan
from stiffcore.record import Stage
from stiffcore.solvers.projection import Machine
from stiffcore.study import BlockFunction, Kind, Study
from stiffcore.survey import _factors_facts
from stiffcore.unit import carry_out, open_operator
from tests.cases import (
    Basic,
    Bottleneck,
    InvertedResidual,
    PreActivation,
    Projected,
    SqueezeExcite,
    randomised,
    seeded,
    transformer,
)
from tests.reference import dense_jacobian
from tests.test_divide import Cut, InMemory, Memory

CASES = {
    "basic": (lambda: Basic(6), (1, 6, 9, 9)),
    "bottleneck": (lambda: Bottleneck(16), (1, 16, 9, 9)),
    "pre_activation": (PreActivation, (1, 4, 9, 9)),
    "rectangular": (Projected, (1, 2, 9, 9)),
    "depthwise": (lambda: InvertedResidual(4, 8), (1, 4, 5, 5)),
    "not_local": (SqueezeExcite, (1, 4, 5, 5)),
    "transformer": (lambda: transformer(True, "relu"), (1, 4, 8)),
    "smooth": (lambda: Basic(4, act=nn.GELU), (1, 4, 6, 6)),
    "dead": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Threshold(1e9, 0.0)), (1, 2, 5, 5)),
    "one": (lambda: nn.Linear(1, 1), (1,)),
    "wide": (lambda: nn.Linear(7, 2), (7,)),
}
BY_WAIST = {("basic", "branch"), ("bottleneck", "block"), ("bottleneck", "branch"), ("pre_activation", "branch")}


def whole(found):
    return np.sort(np.concatenate([found.values, np.ones(found.ones), np.zeros(found.zeros)]))


def ways(factors):
    matrices = factors.matrices(16)
    if factors.reduction is not None:
        return [singular.by_waist(factors, *matrices)], matrices
    return [singular.by_svd(factors, *matrices), singular.by_gram(factors, *matrices)], matrices


@pytest.mark.parametrize("function", ["block", "branch"])
@pytest.mark.parametrize("name", CASES)
def test_singular_values_are_those_of_a_dense_svd(name, function):
    build, shape = CASES[name]
    f, x = randomised(build()), seeded(shape, 1)
    if function == "branch" and name in ("dead", "one", "wide", "transformer"):
        return
    factors = open_factors(f, x, BlockFunction(function))
    true = np.sort(np.linalg.svd(dense_jacobian(factors.jacobian.f, x), compute_uv=False))
    found, matrices = ways(factors)
    difference = factors.difference(matrices)
    for way in found:
        values = whole(way)
        assert len(values) == len(true) == factors.count
        order = np.argsort(np.concatenate([way.values, np.ones(way.ones), np.zeros(way.zeros)]), kind="stable")
        allowed = np.concatenate([way.errors, np.zeros(way.ones + way.zeros)])[order] + 1e-13
        assert (np.abs(values - true) <= allowed).all()
        certificate = singular.certify(factors, way, difference)
        assert certificate.passed, certificate.failures
    if name in ("basic", "bottleneck", "pre_activation"):
        assert ((name, function) in BY_WAIST) == (factors.reduction is not None)


def test_ones_and_zeros_are_counted_exactly():
    factors = open_factors(randomised(Bottleneck(16)), seeded((1, 16, 9, 9), 1))
    (found,), _ = ways(factors)
    assert found.ones == len(factors.rows) - factors.order > 0
    assert found.zeros == factors.count - len(factors.rows) > 0


def test_a_waist_without_full_rank_loses_no_value():
    f = randomised(Bottleneck(16)).eval()
    with torch.no_grad():  # two channels of the waist do the same
        for layer in f.body[:5]:
            for values in (layer.state_dict().get(name) for name in ("weight", "bias", "running_mean", "running_var")):
                if values is not None:
                    values[1] = values[0]
        f.body[6].weight[:, 1] = f.body[6].weight[:, 0]
    x = seeded((1, 16, 9, 9), 1)
    factors = open_factors(f, x)
    assert factors.reduction is not None
    (found,), matrices = ways(factors)
    true = np.sort(np.linalg.svd(dense_jacobian(f, x), compute_uv=False))
    assert np.abs(whole(found) - true).max() <= 1e-7  # near 1, where squares of W's null directions round
    assert singular.certify(factors, found, factors.difference(matrices)).passed


def test_small_values_from_squares_say_how_many_digits_are_left():
    rng = np.random.default_rng(0)
    true = np.array([1e-9, 1e-6, 1e-3, 1.0])
    a = ortho_group.rvs(4, random_state=rng) * true @ ortho_group.rvs(4, random_state=rng)
    layer = nn.Linear(4, 4, bias=False).double()
    layer.weight = nn.Parameter(torch.from_numpy(a), requires_grad=False)
    factors = open_factors(layer, seeded((4,), 1))
    (svd, gram), _ = ways(factors)
    assert np.abs(svd.values - true).max() <= svd.errors.max() < 1e-14
    assert (np.abs(gram.values - true) <= gram.errors).all()
    assert gram.errors[0] > true[0]
    assert gram.errors[1] < 0.1 * true[1]


@given(st.floats(0, 4), st.floats(0, 2), st.floats(-1, 1))
def test_the_error_of_a_root_is_a_bound_where_its_square_is_as_small_as_its_error(square, off, moved):
    (bound,) = singular.root_errors(np.array([square]), np.array([off]))
    other = max(square + moved * off, 0.0)
    assert abs(math.sqrt(other) - math.sqrt(square)) <= bound * (1 + 1e-12)


def test_what_differs_from_the_function_is_not_certified(monkeypatch):
    f, x = randomised(Bottleneck(16)), seeded((1, 16, 9, 9), 1)
    factors = open_factors(f, x)
    u, v = factors.matrices(8)
    wrong = u.copy()
    wrong.data[5] *= 1 + 1e-6
    assert factors.difference([u, v]) <= 1e-13 < 1e-9 < factors.difference([wrong, v])
    found = singular.by_waist(factors, u, v)
    assert not singular.certify(factors, found, 1e-6).passed
    scaled = singular.SingularValues(found.values * 1.001, found.ones, found.zeros, found.errors, 0.0, 0.0)
    assert "Lanczos" in " ".join(singular.certify(factors, scaled, 0.0).failures)


def test_metrics_of_singular_values():
    found = singular_metrics(np.array([0.5, 4.0]), 1, 2)
    assert found["condition"] == 8
    assert found["nuclear_norm"] == 5.5
    assert found["frobenius_norm"] == pytest.approx(np.sqrt(0.25 + 16 + 1))
    shares = np.array([0.5, 4, 1]) / 5.5
    assert found["effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert (found["zero"], found["positive"]) == (0.4, 0.6)
    assert np.isnan(found["S"])
    nothing = singular_metrics(np.zeros(0), 0, 3)
    assert (nothing["effective_rank"], nothing["frobenius_norm"], nothing["zero"]) == (0, 0, 1)
    assert np.isnan(nothing["condition"])


@pytest.mark.parametrize("name", ["rectangular", "depthwise", "not_local"])
def test_a_divided_gram_matrix_has_the_values_of_a_dense_svd(name):
    build, shape = CASES[name]
    f, x = randomised(build()), seeded(shape, 1)
    factors = open_factors(f, x)
    matrices = factors.matrices(16)
    order = factors.order
    found, division = singular.by_division(factors, matrices, Memory(order // 2), order // 2)
    assert [s for s in division.splits if not s.failure]
    true = np.sort(np.linalg.svd(dense_jacobian(factors.jacobian.f, x), compute_uv=False))
    allowed = np.concatenate([np.zeros(found.zeros), found.errors]) + 1e-13
    assert (np.abs(whole(found) - true) <= allowed).all()
    certificate = singular.certify(factors, found, factors.difference(matrices))
    assert certificate.passed, certificate.failures


@pytest.mark.parametrize(("name", "function"), sorted(BY_WAIST))
@pytest.mark.parametrize("at_once", [1, 3])
def test_a_divided_waist_has_the_values_of_a_dense_svd(name, function, at_once):
    build, shape = CASES[name]
    f, x = randomised(build()), seeded(shape, 1)
    factors = open_factors(f, x, BlockFunction(function))
    matrices = factors.matrices(16)
    assert factors.reduction is not None
    space = Memory(max(2, factors.order // 5))
    found, division = singular.by_division(factors, matrices, space, factors.order // 2, at_once=at_once)
    assert [s for s in division.splits if not s.failure]
    true = np.sort(np.linalg.svd(dense_jacobian(factors.jacobian.f, x), compute_uv=False))
    assert found.ones == (len(factors.rows) - factors.order if factors.reduction.shift else 0)
    order = np.argsort(np.concatenate([found.values, np.ones(found.ones), np.zeros(found.zeros)]), kind="stable")
    allowed = np.concatenate([found.errors, np.zeros(found.ones + found.zeros)])[order] + 1e-13
    assert (np.abs(whole(found) - true) <= allowed).all()
    far = np.abs(whole(found) - 1) > 0.1
    assert np.abs(whole(found) - true)[far & (true > 0.1)].max() <= 1e-10
    certificate = singular.certify(factors, found, factors.difference(matrices))
    assert certificate.passed, certificate.failures


@pytest.mark.parametrize(("name", "function"), sorted(BY_WAIST))
def test_errors_in_single_precision_are_honest_and_not_far_too_large(name, function):
    build, shape = CASES[name]
    f, x = randomised(build()).float(), seeded(shape, 1).float()
    factors = open_factors(f, x, BlockFunction(function))
    matrices = factors.matrices(16)
    assert factors.reduction is not None
    assert factors.jacobian.x.dtype is torch.float32
    wide = getattr(factors.jacobian.f, "f", factors.jacobian.f).double()
    true = np.sort(np.linalg.svd(dense_jacobian(wide, x.double()), compute_uv=False))
    order = factors.order
    divided, _ = singular.by_division(factors, matrices, Memory(order // 5), order // 2)
    for found in (singular.by_waist(factors, *matrices), divided):
        values = np.concatenate([found.values, np.ones(found.ones), np.zeros(found.zeros)])
        at = np.argsort(values, kind="stable")
        errors = np.concatenate([found.errors, np.full(found.ones + found.zeros, 1e-6)])[at]
        assert (np.abs(values[at] - true) <= errors + 1e-6).all()
        assert errors[true > 1.1].max() <= 1e-3


def test_division_of_a_waist_that_is_zero():
    factors = open_factors(randomised(Bottleneck(16)), seeded((1, 16, 9, 9), 1), BlockFunction.BRANCH)
    assert factors.reduction is not None
    u, v = (m * 0.0 for m in factors.matrices(16))
    found, _ = singular.by_division(factors, [u, v], Memory(16), 10)
    assert not found.values.any()
    assert not found.errors.any()


@pytest.mark.parametrize(("due", "function"), [(5, "block"), (40, "block"), (150, "block"), (60, "branch")])
def test_division_of_a_waist_cut_off_goes_on_to_the_same_bytes(due, function):
    build, shape = CASES["bottleneck"]
    factors = open_factors(randomised(build()), seeded(shape, 1), BlockFunction(function))
    matrices = factors.matrices(16)

    def solved(space):
        return singular.by_division(factors, matrices, space, factors.order // 2, at_once=2)[0]

    InMemory.due = 0
    expected, space = solved(Memory(12)), Memory(12)
    InMemory.due = due
    with pytest.raises(Cut):
        solved(space)
    InMemory.due = 0
    found = solved(space)
    assert found.values.tobytes() == expected.values.tobytes()
    assert found.errors.tobytes() == expected.errors.tobytes()
    assert set(space.matrices) == {"whole"}


@pytest.mark.slow
@pytest.mark.parametrize("block", ["layer4.0", "layer4.1"])
def test_a_trained_block_has_the_singular_values_of_its_dense_jacobian(block):
    opened = load_network("resnet18", None, torch.float64)
    images = load_images("samples", index=[3])
    call = capture(opened.module, network_input(images.x[0], opened.normalize, torch.float64), [block])[0][block]
    factors = open_factors(call.function, call.x)
    (found, _), matrices = ways(factors)
    assert factors.difference(matrices) <= 1e-12
    squares = (dense_jacobian(call.function, call.x, 128) ** 2).sum()
    assert (found.values**2).sum() == pytest.approx(squares, rel=1e-12)
    assert singular.certify(factors, found, 0.0).passed


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    network = nn.Sequential(OrderedDict(first=Basic(3), second=Projected(3))).double().eval()
    images = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    where = tmp_path_factory.mktemp("singular") / "run"
    options = {"blocks": "first,second", "kinds": "matrix,singular"}
    return network, images, stiffcore.analyze(network, images, [0, 1, 0], run=where, **options)


def test_a_run_holds_singular_values_of_square_and_rectangular_blocks(run):
    network, images, found = run
    rows = found.metrics()
    values = rows[rows["kind"] == "singular"]
    assert values["certified"].all()
    assert set(values["state"]) == {"done"}
    spectrum = found.spectrum(0, "second", kind="singular")
    true = np.sort(np.linalg.svd(dense_jacobian(network[1], network[0](images[:1])), compute_uv=False))
    assert np.abs(spectrum.values - true).max() <= 1e-12
    assert spectrum.metrics["condition"] == pytest.approx(true[true > 1e-12].max() / true[true > 1e-12].min(), rel=1e-9)
    assert set(values["solver"]) <= {"svd", "symmetric"}


@pytest.mark.parametrize("name", ["rectangular", "bottleneck"])
def test_a_run_divides_a_matrix_that_no_memory_holds(name, tmp_path):
    build, shape = CASES[name]
    network = nn.Sequential(OrderedDict(second=build().double().eval()))
    images = seeded(shape, 1)
    options = {"blocks": "second", "kinds": "singular", "solver": "divide"}
    found = stiffcore.analyze(network, images, [0], run=tmp_path / "run", **options)
    store = found.store
    (key,) = found.records()
    assert found.records()[key].plan.solver == "divide"
    order = found.records()[key].unit.k
    store.update(
        key, plan=replace(found.records()[key].plan, panel=16, at_once=2, leaf=order // 3), stage=Stage.PLANNED
    )
    carry_out(store.url, key, threads=1, emit=print, opener=partial(open_operator, module=network))
    spectrum = found.spectrum(0, "second", kind="singular")
    true = np.sort(np.linalg.svd(dense_jacobian(network[0], images), compute_uv=False))
    assert spectrum.certificate.passed
    assert found.records()[key].divided.splits
    assert found.records()[key].unit.route == ("factors" if name == "bottleneck" else "whole")
    assert np.abs(spectrum.values - true).max() <= 1e-7
    large = true > 1e-3
    assert np.abs(spectrum.values - true)[large].max() <= 1e-10


def test_tables_and_the_report_show_condition_and_rank(run, tmp_path):
    pytest.importorskip("matplotlib")
    from stiffcore.report import tables
    from stiffcore.report.page import write_report
    from stiffcore.report.statistics import correlations

    rows = run[2].metrics()
    part = rows[rows["kind"] == "singular"]
    assert "condition" in [str(c.header) for c in tables.metrics_table(part, 200, "singular").columns]
    assert "effective rank" in [str(c.header) for c in tables.means_table(part).columns]
    assert set(correlations(part)["metric"]) == {"condition", "effective_rank"}
    write_report(run[2], tmp_path / "page.html", tmp_path / "figures")
    page = (tmp_path / "page.html").read_text()
    assert "By block: singular" in page
    assert "Condition number and effective rank" in page


def test_the_plan_takes_squares_where_a_dense_copy_does_not_fit():
    factors = open_factors(randomised(Basic(6)), seeded((1, 6, 9, 9), 1))
    assert factors.reduction is None
    common = {"key": "u", "image": 0, "label": 0, "number": 1, "block": "b", "fingerprint": ""}
    facts = _factors_facts(factors, common | {"function": BlockFunction.BLOCK, "kind": Kind.SINGULAR})
    facts = facts.model_copy(update={"k": 4000, "width": 16000, "nonzeros": 100_000})
    for memory, solver in ((4 << 30, "svd"), (450 << 20, "symmetric"), (300 << 20, "divide"), (32 << 20, "none")):
        plan = make_plan([facts], Study.ask({"network": "resnet18", "memory": memory}), Machine(1, 0, 0, None, 1e10))
        assert str(plan.units[0].solver) == solver
        assert plan.units[0].refused == (solver == "none")
    waist = facts.model_copy(update={"route": "factors", "width": 0})
    for memory, solver in ((4 << 30, "symmetric"), (450 << 20, "divide"), (32 << 20, "none")):
        plan = make_plan([waist], Study.ask({"network": "resnet18", "memory": memory}), Machine(1, 0, 0, None, 1e10))
        assert str(plan.units[0].solver) == solver
    asked = Study.ask({"network": "resnet18", "memory": 4 << 30, "solver": "symmetric", "kinds": "singular"})
    assert str(make_plan([facts], asked, Machine(1, 0, 0, None, 1e10)).units[0].solver) == "symmetric"


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e4, 1e8])
def test_a_waist_whose_sides_have_different_sizes_loses_no_value(scale):
    first, second = randomised(nn.Conv2d(8, 1, 1)), randomised(nn.Conv2d(1, 8, 3, padding=1))

    def f(x):
        return F.relu(F.conv2d(F.relu(first(x) * scale), second.weight / scale, padding=1) + x)

    x = seeded((1, 8, 5, 5), 3)
    factors = open_factors(f, x)
    assert factors.reduction is not None
    (found,), matrices = ways(factors)
    true = np.sort(np.linalg.svd(dense_jacobian(f, x), compute_uv=False))
    assert np.abs(whole(found) - true).max() <= 1e-13
    assert found.ones == len(factors.rows) - factors.order
    certificate = singular.certify(factors, found, factors.difference(matrices))
    assert certificate.passed, certificate.failures
    assert certificate.s_error < 1e-9


@pytest.mark.parametrize("scale", [1e6, 1e10])
def test_what_a_large_branch_leaves_uncertain_is_said(scale):
    first, second = randomised(nn.Conv2d(8, 1, 1)), randomised(nn.Conv2d(1, 8, 3, padding=1))

    def f(x):
        return F.relu(second(F.relu(first(x))) * scale + x)

    x = seeded((1, 8, 5, 5), 3)
    factors = open_factors(f, x)
    (found,), _ = ways(factors)
    true = np.sort(np.linalg.svd(dense_jacobian(f, x), compute_uv=False))
    true = true[true > 1e-12 * true.max()]
    condition = singular_metrics(found.values, found.ones, found.zeros)["condition"]
    certificate = singular.certify(factors, found, 0.0)
    assert abs(condition - true.max() / true.min()) <= certificate.s_error


@pytest.mark.parametrize("scale", [1e-100, 1e-9, 1e9])
def test_small_and_large_jacobians_are_not_refused(scale):
    layers = randomised(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 2, 3, padding=1)))
    factors = open_factors(lambda x: layers(x) * scale, seeded((1, 2, 5, 5), 1))
    found, matrices = ways(factors)
    difference = factors.difference(matrices)
    assert difference <= 1e-12
    assert singular.certify(factors, found[0], difference).passed


def test_a_zero_jacobian_has_zeros_only():
    factors = open_factors(lambda x: x - x, seeded((1, 2, 3, 3), 1))
    found, matrices = ways(factors)
    for way in found:
        assert not whole(way).any()
        assert not np.isnan(way.errors).any()
        assert singular.certify(factors, way, factors.difference(matrices)).passed


def test_solvers_of_singular_values_are_refused_for_other_kinds():
    with pytest.raises(InputError, match="--kind singular alone"):
        Study.ask({"network": "resnet18", "solver": "svd", "kinds": "matrix,singular"})


@pytest.mark.parametrize("power", [-500, -300, 300, 500])
def test_singular_values_of_any_size_are_found(power):
    """Squares of numbers below 1e-162 are zero: J is scaled by a power of two, which rounds nothing."""
    layers = randomised(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1)))
    found = []
    for scale in (1.0, 2.0**power):
        factors = open_factors(lambda x, scale=scale: layers(x) * scale, seeded((1, 2, 5, 5), 1))
        of, matrices = ways(factors)
        found.append(of)
        assert all(singular.certify(factors, way, factors.difference(matrices)).passed for way in of)
    for plain, scaled in zip(*found, strict=True):
        assert np.allclose(whole(scaled) * 2.0**-power, whole(plain), rtol=1e-14, atol=1e-15)
