"""The scripts in `examples/` run, make their picture, and say what is known to be true."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys):
    """What a script prints, carried out in this process, once it has made a picture with something in it."""

    def run(name, *options):
        picture = tmp_path / "picture.png"
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.setattr(sys, "argv", [name, "--to", str(picture), *options])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        assert_picture(picture)
        return capsys.readouterr().out

    kind = torch.get_default_dtype()
    yield run
    torch.set_default_dtype(kind)
    plt.close("all")


@pytest.fixture
def printed_apart(tmp_path):
    """The same in a process of its own, for a script that starts others."""

    def run(name, *options):
        program = [sys.executable, str(EXAMPLES / name), "--to", "picture.png", *options]
        found = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
        assert found.returncode == 0, found.stderr
        assert_picture(tmp_path / "picture.png")
        return found.stdout

    return run


def assert_picture(path):
    with Image.open(path) as image:
        assert len(image.convert("RGB").getcolors(1 << 24)) > 1


def numbers(text):
    return [float(number) for number in re.findall(r"[-+]?\d+\.?\d*(?:e[-+]?\d+)?", text)]


def line_with(start, text):
    return next(line[len(start) :] for line in text.splitlines() if line.startswith(start))


def test_every_example_is_in_the_table_and_in_this_file():
    scripts = sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert scripts == sorted(re.findall(r"^\| \[(\w+\.py)\]\(\1\) \|", (EXAMPLES / "README.md").read_text(), re.M))
    assert scripts == sorted(re.findall(r'printed(?:_apart)?\("(\w+\.py)"', Path(__file__).read_text()))


def test_the_textbook_ode_has_its_eigenvalues_and_euler_obeys_its_stable_step(printed):
    text = printed("stiff_ode.py")
    assert numbers(line_with("eigenvalues:", text)) == [-1000, -1]
    assert numbers(line_with("stable_step:", text)) == [0.002]
    (_, _, under, _), (_, _, over, _) = (numbers(line) for line in text.splitlines() if line.startswith("h ="))
    # the fast part starts at 1; each of the 101 or 99 steps takes it times -0.98 or -1.02
    assert under == pytest.approx(0.98**101, rel=0.01)
    assert over == pytest.approx(1.02**99, rel=0.01)


def test_a_resnet_of_half_the_step_is_half_as_far_from_the_odenet(printed):
    pytest.importorskip("torchdiffeq")
    text = printed("resnet_and_odenet.py", "--quick")
    for part in text.split("trained: distance")[1:]:
        far, near = (numbers(line_with(f"  h = 1/{m}:", part))[0] for m in (8, 16))
        assert far / near == pytest.approx(2, rel=0.15)


def test_rober_and_pollu_end_where_the_test_set_says(printed):
    text = printed("chemistry.py", "--quick")
    rober, pollu = (numbers(line.split(":")[1]) for line in text.splitlines() if line.startswith("y1, y2, y3"))
    assert sum(rober) == pytest.approx(1, abs=1e-9)
    # Bari test set: ROBER at t = 1e11, POLLU at t = 60
    np.testing.assert_allclose(rober, [0.2083340149701255e-07, 0.8333360770334713e-13, 0.9999999791665050], rtol=1e-4)
    np.testing.assert_allclose(pollu, [0.5646255480022769e-01, 0.1342484130422339, 0.4139734331099427e-08], rtol=1e-4)
    assert "1 conservation laws" in text
    assert "3 conservation laws" in text
    assert "the sign of 1 eigenvalue is open" in text


def test_a_checkpoint_of_ones_own_gives_a_certified_spectrum_of_each_block_and_branch(printed, tmp_path):
    text = printed("own_checkpoint.py", "--quick")
    assert "6 of 6 spectra certified" in text
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]


def test_layernorm_leaves_a_transformer_one_zero_a_token_and_post_norm_no_branch(printed):
    text = printed("transformer_block.py")
    zeros = {name: numbers(line_with(f"{name}:", text))[1] for name in ("pre-norm branch", "post-norm block")}
    assert zeros == {"pre-norm branch": 6, "post-norm block": 6}
    assert line_with("post-norm branch:", text).startswith(" refused")
    block, branch = (numbers(line_with(f"pre-norm {f}:", text)) for f in ("block", "branch"))
    assert np.subtract(block[3:5], branch[3:5]) == pytest.approx([1, 1], abs=2e-3)  # x + F(x)


@pytest.mark.slow  # three processes that load torch; tests/test_cluster.py has clusters of every kind
def test_a_cluster_of_two_workers_takes_every_unit(printed_apart):
    text = printed_apart("dask_cluster.py", "--quick")
    assert "2 workers" in text
    assert len(re.findall(r"\bdone\s+True$", text, re.M)) == 4
    assert re.search(r"^4 units in", text, re.M)
