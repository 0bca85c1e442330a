"""The tables of docs/configs.md: what real configs of other trainers became, and which keys are refused."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from benchmarks.process import ROOT
from benchmarks.tables.markdown import markdown
from fastdpo.convert.convert import TOOLS, drafted
from fastdpo.convert.draft import Draft, spelled
from fastdpo.convert.rules import Only, Tool

FOLDER = ROOT / "tests/convert/configs"


class Collected(NamedTuple):
    """A config that somebody has, by its keys and values."""

    name: str
    source: str  # where it is
    rows: str  # the format of its rows, by its name in docs/data.md
    keys: dict[str, Any]
    ignore: Sequence[str] = ()  # keys without which it runs, but not with them

    def draft(self, ignore=None) -> Draft:
        return drafted(self.keys, self.ignore if ignore is None else ignore)


def collection(folder: Path = FOLDER) -> list[Collected]:
    """All of them, in the order of the tools' files."""
    files = sorted(folder.glob("*.yaml"))
    return [Collected(**one) for file in files for one in yaml.safe_load(file.read_text(encoding="utf-8"))]


def collected_table(folder: Path = FOLDER) -> str:
    """A row a config."""
    configs = collection(folder)
    rows = [_row(config) for config in sorted(configs, key=lambda one: one.draft().tool.name)]
    whole = sum(not config.ignore for config in configs)
    text = f"{whole} of {len(configs)} run as they are."
    header = ("config", "of", "what it became", "keys left out", "notes to check", "refused")
    return f"{text}\n\n{markdown(header, rows, numbers=False)}"


def _row(config: Collected) -> list[str]:
    draft = config.draft()
    left = sum(": left out" in note and not note.startswith("check: ") for note in draft.notes)
    check = sum(note.startswith("check: ") for note in draft.notes)
    refused = ", ".join(f"`{key}`" for key in config.ignore)
    return [
        f"[{config.name}](<{config.source}>)",  # an address may have brackets
        draft.tool.name,
        _became(draft.ours),
        str(left),
        str(check or ""),
        refused,
    ]


def _became(ours: dict) -> str:
    """A run in a few words: its loss, what is trained, its data."""
    objective = ours.get("objective", "sigmoid")
    loss = " + ".join(objective) if isinstance(objective, dict) else objective
    trained = f"LoRA of rank {ours['lora_rank']}" if ours.get("lora_rank") else "all weights"
    trained = "an adapter" if ours.get("adapter") else trained
    bits = " in 4 bits" if ours.get("load_in_4bit") else ""
    data = ours.get("data", "")
    several = f"{len(data)} data sets" if isinstance(data, list) else f"`{data}`"
    return f"{loss}, {trained}{bits}, {several}".replace("|", "\\|")


def refused_table() -> str:
    """Every key that is refused and why, tool by tool; Unsloth's are TRL's with more."""
    reasons = {tool.name: _reasons(tool) for tool in TOOLS}
    of_unsloth = reasons.pop("Unsloth").items()
    reasons["Unsloth, beside TRL's"] = dict(item for item in of_unsloth if item not in reasons["TRL"].items())
    return "\n\n".join(_table(f"Of {name}", found) for name, found in reasons.items())


def _reasons(tool: Tool) -> dict[str, tuple[str, str]]:
    """{key: (the values that are accepted, why no others)}"""
    found = {}
    for name, reason in tool.reasons.items():
        key = tool.names.get(name, name)
        if not all(tool.unknown({known: 1}) for known in (key, key.split(".")[0])):
            found[key] = ("some", reason)
    for key, rule in tool.rules.items():
        if isinstance(rule, Only):
            values = ", ".join(f"`{spelled(value)}`" if value != "" else "`''`" for value in rule.values)
            found[key] = (values or "none", rule.fix)
    return found


def _table(title: str, reasons: dict[str, tuple[str, str]]) -> str:
    """Keys that have all of it in common share a row."""
    alike = defaultdict(list)
    for key, reason in reasons.items():
        alike[reason].append(f"`{key}`")
    rows = [[", ".join(keys), taken, why.replace("|", "\\|")] for (taken, why), keys in alike.items()]
    header = ("key", "accepted", "why no other value, and the way out")
    return f"**{title}**\n\n{markdown(header, rows, numbers=False)}"
