"""ms-swift's keys that stand alone: of its RLHFArguments, all of SFT and of the tuners with them."""

from fastdpo.convert.draft import Draft
from fastdpo.convert.rules import beside, only, unread
from fastdpo.convert.tools import shared
from fastdpo.convert.tools.shared import LOOKS, NO_SUCH, SAME, SPEED
from fastdpo.convert.tools.template_names import set_template

_OF_TOWERS = unread("a tower is left as it is, or trained as all the rest")
_OF_OTHERS = unread("it is of other methods: PPO, GRPO, GKD or reward models")
_SAYS_NOTHING = unread("it says nothing of dpo, kto, orpo, cpo or simpo")


def _scale(draft: Draft, key: str, value) -> None:
    """Which tokens count, and how much: of all answers, or of the last one."""
    if value == "default":
        draft.check(key, "left out, of a conversation only the last answer is scored")
    elif value == "last_round":
        draft.leave(key, "it is so here")
    else:
        draft.refuse(key, fix="every token of a response counts the same here; remove it")


def _of_environment(draft: Draft, key: str, value) -> None:
    """What Qwen's images, and those of some others, are made smaller to (get_env_args in template/)."""
    if draft.given("max_pixels"):
        return draft.check(key, "left out, max_pixels says how large an image may be")
    draft.set("image_max_pixels", value, key)
    draft.check(key, "templates that read it round sides to whole patches, here the processor does after it")


ROWS = shared.TRANSFORMERS | {
    "model beta lora_rank lora_alpha use_dora use_rslora router_aux_loss_coef": SAME,
    "model_id_or_path": "model",
    "max_epochs": "num_epochs",
    "model_revision": only("master", "main", fix="download the revision and give its folder as model"),
    "model_type model_kwargs task_type": unread("the model's own config says what it is"),
    "template": lambda draft, key, value: set_template(draft, key, value),
    "agent_template": lambda draft, key, value: shared.own_template(draft, key),
    "use_chat_template": only(True, fix="give rows whose prompt is text: they are tokenised as they are"),
    "template_backend": unread("the tokenizer's own template is used"),
    "loss_scale": _scale,
    "add_non_thinking_prefix disable_ignore_empty_think preserve_thinking": lambda draft, key, value: (
        draft.check(key, "left out, an empty thought is written and scored as the template has it")
    ),
    "enable_thinking response_prefix": unread("it is of inference"),
    "is_binary_loss_scale": unread("every token of a response counts the same"),
    "new_special_tokens": only([], fix="add them to the model and tokenizer first"),
    "rope_scaling max_model_len": only(fix="set it in the model's own config"),
    "init_strategy": only(fix="a model whose weights are not all there is refused; remove it"),
    "local_repo_path": unread(
        "no code of a model's repository is run; a model that needs its own is refused"
    ),
    "target_parameters": only(fix="give the modules' names in target_modules"),
    "modules_to_save": only([], fix=NO_SUCH),
    "lora_bias": only("none", fix=NO_SUCH),
    "lora_dtype": unread("a LoRA's weights are kept in fp32"),
    "lorap_lr_ratio freeze_parameters_regex trainable_parameters_regex": only(fix=NO_SUCH),
    "freeze_parameters trainable_parameters": only([], fix=NO_SUCH),
    "freeze_parameters_ratio lisa_activated_layers": only(0, fix=NO_SUCH),
    "freeze_vit": "freeze_vision",
    "max_pixels": "image_max_pixels",
    "MAX_PIXELS": _of_environment,
    "freeze_aligner vit_lr aligner_lr vit_gradient_checkpointing norm_bbox": _OF_TOWERS,
    "freeze_llm use_galore enable_dft_loss": only(False, fix=NO_SUCH),
    "init_weights": only(True, fix=NO_SUCH),
    "optimizer early_stop_interval": only(fix=NO_SUCH),
    "callbacks": only([], fix="no code of yours is run; remove it"),
    "ld_alpha": only(fix="ms-swift weights the policy only; see objective_args: ld_alpha"),
    "dataset_shuffle train_dataloader_shuffle": only(True, fix=shared.SHUFFLED),
    "val_dataset_shuffle": unread("held-out rows are taken as a whole"),
    "streaming": shared.READ_ONCE,
    "interleave_prob": only([], fix="data sets are read one after the other; remove it"),
    "system": only(fix="give rows a system column"),
    "cached_dataset cached_val_dataset": only([], fix="give the rows themselves as dataset"),
    "custom_dataset_info": only([], fix="name the columns of dataset itself, in columns"),
    "external_plugins custom_register_path": only(
        [], fix="no code of yours is run; write what it does as rows"
    ),
    "resume_only_model": only(False, fix="give the checkpoint as model, or as adapter"),
    "use_hf": unread("the Hugging Face hub is where names are looked up"),
    "num_labels problem_type": only(fix="fastdpo trains language models only; remove it"),
    "rpo_alpha loss_weights cpo_alpha simpo_gamma desirable_weight undesirable_weight discopop_tau "
    "label_smoothing": beside("the rlhf_type that reads it"),
    "ref_adapters": beside("adapters"),
    "quant_method hqq_axis": beside("quant_bits"),
    "bnb_4bit_compute_dtype bnb_4bit_quant_type bnb_4bit_use_double_quant bnb_4bit_quant_storage": unread(
        "4 bits are NF4 with double quantisation"
    ),
    "ref_model_type ref_model_revision": beside("ref_model"),
    "galore_target_modules galore_rank galore_update_proj_gap galore_scale galore_proj_type "
    "galore_with_embedding galore_optim_per_parameter galore_quantization galore_proj_quant galore_proj_bits "
    "galore_proj_group_size galore_cos_threshold galore_gamma_proj galore_queue_size": beside("use_galore"),
    "lisa_step_interval": beside("lisa_activated_layers"),
    "lora_ga_batch_size lora_ga_iters lora_ga_max_length lora_ga_direction lora_ga_scale "
    "lora_ga_stable_gamma fourier_n_frequency fourier_scaling boft_block_size boft_block_num "
    "boft_n_butterfly_factor boft_dropout vera_rank vera_projection_prng_key vera_dropout vera_d_initial "
    "adapter_act adapter_length adalora_target_r adalora_init_r adalora_tinit adalora_tfinal adalora_deltaT "
    "adalora_beta1 adalora_beta2 adalora_orth_reg_weight llamapro_num_new_blocks llamapro_num_groups "
    "reft_layer_key reft_layers reft_rank reft_intervention_type reft_args": unread("it is of other tuners"),
    "attn_impl experts_impl device_map max_memory padding_side padding_free packing packing_length "
    "packing_num_proc packing_strategy lazy_tokenize sequence_parallel_size dataset_num_proc "
    "load_from_cache_file download_mode shuffle_buffer_size stopping_strategy tuner_backend use_swift_lora "
    "use_logits_to_keep enable_npu_model_patch zero_hpz_partition_size deepspeed_autotp_size use_flash_ckpt "
    "ds3_gather_for_generation use_flash_attn use_ray ray_exp_name device_groups": SPEED,
    "add_version create_checkpoint_symlink check_model acc_strategy ignore_args_error load_args "
    "load_data_args model_name model_author safe_serialization max_shard_size metric eval_metric "
    "eval_use_evalscope eval_dataset eval_dataset_args eval_limit eval_generation_config extra_eval_args "
    "predict_with_generate enable_channel_loss swanlab_token swanlab_project swanlab_workspace "
    "swanlab_exp_name swanlab_notification_method swanlab_webhook_url swanlab_secret swanlab_sender_email "
    "swanlab_receiver_email swanlab_smtp_server swanlab_smtp_port swanlab_email_language swanlab_mode": LOOKS,
    "disable_auto_column_mapping": unread("rows' columns are told by their names, or by columns"),
    "remove_unused_columns": unread("columns that are not read change nothing"),
    "max_completion_length max_new_tokens temperature top_k top_p repetition_penalty num_beams stream "
    "stop_words logprobs top_logprobs structured_outputs_regex response_length mrl_dims sortish_sampler "
    "generation_max_length generation_num_beams generation_config max_prompt_length": _SAYS_NOTHING,
    "center_rewards_coefficient sft_alpha lmbda seq_kd gkd_logits_topk offload_optimizer offload_model "
    "use_vllm sync_ref_model ref_model_sync_steps ref_model_mixup_alpha num_generations reward_funcs "
    "reward_weights log_completions num_iterations reward_model reward_adapters reward_model_type "
    "reward_model_revision reward_template teacher_model teacher_adapters teacher_model_type "
    "teacher_model_revision teacher_deepspeed teacher_model_server offload_teacher_model num_ppo_epochs "
    "whiten_rewards kl_coef cliprange vf_coef cliprange_value gamma lam num_mini_batches "
    "local_rollout_forward_batch_size num_sample_generations missing_eos_penalty": _OF_OTHERS,
}
