"""Axolotl's keys that are read one by one, all of its schema's that axolotl.py's parts do not take."""

from typing import Any

from fastdpo.convert.rules import Rule, beside, only, unread
from fastdpo.convert.tools import shared
from fastdpo.convert.tools.shared import LOOKS, NO_SUCH, QUANTISED, SAME, SPEED


def _differs(text: str) -> Rule:
    return lambda draft, key, value: draft.check(key, text)


_ELSEWHERE = unread("Axolotl reads it in other training, not of preferences")
_NO_KEY = _differs("Axolotl has no such key and trains without it, as here")
_NOT_HAD = only(False, 0, [], {}, fix=NO_SUCH)
_GATED = unread("log in with `hf auth login`")
_RANDOM = unread("rows are drawn at random by seed, as Axolotl's preference trainers draw them")

ROWS: dict[str, Any] = shared.TRANSFORMERS | {
    "sequence_len": "max_length",
    "lr_scheduler": "lr_scheduler_type",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
    "tiled_mlp": SAME,
    "tiled_mlp_num_shards tiled_mlp_use_original_mlp": unread("a tile has a fixed number of tokens"),
    "strict": unread("it is about Axolotl's command line"),  # ours of this name is about rows
    "model_type tokenizer_type": unread("the model's own files tell it"),
    # Axolotl's trainers are TRL's (core/builders/rl.py passes them no disable_dropout, which is true then):
    # dpo_trainer.py and kto_trainer.py 911, cpo_trainer.py 330, orpo_trainer.py 340 of TRL 1.8
    "lora_dropout": unread("Axolotl's preference trainers switch it off, too"),
    "lora_fan_in_fan_out": unread("it is told by the model's layers"),
    "peft_init_lora_weights": only(True, fix=NO_SUCH),
    "lora_modules_to_save lora_target_parameters lora_rank_pattern lora_alpha_pattern unfrozen_parameters "
    "peft peft_layers_to_transform peft_layers_pattern peft_layer_replication peft_trainable_token_indices "
    "loraplus_lr_ratio relora freeze_mm_modules reinit_weights fix_untrained_tokens": _NOT_HAD,
    "loraplus_lr_embedding": beside("loraplus_lr_ratio"),
    "relora_prune_ratio relora_prune_method relora_cpu_offload jagged_restart_steps "
    "jagged_restart_warmup_steps jagged_restart_anneal_steps": beside("relora"),
    "load_in_8bit": only(False, fix=QUANTISED),
    "gptq qat quantization quantize_moe_experts use_onebitllms model_quantization_config fp8 "
    "nonexpert_quantization s2_attention sage_attention scaling_softmax": _NOT_HAD,
    "model_quantization_config_kwargs": beside("model_quantization_config"),
    "scaling_softmax_factor scaling_softmax_bias": beside("scaling_softmax"),
    "fp8_enable_fsdp_float8_all_gather": beside("fp8"),
    "bnb_config_kwargs": only({}, fix="the 4 bits are bitsandbytes' NF4; remove it"),
    "overrides_of_model_config overrides_of_model_kwargs model_config rope_scaling": only(
        {}, fix="write it into the model's config.json"
    ),
    "cls_model_config type_of_model": beside("a model class of Axolotl's"),
    "revision_of_model": only("main", fix="download the revision and give its folder as base_model"),
    "added_tokens_overrides": only({}, fix="save the tokenizer with these tokens in the model's folder"),
    "tokenizer_use_mistral_common": only(False, fix="a tokenizer of transformers is needed; remove it"),
    "tokenizer_legacy tokenizer_use_fast": _differs("the tokenizer is loaded as it says itself"),
    "rl_adapter_ref_model": only(False, fix="the reference is what training starts from; remove it"),
    "dpo_norm_loss": only(False, fix=NO_SUCH),
    "ref_model": _differs("Axolotl has no such key: its reference is what training starts from, as here"),
    "dpo_max_length dpo_max_prompt_len dpo_max_prompt_length max_prompt_length flash_attn_2 "
    "eval_table_max_new_tokens": _NO_KEY,
    "lr_quadratic_warmup cosine_min_lr_ratio cosine_constant_lr_ratio lr_div_factor lr_groups embedding_lr "
    "embedding_lr_scale": _NOT_HAD,
    "adam_epsilon2 adam_beta3": only(fix=NO_SUCH),
    "dion_lr dion_momentum dion_rank_fraction dion_rank_multiple_of qgalore_rank qgalore_update_proj_gap "
    "qgalore_scale qgalore_proj_type qgalore_proj_quant qgalore_proj_bits qgalore_proj_group_size "
    "qgalore_cos_threshold qgalore_gamma_proj qgalore_queue_size torchdistx_path": beside("its optimizer"),
    "dataset_exact_deduplication": only(False, fix="remove the duplicates from the data first"),
    "dataset_shard_num dataset_shard_idx": only(fix="write the rows that are meant into a file"),
    "streaming": shared.READ_ONCE,
    "shuffle_merged_datasets shuffle_before_merging_datasets curriculum_sampling": _RANDOM,
    "reward_model process_reward_model": only(False, fix="fastdpo does preference training; remove it"),
    "pretraining_dataset": only([], fix="fastdpo does preference training; remove it"),
    "trainer_cls": only(fix="a trainer of one's own is not run here; remove it"),
    "precompute_ref_log_probs": shared.ONCE,
    "simpo_gamma cpo_alpha orpo_alpha dpo_label_smoothing rpo_alpha trl": beside("rl"),
    "kto_desirable_weight kto_undesirable_weight": beside("rl: kto"),
    "rl_beta dpo_beta dpo_loss_type dpo_loss_weights dpo_use_weighting": beside("the rest of the config"),
    "vllm ebft": beside("rl: grpo or ebft"),
    "center_rewards_coefficient num_labels": beside("a reward model"),
    "resize_token_embeddings_to_32x mean_resizing_embeddings shrink_embeddings embeddings_skip_upcast": (
        unread("nothing is added to the tokenizer")
    ),
    "hf_use_auth_token": _GATED,
    # what core/builders/causal.py and utils/data/sft.py alone read
    "neftune_noise_alpha noisy_embedding_alpha loss_watchdog_threshold loss_watchdog_patience "
    "group_by_length dataloader_drop_last early_stopping_patience train_on_inputs min_sample_len "
    "eval_sequence_len max_prompt_len eot_tokens default_system_message chat_template_kwargs "
    "generate_samples num_generation_samples generation_max_new_tokens generation_temperature "
    "generation_top_p generation_top_k generation_prompt_ratio generation_do_sample eval_table_size "
    "eval_max_new_tokens do_causal_lm_eval eval_causal_lm_metrics do_bench_eval bench_dataset bench_split "
    "pretrain_multipack_buffer_size pretrain_multipack_attn pretraining_sample_concatenation "
    "streaming_multipack_buffer_size use_pose pose_split_on_token_ids pose_max_context_len pose_num_chunks "
    "lisa_n_layers lisa_step_interval lisa_layers_attribute use_eaft eaft_alpha eaft_k image_size "
    "image_resize_algorithm role_boundaries processor_type processor_kwargs max_packed_sequence_len "
    "flash_optimum dpo_generate_during_eval roles_to_train train_on_eos": _ELSEWHERE,
    "sample_packing eval_sample_packing pad_to_sequence_len pad_to_multiple_of "
    "sample_packing_group_size sample_packing_bin_size sample_packing_sequentially batch_flattening "
    "sample_packing_mp_start_method sample_packing_eff_est multipack_real_batches flash_attention "
    "flex_attention sdp_attention xformers_attention eager_attention "
    "attn_implementation flex_attn_compile_kwargs flash_attn_cross_entropy flash_attn_fuse_mlp "
    "flash_attn_rms_norm flash_attn_d512 gemma4_hybrid_attn_impl large_head_attention sdpa_varlen "
    "fused_attn_kernel experts_implementation "
    "dataset_processes dataset_num_proc dataset_keep_in_memory dataset_prepared_path "
    "num_dataset_shards_to_save is_preprocess preprocess_iterable dpo_use_liger_kernel dpo_padding_free "
    "dpo_use_logits_to_keep liger_rope liger_rms_norm liger_rms_norm_gated liger_layer_norm liger_swiglu "
    "liger_glu_activation liger_cross_entropy liger_fused_linear_cross_entropy liger_use_token_scaling "
    "cut_cross_entropy unsloth_cross_entropy_loss unsloth_lora_mlp unsloth_lora_qkv unsloth_lora_o "
    "chunked_cross_entropy chunked_cross_entropy_num_chunks lora_mlp_kernel lora_qkv_kernel lora_o_kernel "
    "lora_embedding_kernel lora_on_cpu peft_autocast_adapter_dtype peft_ensure_weight_tying "
    "qlora_sharded_model_loading use_kernels expert_backend moe_grouped_backend moe_dequant_chunk_size "
    "moe_bnb_fast use_scattermoe use_sonicmoe llama4_linearized_experts eval_batch_size local_rank "
    "strict_config device device_map max_memory gpu_memory_limit low_cpu_mem_usage world_size ddp "
    "ddp_bucket_cap_mb ddp_broadcast_buffers deepcompile fsdp_version fsdp_final_state_dict_type fp32_norms "
    "fp32_norm_classes dp_shard_size dp_replicate_size tensor_parallel_size context_parallel_size "
    "sequence_parallel_degree heads_k_stride ring_attn_func expert_parallel_size expert_parallel_backend "
    "selective_checkpointing layer_offloading torch_compile_options gc_steps gc_collect_steps "
    "experimental_skip_move_to_device dynamic_checkpoint use_ray ray_run_name ray_num_workers "
    "resources_per_worker capabilities env_capabilities": SPEED,
    "wandb_entity wandb_watch wandb_name wandb_log_model wandb_run_id wandb_mode use_mlflow "
    "mlflow_tracking_uri mlflow_experiment_name mlflow_run_name hf_mlflow_log_artifacts use_comet "
    "comet_api_key comet_workspace comet_project_name comet_experiment_key comet_mode comet_online "
    "comet_experiment_config trackio_project_name trackio_run_name trackio_space_id use_otel_metrics "
    "otel_metrics_host otel_metrics_port use_swanlab swanlab_project swanlab_experiment_name "
    "swanlab_description swanlab_mode swanlab_workspace swanlab_api_key swanlab_log_model swanlab_web_host "
    "swanlab_api_host swanlab_lark_webhook_url swanlab_lark_secret swanlab_log_completions "
    "swanlab_completion_log_interval swanlab_completion_max_buffer lm_eval_tasks lm_eval_batch_size "
    "lm_eval_post_train lm_eval_model gradio_title gradio_share gradio_server_name gradio_server_port "
    "gradio_max_new_tokens gradio_temperature is_falcon_derived_model is_llama_derived_model "
    "is_mistral_derived_model is_qwen_derived_model tokenizer_save_jinja_files save_first_step "
    "auto_resume_from_checkpoints push_dataset_to_hub merge_lora merge_method profiler_steps "
    "profiler_steps_start include_tokens_per_second include_tkps total_num_tokens total_supervised_tokens "
    "axolotl_config_path debug": LOOKS,
}
