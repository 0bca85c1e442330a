"""Loads what a policy is made of: the model's config, its weights and its tokenizer."""

import contextlib
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from transformers import ProcessorMixin
from transformers.configuration_utils import PreTrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from fastdpo.console.formatting import gigabytes
from fastdpo.data.chat.named import in_pieces, template_of
from fastdpo.distributed.world import ALONE, World
from fastdpo.errors import ConfigError, ModelError
from fastdpo.model import source
from fastdpo.model.activations import set_up_activations
from fastdpo.model.adapters import add_lora, find_start, load_adapter, tell_tied
from fastdpo.model.lm_head import named_budget
from fastdpo.model.policy import Policy
from fastdpo.model.processors import load_processor, template_beside
from fastdpo.model.quantised import check_quantisation, loading_in_4bit, set_up_4bit
from fastdpo.model.rewards import RewardPolicy
from fastdpo.model.sharding import shard
from fastdpo.model.source import sees_images
from fastdpo.model.spec import ModelSpec
from fastdpo.model.towers import freeze_vision, unquantised


def resolve_dtype(name: str) -> torch.dtype:
    """auto | bf16 | fp32 -> the compute dtype on this machine."""
    if name == "auto":
        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def load_model_config(spec: ModelSpec) -> PreTrainedConfig:
    """The model's transformers config. Raises ModelError, or ConfigError for a max_length beyond it."""
    start = find_start(spec)
    found = start.source()
    model_config = source.load_config(found)
    if spec.rewards:
        source.as_reward_model(found, model_config)
    text_config = model_config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None)
    rope = getattr(text_config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        # These pick their frequencies by a batch's longest row, beyond the original length: one row would
        # change another's result.
        limit = rope.get("original_max_position_embeddings", limit)
    if limit and spec.max_length > limit:
        raise ConfigError(
            f"max_length: {spec.max_length} is more than the {limit} positions of {spec.model}; "
            f"set max_length: {limit} or less"
        )
    has_lora = start.adapter is not None or spec.lora_rank is not None
    if not spec.rewards and source.is_classifier(model_config):
        raise ModelError(
            f"model: {start.model!r} is a classifier, and writes nothing: name it as a scorer, or as `reward`"
        )
    if spec.load_in_4bit and found.gguf:
        raise ConfigError(
            f"load_in_4bit: {start.model} is a GGUF file, which is dequantised as it is loaded; leave the "
            "key out, or give the model that it was made of"
        )
    check_quantisation(spec.load_in_4bit, has_lora, start.model, model_config)
    return model_config


def check_stored(spec: ModelSpec) -> None:
    """Raises ModelError where the weights on this machine are not whole, without loading them."""
    source.check_weights(find_start(spec).source())


def load_policy(
    spec: ModelSpec, console: Console, world: World = ALONE, processor: ProcessorMixin | None = None
) -> Policy:
    """Loads the model, freezes what is not trained, adds a LoRA (a fresh one, or one to start from)
    where asked; where ranks shard it, a whole model at a time on each node. processor: of load_processor,
    for a model that sees images. Raises ModelError."""
    with world.in_turn() if world.sharded else contextlib.nullcontext():
        policy = _loaded(spec, console, world)
    policy.world, policy.processor, policy.saved_processor = world, processor, processor
    world.make_equal(policy.trained())
    budget = named_budget(spec.head_memory) or policy.default_budget()
    policy.head_budget = int(world.min(budget))  # a step is cut alike on all ranks
    return policy


def _loaded(spec: ModelSpec, console: Console, world: World) -> Policy:
    start = find_start(spec)
    dtype = torch.bfloat16 if spec.pure_bf16 else resolve_dtype(spec.dtype)
    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    model_config = load_model_config(spec)
    in_4bit = spec.load_in_4bit or bool(getattr(model_config, "quantization_config", None))
    dropped = switch_off_dropout(model_config)
    tell_loading(start.model, console)
    if spec.rewards:
        torch.manual_seed(spec.seed)  # of a new head
    model: Any = source.load_weights(
        *(start.source(), model_config, console, spec.rewards),
        dtype=dtype if start.adapter or spec.lora_rank or spec.pure_bf16 else torch.float32,
        **(loading_in_4bit(model_config, dtype, device, unquantised(model_config)) if in_4bit else {}),
    )
    if in_4bit:
        set_up_4bit(model, dtype, console)
    elif not world.sharded:
        model.to(device)
    if dropped:
        console.print(f"dropout set to 0 for training: {', '.join(dropped)}")
    if start.adapter:
        model = load_adapter(model, start, console)
    elif spec.lora_rank is not None:
        model = add_lora(model, spec)
    if sees_images(model_config) and spec.freeze_vision:
        freeze_vision(model)
    tell_tied(model, console)
    model.train()
    for line in set_up_activations(model, spec):
        console.print(line, highlight=False)
    if spec.rewards:
        policy: Policy = RewardPolicy(model, dtype, dropped, pad=load_tokenizer(spec).pad_token_id)
    else:
        policy = Policy(model, dtype, dropped)
    if world.sharded:
        shard(policy, world)
    return policy


def tell_loading(model: str, console: Console) -> None:
    """Before weights that may take long: over 2 GB, or to be dequantised, or of the hub, which may have to be
    fetched."""
    path = Path(model)
    size = sum(one.stat().st_size for one in ([path] if path.is_file() else path.glob("*.safetensors")))
    if size > 2e9 or not path.is_dir():
        what = f" of {model}, {gigabytes(size)}" if size else f" of {model}"
        console.print(escape(f"loading the weights{what}"), highlight=False, soft_wrap=True)


def load_tokenizer(spec: ModelSpec, console: Console | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of the model, or of the adapter to start from where that has one, with the
    spec's chat template where it names one."""
    found = find_start(spec).tokenizer
    tokenizer = source.load_tokenizer(found, "model")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = template_beside(found)
    if spec.rewards and tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError("model: its tokenizer has neither EOS nor padding, which tell a row's end")
        tokenizer.pad_token = tokenizer.eos_token  # as TRL's
    if spec.chat_template is not None:
        tokenizer.chat_template = template_of(spec.chat_template, tokenizer.chat_template)
        if console and (split := in_pieces(spec.chat_template, tokenizer)):
            sizes = ", ".join(f"{text} ({size} tokens)" for text, size in split.items())
            text = (
                f"chat_template: no single tokens of this tokenizer: {sizes}; the model learns their pieces"
            )
            console.print(escape(text), style="yellow", highlight=False, soft_wrap=True)
    return tokenizer


def switch_off_dropout(model_config: PreTrainedConfig) -> dict[str, float]:
    """Sets every dropout probability (and layerdrop, and router noise) of a transformers config to 0;
    returns what they were.

    A shared prompt would share one dropout mask between responses, and DPO compares two passes.
    """
    changed = {}
    text_config = model_config.get_text_config()
    towers = {name: getattr(model_config, name, None) for name in model_config.sub_configs}
    parts = {"": text_config} | {f"{name}.": part for name, part in towers.items() if part is not text_config}
    for where, part in parts.items():
        for name, value in part.to_dict().items() if part is not None else ():
            is_random = any(word in name for word in ("dropout", "pdrop", "layerdrop", "jitter_noise"))
            if is_random and isinstance(value, float) and value > 0:
                changed[f"{where}{name}"] = value
                setattr(part, name, 0.0)
    return changed


def restore_dropout(model_config: PreTrainedConfig, dropout: dict[str, float]) -> None:
    """Undoes switch_off_dropout, which returned `dropout`."""
    for name, value in dropout.items():
        part, _, name = name.rpartition(".")
        setattr(getattr(model_config, part) if part else model_config.get_text_config(), name, value)


def load_tools(
    spec: ModelSpec, console: Console | None = None
) -> tuple[PreTrainedTokenizerBase, ProcessorMixin | None]:
    """(the tokenizer, the processor of a model that sees images): what rows are read with."""
    tokenizer = load_tokenizer(spec, console)
    return tokenizer, load_processor(spec, tokenizer)
