"""Bytes of the cache against those of a real one."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from fastdpo.model.generation_cache import cache_bytes
from tests.tiny import model_config

WINDOW = 8
_MLA = dict(kv_lora_rank=12, q_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16)
_MLA |= dict(num_key_value_heads=4, first_k_dense_replace=2)
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 24},
    "mistral": {"sliding_window": WINDOW},
    "gemma2": {"sliding_window": WINDOW, "head_dim": 16},
    "gemma3_text": {"sliding_window": WINDOW, "head_dim": 16, "num_hidden_layers": 7},
    "gemma4_text": {
        "sliding_window": WINDOW,
        "hidden_size_per_layer_input": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {},
    "falcon": {"num_kv_heads": 4, "new_decoder_architecture": False, "multi_query": True},
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_are_those_of_a_real_cache(family, dtype):
    """Shorter than a window and longer, once a token is generated, over two sequences."""
    config = model_config(family, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for tokens in (5, 21):
        assert real_bytes(model, config, tokens) == 2 * cache_bytes(config, tokens, dtype.itemsize)


@torch.no_grad()
def real_bytes(model, config, tokens):
    cache = DynamicCache(config=config)
    ids = torch.ones(2, tokens, dtype=torch.int64)
    for part in (ids[:, :-1], ids[:, -1:]):
        model(part, past_key_values=cache, use_cache=True)
    kept = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(tensor.untyped_storage().nbytes() for tensor in kept if tensor is not None)
