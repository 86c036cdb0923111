"""A round trip for every format: what is read back is what the run holds."""

import math
import sys

import h5py
import numpy as np
import pandas as pd
import pytest

import stiffcore
from stiffcore import cli
from stiffcore.commands import terminal
from stiffcore.errors import InputError
from stiffcore.exports import export
from tests.runs import OPTIONS, execute, ready


@pytest.fixture
def run(small):
    return stiffcore.open_run(str(ready(small / "run", OPTIONS | {"count": 2, "blocks": "1,4"})))


def assert_same(found, rows):
    assert list(found.columns) == list(rows.columns)
    for name in rows:
        a, b = found[name], rows[name]
        if b.dtype.kind in "fiub":
            assert np.array_equal(a.to_numpy(float), b.to_numpy(float), equal_nan=True), name
        else:
            assert a.fillna("").astype(str).tolist() == b.fillna("").astype(str).tolist(), name


def test_csv_and_parquet_hold_the_metrics_to_the_last_digit(run, small):
    rows = run.metrics()
    export(run, small / "m.csv")
    assert_same(pd.read_csv(small / "m.csv", keep_default_na=False, na_values=["nan"]), rows)
    export(run, small / "m.parquet")
    assert_same(pd.read_parquet(small / "m.parquet"), rows)
    for low, high in (("negative_low", "negative_high"), ("euler_stable_low", "euler_stable_high")):
        known = rows[rows["function"] == "branch"]
        assert len(known)
        assert (known[low] <= known[high]).all()
    assert (rows["negative_low"] <= rows["negative"]).all()
    assert (rows["negative"] <= rows["negative_high"]).all()


def test_hdf5_holds_spectra_and_metrics(run, small):
    assert "8 spectra" in export(run, small / "s.h5")
    rows = run.metrics()
    with h5py.File(small / "s.h5") as file:
        assert file.attrs["layout"] == 1
        assert set(file["spectra"]) == set(run.records())
        for key in run.records():
            group, spectrum = file[f"spectra/{key}"], run.stored(key)
            assert np.array_equal(group["real"][:] + 1j * group["imag"][:], spectrum.computed)
            assert group["real"].dtype == np.float64
            assert len(group["real"]) + group.attrs["ones"] + group.attrs["zeros"] == group.attrs["n"] == spectrum.n
            assert (group.attrs["complete"], group.attrs["certified"]) == (1, 1)
            assert group.attrs["block"] == spectrum.name
        assert np.array_equal(file["metrics/S_active"][:], rows["S_active"])
        assert file["metrics/block"].asstr()[:].tolist() == rows["block"].tolist()
        assert np.array_equal(file["images/y"][:], run.store.get_array("images", "y"))


def test_the_ends_of_a_spectrum_are_not_taken_for_all_of_it(small, ends_are_cheap):
    run, _ = execute(small / "ends", OPTIONS | {"blocks": "1", "solver": "extremes"})
    export(run, small / "e.hdf5")
    with h5py.File(small / "e.hdf5") as file:
        assert {group.attrs["complete"] for group in file["spectra"].values()} == {0}


def test_notebooks_show_a_run_and_a_spectrum(run):
    assert "8 done" in repr(run)
    page = run._repr_html_()
    assert page.count("<tr") == 9
    spectrum = run.spectrum(block=1)
    shown = spectrum._repr_html_()
    assert f"{spectrum.metrics['S_active']:.7g}" in shown
    assert "certified" in shown


def test_xarray_has_every_metric_at_its_place(run):
    data = run.to_xarray()
    assert data.sizes == {"image": 2, "block": 2, "function": 2, "kind": 1}
    for _, row in run.metrics().iterrows():
        at = data.sel(image=row["image"], block=row["block"], function=row["function"], kind="matrix")
        assert float(at["S_active"]) == row["S_active"]
        assert float(at["negative"]) == row["negative"]
        assert int(at["label"]) == row["label"]
        assert int(at["number"]) == row["number"]
        assert str(at["state"].item()) == "done"
        assert math.isnan(float(at["euler_stable"])) == math.isnan(row["euler_stable"])


def test_what_cannot_be_written_is_refused(run, small, monkeypatch):
    (small / "there.csv").write_text("")
    for name, part in (("there.csv", "exists"), ("x.doc", ".parquet"), ("no/x.csv", "no folder")):
        with pytest.raises(stiffcore.InputError, match=part):
            export(run, small / name)
    assert (small / "there.csv").read_text() == ""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(stiffcore.InputError, match=r"stiffcore\[export\]"):
        export(run, small / "m.parquet")
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(stiffcore.InputError, match=r"stiffcore\[export\]"):
        run.to_xarray()


def test_two_runs_are_compared_block_by_block(run, small, capsys, monkeypatch):
    monkeypatch.setattr(terminal.out, "_width", 400)
    execute(small / "other", OPTIONS | {"count": 1, "blocks": "1,2"})
    other = stiffcore.open_run(str(small / "other"))
    found = stiffcore.compare([run, other], ["S_active"])
    both = found[found["common"] > 0]
    assert set(both["number"]) == {1}
    assert set(both["run"]) == {"other"}
    assert (both["difference"] == 0).all()  # the same network at the same image, under another name
    with pytest.raises(InputError, match="two different runs"):
        stiffcore.compare([run, run])
    with pytest.raises(InputError, match="unknown metrics: stiffness"):
        stiffcore.compare([run, other], ["stiffness"])
    cli.compare([str(small / "run"), str(small / "other")], small / "c.csv")
    shown = capsys.readouterr().out
    assert "other less run" in shown
    assert len(pd.read_csv(small / "c.csv")) == len(stiffcore.compare([run, other]))
    with pytest.raises(InputError, match=r"known are \.csv"):
        cli.compare([str(small / "run"), str(small / "other")], small / "c.parquet")
