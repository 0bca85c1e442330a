"""What README, CONTRIBUTING and docs/ show: their code blocks and inline code, as Markdown is read."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


class Snippet(NamedTuple):
    page: str
    heading: str
    language: str  # "" for inline code
    text: str


def snippets(page: Path) -> Iterator[Snippet]:
    heading = ""
    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
    for before, token in zip([None, *tokens], tokens):
        if token.type == "inline":
            if before.type == "heading_open":
                heading = token.content
            for code in (child for child in token.children if child.type == "code_inline"):
                yield Snippet(page.name, heading, "", code.content)
        elif token.type == "fence":
            yield Snippet(page.name, heading, token.info, token.content)


ALL = [snippet for page in PAGES for snippet in snippets(page)]


def block(page: str, heading: str, language: str, number: int = 0) -> str:
    """The text of a code block, for the tests of what it does."""
    return [s.text for s in ALL if s[:3] == (page, heading, language)][number]
