"""Claims about the compiled code for small squares: LAPACK's values, zeros and doubts, whatever the matrix."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
from flint import ctx
from scipy.optimize import linear_sum_assignment

from stiffcore.eigen import compiled, small, windows
from stiffcore.eigen import squares as host
from stiffcore.eigen.windows import WindowSpectrum
from stiffcore.errors import InputError
from stiffcore.jacobian.slices import Squares
from stiffcore.metrics import HISTOGRAM_EDGES, Tally
from tests.adversary import rational

ROOT = Path(__file__).parents[1]
EPS = np.finfo(float).eps
ORDERS = range(1, small.MOST_ORDER + 1)


def orthogonal(rng, n):
    return np.linalg.qr(rng.standard_normal((n, n)))[0]


def jordan(rng, n):
    q = orthogonal(rng, n)
    return q @ (np.eye(n) + np.diag(rng.integers(1, 4, n - 1), 1)) @ q.T


def graded(rng, n):
    d = 2.0 ** rng.integers(-40, 41, n)
    return rng.standard_normal((n, n)) * d[:, None] / d


def scaled_rows(rng, n):
    return rng.standard_normal((n, n)) * 10.0 ** -np.arange(0, 3 * n, 3)[:, None]


def clustered(rng, n):
    return np.triu(rng.standard_normal((n, n)), 1) + np.diag(1 + 1e-9 * rng.standard_normal(n))


def reducible(rng, n):
    p = rng.permutation(n)
    return np.triu(rng.standard_normal((n, n)) * rng.integers(0, 2, (n, n)), rng.integers(0, 2))[np.ix_(p, p)]


def nearly_reducible(rng, n):
    return reducible(rng, n) + 1e-17 * rng.standard_normal((n, n))


FAMILIES = {
    "gaussian": lambda rng, n: rng.standard_normal((n, n)),
    "integers": lambda rng, n: rng.integers(-2, 3, (n, n)).astype(float),
    "sparse": lambda rng, n: rng.standard_normal((n, n)) * (rng.random((n, n)) < 0.4),
    "defective": jordan,
    "graded": graded,
    "scaled_rows": scaled_rows,
    "clustered": clustered,
    "reducible": reducible,
    "nearly_reducible": nearly_reducible,
    "skew": lambda rng, n: np.triu(a := rng.standard_normal((n, n)), 1) - np.triu(a, 1).T,
    "cyclic": lambda rng, n: np.roll(np.eye(n), rng.integers(0, n), axis=0),  # no step by the book moves it
    "rank_one": lambda rng, n: np.outer(rng.standard_normal(n), rng.standard_normal(n)),
    "constant": lambda rng, n: np.full((n, n), rng.standard_normal()),
    "companion": lambda rng, n: scipy.linalg.companion(np.poly(rng.integers(-3, 4, n))) if n > 1 else np.ones((1, 1)),
    "grcar": lambda rng, n: np.tril(np.triu(np.ones((n, n))), 3) - np.eye(n, k=-1),
    "orthogonal": orthogonal,
    "spread": lambda rng, n: rng.standard_normal((n, n)) * 10.0 ** rng.integers(-60, 61, (n, n)),
}


def solved(a):
    """By the compiled code, of a matrix in its range."""
    work, re, im = np.zeros((8, 8)), np.zeros(8), np.zeros(8)
    work[: len(a), : len(a)] = a
    assert small.small_eigenvalues(work, len(a), re, im) >= 0
    return re[: len(a)] + 1j * im[: len(a)]


def exact(a):
    """Eigenvalues from the characteristic polynomial, in fractions and then in isolating discs."""
    ctx.prec = 300
    roots = rational(a).charpoly().numer().complex_roots()
    return np.array([complex(z.real.mid(), z.imag.mid()) for z, times in roots for _ in range(times)])


def errors(found, true):
    """How far values are from the true ones, one each."""
    gaps = np.abs(found[:, None] - true)
    return gaps[linear_sum_assignment(gaps)].max()


@pytest.mark.parametrize("name", FAMILIES)
def test_values_are_as_near_to_the_true_ones_as_lapacks(name):
    rng = np.random.default_rng(1)
    for n in ORDERS:
        for _ in range(4):
            a = FAMILIES[name](rng, n)
            true = exact(a)
            found, lapack = solved(a), np.linalg.eigvals(a)
            norm = np.linalg.norm(a)
            # a nearly multiple value differs by the root of rounding between any two stable ways
            assert errors(found, true) <= 20 * errors(lapack, true) + 20 * n * EPS * norm, (n, a)
            for value in found:
                smallest = np.linalg.svd(a - value * np.eye(n), compute_uv=False)[-1]
                assert smallest <= 20 * n * EPS * norm, (n, a)
            pairs = found[found.imag != 0]
            assert np.array_equal(pairs[::2], pairs[1::2].conj())


def batch(name, n, dtype, seed=2):
    """Squares of one family, some of them 0, as an accumulation gives them."""
    rng = np.random.default_rng(seed)
    squares = np.stack([FAMILIES[name](rng, n) * (rng.random() < 0.8) for _ in range(60)])
    return Squares(np.arange(5), 0, squares.reshape(5, 12, n, n).astype(dtype))


def taken(squares):
    found = WindowSpectrum(keep=True)
    found.add(squares)
    return found


def by_lapack(squares, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(windows, "MOST_ORDER", 0)
        return taken(squares)


# values of a defective matrix move further in float32, in which LAPACK computes them, than what decides a doubt
CASES = [(name, dtype) for name in FAMILIES for dtype in ("f8", "f4") if (name, dtype) != ("defective", "f4")]


@pytest.mark.parametrize(("name", "dtype"), [case for case in CASES if case != ("spread", "f4")])
def test_zeros_signs_and_doubts_are_lapacks(name, dtype, monkeypatch):
    for n in ORDERS:
        squares = batch(name, n, dtype)
        found, expected = taken(squares), by_lapack(squares, monkeypatch)
        assert found.near_axis == expected.near_axis, n
        assert found.tally.count == expected.tally.count, n
        for what in ("negative", "positive"):  # a sign that is rounding is a throw of dice
            assert abs(getattr(found.tally, what) - getattr(expected.tally, what)) <= found.near_axis, (n, what)
        assert found.tally.histogram.sum() == found.tally.count == len(found.values())
        assert found.frobenius == pytest.approx(expected.frobenius, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-320, 1e-200, 1e-130, 1e130, 1e200])
def test_numbers_near_the_ends_of_float64_are_lapacks(scale, monkeypatch):
    squares = batch("sparse", 3, "f8")
    squares.values[:] *= scale
    found, expected = taken(squares), by_lapack(squares, monkeypatch)
    assert np.array_equal(np.sort_complex(found.values()), np.sort_complex(expected.values()))
    assert found.near_axis == expected.near_axis


def test_one_number_that_is_huge_or_not_finite_does_not_hide():
    for n in (3, 9):
        squares = Squares(np.arange(5), 0, np.random.default_rng(2).standard_normal((5, 12, n, n)))
        squares.values[2, 3, 1, 1] = 1e150
        assert np.abs(taken(squares).values()).max() == pytest.approx(1e150)
        for bad in (np.nan, np.inf, -np.inf):
            squares.values[2, 3, 1, 1] = bad
            with pytest.raises(InputError, match="not finite"):
                taken(squares)


def test_a_matrix_that_takes_too_many_steps_is_left_to_lapack(monkeypatch):
    a = np.zeros((8, 8))
    a[:4, :4] = FAMILIES["gaussian"](np.random.default_rng(0), 4)
    numbers = np.zeros(3), np.zeros(8), np.zeros(8)
    assert small.one_spectrum.py_func(a.copy(), 4, 1.0, EPS, *numbers) == small.FOUND
    monkeypatch.setattr(small, "_STEPS", 1)
    for name in ("small_eigenvalues", "_take_apart"):  # what is compiled has its own number
        monkeypatch.setattr(small, name, getattr(small, name).py_func)
    assert small.one_spectrum.py_func(a, 4, 1.0, EPS, *numbers) == small.DOUBTFUL


def test_every_real_part_is_in_its_bin():
    inner = HISTOGRAM_EDGES[1:-1]
    edge = np.concatenate([inner, np.nextafter(inner, 0), np.nextafter(inner, np.inf), [1e-30, -1e-30, 1e100, -1e100]])
    part = host.take(edge.reshape(1, 1, 1, -1), 0, len(edge), 0.0, 3)
    assert not len(part.doubtful)
    assert np.array_equal(part.histogram, np.histogram(edge, HISTOGRAM_EDGES)[0])


def test_metrics_are_those_of_the_values():
    found = WindowSpectrum(keep=True)
    for n in ORDERS:
        found.add(batch("gaussian", n, "f8"))
    tally, again = found.tally, Tally()
    again.add(found.values())
    assert np.array_equal(tally.histogram, again.histogram)
    first, second = (t.metrics(0, 7, branch=True) for t in (tally, again))
    for name, value in first.items():
        assert value == pytest.approx(second[name], rel=1e-14, nan_ok=True), name


FOLDER = """
import numpy as np
from stiffcore.eigen import compiled, squares
print(compiled._FOLDER, squares.largest_entry(np.ones((1, 1, 1, 1))))
"""


def folder_for(cache):
    """What a fresh process says of its folder, with that cache folder; it must compute in any case."""
    found = subprocess.run(
        [sys.executable, "-c", FOLDER],
        env=os.environ | {"XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
        check=True,
    )
    path, one = found.stdout.split()
    assert one == "1.0"
    return None if path == "None" else Path(path)


def test_compiled_code_is_kept_and_made_again_where_it_is_damaged(tmp_path):
    folder = folder_for(tmp_path)
    assert folder.is_relative_to(tmp_path)
    assert (kept := [*folder.rglob("*.nbc")])
    assert folder.stat().st_mode & 0o777 == 0o700
    for damaged in folder.rglob("*.nb?"):  # half written
        damaged.write_bytes(damaged.read_bytes()[:40])
    assert folder_for(tmp_path) == folder
    assert all(path.stat().st_size > 40 for path in kept)


def test_nothing_is_kept_where_a_stranger_can_write(tmp_path, monkeypatch):
    def folder_in(cache):
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        return compiled.compiled_folder()

    own, shared = tmp_path / "own", tmp_path / "shared"
    folder = folder_in(own)
    assert folder.is_relative_to(own)
    shared.mkdir()
    shared.chmod(0o777)
    assert folder_in(shared) is None
    (own / "stiffcore").chmod(0o770)
    assert folder_in(own) is None
    (own / "stiffcore").chmod(0o700)
    folder.rename(shared / "theirs")
    folder.symlink_to(shared / "theirs")
    assert folder_in(own) is None
    (tmp_path / "file").write_text("")
    assert folder_in(tmp_path / "file") is None
    true = os.lstat
    monkeypatch.setattr(compiled.os, "lstat", lambda path: os.stat_result((*true(path)[:4], 4321, *true(path)[5:])))
    assert folder_in(tmp_path / "new") is None  # another user's


def test_only_who_has_small_squares_imports_numba():
    for path in (ROOT / "stiffcore").rglob("*.py"):
        if path.stem in ("compiled", "small", "small_cuda", "squares"):
            continue
        first = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = [f"{getattr(node, 'module', '')}.{alias.name}" for node in first for alias in node.names]
        assert not [name for name in names if re.search(r"numba|eigen\.(compiled|small|squares)", name)], path


ON_A_DEVICE = """
import numpy as np
from stiffcore.eigen import small_cuda
from stiffcore.eigen import squares as host

rng = np.random.default_rng(0)
for n, dtype in ((1, "f8"), (2, "f8"), (3, "f8"), (5, "f8"), (8, "f8"), (3, "f4")):
    squares = rng.standard_normal((4, n, n, 5)).astype(dtype)
    squares[0, ..., 3], squares[1, 0, 0, 4], squares[2, 0, 0, 1] = 0, 1e30, np.nan
    found, expected = (take(squares, 3, 18, 1.0, 3) for take in (small_cuda.take, host.take))
    assert np.array_equal(found.doubtful, expected.doubtful)
    assert found.counts == expected.counts, n
    order = [z[np.lexsort((z.imag, np.round(z.real, 9)))] for z in (found.values, expected.values)]
    assert np.allclose(*order, rtol=1e-6 if dtype == "f4" else 1e-12, atol=0), n
    assert np.allclose(found.sums, expected.sums)
print("same")
"""


@pytest.mark.parametrize("simulated", [True, pytest.param(False, marks=pytest.mark.gpu)])
def test_threads_of_a_device_find_the_same(simulated):
    """In numba's simulator, one thread after the other, where there is no device."""
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": str(int(simulated))}
    found = subprocess.run(
        [sys.executable, "-c", ON_A_DEVICE], env=environment, capture_output=True, text=True, check=False
    )
    assert found.stdout.strip() == "same", found.stderr
