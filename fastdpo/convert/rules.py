"""What a table of another tool's keys is made of (rules, parts), and how a config is read by one."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import yaml

from fastdpo.config.keys import FIELDS
from fastdpo.config.names import meant
from fastdpo.convert.nested import flattened

_UNKNOWN = "only running the file would tell, and it is not run"
# keys that such a value is left out of: dtype auto takes bf16 where the GPU has it, as all scripts ask for
_HARMLESS = "bf16 fp16 dtype torch_dtype output_dir report_to logging_steps save_steps callbacks".split()


class Unresolved(str):
    """A value that only running a script would tell: what stands there."""

_LOGS_IN = re.compile("(api_key|hub_token|secret)$")  # keys whose value is shown nowhere


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

    tool: "Tool"
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

    def key(self, name: str) -> str:
        """Theirs for what a part calls `name`: by an older version's name where the config has that."""
        key = self.tool.names.get(name, name)
        return next((k for k in (key, *self.tool.older.get(key, ())) if k in self.theirs), key)

    def given(self, name: str) -> bool:
        """Whether the config says it."""
        return self.theirs.get(self.key(name)) is not None

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
            return key if _LOGS_IN.search(key) else f"{key} {spelled(value)}"
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
        self._add(names, "" if theirs == became else f"{theirs} -> {became}", ours)

    def tell(self, name: str, text: str) -> None:
        """A note: `key value TEXT`."""
        self._add((name,), f"{self.word(name)}{text}")

    def leave(self, name: str, why: str) -> None:
        """A key that changes nothing of what is learnt, or that another key has."""
        self.tell(name, f": left out, {why}")

    def check(self, name: str, text: str) -> None:
        """A note on what is not exactly the same and cannot be told from the config."""
        self._add((name,), f"check: {self.word(name)}: {text}")

    def refuse(self, name: str, value=None, fix: str | None = None) -> None:
        """A problem: what would change training and cannot be had. The reason is `fix`, or the tool's."""
        shown = spelled(within(self.theirs, self.key(name)) if value is None else value)
        text = f"{self.key(name)}: {shown}: {fix or self.tool.reasons[name]}"
        self._add((name,), text, is_problem=True)

    def _add(self, names: tuple[str, ...], text: str, ours=None, is_problem: bool = False) -> None:
        keys = tuple(self.negated.get(key, key) for key in map(self.key, names))
        self.fates.append(Fate(keys, text, ours, is_problem))


def within(values: dict, key: str):
    """The value of a key, or of "datasets.path" what `datasets` has there (a list of them where it has
    several); None where there is none."""
    if key in values or "." not in key:
        return values.get(key)
    first, rest = key.split(".", 1)
    inside = values.get(first)
    found = [
        within(one, rest)
        for one in (inside if isinstance(inside, list) else [inside])
        if isinstance(one, dict)
    ]
    return found[0] if len(found) == 1 else found or None


def spelled(value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    first, *more = (f"{value:g}" if isinstance(value, float) else str(value)).splitlines() or [""]
    return f"{first} ..." if more else first  # a note is one line


Rule = Callable[[Draft, str, object], None]  # of a key and its value, which is not null


def to(name: str | None = None, values: dict | None = None) -> Rule:
    """Our key (of the same name unless one is given) with the same value, or what `values` has for it."""

    def rule(draft: Draft, key: str, value) -> None:
        ours = values.get(value, value) if values and isinstance(value, str) else value
        draft.set(name or key, ours, key)

    return rule


@dataclass(frozen=True)
class Unread:
    """The rule of a key that changes nothing about training here, whatever its value."""

    why: str

    def __call__(self, draft: Draft, key: str, value) -> None:
        draft.leave(key, self.why)


def unread(why: str) -> Rule:
    return Unread(why)


def beside(what: str) -> Rule:
    """A key that one of the tool's parts has read where it means something."""
    return unread(f"without {what} it has no meaning")


@dataclass(frozen=True)
class Only:
    """The rule of a key that would change training, with values that are what fastdpo does anyway."""

    values: tuple
    fix: str

    def __call__(self, draft: Draft, key: str, value) -> None:
        if value in self.values:
            draft.leave(key, "it is so here")
        else:
            draft.refuse(key, value, self.fix)


def only(*values, fix: str) -> Rule:
    return Only(values, fix)


@dataclass(frozen=True, eq=False)
class Tool:
    """One tool's config.

    only_here: keys that tell it. defaults: its own, where ours differ. rows: keys (several with one fate
    share a row) -> our key, or a rule.

    parts: functions of a Draft and of several keys, which are the names of their parameters; a key that is
    null or missing leaves the parameter its default. They come before the rows, in this order; a part runs
    where one of the keys before its `*` is there, or has a default in `defaults`. reasons: why parts refuse
    keys, by the names that parts have for them. names: what this tool calls those. older: what its older
    versions call keys that parts read. model_key: the model's.
    """

    name: str
    only_here: str
    defaults: dict
    parts: tuple[Callable[..., None], ...]
    rows: dict[str, Any]  # str | Rule
    reasons: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    older: dict[str, tuple[str, ...]] = field(default_factory=dict)
    model_key: str = "model_name_or_path"

    @cached_property
    def marks(self) -> frozenset[str]:
        return frozenset(self.only_here.split())

    @cached_property
    def read(self) -> set[str]:
        """The keys of the parts, some of them keys of ours too."""
        now = {self.names.get(p.name, p.name) for part in self.parts for p in _parameters(part)}
        return now.union(*self.older.values())

    @cached_property
    def rules(self) -> dict[str, Rule]:
        rows = {key: rule for keys, rule in self.rows.items() for key in keys.split()}
        own = {key: to(rule) if isinstance(rule, str) else rule for key, rule in rows.items()}
        return dict.fromkeys(self.read - set(FIELDS), beside("the rest of the config")) | own

    def unknown(self, values: dict) -> list[str]:
        """The keys that are neither this tool's nor ours."""
        return [key for key in values if not (self._knows(key) or self._negates(key, plain(values[key])))]

    def _knows(self, key: str) -> bool:
        return key in self.rules or key in self.read or key in FIELDS

    def _negates(self, key: str, value) -> bool:
        """Whether it is HfArgumentParser's `no_X: true`, for X: false."""
        return not self._knows(key) and value is True and key[:3] == "no_" and self._knows(key[3:])

    def translate(self, values: dict, whole: bool) -> Draft:
        """All of a config, read; keys of ours stay. `whole`: what is left out has this tool's default."""
        values = flattened(values)
        theirs = {key: plain(value) for key, value in values.items()}
        negated = {key[3:]: key for key, value in theirs.items() if self._negates(key, value)}
        theirs = {key: value for key, value in theirs.items() if key not in negated.values()}
        theirs |= dict.fromkeys(negated, False)
        draft = Draft(self, theirs, self.defaults if whole else {}, negated=negated)
        self._set_aside(draft)
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
                draft.ours[key] = values.get(key, False)
            else:
                what = f"not a key that is known of {self.name}, so what it does to training is not known"
                close = meant(key, [*self.rules, *FIELDS])
                draft.refuse(key, fix=f"{what}. {close}".rstrip(". "))
        draft.fates = list(dict.fromkeys(draft.fates))  # several data sets may say the same
        return draft

    def _set_aside(self, draft: Draft) -> None:
        """What only running the file would tell: refused, unless the key changes nothing anyway."""
        for key in [key for key, value in draft.theirs.items() if isinstance(value, Unresolved)]:
            if key in self.read or not isinstance(self.rules.get(key), Unread):
                del draft.left[key]
                if key in _HARMLESS:
                    draft.check(key, f"left out, {_UNKNOWN}")
                else:
                    draft.refuse(key, fix=f"{_UNKNOWN}; give its value as a flag")


def _parameters(part) -> list[inspect.Parameter]:
    _, *keys = inspect.signature(part).parameters.values()
    return keys


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
