"""Claims about where eigenvalues lie: no true one is outside, whatever the matrix; truth in 300 bits."""

import json
import math

import flint
import numpy as np
import pytest
import scipy.linalg
import torch

import stiffcore
from stiffcore.eigen.inclusion import inclusion
from stiffcore.eigen.pseudospectra import ShiftedTriangular, clear_boundary, least_singular
from stiffcore.eigen.regions import LeftOf, OutsideOf
from stiffcore.spectra import Certificate

EYE = np.eye


def truth(a, bits=300):
    """Eigenvalues of the matrix of these very float64 numbers."""
    flint.ctx.prec = bits
    try:
        entries = [flint.acb(float(v)) for v in np.asarray(a, float).ravel()]
        values = flint.acb_mat(len(a), len(a), entries).eig(algorithm="approx")
    finally:
        flint.ctx.prec = 53
    return np.array([complex(float(z.real.mid()), float(z.imag.mid())) for z in values])


def orthogonal(n, seed):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]


def jordan(n, value, above=1.0):
    return value * EYE(n) + above * EYE(n, k=1)


def toeplitz(n, below, on, above):
    return below * EYE(n, k=-1) + on * EYE(n) + above * EYE(n, k=1)


def grcar(n):
    return sum(EYE(n, k=d) for d in range(4)) - EYE(n, k=-1)


def frank(n):
    return np.array([[float(n - max(i, j)) if j >= i - 1 else 0.0 for j in range(n)] for i in range(n)])


def kahan(n):
    s = 0.1 ** (1 / (n - 1))
    return np.diag(s ** np.arange(n)) @ (EYE(n) - math.sqrt(1 - s * s) * np.triu(np.ones((n, n)), 1))


def hidden(a, seed=0):
    q = orthogonal(len(a), seed)
    return q @ a @ q.T


def near_axis(n, distance, seed):
    d = np.concatenate([[distance, -distance], np.random.default_rng(seed).uniform(-1, 1, n - 2)])
    return hidden(np.diag(d), seed)


def ill_conditioned(n, condition, seed):
    x = orthogonal(n, seed) @ np.diag(np.logspace(0, math.log10(condition), n)) @ orthogonal(n, seed + 1)
    return x @ np.diag(np.random.default_rng(seed).uniform(-1, 2, n)) @ np.linalg.inv(x)


def graded(n, decades, seed):
    d = 10.0 ** np.linspace(-decades, decades, n)
    return np.diag(d) @ np.random.default_rng(seed).standard_normal((n, n)) @ np.diag(1 / d)


def cases():
    normal = np.diag(np.linspace(1.5, 3, 12))
    yield "zero", np.zeros((3, 3))
    yield "one", np.array([[-2.0]])
    yield "jordan", jordan(8, 0.2)
    yield "jordan negative", hidden(jordan(12, -0.3))
    yield "jordan beside normal", hidden(scipy.linalg.block_diag(jordan(6, 0.3), normal))
    yield "two jordan", hidden(scipy.linalg.block_diag(jordan(5, 1.0), jordan(5, -1.0)))
    yield "scaled", 1e-200 * hidden(jordan(5, 1.0))
    yield "huge", 1e200 * hidden(np.diag([1.0, 2, -3, 4]))
    for n in (12, 24):
        yield f"toeplitz {n}", hidden(toeplitz(n, 0.1, 0.3, 1))
        yield f"grcar {n}", grcar(n) - 0.4 * EYE(n)
        yield f"kahan {n}", hidden(kahan(n))
        yield f"frank {n}", frank(n)
        yield f"graded {n}", graded(n, 6, n)
        yield f"gaussian {n}", np.random.default_rng(n).standard_normal((n, n)) / math.sqrt(n)
        yield f"skew {n}", hidden(toeplitz(n, -1, 0.2, 1))
        for distance in (1e-8, 1e-13, 1e-15, 0):
            yield f"near the axis {n} {distance}", near_axis(n, distance, n)
        for condition in (1e3, 1e7, 1e12):
            yield f"conditions {n} {condition:.0e}", ill_conditioned(n, condition, n)
    yield "companion", scipy.linalg.companion(np.poly(np.arange(1, 13)))
    yield "multiple", hidden(np.diag(np.r_[np.ones(6), np.zeros(6), -1.0]))


CASES = dict(cases())


@pytest.mark.parametrize("name", CASES)
def test_no_true_eigenvalue_is_elsewhere(name):
    a = CASES[name]
    scale = 2.0 ** -math.frexp(float(np.abs(a).max()) or 1.0)[1]  # flint's approximation has no room at 1e200
    exact = truth(a * scale) / scale
    found = inclusion(a, 0.0)
    for value in np.linalg.eigvals(a):
        assert np.abs(exact - value).min() <= found.error(complex(value))
    for low, high, true in ((*found.rightmost(), exact.real.max()), (*found.leftmost(), exact.real.min())):
        assert low <= true <= high
    for region in (LeftOf(0.0), OutsideOf(-1.0, 1.0)):
        low, high = found.counted(region)
        near = region.distance(exact) < 1e-60  # of an exact 0 the side is that of the last bit
        assert low <= int((region.has(exact) | near).sum())
        assert int((region.has(exact) & ~near).sum()) <= high


def test_errors_are_near_the_truth_where_eigenvalues_are_well_conditioned():
    for name in ("gaussian 24", "skew 24", "frank 12", "near the axis 24 1e-08"):
        a = CASES[name]
        found, exact = inclusion(a, 0.0), truth(a)
        errors = np.array([found.error(complex(v)) for v in exact])
        assert np.median(errors) < 1e-8 if name.startswith("frank") else np.max(errors) < 1e-11, name
        low, high = found.counted(LeftOf(0.0))
        assert low == high == (exact.real < 0).sum(), name
    assert inclusion(CASES["near the axis 24 1e-15"], 0.0).counted(LeftOf(0.0))[1] > 0


def test_what_a_perturbation_may_do_is_allowed_for():
    rng = np.random.default_rng(0)
    for name in ("jordan", "jordan beside normal", "toeplitz 12", "gaussian 12", "graded 12", "conditions 12 1e+07"):
        a = CASES[name]
        distance = 1e-6 * np.linalg.norm(a, 2)
        found = inclusion(a, distance)
        for _ in range(4):
            e = np.outer(rng.standard_normal(len(a)), rng.standard_normal(len(a)))
            other = np.linalg.eigvals(a + distance * e / np.linalg.norm(e, 2))
            assert found.rightmost()[0] <= other.real.max() <= found.rightmost()[1], name
            low, high = found.counted(LeftOf(0.0))
            assert low <= (other.real < 0).sum() <= high, name


def test_a_hidden_part_far_from_normal_does_not_spoil_what_is_apart_from_it():
    a = hidden(scipy.linalg.block_diag(jordan(12, 0.3), np.diag(np.r_[-np.linspace(2, 3, 7), 2.5])))
    found = inclusion(a, 0.0)
    assert found.rest is not None
    assert found.error(-2.5) < 1e-12
    assert found.error(0.3) > 1e-3
    low, high = found.counted(LeftOf(-1.5))
    assert low == high == 7


@pytest.mark.parametrize("q", [30, 80])
def test_the_bound_of_a_singular_value_is_below_it_and_not_by_far(q):
    rng = np.random.default_rng(q)
    t = np.triu(rng.standard_normal((q, q)) + 1j * rng.standard_normal((q, q))) / math.sqrt(q)
    for z in (0.3, 1j, 5, t[0, 0], t[3, 3] + 1e-9):
        true = float(scipy.linalg.svdvals(t - z * EYE(q))[-1])
        found = least_singular(ShiftedTriangular(t, z), q, np.random.default_rng(0))
        assert found <= true * (1 + 1e-9) + 1e-15
        assert found >= true / 10 or true < 1e-11


def test_a_line_is_clear_only_where_no_matrix_so_near_has_an_eigenvalue_on_it():
    t = scipy.linalg.schur(jordan(10, 1.0).astype(complex), output="complex")[0]
    for away, distance in ((0.9, 1e-3), (0.5, 1e-5), (0.2, 1e-8)):
        assert clear_boundary(t, LeftOf(1 - away), distance) == 0 or away**10 > distance
    assert clear_boundary(t, LeftOf(-0.5), 1e-4)
    assert clear_boundary(np.diag([1.0 + 1j, 1 - 1j]), LeftOf(0.0), 0.9)
    assert not clear_boundary(np.diag([1.0 + 1j, 1 - 1j]), LeftOf(0.0), 1.1)


def matrix_function(a):
    weight = torch.tensor(a)
    return stiffcore.spectrum(lambda x: weight @ x, torch.ones(len(a), dtype=torch.float64))


def test_a_defective_positive_eigenvalue_is_not_read_as_negative_ones():
    for m, power in ((8, -3), (8, 3), (32, 0)):
        h = scipy.linalg.hadamard(m)
        reach = (2.2e-16 * 2) ** (1 / m) * 2.0**power * 3
        for q in (2, 40):
            value = max(round(q / 90 * reach * 2**40) / 2**40, 2**-40)
            s = matrix_function(h @ jordan(m, value, 2.0**power) @ h.T / m)  # exact; all m eigenvalues are `value`
            low, high = s.certificate.negative
            assert low == 0
            assert high >= round(s.metrics["negative"] * m)
            assert (high == 0) == (s.certificate.near_axis == 0)
            assert abs(1 - s.metrics["S_active"]) <= s.certificate.s_active_error
            if s.metrics["negative"]:
                assert s.verdict.startswith("certified, but the sign of")


def test_a_far_from_normal_part_behind_a_normal_one_leaves_its_signs_open():
    n, below = 64, 2.0**-20
    tail = 0.25 + 2 * math.sqrt(below) * np.cos(np.arange(1, n + 1) * np.pi / (n + 1))
    h = scipy.linalg.hadamard(n)
    small = np.arange(1, 11) * 2.0**-12
    normal = np.concatenate([[-5, -4.75, -4.5, 5, 4.75, 4.5], small, -small])
    a = scipy.linalg.block_diag(np.diag(normal), h @ toeplitz(n, below, 0.25, 1.0) @ h.T / n)
    s = matrix_function(a)
    true = int((normal < 0).sum() + (tail < 0).sum())
    low, high = s.certificate.negative
    assert low <= true < round(s.metrics["negative"] * s.n) <= high
    assert low >= 3
    assert high <= len(a) - 3
    assert s.verdict.startswith(f"certified, but the sign of {high - low} eigenvalues is open")
    assert abs(-1 - s.metrics["S_active"]) <= s.certificate.s_active_error < 1e-9  # its ends are of the normal part
    assert (s.metrics["negative_low"], s.metrics["negative_high"]) == (low / s.n, high / s.n)
    shown = f"({100 * low / s.n:.3f} to {100 * high / s.n:.3f})"
    assert shown in repr(s)
    assert shown in s._repr_html_()
    again = Certificate.from_json(json.loads(json.dumps(s.certificate.to_json())))
    assert again.negative == (low, high)
