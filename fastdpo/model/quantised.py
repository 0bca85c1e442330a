"""Frozen weights in 4 bits (QLoRA, 2305.14314): which weights, how many bytes, and loading them.

The format is bitsandbytes' NF4 with double quantisation: blocks of 64 weights share a scale, and blocks of
256 scales, kept in 8 bits, share one in fp32. Everything else stays in the compute dtype. peft's
prepare_model_for_kbit_training is not used: it would keep norms, embeddings and lm_head in fp32, and so the
residual stream too, twice the memory for weights that have no more digits than they were stored with.
"""

import importlib.util
import math
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from fastdpo.errors import ConfigError, ModelError


def quantised_linears(model, skip: list[str] | None = None) -> dict[str, tuple[int, int]]:
    """name -> (out_features, in_features) of the modules that `load_in_4bit` quantises, in a transformers
    model that is not quantised (one on the meta device will do).

    By transformers' own rule: each nn.Linear (and GPT-2's Conv1D) but the lm_head and whatever shares its
    weight with another module. Norms, embeddings, biases and stacked experts (a parameter that no nn.Linear
    holds) stay as they are. `skip`: a checkpoint's own llm_int8_skip_modules, in place of the lm_head.
    """
    from transformers.quantizers.base import HfQuantizer  # imports every quantiser that is installed
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = HfQuantizer.get_modules_to_not_convert(model, skip, model._keep_in_fp32_modules)
    sizes = {}
    for name, module in model.named_modules():
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, kept):
            rows, columns = module.weight.shape
            sizes[name] = (columns, rows) if isinstance(module, Conv1D) else (rows, columns)
    return sizes


def nf4_bytes(out_features: int, in_features: int) -> int:
    """Bytes of the tensors that hold one weight [out, in] in NF4: the packed weights, their scales in 8
    bits, the scales' scales and their mean in fp32, and two tables. (A CUDA allocator rounds each of the six
    up to 512 bytes.)"""
    n = out_features * in_features
    scales = math.ceil(n / 64)
    tables = 16 * 4 + 256 * 4  # fp32: the values of NF4 and of the 8-bit scales, a copy in each module
    return math.ceil(n / 2) + scales + 4 * math.ceil(scales / 256) + 4 + tables


def check_quantisation(load_in_4bit: bool, has_lora: bool, model: str, model_config) -> None:
    """Raises ConfigError and ModelError for what is to be in 4 bits, or is stored quantised, and cannot be
    trained on.

    8-bit models cannot: LLM.int8() picks its outlier columns by all rows of a batch, so that one row's
    log-probs would depend on which others were packed with it.
    """
    stored = getattr(model_config, "quantization_config", None)
    if not load_in_4bit and not stored:
        return
    is_bnb = stored and stored.get("quant_method", "bitsandbytes") == "bitsandbytes"
    if stored and not (is_bnb and stored.get("load_in_4bit")):
        method = stored.get("quant_method") or "an unknown method"
        bits = " in 8 bits" if stored.get("load_in_8bit") else ""
        raise ModelError(
            f"model: {model} is stored quantised by {method}{bits}; of such models only bitsandbytes' 4-bit "
            "ones can be trained on. Give the model that it was made of, with load_in_4bit: true"
        )
    if not has_lora:
        frozen = "load_in_4bit: weights in 4 bits are frozen"
        what = f"model: {model} is stored in 4 bits" if stored else frozen
        raise ConfigError(f"{what}, so only a LoRA can train on it; set lora_rank (or adapter)")
    for package in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"load_in_4bit: needs {package}: pip install 'fastdpo[quant]'")


def loading_in_4bit(model_config, dtype: torch.dtype, device: str, skip: list[str] | None = None) -> dict:
    """from_pretrained's arguments. transformers then quantises each weight as it comes from the disk: no two
    of them are in full precision at a time. skip: what stays whole, where it is not the lm_head alone."""
    stored = getattr(model_config, "quantization_config", None)
    if stored:  # the stored config wins over an argument, so the compute dtype has to go there
        stored["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
        return {"device_map": {"": device}}
    nf4 = dict(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skip, **nf4)
    return {"device_map": {"": device}, "quantization_config": config}


def set_up_4bit(model, dtype: torch.dtype, console) -> None:
    """Readies a freshly loaded 4-bit model for training, and says what is in 4 bits. Raises ModelError where
    nothing is."""
    import bitsandbytes as bnb

    linears = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    if not linears:
        raise ModelError(f"load_in_4bit: {type(model).__name__} has no linear layer that could be quantised")
    for module in linears:
        # On CPUs with AVX512-BF16, bitsandbytes would otherwise repack the weights in eval mode (for the
        # samples), for a kernel that rounds to bf16 and has no backward, and leave them so for training.
        module.support_avx512bf16_for_cpu = False
    short = {torch.bfloat16: "bf16", torch.float32: "fp32"}.get(dtype, str(dtype).removeprefix("torch."))
    head = model.get_output_embeddings()
    if isinstance(head, bnb.nn.Linear4bit):  # linear_logp takes its weight as a matrix
        stored: Any = head.weight
        weight = bnb.functional.dequantize_4bit(stored.data, stored.quant_state).to(dtype)
        whole = nn.Linear(head.in_features, head.out_features, head.bias is not None, device="meta")
        whole.weight, whole.bias = nn.Parameter(weight, requires_grad=False), head.bias
        model.set_output_embeddings(whole)
        linears = [module for module in linears if module is not head]
        text = f"the lm_head is stored in 4 bits: dequantised to {short}, the same values"
        console.print(f"[yellow]{text}, {weight.nbytes / 1e9:.2f} GB", highlight=False, soft_wrap=True)
    console.print(_account(model, linears, short), highlight=False, soft_wrap=True)


def _account(model, linears: list, dtype: str) -> str:
    """One line on what is in 4 bits and what is not."""
    held = {id(module.weight) for module in linears}
    weights = sum(module.in_features * module.out_features for module in linears)
    named = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.Linear)}
    rest = {name: p for name, p in model.named_parameters() if id(p) not in held}
    stacked = {name: p.numel() for name, p in rest.items() if id(p) not in named and p.ndim > 1}
    kinds = " and ".join(sorted({module.weight.quant_type.upper() for module in linears}))
    kept = sum(p.numel() for p in rest.values())
    text = f"{kinds}: {len(linears)} matrices, {weights:,} weights in 4 bits; the other {kept:,} "
    text += f"(embeddings, lm_head, norms, biases) stay in {dtype}"
    if (many := sum(stacked.values())) > weights / 10:
        largest = max(stacked, key=stacked.__getitem__)
        text = f"[yellow]{text}. {many:,} of these are in tensors as {largest}, which "
        text += "no linear layer holds (stacked experts, most often): bitsandbytes cannot quantise them"
    return text
