"""Kernels on column panels against SciPy; spectra by division against known ones; cut off anywhere, the same bytes."""

import json
import tracemalloc
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import scipy.linalg
from scipy.optimize import linear_sum_assignment

from stiffcore.cluster import InProcess
from stiffcore.eigen import certificate, divide, panels
from stiffcore.eigen.blas import HOST
from stiffcore.eigen.dense import LAPACK_MAX_ORDER
from stiffcore.eigen.panels import SingularError
from stiffcore.errors import DamagedError
from stiffcore.plan import divide_held_bytes, divide_sizes
from stiffcore.record import Stage
from stiffcore.session import carry_out_plan, prepare
from stiffcore.store import RunStore, StoredWorkspace, TiledMatrix
from stiffcore.unit import carry_out, open_operator
from tests.records import put, said
from tests.runs import OPTIONS, execute

OPENER = partial(open_operator, trusted=OPTIONS["network"])

N, PANEL, TILE = 60, 16, 8
# torch's, with device "cpu", runs every line of what CUDA does
DEVICES = pytest.mark.parametrize("on", [HOST, "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
FLOAT = np.dtype(float)


class InMemory:
    """Panels in a dictionary; `due` writes from now, one is cut off."""

    due = 0

    def __init__(self, shape, width, dtype):
        self.shape, self.dtype, self.width, self.panels = shape, np.dtype(dtype), min(width, shape[1]), {}

    @property
    def shards(self):
        return -(-self.shape[1] // self.width)

    def columns(self, shard):
        return shard * self.width, min((shard + 1) * self.width, self.shape[1])

    def missing(self):
        return [i for i in range(self.shards) if i not in self.panels]

    def has(self, shard):
        return shard in self.panels

    def read_shard(self, shard, start=0, stop=None):
        return np.array(self.panels[shard][start:stop], order="F")

    def write(self, shard, block):
        InMemory.due -= 1
        if InMemory.due == 0:
            raise Cut
        assert block.dtype == self.dtype
        self.panels[shard] = block.reshape((self.shape[0], -1)).copy(order="F")

    def read(self):
        return np.hstack([self.panels[i] for i in range(self.shards)])


class Memory:
    """A workspace in dictionaries."""

    def __init__(self, panel=PANEL):
        self.panel, self.matrices, self.known = panel, {}, {}

    def matrix(self, name, rows, columns, dtype=FLOAT):
        found = self.matrices.setdefault(name, InMemory((rows, columns), self.panel * 8 // dtype.itemsize, dtype))
        assert found.shape == (rows, columns)
        return found

    def drop(self, *names):
        for name in names:
            self.matrices.pop(name, None)

    def once(self, name, compute):
        if name not in self.known:
            self.known[name] = json.loads(json.dumps(compute()))
        return self.known[name]

    def once_array(self, name, shape, compute):
        if name not in self.known:
            self.known[name] = compute()
            assert self.known[name].shape == shape
        return self.known[name]


class Cut(Exception):
    pass


def in_store(folder):
    store = RunStore(str(folder / "run"), create=True)
    return StoredWorkspace(store, put(store), TILE, PANEL)


@pytest.fixture
def space():
    return Memory()


def stored(space, name, a):
    matrix = space.matrix(name, *a.shape, a.dtype)
    for i in range(matrix.shards):
        matrix.write(i, a[:, slice(*matrix.columns(i))].copy(order="F"))
    return matrix


def random(*shape, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal(shape)
    return a + 1j * rng.standard_normal(shape) if dtype is complex else a


def orthogonal(n=N):
    return np.linalg.qr(random(n, n, seed=1))[0]


def largest_error(found, expected):
    """Of the best matching of two spectra, value by value."""
    distances = np.abs(found[:, None] - expected[None, :])
    return distances[linear_sum_assignment(distances)].max()


# ------------------------------------------------------------------------------------------------- kernels


def test_rows_of_a_panel_are_read_alone(tmp_path):
    a = random(N, N)
    a[8:24] = 0
    matrix = stored(in_store(tmp_path), "a", a)
    for start, stop in ((0, None), (3, 50), (9, 20), (59, 60), (10, 10)):
        assert np.array_equal(matrix.read_shard(1, start, stop), a[start:stop, 16:32])
    assert matrix.read_shard(3).flags.f_contiguous
    assert matrix.read_shard(3).flags.writeable


@DEVICES
@pytest.mark.parametrize(("rows", "inner", "columns"), [(60, 60, 60), (33, 60, 17), (5, 4, 3)])
def test_products(space, rows, inner, columns, on):
    a, b = random(rows, inner), random(inner, columns, seed=2)
    out, wide = (space.matrix(name, rows, columns) for name in ("out", "wide"))
    panels.product(stored(space, "a", a), stored(space, "b", b), out, device=on)
    panels.product(space.matrix("a", rows, inner), space.matrix("b", inner, columns), wide, at_once=6, device=on)
    assert np.allclose(wide.read(), a @ b, atol=1e-13)
    assert np.allclose(out.read(), a @ b, atol=1e-13)


@DEVICES
def test_a_product_with_a_shift_and_columns_made_as_they_are_needed(space, on):
    a, b = random(N, N), random(N, 20, seed=2)
    out = space.matrix("out", N, 20)
    panels.product(stored(space, "a", a), lambda start, stop: b[:, start:stop], out, shift=-1.5, device=on)
    assert np.allclose(out.read(), a @ b - 1.5 * b, atol=1e-13)


@DEVICES
@pytest.mark.parametrize("dtype", [float, complex])
@pytest.mark.parametrize(("order", "at_once"), [(1, 1), (16, 2), (17, 1), (17, 2), (60, 1), (60, 2), (60, 3), (60, 9)])
def test_lu_solves(space, dtype, order, at_once, on):
    a, b = random(order, order, dtype=dtype), random(order, 3, dtype=dtype, seed=2)
    lu = space.matrix("lu", order + 1, order, np.dtype(dtype))
    panels.factor(stored(space, "a", a), lu, at_once=at_once, device=on)
    assert panels.log_determinant(lu) == pytest.approx(np.linalg.slogdet(a)[1])
    assert np.allclose(panels.solve(lu, b.copy(order="F")), np.linalg.solve(a, b), atol=1e-11)
    assert np.allclose(panels.solve_adjoint(lu, b.copy(order="F")), np.linalg.solve(a.conj().T, b), atol=1e-11)


@pytest.mark.parametrize("at_once", [1, 2, 3, 4])
def test_lu_is_that_of_lapack_whatever_the_block(space, at_once):
    a = random(N, N)
    lu, alone = space.matrix("lu", N + 1, N), space.matrix("alone", N + 1, N)
    panels.factor(stored(space, "a", a), lu, at_once=at_once)
    panels.factor(stored(space, "b", a), alone)
    found, pivots = scipy.linalg.lu_factor(a)
    assert np.array_equal(lu.read()[-1], pivots)
    assert np.allclose(np.triu(lu.read()[:-1]), np.triu(found), atol=1e-12)
    assert np.allclose(lu.read(), alone.read(), atol=1e-12)


@DEVICES
@pytest.mark.parametrize("at_once", [1, 3])
def test_an_inverse_beside_other_terms(space, at_once, on):
    a, b = random(N, N), random(N, N, seed=3)
    lu, out = space.matrix("lu", N + 1, N), space.matrix("out", N, N)
    panels.factor(stored(space, "a", a), lu)
    panels.inverse(lu, out, scale=2.0, shift=-0.5, beside=(0.25, stored(space, "b", b)), at_once=at_once, device=on)
    assert np.allclose(out.read(), 2 * np.linalg.inv(a) - 0.5 * np.eye(N) + b / 4, atol=1e-10)


@DEVICES
@pytest.mark.parametrize(("order", "at_once"), [(1, 1), (17, 2), (60, 1), (60, 3), (60, 9)])
def test_the_root_of_a_definite_matrix(space, order, at_once, on):
    a = random(order, order)
    a, root = a @ a.T, space.matrix("root", order, order)
    panels.cholesky(stored(space, "a", a - 2 * np.eye(order)), root, shift=2.0, at_once=at_once, device=on)
    assert np.allclose(root.read(), scipy.linalg.cholesky(a), atol=1e-12)
    indefinite = a - 2 * np.linalg.eigvalsh(a)[-1] * np.eye(order)
    with pytest.raises(SingularError, match="not positive definite"):
        panels.cholesky(stored(space, "b", indefinite), space.matrix("none", order, order), device=on)


@DEVICES
@pytest.mark.parametrize("column", [0, 20, 59])
def test_a_singular_matrix_is_said_to_be(space, column, on):
    a = random(N, N)
    a[:, column] = 0
    with pytest.raises(SingularError, match="zero"):
        panels.factor(stored(space, "a", a), space.matrix("lu", N + 1, N), device=on)


@DEVICES
@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("columns", [1, 16, 37, 60])
def test_reflectors_are_an_orthogonal_matrix_that_spans_the_columns(space, columns, at_once, on):
    a = random(N, columns)
    a[:, columns // 2] = 0  # no reflector, or any
    qr = space.matrix("qr", N + PANEL, columns)
    panels.orthogonalise(stored(space, "a", a), qr, at_once=at_once, device=on)
    turned, identity = space.matrix("turned", N, columns), space.matrix("identity", N, N)
    panels.rotate(qr, stored(space, "b", a), turned)
    panels.rotate(qr, stored(space, "eye", np.eye(N)), identity, at_once=at_once, device=on)
    q = identity.read().T
    assert np.allclose(q.T @ q, np.eye(N), atol=1e-13)
    assert np.allclose(turned.read(), q.T @ a, atol=1e-13)
    assert np.allclose(turned.read()[columns:], 0, atol=1e-13)


@pytest.mark.parametrize("at_once", [1, 4])
def test_kernels_hold_what_is_planned(tmp_path, at_once):
    n, width = 1024, 64
    store = RunStore(str(tmp_path / "run"), create=True)
    space = StoredWorkspace(store, put(store), 256, width)
    a = stored(space, "a", random(n, n))
    lu, x, y, z = (space.matrix(name, n + (name == "lu"), n) for name in ("lu", "x", "y", "z"))
    root = space.matrix("root", n, n)
    half, qr = space.matrix("half", n, n // 2), space.matrix("qr", n + width, n // 2)
    small = space.matrix("small", n // 2, n // 2)
    kernels = {
        "factor": lambda: panels.factor(a, lu, at_once=at_once),
        "inverse": lambda: panels.inverse(lu, x, scale=2.0, beside=(0.5, a), at_once=at_once),
        "distance": lambda: panels.distance(a, x),
        "product": lambda: panels.product(x, partial(divide._gaussian, n), half, shift=1.0, at_once=at_once),
        "cholesky": lambda: panels.cholesky(a, root, shift=4.0 * n, at_once=at_once),
        "orthogonalise": lambda: panels.orthogonalise(half, qr, at_once=at_once),
        "rotate": lambda: panels.rotate(qr, a, y, at_once=at_once),
        "transpose": lambda: panels.transpose(y, z),
        "copy": lambda: panels.copy(z, small, first=n // 2),
        "square_trace": lambda: panels.square_trace(a),
        "norm": lambda: panels.norm(a, shift=1.0),
    }
    held = {}
    for name, kernel in kernels.items():
        tracemalloc.start()
        kernel()
        held[name] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    allowed = divide_held_bytes(n, width, at_once)
    # the store's own records are not a panel's; the plan has `BLAS_BYTES` beside panels
    assert {name: peak for name, peak in held.items() if peak > allowed + (64 << 10)} == {}
    assert max(held.values()) > allowed / 2


def test_copies_transposes_and_sums(space):
    a, b = random(N, N), random(N, N, seed=2)
    first, second = stored(space, "a", a), stored(space, "b", b)
    across = space.matrix("across", N, N)
    panels.transpose(first, across)
    assert np.array_equal(across.read(), a.T)
    part = Memory(7).matrix("part", 35, 35)
    panels.copy(first, part, first=20, shift=1.0)
    assert np.array_equal(part.read(), a[20:55, 20:55] + np.eye(35))
    assert panels.trace(first) == pytest.approx(np.trace(a))
    assert panels.square_trace(first) == pytest.approx(np.trace(a @ a))
    assert panels.norm(first) == pytest.approx(np.linalg.norm(a))
    assert panels.norm(first, shift=2.0) == pytest.approx(np.linalg.norm(a + 2 * np.eye(N)))
    assert panels.norm(first, (5, 30), (10, 50)) == pytest.approx(np.linalg.norm(a[5:30, 10:50]))
    assert panels.distance(first, second) == pytest.approx(np.linalg.norm(a - b))


# ------------------------------------------------------------------------------------------------- spectra


def rotation(n=N):
    turns = [[[0, -t], [t, 0]] for t in np.random.default_rng(2).uniform(0.1, 3, n // 2)]
    return orthogonal(n) @ scipy.linalg.block_diag(*turns) @ orthogonal(n).T


def similar(values):
    return orthogonal(len(values)) @ np.diag(values) @ orthogonal(len(values)).T


MATRICES = {
    "random": random(N, N) / np.sqrt(N),
    "random, moved": random(N, N) / np.sqrt(N) + 5 * np.eye(N),
    "a rotation": rotation(),
    "an eigenvalue on the first line": similar(np.r_[0, np.linspace(-1, 1, N - 1)]),
    "1e-6 from the first line": similar(np.r_[1e-6, -1e-6, np.linspace(-1, 1, N - 2)]),
    "badly scaled": np.diag(10.0 ** np.linspace(-3, 3, N)) @ random(N, N),
    "block diagonal": scipy.linalg.block_diag(*random(N // 3, 3, 3)),
    "symmetric": random(N, N) + random(N, N).T,
    "all right of the first line": similar(np.linspace(1, 2, N)),
    "zero": np.zeros((N, N)),
    "a multiple of the identity": 3 * np.eye(N),
    "a permutation, turned": orthogonal() @ np.roll(np.eye(N), 1, axis=0) @ orthogonal().T,
    "a denormal number on the first line": np.diag(np.r_[1e-310, np.linspace(1, 2, N - 1)]),
    "tiny": random(N, N) * 1e-100,
    "huge": random(N, N) * 1e100,
}


@DEVICES
@pytest.mark.parametrize("name", MATRICES)
def test_all_eigenvalues_are_those_of_a_dense_solver(space, name, on):
    a = MATRICES[name]
    found = divide.eigenvalues(stored(space, "a", a), space, 20, first=0.0, device=on)
    expected, size = scipy.linalg.eigvals(a), np.linalg.norm(a)
    assert largest_error(found.values, expected) <= 1e-10 * size
    assert found.error <= 1e-10 * len(found.splits) * size
    first = found.splits[0] if found.splits else None
    if first is not None and not first.failure:
        assert first.beyond == found.right == (expected.real > 0).sum()
    else:
        assert found.right is None
    parts = [s for s in found.splits if not s.failure and 0 < s.beyond < s.order]
    assert len(parts) >= 2 or not parts
    assert set(space.matrices) == {"a"}


def grcar(n):
    return np.triu(np.tril(np.ones((n, n)), 3)) - np.diag(np.ones(n - 1) * 2, -1)


def jordan(n, length):
    blocks = [np.eye(length, k=1) + value * np.eye(length) for value in np.linspace(-1, 1, n // length)]
    return orthogonal(n) @ scipy.linalg.block_diag(*blocks) @ orthogonal(n).T


@pytest.mark.parametrize(
    ("a", "why"),
    [
        (grcar(300), "block that should vanish"),
        (jordan(N, 6), "block that should vanish"),
        (random(N, N) * 1e-130, "scale the function"),
        (np.kron(np.eye(N // 2), [[0, -1], [1, 0]]), "a step ends at zero"),
    ],
    ids=["Grcar", "defective", "out of range", "two eigenvalues 30 times"],
)
def test_what_cannot_be_divided_well_is_said_and_never_accepted(a, why):
    space = Memory(64)
    with pytest.raises(divide.DivisionError, match=why):
        divide.eigenvalues(stored(space, "a", a), space, 20, first=0.0)


def test_eigenvectors_are_those_of_the_matrix_and_of_its_transpose(space):
    a = random(N, N)
    values = scipy.linalg.eigvals(a)
    chosen = values[values.imag >= 0][[0, 5, 9, -1]]
    found = divide.eigenvectors(stored(space, "a", a), space, chosen)
    assert found.converged.all()
    for i, value in enumerate(chosen):
        assert np.linalg.norm(a @ found.right[:, i] - value * found.right[:, i]) < 1e-10
        assert np.linalg.norm(found.left[:, i].conj() @ a - value * found.left[:, i].conj()) < 1e-10


def test_close_eigenvalues_have_each_its_own_eigenvectors(space):
    true = np.r_[1, 1 + 1e-11, np.linspace(2, 3, N - 2)]
    found = divide.eigenvectors(stored(space, "a", similar(true)), space, true[:2].astype(complex))
    for i in range(2):
        assert abs(found.right[:, i] @ orthogonal()[:, i]) > 0.999
        assert abs(found.left[:, i] @ orthogonal()[:, i]) > 0.999


@pytest.mark.parametrize("length", [2, 8, 15, 24])
def test_a_defective_eigenvalue_has_eigenvectors(space, length):
    a = orthogonal() @ scipy.linalg.block_diag(np.eye(length, k=1), np.diag(np.linspace(1, 2, N - length)))
    a = a @ orthogonal().T
    found = divide.eigenvectors(stored(space, "a", a), space, np.zeros(1, complex))
    assert found.converged.all()
    assert np.linalg.norm(a @ found.right[:, 0]) < 1e-9
    assert set(space.matrices) == {"a"}


def test_what_is_taken_for_a_multiple_of_one_is_in_the_error(space):
    a = 3 * np.eye(N) + 1e-15 * random(N, N)
    found = divide.eigenvalues(stored(space, "a", a), space, 20)
    assert not found.splits
    assert 0 < np.abs(scipy.linalg.eigvals(a) - found.values).max() <= found.error == pytest.approx(1e-15 * N, rel=0.3)


@pytest.mark.parametrize("order", [1, 5])
def test_eigenvectors_of_zero(space, order):
    found = divide.eigenvectors(stored(space, "a", np.zeros((order, order))), space, np.zeros(1, complex))
    assert found.converged.all()
    assert np.allclose(np.linalg.norm(found.right, axis=0), 1)


def test_a_part_is_never_larger_than_lapack_counts():
    for k, budget in ((50_000, 24 << 30), (100_000, 32 << 30)):
        assert divide_sizes(k, budget)[2] <= LAPACK_MAX_ORDER


def solved(space):
    a = MATRICES["random"]
    matrix = space.matrix("a", N, N)
    for i in matrix.missing():
        matrix.write(i, a[:, slice(*matrix.columns(i))].copy(order="F"))
    return divide.eigenvalues(matrix, space, 20, first=0.0, at_once=2).values.tobytes()


def test_cut_off_at_any_panel_it_goes_on_to_the_same_bytes():
    InMemory.due = 0
    expected = solved(Memory())
    total = -InMemory.due
    assert total > 200
    for at in range(1, total + 1, 3):
        space, InMemory.due = Memory(), at
        with pytest.raises(Cut):
            solved(space)
        InMemory.due = 0
        assert solved(space) == expected
        # nothing that was written is written again
        assert -InMemory.due <= total - at + 1


@pytest.mark.parametrize("at", [60, 190])
def test_cut_off_in_the_store_it_goes_on_to_the_same_bytes(tmp_path, monkeypatch, at):
    InMemory.due = 0
    expected, writes, write = solved(Memory()), 0, TiledMatrix.write

    def counted(self, shard, block):
        nonlocal writes
        writes += 1
        if writes == at:
            raise Cut
        return write(self, shard, block)

    monkeypatch.setattr(TiledMatrix, "write", counted)
    with pytest.raises(Cut):
        solved(in_store(tmp_path))
    assert solved(in_store(tmp_path)) == expected


# ---------------------------------------------------------------------------------------------------- runs


def in_parts(url, key, **sizes):
    """A planned run whose unit is to be divided although it would fit."""
    store = RunStore(url)
    store.update(key, plan=replace(store.record(key).plan, **sizes))


def test_a_divided_unit_of_a_run_has_the_spectrum_of_the_dense_solver(small, monkeypatch):
    options = OPTIONS | {"blocks": "1", "functions": "block"}
    dense, _ = execute(small / "dense", options)
    url = str(small / "divided")
    executor = InProcess(lambda event: None)
    run, outcome = carry_out_plan(url, prepare(url, options | {"solver": "divide"}, executor), executor, print)
    assert not outcome.failed
    key = next(iter(run.records()))
    expected = dense.spectrum(block=1)
    in_parts(url, key, panel=32, at_once=2, leaf=len(expected.computed) // 3)
    RunStore(url).update(key, stage=Stage.PLANNED, division=None)
    told, certify = [], certificate.certify
    monkeypatch.setattr(certificate, "certify", lambda *args, **known: told.append(known) or certify(*args, **known))
    carry_out(url, key, opener=OPENER, threads=1, emit=lambda event: None)
    found = run.spectrum(block=1)
    divided = found.record.divided
    assert [(known["neglected"], known["right"]) for known in told] == [(divided.error, divided.right)]
    assert found.certificate.passed
    assert largest_error(found.values, expected.values) < 1e-12
    assert found.metrics["S_active"] == pytest.approx(expected.metrics["S_active"], rel=1e-10)
    assert len(found.record.divided.splits) >= 3
    neglected = found.record.divided.error
    assert neglected > 0
    assert found.record.divided.right == (found.computed.real > 0).sum()
    assert all(abs(expected.values - c.value).min() <= c.error for c in found.certificate.certified)
    assert found.numerical_abscissa == pytest.approx(expected.numerical_abscissa, rel=1e-6)
    assert not (small / "divided" / "units" / key / "division").exists()
    assert found.record.division is None
    damaged_after_it_was_built(run, url, key)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("moments", value) for value in ([1.0], "x", None, [1.0, "y", 2.0], {"a": 1})],
        *[("growth", value) for value in (5, [1.0], {"logarithmic_norm": "x"})],
        *[("-0", value) for value in (5, {}, {"order": "x"}, [1])],
        *[("-0-start", value) for value in (-1, "x", 1e30, None, True)],
        *[("-0-right", value) for value in ([1.0], "xy", {"a": 1.0})],
        *[("-values", False), ("vectors0-0", "x"), ("-0-change1", []), ("failed", {"a": 1}), ("evil", 1)],
    ],
)
def test_what_a_stranger_puts_in_place_of_what_a_division_knows_is_a_damaged_unit(tmp_path, name, value):
    store = RunStore(str(tmp_path / "run"), create=True)
    key = put(store, division={name: value})
    with pytest.raises(DamagedError, match=f"division: {name}:" if name != "evil" else "nothing that a division finds"):
        store.record(key)


def test_an_array_of_another_shape_than_a_division_left_is_damaged(tmp_path):
    store = RunStore(str(tmp_path / "run"), create=True)
    space = StoredWorkspace(store, put(store), tile=4, panel=4)
    assert space.once_array("r-values", (3,), lambda: np.arange(3.0)).shape == (3,)
    for shape in ((2,), (3, 1)):
        with pytest.raises(DamagedError, match="not of"):
            space.once_array("r-values", shape, lambda: np.zeros(1))


def test_what_cannot_be_divided_leaves_no_matrices_and_is_not_tried_again(small, monkeypatch):
    options = OPTIONS | {"blocks": "1", "functions": "block", "index": (0,), "solver": "divide"}
    url, executor, events = str(small / "run"), InProcess(lambda event: events.append(event)), []
    prepared = prepare(url, options, executor)
    (unit,) = prepared.plan.units
    unit = replace(unit, panel=32, at_once=2, leaf=unit.unit.k // 2)
    prepared = replace(prepared, plan=replace(prepared.plan, units=(unit,)))
    with monkeypatch.context() as patch:
        patch.setattr(divide, "SPLIT_TOLERANCE", 0.0)
        patch.setattr(divide, "_curves", lambda mean, *others: iter([divide.Curve(mean)]))
        run, outcome = carry_out_plan(url, prepared, executor, print)
    (key,) = outcome.failed
    assert "curves divides a matrix" in outcome.failed[key]
    assert not (small / "run" / "units" / key / "division").exists()
    notes = [e.note for e in events if "sign of order" in getattr(e, "note", "")]
    assert any("step 3 after a change of" in note and note.endswith("moved") for note in notes)
    events.clear()
    _, outcome = carry_out_plan(url, prepared, executor, print)
    assert "curves divides a matrix" in outcome.failed[key]
    assert not [e for e in events if "sign of order" in getattr(e, "note", "")]
    prepared = replace(prepared, plan=replace(prepared.plan, units=(replace(unit, at_once=1),)))
    run, outcome = carry_out_plan(url, prepared, executor, print)
    assert outcome.failed == {}
    assert run.spectrum(block=1).certificate.passed


def test_a_unit_is_divided_on_a_device(small, supposed_device):
    options = OPTIONS | {"blocks": "1", "functions": "block", "index": (0,), "solver": "divide"}
    expected = execute(small / "host", options | {"device": "cpu"})[0].spectrum(block=1).values
    url, executor = str(small / "device"), InProcess(lambda event: None)
    prepared = prepare(url, options, executor)
    (unit,) = prepared.plan.units
    assert unit.device_bytes > 0
    unit = replace(unit, panel=32, at_once=2, leaf=unit.unit.k // 2)
    prepared = replace(prepared, plan=replace(prepared.plan, units=(unit,)))
    run, outcome = carry_out_plan(url, prepared, executor, print)
    assert outcome.failed == {}
    assert run.spectrum(block=1).certificate.passed
    assert run.spectrum(block=1).record.divided.splits
    assert largest_error(run.spectrum(block=1).values, expected) < 1e-12


def damaged_after_it_was_built(run, url, key):
    """The matrix is built again, and not looked for where it was dropped."""
    store, expected = RunStore(url), run.spectrum(block=1).values.tobytes()

    def stop(event):
        if said(event) == "built" and getattr(event, "done", 1):
            raise KeyboardInterrupt

    store.update(key, stage=Stage.PLANNED, division=None)
    with pytest.raises(KeyboardInterrupt):
        carry_out(url, key, opener=OPENER, threads=1, emit=stop)
    path = next(p for p in (store.local / "units" / key / "matrix").rglob("*") if p.is_file() and p.name != "zarr.json")
    data = path.read_bytes()
    path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    with pytest.raises(DamagedError):
        carry_out(url, key, opener=OPENER, threads=1, emit=lambda event: None)
    assert store.record(key).stage is Stage.PLANNED
    carry_out(url, key, opener=OPENER, threads=1, emit=lambda event: None)
    assert run.spectrum(block=1).values.tobytes() == expected
