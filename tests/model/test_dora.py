"""DoRA, rsLoRA, and adapters on the lm_head and the embeddings: exact on shared prompts and after saving."""

import io
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from torch.utils.checkpoint import CheckpointPolicy
from transformers import AutoModelForCausalLM

from fastdpo.config.keys import Config
from fastdpo.data.packing import pack
from fastdpo.errors import ConfigError
from fastdpo.model import activations
from fastdpo.model.loading import load_policy
from fastdpo.model.saving import save_model
from fastdpo.model.support import prepare
from tests import tiny
from tests.model.test_adapter import logps
from tests.model.test_shared_prompt import assert_gradients_close, gradients, separate
from tests.rounding import model_ulps
from tests.training.test_trainer import QUIET, Run

ENDS = ["q_proj", "lm_head", "embed_tokens"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{tied or not: a model folder}"""
    folder = tmp_path_factory.mktemp("bases")
    return {tie: tiny.save_model(folder / str(tie), tie_word_embeddings=tie) for tie in (False, True)}


def load(base, **keys):
    """(the policy, what was printed)"""
    console = Console(file=io.StringIO(), width=10**4)
    keys = dict(lora_rank=4, max_length=64, dtype="fp32") | keys
    return load_policy(Config(model=base, data="x", **keys), console), console.file.getvalue()


def learn(policy):
    torch.manual_seed(1)
    for parameter in policy.trained():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return policy


KINDS = {
    "dora": dict(use_dora=True),
    "dora and rslora": dict(use_dora=True, use_rslora=True),
    "dora on embeddings": dict(use_dora=True, lora_target_modules=["q_proj", "embed_tokens"]),
    "rslora": dict(use_rslora=True),
    "ends": dict(lora_target_modules=ENDS),
    "head": dict(lora_target_modules=["lm_head"]),
}


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_shared_prompts_are_exact_and_saved_as_peft_reads_it(bases, tmp_path, kind, tie):
    """Log-probs and gradients against the model's own logits, and against what plain peft makes of the
    saved folder: the head sees what generation will."""
    policy, groups = learn(load(bases[tie], **KINDS[kind])[0]), tiny.groups()
    upstream = torch.randn(sum(g.scored_tokens for g in groups))
    logp, grads = separate(policy, groups, upstream)
    prepare(policy, groups, QUIET)
    assert policy.share
    ours = policy.token_logp(pack(groups))
    torch.testing.assert_close(ours, logp, rtol=0, atol=model_ulps(logp))
    (ours * upstream).sum().backward()
    assert_gradients_close(gradients(policy.model), grads, 1e-5)
    assert len(grads) == len(policy.trained())
    save_model(policy, tiny.tokenizer(), tmp_path / "saved")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases[tie]), tmp_path / "saved")
    theirs = logps(theirs.eval(), groups)
    torch.testing.assert_close(theirs, ours.detach(), rtol=0, atol=model_ulps(ours))


def test_its_settings_reach_peft(bases):
    lora = load(bases[False], use_dora=True, use_rslora=True, lora_alpha=6)[0].model.peft_config["default"]
    assert (lora.use_dora, lora.use_rslora, lora.lora_alpha, lora.r) == (True, True, 6, 4)
    lora = load(bases[False])[0].model.peft_config["default"]
    assert (lora.use_dora, lora.use_rslora) == (False, False)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "embed_tokens"]], ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_fresh_dora_changes_nothing_at_all(bases, dtype, targets):
    policy, _ = load(bases[False], use_dora=True, dtype=dtype, lora_target_modules=targets)
    batch = pack(tiny.groups(), policy.share)
    with policy.model.disable_adapter():
        reference = policy.token_logp(batch)
    assert torch.equal(policy.token_logp(batch), reference)


def test_plain_peft_starts_elsewhere_in_bf16(bases):
    """Else the test above would show nothing: there the norms of fresh weights are rounded."""
    model = AutoModelForCausalLM.from_pretrained(bases[False], dtype=torch.bfloat16)
    lora = LoraConfig(r=4, target_modules="all-linear", use_dora=True)
    model, ids = get_peft_model(model, lora), torch.arange(3, 50)[None]
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        fresh = model(ids).logits
        with model.disable_adapter():
            assert not torch.equal(model(ids).logits, fresh)


def test_the_norm_moves_in_bf16_as_in_fp32(bases):
    """A change of the weights that bf16 would round away from their norms."""
    out = {}
    for dtype in ("fp32", "bf16"):
        policy, _ = load(bases[False], use_dora=True, dtype=dtype)
        layer = policy.core.model.layers[0].self_attn.q_proj.lora_magnitude_vector["default"]
        weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
        change = 1e-3 * weight
        with policy.autocast():
            out[dtype] = layer.get_weight_norm(weight, lora_weight=change, scaling=1.0)
        truth = (weight.double() + change.double()).norm(dim=1)
        torch.testing.assert_close(out[dtype].double(), truth, rtol=1e-6, atol=0)
        assert not torch.equal(out[dtype], weight.float().norm(dim=1))


def test_dora_of_others_gets_the_same_norms(bases, tmp_path):
    save_model(learn(load(bases[False], use_dora=True)[0]), tiny.tokenizer(), tmp_path)
    before = {n: p.clone() for n, p in load(bases[False], use_dora=True)[0].model.named_parameters()}
    policy, _ = load(bases[False], adapter=str(tmp_path), lora_rank=None)
    moved = [
        n for n, p in policy.model.named_parameters() if "magnitude" in n and not torch.equal(p, before[n])
    ]
    assert len(moved) == 14  # a start that was learnt is kept
    layer = policy.core.model.layers[0].self_attn.q_proj.lora_magnitude_vector["default"]
    assert layer.get_weight_norm(torch.ones(2, 4).bfloat16(), torch.zeros(2, 4), 1.0).dtype == torch.float32


def test_selective_checkpointing_keeps_no_product_of_weights(bases, monkeypatch):
    """The norm needs B A, as large as the weight, in each layer: kept, these would be the model once more."""
    policy, _ = load(bases[False], use_dora=True, gradient_checkpointing="selective")
    batch, kept, policy_of = pack(tiny.groups(), share=True), [], activations._policy
    policy.set_sharing(True)

    def spy(context, op, *args, **kwargs):
        said = policy_of(context, op, *args, **kwargs)
        if said == CheckpointPolicy.MUST_SAVE and op is torch.ops.aten.mm.default:
            kept.append(len(args[0]))
        return said

    monkeypatch.setattr(activations, "_policy", spy)
    activations.set_up_activations(
        policy.model, Config(model="m", data="x", gradient_checkpointing="selective")
    )
    policy.token_logp(batch).sum().backward()
    assert len(kept) >= 2 * 7 * 3 and set(kept) == {batch.input_ids.numel()}


def saved_names(policy, folder):
    save_model(policy, tiny.tokenizer(), folder)
    return load_file(folder / "adapter_model.safetensors").keys()


def test_an_adapter_holds_no_weight_of_its_base(bases, tmp_path):
    """peft would add the whole embeddings and lm_head, and load them over those of the base."""
    names = saved_names(load(bases[False], lora_target_modules=ENDS)[0], tmp_path / "fresh")
    assert len(names) == 2 * (2 + 2) and all(".lora_" in name for name in names)
    again = load(bases[False], adapter=str(tmp_path / "fresh"), lora_rank=None)[0]
    assert saved_names(again, tmp_path / "again") == names


def test_embeddings_that_an_adapter_brought_stay_in_it(bases, tmp_path):
    lora = LoraConfig(r=4, target_modules=ENDS, task_type="CAUSAL_LM")
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(bases[False]), lora)
    theirs.get_input_embeddings().base_layer.weight.data.mul_(2)
    theirs.save_pretrained(tmp_path / "theirs")
    policy = load(bases[False], adapter=str(tmp_path / "theirs"), lora_rank=None)[0]
    torch.testing.assert_close(logps(policy.model, tiny.groups()), logps(theirs, tiny.groups()))
    assert any(".embed_tokens.base_layer." in name for name in saved_names(policy, tmp_path / "ours"))


def test_dora_on_the_lm_head_is_refused(bases):
    with pytest.raises(ConfigError, match=r"use_dora: the lm_head cannot have it.* lora_target_modules"):
        load(bases[False], use_dora=True, lora_target_modules=["q_proj", "lm_head"])


@pytest.mark.filterwarnings("error:Model has `tie_word_embeddings=True`")  # said once, by us
def test_an_adapter_on_a_tied_end_is_said(bases):
    said = lambda tie, *targets: load(bases[tie], lora_target_modules=["q_proj", *targets])[1]
    assert "the LoRA on its lm_head sets them apart; `fastdpo merge`" in said(True, "lm_head")
    assert "the LoRA on its lm_head and embeddings sets" in said(True, "lm_head", "embed_tokens")
    assert "one weight" not in said(True) + said(False, "lm_head", "embed_tokens")


def test_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr("fastdpo.api.write_report", lambda *args, **keys: None)
    keys = dict(use_dora=True, use_rslora=True, learning_rate=1e-2, max_steps=10)
    run = Run(tmp_path, lora_rank=4, **keys)
    assert run.evals[0]["eval_rewards/margins"] == 0
    assert run.evals[-1]["eval_rewards/margins"] > 0.05
    settings = json.loads(Path(run.folder, "model/adapter_config.json").read_text())
    assert settings["use_dora"] and settings["use_rslora"]
    plain = Run(tmp_path, "plain", lora_rank=4, **(keys | dict(use_dora=False, use_rslora=False)))
    assert (run.losses - plain.losses).abs().max() > 1e-3
    assert '"misses": 0' in (plain.folder / "events.jsonl").read_text()  # one reference for both
