"""The exact KL over the vocabulary beside its definition: full logits of separate rows, in fp64."""

import pytest
import torch

from fastdpo.errors import ModelError
from fastdpo.evaluation import kl
from fastdpo.evaluation.kl import sequence_kl
from fastdpo.model import support
from fastdpo.model.policy import Policy
from tests import tiny
from tests.training.test_samples import silent


@torch.no_grad()
def by_definition(policy, reference, groups):
    out = []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([*group.prompt, *response.ids])[None]
            logps = []
            for one in (policy, reference):
                with one.stock() as model:
                    logits = model(input_ids=ids).logits[0, len(group.prompt) - 1 : -1]
                logps.append(logits.log_softmax(-1)[torch.from_numpy(response.target_mask)])
            logp, ref = logps
            out.append(float((logp.exp() * (logp - ref)).sum()))
    return out


def pair(model_type, **overrides):
    """Two different fp64 models."""
    first, second = (tiny.policy(model_type, torch.float64, **overrides) for _ in range(2))
    with torch.no_grad():
        for p in second.model.parameters():
            p += 0.05 * torch.randn_like(p)
    return first, second


KINDS = {"llama": {}, "gpt2": {}, "gemma2": {"final_logit_softcapping": 3.0}, "cohere": {"logit_scale": 0.5}}
KINDS["phi"] = {}  # its lm_head has a bias
NORMS = 1e-6  # relative: transformers takes norms and softmaxes in fp32, whatever the model is in


@pytest.mark.parametrize("model_type", KINDS)
@pytest.mark.parametrize("share", [True, False])
def test_equals_the_definition(model_type, share, monkeypatch):
    monkeypatch.setattr(kl, "_ROWS", 5)  # chunks that nothing divides
    monkeypatch.setattr(kl, "_COLUMNS", 50)
    policy, reference = pair(model_type, **KINDS[model_type])
    groups = tiny.groups()
    if share:
        for one in (policy, reference):
            support.prepare(one, groups, silent())
            assert one.share
    found = sequence_kl(policy, reference, groups, max_tokens=40)
    expected = by_definition(policy, reference, groups)
    assert found.dtype == "float64" and found == pytest.approx(expected, rel=NORMS) and min(found) > 0.01
    assert sequence_kl(policy, policy, groups).max() == 0


def test_one_shares_prompts_and_the_other_does_not():
    policy, reference = pair("llama")
    policy.set_sharing(True)
    expected = by_definition(policy, reference, tiny.groups())
    assert sequence_kl(policy, reference, tiny.groups()) == pytest.approx(expected, rel=NORMS)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
def test_an_adapter_beside_its_own_base(targets):
    peft = pytest.importorskip("peft")
    base = tiny.policy("llama", torch.float64)
    model = tiny.policy("llama", torch.float64).model
    lora = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    for name, p in lora.named_parameters():
        if "lora_" in name:
            p.data = 0.3 * torch.randn_like(p, dtype=torch.float64)
    policy = Policy(lora, torch.float64)
    found = sequence_kl(policy, None, tiny.groups())
    assert found == pytest.approx(by_definition(policy, base, tiny.groups()), rel=NORMS)
    assert min(found) > 0.01


def test_another_vocabulary_is_refused():
    policy, reference = tiny.policy(), tiny.policy(vocab_size=140)
    with pytest.raises(ModelError, match="one has 131 logits a token, the other 140"):
        sequence_kl(policy, reference, tiny.groups())
    assert len(sequence_kl(policy, policy, [])) == 0
