"""The bytes of keys and values by the config are those that transformers' own cache has."""

import pytest
import torch
from transformers import DynamicCache, PreTrainedConfig

from fastdpo.model.kv_cache import cache_bytes
from tests import tiny

LATENT = dict(kv_lora_rank=16, q_lora_rank=None, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16)
LATENT |= dict(n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1, num_key_value_heads=4)
LAYERED = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=7)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("qwen3", dict(head_dim=32)),
        ("mistral", dict(sliding_window=7)),
        ("gemma2", LAYERED | dict(head_dim=16)),
        ("deepseek_v3", LATENT),
    ],
)
@pytest.mark.parametrize("tokens", [3, 20])
def test_it_is_what_the_cache_holds(kind, sizes, tokens):
    model = tiny.policy(kind, **sizes).core.eval()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.randint(3, 99, (1, tokens)), past_key_values=cache, use_cache=True)
    kept = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert cache_bytes(model.config, tokens, torch.float32) == sum(tensor.nbytes for tensor in kept)


def test_recurrent_layers_keep_nothing_that_grows_and_an_unknown_config_is_no_error():
    mixed = tiny.model_config("qwen3_next", layer_types=["linear_attention", "full_attention"], head_dim=16)
    assert cache_bytes(mixed, 10, torch.bfloat16) == 10 * 2 * 2 * 16 * 2
    unknown = PreTrainedConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=3)
    assert cache_bytes(unknown, 10, torch.bfloat16) == 3 * 10 * 2 * 64 * 2
