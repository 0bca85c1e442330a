"""Numbers with their standard errors, and the paired test between two models on the same prompts."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdpo.console.formatting import percent, significant
from fastdpo.training.held_out import Part, shares, standard_error

_FEWEST = 20  # prompts: of fewer, the normal distribution says too much
_LEVEL = 0.05
_NOISE = 1e-12  # what sums of float64 leave of 0


class Kind(NamedTuple):
    """What a number is called, how it is written, whether lower is better (None: neither is)."""

    title: str
    write: Callable[[float], str]
    lower: bool | None


KINDS = {
    "logps/accuracies": Kind("accuracy of the policy alone", percent, False),
    "logps/accuracies_longer": Kind("... where the chosen is longer", percent, None),
    "logps/accuracies_shorter": Kind("... where the chosen is shorter", percent, None),
    "rewards/accuracies": Kind("accuracy over the reference", percent, False),
    "rewards/accuracies_longer": Kind("... where the chosen is longer", percent, None),
    "rewards/accuracies_shorter": Kind("... where the chosen is shorter", percent, None),
    "rewards/margins": Kind("reward margin", significant, None),
    "loss": Kind("loss", significant, True),
    "kl": Kind("KL on the data's responses, nats a token", significant, None),
    "samples/kl": Kind("KL on its own answers, nats an answer", significant, None),
    "samples/length": Kind("length of an answer, tokens", significant, None),
    "samples/ended": Kind("answers that ended by themselves", percent, None),
    "samples/score": Kind("score of an answer", significant, False),
    "samples/wins": Kind("win rate", percent, False),
}


class Estimate(NamedTuple):
    """A number over some prompts."""

    value: float
    error: float | None = None  # the standard error, clustered by prompt; None where there is none
    by_prompt: np.ndarray = np.zeros(0)  # f64[P]: the value is their mean
    prompts: np.ndarray = np.zeros(0, np.int64)  # i64[P]: which

    @classmethod
    def of(cls, values: np.ndarray, prompts: np.ndarray) -> "Estimate":
        return cls(float(values.mean()), standard_error(values), values, prompts)


def estimate(parts: list[Part], prompt: Tensor, kept: Tensor | None = None) -> Estimate | None:
    """Of a number of `held_out.parts_of`; prompt: of each response its number, i64[R]; kept: bool[R], the
    responses that count. None where there are none. See training/held_out.py for the formula."""
    if kept is not None:
        parts = [_taken(part, kept[part.of]) for part in parts]
    if not all(len(part.values) for part in parts):
        return None
    there = torch.unique(torch.cat([prompt[part.of] for part in parts]))
    place = torch.zeros(int(there[-1]) + 1, dtype=torch.int64).scatter(0, there, torch.arange(len(there)))
    values = shares(parts, place[prompt.clamp(max=int(there[-1]))], len(there))
    return Estimate.of(values.numpy(), there.numpy())


def _taken(part: Part, here: Tensor) -> Part:
    return part._replace(
        values=part.values[here],
        of=part.of[here],
        units=None if part.units is None else part.units[here],
    )


class Test(NamedTuple):
    """One model against another on the same prompts."""

    number: str  # a key of KINDS
    one: str
    other: str
    difference: float  # one - other
    error: float | None
    z: float | None
    p: float | None
    verdict: str
    prompts: int


def paired(number: str, names: tuple[str, str], one: Estimate, other: Estimate) -> Test:
    """The difference of two numbers, its standard error from the differences prompt by prompt (Miller 2024,
    arXiv 2411.00640, section 4.2), z = difference / error and the two-sided p of the normal distribution,
    erfc(|z| / sqrt 2)."""
    assert np.array_equal(one.prompts, other.prompts)
    apart = one.by_prompt - other.by_prompt
    difference, error = float(apart.mean()), standard_error(apart)
    difference = 0.0 if abs(difference) < _NOISE else difference
    error = None if error is None or error < _NOISE else error
    z = None if error is None else difference / error
    p = None if z is None else math.erfc(abs(z) / math.sqrt(2))
    return Test(
        number, *names, difference, error, z, p, _verdict(number, difference, p, len(apart)), len(apart)
    )


def _verdict(number: str, difference: float, p: float | None, prompts: int) -> str:
    if prompts < _FEWEST:
        return f"{prompts} prompts are too few to tell"
    # without an error all prompts differ by the same
    if difference == 0 or (p is not None and p >= _LEVEL):
        return "no difference beyond chance"
    lower = KINDS[number].lower
    if lower is None:
        return "higher" if difference > 0 else "lower"
    return "better" if (difference < 0) == lower else "worse"
