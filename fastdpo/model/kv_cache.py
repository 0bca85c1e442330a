"""How many bytes keys and values take while a model generates."""

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.configuration_utils import PreTrainedConfig


def cache_bytes(config: PreTrainedConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of transformers' cache of one sequence of this many tokens, prompt and new ones, in this dtype.

    By the config alone: a layer keeps its window, and no more; with latent attention (MLA) the latents; what
    a recurrent layer keeps does not grow with tokens, and is left out. Layers of other widths than the
    config's own (num_key_value_heads, head_dim) count as if they had these.
    """
    text: Any = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 1
    if latent := getattr(text, "kv_lora_rank", None):
        width = latent + (getattr(text, "qk_rope_head_dim", None) or 0)
    else:
        key_heads = getattr(text, "num_key_value_heads", None)
        head = getattr(text, "head_dim", None) or text.hidden_size // heads
        width = 2 * head * (key_heads if isinstance(key_heads, int) else heads)
    return sum(min(tokens, most) for most in _kept(text, tokens)) * width * dtype.itemsize


def _kept(text: Any, tokens: int) -> list[int]:
    """The most tokens that each layer keeps; all of them in every layer of a config that transformers makes
    no cache of."""
    try:
        layers = DynamicCache(config=text).layers
    except Exception:  # whatever fields an unusual config lacks
        layers = []
    most = lambda layer: max(layer.sliding_window - 1, 1) if layer.is_sliding else tokens
    kept = [most(layer) for layer in layers if isinstance(layer, DynamicLayer)]
    return kept if layers else [tokens] * (getattr(text, "num_hidden_layers", None) or 1)
