"""What values an option of a loss may have: a loss annotates each of its options with one of these kinds."""

import math
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, NamedTuple

from fastdpo.errors import ConfigError
from fastdpo.values import not_one_of


class Option(NamedTuple):
    """One option of an objective."""

    default: Any
    kind: Any  # one of those below

    def check(self, key: str, value) -> Any:
        """The value as losses take it, or ConfigError, which calls it `key`."""
        return self.kind.__metadata__[0](key, value)


def number(key: str, value, allowed=lambda x: True, says: str = "") -> float:
    """A finite number in range; text is read as one, for YAML takes 1e-3 for text."""
    try:
        out = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        out = math.nan
    if not math.isfinite(out):
        raise ConfigError(f"{key}: {value!r} is not a number")
    if not allowed(out):
        raise ConfigError(f"{key}: {value} is not {says}")
    return out


def switch(key: str, value) -> bool:
    if isinstance(value, bool):
        return value
    raise ConfigError(f"{key}: {value!r} is neither true nor false")


def scope(key: str, value) -> str | int:
    if value == "batch" or (type(value) is int and value > 0):
        return value
    raise ConfigError(f"{key}: {value!r} is neither batch nor a number of groups")


def one_of(*choices: str) -> Callable[[str, Any], str]:
    def check(key: str, value) -> str:
        if value in choices:
            return value
        raise not_one_of(key, value, choices)

    return check


above_0 = partial(number, allowed=lambda x: x > 0, says="above 0")
Number = Annotated[float, number]
Above0 = Annotated[float, above_0]
NotBelow0 = Annotated[float, partial(number, allowed=lambda x: x >= 0, says="0 or more")]
Smoothing = Annotated[float, partial(number, allowed=lambda x: 0 <= x < 0.5, says="in [0, 0.5)")]
ShareOrNone = Annotated[float | None, partial(number, allowed=lambda x: 0 <= x <= 1, says="in [0, 1]")]
Switch = Annotated[bool, switch]
Scope = Annotated[str | int, scope]
