"""Claims about accumulated Jacobians: they are those that products give, for any units, within the bytes announced."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stiffcore.jacobian.accumulation import Accumulation, Steps
from stiffcore.jacobian.colouring import ReachError
from stiffcore.jacobian.graph import FunctionGraph, by_position
from stiffcore.jacobian.reduction import reduce_jacobian
from stiffcore.networks.blocks import capture
from stiffcore.networks.images import load_images, network_input
from stiffcore.networks.zoo import load_network
from stiffcore.study import Build
from stiffcore.unit import checked_sparse, sparse_matrix
from tests.cases import Basic, Projected, randomised, seeded
from tests.reference import dense_jacobian
from tests.test_colouring import LOCAL, MAP, NOT_LOCAL, plain, reduced

# What has operations that are not known there, and is built by products.
BY_PRODUCTS = {
    "inverted_residual",
    "groups",
    "max_pool",
    "avg_pool",
    "padding",
    "crop",
    "stride_and_back",
}


class Squared(nn.Module):
    """Two ways that meet in a product, and a difference."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 3, (1, 3), padding=(0, 1))

    def forward(self, x):
        return self.a(x) * self.b(x) - self.b(x)


FUNCTIONS = {
    "stride": lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1),
    "uneven": lambda: nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)),
    "relu_between": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=2)
    ),
    "projection": Projected,
    "two_ways": Squared,
    "only_pointwise": lambda: nn.Tanh(),
    "nothing": nn.Identity,
}


def steps_between(f, x):
    graph = FunctionGraph(f, x)
    return Steps.of(graph.between(graph.input, [graph.output]), x)


def ordered(units, shape):
    return by_position(torch.as_tensor(units), (1, *shape)).numpy()


@pytest.mark.parametrize("function", ["block", "branch"])
@pytest.mark.parametrize("name", LOCAL)
def test_an_accumulated_matrix_is_the_one_built_column_by_column(name, function):
    r = reduced(name, function)
    assert (r.accumulation is None) == (name in BY_PRODUCTS)
    if r.accumulation is None:
        return
    expected, m = plain(r), r.sparse(1)
    assert r.builds[0] is Build.ACCUMULATED
    assert np.abs(m.toarray() - expected).max() <= 1e-14 * np.abs(expected).max()
    assert not (m.toarray()[expected == 0]).any()
    assert m.nnz <= r.nonzeros_bound() == r.accumulation.entries
    assert m.has_canonical_format
    assert r.check_sparse(m) <= 1e-13


@pytest.mark.parametrize("name", sorted(NOT_LOCAL.keys() - {"one_pixel", "reach_is_the_map", "no_waist_unit"}))
def test_what_is_not_known_is_not_accumulated(name):
    build, shape = NOT_LOCAL[name]
    r = reduce_jacobian(randomised(build()), seeded(shape, 1))
    assert r.builds == (Build.COLUMNS,)


@pytest.mark.parametrize("name", ["one_pixel", "reach_is_the_map"])
def test_small_maps_are_accumulated_though_columns_share_no_product(name):
    build, shape = NOT_LOCAL[name]
    r = reduce_jacobian(randomised(build()), seeded(shape, 1))
    assert r.builds == (Build.ACCUMULATED, Build.COLUMNS)
    assert np.abs(r.sparse(1).toarray() - plain(r)).max() <= 1e-14


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(sorted(FUNCTIONS)), seed=st.integers(0, 99), share=st.sampled_from([0.0, 0.2, 0.7, 1.0]))
def test_any_rows_and_columns_are_those_of_the_dense_jacobian(name, seed, share):
    f, x = randomised(FUNCTIONS[name]()), seeded((1, 2, 6, 7), seed)
    steps = steps_between(f, x)
    rng = np.random.default_rng(seed)
    columns, rows = (
        ordered(np.flatnonzero(rng.random(np.prod(shape)) < share), shape)
        for shape in (steps.source, steps.destination)
    )
    found = Accumulation(steps, columns, rows)
    expected = dense_jacobian(f, x)[np.ix_(rows, columns)]
    m = found.matrix()
    assert m.shape == expected.shape
    assert np.abs(m.toarray() - expected).max(initial=0) <= 1e-13
    assert m.nnz <= found.entries <= expected.size


@settings(max_examples=25, deadline=None)
@given(name=st.sampled_from(sorted(FUNCTIONS)), seed=st.integers(0, 99))
def test_blocks_hold_what_their_window_asks_for(name, seed):
    f, x = randomised(FUNCTIONS[name]()), seeded((1, 2, 6, 7), seed)
    steps = steps_between(f, x)
    (c, h, w), (rows, height, width) = steps.source, steps.destination
    rng = np.random.default_rng(seed)
    windows = np.stack([rng.integers(0, h, (height, width)), rng.integers(0, h, (height, width))] * 1)
    windows = np.concatenate([windows, rng.integers(0, w, (2, height, width))])
    everything = ordered(np.arange(rows * height * width), steps.destination)
    found = Accumulation(steps, ordered(np.arange(c * h * w), steps.source), everything, windows)
    expected = dense_jacobian(f, x).reshape(rows, height, width, c, h, w)
    seen = np.zeros_like(expected)
    for at, channels, (top, bottom, left, right), block in found.blocks():
        tall, wide = max(0, bottom - top + 1), max(0, right - left + 1)
        y, x0 = divmod(at, width)
        inside = block.reshape(len(channels), tall, wide, c).transpose(0, 3, 1, 2)
        seen[channels, y, x0, :, top : bottom + 1, left : right + 1] = inside
    for y in range(height):
        for x0 in range(width):
            top, bottom, left, right = windows[:, y, x0]
            mask = np.zeros((h, w), dtype=bool)
            mask[top : bottom + 1, left : right + 1] = True
            assert np.abs(np.where(mask, seen[:, y, x0] - expected[:, y, x0], 0)).max() <= 1e-13


def test_units_out_of_order_are_refused():
    steps = steps_between(randomised(FUNCTIONS["stride"]()), seeded((1, 2, 6, 7)))
    for columns in ([1, 0], [0, 0], [0, 1, 42]):
        with pytest.raises(ValueError, match="ordered by position"):
            Accumulation(steps, np.array(columns), np.arange(1))


def test_steps_that_do_not_meet_are_refused():
    steps = steps_between(randomised(FUNCTIONS["stride"]()), seeded((1, 2, 6, 7)))
    with pytest.raises(ValueError, match="cannot go on"):
        steps.then(steps)


def test_float32_stays_float32():
    r = reduce_jacobian(randomised(Basic(4)).float(), seeded(MAP, 1, torch.float32))
    m = r.sparse(1, build=Build.ACCUMULATED)
    assert m.dtype == np.float32
    assert np.allclose(m.toarray(), plain(r), rtol=0, atol=1e-6)


def test_a_matrix_that_is_not_the_operators_is_refused_and_built_by_columns(monkeypatch):
    r = reduce_jacobian(randomised(Basic(4)), seeded(MAP, 1))
    true = r.accumulation.matrix()
    wrong = true.copy()
    wrong.data[7] *= 1 + 1e-6
    monkeypatch.setattr(Accumulation, "matrix", lambda self, tell=None: wrong)
    with pytest.raises(ReachError, match="off by"):
        checked_sparse(r, 8)
    assert np.abs((sparse_matrix(r, 8) - true).toarray()).max() <= 1e-13


@pytest.mark.parametrize(
    ("network", "block"), [("resnet18", "layer2.1"), ("resnet18", "layer4.1"), ("resnet50", "layer2.1")]
)
def test_trained_blocks_are_accumulated_within_the_bytes_announced(network, block):
    opened = load_network(network, None, torch.float64)
    images = load_images("samples", index=[3])
    call = capture(opened.module, network_input(images.x[0], opened.normalize, torch.float64), [block])[0][block]
    r = reduce_jacobian(call.function, call.x)
    tracemalloc.start()
    m = r.sparse(1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    found = r.accumulation
    assert peak <= 8 * found.items + 2 * 16 * found.entries + (1 << 20)
    assert r.check_sparse(m) <= 1e-13
    at = r.k // 2
    assert np.abs(m[:, at : at + 16].toarray() - r.columns(at, at + 16).numpy()).max() <= 1e-13
