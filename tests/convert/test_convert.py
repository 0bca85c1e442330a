"""Configs of TRL, Axolotl and LLaMA-Factory as ours: what they map to, and what is refused."""

import pytest
import yaml

from fastdpo.config.keys import FIELDS, Config, coerce
from fastdpo.convert.convert import TOOLS, recognise
from fastdpo.errors import ConfigError
from tests.convert.translated import translate

TRL = """
model_name_or_path: org/model
dataset_name: org/data
dataset_train_split: train_prefs
eval_strategy: steps
eval_steps: 100
loss_type: [sigmoid, bco_pair, sft]
loss_weights: [0.8, 0.2, 1.0]
beta: 0.01
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
max_length: 2048
truncation_mode: keep_end
learning_rate: 5e-7
optim: adamw_torch
use_peft: true
lora_r: 8
lora_alpha: 32
lora_dropout: 0.0
lora_target_modules: [q_proj, v_proj]
warmup_steps: 10
precompute_ref_log_probs: true
use_liger_kernel: true
save_strategy: no
bf16: true
report_to: [wandb, mlflow]
output_dir: out
"""
AXOLOTL = """
base_model: org/model
rl: dpo
rl_beta: 0.2
datasets:
  - path: org/data
    name: en
    split: train_prefs
    type: chatml.intel
val_set_size: 0.05
output_dir: out
sequence_len: 4096
sample_packing: false
adapter: lora
lora_r: 32
lora_alpha: 16
lora_target_linear: true
wandb_project: mine
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_torch
learning_rate: 0.0002
bf16: auto
gradient_checkpointing: offload
warmup_steps: 10
saves_per_epoch: 1
flash_attention: true
special_tokens:
"""
LLAMA_FACTORY = """
model_name_or_path: org/model
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
pref_beta: 0.1
pref_loss: sigmoid
pref_ftx: 0.5
dataset: dpo_en_demo
template: llama3
cutoff_len: 4096
max_samples: 1000
overwrite_cache: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 2.0
lr_scheduler_type: cosine
warmup_steps: 5
val_size: 0.1
plot_loss: true
output_dir: out
fp16: false
"""
OURS = {
    "TRL": {
        "model": "org/model",
        "data": "org/data#train_prefs",
        "eval_data": "org/data#test",
        "eval_steps": 100,
        "objective": {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0},
        "beta": 0.01,
        "batch_size": 16,
        "num_epochs": 3.0,  # TRL's default
        "max_length": 2048,
        "truncation": "keep_end",
        "learning_rate": 5e-7,
        "optim": "adamw_torch_fused",
        "lora_rank": 8,
        "lora_alpha": 32.0,
        "lora_target_modules": ["q_proj", "v_proj"],
        "warmup_steps": 10,
        "dtype": "bf16",
        "report_to": ["wandb"],
        "output_dir": "out",
    },
    "Axolotl": {
        "model": "org/model",
        "data": "org/data:en#train_prefs",
        "data_format": "intel",
        "chat_template": "chatml",
        "eval_data": 0.05,
        "objective": "sigmoid",
        "beta": 0.2,
        "batch_size": 8,
        "num_epochs": 4.0,
        "max_length": 4096,
        "truncation": "drop",
        "learning_rate": 2e-4,
        "lr_scheduler_type": "cosine",  # Axolotl's default
        "optim": "adamw_torch_fused",
        "lora_rank": 32,
        "lora_alpha": 16.0,
        "lora_target_modules": "all-linear",
        "warmup_steps": 10,
        "gradient_checkpointing": True,
        "activation_offloading": True,
        "report_to": ["wandb"],
        "output_dir": "out",
    },
    "LLaMA-Factory": {
        "model": "org/model",
        "data": "data:dpo_en_demo#[:1000]",
        "chat_template": "llama3",
        "eval_data": 0.1,
        "objective": "rpo",
        "objective_args": {"rpo_alpha": 0.5},
        "beta": 0.1,
        "batch_size": 8,
        "num_epochs": 2.0,
        "max_length": 4096,
        "learning_rate": 5e-6,
        "lr_scheduler_type": "cosine",
        "lora_rank": 8,
        "lora_target_modules": "all-linear",
        "warmup_steps": 5,
        "image_max_pixels": 589824,
        "output_dir": "out",
    },
}
FILES = {"TRL": TRL, "Axolotl": AXOLOTL, "LLaMA-Factory": LLAMA_FACTORY}


@pytest.mark.parametrize("tool", FILES)
def test_a_whole_config(tool):
    values = yaml.safe_load(FILES[tool])
    assert recognise(values).name == tool
    ours, notes = translate(values)
    assert ours == OURS[tool]
    assert notes[0] == f"read as a config of {tool}"
    known = {name: value for name, value in ours.items() if name in FIELDS}
    Config(**{name: coerce(name, value) for name, value in known.items()}).per_stage()


@pytest.mark.parametrize("tool", FILES)
def test_every_key_is_accounted_for(tool):
    """In ours under the same name and value, or in a note: none is lost in silence."""
    values = yaml.safe_load(FILES[tool])
    ours, notes = translate(values)
    text = "\n".join(notes)
    for key, value in values.items():
        if value is not None and key not in _WITH_OTHERS:
            assert key in text or ours[key] == value, key


_WITH_OTHERS = set(  # their values are in another key of ours, which OURS has
    "loss_type loss_weights pref_loss rl use_peft stage finetuning_type adapter dataset_train_split "
    "save_strategy eval_strategy lora_dropout fp16 bf16 wandb_project learning_rate".split()
)


def notes_of(text, **more):
    return translate(yaml.safe_load(text) | more)[1]


def test_notes_say_what_became_of_keys():
    notes = notes_of(TRL)
    for note in (
        "per_device_train_batch_size 2, gradient_accumulation_steps 8 (of one device) -> batch_size 16",
        "num_train_epochs 3 (TRL's default) -> num_epochs 3",
        "precompute_ref_log_probs true: left out, the reference is always computed once and kept",
        "report_to ['wandb', 'mlflow']: left out mlflow, metrics.jsonl has it all",
        "use_liger_kernel true: left out, it changes speed or memory only",
    ):
        assert note in notes
    assert not [note for note in notes if note.startswith("max_length")]  # ours is the same
    notes = notes_of(AXOLOTL)
    assert "excess_length_strategy drop (Axolotl's default) -> truncation drop" in notes
    assert "datasets.type chatml.intel -> chat_template chatml" in notes
    assert "template llama3 -> chat_template llama3" in notes_of(LLAMA_FACTORY)


def ours_of(text, **more):
    return translate(yaml.safe_load(text) | more)[0]


def test_tools_are_told_by_keys_that_only_one_has():
    assert recognise({"model": "m", "batch_size": 4, "leraning_rate": 1}) is None
    assert recognise({"per_device_train_batch_size": 4}).name == "TRL"  # transformers' own
    assert not any(tool.marks & set(FIELDS) for tool in TOOLS)
    for tool in TOOLS:  # a name that parts use is no key of the tool's, so that it means one thing
        older = {name for name, key in tool.names.items() if name in tool.older.get(key, ())}
        assert (set(tool.names) - older).isdisjoint(tool.rules)
        assert set(tool.names.values()) <= {*tool.rules, *tool.read}
    with pytest.raises(ConfigError, match=r"several tools.*TRL has loss_type; Axolotl has rl"):
        recognise({"loss_type": "ipo", "rl": "dpo"})


def test_their_words_in_a_config_of_ours():
    """Only those words change, and our defaults stay ours; while ours in theirs leave theirs."""
    ours, notes = translate({"model": "m", "per_device_train_batch_size": 4, "beta": 0.3, "resume": True})
    assert ours == {"model": "m", "batch_size": 4, "beta": 0.3, "resume": True}
    assert notes == [
        "read as a config of TRL",
        "per_device_train_batch_size 4, gradient_accumulation_steps 1 (TRL's default) (of one device) "
        "-> batch_size 4",
    ]


def test_our_words_in_a_config_of_theirs():
    ours = ours_of(TRL, samples=0, lora_rank=4)
    assert (ours["samples"], ours["num_epochs"], ours["lora_rank"]) == (0, 3.0, 4)


def test_flags_are_strings_and_no_whole_config():
    ours, _ = translate({"num_train_epochs": "2", "gradient_accumulation_steps": "4"}, whole=False)
    assert ours == {"num_epochs": 2.0, "batch_size": 32}
    ours, _ = translate({"loss_type": "ipo", "learning_rate": "1e-6", "model": "m"}, whole=False)
    assert ours == {"objective": "ipo", "beta": 0.1, "learning_rate": 1e-6, "model": "m"}
    with pytest.raises(
        ConfigError, match=r"ld_alpha: 0.5: without a loss_type beside it, give it in objective_args"
    ):
        translate({"ld_alpha": "0.5", "padding_free": "true"}, whole=False)


def test_the_balance_loss_of_experts():
    """Under TRL's name; what TRL does without it is our default. LLaMA-Factory has it under another one."""
    assert ours_of(TRL, router_aux_loss_coef=0.01)["router_aux_loss_coef"] == 0.01
    assert ours_of(TRL, router_aux_loss_coef=0)["router_aux_loss_coef"] == 0
    for theirs in ({}, {"router_aux_loss_coef": None}):
        assert "router_aux_loss_coef" not in ours_of(TRL, **theirs)
    assert ours_of(LLAMA_FACTORY, moe_aux_loss_coef=0.02)["router_aux_loss_coef"] == 0.02
    notes = notes_of(LLAMA_FACTORY, moe_aux_loss_coef=0.02)
    assert "moe_aux_loss_coef 0.02 -> router_aux_loss_coef 0.02" in notes
    assert any(n.startswith("check: moe_aux_loss_coef 0.02: ") and "its DPO not" in n for n in notes)
    assert ours_of(AXOLOTL, router_aux_loss_coef=0.03)["router_aux_loss_coef"] == 0.03  # our own word


def test_max_steps_overrules_epochs():
    ours = ours_of(TRL, max_steps=50)
    assert ours["max_steps"] == 50 and "num_epochs" not in ours
    assert ours_of(TRL, max_steps=-1)["num_epochs"] == 3


def test_load_best_and_evaluation():
    ours = ours_of(TRL, load_best_model_at_end=True, metric_for_best_model="eval_loss")
    assert ours["load_best"] is True
    with pytest.raises(ConfigError, match=r"metric_for_best_model: .*load_best goes by the held-out loss"):
        ours_of(TRL, load_best_model_at_end=True, metric_for_best_model="eval_rewards/accuracies")
    ours = ours_of(TRL, eval_strategy="no")
    assert "eval_data" not in ours and "eval_steps" not in ours


def test_keys_of_memory():
    memory = {"pure_bf16": True, "quantization_bit": 4, "use_dora": True, "optim": "adamw_bnb_8bit"}
    ours, notes = translate(yaml.safe_load(LLAMA_FACTORY) | memory)
    assert (ours["load_in_4bit"], ours["use_dora"], ours["optim"]) == (True, True, "adamw_8bit")
    assert "pure_bf16" not in ours and any("a LoRA's weights are kept in fp32" in note for note in notes)
    ours, notes = translate(yaml.safe_load(LLAMA_FACTORY) | {"finetuning_type": "full", "pure_bf16": True})
    assert ours["pure_bf16"] and any("rounds its updates stochastically" in note for note in notes)
    ours = ours_of(
        AXOLOTL, adapter="qlora", optimizer="ao_adamw_8bit", gradient_checkpointing=True, tiled_mlp=True
    )
    assert (ours["load_in_4bit"], ours["optim"], ours["tiled_mlp"]) == (True, "adamw_torch_8bit", True)
    assert "activation_offloading" not in ours
    assert ours_of(AXOLOTL, gradient_checkpointing=False, activation_offloading="disk")[
        "activation_offloading"
    ]


def test_where_a_model_is_uploaded_to():
    assert ours_of(TRL, push_to_hub=True, hub_model_id="me/m")["push_to_hub"] == "me/m"
    assert "push_to_hub" not in ours_of(TRL, hub_model_id="me/m")
    assert ours_of(AXOLOTL, hub_model_id="me/m")["push_to_hub"] == "me/m"  # there the name alone uploads
    assert ours_of(TRL, push_to_hub="me/ours")["push_to_hub"] == "me/ours"


def test_alignment_handbook_s_mixer():
    mixer = {"dataset_mixer": {"org/uf": 1.0}, "dataset_splits": ["train_prefs", "test_prefs"]}
    ours = ours_of(TRL, dataset_name=None, dataset_train_split=None, **mixer)
    assert (ours["data"], ours["eval_data"]) == ("org/uf#train_prefs", "org/uf#test_prefs")
