"""The config as people write it: a YAML file, values as words, the documentation's table of keys."""

import dataclasses
from pathlib import Path

import yaml

from fastdpo.config.keys import FIELDS, Config
from fastdpo.errors import ConfigError

GROUPS = {  # of the help and of docs/keys.md: each key once
    "Data": "model adapter data data_format eval_data chat_template chat_template_kwargs pairs pair_gap "
    "flip_pairs max_length truncation image_max_pixels media_dir data_cache strict".split(),
    "Objective": "objective objective_args beta label_smoothing router_aux_loss_coef reference_cache "
    "stages".split(),
    "Rounds": "rounds sample reward reference".split(),
    "Optimizer": "learning_rate warmup_steps lr_scheduler_type lr_scheduler_kwargs optim adam_beta1 "
    "adam_beta2 adam_epsilon weight_decay max_grad_norm batch_size num_epochs max_steps "
    "freeze_vision seed".split(),
    "Memory": "memory dtype max_tokens head_memory gradient_checkpointing activation_offloading tiled_mlp "
    "offload_optimizer optimizer_in_backward pure_bf16 shard load_in_4bit".split(),
    "LoRA": "lora_rank lora_alpha lora_target_modules use_dora use_rslora".split(),
    "Run": "output_dir push_to_hub eval_steps logging_steps save_steps save_total_limit load_best report_to "
    "samples resume overwrite ignore".split(),
}


class _UniqueKeys(yaml.SafeLoader):
    """yaml.safe_load that refuses a key given twice, where YAML would silently keep the last."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        twice = [key for i, key in enumerate(keys) if key in keys[:i]]
        if twice:
            raise yaml.YAMLError(f"the key {twice[0]!r} is given twice (line {node.start_mark.line + 1} on)")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict:
    """A file of `key: value` lines. Raises ConfigError."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error  # without the path once more
        raise ConfigError(f"cannot read the config file {path}: {reason}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected lines of `key: value`, got a {type(values).__name__}")
    if odd := [key for key in values if not isinstance(key, str)]:
        raise ConfigError(f"{path}: YAML reads the key {odd[0]!r} as no text; write it in quotes")
    return values


def keys_table() -> str:
    """The documentation's tables of keys, a group each, as Markdown."""
    lines = []
    for group, names in GROUPS.items():
        lines += ["", f"## {group}", "", "| key | default | |", "|---|---|---|"]
        for name in names:
            default = f"`{word}`" if (word := default_word(name)) else ""
            doc = FIELDS[name].metadata["doc"].replace("|", chr(92) + "|")
            lines.append(f"| `{name}` | {default} | {doc} |")
    return "\n".join(lines[1:])


def default_word(name: str) -> str:
    """A key's default as one would write it; "" where there is none to write."""
    default = FIELDS[name].default
    return "" if default in (None, "") else to_word(default)


def to_word(value) -> str:
    """A value as one would write it in YAML or after a flag."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def to_yaml(config: Config) -> str:
    """The resolved config as YAML, readable by `read_yaml`; how it was started is no part of it."""
    values = dataclasses.asdict(config)
    kept = {name: value for name, value in values.items() if name not in ("resume", "overwrite")}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
