"""LLaMA-Factory's keys one by one, of src/llamafactory/hparams and of the versions before."""

from fastdpo.convert.draft import Draft
from fastdpo.convert.rules import beside, only, unread
from fastdpo.convert.tools import shared
from fastdpo.convert.tools.shared import LOOKS, NO_SUCH, SAME, SPEED

_NO_MEDIA = unread("images are read by the model's own processor, and rows with videos or sound are refused")
_OF_GENERATION = unread("it is of generation, not of training")
_OF_EXPORT = unread("it is of `llamafactory-cli export`")
_ONE_DEVICE = unread("there is one device")
_MORE_TOKENS = only(False, "", fix="add them to the model and its tokenizer, and give that as model")

OLDER = {  # a key -> what versions before 2024-06 call it
    "pref_loss": ("dpo_loss",),
    "pref_beta": ("dpo_beta", "orpo_beta", "kto_beta"),
    "pref_ftx": ("dpo_ftx", "kto_ftx"),
    "adapter_name_or_path": ("checkpoint_dir",),
    "ref_model": ("dpo_ref_model",),
    "ref_model_adapters": ("ref_model_checkpoint", "dpo_ref_model_checkpoint"),
    "val_size": ("dev_ratio",),
    "template": ("prompt_template",),
    "tokenized_path": ("cache_path",),
}


def _thinking(draft: Draft, key: str, value) -> None:
    draft.set("chat_template_kwargs", {key: value}, key)


def _balance(draft: Draft, key: str, value) -> None:
    draft.set("router_aux_loss_coef", float(value), key)
    if value:
        draft.check(key, "LLaMA-Factory's SFT adds the experts' balance loss, its DPO not; here it is on")


def _tools(draft: Draft, key: str, value) -> None:
    draft.check(key, "left out, the chat template writes tools; compare in `fastdpo data`")


ROWS = {
    "model_name_or_path": "model",
    "use_dora use_rslora": SAME,
    "moe_aux_loss_coef": _balance,
    "enable_thinking": _thinking,
    "tool_format": _tools,
    # The DPO and KTO trainers switch dropout off in the model with its LoRA: disable_dropout_in_model in
    # train/dpo/trainer.py and train/kto/trainer.py (__init__), after load_model in their workflow.py.
    "lora_dropout": unread("LLaMA-Factory's DPO and KTO switch every dropout off, LoRA's too"),
    "additional_target": only("", fix=NO_SUCH),
    "loraplus_lr_ratio lora_lr_ratio": only(fix=NO_SUCH),
    "pref_bco_weight": only(0, fix="its BCO term has another running mean; see objective: {...: ...}"),
    "ld_alpha": only(fix="LLaMA-Factory weights the policy only; see objective_args: ld_alpha"),
    "train_on_prompt": shared.NOT_ON_PROMPTS,
    "mask_history": unread("only the compared responses are scored"),
    "streaming": shared.READ_ONCE,
    "system_prompt": only("", fix="give rows a system column; remove it"),
    "preserve_thinking": only(False, fix="the chat template says what stays of earlier turns; remove it"),
    "rope_scaling": only(fix="set it in the model's own config"),
    "model_revision": only("main", fix="download that revision and give its folder as model"),
    "adapter_folder": only("", fix="give the whole path of the adapter"),
    "add_tokens add_special_tokens new_special_tokens new_normal_tokens "
    "new_special_tokens_config": _MORE_TOKENS,
    "quantization_type": only("nf4", fix="fastdpo quantises to NF4; set nf4"),
    "double_quantization ignore_pad_token_for_loss": only(True, fix=NO_SUCH),
    "resize_vocab split_special_tokens train_from_scratch pissa_init loftq_init use_galore use_apollo "
    "use_badam use_adam_mini use_muon use_llama_pro fp8 fp8_enable_fsdp_float8_all_gather shift_attn "
    "mixture_of_depths disable_shuffling freeze_language_model train_mm_proj_only": only(False, fix=NO_SUCH),
    "model_class peft_config kernel_config dist_config train_dataset sample_backend micro_batch_size": only(
        fix="it is a key of LLaMA-Factory's v1, which is not read; write the config with v0's keys"
    ),
    "early_stopping_steps": only(fix="fastdpo trains to the end; see load_best"),
    "neft_alpha": only(0, fix=NO_SUCH),
    "lora_bf16_mode": only(False, fix="a LoRA's weights are kept in fp32; remove it"),
    "padding_side": unread("rows are packed without padding"),
    "reserved_label_len": unread("max_length and truncation say how rows are cut"),
    "kto_chosen_weight kto_rejected_weight": beside("stage: kto"),
    "simpo_gamma dpo_label_smoothing": beside("pref_loss"),
    "quantization_method quantization_device_map": beside("quantization_bit"),
    "init_special_tokens": beside("new_special_tokens_config"),
    "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules num_layer_trainable "
    "name_module_trainable num_hidden_layers": beside("finetuning_type: freeze"),
    "module_dropout oft_rank oft_block_size oft_target": beside("finetuning_type: oft"),
    "loraplus_lr_embedding": beside("loraplus_lr_ratio"),
    "pissa_iter pissa_convert": beside("pissa_init"),
    "galore_target galore_rank galore_update_interval galore_scale galore_proj_type galore_layerwise": beside(
        "use_galore"
    ),
    "apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type "
    "apollo_scale_type apollo_layerwise apollo_scale_front": beside("use_apollo"),
    "badam_mode badam_start_block badam_switch_mode badam_switch_interval badam_switch_block_every "
    "badam_update_ratio badam_mask_mode badam_verbose": beside("use_badam"),
    "ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards ppo_logger reward_model "
    "reward_model_adapters reward_model_quantization_bit reward_model_type reward_model_checkpoint": beside(
        "stage: ppo"
    ),
    "use_dft_loss use_asft_loss asft_alpha use_eaft_loss eaft_alpha predict_with_generate": beside(
        "stage: sft"
    ),
    "fp8_backend": beside("fp8"),
    "buffer_size": beside("streaming"),
    "freeze_vision_tower": "freeze_vision",
    "media_dir": "media_dir",
    "image_do_pan_and_scan crop_to_patches video_max_pixels "
    "video_min_pixels video_fps video_maxlen use_audio_in_video audio_sampling_rate "
    "video_resolution image_dir visual_inputs freeze_multi_modal_projector": _NO_MEDIA,
    "do_sample temperature top_p top_k num_beams max_new_tokens repetition_penalty length_penalty "
    "skip_special_tokens generation_max_length generation_num_beams generation_config eval_num_beams "
    "infer_backend infer_dtype use_kv_cache use_cache vllm_maxlen vllm_gpu_util vllm_enforce_eager "
    "vllm_max_lora_rank vllm_config vllm_dtype sglang_maxlen sglang_mem_fraction sglang_tp_size "
    "sglang_config sglang_lora_backend": _OF_GENERATION,
    "export_dir export_size export_device export_quantization_bit export_quantization_dataset "
    "export_quantization_nsamples export_quantization_maxlen export_legacy_format "
    "export_hub_model_id": _OF_EXPORT,
    "sequence_parallel_size sequence_parallel_mode ray_num_workers ray_init_kwargs ray_storage_path "
    "ray_storage_filesystem resources_per_worker placement_strategy master_addr master_port "
    "hyper_parallel_args hyper_parallel_cp_size tensor_model_parallel_size pipeline_model_parallel_size "
    "expert_model_parallel_size context_parallel_size virtual_pipeline_model_parallel_size "
    "sequence_parallel account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split "
    "use_distributed_optimizer overlap_param_gather overlap_grad_reduce": _ONE_DEVICE,
    "use_mca use_megatron_bridge use_hyper_parallel use_kt": only(
        False, fix="that backend trains in its own way; set it to false"
    ),
    "recompute_granularity recompute_method recompute_num_layers bias_activation_fusion apply_rope_fusion "
    "masked_softmax_fusion cross_entropy_loss_fusion moe_grouped_gemm moe_token_dispatcher_type "
    "calculate_per_token_loss use_packed_sequences mixed_precision megatron_pretrained_checkpoint "
    "export_hf_on_finish extra_config": beside("Megatron Bridge"),
    "kt_cpu_activation kt_weight_path kt_non_expert_weight_path kt_expert_checkpoint_path "
    "kt_use_lora_experts kt_lora_expert_num kt_lora_expert_intermediate_size kt_optimize_rule kt_maxlen "
    "kt_use_cuda_graph kt_mode kt_force_think cpu_infer chunk_size mode": beside("use_kt"),
    "packing neat_packing sft_packing efficient_packing flash_attn enable_liger_kernel use_unsloth "
    "use_unsloth_gc use_v1_kernels upcast_layernorm upcast_lmhead_output layernorm_dtype "
    "disable_gradient_checkpointing preprocessing_num_workers low_cpu_mem_usage preprocessing_batch_size "
    "overwrite_cache use_reentrant_gc compute_accuracy include_effective_tokens_per_second cache_dir "
    "use_fast_tokenizer offload_folder data_shared_file_system eval_on_each_dataset "
    "disable_version_checking": SPEED,
    "plot_loss use_swanlab swanlab_project swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key "
    "swanlab_logdir swanlab_lark_webhook_url swanlab_lark_secret swanlab_name swanlab_experiment_name "
    "swanlab_description ray_run_name print_param_status hf_hub_token ms_hub_token om_hub_token "
    "hf_auth_token use_auth_token enable_torch_profiler profiler_output_dir profiler_wait_steps "
    "profiler_warmup_steps profiler_active_steps profiler_repeat profiler_record_shapes "
    "profiler_profile_memory profiler_with_stack profile_modules": LOOKS,
}
