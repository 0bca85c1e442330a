"""What the values of a config must be, one by one and together."""

import math
import typing

from fastdpo.config.names import SAME
from fastdpo.data.chat.arguments import check_kwargs
from fastdpo.data.formats.layouts import layout_of
from fastdpo.errors import ConfigError
from fastdpo.values import as_bytes, not_one_of

_TRACKERS = ("tensorboard", "wandb", "trackio")


def _refuse(is_wrong, message: str) -> None:
    if is_wrong:
        raise ConfigError(message)


def check(config) -> None:
    """Raises ConfigError, naming the key and the way out."""
    for name in ("data", "eval_data"):
        if isinstance(sets := getattr(config, name), list):
            _refuse(not all(sets), f"{name}: an empty name among {sets}")
            _refuse(len(set(sets)) < len(sets), f"{name}: a data set is named twice among {sets}")
    for name in ("model", "data", "output_dir"):
        if not getattr(config, name):
            raise ConfigError(f"{name}: missing. Give it in the YAML file or as --{name} VALUE")
    for name, f in config.__dataclass_fields__.items():
        value, low = getattr(config, name), f.metadata["low"]
        is_endless = isinstance(value, float) and not math.isfinite(value)
        _refuse(is_endless, f"{name}: {value} is not a finite number")
        _refuse(None not in (value, low) and value < low, f"{name}: {value} is below {low}")
        if typing.get_origin(f.type) is typing.Literal and value not in typing.get_args(f.type):
            raise not_one_of(name, value, typing.get_args(f.type), SAME.get(name, ()))
    steps = config.warmup_steps
    whole_or_share = steps <= 1 or steps == int(steps)
    _refuse(not whole_or_share, f"warmup_steps: {steps} is neither a whole number nor a share below 1")
    _refuse(config.num_epochs == 0, "num_epochs: 0 would train nothing")
    _refuse(config.seed >= 2**32, f"seed: {config.seed} is not below 2^32")
    if config.load_best and config.eval_data is None:
        raise ConfigError("load_best: needs held-out rows to judge by; set eval_data")
    for name in config.trackers:
        if name not in _TRACKERS:
            raise not_one_of("report_to", name, _TRACKERS)
    noise, held_out = config.label_smoothing or 0, config.eval_data
    _refuse(not 0 <= noise < 0.5, f"label_smoothing: {noise} is not in [0, 0.5)")
    _refuse(config.flip_pairs > 1, f"flip_pairs: {config.flip_pairs} is a share, not over 1")
    if isinstance(held_out, float) and not (0 < held_out < 1 or held_out == max(int(held_out), 1)):
        raise ConfigError(
            f"eval_data: {held_out} is neither a data set, a fraction nor a whole number of groups"
        )
    layout_of(config.data_format)
    check_kwargs(config.chat_template_kwargs)
    _check_memory_keys(config)


def _check_memory_keys(config) -> None:
    for name in ("memory", "head_memory"):
        if getattr(config, name) is not None:
            as_bytes(name, getattr(config, name))
    level = config.gradient_checkpointing
    is_number = isinstance(level, int) and not isinstance(level, bool)
    is_odd = level < 1 if is_number else isinstance(level, str) and level != "selective"
    way_out = "is not true, false, a number of layers or selective"
    _refuse(is_odd, f"gradient_checkpointing: {level!r} {way_out}")
    is_lora = config.lora_rank is not None
    for name in ("use_dora", "use_rslora"):
        if getattr(config, name) and not is_lora:
            raise ConfigError(f"{name}: belongs to a fresh LoRA; set lora_rank")
    if config.pure_bf16:
        has_lora = is_lora or config.adapter is not None
        _refuse(has_lora, "pure_bf16: a LoRA's weights stay in fp32 (they are few); leave the key out")
        _refuse(config.dtype == "fp32", "pure_bf16: contradicts dtype: fp32")
    if config.optimizer_in_backward and config.max_grad_norm:
        raise ConfigError(
            "optimizer_in_backward: the norm of the whole gradient is never known, so it cannot be clipped; "
            "set max_grad_norm: 0"
        )
    if config.offload_optimizer:
        optim, way_out = config.optim, "moves its states to the host by itself; leave one of them out"
        _refuse(optim == "sgd", "offload_optimizer: sgd has no states to keep in the host's memory")
        _refuse(optim.startswith("paged_"), f"offload_optimizer: {optim} {way_out}")
