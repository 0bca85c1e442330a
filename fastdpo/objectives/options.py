"""What may be given to an objective: names, weights and option values, checked before any work."""

import math
from collections.abc import Mapping
from typing import Any

from fastdpo.errors import ConfigError
from fastdpo.objectives.catalogue import BASES, MIXTURES, NAMES
from fastdpo.values import nearest

_SHARE = (lambda x: 0 <= x <= 1, "in [0, 1]")
_ABOVE = (lambda x: x > 0, "above 0")
_NOT_BELOW = (lambda x: x >= 0, "0 or more")
_NUMBERS = {
    "beta": _ABOVE,
    "label_smoothing": (lambda x: 0 <= x < 0.5, "in [0, 0.5)"),
    "f_alpha_divergence_coef": (lambda x: True, ""),
    "ld_alpha": _SHARE,
    "gamma": _SHARE,
    "discopop_tau": _ABOVE,
    "alpha": _NOT_BELOW,
    "dpop_lambda": _NOT_BELOW,
    "length_alpha": _NOT_BELOW,
    "rpo_alpha": _NOT_BELOW,
    "eta": _ABOVE,
    "beta_prime": _ABOVE,
    "desirable_weight": _NOT_BELOW,
    "undesirable_weight": _NOT_BELOW,
    "simpo_gamma": _NOT_BELOW,
    "cpo_alpha": _NOT_BELOW,
    "delta": _NOT_BELOW,
    "slic_lambda": _NOT_BELOW,
}
_CHOICES = {
    "f_divergence_type": ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    "scaling": ("log", "linear", "log_difference"),
    "base_loss": BASES,
}
_SWITCHES = ("use_weighting", "clamp_weights")


def parts_of(objective) -> dict[str, float]:
    """{name: weight} of a name, a mapping, or a list of either; presets as their parts."""
    items = objective if isinstance(objective, list | tuple) else [objective]
    if not items or not all(isinstance(item, str | Mapping) and item for item in items):
        raise ConfigError(f"objective: {objective!r} is neither a name nor names with weights")
    named = [pair for item in items for pair in ([(item, 1.0)] if isinstance(item, str) else item.items())]
    out: dict[str, float] = {}
    for i, (name, weight) in enumerate(named):
        if name not in NAMES:
            close = nearest(name, NAMES)
            raise ConfigError(f"objective: {name!r} is not one of {', '.join(NAMES)}. {close}".rstrip())
        weight = number(f"objective: the weight of {name}", weight, *_ABOVE)
        if name in [other for other, _ in named[:i]]:
            raise ConfigError(f"objective: {name} is given twice")
        for part, share in MIXTURES.get(name, {name: 1.0}).items():
            out[part] = out.get(part, 0.0) + weight * share
    return out


def number(key: str, value, allowed, says: str) -> float:
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


def checked(option: str, value) -> Any:
    """The option's value as the losses take it, or ConfigError."""
    key = option if option in ("beta", "label_smoothing") else f"objective_args: {option}"
    if option in _NUMBERS:
        return number(key, value, *_NUMBERS[option])
    if option == "scope":
        if value == "batch" or (type(value) is int and value > 0):
            return value
        raise ConfigError(f"{key}: {value!r} is neither batch nor a number of groups")
    if option in _SWITCHES:
        if isinstance(value, bool):
            return value
        raise ConfigError(f"{key}: {value!r} is neither true nor false")
    if value not in _CHOICES[option]:
        raise ConfigError(f"{key}: {value!r} is not one of {', '.join(_CHOICES[option])}")
    return value


def check_read(given: dict[str, Any], reads: dict[str, dict]) -> None:
    """That each option given is read by at least one of the objectives ({name: its options})."""
    known = list(dict.fromkeys(option for options in reads.values() for option in options))
    for option in given:
        if option not in known:
            names = ", ".join(reads)
            who = f"{names} does not read" if len(reads) == 1 else f"none of {names} reads"
            what = f"It reads {', '.join(known)}." if known else "It reads none."
            if option in ("beta", "label_smoothing"):
                raise ConfigError(f"{option}: {who} it. {what}")
            raise ConfigError(f"objective_args: {who} {option!r}. {nearest(option, known)}{what}")


def check_together(given: dict[str, Any], names: set[str]) -> None:
    """What one option asks of another. `names`: of the objectives, and of Dr. DPO's base loss."""
    for option, other, value in (
        ("f_alpha_divergence_coef", "f_divergence_type", "alpha_divergence"),
        ("clamp_weights", "use_weighting", True),
    ):
        by_itself = option == "clamp_weights" and "wpo" in names
        if option in given and given.get(other) != value and not by_itself:
            raise ConfigError(f"objective_args: {option} is read only with {other}: {str(value).lower()}")
    if "exo_pair" in names and given.get("label_smoothing") == 0:
        raise ConfigError("label_smoothing: exo_pair needs it above 0 (its paper uses 1e-3)")
