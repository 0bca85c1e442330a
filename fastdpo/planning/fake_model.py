"""The policy of a config, as trainer.py would load it, of tensors without data. No weight file is read."""

import dataclasses
import re

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from fastdpo.config.keys import Config
from fastdpo.model.activations import set_up_activations
from fastdpo.model.adapters import add_lora, find_start, steady_dora
from fastdpo.model.policy import Policy, switch_off_dropout
from fastdpo.model.quantised import quantised_linears
from fastdpo.model.support import sharing_refusal
from fastdpo.planning import stand_ins
from fastdpo.planning.allocations import Tracker
from fastdpo.planning.target import Target
from fastdpo.values import as_bytes


class FakePolicy(Policy):
    """A Policy on fake tensors that plans its head as the target would run it."""

    target: Target

    @property
    def head_backend(self) -> str:
        return self.target.head_backend(self.dtype, lora=hasattr(self.head.module, "base_layer"))


def fake_policy(
    config: Config, model_config, target: Target, mode, tracker: Tracker, device="cpu"
) -> FakePolicy:
    """A policy of fake tensors of `mode`, which say they are on `device`. model_config: the model's
    transformers config, which this call does not change."""
    model_config = type(model_config).from_dict(model_config.to_dict())
    switch_off_dropout(model_config)
    dtype = target.dtype(config)
    frozen = config.lora_rank is not None or find_start(config).adapter is not None
    kept = dtype if frozen or config.pure_bf16 else torch.float32
    # built where tensors have no data either: peft moves parameters, which fake ones refuse
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(model_config, dtype=kept)
        model.tie_weights()  # as initialising would have
        linears = quantised_linears(model) if config.load_in_4bit else {}
        if frozen:
            model = _with_lora(model, config)
    with mode:
        _materialise(model, linears, dtype, tracker, device)
        model.train()
        set_up_activations(model, config)
        policy = FakePolicy(model, dtype, head_budget=as_bytes("head_memory", config.head_memory))
        policy.target = target
        if sharing_refusal(model_config) is None:
            policy.set_sharing(True)
            if not target.is_cpu:
                policy.core.set_attn_implementation(stand_ins.NAME)
    return policy


def head_policy(config: Config, model_config, target: Target) -> FakePolicy:
    """A policy that can only plan its head: of one layer, on no device."""
    small = with_layers(model_config, 1)
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
        if _lora_on_head(model, config):
            model = _with_lora(model, config)
        elif config.lora_rank is not None or find_start(config).adapter is not None:
            model.requires_grad_(False)
    policy = FakePolicy(model, target.dtype(config), head_budget=as_bytes("head_memory", config.head_memory))
    policy.target = target
    return policy


def _lora_on_head(model, config: Config) -> bool:
    """Whether a LoRA, or a whole copy in an adapter, trains the lm_head. peft's rule: a text is a pattern of
    the whole name, a list holds its ends."""
    start = find_start(config)
    if start.adapter is None and config.lora_rank is None:
        return False
    saved = start.settings.get("modules_to_save") or ()
    targets = config.lora_target_modules if start.adapter is None else start.settings.get("target_modules")
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    if isinstance(targets, str):
        named = targets != "all-linear" and re.fullmatch(targets, head) is not None
    else:
        named = any(f".{head}".endswith(f".{target}") for target in targets or ())
    return named or any(f".{head}".endswith(f".{name}") for name in saved)


def with_layers(model_config, layers: int):
    """The same model with its first so many layers."""
    values = model_config.to_dict()
    text = values.get("text_config") or values
    text["num_hidden_layers"] = layers
    for name, value in text.items():
        if name == "layer_types" and value:
            text[name] = value[:layers]
    return type(model_config).from_dict(values)


def _with_lora(model, config: Config):
    start = find_start(config)
    if start.adapter is None:
        return add_lora(model, config)
    import peft

    fields = peft.LoraConfig.__dataclass_fields__
    lora = peft.LoraConfig(**{k: v for k, v in start.settings.items() if k in fields and k != "peft_type"})
    lora.inference_mode = False
    model = peft.get_peft_model(model, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    steady_dora(model, fresh=False)
    return model


def _materialise(model: nn.Module, linears: dict, dtype: torch.dtype, tracker: Tracker, device) -> None:
    """Gives every parameter and buffer a fake tensor (tied ones the same), or a stand-in in 4 bits."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    for name, (out, inside) in linears.items():
        holder, _, last = name.rpartition(".")
        parent = base.get_submodule(holder)
        module = getattr(parent, last)
        plain = getattr(module, "base_layer", module)
        small = stand_ins.Linear4bit(plain, out, inside, dtype, tracker, device)
        if plain is module:
            setattr(parent, last, small)
        else:
            module.base_layer = small
    made: dict[int, torch.Tensor] = {}

    def fake(tensor):
        if id(tensor) not in made:
            new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            made[id(tensor)] = new
        return made[id(tensor)]

    for module in model.modules():
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if tensor is not None:
                    kind[name] = fake(tensor)


def fake_batch(record, mode):
    """A packed batch (or layout) with fake tensors for its own."""
    changed = {}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if isinstance(value, torch.Tensor):
            changed[field.name] = mode.from_tensor(value, static_shapes=True)
        elif dataclasses.is_dataclass(value):
            changed[field.name] = fake_batch(value, mode)
        elif isinstance(value, tuple) and value and isinstance(value[0], torch.Tensor):
            changed[field.name] = tuple(mode.from_tensor(v, static_shapes=True) for v in value)
    return dataclasses.replace(record, **changed)
