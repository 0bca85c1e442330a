"""Every key of a config has a fate, and a value that it cannot have is a problem of that key."""

import pytest

from fastdpo.convert.convert import drafted

TRL = {"model_name_or_path": "m", "dataset_name": "d/x", "learning_rate": 1e-5}
FACTORY = {"model_name_or_path": "m", "stage": "dpo", "dataset": "d", "cutoff_len": 512}
AXOLOTL = {"base_model": "m", "rl": "dpo", "datasets": [{"path": "d/x"}], "adapter": "lora", "lora_r": 8}
SWIFT = {"model": "m", "rlhf_type": "dpo", "dataset": "d/x", "max_length": 512}
OPENRLHF = {"pretrain": "m", "dataset": "d/x", "apply_chat_template": True}
TORCHTUNE = {
    "model": {"_component_": "torchtune.models.llama3.lora_llama3_8b", "lora_attn_modules": ["q_proj"]},
    "checkpointer": {"_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": "m"},
    "loss": {"_component_": "torchtune.rlhf.loss.DPOLoss"},
    "dataset": {"_component_": "torchtune.datasets.stack_exchange_paired_dataset"},
    "dtype": "bf16",
}
UNSLOTH = {"model_name": "m", "max_seq_length": 512, "r": 16, "dataset_name": "d/x"}


@pytest.mark.parametrize(
    "config, key, value",
    [
        (TRL, "max_steps", "many"),
        (TRL, "lora_target_modules", 3),
        (TRL, "loss_type", [{}]),
        (FACTORY, "pref_ftx", "much"),
        (FACTORY, "dataset", 7),
        (AXOLOTL, "lora_alpha", [16]),
        (AXOLOTL, "rpo_alpha", "x"),  # a part takes it by itself
        (AXOLOTL, "plugins", True),
        (SWIFT, "rlhf_type", ["dpo"]),
        (SWIFT, "split_dataset_ratio", "x"),
        (OPENRLHF, "save_steps", "x"),
        (OPENRLHF, "adam_betas", "0.9"),
        (TORCHTUNE, "max_steps_per_epoch", float("inf")),
        (TORCHTUNE, "metric_logger", {}),
        (UNSLOTH, "model_name", 7),
    ],
)
def test_a_value_that_no_code_has_in_mind(config, key, value):
    config = config | {"use_peft": True} if key == "lora_target_modules" else config
    draft = drafted(config | {key: value})
    assert {name for fate in draft.fates if fate.is_problem for name in fate.keys} == {key}
    assert all(text.startswith(f"{key}: ") for text in draft.problems)


def test_two_of_them_in_one_part():
    draft = drafted(OPENRLHF | {"lr_warmup_ratio": "x", "min_lr_ratio": "y"})
    assert draft.problems == [
        "lr_warmup_ratio x, min_lr_ratio y: not all are values that the keys can have; mend or remove them"
    ]


def test_a_new_name_without_a_value_hides_no_old_one():
    assert drafted(FACTORY | {"dpo_beta": 0.3, "pref_beta": None}).ours["beta"] == 0.3


@pytest.mark.parametrize(
    "config, key, value",
    [
        (TRL, "dataset_test_split", "test"),
        (FACTORY, "quantization_method", "bnb"),
        (AXOLOTL, "cpo_alpha", 0.5),
        (SWIFT, "simpo_gamma", 0.5),
        (SWIFT, "use_hf", True),
        (UNSLOTH, "save_strategy", "steps"),
    ],
)
def test_no_key_is_lost(config, key, value):
    assert (
        f"{key} {str(value).replace('True', 'true')}: read with the rest of the config"
        in drafted(config | {key: value}).notes
    )


@pytest.mark.parametrize(
    "config, older, newer",
    [
        (FACTORY, {"kto_beta": 0.2}, {"dpo_beta": 0.3}),
        (FACTORY, {"dpo_beta": 0.2}, {"pref_beta": 0.3}),
        (SWIFT, {"sft_type": "lora"}, {"tuner_type": "full"}),
        (OPENRLHF, {"nll_loss_coef": 0.1}, {"model.nll_loss_coef": 0.2}),
    ],
)
def test_what_is_said_by_two_names(config, older, newer):
    draft = drafted(config | older | newer)
    ((old, value),), (new,) = older.items(), newer
    assert draft.problems == [f"{old}: {value}: {new} says the same, remove one of the two"]
    assert [fate.keys for fate in draft.fates if fate.is_problem] == [(old,)]


def test_keys_with_one_fate_are_told_together():
    notes = drafted(TRL | {"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.2]}).notes
    assert (
        "loss_type ['sigmoid', 'sft'], loss_weights [1, 0.2] -> objective {'sigmoid': 1.0, 'sft': 0.2}"
        in notes
    )


def test_null_switches_off():
    for config in (TRL, FACTORY, SWIFT):
        assert drafted(config | {"max_grad_norm": None}).ours["max_grad_norm"] == 0
    assert "max_grad_norm" not in drafted(AXOLOTL | {"max_grad_norm": None}).ours  # it hands no null on
    assert drafted(TRL | {"max_length": None}).problems == [
        "max_length: null: TRL cuts no row then; give the longest row in tokens"
    ]


@pytest.mark.parametrize(
    "config, steps, ratio, ours",
    [(TRL, 0, 0.1, 0.1), (TRL, 5, 0.1, 5), (TRL, 0, None, 0), (AXOLOTL, 0, 0.1, 0), (AXOLOTL, 5, 0.1, 5)],
)
def test_warm_up_said_twice(config, steps, ratio, ours):
    assert drafted(config | {"warmup_steps": steps, "warmup_ratio": ratio}).ours["warmup_steps"] == ours


def test_axolotl_reads_some_keys_of_rl_dpo_alone():
    said = {"dpo_loss_type": ["hinge"], "dpo_loss_weights": [0.5], "dpo_label_smoothing": 0.1}
    said |= {"dpo_use_weighting": True}
    ours = drafted(AXOLOTL | said | {"dpo_loss_type": ["sigmoid"]}).ours
    assert ours["label_smoothing"] == 0.1 and ours["objective"] == {"sigmoid": 0.5}
    for rl, objective in (("ipo", "ipo"), ("simpo", {"simpo": 1.0, "sft": 1.0}), ("orpo", "orpo")):
        draft = drafted(AXOLOTL | said | {"rl": rl})
        assert not draft.problems and draft.ours["objective"] == objective
        assert "label_smoothing" not in draft.ours
        assert f"dpo_loss_type ['hinge']: left out, rl {rl} does not read it" in draft.notes
        assert any("in TRL's ORPO" in note for note in draft.notes) == (rl == "orpo")


def test_a_likelihood_that_is_said_twice_counts_twice():
    trl = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.2], "rpo_alpha": 0.5}
    axolotl = {"dpo_loss_type": ["sigmoid", "sft"], "dpo_loss_weights": [1, 0.2], "rpo_alpha": 0.5}
    for values in (TRL | trl, AXOLOTL | axolotl):
        assert drafted(values).ours["objective"] == {"sigmoid": 1.0, "sft": 0.7}


def test_axolotls_own_warm_up():
    text = "check: warmup_ratio 0.03 (Axolotl's default): Axolotl's default ends after 100 steps"
    assert any(note.startswith(text) for note in drafted(AXOLOTL).notes)
    for given in ({"warmup_steps": 0}, {"warmup_ratio": 0.03}):
        assert not any(text[:20] in note for note in drafted(AXOLOTL | given).notes)


def test_openrlhf_names_its_own_keys():
    notes = drafted(OPENRLHF | {"nll_loss_coef": 0.2}).notes
    assert "nll_loss_coef 0.2 -> objective_args {'rpo_alpha': 0.2}" in notes


def test_axolotl_cuts_at_512_by_itself():
    assert drafted(AXOLOTL).ours["max_length"] == 512


def test_torchtune_takes_a_folder_and_a_split_of_its_own_sets():
    def data(**more):
        return drafted(TORCHTUNE | {"dataset": TORCHTUNE["dataset"] | more}).ours["data"]

    own = "lvwerra/stack-exchange-paired"
    assert data() == data(source=own) == f"{own}:data/rl"
    assert data(split="train[:9]") == f"{own}:data/rl#train[:9]"
    helpful = {"_component_": "torchtune.datasets.hh_rlhf_helpful_dataset", "name": "c"}
    assert data(**helpful) == "RLHFlow/HH-RLHF-Helpful-standard:c"


def test_torchtune_has_gamma_of_rso_alone():
    assert drafted(TORCHTUNE | {"loss": TORCHTUNE["loss"] | {"gamma": 0.3}}).problems
    rso = {"_component_": "torchtune.rlhf.loss.RSOLoss", "gamma": 0.3}
    ours = drafted(TORCHTUNE | {"loss": rso}).ours
    assert ours["beta"] == 0.3 and ours["objective"] == "hinge"
    assert ours["learning_rate"] == 1e-3  # torch's, which the config does not give
