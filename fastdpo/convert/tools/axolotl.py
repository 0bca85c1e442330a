"""Axolotl's configs: the parts that take several keys (its rows are in axolotl_rows.py)."""

from fastdpo.config.names import OPTIMIZERS
from fastdpo.convert.draft import Draft
from fastdpo.convert.rules import Tool
from fastdpo.convert.tools import shared
from fastdpo.convert.tools.axolotl_data import DATA_REASONS, ENDS, data
from fastdpo.convert.tools.axolotl_rows import ROWS

_LOSSES = {"dpo": "sigmoid", "ipo": "ipo", "kto": "kto", "orpo": "orpo", "simpo": "simpo"}
_OPTIONS = "use_weighting simpo_gamma desirable_weight undesirable_weight".split()
_PLUGINS = "liger cut_cross_entropy kernels swanlab lm_eval expert_parallel".split()  # not what is learnt
_NOT_LINEAR = {"embed_tokens", "lm_head", "wte"}
_TRACKERS = {"use_wandb": "wandb", "use_tensorboard": "tensorboard", "use_trackio": "trackio"}


def _loss(draft: Draft, rl=None) -> None:
    if rl is None:
        return
    if rl not in _LOSSES:
        return draft.refuse("rl")
    names, weights = draft.take("dpo_loss_type"), draft.take("dpo_loss_weights")
    names = [names] if isinstance(names, str) else names or [_LOSSES[rl]]
    if rl != "dpo" and (names != [_LOSSES[rl]] or weights):  # DPOStrategy reads them of rl: dpo alone
        for key in ("dpo_loss_type", "dpo_loss_weights"):
            if draft.given(key):
                draft.leave(key, f"rl {rl} does not read it")
        names, weights = [_LOSSES[rl]], None
    if weights and len(weights) != len(names):
        draft.refuse("dpo_loss_weights", weights)
    parts = dict(zip(names, map(float, weights or [1] * len(names))))
    if rl == "simpo":
        shared.with_likelihood(draft, parts)
    draft.take("cpo_alpha")
    shared.with_sft(draft, parts, "rpo_alpha", draft.take("rpo_alpha"))
    options = _beta(draft) | {name: draft.take(name) for name in ("label_smoothing", *_OPTIONS)}
    for name, reads in (("label_smoothing", ("dpo",)), ("use_weighting", ("dpo", "ipo"))):
        if options[name] and rl not in reads:
            draft.leave(name, f"rl {rl} does not read it")
            options[name] = None
    told = [name for name in ("dpo_loss_type", "dpo_loss_weights") if draft.theirs.get(name)]
    shared.objective(draft, parts, options, "rl", *told)
    if rl == "orpo":
        draft.check("rl", shared.WHOLE_LIKELIHOOD)


def _beta(draft: Draft) -> dict:
    """The options' beta: rl_beta's, or none where the first key that Axolotl looks at is another one."""
    within_trl = draft.take("trl", {})
    if within_trl.keys() - {"beta"}:
        draft.leave("trl", "of it, Axolotl's preference trainers read beta alone")
    given = {"trl.beta": within_trl.get("beta")}
    given |= {key: draft.take(key) for key in ("beta", "dpo_beta", "orpo_alpha")}
    first, *others = [key for key, value in given.items() if value is not None] or ["beta"]
    for other in others:
        draft.leave(other, f"Axolotl reads {draft.key(first)} first")
    if first == "beta":
        return {"beta": 0.1 if given["beta"] is None else given["beta"]}
    draft.set("beta", float(given[first]), first)
    return {}


def _warmup(draft: Draft, warmup_steps=None, warmup_ratio=None) -> None:
    shared.warmup(draft, warmup_steps, warmup_ratio)
    if draft.defaults and not draft.given("warmup_steps", "warmup_ratio"):
        draft.check("warmup_ratio", "Axolotl's default ends after 100 steps, if that is sooner")


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
        why = "the adapter in lora_model_dir has its own" if lora_model_dir else "adapter is not set"
        for key in ("adapter", "lora_r", "lora_alpha", "lora_target_modules", "lora_target_linear"):
            if draft.theirs.get(key):
                draft.leave(key, why)
        return
    if adapter == "qlora":
        draft.set("load_in_4bit", True, "adapter")
    elif adapter != "lora":
        return draft.refuse("adapter")
    draft.set("lora_rank", lora_r or 8, "adapter", "lora_r")
    if lora_alpha is not None:
        draft.set("lora_alpha", float(lora_alpha), "lora_alpha")
    names = [lora_target_modules] if isinstance(lora_target_modules, str) else lora_target_modules or []
    if lora_target_linear and set(names) & _NOT_LINEAR:
        draft.refuse("lora_target_modules")
    elif lora_target_linear:
        draft.set("lora_target_modules", "all-linear", "lora_target_linear")
        if names:
            draft.leave("lora_target_modules", "lora_target_linear has them all")
    elif names:
        shared.target_modules(draft, "lora_target_modules", lora_target_modules)
    elif draft.defaults:
        draft.check("lora_target_modules", "peft's choice for the model is not ours, all-linear")


def _optim(
    draft: Draft,
    optimizer=None,
    excess_length_strategy=None,
    skip_prepare_dataset=False,
    saves_per_epoch=None,
    evals_per_epoch=None,
) -> None:
    if optimizer is not None:
        draft.set("optim", OPTIMIZERS.get(optimizer, optimizer), "optimizer")
    if skip_prepare_dataset:  # then TRL cuts what is too long
        draft.set("truncation", "keep_start", "skip_prepare_dataset")
    elif excess_length_strategy is not None:
        if excess_length_strategy == "raise":
            draft.set("strict", True, "excess_length_strategy")
        ours = "keep_start" if excess_length_strategy == "truncate" else "drop"
        draft.set("truncation", ours, "excess_length_strategy")
    for name, value in (("saves_per_epoch", saves_per_epoch), ("evals_per_epoch", evals_per_epoch)):
        if value is not None:
            draft.leave(name, "save_steps and eval_steps count steps here")


def _report(draft: Draft, wandb_project=None, use_wandb=None, use_tensorboard=None, use_trackio=None) -> None:
    """wandb_project alone switches wandb on."""
    on = {"use_wandb": use_wandb, "use_tensorboard": use_tensorboard, "use_trackio": use_trackio}
    told = [key for key, value in on.items() if value]
    names = [_TRACKERS[key] for key in told]
    if wandb_project and use_wandb is None:
        told, names = ["wandb_project", *told], ["wandb", *names]
    elif wandb_project and not use_wandb:
        draft.leave("wandb_project", "use_wandb is false")
    if names:
        draft.set("report_to", names, *told)


def _precision(draft: Draft, bf16=None, bfloat16=None, fp16=None, float16=None, float32=None) -> None:
    if (fp16 or float16) and not (bf16 or bfloat16):
        return draft.check("fp16" if fp16 else "float16", shared.NO_FP16)
    for name, value in (("fp16", fp16), ("float16", float16)):
        if value:
            draft.leave(name, "bf16 comes first")
    key = "bf16" if bf16 is not None else "bfloat16" if bfloat16 is not None else "float32"
    if float32 or (bf16 is False and not bfloat16):
        draft.set("dtype", "fp32", "float32" if float32 else "bf16")
    elif bf16 not in (None, "auto") or bfloat16:
        draft.set("dtype", "bf16", key)
    if not draft.theirs.get("adapter") and draft.ours.get("dtype") != "fp32" and key != "float32":
        draft.check(
            key, "Axolotl keeps weights that train in bf16; they are fp32 here, unless pure_bf16 is set"
        )


def _names(draft: Draft, base_model=None, base_model_config=None, tokenizer_config=None) -> None:
    """Configuration and tokenizer are the model's own here."""
    if base_model:
        draft.set("model", base_model, "base_model")
    for key, value in (("base_model_config", base_model_config), ("tokenizer_config", tokenizer_config)):
        if value == base_model and value:
            draft.leave(key, "it is the model's own")
        elif value:
            draft.refuse(key)


def _plugins(draft: Draft, plugins=None) -> None:
    """axolotl.integrations.NAME.CLASS, or a user's own class."""
    names = [plugins] if isinstance(plugins, str) else plugins or []
    kind = lambda name: (name.split(".") + [""] * 3)[2] if name.startswith("axolotl.integrations.") else ""
    others = [name for name in names if kind(name) not in _PLUGINS]
    if others:
        draft.refuse("plugins", others)
    elif names:
        draft.leave("plugins", "they change speed, or what is logged")


def _tokens(draft: Draft, special_tokens=None, tokens=None) -> None:
    """What Axolotl gives its tokenizer; here it is the model's own."""
    special = {name: value for name, value in (special_tokens or {}).items() if value}
    own = "the tokenizer's own is used; where that is another, save one with this beside the model"
    added = "nothing is added to the tokenizer; one that it does not have is several tokens"
    turns = draft.ours.get("chat_template", "")
    for name, value in special.items():
        key = f"special_tokens.{name}"
        if name == "pad_token":
            draft.leave(key, "rows are packed without padding")
        elif name == "eos_token" and value == ENDS.get(turns):
            draft.leave(key, f"{turns}'s end of turn is what is scored")
        elif name == "eos_token":
            draft.check(key, "the template's end of turn is what is scored, after plain text " + own)
        elif name == "additional_special_tokens":
            draft.check(key, added)
        else:
            draft.check(key, own)
    if tokens:
        draft.check("tokens", added)


def _memory(draft: Draft, gradient_checkpointing=None, activation_offloading=None) -> None:
    """Their checkpointing may say where its inputs go, and so may activation_offloading."""
    level, offload = gradient_checkpointing, activation_offloading
    if isinstance(level, str):
        draft.set("activation_offloading", True, "gradient_checkpointing")
    elif offload:
        draft.set("activation_offloading", True, "activation_offloading")
    if level is not None:
        draft.set("gradient_checkpointing", bool(level), "gradient_checkpointing")


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
        sequence_len=512,
        warmup_ratio=0.03,
    ),
    parts=(
        shared.batch,
        shared.epochs,
        _warmup,
        _precision,
        _names,
        _lora,
        data,
        shared.held_out,
        _optim,
        _tokens,
        _memory,
        _plugins,
        *shared.KEPT,
        _report,
        _loss,
    ),
    reasons=shared.REASONS
    | DATA_REASONS
    | {
        "rl": f"fastdpo does {', '.join(_LOSSES)}",
        "dpo_loss_weights": "a weight for each loss is needed",
        "adapter": "fastdpo trains a LoRA or all weights; set lora or remove it",
        "lora_target_modules": "all linear layers and others at once are not had; set one of the two",
        "base_model_config": "the configuration is the model's own; remove it",
        "tokenizer_config": "put that tokenizer into the model's folder",
        "plugins": "what they do to training is not known; remove them",
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
    rows=ROWS,
)
