"""A config on its way from another tool's keys to ours, and what became of each key."""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import yaml

from fastdpo.convert.nested import within

# keys whose value is shown and kept nowhere
_LOGS_IN = re.compile("(api_key|(hub|hf|auth|access)_token|secret|password)$")


class Unresolved(str):
    """A value that only running a script would tell: what stands there."""


class Fate(NamedTuple):
    """What became of some keys of theirs, or of what they leave out."""

    keys: tuple[str, ...]
    text: str  # a note, or the problem; empty where it is our key and value as it stands
    ours: str | None = None  # the key of ours that has it
    is_problem: bool = False


@dataclass
class Draft:
    """A config on its way: theirs that are not read yet, ours so far, and what became of each key. Its
    methods take keys by the names that parts have for them (see Tool.names)."""

    tool: Any  # the Tool that reads it, in rules.py
    theirs: dict
    defaults: dict  # of theirs, where they differ from ours; empty where it is no whole config
    ours: dict = field(default_factory=dict)
    fates: list[Fate] = field(default_factory=list)
    negated: dict[str, str] = field(default_factory=dict)  # a key that is false -> as it was given: no_X

    def __post_init__(self):
        self.left = dict.fromkeys(self.defaults) | self.theirs

    @property
    def notes(self) -> list[str]:
        return [fate.text for fate in self.fates if fate.text and not fate.is_problem]

    @property
    def problems(self) -> list[str]:
        return [fate.text for fate in self.fates if fate.is_problem]

    def copy(self) -> "Draft":
        """The same so far, with keys, problems and notes of its own."""
        same = replace(self, theirs=dict(self.theirs), ours=dict(self.ours), fates=[*self.fates])
        same.left = dict(self.left)
        return same

    def key(self, name: str) -> str:
        """Theirs for what a part calls `name`: by an older version's name where the config has that."""
        key = self.tool.names.get(name, name)
        return next((k for k in (key, *self.tool.older.get(key, ())) if self.theirs.get(k) is not None), key)

    def given(self, *names: str) -> list[str]:
        """Which of these the config says."""
        return [name for name in names if self.theirs.get(self.key(name)) is not None]

    def take(self, name: str, default=None):
        """The value of a key of theirs, which is then read; what is null or missing has their default."""
        value = self.left.pop(self.key(name), None)
        return self.defaults.get(self.key(name), default) if value is None else value

    def word(self, name: str, default=None) -> str:
        """`key value`, and whether the value is only their default."""
        key = self.key(name)
        if key in self.negated:
            return f"{self.negated[key]} true"
        if (value := within(self.theirs, key)) is not None:
            return key if is_secret(key) else f"{key} {spelled(value)}"
        value = self.defaults.get(key, default)
        return (
            f"{key} is not given" if value is None else f"{key} {spelled(value)} ({self.tool.name}'s default)"
        )

    def set(self, ours: str, value, *names: str, why: str = "", **assumed) -> None:
        """Our key, and theirs that it comes from; `assumed` are values that were taken for missing ones."""
        self.ours[ours] = value
        theirs = ", ".join(self.word(name, assumed.get(name, value)) for name in names)
        became = f"{ours} {spelled(value)}"
        theirs += f" ({why})" if why else ""
        self._add(names, "" if theirs in ("", became) else f"{theirs} -> {became}", ours)

    def tell(self, name: str, text: str) -> None:
        """A note: `key value TEXT`."""
        self._add((name,), f"{self.word(name)}{text}")

    def leave(self, name: str, why: str) -> None:
        """A key that changes nothing of what is learnt, or that another key has."""
        self.tell(name, f": left out, {why}")

    def tell_the_rest(self, text: str) -> None:
        """Every key that says something and has no fate so far."""
        told = {part for fate in self.fates for key in fate.keys for part in (key, key.split(".")[0])}
        for key, value in self.theirs.items():
            if value and self.negated.get(key, key) not in {*told, *self.ours}:
                self.tell(key, text)

    def check(self, name: str, text: str) -> None:
        """A note on what is not exactly the same and cannot be told from the config."""
        self._add((name,), f"check: {self.word(name)}: {text}")

    def refuse(self, name: str, value=None, fix: str | None = None) -> None:
        """A problem: what would change training and cannot be had. The reason is `fix`, or the tool's."""
        key = self.key(name)
        value = within(self.theirs, key) if value is None else value
        said = key if is_secret(key) else f"{key}: {spelled(value)}"
        self._add((name,), f"{said}: {fix or self.tool.reasons[name]}", is_problem=True)

    def tell_problem(self, names: Iterable[str], text: str) -> None:
        """A problem in words of its own, of the keys of these names."""
        self._add(tuple(names), text, is_problem=True)

    def _add(self, names: tuple[str, ...], text: str, ours=None, is_problem: bool = False) -> None:
        keys = tuple(self.negated.get(key, key) for key in map(self.key, names))
        self.fates.append(Fate(keys, text, ours, is_problem))


def is_secret(key: str) -> bool:
    return bool(_LOGS_IN.search(key))


def spelled(value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    first, *more = (f"{value:g}" if isinstance(value, float) else str(value)).splitlines() or [""]
    return f"{first} ..." if more else first  # a note is one line


def plain(value):
    """A flag's string, or YAML 1.1's "1e-6", as the value it spells."""
    if not isinstance(value, str) or isinstance(value, Unresolved):
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


def as_lines(fates: Iterable[Fate]) -> list[str]:
    """Notes to be read before a run: what is left out for one reason on one line, and last what to check."""
    lines: list[str] = []
    checks: list[str] = []
    left: dict[str, list[str]] = defaultdict(list)
    for text in dict.fromkeys(fate.text for fate in fates if fate.text):
        key, is_left, why = text.partition(": left out, ")
        if text.startswith("check: "):
            checks.append(text)
        elif is_left:
            left[why].append(key)
        else:
            lines.append(text)
    for why, keys in left.items():
        several = len(keys) > 1
        lines.append(f"left out, {why}: {', '.join(keys)}" if several else f"{keys[0]}: left out, {why}")
    return lines + checks
