"""Claims about linearisation and reduction, each against dense Jacobians that share no code with them."""

import functools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stiffcore.errors import InputError
from stiffcore.jacobian import reduction as reduction_module
from stiffcore.jacobian.factors import open_factors
from stiffcore.jacobian.graph import FunctionGraph, Waist, by_position
from stiffcore.jacobian.linearise import Linearisation
from stiffcore.jacobian.reduction import NoSpectrumError, Route, is_residual, reduce_jacobian
from stiffcore.jacobian.slices import open_slices
from stiffcore.networks.blocks import capture, residual_blocks
from stiffcore.study import BlockFunction
from tests.cases import CASES, Basic, Bottleneck, conv, randomised, seeded
from tests.reference import assert_spectra_match, dense_jacobian

BRANCHES = [name for name, case in CASES.items() if case.branch]
A, B = seeded((2, 6), 4), seeded((6, 2), 5)
X6, MATRIX6 = seeded((6,), 9), seeded((6, 6), 8)


def narrow(x):
    return F.relu(x @ A.T) @ B.T


@functools.cache
def opened(name):
    f, x = CASES[name].open()
    return f, x, torch.from_numpy(dense_jacobian(f, x))


@functools.cache
def reduced(name, function="block"):
    f, x, _ = opened(name)
    return reduce_jacobian(f, x, BlockFunction(function), name=name)


def dense(reduction):
    return reduction.columns(0, reduction.k).numpy()


def route_of(reduction):
    return reduction.route + ("0" if reduction.route is Route.WAIST and not reduction.shift else "")


# ------------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("name", CASES)
def test_products_in_both_directions_equal_the_dense_jacobian(name):
    f, x, j = opened(name)
    lin = Linearisation(f, x)
    tolerance = 1e-5 if name == "mixed_precision" else 1e-11
    t, c = seeded((3, lin.n), 5), seeded((2, lin.m), 6)
    assert torch.allclose(lin.jvp(t), t @ j.T, rtol=tolerance, atol=tolerance)
    assert torch.allclose(lin.vjp(c), c @ j, rtol=tolerance, atol=tolerance)


def test_the_point_and_the_module_are_left_as_they_were():
    for name in ("relu_on_its_input", "pre_activation_inplace", "bottleneck"):
        f, x, _ = opened(name)
        before, state = x.clone(), {k: v.clone() for k, v in f.state_dict().items()}
        reduction = reduce_jacobian(f, x)
        dense(reduction)
        assert torch.equal(x, before)
        assert all(torch.equal(state[k], v) for k, v in f.state_dict().items())


# -------------------------------------------------------------------------------------------------- routes


@pytest.mark.parametrize("name", CASES)
def test_the_block_takes_the_route_that_the_mathematics_allows(name):
    r, expected = reduced(name), CASES[name].route
    assert r.k + r.ones + r.zeros == r.n
    assert min(r.k, r.ones, r.zeros) >= 0
    assert expected in ("any", route_of(r)), r.reason


@pytest.mark.parametrize("name", BRANCHES)
def test_the_branch_takes_the_route_that_the_mathematics_allows(name):
    r, expected = reduced(name, "branch"), CASES[name].branch
    assert r.k + r.ones + r.zeros == r.n
    assert r.ones == r.shift == 0
    assert expected in ("any", route_of(r)), r.reason


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.branch])
def test_what_has_no_branch_says_so(name):
    with pytest.raises(NoSpectrumError, match="branch"):
        reduced(name, "branch")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.residual])
def test_the_branch_is_the_function_written_by_hand(name):
    f, x, _ = opened(name)
    by_hand = CASES[name].residual(f)
    branch = reduced(name, "branch").jacobian
    with torch.no_grad():
        assert torch.allclose(branch.value, by_hand(x.clone()), rtol=1e-12, atol=1e-12)
    t = seeded((2, x.numel()), 5)
    assert torch.allclose(branch.jvp(t), t @ torch.from_numpy(dense_jacobian(by_hand, x)).T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
@pytest.mark.parametrize("function", ["block", "branch"])
def test_third_party_blocks_reduce_like_one_another(library, function):
    ours = reduced(f"{library}_bottleneck", function)
    x = opened(f"{library}_bottleneck")[1]
    hand = Bottleneck(8, 2)
    theirs = opened(f"{library}_bottleneck")[0]
    for i, (c, n) in enumerate((("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))):
        hand.body[3 * i], hand.body[3 * i + 1] = getattr(theirs, c), getattr(theirs, n)
    again = reduce_jacobian(hand.double().eval().requires_grad_(False), x, BlockFunction(function))
    assert (ours.k, ours.ones, ours.zeros, ours.route) == (again.k, again.ones, again.zeros, again.route)
    assert np.allclose(dense(ours), dense(again), atol=1e-14)


@pytest.mark.parametrize("function", ["block", "branch"])
def test_rectangular_jacobians_are_refused_with_their_shape(function):
    class Strided(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.short = conv(2, 4, stride=2), conv(4, 4), conv(2, 4, 1, stride=2)

        def forward(self, x):
            return F.relu(self.b(F.relu(self.a(x))) + self.short(x))

    with pytest.raises(NoSpectrumError, match="16 x 32") as caught:
        reduce_jacobian(randomised(Strided()), seeded((1, 2, 4, 4)), BlockFunction(function))
    assert (caught.value.m, caught.value.n) == (16, 32)


# ------------------------------------------------------------------------------------------------- columns

CHUNKED = {"waist": "basic", "waist0": "composition", "active": "projection", "full": "gelu_after"}


@pytest.mark.parametrize("route", CHUNKED)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_columns_are_the_same_in_any_chunks(route, data):
    r = reduced(CHUNKED[route])
    assert route_of(r) == route
    chunk = data.draw(st.integers(1, r.k + 3) | st.sampled_from([1, r.k]))
    parts = [r.columns(at, min(at + chunk, r.k)) for at in range(0, r.k, chunk)]
    assert torch.allclose(torch.cat(parts, dim=1), r.columns(0, r.k), rtol=0, atol=1e-14)
    assert all(p.T.is_contiguous() for p in parts)


@pytest.mark.parametrize("name", ["projection", "gelu_after", "buffered", "rms_norm", "mixed_precision"])
def test_without_a_waist_the_matrix_is_the_dense_jacobian_at_the_active_units(name):
    f, x, j = opened(name)
    r = reduce_jacobian(f, x, reduce=name in ("projection", "gelu_after", "buffered"))
    index = r.index
    assert torch.allclose(r.columns(0, r.k), j[index][:, index], rtol=1e-6, atol=1e-6 if "mixed" in name else 1e-12)
    off = torch.ones(r.n, dtype=bool).index_fill_(0, index, False)
    assert not j[off].any()


def test_the_matrix_of_a_waist_is_the_product_of_dense_factors():
    f, x, _ = opened("basic")
    r = reduced("basic")
    v = torch.from_numpy(dense_jacobian(lambda t: f.act(f.norm1(f.conv1(t))), x))
    h = f.act(f.norm1(f.conv1(x))).detach()
    u = torch.from_numpy(dense_jacobian(lambda t: f.norm2(f.conv2(t)), h))
    on = (f(x).detach().reshape(-1) > 0).double()
    a = r.index
    assert set(a.tolist()) == set(torch.nonzero(h.reshape(-1)).reshape(-1).tolist())
    assert torch.allclose(r.columns(0, r.k), (v @ (on[:, None] * u))[a][:, a], atol=1e-13)
    assert (r.zeros, r.ones) == (int((on == 0).sum()), int(on.sum()) - r.k)


@given(c=st.integers(1, 4), h=st.integers(1, 4), w=st.integers(1, 4), seed=st.integers(0, 99), batched=st.booleans())
@settings(max_examples=50, deadline=None)
def test_units_are_ordered_by_position_then_channel(c, h, w, seed, batched):
    shape = (2 if batched else 1, c, h, w)
    size = int(np.prod(shape))
    chosen = np.flatnonzero(np.random.default_rng(seed).random(size) < 0.6)
    ordered = by_position(torch.from_numpy(chosen), shape).tolist()
    keys = list(zip(*np.unravel_index(ordered, shape), strict=True)) if len(ordered) else []
    expected = sorted(keys) if batched else sorted(keys, key=lambda k: (k[2], k[3], k[1]))
    assert keys == expected


# -------------------------------------------------------------------------------------------- eigenvectors


@pytest.mark.parametrize(
    ("name", "function"),
    [(n, "block") for n in ("basic", "pre_activation", "composition", "projection", "gelu_after", "flipped")]
    + [(n, "branch") for n in ("basic", "projection", "layer_scale")],
)
def test_lifted_vectors_are_eigenvectors_of_the_whole_jacobian(name, function):
    name = "permuted_skip" if name == "flipped" else name
    r = reduced(name, function)
    j = r.jacobian.jvp(torch.eye(r.n, dtype=torch.float64)).T.numpy()
    values, right = np.linalg.eig(dense(r))
    left = np.linalg.inv(right)
    u, v = (
        t.numpy()
        for t in r.lift(
            *(torch.from_numpy(np.ascontiguousarray(m)).cdouble() for m in (right.T, left)),
            torch.from_numpy(values).cdouble(),
        )
    )
    values = values + r.shift
    for i in range(r.k):
        scale = np.linalg.norm(j) * 1e-9
        assert np.linalg.norm(j @ u[i] - values[i] * u[i]) <= scale * np.linalg.norm(u[i])
        assert np.linalg.norm(v[i] @ j - values[i] * v[i]) <= scale * np.linalg.norm(v[i])


def test_a_zero_eigenvalue_of_the_full_matrix_has_an_honest_left_vector():
    """J^T z is rounding noise there: its direction would give a condition number out of thin air."""
    q = torch.linalg.qr(seeded((4, 4), 3)).Q
    m = q @ torch.diag(torch.tensor([0.0, 1, 2, 3], dtype=torch.float64)) @ q.T  # symmetric: all conditions are 1
    r = reduce_jacobian(lambda x: x @ m.T, seeded((4,), 1))
    values, right = np.linalg.eigh(dense(r))
    w = torch.from_numpy(np.ascontiguousarray(right.T)).cdouble()
    u, v = r.lift(w, w, torch.from_numpy(values).cdouble())
    cosine = (u * v).sum(1).abs() / (u.norm(dim=1) * v.norm(dim=1))
    assert torch.allclose(cosine, torch.ones(4, dtype=torch.float64), atol=1e-9)


# ------------------------------------------------------------------------------- what the check must catch


def corrupt(monkeypatch, change):
    true = FunctionGraph.waists

    def waists(self, ends):
        return [change(self, w) for w in true(self, ends)]

    monkeypatch.setattr(FunctionGraph, "waists", waists)


def eigenvalues_agree(f, x, reduction):
    j = dense_jacobian(f, x)
    values = reduction.shift + np.linalg.eigvals(dense(reduction)) if reduction.k else np.empty(0)
    assert_spectra_match(values, reduction.zeros, reduction.ones, np.linalg.eigvals(j))


@pytest.mark.parametrize("dropped", [0, 7, -1])
def test_a_waist_that_forgets_an_active_unit_is_not_used(monkeypatch, dropped):
    f, x, _ = opened("basic")

    def drop(graph, w):
        active = w.active.tolist()
        del active[dropped]
        return Waist(w.node, torch.tensor(active), w.size)

    corrupt(monkeypatch, drop)
    r = reduce_jacobian(f, x)
    assert r.route is Route.ACTIVE
    assert "failed its check" in r.reason
    eigenvalues_agree(f, x, r)


def test_a_node_that_does_not_dominate_is_not_used(monkeypatch):
    f, x, _ = opened("nested_sum")
    monkeypatch.setattr(FunctionGraph, "_reaches", lambda self, ends, without: False)
    r = reduce_jacobian(f, x)
    assert r.route is Route.ACTIVE
    eigenvalues_agree(f, x, r)


def test_a_skip_that_is_no_identity_is_not_split_off(monkeypatch):
    f, x, _ = opened("permuted_skip")
    true = FunctionGraph.residual_sum

    def believe(self, end):
        _, others = true(self, end)
        deepest = max(others, key=self.depth)
        return [n for n in others if n is not deepest], [deepest]

    monkeypatch.setattr(FunctionGraph, "residual_sum", believe)
    r = reduce_jacobian(f, x)
    assert r.route is Route.ACTIVE
    assert r.shift == 0
    eigenvalues_agree(f, x, r)


def test_outputs_believed_inactive_are_not_dropped(monkeypatch):
    f, x, _ = opened("projection")
    true = reduction_module._chain_slope

    def wrong(graph, end):
        slope = true(graph, end)
        slope.view(-1)[torch.nonzero(slope.reshape(-1))[0]] = 0
        return slope

    monkeypatch.setattr(reduction_module, "_chain_slope", wrong)
    r = reduce_jacobian(f, x)
    assert r.route is Route.FULL
    eigenvalues_agree(f, x, r)


def test_a_waist_that_cannot_be_evaluated_costs_the_reduction_only(monkeypatch):
    f, x, _ = opened("basic")
    between = FunctionGraph.between
    monkeypatch.setattr(
        FunctionGraph,
        "between",
        lambda self, start, ends: between(self, start, ends) if start is self.input else (lambda t: t / 0),
    )
    monkeypatch.setattr(reduction_module, "_chain_slope", lambda graph, end: (f(x.clone()) > 0).double())
    r = reduce_jacobian(f, x)
    assert r.route is Route.ACTIVE
    eigenvalues_agree(f, x, r)


def test_a_function_that_cannot_be_traced_is_solved_in_full(monkeypatch):
    monkeypatch.setattr(FunctionGraph, "__init__", lambda *a: (_ for _ in ()).throw(RuntimeError("no trace")))
    f, x, _ = opened("basic")
    r = reduce_jacobian(f, x)
    assert r.route is Route.FULL
    assert "no trace" in r.reason
    eigenvalues_agree(f, x, r)


def test_units_that_lead_nowhere_are_left_out():
    for function in ("block", "branch"):
        assert reduced("dead_units", function).k == 16  # of 32 that are switched on
        assert reduced("zero_branch", function).k == 0


# ------------------------------------------------------------------- derivatives that contradict themselves


class Reversed(torch.autograd.Function):
    """x * x, with a backward derivative that is not its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def jvp(ctx, t):
        return 2 * t * ctx.saved_tensors[0]

    @staticmethod
    def backward(ctx, g):
        return -g * ctx.saved_tensors[0]


def raising(error):
    def f(x):
        raise error

    return f


def constant_by_no_grad(x):
    with torch.no_grad():
        factor = x.mean()
    return F.relu(narrow(x) * factor + x)


REFUSED = {
    "no_grad inside": (constant_by_no_grad, X6, "disagree"),
    "wrong backward": (lambda x: F.relu(Reversed.apply(narrow(x)) + x), X6, "disagree"),
    "derivative infinite": (torch.sqrt, 0 * X6, "derivative at this input is not finite"),
    "half": (lambda x: 2 * x, X6.half(), "float16.*float32"),
    "bfloat16": (lambda x: 2 * x, X6.bfloat16(), "bfloat16"),
    "integers": (lambda x: 2 * x, torch.arange(6), "floating tensor, got torch.int64"),
    "complex": (lambda x: 2 * x, torch.complex(X6, X6), "floating tensor, got torch.complex128"),
    "complex output": (lambda x: (1 + 2j) * x, X6, "floating tensor, got torch.complex128"),
    "nan": (lambda x: x, X6 * torch.nan, "input has values that are not finite"),
    "infinite output": (lambda x: x / 0, X6, "output has values that are not finite"),
    "empty": (lambda x: x, X6[:0], "input is empty"),
    "nothing": (lambda x: None, X6, "floating tensor.*got NoneType"),
    "a tuple of integers": (lambda x: (x.argsort(), "a"), X6, "floating tensor.*got tuple"),
    "integer output": (lambda x: x.argsort(), X6, "one floating tensor, got torch.int64"),
    "dropout": (lambda x: F.dropout(x, 0.5, training=True), X6.repeat(9), "not deterministic.*dropout"),
    "another shape wanted": (lambda x: x @ A, X6, "fails at its input: .*cannot be multiplied"),
    "an assertion": (raising(AssertionError("224 x 224 wanted")), X6, "fails at its input: AssertionError: 224 x 224"),
    "a key that is missing": (raising(KeyError("mask")), X6, "fails at its input: KeyError: 'mask'"),
    "a constant in float32": (lambda x: x @ MATRIX6.float(), X6, "fails at its input: .*--dtype float32"),
    "a constant in float64": (lambda x: x @ MATRIX6, X6.float(), "fails at its input: .*--dtype float64"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("reduce", [True, False])
def test_what_cannot_be_linearised_is_refused_with_the_reason(what, reduce):
    f, x, message = REFUSED[what]
    with pytest.raises(InputError, match=message):
        reduce_jacobian(f, x, reduce=reduce)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: F.relu(narrow(x) * x.detach() + x),
        lambda x: F.relu(narrow(x).detach() + narrow(2 * x) + x),
    ],
)
def test_what_is_hidden_from_autograd_never_gets_into_a_branch(f):
    """Tracing loses `detach`: the graph's branch would have a derivative that the function has not."""
    with pytest.raises(NoSpectrumError, match="do not add up"):
        reduce_jacobian(f, X6, BlockFunction.BRANCH)
    r = reduce_jacobian(f, X6)
    eigenvalues_agree(f, X6, r)


def test_operations_that_vmap_cannot_batch_go_one_by_one():
    def f(x):
        return F.relu(narrow(x) + x.reshape(1, 1, 2, 3).contiguous(memory_format=torch.channels_last).reshape(6))

    r = reduce_jacobian(f, X6)
    assert r.route is Route.WAIST
    full = reduce_jacobian(f, X6, reduce=False)
    assert np.allclose(dense(full), dense_jacobian(f, X6), atol=1e-14)
    eigenvalues_agree(f, X6, r)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_random_graphs_of_sums_and_activations_keep_their_spectrum(seed):
    """Random programs from the operations that the graph logic treats specially: none may change an eigenvalue."""
    choose = np.random.default_rng(seed)
    down, up, square = seeded((2, 6), seed + 1), seeded((6, 2), seed + 2), seeded((6, 6), seed + 3) / 3
    unary = [
        lambda t: t,
        F.relu,
        F.relu6,
        lambda t: F.hardtanh(t, -0.5, 0.7),
        lambda t: F.leaky_relu(t, 0.1),
        lambda t: t.clamp(max=0.3),
        lambda t: -t,
        torch.abs,
        torch.tanh,
        lambda t: t @ square.T,
        lambda t: F.relu(t @ down.T) @ up.T,
        lambda t: F.hardswish(t @ down.T) @ up.T,
        lambda t: t.flip(0),
        lambda t: t.reshape(2, 3).T.reshape(6),
        lambda t: t.reshape(2, 3).clone().flatten(),
        lambda t: F.relu_(t.clone()),
        lambda t: t.clone().mul_(0.5).relu_(),
        lambda t: torch.cat([t[:2], F.relu(t[2:])]),
    ]
    steps = [(int(choose.integers(5)), *(int(i) for i in choose.integers(0, 50, 4))) for _ in range(5)]

    def f(x):
        made = [x]
        for kind, a, b, i, j in steps:
            p, q = unary[i % len(unary)](made[a % len(made)]), unary[j % len(unary)](made[b % len(made)])
            if kind == 0:
                made.append(p)
            elif kind == 1:
                made.append(p + q)
            elif kind == 2:
                made.append(F.relu(p + q))
            elif kind == 3:
                made.append(torch.add(p, q, alpha=[1, 0.5][i % 2]) + made[0])
            else:
                made.append(F.hardtanh(p + q + made[0], -1, 1) if i % 2 else p * torch.sigmoid(q))
        return made[-1]

    x = seeded((6,), seed)
    j = dense_jacobian(f, x)
    r = reduce_jacobian(f, x)
    m = r.shift * np.eye(r.k) + dense(r)
    # traces of powers, and one determinant: the same for any order and any Jordan structure
    for power in range(1, 7):
        ours = np.trace(np.linalg.matrix_power(m, power)) + r.ones
        scale = max(1.0, np.linalg.norm(j) ** power, np.linalg.norm(m) ** power)
        assert abs(ours - np.trace(np.linalg.matrix_power(j, power))) <= 1e-11 * scale
    shifted = np.linalg.det(2.5 * np.eye(r.k) - m) * 1.5**r.ones * 2.5**r.zeros
    truth = np.linalg.det(2.5 * np.eye(6) - j)
    assert abs(shifted - truth) <= 1e-10 * max(1.0, np.linalg.norm(j) ** 6, np.linalg.norm(m) ** 6)


# ------------------------------------------------------------------------------------- ordinary functions

CONV, NARROW = randomised(conv(3, 3)), randomised(nn.Sequential(conv(3, 1, 1), nn.ReLU(), conv(1, 3, 1)))
BODIES = {
    "convolution": CONV,
    "relu of a sum": lambda x: F.relu(CONV(x) + x),
    "waist": lambda x: F.relu(NARROW(x) + x),
}
VIEWS = {
    "map": lambda y: y,
    "flat": lambda y: y.flatten(),
    "row": lambda y: y.flatten(1),
    "rows of channels": lambda y: y.flatten(2),
    "no batch": lambda y: y[0],
    "another map": lambda y: y.view(1, y.shape[2], y.shape[1], y.shape[3]),
    "columns": lambda y: y.reshape(1, -1, y.shape[3], 1),
    "three rows": lambda y: y.reshape(3, -1),
    "channels last": lambda y: y.permute(0, 2, 3, 1),
    "channels last, flat": lambda y: y.permute(0, 2, 3, 1).flatten(1),
    "activation of a view": lambda y: F.relu(y.view(1, -1)),
}


# a convolution at 4 x 4 pixels is computed by products, whose strides are not those of the trace
@pytest.mark.parametrize("side", [4, 5])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("body", BODIES)
def test_an_output_may_be_any_view_of_a_map(body, view, side):
    def f(x):
        return VIEWS[view](BODIES[body](x))

    x = seeded((1, 3, side, side), 3)
    j = dense_jacobian(f, x)
    r = reduce_jacobian(f, x)
    assert_spectra_match(
        r.shift + np.linalg.eigvals(dense(r)) if r.k else [], r.zeros, r.ones, np.linalg.eigvals(j), radius=1e-5
    )
    for build in r.builds:
        assert np.allclose(r.sparse(9, build=build).toarray() if build != "columns" else dense(r), dense(r), atol=1e-14)
    factors = open_factors(f, x)
    assert factors.difference(factors.matrices(9)) <= 1e-12
    slices = j.reshape(-1, 3, side, side)
    traces = sum(np.einsum("acii->", squares.values) for squares in open_slices(f, x).squares(9))
    assert np.isclose(traces, np.einsum("acii->", slices), atol=1e-12)


INPLACE = {
    "leaky_relu": nn.LeakyReLU(0.1, inplace=True),
    "relu6": nn.ReLU6(inplace=True),
    "elu": nn.ELU(inplace=True),
    "celu": nn.CELU(inplace=True),
    "selu": nn.SELU(inplace=True),
    "silu": nn.SiLU(inplace=True),
    "mish": nn.Mish(inplace=True),
    "hardtanh": nn.Hardtanh(inplace=True),
    "hardswish": nn.Hardswish(inplace=True),
    "hardsigmoid": nn.Hardsigmoid(inplace=True),
    "threshold": nn.Threshold(0.1, -1.0, inplace=True),
    "mul": lambda x: x.mul_(0.3),
    "add": lambda x: x.add_(x.sum()),
    "clamp": lambda x: x.clamp_(-1, 0.5),
    "masked_fill": lambda x: x.masked_fill_(x > 0.5, 0.0),
    "item": lambda x: x.__setitem__((0, 0), 2 * x[0, 1]) or x,
}


@pytest.mark.parametrize("name", INPLACE)
def test_the_first_operation_may_work_in_place(name):
    def f(x):
        return CONV(INPLACE[name](x))

    x = seeded((1, 3, 4, 4), 5)
    j = torch.autograd.functional.jacobian(lambda t: f(t.clone()), x).reshape(48, 48).numpy()
    r = reduce_jacobian(f, x, reduce=False)
    assert np.allclose(dense(r), j[r.index][:, r.index], atol=1e-14)
    eigenvalues_agree(f, x, reduce_jacobian(f, x))


# -------------------------------------------------------------------------------------------------- memory

MEASURE = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {root!r})
from tests.cases import Basic, Bottleneck, randomised, seeded
from stiffcore.jacobian.reduction import reduce_jacobian

def status(key):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) * 1024

f, x = {build}
r = reduce_jacobian(f, x)
width = {width}
r.columns(0, 2)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
r.columns(0, width)
print(status("VmHWM") - before, r.column_items * 8 * width, r.k)
"""


@pytest.mark.parametrize(
    ("build", "width"),
    [
        ("randomised(Bottleneck(64, 16)), seeded((1, 64, 16, 16))", 64),
        ("randomised(Basic(32)), seeded((1, 32, 16, 16))", 32),
        ("randomised(Basic(128)), seeded((1, 128, 4, 4))", 256),
    ],
)
def test_columns_hold_no_more_memory_than_they_say(build, width, pytestconfig):
    script = MEASURE.format(root=str(pytestconfig.rootpath), build=build, width=width)
    # a fixed threshold: what is freed goes back, so that the peak is of numbers and not of the heap's holes
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
    ).stdout
    peak, said, _ = map(int, out.split())
    assert peak <= 1.3 * said + 8 * 2**20
    assert said <= 2 * peak + 8 * 2**20, "the plan would give away memory that is there"


# -------------------------------------------------------------------------------------------------- blocks


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.ReLU(inplace=True), conv(3, 3))
        self.one, self.two = Basic(), Basic()
        self.plain = nn.Sequential(conv(3, 3), nn.ReLU(inplace=True))

    def forward(self, x):
        return self.two(self.plain(self.one(self.stem(x))))


def test_residual_blocks_are_found_and_captured_without_touching_the_image():
    net, x = randomised(Net()), seeded((1, 3, 4, 4))
    before = x.clone()
    assert residual_blocks(net, x, is_residual) == ["one", "two"]
    calls, output = capture(net, x, ["one", "two", "stem"])
    assert torch.equal(x, before)
    assert torch.equal(calls["stem"].x, before)
    assert torch.equal(calls["one"].x, net.stem(before.clone()))
    assert torch.equal(calls["two"].function(calls["two"].x.clone()), output)


def test_is_residual_needs_two_terms_that_depend_on_the_input():
    for name in ("basic", "pre_activation", "projection", "doubling", "transformer_pre_relu", "control_flow"):
        f, x, _ = opened(name)
        assert is_residual(f, x), name
    for name in ("composition", "transformer_post_relu", "constant", "linear"):
        f, x, _ = opened(name)
        assert not is_residual(f, x), name
