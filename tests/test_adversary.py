"""No number that is called certified or proved is wrong: a few of what bench/honesty.py asks thousands of times."""

import json

import numpy as np
import pytest
import torch

from stiffcore.eigen import certificate
from stiffcore.errors import StiffcoreError
from stiffcore.spectra import Certificate
from tests import adversary
from tests.adversary import FUNCTIONS, MATRICES, SOLVERS, TALL, Truth, function_case, judged, matrix_case, tall_case

BOTH = (torch.float64, torch.float32)
SLOW = pytest.mark.slow


def lies_of(case, solver):
    try:
        return judged(case, solver).lies
    except StiffcoreError:  # refused: nothing is said
        return ()


def solvers_of(name):
    """Divisions of far from normal blocks of some dozens of rows try every curve: those are slow."""
    if name not in adversary.COSTLY:
        return [pytest.param(name, SOLVERS, id=name)]
    quick = tuple(solver for solver in SOLVERS if solver != "divide")
    return [pytest.param(name, quick, id=name), pytest.param(name, ("divide",), id=f"{name}, divide", marks=SLOW)]


@pytest.mark.parametrize(("name", "solvers"), [x for name in [*MATRICES, *FUNCTIONS] for x in solvers_of(name)])
def test_nothing_that_is_certified_is_wrong(name, solvers):
    make = matrix_case if name in MATRICES else function_case
    for seed, dtype in enumerate(BOTH):
        case = make(name, np.random.default_rng([seed, 7]), dtype)
        for solver in solvers:
            assert lies_of(case, solver) == (), (case.name, solver)


def slowly(name):
    return name if name == "graded" else pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", map(slowly, MATRICES))
def test_what_is_proved_at_larger_orders_is_true(name, monkeypatch):
    monkeypatch.setattr(certificate, "FULL_ORDER", 0)
    for seed, dtype in enumerate(BOTH):
        assert lies_of(matrix_case(name, np.random.default_rng([seed, 7]), dtype), "host-dense") == ()


def test_at_larger_orders_what_is_well_conditioned_is_certified_and_what_is_not_shown_is_said(monkeypatch):
    monkeypatch.setattr(certificate, "FULL_ORDER", 0)
    found = adversary.solved(tall_case("skew couplings", np.random.default_rng(7), torch.float64).reduction)
    assert found.verdict == "certified"
    assert found.certificate.error < 1e-8
    found = adversary.solved(tall_case("large Toeplitz block in company", np.random.default_rng(7), BOTH[0]).reduction)
    assert found.certificate.first_order == len(found.certificate.certified) > 0
    assert found.certificate.unproved == ("largest", "smallest")
    assert found.negative_between == (0, found.k)
    assert 0 < found.metrics["negative"] < 1  # as computed: what was known before is not lost
    for said in ("0 to 100 % are negative", "as computed", "to first order", "found, not proved"):
        assert said in found.verdict
    assert Certificate.from_json(json.loads(json.dumps(found.certificate.to_json(), allow_nan=False))) is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", TALL)
def test_no_end_that_is_certified_is_wrong(name):
    for seed, dtype in enumerate(BOTH):
        case = tall_case(name, np.random.default_rng([seed, 7]), dtype)
        for solver in adversary.solvers_for(case):
            assert lies_of(case, solver) == (), solver


def test_well_conditioned_matrices_are_certified_and_nothing_is_open():
    """Honesty is not bought with silence."""
    for seed in range(3):
        for name in ("random", "skew-dominated", "oscillators"):
            case = matrix_case(name, np.random.default_rng([seed, 8]), torch.float64)
            if np.abs(case.truth.values.real).min() < 1e-3:
                continue
            found = judged(case, "host-dense")
            assert found.plain
            assert found.lies == ()


def test_the_truth_from_300_bits_is_that_of_600(monkeypatch):
    for name in MATRICES:
        a = adversary.rational(MATRICES[name](np.random.default_rng([0, 9]))[0])
        if a.nrows() > 24 or "Jordan" in name or "Toeplitz" in name:  # defective: known by construction
            continue
        found = []
        for bits in (300, 600):
            monkeypatch.setattr(adversary, "BITS", bits)
            found.append(adversary.eigenvalues(a))
        (first, negative), (second, again) = found
        scale = np.abs(second).max()
        apart = np.abs(first[:, None] - second[None]).min(axis=1).max()
        assert apart <= 1e-15 * scale, name
        assert negative == again


def test_a_truth_that_is_known_is_that_of_300_bits():
    for name in ("companion", "Kahan", "random triangular", "near the axis", "oscillators"):
        a, values = MATRICES[name](np.random.default_rng([1, 9]))
        if values is None:
            continue
        known, found = Truth.known(values), Truth.of(adversary.rational(a))
        assert np.abs(known.values[:, None] - found.values[None]).min(axis=0).max() <= 1e-15 * np.abs(values).max()
        assert found.negative[0] <= known.negative[0] <= found.negative[1]


def test_a_lie_is_found(monkeypatch):
    """The judge itself: what is off by more than is said, and counts that are wrong."""
    case = matrix_case("random", np.random.default_rng([3, 7]), torch.float64)
    assert judged(case, "host-dense").lies == ()
    size = np.abs(case.truth.values).max()
    wrong = Truth.known(case.truth.values + 1e-6 * size)
    monkeypatch.setitem(case.__dict__, "truth", wrong)
    assert any("is off by" in lie for lie in judged(case, "host-dense").lies)
    monkeypatch.setitem(case.__dict__, "truth", Truth(case.truth.values, (case.x.numel() + 1,) * 2))
    assert any("said to be negative" in lie for lie in judged(case, "host-dense").lies)
