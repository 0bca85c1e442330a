"""ms-swift's configs (`swift rlhf`): what several of its keys mean together. The others are in swift_keys."""

import math

from fastdpo.convert.draft import Draft
from fastdpo.convert.rules import Tool
from fastdpo.convert.tools import shared
from fastdpo.convert.tools.swift_data import DATA_REASONS, data
from fastdpo.convert.tools.swift_keys import ROWS
from fastdpo.values import as_list

_OF_DPO = (
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_pair aot_unpaired discopop "
    "apo_zero apo_down sft"
).split()
_OF_LORA = ("lora_rank", "lora_alpha", "target_modules", "target_regex", "lora_dropout")
_ONE_SIDED = "the reference is the model without that adapter"


def _batch(
    draft: Draft, per_device_train_batch_size=None, gradient_accumulation_steps=None, *, num_processes=None
) -> None:
    """Without gradient_accumulation_steps the whole batch is 16, or next above (trainers/arguments.py)."""
    size, steps = per_device_train_batch_size, gradient_accumulation_steps
    if steps is None and draft.defaults and isinstance(size, int) and size > 0:
        steps = max(1, math.ceil(16 / size / (num_processes or 1)))
    shared.batch(draft, size, steps, num_processes=num_processes)


def _tuner(
    draft: Draft,
    tuner_type=None,
    lora_rank=8,
    lora_alpha=32,
    target_modules=("all-linear",),
    *,
    adapters=None,
    ref_adapters=None,
    lora_dropout=None,
    target_regex=None,
    learning_rate=None,
) -> None:
    kind = tuner_type or "lora"
    if kind not in ("lora", "full"):
        return draft.refuse("tuner_type")
    rate = learning_rate if learning_rate is not None else 1e-5 if kind == "full" else 1e-4
    if learning_rate is not None or draft.defaults:
        draft.set("learning_rate", rate, "learning_rate", learning_rate=rate)
    if kind == "full" or adapters:
        if kind == "full":
            draft.tell("tuner_type", ": all weights are trained, as without lora_rank")
        for name in draft.given(*_OF_LORA):
            draft.leave(name, "all weights are trained" if kind == "full" else "the adapter has its own")
        return _adapter(draft, adapters, ref_adapters)
    draft.set("lora_rank", lora_rank, "tuner_type", "lora_rank", tuner_type=kind, lora_rank=lora_rank)
    draft.set("lora_alpha", float(lora_alpha), "lora_alpha", lora_alpha=lora_alpha)
    shared.target_modules(draft, "target_modules", target_modules)
    if target_regex is not None:
        draft.refuse("target_regex")
    if lora_dropout:
        # rlhf_trainers/rlhf_mixin.py 31 calls disable_dropout_in_model on the model with its LoRA
        draft.leave("lora_dropout", "ms-swift's RLHF trainers switch LoRA's off, too")


def _adapter(draft: Draft, adapters, ref_adapters) -> None:
    """What is trained on; the reference is model and ref_adapters (rlhf_args.py), ours model and adapter."""
    given, theirs = as_list(adapters), as_list(ref_adapters)
    if not given:
        return
    has_reference = draft.theirs.get("rlhf_type", "dpo") in ("dpo", "kto")
    if len(given) > 1 or (has_reference and given != theirs):
        draft.refuse("adapters")
    else:
        draft.set("adapter", given[0], "adapters", *(["ref_adapters"] if theirs else []))


def _dtype(draft: Draft, torch_dtype=None, *, tuner_type=None) -> None:
    """It decides the dtype of computing, too (base_args/model_args.py, _init_mixed_precision)."""
    if torch_dtype in ("bfloat16", "bf16"):
        draft.set("dtype", "bf16", "torch_dtype")
        if tuner_type == "full":
            draft.check("torch_dtype", "weights that train are kept in fp32 here")
    elif torch_dtype != "auto":
        draft.refuse("torch_dtype")


def _four_bits(draft: Draft, quant_bits=None, quant_method=None) -> None:
    if quant_bits is None:
        return
    if quant_bits != 4 or quant_method != "bnb":
        return draft.refuse("quant_bits", f"{quant_bits} by {quant_method}")
    draft.set("load_in_4bit", True, "quant_method", "quant_bits")


def _length(draft: Draft, max_length=None, truncation_strategy=None) -> None:
    """Of the whole row, prompt and response (template/base.py, _encode_truncated)."""
    ways = {"delete": "drop", "left": "keep_end", "right": "keep_start"}
    if max_length is not None:
        draft.set("max_length", max_length, "max_length")
    elif draft.defaults:
        draft.refuse("max_length", "not given")
    how = truncation_strategy or ("delete" if draft.defaults else None)
    if how in ways:
        draft.set("truncation", ways[how], "truncation_strategy", truncation_strategy=how)
    elif how:
        draft.refuse("truncation_strategy")


def _loss(draft: Draft, rlhf_type=None, loss_type=None, *, loss_weights=None, rpo_alpha=None) -> None:
    kind = rlhf_type or "dpo"
    names = as_list(loss_type)
    beta = draft.take("beta", 2.0 if kind == "simpo" else 0.1)
    options = {"beta": beta, "label_smoothing": draft.take("label_smoothing")}
    weights = {name: draft.take(name) for name in ("desirable_weight", "undesirable_weight")}
    gamma, tau = draft.take("simpo_gamma"), draft.take("discopop_tau")
    told = draft.given("rlhf_type", "loss_type") or ["rlhf_type"]
    if kind == "dpo":
        names = names or ["sigmoid"]
        if not {*names} <= {*_OF_DPO} or len({*names}) < len(names):
            return draft.refuse("loss_type", names)
        if loss_weights is not None and len(as_list(loss_weights)) != len(names):
            return draft.refuse("loss_weights")
        shares = [float(weight) for weight in as_list(loss_weights)] or [1.0] * len(names)
        parts = dict(zip(names, shares))
        shared.with_sft(draft, parts, "rpo_alpha", rpo_alpha)
        told += ["loss_weights"] if loss_weights is not None else []
        return shared.objective(draft, parts, options | {"discopop_tau": tau}, *told)
    name = _OTHERS.get((kind, *names)) if len(names) < 2 else None
    if name is None:
        known = any(kind == other for other, *_ in _OTHERS)
        return draft.refuse("loss_type", names) if known else draft.refuse("rlhf_type")
    parts = {name: 1.0}
    if name == "simpo":
        shared.with_likelihood(draft, parts)
        options["simpo_gamma"] = 1.0 if gamma is None else gamma
    elif name == "cpo":
        options["cpo_alpha"] = draft.take("cpo_alpha")
    shared.objective(draft, parts, options | (weights if kind == "kto" else {}), *told)


_OTHERS = {  # (rlhf_type, loss_type) -> ours
    ("orpo",): "orpo",
    ("kto",): "kto",
    ("kto", "kto"): "kto",
    ("kto", "apo_zero_unpaired"): "apo_zero_unpaired",
    ("cpo",): "cpo",
    ("cpo", "sigmoid"): "cpo",
    ("cpo", "simpo"): "simpo",
    ("simpo",): "simpo",
    ("simpo", "simpo"): "simpo",
}


def _reference(draft: Draft, ref_model=None) -> None:
    if ref_model != draft.theirs.get("model"):
        draft.refuse("ref_model")
    else:
        draft.leave("ref_model", "the reference is what training starts from, which is that")


SWIFT = Tool(
    "ms-swift",
    only_here="rlhf_type tuner_type train_type sft_type split_dataset_ratio val_dataset truncation_strategy "
    "attn_impl quant_bits quant_method use_hf load_from_cache_file ref_adapters target_modules freeze_vit "
    "custom_dataset_info model_author",
    defaults={
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 1,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "lr_scheduler_type": "cosine",
        "gradient_checkpointing": True,
        "router_aux_loss_coef": 0.0,
        "rlhf_type": "dpo",
        "tuner_type": "lora",
        "truncation_strategy": "delete",
    },
    parts=(
        *(_batch, *shared.RUN[1:], _dtype, _four_bits, _tuner, data, _length),
        *(*shared.KEPT, _reference, _loss),
    ),
    reasons=shared.REASONS
    | DATA_REASONS
    | {
        "target_regex": "give the modules' names in target_modules",
        "tuner_type": "fastdpo trains a LoRA or all weights; set lora or full",
        "template": "fastdpo does not know it; give chat_template a Jinja file, or one of our names",
        "adapters": f"{_ONE_SIDED}, and fastdpo's the model with it; name it in ref_adapters, too, or merge "
        "it into the model first",
        "ref_model": "the reference is the model that training starts from; remove it",
        "torch_dtype": "ms-swift computes in fp16 then, fastdpo in bf16 or fp32; set bfloat16",
        "quant_bits": "fastdpo quantises to 4 bits by bnb only; set quant_bits 4 with quant_method bnb",
        "max_length": "ms-swift takes the model's own limit then; give the longest row in tokens",
        "truncation_strategy": "rows are cut at one end or left out; set delete, left or right",
        "rlhf_type": "fastdpo does dpo, kto, orpo, cpo and simpo",
        "loss_type": "fastdpo does not have it of this rlhf_type; see `fastdpo objectives`",
        "loss_weights": "a weight for each loss is needed",
    },
    names={"val_size": "split_dataset_ratio"},
    older={"tuner_type": ("train_type", "sft_type")},
    model_key="model",
    rows=ROWS,
)
