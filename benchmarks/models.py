"""The models that are measured: real configurations with random weights.

The sizes are those of the public config.json files; `tests/benchmarks/test_models.py` holds each one against
its published number of parameters. Speed and memory do not depend on what the weights are.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from fastdpo.model.loading import switch_off_dropout
from fastdpo.model.quantised import quantised_linears
from fastdpo.model.source import auto_class

SEED = 0
# of models that see images; below the ids that random rows are drawn from
TOKEN_IDS = {"vision_start_token_id": 2, "vision_end_token_id": 3, "image_token_id": 4, "video_token_id": 5}


@dataclass(frozen=True, eq=False)
class BenchModel:
    """A transformers configuration, and whether all of it trains or a LoRA on its decoder layers."""

    name: str
    model_type: str  # "qwen2", "qwen3", "llama", "qwen2_5_vl" or "qwen3_vl"
    config: dict  # arguments of the transformers config, of the language model where there is a tower
    lora_rank: int | None = None  # None: all weights train
    vision: dict | None = None  # a tower's arguments: it sees images, and the tower stays frozen

    @property
    def hidden(self) -> int:
        return self.config["hidden_size"]

    @property
    def layers(self) -> int:
        return self.config["num_hidden_layers"]

    @property
    def vocab(self) -> int:
        return self.config["vocab_size"]

    @property
    def heads(self) -> int:
        return self.config["num_attention_heads"]

    @property
    def kv_heads(self) -> int:
        return self.config["num_key_value_heads"]

    @property
    def head_dim(self) -> int:
        return self.config.get("head_dim") or self.hidden // self.heads

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one decoder layer, by name: (inputs, outputs)."""
        D, inner = self.hidden, self.config["intermediate_size"]
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = {"q_proj": (D, q), "k_proj": (D, kv), "v_proj": (D, kv), "o_proj": (q, D)}
        return attention | {"gate_proj": (D, inner), "up_proj": (D, inner), "down_proj": (inner, D)}

    @property
    def body_params(self) -> int:
        """Weights of all decoder layers' linears, without biases and norms."""
        return self.layers * sum(n_in * n_out for n_in, n_out in self.linears.values())

    @property
    def lora_params(self) -> int:
        """Weights of the LoRA: A and B beside every one of the linears; 0 without one."""
        per_layer = sum(n_in + n_out for n_in, n_out in self.linears.values())
        return self.layers * (self.lora_rank or 0) * per_layer


def _config(hidden, inner, layers, heads, kv_heads, vocab, theta, positions, eps, tied, **more) -> dict:
    rope = {"rope_type": "default", "rope_theta": theta}
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "rope_parameters": rope | more.pop("rope", {}),
        "max_position_embeddings": positions,
        "rms_norm_eps": eps,
        "tie_word_embeddings": tied,
        **more,
    }


def _llama3_rope(factor: float) -> dict:
    bounds = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope": {"rope_type": "llama3", "factor": factor} | bounds}


def _mrope(*section: int) -> dict:
    """Of positions in time, height and width."""
    return {"rope": {"mrope_section": list(section)}}


def _tower(depth, hidden, inner, patch, **more) -> dict:
    sizes = {"depth": depth, "hidden_size": hidden, "intermediate_size": inner, "patch_size": patch}
    return sizes | {"num_heads": 16, "out_hidden_size": 2048, **more}


_LLAMA_8B = _config(4096, 14_336, 32, 32, 8, 128_256, 5e5, 131_072, 1e-5, False, **_llama3_rope(8.0))
_MODELS = (
    BenchModel(
        "Qwen2.5-0.5B",
        "qwen2",
        _config(896, 4864, 24, 14, 2, 151_936, 1e6, 32_768, 1e-6, True),
    ),
    BenchModel(
        "Llama-3.2-1B",
        "llama",
        _config(2048, 8192, 16, 32, 8, 128_256, 5e5, 131_072, 1e-5, True, head_dim=64, **_llama3_rope(32.0)),
    ),
    BenchModel(
        "Qwen2.5-1.5B",
        "qwen2",
        _config(1536, 8960, 28, 12, 2, 151_936, 1e6, 131_072, 1e-6, True),
    ),
    BenchModel(
        "Qwen3-1.7B",
        "qwen3",
        _config(2048, 6144, 28, 16, 8, 151_936, 1e6, 40_960, 1e-6, True, head_dim=128),
    ),
    BenchModel("Llama-3.1-8B LoRA", "llama", _LLAMA_8B, lora_rank=16),
    BenchModel(
        "Qwen2.5-7B LoRA",
        "qwen2",
        _config(3584, 18_944, 28, 28, 4, 152_064, 1e6, 131_072, 1e-6, False),
        lora_rank=16,
    ),
    # For what fits a card: the sizes between and above those that are timed.
    BenchModel(
        "Qwen2.5-3B",
        "qwen2",
        _config(2048, 11_008, 36, 16, 2, 151_936, 1e6, 32_768, 1e-6, True),
    ),
    BenchModel(
        "Qwen2.5-14B LoRA",
        "qwen2",
        _config(5120, 13_824, 48, 40, 8, 152_064, 1e6, 131_072, 1e-6, False),
        lora_rank=16,
    ),
    BenchModel(
        "Qwen2.5-32B LoRA",
        "qwen2",
        _config(5120, 27_648, 64, 40, 8, 152_064, 1e6, 131_072, 1e-6, False),
        lora_rank=16,
    ),
    BenchModel("Llama-3.1-8B", "llama", _LLAMA_8B),
    BenchModel(
        "Llama-3.1-70B LoRA",
        "llama",
        _config(8192, 28_672, 80, 64, 8, 128_256, 5e5, 131_072, 1e-5, False, **_llama3_rope(8.0)),
        lora_rank=16,
    ),
    # They see images; the text of Qwen3-VL-2B is Qwen3-1.7B.
    BenchModel(
        "Qwen3-VL-2B",
        "qwen3_vl",
        _config(2048, 6144, 28, 16, 8, 151_936, 5e6, 262_144, 1e-6, True, head_dim=128, **_mrope(24, 20, 20)),
        vision=_tower(24, 1024, 4096, 16, num_position_embeddings=2304, deepstack_visual_indexes=[5, 11, 17]),
    ),
    BenchModel(
        "Qwen2.5-VL-3B LoRA",
        "qwen2_5_vl",
        _config(2048, 11_008, 36, 16, 2, 151_936, 1e6, 128_000, 1e-6, True, **_mrope(16, 24, 24)),
        lora_rank=16,
        vision=_tower(32, 1280, 3420, 14, window_size=112, fullatt_block_indexes=[7, 15, 23, 31]),
    ),
    # Small enough for two CPU cores, with a real vocabulary: nearly all of its step is the lm_head, as
    # in small models with large vocabularies.
    BenchModel("CPU", "qwen2", _config(256, 1024, 4, 4, 2, 151_936, 1e6, 32_768, 1e-6, True)),
)
MODELS = {model.name: model for model in _MODELS}


def tiny(model: BenchModel) -> BenchModel:
    """The same family and options at toy size, for dry runs."""
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=1000)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2)
    if "head_dim" in model.config:
        sizes["head_dim"] = 32 if model.model_type == "qwen3" else 16
    rank = None if model.lora_rank is None else 4
    small = replace(model, name=f"{model.name}, tiny", config=model.config | sizes, lora_rank=rank)
    return small if model.vision is None else _tiny_tower(small)


def _tiny_tower(model: BenchModel) -> BenchModel:
    """With two blocks, which see images as its large one does."""
    rope = model.config["rope_parameters"] | {"mrope_section": [2, 3, 3]}
    sizes = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    sizes |= {name: [0] for name in model.vision if name.endswith("_indexes")}
    return replace(model, config=model.config | {"rope_parameters": rope}, vision=model.vision | sizes)


def build(model: BenchModel, device: str | torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model with random weights, the same ones at every call on the same kind of device, made on
    `device` in `dtype` so that nothing larger ever exists. Without the LoRA: each trainer adds its own."""
    torch.manual_seed(SEED)
    with torch.device(device):
        return _from_config(model, dtype)


def _from_config(model: BenchModel, dtype: torch.dtype) -> PreTrainedModel:
    config = _transformers_config(model)
    return auto_class(config).from_config(config, dtype=dtype)


def _transformers_config(model: BenchModel):
    if model.vision is None:
        config = AutoConfig.for_model(model.model_type, **model.config)
    else:
        parts = {"text_config": model.config, "vision_config": model.vision}
        tied = model.config["tie_word_embeddings"]
        config = AutoConfig.for_model(model.model_type, tie_word_embeddings=tied, **parts, **TOKEN_IDS)
    switch_off_dropout(config)
    return config


@torch.no_grad()
def build_4bit(model: BenchModel, device: str | torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """As `build`, with the linears that load_in_4bit quantises in bitsandbytes' NF4 (double quantisation)
    and the rest in `dtype`, the compute dtype. One linear is made and quantised at a time, so that the
    whole model never exists in `dtype`. Raises ImportError without bitsandbytes."""
    import bitsandbytes as bnb

    torch.manual_seed(SEED)
    with torch.device("meta"):
        built = _from_config(model, dtype)
    std = built.config.initializer_range
    nf4 = dict(quant_type="nf4", compress_statistics=True)
    for name, (rows, columns) in quantised_linears(built).items():
        bias = built.get_submodule(name).bias
        linear = bnb.nn.Linear4bit(columns, rows, bias is not None, dtype, device="meta", **nf4)
        weight = torch.empty(rows, columns, dtype=dtype, device=device).normal_(std=std)
        linear.weight = bnb.nn.Params4bit(weight, requires_grad=False, **nf4).to(device)
        del weight
        linear.bias = bias  # still on the meta device
        built.set_submodule(name, linear)
    _materialise(built, device, std)
    built.is_loaded_in_4bit = True  # what peft and TRL ask
    return built


def _materialise(built: PreTrainedModel, device: str | torch.device, std: float) -> None:
    """Gives what is on the meta device values on `device`: matrices random ones, norms 1, biases 0; rotary
    frequencies are computed anew. Tied weights stay tied."""
    made = {}
    for name, module in list(built.named_modules()):
        for key, old in module.named_parameters(recurse=False):
            if not old.is_meta:
                continue
            if old not in made:
                new = torch.empty_like(old, device=device)
                value = 0.0 if key == "bias" else 1.0
                made[old] = nn.Parameter(new.normal_(std=std) if new.ndim > 1 else new.fill_(value))
            setattr(module, key, made[old])
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            with torch.device(device):
                built.set_submodule(name, type(module)(module.config))
