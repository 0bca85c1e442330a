"""What a table of another tool's keys is made of (rules, parts), and how a config is read by one."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import yaml

from fastdpo.config.keys import FIELDS
from fastdpo.config.names import meant
from fastdpo.errors import ConfigError


@dataclass
class Draft:
    """A config on its way: theirs that are not read yet, ours so far, and what became of each key."""

    tool: str
    theirs: dict
    defaults: dict  # of theirs, where they differ from ours; empty where it is no whole config
    names: dict  # see Tool
    ours: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.left = dict.fromkeys(self.defaults) | self.theirs

    def key(self, name: str) -> str:
        """Theirs for what a part calls `name`."""
        return self.names.get(name, name)

    def take(self, name: str, default=None):
        """The value of a key of theirs, which is then read; what is null or missing has their default."""
        value = self.left.pop(self.key(name), None)
        return self.defaults.get(self.key(name), default) if value is None else value

    def word(self, name: str, value) -> str:
        """`key value`, and whether the value is only their default."""
        key = self.key(name)
        whose = "" if self.theirs.get(key) is not None else f" ({self.tool}'s default)"
        return f"{key} {spelled(value)}{whose}"

    def set(self, name: str, value, source: str) -> None:
        """Our key and where its value comes from."""
        self.ours[name] = value
        if source != (ours := f"{name} {spelled(value)}"):
            self.notes.append(f"{source} -> {ours}")

    def leave(self, name: str, value, why: str) -> None:
        self.notes.append(f"{self.key(name)} {spelled(value)}: left out, {why}")

    def check(self, note: str) -> None:
        """A note on what is not exactly the same and cannot be told from the config."""
        self.notes.append(f"check: {note}")

    def refuse(self, name: str, value, way_out: str):
        raise ConfigError(f"{self.key(name)}: {spelled(value)}: {way_out}")


def spelled(value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


Rule = Callable[[Draft, str, object], None]  # of a key and its value, which is not null


def to(name: str | None = None, values: dict | None = None) -> Rule:
    """Our key (of the same name unless one is given) with the same value, or what `values` has for it."""

    def rule(draft: Draft, key: str, value) -> None:
        ours = values.get(value, value) if values and isinstance(value, str) else value
        draft.set(name or key, ours, draft.word(key, value))

    return rule


def unread(why: str) -> Rule:
    """A key that changes nothing about training here."""
    return lambda draft, key, value: draft.leave(key, value, why)


def beside(what: str) -> Rule:
    """A key that one of the tool's parts has read where it means something."""
    return unread(f"without {what} it has no meaning")


def only(*values, fix: str) -> Rule:
    """A key that would change training, with values that are what fastdpo does anyway."""

    def rule(draft: Draft, key: str, value) -> None:
        if value not in values:
            draft.refuse(key, value, fix)
        draft.leave(key, value, "it is so here")

    return rule


@dataclass(frozen=True, eq=False)
class Tool:
    """One tool's config.

    only_here: the keys by which it is recognised. defaults: its own, where ours differ. rows: keys (several
    with one fate share a row) -> our key, or a rule.

    parts: functions of a Draft and of several keys, which are the names of their parameters; a key that is
    null or missing leaves the parameter its default. They come before the rows, in this order; a part runs
    where one of the keys before its `*` is there, or has a default in `defaults`.
    names: what this tool calls the keys that parts and losses know by another name.
    """

    name: str
    only_here: str
    defaults: dict
    parts: tuple[Callable[..., None], ...]
    rows: dict[str, Any]  # str | Rule
    names: dict[str, str] = field(default_factory=dict)

    @cached_property
    def marks(self) -> frozenset[str]:
        return frozenset(self.only_here.split())

    @cached_property
    def read(self) -> set[str]:
        """The keys of the parts, some of them keys of ours too."""
        return {self.names.get(p.name, p.name) for part in self.parts for p in _parameters(part)}

    @cached_property
    def rules(self) -> dict[str, Rule]:
        rows = {key: rule for keys, rule in self.rows.items() for key in keys.split()}
        own = {key: to(rule) if isinstance(rule, str) else rule for key, rule in rows.items()}
        return dict.fromkeys(self.read - set(FIELDS), beside("the rest of the config")) | own

    def translate(self, values: dict, whole: bool) -> Draft:
        """All of a config, read; keys of ours stay. `whole`: what is left out has this tool's default."""
        theirs = {key: plain(value) for key, value in values.items()}
        draft = Draft(self.name, theirs, self.defaults if whole else {}, self.names)
        for part in self.parts:
            keys = _parameters(part)
            if any(draft.key(p.name) in draft.left for p in keys if p.kind is not p.KEYWORD_ONLY):
                taken = {p.name: draft.take(p.name) for p in keys}
                part(draft, **{name: value for name, value in taken.items() if value is not None})
        for key in list(draft.left):
            if key in self.rules:
                if (value := draft.take(key)) is not None:
                    self.rules[key](draft, key, value)
            elif key in FIELDS:
                draft.ours[key] = values[key]
            else:
                raise ConfigError(
                    f"{key}: not a key that is known of {self.name}, so what it does to training is not "
                    f"known. {meant(key, [*self.rules, *FIELDS])}Remove it, or replace it by a key of "
                    "`fastdpo train --help`"
                )
        return draft


def _parameters(part) -> list[inspect.Parameter]:
    _, *keys = inspect.signature(part).parameters.values()
    return keys


def plain(value):
    """A flag's string, or YAML 1.1's "1e-6", as the value it spells."""
    if not isinstance(value, str):
        return value
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        return value
    if not isinstance(parsed, str):
        return parsed if isinstance(parsed, int | float | bool | list | dict) else value or None
    try:
        return float(parsed)
    except ValueError:
        return value
