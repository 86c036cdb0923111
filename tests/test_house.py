"""The house in order: linter and type checker are clean, and no module imports from a later stage."""

import ast
import os
import re
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The way of the data; a module may import from its own line and those above it.
STAGES = [
    ["version", "errors", "text", "ending"],
    ["memory", "metrics"],
    ["study", "spectra"],
    ["record"],
    ["jacobian"],
    ["networks"],
    ["eigen"],
    ["store", "solvers", "plan", "survey", "trust"],
    ["unit", "cluster"],
    ["picture", "preload"],
    ["run", "asked"],
    ["session", "exports"],
    ["verify"],
    ["api", "report"],
    ["commands"],
    ["cli"],
    ["__main__"],
]
LEVEL = {name: level for level, names in enumerate(STAGES) for name in names}
MODULES = sorted(
    p for p in (ROOT / "stiffcore").rglob("*.py") if p.parent != ROOT / "stiffcore" or p.stem != "__init__"
)


def stage(module: str) -> str:
    return module.split(".")[1]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)  # a module, or something in it
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_module_imports_from_a_later_stage(path):
    own = LEVEL[path.relative_to(ROOT / "stiffcore").with_suffix("").parts[0]]
    inside = [m for m in imports(path) if m.startswith("stiffcore.")]
    assert [m for m in inside if LEVEL[stage(m)] > own] == []


def test_no_modules_import_each_other_in_a_circle():
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in MODULES}
    graph = {name: imports(path) & names.keys() for name, path in names.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(names)


@pytest.mark.parametrize(("library", "home"), [("zarr", "store"), ("dask", "cluster"), ("distributed", "cluster")])
def test_a_library_with_one_place_is_imported_there_only(library, home):
    users = [p for p in MODULES if any(re.match(rf"{library}(\.|$)", m) for m in imports(p))]
    assert {p.relative_to(ROOT / "stiffcore").with_suffix("").parts[0] for p in users} == {home}


# What takes from a tenth of a second to seconds to import.
HEAVY = ("torch", "distributed", "dask", "numba", "matplotlib", "scipy", "pandas", "zarr", "numpy")
READING = ("zarr", "numpy")


@pytest.mark.parametrize(
    ("command", "code", "allowed"),
    [
        ("--help", 0, ()),
        ("--version", 0, ()),
        ("COMPLETE sta", 0, ()),
        ("run a --no-such-option", 2, ()),
        ("run a --network resnet18 --memory much", 2, READING),
        ("run a --network resnet18 --blocks 9,layer5.0", 2, READING),
        ("status RUN", 0, READING),
        ("show RUN", 0, (*READING, "pandas")),
        ("export RUN --to metrics.csv", 0, (*READING, "pandas")),
    ],
)
def test_a_command_imports_what_it_needs(command, code, allowed, stored, tmp_path):
    """By counting, as seconds depend on the machine."""
    program = (
        "import sys\nfrom stiffcore.cli import main\nsys.argv[0] = 'stiffcore'\ntry:\n    main()\nfinally:\n"
        f"    print('IMPORTED', *({HEAVY!r} & sys.modules.keys()), len(sys.modules), file=sys.stderr)"
    ).replace(repr(HEAVY), repr(set(HEAVY)))
    words, environment = [str(stored) if word == "RUN" else word for word in command.split()], dict(os.environ)
    if words[0] == "COMPLETE":  # as a shell asks
        environment |= {
            "_STIFFCORE_COMPLETE": "complete_bash",
            "COMP_WORDS": f"stiffcore {words[1]}",
            "COMP_CWORD": "1",
        }
        words = []
    found = subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == code, found.stderr
    assert environment == os.environ or "status" in found.stdout.split()
    *heavy, modules = found.stderr.rsplit("IMPORTED ", 1)[1].split()
    assert set(heavy) <= set(allowed)
    assert int(modules) < (1200 if allowed else 600)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A run that an earlier version stored, of one small network."""
    folder = tmp_path_factory.mktemp("stored")
    with zipfile.ZipFile(ROOT / "tests/data/runs-of-0.1.0.zip") as runs:
        runs.extractall(folder, [name for name in runs.namelist() if name.startswith("metrics-half/")])
    return folder / "metrics-half"


@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=lambda c: " ".join(c)
)
def test_linter_formatter_and_type_checker_find_nothing(command):
    found = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_page_of_benchmarks_is_made_from_their_figures():
    code = "import page; print(page.page(), end='')"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "bench", capture_output=True, text=True, check=True)
    assert found.stdout == (ROOT / "bench/README.md").read_text(), "run python bench/page.py"


def test_versions_agree():
    import stiffcore

    assert f"version: {stiffcore.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {stiffcore.__version__}" in (ROOT / "CHANGELOG.md").read_text()
