"""Claims about colouring: the sparse matrix of shared products is the one built column by column."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stiffcore.jacobian import reduction as reduction_module
from stiffcore.jacobian.colouring import Colouring, Reach, ReachError
from stiffcore.jacobian.graph import FunctionGraph, reach_of
from stiffcore.jacobian.linearise import Linearisation
from stiffcore.jacobian.reduction import reduce_jacobian
from stiffcore.networks.blocks import capture
from stiffcore.networks.images import load_images, network_input
from stiffcore.networks.zoo import load_network
from stiffcore.study import BlockFunction, Build
from tests.cases import (
    Basic,
    Bottleneck,
    InvertedResidual,
    PreActivation,
    Projection,
    SqueezeExcite,
    conv,
    randomised,
    seeded,
    transformer,
)
from tests.reference import dense_jacobian

MAP = (1, 4, 9, 11)


class Inside(nn.Module):
    """relu(up(inner(relu(down(x)))) + x)."""

    def __init__(self, inner, c=4, width=2):
        super().__init__()
        self.down, self.inner, self.up = conv(c, width, 1), inner, conv(width, c)

    def forward(self, x):
        return F.relu(self.up(self.inner(F.relu(self.down(x)))) + x)


class Gate(nn.Module):
    """Every position is scaled by something about all of them."""

    def forward(self, x):
        return x * torch.sigmoid(x.mean((2, 3), keepdim=True))


class ScaleByMap(nn.Module):
    """A parameter for every position, and one for every channel."""

    def __init__(self):
        super().__init__()
        self.map, self.channel = nn.Parameter(torch.ones(9, 11)), nn.Parameter(torch.ones(2, 1, 1))

    def forward(self, x):
        return torch.maximum(self.map * x, self.channel - x) / 3


LOCAL = {
    "basic": lambda: Basic(4),
    "bottleneck": lambda: Bottleneck(4),
    "pre_activation": PreActivation,
    "projection": Projection,
    "inverted_residual": lambda: InvertedResidual(4, 8),
    "gelu": lambda: Basic(4, act=nn.GELU),
    "gelu_after": lambda: Basic(4, outer=nn.GELU),
    "wide_waist": lambda: Inside(nn.Identity(), width=8),
    "dilation": lambda: Inside(nn.Conv2d(2, 2, 3, padding=2, dilation=2)),
    "groups": lambda: Inside(nn.Conv2d(2, 2, 3, padding=1, groups=2)),
    "max_pool": lambda: Inside(nn.MaxPool2d(3, 1, 1)),
    "avg_pool": lambda: Inside(nn.AvgPool2d(3, 1, 1)),
    "padding": lambda: Inside(nn.Sequential(nn.ZeroPad2d((2, 0, 1, 0)), nn.Conv2d(2, 2, (2, 3)))),
    "crop": lambda: Inside(nn.Sequential(nn.ZeroPad2d((-1, 1, 1, -1)))),
    "prelu": lambda: Inside(nn.PReLU(2)),
    "scale_by_map": lambda: Inside(ScaleByMap()),
    "stride_and_back": lambda: Inside(
        nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.ConvTranspose2d(3, 2, 3, 2, 1))
    ),
}
NOT_LOCAL = {
    "squeeze_excite": (SqueezeExcite, MAP),
    "gate": (lambda: Inside(Gate()), MAP),
    "global_pool": (lambda: Inside(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Upsample((9, 11)))), MAP),
    "group_norm": (lambda: Basic(4, norm=lambda c: nn.GroupNorm(2, c)), MAP),
    "instance_norm": (lambda: Basic(4, norm=nn.InstanceNorm2d), MAP),
    "batch_of_two": (lambda: Basic(4), (2, *MAP[1:])),
    "transformer": (lambda: transformer(True, "relu"), (1, 4, 8)),
    "one_pixel": (lambda: Basic(4), (1, 4, 1, 1)),
    "reach_is_the_map": (lambda: Basic(4), (1, 4, 3, 3)),
    "no_waist_unit": (lambda: Inside(nn.Threshold(1e9, 0.0)), MAP),
}


@functools.cache
def reduced(name, function="block"):
    return reduce_jacobian(randomised(LOCAL[name]()), seeded(MAP, 1), BlockFunction(function))


def plain(r):
    return r.columns(0, r.k).numpy()


def reach_between(f, x):
    graph = FunctionGraph(f, x)
    return reach_of(graph.between(graph.input, [graph.output]))


# -------------------------------------------------------------------------------------- the reduced matrix


@pytest.mark.parametrize("function", ["block", "branch"])
@pytest.mark.parametrize("name", LOCAL)
def test_the_sparse_matrix_is_the_one_built_column_by_column(name, function):
    r = reduced(name, function)
    expected = plain(r)
    m = r.sparse(chunk=7, build=Build.SHARED)
    assert np.array_equal(m.toarray(), expected)
    assert m.nnz == np.count_nonzero(expected)
    assert m.has_canonical_format
    assert m.dtype == expected.dtype
    assert r.products(0, r.k) < r.k
    assert m.nnz <= r.nonzeros_bound() <= r.coloured.entries(r.index.numpy(), r.index.numpy())
    assert r.check_sparse(m) <= 1e-13


@pytest.mark.parametrize("name", NOT_LOCAL)
def test_what_is_not_local_or_saves_nothing_is_not_coloured(name):
    build, shape = NOT_LOCAL[name]
    r = reduce_jacobian(randomised(build()), seeded(shape, 1))
    assert r.coloured is None
    with pytest.raises(ValueError, match="not coloured"):
        r.sparse(1, build=Build.SHARED)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_bands_of_columns_are_the_matrix_in_any_chunks(data):
    r = reduced("basic")
    start = data.draw(st.integers(0, r.k))
    stop = data.draw(st.integers(start, r.k))
    chunk = data.draw(st.integers(1, 40))
    band = r.columns_sparse(start, stop, chunk)
    assert band.shape == (r.k, stop - start)
    assert np.array_equal(band.toarray(), plain(r)[:, start:stop])
    assert r.products(start, stop) <= min(stop - start, r.products(0, r.k))
    assert band.nnz <= r.coloured.entries(r.index.numpy()[start:stop], r.index.numpy())
    assert start == stop or r.check_sparse(band, start) <= 1e-13


def test_products_share_as_many_columns_as_the_receptive_field_allows():
    for f, colours in ((conv(2, 3), 9), (nn.Sequential(conv(2, 3), conv(3, 2)), 25), (conv(2, 3, 1), 1)):
        colouring = Colouring(reach_between(randomised(f), seeded((1, 2, 9, 11))))
        assert colouring.products(np.arange(2 * 9 * 11)) == 2 * colours


def test_float32_keeps_its_type():
    r = reduce_jacobian(randomised(Basic(4)).float(), seeded(MAP, 1, torch.float32))
    m = r.sparse(16, build=Build.SHARED)
    assert m.dtype == np.float32
    assert np.allclose(m.toarray(), plain(r), rtol=0, atol=1e-6)
    assert r.check_sparse(m) <= 1e-5


@pytest.mark.parametrize(
    ("network", "block", "is_coloured"),
    [("resnet18", "layer2.1", True), ("resnet18", "layer3.1", False), ("resnet50", "layer2.1", True)],
)
def test_trained_blocks_have_the_matrix_of_their_columns(network, block, is_coloured):
    opened = load_network(network, None, torch.float64)
    images = load_images("samples", index=[3])
    call = capture(opened.module, network_input(images.x[0], opened.normalize, torch.float64), [block])[0][block]
    r = reduce_jacobian(call.function, call.x)
    assert (r.coloured is not None) == is_coloured
    if is_coloured:  # a band in the middle of the map, which meets it on both sides
        start, stop = r.k // 2, r.k // 2 + 48
        band = r.columns_sparse(start, stop, chunk=16)
        assert np.array_equal(band.toarray(), r.columns(start, stop).numpy())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "block"), [("resnet18", "layer1.1"), ("resnet50", "layer1.1"), ("resnet50", "layer2.1")]
)
def test_whole_matrices_of_trained_blocks_equal_their_columns(network, block):
    opened = load_network(network, None, torch.float64)
    images = load_images("samples", index=[3])
    call = capture(opened.module, network_input(images.x[0], opened.normalize, torch.float64), [block])[0][block]
    r = reduce_jacobian(call.function, call.x)
    m = r.sparse(chunk=32, build=Build.SHARED)
    assert r.products(0, r.k) < r.k / 2
    assert r.check_sparse(m) <= 1e-13
    for start in range(0, r.k, 256):
        stop = min(start + 256, r.k)
        assert np.array_equal(m[:, start:stop].toarray(), r.columns(start, stop).numpy())


# ------------------------------------------------------------------------------------- what the guards catch


def shrunk(reach):
    """A reach that forgets the last row that each row influences."""
    y = np.stack([reach.y[0], np.maximum(reach.y[1] - 1, reach.y[0])])
    return Reach(reach.source, reach.destination, y, reach.x)


def test_a_reach_that_is_too_small_is_refused_before_anything_is_built(monkeypatch):
    monkeypatch.setattr(reduction_module, "reach_of", lambda module: shrunk(reach_of(module)))
    monkeypatch.setattr(reduction_module.Steps, "of", lambda module, x: None)
    r = reduce_jacobian(randomised(Basic(4)), seeded(MAP, 1))
    assert r.coloured is None


def test_a_product_that_leaves_its_reach_stops_the_build():
    f, x = randomised(conv(2, 3)), seeded((1, 2, 6, 7))
    wrong = Colouring(shrunk(reach_between(f, x)))
    with pytest.raises(ReachError, match="where nothing should reach"):
        wrong.matrix(Linearisation(f, x).jvp, np.arange(84), np.arange(126), 8, x)


def test_rounding_out_of_reach_is_dropped():
    """Fast convolutions leave it there; it belongs to no column."""
    f, x = randomised(conv(2, 3)), seeded((1, 2, 6, 7))
    lin, colouring = Linearisation(f, x), Colouring(reach_between(f, x))
    columns, rows = np.arange(40, 44), np.arange(126)
    clean = colouring.matrix(lin.jvp, columns, rows, 8, x)
    noisy = colouring.matrix(lambda t: lin.jvp(t) + 1e-17, columns, rows, 8, x)
    assert abs(clean - noisy).max() <= 1e-16
    assert noisy.nnz < noisy.shape[0] * noisy.shape[1] / 2


@pytest.mark.parametrize("change", ["value", "missing", "moved"])
def test_the_check_finds_one_wrong_entry(change):
    r = reduced("bottleneck")
    dense = r.sparse(16).toarray()
    i, j = np.argwhere(np.abs(dense) > 0.1 * np.abs(dense).max())[0]
    if change == "value":
        dense[i, j] *= 1 + 1e-6
    elif change == "missing":
        dense[i, j] = 0
    else:
        dense[:, [j, j + 1]] = dense[:, [j + 1, j]]
    assert r.check_sparse(type(r.sparse(16))(dense)) > 1e-9


# ------------------------------------------------------------------------------------------- any local function

LAYERS = st.one_of(
    st.builds(
        lambda k, s, p, d, g: nn.Conv2d(2, 2, k, s, p, d, groups=g),
        st.tuples(st.integers(1, 3), st.integers(1, 3)),
        st.integers(1, 3),
        st.integers(0, 2),
        st.integers(1, 2),
        st.integers(1, 2),
    ),
    st.builds(
        lambda k, s, p: nn.ConvTranspose2d(2, 2, k, s, p), st.integers(2, 3), st.integers(1, 3), st.integers(0, 1)
    ),
    st.builds(lambda s, c: nn.MaxPool2d(2, s, ceil_mode=c), st.integers(1, 3), st.booleans()),
    st.builds(lambda s, p: nn.AvgPool2d(3, s, p), st.integers(1, 2), st.integers(0, 1)),
    st.builds(lambda *pads: nn.ZeroPad2d(pads), *[st.integers(-1, 2)] * 4),
    st.sampled_from([nn.ReLU(), nn.GELU(), nn.BatchNorm2d(2)]),
)


@settings(max_examples=60, deadline=None)
@given(layers=st.lists(LAYERS, min_size=1, max_size=3), h=st.integers(1, 9), w=st.integers(1, 9), sums=st.booleans())
def test_any_stack_of_local_layers_has_its_dense_jacobian(layers, h, w, sums):
    module, x = randomised(nn.Sequential(*layers)), seeded((1, 2, h, w), 3)
    try:
        f = (lambda t: module(t) + module(t * 2)) if sums else module
        out = f(x)
    except RuntimeError:  # a map that is smaller than the kernel
        return
    if not out.numel():
        return
    expected = dense_jacobian(f, x)
    reach = reach_between(f, x)
    colouring = Colouring(reach)
    columns, rows = np.arange(x.numel()), np.arange(out.numel())
    m = colouring.matrix(Linearisation(f, x).jvp, columns, rows, 5, x)
    assert np.allclose(m.toarray(), expected, rtol=1e-12, atol=1e-13)
    # the same reach, position by position
    ways = [[set(range(a, b + 1)) for a, b in ends.T] for ends in (reach.y, reach.x)]
    pairs = sum(len(p) for p in ways[0]) * sum(len(p) for p in ways[1]) * 2 * out.shape[1]
    assert colouring.entries(columns, rows) == pairs >= m.nnz
    # no colouring has fewer colours than intervals that meet in one place
    crowd = [
        max(1, *(sum(q in p for p in axis) for q in range(n))) for axis, n in zip(ways, out.shape[2:], strict=True)
    ]
    assert colouring.products(columns) == 2 * crowd[0] * crowd[1]


def test_some_rows_and_columns_of_a_rectangular_jacobian():
    f, x = randomised(nn.Conv2d(3, 5, 3, stride=2, padding=1)), seeded((1, 3, 7, 8))
    expected = dense_jacobian(f, x)
    generator = np.random.default_rng(0)
    columns, rows = generator.permutation(168)[:40], generator.permutation(80)[:30]
    colouring = Colouring(reach_between(f, x))
    m = colouring.matrix(Linearisation(f, x).jvp, columns, rows, 4, x)
    assert np.allclose(m.toarray(), expected[np.ix_(rows, columns)], rtol=1e-13, atol=1e-15)
    assert m.nnz <= colouring.entries(columns, rows)


def test_reaches_follow_one_another_only_through_one_map():
    with pytest.raises(ValueError, match="cannot go on"):
        Reach.identity((2, 3, 4)).then(Reach.identity((3, 2, 4)))


W = seeded((2, 2, 3, 3), 1)


@pytest.mark.parametrize(
    "f",
    [
        lambda t: torch.conv2d(t, W, None, [2], [1], [2]),
        lambda t: F.conv_transpose2d(t, W, stride=[2], padding=[1]),
        lambda t: F.max_pool2d(t, [2]),
        lambda t: F.max_pool2d(t, [3], [1], [1]),
        lambda t: F.avg_pool2d(t, [3], [2], [1]),
    ],
)
def test_one_number_for_both_axes_is_read_as_such(f):
    x = seeded((1, 2, 7, 6))
    expected = dense_jacobian(f, x)
    m = Colouring(reach_between(f, x)).matrix(
        Linearisation(f, x).jvp, np.arange(expected.shape[1]), np.arange(expected.shape[0]), 9, x
    )
    assert np.allclose(m.toarray(), expected, rtol=1e-12, atol=1e-13)


def test_small_maps_multiplied_by_products_have_the_same_reach():
    f = randomised(conv(2, 3))
    x = seeded((1, 2, 4, 3))
    graph = FunctionGraph(f, x)
    module = graph.between(graph.input, [graph.output])
    assert any("products" in str(node.target) for node in module.graph.nodes)
    reach = reach_of(module)
    assert reach.y.tolist() == [[0, 0, 1, 2], [1, 2, 3, 3]]
    assert reach.x.tolist() == [[0, 0, 1], [1, 2, 2]]
