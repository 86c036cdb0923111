"""Claims about what is read off a spectrum: Eq. 10, shares that add up, errors that bound."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import stiffcore
from stiffcore.metrics import NAMES, spectrum_metrics, spell, stiffness_error, stiffness_index
from stiffcore.spectra import Certificate, Certified, Spectrum

FINITE = st.floats(-1e6, 1e6, allow_subnormal=False)
PARTS = st.one_of(FINITE, st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, -2.0]))
VALUES = st.lists(st.builds(complex, PARTS, PARTS), max_size=12).map(lambda v: np.array(v, complex))
COUNTS = st.integers(0, 4)


def metrics(*values, ones=0, zeros=0, branch=False):
    return spectrum_metrics(np.array(values, complex), ones, zeros, branch=branch)


def same(a, b):
    return a == b or (math.isnan(a) and math.isnan(b))


def direct(values):
    """Eq. 10 and the rest, number by number."""
    re = [v.real for v in values]
    decays = [r for r in re if r < 0]
    n = len(values)
    low, high = (min(re), max(re)) if n else (math.nan, math.nan)
    zero_over_zero = math.nan if high == 0 else math.inf
    s = zero_over_zero if n and low == 0 else float(high) / float(low)
    return {
        "S": s,
        "negative": sum(r < 0 for r in re) / n if n else math.nan,
        "positive": sum(r > 0 for r in re) / n if n else math.nan,
        "zero": sum(r == 0 for r in re) / n if n else math.nan,
        "abscissa": high,
        "min_re": low,
        "radius": max(np.abs(values)) if n else math.nan,
        "max_im": max(abs(v.imag) for v in values) if n else math.nan,
        "euler_stable": sum(np.abs(1 + values) <= 1) / n if n else math.nan,
        "decay_ratio": min(decays) / max(decays) if decays else math.nan,
    }


@given(VALUES, COUNTS, COUNTS)
def test_metrics_equal_those_of_all_n_values(computed, ones, zeros):
    found = spectrum_metrics(computed, ones, zeros, branch=True)
    assert tuple(found) == NAMES
    everything = np.concatenate([computed, np.ones(ones), np.zeros(zeros)])
    expected = direct(everything)
    active = direct(np.concatenate([computed, np.ones(ones)]))
    expected |= {"S_active": active["S"], "min_re_active": active["min_re"]}
    for name, value in expected.items():
        assert same(found[name], value), name
        assert type(found[name]) is float
    if len(everything):
        assert found["negative"] + found["positive"] + found["zero"] == pytest.approx(1, abs=1e-15)
    assert math.isnan(spectrum_metrics(computed, ones, zeros, branch=False)["euler_stable"])


@given(VALUES, COUNTS, COUNTS)
def test_a_spectrum_expands_to_n_values_with_the_same_metrics(computed, ones, zeros):
    spectrum = Spectrum(computed, ones, zeros, len(computed), "matrix", "branch", "f", "host-dense", "", certificate())
    values = spectrum.values
    assert len(values) == spectrum.n == len(computed) + ones + zeros
    assert np.array_equal(values, values[np.lexsort((values.imag, values.real))])
    again = spectrum_metrics(values, 0, 0, branch=True)
    for name in set(NAMES) - {"S_active", "min_re_active"}:
        assert same(again[name], spectrum.metrics[name]), name
    repr(spectrum)


@pytest.mark.parametrize(
    ("values", "zeros", "s", "s_active"),
    [
        ((2, 4), 0, 2, 2),
        ((2, 4), 3, math.inf, 2),
        ((-2, 4), 0, -2, -2),
        ((-2, 4), 3, -2, -2),
        ((-4, -2), 0, 0.5, 0.5),
        ((-4, -2), 3, 0, 0.5),
        ((0, 4), 0, math.inf, math.inf),
        ((0, 0), 0, math.nan, math.nan),
        ((), 3, math.nan, math.nan),
        ((), 0, math.nan, math.nan),
        ((-0.0, 4), 0, math.inf, math.inf),
        ((1e-300, 1e300), 0, math.inf, math.inf),
        ((-1e-300, 1e300), 0, -math.inf, -math.inf),
        ((3 + 5j, 3 - 5j), 0, 1, 1),
    ],
)
def test_stiffness_index_is_equation_10(values, zeros, s, s_active):
    found = metrics(*values, zeros=zeros)
    assert same(found["S"], s)
    assert same(found["S_active"], s_active)
    assert not (found["S"] == 0 and math.copysign(1, found["S"]) < 0)


def test_no_warning_is_raised_for_infinities():
    with np.errstate(all="raise"):
        assert stiffness_index(np.array([0.0, 1.0])) == math.inf
        assert stiffness_index(np.array([1e-300, 1e300])) == math.inf


def test_structural_zeros_and_ones_are_counted():
    found = metrics(-1, 0.5, ones=3, zeros=5)
    assert (found["negative"], found["positive"], found["zero"]) == (0.1, 0.4, 0.5)
    assert found["abscissa"] == 1
    assert found["min_re"] == -1
    assert metrics(0.5, zeros=5)["min_re"] == 0
    assert metrics(0.5, zeros=5)["min_re_active"] == 0.5
    assert math.copysign(1, metrics(-0.0)["min_re"]) == 1


def test_euler_stable_is_the_share_in_the_disc_of_step_1():
    assert metrics(-1, -2, -2.1, 0.1, -1 + 1j, -1 - 1j, -1 + 1.1j, zeros=3, branch=True)["euler_stable"] == 0.7
    assert metrics(-1, ones=1, branch=True)["euler_stable"] == 0.5
    assert math.isnan(metrics(branch=True)["euler_stable"])


def test_float32_spectra_have_plain_float_metrics():
    found = spectrum_metrics(np.array([0.5 + 1j, 0.5 - 1j], np.complex64), 1, 0, branch=True)
    assert all(type(v) is float for v in found.values())


def test_the_largest_stable_step_is_that_of_forward_euler():
    values = np.array([-1 + 2j, -1 - 2j, -0.5, -3, 0.25, 2 + 1j, 2 - 1j])
    h = metrics(*values, zeros=2, branch=True)["stable_step"]
    decaying = values[values.real < 0]
    assert np.abs(1 + h * decaying).max() == pytest.approx(1)
    assert np.abs(1 + 1.001 * h * decaying).max() > 1
    assert metrics(1, 2, branch=True)["stable_step"] == math.inf
    assert math.isnan(metrics(-1)["stable_step"])
    assert metrics(-1e-300, branch=True)["stable_step"] == pytest.approx(2e300)


def test_departure_from_normality_is_the_strict_triangle_of_the_schur_form():
    a = np.triu(np.random.default_rng(0).standard_normal((6, 6)))
    values = np.diag(a) + 1.0
    for scale in (1.0, 1e-200, 1e150):
        found = spectrum_metrics(
            scale * np.diag(a).astype(complex), 0, 0, branch=False, frobenius=scale * np.linalg.norm(a)
        )
        assert found["departure"] == pytest.approx(scale * np.linalg.norm(np.triu(a, 1)))
    shifted = spectrum_metrics(values.astype(complex), 2, 3, branch=False, shift=1, frobenius=np.linalg.norm(a))
    assert shifted["departure"] == pytest.approx(np.linalg.norm(np.triu(a, 1)))
    assert spectrum_metrics(np.zeros(3, complex), 0, 0, branch=False, frobenius=0.0)["departure"] == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (math.inf, "infinite"),
        (-math.inf, "-infinite"),
        (math.nan, "undefined"),
        (np.float64(math.inf), "infinite"),
        (1 / 3, "0.33333"),
        (-123456789.0, "-1.2346e+08"),
        (0.0, "0"),
    ],
)
def test_spell(value, text):
    assert spell(value) == text


POSITIVE = st.floats(1e-6, 1e6)


@settings(deadline=None)
@given(POSITIVE, POSITIVE, st.floats(0, 1), st.floats(0, 0.999), st.booleans(), st.integers(0, 2**32))
def test_no_ends_within_their_errors_give_an_s_further_off(top, bottom, share_max, share_min, negative, seed):
    error_max, error_min = share_max * top, share_min * bottom
    bottom = -bottom if negative else bottom
    rng = np.random.default_rng(seed)
    bound = stiffness_error({"max": top, "min": bottom}, error_max, error_min)
    moved_max = top + error_max * np.concatenate([[1, -1, 1, -1], rng.uniform(-1, 1, 200)])
    moved_min = bottom + error_min * np.concatenate([[1, 1, -1, -1], rng.uniform(-1, 1, 200)])
    gap = np.abs(moved_max / moved_min - top / bottom).max()
    assert gap <= bound * (1 + 1e-9) + 1e-12 * top / abs(bottom)
    # and it is no looser than the worst corner
    assert bound <= gap * (1 + 1e-9) + 1e-9 * top / abs(bottom)


@given(POSITIVE, POSITIVE)
def test_stiffness_error_is_first_order_for_small_errors(top, bottom):
    h = 1e-6
    by_difference = (top + h * top) / (bottom - h * bottom) - top / bottom
    assert stiffness_error({"max": top, "min": bottom}, h * top, h * bottom) == pytest.approx(by_difference, rel=1e-5)


@pytest.mark.parametrize(
    ("low", "error_low", "expected"),
    [
        (1e-3, 1e-3, math.inf),
        (1e-3, 2e-3, math.inf),
        (-1e-3, 1e-3, math.inf),
        (0.0, 1e-3, math.inf),
        (1.0, math.inf, math.inf),
        (1.0, math.nan, math.inf),
        (1.0, 0.0, 0.0),
        (5e-324, 0.0, 0.0),
    ],
)
def test_stiffness_error_near_a_zero_minimum(low, error_low, expected):
    assert stiffness_error({"max": 2.0, "min": low}, 0.0, error_low) == expected


def test_stiffness_error_grows_without_bound_towards_the_zero_minimum():
    found = [stiffness_error({"max": 1.0, "min": 1.0}, 0.0, 1 - 10.0**-e) for e in (1, 4, 8)]
    assert found[0] < found[1] < found[2]
    assert found[2] > 0.9e8


def test_stiffness_error_is_a_plain_number_whatever_it_is_given():
    for kind in (float, np.float32, np.float64):
        for error in (0.1, math.inf):
            found = stiffness_error({"max": kind(2), "min": kind(1)}, error, 0.1)
            assert type(found) is float


def certificate(**fields):
    plain = {
        "certified": (),
        "trace_error": 0.0,
        "square_error": 0.0,
        "reduction_check": 0.0,
        "error": 0.0,
        "s_error": 0.0,
        "s_active_error": 0.0,
        "near_axis": 0,
        "axis_error": 0.0,
        "failures": (),
    }
    return Certificate(**plain | fields)


ANY = st.floats(allow_nan=True, allow_infinity=True)


@given(
    st.lists(st.builds(Certified, st.builds(complex, ANY, ANY), ANY, ANY, ANY, st.booleans()), max_size=3).map(tuple),
    ANY,
    ANY,
    st.lists(st.text(), max_size=2).map(tuple),
)
def test_a_certificate_survives_strict_json(certified, error, s_error, failures):
    assume(not any(f in ("inf", "-inf", "nan") for f in failures))
    before = certificate(certified=certified, error=error, s_error=s_error, failures=failures, near_axis=3)
    text = json.dumps(before.to_json(), allow_nan=False)
    after = Certificate.from_json(json.loads(text))
    assert repr(after) == repr(before)
    assert after.passed == (not failures)


def test_numpy_infinities_survive_json_too():
    before = certificate(s_error=np.float64(np.inf), error=np.float64(np.nan))
    after = Certificate.from_json(json.loads(json.dumps(before.to_json(), allow_nan=False)))
    assert after.s_error == math.inf
    assert math.isnan(after.error)


def test_a_decay_ratio_is_of_eigenvalues_whose_sign_is_certain():
    values = np.array([-4.0, -2.0, -1e-18, 1e-19], complex)
    assert spectrum_metrics(values, 0, 0, branch=True)["decay_ratio"] == pytest.approx(4e18)
    found = spectrum_metrics(values, 0, 0, branch=True, axis_error=1e-15)
    assert found["decay_ratio"] == 2
    assert found["negative"] == 0.75
    assert math.isnan(spectrum_metrics(values, 0, 0, branch=True, axis_error=5)["decay_ratio"])


def test_the_decay_ratio_of_a_conserving_system_leaves_its_zero_out():
    a = torch.tensor([[-2.0, 3.0, 0.0], [2.0, -3.5, 0.0], [0.0, 0.5, 0.0]], dtype=torch.float64) + 0.0
    mixed = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    a = mixed @ a @ mixed.T
    found = stiffcore.spectrum(lambda y: a @ y, torch.zeros(3, dtype=torch.float64))
    true = np.sort(np.linalg.eigvals(a.numpy()).real)
    assert found.metrics["decay_ratio"] == pytest.approx(true[0] / true[1], rel=1e-12)
    assert "left out of the decay ratio" in found.verdict
