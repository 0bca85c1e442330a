"""Shared prompts in a model that another trainer has wrapped: our attention in it, switched on module by
module by the layout in a call, and the start check of fastdpo.model.support."""

import contextlib
import io
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn
from transformers import AttentionInterface

from fastdpo.integrations.images import BatchImages
from fastdpo.model.attention import prefix_attention, stock_attention
from fastdpo.model.lm_head import Head, logit_transform
from fastdpo.model.policy import Policy
from fastdpo.model.support import prepare
from fastdpo.records import PreferenceGroup, PrefixLayout, Response

NAME = "fastdpo_prefix_trl"
# probabilities that transformers' layers keep as plain numbers, which TRL's disable_dropout leaves alone
_RATES = ("attention_dropout", "activation_dropout", "dropout", "hidden_dropout", "layerdrop")
_SHORT = 96  # tokens of a prompt's end, and of a response


class Sealed:
    """A layout that wrappers hand on as it is: FSDP would copy a dataclass field by field for each layer."""

    def __init__(self, layout: PrefixLayout):
        self.layout = layout

    def to(self, device, **_) -> "Sealed":
        """For accelerate, where the layers of a model lie on several devices."""
        return Sealed(self.layout.to(device))


def _attention(*args, fastdpo_layout: Sealed, output_router_logits=None, **kwargs):
    """prefix_attention. A mixture of experts hands its layers a wish that is none of the attention's."""
    return prefix_attention(*args, fastdpo_layout=fastdpo_layout.layout, **kwargs)  # type: ignore[misc]


AttentionInterface.register(NAME, _attention)


def switch_attention(model) -> list:
    """Hooks that give a module our attention while it is called with a layout, and its own otherwise.

    They sit on the modules that look the attention up, so that a checkpoint's recompute in the backward,
    which repeats the module's call and nothing around it, finds ours too.
    """
    before = []

    def enter(module, args, kwargs):
        if isinstance(kwargs.get("fastdpo_layout"), Sealed):
            config = module.config.get_text_config()
            before.append((config, config._attn_implementation))
            config._attn_implementation_internal = NAME

    def leave(module, args, kwargs, output):
        if isinstance(kwargs.get("fastdpo_layout"), Sealed):
            config, name = before.pop()
            config._attn_implementation_internal = name

    hooks, text = [], model.config.get_text_config().model_type
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        # a tower's keep their own
        if hasattr(config, "_attn_implementation_internal") and config.get_text_config().model_type == text:
            hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.append(module.register_forward_hook(leave, with_kwargs=True, always_call=True))
    return hooks


def random_module(model) -> str | None:
    """The name of a module that drops out in training."""
    for name, module in model.named_modules():
        rates = [getattr(module, rate, None) for rate in _RATES]
        if isinstance(module, nn.Dropout):
            rates.append(module.p)
        if any(isinstance(rate, float) and rate > 0 for rate in rates):
            return name or type(model).__name__
    return None


class Inner(Policy):
    """A model whose adapters, if any, are inside it, as prepare() takes it."""

    def __init__(self, model, forward, images: BatchImages | None):
        weight = model.get_input_embeddings().weight
        self.model = self.core = model
        self.device, self.dtype, self.dropout = weight.device, weight.dtype, {}
        self.head_budget = None
        if torch.is_autocast_enabled(self.device.type):
            self.dtype = torch.get_autocast_dtype(self.device.type)
        self.head = Head(model.get_output_embeddings(), *logit_transform(model.config.get_text_config()))
        self.stock_attention = stock_attention(model.config)
        self.share, self.forward, self.processor = False, forward, images

    def inside(self, call):
        """We are inside the model's own forward."""
        return call()

    def hidden(self, batch):
        """With the layout sealed, as the real calls do."""
        sealed = None if batch.layout is None else Sealed(batch.layout)
        return super().hidden(replace(batch, layout=sealed))

    @contextlib.contextmanager
    def stock(self):
        """Calls the forward itself: what wraps the model's call (accelerate's autocast, FSDP's hooks) is
        around us, and cannot be entered again."""
        with super().stock():
            yield self.own

    def own(self, **kwargs):
        """FSDP2 computes in a smaller dtype than the weights have outside their layers, without autocast."""
        out = self.forward(**kwargs)
        self.dtype = min(self.dtype, out.logits.dtype, key=lambda dtype: dtype.itemsize)
        return out


def can_share(model, forward, groups, images, tell, around=None) -> bool:
    """Whether this model's prompts can be shared, or its rows stay padded; `tell` gets the reasons.

    Compares our log-probs with the model's own `forward` on `groups`, some of the first batch, whose images
    these are, within the context `around`. Raises ModelError where neither way gives what the model gives.
    """
    if random := random_module(model):
        tell(f"{random} drops out at random, and a shared prompt would share it: rows stay padded")
        return False
    told = io.StringIO()
    console, policy = Console(file=told, width=1000), Inner(model, forward, images)
    if policy.stock_attention != model.config._attn_implementation:
        tell(
            f"{type(model).__name__} runs by eager attention from now on: sdpa, with which it was loaded, "
            "leaves out the softcap of its scores"
        )
    try:
        with around or contextlib.nullcontext():
            prepare(policy, groups, console)
        shared = policy.share
    finally:
        policy.set_sharing(False)
    if said := told.getvalue().strip():
        tell(said)
    return shared


def short(groups: tuple[PreferenceGroup, ...]) -> list[PreferenceGroup]:
    """The same groups, short: any tokens do for comparing two ways to compute them. Prompts with images stay
    whole."""
    out = []
    for group in groups:
        pieces = [response.ids[:_SHORT] for response in group.responses]
        responses = tuple(Response(ids, np.ones(len(ids), bool)) for ids in pieces)
        prompt = group.prompt if group.images else group.prompt[-_SHORT:]
        out.append(PreferenceGroup(group.row, prompt, responses, (), images=group.images))
    return out
