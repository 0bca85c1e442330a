"""Axolotl's configs key by key."""

from fastdpo.convert.axolotl_data import data
from fastdpo.convert.rules import (
    COMMON,
    LOOKS,
    NO_CODE,
    NO_DROPOUT,
    NO_SUCH,
    OPTIMIZERS,
    QUANTISED,
    SPEED,
    Draft,
    Tool,
    batch,
    epochs,
    modules,
    objective,
    only,
    part_of,
    precision,
    saving,
    to,
    trackers,
    unread,
    upload,
    warmup,
)
from fastdpo.convert.trl import TRANSFORMERS

_LOSSES = {"dpo": "sigmoid", "ipo": "ipo", "kto": "kto", "orpo": "orpo", "simpo": "simpo"}


def _loss(draft: Draft) -> None:
    rl = draft.take("rl")
    if rl is None:
        return
    if rl not in _LOSSES:
        draft.refuse("rl", rl, f"fastdpo does {', '.join(_LOSSES)}")
    names, weights = draft.take("dpo_loss_type"), draft.take("dpo_loss_weights")
    names = [names] if isinstance(names, str) else names or [_LOSSES[rl]]
    if rl not in ("dpo", "ipo") and names != [_LOSSES[rl]]:
        draft.refuse("dpo_loss_type", names, f"it is of rl: dpo, not of rl: {rl}")
    if weights and len(weights) != len(names):
        draft.refuse("dpo_loss_weights", weights, f"a weight for each of {', '.join(names)}")
    parts = dict(zip(names, map(float, weights or [1] * len(names))))
    cpo_alpha = draft.take("cpo_alpha", 1.0 if rl == "simpo" else None)
    if rl == "simpo" and cpo_alpha:
        parts["sft"] = float(cpo_alpha)
        draft.notes.append(f"{draft.word('cpo_alpha', cpo_alpha)} -> the loss sft beside simpo")
    beta_key = "orpo_alpha" if rl == "orpo" and draft.given("orpo_alpha") else "rl_beta"
    smoothing = draft.take("dpo_label_smoothing", 0.0 if "robust" in parts else None)
    options = {
        "beta": (beta_key, draft.take(beta_key, 0.1), False),
        "label_smoothing": ("dpo_label_smoothing", smoothing, False),
        "use_weighting": ("dpo_use_weighting", draft.take("dpo_use_weighting") or None, True),
        "simpo_gamma": ("simpo_gamma", draft.take("simpo_gamma"), False),
        "desirable_weight": ("kto_desirable_weight", draft.take("kto_desirable_weight"), False),
        "undesirable_weight": ("kto_undesirable_weight", draft.take("kto_undesirable_weight"), False),
    }
    objective(draft, parts, options)


def _adapter(draft: Draft) -> None:
    kind, folder = draft.take("adapter"), draft.take("lora_model_dir")
    rank, alpha, targets = (draft.take(key) for key in ("lora_r", "lora_alpha", "lora_target_modules"))
    linear = draft.take("lora_target_linear")
    if folder:
        draft.set("adapter", folder, f"lora_model_dir {folder}")
    if kind is None or folder:
        return
    if kind == "qlora":
        draft.left["load_in_4bit"] = True
    elif kind != "lora":
        draft.refuse("adapter", kind, "fastdpo trains a LoRA or all weights; set lora or remove it")
    draft.set("lora_rank", rank or 8, draft.word("lora_r", rank or 8))
    if alpha is not None:
        draft.ours["lora_alpha"] = float(alpha)
    if linear:
        draft.set("lora_target_modules", "all-linear", "lora_target_linear true")
    elif targets:
        draft.set("lora_target_modules", modules(targets), f"lora_target_modules {targets}")


def _optimizer(draft: Draft) -> None:
    if (name := draft.take("optimizer")) is not None:
        draft.set("optim", OPTIMIZERS.get(name, name), f"optimizer {name}")
    long_rows = draft.take("excess_length_strategy", "drop" if draft.defaults else None)
    if long_rows == "raise":
        draft.set("strict", True, "excess_length_strategy raise")
    if long_rows is not None:
        ours = "keep_start" if long_rows == "truncate" else "drop"
        draft.set("truncation", ours, draft.word("excess_length_strategy", long_rows))
    if draft.take("wandb_project"):
        draft.left["report_to"] = ["wandb"]
    for name in ("saves_per_epoch", "evals_per_epoch"):
        if (value := draft.take(name)) is not None:
            draft.notes.append(f"{name} {value}: left out; save_steps and eval_steps count steps here")


def _activations(draft: Draft) -> None:
    """Their checkpointing may say where its inputs go, and so may activation_offloading."""
    level, offload = draft.take("gradient_checkpointing"), draft.take("activation_offloading")
    if isinstance(level, str):
        draft.set("activation_offloading", True, f"gradient_checkpointing {level}")
    elif offload:
        draft.set("activation_offloading", True, draft.word("activation_offloading", offload))
    if level is not None:
        draft.ours["gradient_checkpointing"] = bool(level)


def _template(draft: Draft) -> None:
    template = draft.take("chat_template")
    if template in ("jinja", "alpaca"):
        draft.refuse(
            "chat_template", template, "write the template to a file and give chat_template: FILE.jinja"
        )
    if template and template.endswith(".jinja"):
        draft.ours["chat_template"] = template
    elif template and template != "tokenizer_default":
        draft.check(
            f"chat_template {template}: left out, the tokenizer's own is used; compare in `fastdpo data`"
        )


AXOLOTL = Tool(
    "Axolotl",
    frozenset(
        (
            "base_model rl rl_beta micro_batch_size sequence_len sample_packing dpo_loss_type "
            "dpo_loss_weights val_set_size dataset_prepared_path lora_target_linear lora_model_dir "
            "pad_to_sequence_len test_datasets saves_per_epoch evals_per_epoch excess_length_strategy"
        ).split()
    ),
    {
        "micro_batch_size": 1,
        "num_epochs": 1.0,
        "lr_scheduler": "cosine",
        "excess_length_strategy": "drop",
        "lora_r": 8,
        "warmup_ratio": 0.03,
    },
    TRANSFORMERS
    | {
        "base_model": to("model"),
        "sequence_len": to("max_length"),
        "lr_scheduler": to("lr_scheduler_type"),
        "revision_of_model": only(
            "main", otherwise="download the revision and give its folder as base_model"
        ),
        "trust_remote_code": only(False, otherwise=NO_CODE),
        "load_in_8bit": only(False, otherwise=QUANTISED),
        "load_in_4bit": to("load_in_4bit"),
        "lora_dropout": only(0, otherwise=NO_DROPOUT),
        "lora_modules_to_save": only([], otherwise=NO_SUCH),
        "peft_use_dora": to("use_dora"),
        "peft_use_rslora": to("use_rslora"),
        "tiled_mlp": to("tiled_mlp"),
        "tiled_mlp_num_shards": unread("a tile has a fixed number of tokens"),
        "rl_adapter_ref_model": only(
            False, otherwise="the reference is what training starts from; remove it"
        ),
        "rpo_alpha": only(0, otherwise="use dpo_loss_type: [sigmoid, sft] with dpo_loss_weights"),
        "special_tokens": only(
            {}, otherwise="set them in the tokenizer itself (eos_token changes what is scored)"
        ),
        "tokenizer_config": only(otherwise="put that tokenizer into the model's folder"),
        "early_stopping_patience": only(
            otherwise="see load_best, which keeps the best checkpoint; remove it"
        ),
        "tokens": only([], otherwise="add them to the model and tokenizer first"),
        "unfrozen_parameters": only([], otherwise=NO_SUCH),
        "shuffle_merged_datasets": only(True, otherwise="rows are shuffled by seed; remove it"),
        "train_on_inputs": only(False, otherwise="responses are what is scored; set it to false"),
        "dataset_exact_deduplication": only(False, otherwise="remove the duplicates from the data first"),
        "precompute_ref_log_probs": unread("the reference is always computed once and kept"),
        "chat_template_jinja": part_of("chat_template: jinja"),
        "group_by_length": only(False, otherwise="rows are shuffled by seed; remove it"),
        **dict.fromkeys(("simpo_gamma", "cpo_alpha", "orpo_alpha", "dpo_label_smoothing"), part_of("rl")),
        **dict.fromkeys(("kto_desirable_weight", "kto_undesirable_weight"), part_of("rl: kto")),
        **dict.fromkeys(
            (
                "model_type tokenizer_type sample_packing eval_sample_packing "
                "pad_to_sequence_len flash_attention flex_attention sdp_attention xformers_attention "
                "attn_implementation dataset_processes dataset_prepared_path "
                "dpo_use_liger_kernel dpo_padding_free plugins liger_rope liger_rms_norm "
                "liger_glu_activation liger_fused_linear_cross_entropy lora_mlp_kernel lora_qkv_kernel "
                "lora_o_kernel eval_batch_size local_rank debug strict_config"
            ).split(),
            unread(SPEED),
        ),
        **dict.fromkeys(
            (
                "wandb_entity wandb_watch wandb_name wandb_log_model wandb_run_id mlflow_experiment_name "
                "use_tensorboard is_llama_derived_model"
            ).split(),
            unread(LOOKS),
        ),
    },
    COMMON
    | set(
        "micro_batch_size num_epochs adapter lora_model_dir lora_r lora_alpha lora_target_modules "
        "lora_target_linear datasets test_datasets val_set_size optimizer excess_length_strategy "
        "wandb_project saves_per_epoch evals_per_epoch chat_template rl rl_beta dpo_loss_type "
        "dpo_loss_weights dpo_use_weighting gradient_checkpointing activation_offloading".split()
    ),
    (
        batch("micro_batch_size"),
        epochs("num_epochs"),
        warmup,
        precision,
        _adapter,
        data,
        _optimizer,
        _template,
        _activations,
        saving,
        upload,
        trackers,
        _loss,
    ),
)
