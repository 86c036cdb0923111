"""Claims about tables: at any width nothing is cropped, verdicts least of all, and each reason stands once."""

import io
import zipfile
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

import stiffcore
from stiffcore.errors import InputError
from stiffcore.report.tables import metrics_table, plan_table
from stiffcore.report.terminal import Terminal
from tests.test_plan import GIB, planned, unit

STORED = Path(__file__).parent / "data/tables"
ROW = {
    "image": 0,
    "image_index": 7,
    "number": 1,
    "block": "layer1.0",
    "function": "block",
    "state": "done",
    "n": 16_384,
    "m": 16_384,
    "k": 7_721,
    "route": "waist",
    "S": float("inf"),
    "S_active": 7.70151,
    "S_active_error": 3.2e-11,
    "negative": 0.0,
    "negative_low": 0.0,
    "negative_high": 0.0,
    "zero": 0.23608,
    "near_axis": 0,
    "abscissa": 2.4096,
    "min_re_active": 0.31287,
    "value_error": 1.3e-12,
    "certified": True,
    "solver": "extremes",
    "basis": "ends; proved: found and deflated, margin 1.3e-05",
    "note": "",
    "label": 0,
    "prediction": 1,
    "loss": 2.53,
}
OPEN = {"function": "branch", "S": -1.6204, "S_active": -1.620384, "negative": float("nan"), "basis": "ends; open"}
OPEN |= {"negative_low": 0.00012, "negative_high": 0.47107, "note": "how many have negative real part is open"}
RECTANGULAR = {"number": 3, "block": "layer2.0", "n": 8_192, "state": "no spectrum"}
FAILED = {"number": 4, "block": "encoder.layers.11.attention", "certified": False, "note": "residual of 1 is 1e-3"}


def rows(*changes):
    return pd.DataFrame([ROW | change for change in changes])


def printed(table, width):
    console = Terminal(file=io.StringIO(), width=width)
    console.print_table(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def shown(name, width):
    if name == "show":
        return printed(
            metrics_table(rows({}, OPEN, RECTANGULAR, {"number": 2, "block": "layer1.1"}, FAILED), width), width
        )
    units = [unit(300), unit(7_000, block="layer1.1"), unit(60_000, block="layer1.2")]
    return printed(plan_table(planned(units, 4 * GIB), width), width)


@pytest.mark.parametrize("name", ["show", "plan"])
@pytest.mark.parametrize("width", [80, 100, 160])
def test_tables_at_these_widths_are_as_stored(name, width):
    """Stored by `python -m tests.test_tables`."""
    text = shown(name, width)
    assert text == (STORED / f"{name}-{width}.txt").read_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("width", [*range(20, 200, 9)])
def test_no_number_and_no_verdict_is_cropped_at_any_width(width):
    text = shown("show", width)
    assert "…" not in text
    for cell in ("7.70151", "-1.620384", "3.2e-11", "yes (1)", "yes (2, 3)", "NO (1, 4)", "no spectrum"):
        assert cell in text, cell


def test_what_verdicts_rest_on_stands_below_the_table_once():
    text = shown("show", 160)
    assert text.count("proved: found and deflated") == 1  # of three spectra, with three margins
    assert text.count("residual of 1 is 1e-3") == 1


def test_the_width_of_a_pipe_shows_every_column():
    table = metrics_table(rows({}, OPEN), 180)
    assert [str(c.header) for c in table.columns][-4:] == ["max Re", "min Re active", "error", "certified"]
    assert Console(width=180).measure(table).maximum <= 180


def test_a_spectrum_that_is_not_there_says_which_are(tmp_path):
    with zipfile.ZipFile(STORED.parent / "runs-of-0.1.0.zip") as runs:
        runs.extractall(tmp_path, [name for name in runs.namelist() if name.startswith("metrics-half/")])
    run = stiffcore.open_run(tmp_path / "metrics-half")
    with pytest.raises(InputError, match=r"image 5.*; it has image 0, blocks 2 layer1.1, functions block, kinds "):
        run.spectrum(image=5)


if __name__ == "__main__":
    STORED.mkdir(exist_ok=True)
    for name in ("show", "plan"):
        for width in (80, 100, 160):
            (STORED / f"{name}-{width}.txt").write_text(shown(name, width))
