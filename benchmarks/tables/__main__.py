"""Writes what is generated in README.md and docs/, between `<!-- table: NAME -->` and `<!-- end -->`: numbers
from the newest results, and the tables of keys, objectives and formats.

    python -m benchmarks.tables [--check]      --check changes nothing, and exits 1 where a page differs

A block without a result says what waits for one, or what a model predicts; a result measured on a red gate
gives no numbers.
"""

import argparse
import re
import sys
from pathlib import Path

from benchmarks.process import ROOT
from benchmarks.results import RESULTS, newest_shown
from benchmarks.tables import head_blocks
from benchmarks.tables.blocks import BLOCKS
from benchmarks.tables.chips import tiles_table
from benchmarks.tables.configs import collected_table, refused_table
from benchmarks.tables.markdown import link
from benchmarks.tables.rank_blocks import on_paper
from benchmarks.tables.standing import standing
from fastdpo.config.reading import keys_table
from fastdpo.data.formats.known import FORMATS
from fastdpo.objectives.catalogue import objectives_table

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"(<!-- table: (?P<name>[a-z0-9-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
WAITING = "Not measured yet: {} (`{}`)."
PREDICTED = {"head-shapes": head_blocks.predicted}


def formats_table() -> str:
    """docs/data.md's table of formats, in Markdown."""
    lines = ["| format | of | its rows |", "|---|---|---|"]
    lines += [f"| `{name}` | {f.tool} | `{f.looks}` |" for name, f in FORMATS.items()]
    return "\n".join(lines) + "\n"


TABLES = {"keys": keys_table, "objectives": objectives_table, "formats": formats_table}
TABLES |= {"tiles": tiles_table, "configs": collected_table, "refused": refused_table, "ranks": on_paper}


def block(name: str, folder: Path = RESULTS, up: str = "") -> str:
    """The text of a block; of results, from the newest. up: from its page to the root, as in "../"."""
    if name in TABLES:
        return TABLES[name]().strip()
    if name == "standing":
        return standing(folder, up)
    what, machine, text, missing, command = BLOCKS[name]
    record, path = newest_shown(what, machine, folder)
    if path is None and name in PREDICTED:
        return PREDICTED[name](up)
    if path is None:
        return WAITING.format(missing, command)
    if record is None:
        return f"No numbers, for the gate was red: {missing} (`{command}`)."
    return text(record, link(path, up))


def rendered(page: Path) -> str:
    """The page with every block written anew. KeyError for a name that is no block's."""
    up = "../" * (len(page.relative_to(ROOT).parts) - 1)
    written = lambda found: f"{found[1]}{block(found['name'], up=up)}\n{found[3]}"
    return BLOCK.sub(written, page.read_text(encoding="utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only tell whether the pages are up to date")
    args = parser.parse_args()
    changed = {page: new for page in PAGES if (new := rendered(page)) != page.read_text(encoding="utf-8")}
    for page, new in changed.items():
        name = page.relative_to(ROOT)
        if not args.check:
            page.write_text(new, encoding="utf-8")
        print(f"{name} differs: python -m benchmarks.tables" if args.check else f"{name}: written")
    print(f"{len(PAGES) - len(changed)} of {len(PAGES)} pages were up to date")
    return int(args.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
