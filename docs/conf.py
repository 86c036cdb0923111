"""Sphinx settings: Markdown pages, an API page from docstrings, the commands from their own help. No network."""

import re

import typer
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

from stiffcore.version import __version__

project = "stiffcore"
author = "The stiffcore developers"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"stiffcore {release}"
html_copy_source = False
myst_heading_anchors = 3
nitpicky = False
# as docstrings have it: `name` is code
default_role = "code"
smartquotes = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True


def plain(app, what, name, obj, options, lines):
    """Docstrings are plain text with `code`: |x| is a modulus, not a substitution, and * is a product."""
    for i, line in enumerate(lines):
        parts = re.split(r"(`[^`]*`)", line)
        lines[i] = "".join(part if part.startswith("`") else re.sub(r"([|*])", r"\\\1", part) for part in parts)


def whole(app, what, name, obj, options, lines):
    """Napoleon takes what stands before a colon in a property's first line for its type: put it back."""
    types = [line for line in lines if line.startswith(":type: ")]
    if what == "property" and types:
        lines.remove(types[0])
        lines[0] = f"{types[0].removeprefix(':type: ')}: {lines[0]}"


def unsigned(app, what, name, obj, options, signature, returned):
    """Classes are what comes back: nobody calls them, and their arguments are the attributes below."""
    return ("", None) if what == "class" else None


def outward(app, docname, source):
    """Links to Markdown files outside of this folder lead to copies of them, as links to other files do."""
    source[0] = re.sub(r"\]\((\.\./[^)\s]+\.md)\)", r"](path:\1)", source[0])


class Commands(SphinxDirective):
    """Every command of the command line, with what its help says."""

    def run(self):
        from stiffcore.cli import app

        lines = []
        for name, command in typer.main.get_command(app).commands.items():
            arguments = [p.metavar or p.name.upper() for p in command.params if is_argument(p)]
            usage = " ".join(["stiffcore", name, *arguments])
            lines += [f"## `{usage}`", "", escaped(command.help), ""]
            for parameter in command.params:
                if not is_argument(parameter):
                    lines += [f"- `{' / '.join(parameter.opts)}`: {escaped(parameter.help)}"]
            lines += [""]
        node = nodes.section()
        node.document = self.state.document
        self.state.nested_parse(StringList(lines, "stiffcore.cli"), self.content_offset, node, match_titles=1)
        return node.children


def is_argument(parameter):
    return parameter.param_type_name == "argument"


def escaped(text):
    """Help as Markdown that shows what was written."""
    parts = re.split(r"(`[^`]*`)", " ".join((text or "").split()))
    return "".join(part if part.startswith("`") else re.sub(r"([\\*_<>\[\]|~])", r"\\\1", part) for part in parts)


def setup(app):
    app.connect("source-read", outward)
    app.connect("autodoc-process-docstring", plain, priority=100)
    app.connect("autodoc-process-docstring", whole, priority=900)
    app.connect("autodoc-process-signature", unsigned)
    app.add_directive("stiffcore-commands", Commands)
    return {"parallel_read_safe": True}
