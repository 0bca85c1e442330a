"""Unsloth's arguments, as its notebooks give them: FastLanguageModel's, and beside them TRL's."""

from dataclasses import replace

from fastdpo.convert.draft import Draft
from fastdpo.convert.rules import beside, only, unread
from fastdpo.convert.tools import shared, trl
from fastdpo.convert.tools.shared import LOOKS, NO_SUCH, SPEED

_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _loading(
    draft: Draft,
    model_name=None,
    load_in_4bit=False,
    full_finetuning=False,
    *,
    load_in_8bit=False,
    float32_mixed_precision=False,
) -> None:
    if model_name is not None:
        draft.set("model", model_name, "model_name")
    if full_finetuning and float32_mixed_precision:
        draft.leave("full_finetuning", "there is no LoRA")
    elif full_finetuning:
        draft.set("pure_bf16", True, "full_finetuning")
        draft.check("full_finetuning", "fastdpo rounds its updates stochastically, Unsloth to nearest")
    elif load_in_8bit:
        draft.refuse("load_in_8bit")
    elif load_in_4bit:
        draft.set("load_in_4bit", True, "load_in_4bit")
        if model_name and not model_name.endswith("-bnb-4bit"):  # what is stored in 4 bits is taken as it is
            text = "Unsloth takes its own 4-bit copy where it has one; here these weights are quantised"
            draft.check("model_name", text)


def _lora(draft: Draft, r=None, lora_alpha=16, target_modules=None, lora_dropout=0) -> None:
    """get_peft_model's arguments."""
    draft.set("lora_rank", 16 if r is None else r, "r")
    draft.set("lora_alpha", float(lora_alpha), "lora_alpha")
    shared.target_modules(draft, "target_modules", target_modules or _MODULES)
    if lora_dropout:  # TRL's trainers get a model that has its LoRA
        draft.leave("lora_dropout", "TRL's disable_dropout switches LoRA's off, too")


def _checkpointing(draft: Draft, use_gradient_checkpointing=None, gradient_checkpointing=None) -> None:
    if use_gradient_checkpointing:  # "unsloth" is true with offloading
        draft.set("gradient_checkpointing", True, "use_gradient_checkpointing")
    elif gradient_checkpointing:
        draft.set("gradient_checkpointing", True, "gradient_checkpointing")


UNSLOTH = replace(
    trl.TRL,
    name="Unsloth",
    only_here="r target_modules max_seq_length use_gradient_checkpointing random_state loftq_config "
    "full_finetuning fast_inference load_in_16bit modules_to_save",
    # its configs' own (unsloth/models/rl.py), where they are not TRL's
    defaults=trl.TRL.defaults
    | {
        "load_in_4bit": True,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 5e-5,
        "warmup_ratio": 0.1,
        "weight_decay": 0.001,
        "optim": "adamw_8bit",
    },
    parts=(_loading, _lora, _checkpointing, *(part for part in trl.TRL.parts if part is not trl._lora)),
    reasons=trl.TRL.reasons | {"load_in_8bit": shared.QUANTISED},
    model_key="model_name",
    rows=trl.TRL.rows
    | {
        "max_seq_length": unread("rows are cut at max_length"),
        "random_state": unread("seed is LoRA's too"),
        "loftq_config": only({}, fix=NO_SUCH),
        "modules_to_save layers_to_transform layers_pattern": only([], fix=NO_SUCH),
        "finetune_last_n_layers qat_scheme target_parameters rope_scaling resize_model_vocab": only(
            fix=NO_SUCH
        ),
        "load_in_fp8 offload_embedding ensure_weight_tying": only(False, fix=NO_SUCH),
        "revision": trl.TRL.rows["model_revision"],
        "load_in_16bit": beside("load_in_4bit"),
        "fast_inference gpu_memory_utilization max_lora_rank float8_kv_cache fix_tokenizer text_only "
        "use_exact_model_name unsloth_tiled_mlp": SPEED,
        "disable_log_stats temporary_location": LOOKS,
    },
)
