"""The keys and values that generation keeps: their bytes, as transformers' DynamicCache stores them."""

from collections.abc import Iterator
from typing import Any

from transformers import DynamicCache, PreTrainedConfig


def cache_bytes(config: PreTrainedConfig, tokens: int, dtype_bytes: int) -> int:
    """Of one sequence of so many tokens. config: the model's.

    2 x layers x key/value heads x head size x tokens x dtype_bytes. A layer with a window keeps no more
    tokens than it has; latent attention (MLA) keeps one compressed row and one rotary key a token. Layers
    that use another's keys keep nothing; a recurrent layer's state does not grow, and is not counted.
    """
    return dtype_bytes * sum(width * min(tokens, most or tokens) for width, most in _layers(config))


def _layers(config: PreTrainedConfig) -> Iterator[tuple[int, int | None]]:
    """(numbers a token, the most tokens or None) of each layer that keeps keys."""
    text: Any = config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    own = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text] * len(layers)
    for layer, of_layer in zip(layers, own):
        if hasattr(layer, "keys"):
            yield _width(of_layer), getattr(layer, "sliding_window", None)


def _width(text: Any) -> int:
    """Numbers that a layer keeps of a token."""
    if rank := getattr(text, "kv_lora_rank", None):  # MLA
        return rank + (getattr(text, "qk_rope_head_dim", None) or 0)
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        return 2 * size  # Falcon's and GPT-BigCode's one head
    return 2 * (getattr(text, "num_key_value_heads", None) or heads) * size
