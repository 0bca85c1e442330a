"""TRL's configs (of its trainers for DPO, KTO, CPO and ORPO, ModelConfig, ScriptArguments) and transformers'
own, key by key; alignment-handbook's and SimPO's are TRL's with more."""

from fastdpo.convert.draft import Draft
from fastdpo.convert.rules import Tool, beside, only, unread
from fastdpo.convert.tools import shared
from fastdpo.convert.tools.shared import NO_DROPOUT, NO_SUCH, QUANTISED, SAME, SPEED
from fastdpo.convert.tools.template_names import set_template
from fastdpo.convert.tools.trl_data import REASONS, data, said_in_names

_ALONE = only(fix="without a loss_type beside it, give it in objective_args")
_SHUFFLED = only("random", fix=shared.SHUFFLED)
_PACKED = unread("batches are packed here")
_CUT = "rows are cut by max_length and truncation alone; `fastdpo data` counts those that are"
_LORA = ("lora_r", "lora_alpha", "lora_target_modules", "lora_dropout")
_OPTIONS = (
    "ld_alpha f_divergence_type f_alpha_divergence_coef use_weighting discopop_tau simpo_gamma cpo_alpha "
    "desirable_weight undesirable_weight"
)
_LOSSES = (  # of TRL's trainers, of all versions; orpo and cpo are trainers
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_pair aot_unpaired apo_zero "
    "apo_down discopop sft sigmoid_norm kto apo_zero_unpaired simpo cpo orpo"
).split()


def _loading(draft: Draft, dtype=None, torch_dtype=None) -> None:
    """The dtype that weights are loaded in: trained weights are fp32 here whatever it says."""
    for key, value in (("dtype", dtype), ("torch_dtype", torch_dtype)):
        if key == "dtype" and value in ("bf16", "fp32"):  # our own word
            draft.set(key, value, key)
        elif value not in (None, "auto", "float32", "fp32"):
            kept = "weights that train are kept in fp32 here, computed with in dtype"
            draft.check(key, f"left out; {kept}")


def _lora(
    draft: Draft, use_peft=False, lora_r=16, lora_alpha=32, lora_target_modules=None, lora_dropout=None
) -> None:
    if not use_peft:
        for key in _LORA:
            if draft.theirs.get(key):
                draft.leave(key, "use_peft is not set")
        return
    draft.set("lora_rank", lora_r, "use_peft", "lora_r")
    draft.set("lora_alpha", float(lora_alpha), "lora_alpha")
    if lora_target_modules is None:
        draft.set("lora_target_modules", "peft", "lora_target_modules")
    else:
        shared.target_modules(draft, "lora_target_modules", lora_target_modules)
    # all versions' trainers call disable_dropout_in_model after get_peft_model (1.16: dpo_trainer.py 664 and
    # 932, kto_trainer.py 715 and 943, cpo_trainer.py 251 and 329, orpo_trainer.py 261 and 339)
    if lora_dropout and draft.theirs.get("disable_dropout") is False:
        draft.refuse("lora_dropout")
    elif lora_dropout:
        draft.leave("lora_dropout", "TRL's disable_dropout, which is on, switches a LoRA's off, too")


def _nested(draft: Draft, key: str, value) -> None:
    if value:
        draft.leave(key, "it is so here")
    else:
        draft.check(key, "of weights in 4 bits the scales are quantised, too, here")


def _sampling(draft: Draft, key: str, value) -> None:
    if value == "sequential" and draft.ours.get("objective") in ("kto", "apo_zero_unpaired"):
        draft.check(key, "KTOTrainer's default; rows are shuffled by seed here")
    else:
        _SHUFFLED(draft, key, value)


def _lengths(
    draft: Draft,
    max_length=None,
    truncation_mode=None,
    max_prompt_length=None,
    max_completion_length=None,
    max_target_length=None,
) -> None:
    """What is cut of rows that are too long. TRL 0.7 to 0.28 had max_prompt_length, and kept a row's end."""
    if max_length is not None:
        draft.set("max_length", max_length, "max_length")
    elif "max_length" in draft.theirs:
        draft.refuse("max_length", "null")
    if truncation_mode:
        draft.set("truncation", truncation_mode, "truncation_mode")
    elif max_prompt_length and draft.defaults:
        why = "TRL that has it keeps the end of rows over max_length"
        draft.set("truncation", "keep_end", "max_prompt_length", why=why)
    for key in ("max_prompt_length", "max_completion_length", "max_target_length"):
        if draft.theirs.get(key) is not None:
            draft.check(key, f"left out, {_CUT}")


def _loss(
    draft: Draft, loss_type="sigmoid", gamma_beta_ratio=None, *, loss_weights=None, rpo_alpha=None
) -> None:
    if gamma_beta_ratio is not None:
        return _simpo(draft, loss_type, gamma_beta_ratio)
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    names, source = _trainers(draft, names)
    if not names:
        return
    if unknown := [name for name in names if draft.defaults and name not in _LOSSES]:
        return draft.refuse("loss_type", ", ".join(map(str, unknown)))
    parts = dict(zip(names, loss_weights or [1.0] * len(names)))
    if len(parts) != len(names) or (loss_weights and len(loss_weights) != len(names)):
        return draft.refuse("loss_weights", loss_weights or names)
    parts = {name: float(weight) for name, weight in parts.items()}
    shared.with_sft(draft, parts, "rpo_alpha", rpo_alpha)
    if "simpo" in parts:
        shared.with_likelihood(draft, parts)
    options = {"beta": draft.take("beta", 0.1), "label_smoothing": draft.take("label_smoothing")}
    if draft.theirs.get("f_divergence_type") != "alpha_divergence":
        draft.take("f_alpha_divergence_coef")
    options |= {name: draft.take(name) for name in _OPTIONS.split()}
    told = [source, *(["loss_weights"] if loss_weights else [])]
    shared.objective(draft, parts, options, *told)
    if "orpo" in parts:
        draft.check(source, shared.WHOLE_LIKELIHOOD)


def _trainers(draft: Draft, names: list) -> tuple[list, str]:
    """The losses that loss_type means, and the key that says so. It is of four trainers, of which ORPOTrainer
    has none, and the others may leave it out."""
    given = lambda *keys: [key for key in keys if draft.theirs.get(key) is not None]
    if (cpo := given("cpo_alpha", "simpo_gamma")) and names != ["simpo"]:
        if names not in (["sigmoid"], ["cpo"]):
            draft.refuse(cpo[0], fix="of CPOTrainer's losses fastdpo has sigmoid (cpo) and simpo")
            return [], ""
        return ["cpo"], cpo[0]
    if given("loss_type") or not draft.defaults:
        return names, "loss_type"
    if kto := given("desirable_weight", "undesirable_weight"):
        return ["kto"], kto[0]
    said = said_in_names(draft, {"dpo", "ipo", "kto", "orpo", "cpo", "simpo"})
    if said is None or said[1] not in ("kto", "orpo", "cpo"):
        return names, "loss_type"
    draft.check(
        said[0], f"only its name says which trainer the config is for; if not {said[1]}, set objective"
    )
    return [said[1]], said[0]


def _simpo(draft: Draft, loss_type: str, ratio: float) -> None:
    """SimPO's own trainer (princeton-nlp/SimPO): CPOTrainer's simpo with the margin as a share of beta."""
    if loss_type != "sigmoid":
        return draft.refuse("loss_type", fix="of SimPO's losses fastdpo has sigmoid")
    beta, parts = draft.take("beta", 2.0), {"simpo": 1.0}
    shared.with_sft(draft, parts, "sft_weight", draft.take("sft_weight"))
    options = {"beta": beta, "label_smoothing": draft.take("label_smoothing")}
    shared.objective(draft, parts, options, "gamma_beta_ratio")
    args = {"simpo_gamma": float(ratio) * beta}
    draft.set(
        "objective_args", args, "gamma_beta_ratio", "beta", why="the margin is their product", beta=beta
    )


_SCRIPT = {  # what scripts and notebooks of Python say besides
    "map": lambda draft, key, value: draft.check(
        key, "what code does to the rows is not read; see `fastdpo data`, and data_format"
    ),
    "tokenizer.chat_template": lambda draft, key, value: shared.own_template(draft, key),
    "get_chat_template": lambda draft, key, value: set_template(draft, key, value, of="Unsloth"),
    "callbacks": lambda draft, key, value: draft.check(key, "left out; callbacks are not run"),
    "eval_dataset": unread("give eval_data"),
    "ref_model": only(fix="the reference is the model that training starts from; remove it"),
    "bias": only("none", fix=NO_SUCH),
    "init_lora_weights": only(True, fix=NO_SUCH),
    "bnb_4bit_compute_dtype": beside("load_in_4bit"),
    "device_map low_cpu_mem_usage cache_dir data_collator": SPEED,
    "compute_metrics": shared.LOOKS,
}
TRL = Tool(
    "TRL",
    only_here="loss_type loss_weights dataset_name dataset_config dataset_train_split dataset_test_split "
    "dataset_mixer dataset_splits dataset_configs dataset_mixture use_peft truncation_mode max_prompt_length "
    "max_completion_length padding_free precompute_ref_log_probs precompute_ref_batch_size rpo_alpha "
    "reference_free sync_ref_model ref_model_mixup_alpha ref_model_sync_steps f_divergence_type "
    "f_alpha_divergence_coef use_weighting discopop_tau dataset_num_proc use_liger_loss generate_during_eval "
    "gamma_beta_ratio sft_weight desirable_weight undesirable_weight",
    defaults=shared.DEFAULTS | {"loss_type": "sigmoid"},
    parts=(*shared.RUN, _loading, _lora, data, _lengths, *shared.KEPT, _loss),
    reasons=shared.REASONS
    | REASONS
    | {
        "lora_dropout": NO_DROPOUT,
        "loss_type": "no loss of TRL's trainers; if fastdpo has it (`fastdpo objectives`), set objective",
        "max_length": "TRL cuts no row then; give the longest row in tokens",
        "loss_weights": "a weight for each loss is needed, each named once",
        "get_chat_template": "give chat_template a Jinja file, or one of our names",
    },
    rows=shared.TRANSFORMERS
    | _SCRIPT
    | {
        "model_name_or_path": "model",
        "model_revision": only("main", fix="download the revision and give its folder as model"),
        "base_model_revision model_code_revision": only(
            fix="download the revision and give its folder as model"
        ),
        "tokenizer_name_or_path": only(fix="put that tokenizer into the model's folder"),
        "load_in_8bit": only(False, fix=QUANTISED),
        "use_dora use_rslora activation_offloading router_aux_loss_coef": SAME,
        "lora_modules_to_save lora_target_parameters": only([], fix=NO_SUCH),
        "lora_task_type": only("CAUSAL_LM", fix=NO_SUCH),
        "lora_bias": only("none", fix=NO_SUCH),
        "peft_config": only({}, fix="give lora_r, lora_alpha and lora_target_modules as keys of their own"),
        "disable_dropout": only(True, fix="fastdpo switches dropout off; set it to true"),
        "reference_free": only(False, fix="use a loss without a reference: simpo, cpo, orpo or slic"),
        "force_use_ref_model": unread("the reference is always the model that training starts from"),
        "sync_ref_model": only(False, fix="the reference does not move here; stages does it in steps"),
        "ref_model_mixup_alpha ref_model_sync_steps": beside("sync_ref_model"),
        "model_init_kwargs ref_model_init_kwargs": only({}, fix="give the settings as keys of their own"),
        "model_adapter_name ref_adapter_name": only(fix="give the adapter's folder as adapter"),
        "base_model_attribute_name": unread("the model's head is found without it"),
        "is_encoder_decoder": only(False, fix="fastdpo trains decoders only"),
        "alpha": only(0, fix="AlphaPO is not among fastdpo's losses; remove it"),
        "label_pad_token_id": only(-100, fix="no label is padded here; remove it"),
        "chat_template_path": "chat_template",
        "auto_insert_empty_system_msg": unread("the check of dataset_mixer is about it"),
        "columns_to_keep text_column": unread("only the columns of a known format are read"),
        "truncation_side": beside("truncation_mode"),
        "precompute_ref_log_probs": shared.ONCE,
        "padding_free pad_to_multiple_of pad_token padding_value": _PACKED,
        "bnb_4bit_quant_type": only("nf4", fix="fastdpo quantises to NF4; set nf4"),
        "bnb_4bit_quant_storage": beside("load_in_4bit"),
        "use_bnb_nested_quant": _nested,
        "train_sampling_strategy": _sampling,
        "dataset_streaming streaming": shared.READ_ONCE,
        "sanity_check": only(False, fix="give data as ours, as in NAME#train[:1000]"),
        "dataset_num_proc preprocessing_num_workers precompute_ref_batch_size attn_implementation "
        "use_flash_attention_2 use_liger_loss use_logits_to_keep use_num_logits_to_keep ignore_bias_buffers "
        "generate_during_eval": SPEED,
        "dataset_splits dataset_configs": beside("dataset_mixer"),
        "dataset_config dataset_train_split dataset_test_split": beside("dataset_name"),
        "test_split_size": beside("datasets"),
        "sft_weight": beside("gamma_beta_ratio"),
        f"{_OPTIONS} rpo_alpha loss_weights": _ALONE,
    },
)
