"""What people write as the value of a key, as the type it must have."""

import contextlib
import difflib
import os
import re
import types
import typing
from collections.abc import Mapping
from datetime import timedelta

import yaml

from fastdpo.errors import ConfigError

_WORDS: dict[object, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_WORDS |= {dict: "{option: value, ...}", list: "a list"}


def as_type(name: str, value, kind, doc: str):
    """A YAML value or a flag's string as a type hint (a type, or a union of some). Raises ConfigError, which
    says by `doc` what the key is."""
    kind = str if typing.get_origin(kind) is typing.Literal else kind  # config.checks says which texts may be
    allowed = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    plain, text = [typing.get_origin(kind) or kind for kind in allowed], value
    fits = lambda value: any(isinstance(value, k) and k in (bool, type(value)) for k in plain)
    if isinstance(value, str) and allowed != (str,):
        with contextlib.suppress(yaml.YAMLError, ValueError):
            value = yaml.safe_load(value)
        if isinstance(value, str) and float in allowed:
            with contextlib.suppress(ValueError):
                value = float(value)  # YAML 1.1 reads 1e-6 as a string
    if isinstance(value, int) and not isinstance(value, bool) and float in allowed:
        value = float(value)
    if isinstance(value, list) and list[str] in allowed and not all(isinstance(v, str) for v in value):
        raise ConfigError(f"{name}: expected names, got {_shown(value)}")
    if fits(value):
        return value
    if str in plain and not isinstance(value, list | dict | None):
        if isinstance(text, str):  # of a flag: 2024 may be a folder's name
            return text
        raise ConfigError(f"{name}: YAML reads {value} as no text; write it in quotes: '{value}'")
    wanted = " or ".join(_WORDS[k] for k in plain if k in _WORDS)
    raise ConfigError(f"{name}: expected {wanted}, got {_shown(value)}. Its help: {doc}")


def _shown(value) -> str:
    """No more of it than people read: from Python it may be a whole data set."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def plain(value):
    """A value from Python as YAML would bring it: a path as text, a tuple as a list, a number of numpy as
    Python's own; within dicts and lists, too."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value.item() if getattr(value, "ndim", None) == 0 else value


def as_list(value) -> list:
    """A list as it is, one value as a list of it, None as an empty one."""
    return value if isinstance(value, list) else [] if value is None else [value]


def nearest(name, names) -> str:
    """Which of some names is meant by one that is none of them, as a question; nothing where none is near."""
    spelled = lambda name: str(name).lower().replace("-", "_")
    known = {spelled(name): name for name in names}
    close = difflib.get_close_matches(spelled(name), known, n=1, cutoff=0.5)
    return f"Did you mean {known[close[0]]!r}? " if close else ""


def not_one_of(key: str, value, names, others=()) -> ConfigError:
    """What to raise for a value that is none of some names; `others` are taken, too."""
    known, close = ", ".join(names), nearest(value, [*names, *others])
    return ConfigError(f"{key}: {value!r} is not one of {known}. {close}".rstrip(". "))


_UNITS = {"": 1, "B": 1} | {f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}
_UNITS |= {f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)}


def as_bytes(name: str, text: str) -> int:
    """ "24GB" (24e9), "512MiB" (512 * 2^20) -> bytes. Raises ConfigError."""
    if re.fullmatch(r"\s*[0-9.]+\s*", text):
        unit = "B" if len(text) > 6 else "MiB" if name == "head_memory" else "GB"
        raise ConfigError(f"{name}: {text} has no unit; {text.strip()}{unit}?")
    found = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?I?B)\s*", text.upper())
    try:
        size = int(float(found[1]) * _UNITS[found[2]])  # type: ignore[index]  # None is a TypeError
    except (TypeError, ValueError, KeyError):
        size = 0
    if size <= 0:
        raise ConfigError(f"{name}: {text!r} is not a size as in 24GB or 512MiB")
    return size


_AGE = re.compile(r"(\d{1,5})\s*(h|d|w)(?:ours?|ays?|eeks?)?")
_SPANS = {"h": "hours", "d": "days", "w": "weeks"}


def as_age(name: str, text: str) -> timedelta:
    """ "30d", "2 weeks" -> how long. Raises ConfigError."""
    found = _AGE.fullmatch(text.strip().lower())
    if not found:
        raise ConfigError(f"{name}: {text!r} is not an age as in 12h, 30d or 2w")
    return timedelta(**{_SPANS[found[2]]: int(found[1])})
