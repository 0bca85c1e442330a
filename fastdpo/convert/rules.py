"""What a table of another tool's keys is made of (rules, parts), and how a config is read by one."""

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fastdpo.config.keys import FIELDS
from fastdpo.config.names import meant
from fastdpo.convert.draft import Draft, Fate, Unresolved, plain, spelled
from fastdpo.convert.nested import flattened
from fastdpo.errors import ConfigError

# what code does over a value of another kind than it has in mind, such as a list for a number
_STUMBLES = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError)
_ODD = "this is no value that the key can have; mend or remove it"
_UNKNOWN = "only running the file would tell, and it is not run"
# keys that such a value is left out of: dtype auto takes bf16 where the GPU has it, as all scripts ask for
_HARMLESS = "bf16 fp16 dtype torch_dtype output_dir report_to logging_steps save_steps callbacks".split()
_HARMLESS += ["save_path", "ckpt.output_dir", "ckpt.save_steps", "logger.logging_steps"]

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
        self._say_twice(draft)
        self._set_aside(draft)
        for part in self.parts:
            keys = _parameters(part)
            if any(draft.key(p.name) in draft.left for p in keys if p.kind is not p.KEYWORD_ONLY):
                before = draft.copy()
                try:
                    _run(part, draft)
                except _STUMBLES:
                    _tell_odd(part, draft, before)
        for key in list(draft.left):
            if key in self.rules:
                if (value := draft.take(key)) is not None:
                    try:
                        self.rules[key](draft, key, value)
                    except _STUMBLES:
                        draft.refuse(key, value, _ODD)
            elif key in FIELDS:
                draft.ours[key] = values.get(key, False)
            else:
                what = f"not a key that is known of {self.name}, so what it does to training is not known"
                close = meant(key, [*self.rules, *FIELDS])
                draft.refuse(key, fix=f"{what}. {close}".rstrip(". "))
        draft.fates = list(dict.fromkeys(draft.fates))  # several data sets may say the same
        draft.tell_the_rest(": read with the rest of the config")
        return draft

    def _say_twice(self, draft: Draft) -> None:
        """Keys that are another one's older name, beside that: refused, for only one of them is read."""
        for key, older in self.older.items():
            first, *others = [k for k in (key, *older) if draft.theirs.get(k) is not None] or [key]
            for other in others:
                del draft.left[other]
                text = (
                    f"{other}: {spelled(draft.theirs[other])}: {first} says the same, remove one of the two"
                )
                draft.fates.append(Fate((other,), text, is_problem=True))

    def _set_aside(self, draft: Draft) -> None:
        """What only running the file would tell: refused, unless the key changes nothing anyway."""
        for key in [key for key, value in draft.theirs.items() if isinstance(value, Unresolved)]:
            if key in self.read or not isinstance(self.rules.get(key), Unread):
                del draft.left[key]
                if key in _HARMLESS:
                    draft.check(key, f"left out, {_UNKNOWN}")
                else:
                    draft.refuse(key, fix=f"{_UNKNOWN}; give its value as a flag")


def _run(part, draft: Draft) -> None:
    taken = {p.name: draft.take(p.name) for p in _parameters(part)}
    given = {name: value for name, value in taken.items() if value is not None}
    try:
        part(draft, **given)
    except ConfigError as error:  # what a part makes of keys is refused elsewhere
        for problem in error.args:
            draft.tell_problem(list(given)[:1], problem)


def _tell_odd(part, draft: Draft, before: Draft) -> None:
    """The key that a part stumbled over: the last one that it takes without which it does not, for what
    switches a key on is taken before it; or one that it only looks at."""
    first = [draft.key(p.name) for p in _parameters(part)]
    given = [key for key in dict.fromkeys((*first, *before.left)) if before.theirs.get(key) is not None]
    taken = [key for key in given if key not in draft.left and key in before.left]
    for key in (*reversed(taken), *(key for key in given if key not in taken)):
        other = before.copy()
        other.theirs.pop(key), other.left.pop(key, None)
        with contextlib.suppress(*_STUMBLES):
            _run(part, other)
            return draft.refuse(key, fix=_ODD)
    said = ", ".join(map(draft.word, taken or given))
    draft.tell_problem(
        taken or given, f"{said}: not all are values that the keys can have; mend or remove them"
    )


def _parameters(part) -> list[inspect.Parameter]:
    _, *keys = inspect.signature(part).parameters.values()
    return keys
