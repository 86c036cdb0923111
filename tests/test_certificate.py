"""Claims about trust: the error estimates bound the true errors, and what is wrong does not pass."""

import dataclasses
import json
from functools import cache

import mpmath
import numpy as np
import pytest
import torch

from stiffcore.eigen import dense
from stiffcore.eigen.certificate import Moments, certify, matrix_moments
from stiffcore.eigen.inclusion import FULL_ORDER
from stiffcore.jacobian.reduction import Route, reduce_jacobian
from stiffcore.spectra import CERTIFIED_MOST, Certificate, certified_choice

DTYPES = [np.float64, np.float32]
# Bounds of first order, from norms that are themselves computed.
FACTOR = 3


def reduction_of(a):
    weight = torch.as_tensor(np.ascontiguousarray(a))
    reduction = reduce_jacobian(lambda x: x @ weight.T, torch.zeros(len(a), dtype=weight.dtype), reduce=False)
    assert reduction.route is Route.FULL
    return reduction


def solve(a):
    """Values, the chosen and their vectors, and moments, as a unit finds them."""
    a = np.asfortranarray(a)
    moments = matrix_moments(a)
    h = dense.to_hessenberg(a.copy(order="F"))
    values = dense.hessenberg_eigenvalues(dataclasses.replace(h, a=h.a.copy(order="F")))
    chosen = certified_choice(values, 0)
    return h, values, chosen, moments


def certificate_of(a, spoil=None):
    h, values, chosen, moments = solve(a)
    vectors = dense.hessenberg_eigenvectors(h, values[chosen])
    if spoil is not None:
        values = spoil(values, chosen)
        if len(values) != len(a):
            chosen = certified_choice(values, 0)
            vectors = dense.hessenberg_eigenvectors(h, values[chosen])
    return certify(reduction_of(a), values, chosen, vectors, moments)


@cache
def truth(shape, data):
    """Eigenvalues to 40 digits, as complex128."""
    a = np.frombuffer(data).reshape(shape)
    with mpmath.workdps(40):
        values = mpmath.eig(mpmath.matrix(a.tolist()), left=False, right=False)
    return np.array([complex(v) for v in values])


def exact_eigenvalues(a):
    return truth(a.shape, a.astype(float).tobytes())


def random_matrix(seed, k, dtype):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((k, k)) / np.sqrt(k)
    kind = seed % 4
    if kind == 1:  # far from normal
        a = np.triu(a, 1) * 10 + np.diag(rng.standard_normal(k))
        q = np.linalg.qr(rng.standard_normal((k, k)))[0]
        a = q @ a @ q.T
    elif kind == 2:  # rows of very different size, which balancing evens out
        d = 10.0 ** rng.uniform(-3, 3, k)
        a = a * d[:, None] / d
    elif kind == 3:  # of low rank: many eigenvalues 0
        a = rng.standard_normal((k, 3)) @ rng.standard_normal((3, k)) / k + np.eye(k) * 0.3
    return a.astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_no_eigenvalue_is_further_off_than_its_error_estimate(dtype, scale):
    for seed in range(8 if scale == 1 else 4):
        a = (random_matrix(seed, 9, dtype) * dtype(scale)).astype(dtype)
        exact, found = exact_eigenvalues(a), certificate_of(a)
        assert found.passed, (seed, found.failures)
        for c in found.certified:
            true_error = np.abs(exact - c.value).min()
            assert true_error <= FACTOR * c.error, (seed, c, true_error)
            assert c.condition >= 1 - 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_s_is_not_further_off_than_its_error_estimate(dtype):
    checked = 0
    for seed in range(8):
        a = random_matrix(seed, 9, dtype)
        exact, found = exact_eigenvalues(a).real, certificate_of(a)
        values = solve(a)[1].real.astype(float)
        s_true, s = exact.max() / exact.min(), values.max() / values.min()
        assert abs(s - s_true) <= FACTOR * found.s_error + 1e-12 * abs(s)
        assert found.s_error == found.s_active_error  # no structural zeros here
        checked += found.s_error < 1e-2 * abs(s)
    assert checked >= 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-16, 1e-12, 1.0, 1e12])
@pytest.mark.parametrize("k", [3, 40])
def test_a_correct_spectrum_passes_whatever_its_scale(dtype, scale, k):
    for seed in range(4):
        found = certificate_of((random_matrix(seed, k, dtype) * dtype(scale)).astype(dtype))
        assert found.passed, (seed, found.failures)


def nudged(relative):
    def spoil(values, chosen):
        values = values.copy()
        values[chosen[-1]] += relative * np.abs(values).max()
        return values

    return spoil


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-16, 1e-12, 1.0, 1e12])
def test_a_corrupted_eigenvalue_fails_whatever_its_scale(dtype, scale):
    # float32 residuals are trusted to 2e-3 of the scale
    amount = 1e-3 if dtype == np.float64 else 2e-2
    for seed in (0, 1, 3) if dtype == np.float32 else range(4):  # 2 has eigenvalues far below its norm
        a = (random_matrix(seed, 30, dtype) * dtype(scale)).astype(dtype)
        failures = certificate_of(a, nudged(amount)).failures
        assert any("residual" in line for line in failures), (seed, failures)
        if dtype == np.float64:
            assert any("trace" in line for line in failures)


def test_a_corrupted_eigenvalue_that_was_not_chosen_fails_by_the_traces():
    def spoil(values, chosen):
        values = values.copy()
        values[next(i for i in range(len(values)) if i not in chosen)] += 1e-3
        return values

    failures = certificate_of(random_matrix(0, 30, np.float64), spoil).failures
    assert [("residual" in line) for line in failures] == [False, False]


def dropped(values, chosen):
    return np.delete(values, len(values) // 2)


def duplicated(values, chosen):
    values = values.copy()
    values[len(values) // 2] = values[len(values) // 2 - 3]
    return values


def twice(values, chosen):
    return np.insert(values, 0, values[0])


@pytest.mark.parametrize("spoil", [dropped, duplicated, twice])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_lost_or_doubled_eigenvalue_fails_by_the_traces(spoil, dtype):
    for seed in (0, 1, 4):
        failures = certificate_of(random_matrix(seed, 30, dtype), spoil).failures
        assert any("trace" in line for line in failures), (seed, failures)


def test_a_lost_eigenvalue_zero_is_missed_by_the_traces_but_not_by_the_count():
    a = np.diag([0.0, 1.0, 2.0])
    failures = certificate_of(a, lambda values, chosen: values[1:]).failures
    assert failures == ("there are 2 eigenvalues of a matrix of order 3",)


def test_conjugates_exchanged_for_their_real_parts_fail():
    a = np.array([[0.0, 1.0], [-1.0, 0.0]])
    assert certificate_of(a).passed
    failures = certificate_of(a, lambda values, chosen: values.real + 0j).failures
    assert any("square" in line for line in failures)


def test_nan_fails():
    failures = certificate_of(np.eye(3), lambda values, chosen: values * np.nan).failures
    assert any("trace" in line for line in failures)
    assert any("residual" in line for line in failures)


def test_a_nilpotent_matrix_passes_the_traces():
    rng = np.random.default_rng(0)
    u = rng.standard_normal(40)
    v = rng.standard_normal(40)
    v -= u * (u @ v) / (u @ u)
    found = certificate_of(np.outer(u, v))
    assert not [line for line in found.failures if "trace" in line or "square" in line]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0, 1, 31, 32, 33, 100])
def test_moments_are_numpys(dtype, k):
    a = np.asfortranarray(np.random.default_rng(k).standard_normal((k, k)).astype(dtype))
    found, wide = matrix_moments(a), a.astype(float)
    assert found.trace == pytest.approx(np.trace(wide), abs=1e-12 * max(k, 1))
    assert found.trace_square == pytest.approx(np.trace(wide @ wide), abs=1e-12 * max(k, 1) ** 2)
    assert found.frobenius == pytest.approx(np.linalg.norm(wide), rel=1e-13)
    assert all(type(v) is float for v in dataclasses.astuple(found))


def test_moments_take_no_second_matrix():
    import tracemalloc

    a = np.ones((1500, 1500), np.float32, order="F")
    tracemalloc.start()
    matrix_moments(a)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < a.nbytes / 5


def test_near_axis_counts_what_may_be_zero():
    rng = np.random.default_rng(1)
    q = rng.standard_normal((12, 12))
    values = np.array([-1, -0.5, 0, 0, 1e-17, -1e-17, 0.25, 0.5, 0.75, 1, 1.5, 2])
    a = q @ np.diag(values) @ np.linalg.inv(q)
    h, computed, chosen, moments = solve(a)
    found = certify(reduction_of(a), computed, chosen, dense.hessenberg_eigenvectors(h, computed[chosen]), moments)
    assert found.near_axis >= 4
    assert found.axis_error >= np.abs(computed.real[np.argsort(np.abs(computed))[:4]]).max()
    assert certificate_of(np.diag([1.0, 2.0, -3.0])).near_axis == 0
    assert certificate_of(np.diag([0.0, 2.0, -3.0])).near_axis == 1


def test_a_count_in_another_way_must_agree_but_for_what_may_be_zero():
    def failures(values, right):
        a = np.diag(values)
        h, computed, chosen, moments = solve(a)
        vectors = dense.hessenberg_eigenvectors(h, computed[chosen])
        return certify(reduction_of(a), computed, chosen, vectors, moments, right=right).failures

    values = np.array([-3.0, -1, 0.5, 1, 2])
    assert failures(values, 3) == failures(values, None) == ()
    for wrong in (2, 4):
        assert "3 real parts are positive, but the division counted" in " ".join(failures(values, wrong))
    values[2] = 1e-17
    assert failures(values, 2) == failures(values, 3) == ()
    assert failures(values, 4)


def test_float32_is_not_read_below_its_rounding():
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
    found = certificate_of((q @ np.diag([1e-9, 1, 2]) @ q.T).astype(np.float32))
    assert found.near_axis == 1
    assert found.negative == (0, 1)
    assert 0 < found.axis_error < 1e-6


def test_selection_takes_extremes_and_the_nearest_to_the_axis():
    rng = np.random.default_rng(0)
    real = rng.permutation(np.linspace(-3.05, 4, 101))
    values = dense.sort_eigenvalues(np.concatenate([real + 1j * np.abs(real), real - 1j * np.abs(real)]))
    for shift in (0, 1):
        chosen = certified_choice(values, shift)
        assert np.array_equal(chosen, np.unique(chosen))
        assert (values[chosen].imag >= 0).all()
        order = np.sort(real)
        nearest = real[np.argsort(np.abs(real + shift))]
        sides = {*nearest[nearest + shift < 0][:3], *nearest[nearest + shift > 0][:3]}
        assert set(values[chosen].real) == {*order[:3], *order[-3:], *nearest[:8], *sides}
        assert len(chosen) <= CERTIFIED_MOST


def test_a_defective_cluster_behind_simple_eigenvalues_near_the_axis_is_not_read_as_signs():
    rng = np.random.default_rng(3)
    q = np.linalg.qr(rng.standard_normal((24, 24)))[0]
    jordan = np.diag(np.r_[np.zeros(8), 1e-13, -1e-13, 2e-13, np.linspace(1, 3, 13)])
    jordan[np.arange(7), np.arange(1, 8)] = 1  # the eigenvalue 0, eight times in one block, scatters to |l| = 0.01
    assert certificate_of(q @ jordan @ q.T).near_axis >= 8


@pytest.mark.parametrize("k", [0, 1, 2, 3, 5])
def test_selection_of_few_values_takes_each_once(k):
    values = np.arange(k) + 0j
    chosen = certified_choice(values, 1)
    assert chosen.tolist() == list(range(k))
    assert chosen.dtype.kind == "i"


@pytest.mark.parametrize("dtype", DTYPES)
def test_order_1(dtype):
    for value in (3.0, -1e-9, 0.0):
        found = certificate_of(np.array([[value]], dtype))
        assert found.passed
        assert [c.value for c in found.certified] == [complex(dtype(value))]
        assert found.s_error == pytest.approx(0, abs=1e-5)


def relu_block(inactive):
    """A residual block that ReLU holds at zero in all but one place: nothing to solve, for a dead branch."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(5, 3, dtype=torch.float64)
            self.outer = torch.nn.Linear(3, 5, dtype=torch.float64)
            with torch.no_grad():
                self.inner.bias.fill_(-100.0 if inactive else 100.0)
                self.outer.bias.copy_(torch.tensor([1000.0, -1000.0, 1000.0, 1000.0, 1000.0]))
                self.outer.weight.mul_(0.1)

        def forward(self, x):
            return torch.relu(self.outer(torch.relu(self.inner(x))) + x)

    torch.manual_seed(0)
    return Block().eval().requires_grad_(False)


def test_order_0_is_certified_by_what_is_exact():
    reduction = reduce_jacobian(relu_block(inactive=True), torch.ones(1, 5, dtype=torch.float64))
    assert (reduction.k, reduction.ones, reduction.zeros) == (0, 4, 1)
    values = np.empty(0, complex)
    found = certify(reduction, values, certified_choice(values, reduction.shift), None, Moments(0.0, 0.0, 0.0))
    assert found.passed
    assert (found.error, found.near_axis, found.s_error, found.s_active_error) == (0, 0, 0, 0)
    assert Certificate.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found


def test_a_reduced_block_is_certified_on_the_original():
    reduction = reduce_jacobian(relu_block(inactive=False), torch.ones(1, 5, dtype=torch.float64))
    assert (reduction.route, reduction.shift) == (Route.WAIST, 1)
    h, values, chosen, moments = solve(reduction.columns(0, reduction.k).numpy())
    vectors = dense.hessenberg_eigenvectors(h, values[chosen])
    found = certify(reduction, values, chosen, vectors, moments)
    assert found.passed
    assert found.s_error == 0  # the structural zero is the minimum, and exact
    exact = np.linalg.eigvals(reduction.jacobian.jvp(torch.eye(5, dtype=torch.float64)).numpy().T)
    for c in found.certified:
        assert np.abs(exact - c.value).min() <= FACTOR * c.error + 1e-15
    bad = certify(reduction, values + 1e-3, chosen, vectors, moments)
    assert any("residual" in line for line in bad.failures)


def grcar(n):
    return sum(np.eye(n, k=d) for d in range(4)) - np.eye(n, k=-1)


def grcar_eigenvalue(n, near):
    """The eigenvalue nearest to a close guess: Newton's method in 80 digits on the characteristic polynomial.

    With p_n = det(G_n - l I), expanding the last column gives p_n = (1 - l) p_(n-1) + p_(n-2) + p_(n-3) + p_(n-4).
    """
    with mpmath.workdps(80):
        value = mpmath.mpc(near)
        for _ in range(60):
            p, dp = [0, 0, 0, mpmath.mpc(1)], [0, 0, 0, mpmath.mpc(0)]
            for _ in range(n):
                p.append((1 - value) * p[-1] + p[-2] + p[-3] + p[-4])
                dp.append((1 - value) * dp[-1] - p[-2] + dp[-2] + dp[-3] + dp[-4])
            step = p[-1] / dp[-1]
            value -= step
            if abs(step) < mpmath.mpf(10) ** -40:
                return complex(value)
    raise AssertionError(near)


def test_a_far_from_normal_matrix_has_large_and_honest_errors():
    a = grcar(60)
    found = certificate_of(a)
    exact = np.array([grcar_eigenvalue(60, v) for v in np.linalg.eigvals(a)])
    assert len(np.unique(exact.round(10))) == 60
    errors = np.array([c.error for c in found.certified])
    assert errors.max() > 1e-12
    for c in found.certified:
        assert np.abs(exact - c.value).min() <= FACTOR * c.error
    assert max(c.condition for c in found.certified) > 1e3
    in_float32 = certificate_of(a.astype(np.float32))
    assert in_float32.error > found.error
    for c in in_float32.certified:
        assert np.abs(exact - c.value).min() <= FACTOR * c.error


def test_a_defective_eigenvalue_has_an_honest_error():
    q = np.linalg.qr(np.random.default_rng(3).standard_normal((6, 6)))[0]
    a = q @ (np.diag(np.full(6, 2.0)) + np.eye(6, k=1)) @ q.T
    found = certificate_of(a)
    for c in found.certified:
        # first order is no bound here, but it must not promise what it cannot know
        assert c.condition > 1e6 or abs(c.value - 2) < 1e-9


def test_a_singular_matrix_has_honest_errors_too():
    for seed in range(6):
        q = np.random.default_rng(seed).standard_normal((20, 20))
        a = q @ np.diag([0.0, *np.linspace(1, 3, 19)]) @ np.linalg.inv(q)
        right, left = q[:, 0], np.linalg.inv(q)[0]
        condition = np.linalg.norm(right) * np.linalg.norm(left)
        found = min(certificate_of(a).certified, key=lambda c: abs(c.value))
        assert abs(found.value) < 1e-10
        assert found.condition == pytest.approx(condition, rel=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_certificate_is_plain_json_whatever_the_dtype(dtype):
    for a in (random_matrix(0, 6, dtype), np.zeros((3, 3), dtype), np.diag([0, 1, 2]).astype(dtype)):
        found = certificate_of(a)
        text = json.dumps(found.to_json(), allow_nan=False)
        assert repr(Certificate.from_json(json.loads(text))) == repr(found)


def test_an_end_that_was_not_certified_has_no_error_bound_beyond_the_orders_that_are_located():
    for k, known in ((FULL_ORDER, True), (FULL_ORDER + 1, False)):
        a = np.diag(np.linspace(1.0, 20, k))
        _, values, chosen, moments = solve(a)
        vectors = np.eye(k, dtype=complex)[:, chosen[2:-2]]
        some = dense.Eigenvectors(vectors, vectors, np.ones(len(chosen) - 4, bool))
        found = certify(reduction_of(a), values, chosen[2:-2], some, moments)
        assert (found.s_error < 1e-9) == known
        assert (found.s_error == np.inf) != known
    json.dumps(found.to_json(), allow_nan=False)


def test_zeros_of_a_singular_reduced_matrix_leave_the_rest_its_digits():
    # of rank 3 between two waists: M is singular, and J has 0 as a defective eigenvalue
    rng = np.random.default_rng(5)
    narrow, widen = (torch.as_tensor(rng.standard_normal(s)) for s in ((12, 40), (40, 12)))
    middle = torch.as_tensor(rng.standard_normal((12, 3)) @ rng.standard_normal((3, 12)) / 6)
    x = torch.as_tensor(rng.standard_normal((1, 40)))

    def branch(x):
        return torch.relu(torch.relu(x @ narrow.T + 50) @ middle.T + 1000) @ widen.T

    reduction = reduce_jacobian(branch, x)
    a = reduction.columns(0, reduction.k).numpy()
    assert reduction.route is Route.WAIST
    assert np.linalg.matrix_rank(a) == 3 < reduction.k
    h, values, chosen, moments = solve(a)
    found = certify(reduction, values, chosen, dense.hessenberg_eigenvectors(h, values[chosen]), moments)
    assert found.passed
    assert found.near_axis == reduction.k - 3
    assert found.s_active_error < 1e-9
    exact = np.linalg.eigvals(torch.func.jacrev(branch)(x).reshape(40, 40).numpy())
    for c in found.certified:
        if abs(c.value) > 1e-9:  # the others are defective in J: exact scatters
            assert np.abs(exact - c.value).min() <= FACTOR * c.error


def test_selection_looks_past_many_zeros():
    values = dense.sort_eigenvalues(np.r_[np.linspace(-1e-17, 1e-17, 40), -1e-9, 1e-9, np.linspace(1, 3, 20)] + 0j)
    chosen = set(values[certified_choice(values, 0)].real)
    assert {-1e-9, 1e-9} <= chosen
    assert sum(abs(v) < 1e-16 for v in chosen) == 8 + 2  # nearest, and of the smallest
