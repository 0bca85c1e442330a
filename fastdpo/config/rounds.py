"""Rounds: how a model is sampled, and what keys they need and refuse."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fastdpo.errors import ConfigError
from fastdpo.values import nearest, not_one_of

Engine = Literal["transformers", "vllm"]
REFERENCES = ("round", "start")


@dataclass(frozen=True)
class SampleSpec:
    """How prompts are answered: the key `sample`."""

    prompts: int = 512  # of a round
    responses: int = 4  # to each
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    resets: float = 0.0  # the share of prompts that the start of their chosen response is added to
    missing_eos_penalty: float = 0.0  # taken from the score of a sample that did not end in time
    engine: Engine = "transformers"


_FIELDS = {field.name: field for field in dataclasses.fields(SampleSpec)}
SAMPLE_WORDS = "{" + ", ".join(f"{name}: {field.default}" for name, field in _FIELDS.items()) + "}"
_RANGES = {  # beyond their types: what a number has to be
    "prompts": (lambda x: x >= 1, "1 or more"),
    "responses": (lambda x: x >= 1, "1 or more"),
    "max_new_tokens": (lambda x: x >= 1, "1 or more"),
    "temperature": (lambda x: x > 0, "above 0"),
    "top_p": (lambda x: 0 < x <= 1, "in (0, 1]"),
    "resets": (lambda x: 0 <= x <= 1, "in [0, 1]"),
    "missing_eos_penalty": (lambda x: x >= 0, "0 or more"),
}


def sample_spec(sample: dict | None) -> SampleSpec:
    """The key `sample` as a record. Raises ConfigError for each option that is unknown or out of range."""
    found, values = [], {}
    for name, value in (sample or {}).items():
        problem = _problem(name, value)
        found += [f"sample: {problem}"] if problem else []
        values[name] = value
    if found:
        raise ConfigError(*found)
    given: Any = {n: float(v) if isinstance(_FIELDS[n].default, float) else v for n, v in values.items()}
    return SampleSpec(**given)


def _problem(name, value) -> str:
    """What is wrong with an option; nothing, where it is right."""
    if name not in _FIELDS:
        return f"unknown option {name!r}. {nearest(name, _FIELDS)}It takes {', '.join(_FIELDS)}"
    if name == "engine":
        known = get_args(Engine)
        return "" if value in known else str(not_one_of("engine", value, known))
    whole = isinstance(_FIELDS[name].default, int)
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return f"{name}: {value!r} is not a {'whole ' if whole else ''}number"
    fits, says = _RANGES[name]
    return "" if math.isfinite(value) and fits(value) else f"{name}: {value} is not {says}"


def sampling_problems(config) -> Iterator[str]:
    """What is wrong in the keys of sampling, alone and together."""
    try:
        spec = sample_spec(config.sample)
    except ConfigError as error:
        yield from error.args
        return
    if config.reference not in (None, *REFERENCES):
        yield str(not_one_of("reference", config.reference, REFERENCES))
    if (config.rounds or config.sample) and spec.max_new_tokens >= config.max_length:
        yield (
            f"sample: max_new_tokens: {spec.max_new_tokens} leaves no room for a prompt within max_length: "
            f"{config.max_length}; raise that, or sample fewer"
        )
    if config.rounds is None:
        return
    if config.reward is None:
        yield "reward: rounds need what scores the samples: FILE.py:function, vader, length or a reward model"
    if spec.responses < 2:
        yield "sample: responses: 1 has nothing to be compared with; a round needs 2 or more"
    if config.reference == "start" and config.lora_rank is None:
        yield (
            "reference: start needs a fresh LoRA (lora_rank), whose base is the start without a copy; with "
            "reference: round each round refers to the model that sampled"
        )
    refused = {
        "stages": (config.stages, "its stages would each have rounds; run one after the other"),
        "flip_pairs": (config.flip_pairs, "it is noise in pairs of the data, and pairs come from samples"),
        "load_best": (config.load_best, "held-out rows say little of what `reward` is after"),
        "max_steps": (config.max_steps, "rounds and num_epochs (of each round's rows) say how long it is"),
        "pair_gap": (config.pair_gap == "logp", "samples are told apart by their scores"),
    }
    for name, (is_set, why) in refused.items():
        if is_set:
            yield f"{name}: not with rounds: {why}"


def only_with_rounds(config) -> Iterator[str]:
    """Keys that a training without rounds would not read."""
    for name in ("sample", "reward", "reference"):
        if config.rounds is None and getattr(config, name) is not None:
            yield f"{name}: read only with rounds, as in rounds: 10 (or by `fastdpo sample`)"
