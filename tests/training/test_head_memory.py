"""What the lm_head may take where head_memory names nothing: the head's own default, within a share of what
is free on the card, and of a run that goes on what it began with."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from fastdpo_kernels import default_budget
from rich.console import Console

from fastdpo.config.keys import Config
from fastdpo.files import durable
from fastdpo.model.lm_head import within_free_memory
from fastdpo.model.loading import load_policy
from fastdpo.model.policy import Policy
from fastdpo.model.spec import ModelSpec
from fastdpo.planning.fake_model import head_policy, with_head_memory
from fastdpo.planning.target import CONTEXT, Target
from fastdpo.training import checkpoint
from tests.tiny import save_model
from tests.training.test_resume import inputs, make, no_report, outcome, run, stopped_in_step  # noqa: F401

GIB = 1 << 30


def test_a_quarter_of_what_is_free():
    assert within_free_memory(GIB, None) == GIB  # a CPU
    assert within_free_memory(GIB, 4 * GIB) == GIB
    assert within_free_memory(GIB, 4 * GIB - 4) == 3 * GIB // 4  # whole steps of 256 MiB
    assert within_free_memory(8 * GIB, 10 * GIB) == 5 * GIB // 2
    assert within_free_memory(GIB, GIB // 2) == within_free_memory(GIB, 0) == 64 << 20


def test_a_loaded_policy_knows_its_budget(tmp_path, monkeypatch):
    spec = ModelSpec(model=save_model(tmp_path / "model"), dtype="fp32", max_length=32)
    policy = load_policy(spec, Console(quiet=True))
    V, D = policy.core.get_output_embeddings().weight.shape
    assert policy.head_budget == default_budget(V, D, True) == (512 << 20) + 4 * V * D
    frozen = load_policy(replace(spec, lora_rank=2), Console(quiet=True))
    assert frozen.head_budget == 512 << 20
    monkeypatch.setattr(Policy, "free_memory", lambda self: GIB + 1)
    assert load_policy(spec, Console(quiet=True)).head_budget == 256 << 20
    assert load_policy(replace(spec, head_memory="1GiB"), Console(quiet=True)).head_budget == GIB


def budgets(keys, memory, layers=16):
    """(of head_policy, of a run's config as planned) for Llama-3.2-1B's shape."""
    from transformers import LlamaConfig

    sizes = dict(hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8)
    c = LlamaConfig(vocab_size=128256, num_hidden_layers=layers, tie_word_embeddings=True, **sizes)
    config = Config(model="m", data="d", output_dir="o", **keys)
    target = Target(capability=(9, 0), memory=memory)
    return head_policy(config, c, target), with_head_memory(config, c, target).head_memory


def test_a_plan_counts_what_the_loaded_model_leaves_free():
    weights, whole = 4 * 1_235_814_400, 8 * 128256 * 2048
    policy, planned = budgets({}, 80 * GIB)
    assert policy.head_budget == whole and planned == f"{whole}B"
    policy, planned = budgets({}, 12 * GIB)
    assert policy.loaded == weights
    assert policy.head_budget == (12 * GIB - CONTEXT - weights) // 4 // (256 << 20) * (256 << 20) < whole
    assert policy.max_scored == policy.head_budget // 2 // (2 * 128256)
    lora, _ = budgets({"lora_rank": 4}, 12 * GIB)
    assert lora.loaded == weights // 2 and lora.head_budget == 512 << 20
    in_4bit, _ = budgets({"lora_rank": 4, "load_in_4bit": True}, 12 * GIB)
    assert 0.3 * weights / 2 < in_4bit.loaded < 0.6 * weights / 2
    assert budgets({}, None)[0].head_budget == whole
    assert budgets({"head_memory": "300MiB"}, 80 * GIB)[1] == f"{300 << 20}B"


@pytest.fixture
def free(monkeypatch):
    """Sets what a policy finds by itself."""
    return lambda size: monkeypatch.setattr(Policy, "default_budget", lambda self: size)


def states(config):
    paths = checkpoint.found(Path(config.output_dir) / "checkpoints")
    return [json.loads((path / "state.json").read_text())["state"]["head_budget"] for path in paths]


def test_a_resumed_run_keeps_it(make, free):  # noqa: F811
    """With as much free memory as there may be now, and without it another run."""
    whole, cut, other = make("whole"), make("cut"), make("other")
    free(12_000)
    assert "a microbatch ends at" in run(whole)
    with stopped_in_step(3):
        run(cut)
    free(80_000)
    run(replace(cut, resume=True))
    assert outcome(cut) == outcome(whole) and set(states(cut)) == {12_000}
    run(other)
    assert outcome(other)[1] != outcome(whole)[1] and set(states(other)) == {80_000}


def test_a_checkpoint_from_before_it_was_kept(make, free):  # noqa: F811
    """Its config names the default of then."""
    whole, cut = make("whole"), make("cut")
    free(12_000)
    run(whole)
    with stopped_in_step(3):
        run(cut)
    for path in checkpoint.found(Path(cut.output_dir) / "checkpoints"):
        state = json.loads((path / "state.json").read_text())["state"]
        del state["head_budget"]
        state["config"]["head_memory"] = "12000B"
        text = json.dumps({"digest": durable.json_digest(state), "state": state})
        (path / "state.json").write_text(text)
    free(80_000)
    run(replace(cut, resume=True))
    assert outcome(cut) == outcome(whole)


def test_a_named_one_is_taken_at_resume_too(make, free):  # noqa: F811
    config = make("run")
    free(12_000)
    with stopped_in_step(3):
        run(config)
    run(replace(config, resume=True, head_memory="80kB"))
    assert states(config)[-1] == 80_000
