"""Configs of TRL's trainers, of alignment-handbook and of SimPO: their mixtures, trainers and older keys."""

import pytest
import yaml

from fastdpo.convert.tools.trl import TRL as TOOL
from fastdpo.errors import ConfigError
from tests.convert.test_convert import TRL, ours_of
from tests.convert.translated import translate

PLAIN = {"model_name_or_path": "org/m", "dataset_name": "org/d", "beta": 0.2, "dataset_num_proc": 4}


def became(**keys):
    """(our keys, notes) of a whole config."""
    return translate(PLAIN | keys)


def problem(**keys):
    with pytest.raises(ConfigError) as caught:
        became(**keys)
    return str(caught.value)


@pytest.mark.peer
@pytest.mark.parametrize(
    "name",
    "DPOConfig KTOConfig ModelConfig ScriptArguments experimental.cpo.CPOConfig experimental.orpo.ORPOConfig "
    "scripts.utils.DatasetMixtureConfig".split(),
)
def test_every_key_of_trl_is_known_and_its_default_is_no_problem(name):
    """So a new key of TRL fails here before it is refused in a user's hands."""
    from dataclasses import MISSING, fields
    from importlib import import_module

    import trl

    module, _, kind = f"trl.{name}".rpartition(".")
    values = {}
    for f in fields(getattr(import_module(module), kind)):
        values[f.name] = f.default_factory() if f.default is MISSING else f.default
    draft = TOOL.translate(values, whole=True)
    assert draft.problems == [], f"TRL {trl.__version__}"


def test_lora_dropout_is_switched_off_by_trl_itself():
    lora = {"use_peft": True, "lora_dropout": 0.05, "lora_r": 8}
    ours, notes = became(**lora)
    assert ours["lora_rank"] == 8
    off = "lora_dropout 0.05: left out, TRL's disable_dropout, which is on, switches a LoRA's off, too"
    assert off in notes
    found = problem(**lora, disable_dropout=False)
    assert "lora_dropout: 0.05: fastdpo trains LoRA without dropout" in found
    assert "disable_dropout: false: fastdpo switches dropout off" in found


def test_modules_that_are_not_named_are_pefts_choice():
    assert became(use_peft=True)[0]["lora_target_modules"] == "peft"
    assert "lora_target_modules" not in became()[0]


def test_no_x_is_x_false():
    ours, notes = became(no_remove_unused_columns=True, no_gradient_checkpointing=True)
    assert "no_remove_unused_columns true: left out, it changes speed or memory only" in notes
    assert ours["gradient_checkpointing"] is False
    fates = TOOL.translate({"no_disable_dropout": True}, whole=False).fates
    assert fates[0].keys == ("no_disable_dropout",) and fates[0].is_problem
    for odd in ({"no_remove_unused_columns": False}, {"no_such": True}):
        assert "not a key that is known of TRL" in problem(**odd)


def of_mixture(entries, **more):
    return became(dataset_name=None, dataset_mixture={"datasets": entries} | more)


def test_a_mixture_of_data_sets():
    columns = ["chosen", "rejected", "messages"]
    one = {"id": "org/a", "config": "default", "split": "train_prefs", "columns": columns, "weight": 1.0}
    two = one | {"id": "org/b", "config": None, "split": None}
    ours, notes = of_mixture([one, two], test_split_size=2000, seed=0)
    assert ours["data"] == ["org/a:default#train_prefs", "org/b"]
    assert ours["eval_data"] == 2000
    assert ours["data_format"] == {"chosen": "chosen", "rejected": "rejected"}  # no other column is read
    assert of_mixture([two], test_split_size=0.1)[0].items() >= {"data": "org/b", "eval_data": 0.1}.items()
    assert any(note.startswith("dataset_mixture.seed 0: left out") for note in notes)


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"weight": 0.5}, "dataset_mixture.datasets.weight: 0.5 of org/b: it takes a random share"),
        ({"columns": ["prompt"]}, "dataset_mixture.datasets.columns: .*the same columns"),
        ({"streaming": True}, "dataset_mixture.datasets.streaming: true: it is not read"),
        ({"id": None}, "dataset_mixture: .*needs an id"),
    ],
)
def test_what_a_mixture_cannot_have(entry, message):
    whole = {"id": "org/b", "columns": ["chosen", "rejected"]}
    with pytest.raises(ConfigError, match=message):
        of_mixture([whole, whole | {"id": "org/b"} | entry])


def test_trls_own_list_of_data_sets():
    sets = [{"path": "org/a", "name": "en"}, {"path": "json", "data_files": "x.jsonl", "split": "train"}]
    ours, _ = became(dataset_name=None, datasets=sets, test_split_size=0.1, streaming=False)
    assert (ours["data"], ours["eval_data"]) == (["org/a:en", "x.jsonl"], 0.1)
    half = {"path": "org/a", "fraction": 0.5}
    assert "datasets.fraction: 0.5" in problem(dataset_name=None, datasets=[half, sets[0]])
    assert became(dataset_name=None, datasets=[half])[0]["data"] == "org/a"  # a share of itself
    assert "test_split_size: 1.5: a share" in problem(
        dataset_name=None, datasets=sets[:1], test_split_size=1.5
    )


def of_mixer(mixer, splits=("train_prefs", "test_prefs"), **more):
    return became(dataset_name=None, dataset_mixer=mixer, dataset_splits=list(splits), **more)[0]


def test_what_a_mixture_is_read_in_place_of():
    ours, notes = became(dataset_mixer={"org/a": 1.0}, datasets=[{"path": "org/b"}])
    assert ours["data"] == "org/a"
    for what in ("datasets [{'path': 'org/b'}]", "dataset_name org/d"):
        assert f"check: {what}: left out, dataset_mixer says what is read" in notes


def test_an_older_mixture():
    ours = of_mixer({"org/a": 1.0, "org/b": 0.5}, dataset_configs=["en", None], eval_strategy="steps")
    assert ours["data"] == ["org/a:en#train_prefs", "org/b#train_prefs[:50%]"]
    assert ours["eval_data"] == ["org/a:en#test_prefs", "org/b#test_prefs"]
    assert "eval_data" not in of_mixer({"org/a": 1}, eval_strategy="no", do_eval="no")
    assert of_mixer({"org/a": 1}, do_eval=True)["eval_data"] == "org/a#test_prefs"
    for mixer, splits, message in (
        ({"org/a": 0.333}, ["train"], "dataset_mixer: .*whole hundredths"),
        ({"org/a": 1}, ["train", "train_more"], "dataset_splits: .*one split with train"),
    ):
        with pytest.raises(ConfigError, match=message):
            of_mixer(mixer, splits)
    with pytest.raises(ConfigError, match=r"dataset_configs: .*one for each"):
        of_mixer({"org/a": 1}, dataset_configs=["en", "fr"])


@pytest.mark.parametrize(
    "keys, objective, args",
    [
        ({"hub_model_id": "zephyr-orpo-141b"}, "orpo", None),
        ({"output_dir": "out/kto-lora", "dataset_name": "org/dpo-rows"}, "kto", None),  # rows have any name
        ({"output_dir": "out/1", "dataset_name": "org/kto-mix"}, "kto", None),
        ({"output_dir": "orpo-then-dpo"}, "sigmoid", None),
        ({"output_dir": "orpo-or-kto"}, "sigmoid", None),
        ({"output_dir": "corporation"}, "sigmoid", None),  # only whole words count
        ({"output_dir": "kto", "loss_type": "sigmoid"}, "sigmoid", None),
        ({"undesirable_weight": 0.5}, "kto", {"undesirable_weight": 0.5}),
        ({"loss_type": "apo_zero_unpaired"}, "apo_zero_unpaired", None),
        ({"loss_type": "sigmoid", "cpo_alpha": 0.5}, "cpo", {"cpo_alpha": 0.5}),
        ({"cpo_alpha": 0}, "cpo", {"cpo_alpha": 0}),  # ours is 1
        ({"loss_type": "simpo", "cpo_alpha": 0, "simpo_gamma": 1.0}, "simpo", {"simpo_gamma": 1.0}),
    ],
)
def test_which_trainer_a_config_is_for(keys, objective, args):
    ours, notes = became(**keys)
    assert (ours["objective"], ours.get("objective_args"), ours["beta"]) == (objective, args, 0.2)
    by_name = "loss_type" not in keys and objective in ("orpo", "kto") and not args
    assert by_name == any("only its name says which trainer" in note for note in notes)


def test_losses_that_trl_has_not():
    assert "loss_type: rpo: no loss of TRL's trainers" in problem(loss_type="rpo")
    assert "loss_type: kto_pair" in problem(loss_type=["sigmoid", "kto_pair"])
    assert translate({"model": "m", "loss_type": "rpo"})[0]["objective"] == "rpo"  # a config of ours
    assert "cpo_alpha: 0.5: of CPOTrainer's losses" in problem(loss_type="hinge", cpo_alpha=0.5)


def test_simpos_own_trainer():
    ours, _ = became(beta=10, gamma_beta_ratio=0.3)
    assert (ours["objective"], ours["beta"]) == ("simpo", 10)
    assert ours["objective_args"] == {"simpo_gamma": pytest.approx(3)}
    ours, _ = became(beta=None, gamma_beta_ratio=0.5, sft_weight=0.2)
    assert (ours["objective"], ours["beta"]) == ({"simpo": 1.0, "sft": 0.2}, 2)
    assert ours["objective_args"] == {"simpo_gamma": 1}
    assert "of SimPO's losses fastdpo has sigmoid" in problem(gamma_beta_ratio=0.5, loss_type="hinge")


def test_lengths_of_older_trl():
    ours, notes = became(max_prompt_length=512, max_completion_length=None)
    assert ours["truncation"] == "keep_end"
    assert [note for note in notes if note.startswith("check: max_prompt_length 512: left out, rows are cut")]
    assert became(max_prompt_length=512, truncation_mode="keep_start")[0]["truncation"] == "keep_start"
    assert "truncation" not in became(max_target_length=9)[0]
    assert "truncation" not in translate({"max_prompt_length": 512}, whole=False)[0]  # a flag


def test_where_a_run_is_uploaded_without_a_name():
    ours, _ = became(push_to_hub=True, output_dir="data/SmolLM3-DPO")
    assert ours["push_to_hub"] == "SmolLM3-DPO"  # as transformers does


def test_quantisation():
    _, notes = became(load_in_4bit=True, bnb_4bit_quant_type="nf4", use_bnb_nested_quant=False)
    assert any(note.startswith("check: use_bnb_nested_quant false: ") for note in notes)
    assert "bnb_4bit_quant_type: fp4" in problem(bnb_4bit_quant_type="fp4")


def test_trust_remote_code_is_a_note():
    assert yaml.safe_load(TRL)["model_name_or_path"] == ours_of(TRL, trust_remote_code=True)["model"]


def test_rows_in_order_are_ktos_default_alone():
    _, notes = became(loss_type="kto", train_sampling_strategy="sequential")
    assert any(note.startswith("check: train_sampling_strategy sequential: ") for note in notes)
    assert "train_sampling_strategy: sequential: rows are shuffled" in problem(
        train_sampling_strategy="sequential"
    )


@pytest.mark.parametrize("given", ["{% for m in messages %}{{ m.content }}{% endfor %}", "zephyr", "t.jinja"])
def test_a_chat_template_is_ours(given):
    """The handbook's configs have Jinja text; a name is our key's."""
    assert became(chat_template=given)[0]["chat_template"] == given
