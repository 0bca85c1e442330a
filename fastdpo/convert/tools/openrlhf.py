"""OpenRLHF's flags (train_dpo, and train_kto of versions before March 2026), by the names with dots and by
those before April 2026, which parts call them by."""

from fastdpo.convert.draft import Draft
from fastdpo.convert.rules import Tool
from fastdpo.convert.tools import shared
from fastdpo.convert.tools.openrlhf_keys import FORMER, NAMES, ROWS

_ALL_ROWS = 1_000_000  # its default of max_samples
_KTO = ("input_key", "output_key", "label_key", "desirable_loss_weight", "undesirable_loss_weight")
_KTO_TEMPLATE = "User: {}\nAssistant: "
_END = "OpenRLHF puts a space and EOS behind a response without EOS, fastdpo EOS behind text alone"
_START = (
    "OpenRLHF tokenises text without the beginning-of-text token, fastdpo with it where the tokenizer has it"
)
_WHOLE = "OpenRLHF scores all of both texts then, fastdpo what comes after what they have in common"


def _is_judged(draft: Draft) -> bool:
    return bool(draft.given(*_KTO))


def _model(draft: Draft, pretrain=None, ref_pretrain=None, param_dtype=None) -> None:
    if pretrain is not None:
        draft.set("model", pretrain, "pretrain")
    if ref_pretrain not in (None, pretrain):
        draft.refuse("ref_pretrain")
    elif ref_pretrain:
        draft.leave("ref_pretrain", "the reference is what training starts from, which is that")
    if param_dtype in ("bf16", "fp32", True):  # --bf16 was a switch
        draft.set("dtype", "fp32" if param_dtype == "fp32" else "bf16", "param_dtype")
    elif param_dtype:
        draft.refuse("param_dtype")


def _same(
    draft: Draft, train_batch_size=None, max_epochs=None, learning_rate=None, aux_loss_coef=None
) -> None:
    """What has a default here, and so is read by both of its names."""
    for ours, name, value in (
        ("batch_size", "train_batch_size", train_batch_size),
        ("num_epochs", "max_epochs", max_epochs),
        ("learning_rate", "learning_rate", learning_rate),
        ("router_aux_loss_coef", "aux_loss_coef", aux_loss_coef),
    ):
        if value is not None:
            draft.set(ours, value, name)


def _optimizer(
    draft: Draft, adam_betas=None, lr_scheduler=None, lr_warmup_ratio=None, *, min_lr_ratio=0.1
) -> None:
    """DeepSpeed's AdamW and transformers' schedule (utils/deepspeed/deepspeed.py)."""
    if adam_betas is not None:
        shared.betas(draft, "adam_betas", adam_betas)
    if lr_scheduler is not None:
        draft.set("lr_scheduler_type", lr_scheduler, "lr_scheduler")
        if lr_scheduler in ("cosine_with_min_lr", "cosine_warmup_with_min_lr"):
            share = {"min_lr_rate": float(min_lr_ratio)}
            draft.set("lr_scheduler_kwargs", share, "min_lr_ratio", min_lr_ratio=min_lr_ratio)
        elif draft.given("min_lr_ratio"):
            draft.leave("min_lr_ratio", "the schedule does not read it")
    if lr_warmup_ratio is not None:
        draft.set("warmup_steps", float(lr_warmup_ratio), "lr_warmup_ratio", why="a share of all steps")


def _lora(draft: Draft, lora_rank=0, lora_alpha=16, target_modules="all-linear") -> None:
    if not lora_rank:
        for name in draft.given("lora_rank", "lora_alpha", "target_modules"):
            draft.leave(name, "without lora_rank all weights are trained")
        return
    draft.set("lora_rank", lora_rank, "lora_rank")
    draft.set("lora_alpha", float(lora_alpha), "lora_alpha", lora_alpha=16)
    shared.target_modules(draft, "target_modules", target_modules)


def _data(
    draft: Draft,
    dataset=None,
    eval_dataset=None,
    *,
    dataset_probs=None,
    dataset_split="train",
    eval_split="test",
    max_samples=_ALL_ROWS,
) -> None:
    """Several have commas between them and come one after the other; max_samples are the first of each, and
    of all together (datasets/utils.py, cli/train_dpo.py)."""
    if len(shared.names_in(dataset)) > 1:
        for name in draft.given("dataset_probs") + ["max_samples"] * (max_samples < _ALL_ROWS):
            draft.refuse(name)
    elif dataset_probs is not None:
        draft.leave("dataset_probs", "there is one data set")
    cut = f"[:{max_samples}]" if max_samples < _ALL_ROWS else ""
    for key, value, part, ours in (
        ("dataset", dataset, dataset_split + cut, "data"),
        ("eval_dataset", eval_dataset, eval_split, "eval_data"),
    ):
        specs = [shared.spec(name, None, part) for name in shared.names_in(value)]
        if any("@" in name or name.endswith(".py") for name in shared.names_in(value)):
            draft.refuse(key)
        elif specs:
            more = draft.given("max_samples" if key == "dataset" and cut else "", f"{key}_split")
            draft.set(ours, shared.one_or_all(specs), key, *more)
    if not eval_dataset:
        for name in draft.given("eval_split"):
            draft.leave(name, "there is no eval_dataset")


def _rows(
    draft: Draft,
    max_len=None,
    prompt_key=None,
    chosen_key="chosen",
    rejected_key="rejected",
    input_key="input",
    output_key=None,
    label_key="label",
    *,
    input_template=None,
    apply_chat_template=False,
) -> None:
    """The rows' columns, of which no other is read, and their length (datasets/reward_dataset.py,
    unpaired_preference_dataset.py)."""
    names = {"prompt": prompt_key, "chosen": chosen_key, "rejected": rejected_key}
    told = draft.given("prompt_key", "chosen_key", "rejected_key")
    template = input_template
    if is_judged := _is_judged(draft):
        asked = "prompt" if output_key else "messages"  # whose last turn is the answer
        names = {asked: input_key, "completion": output_key, "label": label_key}
        told = draft.given("input_key", "output_key", "label_key")
        template = _KTO_TEMPLATE if template is None else template
    names = {ours: theirs for ours, theirs in names.items() if theirs}
    if template and "{}" in template and "prompt" in names and not apply_chat_template:
        names["prompt_format"] = template.replace("{}", "{prompt}")
        told += draft.given("input_template")
    elif input_template:
        draft.leave("input_template", "it is not read without a prompt's text to put in")
    if told or draft.defaults:
        draft.set("data_format", names, *(told or ["chosen_key"]), chosen_key=chosen_key)
        draft.check("apply_chat_template", _END)
        if not apply_chat_template:
            draft.check("apply_chat_template", _START)
            if not names.keys() & {"prompt", "messages"}:
                draft.check("prompt_key", _WHOLE)
    if is_judged and draft.defaults and not draft.given("max_len"):
        max_len = 2048  # train_kto's default
    if max_len is not None:
        draft.set("max_length", max_len, "max_len", max_len=max_len)
        draft.check("max_len", "OpenRLHF puts EOS at the end of a response that is cut, fastdpo does not")


def _loss(draft: Draft, beta=None, *, label_smoothing=None, ipo=False, nll_loss_coef=None) -> None:
    judged = _is_judged(draft)
    if judged and not draft.given("beta"):
        beta = 0.01  # train_kto's default
    options = {"beta": beta, "label_smoothing": label_smoothing}
    name, told = "sigmoid", []
    if judged:
        name, told = "kto", draft.given(*_KTO)[-1:]
        options = {"beta": beta, "desirable_weight": draft.take("desirable_loss_weight")}
        options["undesirable_weight"] = draft.take("undesirable_loss_weight")
    elif nll_loss_coef and (ipo or label_smoothing):
        return draft.refuse("nll_loss_coef")
    elif nll_loss_coef:
        name, told = "rpo", ["nll_loss_coef"]  # the winner's likelihood a token, each pair's own mean
        options["rpo_alpha"] = float(nll_loss_coef)
    elif ipo:
        name, told = "ipo_sum", ["ipo"]  # of summed log-probs (models/loss.py)
    shared.objective(draft, {name: 1.0}, options, *told)


def _saves(draft: Draft, save_steps=None, eval_steps=None) -> None:
    """-1: none before the end, or once an epoch."""
    for name, value in (("save_steps", save_steps), ("eval_steps", eval_steps)):
        if value is not None and value > 0:
            draft.set(name, value, name)
        elif value is not None:
            draft.leave(name, "steps are counted here, always with the end")


def _trackers(draft: Draft, use_wandb=None, use_tensorboard=None) -> None:
    key = draft.key("use_wandb")
    draft.theirs |= {key: True} if use_wandb else {}  # it may be what logs in
    report_to = ["wandb"] if use_wandb else ["tensorboard"] if use_tensorboard else []
    if report_to:
        draft.set("report_to", report_to, *draft.given("use_wandb", "use_tensorboard")[:1])


OPENRLHF = Tool(
    "OpenRLHF",
    only_here=" ".join(NAMES.values()) + " pretrain ref_pretrain micro_train_batch_size "
    "prompt_key chosen_key rejected_key apply_chat_template zero_stage packing_samples "
    "nll_loss_coef ref_offload adam_offload input_key output_key label_key",
    defaults={
        "train.batch_size": 128,
        "train.max_epochs": 1,
        "adam.lr": 1e-5,
        "adam.betas": "0.9 0.95",
        "lr_scheduler": "cosine_with_min_lr",
        "lr_warmup_ratio": 0.03,
        "model.aux_loss_coef": 0.0,
        "model.beta": 0.1,
        "data.max_len": 512,
    },
    parts=(_model, _same, _optimizer, _lora, _data, _rows, _saves, _trackers, _loss),
    reasons={
        "ref_pretrain": "the reference is the model that training starts from; remove it",
        "param_dtype": "fastdpo computes in bf16 or fp32; set bf16",
        "dataset_probs": "data sets are read one after the other; remove it",
        "max_samples": "give one data set, or its first rows as data: NAME#train[:1000]",
        "dataset": "fastdpo reads a file, a folder or a hub's NAME; save its part in a file",
        "eval_dataset": "fastdpo reads a file, a folder or a hub's NAME; save its part in a file",
        "nll_loss_coef": "fastdpo has it beside plain DPO only; remove it",
    },
    names=NAMES
    | {
        "rpo_alpha": "model.nll_loss_coef",
        "desirable_weight": "desirable_loss_weight",
        "undesirable_weight": "undesirable_loss_weight",
    },
    older={key: (name, *FORMER.get(name, ())) for name, key in NAMES.items()},
    model_key="pretrain",
    rows=ROWS,
)
