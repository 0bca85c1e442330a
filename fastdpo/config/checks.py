"""What the values of a config must be, one by one and together."""

import math
import typing

from fastdpo.data.formats.layouts import layout_of
from fastdpo.errors import ConfigError
from fastdpo.values import as_bytes

_TRACKERS = ("tensorboard", "wandb", "trackio")


def check(config) -> None:
    """Raises ConfigError, naming the key and the way out."""
    for name in ("model", "data", "output_dir"):
        if not getattr(config, name):
            raise ConfigError(f"{name}: missing. Give it in the YAML file or as --{name} VALUE")
    for name, f in config.__dataclass_fields__.items():
        value, low = getattr(config, name), f.metadata["low"]
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name}: {value} is not a finite number")
        if value is not None and low is not None and value < low:
            raise ConfigError(f"{name}: {value} is below {low}")
        if typing.get_origin(f.type) is typing.Literal and value not in typing.get_args(f.type):
            raise ConfigError(f"{name}: {value!r} is not one of {', '.join(typing.get_args(f.type))}")
    if config.warmup_steps > 1 and config.warmup_steps != int(config.warmup_steps):
        raise ConfigError(
            f"warmup_steps: {config.warmup_steps} is neither a whole number nor a share below 1"
        )
    if config.num_epochs == 0:
        raise ConfigError("num_epochs: 0 would train nothing")
    if config.seed >= 2**32:
        raise ConfigError(f"seed: {config.seed} is not below 2^32")
    if config.load_best and config.eval_data is None:
        raise ConfigError("load_best: needs held-out rows to judge by; set eval_data")
    unknown = [name for name in config.trackers if name not in _TRACKERS]
    if unknown:
        raise ConfigError(f"report_to: {unknown[0]!r} is not one of {', '.join(_TRACKERS)}")
    if not 0 <= (config.label_smoothing or 0) < 0.5:
        raise ConfigError(f"label_smoothing: {config.label_smoothing} is not in [0, 0.5)")
    if config.flip_pairs > 1:
        raise ConfigError(f"flip_pairs: {config.flip_pairs} is a share, not over 1")
    if isinstance(config.eval_data, float) and not 0 < config.eval_data < 1:
        raise ConfigError(
            f"eval_data: {config.eval_data} is neither a data set nor a fraction between 0 and 1"
        )
    layout_of(config.data_format)
    _check_memory_keys(config)


def _check_memory_keys(config) -> None:
    for name in ("memory", "head_memory"):
        if getattr(config, name) is not None:
            as_bytes(name, getattr(config, name))
    level = config.gradient_checkpointing
    is_number = isinstance(level, int) and not isinstance(level, bool)
    if (isinstance(level, str) and level != "selective") or (is_number and level < 1):
        raise ConfigError(
            f"gradient_checkpointing: {level!r} is not true, false, a number of layers or selective"
        )
    is_lora = config.lora_rank is not None
    for name in ("use_dora", "use_rslora"):
        if getattr(config, name) and not is_lora:
            raise ConfigError(f"{name}: belongs to a fresh LoRA; set lora_rank")
    if config.pure_bf16 and (is_lora or config.adapter is not None):
        raise ConfigError("pure_bf16: a LoRA's weights stay in fp32 (they are few); leave the key out")
    if config.pure_bf16 and config.dtype == "fp32":
        raise ConfigError("pure_bf16: contradicts dtype: fp32")
    if config.optimizer_in_backward and config.max_grad_norm:
        raise ConfigError(
            "optimizer_in_backward: the norm of the whole gradient is never known, so it cannot be clipped; "
            "set max_grad_norm: 0"
        )
    if config.offload_optimizer and config.optim == "sgd":
        raise ConfigError("offload_optimizer: sgd has no states to keep in the host's memory")
    if config.offload_optimizer and config.optim.startswith("paged_"):
        raise ConfigError(
            f"offload_optimizer: {config.optim} moves its states to the host by itself; leave one of them out"
        )
