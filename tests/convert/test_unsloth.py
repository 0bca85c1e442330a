"""Unsloth's arguments as ours: its own names, its own defaults, TRL's beneath."""

import pytest

from fastdpo.config.keys import from_values
from fastdpo.convert.convert import recognise
from fastdpo.errors import ConfigError
from tests.convert.translated import translate

NOTEBOOK = {
    "model_name": "unsloth/zephyr-sft-bnb-4bit",
    "max_seq_length": 4096,
    "load_in_4bit": True,
    "r": 64,
    "target_modules": ["q_proj", "v_proj"],
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "bias": "none",
    "use_gradient_checkpointing": "unsloth",
    "random_state": 3407,
    "loftq_config": None,
    "dataset_name": "org/data",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "learning_rate": 5e-6,
    "optim": "adamw_torch",
    "max_length": 512,
    "beta": 0.2,
}


def test_a_notebook():
    ours, notes = translate(NOTEBOOK)
    from_values(ours)
    assert notes[0] == "read as a config of Unsloth"
    same = {"learning_rate": 5e-6, "max_length": 512, "beta": 0.2, "data": "org/data", "batch_size": 8}
    lora = {"lora_rank": 64, "lora_alpha": 32.0, "lora_target_modules": ["q_proj", "v_proj"]}
    more = {"model": "unsloth/zephyr-sft-bnb-4bit", "load_in_4bit": True, "gradient_checkpointing": True}
    own = {"warmup_steps": 0.1, "weight_decay": 0.001, "num_epochs": 3.0}  # its defaults
    assert ours == same | lora | more | own | {"optim": "adamw_torch_fused", "objective": "sigmoid"}
    assert "lora_dropout 0.1: left out, TRL's disable_dropout switches LoRA's off, too" in notes
    assert "weight_decay 0.001 (Unsloth's default) -> weight_decay 0.001" in notes
    assert not any("model_name" in note and note.startswith("check") for note in notes)


def test_weights_that_are_not_stored_in_4_bits():
    _, notes = translate(NOTEBOOK | {"model_name": "org/whole"})
    assert any(
        note.startswith("check: model_name org/whole: Unsloth takes its own 4-bit copy") for note in notes
    )
    ours, notes = translate(NOTEBOOK | {"model_name": "org/whole", "load_in_4bit": False})
    assert "load_in_4bit" not in ours and not any("4-bit" in note for note in notes)


def test_all_weights():
    values = {
        "model_name": "org/model",
        "max_seq_length": 512,
        "full_finetuning": True,
        "dataset_name": "d/d",
    }
    ours, _ = translate(values)
    assert ours["pure_bf16"] and not {"lora_rank", "load_in_4bit"} & ours.keys()
    assert "pure_bf16" not in translate(values | {"float32_mixed_precision": True})[0]


def test_a_lora_of_its_defaults():
    ours, _ = translate(
        {"model_name": "org/model", "max_seq_length": 9, "lora_alpha": 16, "dataset_name": "d/d"}
    )
    assert ours["lora_rank"] == 16 and ours["load_in_4bit"] and len(ours["lora_target_modules"]) == 7


@pytest.mark.parametrize(
    "key, value, text",
    [
        ("load_in_8bit", True, "load_in_8bit: true: fastdpo quantises to 4 bits only"),
        ("bias", "all", "bias: all: fastdpo does not have it"),
        ("modules_to_save", ["lm_head"], "modules_to_save: ['lm_head']: fastdpo does not have it"),
        ("loftq_config", {"bits": 4}, "loftq_config: {'bits': 4}: fastdpo does not have it"),
        ("ref_model", "other", "ref_model: other: the reference is the model that training starts from"),
    ],
)
def test_what_cannot_be_had(key, value, text):
    with pytest.raises(ConfigError) as error:
        translate(NOTEBOOK | {key: value})
    assert str(error.value).startswith(text) and "\n" not in str(error.value)


def test_trl_is_not_taken_for_it():
    assert recognise({"model_name_or_path": "m", "dataset_name": "d/d", "lora_r": 8}).name == "TRL"
