"""The policy of a config, as trainer.py would load it, of tensors without data. No weight file is read."""

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.initialization import no_init_weights

from fastdpo.config.keys import Config
from fastdpo.model.activations import decoder_layers, set_up_activations, towers_layers
from fastdpo.model.adapters import add_lora, find_start, steady_dora
from fastdpo.model.attention import by_part
from fastdpo.model.lm_head import named_budget
from fastdpo.model.loading import switch_off_dropout
from fastdpo.model.policy import Policy
from fastdpo.model.quantised import nf4_bytes, quantised_linears
from fastdpo.model.source import auto_class, sees_images
from fastdpo.model.spec import ModelSpec
from fastdpo.model.support import sharing_refusal
from fastdpo.model.towers import freeze_vision, unquantised
from fastdpo.planning import stand_ins
from fastdpo.planning.allocations import Tracker
from fastdpo.planning.target import CONTEXT, Target
from fastdpo.training.job import part


class FakePolicy(Policy):
    """A Policy on fake tensors that plans its head as the target would run it. loaded: bytes of the whole
    model's weights there."""

    def __init__(self, model, config: Config, target: Target, loaded: int = 0):
        super().__init__(model, target.dtype(config), head_budget=named_budget(config.head_memory))
        self.target, self.loaded = target, loaded
        self.head_budget = self.head_budget or self.default_budget()

    def free_memory(self) -> int | None:
        """As a run finds it once its model is loaded."""
        memory = self.target.memory
        return None if memory is None else max(0, memory - CONTEXT - self.loaded)

    @property
    def head_backend(self) -> str:
        return self.target.head_backend(self.dtype, lora=hasattr(self.head.module, "base_layer"))


def trains_all(config: Config) -> bool:
    return config.lora_rank is None and find_start(part(ModelSpec, config)).adapter is None


def whole_model(model_config, dtype: torch.dtype | None = None):
    """The model of a transformers config as a run loads it, tied as initialising would have."""
    model = auto_class(model_config).from_config(model_config, dtype=dtype)
    model.tie_weights()
    return model


def _kept(config: Config, target: Target) -> torch.dtype:
    """What weights are kept in, those of a frozen tower too."""
    return torch.float32 if trains_all(config) and not config.pure_bf16 else target.dtype(config)


def fake_policy(
    config: Config, model_config, target: Target, mode, tracker: Tracker, device="cpu"
) -> FakePolicy:
    """A policy of fake tensors of `mode`, which say they are on `device`. model_config: the model's
    transformers config, which this call does not change."""
    model_config = type(model_config).from_dict(model_config.to_dict())
    switch_off_dropout(model_config)
    dtype = target.dtype(config)
    # built where tensors have no data either: peft moves parameters, which fake ones refuse
    with torch.device("meta"), no_init_weights():
        model = whole_model(model_config, _kept(config, target))
        linears = quantised_linears(model, unquantised(model_config)) if config.load_in_4bit else {}
        model = _trained(model, config)
        base = model.get_base_model() if hasattr(model, "peft_config") else model
    with mode:
        for name, (out, inside) in linears.items():
            name += ".base_layer" if hasattr(base.get_submodule(name), "base_layer") else ""
            plain = base.get_submodule(name)
            base.set_submodule(name, stand_ins.Linear4bit(plain, out, inside, dtype, tracker, device))
        _materialise(model, device)
        model.train()
        set_up_activations(model, part(ModelSpec, config))
        policy = FakePolicy(model, config, target)
        if sharing_refusal(model_config) is None:
            policy.set_sharing(True)
            if not target.is_cpu:
                policy.core.set_attn_implementation(by_part(policy.core.config, stand_ins.NAME))
    return policy


def head_policy(
    config: Config, model_config, target: Target, loaded: int | None = None, processor: Any = None
) -> FakePolicy:
    """A policy that can only plan its head, and pack: of one layer, on no device. loaded: bytes of weights
    beside it, where they are not the whole model's. processor: the model's, where rows have images."""
    with torch.device("meta"), no_init_weights():
        model = whole_model(with_layers(model_config, 1), torch.float32)
        if loaded is None:
            layers = model_config.get_text_config().num_hidden_layers
            loaded = _loaded_bytes(model, config, layers, target)
        if not trains_all(config):
            on_head = _lora_on_head(model, config)
            model = _with_lora(model, config) if on_head else model.requires_grad_(False)
    policy = FakePolicy(model, config, target, loaded)
    policy.processor, policy.share = processor, sharing_refusal(model_config, processor) is None
    return policy


def with_head_memory(config: Config, model_config, target: Target, loaded: int | None = None) -> Config:
    """The config with the head_memory of a run of it: some layers of the model would not tell. loaded: see
    head_policy."""
    return replace(config, head_memory=f"{head_policy(config, model_config, target, loaded).head_budget}B")


@dataclass(frozen=True)
class Unit:
    """Weights that are gathered at once where they are sharded."""

    size: int  # bytes of all, as they are kept
    trained: int  # how many train


def units(config: Config, model_config, target: Target) -> tuple[Unit, Unit]:
    """(one decoder layer, what is in none: embedding, last norm and lm_head, and a projector), a LoRA of
    theirs included. A tower's layers are in neither: rows without images gather none."""
    with torch.device("meta"), no_init_weights():
        model = _trained(whole_model(with_layers(model_config, 1), _kept(config, target)), config)
    core = model.get_base_model() if hasattr(model, "peft_config") else model
    inside = {id(p) for p in decoder_layers(core)[0].parameters()}
    beside = {id(p) for layer in towers_layers(core) for p in layer.parameters()}
    left = [p for p in model.parameters() if id(p) not in beside]
    parts = ([p for p in left if (id(p) in inside) is is_layer] for is_layer in (True, False))
    layer, root = (
        Unit(sum(p.numel() * p.itemsize for p in part), sum(p.numel() for p in part if p.requires_grad))
        for part in parts
    )
    return layer, root


def _loaded_bytes(model, config: Config, layers: int, target: Target) -> int:
    """Of the weights of a model of so many layers as a run loads them; model: its first layer."""
    itemsize = _kept(config, target).itemsize
    size = lambda module: sum(p.numel() for p in module.parameters()) * itemsize
    saved = 0
    if config.load_in_4bit:
        sizes = quantised_linears(model, unquantised(model.config)).values()
        saved = sum(out * inside * itemsize - nf4_bytes(out, inside) for out, inside in sizes)
    return size(model) + (layers - 1) * sum(map(size, decoder_layers(model)[:1])) - layers * saved


def _lora_on_head(model, config: Config) -> bool:
    """Whether a LoRA, or a whole copy in an adapter, trains the lm_head. peft's rule: a text is a pattern of
    the whole name, a list holds its ends."""
    start = find_start(part(ModelSpec, config))
    targets = config.lora_target_modules if start.adapter is None else start.settings.get("target_modules")
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    if isinstance(targets, str):
        targets = [head] if targets != "all-linear" and re.fullmatch(targets, head) else []
    named = [*(targets or []), *(start.settings.get("modules_to_save") or [])]
    return any(f".{head}".endswith(f".{name}") for name in named)


def with_layers(model_config, layers: int):
    """The same model with its first so many layers."""
    values = model_config.to_dict()
    text = values.get("text_config") or values
    text["num_hidden_layers"] = layers
    if text.get("layer_types"):
        text["layer_types"] = text["layer_types"][:layers]
    return type(model_config).from_dict(values)


def _trained(model, config: Config):
    """The model with what trains of it: a LoRA's weights or all, but not a frozen tower's."""
    model = model if trains_all(config) else _with_lora(model, config)
    if sees_images(model.config) and config.freeze_vision:
        freeze_vision(model)
    return model


def _with_lora(model, config: Config):
    """A fresh LoRA, or one as that of the adapter to start from."""
    spec = part(ModelSpec, config)
    start = find_start(spec)
    if start.adapter is None:
        return add_lora(model, spec)
    import peft

    lora = peft.PeftConfig.from_pretrained(str(start.adapter))
    lora.inference_mode = False
    model = peft.get_peft_model(model, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    steady_dora(model, fresh=False)
    return model


def _materialise(model: nn.Module, device) -> None:
    """Gives every parameter and buffer a fake tensor, tied ones the same."""
    made: dict[int, torch.Tensor] = {}

    def fake(tensor):
        if id(tensor) not in made:
            new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            weight = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad) if weight else new
        return made[id(tensor)]

    for module in model.modules():
        for kind in (module._parameters, module._buffers):
            kind.update({name: fake(tensor) for name, tensor in kind.items() if tensor is not None})
