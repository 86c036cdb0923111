"""What others named or said is shown as it is: no markup, no formula, no order to the terminal, wherever it goes."""

import csv
import io
import re
import sys
import warnings
import xml.dom.minidom

import h5py
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress
from torch import nn

import stiffcore
from stiffcore import cli
from stiffcore.commands import terminal
from stiffcore.commands.progress import Bars
from stiffcore.exports import export
from stiffcore.report.figures import spectra
from stiffcore.report.page import write_report
from stiffcore.report.terminal import Terminal
from stiffcore.text import spreadsheet_cell, visible

# Names of modules may hold anything but a full stop, and no comma where they are listed.
NAMES = [
    "[/data/x] {0} {name} %s",
    "expected [n] got [batch] :skull:",
    "[link=file:///etc/passwd]here[/link] [bold red]NOT[/]",
    "$x",
    "$\\frac{$ $\\evil$ a_b^c\\$",
    "=HYPERLINK(1)",
    "-1+1\x1b[2J\x1b]0;mine\x07\r\x08\x0b\x7f\x9b31m",
    "@SUM \u202eexe\u2066\u2028\ufeff<script>alert(1)</script>-->",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    network = nn.Sequential()
    for name in NAMES:
        network.add_module(name, nn.Linear(3, 3))
    torch.manual_seed(0)
    images = torch.rand(3, 3)
    made = stiffcore.analyze(network, images, [0, 1, 1], run=folder / "run", blocks=NAMES)
    key = next(key for key, r in made.records().items() if r.unit.block == NAMES[0] and r.unit.image == 2)
    made.store.update(key, stage="planned", failure="no file [/data/x]\nexpected [n, c] got [batch]\x1b[2J \udcff")
    return stiffcore.open_run(str(folder / "run"))


def assert_shown(text, names=NAMES):
    lost = [name for name in names if visible(name) not in text]
    assert lost == []
    assert [c for c in text if c != "\n" and not c.isprintable()] == []


def test_every_character_that_acts_or_hides_is_made_visible():
    assert visible("\x1b[31m \x00\x7f\x9b\r\u202e\u2066\u200b\ud800\U000e0041") == (
        "\\x1b[31m \\x00\\x7f\\x9b\\r\\u202e\\u2066\\u200b\\ud800\\U000e0041"
    )
    for plain in ("plain", "naïve 猫 👩\u200d🔬 한국어 עברית", "two\nlines\tand a tab", "[/data/x] $x =1"):
        assert visible(plain) == plain
    assert visible("two\nlines", lines=False) == "two\\nlines"
    assert [spreadsheet_cell(t) for t in ("=1", "-1", "layer1.1", "\t=1", "1-2", "")] == [
        *("'=1", "'-1", "layer1.1"),
        *("'\t=1", "1-2", ""),
    ]


@given(st.text(st.characters(exclude_characters="\t")))
def test_no_text_reaches_a_terminal_otherwise_than_it_is(text):
    printed = io.StringIO()
    Terminal(file=printed, width=10_000, force_terminal=True, color_system=None).print(text, soft_wrap=True)
    shown = printed.getvalue()
    assert shown == visible(text) + "\n"
    shown.encode()  # no half of a surrogate pair
    assert "\x1b" not in shown


def printed(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["stiffcore", *map(str, args)])
    for name in ("out", "err"):
        monkeypatch.setattr(getattr(terminal, name), "_width", 400)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    said = capsys.readouterr()
    return said.out + said.err


def test_tables_and_sentences_show_names_and_messages_as_they_are(run, monkeypatch, capsys):
    assert_shown(printed(monkeypatch, capsys, "show", run.store.url))
    said = printed(monkeypatch, capsys, "status", run.store.url)
    assert_shown(said, ["no file [/data/x]", "expected [n, c] got [batch]\x1b[2J \udcff"])


def test_progress_bars_show_names_and_messages_as_they_are(run):
    shown = io.StringIO()
    progress = Bars()
    console = Terminal(file=shown, width=400, force_terminal=True, color_system=None)
    bars = Progress(*progress.bars.columns, console=console, auto_refresh=False)
    for name in NAMES:
        bars.add_task(name, total=1, note=f"{name}!")
    console.print(bars.get_renderable())
    assert_shown(shown.getvalue(), [*NAMES, *(f"{name}!" for name in NAMES)])


def test_an_error_is_shown_as_it_is(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["stiffcore", "status", "/nowhere/[/data/x]\x1b[2J"])
    with pytest.raises(SystemExit):
        cli.main()
    assert_shown(capsys.readouterr().err, ["/nowhere/[/data/x]\x1b[2J"])


def test_a_library_s_warning_is_a_line_of_text(monkeypatch, capsys):
    def warns():
        warnings.warn("old [/data/x]\x1b[2J", UserWarning, stacklevel=1)

    monkeypatch.setattr(cli, "app", warns)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        cli.main()
    said = capsys.readouterr().err
    assert_shown(said, ["warning: old [/data/x]\x1b[2J"])
    assert said.count("\n") == 1


def test_pictures_draw_names_as_they_are(run, tmp_path):
    figure = spectra(run, 0, "block")
    titles = [axis.get_title() for axis in figure.axes]
    figure.savefig(tmp_path / "a.png")
    for name in NAMES:
        [title] = [t for t in titles if t.replace(r"\$", "$").startswith(visible(name) + ",")]
        text = next(axis.title for axis in figure.axes if axis.get_title() == title)
        drawn, is_math = text._preprocess_math(title)
        assert (is_math, drawn) == (False, title.replace(r"\$", "$"))


def test_the_page_and_its_figures_are_well_formed_and_name_what_there_is(run, tmp_path):
    write_report(run, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert [c for c in text if c not in "\n\t" and not c.isprintable()] == []
    for name in NAMES:
        escaped = re.escape(visible(name)).replace("<", "&lt;").replace(">", "&gt;")
        assert re.search(escaped, text), name
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) > 2
    for drawing in drawings:
        xml.dom.minidom.parseString(drawing)


def test_no_cell_of_a_csv_file_is_a_formula_and_every_format_can_be_read(run, tmp_path):
    export(run, tmp_path / "m.csv")
    with (tmp_path / "m.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * len(NAMES)
    numbers = {name for name, value in run.metrics().items() if value.dtype.kind in "biuf"}
    for row in rows:
        assert [(n, v) for n, v in row.items() if n not in numbers and v[:1] in tuple("=+-@\t\r")] == []
    assert {row["block"].removeprefix("'") for row in rows} == {visible(name) for name in NAMES}
    export(run, tmp_path / "m.parquet")
    assert set(pd.read_parquet(tmp_path / "m.parquet")["block"]) == {visible(name) for name in NAMES}
    export(run, tmp_path / "m.h5")
    with h5py.File(tmp_path / "m.h5") as file:
        assert set(file["metrics/block"].asstr()[:]) == {visible(name) for name in NAMES}
        assert {group.attrs["block"] for group in file["spectra"].values()} == {visible(name) for name in NAMES}
