"""In-place routines on parts of arrays against NumPy's and SciPy's own, and nothing beside those parts touched."""

import numpy as np
import pytest
import scipy.linalg

from stiffcore.eigen import blas

DTYPES = pytest.mark.parametrize("dtype", [np.float64, np.complex128])


def numbers(rows, columns, dtype, seed=0):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((rows, columns)).astype(dtype)
    if dtype is np.complex128:
        a += 1j * rng.standard_normal((rows, columns))
    return np.asfortranarray(a)


@DTYPES
@pytest.mark.parametrize(
    ("rows", "columns", "inner"), [(7, 5, 3), (1, 5, 3), (7, 1, 3), (7, 5, 1), (1, 1, 1), (7, 0, 3)]
)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_is_added_to_a_part(dtype, rows, columns, inner, transposed):
    whole, b = numbers(12, 8, dtype), numbers(9, 8, dtype, 2)[4 : 4 + inner, :columns]
    a = numbers(inner, rows, dtype, 1).T if transposed else numbers(11, 9, dtype, 1)[2 : 2 + rows, 1 : 1 + inner]
    expected = whole.copy()
    expected[3 : 3 + rows, 2 : 2 + columns] += -2 * a @ b
    blas.add_product(whole[3 : 3 + rows, 2 : 2 + columns], -2.0, a, b)
    assert np.allclose(whole, expected, rtol=0, atol=1e-14)


@DTYPES
@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("trans", ["N", "T", "C"])
@pytest.mark.parametrize(("order", "columns"), [(6, 4), (1, 4), (6, 1), (6, 0)])
def test_a_triangular_system_is_solved_in_its_place(dtype, lower, unit, trans, order, columns):
    a = numbers(11, 9, dtype, 1)[2 : 2 + order, 1 : 1 + order] + 3 * np.eye(order)
    a, whole = np.asfortranarray(a), numbers(12, 8, dtype)
    expected = whole.copy()
    part = (slice(3, 3 + order), slice(2, 2 + columns))
    if columns:
        expected[part] = scipy.linalg.solve_triangular(a, whole[part], lower=lower, unit_diagonal=unit, trans=trans)
    blas.solve_triangular(a, whole[part], lower=lower, unit=unit, trans=trans)
    assert np.allclose(whole, expected, rtol=1e-12, atol=1e-13)


@DTYPES
@pytest.mark.parametrize(("rows", "columns"), [(7, 7), (9, 4), (5, 1), (1, 1)])
def test_factors_are_those_of_lapack(dtype, rows, columns):
    whole = numbers(12, 8, dtype)
    expected = whole.copy(order="F")
    (getrf,) = scipy.linalg.get_lapack_funcs(("getrf",), (whole,))
    expected[3 : 3 + rows, 1 : 1 + columns], swapped, _ = getrf(whole[3 : 3 + rows, 1 : 1 + columns])
    pivots, regular = blas.factor(whole[3 : 3 + rows, 1 : 1 + columns])
    assert regular
    assert np.array_equal(pivots, swapped)
    assert np.array_equal(whole, expected)


@DTYPES
@pytest.mark.parametrize("order", [1, 2, 7])
def test_a_definite_matrix_has_a_root_in_its_place(dtype, order):
    whole = numbers(12, 8, dtype)
    before, part = whole.copy(order="F"), (slice(3, 3 + order), slice(1, 1 + order))
    a = numbers(order, order, dtype, 1)
    whole[part] = a @ a.conj().T + np.eye(order)
    expected = scipy.linalg.cholesky(whole[part])
    assert blas.cholesky(whole[part])
    assert np.allclose(np.triu(whole[part]), expected, rtol=0, atol=1e-13)
    whole[part] = before[part]
    assert np.array_equal(whole, before)
    assert not blas.cholesky(np.asfortranarray(whole[part] - 9 * np.eye(order)))


def test_a_zero_pivot_is_said():
    a = numbers(6, 6, np.float64)
    a[:, 2] = 0
    assert not blas.factor(a)[1]


def test_what_is_not_column_major_is_refused():
    with pytest.raises(ValueError, match="column-major"):
        blas.factor(np.eye(4)[::2])
