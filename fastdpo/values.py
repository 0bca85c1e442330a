"""What people write as the value of a key, as the type it must have."""

import contextlib
import difflib
import re
import types
import typing

import yaml

from fastdpo.errors import ConfigError


def as_type(name: str, value, kind):
    """A YAML value or a flag's string as a type hint (a type, or a union of some). Raises ConfigError."""
    kind = str if typing.get_origin(kind) is typing.Literal else kind  # config.checks says which texts may be
    allowed = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if isinstance(value, str) and allowed != (str,):
        with contextlib.suppress(yaml.YAMLError, ValueError):
            value = yaml.safe_load(value)
        if isinstance(value, str) and float in allowed:
            with contextlib.suppress(ValueError):
                value = float(value)  # YAML 1.1 reads 1e-6 as a string
    if isinstance(value, int) and not isinstance(value, bool) and float in allowed:
        value = float(value)
    if isinstance(value, list) and list[str] in allowed and not all(isinstance(v, str) for v in value):
        raise ConfigError(f"{name}: expected names, got {value!r}")
    for kind in allowed:
        if isinstance(value, typing.get_origin(kind) or kind) and (
            kind is bool or not isinstance(value, bool)
        ):
            return value
    words: dict[object, str] = {type(None): "nothing", dict: "{option: value, ...}", str: "text"}
    plain = [typing.get_origin(kind) or kind for kind in allowed]
    wanted = " or ".join(words.get(k, getattr(k, "__name__", str(k))) for k in plain)
    raise ConfigError(f"{name}: expected {wanted}, got {value!r}")


def nearest(name, names) -> str:
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}? " if close else ""


_UNITS = {"": 1, "B": 1} | {f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}
_UNITS |= {f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)}


def as_bytes(name: str, text: str) -> int:
    """ "24GB" (24e9), "512MiB" (512 * 2^20) -> bytes. Raises ConfigError."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?I?B)\s*", text.upper())
    try:
        size = int(float(found[1]) * _UNITS[found[2]])  # type: ignore[index]  # None is a TypeError
    except (TypeError, ValueError, KeyError):
        size = 0
    if size <= 0:
        raise ConfigError(f"{name}: {text!r} is not a size as in 24GB or 512MiB")
    return size
