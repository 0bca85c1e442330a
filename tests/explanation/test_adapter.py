"""An adapter's model before is the model itself, its adapter off: one load, no merge, the same numbers."""

import pytest
from peft import AutoPeftModelForCausalLM
from peft.tuners.lora.layer import LoraLayer

from fastdpo.explanation import models
from tests import tiny


def close(ours, theirs, near, path=""):
    """Two results are the same but for rounding."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), path
        for key in ours:
            close(ours[key], theirs[key], near, f"{path}/{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), path
        for i, both in enumerate(zip(ours, theirs)):
            close(*both, near, f"{path}/{i}")
    elif isinstance(ours, float):
        assert theirs == pytest.approx(ours, rel=near, abs=near), path
    else:
        assert ours == theirs, path


@pytest.fixture(scope="module")
def of_lora(place):
    return place.kept("lora", causes=30)[0]


def test_an_adapter_is_loaded_once_and_never_merged(place, of_lora, monkeypatch):
    loads, load = [], models.loaded
    monkeypatch.setattr(models, "loaded", lambda model, *rest: loads.append(model) or load(model, *rest))
    for cls in (LoraLayer, *LoraLayer.__subclasses__()):
        if "merge" in vars(cls):
            monkeypatch.setattr(cls, "merge", lambda *_, **__: pytest.fail("it was merged"))
    again = place("lora", causes=2, random_sets=1)
    assert len(loads) == 1 and loads[0].name == str(place.folder / "lora")
    same = ("weights", "behaviour", "direction", "where", "neurons")
    assert all(again[part] == of_lora[part] for part in same)


def test_an_adapter_is_its_base_against_the_merged_model(place, of_lora):
    merged = AutoPeftModelForCausalLM.from_pretrained(place.folder / "lora/model").merge_and_unload()
    merged.save_pretrained(place.folder / "merged")
    tiny.tokenizer().save_pretrained(place.folder / "merged")
    found = place("model", "merged", data="rows.jsonl", max_length=64, causes=30)
    assert found["weights"]["kind"] == "whole" and of_lora["weights"]["kind"] == "lora"
    assert found["weights"]["relative"] == pytest.approx(of_lora["weights"]["relative"], rel=1e-4)
    for part in ("direction", "where", "neurons", "causes"):
        assert of_lora[part] is not None
        close(of_lora[part], found[part], 1e-4, part)
    tokens = [behaviour.pop("tokens") for behaviour in (of_lora["behaviour"] | {}, found["behaviour"] | {})]
    assert [one["token"] for one in tokens[0]] == [one["token"] for one in tokens[1]]
    close(of_lora["behaviour"]["numbers"], found["behaviour"]["numbers"], 1e-4)


def test_an_adapter_beside_another_whole_model(place, of_lora):
    """Either may be the adapter: nothing is said of the weights, and all else is."""
    for two in (("full", "lora"), ("lora", "full")):
        found = place(*two, data="rows.jsonl", max_length=64)
        assert "is an adapter that is not on the other" in found["weights"]["reason"]
        assert found["changed"] and found["where"]["exact"] < 1e-5 and found["neurons"]["gross"] > 0
