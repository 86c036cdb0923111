"""Claims about the store: bits come back, damage is told, a kill at any instant leaves something whole."""

import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
from pathlib import Path

import fsspec
import google_crc32c
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from stiffcore import store as store_module
from stiffcore.errors import BusyError, DamagedError, InputError, NoRunError
from stiffcore.record import FORMAT, Stage
from stiffcore.store import RunStore, TiledMatrix
from stiffcore.store.place import StrangeError
from tests.records import a_header, a_record, put

QUICK = settings(max_examples=40, deadline=None)


def unit_bytes(store, key):
    return sum(p.stat().st_size for p in (store.local / "units" / key).rglob("*") if p.is_file())


@pytest.fixture
def store(tmp_path):
    run = RunStore(str(tmp_path / "run"), create=True)
    run.header = a_header()
    return run


def files(folder):
    return sorted(p for p in Path(folder).rglob("*") if p.is_file())


def snapshot(folder):
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in files(folder)}


def fill(matrix, a, order=None):
    for shard in order if order is not None else range(matrix.shards):
        start, stop = matrix.columns(shard)
        matrix.write(shard, a[:, start:stop].copy(order="F"))


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes("F") == b.tobytes("F")


@st.composite
def matrices(draw):
    rows, columns = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    tile, shard = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    a = rng.standard_normal((rows, columns)).astype(dtype)
    a[rng.random(a.shape) < 0.2] = -0.0
    for r in range(0, rows, tile):
        for c in range(0, columns, shard):
            if rng.random() < 0.5:
                a[r : r + tile, c : c + shard] = rng.choice([0.0, -0.0])
    return a, tile, shard, rng


@QUICK
@given(matrices())
def test_any_matrix_comes_back_bit_for_bit(tmp_path_factory, case):
    a, tile, shard, rng = case
    group = RunStore(str(tmp_path_factory.mktemp("s") / "run"), create=True).unit_group("u")
    m = TiledMatrix.create(group, "matrix", a.shape, a.dtype, tile, shard)
    written = []
    for i in rng.permutation(m.shards):
        assert m.missing() == sorted(set(range(m.shards)) - set(written))
        fill(m, a, [i])
        written.append(int(i))
        assert TiledMatrix(group, "matrix").missing() == sorted(set(range(m.shards)) - set(written))
    expected = a.copy()
    for r in range(0, len(a), m.tile):
        for c in range(0, a.shape[1], m.shard):
            block = expected[r : r + m.tile, c : c + m.shard]
            if not block.any():
                block[...] = 0.0  # negative zeros of a zero tile are the one thing not kept
    found = TiledMatrix(group, "matrix").read()
    assert found.flags.f_contiguous
    assert same_bits(found, expected)
    assert np.array_equal(found, a)


@st.composite
def tall_matrices(draw):
    rows, columns = draw(st.integers(20, 80)), draw(st.integers(1, 12))
    tile, shard, band = draw(st.integers(1, 6)), draw(st.integers(1, 5)), draw(st.integers(1, 19))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    a = np.zeros((rows, columns), dtype)
    for column in range(columns):
        for _ in range(rng.integers(0, 4)):
            at = rng.integers(0, rows)
            a[at : at + 3, column] = rng.standard_normal()
    return a, tile, shard, band


@QUICK
@given(tall_matrices())
def test_a_tall_matrix_is_several_files_a_panel_and_sparse_or_dense_the_same(tmp_path_factory, case):
    a, tile, shard, band = case
    folder = tmp_path_factory.mktemp("s")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module.tiles, "ROWS_IN_SHARD", band)
        found = []
        for name in ("dense", "sparse"):
            store = RunStore(str(folder / name), create=True)
            m = TiledMatrix.create(store.unit_group("u"), "matrix", a.shape, a.dtype, tile, shard)
            for i in range(m.shards):
                block = a[:, slice(*m.columns(i))].copy(order="F")
                assert i in m.missing()
                zeros = m.write(i, block if name == "dense" else scipy.sparse.csc_array(block))
                tiles = [block[r : r + m.tile].any() for r in range(0, len(a), m.tile)]
                assert zeros == tiles.count(False)
            matrix = store.local / "units/u/matrix"
            found.append({p.relative_to(store.local): p.read_bytes() for p in files(store.local / "units/u")})
            assert m.missing() == []
        assert found[0] == found[1]
    rows = m._band
    bands = {(r // rows, c // m.shard) for r, c in zip(*np.nonzero(a), strict=True)}
    assert len([p for p in files(matrix) if p.name != "zarr.json"]) == len(bands)
    m = TiledMatrix(RunStore(store.url, create=True).unit_group("u"), "matrix")
    assert same_bits(m.read(), a)
    sparse, expected = m.read_sparse(), scipy.sparse.csc_array(a)
    assert sparse.dtype == a.dtype
    assert sparse.has_canonical_format
    assert sparse.indices.dtype == sparse.indptr.dtype == np.int32
    assert np.array_equal(sparse.indptr, expected.indptr)
    assert np.array_equal(sparse.indices, expected.indices)
    assert sparse.data.tobytes() == expected.data.tobytes()


def test_up_to_16384_rows_a_shard_is_one_file(store):
    for rows, bands in ((16_384, 1), (16_385, 5), (40_000, 10)):
        m = TiledMatrix.create(store.unit_group(f"u{rows}"), "matrix", (rows, 1), np.dtype("f4"), 256, 1)
        m.write(0, np.ones((rows, 1), "f4"))
        assert len([p for p in files(store.local / f"units/u{rows}/matrix") if p.name != "zarr.json"]) == bands


def test_a_shard_written_twice_is_the_last_one(store):
    m = TiledMatrix.create(store.unit_group("u"), "matrix", (7, 5), np.dtype("f8"), 3, 2)
    a = np.ones((7, 5))
    fill(m, a)
    a[:, 2:] = 0
    a[0, 4] = 3
    fill(m, a)
    assert np.array_equal(m.read(), a)


@pytest.mark.parametrize(("rows", "tile"), [(7, 3), (20_000, 256)])
def test_a_file_that_was_torn_is_written_over(store, rows, tile):
    m = TiledMatrix.create(store.unit_group("u"), "matrix", (rows, 5), np.dtype("f8"), tile, 2)
    a = np.random.default_rng(0).standard_normal((rows, 5))
    fill(m, a)
    torn = [p for p in files(store.local / "units/u/matrix") if p.name != "zarr.json"]
    for path in torn:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DamagedError):
        m.read()
    fill(m, a)
    assert np.array_equal(m.read(), a)


def test_nan_infinity_and_subnormals_are_numbers_too(store):
    m = TiledMatrix.create(store.unit_group("u"), "matrix", (4, 4), np.dtype("f8"), 2, 2)
    a = np.zeros((4, 4))
    a[0, 0], a[2, 1], a[0, 3] = np.nan, np.inf, 5e-324
    fill(m, a)
    assert same_bits(m.read(), a)


def test_a_run_that_was_killed_before_its_header_says_so(tmp_path):
    RunStore(str(tmp_path / "run"), create=True)
    with pytest.raises(NoRunError, match="was begun, but nothing is recorded in it"):
        RunStore(str(tmp_path / "run"))


def test_a_read_only_block_is_not_written_to(store):
    m = TiledMatrix.create(store.unit_group("u"), "matrix", (4, 2), np.dtype("f8"), 2, 2)
    a = np.full((4, 2), -0.0, order="F")
    a.flags.writeable = False
    m.write(0, a)
    assert np.signbit(a).all()
    assert m.missing() == []


def test_zero_tiles_of_a_banded_matrix_cost_nothing(store):
    n, tile = 512, 32
    a = np.zeros((n, n))
    for d in range(-8, 9):
        a += np.diag(np.random.default_rng(d + 8).standard_normal(n - abs(d)), d)
    a[a == 0] = -0.0  # as masks leave them
    group = store.unit_group("u")
    m = TiledMatrix.create(group, "matrix", a.shape, a.dtype, tile, tile)
    fill(m, a)
    stored = sum(bool(a[r : r + tile, c : c + tile].any()) for r in range(0, n, tile) for c in range(0, n, tile))
    on_disk = sum(p.stat().st_size for p in files(store.local / "units/u/matrix") if p.name != "zarr.json")
    index = m.shards * (n // tile * 16 + 4)
    assert on_disk == stored * (tile * tile * 8 + 4) + index
    assert np.array_equal(m.read(), a)


def test_a_zero_shard_has_no_file(store):
    m = TiledMatrix.create(store.unit_group("u"), "matrix", (6, 4), np.dtype("f8"), 3, 2)
    assert m.write(0, np.zeros((6, 2), order="F")) == 2
    assert m.write(1, np.full((6, 2), -0.0, order="F")) == 2
    assert [p.name for p in files(store.local / "units/u/matrix")] == ["zarr.json"]
    assert not m.read().any()
    assert not np.signbit(m.read()).any()


def test_creating_an_existing_matrix_keeps_its_shards(store):
    group = store.unit_group("u")
    a = np.arange(30.0).reshape(6, 5) + 1
    fill(TiledMatrix.create(group, "matrix", (6, 5), a.dtype, 2, 2), a, [2, 0])
    before = snapshot(store.local)
    m = TiledMatrix.create(RunStore(store.url).unit_group("u"), "matrix", (6, 5), a.dtype, 2, 2)
    assert snapshot(store.local) == before
    assert m.missing() == [1]
    fill(m, a, [1])
    assert np.array_equal(m.read(), a)


def test_what_is_left_of_a_half_deleted_matrix_vouches_for_nothing(store):
    group = store.unit_group("u")
    a = np.ones((6, 5))
    fill(TiledMatrix.create(group, "matrix", (6, 5), a.dtype, 2, 2), a)
    # a kill inside the deletion of a folder: its files go in any order
    (store.local / "units/u/matrix_tiles/zarr.json").unlink()
    m = TiledMatrix.create(store.unit_group("u"), "matrix", (6, 5), a.dtype, 2, 2)
    assert m.missing() == [0, 1, 2]


def test_dropping_a_half_deleted_matrix_leaves_nothing(store):
    a = np.ones((6, 5))
    fill(TiledMatrix.create(store.unit_group("u"), "matrix", (6, 5), a.dtype, 2, 2), a)
    (store.local / "units/u/matrix_tiles/zarr.json").unlink()
    (store.local / "units/u/matrix/zarr.json").unlink()
    store.drop("u", "matrix", "never_there")
    assert files(store.local / "units/u") == [store.local / "units/u/zarr.json"]


def test_any_flipped_byte_of_a_matrix_is_told(store):
    rng = np.random.default_rng(0)
    a = rng.standard_normal((7, 5))
    a[:4, 2:4] = 0
    group = store.unit_group("u")
    fill(TiledMatrix.create(group, "matrix", a.shape, a.dtype, 4, 2), a)
    chunks = [p for p in files(store.local / "units/u") if p.name != "zarr.json"]
    assert len(chunks) == 6
    for path in chunks:
        good = path.read_bytes()
        for at in range(len(good)) if len(good) < 60 else {0, 1, len(good) - 1, *range(3, len(good), 7)}:
            for bit in (0, 7):
                bad = bytearray(good)
                bad[at] ^= 1 << bit
                path.write_bytes(bad)
                with pytest.raises(DamagedError):
                    TiledMatrix(group, "matrix").read()
        for size in (0, 1, len(good) // 2, len(good) - 1):
            path.write_bytes(good[:size])
            with pytest.raises(DamagedError):
                TiledMatrix(group, "matrix").read()
        path.write_bytes(good)
    assert np.array_equal(TiledMatrix(group, "matrix").read(), a)


def test_a_flipped_byte_in_the_record_of_shards_is_told_when_asked_what_is_missing(store):
    group = store.unit_group("u")
    m = TiledMatrix.create(group, "matrix", (4, 4), np.dtype("f8"), 2, 2)
    fill(m, np.ones((4, 4)))
    path = next(p for p in files(store.local / "units/u/matrix_tiles") if p.name != "zarr.json")
    path.write_bytes(bytes([255]) + path.read_bytes()[1:])
    with pytest.raises(DamagedError):
        m.missing()


def test_damage_to_a_tall_matrix_is_told_whichever_way_it_is_read(store, monkeypatch):
    monkeypatch.setattr(store_module.tiles, "ROWS_IN_SHARD", 4)
    a = np.zeros((10, 2))
    a[1], a[9] = 1, 2
    m = TiledMatrix.create(store.unit_group("u"), "matrix", a.shape, a.dtype, 2, 2)
    for read in (m.read, m.read_sparse):
        with pytest.raises(DamagedError, match="not written"):
            read()
    fill(m, a)
    chunks = [p for p in files(store.local / "units/u") if p.name != "zarr.json"]
    assert len(chunks) == 3
    for path in chunks:
        good = path.read_bytes()
        for bad in (None, b"", good[:-1], bytes([good[0] ^ 1]) + good[1:], good[:-1] + bytes([good[-1] ^ 1])):
            path.unlink() if bad is None else path.write_bytes(bad)
            for read in (m.read, m.read_sparse):
                with pytest.raises(DamagedError):
                    read()
        path.write_bytes(good)
    assert np.array_equal(m.read_sparse().toarray(), a)


def test_a_matrix_that_an_earlier_version_wrote_row_by_row_is_read_and_finished(store):
    a, group = np.random.default_rng(0).standard_normal((11, 7)), store.unit_group("u")
    a[:3] = 0
    layout = {"shape": a.shape, "dtype": "f8", "chunks": (3, 2), "shards": (12, 2), "fill_value": 0}
    store_module.tiles.create_array(group, "matrix", **layout, dimension_names=("row", "column"))
    layout = {"shape": (4, 4), "dtype": "uint8", "chunks": (4, 1), "fill_value": 255}
    store_module.tiles.create_array(group, "matrix_tiles", **layout, dimension_names=("row_tile", "column_shard"))
    m = TiledMatrix.create(group, "matrix", a.shape, a.dtype, 3, 2)
    assert (m.shape, m.tile, m.shard, m.shards) == ((11, 7), 3, 2, 4)
    fill(m, a)
    assert np.array_equal(group["matrix"][:], a)
    for found in (m.read(), m.read_sparse().toarray()):
        assert np.array_equal(found, a)
    assert np.array_equal(m.read_shard(1, 2, 9), a[2:9, 2:4])
    assert m.read_shard(1).flags.f_contiguous


@pytest.mark.parametrize("name", ["matrix", "matrix_tiles"])
def test_a_deleted_file_of_a_recorded_shard_is_told(store, name):
    group = store.unit_group("u")
    m = TiledMatrix.create(group, "matrix", (4, 4), np.dtype("f8"), 2, 2)
    fill(m, np.ones((4, 4)))
    for path in [p for p in files(store.local / "units/u" / name) if p.name != "zarr.json"]:
        good = path.read_bytes()
        path.unlink()
        with pytest.raises(DamagedError):
            m.read()
        path.write_bytes(good)


def test_an_incomplete_or_absent_matrix_is_not_read(store):
    group = store.unit_group("u")
    m = TiledMatrix.create(group, "matrix", (4, 5), np.dtype("f8"), 2, 2)
    fill(m, np.ones((4, 5)), [0, 2])
    with pytest.raises(DamagedError, match="columns 2 to 3: not written"):
        m.read()
    with pytest.raises(DamagedError, match="nothing"):
        TiledMatrix(group, "nothing")


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_writing_and_reading_a_shard_takes_what_is_planned(store, dtype):
    from stiffcore.solvers.projection import shard_bytes

    k, shard = 1500, 64
    m = TiledMatrix.create(store.unit_group("u"), "matrix", (k, 3 * shard), np.dtype(dtype), 256, shard)
    block = np.asfortranarray(np.random.default_rng(0).standard_normal((k, shard)).astype(dtype))
    fill(m, np.tile(block, 3))
    tracemalloc.start()
    m.write(1, block)
    written = tracemalloc.get_traced_memory()[1] + block.nbytes
    tracemalloc.reset_peak()
    m.check(complete=True)
    read = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(written, read) <= shard_bytes(k, shard, block.itemsize)


@pytest.mark.parametrize("k", [1, 5, 300, 520])
@pytest.mark.parametrize("shard", [8, 64])
def test_a_full_matrix_takes_the_disk_that_is_planned(store, k, shard):
    from stiffcore.solvers.projection import METADATA_BYTES, stored_bytes

    m = TiledMatrix.create(store.unit_group("u"), "matrix", (k, k), np.dtype("f8"), 256, shard)
    fill(m, np.ones((k, k)))
    found = unit_bytes(store, "u") - (store.local / "units/u/zarr.json").stat().st_size
    assert found <= stored_bytes(k, shard, 8) <= found + METADATA_BYTES


def test_orphans_of_killed_writers_are_swept(store):
    fill(TiledMatrix.create(store.unit_group("u"), "matrix", (4, 4), np.dtype("f8"), 2, 2), np.ones((4, 4)))
    before = snapshot(store.local)
    for folder in ("", "units", "units/u/matrix/c/0"):
        (store.local / folder / f"x.{'0' * 32}.partial").write_bytes(b"half")
    assert store.sweep() == 3
    assert snapshot(store.local) == before
    assert store.sweep() == 0


@pytest.mark.parametrize(
    "values",
    [
        np.arange(5.0),
        np.zeros(4),
        np.array([-0.0, np.nan, np.inf]),
        np.empty(0, "c8"),
        np.empty((0, 3, 2), "u1"),
        np.arange(6, dtype="u1").reshape(1, 2, 3),
        np.array([1 + 2j, -3j]),
        np.array([True, False]),
    ],
    ids=str,
)
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_small_arrays_come_back(tmp_path, values, scheme):
    store = RunStore(f"{scheme}{tmp_path}/run", create=True)
    dims = tuple(f"d{i}" for i in range(values.ndim))
    store.put_array("units/u", "a", np.ones(9), ("other",))  # replaced
    store.put_array("units/u", "a", values, dims)
    assert same_bits(store.get_array("units/u", "a"), values)


@pytest.mark.parametrize("values", [np.arange(1.0, 6.0), np.zeros(5)])
def test_damage_to_a_small_array_is_told(store, values):
    store.put_array("units/u", "a", values, ("d",))
    path = store.local / "units/u/a/c/0"
    good = path.read_bytes()
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        with pytest.raises(DamagedError):
            store.get_array("units/u", "a")
    path.write_bytes(b"")
    with pytest.raises(DamagedError):
        store.get_array("units/u", "a")
    path.unlink()
    with pytest.raises(DamagedError):
        store.get_array("units/u", "a")
    for group, name in (("units/u", "b"), ("units", "u"), ("nowhere", "a")):
        with pytest.raises(DamagedError):
            store.get_array(group, name)


def test_metadata_that_is_not_json_is_told(store):
    store.put_array("units/u", "a", np.ones(3), ("d",))
    path = store.local / "units/u/a/zarr.json"
    good = path.read_bytes()
    for bad in (b"", good[: len(good) // 2], b"[]", good.replace(b'"shape"', b'"shope"')):
        path.write_bytes(bad)
        with pytest.raises(DamagedError):
            store.get_array("units/u", "a")


def foreign_file(path):
    path.write_text("mine")


def foreign_folder(path):
    path.mkdir()
    (path / "thesis.tex").write_text("mine")


def foreign_group(path):
    import zarr

    zarr.open_group(str(path), mode="w").create_array("mine", shape=3, dtype="f8")


def foreign_array(path):
    import zarr

    zarr.create_array(str(path), shape=3, dtype="f8")[:] = 1


def foreign_empty_group(path):
    import zarr

    zarr.open_group(str(path), mode="w", attributes={"mine": 1})


def foreign_version_2(path):
    import zarr

    zarr.open_group(str(path), mode="w", zarr_format=2).create_array("mine", shape=3, dtype="f8")


def foreign_torn(path):
    foreign_folder(path)
    (path / "zarr.json").write_text('{\n  "attributes"')


def foreign_broken(path):
    path.mkdir()
    (path / "zarr.json").write_text("{not json")


@pytest.mark.parametrize(
    "make",
    [
        foreign_file,
        foreign_folder,
        foreign_group,
        foreign_array,
        foreign_empty_group,
        foreign_version_2,
        foreign_broken,
        foreign_torn,
    ],
)
@pytest.mark.parametrize("create", [True, False])
def test_what_is_not_a_run_is_refused_and_not_touched(tmp_path, make, create):
    path = tmp_path / "theirs"
    make(path)
    before = snapshot(tmp_path)
    with pytest.raises(InputError):
        RunStore(str(path), create=create)
    if make is not foreign_folder or create:
        with pytest.raises(InputError):
            RunStore.check_new(str(path))
    assert snapshot(tmp_path) == before


def test_looking_at_a_run_that_is_not_there_makes_nothing(tmp_path):
    for url in (tmp_path / "none", f"file://{tmp_path}/none", tmp_path / "a/b"):
        with pytest.raises(NoRunError):
            RunStore(str(url))
        RunStore.check_new(str(url))
    assert list(tmp_path.iterdir()) == []


def test_another_format_is_refused(store):
    for step, says in ((1, r"newer stiffcore \(99\.0\): update"), (-1, r"older stiffcore \(99\.0\): export")):
        for path in (store.local / "zarr.json", store.local / "units/zarr.json"):
            text = json.loads(path.read_text())
            text["attributes"]["stiffcore"] |= {"format": FORMAT + step, "version": "99.0"}
            path.write_text(json.dumps(text))
        before = snapshot(store.local)
        for create in (True, False):
            with pytest.raises(InputError, match=says):
                RunStore(store.url, create=create)
        assert not RunStore.restore(store.url)
        assert snapshot(store.local) == before


def test_a_run_killed_before_its_header_is_begun_again_from_nothing(tmp_path):
    url = str(tmp_path / "run")
    first = RunStore(url, create=True)
    first.put_array("images", "x", np.ones(3), ("d",))
    put(first, "old")
    (first.local / "holder.json").write_text("{}")
    with pytest.raises(NoRunError):
        RunStore(url)
    RunStore.check_new(url)
    again = RunStore(url, create=True)
    with again.hold():
        again.sweep()
        assert again.units() == {}
        new = put(again, "new")
        again.header = a_header()
        assert again.sweep() == 0
    assert list(RunStore(url).units()) == [new]


def test_a_header_written_meanwhile_is_seen_by_the_next_holder(tmp_path):
    a = RunStore(str(tmp_path / "run"), create=True)
    b = RunStore(str(tmp_path / "run"), create=True)
    with a.hold():
        a.header = a_header()
        key = put(a)
    with b.hold():
        assert b.header is not None
        b.sweep()
        assert list(b.units()) == [key]


HOLDER = """
import sys, time
from stiffcore import store
store.HEARTBEAT_S = 0.1
with store.RunStore(sys.argv[1]).hold():
    print("held", flush=True)
    time.sleep(60)
"""


def start(code, *args):
    process = subprocess.Popen([sys.executable, "-c", code, *args], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "held"
    return process


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_second_process_is_told_who_and_a_killed_one_is_no_obstacle(store, scheme):
    url = scheme + str(store.local)
    process = start(HOLDER, url)
    try:
        other = RunStore(url)
        assert other.holder()["pid"] == process.pid
        with pytest.raises(BusyError, match=f"process {process.pid} on "), other.hold():
            pass
        os.kill(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, but nobody has asked for its exit status
        assert other.holder() is None
        with other.hold():
            assert other.holder()["pid"] == os.getpid()
        assert other.holder() is None
    finally:
        kill(process)


def test_holding_the_same_run_twice_in_one_process_is_refused(store):
    with store.hold(), pytest.raises(BusyError, match=str(os.getpid())), RunStore(store.url).hold():
        pass
    with store.hold():
        pass


class TestHeartbeat:
    @pytest.fixture
    def url(self, store, monkeypatch):
        monkeypatch.setattr(store_module.lock, "HEARTBEAT_S", 0.05)
        monkeypatch.setattr(store_module.lock, "DEAD_AFTER_S", 0.5)
        return f"file://{store.local}"

    def elsewhere(self, store, **fields):
        now = time.time()
        me = {"token": "t", "pid": 1, "host": "elsewhere", "since": now, "heartbeat": now}
        store._write_json("holder.json", me | fields)

    def test_a_beating_holder_elsewhere_is_respected_and_a_silent_one_is_not(self, url):
        store = RunStore(url)
        stop = threading.Event()

        def beat(skew):
            while not stop.wait(0.05):
                self.elsewhere(store, heartbeat=time.time() + skew)

        for skew in (0, -3600, 3600):  # clocks of two machines need not agree
            stop.clear()
            beating = threading.Thread(target=beat, args=(skew,))
            beating.start()
            time.sleep(0.2)
            with pytest.raises(BusyError, match="on elsewhere"), store.hold():
                pass
            stop.set()
            beating.join()
        self.elsewhere(store, heartbeat=time.time() - 1)
        assert store.holder() is None
        with store.hold():
            pass

    @pytest.mark.parametrize("first", ["", "file://"])
    def test_a_path_and_its_url_exclude_each_other(self, url, store, first):
        second = "file://" if not first else ""
        one, other = (RunStore(scheme + str(store.local)) for scheme in (first, second))
        with one.hold(), pytest.raises(BusyError), other.hold():
            pass

    def test_a_worker_writes_while_its_session_lives_and_not_after(self, url, store, monkeypatch):
        monkeypatch.setattr(store_module.lock, "LEASE_S", 0.4)
        with store.hold(leased=True) as token:
            held = pickle.loads(pickle.dumps(store_module.lease(store.url, token, True)))
            worker = RunStore(store.url, lease=held)
            worker.put_array("images", "a", np.ones(3), ("d",))
            time.sleep(0.6)  # a long call of LAPACK, in which the session is renewed
            worker.put_array("images", "b", np.ones(3), ("d",))
            # the session dies without a word: its record stays as it is
            now = json.loads((store.local / "holder.json").read_text())
            monkeypatch.setattr(store_module.lock, "HEARTBEAT_S", 60)
            time.sleep(0.1)
            (store.local / "holder.json").write_text(json.dumps(now))
            time.sleep(0.6)
            for act in (
                lambda: worker.put_array("images", "c", np.ones(3), ("d",)),
                lambda: worker.clear("images"),
            ):
                with pytest.raises(BusyError, match="silent"):
                    act()
            (store.local / "holder.json").write_text(json.dumps(now | {"token": "another"}))
            with pytest.raises(BusyError, match="over"):
                worker.put_array("images", "d", np.ones(3), ("d",))
        assert sorted(p.name for p in (store.local / "images").iterdir() if p.is_dir()) == ["a", "b"]

    def test_who_takes_a_run_over_waits_for_a_write_that_is_under_way(self, url, store, monkeypatch):
        monkeypatch.setattr(store_module.lock, "DEAD_AFTER_S", 0.5)
        self.elsewhere(store)
        with store_module.lock._beside(store.local):
            with pytest.raises(BusyError, match="still writing"), store.hold():
                pass
            assert store._read_json("holder.json")["host"] == "elsewhere"
        with store.hold():
            pass

    def test_a_dead_session_whose_workers_live_elsewhere_is_waited_for(self, url, store):
        told = []
        self.elsewhere(store, host=socket.gethostname(), pid=2**22 + 1, leased=True)
        began = time.monotonic()
        with store.hold(tell=told.append):
            assert time.monotonic() - began > 0.4
        self.elsewhere(store, host=socket.gethostname(), pid=2**22 + 1, leased=False)
        began = time.monotonic()
        with store.hold():
            assert time.monotonic() - began < 10

    def test_the_heart_beats(self, url):
        store = RunStore(url)
        with store.hold():
            time.sleep(0.7)
            assert time.time() - store.holder()["heartbeat"] < 0.5
            with pytest.raises(BusyError), RunStore(url).hold():
                pass
        assert store._read_json("holder.json") is None

    def test_who_was_taken_for_dead_does_not_take_the_run_back(self, url):
        store = RunStore(url)
        with store.hold():
            self.elsewhere(store)
            time.sleep(0.2)
            assert store._read_json("holder.json")["host"] == "elsewhere"
        assert store._read_json("holder.json")["host"] == "elsewhere"

    def test_a_half_written_record_of_a_dead_holder_is_no_obstacle(self, url, store):
        (store.local / "holder.json").write_text('{"token": "ab')
        with RunStore(url).hold():
            pass


UPDATER = """
import sys
from stiffcore import store
run = store.RunStore(sys.argv[1])
print("held", flush=True)
for i in range(10**9):
    run.update(sys.argv[2], ilo=i, how="x" * (i % 5000), ihi=2 * i)
"""


def test_a_record_is_whole_whenever_its_writer_is_killed(store):
    key = put(store, failure="yes", ilo=0, ihi=0)
    path = store.local / f"units/{key}/zarr.json"
    for delay in (0.05, 0.11, 0.17):
        process = start(UPDATER, str(store.local), key)
        end = time.time() + delay
        while time.time() < end:
            json.loads(path.read_text())
        kill(process)
        record = store.record(key)
        assert record.ihi == 2 * record.ilo
        assert record.failure == "yes"
    store.sweep()
    assert [p for p in files(store.local) if p.name.endswith(".partial")] == []


def test_records_are_read_as_they_stand(store):
    other = RunStore(store.url)
    assert other.units() == {}
    b, a = put(store, "b", failure="full"), put(store, "a")
    store.update(b, stage=Stage.BUILT)
    assert other.record(b) == a_record("b", failure="full", stage=Stage.BUILT)
    assert list(other.units()) == [a, b]
    assert unit_bytes(other, a) > 0
    assert other.free_bytes() > 0


def test_two_writers_add_to_a_record_in_turn(store):
    other = RunStore(store.url)
    key = put(store, ilo=1)
    other.update(key, ihi=2)
    store.update(key, found=3, ihi=4)
    assert other.record(key) == a_record(ilo=1, ihi=4, found=3)


@pytest.mark.parametrize("place", ["{}", "file://{}", "memory://{}"])
def test_a_file_that_is_larger_than_what_it_declares_is_not_read(tmp_path, monkeypatch, place):
    """Where it lies makes no difference, nor what the index in a shard says of its tiles."""
    url = place.format(f"{tmp_path}/run")
    fs, path = fsspec.core.url_to_fs(url)
    store = RunStore(url, create=True)
    store.header = a_header()
    matrix = TiledMatrix.create(store.unit_group("u"), "matrix", (9, 9), np.dtype("f8"), 2, 4)
    fill(matrix, np.eye(9))
    shard = next(name for name in fs.find(f"{path}/units/u/matrix/c") if name.endswith("0/0"))
    whole = fs.cat_file(shard)
    fs.pipe_file(shard, whole[:-4] + bytes(100_000) + whole[-4:])
    with pytest.raises(DamagedError, match=r"a file has 100,\d+ bytes"):
        TiledMatrix(RunStore(url).unit_group("u"), "matrix").read()
    for module in ("place", "remote"):
        monkeypatch.setattr(f"stiffcore.store.{module}.METADATA_MOST", 50_000)
    header = fs.cat_file(f"{path}/zarr.json")
    for copy in ("zarr.json", "units/zarr.json"):
        fs.pipe_file(f"{path}/{copy}", header + b" " * 60_000)
    with pytest.raises(StrangeError, match=r"zarr.json has .*bytes"):
        _ = RunStore(url).header


@pytest.mark.parametrize("place", ["{}", "file://{}", "memory://{}"])
@pytest.mark.parametrize("tile", [(0, 10**11), (0, 2**62), (2**62, 100), (2**63 + 5, 17), (0, 2**64 - 2), (8, 68)])
def test_an_index_of_a_shard_that_points_beyond_it_is_damage_and_asks_for_no_memory(tmp_path, place, tile):
    """Where a tile begins and how long it is stand in the shard itself, sealed by a checksum that anyone can make."""
    url = place.format(f"{tmp_path}/run")
    fs, path = fsspec.core.url_to_fs(url)
    store = RunStore(url, create=True)
    store.header = a_header()
    fill(TiledMatrix.create(store.unit_group("u"), "matrix", (9, 9), np.dtype("f8"), 9, 9), np.eye(9))
    (shard,) = fs.find(f"{path}/units/u/matrix/c")
    whole, index = fs.cat_file(shard), struct.pack("<QQ", *tile)
    fs.pipe_file(shard, whole[:-20] + index + google_crc32c.value(index).to_bytes(4, "little"))
    with pytest.raises(DamagedError):
        TiledMatrix(RunStore(url).unit_group("u"), "matrix").read()


def test_a_run_on_a_url_works_as_one_in_a_folder(tmp_path):
    url = f"file://{tmp_path}/run"
    store = RunStore(url, create=True)
    store.header = a_header()
    key = put(store)
    a = np.eye(9)
    fill(TiledMatrix.create(store.unit_group(key), "matrix", (9, 9), a.dtype, 2, 4), a)
    assert np.array_equal(TiledMatrix(RunStore(url).unit_group(key), "matrix").read(), a)
    store.drop(key, "matrix", "never_there")
    assert RunStore(f"{tmp_path}/run").units() == {key: a_record()}
    assert [p.name for p in files(tmp_path / f"run/units/{key}")] == ["zarr.json"]
    assert store.sweep() == 0


def test_xarray_opens_a_unit_with_named_dimensions(store):
    xarray = pytest.importorskip("xarray")
    a = np.arange(35.0).reshape(7, 5) + 1
    fill(TiledMatrix.create(store.unit_group("u"), "matrix", (7, 5), a.dtype, 3, 2), a)
    store.put_array("units/u", "eigenvalues", np.array([1 + 1j, 1 - 1j]), ("eigenvalue",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = xarray.open_zarr(
            str(store.local), group="units/u", consolidated=False, chunks=None, mask_and_scale=False
        )
        assert found["matrix"].dims == ("column", "row")
        assert found["matrix_tiles"].dims == ("row_tile", "column_shard")
        assert found["eigenvalues"].dims == ("eigenvalue",)
        assert np.array_equal(found["matrix"].transpose("row", "column").values, a)
        assert np.array_equal(found["eigenvalues"].values, [1 + 1j, 1 - 1j])


@pytest.mark.parametrize("rows", [8, 20_000])
def test_a_file_with_more_than_its_tiles_is_refused_before_it_is_read(tmp_path, rows):
    store = RunStore(str(tmp_path / "run"), create=True)
    a = TiledMatrix.create(store.unit_group(put(store)), "a", (rows, 3), np.dtype(float), tile=4, shard=2)
    for shard in range(a.shards):
        a.write(shard, np.ones((rows, a.columns(shard)[1] - a.columns(shard)[0])))
    assert a.read().sum() == 3 * rows
    path = next(p for p in tmp_path.rglob("a/c/*/*") if p.is_file())
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(DamagedError, match="1,099,511,627,776 bytes"):
        a.read()
