"""The command line says what it does, prints what programs can read, and refuses in one message."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from stiffcore.cli import app
from tests.runs import OPTIONS, execute


def command(*args, cwd):
    program = [sys.executable, "-c", "from stiffcore.cli import main; main()", *map(str, args)]
    return subprocess.run(program, cwd=cwd, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.parametrize("name", ["run", "plan", "status", "show", "export", "demo"])
def test_every_command_has_help(name):
    found = CliRunner().invoke(app, [name, "--help"])
    assert found.exit_code == 0
    assert len(found.output.splitlines()) > 8


def test_help_says_what_an_option_is_when_it_is_not_given(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    said = " ".join(CliRunner().invoke(app, ["run", "--help"]).output.replace("│", " ").split())
    for default in ("samples", "as the network wants", "block", "float64", "80 % of what is free", "one a core"):
        assert f"[default: ({default})]" in said


def test_plan_run_status_show_and_export_agree(small):
    options = ["--network", "smallnet:make", "--images", "six.npz", "--index", "3", "--normalize", "none"]
    planned = command("plan", "run", *options, "--json", cwd=small)
    assert planned.returncode == 0, planned.stderr
    plan = json.loads(planned.stdout)
    assert not (small / "run").exists()
    assert all(isinstance(v, int) for k, v in plan.items() if k.endswith("_bytes"))
    assert [u["solver"] for u in plan["units"]] == ["host-dense"] * 4
    ran = command("run", "run", *options, "--memory", "4GiB", cwd=small)
    assert ran.returncode == 0, ran.stderr
    assert "normalisation: none" in ran.stdout
    assert ran.stderr.startswith("run: a new run; ")  # said before anything that takes seconds
    assert ran.stderr.count("certified") == 4
    assert "Traceback" not in ran.stderr
    status = json.loads(command("status", "run", "--json", cwd=small).stdout)
    assert [u["state"] for u in status["units"]] == ["done"] * 4
    assert status["holder"] is None
    rows = json.loads(command("show", "run", "--json", cwd=small).stdout)
    assert {r["block"]: r["k"] for r in rows} == {u["block"]: u["k"] for u in plan["units"]}
    assert all(r["label"] == 3 and r["certified"] for r in rows)
    assert all(r["S"] == "infinite" for r in rows if r["zeros"] and r["negative"] == 0)
    assert command("export", "run", "--to", "metrics.csv", cwd=small).returncode == 0
    with (small / "metrics.csv").open() as file:
        exported = list(csv.DictReader(file))
    assert [float(e["S_active"]) for e in exported] == pytest.approx([r["S_active"] for r in rows])
    again = command("export", "run", "--to", "metrics.csv", cwd=small)
    assert again.returncode == 2
    assert "exists" in again.stderr


def test_matrices_alone_are_named_as_stored_wherever_a_spectrum_would_be(small):
    options = ["--network", "smallnet:make", "--images", "six.npz", "--blocks", "4", "--solver", "matrix-only"]
    ran = command("run", "run", *options, "--memory", "4GiB", cwd=small)
    assert ran.returncode == 0, ran.stderr
    assert "matrix of order" in ran.stderr
    assert "0 spectra in run" in ran.stdout
    status = json.loads(command("status", "run", "--json", cwd=small).stdout)
    assert [(u["state"], u["stage"]) for u in status["units"]] == [("stored", "done")]
    for name in ("status", "show"):
        found = CliRunner().invoke(app, [name, str(small / "run")])
        assert found.exit_code == 0
        assert "stored" in found.output


@pytest.mark.parametrize("columns", ["0", "20", "nonsense"])
def test_a_width_that_holds_no_table_is_not_kept_to(columns):
    code = (
        "from stiffcore.commands.terminal import out; from rich.table import Table;"
        "t = Table('block', 'k', title='of'); t.caption = 'end'; t.add_row('layer1.0', '1,234'); out.print_table(t)"
    )
    environment = os.environ | {"COLUMNS": columns}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    lines = [line.strip() for line in found.stdout.splitlines()]
    if columns == "nonsense":
        assert "│ layer1.0 │ 1,234 │" in lines
    else:  # a line a cell: no column is narrower than its words
        assert lines == ["of", "block layer1.0", "k 1,234", "", "end"]


def test_tables_show_blocks_without_spectrum_as_dashes(small):
    execute(small / "run", OPTIONS | {"blocks": "down,layer2.2", "functions": "block"})
    found = CliRunner().invoke(app, ["show", str(small / "run")])
    line = next(line for line in found.output.splitlines() if "down" in line)
    assert "no spectrum" in line
    assert not any(part.strip().replace(".", "").isdigit() for part in line.split("│")[4:-2])


def test_many_images_get_a_table_of_means(small):
    execute(small / "run", OPTIONS | {"count": 3, "blocks": "4"})
    found = CliRunner().invoke(app, ["show", str(small / "run")])
    assert "Mean over images" in found.output
    assert json.loads(CliRunner().invoke(app, ["show", str(small / "run"), "--json"]).output)[0]["n"] == 36


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["show", "nowhere"], ["there is no run", "stiffcore run"]),
        (["status", "."], ["no run"]),
        (["status", "nosuch://bucket/run"], ["nosuch://"]),
        (["run", "/proc/new", "--network", "smallnet:make", "--images", "six.npz"], ["/proc/new", "cannot be made"]),
        (["run", "new", "--network", "resnet18", "--blocks", "²"], ["'²'"]),
        (["run", "new", "--weights", "/nope.pt", "--network", "resnet18", "--index", "99"], ["/nope.pt", "99"]),
        (
            ["run", "new", "--weights", "/nope.pt", "--network", "vgg", "--images", "/no.npz"],
            ["/nope.pt", "vgg", "/no.npz"],
        ),
        (["run", "new", "--network", "resnet18", "--blocks", "7.7", "--memory", "4GiB"], ["'7.7'", "1 layer1.0"]),
        (["run", "new", "--dtype", "half", "--device", "tpu"], ["--dtype", "--device"]),
        (["run", "new", "--network", "resnet34"], ["resnet34", "--weights"]),
        (["export", "nowhere", "--to", "x.doc"], [".csv"]),
        (["run", "new", "--colour", "red"], ["--colour"]),
    ],
)
def test_wrong_input_ends_with_one_message_and_code_2(small, args, parts):
    found = command(*args, cwd=small)
    assert found.returncode == 2
    assert all(part in found.stderr for part in parts), found.stderr
    assert "Traceback" not in found.stderr
    assert not (small / "new").exists()


def test_images_of_the_wrong_shape_are_refused_by_the_network(small):
    np.savez(small / "big.npz", x=np.zeros((1, 9, 9, 3), np.uint8), y=np.zeros(1, int))
    found = command("run", "new", "--network", "smallnet:make", "--images", "big.npz", cwd=small)
    assert found.returncode == 2
    assert "(1, 3, 9, 9)" in found.stderr


def test_a_run_without_any_spectrum_yet_shows_dashes(small):
    execute(small / "run", OPTIONS | {"blocks": "down"})
    found = CliRunner().invoke(app, ["show", str(small / "run")])
    assert found.exit_code == 0, found.output
    assert "no spectrum" in found.output


def test_a_damaged_spectrum_is_made_again_under_the_bars_too(small):
    execute(small / "run", OPTIONS | {"blocks": "4", "functions": "block"})
    chunk = next(p for p in (small / "run").rglob("eigenvalues/c/*") if p.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"?")
    found = command("run", "run", "--trust", cwd=small)
    assert found.returncode == 0, found.stderr
    assert "computed again" in found.stderr
