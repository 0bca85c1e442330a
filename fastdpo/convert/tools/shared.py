"""What the tools have in common: transformers' TrainingArguments, LoRA's modules, losses and options."""

import math
import re
from pathlib import Path

from fastdpo.config.names import OPTIMIZERS
from fastdpo.convert.draft import Draft
from fastdpo.convert.rules import beside, only, to, unread

DEFAULTS = {"num_train_epochs": 3.0, "per_device_train_batch_size": 8}  # TrainingArguments'
SAME = to()
SPEED = unread("it changes speed or memory only")
LOOKS = unread("it changes what is shown or stored only")
ONCE = unread("the reference is always computed once and kept")
NO_SUCH = "fastdpo does not have it, and training would not be the same; remove it"
NO_DROPOUT = "fastdpo trains LoRA without dropout; set it to 0"
NO_FP16 = "left out, fastdpo computes in bf16, or in fp32 where the GPU has no bf16"
QUANTISED = "fastdpo quantises to 4 bits only; set load_in_4bit: true"
WHOLE_LIKELIHOOD = "the likelihood is of the response here, in TRL's ORPO of the prompt, too"
SHUFFLED = "rows are shuffled by seed; remove it"
READ_ONCE = only(False, fix="rows are read once, before training; set it to false")
NOT_ON_PROMPTS = only(False, fix="responses are what is scored; set it to false")
# options that train otherwise if they are not read
_MUST_BE_READ = ("ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "use_weighting", "rpo_alpha")
REASONS = {  # why the parts below refuse keys, by the names that they have here
    "per_device_train_batch_size": "a whole number of at least 1 is needed",
    "gradient_accumulation_steps": "a whole number of at least 1 is needed",
    "metric_for_best_model": "load_best goes by the held-out loss; set eval_loss",
    "push_to_hub": "name the repository: push_to_hub: me/my-model",
    "val_size": "give a share below 1, or a whole number of rows",
    **dict.fromkeys(_MUST_BE_READ, "the loss does not read it here; remove it"),
}

TRANSFORMERS = {  # rows of every tool: TrainingArguments, and two more
    "output_dir learning_rate lr_scheduler_type lr_scheduler_kwargs adam_beta1 adam_beta2 adam_epsilon "
    "weight_decay max_grad_norm seed logging_steps save_total_limit gradient_checkpointing "
    "load_in_4bit": SAME,
    "overwrite_output_dir": "overwrite",
    "optim": to("optim", OPTIMIZERS),
    "optim_args": only("", fix=NO_SUCH),
    "optim_target_modules": only(fix=NO_SUCH),
    "neftune_noise_alpha": only(0, fix=NO_SUCH),
    "label_smoothing_factor": only(0, fix="it is not DPO's; label_smoothing is"),
    "trust_remote_code": unread(
        "no code of a model's repository is run; a model that needs its own is refused"
    ),
    "data_seed": unread("the order of rows goes by seed"),
    "train_sampling_strategy": only("random", fix=SHUFFLED),
    "group_by_length": only(False, fix="rows are shuffled by seed, and packed without padding; remove it"),
    "dataloader_drop_last": only(False, fix="every row is trained on; remove it"),
    "average_tokens_across_devices": unread("there is one device"),
    "deepspeed fsdp": unread("there is one device: batch_size is the whole batch, of all devices together"),
    "auto_find_batch_size": unread("max_tokens bounds memory, and batch_size stays"),
    "resume_from_checkpoint": unread("say --resume"),
    "metric_for_best_model greater_is_better": beside("load_best_model_at_end"),
    "activation_checkpointing": "gradient_checkpointing",
    "ignore_data_skip": unread("a run that is resumed goes on at its own row"),
    "label_names length_column_name": unread("the rows' columns are found by data_format"),
    "torchdynamo jit_mode_eval use_ipex fp16_backend fp16_opt_level half_precision_backend no_cuda "
    "use_mps_device tpu_num_cores dispatch_batches sharded_ddp fsdp_min_num_params "
    "fsdp_transformer_layer_cls_to_wrap per_gpu_eval_batch_size local_rank debug tf32 dataloader_num_workers "
    "dataloader_pin_memory dataloader_prefetch_factor dataloader_in_order dataloader_persistent_workers "
    "dataloader_multiprocessing_context torch_compile torch_compile_backend torch_compile_mode "
    "use_liger_kernel liger_kernel_config gradient_checkpointing_kwargs activation_checkpointing_kwargs "
    "ddp_timeout ddp_find_unused_parameters ddp_backend ddp_bucket_cap_mb ddp_broadcast_buffers "
    "ddp_static_graph use_cpu use_cache torch_empty_cache_steps per_device_eval_batch_size "
    "eval_accumulation_steps eval_do_concat_batches eval_use_gather_object bf16_full_eval fp16_full_eval "
    "fsdp_config accelerator_config parallelism_config remove_unused_columns full_determinism "
    "enable_jit_checkpoint": SPEED,
    "logging_strategy logging_first_step logging_dir logging_nan_inf_filter log_level log_level_replica "
    "log_on_each_node run_name disable_tqdm do_train do_eval do_predict eval_on_start eval_delay "
    "save_only_model save_safetensors hub_strategy hub_private_repo hub_token hub_revision hub_always_push "
    "hub_model_revision push_to_hub_token push_to_hub_model_id push_to_hub_organization project "
    "trackio_space_id trackio_bucket_id trackio_static_space_id wandb_project wandb_entity wandb_run_group "
    "include_num_input_tokens_seen include_tokens_per_second include_for_metrics include_inputs_for_metrics "
    "batch_eval_metrics skip_memory_metrics prediction_loss_only restore_callback_states_from_checkpoint "
    "save_on_each_node benchmarks callbacks overwrite_hub_revision push_to_hub_revision": LOOKS,
}


def batch(
    draft: Draft, per_device_train_batch_size=None, gradient_accumulation_steps=None, *, num_processes=None
) -> None:
    """The whole batch: of one device in one step, times what a script says of steps and devices."""
    size, steps = per_device_train_batch_size, gradient_accumulation_steps
    if size is None and steps is None:
        return
    size_key, steps_key = "per_device_train_batch_size", "gradient_accumulation_steps"
    size = draft.tool.defaults.get(draft.key(size_key), 1) if size is None else size
    steps = 1 if steps is None else steps
    odd = lambda value: not isinstance(value, int) or isinstance(value, bool) or value < 1
    wrong = [key for key, value in ((size_key, size), (steps_key, steps)) if odd(value)]
    for key in wrong:
        draft.refuse(key)
    if not wrong:
        devices, given = ([num_processes], ["num_processes"]) if num_processes else ([], [])
        values = {size_key: size, steps_key: steps}
        why = "" if devices else "of one device"
        draft.set("batch_size", math.prod([size, steps, *devices]), *values, *given, why=why, **values)


def epochs(draft: Draft, num_train_epochs=None, max_steps=-1) -> None:
    """Passes over the data, and the steps that overrule them."""
    if max_steps > 0:
        draft.set("max_steps", max_steps, "max_steps")
    if num_train_epochs is None:
        return
    if "max_steps" in draft.ours:
        draft.leave("num_train_epochs", "max_steps says when to stop")
    else:
        draft.set("num_epochs", float(num_train_epochs), "num_train_epochs")


def warmup(draft: Draft, warmup_steps=None, warmup_ratio=None) -> None:
    """warmup_steps, or warmup_ratio as transformers 5 writes it: steps below 1 are a share. Of both
    transformers reads the ratio where the steps are 0, and Axolotl the steps."""
    if warmup_steps is not None and (
        warmup_steps or draft.tool.name == "Axolotl" or not draft.given("warmup_ratio")
    ):
        draft.set("warmup_steps", warmup_steps, "warmup_steps")
        if draft.given("warmup_ratio"):
            draft.leave("warmup_ratio", "warmup_steps comes first")
        if 0 < warmup_steps < 1:
            draft.check("warmup_steps", "a share of all steps, as in transformers 5; before, no warm-up")
    elif warmup_ratio:
        draft.set("warmup_steps", float(warmup_ratio), "warmup_ratio", why="a share of all steps")


def clipping(draft: Draft, max_grad_norm=None) -> None:
    if max_grad_norm is not None:
        draft.set("max_grad_norm", max_grad_norm, "max_grad_norm")
    elif "max_grad_norm" in draft.theirs:
        draft.set("max_grad_norm", 0.0, "max_grad_norm", why="null switches clipping off")


def precision(draft: Draft, bf16="auto", fp16=False) -> None:
    if fp16 and fp16 != "auto":
        draft.check("fp16", NO_FP16)
    elif bf16 != "auto":
        draft.set("dtype", "bf16" if bf16 else "fp32", "bf16")


def saves(draft: Draft, save_strategy=None, save_steps=None) -> None:
    _every(draft, "save_strategy", save_strategy, "save_steps", save_steps)


def evaluations(draft: Draft, eval_strategy=None, evaluation_strategy=None, eval_steps=None) -> None:
    when = "evaluation_strategy" if evaluation_strategy else "eval_strategy"
    _every(draft, when, evaluation_strategy or eval_strategy, "eval_steps", eval_steps)


def _every(draft: Draft, strategy: str, when, key: str, steps) -> None:
    if when in ("epoch", "best"):
        draft.leave(strategy, f"{key} counts steps here, always with the end")
    elif isinstance(steps, float) and steps < 1:
        draft.leave(key, "it is a number of steps here")
    elif steps and when not in ("no", False):  # YAML reads no as false
        draft.set(key, int(steps), key)


def best(draft: Draft, load_best_model_at_end=False) -> None:
    if not load_best_model_at_end:
        return
    metric, greater = draft.take("metric_for_best_model"), draft.take("greater_is_better")
    if metric not in (None, "loss", "eval_loss") or greater:
        draft.refuse("metric_for_best_model")
    draft.set("load_best", True, "load_best_model_at_end")


def trackers(draft: Draft, report_to=None) -> None:
    names = [report_to] if isinstance(report_to, str) else report_to or []
    known = [name for name in names if name in ("tensorboard", "wandb", "trackio")]
    if others := [name for name in names if name not in (*known, "none")]:
        draft.tell("report_to", f": left out {', '.join(others)}, metrics.jsonl has it all")
    if known:
        draft.set("report_to", known, "report_to")


def upload(draft: Draft, push_to_hub=None, hub_model_id=None) -> None:
    """Their push_to_hub is yes or no, and hub_model_id the name; in Axolotl the name alone is a yes."""
    folder = draft.theirs.get("output_dir")
    if isinstance(push_to_hub, str):  # our own key
        draft.set("push_to_hub", push_to_hub, "push_to_hub")
    elif push_to_hub and not hub_model_id and folder:
        draft.set(
            "push_to_hub", Path(str(folder)).name, "push_to_hub", "output_dir"
        )  # as transformers names it
    elif push_to_hub and not hub_model_id:
        draft.refuse("push_to_hub")
    elif hub_model_id and (push_to_hub or draft.tool.name == "Axolotl"):
        draft.set("push_to_hub", hub_model_id, "hub_model_id")
    elif hub_model_id:
        draft.leave("hub_model_id", "push_to_hub is not set")


def held_out(draft: Draft, val_size=None) -> None:
    hold_out(draft, val_size, "val_size")


def hold_out(draft: Draft, size, *keys: str) -> None:
    """A share of the rows, or a number of them, that is split off by seed."""
    if size and size >= 1 and size != int(size):
        draft.refuse(keys[0])
    elif size:
        draft.set("eval_data", float(size), *keys)


RUN = (batch, epochs, warmup, clipping, precision)
KEPT = (saves, evaluations, best, upload, trackers)


def spec(name: str, config: str | None, split: str | None) -> str:
    """A hub data set as our key data names it."""
    return name + (f":{config}" if config else "") + (f"#{split}" if split and split != "train" else "")


def one_or_all(specs: list):
    """What our key data takes."""
    return specs[0] if len(specs) == 1 else specs


def names_in(value) -> list[str]:
    """Names with commas between them, or a list of them."""
    names = value.split(",") if isinstance(value, str) else value or []
    return [str(name).strip() for name in names if str(name).strip()]


def own_template(draft: Draft, key: str) -> None:
    draft.check(key, "left out, the tokenizer's own is used; compare in `fastdpo data`")


def target_modules(draft: Draft, key: str, value) -> None:
    """LoRA's target modules, which the tool's `key` has."""
    names = names_in(value)
    ours = "all-linear" if names in (["all"], ["all-linear"]) else names
    draft.set("lora_target_modules", ours, key)


def betas(draft: Draft, name: str, value) -> None:
    """AdamW's two, a list or text."""
    found = re.findall(r"[\d.e-]+", str(value))
    if len(found) != 2:
        return draft.refuse(name, fix="two numbers are needed")
    for ours, beta in zip(("adam_beta1", "adam_beta2"), found):
        draft.set(ours, float(beta), name)


def with_sft(draft: Draft, parts: dict[str, float], name: str, weight) -> None:
    """The winner's likelihood beside a loss, by the key that has its weight."""
    if weight:
        draft.tell(name, f" -> the loss sft beside {', '.join(part for part in parts if part != 'sft')}")
        parts["sft"] = parts.get("sft", 0.0) + float(weight)


def with_likelihood(draft: Draft, parts: dict[str, float]) -> None:
    """CPOTrainer's simpo has it, unless cpo_alpha is 0."""
    with_sft(draft, parts, "cpo_alpha", draft.take("cpo_alpha", 1.0))


def objective(draft: Draft, parts: dict[str, float], options: dict, *names: str) -> None:
    """Our objective of weighted losses, told by the keys of these names, with those options (theirs, by our
    names) that one of them reads."""
    from fastdpo.objectives.make import options_read

    parts = {{"aot_pair": "aot"}.get(name, name): weight for name, weight in parts.items()}
    if "robust" in parts and options.get("label_smoothing") is None:
        options = options | {"label_smoothing": 0.0}  # TRL's default, which ours is not
    losses = ", ".join(parts)
    draft.set("objective", losses if list(parts.values()) == [1] else parts, *names)
    read, args = options_read(draft.ours["objective"]), {}
    for name, value in options.items():
        off = "use_weighting" if "cpo" in parts else ("use_weighting", "cpo_alpha")  # cpo's own is 1
        if value in (None, "reverse_kl") or (not value and name in off):
            continue  # what changes nothing
        if name not in read and name in _MUST_BE_READ:
            draft.refuse(name, value)
        elif name not in read:
            draft.leave(name, f"the loss ({losses}) does not read it")
        elif name in ("beta", "label_smoothing"):
            draft.set(name, float(value), name)
        else:
            args[name] = value
    if args:
        draft.set("objective_args", args, *args, **args)
