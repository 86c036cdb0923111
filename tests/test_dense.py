"""Claims about the dense solvers: identities on the original matrix first, then agreement with numpy."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linear_sum_assignment
from threadpoolctl import threadpool_limits

from stiffcore.eigen import dense, device, lapack
from stiffcore.errors import InputError, StiffcoreError

DTYPES = [np.float32, np.float64]
SOLVERS = ["lapack", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
"""LAPACK, and the functions of `eigen.device` by the torch device they work on."""


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads of BLAS beside other work on two cores were seen to take 10 times as long."""
    with threadpool_limits(1):
        yield


def fortran(a, dtype=np.float64):
    return np.array(a, dtype, order="F")


def eigenvalues(a, solver="lapack"):
    if solver != "lapack":
        return device.device_eigenvalues(a, solver)
    return dense.hessenberg_eigenvalues(dense.to_hessenberg(a.copy(order="F")))


def eigenvectors(a, values, solver="lapack"):
    if solver != "lapack":
        return device.device_eigenvectors(a, values, solver)
    return dense.hessenberg_eigenvectors(dense.to_hessenberg(a.copy(order="F")), values)


def residuals(a, values, vectors):
    """Largest right and left residual over the norm of the ORIGINAL matrix, in double precision."""
    a = a.astype(float)
    x, y = vectors.right.astype(complex), vectors.left.astype(complex)
    scale = np.linalg.norm(a) or 1.0
    right = np.linalg.norm(a @ x - x * values, axis=0)
    left = np.linalg.norm(y.conj().T @ a - values[:, None] * y.conj().T, axis=1)
    return max(right.max(initial=0), left.max(initial=0)) / scale


def matched_distance(ours, theirs):
    distance = np.abs(ours[:, None] - theirs[None, :])
    rows, columns = linear_sum_assignment(distance)
    return distance[rows, columns].max(initial=0)


def assert_conjugate_closed(values):
    assert np.array_equal(values, dense.sort_eigenvalues(values.conj()))


def assert_unit(vectors):
    for side in (vectors.right, vectors.left):
        assert np.linalg.norm(side, axis=0) == pytest.approx(1, abs=1e-5)


def gaussian(k, dtype=np.float64, seed=0):
    return fortran(np.random.default_rng(seed).standard_normal((k, k)) / max(k, 1) ** 0.5, dtype)


def grcar(k):
    return fortran(sum(np.eye(k, k=d) for d in range(4)) - np.eye(k, k=-1))


def isolated(k=40):
    """Zero rows and columns, and triangular ends under a permutation: balancing deflates most of it."""
    a = gaussian(k)
    a[:5] = 0
    a[:, 7:11] = 0
    a[20:, :20] = 0
    a[30:, 30:] = np.triu(a[30:, 30:])
    order = np.random.default_rng(1).permutation(k)
    return fortran(a[np.ix_(order, order)])


def badly_scaled(k=40):
    scale = 2.0 ** np.random.default_rng(2).integers(-20, 21, k)
    return fortran(gaussian(k) * scale[:, None] / scale)


def repeated(k=30):
    q, _ = np.linalg.qr(gaussian(k))
    return fortran(q @ np.diag(np.repeat([1.0, -2.0, 3.0], k // 3)) @ q.T)


STRUCTURED = {
    "isolated": isolated(),
    "badly scaled": badly_scaled(),
    "isolated and badly scaled": fortran(isolated() * np.exp2(np.arange(40) - 20.0)[:, None]),
    "Jordan block": fortran(2 * np.eye(6) + np.eye(6, k=1)),
    "Jordan block, transposed": fortran(2 * np.eye(6) + np.eye(6, k=-1)),
    "Grcar": grcar(60),
    "rotation": fortran([[0, -1], [1, 0]]),
    "cyclic shift": fortran(np.roll(np.eye(12), 1, axis=0)),
    "zero": fortran(np.zeros((9, 9))),
    "identity": fortran(np.eye(9)),
    "upper triangular": fortran(np.triu(gaussian(30))),
    "lower triangular": fortran(np.tril(gaussian(30))),
    "nilpotent": fortran(np.triu(gaussian(12), 1)),
    "repeated": repeated(),
    "symmetric": fortran(gaussian(30) + gaussian(30).T),
    "skew": fortran(gaussian(31) - gaussian(31).T),
}
SENSITIVE = {"Jordan block", "Jordan block, transposed", "nilpotent", "Grcar"}


@pytest.fixture(params=STRUCTURED)
def structured(request):
    return request.param, STRUCTURED[request.param]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0, 1, 2, 3, 50, 300])
def test_random_matrices_keep_every_identity(k, dtype, solver):
    a = gaussian(k, dtype)
    eps = np.finfo(dtype).eps
    values = eigenvalues(a, solver)
    assert values.shape == (k,)
    assert values.dtype == np.result_type(dtype, np.complex64)
    assert_conjugate_closed(values)
    assert abs(values.sum() - np.trace(a.astype(float))) <= 100 * eps * max(k, 1)
    assert abs((values**2).sum() - np.trace(a.astype(float) @ a.astype(float))) <= 100 * eps * max(k, 1)
    asked = values[:: max(1, k // 12)]
    vectors = eigenvectors(a, asked, solver)
    assert vectors.right.shape == vectors.left.shape == (k, len(asked))
    assert vectors.converged.dtype == bool
    assert vectors.converged.all()
    assert_unit(vectors)
    # ?hsein stops at its first step that grows enough: seen 113 eps at k = 300, and less with other threads.
    assert residuals(a, asked, vectors) <= 1000 * eps


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 2e-3), (np.float64, 1e-10)])
@pytest.mark.parametrize("k", [1, 2, 3, 50, 300])
def test_random_matrices_agree_with_numpy_eigenvalue_by_eigenvalue(k, dtype, tolerance, solver):
    a = gaussian(k, dtype)
    assert matched_distance(eigenvalues(a, solver), np.linalg.eigvals(a.astype(float))) <= tolerance


@pytest.mark.parametrize("solver", SOLVERS)
def test_structured_matrices_keep_trace_pairs_and_residuals(structured, solver):
    name, a = structured
    values = eigenvalues(a, solver)
    norm = np.linalg.norm(a)
    assert_conjugate_closed(values)
    assert abs(values.sum() - np.trace(a)) <= 1e-12 * norm
    vectors = eigenvectors(a, values, solver)
    assert vectors.converged.all()
    assert_unit(vectors)
    # Balancing trades the norm of A for its own: a vector's residual may grow by the ratio.
    assert residuals(a, values, vectors) <= (1e-9 if name == "isolated and badly scaled" else 1e-13)


def test_structured_matrices_agree_with_numpy(structured):
    name, a = structured
    tolerance = 1e-2 if name in SENSITIVE else 1e-10 * max(1, np.linalg.norm(a))
    assert matched_distance(eigenvalues(a), np.linalg.eigvals(a)) <= tolerance


def test_triangular_and_permuted_triangular_matrices_give_their_diagonal_exactly():
    upper = np.triu(gaussian(30))
    order = np.random.default_rng(3).permutation(30)
    expected = np.sort(np.diag(upper))
    assert np.array_equal(eigenvalues(fortran(upper)), expected)
    assert np.array_equal(eigenvalues(fortran(upper[np.ix_(order, order)])), expected)


def test_balancing_makes_badly_scaled_residuals_small_in_every_component():
    """Normwise residuals hide small rows; these are taken in the basis where no row is small."""
    plain, scale = gaussian(40), 2.0 ** np.random.default_rng(2).integers(-20, 21, 40)
    a = badly_scaled()
    values = eigenvalues(a)
    assert matched_distance(values, np.linalg.eigvals(plain)) <= 1e-12
    vectors = eigenvectors(a, values)
    x, y = vectors.right / scale[:, None], vectors.left * scale[:, None]
    x, y = x / np.linalg.norm(x, axis=0), y / np.linalg.norm(y, axis=0)
    assert np.linalg.norm(plain @ x - x * values, axis=0).max() <= 1e-12
    assert np.linalg.norm(y.conj().T @ plain - values[:, None] * y.conj().T, axis=1).max() <= 1e-12


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("a", [gaussian(30), isolated()], ids=["random", "isolated"])
def test_left_and_right_vectors_of_distinct_eigenvalues_are_orthogonal(a, solver):
    values = eigenvalues(a, solver)
    nonzero = values[np.abs(values) > 1e-9]
    vectors = eigenvectors(a, nonzero, solver)
    product = np.abs(vectors.left.conj().T @ vectors.right)
    assert (np.diag(product) > 1e-6).all()
    # |y_i^H x_j| = |residual| / |lambda_i - lambda_j|
    gap = np.abs(nonzero[:, None] - nonzero)
    np.fill_diagonal(gap, 0)
    assert (product * gap).max() <= 1e-13 * np.linalg.norm(a)


def test_a_defective_eigenvalue_has_orthogonal_left_and_right_vectors():
    a = STRUCTURED["Jordan block"]
    vectors = eigenvectors(a, np.array([2.0 + 0j]))
    assert abs(vectors.left[:, 0].conj() @ vectors.right[:, 0]) <= 1e-12
    assert abs(vectors.right[0, 0]) == pytest.approx(1)
    assert abs(vectors.left[-1, 0]) == pytest.approx(1)


@pytest.mark.parametrize("solver", SOLVERS)
def test_vectors_do_not_depend_on_what_else_is_asked(solver):
    a = gaussian(30)
    values = eigenvalues(a, solver)
    pair = values[np.argmax(values.imag)]
    asked = np.array([pair, pair.conj(), values[3], pair, np.nextafter(pair.real, 9) + 1j * pair.imag])
    together = eigenvectors(a, asked, solver)
    alone = eigenvectors(a, asked[1:2], solver)
    assert together.converged.all()
    close = {"rtol": 0, "atol": 1e-13}
    np.testing.assert_allclose(together.right[:, 1], alone.right[:, 0], **close)
    np.testing.assert_allclose(together.left[:, 1], alone.left[:, 0], **close)
    np.testing.assert_allclose(together.right[:, 0], together.right[:, 1].conj(), **close)
    np.testing.assert_allclose(together.right[:, 0], together.right[:, 3], **close)
    assert residuals(a, asked, together) <= 1e-13


def test_the_reduced_matrix_survives_the_eigenvectors_bit_for_bit():
    for a in (gaussian(60), isolated(), fortran([[3.0]])):
        h = dense.to_hessenberg(a.copy(order="F"))
        before = [h.a.tobytes(order="A"), h.tau.tobytes(), h.scale.tobytes()]
        dense.hessenberg_eigenvectors(h, eigenvalues(a)[:4])
        assert before == [h.a.tobytes(order="A"), h.tau.tobytes(), h.scale.tobytes()]


@pytest.mark.parametrize("solver", SOLVERS)
def test_asking_for_no_vectors_gives_none(solver):
    vectors = eigenvectors(gaussian(5), np.zeros(0, complex), solver)
    assert vectors.right.shape == vectors.left.shape == (5, 0)
    assert vectors.converged.shape == (0,)


def test_the_reduction_works_in_the_memory_it_is_given():
    a = gaussian(20)
    assert dense.to_hessenberg(a).a is a


@pytest.mark.parametrize("k", [3, 50, 120, 700])
@pytest.mark.parametrize("rubbish", [1e300, np.nan], ids=["huge", "nan"])
def test_nothing_below_the_subdiagonal_counts_as_matrix(k, rubbish):
    """?hseqr takes different roads below 50, above 75 and above 500: none may read the reflectors."""
    h = dense.to_hessenberg(gaussian(k))
    below = np.tril(np.ones((k, k), bool), -2)
    clean, dirty = h.a.copy(order="F"), h.a.copy(order="F")
    clean[below], dirty[below] = 0, rubbish
    matrices = (clean, dirty, h.a)
    values = [dense.hessenberg_eigenvalues(dataclasses.replace(h, a=m)) for m in matrices]
    assert np.array_equal(values[0], values[1])
    assert np.array_equal(values[0], values[2])


def test_nothing_below_the_subdiagonal_reaches_the_inverse_iteration():
    h = dense.to_hessenberg(gaussian(50))
    value = complex(0.3, 0.4)
    dirty = h.a.copy(order="F")
    dirty[np.tril(np.ones((50, 50), bool), -2)] = np.nan
    found = []
    for m in (h.a, dirty):
        x, y = np.zeros((50, 2), order="F"), np.zeros((50, 2), order="F")
        lapack.hsein(m, value, y, x, np.empty(50 * 52))
        found.append((x, y))
    assert np.array_equal(found[0], found[1])


@pytest.mark.parametrize(
    ("dtype", "factor"), [(np.float32, 2.0**-110), (np.float64, 2.0**-990), (np.float64, 2.0**900)]
)
def test_eigenvalues_scale_with_the_matrix_to_the_ends_of_the_floating_range(dtype, factor):
    a = gaussian(60, dtype)
    scaled = eigenvalues(fortran(a * dtype(factor), dtype))
    assert matched_distance(scaled / factor, eigenvalues(a)) <= 1e4 * np.finfo(dtype).eps


def test_order_is_by_real_then_imaginary_part_and_does_not_depend_on_the_input_order():
    values = np.array([1 + 2j, 1 - 2j, -1 + 0j, 1 + 0j, complex(-0.0, -0.0), 0j, 1 - 3j, 1 + 3j])
    expected = np.array([-1, 0, 0, 1 - 3j, 1 - 2j, 1, 1 + 2j, 1 + 3j], complex)
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert dense.sort_eigenvalues(rng.permutation(values)).tobytes() == expected.tobytes()


def test_equal_matrices_give_equal_bits():
    assert eigenvalues(gaussian(120)).tobytes() == eigenvalues(gaussian(120)).tobytes()


def test_a_backend_that_solves_in_complex_numbers_still_gives_exact_pairs():
    exact = eigenvalues(gaussian(40))
    rng = np.random.default_rng(0)
    noisy = rng.permutation(exact * (1 + 1e-16 * rng.standard_normal(40)))
    noisy.imag[np.abs(noisy.imag) > 0] += 1e-15
    assert not np.array_equal(dense.sort_eigenvalues(noisy), dense.sort_eigenvalues(noisy.conj()))
    repaired = device._with_exact_pairs(noisy)
    assert_conjugate_closed(dense.sort_eigenvalues(repaired))
    assert matched_distance(repaired, exact) <= 1e-14
    lopsided = np.array([1 + 1j, 2 + 0j])
    assert device._with_exact_pairs(lopsided) is lopsided


def test_values_that_belong_to_no_eigenvector_are_flagged_not_raised():
    a = gaussian(40)
    vectors = device.device_eigenvectors(a, np.array([50.0 + 0j, eigenvalues(a)[0]]), "cpu")
    assert vectors.converged.tolist() == [False, True]


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 7).flatmap(
        lambda k: arrays(
            np.float64,
            (k, k),
            # Sixteenths: see the named example below for what entries of 1e-45 do to balancing.
            elements=st.one_of(st.just(0.0), st.integers(-50, 50).map(lambda i: i / 16)),
        )
    )
)
def test_small_matrices_of_any_structure_keep_trace_pairs_and_residuals(a):
    a = fortran(a)
    values = eigenvalues(a)
    assert_conjugate_closed(values)
    assert abs(values.sum() - np.trace(a)) <= 1e-13 * max(np.linalg.norm(a), 1e-300)
    vectors = eigenvectors(a, values)
    done = vectors.converged
    kept = dense.Eigenvectors(vectors.right[:, done], vectors.left[:, done], done[done])
    assert residuals(a, values[done], kept) <= 1e-12


def test_convergence_speaks_of_the_balanced_matrix_not_of_the_original():
    """Found by hypothesis; Watkins, A case where balancing is harmful (2006). Certify with A itself."""
    a = fortran([[0, 0, 0, 0], [0, 0, 1, 1e-45], [0, 0, 0, 0], [0, 1, 0, 1]])
    values = eigenvalues(a)
    assert np.allclose(values, [0, 0, 0, 1], atol=1e-40)
    vectors = eigenvectors(a, values)
    assert vectors.converged.all()
    assert residuals(a, values, vectors) > 0.1


@pytest.mark.parametrize(
    ("matrix", "word"),
    [
        (np.zeros((3, 4), order="F"), "square"),
        (np.zeros(3), "square"),
        (np.ones((3, 3), order="C"), "Fortran"),
        (np.ones((3, 3), int, order="F"), "float32 or float64"),
        (fortran(np.diag([1, np.nan])), "finite"),
        (fortran(np.diag([1, np.inf])), "finite"),
    ],
)
def test_a_matrix_that_cannot_be_worked_on_is_refused_at_the_door(matrix, word):
    for solve in (dense.to_hessenberg, lambda a: device.device_eigenvalues(a, "cpu")):
        with pytest.raises(InputError, match=word):
            solve(matrix)


def test_every_problem_is_named_at_once():
    matrix = np.zeros((3, 4), int)
    matrix.flags.writeable = False
    with pytest.raises(InputError, match=r"(?s)square.*float64.*order='F'.*read-only"):
        dense.to_hessenberg(matrix)


@pytest.mark.parametrize("check", [dense.check_lapack_order, device.check_cusolver_order])
def test_orders_beyond_32_bit_counting_are_refused(check):
    check(46_340)
    with pytest.raises(InputError, match=r"46,341.*46,340"):
        check(46_341)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("values", [np.array([np.nan + 0j]), np.zeros((2, 2), complex)])
def test_values_that_are_no_finite_vector_are_refused(values, solver):
    with pytest.raises(InputError, match="finite"):
        eigenvectors(gaussian(3), values, solver)


def test_a_matrix_of_order_one_has_no_complex_eigenvalue():
    with pytest.raises(InputError, match="no complex eigenvalue"):
        eigenvectors(fortran([[1.0]]), np.array([1j]))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_matrix_of_order_zero_has_no_eigenvector(solver):
    with pytest.raises(InputError, match="eigenvalue"):
        eigenvectors(gaussian(0), np.array([1.0 + 0j]), solver)


def test_lapack_says_which_routine_failed_and_why():
    with pytest.raises(StiffcoreError, match=r"dgehrd: info = -2: argument 2 \(ilo\)"):
        lapack.gehrd(gaussian(4), 9, 4)
    with pytest.raises(StiffcoreError, match=r"shseqr: info = 3: the QR iteration did not converge"):
        lapack._refuse("hseqr", np.dtype(np.float32), 3)
    with pytest.raises(InputError, match="Fortran"):
        lapack.gebal(np.ones((3, 3)))
    with pytest.raises(InputError, match="float32 or float64"):
        lapack.gebal(np.ones((3, 3), complex, order="F"))
    with pytest.raises(InputError, match="shape"):
        lapack.hsein(gaussian(4), 1 + 0j, gaussian(4), gaussian(4), np.empty(24))


def test_a_scipy_with_other_signatures_is_refused_before_it_is_called(monkeypatch):
    monkeypatch.setitem(lapack._ARGUMENTS, "gebak", "job side n")
    lapack._function.cache_clear()
    with pytest.raises(StiffcoreError, match="needed 3 arguments"):
        lapack.gebak(gaussian(3), 1, 3, np.ones(3), "R")


def test_the_reduction_releases_the_interpreter_lock():
    a = gaussian(800)
    stop, ticks = threading.Event(), []

    def tick():
        while not stop.wait(0.002):
            ticks.append(time.monotonic())

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.monotonic()
    dense.to_hessenberg(a)
    end = time.monotonic()
    stop.set()
    thread.join()
    # With the lock held there would be a tick before each foreign call at most, and the calls take the time.
    third = (end - start) / 3
    for part in range(3):
        assert any(start + part * third < t < start + (part + 1) * third for t in ticks)
    assert len(ticks) >= 6


MEMORY_PROBE = """
import json, sys
import numpy as np
from stiffcore.eigen import dense

def field(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name)) * 1024

def reset():
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")

stage, k, dtype = sys.argv[1], int(sys.argv[2]), np.dtype(sys.argv[3])
rng = np.random.default_rng(0)

def matrix(k):
    a = np.empty((k, k), dtype, order="F")
    for j in range(k):
        a[:, j] = rng.standard_normal(k)
    return a

def once(k):
    before = field("VmRSS")
    a = matrix(k)
    if stage == "to_hessenberg":
        reset()
        h = dense.to_hessenberg(a)
        return field("VmHWM") - before
    h = dense.to_hessenberg(a)
    if stage == "hessenberg_eigenvectors":
        spare = dense.Hessenberg(h.a.copy(order="F"), h.tau, h.scale, h.ilo, h.ihi)
        values = dense.hessenberg_eigenvalues(spare)[-10:]
        del spare
    reset()
    if stage == "hessenberg_eigenvalues":
        dense.hessenberg_eigenvalues(h)
    else:
        dense.hessenberg_eigenvectors(h, values)
    return field("VmHWM") - before

once(300)
print(json.dumps(once(k)))
"""


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("stage", ["to_hessenberg", "hessenberg_eigenvalues", "hessenberg_eigenvectors"])
def test_peak_memory_is_what_the_formula_says(stage, dtype):
    k, slack = 1500, 8 << 20
    itemsize = np.dtype(dtype).itemsize
    formula = {
        "to_hessenberg": dense.to_hessenberg_bytes(k, itemsize),
        "hessenberg_eigenvalues": dense.hessenberg_eigenvalues_bytes(k, itemsize),
        "hessenberg_eigenvectors": dense.hessenberg_eigenvectors_bytes(k, 10, itemsize),
    }[stage]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_PROBE, stage, str(k), dtype],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    measured = json.loads(done.stdout)
    assert measured <= formula + slack
    assert formula <= 2 * measured


def test_workspace_formulas_bound_what_lapack_asks_for(monkeypatch):
    asked = []
    call = lapack._call

    def spy(routine, dtype, *arguments):
        if arguments[-1] != -1 and isinstance(arguments[-1], int):
            asked.append(arguments[-1])
            return
        call(routine, dtype, *arguments)

    monkeypatch.setattr(lapack, "_call", spy)
    for k in (1, 2, 10, 75, 76, 151, 501, 600, 3001, 6001, 20_000, 46_340):
        # One column stands for the matrix: neither the query nor the spy reads it.
        column = np.broadcast_to(np.zeros(1), (k, k))
        monkeypatch.setattr(lapack, "_order", lambda a: len(a))
        lapack.gehrd(column, 1, k)
        assert asked.pop() + k <= (dense.to_hessenberg_bytes(k, 8) - (1 << 20)) // 8 - k * k
        lapack.hseqr(column, 1, k)
        assert asked.pop() + 4 * k <= dense.hessenberg_eigenvalues_bytes(k, 8) // 8 - k * k


def test_flops_follow_golub_and_van_loan():
    assert dense.to_hessenberg_flops(300) + dense.hessenberg_eigenvalues_flops(300) == 10 * 300**3
    assert dense.device_bytes(1000, 8) >= 5 * 8 * 1000**2
