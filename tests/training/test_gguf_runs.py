"""A GGUF file through the commands: trained whole and by a LoRA, stopped and gone on with, planned, merged,
and told in the card; and its reference is that of the folder with the same weights."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, GgufConfig

from fastdpo.api import fill_reference
from fastdpo.api import train as run
from fastdpo.config.keys import Config
from fastdpo.errors import ConfigError
from fastdpo.model.loading import load_policy
from fastdpo.planning.command import plan
from fastdpo.publish.merge import merge
from fastdpo.reference.fingerprint import reference_fingerprint
from tests import tiny
from tests.ggufs import save_gguf
from tests.training.test_resume import stopped_in_step

QUIET = Console(quiet=True)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Of a run on models/tiny.gguf in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastdpo.api.write_report", lambda *args, **keys: None)
    Path("models").mkdir()
    save_gguf("models/tiny.gguf")
    keys = dict(batch_size=4, max_steps=2, max_length=64, dtype="fp32", samples=0, learning_rate=1e-2)
    keys |= dict(data=tiny.write_jsonl(Path("rows.jsonl"), tiny.rows(8)), output_dir="run")
    return Config(model="models:tiny.gguf", **keys)


def theirs():
    plain = GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        "models", gguf_file="tiny.gguf", quantization_config=plain, dtype=torch.float32
    )


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def test_whole_and_after_a_stop(config):
    run(replace(config, save_steps=1), QUIET)
    expected, start = weights("run/model"), theirs().state_dict()
    assert not any(torch.equal(value, start[name]) for name, value in expected.items() if "proj" in name)
    cut = replace(config, save_steps=1, output_dir="cut")
    with stopped_in_step(1):
        run(cut, QUIET)
    run(replace(cut, model="models/tiny.gguf", resume=True), QUIET)
    assert same(weights("cut/model"), expected)
    assert "`tiny.gguf` (dequantised), trained with" in Path("run/model/README.md").read_text()


def test_a_lora_is_merged_and_trained_on(config):
    run(replace(config, lora_rank=2), QUIET)
    base = json.loads(Path("run/model/adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == "models/tiny.gguf"
    card = Path("run/model/README.md").read_text()
    assert 'from_pretrained("models", gguf_file="tiny.gguf", quantization_config=plain)' in card
    assert "`tiny.gguf` (dequantised) and a LoRA of rank 2" in card and "vllm serve" not in card
    merged, start = weights(merge("run", console=QUIET)), theirs().state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in merged.items())
    assert merged["lm_head.weight"].dtype == torch.float32
    policy = load_policy(replace(config, model="run/model"), QUIET)
    ids = torch.randint(3, 300, (1, 16))
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained("run-merged")(ids).logits
        torch.testing.assert_close(ours, policy.model(ids).logits, rtol=0, atol=1e-4)
    run(replace(config, model="run/model", output_dir="more"), QUIET)
    assert json.loads(Path("more/model/adapter_config.json").read_text())["base_model_name_or_path"] == base


def test_its_reference_is_that_of_its_weights(config):
    theirs().save_pretrained("folder")
    tiny.tokenizer().save_pretrained("folder")
    names = {
        reference_fingerprint(load_policy(replace(config, model=model), QUIET), False).namespace
        for model in ("models:tiny.gguf", "folder")
    }
    assert len(names) == 1
    said = io.StringIO()
    fill_reference(replace(config, reference_cache="c.sqlite"), QUIET)
    fill_reference(
        replace(config, reference_cache="c.sqlite", model="folder"), Console(file=said, width=1000)
    )
    assert "16 of 16 responses found" in said.getvalue()


def test_it_is_planned_as_its_weights_are(config):
    theirs().save_pretrained("folder")
    tiny.tokenizer().save_pretrained("folder")
    plans = []
    for model in ("models/tiny.gguf", "folder"):
        said = Console(file=io.StringIO(), width=200)
        assert plan(replace(config, model=model), "RTX 4090", "cuda", said)
        plans.append(said.file.getvalue().splitlines())
    assert plans[0][-5:] == plans[1][-5:] and any("Predicted peak" in line for line in plans[0])


def test_a_run_does_not_replace_its_model(config):
    run(config, QUIET)
    save_gguf("run/model/tiny.gguf")
    text = "the run would replace model: .*run/model/tiny.gguf"
    with pytest.raises(ConfigError, match=text):
        run(replace(config, model="run/model:tiny.gguf", overwrite=True), QUIET)
