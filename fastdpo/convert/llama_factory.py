"""LLaMA-Factory's configs key by key."""

from pathlib import Path

from fastdpo.convert import shared
from fastdpo.convert.rules import Draft, Tool, beside, only, unread
from fastdpo.convert.shared import LOOKS, NO_DROPOUT, NO_SUCH, QUANTISED, SAME, SPEED

_NO_NAME = "it is no name in a dataset_info.json"
_TEXT = only(fix="fastdpo trains on text only; remove it")
_REFERENCE = only(fix="the reference is the model that training starts from; remove it")


def _loss(draft: Draft, stage="dpo", pref_loss="sigmoid", beta=0.1, rpo_alpha=None) -> None:
    if stage not in ("dpo", "kto"):
        return draft.refuse("stage")
    if pref_loss == "kto_pair":
        return draft.refuse("pref_loss")
    smoothing, gamma = draft.take("label_smoothing"), draft.take("simpo_gamma")
    weights = {name: draft.take(name) for name in ("desirable_weight", "undesirable_weight")}
    name, options = pref_loss, {"beta": beta}
    if stage == "kto":
        name, options = "kto", options | weights
    options |= {"label_smoothing": smoothing if name == "sigmoid" else None, "simpo_gamma": gamma}
    if rpo_alpha:  # their pref_ftx
        if name != "sigmoid" or smoothing:
            return draft.refuse("rpo_alpha")
        name = "rpo"  # DPO and the winner's likelihood a token, each pair's own mean: what pref_ftx is
        options["rpo_alpha"] = float(rpo_alpha)
    shared.objective(draft, {name: 1.0}, options, "stage" if stage == "kto" else "pref_loss")


def _lora(
    draft: Draft,
    finetuning_type=None,
    lora_rank=None,
    lora_alpha=None,
    lora_target=None,
    pure_bf16=False,
    quantization_bit=None,
    quantization_method="bnb",
) -> None:
    kind, bits, how = finetuning_type, quantization_bit, quantization_method
    if kind not in ("lora", "full", None):
        return draft.refuse("finetuning_type")
    if pure_bf16 and kind == "lora":
        draft.check("pure_bf16", "left out, a LoRA's weights are kept in fp32 here")
    elif pure_bf16:
        draft.set("pure_bf16", True, "pure_bf16")
        draft.check("pure_bf16", "fastdpo rounds its updates stochastically, LLaMA-Factory to nearest")
    if bits is not None:
        if bits != 4 or how not in ("bnb", "bitsandbytes"):
            draft.refuse("quantization_bit", f"{bits} by {how}")
        draft.set("load_in_4bit", True, "quantization_bit")
    if kind == "full" or (kind == "lora" and draft.theirs.get("adapter_name_or_path")):
        return  # the adapter has all of that
    if lora_rank or kind:
        draft.set("lora_rank", lora_rank or 8, "lora_rank")
    if lora_alpha is not None:
        draft.set("lora_alpha", float(lora_alpha), "lora_alpha")
    if lora_target is not None:
        shared.target_modules(draft, "lora_target", lora_target)


def _data(draft: Draft, dataset=None, eval_dataset=None, dataset_dir="data", max_samples=None) -> None:
    cut = f"#train[:{max_samples}]" if max_samples else ""
    for key, name, ours in (("dataset", dataset, "data"), ("eval_dataset", eval_dataset, "eval_data")):
        if name is None:
            continue
        names = [one.strip() for one in name.split(",")] if isinstance(name, str) else name
        if len(names) != 1:
            draft.refuse(key)
        elif "/" in names[0] or Path(names[0]).suffix in (".jsonl", ".json", ".csv", ".parquet"):
            draft.refuse(key, fix=f"{_NO_NAME}; did you mean {ours}?")
        else:
            more = ["max_samples"] if max_samples else []
            draft.set(ours, f"{dataset_dir}:{names[0]}{cut}", key, *more)


def _template(draft: Draft, template=None, cutoff_len=None) -> None:
    """LLaMA-Factory writes prompts with its own templates, fastdpo with the tokenizer's."""
    if template in ("default", "empty", "vanilla", "alpaca", "vicuna", "fewshot"):
        draft.refuse("template")
    elif template:
        shared.own_template(draft, "template")
    if cutoff_len:
        draft.set("max_length", cutoff_len, "cutoff_len")
        draft.check("cutoff_len", "LLaMA-Factory cuts longer rows at the prompt's end too; see truncation")


def _thinking(draft: Draft, key: str, value) -> None:
    draft.set("chat_template_kwargs", {key: value}, key)


def _balance(draft: Draft, key: str, value) -> None:
    draft.set("router_aux_loss_coef", float(value), key)
    if value:
        draft.check(key, "LLaMA-Factory's SFT adds the experts' balance loss, its DPO not; here it is on")


LLAMA_FACTORY = Tool(
    "LLaMA-Factory",
    only_here="stage finetuning_type pref_loss pref_beta pref_ftx cutoff_len template dataset dataset_dir "
    "eval_dataset lora_target max_samples val_size plot_loss overwrite_cache quantization_bit flash_attn "
    "kto_chosen_weight kto_rejected_weight dpo_label_smoothing adapter_name_or_path",
    defaults=shared.DEFAULTS
    | {"learning_rate": 5e-5, "cutoff_len": 2048, "finetuning_type": "lora", "stage": "dpo"},
    parts=(*shared.RUN, _lora, _data, shared.held_out, _template, *shared.KEPT, _loss),
    reasons=shared.REASONS
    | {
        "stage": "fastdpo does preference training: dpo or kto (stages does SFT before it)",
        "pref_loss": "kto is not that loss; choose one of `fastdpo objectives`",
        "rpo_alpha": "fastdpo has it beside plain pref_loss: sigmoid only; remove it",
        "finetuning_type": "fastdpo trains a LoRA or all weights; set lora or full",
        "quantization_bit": QUANTISED,
        **dict.fromkeys(("dataset", "eval_dataset"), "give one data set; write the rows into one file"),
        "template": "write that template to a Jinja file and give chat_template: FILE.jinja",
    },
    names={
        "beta": "pref_beta",
        "label_smoothing": "dpo_label_smoothing",
        "rpo_alpha": "pref_ftx",
        "desirable_weight": "kto_chosen_weight",
        "undesirable_weight": "kto_rejected_weight",
    },
    rows=shared.TRANSFORMERS
    | {
        "model_name_or_path": "model",
        "adapter_name_or_path": "adapter",
        "moe_aux_loss_coef": _balance,
        "use_dora use_rslora": SAME,
        "lora_dropout": only(0, fix=NO_DROPOUT),
        "additional_target": only("", fix=NO_SUCH),
        "create_new_adapter": only(False, fix="merge the first adapter into the model, then train a new one"),
        "loraplus_lr_ratio": only(fix=NO_SUCH),
        "pref_bco_weight": only(0, fix="its BCO term has another running mean; see objective: {...: ...}"),
        "ld_alpha": only(fix="LLaMA-Factory weights the policy only; see objective_args: ld_alpha"),
        "ref_model ref_model_adapters": _REFERENCE,
        "ref_model_quantization_bit": only(fix="the reference is the model itself; remove it"),
        "train_on_prompt": shared.NOT_ON_PROMPTS,
        "mask_history": unread("only the compared responses are scored"),
        "tokenized_path": only(fix="give the rows themselves as dataset"),
        "streaming": shared.READ_ONCE,
        "mix_strategy": only("concat", fix=NO_SUCH),
        "tool_format": only(fix="tools are written by the chat template; remove it"),
        "default_system": only(fix="give rows a system column; remove it"),
        "enable_thinking": _thinking,
        "rope_scaling": only(fix="set it in the model's own config"),
        "resize_vocab": only(False, fix=NO_SUCH),
        "pissa_init use_galore use_apollo use_badam use_adam_mini use_muon use_llama_pro fp8 shift_attn "
        "mixture_of_depths disable_shuffling": only(False, fix=NO_SUCH),
        "image_max_pixels video_max_pixels freeze_vision_tower media_dir": _TEXT,
        "kto_chosen_weight kto_rejected_weight": beside("stage: kto"),
        "simpo_gamma dpo_label_smoothing": beside("pref_loss"),
        "packing neat_packing flash_attn enable_liger_kernel use_unsloth use_unsloth_gc upcast_layernorm "
        "upcast_lmhead_output disable_gradient_checkpointing preprocessing_num_workers low_cpu_mem_usage "
        "preprocessing_batch_size overwrite_cache use_reentrant_gc buffer_size compute_accuracy "
        "include_effective_tokens_per_second cache_dir use_fast_tokenizer": SPEED,
        "plot_loss use_swanlab swanlab_project swanlab_run_name ray_run_name print_param_status "
        "infer_backend export_dir hf_hub_token": LOOKS,
    },
)
