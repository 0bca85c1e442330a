"""The losses, data types and defaults of TRL, Axolotl and LLaMA-Factory in our words; and what is refused."""

import pytest
import yaml

from fastdpo.config.keys import Config, coerce
from fastdpo.errors import ConfigError
from tests.convert.test_convert import AXOLOTL, FILES, LLAMA_FACTORY, TRL, notes_of, ours_of
from tests.convert.translated import translate


@pytest.mark.parametrize(
    "more, objective, rest",
    [
        ({"loss_type": "ipo", "loss_weights": None}, "ipo", {"beta": 0.01}),
        ({"loss_type": ["sft"], "loss_weights": None}, "sft", {}),  # it reads no beta
        (
            {"loss_type": "robust", "loss_weights": None},
            "robust",
            {"beta": 0.01, "label_smoothing": 0.0},  # TRL's default; ours is another one
        ),
        (
            {"loss_type": "sigmoid", "loss_weights": None, "rpo_alpha": 0.5, "label_smoothing": 0.1},
            {"sigmoid": 1.0, "sft": 0.5},
            {"beta": 0.01, "label_smoothing": 0.1},
        ),
        (
            {"loss_type": ["aot_pair", "sft"], "loss_weights": [1, 0.3], "rpo_alpha": 0.5},
            {"aot": 1.0, "sft": 0.8},
            {"beta": 0.01},
        ),
        (
            {"loss_type": "sigmoid", "loss_weights": None, "ld_alpha": 0.5, "use_weighting": True},
            "sigmoid",
            {"beta": 0.01, "objective_args": {"ld_alpha": 0.5, "use_weighting": True}},
        ),
        (
            {
                "loss_type": "discopop",
                "loss_weights": None,
                "discopop_tau": 0.1,
                "f_divergence_type": "reverse_kl",
            },
            "discopop",
            {"beta": 0.01, "objective_args": {"discopop_tau": 0.1}},
        ),
        (
            {
                "loss_type": "hinge",
                "loss_weights": None,
                "f_divergence_type": "alpha_divergence",
                "f_alpha_divergence_coef": 0.7,
            },
            "hinge",
            {
                "beta": 0.01,
                "objective_args": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
            },
        ),
        (
            {"loss_type": "simpo", "loss_weights": None, "simpo_gamma": 0.3, "cpo_alpha": 0.0},
            "simpo",
            {"beta": 0.01, "objective_args": {"simpo_gamma": 0.3}},
        ),
        (
            {"loss_type": "simpo", "loss_weights": None},  # CPOTrainer's cpo_alpha is 1 unless said
            {"simpo": 1.0, "sft": 1.0},
            {"beta": 0.01},
        ),
    ],
)
def test_trl_losses(more, objective, rest):
    ours = ours_of(TRL, **more)
    assert ours["objective"] == objective
    names = ("beta", "label_smoothing", "objective_args")
    assert {name: ours[name] for name in names if name in ours} == rest
    Config(**{name: coerce(name, value) for name, value in ours.items()})


@pytest.mark.peer
def test_every_trl_loss_has_its_own_name_here():
    from dataclasses import fields

    from trl import DPOConfig

    names = "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down"
    (doc,) = (f.metadata["help"] for f in fields(DPOConfig) if f.name == "loss_type")
    for name in (*names.split(), "discopop", "sft", "sigmoid_norm"):
        assert f"'{name}'" in doc or name in doc
        smoothing = {"label_smoothing": 0.01} if name == "exo_pair" else {}
        ours = ours_of(TRL, loss_type=name, loss_weights=None, **smoothing)
        assert ours["objective"] == name
        Config(**{key: coerce(key, value) for key, value in ours.items()}).per_stage()


@pytest.mark.parametrize(
    "kind, data_format",
    [
        ("chatml.argilla_chat", "trl"),
        ("llama3.default", "axolotl"),
        (None, "trl"),
        ("llama3.icr", "icr"),
        ("chatml.prompt_pairs", "prompt_pairs"),
        ("llama3.ultra", "ultra"),
        ("zephyr.nectar", "nectar"),
        (
            {"field_prompt": "q", "field_chosen": "a", "field_rejected": "b", "prompt_format": "[{q}]"},
            {"prompt": "q", "chosen": "a", "rejected": "b", "prompt_format": "[{prompt}]"},
        ),
        (
            {"field_system": "sys", "prompt_format": "{system}: {prompt}"},
            {
                "prompt": "prompt",
                "chosen": "chosen",
                "rejected": "rejected",
                "system": "sys",
                "prompt_format": "{system}: {prompt}",
            },
        ),
    ],
)
def test_axolotl_types(kind, data_format):
    from fastdpo.data.formats.layouts import layout_of

    ours = ours_of(AXOLOTL, datasets=[{"path": "org/data", "type": kind}])
    assert ours.get("data_format") == data_format and ours["data"] == "org/data"
    layout_of(data_format)


def test_axolotl_chat_template_fields():
    entry = {"path": "d", "type": "chat_template", "field_messages": "talk", "roles": {"user": ["user"]}}
    ours = ours_of(AXOLOTL, datasets=[entry])
    expected = {"format": "messages", "messages": "talk", "chosen": "chosen", "rejected": "rejected"}
    assert ours["data_format"] == expected  # Axolotl reads no other column
    assert ours_of(AXOLOTL, datasets=[entry | {"roles": {"user": ["human"]}}]) == ours
    with pytest.raises(ConfigError, match=r"datasets.roles: .*customer"):
        ours_of(AXOLOTL, datasets=[entry | {"roles": {"user": ["customer"]}}])


def test_axolotl_nectar_is_said_to_differ():
    notes = notes_of(AXOLOTL, datasets=[{"path": "d", "type": "zephyr.nectar"}])
    assert any("worst answers as chosen" in note for note in notes)


@pytest.mark.parametrize(
    "rl, more, objective, args",
    [
        ("ipo", {}, "ipo", None),
        ("dpo", {"dpo_loss_type": "aot_pair"}, "aot", None),
        ("orpo", {"orpo_alpha": 0.3}, "orpo", None),
        ("simpo", {"cpo_alpha": 0, "simpo_gamma": 0.7}, "simpo", {"simpo_gamma": 0.7}),
        ("kto", {"kto_desirable_weight": 0.5}, "kto", {"desirable_weight": 0.5}),
        (
            "dpo",
            {"dpo_loss_type": ["hinge", "sft"], "dpo_loss_weights": [1, 0.1]},
            {"hinge": 1.0, "sft": 0.1},
            None,
        ),
    ],
)
def test_axolotl_rl(rl, more, objective, args):
    ours = ours_of(AXOLOTL, rl=rl, **more)
    assert (ours["objective"], ours.get("objective_args")) == (objective, args)
    assert ours["beta"] == 0.2  # which Axolotl reads before orpo_alpha
    if rl == "orpo":
        assert ours_of(AXOLOTL, rl=rl, rl_beta=None, **more)["beta"] == 0.3


def test_axolotl_long_rows_and_warmup():
    assert ours_of(AXOLOTL, excess_length_strategy="truncate")["truncation"] == "keep_start"
    ours = ours_of(AXOLOTL, excess_length_strategy="raise")
    assert (ours["truncation"], ours["strict"]) == ("drop", True)
    assert ours_of(AXOLOTL, warmup_steps=None)["warmup_steps"] == 0.03  # Axolotl's default: a share


@pytest.mark.parametrize(
    "more, objective, args",
    [
        ({"pref_loss": "simpo", "pref_ftx": 0, "simpo_gamma": 1.0}, "simpo", {"simpo_gamma": 1.0}),
        ({"pref_loss": "orpo", "pref_ftx": 0}, "orpo", None),
        ({"stage": "kto", "pref_ftx": 0, "kto_rejected_weight": 0.5}, "kto", {"undesirable_weight": 0.5}),
    ],
)
def test_llama_factory_losses(more, objective, args):
    ours = ours_of(LLAMA_FACTORY, **more)
    assert (ours["objective"], ours.get("objective_args"), ours["beta"]) == (objective, args, 0.1)


def test_llama_factory_defaults():
    """Where a whole config leaves out what LLaMA-Factory sets otherwise than we do."""
    ours, notes = translate({"model_name_or_path": "m", "stage": "dpo", "dataset": "d"})
    assert ours["learning_rate"] == 5e-5 and ours["max_length"] == 2048 and ours["num_epochs"] == 3
    assert ours["lora_rank"] == 8 and ours["beta"] == 0.1 and ours["data"] == "data:d"
    assert "learning_rate 5e-05 (LLaMA-Factory's default) -> learning_rate 5e-05" in notes
    ours = ours_of(LLAMA_FACTORY, finetuning_type="full", dataset_dir="x/y")
    assert "lora_rank" not in ours and ours["data"].startswith("x/y:dpo_en_demo")


REFUSED = [
    ("TRL", {"sync_ref_model": True}, "sync_ref_model: true: the reference does not move here"),
    (
        "TRL",
        {"lora_dropout": 0.05, "disable_dropout": False},
        "lora_dropout: 0.05: fastdpo trains LoRA without dropout",
    ),
    ("TRL", {"load_in_8bit": True}, "load_in_8bit: true: fastdpo quantises to 4 bits only"),
    ("TRL", {"neftune_noise_alpha": 5}, "neftune_noise_alpha: 5: fastdpo does not have it"),
    ("TRL", {"loss_weights": [1]}, "loss_weights: .*a weight for each loss"),
    ("TRL", {"loss_type": "dpo2", "loss_weights": None}, "loss_type: dpo2: no loss of TRL's trainers"),
    ("TRL", {"per_device_train_batch_size": 0}, "per_device_train_batch_size: 0: a whole number"),
    (
        "TRL",
        {"loss_type": "simpo", "loss_weights": None, "ld_alpha": 0.5},
        "ld_alpha: 0.5: the loss does not read it here",
    ),
    ("TRL", {"gamma_ratio": 0.5}, "gamma_ratio: 0.5: not a key that is known of TRL"),
    ("TRL", {"gradient_acumulation_steps": 2}, "Did you mean 'gradient_accumulation_steps'"),
    ("Axolotl", {"adapter": "ia3"}, "adapter: ia3: fastdpo trains a LoRA or all weights"),
    ("Axolotl", {"rl": "grpo"}, "rl: grpo: fastdpo does dpo, ipo, kto, orpo, simpo"),
    ("Axolotl", {"datasets": [{"path": "a", "type": "sharegpt"}]}, "datasets.type: sharegpt: known are"),
    ("Axolotl", {"datasets": [{"path": "a", "shards": 4}]}, "datasets.shards: 4: write the rows"),
    ("Axolotl", {"val_set_size": 1.5}, "val_set_size: 1.5: give a share"),
    (
        "Axolotl",
        {"chat_template": "metharme", "datasets": [{"path": "a"}]},
        "chat_template: metharme: write the template to a file",
    ),
    ("LLaMA-Factory", {"stage": "sft"}, "stage: sft: fastdpo does preference training"),
    ("LLaMA-Factory", {"quantization_bit": 8}, "quantization_bit: 8 by bnb: fastdpo quantises to 4"),
    ("LLaMA-Factory", {"quantization_bit": 4, "quantization_method": "hqq"}, "quantization_bit: 4 by hqq"),
    ("TRL", {"push_to_hub": True, "output_dir": None}, "push_to_hub: true: name the repository"),
    ("LLaMA-Factory", {"finetuning_type": "freeze"}, "finetuning_type: freeze"),
    ("LLaMA-Factory", {"template": "fewshot"}, "template: fewshot: fastdpo does not know it"),
    (
        "LLaMA-Factory",
        {"template": "qwen", "default_system": "Be."},
        "default_system: Be.: a tokenizer's own template has its own",
    ),
    ("LLaMA-Factory", {"ld_alpha": 0.5}, "ld_alpha: 0.5: LLaMA-Factory weights the policy only"),
    ("LLaMA-Factory", {"pref_loss": "ipo"}, "pref_ftx: 0.5: fastdpo has it beside plain pref_loss: sigmoid"),
    ("LLaMA-Factory", {"use_galore": True}, "use_galore: true: fastdpo does not have it"),
    ("LLaMA-Factory", {"pref_bco_weight": 0.2}, "pref_bco_weight: 0.2"),
]


@pytest.mark.parametrize("tool, more, message", REFUSED)
def test_what_would_train_otherwise_is_an_error(tool, more, message):
    with pytest.raises(ConfigError, match=message):
        translate(yaml.safe_load(FILES[tool]) | more)


def test_what_the_template_is_given():
    ours, notes = translate(yaml.safe_load(LLAMA_FACTORY) | {"enable_thinking": False})
    assert ours["chat_template_kwargs"] == {"enable_thinking": False}
    assert "enable_thinking false -> chat_template_kwargs {'enable_thinking': False}" in notes
    assert "chat_template_kwargs" not in ours_of(LLAMA_FACTORY)
    given = {
        "chat_template_kwargs": {"enable_thinking": False}
    }  # our name, but Axolotl's DPO does not read it
    assert "chat_template_kwargs" not in translate(yaml.safe_load(AXOLOTL) | given)[0]
