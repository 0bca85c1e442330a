"""LLaMA-Factory's rules: which of its keys are known, what several say together, and where its data lies."""

import json

import pytest

from fastdpo.convert.tools.llama_factory import LLAMA_FACTORY
from fastdpo.data.sources import load_rows
from fastdpo.errors import DataError
from tests.tiny import write_jsonl

DPO = {"model_name_or_path": "m", "stage": "dpo", "finetuning_type": "lora", "dataset": "d"}
# every key of src/llamafactory/hparams at ff6d4d12, but for transformers' own, those of evaluation, and
# max_length, which is of generation there and our own key here
KEYS = """
model_name_or_path adapter_name_or_path adapter_folder cache_dir use_fast_tokenizer resize_vocab
split_special_tokens add_tokens add_special_tokens new_special_tokens_config init_special_tokens
model_revision low_cpu_mem_usage rope_scaling flash_attn shift_attn mixture_of_depths use_unsloth
use_unsloth_gc enable_liger_kernel moe_aux_loss_coef disable_gradient_checkpointing use_reentrant_gc
upcast_layernorm upcast_lmhead_output train_from_scratch infer_backend offload_folder use_kv_cache
use_v1_kernels infer_dtype hf_hub_token ms_hub_token om_hub_token print_param_status trust_remote_code
quantization_method quantization_bit quantization_type double_quantization quantization_device_map
image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels video_min_pixels
video_fps video_maxlen use_audio_in_video audio_sampling_rate export_dir export_size export_device
export_quantization_bit export_quantization_dataset export_quantization_nsamples export_quantization_maxlen
export_legacy_format export_hub_model_id vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank
vllm_config sglang_maxlen sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend use_kt
kt_cpu_activation kt_weight_path kt_non_expert_weight_path kt_expert_checkpoint_path kt_use_lora_experts
kt_lora_expert_num kt_lora_expert_intermediate_size template dataset eval_dataset dataset_dir media_dir
cutoff_len train_on_prompt mask_history streaming buffer_size mix_strategy interleave_probs overwrite_cache
preprocessing_batch_size preprocessing_num_workers max_samples eval_num_beams ignore_pad_token_for_loss
val_size eval_on_each_dataset packing neat_packing tool_format default_system enable_thinking
preserve_thinking tokenized_path data_shared_file_system freeze_trainable_layers freeze_trainable_modules
freeze_extra_modules additional_target lora_alpha lora_dropout lora_rank lora_target loraplus_lr_ratio
loraplus_lr_embedding use_rslora use_dora pissa_init pissa_iter pissa_convert create_new_adapter
module_dropout oft_rank oft_block_size oft_target pref_beta pref_ftx pref_bco_weight pref_loss
dpo_label_smoothing kto_chosen_weight kto_rejected_weight simpo_gamma ppo_buffer_size ppo_epochs
ppo_score_norm ppo_target ppo_whiten_rewards ref_model ref_model_adapters ref_model_quantization_bit
reward_model reward_model_adapters reward_model_quantization_bit reward_model_type ld_alpha use_galore
galore_target galore_rank galore_update_interval galore_scale galore_proj_type galore_layerwise use_apollo
apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type apollo_scale_type
apollo_layerwise apollo_scale_front use_badam badam_mode badam_start_block badam_switch_mode
badam_switch_interval badam_update_ratio badam_mask_mode badam_verbose use_swanlab swanlab_project
swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key swanlab_logdir swanlab_lark_webhook_url
swanlab_lark_secret pure_bf16 stage finetuning_type use_llama_pro use_adam_mini use_mca use_megatron_bridge
use_hyper_parallel hyper_parallel_args hyper_parallel_cp_size use_muon use_dft_loss use_asft_loss asft_alpha
use_eaft_loss eaft_alpha freeze_vision_tower freeze_multi_modal_projector freeze_language_model
compute_accuracy disable_shuffling early_stopping_steps plot_loss include_effective_tokens_per_second
ray_num_workers ray_init_kwargs master_addr master_port enable_torch_profiler profiler_output_dir
profiler_wait_steps profiler_warmup_steps profiler_active_steps profiler_repeat profiler_record_shapes
profiler_profile_memory profiler_with_stack profile_modules fp8 fp8_backend
fp8_enable_fsdp_float8_all_gather overwrite_output_dir do_sample temperature top_p top_k num_beams
max_new_tokens repetition_penalty length_penalty skip_special_tokens tensor_model_parallel_size
pipeline_model_parallel_size expert_model_parallel_size context_parallel_size
virtual_pipeline_model_parallel_size sequence_parallel recompute_granularity recompute_method
recompute_num_layers account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
bias_activation_fusion apply_rope_fusion masked_softmax_fusion cross_entropy_loss_fusion moe_grouped_gemm
moe_token_dispatcher_type calculate_per_token_loss use_distributed_optimizer overlap_param_gather
overlap_grad_reduce use_packed_sequences mixed_precision megatron_pretrained_checkpoint export_hf_on_finish
extra_config
"""
PLAIN = {  # its own values of keys that other values would change training by
    **dict.fromkeys("resize_vocab split_special_tokens train_from_scratch shift_attn fp8".split(), False),
    **dict.fromkeys("use_galore use_apollo use_badam use_muon use_adam_mini use_llama_pro".split(), False),
    **dict.fromkeys("disable_shuffling freeze_language_model pissa_init create_new_adapter".split(), False),
    **dict.fromkeys("train_on_prompt mask_history streaming preserve_thinking use_kt use_mca".split(), False),
    **dict.fromkeys("use_megatron_bridge use_hyper_parallel pure_bf16 use_dora".split(), False),
    **{"model_revision": "main", "quantization_type": "nf4", "double_quantization": True},
    **{"ignore_pad_token_for_loss": True, "mix_strategy": "concat", "val_size": 0.0, "lora_dropout": 0.0},
    **{"pref_ftx": 0.0, "pref_bco_weight": 0.0, "dpo_label_smoothing": 0.0, "dataset_dir": "data"},
    **{"kto_chosen_weight": 1.0, "simpo_gamma": 0.5, "lora_rank": 8, "lora_target": "all", "pref_beta": 0.1},
    **{"quantization_method": "bnb", "freeze_vision_tower": True, "enable_thinking": True},
}


def read(**more):
    return LLAMA_FACTORY.translate(DPO | more, whole=True)


def refused(**more):
    return [key for fate in read(**more).fates if fate.is_problem for key in fate.keys]


def test_every_key_is_known_and_none_is_refused_at_its_default():
    assert not LLAMA_FACTORY.unknown(dict.fromkeys(KEYS.split()))
    assert set(PLAIN) <= {*KEYS.split()} and read(**PLAIN).problems == []


def test_older_names():
    older = {"dpo_loss": "hinge", "dpo_beta": 0.3, "dpo_ftx": 0.0, "dev_ratio": 0.2}
    draft = read(**older)
    assert (draft.ours["objective"], draft.ours["beta"], draft.ours["eval_data"]) == ("hinge", 0.3, 0.2)
    assert any("trains sigmoid on TRL 0.24" in note for note in draft.notes)
    assert "dpo_beta 0.3 -> beta 0.3" in draft.notes  # as the config spells it
    draft = read(stage="orpo", orpo_beta=0.05)
    assert (draft.ours["objective"], draft.ours["beta"]) == ("orpo", 0.05)
    draft = read(orpo_beta=0.05)  # of a stage that it is not
    assert draft.ours["beta"] == 0.1 and "orpo_beta 0.05: left out, stage dpo does not read it" in draft.notes
    assert refused(stage="kto", kto_ftx=0.1) == ["kto_ftx"]
    assert read(pref_beta=0.2, dpo_beta=0.3).ours["beta"] == 0.2


def test_what_the_reference_is():
    """Ours is what training starts from; LLaMA-Factory's of a LoRA is the model without its adapter, unless
    ref_model says otherwise."""
    assert read(ref_model="m").problems == [] and refused(ref_model="other") == ["ref_model"]
    assert refused(adapter_name_or_path="a") == ["adapter_name_or_path"]
    same = {"adapter_name_or_path": "a", "ref_model": "m", "ref_model_adapters": "a"}
    draft = read(**same, lora_target="all")
    assert draft.problems == [] and draft.ours["adapter"] == "a" and "lora_rank" not in draft.ours
    assert refused(**same | {"ref_model_adapters": "b"}) == ["ref_model_adapters"]
    assert refused(**same | {"ref_model_adapters": None}) == ["ref_model_adapters"]
    bits = {"quantization_bit": 4, "ref_model": "m"}
    assert refused(**bits) == ["ref_model_quantization_bit"]
    assert read(**bits, ref_model_quantization_bit=4).problems == []
    for loss in ("orpo", "simpo"):
        draft = read(pref_loss=loss, adapter_name_or_path="a", ref_model="other")
        assert draft.problems == [] and draft.ours["adapter"] == "a"
    assert refused(adapter_name_or_path="a,b", pref_loss="orpo") == ["adapter_name_or_path"]
    for fresh in ({"create_new_adapter": True}, {"resume_lora_training": False}):
        assert refused(adapter_name_or_path="a", pref_loss="orpo", **fresh) == ["adapter_name_or_path"]
        assert read(**fresh).ours["lora_rank"] == 8


def test_data_sets():
    two = {"dataset": "a, b", "eval_dataset": "c,d", "dataset_dir": "x", "max_samples": 9}
    draft = read(**two)
    assert draft.ours["data"] == ["x:a#[:9]", "x:b#[:9]"]
    assert draft.ours["eval_data"] == ["x:c#[:9]", "x:d#[:9]"]
    assert refused(**two, mix_strategy="interleave_under", interleave_probs="0.5,0.5") == ["mix_strategy"]
    assert read(mix_strategy="interleave_under").problems == []  # of one data set
    assert refused(dataset_dir="ONLINE") == refused(dataset_dir="REMOTE:org/x") == ["dataset_dir"]
    assert refused(dataset="org/x") == ["dataset"]
    assert read(tokenized_path="t").problems == []
    assert refused(dataset=None, tokenized_path="t") == ["tokenized_path"]
    assert "eval_data" not in read(val_size=1e-7).ours


def test_what_changes_training_is_refused_and_the_rest_is_not():
    for key, value in {
        **{"finetuning_type": "freeze", "additional_target": "embed_tokens", "resize_vocab": True},
        **{"rope_scaling": "linear", "quantization_type": "fp4", "pref_loss": "kto_pair", "pref_ftx": 1.0},
        **{"default_system": "Be kind.", "early_stopping_steps": 3, "use_mca": True, "adapter_folder": "x"},
    }.items():
        assert refused(**{"pref_loss": "ipo"} | {key: value}) == [key]
    assert (
        read(lora_dropout=0.1, tool_format="qwen", image_max_pixels=9, freeze_trainable_layers=3).problems
        == []
    )
    assert read(finetuning_type="full", lora_rank=8).ours.get("lora_rank") is None


def test_images_are_as_large_as_there():
    draft = read()
    assert draft.ours["image_max_pixels"] == 768 * 768
    assert "image_max_pixels 589824 (LLaMA-Factory's default) -> image_max_pixels 589824" in draft.notes
    assert "image_max_pixels" not in LLAMA_FACTORY.translate(DPO, whole=False).ours  # flags over a config
    of = lambda **keys: (read(**keys).ours["image_max_pixels"], read(**keys).problems)
    assert of(image_max_pixels=262144) == of(image_resolution=262144) == (262144, [])
    assert of(image_resolution=512) == (512 * 512, [])
    assert any("of an image's longer side" in note for note in read(image_resolution=512).notes)
    smallest = lambda value: [note for note in read(image_min_pixels=value).notes if "image_min" in note]
    assert smallest(1024) == [
        "image_min_pixels 1024: left out, so small an image is left to the model's own processor"
    ]
    assert smallest(65536)[0].startswith("check: image_min_pixels 65536: left out, no image is made larger")


def test_where_a_data_set_was_looked_for_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError, match=rf"^data: 'data:d' does not exist here; {tmp_path}/data is no folder\."
    ):
        load_rows("data:d")
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data/rows.jsonl", [{"prompt": "p"}])
    with pytest.raises(DataError, match=rf"here; {tmp_path}/data holds no dataset_info.json\. Give"):
        load_rows("data:d")


def test_max_samples_are_of_the_split_that_the_listing_says(tmp_path):
    (tmp_path / "rows").mkdir()
    row = lambda prompt: {"instruction": prompt, "chosen": "yes", "rejected": "no"}
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"rows/{split}.jsonl", [row(f"{split} {i}") for i in range(3)])
    entry = {"file_name": "rows", "ranking": True, "split": "test"}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"d": entry}))
    for most, prompts in ((2, ["test 0", "test 1"]), (99, ["test 0", "test 1", "test 2"])):
        spec = read(dataset_dir=str(tmp_path), max_samples=most).ours["data"]
        assert [one["instruction"] for one in load_rows(spec)] == prompts
    rows = load_rows(f"{tmp_path}/rows/train.jsonl#[1:]")  # also where nothing says a split
    assert [one["instruction"] for one in rows] == ["train 1", "train 2"]
