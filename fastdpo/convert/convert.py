"""Other trainers' configs as ours: each key is mapped, left out with a reason, or refused; nothing is dropped
in silence. A tool is recognised by keys that only it has (`only_here` in its table)."""

import sys
from pathlib import Path

import yaml

from fastdpo.config.keys import FIELDS, Config, coerce, from_values
from fastdpo.config.reading import read_yaml
from fastdpo.convert.axolotl import AXOLOTL
from fastdpo.convert.llama_factory import LLAMA_FACTORY
from fastdpo.convert.nested import flattened
from fastdpo.convert.notebooks import read_code
from fastdpo.convert.rules import Tool
from fastdpo.convert.torchtune import TORCHTUNE
from fastdpo.convert.trl import TRL
from fastdpo.convert.unsloth import UNSLOTH
from fastdpo.errors import ConfigError

TOOLS = (TRL, LLAMA_FACTORY, AXOLOTL, TORCHTUNE, UNSLOTH)


def read(path: Path) -> dict:
    """The keys of a config file: of YAML, or a script or notebook of Python. Raises ConfigError."""
    return read_code(path) if path.suffix in (".py", ".ipynb") else read_yaml(path)


def recognise(values: dict) -> Tool | None:
    """The tool that has these keys: of those with a mark among them the one that knows most; None where no
    tool has any of them (but we may). Raises ConfigError where several know as many."""
    values = flattened(values)
    marks = {tool: [key for key in values if key in tool.marks] for tool in TOOLS}
    unknown = {tool: len(tool.unknown(values)) for tool in TOOLS if marks[tool]}
    found = [tool for tool, count in unknown.items() if count == min(unknown.values())]
    if len(found) > 1:
        which = "; ".join(f"{tool.name} has {', '.join(marks[tool])}" for tool in found)
        raise ConfigError(f"these keys are of several tools, so none is sure to be meant: {which}")
    if not found and any(key in TRL.rules and key not in FIELDS for key in values):
        return TRL  # transformers' own keys, which LLaMA-Factory has too but then with some of its own
    return found[0] if found else None


def translate(values: dict, *, whole: bool = True) -> tuple[dict, list[str]]:
    """(our keys and values, what became of each of theirs) of a config of TRL, Axolotl or LLaMA-Factory.

    `whole`: it is a whole config, so what it leaves out has the tool's default, and where ours is another one
    the tool's is written down; unless it has our key for the model, and so is a config of ours with some of
    their words. Other keys of ours stay. Raises ConfigError for a key that changes training and has no
    counterpart.
    """
    tool = recognise(values)
    if tool is None:
        return dict(values), []
    draft = tool.translate(values, whole and (tool.model_key == "model" or "model" not in values))
    if draft.problems:
        raise ConfigError("\n".join(draft.problems))
    return draft.ours, [f"read as a config of {tool.name}", *draft.notes]


def config_of(whole: dict, over: dict) -> Config:
    """The config of a whole one's keys (a file's), and of keys that win over them (flags). Keys of other
    trainers are translated in both, and said on stderr. Raises ConfigError."""
    return from_values(_in_our_words(whole, whole=True) | _in_our_words(over, whole=False))


def _in_our_words(values: dict, whole: bool) -> dict:
    if all(name in FIELDS for name in values):
        return values
    values, notes = translate(values, whole=whole)
    for note in notes:
        print(note, file=sys.stderr)
    return values


def converted(values: dict) -> str:
    """Another trainer's config as YAML of ours, what became of its keys in comments above it. Raises
    ConfigError where that is not a config that fastdpo can run."""
    if recognise(values) is None:
        marks = "; ".join(f"{tool.name} by {', '.join(sorted(tool.marks)[:6])}, ..." for tool in TOOLS)
        raise ConfigError(f"none of the keys is of a tool that is known: {marks}")
    ours, notes = translate(values)
    Config(**{name: coerce(name, value) for name, value in ours.items()})
    comments = "".join(f"# {note}\n" for note in notes)
    return comments + yaml.safe_dump(ours, sort_keys=False, allow_unicode=True)
