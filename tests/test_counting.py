"""Claims about counts: never a wrong one; and bounds that hold against dense truth."""

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from stiffcore.eigen import counting, numerical_range, sparse
from stiffcore.eigen.counting import Count, count_left, count_outside_disc
from stiffcore.eigen.extremes import extremes
from stiffcore.errors import InputError
from tests.test_extremes import dense_eigenvalues, normal_spread, planted


@pytest.fixture(autouse=True)
def one_thread():
    with threadpool_limits(1):
        yield


@pytest.fixture
def sparse_always(monkeypatch):
    """Small matrices take the way of large ones: as few Lanczos steps as there is room for prove nothing, so 30."""
    for module in (sparse, numerical_range, counting):
        monkeypatch.setattr(module, "DENSE_ORDER", 30)
    monkeypatch.setattr(numerical_range, "SUPPORT_STEPS", 60)


def grcar(k):
    return sp.diags_array([-1.0, 1, 1, 1, 1], offsets=[-1, 0, 1, 2, 3], shape=(k, k)).tocsc()


def advection_diffusion(k, peclet):
    return sp.diags_array([-1 - peclet, 2.0, -1 + peclet], offsets=[-1, 0, 1], shape=(k, k)).tocsc()


def convolution_like(side, channels, gain, seed=0):
    """I + M as a residual block has it: 3 x 3 neighbourhoods, position by position, nearly normal to far from it."""
    rng = np.random.default_rng(seed)
    line = sp.diags_array([1.0, 1, 1], offsets=[-1, 0, 1], shape=(side, side))
    near = sp.coo_array(sp.kron(sp.kron(line, line), np.ones((channels, channels))))
    near.data = gain * rng.standard_normal(near.nnz) / np.sqrt(9 * channels)
    return sp.csc_array(near + sp.eye_array(side * side * channels))


def assert_true(count: Count, a, counted):
    """None, or the dense count, with no dense eigenvalue inside the margin (but for rounding)."""
    values = dense_eigenvalues(a)
    if count.count is None:
        assert count.basis == "open"
        assert count.margin == 0
        assert count.note
        return
    assert count.count == int(counted(values).sum())
    assert count.margin > 0


def assert_left(count, a, threshold):
    assert_true(count, a, lambda values: values.real < threshold)
    if count.count is not None and a.shape[0]:
        condition = np.linalg.cond(np.linalg.eig(a.toarray() if sp.issparse(a) else a)[1])
        distance = np.abs(dense_eigenvalues(a).real - threshold).min()
        norm = np.linalg.norm(a.toarray() if sp.issparse(a) else a)
        assert distance >= count.margin * (1 - 1e-6) - 1e-14 * min(condition, 1e12) * norm


def assert_outside(count, a, centre, radius):
    assert_true(count, a, lambda values: np.abs(values - centre) > radius)


@st.composite
def small_matrices(draw, orders):
    k = draw(orders)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["normal", "triangular", "jordan", "integer", "symmetric", "skew", "diagonal"]))
    a = rng.standard_normal((k, k)) / np.sqrt(max(k, 1))
    if kind == "triangular":
        a = np.triu(10 * a) + np.diag(rng.uniform(-1, 1, k)) - np.diag(np.diag(10 * a))
    elif kind == "jordan":
        a = np.diag(np.ones(max(k - 1, 0)), 1)[:k, :k] + 0.1 * np.eye(k)
    elif kind == "integer":
        a = rng.integers(-1, 2, (k, k)).astype(float)
    elif kind == "symmetric":
        a = a + a.T
    elif kind == "skew":
        a = a - a.T + 0.5 * np.eye(k)
    elif kind == "diagonal":
        a = np.diag(rng.integers(-2, 3, k).astype(float))
    return draw(st.sampled_from([1.0, 1.0, 1e-8, 1e8])) * a


def drawn_threshold(data, a):
    values = dense_eigenvalues(a)
    scale = np.abs(values).max(initial=0.0) or 1.0
    near = data.draw(st.sampled_from([0.0, 1e-14, -1e-14, 1e-6, -1e-6, 0.1, -0.1]))
    at = data.draw(st.sampled_from([0.0, *values.real[:3].tolist()])) if len(values) else 0.0
    return at + near * scale


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_small_count_is_never_wrong(data):
    a = data.draw(small_matrices(st.integers(0, 12)))
    threshold = drawn_threshold(data, a)
    values = dense_eigenvalues(a)
    count = count_left(a, threshold)
    # where a dense eigenvalue is within its own error of the line, the dense count is no truth
    moved = [np.linalg.eigvals(a + 1e-14 * np.linalg.norm(a) * e) for e in np.random.default_rng(0).choice([-1.0, 1], (4, *a.shape))]
    if count.count is not None:
        assert count.count in {int((v.real < threshold).sum()) for v in [values, *moved]}
        assert all(np.abs(v.real - threshold).min(initial=np.inf) > 0 for v in [values])
    radius = abs(threshold) or 1.0
    assert_outside(count_outside_disc(a, threshold, radius), a, threshold, radius)


@given(st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[])
def test_a_count_by_discs_is_never_wrong(data):
    with pytest.MonkeyPatch.context() as patch, threadpool_limits(1):
        sparse_always.__wrapped__(patch) if hasattr(sparse_always, "__wrapped__") else None
        for module in (sparse, numerical_range, counting):
            patch.setattr(module, "DENSE_ORDER", 30)
        patch.setattr(counting, "MOST_DISCS", 60)
        a = data.draw(small_matrices(st.integers(95, 110)))
        threshold = drawn_threshold(data, a)
        assert_true(count_left(a, threshold), a, lambda values: values.real < threshold)
