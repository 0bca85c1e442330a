"""What the values of a config must be, one by one and together."""

import math
import re
import typing
from collections.abc import Iterable, Iterator

from fastdpo.config.names import SAME
from fastdpo.config.rounds import sampling_problems
from fastdpo.data.chat.arguments import check_kwargs
from fastdpo.data.formats.layouts import layout_of
from fastdpo.errors import ConfigError
from fastdpo.values import as_bytes, not_one_of

_TRACKERS = ("tensorboard", "wandb", "trackio")


def problems(config) -> list[str]:
    """All that is wrong, each naming the key and the way out."""
    found = list(_one_by_one(config))
    return found + of_other_keys(found, _together(config))


def of_other_keys(found: Iterable[str], more: Iterable[str]) -> list[str]:
    """More problems, but for those of keys that have one already."""
    named = [text.split(":")[0] for text in found]
    return [text for text in more if text.split(":")[0] not in named]


def without(found: Iterable[str], wrong: Iterable[str]) -> list[str]:
    """The problems whose first sentence names none of these keys, which are wrong already: it may come of
    that."""
    named = [re.compile(rf"\b{re.escape(name)}\b") for name in wrong]
    return [text for text in found if not any(name.search(text.split(". ")[0]) for name in named)]


def said(call, *args) -> tuple[str, ...]:
    """The problems that a call raises."""
    try:
        call(*args)
    except ConfigError as error:
        return error.args
    return ()


def of_objective(values: dict) -> tuple[str, ...]:
    """What making the objective refuses, which is else told when a run starts."""
    if values.get("stages") or not values.keys() & {"objective", "objective_args", "beta", "label_smoothing"}:
        return ()
    from fastdpo.objectives.make import make_objective  # late: it imports torch

    args = {name: values.get(name) for name in ("beta", "label_smoothing")}
    args |= values.get("objective_args") or {}
    return said(make_objective, values.get("objective", "sigmoid"), args)


def _one_by_one(config) -> Iterator[str]:
    for name in ("model", "data", "output_dir"):
        if not getattr(config, name):
            yield f"{name}: missing. Give it in the YAML file or as --{name} VALUE"
    for name in ("data", "eval_data"):
        if isinstance(sets := getattr(config, name), list) and sets:
            if not all(sets):
                yield f"{name}: an empty name among {sets}"
            elif len(set(sets)) < len(sets):
                yield f"{name}: a data set is named twice among {sets}"
    for name, f in config.__dataclass_fields__.items():
        value, low = getattr(config, name), f.metadata["low"]
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{name}: {value} is not a finite number"
        elif None not in (value, low) and value < low:
            yield f"{name}: {value} is below {low}"
        elif typing.get_origin(f.type) is typing.Literal and value not in typing.get_args(f.type):
            yield str(not_one_of(name, value, typing.get_args(f.type), SAME.get(name, ())))
    for name in config.trackers:
        if name not in _TRACKERS:
            yield str(not_one_of("report_to", name, _TRACKERS))
    if config.ignore is not None and not isinstance(config.ignore, dict):
        yield f"ignore: {config.ignore!r} is read with a config alone, whose keys it names"
    yield from said(layout_of, config.data_format)
    yield from said(check_kwargs, config.chat_template_kwargs)
    for name in ("memory", "head_memory"):
        if getattr(config, name) is not None:
            yield from said(as_bytes, name, getattr(config, name))


def _together(config) -> Iterator[str]:
    steps = config.warmup_steps
    if math.isfinite(steps) and steps > 1 and steps != int(steps):
        yield f"warmup_steps: {steps} is neither a whole number nor a share below 1"
    if config.num_epochs == 0:
        yield "num_epochs: 0 would train nothing"
    if config.seed >= 2**32:
        yield f"seed: {config.seed} is not below 2^32"
    for name in ("adam_beta1", "adam_beta2"):
        if getattr(config, name) >= 1:
            yield f"{name}: {getattr(config, name)} is not below 1"
    noise, held_out = config.label_smoothing or 0, config.eval_data
    if config.load_best and held_out is None:
        yield "load_best: needs held-out rows to judge by; set eval_data"
    if not 0 <= noise < 0.5:
        yield f"label_smoothing: {noise} is not in [0, 0.5)"
    if config.flip_pairs > 1:
        yield f"flip_pairs: {config.flip_pairs} is a share, not over 1"
    if isinstance(held_out, float) and not (0 < held_out < 1 or held_out == max(held_out // 1, 1)):
        yield f"eval_data: {held_out} is neither a data set, a fraction nor a whole number of groups"
    yield from sampling_problems(config)
    yield from _memory(config)


def _memory(config) -> Iterator[str]:
    level = config.gradient_checkpointing
    is_number = isinstance(level, int) and not isinstance(level, bool)
    if level < 1 if is_number else isinstance(level, str) and level != "selective":
        yield f"gradient_checkpointing: {level!r} is not true, false, a number of layers or selective"
    if config.shard not in (True, False, "auto", "hybrid"):
        yield f"shard: {config.shard!r} is not true, false, auto or hybrid"
    is_lora = config.lora_rank is not None
    for name in ("use_dora", "use_rslora"):
        if getattr(config, name) and not is_lora:
            yield f"{name}: belongs to a fresh LoRA; set lora_rank"
    if config.pure_bf16 and (is_lora or config.adapter is not None):
        yield "pure_bf16: a LoRA's weights stay in fp32 (they are few); leave the key out"
    elif config.pure_bf16 and config.dtype == "fp32":
        yield "pure_bf16: contradicts dtype: fp32"
    if config.optimizer_in_backward and config.max_grad_norm:
        yield (
            "optimizer_in_backward: the norm of the whole gradient is never known, so it cannot be clipped; "
            "set max_grad_norm: 0"
        )
    if config.offload_optimizer and config.optim == "sgd":
        yield "offload_optimizer: sgd has no states to keep in the host's memory"
    elif config.offload_optimizer and config.optim.startswith("paged_"):
        way_out = "moves its states to the host by itself; leave one of them out"
        yield f"offload_optimizer: {config.optim} {way_out}"
