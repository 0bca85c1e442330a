"""torchtune's DPO configs (recipes lora_dpo_* and full_dpo_distributed): nested keys, here with dots."""

from fastdpo.convert.draft import Draft
from fastdpo.convert.rules import Tool, beside, only, unread
from fastdpo.convert.tools import shared
from fastdpo.convert.tools.shared import LOOKS, NO_DROPOUT, NO_SUCH, SAME, SPEED
from fastdpo.convert.tools.torchtune_data import SETS, data, last

_OWNERS = {
    "llama": "meta-llama",
    "qwen": "Qwen",
    "mistral": "mistralai",
    "gemma": "google",
    "phi": "microsoft",
}
_MODULES = {"output_proj": "o_proj"}  # theirs that transformers calls otherwise
_LOSSES = {"DPOLoss": "sigmoid", "RSOLoss": "hinge"}
_OPTIMIZERS = {
    "torch.optim.AdamW": "adamw_torch_fused",
    "torch.optim.SGD": "sgd",
    "bitsandbytes.optim.AdamW8bit": "adamw_8bit",
    "bitsandbytes.optim.PagedAdamW8bit": "paged_adamw_8bit",
    "bitsandbytes.optim.PagedAdamW": "paged_adamw_32bit",
    "torchao.optim.AdamW8bit": "adamw_torch_8bit",
    "torchao.optim.AdamW4bit": "adamw_torch_4bit",
    "torchao.prototype.low_bit_optim.AdamW8bit": "adamw_torch_8bit",
    "torchao.prototype.low_bit_optim.AdamW4bit": "adamw_torch_4bit",
}
_TRACKERS = {"WandBLogger": "wandb", "TensorBoardLogger": "tensorboard"}


def _has_lora(draft: Draft) -> bool:
    return last(str(draft.theirs.get("model._component_") or "")).startswith(("lora_", "qlora_"))


def _model(draft: Draft, checkpoint_dir=None, checkpointer="", ref_checkpoint_dir=None) -> None:
    if (kind := last(checkpointer)) == "FullModelTorchTuneCheckpointer":
        draft.refuse("checkpointer")
    if ref_checkpoint_dir not in (None, checkpoint_dir):
        draft.refuse("ref_checkpoint_dir")
    elif ref_checkpoint_dir:  # full_dpo_distributed's
        draft.leave("ref_checkpoint_dir", "it is the model that training starts from")
        draft.check("per_device_train_batch_size", "it is one device's; batch_size here is the whole batch")
    if checkpoint_dir is None:
        return
    folder = checkpoint_dir.rstrip("/")
    if kind == "FullModelMetaCheckpointer":  # Meta's own files lie in a folder of the one on the hub
        folder = folder.removesuffix("/original")
    draft.set("model", folder, "checkpoint_dir")
    component = str(draft.theirs.get("model._component_") or "")
    owner = next((owner for name, owner in _OWNERS.items() if name in component), "OWNER")
    name = f"{owner}/{folder.rpartition('/')[2]}"
    draft.check("checkpoint_dir", f"`tune download` fills that folder; without it give --model {name} or so")


def _lora(
    draft: Draft,
    model_component="",
    lora_rank=8,
    lora_alpha=16,
    lora_attn_modules=(),
    apply_lora_to_mlp=False,
    apply_lora_to_output=False,
    *,
    lora_dropout=0,
    quantize_base=False,
) -> None:
    if not _has_lora(draft):
        draft.tell("model_component", ": all weights are trained, as without lora_rank")
        return  # full_dpo_distributed.py calls disable_dropout
    draft.set("lora_rank", lora_rank, "lora_rank")
    draft.set("lora_alpha", float(lora_alpha), "lora_alpha")
    names = [_MODULES.get(name, name) for name in lora_attn_modules]
    names += ["gate_proj", "up_proj", "down_proj"] if apply_lora_to_mlp else []
    names += ["lm_head"] if apply_lora_to_output else []
    keys = ["lora_attn_modules"] + ["apply_lora_to_mlp"] * bool(apply_lora_to_mlp)
    keys += ["apply_lora_to_output"] * bool(apply_lora_to_output)
    draft.set("lora_target_modules", names, *keys)
    if lora_dropout:  # the LoRA recipes leave it on
        draft.refuse("lora_dropout")
    if quantize_base or last(model_component).startswith("qlora_"):
        draft.set("load_in_4bit", True, "quantize_base" if quantize_base else "model_component")
        draft.check(
            "model_component", "NF4 is torchao's there and bitsandbytes' here, which rounds otherwise"
        )


def _precision(draft: Draft, dtype=None) -> None:
    if dtype not in ("bf16", "fp32"):
        draft.refuse("dtype")
    elif dtype == "bf16" and not _has_lora(draft):
        draft.set("pure_bf16", True, "dtype")
        draft.check("dtype", "fastdpo rounds its updates stochastically, torchtune to nearest")
    else:
        draft.set("dtype", dtype, "dtype")
        if dtype == "bf16":
            draft.check("dtype", "torchtune keeps a LoRA's weights in bf16, fastdpo in fp32")


def _steps(draft: Draft, num_train_epochs=1, max_steps_per_epoch=None) -> None:
    if max_steps_per_epoch is None:
        draft.set("num_epochs", float(num_train_epochs), "num_train_epochs")
        return draft.check("num_train_epochs", "torchtune skips the last rows where they fill no batch")
    steps = int(max_steps_per_epoch * num_train_epochs)
    draft.set("max_steps", steps, "max_steps_per_epoch", "num_train_epochs")
    draft.check("max_steps_per_epoch", "fewer rows than that end an epoch there; here they are read again")


def _optimizer(
    draft: Draft, optimizer=None, weight_decay=0.01, optimizer_betas=None, optimizer_eps=None
) -> None:
    if optimizer is not None and optimizer not in _OPTIMIZERS:
        draft.refuse("optimizer")
    elif optimizer:
        draft.set("optim", _OPTIMIZERS[optimizer], "optimizer")
    if optimizer_betas is not None:
        shared.betas(draft, "optimizer_betas", optimizer_betas)
    if optimizer_eps is not None:
        draft.set("adam_epsilon", float(optimizer_eps), "optimizer_eps")
    if optimizer != "torch.optim.SGD":
        draft.set("weight_decay", float(weight_decay), "weight_decay")
        if weight_decay and not _has_lora(draft):
            draft.check("weight_decay", "norms decay there, too; here only matrices")


def _schedule(draft: Draft, lr_scheduler=None, num_warmup_steps=0, num_cycles=0.5) -> None:
    if lr_scheduler is None:
        return draft.set("lr_scheduler_type", "constant", "lr_scheduler", lr_scheduler=None)
    if last(lr_scheduler) != "get_cosine_schedule_with_warmup":
        return draft.refuse("lr_scheduler")
    if num_cycles != 0.5:
        draft.refuse("num_cycles")
    draft.set("lr_scheduler_type", "cosine", "lr_scheduler")
    draft.set("warmup_steps", num_warmup_steps, "num_warmup_steps")


def _clipping(draft: Draft, clip_grad_norm=None) -> None:
    if clip_grad_norm is not None and _has_lora(draft):
        draft.leave("clip_grad_norm", "torchtune's LoRA recipes do not read it, and do not clip")
        draft.ours["max_grad_norm"] = 0.0
    else:
        norm = 0.0 if clip_grad_norm in (None, "inf", float("inf")) else float(clip_grad_norm)
        draft.set("max_grad_norm", norm, "clip_grad_norm", clip_grad_norm=None)


def _length(draft: Draft, max_seq_len=None, old_max_seq_len=None, truncation_type=None) -> None:
    if longest := max_seq_len or old_max_seq_len:
        draft.set("max_length", longest, "max_seq_len" if max_seq_len else "old_max_seq_len")
    else:
        draft.check("max_seq_len", "torchtune cuts no row then; here max_length 1024 does, and counts it")
    if truncation_type:
        draft.set("truncation", "keep_end" if truncation_type == "left" else "keep_start", "truncation_type")


def _loss(draft: Draft, loss=None, loss_type=None, beta=0.1, gamma=None, *, label_smoothing=None) -> None:
    name = _LOSSES.get(last(loss or ""))
    if name is None:
        return draft.refuse("loss")
    if loss_type not in (None, name):
        draft.refuse("loss_type")
    if gamma is not None and name == "sigmoid":
        draft.refuse("gamma")
    shared.objective(draft, {name: 1.0}, {"beta": beta, "label_smoothing": label_smoothing or None}, "loss")
    if gamma is not None:
        draft.set("beta", float(gamma), "gamma")


def _tracker(draft: Draft, metric_logger=None) -> None:
    if metric_logger is None:
        return
    kind = last(metric_logger["_component_"])
    if kind in _TRACKERS:
        draft.set("report_to", _TRACKERS[kind], "metric_logger")
    else:
        draft.leave("metric_logger", "metrics.jsonl has it all")


TORCHTUNE = Tool(
    "torchtune",
    only_here="model._component_ checkpointer.checkpoint_dir checkpointer._component_ tokenizer._component_ "
    "loss._component_ dataset._component_ optimizer._component_ lr_scheduler._component_ metric_logger",
    defaults={
        "clip_grad_norm": None,
        "lr_scheduler._component_": None,
        "optimizer.lr": 1e-3,
        "optimizer.weight_decay": 0.01,
        "tokenizer.max_seq_len": None,
        "gradient_accumulation_steps": 1,
    },
    parts=(
        shared.batch, _steps, _model, _lora, _precision, _optimizer, _schedule, _clipping, _length, data,
        _loss, _tracker,
    ),
    reasons=shared.REASONS
    | {
        "checkpointer": "a folder in transformers' format is needed: save with FullModelHFCheckpointer",
        "ref_checkpoint_dir": "the reference is the model that training starts from",
        "lora_dropout": NO_DROPOUT,
        "dtype": "fastdpo computes in bf16 or fp32",
        "optimizer": f"known are {', '.join(_OPTIMIZERS)}; choose one, or give optim",
        "lr_scheduler": "known is get_cosine_schedule_with_warmup; give lr_scheduler_type",
        "num_cycles": NO_SUCH,
        "data_component": f"known are {', '.join(SETS)}, one of them; give data, and data_format",
        "data_files": "give the files as a list in data",
        "source": "it is not given; give data",
        "prompt_template": "write the template to a Jinja file and give chat_template: FILE.jinja",
        "loss": f"known are {', '.join(_LOSSES)}; give objective (`fastdpo objectives` lists them)",
        "gamma": "DPOLoss has none; remove it",
        "loss_type": "it is not that loss's; give objective (`fastdpo objectives` lists them)",
    },
    names={
        "per_device_train_batch_size": "batch_size",
        "num_train_epochs": "epochs",
        "checkpointer": "checkpointer._component_",
        "checkpoint_dir": "checkpointer.checkpoint_dir",
        "ref_checkpoint_dir": "ref_checkpointer.checkpoint_dir",
        "model_component": "model._component_",
        "tokenizer": "tokenizer._component_",
        "optimizer": "optimizer._component_",
        "optimizer_betas": "optimizer.betas",
        "optimizer_eps": "optimizer.eps",
        "weight_decay": "optimizer.weight_decay",
        "lr_scheduler": "lr_scheduler._component_",
        "data_component": "dataset._component_",
        "config": "dataset.name",
        "old_max_seq_len": "dataset.max_seq_len",
        "loss": "loss._component_",
        **{name: f"model.{name}" for name in "lora_rank lora_alpha lora_attn_modules lora_dropout".split()},
        **{name: f"model.{name}" for name in "apply_lora_to_mlp apply_lora_to_output quantize_base".split()},
        **{name: f"tokenizer.{name}" for name in "max_seq_len truncation_type prompt_template".split()},
        **{name: f"lr_scheduler.{name}" for name in ("num_warmup_steps", "num_cycles")},
        **{name: f"dataset.{name}" for name in "source data_files data_dir split column_map".split()},
        **{name: f"loss.{name}" for name in "loss_type beta gamma label_smoothing".split()},
    },
    model_key="model",  # where it is one, it is the part of that name
    rows={
        "optimizer.lr": "learning_rate",
        "log_every_n_steps": "logging_steps",
        "save_every_n_steps": "save_steps",
        "enable_activation_checkpointing": "gradient_checkpointing",
        "enable_activation_offloading": "activation_offloading",
        "optimizer_in_bwd": "optimizer_in_backward",
        "model.use_dora": "use_dora",
        "output_dir seed": SAME,
        "shuffle": only(True, fix="rows are shuffled by seed; set it to true"),
        "resume_from_checkpoint": unread("say --resume"),
        "checkpointer.recipe_checkpoint checkpointer.adapter_checkpoint": beside("resume_from_checkpoint"),
        "checkpointer.checkpoint_files checkpointer.model_type checkpointer.safe_serialization "
        "ref_checkpointer._component_ ref_checkpointer.checkpoint_files ref_checkpointer.recipe_checkpoint "
        "ref_checkpointer.model_type ref_checkpointer.safe_serialization tokenizer.path "
        "tokenizer.merges_file tokenizer.special_tokens_path tokenizer.special_tokens": unread(
            "the model's folder says it"
        ),
        "checkpointer.output_dir ref_checkpointer.output_dir": unread("output_dir has it"),
        "dataset": only(fix="give the data sets as data, and their columns as data_format"),
        "dataset.train_on_input": only(False, fix="responses are what is scored; set it to false"),
        "dataset.new_system_prompt": only(fix="give rows a system column, or a system turn; remove it"),
        "dataset.filter_fn": only(fix="give the rows that it leaves; remove it"),
        "dataset.packed": unread("batches are packed here"),
        "optimizer.momentum": only(0, fix=NO_SUCH),
        "optimizer.amsgrad optimizer.maximize optimizer.nesterov": only(False, fix=NO_SUCH),
        "model.lora_bias": only(False, fix=NO_SUCH),
        "optimizer.fused optimizer.foreach compile device fsdp_cpu_offload fsdp_reshard_after_forward "
        "custom_sharded_layers enable_async_checkpointing log_peak_memory_stats cudnn_deterministic_mode "
        "profiler device_type num_workers pin_memory": SPEED,
        "save_adapter_weights_only log_level": LOOKS,
    },
)  # fmt: skip
