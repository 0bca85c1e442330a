"""Which model is meant: a run's, an adapter, a whole model; and what its run's config says of it."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from fastdpo.config.keys import FIELDS, Config, from_values
from fastdpo.config.reading import read_yaml
from fastdpo.config.rewards import OBJECTIVE
from fastdpo.data.store.stored import facts_of
from fastdpo.errors import ConfigError, ModelError
from fastdpo.model.adapters import find_start
from fastdpo.model.loading import (
    check_stored,
    load_model_config,
    load_policy,
    load_tokenizer,
    resolve_dtype,
)
from fastdpo.model.policy import Policy
from fastdpo.model.processors import load_processor
from fastdpo.model.spec import ModelSpec
from fastdpo.model.support import prepare
from fastdpo.records import Groups
from fastdpo.training.job import objective_of, part
from fastdpo.training.trainer import check_vocabulary

# What of a run's config an evaluation goes by. What wrote the turns is in its model's tokenizer.
_OBJECTIVE = "objective objective_args beta label_smoothing".split()
_KEPT = [
    *_OBJECTIVE,
    *"max_length truncation data_format chat_template_kwargs max_tokens head_memory".split(),
    *"image_max_pixels media_dir".split(),
]
_KEPT += "dtype pure_bf16 load_in_4bit reference_cache data_cache".split()


@dataclass(frozen=True)
class Named:
    """A model by its name."""

    name: str  # as it was given
    key: str  # what for: model, reference or versus
    spec: ModelSpec
    run: Path | None = None  # the run that trained it
    keys: dict[str, Any] = field(default_factory=dict)  # the run's, of _KEPT
    trained_from: ModelSpec | None = None  # its default reference
    stages: int = 1  # of its run

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Inside, errors about `model` are about what this model is given as."""
        try:
            yield
        except (ModelError, ConfigError) as error:
            kind, text = type(error), str(error)
            own = text.startswith("model: ") and self.key != "model"
            raise kind(f"{self.key}{text.removeprefix('model')}" if own else text) from None

    def is_on(self, reference: "Named") -> bool:
        """Whether the reference is this model without its adapter."""
        start, other = find_start(self.spec), find_start(reference.spec)
        same = os.path.realpath(start.model) == os.path.realpath(other.model)
        in_4bit = self.spec.load_in_4bit == reference.spec.load_in_4bit
        return start.adapter is not None and other.adapter is None and same and in_4bit


def named(name: str, key: str, **given: Any) -> Named:
    """The model of this name; given: keys that win over its run's. Raises ConfigError or ModelError where it
    is not there, or not whole."""
    path, keys, stages = Path(os.path.expanduser(name)), dict[str, Any](), 1
    run = next((some for some in (path, path.absolute().parent) if _is_run(some)), None)
    run = run if run == path or path.name == "model" else None
    folder = str(path / "model") if run == path and (path / "model").is_dir() else name
    config = None
    if run is not None:
        read = read_yaml(run / "config.yaml")
        config = from_values({key: value for key, value in read.items() if key in FIELDS})
        last = config.per_stage()[-1]
        keys, stages = {key: getattr(last, key) for key in _KEPT}, len(config.per_stage())
    of_samples = config is not None and "response scores" in objective_of(last).needs  # and of no rows
    if given.get("objective") is not None or of_samples:
        keys |= dict.fromkeys(_OBJECTIVE)
    keys |= {key: value for key, value in given.items() if value is not None}
    in_bf16 = keys.pop("pure_bf16", None)
    found = Named(name, key, part(ModelSpec, _config(folder, keys)), run, keys, stages=stages)
    if given.get("objective") == OBJECTIVE:
        raise ConfigError(f"objective: {OBJECTIVE} is of reward models, which `fastdpo reward` trains")
    if found.spec.rewards:
        raise ConfigError(f"{key}: {name} is a reward model, which says nothing; give it as --scorer")
    with found.told():
        start = find_start(found.spec)
        load_model_config(found.spec)
        check_stored(found.spec)
    if config is not None:
        before = _config(config.model, keys | {"adapter": config.adapter})
        found = replace(found, trained_from=_settled(part(ModelSpec, before), in_bf16))
    elif start.adapter is not None:
        found = replace(found, trained_from=_settled(part(ModelSpec, _config(start.model, keys)), in_bf16))
    return replace(found, spec=_settled(found.spec, in_bf16))


def _settled(spec: ModelSpec, in_bf16: bool | None) -> ModelSpec:
    """Whole weights as the run had them, for the reference cache knows them by their dtype; of no run: in the
    dtype that is computed in, for half the bytes."""
    if find_start(spec).adapter is not None or spec.load_in_4bit:
        return spec
    computed = resolve_dtype(spec.dtype) is torch.bfloat16
    return replace(spec, pure_bf16=computed if in_bf16 is None else in_bf16)


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


def _config(model: str, keys: dict[str, Any]) -> Config:
    """Of an evaluation: the data are not read by it."""
    given = {name: value for name, value in keys.items() if value is not None}
    return from_values(given | {"model": model, "data": "rows"})


def config_of(model: Named, data: str | list[str]) -> Config:
    """What its rows are read and scored by."""
    return replace(_config(model.spec.model, model.keys), data=data)


def reference_of(
    model: Named, name: str | None, key: str = "reference", way_out: str = "name it by --reference"
) -> Named | None:
    """What a model is compared with: the one named, or what it was trained from; None where neither is
    known. key: what it is called; way_out: what to do where what it was trained from is not there."""
    if name is not None:
        return named(name, key, **alike(model))
    if model.trained_from is None:
        return None
    spec = model.trained_from
    found = Named(spec.model if spec.adapter is None else spec.adapter, key, spec)
    if model.is_on(found):  # its base is loaded with it
        return found
    try:
        with found.told():
            load_model_config(spec)
            check_stored(spec)
    except ModelError as error:
        raise ModelError(f"{error}; it is what {model.name} was trained from: {way_out}") from None
    return found


def alike(model: Named) -> dict[str, Any]:
    """The keys by which another model computes as this one."""
    bf16 = None if find_start(model.spec).adapter is not None else model.spec.pure_bf16
    return {"max_length": model.spec.max_length, "dtype": model.spec.dtype, "pure_bf16": bf16}


def loaded(model: Named, groups: Groups, console: Console) -> Policy:
    """Its weights, ready to score and to answer. Raises ModelError."""
    with model.told():
        processor = load_processor(model.spec, load_tokenizer(model.spec))
        policy = load_policy(model.spec, console, processor=processor)
        policy.model.requires_grad_(False).eval()
        check_vocabulary(policy, groups)
        try:
            prepare(policy, groups, console)
        except ModelError:
            _check_weights(policy)
            raise
    return policy


def _check_weights(policy: Policy) -> None:
    """Raises ModelError that names the first weight with entries that are not finite."""
    for name, weight in policy.model.named_parameters():
        if weight.is_floating_point() and not bool(weight.isfinite().all()):
            raise ModelError(f"model: {name} has entries that are not finite numbers; train it again")


def check_same_tokens(ours, theirs, groups: Groups, names: tuple[str, str]) -> None:
    """Raises ConfigError where two tokenizers do not mean the same by the ids that rows are made of."""
    ids = list(range(int(np.max(facts_of(groups).largest)) + 1))
    for i, a, b in zip(ids, ours.convert_ids_to_tokens(ids), theirs.convert_ids_to_tokens(ids)):
        if a != b:
            one, other = names
            raise ConfigError(
                f"{one} and {other} have different tokenizers (token {i} is {a!r} in the one, {b!r} in the "
                "other), and log-probs of other tokens do not compare"
            )
