"""What the backward finds of the forward: recomputed, kept, or kept in the host's memory."""

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from fastdpo.errors import ConfigError
from fastdpo.model.offloading import Offloading
from fastdpo.model.spec import ModelSpec
from fastdpo.model.tiled_mlp import is_inside, tile_mlps, untile_mlps

# What `selective` keeps: matrix products with weights, and fused attention. Batched products are not here:
# where a decoder has them they are the scores of an attention that is not fused, quadratic in the row.
KEPT = {
    "aten::mm",
    "aten::addmm",
    "aten::_addmm_activation",
    "aten::_scaled_mm",
    "aten::_grouped_mm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
    "bitsandbytes::gemm_4bit",
}


def set_up_activations(model, spec: ModelSpec) -> list[str]:
    """Makes a causal LM (or a peft model of one) train with gradient_checkpointing, activation_offloading
    and tiled_mlp as they are in `spec`, whatever it was set to before. Returns what it did, a line each.
    Raises ConfigError where the model has nothing that a key could apply to.

    gradient_checkpointing True recomputes every layer of the decoder, and of towers beside it, from its
    input, a number k the layers 0, k, 2k, ... of each (as transformers' every_n_layers), "selective" all but
    what KEPT names. Nothing is reentrant, so frozen embeddings and 4-bit weights need no special care; the
    random state is not restored for the recompute, because nothing random is left in a model that trains
    here.
    """
    core = model.get_base_model() if hasattr(model, "peft_config") else model
    layers = decoder_layers(core)
    recompute = _set_recompute(core, layers, towers_layers(core), spec.gradient_checkpointing)
    return [*filter(None, (recompute, _set_tiles(core, layers, spec.tiled_mlp), _set_offloading(core, spec)))]


def decoder_layers(model: Any) -> list[nn.Module]:
    """The layers of a transformers model that can be recomputed, in order, none inside another; of one with
    towers beside its decoder the decoder's."""
    return recomputable(model.get_decoder() if _has_towers(model) else model)


def towers_layers(model: Any) -> list[nn.Module]:
    """Those of the towers."""
    known = set(decoder_layers(model)) if _has_towers(model) else set()
    return [layer for layer in recomputable(model) if layer not in known] if known else []


def _has_towers(model: Any) -> bool:
    config = getattr(model, "config", None)
    return config is not None and config.get_text_config() is not config


def recomputable(module: nn.Module) -> list[nn.Module]:
    """The layers in a module, towers' too."""
    if isinstance(module, GradientCheckpointingLayer):
        return [module]
    return [layer for child in module.children() for layer in recomputable(child)]


def _set_recompute(core, layers: list[Any], others: list[Any], level: bool | int | str) -> str:
    if level and not layers:
        raise ConfigError(
            f"gradient_checkpointing: {type(core).__name__} has no layers that can be recomputed; "
            "leave the key out"
        )
    function = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if level == "selective":
        function = partial(function, context_fn=partial(create_selective_checkpoint_contexts, _policy))
    every = 1 if isinstance(level, str) else int(level)
    for number, layer in [*enumerate(layers), *enumerate(others)]:
        layer.gradient_checkpointing = bool(level) and number % every == 0
        layer._gradient_checkpointing_func = function
    layers = layers + others
    done = sum(layer.gradient_checkpointing for layer in layers)
    but = ", all but matrix products and attention" if level == "selective" else ""
    return f"{done} of {len(layers)} layers are computed again in the backward{but}" if done else ""


def _policy(context, op, *args, **kwargs) -> CheckpointPolicy:
    schema = getattr(op, "_schema", None)
    kept = schema is not None and schema.name in KEPT and not is_inside()
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _set_tiles(core, layers: list[nn.Module], tiled: bool) -> str:
    untile_mlps(layers)
    if not tiled:
        return ""
    done, left = tile_mlps(layers)
    if not done:
        raise ConfigError(
            f"tiled_mlp: {type(core).__name__} has no dense MLP that takes hidden states only; "
            "leave the key out"
        )
    rest = f"; {left} (mixtures of experts, or of another form) are left alone" if left else ""
    return f"{done} MLPs are computed in tiles of tokens{rest}"


def _set_offloading(core, spec: ModelSpec) -> str:
    if before := vars(core).pop("_fastdpo_offloading", None):
        before.remove()
    if not spec.activation_offloading:
        return ""
    core._fastdpo_offloading = Offloading(core.base_model)
    if spec.gradient_checkpointing == "selective":  # torch keeps those where no hook sees them
        return "the layers' inputs are kept in the host's memory, the products and attention are not"
    return "what the layers save for the backward is kept in the host's memory"
