"""QLoRA: a frozen base in NF4 under a LoRA, on shared prompts, in the cache, in runs and in peft."""

import io
import json
import signal
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from fastdpo.api import train
from fastdpo.config.keys import Config
from fastdpo.data.packing import pack
from fastdpo.errors import Stopped
from fastdpo.model.loading import load_policy
from fastdpo.model.support import prepare
from fastdpo.reference.fingerprint import reference_fingerprint
from fastdpo.report.page import write_report
from fastdpo.training.samples import complete
from fastdpo.training.stage import Stage
from tests import tiny
from tests.model.test_shared_prompt import assert_gradients_close, gradients
from tests.rounding import is_tie, model_ulps
from tests.training.test_trainer import QUIET, Run

bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'fastdpo[quant]'")
NF4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr("fastdpo.api.write_report", lambda *args, **keys: None)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("base"), vocab_size=400)


def config_of(base, **keys):
    keys = dict(load_in_4bit=True, lora_rank=4, dtype="fp32") | keys
    return Config(model=base, data="x", max_length=64, **keys)


def load(base, **keys):
    """(the policy, what was printed)"""
    console = Console(file=io.StringIO(), width=10**4)
    return load_policy(config_of(base, **keys), console), console.file.getvalue()


def learn(policy):
    """Moves a LoRA away from its start, where it does nothing and most of its gradients are 0."""
    torch.manual_seed(1)
    for parameter in policy.trained():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return policy


def linears(model):
    return {
        n.replace(".base_layer", ""): m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)
    }


# ---- exactness


@pytest.fixture(scope="module")
def truth(base):
    """{dora or not: the LoRA's log-probs and gradients on separate rows, with full logits, of a model whose
    weights are the 4-bit ones written out}."""
    out = {}
    for dora in (False, True):
        policy = learn(load(base, use_dora=dora)[0])
        plain = AutoModelForCausalLM.from_pretrained(base)
        for name, module in linears(policy.core).items():
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert not torch.equal(weight, plain.get_submodule(name).weight)
            plain.get_submodule(name).weight.data = weight
        lora = LoraConfig(
            r=4, lora_alpha=8, target_modules="all-linear", use_dora=dora, task_type="CAUSAL_LM"
        )
        plain = get_peft_model(plain, lora)
        trained = dict(policy.model.named_parameters())
        for name, parameter in plain.named_parameters():
            if parameter.requires_grad:
                parameter.data = trained[name].data.clone()
        plain.train()
        logps = []
        for group in tiny.groups():
            for response in group.responses:
                ids = torch.tensor([[*group.prompt, *response.ids]])
                logp = plain(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
                logps.append(logp[len(group.prompt) - 1 :][torch.from_numpy(response.target_mask)])
        logp = torch.cat(logps)
        (logp * weights(logp)).sum().backward()
        out[dora] = logp.detach(), gradients(plain)
    return out


def weights(logp):
    return torch.linspace(-1, 1, len(logp))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_logps_and_gradients(base, truth, dora, checkpointing, share):
    policy = learn(load(base, use_dora=dora, gradient_checkpointing=checkpointing)[0])
    prepare(policy, tiny.groups(), QUIET)
    assert policy.share
    policy.set_sharing(share)
    logp = policy.token_logp(pack(tiny.groups(), share))
    torch.testing.assert_close(logp.detach(), truth[dora][0], rtol=0, atol=model_ulps(logp))
    (logp * weights(logp)).sum().backward()
    ours = gradients(policy.model)
    assert len(ours) == 14 * (3 if dora else 2) and all(grad.abs().max() > 0 for grad in ours.values())
    assert_gradients_close(ours, truth[dora][1], 1e-5)


def test_what_follows_a_dora_layer_stays_in_bf16(base, monkeypatch):
    """Where CUDA's autocast is on, which is what peft asks for, it hands on the sum of bf16 and fp32."""
    policy, _ = load(base, use_dora=True, dtype="bf16")
    layer = policy.core.model.layers[0].self_attn.q_proj
    with policy.autocast(), monkeypatch.context() as patch:  # autocast asks it too, when it begins and ends
        patch.setattr(torch, "is_autocast_enabled", lambda device=None: True)
        x = torch.randn(3, 64).bfloat16()
        assert layer(x).dtype == torch.bfloat16
        assert type(layer).forward(layer, x).dtype == torch.float32  # without our hook
    assert not torch.is_autocast_enabled("cpu")


def test_samples_leave_the_weights_as_they_are(base):
    """On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights in eval mode, for a kernel that rounds to
    bf16 and has no backward; the layers would stay like that in training."""
    policy, _ = load(base)
    tokenizer, groups = AutoTokenizer.from_pretrained(base), tiny.groups()
    before, logp = (
        reference_fingerprint(policy, True).namespace,
        policy.token_logp(pack(groups, policy.share)),
    )
    assert complete(policy, tokenizer, groups[:2], max_new_tokens=4, console=QUIET)
    assert reference_fingerprint(policy, True).namespace == before
    again = policy.token_logp(pack(groups, policy.share))
    assert torch.equal(again, logp)
    again.sum().backward()
    assert all(p.grad is not None for p in policy.trained())


# ---- runs


def events(run, kind):
    lines = (run.folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def test_a_whole_run(tmp_path):
    keys = dict(load_in_4bit=True, learning_rate=1e-2, max_steps=8, save_steps=4)
    run = Run(tmp_path, lora_rank=4, samples=2, **keys)
    assert run.evals[0]["eval_rewards/margins"] == 0
    assert is_tie(run.steps[0])
    assert run.evals[-1]["eval_rewards/margins"] > 0.05
    write_report(run.folder, ended=True)
    assert "<html" in (run.folder / "report.html").read_text()
    assert len((run.folder / "samples.jsonl").read_text().splitlines()) == 4  # none was lost to an error
    saved = load_file(run.folder / "checkpoints/step-8/weights.safetensors")
    assert saved and all("lora_" in name for name in saved)
    assert not (run.folder / "model/model.safetensors").exists()
    again = Run(tmp_path, "again", lora_rank=8, beta=0.3, **keys)
    (reference,) = events(again, "reference")
    assert reference["misses"] == 0 and reference["hits"] > 0
    whole = Run(tmp_path, "whole", lora_rank=4, **(keys | {"load_in_4bit": False}))
    assert events(whole, "reference")[0]["hits"] == 0
    assert (run.losses - whole.losses).abs().max() > 1e-4


def test_what_is_saved_loads_in_peft_on_either_base(tmp_path):
    run = Run(tmp_path, load_in_4bit=True, lora_rank=4, learning_rate=1e-2, max_steps=6)
    policy, _ = load(run.start, adapter=str(run.folder / "model"), lora_rank=None)
    groups = tiny.groups()
    ours = policy.token_logp(pack(groups, policy.share)).detach()
    for quantisation in (BitsAndBytesConfig(**NF4), None):
        theirs = AutoModelForCausalLM.from_pretrained(run.start, quantization_config=quantisation)
        theirs = PeftModel.from_pretrained(theirs, run.folder / "model").eval()
        ids = torch.tensor([[*groups[0].prompt, *groups[0].responses[0].ids]])
        for module in linears(theirs).values():
            module.support_avx512bf16_for_cpu = False  # its eval kernel rounds to bf16
        with torch.no_grad():
            logp = theirs(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        mask = torch.from_numpy(groups[0].responses[0].target_mask)
        logp = logp[len(groups[0].prompt) - 1 :][mask]
        off = float((logp - ours[: len(logp)]).abs().max())
        assert off < model_ulps(logp) if quantisation else 1e-3 < off < 1


def test_a_stopped_run_goes_on_bitwise(tmp_path, monkeypatch):
    keys = dict(load_in_4bit=True, use_dora=True, lora_rank=4, learning_rate=1e-2, max_steps=6, save_steps=3)
    whole = Run(tmp_path, "whole", **keys)
    config = replace(whole.config, output_dir=str(tmp_path / "cut"))
    stock = Stage.step

    def stopping(self, groups, progress, step, *more):
        if step == 5:
            raise Stopped(signal.SIGTERM)
        return stock(self, groups, progress, step, *more)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Stage, "step", stopping)
        train(config, QUIET)
    folder = train(replace(config, resume=True), QUIET)
    ours, theirs = (load_file(f / "model/adapter_model.safetensors") for f in (folder, whole.folder))
    apart = {name: float((ours[name] - theirs[name]).abs().max()) for name in theirs}
    assert ours.keys() == theirs.keys() and not any(apart.values()), apart
    assert any("magnitude" in name for name in ours)


def test_later_stages_and_adapters_to_start_from_are_their_own_reference(tmp_path):
    stages = [dict(objective="sft", max_steps=5, learning_rate=1e-2), dict(max_steps=2)]
    run = Run(tmp_path, "stages", load_in_4bit=True, lora_rank=4, stages=stages, beta=None)
    assert run.evals[2]["eval_rewards/margins"] == 0
    goes_on = Run(tmp_path, "goes on", load_in_4bit=True, adapter=str(run.folder / "model"), max_steps=1)
    (reference,) = events(goes_on, "reference")
    assert goes_on.evals[0]["eval_rewards/margins"] == 0 and reference["misses"] > 0
    at_base = Run(tmp_path, "base", load_in_4bit=True, lora_rank=4, max_steps=1)
    apart = goes_on.evals[0]["eval_logps/chosen"] - at_base.evals[0]["eval_logps/chosen"]
    assert abs(apart) > 0.1  # so a reference without the adapter would show
