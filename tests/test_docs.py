"""The documentation builds without a warning and without network, its links lead somewhere, and its commands work."""

import doctest
import os
import pkgutil
import re
import subprocess
import sys
import textwrap
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import stiffcore
from tests.test_house import STAGES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = (
    "index",
    "tutorial",
    "theory",
    "trust",
    "trust-model",
    "glossary",
    "inputs",
    "store",
    "architecture",
    "device",
    "api",
    "extremes",
    "extremes-study",
    "study",
    "study-summary",
)
PROGRAM = "from stiffcore.cli import main; main()"


class Page(HTMLParser):
    """Links, anchors, and what a browser would load by itself."""

    def __init__(self, text):
        super().__init__()
        self.links, self.anchors, self.loaded = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors |= {given.get("id"), given.get("name")}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("index", "search", "next", "prev", "canonical"):
            self.loaded.append(given["href"])
        elif given.get("src"):
            self.loaded.append(given["src"])


def fenced(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("docs")
    # no proxy answers there: whoever asks the network fails
    closed = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", out / "trees"]
    found = subprocess.run(
        [*command, DOCS, out / "html"], env=os.environ | closed, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return {path: Page(path.read_text()) for path in (out / "html").glob("*.html")}


@pytest.fixture(scope="module")
def by_name(built):
    return {path.stem: page for path, page in built.items()}


def test_every_page_is_there(by_name):
    assert set(PAGES) <= set(by_name)
    assert set(PAGES) == {path.stem for path in DOCS.glob("*.md")}


def test_every_link_between_pages_leads_to_a_file_and_a_place_in_it(built):
    broken = []
    for path, page in built.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchors = built[target].anchors if target in built and parts.fragment else {unquote(parts.fragment)}
            if not target.is_file() or unquote(parts.fragment) not in anchors:
                broken.append((path.name, link))
    assert broken == []


def test_a_page_loads_nothing_from_the_network(built):
    assert [src for page in built.values() for src in page.loaded if urlsplit(src).netloc] == []


@pytest.mark.parametrize("path", [*DOCS.glob("*.md"), *ROOT.glob("*.md")], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_to_a_file_of_the_repository_resolves(path):
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = [urlsplit(link) for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    missing = [link.path for link in links if not link.scheme and link.path and not (path.parent / link.path).exists()]
    assert missing == []


def test_every_public_name_is_in_the_reference(by_name):
    missing = [name for name in stiffcore.__all__ if f"stiffcore.{name}" not in by_name["api"].anchors]
    assert missing == []


def test_every_command_is_in_the_reference(by_name):
    import typer

    from stiffcore.cli import app

    commands = typer.main.get_command(app).commands
    text = " ".join(sorted(filter(None, by_name["api"].anchors)))
    assert [name for name in commands if f"stiffcore-{name}" not in text] == []


@pytest.mark.parametrize("path", [ROOT / "README.md", *DOCS.glob("*.md")], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_line_names_commands_and_options_that_exist(path):
    import typer

    from stiffcore.cli import app

    commands = typer.main.get_command(app).commands
    text = path.read_text() + "".join(textwrap.indent(block, "    ") for block in fenced(path, "sh"))
    wrong = []
    for name, rest in re.findall(r"^    stiffcore ([a-z]+)\b(.*)$", text.replace("\\\n", " "), re.MULTILINE):
        known = {option for p in commands[name].params for option in p.opts} if name in commands else set()
        given = re.findall(r"(?<!\S)--[a-z-]+", rest.split("  #")[0])
        wrong += [name] if name not in commands else [f"{name} {option}" for option in given if option not in known]
    assert wrong == []


def row_of(text):
    """The cells of the one block's row, without those that differ from machine to machine."""
    line = next(line for line in text.splitlines() if line.startswith("│ 8 layer4.1") and "yes" in line)
    cells = [cell.strip() for cell in line.strip("│ \n").split("│")]
    return cells[:5] + cells[6:11] + cells[12:]


@pytest.mark.slow
def test_the_tutorial_works_as_written(tmp_path, monkeypatch):
    page, blocks = DOCS / "tutorial.md", []
    for block in fenced(page, "sh"):
        blocks.append(f"echo '# {len(blocks)}'\n{block}")
    assert len(blocks) == 7
    prelude = f'set -e\nstiffcore() {{ "{sys.executable}" -c "{PROGRAM}" "$@"; }}\n'
    found = subprocess.run(
        ["bash", "-c", prelude + "".join(blocks)],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "COLUMNS"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    printed = dict(re.findall(r"^# (\d+)\n(.*?)(?=^# \d+\n|\Z)", found.stdout, re.MULTILINE | re.DOTALL))
    assert row_of(printed["3"]) == row_of(page.read_text())
    assert printed["4"] in page.read_text()
    assert {"metrics.csv", "first.h5", "report.html"} <= {path.name for path in tmp_path.iterdir()}
    listed = next(block for block in fenced(DOCS / "store.md", "text") if block.startswith("store/first/"))
    files = sorted(str(p.relative_to(tmp_path)) for p in (tmp_path / "store/first").rglob("*") if p.is_file())
    taken = re.compile("numerical_range|pseudospectrum")
    assert [name for name in files if not taken.search(name)] == listed.split()
    monkeypatch.chdir(tmp_path)
    code = "\n".join(fenced(page, "pycon"))
    test = doctest.DocTestParser().get_doctest(code, {}, page.name, str(page), 0)
    report = []
    doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert report == []


def test_every_name_on_the_map_is_in_the_code():
    page = (DOCS / "architecture.md").read_text()
    names = [name.removeprefix("stiffcore.") for name in re.findall(r"`([a-z_]+(?:\.[A-Za-z_]+)+)`", page)]
    names = [name for name in names if name != "tests/test_house.py"]
    assert len(names) > 60
    for name in names:
        pkgutil.resolve_name(f"stiffcore.{name}")


def test_the_map_has_every_module_where_it_may_import():
    table = re.findall(r"^\| [a-z ]+ \| (.*?) \|", (DOCS / "architecture.md").read_text(), re.MULTILINE)[1:]
    lines = [re.findall(r"`(\w+)/?`", line) for line in table]
    assert [name for line in lines for name in line] == [name for stage in STAGES for name in stage]


def test_every_row_of_what_may_be_given_names_tests_that_exist():
    rows = [line for line in (DOCS / "inputs.md").read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| given |")]
    assert len(rows) > 30
    for row in rows:
        tests = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)
        assert tests, row
        for file, name in tests:
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(), name
