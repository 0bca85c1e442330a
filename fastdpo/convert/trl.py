"""TRL's configs (DPOConfig, CPOConfig, ModelConfig, ScriptArguments) and transformers' own, key by key."""

from fastdpo.convert import shared
from fastdpo.convert.rules import Draft, Tool, beside, only, unread
from fastdpo.convert.shared import NO_DROPOUT, NO_SUCH, QUANTISED, SAME, SPEED

_ALONE = only(fix="without a loss_type beside it, give it in objective_args")
_PACKED = unread("batches are packed here")
_CUT = only(fix="rows are cut by max_length and truncation alone; remove it")
_LORA = ("lora_r", "lora_alpha", "lora_target_modules", "lora_dropout")
_OPTIONS = (
    "ld_alpha f_divergence_type f_alpha_divergence_coef use_weighting discopop_tau simpo_gamma cpo_alpha "
    "desirable_weight undesirable_weight"
)


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
        draft.check("lora_target_modules", "peft's choice for the model is not ours, all-linear")
    else:
        shared.target_modules(draft, "lora_target_modules", lora_target_modules)
    if lora_dropout:
        draft.refuse("lora_dropout")
    if lora_dropout is None and draft.defaults:
        draft.check("lora_dropout", "TRL's default is 0.05; there is none here")


def _data(
    draft: Draft,
    dataset_name=None,
    dataset_config=None,
    datasets=None,
    dataset_mixer=None,
    dataset_train_split=None,
) -> None:
    name, config, split, test_split = dataset_name, dataset_config, dataset_train_split, None
    source = "dataset_name"
    if datasets:
        if len(datasets) != 1 or not set(datasets[0]) <= {"path", "name", "split"}:
            return draft.refuse("datasets")
        name, config, split = datasets[0]["path"], datasets[0].get("name"), datasets[0].get("split")
        source = "datasets.path"
    if dataset_mixer:  # alignment-handbook's
        if len(dataset_mixer) != 1 or next(iter(dataset_mixer.values())) != 1:
            return draft.refuse("dataset_mixer")
        source = "dataset_mixer"
        (name,), splits = dataset_mixer, draft.take("dataset_splits", ["train"])
        config, *_ = draft.take("dataset_configs") or [None]
        split = next(s for s in splits if "test" not in s)
        test_split = next((s for s in splits if "test" in s), None)
        if test_split:
            draft.set("eval_data", shared.spec(name, config, test_split), "dataset_splits")
    if name is None:
        return
    draft.set("data", shared.spec(name, config, split), source)
    test = draft.take("dataset_test_split", "test" if draft.defaults else None)
    evaluates = draft.theirs.get("eval_strategy") or draft.theirs.get("evaluation_strategy") or "no"
    if test and evaluates not in ("no", False) and not test_split:
        draft.set("eval_data", shared.spec(name, config, test), "dataset_test_split", dataset_test_split=test)


def _loss(
    draft: Draft, loss_type="sigmoid", *, loss_weights=None, rpo_alpha=None, beta=0.1, label_smoothing=None
) -> None:
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    parts = dict(zip(names, loss_weights or [1.0] * len(names)))
    if len(parts) != len(names) or (loss_weights and len(loss_weights) != len(names)):
        return draft.refuse("loss_weights", loss_weights or names)
    parts = {{"aot_pair": "aot"}.get(name, name): weight for name, weight in parts.items()}
    if rpo_alpha:
        parts["sft"] = rpo_alpha
        draft.tell("rpo_alpha", " -> the loss sft, as TRL itself has it since 0.29")
    if "simpo" in parts:
        shared.with_likelihood(draft, parts)
    if "robust" in parts and label_smoothing is None:
        label_smoothing = 0.0
    if draft.theirs.get("f_divergence_type") != "alpha_divergence":
        draft.take("f_alpha_divergence_coef")
    options = {"beta": beta, "label_smoothing": label_smoothing}
    options |= {name: draft.take(name) for name in _OPTIONS.split()}
    shared.objective(draft, {name: float(weight) for name, weight in parts.items()}, options, "loss_type")


TRL = Tool(
    "TRL",
    only_here="loss_type loss_weights dataset_name dataset_config dataset_train_split dataset_test_split "
    "dataset_mixer dataset_splits use_peft truncation_mode max_prompt_length max_completion_length "
    "padding_free precompute_ref_log_probs precompute_ref_batch_size rpo_alpha reference_free "
    "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps f_divergence_type f_alpha_divergence_coef "
    "use_weighting discopop_tau dataset_num_proc use_liger_loss generate_during_eval",
    defaults=shared.DEFAULTS | {"loss_type": "sigmoid"},
    parts=(*shared.RUN, _loading, _lora, _data, *shared.KEPT, _loss),
    reasons=shared.REASONS
    | {
        "lora_dropout": NO_DROPOUT,
        "datasets": "give one data set as data, and its columns' names as data_format",
        "dataset_mixer": "give one data set as data",
        "loss_weights": "a weight for each loss is needed, each named once",
    },
    rows=shared.TRANSFORMERS
    | {
        "model_name_or_path": "model",
        "model_revision": only("main", fix="download the revision and give its folder as model"),
        "load_in_8bit": only(False, fix=QUANTISED),
        "use_dora use_rslora activation_offloading max_length router_aux_loss_coef": SAME,
        "lora_modules_to_save lora_target_parameters": only([], fix=NO_SUCH),
        "lora_task_type": only("CAUSAL_LM", fix=NO_SUCH),
        "max_prompt_length max_completion_length": _CUT,
        "truncation_mode": "truncation",
        "disable_dropout": only(True, fix="fastdpo switches dropout off; set it to true"),
        "reference_free": only(False, fix="use a loss without a reference: simpo, cpo, orpo or slic"),
        "sync_ref_model": only(False, fix="the reference does not move here; stages does it in steps"),
        "ref_model_mixup_alpha ref_model_sync_steps": beside("sync_ref_model"),
        "model_init_kwargs": only({}, fix="give the settings as keys of their own"),
        "chat_template_path": "chat_template",
        "precompute_ref_log_probs": shared.ONCE,
        "padding_free pad_to_multiple_of pad_token": _PACKED,
        "bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage": beside("load_in_4bit"),
        "dataset_streaming": shared.READ_ONCE,
        "dataset_num_proc preprocessing_num_workers precompute_ref_batch_size attn_implementation "
        "use_liger_loss ignore_bias_buffers generate_during_eval": SPEED,
        "dataset_splits dataset_configs": beside("dataset_mixer"),
        "dataset_train_split dataset_test_split": beside("dataset_name"),
        f"{_OPTIONS} rpo_alpha loss_weights": _ALONE,
    },
)
