"""Axolotl's configs: keys, data sets with their types, templates, tokens."""

import pytest

from fastdpo.convert.tools.axolotl import AXOLOTL
from fastdpo.data.formats.layouts import layout_of
from fastdpo.data.rows import parse_row
from fastdpo.errors import ConfigError
from tests.convert.translated import translate

SMALL = {"base_model": "m", "rl": "dpo", "adapter": "lora", "lora_target_linear": True, "learning_rate": 1e-5}


def both(*sets, **keys):
    """(ours, notes) of a small config with these data sets and keys."""
    return translate(SMALL | {"datasets": list(sets) or [{"path": "d", "type": "chatml.intel"}]} | keys)


def one(kind, **entry):
    return {"path": "d", "type": kind, **entry}


def refused(*sets, **keys) -> str:
    with pytest.raises(ConfigError) as caught:
        both(*sets, **keys)
    return str(caught.value)


def test_every_key_of_its_schema_is_known():
    assert AXOLOTL.unknown(dict.fromkeys(_SCHEMA)) == []


# ---- data sets


def test_several_sets_are_one_list():
    ours, _ = both(one("chatml.intel", path="a", split="x"), one("chatml.intel", path="b", name=["c", "d"]))
    assert (ours["data"], ours["data_format"]) == (["a#x", "b:c", "b:d"], "intel")
    assert (
        "datasets.type: ['chatml.intel', 'chatml.icr']: all data sets must be read and written alike"
        in refused(one("chatml.intel"), one("chatml.icr", path="b"))
    )
    assert "must be read and written alike" in refused(one("chatml.icr"), one("llama3.icr", path="b"))
    assert "alike" in refused(one("chatml.icr"), test_datasets=[one("llama3.icr", path="t")])
    for wrong in ({"type": "chatml.icr"}, "d"):
        assert "datasets: " in (text := refused(wrong)) and "a list of data sets is needed" in text
    assert "test_datasets.type: chatml.icr" in refused(test_datasets=[one("chatml.icr", path="t")])


def test_files_of_a_set():
    files = {"data_files": ["a.jsonl", "b.jsonl"]}
    assert both(one("chatml.intel", path="json", **files))[0]["data"] == ["a.jsonl", "b.jsonl"]
    assert both(one("chatml.intel", path="./folder", **files))[0]["data"] == ["a.jsonl", "b.jsonl"]
    assert both(one("chatml.intel", path="x/rows.jsonl", **files))[0]["data"] == "x/rows.jsonl"
    assert "datasets.data_files: ['a.jsonl', 'b.jsonl']: download them" in refused(
        one("chatml.intel", path="org/data", **files)
    )


@pytest.mark.parametrize(
    "rl, kind, row, prompt, answer",
    [
        ("dpo", "chatml", {"input": "q", "chosen": "a", "rejected": "b"}, "q", "a"),
        (
            "dpo",
            "llama3.default",
            {"instruction": "q", "chosen_response": "a", "rejected_response": "b"},
            "q",
            "a",
        ),
        ("dpo", "chatml.prompt_pairs", {"prompt": "q", "chosen": "a", "rejected": "b"}, "q", "a"),
        ("kto", "llama3.ultra", {"prompt": "q", "completion": "a", "label": True}, "q", "a"),
        ("kto", "chatml.intel", {"question": "q", "completion": "a", "label": True}, "q", "a"),
        ("kto", "chatml.argilla", {"instruction": "q", "completion": "a", "label": True}, "q", "a"),
    ],
)
def test_text_of_a_type_that_writes_turns_is_a_conversation(rl, kind, row, prompt, answer):
    ours, _ = both(one(kind), rl=rl)
    assert ours["chat_template"] == kind.split(".")[0]
    parsed = parse_row(row, 0, layout_of(ours["data_format"]))
    assert parsed.prompt == [{"role": "user", "content": prompt}]
    assert parsed.responses[0] == [{"role": "assistant", "content": answer}]


def test_kto_s_other_types():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    ours, _ = both(one("chatml.argilla_chat"), rl="kto")
    parsed = parse_row({"completion": turns, "label": False}, 0, layout_of(ours["data_format"]))
    assert (parsed.prompt, parsed.responses, parsed.label) == (turns[:1], (turns[1:],), False)
    kind = {"field_prompt": "q", "field_label": "good", "prompt_format": "[{q}]"}
    ours, _ = both(one(kind | {"completion_format": "{completion}!"}), rl="kto")
    parsed = parse_row({"q": "x", "completion": "y", "good": True}, 0, layout_of(ours["data_format"]))
    assert (parsed.prompt, parsed.responses, parsed.label) == ("[x]", ("y!",), True)
    assert any(
        note.startswith("datasets.type passthrough (Axolotl's default)") for note in both({"path": "d"})[1]
    )
    assert both(one("passthrough"), rl="kto")[0]["data_format"] == "trl_unpaired"
    assert "datasets.type: chat_template.default: known are" in refused(
        one("chat_template.default"), rl="kto"
    )


def test_names_of_messages():
    mapped = {"message_property_mappings": {"role": "from", "content": "value"}, "field_chosen": "good"}
    ours, _ = both(one("chat_template.argilla_chat", **mapped))
    assert ours["data_format"] == {"format": "trl", "chosen": "good", "rejected": "rejected"}
    assert both(one("chat_template.argilla"), rl="orpo")[0]["data_format"] == "ultra"
    text = refused(one("chat_template", message_field_content="text"))
    assert "datasets.message_property_mappings: {'content': 'text'}: a message needs role and content" in text


def test_keys_of_a_set():
    entry = one("chatml.intel", roles_to_train=["assistant"], ds_type="json", shards=None)
    _, notes = both(entry, entry | {"path": "e"})
    text = "datasets.roles_to_train [['assistant'], ['assistant']]: left out, Axolotl does not read it"
    assert sum(note.startswith(text) for note in notes) == 1 and not any("ds_type" in note for note in notes)
    for entry, text in (
        ({"shards": 2, "shards_idx": 0}, "datasets.shards: 2: write the rows"),
        ({"revision": "abc"}, "datasets.revision: abc: download"),
        ({"surprise": 1}, "datasets.surprise: 1: it is not read"),
    ):
        assert text in refused(one("chatml.intel", **entry))


# ---- templates and tokens


@pytest.mark.parametrize(
    "entry, keys, template",
    [
        (one("chatml.intel"), {"chat_template": "llama3"}, "chatml"),  # what its type writes
        (one("zephyr.nectar"), {}, "zephyr"),
        (one("chat_template"), {"chat_template": "phi_35"}, "phi3"),
        (one("chat_template", chat_template="chatml"), {"chat_template": "llama3"}, "chatml"),
        (one("chat_template"), {"chat_template": "jinja", "chat_template_jinja": "{{ 1 }}\n"}, "{{ 1 }}\n"),
        (one("chat_template", chat_template_jinja="a/b.jinja"), {}, "a/b.jinja"),
        (one("chat_template"), {"chat_template": "qwen_25"}, None),
        (one("chat_template"), {"chat_template": "tokenizer_default"}, None),
        (one("chat_template"), {"chat_template": "tokenizer_default_fallback_chatml"}, "default:chatml"),
        (one("chat_template"), {}, None),
    ],
)
def test_templates(entry, keys, template):
    ours, notes = both(entry, **keys)
    assert ours.get("chat_template") == template
    assert all("\n" not in note for note in notes)
    if entry["type"] == "chatml.intel":
        assert "chat_template llama3: left out, the data set says how its turns are written" in notes
    assert any("check: chat_template" in note for note in notes) == (
        template is None and keys.get("chat_template", "tokenizer_default") != "tokenizer_default"
    )


def test_a_template_that_is_not_had():
    assert "chat_template: metharme: write" in refused(one("chat_template"), chat_template="metharme")
    assert "chat_template: jinja: write" in refused(one("chat_template"), chat_template="jinja")


def test_special_tokens():
    tokens = {"pad_token": "<pad>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    _, notes = both(special_tokens=tokens, tokens=["<|im_start|>"])
    assert "special_tokens.pad_token <pad>: left out, rows are packed without padding" in notes
    assert "special_tokens.eos_token <|im_end|>: left out, chatml's end of turn is what is scored" in notes
    assert any(note.startswith("check: special_tokens.unk_token <unk>: ") for note in notes)
    assert any(note.startswith("check: tokens ['<|im_start|>']: ") for note in notes)
    assert not any("BOS and EOS of the tokenizer" in note for note in notes)
    _, notes = both(special_tokens={"eos_token": "</s>"})
    assert any(note.startswith("check: special_tokens.eos_token </s>: ") for note in notes)
    assert any("BOS and EOS of the tokenizer" in note for note in notes)
    _, notes = both(one("passthrough"))
    assert not any("BOS and EOS" in note for note in notes)


# ---- training


@pytest.mark.parametrize(
    "keys, beta",
    [
        ({}, 0.1),
        ({"dpo_beta": 0.3}, 0.3),
        ({"rl_beta": 0.2, "dpo_beta": 0.3}, 0.2),
        ({"rl_beta": 0.2, "trl": {"beta": 0.4}}, 0.4),
        ({"rl": "orpo", "orpo_alpha": 0.5}, 0.5),
        ({"rl": "orpo", "orpo_alpha": 0.5, "rl_beta": 0.2}, 0.2),
    ],
)
def test_which_beta_is_read(keys, beta):
    ours, notes = both(**keys)
    assert ours["beta"] == beta
    assert sum("first" in note for note in notes) == max(0, len(keys.keys() - {"rl"}) - 1)


def test_what_its_preference_trainers_do_not_read():
    keys = {"lora_dropout": 0.1, "neftune_noise_alpha": 5, "group_by_length": True, "strict": False}
    keys |= {"early_stopping_patience": 3, "chat_template_kwargs": {"a": 1}, "shuffle_merged_datasets": False}
    plain = both()[0]
    ours, notes = both(**keys)
    assert ours == plain
    assert all(any(note.startswith(f"{key} ") and "left out" in note for note in notes) for key in keys)


def test_parts_of_a_model_and_a_lora():
    ours, notes = both(base_model_config="m", tokenizer_config="m", adapter="qlora", load_in_4bit=True)
    assert (ours["model"], ours["load_in_4bit"]) == ("m", True)
    assert "tokenizer_config m: left out, it is the model's own" in notes
    assert "tokenizer_config: n: put that tokenizer" in refused(tokenizer_config="n")
    both(lora_target_modules=["q_proj"])
    assert "lora_target_modules: ['lm_head']: all linear" in refused(lora_target_modules=["lm_head"])
    ours, notes = both(lora_model_dir="x", lora_r=4)
    assert ours["adapter"] == "x" and "lora_rank" not in ours
    assert "lora_r 4: left out, the adapter in lora_model_dir has its own" in notes
    assert "lora_r 4: left out, adapter is not set" in both(adapter=None, lora_r=4)[1]
    _, notes = both(lora_target_linear=None)
    assert any(note.startswith("check: lora_target_modules is not given") for note in notes)


def test_precision():
    assert "dtype" not in both(bf16="auto")[0]
    assert both(bf16="full")[0]["dtype"] == "bf16" == both(bfloat16=True)[0]["dtype"]
    assert both(bf16=False)[0]["dtype"] == "fp32" == both(float32=True)[0]["dtype"]
    assert both(bf16=True, fp16=True)[0]["dtype"] == "bf16"
    for theirs in ({"bf16": False, "fp16": True}, {"float16": True}):
        ours, notes = both(**theirs)
        assert "dtype" not in ours and any("16 true: left out, fastdpo computes in" in note for note in notes)
    assert "fp16 true: left out, bf16 comes first" in both(bf16=True, fp16=True)[1]
    assert any("they are fp32 here" in note for note in both(bf16=True, adapter=None)[1])


def test_plugins():
    liger, cce = "axolotl.integrations.liger.LigerPlugin", "axolotl.integrations.cut_cross_entropy.X"
    assert any(note.startswith("plugins [") for note in both(plugins=[liger, cce])[1])
    kd = "axolotl.integrations.kd.KDPlugin"
    assert f"plugins: ['{kd}', 'mine.Plugin']: what they do" in refused(plugins=[liger, kd, "mine.Plugin"])


def test_what_is_reported_and_what_is_not_shown():
    assert both(wandb_project="p")[0]["report_to"] == ["wandb"]
    assert "report_to" not in both(wandb_project="p", use_wandb=False)[0]
    assert both(use_tensorboard=True, use_trackio=True)[0]["report_to"] == ["tensorboard", "trackio"]
    _, notes = both(comet_api_key="hidden", hub_token="hidden")
    assert not any("hidden" in note for note in notes) and any("comet_api_key: left out" in n for n in notes)


def test_rows_that_are_too_long():
    assert both()[0]["truncation"] == "drop"
    assert both(skip_prepare_dataset=True)[0]["truncation"] == "keep_start"  # by TRL then


def test_a_loss_beside_it_from_before_there_were_several():
    assert both(rpo_alpha=0.5)[0]["objective"] == {"sigmoid": 1.0, "sft": 0.5}


_SCHEMA = (  # every field of AxolotlInputConfig, 2026-07
    "accelerator_config activation_offloading adam_beta1 adam_beta2 adam_beta3 adam_epsilon adam_epsilon2 "
    "adapter added_tokens_overrides attn_implementation auto_find_batch_size auto_resume_from_checkpoints "
    "axolotl_config_path base_model base_model_config batch_flattening batch_size bench_dataset "
    "bench_split bf16 bfloat16 bnb_config_kwargs capabilities center_rewards_coefficient chat_template "
    "chat_template_jinja chat_template_kwargs chunked_cross_entropy chunked_cross_entropy_num_chunks "
    "cls_model_config comet_api_key comet_experiment_config comet_experiment_key comet_mode comet_online "
    "comet_project_name comet_workspace context_parallel_size cosine_constant_lr_ratio "
    "cosine_min_lr_ratio cpo_alpha curriculum_sampling dataloader_drop_last dataloader_num_workers "
    "dataloader_pin_memory dataloader_prefetch_factor dataset_exact_deduplication dataset_keep_in_memory "
    "dataset_num_proc dataset_prepared_path dataset_processes dataset_shard_idx dataset_shard_num "
    "datasets ddp ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_timeout "
    "deepcompile deepspeed default_system_message device device_map dion_lr dion_momentum "
    "dion_rank_fraction dion_rank_multiple_of do_bench_eval do_causal_lm_eval dp_replicate_size "
    "dp_shard_size dpo_beta dpo_generate_during_eval dpo_label_smoothing dpo_loss_type dpo_loss_weights "
    "dpo_norm_loss dpo_padding_free dpo_use_liger_kernel dpo_use_logits_to_keep dpo_use_weighting "
    "dynamic_checkpoint eaft_alpha eaft_k eager_attention early_stopping_patience ebft embedding_lr "
    "embedding_lr_scale embeddings_skip_upcast env_capabilities eot_tokens eval_batch_size "
    "eval_causal_lm_metrics eval_max_new_tokens eval_sample_packing eval_sequence_len eval_steps "
    "eval_strategy eval_table_size evals_per_epoch evaluation_strategy excess_length_strategy "
    "experimental_skip_move_to_device experts_implementation fix_untrained_tokens flash_attention "
    "flash_attn_cross_entropy flash_attn_d512 flash_attn_fuse_mlp flash_attn_rms_norm flash_optimum "
    "flex_attention flex_attn_compile_kwargs float16 float32 fp16 fp32_norm_classes fp32_norms fp8 "
    "fp8_enable_fsdp_float8_all_gather freeze_mm_modules fsdp fsdp_config fsdp_final_state_dict_type "
    "fsdp_version fused_attn_kernel gc_collect_steps gc_steps gemma4_hybrid_attn_impl generate_samples "
    "generation_do_sample generation_max_new_tokens generation_prompt_ratio generation_temperature "
    "generation_top_k generation_top_p gptq gpu_memory_limit gradient_accumulation_steps "
    "gradient_checkpointing gradient_checkpointing_kwargs gradio_max_new_tokens gradio_server_name "
    "gradio_server_port gradio_share gradio_temperature gradio_title greater_is_better group_by_length "
    "heads_k_stride hf_mlflow_log_artifacts hf_use_auth_token hub_model_id hub_revision hub_strategy "
    "image_resize_algorithm image_size include_tkps include_tokens_per_second is_falcon_derived_model "
    "is_llama_derived_model is_mistral_derived_model is_preprocess is_qwen_derived_model "
    "jagged_restart_anneal_steps jagged_restart_steps jagged_restart_warmup_steps kto_desirable_weight "
    "kto_undesirable_weight large_head_attention layer_offloading learning_rate lisa_layers_attribute "
    "lisa_n_layers lisa_step_interval llama4_linearized_experts load_best_model_at_end load_in_4bit "
    "load_in_8bit local_rank logging_steps lora_alpha lora_alpha_pattern lora_dropout "
    "lora_embedding_kernel lora_fan_in_fan_out lora_mlp_kernel lora_model_dir lora_modules_to_save "
    "lora_o_kernel lora_on_cpu lora_qkv_kernel lora_r lora_rank_pattern lora_target_linear "
    "lora_target_modules lora_target_parameters loraplus_lr_embedding loraplus_lr_ratio "
    "loss_watchdog_patience loss_watchdog_threshold low_cpu_mem_usage lr_div_factor lr_groups "
    "lr_quadratic_warmup lr_scheduler lr_scheduler_kwargs max_grad_norm max_memory "
    "max_packed_sequence_len max_prompt_len max_steps mean_resizing_embeddings merge_lora merge_method "
    "metric_for_best_model micro_batch_size min_sample_len mlflow_experiment_name mlflow_run_name "
    "mlflow_tracking_uri model_quantization_config model_quantization_config_kwargs "
    "multipack_real_batches neftune_noise_alpha noisy_embedding_alpha num_dataset_shards_to_save "
    "num_epochs num_generation_samples num_labels optim_args optim_target_modules optimizer orpo_alpha "
    "otel_metrics_host otel_metrics_port output_dir overrides_of_model_config overrides_of_model_kwargs "
    "pad_to_multiple_of pad_to_sequence_len peft peft_autocast_adapter_dtype peft_ensure_weight_tying "
    "peft_init_lora_weights peft_layer_replication peft_layers_pattern peft_layers_to_transform "
    "peft_trainable_token_indices peft_use_dora peft_use_rslora plugins pose_max_context_len "
    "pose_num_chunks pose_split_on_token_ids precompute_ref_log_probs preprocess_iterable "
    "pretrain_multipack_attn pretrain_multipack_buffer_size pretraining_dataset "
    "pretraining_sample_concatenation process_reward_model processor_kwargs processor_type profiler_steps "
    "profiler_steps_start push_dataset_to_hub qat qgalore_cos_threshold qgalore_gamma_proj "
    "qgalore_proj_bits qgalore_proj_group_size qgalore_proj_quant qgalore_proj_type qgalore_queue_size "
    "qgalore_rank qgalore_scale qgalore_update_proj_gap qlora_sharded_model_loading quantization "
    "quantize_moe_experts ray_num_workers ray_run_name reinit_weights relora relora_cpu_offload "
    "relora_prune_method relora_prune_ratio remove_unused_columns resize_token_embeddings_to_32x "
    "resources_per_worker resume_from_checkpoint revision_of_model reward_model ring_attn_func rl rl_beta "
    "role_boundaries rope_scaling rpo_alpha s2_attention sage_attention sample_packing "
    "sample_packing_bin_size sample_packing_eff_est sample_packing_group_size "
    "sample_packing_mp_start_method sample_packing_sequentially save_first_step save_only_model "
    "save_safetensors save_steps save_strategy save_total_limit saves_per_epoch scaling_softmax "
    "scaling_softmax_bias scaling_softmax_factor sdp_attention sdpa_varlen seed selective_checkpointing "
    "sequence_len sequence_parallel_degree shrink_embeddings shuffle_before_merging_datasets "
    "shuffle_merged_datasets simpo_gamma skip_prepare_dataset special_tokens streaming "
    "streaming_multipack_buffer_size strict tensor_parallel_size test_datasets tf32 tiled_mlp "
    "tiled_mlp_num_shards tiled_mlp_use_original_mlp tokenizer_config tokenizer_legacy "
    "tokenizer_save_jinja_files tokenizer_type tokenizer_use_fast tokenizer_use_mistral_common tokens "
    "torch_compile torch_compile_backend torch_compile_mode torch_compile_options torch_empty_cache_steps "
    "torchdistx_path total_num_tokens total_supervised_tokens trackio_project_name trackio_run_name "
    "trackio_space_id train_on_inputs trainer_cls trl trust_remote_code type_of_model unfrozen_parameters "
    "use_comet use_eaft use_kernels use_mlflow use_onebitllms use_otel_metrics use_pose use_ray "
    "use_tensorboard use_trackio use_wandb val_set_size vllm wandb_entity wandb_log_model wandb_mode "
    "wandb_name wandb_project wandb_run_id wandb_watch warmup_ratio warmup_steps weight_decay world_size "
    "xformers_attention"
).split()
