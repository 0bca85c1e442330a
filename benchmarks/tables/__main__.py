"""Writes the README's numbers from the newest results, between `<!-- table: NAME -->` and `<!-- end -->`.

    python -m benchmarks.tables [--check]      --check changes nothing, and exits 1 where the README differs

A block without a result says what waits for one; a result measured on a red gate gives no numbers.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from benchmarks.process import ROOT
from benchmarks.results import RESULTS, gate_passed, machine_of, newest_path
from benchmarks.tables.blocks import BLOCKS

README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- table: (?P<name>[a-z0-9-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
WAITING = "Not measured yet: {} (`{}`)."


def block(name: str, folder: Path = RESULTS) -> str:
    """The text of a block, from the newest result there is."""
    what, machine, text, missing, command = BLOCKS[name]
    path = newest_path(what, machine, folder)
    if path is None:
        return WAITING.format(missing, command)
    record = json.loads(path.read_text())
    passed = gate_passed(record.get("git"), machine_of(path), folder)  # run again since, it may say otherwise
    if (record.get("gate_passed") if passed is None else passed) is False:
        return f"No numbers, for the gate was red: {missing} (`{command}`)."
    return text(record, f"[results](benchmarks/results/{path.name})")


def rendered(readme: str, folder: Path = RESULTS) -> str:
    """The README with every block written anew. KeyError for a name that BLOCKS does not have."""
    return BLOCK.sub(lambda found: found[1] + block(found["name"], folder) + "\n" + found[3], readme)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only tell whether the README is up to date")
    args = parser.parse_args()
    old = README.read_text(encoding="utf-8")
    new = rendered(old)
    if args.check:
        print("README.md: up to date" if old == new else "README.md differs: python -m benchmarks.tables")
        return int(old != new)
    README.write_text(new, encoding="utf-8")
    print(f"README.md: {'unchanged' if old == new else 'written'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
