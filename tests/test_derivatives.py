"""Claims about functions that autograd differentiates and `torch.func` does not, and about modules left as they were.

The truth is plain autograd's: each row of J from a function made anew, so that no call sees what another one left.
"""

import copy
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torchvision.ops import deform_conv2d, roi_align

import stiffcore
from stiffcore.errors import InputError
from stiffcore.jacobian.derivatives import value_gap
from stiffcore.jacobian.factors import open_factors
from stiffcore.jacobian.linearise import Linearisation, Way
from stiffcore.jacobian.modules import modules_of
from stiffcore.jacobian.reduction import NoSpectrumError, Route, UntracedError, is_residual, reduce_jacobian
from stiffcore.jacobian.slices import open_slices
from stiffcore.study import BlockFunction
from tests.cases import Basic, randomised, seeded
from tests.reference import assert_spectra_match, matched_distance

A, X = seeded((6, 6), 4), seeded((6,), 9)
UP, DOWN = seeded((6, 2), 5), seeded((2, 6), 6)
MAP, GRID, OFFSETS, TAPS = (
    seeded((1, 2, 4, 4), 1),
    seeded((1, 4, 4, 2), 2),
    seeded((1, 18, 4, 4), 3),
    seeded((2, 2, 3, 3)),
)


def rows_by_autograd(build, x):
    """(m, n), one row from each new function."""
    rows, m = [], first(build()(x.clone())).numel()
    for i in range(m):
        f = build()
        t = x.clone().requires_grad_()
        y = first(f(t.clone()))
        cotangent = torch.zeros(m, dtype=y.dtype)
        cotangent[i] = 1
        y.backward(cotangent.reshape(y.shape))
        rows.append(torch.zeros_like(x) if t.grad is None else t.grad)
    return torch.stack([row.reshape(-1) for row in rows]).numpy()


def first(y):
    while not isinstance(y, torch.Tensor):
        y = next(v for v in (y.values() if isinstance(y, dict) else y) if not isinstance(v, int))
    return y


class Old(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x * x * g


class Once(Old):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return Old.backward(ctx, g)


class ByNumpy(Old):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(np.sin(x.numpy(force=True)))

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(np.cos(x.numpy(force=True)) * g.numpy(force=True))


class Rounded(Old):
    """Straight-through: its values are steps, its derivative is that of the identity."""

    @staticmethod
    def forward(ctx, x):
        return torch.round(x)

    @staticmethod
    def backward(ctx, g):
        return g


class NoForward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


class WrongForward(NoForward):
    @staticmethod
    def setup_context(ctx, inputs, output):
        NoForward.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def jvp(ctx, t):
        return 3 * t * ctx.saved_tensors[0]


class Equilibrium(nn.Module):
    """z = tanh(U z + V x), differentiated by a hook on z that may be used once."""

    def __init__(self, once):
        super().__init__()
        self.u, self.v, self.once = nn.Parameter(0.05 * seeded((6, 6), 1)), nn.Parameter(seeded((6, 6), 2)), once

    def step(self, z, x):
        return torch.tanh(z @ self.u.T + x @ self.v.T)

    def forward(self, x):
        with torch.no_grad():
            z = torch.zeros_like(x)
            for _ in range(15):
                z = self.step(z, x)
        z = self.step(z, x)
        with torch.enable_grad():
            inside = z.detach().clone().requires_grad_()
            again = self.step(inside, x)

        def solve(gradient):
            if self.once:
                self.handle.remove()
            y = gradient
            for _ in range(15):
                y = torch.autograd.grad(again, inside, y, retain_graph=True)[0] + gradient
            return y

        self.handle = z.register_hook(solve)
        return z


class Counting(nn.Module):
    """Buffers that are changed in place, replaced, and used."""

    def __init__(self):
        super().__init__()
        self.linear = randomised(nn.Linear(6, 6))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(6, dtype=torch.float64))
        self.register_buffer("last", torch.zeros(6, dtype=torch.float64))
        self.seen, self.python_calls = None, 0

    def forward(self, x):
        self.calls += 1
        self.python_calls += 1
        h = self.linear(x)
        self.mean.mul_(0.9).add_(0.1 * h)
        self.last = 0.5 * self.last + h
        self.seen = h
        return torch.tanh(h - self.mean) * self.calls * self.python_calls + self.last


class SpectralByData(nn.Module):
    """Spectral normalisation as it was first published: parameters that `.data` replaces in every call."""

    def __init__(self):
        super().__init__()
        self.linear, self.u = randomised(nn.Linear(6, 6)), nn.Parameter(seeded((6,), 3), requires_grad=False)

    def forward(self, x):
        w = self.linear.weight
        self.u.data = F.normalize(w.data @ F.normalize(w.data.T @ self.u.data, dim=0), dim=0)
        return F.linear(x, w / (self.u @ w).norm())


def hooked():
    module = nn.Sequential(randomised(nn.Linear(6, 6)), nn.Tanh())
    module[1].register_full_backward_hook(lambda module, inside, outside: None)
    return module


def normalised_by(make):
    def build():
        torch.manual_seed(0)
        module = nn.Sequential(make(nn.Linear(6, 6).double()), nn.Tanh())
        module(X)  # what is computed in a pass is no leaf any more
        return module.eval()

    return build


def pruned(linear):
    prune.random_unstructured(linear, "weight", 0.3)
    return linear


SPARSE = (A * (A > 0.3)).to_sparse()
# name: (makes the function, point, the ways that may be taken)
AUTOGRAD = {
    "old-style function": (lambda: lambda x: Old.apply(A @ x) + x, X, [Way.TWICE]),
    "old-style function before a relu": (
        lambda: lambda x: F.relu(UP @ F.relu(Old.apply(DOWN @ x)) + x),
        X,
        [Way.TWICE],
    ),
    "differentiable once": (lambda: lambda x: Once.apply(A @ x) + x, X, [Way.TRACE]),
    "a function of numpy": (lambda: lambda x: ByNumpy.apply(A @ x) + x, X, [Way.ROWS]),
    "no jvp": (lambda: lambda x: NoForward.apply(A @ x) + x, X, [Way.TWICE]),
    "wrong jvp": (lambda: lambda x: WrongForward.apply(A @ x) + x, X, [Way.TWICE]),
    "straight-through": (lambda: lambda x: Rounded.apply(A @ x) + x, X, [Way.TWICE]),
    "checkpoint": (lambda: lambda x: checkpoint(lambda t: torch.tanh(A @ t), x, use_reentrant=False), X, None),
    "reentrant checkpoint": (lambda: lambda x: checkpoint(torch.tanh, A @ x, use_reentrant=True) + x, X, [Way.TRACE]),
    "checkpointed sequence": (
        lambda: lambda x: checkpoint_sequential([torch.tanh, lambda t: A @ t], 2, x, use_reentrant=True),
        X,
        [Way.TRACE],
    ),
    "grid_sample": (
        lambda: lambda x: F.grid_sample(x, torch.tanh(GRID), align_corners=False) + torch.sin(x),
        MAP,
        None,
    ),
    "grid_sample at x": (
        lambda: lambda x: F.grid_sample(MAP, torch.tanh(x.reshape(1, 4, 4, 2)), align_corners=False),
        MAP,
        None,
    ),
    "deform_conv2d": (lambda: lambda x: deform_conv2d(x, 0.3 * OFFSETS, TAPS, padding=1) + x, MAP, [Way.ROWS]),
    "roi_align": (lambda: lambda x: roi_align(x, torch.tensor([[0, 0, 0, 3.0, 3.0]]).double(), 4), MAP, [Way.ROWS]),
    "cdist": (
        lambda: lambda x: torch.cdist(x.reshape(3, 2), torch.tanh(x).reshape(3, 2) + 1)[:, :2].flatten(),
        X,
        None,
    ),
    "sparse product": (lambda: lambda x: torch.sparse.mm(SPARSE, torch.tanh(x)[:, None])[:, 0] + x, X, None),
    "sparse rows": (lambda: lambda x: SPARSE.to_sparse_csr() @ torch.tanh(x), X, None),
    "embedding_bag": (lambda: lambda x: F.embedding_bag(torch.arange(6)[None], x.reshape(6, 1)) * x, X, None),
    "fake quantisation": (lambda: lambda x: torch.fake_quantize_per_tensor_affine(A @ x, 0.1, 0, -128, 127), X, None),
    "gradient inside": (lambda: descended, X, None),
    "equilibrium": (lambda: Equilibrium(False), X, [Way.ROWS]),
    "equilibrium, hook used once": (lambda: Equilibrium(True), X, [Way.ROWS]),
    "module with backward hooks": (hooked, X, [Way.TWICE]),
    "buffers in forward": (Counting, X, None),
    "spectral norm by data": (SpectralByData, X, None),
    "training batch norm": (lambda: nn.BatchNorm1d(2).double(), seeded((3, 2), 1), None),
    "several outputs": (lambda: lambda x: {"step": 3, "out": (torch.tanh(A @ x), x)}, X, None),
    "random, but seeded": (
        lambda: lambda x: torch.tanh(A @ x) * torch.randn(6, generator=torch.Generator().manual_seed(3)).double(),
        X,
        None,
    ),
    "linear solve": (lambda: lambda x: torch.linalg.solve(A + torch.diag(x), torch.sin(x)), X, [Way.TRANSFORMS]),
    "weight_norm": (normalised_by(nn.utils.weight_norm), X, None),
    "weight_norm, parametrised": (normalised_by(parametrizations.weight_norm), X, None),
    "spectral_norm": (normalised_by(nn.utils.spectral_norm), X, None),
    "spectral_norm, parametrised": (normalised_by(parametrizations.spectral_norm), X, None),
    "pruned": (normalised_by(pruned), X, None),
}


def descended(x):
    with torch.enable_grad():
        t = x if x.requires_grad else x.detach().requires_grad_()
        return x - torch.autograd.grad(torch.tanh(A @ t).square().sum(), t, create_graph=True)[0]


@functools.cache
def truth(name):
    build, x, _ = AUTOGRAD[name]
    return rows_by_autograd(build, x)


@pytest.mark.parametrize("name", AUTOGRAD)
def test_what_autograd_differentiates_has_its_jacobian(name):
    build, x, ways = AUTOGRAD[name]
    r, j = reduce_jacobian(build(), x, reduce=False), truth(name)
    scale = np.abs(j).max()
    assert ways is None or r.jacobian.way in ways
    assert (r.jacobian.way is Way.TRANSFORMS) == ("derivatives by" not in r.reason)
    assert np.allclose(r.columns(0, r.k).numpy(), j[r.index][:, r.index], rtol=0, atol=1e-12 * scale)
    t, c = seeded((3, r.n), 5), seeded((3, r.n), 6)
    assert np.allclose(r.jacobian.jvp(t), t @ j.T, rtol=0, atol=1e-11 * scale)
    assert np.allclose(r.jacobian.vjp(c), c @ j, rtol=0, atol=1e-11 * scale)
    reduced = reduce_jacobian(build(), x)
    values = reduced.shift + np.linalg.eigvals(reduced.columns(0, reduced.k).numpy()) if reduced.k else []
    assert_spectra_match(values, reduced.zeros, reduced.ones, np.linalg.eigvals(j))


SINGLE = ["old-style function", "differentiable once", "grid_sample", "cdist", "buffers in forward"]


@pytest.mark.parametrize("name", SINGLE)
def test_they_hold_in_single_precision(name):
    build, x, _ = AUTOGRAD[name]

    def f(t):
        return first(double(t.double())).float()

    double = build()
    r, j = reduce_jacobian(f, x.float(), reduce=False), truth(name)
    assert np.allclose(r.columns(0, r.k).numpy(), j[r.index][:, r.index], rtol=0, atol=1e-5 * np.abs(j).max())


def test_a_derivative_that_is_not_of_the_values_is_said():
    for name in ("straight-through", "fake quantisation", "buffers in forward"):
        build, x, _ = AUTOGRAD[name]
        assert ("its values change by something else" in reduce_jacobian(build(), x).reason) == (name[0] != "b")
    f = Linearisation(AUTOGRAD["old-style function"][0](), X)
    f.take(Way.TWICE)
    assert value_gap(f) <= 1e-8
    f.vjp = lambda rows: 1.001 * type(f).vjp(f, rows)
    assert value_gap(f) >= 5e-4


class Lopsided(Old):
    """A backward pass that is not linear."""

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x * x * g.abs()


class ForgetsInTwo(Old):
    """A backward pass that differentiated again gives half."""

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 1.5 * x * x * (g + g.detach())


class OnceAlone(Old):
    """A backward pass that is wrong for several cotangents at once."""

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x * x * g * (0.5 if torch._C._functorch.is_batchedtensor(g) else 1.0)


def test_wrong_products_are_not_taken():
    with pytest.raises(InputError, match="cannot be differentiated"):
        reduce_jacobian(lambda x: Lopsided.apply(A @ x), X)
    j = rows_by_autograd(lambda: lambda x: Old.apply(A @ x), X)
    for function, ways in ((ForgetsInTwo, [Way.TRACE]), (OnceAlone, list(Way))):
        r = reduce_jacobian(lambda x, function=function: function.apply(A @ x), X, reduce=False)
        assert r.jacobian.way in ways
        assert np.allclose(r.columns(0, 6).numpy(), j, rtol=0, atol=1e-12)
        assert np.allclose(r.jacobian.vjp(torch.eye(6).double()), j, rtol=0, atol=1e-12)


def state_of(module):
    tensors = {name: t.clone() for name, t in [*module.named_parameters(), *module.named_buffers()]}
    return tensors, {name: set(vars(m)) for name, m in module.named_modules()}


@pytest.mark.parametrize("name", ["buffers in forward", "spectral norm by data", "training batch norm", "weight_norm"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_modules_are_left_as_they_were(name, wrapped):
    build, x, _ = AUTOGRAD[name]
    module = build()
    tensors, attributes = state_of(module)
    f = functools.partial(lambda m, t: m(t), module) if wrapped else module
    r = reduce_jacobian(f, x)
    r.columns(0, r.k)
    after, same = state_of(module)
    assert all(torch.equal(tensors[key], t) for key, t in after.items())
    assert attributes == same
    assert getattr(module, "python_calls", 0) == 0
    try:
        assert not is_residual(f, x)
    except UntracedError:  # the graph has no place for what these do to their tensors
        assert name in ("buffers in forward", "spectral norm by data")


class Bound:
    def __init__(self, module):
        self.module = module

    def method(self, x):
        return self.module(x)

    def __call__(self, x):
        return self.module(x)


HELD = nn.Tanh()


def by_name(x):
    return HELD(x)


def test_modules_are_found_in_what_uses_them():
    module = nn.Tanh()
    inner = lambda x: module(x)  # noqa: E731
    for f in (module, module.forward, inner, lambda x: inner(x), Bound(module), Bound(module).method):
        assert module in list(modules_of(f)), f
    for f in (functools.partial(inner), lambda x, m=module: m(x), lambda x, *, ms=(module,): ms[0](x)):
        assert module in list(modules_of(f)), f
    assert HELD in list(modules_of(by_name))
    assert HELD in list(modules_of(lambda x: by_name(x)))
    assert list(modules_of(torch.tanh)) == []


def test_the_rows_of_a_jacobian_are_in_the_plan():
    f = AUTOGRAD["a function of numpy"][0]()
    r = reduce_jacobian(f, X)
    assert r.route is Route.FULL
    assert r.kernel_items * 3 >= r.n**2
    assert "held in memory" in r.reason


KINDS = ["old-style function before a relu", "reentrant checkpoint", "deform_conv2d", "grid_sample", "weight_norm"]


@pytest.mark.parametrize("name", KINDS)
def test_all_kinds_of_answers_come_from_them(name):
    build, x, _ = AUTOGRAD[name]
    j = truth(name)
    factors = open_factors(build(), x)
    assert factors.difference(factors.matrices(7)) <= 1e-11
    if x.dim() == 4:
        slices = open_slices(build(), x)
        traces = sum(np.einsum("acii->", squares.values) for squares in slices.squares(7))
        assert np.isclose(traces, np.einsum("acii->", j.reshape(-1, 2, 4, 4)), atol=1e-11)
    s = stiffcore.spectrum(build(), x, memory="3GiB")
    assert s.certificate.passed, s.verdict
    assert matched_distance(s.values, np.linalg.eigvals(j)) <= 1e-10


def test_a_branch_is_differentiated_as_its_block_is():
    inner = randomised(Basic(2))

    def f(x):
        return F.relu(x + deform_conv2d(inner(x), 0.3 * OFFSETS, TAPS, padding=1))

    by_hand = rows_by_autograd(lambda: lambda x: deform_conv2d(inner(x), 0.3 * OFFSETS, TAPS, padding=1), MAP)
    r = reduce_jacobian(f, MAP, BlockFunction.BRANCH)
    assert np.allclose(r.jacobian.vjp(torch.eye(32).double()), by_hand, rtol=0, atol=1e-11)
    # what a graph says of a custom function's derivative is its forward pass's: not taken where that is another one
    with pytest.raises(NoSpectrumError, match=r"do not add up|could not be traced"):
        reduce_jacobian(lambda x: x + Rounded.apply(A @ x), X, BlockFunction.BRANCH)


def test_compiled_modules_are_run_as_they_were_written():
    torch.manual_seed(0)
    linear = nn.Linear(6, 6).double()
    plain = nn.Sequential(linear, nn.Tanh())
    compiled = nn.Sequential(torch.compile(copy.deepcopy(linear), backend="aot_eager"), nn.Tanh())
    whole = copy.deepcopy(plain)
    whole.compile(backend="aot_eager")
    expected = reduce_jacobian(plain, X)
    for f in (compiled, whole, torch.compile(lambda x: plain(x), backend="aot_eager")):
        r = reduce_jacobian(f, X)
        assert "not traced" not in r.reason
        assert torch.equal(r.columns(0, 6), expected.columns(0, 6))


COMPLEX = {
    "fourier": lambda x: torch.fft.irfft(torch.fft.rfft(x) * torch.tensor([1 + 0.5j, 2 - 1j, 0.3j, 1.0]), n=6),
    "absolute value": lambda x: (x * (1 + 2j) + 1j).abs(),
    "cast, then absolute value": lambda x: (x.to(torch.cdouble) * (1 + 2j)).abs() + x,
    "exponential": lambda x: torch.exp(1j * (A @ x)).real,
    "product": lambda x: ((A + 1j * A.T) @ x.to(torch.cdouble)).imag,
    "conjugate": lambda x: (torch.fft.fft(x) * torch.fft.fft(A @ x).conj()).real,
    "rotation": lambda x: torch.view_as_real(torch.view_as_complex(x.reshape(3, 2)) * (0.6 + 0.8j)).flatten(),
    "solve": lambda x: torch.linalg.solve(A + 1j * torch.diag(x), x.to(torch.cdouble)).real,
    "map": lambda x: (x.reshape(1, 1, 2, 3) * (1 + 2j)).abs().flatten(),
}


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_numbers_inside_are_differentiated_by_their_parts(name):
    f = COMPLEX[name]
    r = reduce_jacobian(f, X, reduce=False)
    steps = 1e-6 * torch.eye(6).double()
    quotients = torch.stack([(f(X + h) - f(X - h)) / 2e-6 for h in steps], dim=1)
    assert torch.allclose(r.jacobian.jvp(torch.eye(6).double()).T, quotients, atol=1e-7)
    assert torch.allclose(r.jacobian.vjp(torch.eye(6).double()), quotients, atol=1e-7)


def test_a_derivative_that_torch_has_wrong_is_refused():
    """torch.polar of negative lengths, in reverse mode (torch 2.14)."""
    with pytest.raises(InputError, match="disagree"):
        reduce_jacobian(lambda x: torch.polar(x, A @ x).imag, X)
