"""LLaMA-Factory's configs key by key."""

from fastdpo.convert.rules import (
    COMMON,
    LOOKS,
    NO_CODE,
    NO_DROPOUT,
    NO_SUCH,
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

_TEXT = "fastdpo trains on text only; remove it"


def _stage(draft: Draft) -> None:
    stage, loss = draft.take("stage", "dpo"), draft.take("pref_loss", "sigmoid")
    if stage not in ("dpo", "kto"):
        draft.refuse(
            "stage", stage, "fastdpo does preference training: dpo or kto (stages does SFT before it)"
        )
    if loss == "kto_pair":
        draft.refuse("pref_loss", loss, "kto is not that loss; choose one of `fastdpo objectives`")
    beta, smoothing = draft.take("pref_beta", 0.1), draft.take("dpo_label_smoothing")
    weights = draft.take("kto_chosen_weight"), draft.take("kto_rejected_weight")
    gamma, ftx = draft.take("simpo_gamma"), draft.take("pref_ftx")
    name = "kto" if stage == "kto" else loss
    options = {"beta": ("pref_beta", beta, False)}
    if stage == "kto":
        names = ("desirable_weight", "undesirable_weight")
        keys = ("kto_chosen_weight", "kto_rejected_weight")
        options |= {name: (key, weight, False) for name, key, weight in zip(names, keys, weights)}
    options["label_smoothing"] = ("dpo_label_smoothing", smoothing if name == "sigmoid" else None, False)
    options["simpo_gamma"] = ("simpo_gamma", gamma, False)
    if ftx:
        if name != "sigmoid" or smoothing:
            draft.refuse("pref_ftx", ftx, "fastdpo has it beside plain pref_loss: sigmoid only; remove it")
        name = "rpo"  # DPO and the winner's likelihood a token, each pair's own mean: what pref_ftx is
        options = options | {"rpo_alpha": ("pref_ftx", float(ftx), True)}
    objective(draft, {name: 1.0}, options)


def _stage_if_said(draft: Draft) -> None:
    """A whole config has a loss, named or not; single flags change only what they name."""
    if draft.defaults or any(key in draft.left for key in ("stage", "pref_loss", "pref_beta", "pref_ftx")):
        _stage(draft)


def _adapter(draft: Draft) -> None:
    kind = draft.take("finetuning_type", "lora" if draft.defaults else None)
    if kind not in ("lora", "full", None):
        draft.refuse("finetuning_type", kind, "fastdpo trains a LoRA or all weights; set lora or full")
    rank, alpha, targets = (draft.take(key) for key in ("lora_rank", "lora_alpha", "lora_target"))
    if draft.take("pure_bf16"):
        if kind == "lora":
            draft.check("pure_bf16 true: left out, a LoRA's weights are kept in fp32 here")
        else:
            draft.set("pure_bf16", True, "pure_bf16 true")
            draft.check("pure_bf16: fastdpo rounds its updates stochastically, LLaMA-Factory to nearest")
    bits, how = draft.take("quantization_bit"), draft.take("quantization_method", "bnb")
    if bits is not None:
        if bits != 4 or how not in ("bnb", "bitsandbytes"):
            draft.refuse("quantization_bit", f"{bits} by {how}", QUANTISED)
        draft.set("load_in_4bit", True, f"quantization_bit {bits}")
    if kind == "full":
        return
    if kind == "lora" and draft.left.get("adapter_name_or_path"):
        return  # the adapter has all of that
    if rank or kind:
        draft.set("lora_rank", rank or 8, draft.word("lora_rank", rank or 8))
    if alpha is not None:
        draft.ours["lora_alpha"] = float(alpha)
    if targets is not None:
        draft.set("lora_target_modules", modules(targets), f"lora_target {targets}")


def _data(draft: Draft) -> None:
    folder, samples = draft.take("dataset_dir", "data"), draft.take("max_samples")
    cut = f"#train[:{samples}]" if samples else ""
    for key, ours in (("dataset", "data"), ("eval_dataset", "eval_data")):
        name = draft.take(key)
        if name is None:
            continue
        names = [one.strip() for one in name.split(",")] if isinstance(name, str) else name
        if len(names) != 1:
            draft.refuse(key, name, f"give one data set; write the rows of these into one file as {ours}")
        draft.set(
            ours,
            f"{folder}:{names[0]}{cut}",
            f"{key} {names[0]}" + (f", max_samples {samples}" if cut else ""),
        )
    if size := draft.take("val_size"):
        if size >= 1:
            draft.refuse("val_size", size, "give the share of rows to hold out, below 1")
        draft.set("eval_data", float(size), f"val_size {size}")


def _template(draft: Draft) -> None:
    """LLaMA-Factory writes prompts with its own templates, fastdpo with the tokenizer's."""
    if template := draft.take("template"):
        if template in ("default", "empty", "vanilla", "alpaca", "vicuna", "fewshot"):
            way_out = "write that template to a Jinja file and give chat_template: FILE.jinja"
            draft.refuse("template", template, way_out)
        draft.check(f"template {template}: left out, the tokenizer's own is used; compare in `fastdpo data`")
    if cutoff := draft.take("cutoff_len"):
        draft.set("max_length", cutoff, draft.word("cutoff_len", cutoff))
        draft.check("rows over cutoff_len: LLaMA-Factory cuts prompts at their end too; see truncation")


LLAMA_FACTORY = Tool(
    "LLaMA-Factory",
    frozenset(
        (
            "stage finetuning_type pref_loss pref_beta pref_ftx cutoff_len template dataset "
            "dataset_dir eval_dataset lora_target max_samples val_size plot_loss overwrite_cache "
            "quantization_bit flash_attn kto_chosen_weight kto_rejected_weight dpo_label_smoothing "
            "adapter_name_or_path"
        ).split()
    ),
    {"num_train_epochs": 3.0, "per_device_train_batch_size": 8, "learning_rate": 5e-5, "cutoff_len": 2048},
    TRANSFORMERS
    | {
        "model_name_or_path": to("model"),
        "adapter_name_or_path": to("adapter"),
        "trust_remote_code": only(False, otherwise=NO_CODE),
        "load_in_4bit": to("load_in_4bit"),
        "use_dora": to("use_dora"),
        "use_rslora": to("use_rslora"),
        "lora_dropout": only(0, otherwise=NO_DROPOUT),
        "additional_target": only("", otherwise=NO_SUCH),
        "create_new_adapter": only(
            False, otherwise="merge the first adapter into the model, then train a new one"
        ),
        "loraplus_lr_ratio": only(otherwise=NO_SUCH),
        "pref_bco_weight": only(
            0, otherwise="its BCO term has another running mean; see objective: {...: ...}"
        ),
        "ld_alpha": only(otherwise="LLaMA-Factory weights the policy only; see objective_args: ld_alpha"),
        "ref_model": only(otherwise="the reference is the model that training starts from; remove it"),
        "ref_model_adapters": only(
            otherwise="the reference is the model that training starts from; remove it"
        ),
        "ref_model_quantization_bit": only(otherwise="the reference is the model itself; remove it"),
        "train_on_prompt": only(False, otherwise="responses are what is scored; set it to false"),
        "mask_history": unread("only the compared responses are scored"),
        "tokenized_path": only(otherwise="give the rows themselves as dataset"),
        "streaming": only(False, otherwise="rows are read once, before training; set it to false"),
        "mix_strategy": only("concat", otherwise=NO_SUCH),
        "tool_format": only(otherwise="tools are written by the chat template; remove it"),
        "default_system": only(otherwise="give rows a system column; remove it"),
        "enable_thinking": unread("the chat template and chat_template_kwargs of a row say it"),
        "rope_scaling": only(otherwise="set it in the model's own config"),
        "resize_vocab": only(False, otherwise=NO_SUCH),
        **dict.fromkeys(
            (
                "pissa_init use_galore use_apollo use_badam use_adam_mini use_muon "
                "use_llama_pro fp8 shift_attn mixture_of_depths disable_shuffling"
            ).split(),
            only(False, None, otherwise=NO_SUCH),
        ),
        **dict.fromkeys(
            ("image_max_pixels", "video_max_pixels", "freeze_vision_tower", "media_dir"),
            only(otherwise=_TEXT),
        ),
        **dict.fromkeys(("kto_chosen_weight", "kto_rejected_weight"), part_of("stage: kto")),
        **dict.fromkeys(("simpo_gamma", "dpo_label_smoothing"), part_of("pref_loss")),
        **dict.fromkeys(
            (
                "packing neat_packing flash_attn enable_liger_kernel use_unsloth use_unsloth_gc "
                "upcast_layernorm upcast_lmhead_output disable_gradient_checkpointing "
                "preprocessing_num_workers low_cpu_mem_usage preprocessing_batch_size overwrite_cache "
                "use_reentrant_gc buffer_size compute_accuracy "
                "include_effective_tokens_per_second cache_dir use_fast_tokenizer"
            ).split(),
            unread(SPEED),
        ),
        **dict.fromkeys(
            (
                "plot_loss use_swanlab swanlab_project swanlab_run_name ray_run_name print_param_status "
                "infer_backend export_dir hf_hub_token"
            ).split(),
            unread(LOOKS),
        ),
    },
    COMMON
    | set(
        "per_device_train_batch_size num_train_epochs finetuning_type pure_bf16 quantization_bit "
        "quantization_method lora_rank lora_alpha lora_target "
        "dataset eval_dataset dataset_dir max_samples val_size template cutoff_len stage pref_loss pref_beta "
        "pref_ftx".split()
    ),
    (
        batch("per_device_train_batch_size"),
        epochs("num_train_epochs"),
        warmup,
        precision,
        _adapter,
        _data,
        _template,
        saving,
        upload,
        trackers,
        _stage_if_said,
    ),
)
