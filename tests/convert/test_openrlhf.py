"""OpenRLHF's flags and defaults, old and new, as ours; what is refused."""

from pathlib import Path

import pytest
import yaml

from fastdpo.config.keys import from_values
from fastdpo.convert.convert import recognise
from fastdpo.convert.tools.openrlhf import OPENRLHF

KNOWN = yaml.safe_load((Path(__file__).parent / "known/openrlhf.yaml").read_text(encoding="utf-8"))
LEAST = {"pretrain": "org/model", "dataset": "org/data", "max_len": 512}


def draft(**more):
    given = {key: value for key, value in (LEAST | more).items() if value is not None}
    assert recognise(given) is OPENRLHF
    return OPENRLHF.translate(given, whole=True)


def ours(**more):
    made = draft(**more)
    assert made.problems == []
    return made.ours


@pytest.mark.parametrize("version", KNOWN)
def test_every_flag_is_known_and_its_default_is_no_problem(version):
    keys = KNOWN[version] | {"pretrain": "org/model", "dataset": "org/data"}
    assert len(keys) > 55 and OPENRLHF.unknown(keys) == []
    made = OPENRLHF.translate({key: value for key, value in keys.items() if value is not None}, whole=True)
    assert made.problems == []
    assert made.ours["objective"] == ("kto" if version == "train_kto" else "sigmoid")
    assert made.ours["batch_size"] == 128 and made.ours["learning_rate"] == 1e-5
    without = OPENRLHF.translate(
        {"pretrain": "org/model", "dataset": "org/data", "label_key": None}, True
    ).ours
    differs = {"objective", "beta", "max_length", "data_format"} if version == "train_kto" else set()
    assert {key for key in without if made.ours.get(key) != without[key]} == differs


def test_what_is_left_out_has_its_default():
    assert ours(max_len=None) == {
        "model": "org/model",
        "data": "org/data",
        "data_format": {"chosen": "chosen", "rejected": "rejected"},
        "objective": "sigmoid",
        "beta": 0.1,
        "batch_size": 128,
        "num_epochs": 1,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "warmup_steps": 0.03,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "max_length": 512,
        "router_aux_loss_coef": 0.0,
    }


def test_both_names_of_a_flag_are_one():
    old = {"beta": 0.3, "learning_rate": 1e-6, "adam_betas": [0.8, 0.9], "train_batch_size": 4, "l2": 0.1}
    new = {"model.beta": 0.3, "adam.lr": 1e-6, "adam.betas": "0.8 0.9", "train.batch_size": 4}
    new |= {"adam.weight_decay": 0.1}
    assert ours(**old) == ours(**new)
    assert ours(**old)["adam_beta1"] == 0.8 and ours(**old)["batch_size"] == 4
    assert (
        "beta 0.3 -> beta 0.3" not in draft(**old).notes
        and "model.beta 0.3 -> beta 0.3" in draft(**new).notes
    )


@pytest.mark.parametrize(
    "more, objective, args",
    [
        ({"ipo": True}, "ipo_sum", None),
        ({"nll_loss_coef": 0.2}, "rpo", {"rpo_alpha": 0.2}),
        ({"model.nll_loss_coef": 0}, "sigmoid", None),
        (
            {"input_key": "q", "output_key": "a", "desirable_loss_weight": 2.0},
            "kto",
            {"desirable_weight": 2.0},
        ),
    ],
)
def test_losses(more, objective, args):
    made = ours(**more)
    assert (made["objective"], made.get("objective_args")) == (objective, args)
    assert made["beta"] == (0.01 if objective == "kto" else 0.1)
    made.pop("lr_scheduler_kwargs")
    from_values(made | {"lr_scheduler_type": "cosine"})


@pytest.mark.parametrize(
    "more, format",
    [
        ({"prompt_key": "q", "apply_chat_template": True}, {"prompt": "q"}),
        (
            {"prompt_key": "q", "input_template": "Q: {} A:"},
            {"prompt": "q", "prompt_format": "Q: {prompt} A:"},
        ),
        ({"prompt_key": "q", "input_template": "Q: {}", "apply_chat_template": True}, {"prompt": "q"}),
        ({"input_template": "Q: {}"}, {}),  # without prompt_key it is not read
    ],
)
def test_rows_of_pairs(more, format):
    assert ours(**more)["data_format"] == format | {"chosen": "chosen", "rejected": "rejected"}


def test_rows_of_judged_responses():
    text = {"prompt": "q", "completion": "a", "label": "l", "prompt_format": "User: {prompt}\nAssistant: "}
    assert ours(input_key="q", output_key="a", label_key="l")["data_format"] == text
    chat = ours(input_key="turns", apply_chat_template=True, input_template="")
    assert chat["data_format"] == {"messages": "turns", "label": "label"}


def test_data_sets():
    made = ours(dataset="a.jsonl, org/b", eval_dataset="org/c", **{"data.dataset_split": "good"})
    assert made["data"] == ["a.jsonl#good", "org/b#good"] and made["eval_data"] == "org/c#test"
    assert ours(max_samples=100)["data"] == "org/data#train[:100]"


def test_lora_and_trackers():
    assert "lora_alpha" not in ours(lora_rank=0, lora_alpha=8)
    made = ours(lora_rank=4, target_modules=["q_proj", "v_proj"])
    assert (made["lora_rank"], made["lora_alpha"]) == (4, 16.0)
    assert made["lora_target_modules"] == ["q_proj", "v_proj"]
    made = draft(use_wandb="a-token")
    assert made.ours["report_to"] == ["wandb"] and "a-token" not in "".join(made.notes)


def test_checks_say_what_a_config_cannot():
    notes = "\n".join(draft(apply_chat_template=True).notes)
    assert "a space and EOS" in notes and "beginning-of-text" not in notes
    assert "EOS at the end of a response that is cut" in notes
    notes = "\n".join(draft().notes)
    assert "beginning-of-text" in notes and "scores all of both texts" in notes


@pytest.mark.parametrize(
    "more, key",
    [
        ({"ref_pretrain": "org/other"}, "ref_pretrain: org/other"),
        ({"param_dtype": "fp16"}, "param_dtype: fp16"),
        ({"lora_dropout": 0.1}, "lora_dropout: 0.1"),
        ({"optim": "muon"}, "optim: muon"),
        ({"nll_loss_coef": 0.1, "ipo": True}, "nll_loss_coef: 0.1"),
        ({"dataset": "a,b", "dataset_probs": "0.5,0.5"}, "dataset_probs: 0.5,0.5"),
        ({"dataset": "a,b", "max_samples": 100}, "max_samples: 100"),
        ({"dataset": "org/data@part"}, "dataset: org/data@part"),
        ({"kl_loss_coef": 0.001}, "kl_loss_coef: 0.001: not a key that is known"),
    ],
)
def test_what_would_train_otherwise_is_refused(more, key):
    (problem,) = draft(**more).problems
    assert problem.startswith(key)
