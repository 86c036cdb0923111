"""Claims about tensor slices: the eigenvalues, zeros counted, that torch finds in the Jacobian tensor."""

from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import stiffcore
from stiffcore.eigen import squares as small_squares
from stiffcore.eigen.windows import WindowSpectrum
from stiffcore.errors import InputError
from stiffcore.jacobian.accumulation import Steps
from stiffcore.jacobian.reduction import NoSpectrumError
from stiffcore.jacobian.slices import RandomCheck, Squares, open_slices
from stiffcore.metrics import HISTOGRAM_EDGES, Tally, spectrum_metrics
from stiffcore.study import BlockFunction
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

MAP = (1, 4, 9, 9)
CASES = {
    "basic": (lambda: Basic(4), MAP),
    "bottleneck": (lambda: Bottleneck(4), MAP),
    "pre_activation": (PreActivation, MAP),
    "rectangular": (Projected, (1, 2, 9, 9)),
    "one_pixel": (lambda: Basic(4), (1, 4, 1, 1)),
    "two_pixels": (lambda: Basic(4), (1, 4, 2, 2)),
    "far_windows": (lambda: nn.Conv2d(4, 3, 3, padding=4, dilation=4), MAP),
    "no_diagonal": (lambda: nn.Sequential(nn.ConstantPad2d((6, -6, 0, 0), 0.0), nn.ReLU()), MAP),
    "depthwise": (lambda: InvertedResidual(4, 8), MAP),
    "not_local": (SqueezeExcite, MAP),
    "square_transformer": (lambda: transformer(True, "relu"), (1, 8, 8)),
}
BY_ROWS = {"no_diagonal", "depthwise", "not_local", "square_transformer"}


def direct(f, x):
    """Every eigenvalue, as the issue defines them."""
    return torch.linalg.eigvals(torch.func.jacrev(f)(x).detach()).reshape(-1).numpy()


def found_in(slices, keep=True, chunk=5):
    found = WindowSpectrum(keep)
    for squares in slices.squares(chunk):
        found.add(squares)
    return found


def matched(a, b):
    """The largest distance between two sets of values in order of their real, then imaginary parts."""

    def order(z):
        return z[np.lexsort((np.round(z.imag, 10), np.round(z.real, 10)))]

    return np.abs(order(a) - order(b)).max(initial=0)


@pytest.mark.parametrize("name", CASES)
def test_every_eigenvalue_is_that_of_the_jacobian_tensor(name):
    build, shape = CASES[name]
    f, x = randomised(build()), seeded(shape, 1)
    slices = open_slices(f, x)
    assert (slices.accumulation is None) == (name in BY_ROWS)
    expected = direct(f, x) if name != "square_transformer" else _direct_plainly(f, x)
    found = found_in(slices)
    values = found.values()
    assert slices.count == len(expected)
    assert found.tally.count == len(values) <= slices.bound <= slices.count
    everything = np.concatenate([values, np.zeros(slices.count - len(values))])
    assert matched(everything, expected) <= 1e-9
    certificate = found.certificate(slices, 0.0)
    assert certificate.passed, certificate.failures
    if len(values):
        largest, smallest = values.real.max(), values.real.min()
        assert {c.value.real for c in certificate.certified} >= {largest, smallest}
        assert abs(expected.real.max() - max(largest, 0.0)) <= max(certificate.error, 1e-14)


def _direct_plainly(f, x):
    from tests.reference import dense_jacobian

    return torch.linalg.eigvals(torch.from_numpy(dense_jacobian(f, x)).reshape(-1, *x.shape[-2:])).reshape(-1).numpy()


@pytest.mark.parametrize("name", ["basic", "bottleneck", "rectangular"])
def test_squares_by_windows_are_those_by_rows(name, monkeypatch):
    build, shape = CASES[name]
    f, x = randomised(build()), seeded(shape, 1)
    by_windows = open_slices(f, x)
    monkeypatch.setattr(Steps, "of", lambda module, x: None)
    by_rows = open_slices(f, x)
    a, b = found_in(by_windows), found_in(by_rows)
    assert a.tally.count == b.tally.count
    assert matched(a.values(), b.values()) <= 1e-13


def test_a_branch_is_sliced_without_its_skip():
    f, x = randomised(Basic(4, norm=nn.Identity)), seeded(MAP, 1)
    slices = open_slices(f, x, BlockFunction.BRANCH)
    branch = nn.Sequential(f.conv1, nn.ReLU(), f.conv2) if hasattr(f, "conv1") else None
    values = found_in(slices).values()
    assert slices.jacobian.name.startswith("the branch")
    if branch is not None:
        assert matched(np.concatenate([values, np.zeros(slices.count - len(values))]), direct(branch, x)) <= 1e-10


@pytest.mark.parametrize("shape", [(1, 4, 9, 7), (5,)])
def test_slices_that_are_no_squares_have_no_eigenvalues(shape):
    f = randomised(Basic(4)) if len(shape) == 4 else nn.Tanh()
    with pytest.raises(NoSpectrumError, match="no square matrices"):
        open_slices(f, seeded(shape, 1))


def checked(slices, change=lambda squares: squares):
    check = RandomCheck(slices)
    for squares in slices.squares(1):
        if (changed := change(squares)) is not None:
            check.add(changed)
    return check.difference()


@pytest.mark.parametrize("name", sorted(CASES.keys() - BY_ROWS))
def test_all_squares_are_compared_with_products(name):
    build, shape = CASES[name]
    assert checked(open_slices(randomised(build()), seeded(shape, 1))) <= 1e-13


def test_no_wrong_square_passes():
    slices = open_slices(randomised(Basic(4)), seeded(MAP, 1))
    positions = [int(squares.units[0]) % 81 for squares in slices.squares(1) if squares.values.any()]
    for position in positions[::5]:

        def scaled(squares, position=position):
            wrong = squares.values * (1 + 1e-6 * (squares.units[0] % 81 == position))
            return Squares(squares.units, squares.first, wrong)

        assert checked(slices, scaled) > 1e-10
        assert checked(slices, lambda s, position=position: None if s.units[0] % 81 == position else s) > 1e-10
    assert not found_in(slices).certificate(slices, 1e-6).passed


def test_where_something_is_hidden_from_autograd_at_one_position_the_graph_is_not_used():
    layer, mask = randomised(nn.Conv2d(3, 3, 3, padding=1)), torch.zeros(5, 5, dtype=torch.float64)
    mask[3, 3] = 1

    def f(x):
        return layer(x) * (1 - mask) + (layer(x) * mask).detach()

    slices = open_slices(f, seeded((1, 3, 5, 5), 1))
    assert slices.accumulation is None
    shown = open_slices(lambda x: layer(x) * (1 - mask), seeded((1, 3, 5, 5), 1))
    assert shown.accumulation is not None
    first, second = (np.sort_complex(found_in(s).values()) for s in (slices, shown))
    assert np.allclose(first, second, atol=1e-12)


def test_signs_of_a_nilpotent_square_are_unsure_in_float32_too():
    q = torch.linalg.qr(seeded((3, 3), 2))[0]
    kernel = q @ torch.tensor([[0.0, 1, 2], [0, 0, 3], [0, 0, 0]], dtype=torch.float64) @ q.T
    layer = nn.Conv2d(1, 1, 3, padding=1, bias=False).double()
    layer.weight = nn.Parameter(kernel.reshape(1, 1, 3, 3), requires_grad=False)
    for dtype in (torch.float64, torch.float32):
        found = found_in(open_slices(layer.to(dtype), seeded((1, 1, 9, 9), 1, dtype)))
        assert found.near_axis >= 7 * 3  # the squares that the border does not cut


def test_an_end_that_is_the_rounding_of_zero_is_certified_as_unsure():
    layer = nn.Conv2d(1, 1, 3, padding=1, bias=False).double()
    layer.weight = nn.Parameter(torch.full((1, 1, 3, 3), 1 / 9, dtype=torch.float64), requires_grad=False)
    slices = open_slices(layer, seeded((1, 1, 9, 9), 1))
    certificate = found_in(slices).certificate(slices, checked(slices))
    assert certificate.passed, certificate.failures
    assert certificate.near_axis > 0
    assert certificate.s_active_error == np.inf


def test_a_wrong_eigenvalue_is_not_certified(monkeypatch):
    slices = open_slices(randomised(Basic(4)), seeded(MAP, 1))
    true = small_squares.take

    def wrong(*args):
        part = true(*args)
        few = {end: [(z * (1 + 1e-6), at) for z, at in found] for end, found in part.few.items()}
        return replace(part, few=few, sums=part.sums * [1 + 1e-6, 1, 1, 1])

    monkeypatch.setattr(small_squares, "take", wrong)
    failures = found_in(slices).certificate(slices, 0.0).failures
    assert any("not an eigenvalue" in line for line in failures)
    assert any("traces" in line for line in failures)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), w=st.integers(1, 5), scale=st.sampled_from([1e-200, 1e-3, 1.0, 1e100]))
def test_squares_in_parts_have_the_metrics_of_all(seed, w, scale):
    rng = np.random.default_rng(seed)
    a = scale * rng.standard_normal((4, 3, w, w)) * (rng.random((4, 3, w, w)) < 0.7)
    found = WindowSpectrum(True)
    for part in (a[:1], a[1:]):
        found.add(Squares(np.arange(len(part)), 0, part))
    values = np.linalg.eigvals(a).reshape(-1)
    zeros = 12 * w - found.tally.count
    assert zeros >= np.count_nonzero(values == 0) - 0
    expected = spectrum_metrics(values[values != 0], 0, int(np.count_nonzero(values == 0)), branch=True)
    got = found.tally.metrics(0, zeros, branch=True)
    for name in ("abscissa", "radius", "max_im", "euler_stable"):
        assert got[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-9 * scale)
    assert found.tally.histogram.sum() == found.tally.count


def test_eigenvalues_within_their_rounding_of_the_axis_are_counted():
    nearly = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1e-18, 0.0, 0.0]])  # a third root of 1e-18: 1e-6
    turning = np.array([[1e-17, 1.0], [-1.0, 1e-17]])
    plain = np.array([[1e-3, 1.0], [-1.0, 1e-3]])
    for square, near in ((nearly, 3), (turning, 2), (plain, 0)):
        found = WindowSpectrum(True)
        found.add(Squares(np.arange(1), 0, square[None, None]))
        assert found.near_axis == near


def test_a_histogram_counts_every_real_part_once():
    tally = Tally()
    values = np.array([-1e9, -3.0, -1e-20, 0.0, 1e-20, 2.5, 1e12])
    tally.add(values.astype(complex))
    assert tally.histogram.sum() == len(values)
    middle = np.searchsorted(HISTOGRAM_EDGES, 0.0) - 1
    assert tally.histogram[middle] == 3
    assert tally.histogram[0] == tally.histogram[-1] == 1


# ------------------------------------------------------------------------------------------------------- in a run


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A run of both kinds of spectra, of square and rectangular blocks."""
    torch.manual_seed(0)
    network = nn.Sequential(OrderedDict(first=Basic(3), wide=Wide())).double().eval()
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    where = tmp_path_factory.mktemp("slices") / "run"
    options = {"blocks": "first,wide", "kinds": "matrix,tensor-slices", "functions": "block,branch"}
    return network, images, options, stiffcore.analyze(network, images, [0, 1], run=where, **options)


class Wide(nn.Module):
    """A block whose result has more channels than it keeps: rectangular inside, square again at its end."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.s = nn.Conv2d(3, 5, 3, 1, 1), nn.Conv2d(5, 3, 3, 1, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return torch.relu(self.b(torch.relu(self.a(x))) + self.s(x))


def test_a_run_holds_both_kinds(both):
    network, images, _, run = both
    rows = run.metrics()
    assert set(rows["kind"]) == {"matrix", "tensor-slices"}
    assert rows["certified"].all()
    sliced = rows[rows["kind"] == "tensor-slices"]
    assert (sliced["eigenvalues"] == sliced["elements"] // 8).all()
    spectrum = run.spectrum(1, "first", "block", "tensor-slices")
    expected = direct(network[0], images[1:2])
    assert spectrum.n == len(expected)
    assert matched(spectrum.values, expected) <= 1e-10
    assert spectrum.metrics["negative"] == pytest.approx((expected.real < -1e-14).mean())
    assert len(run.to_xarray()["kind"]) == 2


def test_metrics_alone_are_those_of_the_spectra(both, tmp_path):
    network, images, options, run = both
    lean = stiffcore.analyze(network, images, [0, 1], run=tmp_path / "lean", keep="metrics", **options)
    expected, found = run.metrics(), lean.metrics()
    for name in stiffcore.metrics.NAMES:
        assert np.allclose(found[name], expected[name], rtol=1e-12, atol=0, equal_nan=True), name
    assert found["certified"].all()
    spectrum = lean.spectrum(0, "first", "block", "tensor-slices")
    with pytest.raises(InputError, match="keeps metrics only"):
        _ = spectrum.values
    stored = {key: set(lean.store.unit_group(key)) for key in lean.records()}
    assert all(names == {"histogram", "histogram_edges"} for names in stored.values())
    key = next(iter(lean.records()))
    counts = lean.store.get_array(f"units/{key}", "histogram")
    assert counts.sum() == lean.records()[key].found
    again = stiffcore.analyze(network, images, [0, 1], run=tmp_path / "lean", keep="metrics", **options)
    assert again.metrics().equals(found)


def test_a_report_shows_both_kinds(both, tmp_path):
    pytest.importorskip("matplotlib")
    from stiffcore.report.page import write_report

    write_report(both[3], tmp_path / "page.html", tmp_path / "figures")
    page = (tmp_path / "page.html").read_text()
    assert "Tensor slices" in page
    assert 'id="spectra-tensor-slices-branch-0"' in page
    assert (tmp_path / "figures" / "depth-matrix-block.png").exists()


def test_slices_by_rows_are_carried_out_by_workers(tmp_path):
    network = nn.Sequential(OrderedDict(first=SqueezeExcite())).double().eval()
    images = torch.rand(1, 4, 8, 8, dtype=torch.float64)
    options = {"blocks": "first", "kinds": "tensor-slices", "workers": 1}
    events = []
    run = stiffcore.analyze(network, images, run=tmp_path / "run", on_event=events.append, **options)
    assert run.metrics()["state"].tolist() == ["done"]
    assert run.metrics()["route"].tolist() == ["rows"]


@pytest.mark.parametrize("side", [2, 4, 5])
def test_a_branch_on_a_small_map_is_accumulated(side):
    slices = open_slices(randomised(Basic(4)), seeded((1, 4, side, side), 1), BlockFunction.BRANCH)
    assert slices.accumulation is not None


class Gated(nn.Module):
    """x + x sigmoid(a mean over all positions): not local, with signs that are rounding."""

    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return x + x * torch.sigmoid(self.c(x).mean((2, 3), keepdim=True))


def test_metrics_kept_alone_leave_out_the_same_unsure_signs(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(OrderedDict(first=Gated())).double().eval()
    images = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    options = {"blocks": "first", "kinds": "tensor-slices", "functions": "block,branch"}
    full = stiffcore.analyze(network, images, run=tmp_path / "full", **options).metrics()
    lean = stiffcore.analyze(network, images, run=tmp_path / "lean", keep="metrics", **options).metrics()
    assert (full["near_axis"] > 0).any()
    for name in stiffcore.metrics.NAMES:
        assert np.array_equal(full[name], lean[name], equal_nan=True), name


def test_metrics_are_those_of_the_last_solve(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(OrderedDict(first=Basic(4))).double().eval()
    images = torch.rand(1, 4, 16, 16, dtype=torch.float64)
    options = {"blocks": "first", "keep": "metrics"}
    expected = stiffcore.analyze(network, images, run=tmp_path / "fresh", solver="host-dense", **options).metrics()
    stiffcore.analyze(network, images, run=tmp_path / "run", solver="extremes", **options)
    found = stiffcore.analyze(network, images, run=tmp_path / "run", solver="host-dense", **options).metrics()
    for name in stiffcore.metrics.NAMES:
        assert np.allclose(found[name], expected[name], rtol=1e-9, atol=0, equal_nan=True), name
    again = stiffcore.analyze(network, images, run=tmp_path / "run", blocks="first", keep="spectra")
    with pytest.raises(InputError, match="keeps metrics only"):
        _ = again.spectrum(0, "first").values
