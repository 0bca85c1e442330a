"""Other words for keys and their values: what means the same is taken, and for a key that is none of ours the
nearest is named."""

import re
from typing import Literal

from fastdpo.values import nearest

Optimizer = Literal[
    "adamw_torch_fused",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "adamw_torch_8bit",
    "adamw_torch_4bit",
    "adafactor",
    "rmsprop",
    "sgd",
]
# ours for the same by another word: transformers' optimizers and dtypes, peft's modules, YAML's off and on
OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw_torch": "adamw_torch_fused",
    "adamw_hf": "adamw_torch_fused",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "ao_adamw_8bit": "adamw_torch_8bit",
    "ao_adamw_4bit": "adamw_torch_4bit",
}
_OFF = {False: "off", "false": "off", "no": "off", "none": "off"}
_AUTO = {True: "auto", "true": "auto", "yes": "auto", "on": "auto"}
SAME: dict[str, dict] = {
    "optim": OPTIMIZERS,
    "dtype": {"bfloat16": "bf16", "float32": "fp32"},
    "lora_target_modules": {"all_linear": "all-linear", "all": "all-linear"},
    "push_to_hub": {False: None, "false": None, "no": None},  # transformers' switch
    "data_cache": _OFF | _AUTO,
    "reference_cache": _OFF | _AUTO,
}
_SIZES = ("memory", "head_memory")
ALSO_CALLED = (*SAME, *_SIZES, "max_steps")  # the keys that `in_our_words` changes
_MODULES = re.compile(r"\w[\w.]*(\s*,\s*\w[\w.]*)*")  # what is more is a regular expression of whole names
# what else a key is called
CALLED = {
    "model": "model_name model_path model_id pretrained policy",
    "data": "dataset datasets dataset_name train_file train_data train_dataset dataset_mixer",
    "eval_data": "eval_dataset test_data val_data validation eval_file test_datasets val_size val_set_size",
    "output_dir": "output out save_dir run_dir",
    "objective": "loss loss_type method algorithm rl pref_loss rlhf_type",
    "learning_rate": "lr",
    "lr_scheduler_type": "scheduler schedule lr_schedule lr_scheduler",
    "warmup_steps": "warmup",
    "weight_decay": "wd",
    "max_grad_norm": "grad_clip clip_grad gradient_clipping clip",
    "optim": "optimizer opt",
    "batch_size": "bs train_batch_size batch global_batch_size per_device_train_batch_size micro_batch_size "
    "gradient_accumulation_steps",
    "num_epochs": "epochs n_epochs epoch num_train_epochs",
    "max_steps": "steps iters num_steps n_steps",
    "max_length": "max_len max_seq_length max_seq_len seq_len context_length",
    "lora_rank": "lora rank r lora_r lora_dim",
    "lora_alpha": "alpha",
    "lora_target_modules": "target_modules lora_modules",
    "load_in_4bit": "qlora quantize 4bit load_in_8bit quantization_bit",
    "dtype": "precision mixed_precision compute_dtype fp16",
    "report_to": "logger tracker log_with wandb tensorboard",
    "logging_steps": "log_every log_steps log_interval",
    "save_steps": "save_every checkpoint_steps",
    "eval_steps": "eval_every eval_interval",
    "gradient_checkpointing": "grad_checkpointing activation_checkpointing",
    "push_to_hub": "hub hub_repo",
    "resume": "continue",
    "overwrite": "force",
}
_KEYS = {word: key for key, words in CALLED.items() for word in words.split()}


def in_our_words(key: str, value):
    """A value as ours, where it says the same by another word; of a size without its unit, the text."""
    if key in _SIZES and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if key == "max_steps" and str(value) in ("-1", "-1.0"):
        return None  # transformers' word for no limit
    if not isinstance(value, str | bool):
        return value
    word = value.lower().replace("-", "_") if isinstance(value, str) else value
    ours = SAME.get(key, {}).get(word, value)
    if key == "lora_target_modules" and ours not in ("all-linear", "peft"):
        if isinstance(ours, str) and _MODULES.fullmatch(ours):
            return [name.strip() for name in ours.split(",")]
    return ours


def meant(key: str, keys) -> str:
    """`nearest`, by what keys are called elsewhere, too."""
    ours = called(key)
    return nearest(ours if ours in keys else key, keys)


def called(key) -> str:
    """The key that is called so elsewhere, too; or the word itself."""
    return _KEYS.get(str(key).lower().replace("-", "_"), key)
