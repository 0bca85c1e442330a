"""Other trainers' configs as ours: each key is mapped, left out with a reason, or refused; nothing is dropped
in silence. A tool is recognised by keys that only it has (`only_here` in its table)."""

import sys
from collections.abc import Sequence
from pathlib import Path

from fastdpo.config.keys import FIELDS, Config, from_values
from fastdpo.config.reading import read_yaml
from fastdpo.convert.draft import Draft, Fate, as_lines
from fastdpo.convert.files.notebooks import read_code
from fastdpo.convert.files.scripts import read_script
from fastdpo.convert.nested import flattened
from fastdpo.convert.overrides import as_fates, concerns, laid_over, problems_left, to_ignore, way_on, without
from fastdpo.convert.rules import Tool
from fastdpo.convert.tools.axolotl import AXOLOTL
from fastdpo.convert.tools.llama_factory import LLAMA_FACTORY
from fastdpo.convert.tools.openrlhf import OPENRLHF
from fastdpo.convert.tools.swift import SWIFT
from fastdpo.convert.tools.torchtune import TORCHTUNE
from fastdpo.convert.tools.trl import TRL
from fastdpo.convert.tools.unsloth import UNSLOTH
from fastdpo.errors import ConfigError

TOOLS = (TRL, LLAMA_FACTORY, AXOLOTL, SWIFT, OPENRLHF, TORCHTUNE, UNSLOTH)
_LAUNCHERS = {"compute_environment": "accelerate's launcher", "zero_optimization": "DeepSpeed"}


def read(path: Path) -> dict:
    """The keys of a config file: of YAML, of the command in a shell script, of the calls in a script or
    notebook of Python. Raises ConfigError."""
    if path.suffix in (".sh", ".bash"):
        return read_script(path)
    return read_code(path) if path.suffix in (".py", ".ipynb") else read_yaml(path)


def recognise(values: dict) -> Tool | None:
    """The tool that has these keys: of those with a mark among them the one that knows most; None where no
    tool has any of them (but we may). Raises ConfigError where several know as many."""
    if launcher := next((what for key, what in _LAUNCHERS.items() if key in values), None):
        way = "give the trainer's own, with --num_processes N if it ran on N devices"
        raise ConfigError(f"this is a config of {launcher}, not of a trainer; {way}")
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


def config_of(whole: dict, over: dict) -> Config:
    """The config of a whole one's keys (a file's), and of keys that win over them (flags); flags alone are a
    whole one. Keys of other trainers are translated, and that is said on stderr. Raises ConfigError with all
    that is wrong."""
    names, before = to_ignore(whole.get("ignore"), over.get("ignore"))
    whole, over = ({key: v for key, v in some.items() if key != "ignore"} for some in (whole, over))
    whole, over = (whole, over) if whole else (over, {})
    whole, ignored = without(whole, names)
    base = flags = None
    tool = _tool_of(whole)
    theirs, over, others = laid_over(tool, whole, over) if tool else (whole, {}, over)
    if tool:
        base = tool.translate(theirs, _is_whole(tool, whole))
    if other := _tool_of(others):
        flags = other.translate(others, whole=False)
    over = (flags.ours if flags else others) | over
    ours = (base.ours if base else whole) | over
    ignored = before | ignored
    ours |= {"ignore": ignored} if ignored else {}
    refused = problems_left(base, over) if base else []
    problems = [fate.text for fate in refused] + (flags.problems if flags else [])
    if not problems:
        _say(base, over)
        _say(flags, {})
    config = _checked(tool, refused, problems, whole, ours)
    for fate in as_fates(ignored):
        print(fate.text, file=sys.stderr)
    return config


def _checked(tool: Tool | None, refused: list[Fate], problems: list[str], theirs: dict, ours: dict) -> Config:
    """Our keys as a Config. Raises ConfigError with the problems of theirs and of ours, all at once."""
    last = way_on(tool, refused, theirs, ours) if tool else ""
    wrong = {concerns(tool, key) for fate in refused for key in fate.keys} if tool else set()
    try:
        config = from_values(ours, wrong)
    except ConfigError as error:
        problems += error.args
    if problems:
        raise ConfigError(*problems, way_on=last)
    return config


def _tool_of(values: dict) -> Tool | None:
    return None if all(name in FIELDS for name in values) else recognise(values)


def _is_whole(tool: Tool, values: dict) -> bool:
    """Whether it is the tool's config, and none of ours with some of the tool's words."""
    return tool.model_key == "model" or "model" not in values


def _say(draft: Draft | None, over: dict) -> None:
    """What became of the keys, but for those that others win over."""
    if draft:
        told = [fate for fate in draft.fates if not fate.is_problem and fate.ours not in over]
        print(f"read as a config of {draft.tool.name}", *as_lines(told), sep="\n", file=sys.stderr)


def drafted(values: dict, ignore: Sequence[str] = ()) -> Draft:
    """Another trainer's config, read without the keys to ignore, and with its problems. Raises ConfigError
    where it is none's, and where it has no such key."""
    names, before = to_ignore(values.get("ignore"), list(ignore))
    kept, ignored = without({key: value for key, value in values.items() if key != "ignore"}, names)
    tool = recognise(kept)
    if tool is None:
        if values and values.keys() <= FIELDS.keys():
            raise ConfigError("all its keys are fastdpo's own already; `fastdpo train` takes it as it is")
        known = ", ".join(tool.name for tool in TOOLS)
        raise ConfigError(f"none of its keys is of a tool that is known; known are {known}")
    draft = tool.translate(kept, _is_whole(tool, kept))
    if before or ignored:
        draft.ours["ignore"] = before | ignored
    draft.fates += as_fates(ignored)
    return draft


def converted(values: dict, draft: Draft) -> str:
    """What was drafted of `values` as YAML of ours, with a comment at each key that changed or went. Raises
    ConfigError where that is not a config that fastdpo can run."""
    from fastdpo.convert.written import as_yaml  # late: a run needs no tables

    _checked(draft.tool, problems_left(draft, {}), draft.problems, values, draft.ours)
    return as_yaml(values, draft)
