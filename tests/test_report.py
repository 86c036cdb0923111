"""The report: one page that needs no network, says what failed, and opens in a browser."""

import json
import re
import shutil
import subprocess
from dataclasses import replace

import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

import stiffcore
from stiffcore.commands.reading import show_tables
from stiffcore.metrics import spell
from stiffcore.report.figures import depth, paper_values
from stiffcore.report.page import render, write_report
from tests.runs import OPTIONS, execute, ready

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def run(small):
    return stiffcore.open_run(str(ready(small / "run", OPTIONS | {"count": 4, "blocks": "1,4"})))


def test_the_page_needs_nothing_from_elsewhere_and_has_every_part(run, small):
    write_report(run, small / "r.html", small / "figures")
    text = (small / "r.html").read_text()
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!#|data:)", text)
    assert not re.findall(r"url\((?!#|['\"]?data:)", text)
    for title in ("By block", "Certificates", "What made this run"):
        assert f"<h2>{title}" in text
    for title in ("By label", "Correlations with accuracy and loss"):  # of four images with four labels there are none
        assert f"<h2>{title}" not in text
    for figure in ("spectra-matrix-block-0", "spectra-matrix-branch-0", "depth-matrix-block"):
        assert f'id="{figure}"' in text
        assert Image.open(small / f"figures/{figure}.png").size[0] > 300
        assert "<svg" in (small / f"figures/{figure}.svg").read_text()
    assert "No check failed, and no unit." in text
    row = run.metrics().iloc[0]
    assert f"{row['S_active']:.7g}" in text
    assert run.header.identity.weights in text


def test_means_by_label_and_correlations_come_with_enough_images(run):
    rows = run.metrics()
    many = pd.concat([rows.assign(image=rows["image"] + 4 * i, loss=rows["loss"] + i % 3) for i in range(5)])
    for copies, there in ((many, True), (many[many["image"] < 19], False)):
        text = render(run, copies, {})
        assert ("<h2>Correlations with accuracy and loss" in text) is there
        assert "<h2>By label" in text


def test_what_failed_and_what_is_open_stands_in_the_page(small, ends_are_cheap):
    run, _ = execute(small / "run", OPTIONS | {"blocks": "1", "solver": "extremes", "functions": "block"})
    key = next(iter(run.records()))
    record = run.store.record(key)
    run.store.update(key, certificate=replace(record.certificate, failures=("the moon <was> wrong",)))
    write_report(run, small / "r.html")
    text = (small / "r.html").read_text()
    assert "not certified: the moon &lt;was&gt; wrong" in text
    assert "ends; proved" in text
    assert "No check failed" not in text


def test_nothing_is_overwritten_and_names_are_checked(run, small):
    (small / "there.html").write_text("mine")
    with pytest.raises(stiffcore.InputError, match="exists"):
        write_report(run, small / "there.html")
    with pytest.raises(stiffcore.InputError, match=r"\.html"):
        write_report(run, small / "r.pdf")
    write_report(run, small / "a.html", small / "figures")
    with pytest.raises(stiffcore.InputError, match="exists"):
        write_report(run, small / "b.html", small / "figures")
    assert not (small / "b.html").exists()
    assert (small / "there.html").read_text() == "mine"


def test_the_paper_s_values_are_those_of_its_tables():
    by_block = {p["block"]: p for p in paper_values("resnet18")}
    assert (by_block[8]["S"], by_block[8]["negative"]) == (-12.99, pytest.approx(0.2192))
    assert len(paper_values("resnet34")) == 16
    assert [p["S"] for p in paper_values("resnet50")] == [-35.32]
    assert paper_values("smallnet:make") == []


# What a browser measures of a page once it is drawn, as its title.
MEASURE = """<script>document.title = JSON.stringify({
    wide: document.documentElement.scrollWidth - innerWidth,
    background: getComputedStyle(document.body).backgroundColor,
    columns: new Set([...document.querySelectorAll(".panels svg")].map(svg => svg.getBoundingClientRect().left)).size,
    panels: [...document.querySelectorAll(".panels svg")].filter(svg => svg.getBoundingClientRect().width > 150).length,
    rows: document.querySelectorAll("tr").length})</script>"""


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_draws_the_page_wide_and_narrow_light_and_dark(run, small):
    write_report(run, small / "r.html")
    (small / "measured.html").write_text((small / "r.html").read_text() + MEASURE)
    base = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu"]
    for width, dark in ((1300, False), (1300, True), (500, False), (500, True)):  # headless windows are 500 at least
        look = [f"--window-size={width},2000", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
        page = (small / "measured.html").as_uri()
        dom = subprocess.run(
            [*base, *look, "--dump-dom", page], capture_output=True, text=True, timeout=120, check=True
        )
        seen = json.loads(re.search(r"<title>({.*?})</title>", dom.stdout)[1])
        assert seen["wide"] <= 0
        assert seen["panels"] == 4
        assert (seen["columns"] > 1) is (width == 1300)
        assert seen["rows"] > 20
        assert (max(map(int, re.findall(r"\d+", seen["background"]))) < 60) is dark
    shot = small / "shot.png"
    look = ["--window-size=1300,2000", f"--screenshot={shot}"]
    subprocess.run([*base, *look, (small / "r.html").as_uri()], capture_output=True, timeout=120, check=True)
    drawn = Image.open(shot).convert("RGB")
    blue = sum(count for count, (r, g, b) in drawn.getcolors(1 << 24) if b > r + 60 and b > g + 40)
    assert blue > 100  # the computed eigenvalues


def test_the_summary_names_the_extremes_and_no_folder_is_told(run, small):
    write_report(run, small / "r.html")
    text = (small / "r.html").read_text()
    rows = run.metrics()
    part = rows[rows["function"] == "block"]
    least, most = part.loc[part["S_active"].idxmin()], part.loc[part["S_active"].idxmax()]
    assert f"S active from {spell(least['S_active'])} ({least['block']}) to {spell(most['S_active'])}" in text
    assert f"matrix of block: {len(part)} of {len(part)} spectra certified" in text
    assert str(small) not in text


def test_plots_of_a_spectrum_a_run_and_several(run, small):
    key = next(iter(run.records()))
    spectrum = run.stored(key)
    axis = spectrum.plot()
    assert axis.get_aspect() == 1
    drawn = axis.lines[-1 - (spectrum.zeros > 0) - (spectrum.ones > 0)].get_xydata()
    assert sorted(map(tuple, drawn)) == sorted(zip(spectrum.computed.real, spectrum.computed.imag, strict=True))
    left, right = axis.get_xlim()
    assert left < min(spectrum.computed.real.min(), 0) < spectrum.computed.real.max() < right
    assert spectrum.plot(axis) is axis
    depth = run.plot_depth()
    assert [a.get_ylabel() for a in depth.axes] == ["S active", "Re < 0, %"]
    median = run.metrics().query("function == 'block'").groupby("number")["S_active"].median()
    assert [y for container in depth.axes[0].containers for y in container[0].get_ydata()] == pytest.approx(
        list(median)
    )
    with pytest.raises(stiffcore.InputError, match="nothing to draw of branch"):
        run.plot_labels("branch", "singular")
    found = stiffcore.compare([run, stiffcore.open_run(str(shutil.copytree(small / "run", small / "again")))])
    figure = stiffcore.plot_compare(found)
    assert [a.get_ylabel() for a in figure.axes] == ["S_active", "negative", "abscissa"]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["run", "again"]


def test_the_paper_s_values_stand_beside_tensor_slices_alone(run):
    rows = run.metrics().query("function == 'block'").assign(S_active=-2.0)
    plain, sliced = (depth(rows.assign(kind=kind), "block", "resnet18") for kind in ("matrix", "tensor-slices"))
    crosses = [sum(line.get_marker() == "x" for line in figure.axes[0].lines) for figure in (plain, sliced)]
    assert crosses == [0, 1]


def test_blocks_that_are_no_residual_ones_and_images_without_labels_are_shown(small, capsys):
    body = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1))
    network = nn.Sequential(body, nn.Flatten(), nn.Linear(75, 2))
    images = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    run = stiffcore.analyze(network, images, run=small / "a", blocks="0.0,0.2")
    show_tables(run)
    assert "loss undefined" in capsys.readouterr().out
    write_report(run, small / "a.html")
    labelled = stiffcore.analyze(network, images, [0, 1, 0, 1], run=small / "b", blocks="0.0,0.2")
    labelled.picture(block="0.0", grid=2, module=network)
    write_report(labelled, small / "b.html")
    text = (small / "b.html").read_text()
    assert 'id="labels-matrix-block"' in text
    assert "<h2>By label" in text
