"""Models that see images: which of their modules are the language model, and which are beside it."""

import re

import torch
from torch import nn
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from fastdpo.errors import ConfigError, ModelError
from fastdpo.model.source import auto_class, sees_images


def decoder_name(core) -> str:
    """The dotted name of the language model in a model that sees images. Raises ModelError where transformers
    does not tell it."""
    decoder = core.get_decoder()
    name = next((name for name, module in core.named_modules() if module is decoder), "")
    if not name or decoder is core.base_model:
        raise ModelError(
            f"model: which part of {type(core).__name__} is its language model is not known here; say "
            "freeze_vision: false, and leave memory out"
        )
    return name


def _is_language(core):
    """Whether a module or a weight of this name is of the language model or the lm_head."""
    decoder, head = decoder_name(core), core.get_output_embeddings()
    heads = [name for name, module in core.named_modules() if module is head]
    return lambda name: any(name == one or name.startswith(f"{one}.") for one in (decoder, *heads))


def weights_beside(core) -> dict[str, nn.Parameter]:
    """What images go through: the weights that are not of the language model; of a model that sees none,
    none."""
    if not sees_images(core.config):
        return {}
    is_language = _is_language(core)
    return {name: weight for name, weight in core.named_parameters() if not is_language(name)}


def freeze_vision(model) -> None:
    """Takes what images go through out of training. Raises ConfigError for a LoRA on it."""
    is_lora = hasattr(model, "peft_config")
    core = model.get_base_model() if is_lora else model
    for name, weight in weights_beside(core).items():
        if is_lora and weight.requires_grad:
            raise ConfigError(
                f"freeze_vision: the LoRA is also on what images go through ({name}); say freeze_vision: "
                "false, or name other lora_target_modules"
            )
        weight.requires_grad_(False)


def beside_towers(core, targets: str | list[str]) -> str | list[str]:
    """lora_target_modules, all-linear or names, that no module of a tower has: a pattern that peft compares
    with whole names, or these names. A pattern is left as it is."""
    is_language, head = _is_language(core), core.get_output_embeddings()
    modules = {name: module for name, module in core.named_modules() if is_language(name)}
    if targets == "all-linear":  # peft's rule
        linear = lambda module: isinstance(module, nn.Linear | Conv1D) and module is not head
        names = [name for name, module in modules.items() if linear(module)]
    elif isinstance(targets, list):
        names = [name for name in modules if any(f".{name}".endswith(f".{end}") for end in targets)]
        if not names:
            raise ConfigError(
                f"lora_target_modules: {', '.join(targets)} are modules of the vision tower alone; say "
                "freeze_vision: false"
            )
    else:
        return targets
    decoder = decoder_name(core)
    inside = [name for name in names if name.startswith(f"{decoder}.")]
    ends = sorted({name.rpartition(".")[2] for name in inside})
    others = sorted(set(names) - set(inside))
    pattern = "|".join(
        [rf"{re.escape(decoder)}\.(.*\.)?({'|'.join(map(re.escape, ends))})"] * bool(ends)
        + list(map(re.escape, others))
    )
    found = [name for name, _ in core.named_modules() if re.fullmatch(pattern, name)]
    return pattern if found == names else names


def unquantised(model_config) -> list[str] | None:
    """What `load_in_4bit` leaves whole in a model that sees images: the lm_head, the tower, the projector.
    None for another model: transformers' own choice."""
    if not sees_images(model_config):
        return None
    with torch.device("meta"), no_init_weights():
        core = auto_class(model_config).from_config(model_config)
    at, beside = core, []
    for part in (path := decoder_name(core).split(".")):
        where = path[: path.index(part)]
        beside += [".".join([*where, name]) for name, _ in at.named_children() if name != part]
        at = getattr(at, part)
    return beside
