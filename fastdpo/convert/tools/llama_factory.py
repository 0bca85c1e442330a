"""LLaMA-Factory's configs: what several of its keys mean together. The others are in llama_factory_keys."""

from pathlib import Path

from fastdpo.convert.draft import Draft
from fastdpo.convert.rules import Tool
from fastdpo.convert.tools import shared
from fastdpo.convert.tools.llama_factory_keys import OLDER, ROWS
from fastdpo.convert.tools.shared import QUANTISED
from fastdpo.convert.tools.template_names import set_template

_LOSSES = ("sigmoid", "hinge", "ipo", "orpo", "simpo", "nca_pair")  # nca_pair: Light-R1's fork
_FILES = (".jsonl", ".json", ".csv", ".parquet")
_SMALLEST = 1e-6  # what its code takes for 0
_LONGEST_SIDE = 8192  # of image_resolution, before 2025; a larger one is of all pixels, as of early 2025
_MERGE = "the new LoRA is on the model with this one merged: merge it first, and give that as model"
_MERGE_SOME = "all but the last one are merged: merge them first, and give that as model"


def _loss(draft: Draft, stage="dpo", pref_loss="sigmoid", beta=0.1, rpo_alpha=None) -> None:
    """stage, or under stage: dpo the loss that pref_loss names; versions before 2024-05 have a stage orpo."""
    name = {"dpo": pref_loss, "kto": "kto", "orpo": "orpo"}.get(stage)
    told = draft.given("stage", "pref_loss") or ["pref_loss"]
    if name is None:
        return draft.refuse("stage")
    if stage == "dpo" and name not in _LOSSES:
        return draft.refuse("pref_loss")
    if draft.key("beta").endswith("_beta") and draft.key("beta") not in ("pref_beta", f"{stage}_beta"):
        draft.leave("beta", f"stage {stage} does not read it")  # orpo_beta beside stage: dpo
        beta = 0.1
    if stage == "dpo" and name in ("hinge", "ipo"):  # train/dpo/trainer.py 206 names no loss to TRL's
        draft.check("pref_loss", "LLaMA-Factory 0.9.5 trains sigmoid on TRL 0.24, whatever it says")
    smoothing = draft.take("label_smoothing")
    options = {name: draft.take(name) for name in ("simpo_gamma", "desirable_weight", "undesirable_weight")}
    options["beta"] = beta
    if name == "sigmoid":
        options["label_smoothing"] = smoothing
    elif smoothing is not None:
        draft.leave("label_smoothing", f"the loss ({name}) does not read it")
    if rpo_alpha is not None and rpo_alpha <= _SMALLEST:
        draft.leave("rpo_alpha", "it is none")
    elif rpo_alpha:  # their pref_ftx
        if name != "sigmoid" or smoothing:
            return draft.refuse("rpo_alpha")
        name = "rpo"  # DPO and the winner's likelihood a token, each pair's own mean: what pref_ftx is
        options["rpo_alpha"] = float(rpo_alpha)
    shared.objective(draft, {name: 1.0}, options, *told)


def _reference(
    draft: Draft,
    adapter_name_or_path=None,
    ref_model=None,
    ref_model_adapters=None,
    ref_model_quantization_bit=None,
    create_new_adapter=False,
    resume_lora_training=True,
) -> None:
    """What training starts from, and what it refers to. LLaMA-Factory's reference is ref_model with
    ref_model_adapters; without them, of a LoRA, the model with its adapter switched off (create_ref_model in
    train/trainer_utils.py, compute_reference_log_probs in train/dpo/trainer.py). Ours is what training starts
    from."""
    adapters, theirs = shared.names_in(adapter_name_or_path), shared.names_in(ref_model_adapters)
    given = draft.given("ref_model", "ref_model_adapters", "ref_model_quantization_bit")
    is_fresh = create_new_adapter or not resume_lora_training
    has_reference = draft.ours.get("objective") not in ("orpo", "simpo")
    for key in draft.given("create_new_adapter", "resume_lora_training"):
        draft.leave(key, "a fresh LoRA is on the model itself" if is_fresh else "it is so here")
    if adapters and is_fresh:
        draft.refuse("adapter_name_or_path", fix=_MERGE)
    elif len(adapters) > 1:
        draft.refuse("adapter_name_or_path", fix=_MERGE_SOME)
    elif adapters and has_reference and ref_model is None:
        draft.refuse("adapter_name_or_path")
    elif adapters:
        draft.set("adapter", adapters[0], "adapter_name_or_path")
    if not has_reference or ref_model is None:
        for key in given:
            draft.leave(key, "without ref_model it has no meaning" if has_reference else "the loss has none")
    elif ref_model != draft.theirs.get("model_name_or_path"):
        draft.refuse("ref_model")
    elif theirs != adapters:
        draft.refuse("ref_model_adapters")
    elif ref_model_quantization_bit != draft.theirs.get("quantization_bit"):
        draft.refuse("ref_model_quantization_bit")
    else:
        for key in given:
            draft.leave(key, "the reference is what training starts from, which is that")


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
    kind, bits = finetuning_type, quantization_bit
    if kind not in ("lora", "full", None):
        return draft.refuse("finetuning_type")
    if pure_bf16 and kind == "lora":
        draft.check("pure_bf16", "left out, a LoRA's weights are kept in fp32 here")
    elif pure_bf16:
        draft.set("pure_bf16", True, "pure_bf16")
        draft.check("pure_bf16", "fastdpo rounds its updates stochastically, LLaMA-Factory to nearest")
    if bits is not None and (bits != 4 or quantization_method not in ("bnb", "bitsandbytes")):
        draft.refuse("quantization_bit", f"{bits} by {quantization_method}")
    elif bits is not None:
        draft.set("load_in_4bit", True, *draft.given("quantization_bit", "quantization_method"))
    is_fresh = draft.theirs.get("create_new_adapter")
    has_adapter = kind == "lora" and draft.given("adapter_name_or_path") and not is_fresh
    if kind == "full":
        draft.tell("finetuning_type", ": all weights are trained, as without lora_rank")
    elif has_adapter:
        draft.tell("finetuning_type", ": the adapter is trained on, as without lora_rank")
    if kind == "full" or has_adapter:
        why = "the adapter has its own" if has_adapter else "all weights are trained"
        for key in draft.given("lora_rank", "lora_alpha", "lora_target"):
            draft.leave(key, why)
        return
    if lora_rank or kind:
        draft.set("lora_rank", lora_rank or 8, "finetuning_type", "lora_rank")
    if lora_alpha is not None:
        draft.set("lora_alpha", float(lora_alpha), "lora_alpha")
    if lora_target is not None:
        shared.target_modules(draft, "lora_target", lora_target)


def _data(
    draft: Draft,
    dataset=None,
    eval_dataset=None,
    dataset_dir="data",
    max_samples=None,
    mix_strategy="concat",
    interleave_probs=None,
    tokenized_path=None,
) -> None:
    """Names in the dataset_info.json of dataset_dir, as FOLDER:NAME, one after the other (mix_strategy
    concat); max_samples are the first of each."""
    cut = f"#[:{max_samples}]" if max_samples else ""
    if not isinstance(dataset_dir, str) or dataset_dir == "ONLINE" or dataset_dir.startswith("REMOTE:"):
        return draft.refuse("dataset_dir")
    more = draft.given("dataset_dir", "max_samples")
    for key, ours in (("dataset", "data"), ("eval_dataset", "eval_data")):
        names = shared.names_in(dataset if key == "dataset" else eval_dataset)
        if any("/" in name or Path(name).suffix in _FILES for name in names):
            draft.refuse(key, fix=f"it is no name in a dataset_info.json; did you mean {ours}?")
        elif names:
            specs = [f"{dataset_dir}:{name}{cut}" for name in names]
            draft.set(ours, shared.one_or_all(specs), key, *more)
    is_mixed = len(shared.names_in(dataset)) > 1
    if is_mixed and mix_strategy != "concat":
        draft.refuse("mix_strategy")
    else:
        for key in draft.given("mix_strategy", "interleave_probs"):
            draft.leave(key, "data sets are read one after the other")
    if tokenized_path is not None and dataset is None:
        draft.refuse("tokenized_path")
    elif tokenized_path is not None:
        draft.leave("tokenized_path", "the rows of dataset are tokenised anew")


def _held_out(draft: Draft, val_size=None) -> None:
    if val_size is not None and val_size <= _SMALLEST:
        draft.leave("val_size", "it holds out no rows")
    else:
        shared.held_out(draft, val_size)


def _template(draft: Draft, template=None, cutoff_len=None, default_system=None) -> None:
    if template:
        set_template(draft, "template", template, default=default_system or "")
    elif default_system:
        draft.refuse("default_system")
    if cutoff_len:
        draft.set("max_length", cutoff_len, "cutoff_len")
        draft.check("cutoff_len", "LLaMA-Factory cuts longer rows at the prompt's end too; see truncation")


def _images(draft: Draft, image_max_pixels=None, image_resolution=None, *, image_min_pixels=None) -> None:
    """Larger images are made smaller as here, by one factor for both sides (data/mm_plugin.py 222)."""
    if image_resolution is None:
        draft.set("image_max_pixels", image_max_pixels, "image_max_pixels")
    elif image_resolution > _LONGEST_SIDE:
        draft.set("image_max_pixels", image_resolution, "image_resolution")
    else:
        draft.set("image_max_pixels", image_resolution**2, "image_resolution")
        draft.check("image_resolution", "so small it is of an image's longer side, and here of all pixels")
    if image_min_pixels is not None and image_min_pixels > 32 * 32:
        draft.check("image_min_pixels", "left out, no image is made larger before the model's processor")
    elif image_min_pixels is not None:
        draft.leave("image_min_pixels", "so small an image is left to the model's own processor")


LLAMA_FACTORY = Tool(
    "LLaMA-Factory",
    only_here="stage finetuning_type pref_loss pref_beta pref_ftx cutoff_len template dataset dataset_dir "
    "eval_dataset lora_target max_samples val_size plot_loss overwrite_cache quantization_bit flash_attn "
    "kto_chosen_weight kto_rejected_weight dpo_label_smoothing adapter_name_or_path "
    "create_new_adapter dpo_ftx dpo_loss dpo_beta orpo_beta kto_ftx",
    defaults=shared.DEFAULTS
    | {"learning_rate": 5e-5, "cutoff_len": 2048, "finetuning_type": "lora", "stage": "dpo"}
    | {"image_max_pixels": 768 * 768},
    parts=(*shared.RUN, _lora, _data, _held_out, _template, _images, *shared.KEPT, _loss, _reference),
    reasons=shared.REASONS
    | {
        "stage": "fastdpo does preference training: dpo or kto (stages does SFT before it)",
        "pref_loss": f"fastdpo has {', '.join(_LOSSES)} of LLaMA-Factory's",
        "rpo_alpha": "fastdpo has it beside plain pref_loss: sigmoid only; remove it",
        "finetuning_type": "fastdpo trains a LoRA or all weights; set lora or full",
        "quantization_bit": QUANTISED,
        "mix_strategy": "fastdpo reads data sets one after the other; set concat",
        "tokenized_path": "give the rows themselves as dataset",
        "dataset_dir": "fastdpo reads the dataset_info.json of a folder here; or give a hub name as data",
        "template": "fastdpo does not know it; give chat_template a Jinja file, or one of our names",
        "default_system": "a tokenizer's own template has its own; give rows a system column",
        "adapter_name_or_path": "LLaMA-Factory's reference is then the model without it, fastdpo's has "
        "it, as ref_model (the model) and ref_model_adapters (this one) beside it say",
        "ref_model": "the reference is the model that training starts from",
        "ref_model_adapters": "the reference is what training starts from, the same adapter with it",
        "ref_model_quantization_bit": "the reference is quantised as the model is",
    },
    names={
        "beta": "pref_beta",
        "label_smoothing": "dpo_label_smoothing",
        "rpo_alpha": "pref_ftx",
        "desirable_weight": "kto_chosen_weight",
        "undesirable_weight": "kto_rejected_weight",
    },
    older=OLDER,
    rows=shared.TRANSFORMERS | ROWS,
)
