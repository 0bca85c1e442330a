"""Axolotl's configs key by key."""

from fastdpo.config.names import OPTIMIZERS
from fastdpo.convert import shared
from fastdpo.convert.axolotl_data import DATA_REASONS, data
from fastdpo.convert.rules import Draft, Tool, beside, only, unread
from fastdpo.convert.shared import LOOKS, NO_DROPOUT, NO_SUCH, QUANTISED, SAME, SHUFFLED, SPEED

_LOSSES = {"dpo": "sigmoid", "ipo": "ipo", "kto": "kto", "orpo": "orpo", "simpo": "simpo"}
_OPTIONS = "use_weighting simpo_gamma desirable_weight undesirable_weight".split()


def _loss(draft: Draft, rl=None) -> None:
    if rl is None:
        return
    if rl not in _LOSSES:
        return draft.refuse("rl")
    names, weights = draft.take("dpo_loss_type"), draft.take("dpo_loss_weights")
    names = [names] if isinstance(names, str) else names or [_LOSSES[rl]]
    if rl not in ("dpo", "ipo") and names != [_LOSSES[rl]]:
        draft.refuse("dpo_loss_type")
    if weights and len(weights) != len(names):
        draft.refuse("dpo_loss_weights", weights)
    parts = dict(zip(names, map(float, weights or [1] * len(names))))
    if rl == "simpo":
        shared.with_likelihood(draft, parts)
    draft.take("cpo_alpha")
    if rl == "orpo" and draft.theirs.get("orpo_alpha") is not None:
        draft.set("beta", float(draft.take("orpo_alpha")), "orpo_alpha")
    smoothing = draft.take("label_smoothing", 0.0 if "robust" in parts else None)
    options = {"beta": draft.take("beta", 0.1), "label_smoothing": smoothing}
    if "beta" in draft.ours:
        del options["beta"]
    told = [name for name in ("dpo_loss_type", "dpo_loss_weights") if draft.theirs.get(name)]
    shared.objective(draft, parts, options | {name: draft.take(name) for name in _OPTIONS}, "rl", *told)


def _lora(
    draft: Draft,
    adapter=None,
    lora_model_dir=None,
    lora_r=8,
    lora_alpha=None,
    lora_target_modules=None,
    lora_target_linear=False,
) -> None:
    if lora_model_dir:
        draft.set("adapter", lora_model_dir, "lora_model_dir")
    if adapter is None or lora_model_dir:
        return
    if adapter == "qlora":
        draft.left["load_in_4bit"] = True
    elif adapter != "lora":
        return draft.refuse("adapter")
    draft.set("lora_rank", lora_r or 8, "adapter", "lora_r")
    if lora_alpha is not None:
        draft.set("lora_alpha", float(lora_alpha), "lora_alpha")
    if lora_target_linear:
        draft.set("lora_target_modules", "all-linear", "lora_target_linear")
    elif lora_target_modules:
        shared.target_modules(draft, "lora_target_modules", lora_target_modules)


def _optim(
    draft: Draft,
    optimizer=None,
    excess_length_strategy=None,
    wandb_project=None,
    saves_per_epoch=None,
    evals_per_epoch=None,
) -> None:
    if optimizer is not None:
        draft.set("optim", OPTIMIZERS.get(optimizer, optimizer), "optimizer")
    if excess_length_strategy == "raise":
        draft.set("strict", True, "excess_length_strategy")
    if excess_length_strategy is not None:
        ours = "keep_start" if excess_length_strategy == "truncate" else "drop"
        draft.set("truncation", ours, "excess_length_strategy")
    if wandb_project:
        draft.left["report_to"] = ["wandb"]
    for name, value in (("saves_per_epoch", saves_per_epoch), ("evals_per_epoch", evals_per_epoch)):
        if value is not None:
            draft.leave(name, "save_steps and eval_steps count steps here")


def _memory(draft: Draft, gradient_checkpointing=None, activation_offloading=None) -> None:
    """Their checkpointing may say where its inputs go, and so may activation_offloading."""
    level, offload = gradient_checkpointing, activation_offloading
    if isinstance(level, str):
        draft.set("activation_offloading", True, "gradient_checkpointing")
    elif offload:
        draft.set("activation_offloading", True, "activation_offloading")
    if level is not None:
        draft.set("gradient_checkpointing", bool(level), "gradient_checkpointing")


def _template(draft: Draft, chat_template=None) -> None:
    if chat_template in ("jinja", "alpaca"):
        draft.refuse("chat_template")
    elif chat_template and chat_template.endswith(".jinja"):
        draft.set("chat_template", chat_template, "chat_template")
    elif chat_template and chat_template != "tokenizer_default":
        shared.own_template(draft, "chat_template")


AXOLOTL = Tool(
    "Axolotl",
    only_here="base_model rl rl_beta micro_batch_size sequence_len sample_packing dpo_loss_type "
    "dpo_loss_weights val_set_size dataset_prepared_path lora_target_linear lora_model_dir "
    "pad_to_sequence_len test_datasets saves_per_epoch evals_per_epoch excess_length_strategy",
    defaults=dict(
        micro_batch_size=1,
        num_epochs=1.0,
        lr_scheduler="cosine",
        excess_length_strategy="drop",
        lora_r=8,
        warmup_ratio=0.03,
    ),
    parts=(*shared.RUN, _lora, data, shared.held_out, _optim, _template, _memory, *shared.KEPT, _loss),
    reasons=shared.REASONS
    | DATA_REASONS
    | {
        "rl": f"fastdpo does {', '.join(_LOSSES)}",
        "dpo_loss_type": "it is of rl: dpo alone",
        "dpo_loss_weights": "a weight for each loss is needed",
        "adapter": "fastdpo trains a LoRA or all weights; set lora or remove it",
        "chat_template": "write the template to a file and give chat_template: FILE.jinja",
    },
    names={
        "per_device_train_batch_size": "micro_batch_size",
        "num_train_epochs": "num_epochs",
        "val_size": "val_set_size",
        "beta": "rl_beta",
        "label_smoothing": "dpo_label_smoothing",
        "use_weighting": "dpo_use_weighting",
        "desirable_weight": "kto_desirable_weight",
        "undesirable_weight": "kto_undesirable_weight",
    },
    model_key="base_model",
    rows=shared.TRANSFORMERS
    | {
        "base_model": "model",
        "sequence_len": "max_length",
        "lr_scheduler": "lr_scheduler_type",
        "revision_of_model": only("main", fix="download the revision and give its folder as base_model"),
        "load_in_8bit": only(False, fix=QUANTISED),
        "lora_dropout": only(0, fix=NO_DROPOUT),
        "lora_modules_to_save unfrozen_parameters": only([], fix=NO_SUCH),
        "peft_use_dora": "use_dora",
        "peft_use_rslora": "use_rslora",
        "tiled_mlp": SAME,
        "tiled_mlp_num_shards": unread("a tile has a fixed number of tokens"),
        "rl_adapter_ref_model": only(False, fix="the reference is what training starts from; remove it"),
        "rpo_alpha": only(0, fix="use dpo_loss_type: [sigmoid, sft] with dpo_loss_weights"),
        "special_tokens": only({}, fix="set them in the tokenizer itself (eos_token changes what is scored)"),
        "tokenizer_config": only(fix="put that tokenizer into the model's folder"),
        "early_stopping_patience": only(fix="see load_best, which keeps the best checkpoint; remove it"),
        "tokens": only([], fix="add them to the model and tokenizer first"),
        "shuffle_merged_datasets": only(True, fix=SHUFFLED),
        "group_by_length": only(False, fix=SHUFFLED),
        "train_on_inputs": shared.NOT_ON_PROMPTS,
        "dataset_exact_deduplication": only(False, fix="remove the duplicates from the data first"),
        "precompute_ref_log_probs": shared.ONCE,
        "chat_template_jinja": beside("chat_template: jinja"),
        "simpo_gamma cpo_alpha orpo_alpha dpo_label_smoothing": beside("rl"),
        "kto_desirable_weight kto_undesirable_weight": beside("rl: kto"),
        "rl_beta dpo_loss_type dpo_loss_weights dpo_use_weighting": beside("the rest of the config"),
        "model_type tokenizer_type sample_packing eval_sample_packing pad_to_sequence_len flash_attention "
        "flex_attention sdp_attention xformers_attention attn_implementation dataset_processes "
        "dataset_prepared_path dpo_use_liger_kernel dpo_padding_free plugins liger_rope liger_rms_norm "
        "liger_glu_activation liger_fused_linear_cross_entropy lora_mlp_kernel lora_qkv_kernel "
        "lora_o_kernel eval_batch_size local_rank debug strict_config": SPEED,
        "wandb_entity wandb_watch wandb_name wandb_log_model wandb_run_id mlflow_experiment_name "
        "use_tensorboard is_llama_derived_model": LOOKS,
    },
)
