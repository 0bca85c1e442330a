"""TRL's configs (DPOConfig, CPOConfig, ModelConfig, ScriptArguments) and transformers' own, key by key."""

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
    loading_dtype,
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

_BATCHES = "batches are packed here"
_ADAM = "fastdpo's AdamW has betas 0.9 and 0.999 and eps 1e-8; remove it"
IN_ARGS = "without a loss_type beside it, give it in objective_args"
LOSS_OPTIONS = (
    "ld_alpha f_divergence_type f_alpha_divergence_coef use_weighting discopop_tau rpo_alpha "
    "simpo_gamma cpo_alpha desirable_weight undesirable_weight loss_weights"
).split()

TRANSFORMERS = {  # TrainingArguments, which TRL and LLaMA-Factory share
    "output_dir": to("output_dir"),
    "learning_rate": to("learning_rate"),
    "lr_scheduler_type": to("lr_scheduler_type"),
    "lr_scheduler_kwargs": only({}, otherwise=NO_SUCH),
    "optim": to("optim", OPTIMIZERS),
    "optim_args": only("", otherwise=NO_SUCH),
    "optim_target_modules": only(otherwise=NO_SUCH),
    "adam_beta1": only(0.9, otherwise=_ADAM),
    "adam_beta2": only(0.999, otherwise=_ADAM),
    "adam_epsilon": only(1e-8, otherwise=_ADAM),
    "weight_decay": to("weight_decay"),
    "max_grad_norm": to("max_grad_norm"),
    "seed": to("seed"),
    "data_seed": unread("the order of rows goes by seed"),
    "logging_steps": to("logging_steps"),
    "save_total_limit": to("save_total_limit"),
    "gradient_checkpointing": to("gradient_checkpointing"),
    "label_smoothing_factor": only(0, otherwise="it is not DPO's; label_smoothing is"),
    "neftune_noise_alpha": only(0, otherwise=NO_SUCH),
    "train_sampling_strategy": only("random", otherwise="rows are shuffled by seed; remove it"),
    "group_by_length": only(
        False, otherwise="rows are shuffled by seed, and packed without padding; remove it"
    ),
    "dataloader_drop_last": only(False, otherwise="every row is trained on; remove it"),
    "average_tokens_across_devices": unread("there is one device"),
    "auto_find_batch_size": unread("max_tokens bounds memory, and batch_size stays"),
    "resume_from_checkpoint": unread("say --resume"),
    "overwrite_output_dir": to("overwrite"),
    "deepspeed": unread("there is one device: batch_size is the whole batch, of all devices together"),
    "fsdp": unread("there is one device: batch_size is the whole batch, of all devices together"),
    **dict.fromkeys(("metric_for_best_model", "greater_is_better"), part_of("load_best_model_at_end")),
    **dict.fromkeys(
        (
            "tf32 dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor "
            "dataloader_persistent_workers torch_compile torch_compile_backend torch_compile_mode "
            "use_liger_kernel gradient_checkpointing_kwargs ddp_timeout ddp_find_unused_parameters "
            "ddp_backend use_cpu torch_empty_cache_steps per_device_eval_batch_size "
            "eval_accumulation_steps bf16_full_eval fp16_full_eval fsdp_config accelerator_config "
            "remove_unused_columns full_determinism"
        ).split(),
        unread(SPEED),
    ),
    **dict.fromkeys(
        "logging_strategy logging_first_step logging_dir log_level run_name disable_tqdm do_train do_eval "
        "eval_on_start eval_delay save_only_model save_safetensors hub_strategy "
        "hub_private_repo hub_token hub_revision hub_model_revision project include_num_input_tokens_seen "
        "prediction_loss_only save_on_each_node".split(),
        unread(LOOKS),
    ),
}


def _model(draft: Draft) -> None:
    if not draft.take("use_peft"):
        named = [k for k in ("lora_r", "lora_alpha", "lora_target_modules", "lora_dropout") if draft.take(k)]
        if named:
            draft.notes.append(f"{', '.join(named)}: left out, use_peft is not set")
        return
    draft.set("lora_rank", draft.take("lora_r", 16), "lora_r with use_peft")
    draft.set("lora_alpha", float(draft.take("lora_alpha", 32)), "lora_alpha")
    targets = draft.take("lora_target_modules")
    if targets is None:
        draft.check("lora_target_modules is not given: peft's choice for the model is not ours, all-linear")
    else:
        draft.set("lora_target_modules", modules(targets), f"lora_target_modules {targets}")
    dropout = draft.take("lora_dropout")
    if dropout:
        draft.refuse("lora_dropout", dropout, NO_DROPOUT)
    if dropout is None and draft.defaults:
        draft.check("lora_dropout is not given: TRL's default is 0.05; there is none here")


def _data(draft: Draft) -> None:
    name, config = draft.take("dataset_name"), draft.take("dataset_config")
    if sets := draft.take("datasets"):
        if len(sets) != 1 or not set(sets[0]) <= {"path", "name", "split"}:
            draft.refuse("datasets", sets, "give one data set as data, and its columns' names as data_format")
        name, config = sets[0]["path"], sets[0].get("name")
        draft.left["dataset_train_split"] = sets[0].get("split")
    mixer, split = draft.take("dataset_mixer"), draft.take("dataset_train_split")
    evaluates = draft.left.get("eval_strategy") or draft.left.get("evaluation_strategy") or "no"
    if mixer:  # alignment-handbook's
        if len(mixer) != 1 or next(iter(mixer.values())) != 1:
            draft.refuse("dataset_mixer", mixer, "give one data set as data")
        (name,) = mixer
        splits = draft.take("dataset_splits", ["train"])
        split, config = (
            next(s for s in splits if "test" not in s),
            (draft.take("dataset_configs") or [None])[0],
        )
        tests = [s for s in splits if "test" in s]
        if tests:
            draft.set("eval_data", _spec(name, config, tests[0]), f"dataset_splits {tests[0]}")
    if name is None:
        return
    draft.set("data", _spec(name, config, split), f"dataset_name {name}")
    test = draft.take("dataset_test_split", "test" if draft.defaults else None)
    if test and evaluates not in ("no", False) and "eval_data" not in draft.ours:
        draft.set("eval_data", _spec(name, config, test), f"dataset_test_split {test}")


def _spec(name: str, config: str | None, split: str | None) -> str:
    return name + (f":{config}" if config else "") + (f"#{split}" if split and split != "train" else "")


def _loss(draft: Draft) -> None:
    said, weights = draft.take("loss_type", "sigmoid"), draft.take("loss_weights")
    names = [said] if isinstance(said, str) else list(said)
    parts = dict(zip(names, weights or [1.0] * len(names)))
    if len(parts) != len(names) or (weights and len(weights) != len(names)):
        draft.refuse("loss_weights", weights, f"a weight for each of {', '.join(names)}, each named once")
    parts = {{"aot_pair": "aot"}.get(name, name): weight for name, weight in parts.items()}
    if alpha := draft.take("rpo_alpha"):
        parts["sft"] = alpha
        draft.notes.append(f"rpo_alpha {alpha} -> the loss sft, as TRL itself has it since 0.29")
    cpo_alpha = draft.take("cpo_alpha", 1.0 if "simpo" in parts else None)
    if "simpo" in parts and cpo_alpha:
        parts["sft"] = cpo_alpha
        draft.notes.append(f"{draft.word('cpo_alpha', cpo_alpha)} -> the loss sft beside simpo")
        cpo_alpha = None
    divergence = draft.take("f_divergence_type", "reverse_kl")
    coefficient = draft.take("f_alpha_divergence_coef")
    smoothing = draft.take("label_smoothing", 0.0 if "robust" in parts else None)
    options = {
        "beta": ("beta", draft.take("beta", 0.1), False),
        "label_smoothing": ("label_smoothing", smoothing, False),
        "ld_alpha": ("ld_alpha", draft.take("ld_alpha"), True),
        "f_divergence_type": ("f_divergence_type", None if divergence == "reverse_kl" else divergence, True),
        "f_alpha_divergence_coef": (
            "f_alpha_divergence_coef",
            coefficient if divergence == "alpha_divergence" else None,
            True,
        ),
        "use_weighting": ("use_weighting", draft.take("use_weighting") or None, True),
        "discopop_tau": ("discopop_tau", draft.take("discopop_tau"), False),
        "simpo_gamma": ("simpo_gamma", draft.take("simpo_gamma"), False),
        "cpo_alpha": ("cpo_alpha", cpo_alpha or None, False),
        "desirable_weight": ("desirable_weight", draft.take("desirable_weight"), False),
        "undesirable_weight": ("undesirable_weight", draft.take("undesirable_weight"), False),
    }
    objective(draft, {name: float(weight) for name, weight in parts.items()}, options)


def _loss_if_said(draft: Draft) -> None:
    """A whole config has a loss, named or not; single flags change only what they name."""
    if draft.defaults or "loss_type" in draft.left:
        _loss(draft)


TRL = Tool(
    "TRL",
    frozenset(
        (
            "loss_type loss_weights dataset_name dataset_config dataset_train_split "
            "dataset_test_split dataset_mixer dataset_splits use_peft truncation_mode "
            "max_prompt_length max_completion_length padding_free precompute_ref_log_probs "
            "precompute_ref_batch_size rpo_alpha reference_free sync_ref_model ref_model_mixup_alpha "
            "ref_model_sync_steps f_divergence_type f_alpha_divergence_coef use_weighting "
            "discopop_tau dataset_num_proc use_liger_loss generate_during_eval"
        ).split()
    ),
    {"num_train_epochs": 3.0, "per_device_train_batch_size": 8},
    TRANSFORMERS
    | {
        "model_name_or_path": to("model"),
        "model_revision": only("main", otherwise="download the revision and give its folder as model"),
        "trust_remote_code": only(False, otherwise=NO_CODE),
        "load_in_4bit": to("load_in_4bit"),
        "load_in_8bit": only(False, otherwise=QUANTISED),
        "use_dora": to("use_dora"),
        "use_rslora": to("use_rslora"),
        "activation_offloading": to("activation_offloading"),
        "lora_modules_to_save": only([], otherwise=NO_SUCH),
        "lora_target_parameters": only([], otherwise=NO_SUCH),
        "lora_task_type": only("CAUSAL_LM", otherwise=NO_SUCH),
        "max_length": to("max_length"),
        "max_prompt_length": only(otherwise="rows are cut by max_length and truncation alone; remove it"),
        "max_completion_length": only(otherwise="rows are cut by max_length and truncation alone; remove it"),
        "truncation_mode": to("truncation"),
        "disable_dropout": only(True, otherwise="fastdpo switches dropout off; set it to true"),
        "reference_free": only(False, otherwise="use a loss without a reference: simpo, cpo, orpo or slic"),
        "sync_ref_model": only(False, otherwise="the reference does not move here; stages does it in steps"),
        "router_aux_loss_coef": only(0, otherwise=NO_SUCH),
        "ref_model_mixup_alpha": part_of("sync_ref_model"),
        "ref_model_sync_steps": part_of("sync_ref_model"),
        "model_init_kwargs": only({}, otherwise="give the settings as keys of their own"),
        "chat_template_path": to("chat_template"),
        "precompute_ref_log_probs": unread("the reference is always computed once and kept"),
        "padding_free": unread(_BATCHES),
        "pad_to_multiple_of": unread(_BATCHES),
        "pad_token": unread(_BATCHES),
        "bnb_4bit_quant_type": part_of("load_in_4bit"),
        "use_bnb_nested_quant": part_of("load_in_4bit"),
        "bnb_4bit_quant_storage": part_of("load_in_4bit"),
        "dataset_streaming": only(False, otherwise="rows are read once, before training; set it to false"),
        **dict.fromkeys(
            (
                "dataset_num_proc preprocessing_num_workers precompute_ref_batch_size "
                "attn_implementation use_liger_loss ignore_bias_buffers "
                "generate_during_eval"
            ).split(),
            unread(SPEED),
        ),
        **dict.fromkeys(("dataset_splits", "dataset_configs"), part_of("dataset_mixer")),
        **dict.fromkeys(("dataset_train_split", "dataset_test_split"), part_of("dataset_name")),
        **dict.fromkeys(LOSS_OPTIONS, only(otherwise=IN_ARGS)),
    },
    COMMON
    | set(
        "per_device_train_batch_size num_train_epochs dtype torch_dtype use_peft lora_r lora_alpha "
        "lora_dropout lora_target_modules dataset_name dataset_config datasets dataset_mixer loss_type beta "
        "label_smoothing".split()
    ),
    (
        batch("per_device_train_batch_size"),
        epochs("num_train_epochs"),
        warmup,
        precision,
        loading_dtype("dtype"),
        loading_dtype("torch_dtype"),
        _model,
        _data,
        saving,
        upload,
        trackers,
        _loss_if_said,
    ),
)
