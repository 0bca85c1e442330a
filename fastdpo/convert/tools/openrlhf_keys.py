"""OpenRLHF's flags: the names that parts read by, and the flags that stand alone."""

from fastdpo.convert.rules import beside, only, unread
from fastdpo.convert.tools.shared import LOOKS, NO_DROPOUT, SPEED

NAMES = {  # of versions before April 2026 -> those with dots
    "pretrain": "model.model_name_or_path",
    "ref_pretrain": "ref.model_name_or_path",
    "param_dtype": "ds.param_dtype",
    "train_batch_size": "train.batch_size",
    "max_epochs": "train.max_epochs",
    "learning_rate": "adam.lr",
    "aux_loss_coef": "model.aux_loss_coef",
    "adam_betas": "adam.betas",
    "lora_rank": "ds.lora.rank",
    "lora_alpha": "ds.lora.alpha",
    "target_modules": "ds.lora.target_modules",
    "dataset": "data.dataset",
    "dataset_probs": "data.dataset_probs",
    "dataset_split": "data.dataset_split",
    "max_samples": "data.max_samples",
    "eval_dataset": "eval.dataset",
    "eval_split": "eval.split",
    "prompt_key": "data.prompt_key",
    "chosen_key": "data.chosen_key",
    "rejected_key": "data.rejected_key",
    "input_template": "data.input_template",
    "apply_chat_template": "data.apply_chat_template",
    "max_len": "data.max_len",
    "beta": "model.beta",
    "ipo": "model.ipo_enable",
    "label_smoothing": "model.label_smoothing",
    "nll_loss_coef": "model.nll_loss_coef",
    "save_steps": "ckpt.save_steps",
    "eval_steps": "eval.steps",
    "use_wandb": "logger.wandb.key",
    "use_tensorboard": "logger.tensorboard_dir",
}
FORMER = {"param_dtype": ("data_type", "bf16"), "dataset_split": ("train_split",)}

ROWS = {
    "adam.weight_decay l2": "weight_decay",
    "adam.eps": "adam_epsilon",
    "max_norm": "max_grad_norm",
    "train.seed seed": "seed",
    "ckpt.output_dir save_path": "output_dir",
    "ckpt.max_num max_ckpt_num": "save_total_limit",
    "logger.logging_steps logging_steps": "logging_steps",
    "model.gradient_checkpointing_enable gradient_checkpointing": "gradient_checkpointing",
    "ds.load_in_4bit load_in_4bit": "load_in_4bit",
    "data.tokenizer_chat_template tokenizer_chat_template": "chat_template",
    "ds.lora.dropout lora_dropout": only(0, fix=NO_DROPOUT),
    "optim": only("adam", fix="fastdpo has AdamW; set adam"),
    "muon.lr muon.momentum muon.ns_steps muon.nesterov muon.no_nesterov": beside("optim muon"),
    "min_lr_ratio": beside("lr_scheduler cosine_with_min_lr"),
    "input_key output_key label_key": beside("the rest of the config"),
    "desirable_loss_weight undesirable_loss_weight": beside("train_kto"),
    "ckpt.load_enable load_checkpoint": unread("say --resume"),
    "use_ms": lambda draft, key, value: draft.check(
        key, "left out, names are looked up on the Hugging Face hub, and ModelScope's may be others"
    ),
    "num_processes": unread("the batch is that of all devices together"),
    "ds.grad_accum_dtype grad_accum_dtype": unread("gradients are summed in fp32"),
    "train.micro_batch_size micro_train_batch_size ds.zero_stage zero_stage ds.zpg zpg ds.adam_offload "
    "adam_offload ref.offload ref_offload ds.attn_implementation attn_implementation flash_attn "
    "ds.experts_implementation ds.use_liger_kernel use_liger_kernel ds.overlap_comm overlap_comm "
    "ds.deepcompile deepcompile torch_compile disable_trace_cache model.gradient_checkpointing_reentrant "
    "gradient_checkpointing_use_reentrant ds.tensor_parallel_size ds_tensor_parallel_size ds.ring_attn_size "
    "ring_attn_size ds.ring_attn_head_stride ring_head_stride ds.packing_samples packing_samples "
    "data.disable_fast_tokenizer disable_fast_tokenizer data.dataloader_num_workers dataloader_num_workers "
    "local_rank train.full_determinism_enable full_determinism": SPEED,
    "ckpt.path ckpt_path ckpt.max_mem max_ckpt_mem ckpt.save_hf save_hf_ckpt ckpt.disable_ds disable_ds_ckpt "
    "ds.use_universal_ckpt use_ds_universal_ckpt use_universal_ckpt logger.wandb.org wandb_org "
    "logger.wandb.group wandb_group logger.wandb.project wandb_project logger.wandb.run_name "
    "wandb_run_name": LOOKS,
}
