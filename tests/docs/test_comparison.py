"""docs/comparison.md: every cell has its source, every source its use; versions and counts are the code's."""

import re
from pathlib import Path

from fastdpo.data.formats.known import FORMATS
from fastdpo.integrations import unsloth, versions
from fastdpo.objectives.catalogue import NAMES

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "comparison.md").read_text(encoding="utf-8")
TOOLS = ("TRL", "Axolotl", "LLaMA-Factory", "Unsloth", "ms-swift", "transformers")
LETTERS = dict(zip(TOOLS, "TALUSH", strict=True))
CITED = re.compile(r"\[([A-Z]\d+)\]\(#([\w-]+)\)")


def cells():
    """(feature, tool, cell), of all tables."""
    head = []
    for line in TEXT.splitlines():
        if not line.startswith("|"):
            head = []
        elif not head:
            head = line.strip("|").split("|")
        elif set(line) - set("|-"):
            row = line.strip("|").split("|")
            assert len(row) == len(head) == 7, line
            for tool, cell in zip(head[1:], row[1:], strict=True):
                yield row[0].strip(), tool.strip(), cell


def test_every_cell_has_a_source():
    assert len({feature for feature, _, _ in cells()}) > 35
    for feature, tool, cell in cells():
        assert "](" in cell or "not checked" in cell, (feature, tool)


def test_every_source_is_used_and_defined():
    defined = []
    for section in re.split(r"(?m)^### ", TEXT.split("\n## Sources\n")[1])[1:]:
        name = section.splitlines()[0]
        found = re.findall(r"\*\*([A-Z]\d+)\*\* \[[^\]]+\]\(https://[^)]+\)", section)
        assert found == [f"{LETTERS[name]}{i + 1}" for i in range(len(found))]
        defined += [(number, name.lower()) for number in found]
    assert set(CITED.findall(TEXT)) == set(defined)


def test_versions_and_counts_are_those_of_the_code():
    newest = {package: max(known) for package, known, _ in versions._KNOWN.values() if package != "TRL"}
    trl, older = (max(versions._KNOWN[module][1]) for module in ("trl", "trl_older"))
    assert f"TRL {trl}." in TEXT and f"TRL {older}, which it installs" in TEXT
    assert all(f"{package} {version}," in TEXT for package, version in newest.items())
    unsloth_version = re.search(r"Unsloth (\d+\.\d+\.\d+)", TEXT)[1]
    assert f"Written against {unsloth_version} " in unsloth.__doc__
    ours = {feature: re.match(r" \[(\d+)", cell) for feature, tool, cell in cells() if tool == "fastdpo"}
    assert int(ours["Losses by name in the DPO trainer"][1]) == len(NAMES)
    assert int(ours["Row formats"][1]) == len(FORMATS)


def test_the_page_stays_short():
    assert TEXT.count("\n") <= 160
