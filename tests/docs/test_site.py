"""The site builds without a warning, and its links lead somewhere."""

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from benchmarks.process import python_path
from tests.docs.snippets import ROOT


class Page(HTMLParser):
    """What an HTML page links to, and what in it can be linked to."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.anchors = set(), set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("href", "src"):
                self.links.add(value)
            elif name == "id":
                self.anchors.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-qWnE", "--keep-going", "docs", folder]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | python_path(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {path: Page(path) for path in folder.rglob("*.html")}


def test_every_link_leads_somewhere(site):
    broken = []
    for path, page in site.items():
        for link in map(urlsplit, page.links):
            if link.scheme or link.netloc:
                continue
            target = (path.parent / unquote(link.path)).resolve() if link.path else path
            anchors = site[target].anchors if target in site else ()
            if not target.is_file() or (link.fragment and unquote(link.fragment) not in anchors):
                broken.append(f"{path.name}: {link.geturl()}")
    assert not broken


def test_every_page_is_on_the_site(site):
    assert {f"{page.stem}.html" for page in ROOT.glob("docs/*.md")} <= {path.name for path in site}
