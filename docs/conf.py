"""The site: `make docs`, by Sphinx with MyST and Furo."""

import os
import re
import tomllib
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PAGES = {  # of other folders, and what they are here: a page there is one line, `{root} NAME`
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "NOTES.md": "notes.md",
    "benchmarks/GPU_TODO.md": "gpu_todo.md",
}
_project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

project, release = _project["name"], _project["version"]
html_title = f"{project} {release}"
author = copyright = f"The {project} developers"

extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_heading_anchors = 3  # links to headings, as on GitHub
exclude_patterns = ["_build"]
autodoc_typehints = "none"  # of results; arguments' shapes are in the text
html_theme = "furo"
html_show_sourcelink = False
html_static_path, html_css_files = ["static"], ["site.css"]
nitpicky = True  # a link into nothing is a warning, and `make docs` takes none


def from_here(text: str, folder: Path) -> str:
    """The text of a page in `folder`, its links as a page in docs/ writes them."""

    def link(found):
        path = os.path.relpath(folder / found[1], ROOT)
        return f"]({PAGES.get(path) or os.path.relpath(ROOT / path, DOCS)}"

    return re.sub(r"\]\((?![a-z]+:|#)([^)#]+)", link, text)


def put_pages(app, page, source):
    """README and others are pages here, too, and links to them lead there."""
    root = re.match(r"\{root\} (\S+)", source[0])
    path = ROOT / root[1] if root else DOCS / f"{page}.md"
    rest = source[0][root.end() :] if root else ""
    source[0] = from_here(path.read_text(encoding="utf-8"), path.parent) + rest


def as_in_a_terminal(app, what, name, obj, options, lines):
    """Docstrings are plain text, written for `help()`: paragraphs, and columns kept apart by spaces."""
    out = []
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines).strip()):
        if re.search(r"\S  +\S", paragraph):
            out += ["::", "", *(f"    {line}" for line in paragraph.splitlines())]
        elif paragraph:
            out += re.sub(r"[\\*|_`]", r"\\\g<0>", paragraph).splitlines()
        out.append("")
    lines[:] = out


def setup(app):
    app.connect("source-read", put_pages)
    app.connect("autodoc-process-docstring", as_in_a_terminal)
