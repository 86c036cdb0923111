"""Claims about counts: never a wrong one; and bounds that hold against dense truth."""

import tracemalloc
from dataclasses import replace

import mpmath
import numpy as np
import pytest
import scipy.linalg
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator
from threadpoolctl import threadpool_limits

from stiffcore.eigen import counting, deflation, discs, numerical_range, powers, sparse
from stiffcore.eigen.counting import count_left, count_outside_disc
from stiffcore.eigen.extremes import extremes
from stiffcore.eigen.regions import LeftOf, OutsideOf
from stiffcore.errors import InputError
from tests.test_extremes import dense_eigenvalues, normal_spread, planted


@pytest.fixture(autouse=True)
def one_thread():
    with threadpool_limits(1):
        yield


@pytest.fixture
def few_are_dense(monkeypatch):
    """Matrices of order 100 take the way of large ones."""
    make_few_dense(monkeypatch)


@pytest.fixture
def no_powers(monkeypatch):
    """Counts that powers would prove are left to the numerical range and to discs."""
    monkeypatch.setattr(powers, "MOST_POWER", 0)


@pytest.fixture
def no_deflation(monkeypatch):
    """Counts that Arnoldi and powers of the rest would prove are left to discs."""
    monkeypatch.setattr(counting, "count_beyond", lambda *_: None)


def make_few_dense(patch):
    for module in (sparse, numerical_range, counting):
        patch.setattr(module, "DENSE_ORDER", 30)
    patch.setattr(numerical_range, "SUPPORT_STEPS", 60)


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


def dense_counts(a, counted):
    """What dense solvers count on matrices a few roundings from this one; where they differ, what many digits count."""
    rng = np.random.default_rng(0)
    shaken = [a + 1e-15 * np.linalg.norm(a) * rng.choice([-1.0, 1.0], a.shape) for _ in range(4)]
    found = {sum(map(counted, np.linalg.eigvals(m))) for m in [a, *shaken]}
    return found if len(found) == 1 else {exact_count(a, counted)}


def exact_count(a, counted):
    """For the very numbers in `a`, with many digits: 300 leave 25 of a twelvefold eigenvalue.

    For large orders, where all digits would take 90 s, two-sided Rayleigh quotients of dense eigenvectors, whose error
    is the product of both vectors' errors (Parlett, The Symmetric Eigenvalue Problem, and Ostrowski for any matrix).
    """
    with mpmath.workdps(300 if len(a) <= 12 else 30):
        if len(a) <= 12:
            return sum(map(counted, mpmath.eig(mpmath.matrix(a.tolist()), left=False, right=False)))
        digits = np.vectorize(mpmath.mpmathify, otypes=[object])
        _, left, right = scipy.linalg.eig(a, left=True)
        left, right = digits(left.conj()), digits(right)
        return sum(map(counted, (left * (digits(a) @ right)).sum(axis=0) / (left * right).sum(axis=0)))


@pytest.mark.parametrize("k", [12, 40])
def test_many_digits_tell_what_dense_solvers_do_not(k):
    rng = np.random.default_rng(k)
    a = rng.standard_normal((k, k))
    skew = a - a.T + 0.5 * np.eye(k)  # every real part is 0.5
    below, above = np.nextafter(0.5, 0), np.nextafter(0.5, 1)
    assert [exact_count(skew, lambda v, at=at: v.real < at) for at in (below, above)] == [0, k]
    assert len({int((np.linalg.eigvals(m).real < below).sum()) for m in (skew, skew.T, skew + 1e-15 * a)} | {0}) > 1


def test_an_exact_real_part_is_told_from_a_threshold_a_rounding_away():
    # its symmetric part is 0.5 I to the last bit, which dense solvers do not see
    a = np.array([[0.5, -0.64823182, -0.05285096], [0.64823182, 0.5, -0.12301217], [0.05285096, 0.12301217, 0.5]])
    count = count_left(a, 0.49999999999999967)
    assert (count.count, count.basis) == (0, "proved: numerical range")
    assert 0 < count.margin <= 0.5 - 0.49999999999999967
    assert dense_counts(a, lambda v: v.real < 0.49999999999999967) == {0}


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_small_count_is_never_wrong(data):
    a = data.draw(small_matrices(st.integers(0, 12)))
    threshold = drawn_threshold(data, a)
    left = count_left(a, threshold)
    if left.count is not None:
        assert {left.count} == dense_counts(a, lambda v: v.real < threshold)
        assert left.margin > 0
    radius = abs(threshold) or 1.0
    outside = count_outside_disc(a, threshold, radius)
    if outside.count is not None:
        assert {outside.count} == dense_counts(a, lambda v: abs(v - threshold) > radius)


@given(st.data())
@settings(max_examples=6, deadline=None)
def test_a_count_by_search_is_never_wrong(data):
    with pytest.MonkeyPatch.context() as patch:
        make_few_dense(patch)
        patch.setattr(discs, "MOST_DISCS", 60)
        if data.draw(st.booleans()):
            patch.setattr(powers, "MOST_POWER", 0)
        if data.draw(st.booleans()):
            patch.setattr(counting, "count_beyond", lambda *_: None)
        a = data.draw(small_matrices(st.integers(101, 170)))
        threshold = drawn_threshold(data, a)
        left = count_left(a, threshold)
        if left.count is not None:
            assert {left.count} == dense_counts(a, lambda v: v.real < threshold)
        outside = count_outside_disc(a, threshold, abs(threshold) or 1.0)
        if outside.count is not None:
            assert {outside.count} == dense_counts(a, lambda v: abs(v - threshold) > (abs(threshold) or 1.0))


@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e8])
def test_the_numerical_range_decides_a_diffusion(scale, no_powers):
    a = scale * advection_diffusion(500, 0.3)
    left = count_left(a, 0.0)
    assert (left.count, left.basis, left.computed) == (0, "proved: numerical range", False)
    smallest = 2 - 2 * np.cos(np.pi / 501)
    # the symmetric part is the Laplacian
    assert 0 < left.margin <= smallest * scale
    right = count_left(a, 4.1 * scale)
    assert (right.count, right.basis) == (500, "proved: numerical range")


@pytest.mark.parametrize("distance", [1e-6, -1e-6, 1e-2])
@pytest.mark.parametrize("by", ["power", "discs"])
def test_a_planted_eigenvalue_is_counted_on_its_side(distance, by, request):
    if by == "discs":
        request.getfixturevalue("no_deflation")
    a = planted(300, [[-0.7, 0.4, 0], [-0.4, -0.7, 0], [0, 0, distance]])
    count = count_left(a, 0.0)
    assert count.count == (3 if distance < 0 else 2)
    assert count.basis == "proved: found and deflated"
    assert by in count.note
    assert count.computed
    assert 0 < count.margin <= abs(distance) * (1 + 1e-6)


def test_a_multiple_eigenvalue_and_a_jordan_block_are_counted_in_full():
    a = planted(300, np.diag([-0.5, -0.5, -0.5]) + np.diag([0.3, 0], 1))
    count = count_left(a, 0.0)
    assert count.count in (3, None)
    b = planted(300, np.diag([-0.5, -0.5]))
    assert count_left(b, 0.0).count in (2, None)


def test_discs_decide_where_the_numerical_range_does_not(no_powers, no_deflation):
    a = planted(300, [[0.5, 3.0], [0.0, 0.6]])
    assert numerical_range.numerical_range_end(a).value < 0
    count = count_left(a, 0.0)
    assert count.count == 0
    assert count.basis in ("proved: discs", "proved: found and deflated")


def spread_right_of(k, distance, coupling, seed):
    """Triangular in a random order: real parts from `distance` on, as far from normal as the coupling makes it."""
    rng = np.random.default_rng(seed)
    values = np.concatenate([[distance], rng.uniform(max(distance, 0.2), 2, k - 1)])
    a = np.diag(values) + np.triu(rng.standard_normal((k, k)), 1) * coupling / np.sqrt(k)
    order = rng.permutation(k)
    return sp.csc_array(a[order][:, order])


@given(
    st.integers(101, 160),
    st.sampled_from([-0.3, -1e-3, 1e-9, 1e-3, 0.05, 0.3]),
    st.floats(0, 3),
    st.integers(0, 10**6),
    st.sampled_from([1.0, 1e-8, 1e8]),
)
@settings(max_examples=40, deadline=None)
def test_a_power_never_proves_more_than_is_true(k, distance, coupling, seed, scale):
    rng = np.random.default_rng(seed)
    a = powers.Operator.of(scale * spread_right_of(k, distance, coupling, seed), rng)
    found = powers.margin_right_of(a, 0.0, rng)
    if found is not None:
        assert 0 < found.margin <= distance * scale * (1 + 1e-9)
    left = powers.margin_right_of(a.negative(), -2.5 * scale, rng)
    if left is not None:
        assert 0 < left.margin <= (2.5 - max(2.0 * (1 - 0.5), distance)) * scale
    inside = powers.margin_inside(a, scale, 1.05 * scale, rng)
    if inside is not None:
        assert 0 < inside.margin <= (1.05 - abs(distance - 1)) * scale * (1 + 1e-9)


def test_powers_decide_where_the_numerical_range_does_not():
    a = spread_right_of(400, 0.2, 1.5, 0)
    assert numerical_range.numerical_range_end(a).value < -0.1
    count = count_left(a, 0.0)
    assert (count.count, count.basis, count.computed) == (0, "proved: powers", True)
    assert 0 < count.margin <= 0.2
    count = count_left(a, 2.3)
    assert (count.count, count.basis) == (400, "proved: powers")
    outside = count_outside_disc(a)
    assert (outside.count, outside.basis) == (400, "proved: powers")
    inside = count_outside_disc(a, 1.0, 1.3)
    assert (inside.count, inside.basis) == (0, "proved: powers")


def test_powers_of_an_operator_decide_without_a_matrix():
    a = spread_right_of(300, 0.3, 0.5, 1)
    operator = LinearOperator(a.shape, matvec=lambda x: a @ x, rmatvec=lambda x: a.T @ x, dtype=float)
    count = count_left(operator, 0.0)
    assert (count.count, count.basis) == (0, "proved: powers")
    assert count_left(operator, 1.0).count is None
    assert count_outside_disc(operator, 1.0, 0.1).count is None


def disc_of_eigenvalues(k, radius, seed, density=0.2):
    """I + M, M's eigenvalues all over a disc: as blocks of networks with random weights have them (circular law)."""
    m = sp.random_array(
        (k, k),
        density=density,
        rng=np.random.default_rng(seed),
        data_sampler=np.random.default_rng(seed).standard_normal,
    )
    return sp.csc_array(sp.eye_array(k) + m * (radius / np.sqrt(density * k)))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("radius", [1.03, 1.1])
def test_eigenvalues_at_the_edge_of_a_full_disc_are_counted_by_products(seed, radius):
    a = disc_of_eigenvalues(700, radius, seed)
    true = dense_eigenvalues(a)
    count = count_left(a, 0.0)
    assert (count.count, count.basis) == (int((true.real < 0).sum()), "proved: found and deflated")
    assert 0 < count.margin <= np.abs(true.real).min()
    operator = LinearOperator(a.shape, matvec=lambda x: a @ x, rmatvec=lambda x: a.T @ x, dtype=float)
    assert count_left(operator, 0.0).count == count.count
    outside = count_outside_disc(a, 1.0, radius)
    assert outside.count == int((np.abs(true - 1) > radius).sum())


def operator_of(a, seed=0):
    return powers.Operator.of(a, np.random.default_rng(seed))


@pytest.mark.parametrize("region", [LeftOf(0.02), OutsideOf(1.0, 0.98)])
def test_resolvents_are_bounded_on_the_whole_boundary(region):
    a = disc_of_eigenvalues(300, 1.05, 0)
    operator, rng = operator_of(a), np.random.default_rng(0)
    space = sparse.Arnoldi(operator.apply, 300, 200, rng)
    space.extend(200)
    values, residuals = space.ritz()
    found = residuals < 1e-10
    assert 20 < found.sum() < 150
    size = powers.norm_from_above(lambda x: a.T @ (a @ x), 300, rng)
    inner = deflation.Inner.of(operator, space.schur_vectors(values, found), size)
    assert np.linalg.norm(a.toarray(), 2) <= inner.size
    q = inner.q
    t = q.T @ (a @ q)
    complement = scipy.linalg.null_space(q.T)
    c = complement.T @ (a @ complement)
    left = np.linalg.norm(a @ q - q @ t, 2)
    assert left <= inner.residual <= 1e-8
    ellipse, rate = region.ellipse(np.linalg.eigvals(c), 1.0)
    found = deflation._enclosed(operator, inner, ellipse, rate, 600, rng)
    outer = found.decay.resolvent()
    length, point = region.boundary(3.0)
    for z in point(np.linspace(0, length, 40)):
        assert 1 / scipy.linalg.svdvals(t - z * np.eye(len(t)))[-1] <= inner.resolvent(region)
        assert 1 / scipy.linalg.svdvals(c - z * np.eye(len(c)))[-1] <= outer
    before, now = 2 * np.eye(len(c)), c - ellipse.centre * np.eye(len(c))
    b = now
    for _ in range(found.decay.power - 1):
        before, now = now, b @ now - ellipse.focal * before
    assert np.linalg.norm(now, 2) / ellipse.radius**found.decay.power <= powers.ENOUGH


@pytest.mark.parametrize("missed", [0, 1])
def test_an_eigenvalue_that_arnoldi_missed_is_no_wrong_count(missed, monkeypatch):
    """Its real part is -0.3 or 0.002: powers of the rest do not vanish, so that nothing is proved."""
    a = planted(300, np.diag([-0.3, -0.5, -0.7, 0.002]))
    original, hidden = sparse.Arnoldi.schur_vectors, [-0.3, 0.002][missed]
    monkeypatch.setattr(
        sparse.Arnoldi,
        "schur_vectors",
        lambda space, values, chosen: original(space, values, chosen & (np.abs(values - hidden) > 1e-3)),
    )
    found = deflation.count_beyond(operator_of(a), LeftOf(0.0), None, np.random.default_rng(0))
    assert found is None


def test_steps_of_arnoldi_fit_the_memory():
    for k, memory in ((300, 0), (2_500, 10**7), (100_000, 10**9)):
        steps = deflation._steps(k, memory)
        assert 50 < steps < min(k, deflation.MOST_STEPS)
        assert 0.99 < (16 * k * steps + 64 * steps**2) / (8 * k * deflation.FREE_VECTORS + memory) <= 1
    assert deflation._steps(300, None) == 300
    assert deflation._steps(10**6, None) == deflation.MOST_STEPS


@pytest.mark.parametrize("k", [101, 130, 150, 151])
@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e8])
def test_small_orders_are_counted_where_arnoldi_finds_all(k, scale):
    a = scale * (np.eye(k) + np.random.default_rng(k).standard_normal((k, k)) / np.sqrt(k))
    true = np.linalg.eigvals(a)
    for region in (LeftOf(0.2 * scale), OutsideOf(scale, 0.9 * scale)):
        found = deflation.count_beyond(operator_of(a), region, None, np.random.default_rng(0))
        assert found.count == region.has(true).sum()


@pytest.mark.parametrize("radius", [1e-13, 1e-14, 1e-15])
def test_what_vanishes_but_for_rounding_is_no_proof_and_no_crash(radius):
    a = np.zeros((300, 300))
    a[0, 0] = 1
    assert count_outside_disc(a, 0.0, radius).count in (1, None)


def test_a_basis_that_lapack_cannot_order_leaves_it_to_discs(monkeypatch):
    schur = scipy.linalg.schur

    def fails(*args, **options):
        if "sort" in options:
            raise np.linalg.LinAlgError
        return schur(*args, **options)

    monkeypatch.setattr(scipy.linalg, "schur", fails)
    a = planted(300, [[-0.7, 0.4], [-0.4, -0.7]])
    count = count_left(a, 0.0)
    assert (count.count, "discs" in count.note) == (2, True)


def test_vectors_of_the_deflated_count_fit_what_is_given():
    k, memory = 30_000, 30 * 2**20
    values = np.concatenate([np.linspace(-1, -0.5, 20), np.random.default_rng(0).uniform(0.5, 1.5, k - 20)])
    operator = operator_of(sp.csc_array(sp.diags_array(values)))
    tracemalloc.start()
    found = deflation.count_beyond(operator, LeftOf(0.0), memory, np.random.default_rng(0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.count == 20
    assert peak <= memory + 8 * k * deflation.FREE_VECTORS


def test_a_crowd_is_refused_after_few_products():
    a = disc_of_eigenvalues(2000, 2.0, 0, density=0.02)
    products = []
    operator = operator_of(a)
    counted = replace(operator, apply=lambda x: products.append(1) or operator.apply(x))
    found = deflation.count_beyond(counted, LeftOf(0.0), None, np.random.default_rng(0))
    assert found.count is None
    assert "needs the spectrum" in found.note
    assert len(products) <= 500


def test_what_is_known_of_the_ends_helps_and_changes_nothing(no_deflation):
    a = planted(300, [[-0.7, 0.4], [-0.4, -0.7]])
    found = extremes(a)
    count = count_left(a, 0.0, known=(found.values, found.vectors.right))
    assert count.count == 2


@pytest.mark.parametrize("k", [0, 1, 2, 60])
def test_small_orders(k):
    a = np.random.default_rng(k).standard_normal((k, k))
    count = count_left(sp.csc_array(a), 0.1)
    assert count.count == int((np.linalg.eigvals(a).real < 0.1).sum())
    assert count_outside_disc(sp.csc_array(a)).count in (int((np.abs(np.linalg.eigvals(a) + 1) > 1).sum()), None)


def balanced_into_a_defect(half, t, rng):
    """Blocks D, t^2 C, C', D': balancing solves t C and t C', in which an eigenvalue 0 is nearly defective, twice."""
    diagonals = [np.diag(np.concatenate([[0.0], rng.uniform(1, 3, half - 1)])) for _ in range(2)]
    couplings = [rng.uniform(0.5, 1, (half, half)) * rng.choice([-1, 1], (half, half)) for _ in range(2)]
    couplings[1][0, 0] = 0
    return np.block([[diagonals[0], t * t * couplings[0]], [couplings[1], diagonals[1]]])


@pytest.mark.parametrize("t", [2.0**-18, 2.0**-22])
def test_balancing_makes_no_dense_count_wrong(t):
    claimed = []
    for seed in range(6):
        a = balanced_into_a_defect(3, t, np.random.default_rng(seed))
        values = np.linalg.eigvals(a).real
        near = np.sort(values[np.abs(values) < 0.3])
        for threshold in (near[0] / 2, near[-1] / 2, near[0] - 1e-9, near[-1] + 1e-9):
            count = count_left(a, threshold)
            claimed.append(count.count)
            assert count.count in (exact_count(a, lambda v, at=threshold: v.real < at), None)
    assert claimed.count(None) < len(claimed)  # away from them it is decided


def test_singular_values_hold_the_schur_form_s_error():
    a = balanced_into_a_defect(20, 2.0**-20, np.random.default_rng(0))
    form = discs.SchurForm.of(a)
    assert form.error < 1e-11
    shift = -0.1 + 0.3j
    exact = scipy.linalg.svdvals(a - shift * np.eye(40))[-1]
    assert abs(scipy.linalg.svdvals(form.t - shift * np.eye(40))[-1] - exact) <= form.error
    assert np.allclose(np.sort_complex(form.values), np.sort_complex(np.linalg.eigvals(form.t)), atol=1e-6)
    pairs = discs.SchurForm.of(np.random.default_rng(1).standard_normal((9, 9)))
    for values in (np.linalg.eigvals(pairs.t), pairs.values):
        assert np.isclose(values.sum().imag, 0)
    assert np.allclose(np.sort_complex(pairs.values), np.sort_complex(np.linalg.eigvals(pairs.t)))


def test_what_is_tolerated_is_no_more_than_the_distance_to_a_matrix_with_an_eigenvalue_there():
    """And where that is less than the matrix's own rounding, nothing is counted."""
    w = np.linspace(0, 4, 81)
    for a in (spread_right_of(120, 0.2, 1.5, 0), planted(120, np.diag([-0.5, -0.6])), spread_right_of(60, 0.2, 3, 0)):
        dense = a.toarray()
        nearest = min(scipy.linalg.svdvals(dense - 1j * y * np.eye(len(dense)))[-1] for y in w)
        count = count_left(a, 0.0)
        assert count.count is not None
        assert 0 < count.tolerated <= nearest * (1 + 1e-9)
        assert count_left(a, 0.0, rounding=0.9 * count.tolerated).count == count.count
        wide = count_left(a, 0.0, rounding=1.01 * nearest)
        assert (wide.count, wide.tolerated) == (None, 0)


@pytest.mark.parametrize(
    "a",
    [grcar(300), sp.diags_array([1.0, 9.0], offsets=[0, 1], shape=(300, 300)).tocsc()],
    ids=["grcar", "jordan-like"],
)
def test_far_from_normal_a_count_is_open_or_true(a, monkeypatch):
    monkeypatch.setattr(discs, "MOST_DISCS", 40)
    for threshold in (0.5, 0.02):
        count = count_left(a, threshold)
        assert count.count is None
        assert count.note


def test_an_eigenvalue_on_the_line_leaves_the_count_open():
    a = planted(300, [[0.0]])
    assert count_left(a, 0.0).count is None
    assert count_left(np.zeros((4, 4)), 0.0).count is None
    assert count_left(np.diag([0.0, 1.0]), 0.0).count is None


def test_too_many_eigenvalues_are_left_to_the_spectrum():
    a = planted(300, np.diag(np.linspace(-1, -0.5, 80)))
    count = count_left(a, 0.0)
    assert count.count is None
    assert "needs the spectrum" in count.note


@pytest.mark.parametrize("by", ["power", "discs"])
def test_most_eigenvalues_left_of_the_line_are_counted_from_the_right(by, request):
    if by == "discs":
        request.getfixturevalue("no_deflation")
    a = planted(300, [[2.8, 0.2], [-0.2, 2.8]])
    count = count_left(a, 2.4)
    assert count.count == 298
    assert by in count.note


def test_too_little_memory_leaves_it_open_and_says_so(no_deflation):
    a = planted(300, [[-0.7, 0.4], [-0.4, -0.7]])
    count = count_left(a, 0.0, memory_bytes=1000)
    assert count.count is None
    assert "GB" in count.note


def test_outside_a_disc(no_powers):
    k = 300
    inside = 0.4 * (normal_spread(k) - sp.eye_array(k)) - sp.eye_array(k)
    count = count_outside_disc(inside)
    assert count.count == int((np.abs(dense_eigenvalues(inside) + 1) > 1).sum()) == 0
    a = planted(k, [[2.5, 1.0], [-1.0, 2.5]])
    found = count_outside_disc(a, 1.5, 1.1)
    assert found.count == 2
    tight = sp.csc_array(0.5 * sp.eye_array(k) - 0.5 * sp.eye_array(k, k=1))
    proved = count_outside_disc(tight, 0.5, 0.6)
    assert (proved.count, proved.basis, proved.computed) == (0, "proved: norm", False)


@pytest.mark.parametrize(
    ("side", "gain", "basis"),
    [
        (10, 0.3, "proved: numerical range"),
        (10, 0.75, "proved: discs"),
        pytest.param(16, 0.75, "proved: discs", marks=pytest.mark.slow),
        pytest.param(18, 0.75, "proved: discs", marks=pytest.mark.slow),
    ],
)
def test_a_banded_matrix_like_a_convolution_has_nothing_left_of_the_line(side, gain, basis, no_powers, no_deflation):
    """Orders 800, 2,048 and 2,592."""
    a = convolution_like(side, 8, gain)
    count = count_left(a, 0.05)
    assert (count.count, count.basis) == (0, basis)
    assert int((dense_eigenvalues(a).real < 0.05).sum()) == 0


@given(st.integers(1, 12), st.integers(0, 10**6), st.sampled_from([1.0, 1e-8, 1e8]))
@settings(max_examples=60, deadline=None)
def test_inertia_never_proves_more_than_is_true(k, seed, scale):
    rng = np.random.default_rng(seed)
    h = rng.integers(-3, 4, (k, k)) * scale
    h = (h + h.T) / 2
    least = float(np.linalg.eigvalsh(h)[0])
    for offset in (-1.0, -1e-3, -1e-9, 0.0, 1e-13, 1e-9, 1e-3):
        bound = sparse.proved_least(sp.csc_array(h), least + offset * scale)
        assert bound is None or bound <= least + 1e-15 * k * np.abs(h).sum()
        if offset <= -1e-3:
            assert bound is not None
            assert bound > least + 2 * offset * scale


def test_the_end_of_the_numerical_range_is_found_and_proved():
    a = convolution_like(8, 6, 0.3)
    least = float(scipy.linalg.eigvalsh((a + a.T).toarray() / 2)[0])
    end = numerical_range.numerical_range_end(a)
    assert end.value == pytest.approx(least, abs=1e-7)
    assert least - 1e-4 < end.bound <= least
    assert numerical_range.numerical_range_end(a, right_of=5.0).bound == -np.inf
    assert numerical_range.logarithmic_norm(a) == pytest.approx(np.linalg.eigvalsh((a + a.T).toarray() / 2)[-1])


def test_the_curve_of_the_numerical_range_encloses_the_spectrum_and_is_symmetric():
    a = normal_spread(200)
    angles, points = numerical_range.numerical_range(a, 24)
    assert np.allclose(points[1:], np.conj(points[:0:-1]))
    for t, point in zip(angles, points, strict=True):
        turned = (np.exp(-1j * t) * dense_eigenvalues(a)).real.max()
        assert (np.exp(-1j * t) * point).real >= turned - 1e-6
    for normal, height in numerical_range.outer_polygon(a, angles, np.random.default_rng(0)):
        assert (np.conj(normal) * points).real.max() <= height


@pytest.mark.parametrize("z", [0.0, 0.3 + 0.4j, 5.0])
def test_singular_values_and_their_bounds_hold_against_an_svd(z):
    a = normal_spread(300)
    true = scipy.linalg.svdvals(a.toarray() - z * np.eye(300))[-1]
    assert sparse.smallest_singular_value(a, z) == pytest.approx(true, rel=1e-6)
    bound = sparse.singular_bound(sparse.Shifted(a, z), sparse.norm_bound(a), np.random.default_rng(0))
    assert 0.7 * true < bound <= true


def test_factors_in_single_precision_give_the_same_bound():
    a = normal_spread(300)
    needed = sparse.factor_bytes(sparse.estimated_fill(a), a.nnz, 16)
    single = sparse.Shifted(a, 0.3 + 0.4j, needed - 1)
    assert single._factored == np.complex64
    true = scipy.linalg.svdvals(a.toarray() - (0.3 + 0.4j) * np.eye(300))[-1]
    bound = sparse.singular_bound(single, sparse.norm_bound(a), np.random.default_rng(0))
    assert 0.7 * true < bound <= true
    with pytest.raises(sparse.FillError, match="sparse LU needs about"):
        sparse.Shifted(a, 0.3 + 0.4j, needed // 3)


def test_singular_at_an_eigenvalue():
    a = sp.csc_array(sp.diags_array(np.arange(300.0)))
    assert sparse.smallest_singular_value(a, 7.0) == 0
    assert sparse.smallest_singular_value(a, 7.25) == pytest.approx(0.25)
    assert sparse.smallest_singular_value(a, 8.0 - 0.5j) == pytest.approx(0.5)


def test_a_deflated_operator_has_the_singular_values_of_the_complement():
    a = planted(200, [[-0.7, 0.4], [-0.4, -0.7]])
    search = discs.Cover(a, LeftOf(0.0), None, np.random.default_rng(0))
    found = extremes(a)
    assert search.deflate(found.values[:2], found.vectors.right[:, :2]) == 2
    complement = scipy.linalg.null_space(search.q.T)
    z = -0.5 + 0.3j
    true = scipy.linalg.svdvals(complement.T @ (a @ complement) - z * np.eye(198))[-1]
    bound = sparse.singular_bound(sparse.Shifted(a, z), search.norm, search.rng, search.project)
    assert 0.7 * true < bound <= true


@pytest.mark.parametrize("gain", [0.3, 0.6])
def test_fill_is_estimated_on_the_safe_side(gain):
    a = convolution_like(16, 6, gain)
    fill = sparse._splu(a, pivoting=0.01).nnz
    assert fill <= sparse.estimated_fill(a) <= 3 * fill
    order = np.random.default_rng(0).permutation(a.shape[0])
    assert fill / 1.5 <= sparse.estimated_fill(a[order][:, order].tocsc()) <= 3 * fill


def test_thresholds_that_are_none_are_refused():
    with pytest.raises(InputError, match="finite threshold"):
        count_left(np.eye(2), np.nan)
    with pytest.raises(InputError, match="positive radius"):
        count_outside_disc(np.eye(2), 0.0, -1.0)


@pytest.mark.parametrize("scale", [0.0, 1e-170, 1e160])
def test_a_norm_that_cannot_be_computed_with_leaves_counts_open(scale):
    a = scale * np.diag(np.linspace(0.5, 2, 120))
    for count in (count_left(a, 0.0), count_outside_disc(a, 0.0, 1e-300 if scale else 1.0)):
        assert count.count is None or count.count in (0, 120)
    assert count_left(np.zeros((120, 120)), 0.0).note == "every eigenvalue is 0"


@pytest.mark.parametrize("aspect", [0.3, 1.0, 4.0, 20.0])
def test_powers_of_an_ellipse_bound_the_resolvent_on_it_and_beyond(aspect):
    rng = np.random.default_rng(3)
    k, ellipse = 120, powers.Ellipse(1.0, 0.5, 0.5 * aspect)
    inside = 0.8 * rng.uniform(0, 1, k // 2) * np.exp(2j * np.pi * rng.uniform(0, 1, k // 2))
    pairs = [np.array([[1 + 0.5 * z.real, y], [-y, 1 + 0.5 * z.real]]) for z in inside for y in [0.5 * aspect * z.imag]]
    a = scipy.linalg.block_diag(*pairs) + np.triu(rng.standard_normal((k, k)), 2) * 0.02 * min(aspect, 1)
    operator = operator_of(sp.csc_array(a))
    true = np.linalg.eigvals(a)
    found = powers.decay(operator, ellipse, rng, float(ellipse.level(true).max()), 2000)
    assert found is not None
    assert ellipse.level(true).max() < 1
    t = np.linspace(0, np.pi, 30)
    for level in (1.0, 1.2):
        w = level * ellipse.radius * np.exp(1j * t)
        z = ellipse.centre + w + ellipse.focal / w
        assert np.allclose(ellipse.level(z), level)
        least = min(scipy.linalg.svdvals(a - point * np.eye(k))[-1] for point in z)
        assert 1 / least <= found.resolvent(level)
    assert found.tolerated <= found.margin <= (true.real.min() - 0.5) * (1 + 1e-9)
