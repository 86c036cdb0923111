"""Claims about the ends of sparse spectra: eigenpairs first, then agreement with dense eigenvalues."""

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse as sp
from scipy.sparse.linalg import LinearOperator
from threadpoolctl import threadpool_limits

from stiffcore.eigen import counting
from stiffcore.eigen import extremes as module
from stiffcore.eigen.certificate import _isolated_error
from stiffcore.eigen.counting import ends_of
from stiffcore.eigen.deflation import enclosures_of
from stiffcore.eigen.extremes import extremes, spectral_radius
from stiffcore.eigen.numerical_range import logarithmic_norm
from stiffcore.eigen.sparse import DenseMatrix
from stiffcore.errors import InputError


@pytest.fixture(autouse=True)
def one_thread():
    with threadpool_limits(1):
        yield


def dense_eigenvalues(a):
    values = np.linalg.eigvals(a.toarray() if sp.issparse(a) else a)
    return values[np.lexsort((values.imag, values.real))]


def normal_spread(k, seed=0):
    """Sparse, non-symmetric, mildly non-normal; complex and real ends."""
    rng = np.random.default_rng(seed)
    return sp.csc_array(sp.eye_array(k) + sp.random_array((k, k), density=8 / k, rng=rng, data_sampler=rng.normal) / 4)


def planted(k, corner, seed=0):
    """A bulk of real parts between 1 and 2, and a few eigenvalues of a small block, hidden by a similarity."""
    rng = np.random.default_rng(seed)
    corner = np.asarray(corner, float)
    bulk = sp.diags_array(rng.uniform(1, 2, k - len(corner)))
    a = sp.block_diag([corner, bulk]).tocsc()
    t = sp.eye_array(k, format="csc") + sp.diags_array(np.full(k - 1, 0.3), offsets=1)
    inverse = sp.eye_array(k, format="csc")
    # I - N + N^2 - ..., cut where it is below rounding
    power = -sp.diags_array(np.full(k - 1, 0.3), offsets=1).tocsc()
    step = power
    for _ in range(31):
        inverse = inverse + power
        power = power @ step
    mixed = sp.csc_array(t @ a @ inverse)
    order = rng.permutation(k)
    return mixed[order][:, order].tocsc()


def assert_is_both_ends(found, a, each_end=3, tolerance=1e-9):
    values = dense_eigenvalues(a)
    scale = np.abs(values).max()
    assert found.converged_left
    assert found.converged_right
    order = np.sort(found.values.real)
    assert np.abs(order[:each_end] - values.real[:each_end]).max() <= tolerance * scale
    assert np.abs(order[-each_end:] - values.real[-each_end:]).max() <= tolerance * scale
    assert max(np.abs(values - v).min() for v in found.values) <= tolerance * scale


def assert_pairs_are_exact(found):
    values = found.values
    for i in np.flatnonzero(values.imag != 0):
        j = np.flatnonzero(values == np.conj(values[i]))
        assert len(j) == 1
        assert np.array_equal(found.vectors.right[:, j[0]], np.conj(found.vectors.right[:, i]))
    assert np.array_equal(values, values[np.lexsort((values.imag, values.real))])


@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_both_ends_with_their_vectors_agree_with_dense_ones(scale, seed):
    a = scale * normal_spread(400, seed)
    found = extremes(a)
    assert_is_both_ends(found, a)
    assert_pairs_are_exact(found)
    x, y = found.vectors.right, found.vectors.left
    assert found.vectors.converged.all()
    assert np.abs(a @ x - x * found.values).max() <= 1e-9 * scale
    assert np.abs(a.T @ y.conj() - y.conj() * found.values).max() <= 1e-9 * scale
    assert np.allclose(np.linalg.norm(x, axis=0), 1)


@pytest.mark.parametrize("k", [0, 1, 2, 7, 60])
def test_small_orders_are_dense(k):
    a = np.random.default_rng(k).standard_normal((k, k))
    found = extremes(sp.csc_array(a))
    assert found.vectors.right.shape == (k, len(found.values))
    if k:
        assert_is_both_ends(found, a, each_end=min(k, 3))
        assert_pairs_are_exact(found)


def test_a_pair_that_the_number_asked_for_cuts_is_whole():
    a = planted(300, [[-3, 0, 0, 0], [0, -2, 0, 0], [0, 0, -1, 2], [0, 0, -2, -1]])
    found = extremes(a)
    assert np.allclose(found.values[:4], [-3, -2, -1 - 2j, -1 + 2j])
    assert_pairs_are_exact(found)


def test_eigenvalues_of_a_laplacian_are_found_by_shift_invert():
    k = 1000
    a = sp.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(k, k))
    found = extremes(a)
    exact = 2 - 2 * np.cos(np.pi * np.arange(1, k + 1) / (k + 1))
    assert found.converged_left
    assert found.converged_right
    assert np.abs(found.values.real[:3] - exact[:3]).max() < 1e-10
    assert np.abs(found.values.real[-3:] - exact[-3:]).max() < 1e-10


@pytest.mark.parametrize("superdiagonals", [1, 3])
def test_where_a_spectrum_is_not_determined_nothing_is_said_to_converge(superdiagonals):
    k = 400
    a = sp.diags_array([-1.0, *[1.0] * (superdiagonals + 1)], offsets=range(-1, superdiagonals + 1), shape=(k, k))
    jordan_like = a + sp.diags_array([8.0], offsets=[1], shape=(k, k))
    found = extremes(jordan_like)
    assert not (found.converged_left and found.converged_right)
    assert "did not" in found.note


@pytest.mark.parametrize(
    "a", [sp.csc_array((300, 300)), sp.eye_array(300), sp.diags_array(np.repeat([1.0, 2, 3], 100))]
)
def test_few_different_eigenvalues_are_found_once_at_least(a):
    found = extremes(a)
    assert found.converged_left
    assert found.converged_right
    assert found.values.real.min() == pytest.approx(a.diagonal().min(), abs=1e-12)
    assert found.values.real.max() == pytest.approx(a.diagonal().max(), abs=1e-12)


def test_matrix_free_finds_the_same():
    a = normal_spread(300)
    both = LinearOperator(a.shape, matvec=lambda x: a @ x, rmatvec=lambda x: a.T @ x, dtype=float)
    assert_is_both_ends(extremes(both), a)
    only = LinearOperator(a.shape, matvec=lambda x: a @ x, dtype=float)
    found = extremes(only)
    assert_is_both_ends(found, a)
    assert np.isnan(found.vectors.left).all()
    assert not found.vectors.converged.any()


def test_a_start_that_misses_the_end_is_found_out(monkeypatch):
    """The first run is made blind to the rightmost eigenvalue: the second one contradicts it."""
    a = sp.csc_array(sp.diags_array(np.concatenate([[3.0], np.linspace(1, 2, 299)])))
    arnoldi, calls = module._arnoldi, []

    def blind(apply, k, which, *rest):
        run = arnoldi(apply, k, which, *rest)
        calls.append(which)
        if calls.count("LR") == 1 and which == "LR":
            keep = run.values.real < 2.5
            return module._Run(run.values[keep], run.vectors[:, keep], True)
        return run

    monkeypatch.setattr(module, "_arnoldi", blind)
    found = extremes(a)
    assert not found.converged_right or found.values.real.max() == pytest.approx(3)


def test_too_little_memory_for_a_factorisation_is_said():
    k = 500
    a = sp.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(k, k))
    a = a + 0.1 * sp.diags_array([1.0, -1.0], offsets=[-1, 1], shape=(k, k))
    found = extremes(a, memory_bytes=1000)
    assert found.converged_left or "GB" in found.note


def test_the_spectral_radius_is_the_dense_one():
    a = normal_spread(300)
    assert spectral_radius(a) == pytest.approx(np.abs(dense_eigenvalues(a)).max(), rel=1e-9)
    assert spectral_radius(sp.csc_array((0, 0))) == 0
    empty = LinearOperator((0, 0), matvec=lambda x: x, rmatvec=lambda x: x, dtype=float)
    assert spectral_radius(empty) == 0  # of an order that SciPy's products refuse


@pytest.mark.parametrize(
    "a",
    [np.ones((2, 3)), np.ones((2, 2), complex), np.array([[np.nan]]), [[1.0]]],
    ids=["oblong", "complex", "nan", "list"],
)
def test_what_is_no_square_real_matrix_is_refused(a):
    with pytest.raises(InputError, match="sparse eig needs"):
        extremes(a)


def test_the_planted_matrix_has_its_eigenvalues():
    """The helper of other tests is held to what it claims."""
    a = planted(120, [[-1, 2], [-2, -1]])
    assert np.allclose(np.sort(dense_eigenvalues(a).real)[:2], -1)
    assert scipy.linalg.norm(a.toarray() - a.toarray().T) > 0.1


@pytest.mark.parametrize("power", [-500, -100, 100, 500])
def test_the_size_of_a_matrix_does_not_matter(power):
    a = np.diag(np.linspace(0.5, 3, 256)) + np.triu(np.random.default_rng(0).standard_normal((256, 256)), 1) / 50
    scale = 2.0**power
    found, scaled = extremes(a), extremes(scale * a)
    assert scaled.converged_left
    assert scaled.converged_right
    assert np.allclose(scaled.values / scale, found.values, rtol=1e-9)
    for norm in (logarithmic_norm, spectral_radius):
        assert norm(scale * a) / scale == pytest.approx(norm(a), rel=1e-6)


def skewed(n, size, rng):
    g = rng.standard_normal((n, n)) / np.sqrt(n)
    return size * (g - g.T) + np.diag(rng.uniform(0.5, 1, n))


def sparsely_skewed(n, rng):
    s = np.triu(10 * rng.standard_normal((n, n)) * (rng.random((n, n)) < 6 / n), 1)
    return s - s.T + np.diag(rng.uniform(0.5, 1, n))


def skew_convolution(n, rng):
    return np.diag(np.full(n - 1, 5.0), 1) - np.diag(np.full(n - 1, 5.0), -1) + np.diag(rng.uniform(0.5, 1, n))


def scaled_rotation(n, rng):
    q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    return 1.5 * np.eye(n) + q * rng.uniform(0.9, 1, n)


def oscillators(n, rng):
    """Damped oscillators in another basis: pairs of real parts under 1 and imaginary parts of up to 50."""
    w, d = rng.uniform(1, 50, n // 2), rng.uniform(0.01, 1, n // 2)
    a = scipy.linalg.block_diag(*(np.array([[-x, y], [-y, -x]]) for x, y in zip(d, w, strict=True)))
    q = np.linalg.qr(rng.standard_normal((len(a), len(a))))[0]
    return q @ a @ q.T


TALL = {
    "skew 3": lambda n, rng: skewed(n, 3, rng),
    "skew 100": lambda n, rng: skewed(n, 100, rng),
    "sparse skew": sparsely_skewed,
    "skew convolution": skew_convolution,
    "scaled rotation": scaled_rotation,
    "oscillators": oscillators,
}


@pytest.mark.parametrize("name", TALL)
@pytest.mark.parametrize("n", [130, 280])
def test_the_ends_of_a_tall_spectrum_are_the_true_ones_and_proved(name, n):
    """Two starts of Arnoldi agree on eigenvalues of large imaginary part, and others lie further out."""
    a = TALL[name](n, np.random.default_rng(n))
    found, true = extremes(a), dense_eigenvalues(a)
    ends = ends_of(a, 0, (found.values, found.vectors.right), disc=False, memory_bytes=None, note="")
    scale = np.abs(true).max()
    for sign, lines in ((-1, ends.left_lines), (1, ends.right_lines)):
        assert lines
        assert (sign * found.values.real).max() == pytest.approx((sign * true.real).max(), abs=1e-10 * scale)
        for count in lines:
            assert count.count == (sign * true.real > sign * count.threshold).sum()
            assert count.count == (sign * found.values.real > sign * count.threshold).sum()


@pytest.mark.parametrize("case", ["missed by Arnoldi", "found by it"])
def test_an_end_that_arnoldi_misses_is_taken_up_by_deflation(case, monkeypatch):
    """Its runs are made blind to the outermost eigenvalue at either end, both alike; so they agree."""
    a = normal_spread(400)
    true, arnoldi = dense_eigenvalues(a), module._arnoldi
    hidden = (true.real.min() + 1e-6, true.real.max() - 1e-6)

    def blind(*arguments):
        run = arnoldi(*arguments)
        keep = (run.values.real > hidden[0]) & (run.values.real < hidden[1])
        return module._Run(run.values[keep], run.vectors[:, keep], True)

    if case == "missed by Arnoldi":
        monkeypatch.setattr(module, "_arnoldi", blind)
    found = extremes(a)
    assert_is_both_ends(found, a)
    assert_pairs_are_exact(found)
    assert found.vectors.converged.all()
    x, y = found.vectors.right, found.vectors.left
    assert np.abs(a @ x - x * found.values).max() <= 1e-9
    assert np.abs(a.T @ y.conj() - y.conj() * found.values).max() <= 1e-9


def test_where_nothing_holds_all_eigenvalues_no_line_is_proved():
    a = sp.csc_array(sp.diags_array([-1.0, 1.0, 9.0], offsets=[-1, 0, 1], shape=(400, 400)))
    assert enclosures_of(a, None) == ()
    assert counting._lines((), a, np.array([0.9, 1.1]), None, 0.0) == ()


def test_a_disc_around_an_eigenvalue_holds_one_of_every_matrix_within_its_margin():
    rng = np.random.default_rng(5)
    a = np.diag(np.linspace(-1, 1, 120)) + 0.3 * np.triu(rng.standard_normal((120, 120)), 1) / 11
    values, right = np.linalg.eig(a)
    left = np.linalg.inv(right).conj().T
    [enclosure] = enclosures_of(sp.csc_array(a), None)
    for at in (values.real.argmin(), values.real.argmax(), values.real.argsort()[60]):
        u, v = right[:, at] / np.linalg.norm(right[:, at]), left[:, at] / np.linalg.norm(left[:, at])
        found = enclosure.discs(complex(values[at]), 1e-14)
        assert len(found) >= 3
        for radius, margin in found:
            assert margin > 1e-14
            for off in (np.outer(v, u.conj()), -np.outer(v, u.conj()), rng.standard_normal((120, 120))):
                moved = np.linalg.eigvals(a + 0.99 * margin / np.linalg.norm(off, 2) * off)
                assert (np.abs(moved - values[at]) < radius).sum() == 1
        condition = 1 / abs(np.vdot(v, u))
        for size in (1e-9, 1e-5, 0.2 * found[-1][1]):
            bound = _isolated_error(found, condition, 1e-14, size)
            worst = [np.linalg.eigvals(a + sign * size * np.outer(v, u.conj())) for sign in (1, -1)]
            farthest = max(np.abs(moved - values[at]).min() for moved in worst)
            assert farthest <= bound
        assert _isolated_error(found, condition, 1e-14, 1e-9) < 1.2 * condition * 1e-9
    assert _isolated_error((), 1.0, 0.0, 0.0) == np.inf


def test_products_with_a_dense_matrix_are_those_in_double_precision():
    rng = np.random.default_rng(6)
    for dtype in ("f4", "f8"):
        a = np.asfortranarray(rng.standard_normal((600, 600)).astype(dtype))
        x, operator = rng.standard_normal((600, 3)), DenseMatrix(a)
        for got, expected in ((operator @ x, a.astype(float) @ x), (operator.T @ x, a.T.astype(float) @ x)):
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)
        np.testing.assert_allclose(operator.rmatvec(x[:, 0]), a.T.astype(float) @ x[:, 0], rtol=0, atol=1e-12)
