"""What `fastdpo explain` says of bad input, each by its message; before any work, where that can be."""

import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from fastdpo.cli import main
from fastdpo.errors import ConfigError, DataError, ModelError
from fastdpo.explanation import explain as module
from fastdpo.explanation import models
from tests import images, tiny
from tests.explanation.runs import rows
from tests.explanation.test_written import as_run, names

UNPAIRED = [{"prompt": "a cat", "completion": " dog", "label": True}] * 3

BAD = {  # what is given -> (the error, what it says)
    "pairs": ({"pairs": 3}, ConfigError, "pairs: 3 is below 4"),
    "causes": ({"causes": -1}, ConfigError, "causes: -1 is below 0"),
    "random_sets": ({"random_sets": 0}, ConfigError, "random_sets: 0 is below 1"),
    "samples": ({"samples": 0}, ConfigError, "samples: 0 is below 1"),
    "max_new_tokens": ({"max_new_tokens": 0}, ConfigError, "max_new_tokens: 0 is below 1"),
    "direction": ({"direction": "left"}, ConfigError, "direction: 'left' is not one of up, down"),
    "groups": ({"groups": "v2"}, ConfigError, "groups: 'v2' is not one of v1, v3"),
    "text": ({"text": "mine"}, ConfigError, "text: 'mine' is not one of given, own"),
    "an unknown option": ({"probes": "pairs"}, ConfigError, "probes: explain has no such option; .*probe, "),
    "an option that is a place": ({"before": "model"}, ConfigError, "before: explain has no such option"),
    "match_length": (
        {"match_length": True, "probe": "labels.jsonl"},
        ConfigError,
        "match_length: it is of pairs, and the probe is of a file",
    ),
    "scorer without causes": ({"scorer": "length"}, ConfigError, "scorer: .* causes: 0 patches none"),
    "scorer": ({"scorer": "nothing", "causes": 1}, ModelError, "scorer: .*nothing"),
    "a probe that is not there": ({"probe": "none.jsonl"}, DataError, "probe: cannot read .*none.jsonl"),
    "a vector that is not there": ({"probe": "none.safetensors"}, ConfigError, "probe: cannot read .*none"),
    "a vector of another width": (
        {"probe": "wide.safetensors"},
        ConfigError,
        r"probe: v of .*wide.safetensors is of shape \[65\], the model's states are \[64\]",
    ),
    "a label that is none": ({"probe": "bad.jsonl"}, DataError, "probe: .*bad.jsonl, line 2 has no 'label'"),
    "rows": ({"data": "none.jsonl"}, DataError, "data: '.*none.jsonl' does not exist here"),
    "format": ({"data_format": "nothing"}, ConfigError, "data_format: 'nothing' is not one of"),
    "no pairs": ({"data": "unpaired.jsonl"}, ConfigError, "data: no row of it has a chosen and a rejected"),
}


@pytest.fixture(scope="module", autouse=True)
def bad_files(place):
    tiny.write_jsonl(place.folder / "unpaired.jsonl", UNPAIRED)
    tiny.write_jsonl(place.folder / "bad.jsonl", [{"text": "a", "label": 1}, {"text": "b"}])
    save_file({"v": torch.ones(65)}, place.folder / "wide.safetensors")
    tiny.write_jsonl(place.folder / "few.jsonl", rows(4, seed=2))


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr(models, "loaded", lambda *_: pytest.fail("weights were loaded"))


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_before_any_work(place, name, no_weights):
    keys, error, said = BAD[name]
    with pytest.raises(error, match=said):
        place("lora", output="bad", **keys)
    assert not (place.folder / "bad").exists()


def test_the_command_says_it_and_fails(place, capsys):
    assert main(["explain", str(place.folder / "lora"), "--causes", "-1"]) == 2
    said = capsys.readouterr()
    assert "causes: -1 is below 0" in said.err + said.out
    assert main(["explain", str(place.folder / "lora"), "--groups", "v2"]) != 0
    assert "v2" in "".join(capsys.readouterr())


# ---- models


@pytest.mark.parametrize(
    "sizes, said",
    [
        (
            {"intermediate_size": 80},
            r"layers\.0\.mlp\.gate_proj\.weight is \[96, 64\] in the one, \[80, 64\]",
        ),
        ({"num_hidden_layers": 1}, r"layers\.1\.\S+ is \[.*\] in the one, not there in the other"),
        ({"num_hidden_layers": 3}, r"layers\.2\.\S+ is not there in the one, \[.*\] in the other"),
        ({"attention_bias": True}, r"layers\.0\.self_attn\.q_proj\.bias is not there in the one, \[64\]"),
    ],
)
def test_models_of_other_shapes(place, tmp_path, no_weights, sizes, said):
    tiny.save_model(tmp_path / "other", **sizes)
    text = rf"model and .*other are not one model before and after training: .*{said}"
    with pytest.raises(ModelError, match=text):
        place("model", tmp_path / "other", data="rows.jsonl", max_length=64)


def test_a_model_of_another_family(place, no_weights):
    with pytest.raises(ModelError, match="not one model before and after training"):
        place("model", "gpt2/model", data="rows.jsonl", max_length=64)


def test_other_tokenizers(place, tmp_path, no_weights):
    shutil.copytree(place.folder / "model", tmp_path / "other")
    text = (tmp_path / "other/tokenizer.json").read_text()
    (tmp_path / "other/tokenizer.json").write_text(text.replace('"<|im_start|>"', '"<|begins|>"'))
    with pytest.raises(ConfigError, match=r"different tokenizers .token 1 is '<.im_start.>' in the one"):
        place(tmp_path / "other", "full", data="rows.jsonl")


def test_models_that_are_not_there(place, no_weights):
    with pytest.raises(ModelError, match=r"after: '.*nowhere/at/all' does not exist here"):
        place("nowhere/at/all", data="rows.jsonl")
    with pytest.raises(ModelError, match=r"before: '.*nowhere/at/all' does not exist here"):
        place("nowhere/at/all", "full", data="rows.jsonl")


def test_a_model_that_nobody_knows_the_start_of(place, no_weights):
    with pytest.raises(
        ConfigError, match=r"before: nothing here says what .*model was trained from; name both"
    ):
        place("model", data="rows.jsonl", max_length=64)


def test_a_start_that_has_gone(place, tmp_path, no_weights):
    run = tmp_path / "full"
    shutil.copytree(place.folder / "full", run)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(f"model: {place.full.start}", "model: gone/for/good"))
    with pytest.raises(ModelError, match=r"'gone/for/good'.*name both models.* BEFORE AFTER --data"):
        place(run)


@pytest.mark.parametrize("which", ["before", "after"])
def test_weights_that_are_no_numbers(place, tmp_path, which):
    name = "model.layers.1.mlp.up_proj.weight"
    model = AutoModelForCausalLM.from_pretrained(place.folder / "model")
    model.get_parameter(name).data[0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    tiny.tokenizer().save_pretrained(tmp_path / "nan")
    two = ("model", tmp_path / "nan") if which == "after" else (tmp_path / "nan", "model")
    with pytest.raises(ModelError, match=rf"{which}: {name} has entries that are not finite numbers"):
        place(*two, data="rows.jsonl", max_length=64, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- rows


def test_no_held_out_rows(place, tmp_path, no_weights):
    run = as_run(place, tmp_path / "run", eval_data=None)
    with pytest.raises(ConfigError, match=r"data: the run .*run held no rows out, .* by --data rows.jsonl"):
        place(run)
    with pytest.raises(ConfigError, match=r"data: .*full-alone is no run's, .* by --data rows.jsonl"):
        shutil.copytree(place.folder / "full/model", tmp_path / "full-alone")
        place("model", tmp_path / "full-alone", max_length=64)


def test_rows_with_images(place, tmp_path, no_weights):
    images.save(tmp_path / "vision", "llava")
    images.picture(1).save(tmp_path / "cat.png")
    some = [*rows(5), rows(1)[0] | {"images": ["cat.png"]}]
    data = tiny.write_jsonl(tmp_path / "images.jsonl", some)
    with pytest.raises(ConfigError, match=r"data: row 5 has an image, and .* reads none yet"):
        place(tmp_path / "vision", tmp_path / "vision", data=data, max_length=64)


def test_one_prompt_is_no_direction(place, tmp_path):
    tiny.write_jsonl(place.folder / "one.jsonl", [row | {"prompt": "a cat"} for row in rows(5)])
    with pytest.raises(ConfigError, match="probe: pairs of 1 prompts; half of them fit the direction"):
        place("lora", data="one.jsonl", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- a direction that tells nothing apart


def test_a_direction_no_better_than_chance(place, tmp_path):
    """Two prompts to test it on say nothing, whatever they say."""
    found = place("lora", data="few.jsonl", causes=2, output=tmp_path, page=True)
    direction, page = found["direction"], (tmp_path / "explain.html").read_text()
    assert not direction["found"] and not direction["forced"] and direction["interval"][0] < 0.5
    assert found["where"] is found["neurons"] is found["causes"] is None
    assert found["behaviour"]["numbers"]["margins"]["value"] and found["weights"]["relative"]
    assert "No direction found" in page and names(tmp_path) == {"explain.html", "explain.json"}
    for title in ("Where", "Neurons", "Causes"):
        assert f">{title}</h2>" not in page
    assert "recording" not in found["seconds"] and "causes" not in found["seconds"]


def test_it_goes_on_by_force(place, tmp_path):
    found = place("lora", data="few.jsonl", causes=2, output=tmp_path, force=True, page=True)
    direction, page = found["direction"], (tmp_path / "explain.html").read_text()
    assert not direction["found"] and direction["forced"]
    assert found["where"]["exact"] < 1e-5 and found["neurons"]["gross"] > 0 and found["causes"]["rows"]
    assert "as was asked" in page and ">Causes</h2>" in page


def test_labels_no_better_than_chance(place, tmp_path):
    texts = [{"text": row["prompt"], "label": i % 2} for i, row in enumerate(rows(24, seed=5))]
    tiny.write_jsonl(place.folder / "noise.jsonl", texts)
    found = place("lora", probe="noise.jsonl")
    assert found["direction"]["kind"] == "labels" and not found["direction"]["found"]
    assert found["neurons"] is None


def test_a_scorer_that_fails(place, tmp_path, no_weights):
    (tmp_path / "judge.py").write_text("def f(prompts, answers):\n    return [0.5] * 7\n")
    with pytest.raises(ConfigError, match="fails its first try"):
        place("lora", scorer=f"{tmp_path}/judge.py:f", causes=1)


def test_a_wrong_split_of_the_residual_is_told_before_anything_is_said_of_it(place, monkeypatch):
    """A model whose parts are not all known: its final residual is not their sum."""
    found = module.find_places

    def without_a_layer(policy):
        places = found(policy)
        return type(places)(places.layers[1:], places.first, places.norm, places.scale, places.experts)

    monkeypatch.setattr(module, "find_places", without_a_layer)
    with pytest.raises(ModelError, match="its final residual differs from the embedding plus its 2 parts"):
        place("lora")
