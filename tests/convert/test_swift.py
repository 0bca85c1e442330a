"""ms-swift's keys and defaults as ours; what is refused."""

from pathlib import Path

import pytest
import yaml

from fastdpo.config.keys import from_values
from fastdpo.convert.convert import recognise
from fastdpo.convert.tools.swift import SWIFT

KNOWN = yaml.safe_load((Path(__file__).parent / "known/ms_swift.yaml").read_text(encoding="utf-8"))
LEAST = {"rlhf_type": "dpo", "model": "org/model", "dataset": "rows.jsonl", "max_length": 512}


def draft(**more):
    given = {key: value for key, value in (LEAST | more).items() if value is not None}
    assert recognise(given) is SWIFT
    return SWIFT.translate(given, whole=True)


def ours(**more):
    made = draft(**more)
    assert made.problems == []
    from_values(made.ours)
    return made.ours


def test_images_are_as_large_as_there():
    assert ours(max_pixels=9)["image_max_pixels"] == ours(MAX_PIXELS=9)["image_max_pixels"] == 9
    assert ours(max_pixels=9, MAX_PIXELS=5)["image_max_pixels"] == 9
    assert [note for note in draft(MAX_PIXELS=9).notes if note.startswith("check: MAX_PIXELS 9: templates")]


@pytest.mark.parametrize("rlhf_type", ["dpo", "kto", "orpo", "cpo", "simpo"])
def test_every_argument_is_known_and_its_default_is_no_problem(rlhf_type):
    given = {key: value for key, value in KNOWN.items() if value not in (None, [])}
    assert len(KNOWN) > 250 and SWIFT.unknown(KNOWN) == []
    assert ours(**given | LEAST | {"rlhf_type": rlhf_type})["objective"]


def test_what_is_left_out_has_its_default():
    assert ours() == {
        "model": "org/model",
        "data": "rows.jsonl",
        "objective": "sigmoid",
        "beta": 0.1,
        "batch_size": 16,
        "num_epochs": 3.0,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "lora_rank": 8,
        "lora_alpha": 32.0,
        "lora_target_modules": "all-linear",
        "max_length": 512,
        "truncation": "drop",
        "gradient_checkpointing": True,
        "router_aux_loss_coef": 0.0,
    }
    full = ours(tuner_type="full")
    assert full["learning_rate"] == 1e-5 and "lora_rank" not in full


@pytest.mark.parametrize(
    "more, size",
    [
        ({"per_device_train_batch_size": 4}, 16),
        ({"per_device_train_batch_size": 4, "num_processes": 3}, 24),
        ({"per_device_train_batch_size": 32}, 32),
        ({"gradient_accumulation_steps": 2, "num_processes": 8}, 16),
    ],
)
def test_the_batch(more, size):
    assert ours(**more)["batch_size"] == size


@pytest.mark.parametrize(
    "more, objective, rest",
    [
        ({"rpo_alpha": 0.1}, {"sigmoid": 1.0, "sft": 0.1}, {"beta": 0.1}),
        (
            {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "rpo_alpha": 0.0},
            {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0},
            {"beta": 0.1},
        ),
        ({"loss_type": "robust"}, "robust", {"beta": 0.1, "label_smoothing": 0.0}),
        ({"loss_type": ["ipo"], "beta": 0.5}, "ipo", {"beta": 0.5}),
        ({"rlhf_type": "orpo"}, "orpo", {"beta": 0.1}),
        ({"rlhf_type": "cpo", "cpo_alpha": 0.5}, "cpo", {"beta": 0.1, "objective_args": {"cpo_alpha": 0.5}}),
        (
            {"rlhf_type": "simpo"},
            {"simpo": 1.0, "sft": 1.0},
            {"beta": 2.0, "objective_args": {"simpo_gamma": 1.0}},
        ),
        (
            {"rlhf_type": "cpo", "loss_type": "simpo", "cpo_alpha": 0, "simpo_gamma": 0.4, "beta": 2.5},
            "simpo",
            {"beta": 2.5, "objective_args": {"simpo_gamma": 0.4}},
        ),
        (
            {"rlhf_type": "kto", "desirable_weight": 0.2},
            "kto",
            {"beta": 0.1, "objective_args": {"desirable_weight": 0.2}},
        ),
    ],
)
def test_losses(more, objective, rest):
    made = ours(**more)
    assert made["objective"] == objective
    assert {key: made[key] for key in ("beta", "label_smoothing", "objective_args") if key in made} == rest


@pytest.mark.parametrize(
    "more, data, data_format",
    [
        ({"dataset": "swift/orca_dpo_pairs"}, "Intel/orca_dpo_pairs", "intel"),
        ({"dataset": "Intel/orca_dpo_pairs#50", "use_hf": True}, "Intel/orca_dpo_pairs#train[:50]", "intel"),
        ({"dataset": "hf::org/data:default"}, "org/data", None),
        ({"dataset": ["a.jsonl", "org/b:en"]}, ["a.jsonl", "org/b:en"], None),
        (
            {"dataset": "a.csv", "columns": {"q": "query", "good": "response", "bad": "rejected_response"}},
            "a.csv",
            {"format": "prompt_pairs", "prompt": "q", "chosen": "good", "rejected": "bad"},
        ),
        (
            {"rlhf_type": "kto", "columns": '{"q": "query", "a": "response", "liked": "label"}'},
            "rows.jsonl",
            {"format": "alpaca_kto", "instruction": "q", "output": "a", "kto_tag": "liked"},
        ),
    ],
)
def test_data(more, data, data_format):
    made = ours(**more)
    assert (made["data"], made.get("data_format")) == (data, data_format)


def test_held_out():
    assert ours(split_dataset_ratio=0.05)["eval_data"] == 0.05
    assert ours(split_dataset_ratio=0.05, val_dataset="v.jsonl")["eval_data"] == "v.jsonl"
    assert "eval_data" not in ours(split_dataset_ratio=0)


def test_an_adapter_is_trained_on_where_the_reference_has_it_too():
    adapter = {"adapters": "sft", "target_regex": "q_proj$", "lora_rank": 4}
    made = ours(**adapter, ref_adapters=["sft"])
    assert made["adapter"] == "sft" and "lora_rank" not in made
    assert ours(**adapter, rlhf_type="orpo")["adapter"] == "sft"
    (problem,) = draft(**adapter).problems
    assert problem.startswith("adapters: sft: the reference is the model without that adapter")


def test_checks_say_what_a_config_cannot():
    notes = "\n".join(draft(dataset="mine/data#100", tuner_type="full", torch_dtype="bfloat16").notes)
    for text in ("mine/data is ModelScope's name", "draws 100 rows at random", "are kept in fp32 here"):
        assert text in notes
    (note,) = [note for note in draft(lora_dropout=0.1).notes if note.startswith("lora_dropout 0.1")]
    assert note.endswith("ms-swift's RLHF trainers switch LoRA's off, too")


@pytest.mark.parametrize(
    "more, key",
    [
        ({"max_length": None}, "max_length: not given"),
        ({"rlhf_type": "grpo"}, "rlhf_type: grpo"),
        ({"loss_type": "made_up"}, "loss_type: ['made_up']"),
        ({"rlhf_type": "cpo", "loss_type": "hinge"}, "loss_type: ['hinge']"),
        ({"loss_type": ["ipo", "sft"], "loss_weights": [1]}, "loss_weights: [1]"),
        ({"tuner_type": "longlora"}, "tuner_type: longlora"),
        ({"torch_dtype": "float16"}, "torch_dtype: float16"),
        ({"quant_bits": 8, "quant_method": "bnb"}, "quant_bits: 8 by bnb"),
        ({"truncation_strategy": "split"}, "truncation_strategy: split"),
        ({"ref_model": "org/other"}, "ref_model: org/other"),
        ({"target_regex": "q_proj"}, "target_regex: q_proj"),
        ({"system": "You are S."}, "system: You are S."),
        ({"loss_scale": "hermes"}, "loss_scale: hermes"),
        ({"dataset": "org/data:a/b"}, "dataset: org/data:a/b"),
        ({"columns": {"q": "query"}}, "columns: {'q': 'query'}"),
        ({"freeze_parameters_ratio": 0.5}, "freeze_parameters_ratio: 0.5"),
        ({"dataset": ["swift/orca_dpo_pairs", "AI-ModelScope/zhihu_rlhf_3k"]}, "dataset: ['swift/orca"),
    ],
)
def test_what_would_train_otherwise_is_refused(more, key):
    (problem,) = draft(**more).problems
    assert problem.startswith(key)


def test_a_flag_over_it_has_no_defaults():
    made = SWIFT.translate({"per_device_train_batch_size": "2", "rlhf_type": "kto"}, whole=False)
    assert made.ours == {"batch_size": 2, "objective": "kto", "beta": 0.1}


def test_a_template_by_its_name():
    assert ours(template="chatml")["chat_template"] == "chatml"
    assert "chat_template" not in ours(template="qwen2_5")
    assert draft(template="default").problems[0].startswith("template: default: fastdpo does not know it")
