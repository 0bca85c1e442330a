"""What comes over another trainer's config before it is read: flags, and the keys to go on without."""

import copy
from collections.abc import Iterable, Iterator

from fastdpo.config.keys import FIELDS
from fastdpo.config.names import called
from fastdpo.convert.draft import Draft, Fate, is_secret, plain, spelled
from fastdpo.convert.nested import put, remove, within
from fastdpo.convert.rules import Tool
from fastdpo.errors import ConfigError
from fastdpo.values import as_list, nearest

_OF_DATA = ("path", "name", "split", "type", "data_files")


def to_ignore(*given) -> tuple[list[str], dict]:
    """(the names of keys to ignore, what was left out of a config before it was written) of values of the key
    `ignore`."""
    names: list[str] = []
    before: dict = {}
    for value in map(plain, given):
        if isinstance(value, dict):
            before |= value
        else:
            names += [name.strip() for text in as_list(value) for name in str(text).split(",")]
    return list(filter(None, dict.fromkeys(names))), before


def without(values: dict, names: Iterable[str]) -> tuple[dict, dict]:
    """(a config without the keys of these names, what they said). Raises ConfigError for names it has not."""
    kept, ignored, wrong = copy.deepcopy(values), {}, []
    for name in names:
        if not _has(values, name):
            wrong.append(
                f"ignore: {name!r} is not in the config. {nearest(name, _keys(values))}".rstrip(". ")
            )
        ignored[name] = "not kept" if is_secret(name) else within(values, name)
        remove(kept, name)
    if wrong:
        raise ConfigError(*wrong)
    return kept, ignored


def as_fates(ignored: dict) -> list[Fate]:
    """What is said of keys that were left out so."""
    said = ((key, f"{key} {spelled(value)}: ignored, as was asked for") for key, value in ignored.items())
    return [Fate((key,), text, "ignore") for key, text in said]


def _has(values: dict, name: str) -> bool:
    return name in values or within(values, name) is not None


def _keys(values: dict) -> Iterator[str]:
    """The keys, and with dots those in them."""
    for key, value in values.items():
        yield str(key)
        for one in as_list(value):
            yield from (f"{key}.{inside}" for inside in _keys(one)) if isinstance(one, dict) else ()


def laid_over(tool: Tool, values: dict, flags: dict) -> tuple[dict, dict, dict]:
    """(the tool's config with flags that are its keys over it, flags that are keys of ours, other flags).

    A flag of ours takes the place of the tool's key of that name, which may mean another thing."""
    values, ours, others = copy.deepcopy(values), {}, {}
    is_nested = lambda key: isinstance(values.get(key.split(".")[0]), dict | list)
    for key, value in flags.items():
        if key in FIELDS and not (key == "push_to_hub" and isinstance(plain(value), bool)):
            ours[key] = value
            if key != "output_dir" and not isinstance(values.get(key), dict):  # it may name TRL's trainer
                values.pop(key, None)
        elif key in values or is_nested(key) or not tool.unknown({key: value}):
            put(values, key, value) if value is not None else remove(values, key)
        else:
            others[key] = value
    return values, ours, others


def problems_left(draft: Draft, over: dict) -> list[Fate]:
    """The problems that flags of ours leave: they may say what a refused key would have. What is nested in
    one that they replace may say more than that, but for where data is and how it is read."""
    found = [fate for fate in draft.fates if fate.is_problem]
    is_said = lambda key: concerns(draft.tool, key) in over and key.rpartition(".")[2] in {key, *_OF_DATA}
    return [fate for fate in found if not any(map(is_said, fate.keys))]


def concerns(tool: Tool, key: str) -> str:
    """The key of ours that one of theirs is about, or the key itself."""
    return "model" if key == tool.model_key else called(key.split(".")[0])


def way_on(tool: Tool, refused: list[Fate], values: dict, ours: dict) -> str:
    """How to go on without the keys of a config that are refused; without a model or data it is none."""
    keys = dict.fromkeys(key for fate in refused for key in fate.keys if _has(values, key))
    needed = {"model", "data"} - ours.keys()
    free = [key for key in keys if "." in key or concerns(tool, key) not in needed]
    which = "it" if len(refused) == 1 else "them"
    return f"To go on without {which}: --ignore {','.join(free)}" if free else ""
