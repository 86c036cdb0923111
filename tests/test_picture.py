"""The numerical range and the pseudospectrum of a unit, against dense truth."""

import numpy as np
import pytest
import scipy.linalg

import stiffcore
from stiffcore.errors import DamagedError
from stiffcore.picture import ARRAYS, shifted_matrix, stored_picture
from stiffcore.store import RunStore
from tests.records import put
from tests.runs import OPTIONS, command, execute


@pytest.mark.parametrize("keep", ["spectra", "all"])
def test_a_picture_is_of_the_matrix_that_has_the_spectrum_and_stays_in_the_run(small, keep):
    run, _ = execute(small / "run", OPTIONS | {"blocks": "1", "keep": keep})
    found = run.picture(block=1, grid=7, trust=True)
    key = next(iter(run.records()))
    a = shifted_matrix(run.store, key, trusted=OPTIONS["network"])[0].toarray()
    spectrum = run.spectrum(block=1)
    assert np.allclose(np.sort_complex(np.linalg.eigvals(a).round(9)), np.sort_complex(spectrum.computed.round(9)))
    for z, t in zip(found.numerical_range, 2 * np.pi * np.arange(72) / 72, strict=True):
        rotated = np.exp(-1j * t) * a
        support = scipy.linalg.eigvalsh((rotated + rotated.conj().T) / 2)[-1]
        assert (np.exp(-1j * t) * z).real == pytest.approx(support, abs=1e-6)
    assert found.re[0] < found.numerical_range.real.min()
    assert found.re[-1] > found.numerical_range.real.max()
    assert found.im[0] == 0
    assert found.im[-1] > found.numerical_range.imag.max()
    for j, i in ((0, 0), (1, 3), (len(found.im) - 1, len(found.re) - 1)):
        z = found.re[i] + 1j * found.im[j]
        true = scipy.linalg.svdvals(a - z * np.eye(len(a)))[-1]
        assert found.smallest[j, i] == pytest.approx(true, rel=1e-6)
    again = stored_picture(stiffcore.open_run(str(small / "run")).store, key)
    assert np.array_equal(again.smallest, found.smallest)
    run.picture(block=1, trust=True)
    assert np.array_equal(stored_picture(run.store, key).smallest, found.smallest)
    # the run is as it was, and goes on
    assert execute(small / "run", {})[1].failed == {}
    assert stored_picture(run.store, key) is not None


@pytest.mark.parametrize("threshold", [-0.1, 0.0, 0.5, 0.97, 1.03, 5.0])
def test_eigenvalues_left_of_any_line_are_counted_exact_ones_and_zeros_with_them(small, threshold):
    run, _ = execute(small / "run", OPTIONS | {"blocks": "1", "functions": "block"})
    found = run.count_left(threshold, block=1, trust=True)
    values = run.spectrum(block=1).values
    if found.count is not None:
        assert found.count == (values.real < threshold).sum()
        assert found.margin <= np.abs(values.real - threshold).min() + 1e-9
    assert found.count is not None or np.abs(values.real - threshold).min() < 1e-6


def test_a_count_of_a_run_allows_for_the_rounding_of_its_matrix(small, monkeypatch):
    run, _ = execute(small / "run", OPTIONS | {"blocks": "1", "keep": "all"})
    key = next(iter(run.records()))
    threshold = float(np.sort(run.spectrum(block=1).computed.real)[:2].mean())
    sure = run.count_left(threshold, block=1, trust=True)
    distance = run.store.record(key).distance
    assert 0 < distance < 1e-12
    assert sure.tolerated > distance
    run.store.update(key, distance=2 * sure.tolerated)  # as of a far larger rounding
    assert run.count_left(threshold, block=1, trust=True).count is None
    run.store.update(key, distance=None)  # a run of an older version
    assert run.count_left(threshold, block=1, trust=True) == sure


def test_the_command_says_what_it_found_and_refuses_a_unit_that_is_not_there(small):
    execute(small / "run", OPTIONS | {"blocks": "1,4", "solver": "extremes"})
    asked = ("picture", small / "run", "--block", "4", "--function", "branch", "--grid", "4", "--to", "drawn.png")
    process = command(*asked, "--trust", cwd=small)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    assert (small / "drawn.png").read_bytes().startswith(b"\x89PNG")
    assert "numerical range: real parts" in printed
    assert "the smallest singular value is" in " ".join(printed.split())
    process = command("picture", small / "run", "--block", "9", cwd=small)
    assert "no unit of image 0, block 9" in process.communicate()[1]
    assert process.returncode == 2


def test_a_picture_that_is_there_is_not_computed_again(small, monkeypatch):
    run, _ = execute(small / "run", OPTIONS | {"blocks": "4", "functions": "block"})
    taken = run.picture(block=4, grid=4, trust=True)

    def built(*args):
        raise AssertionError("the matrix was built again")

    monkeypatch.setattr("stiffcore.picture.shifted_matrix", built)
    for again in (run.picture(block=4, grid=4), run.picture(block=4)):
        assert np.array_equal(again.numerical_range, taken.numerical_range)
        assert np.array_equal(again.smallest, taken.smallest)
    with pytest.raises(AssertionError, match="built again"):
        run.picture(block=4, grid=5)


def test_a_kept_matrix_that_was_damaged_is_said_to_be(small):
    run, _ = execute(small / "run", OPTIONS | {"blocks": "1", "functions": "block", "keep": "all"})
    key = next(iter(run.records()))
    for name in ("matrix", "matrix_tiles"):
        path = small / "run" / "units" / key / name / "zarr.json"
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DamagedError, match=name):
            run.picture(block=1, trust=True)
        path.write_bytes(whole)
    run.picture(block=1, trust=True)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("numerical_range", np.zeros((3, 2), complex)),
        ("numerical_range", np.zeros(3)),
        ("pseudospectrum_re", np.zeros((1, 2))),
        ("pseudospectrum", np.zeros(2)),
        ("pseudospectrum", np.zeros((2, 2), complex)),
    ],
)
def test_a_picture_of_other_arrays_than_were_written_is_none(tmp_path, name, values):
    store = RunStore(str(tmp_path / "run"), create=True)
    key = put(store)
    whole = (np.zeros(3, complex), np.zeros(2), np.zeros(2), np.zeros((2, 2)))
    for array, stored in zip(ARRAYS, whole, strict=True):
        store.put_array(f"units/{key}", array, stored, tuple(f"axis{i}" for i in range(stored.ndim)))
    assert stored_picture(store, key) is not None
    store.put_array(f"units/{key}", name, values, tuple(f"axis{i}" for i in range(values.ndim)))
    assert stored_picture(store, key) is None
