"""The balance loss of mixtures of experts: of packed rows, what the model gives of TRL's padded ones."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from fastdpo.data.packing import pack
from fastdpo.errors import ConfigError
from fastdpo.model import support
from fastdpo.model.activations import set_up_activations
from fastdpo.model.experts import Balance, coefficient, experts, mean_of
from fastdpo.model.spec import ModelSpec
from fastdpo.records import Pair, PreferenceGroup, Response, ResponseLogps
from tests.model.test_shared_prompt import assert_gradients_close, gradients
from tests.tiny import groups, model_config, policy

QUIET = Console(quiet=True)
SMALL = dict(num_experts=4, moe_intermediate_size=32, num_experts_per_tok=2)
FAMILIES = {
    "mixtral": dict(num_local_experts=4),
    "qwen2_moe": SMALL | dict(shared_expert_intermediate_size=32),
    "qwen3_moe": SMALL,
    "olmoe": dict(num_experts=4, num_experts_per_tok=2),
    "granitemoe": dict(num_local_experts=4, num_experts_per_tok=2),
    "gpt_oss": dict(num_local_experts=4, num_experts_per_tok=2, head_dim=16),  # cannot share prompts
}
WITHOUT = ("llama", "gemma3_text", "gpt2")


def whole(some):
    return [replace(g, whole=True) for g in some]


def exact_policy(family):
    """In fp64, which grouped products of experts do not take."""
    p = policy(family, torch.float64, **FAMILIES[family])
    p.core.set_experts_implementation("eager")
    return p


def padded(some):
    """TRL's batch: a row a response, prompt and all of it, padded on the right."""
    rows = [torch.from_numpy(np.concatenate([g.prompt, r.ids])) for g in some for r in g.responses]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask}


def by_transformers(p, some):
    """What the model's own forward returns as aux_loss, and the gradients of ten of it."""
    with p.stock() as model:
        aux = model(**padded(some), output_router_logits=True, use_cache=False).aux_loss
    (10 * aux).backward()
    return aux.detach(), gradients(p.model)


def ours(p, some):
    balance, seen, batch = Balance(p, 10.0), [], pack(whole(some), p.share)
    with balance.recorded(seen):
        p.token_logp(batch)
    aux = balance.loss(seen, batch)
    (10 * aux).backward()
    return aux.detach(), gradients(p.model)


@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("family", FAMILIES)
def test_value_and_gradients(family, share):
    p, some = exact_policy(family), groups()
    aux, grads = by_transformers(p, some)
    routers = [name for name in grads if "router" in name or "gate." in name]
    assert routers and all(grads[name].abs().max() > 1e-4 for name in routers)
    support.prepare(p, some, QUIET)
    assert p.share == (family != "gpt_oss")
    p.set_sharing(share and p.share)
    found, gradients_found = ours(p, some)
    assert float(found) == pytest.approx(float(aux), rel=1e-6)
    assert_gradients_close(gradients_found, grads, 1e-5)  # the function's sums are fp32


@pytest.mark.parametrize("level", [True, "selective", 2])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_recomputed_layers(family, level):
    """Router logits keep their way back to the weights through layers that are computed again."""
    p, some = exact_policy(family), groups()
    aux, grads = by_transformers(p, some)
    p.set_sharing(True)
    assert set_up_activations(p.model, ModelSpec(model="m", gradient_checkpointing=level))
    found, gradients_found = ours(p, some)
    assert float(found) == pytest.approx(float(aux), rel=1e-6)
    assert_gradients_close(gradients_found, grads, 1e-5)


def test_a_prompt_counts_once_a_response_and_the_last_token_counts():
    """Prompt p, responses a and b of one token, two experts, each token to one: separate rows are p a p b,
    and p and a go to expert 0 with probability 3/4, b to expert 1 with 3/4. Three of four tokens, mean
    probability (3/4 * 3 + 1/4) / 4 = 5/8: 2 * (3/4 * 5/8 + 1/4 * 3/8) = 9/8."""
    p = policy("mixtral", num_local_experts=2, num_experts_per_tok=1)
    one = lambda token: Response(np.array([token]), np.array([True]))
    some = PreferenceGroup(0, np.array([5]), (one(6), one(7)), (Pair(0, 1),), whole=True)
    to_0, to_1 = [math.log(3), 0.0], [0.0, math.log(3)]
    shared, separate = pack([some]), pack([some], share=False)
    assert shared.input_ids.tolist() == [[5, 6, 7]] and separate.input_ids.tolist() == [[5, 6], [5, 7]]
    balance = Balance(p, 1.0)
    assert float(balance.loss([(torch.tensor([to_0, to_0, to_1]),)], shared)) == pytest.approx(9 / 8)
    rows = torch.tensor([to_0, to_0, to_0, to_1])
    assert float(balance.loss([(rows,)], separate)) == pytest.approx(9 / 8)


def test_whole_groups_score_what_others_score():
    p, some = policy("llama", torch.float64), groups()
    for share in (True, False):
        p.set_sharing(share)
        plain, with_last = pack(some, share), pack(whole(some), share)
        responses = sum(len(g.responses) for g in some)
        assert with_last.input_tokens == plain.input_tokens + responses
        assert with_last.unshared_tokens == plain.unshared_tokens
        assert with_last.target.equal(plain.target)
        torch.testing.assert_close(p.token_logp(with_last), p.token_logp(plain), rtol=1e-12, atol=1e-12)


def test_several_microbatches():
    """Of 1 and 3 responses, with losses 2 and 4: (1 * 2 + 3 * 4) / 4."""
    seen = [
        SimpleNamespace(cu_resp=range(n + 1), aux_loss=torch.tensor(value))
        for n, value in [(1, 2.0), (3, 4.0)]
    ]
    assert float(mean_of(seen)) == 3.5


def test_only_inside_are_router_logits_kept():
    p, batch = policy("mixtral", num_local_experts=4), pack(whole(groups()), share=False)
    balance, seen = Balance(p, 1.0), []
    with balance.recorded(seen):
        p.token_logp(batch)
    p.token_logp(batch)
    assert len(seen) == 1 and len(seen[0]) == 2  # layers
    assert not p.core.base_model._forward_hooks and not p.core.base_model._forward_pre_hooks


def test_the_coefficient():
    mixtral = model_config("mixtral", num_local_experts=4, router_aux_loss_coef=0.02)
    assert experts(mixtral) == 4
    assert coefficient(mixtral, None) == (0.02, "")
    assert coefficient(mixtral, 0.5) == (0.5, "")
    assert coefficient(mixtral, 0.0) == (0.0, "router_aux_loss_coef is 0")
    assert coefficient(model_config("mixtral", router_aux_loss_coef=0.0), None)[0] == 0.0


def test_models_whose_config_has_no_coefficient():
    dbrx = model_config("dbrx")
    assert experts(dbrx) == 4
    assert coefficient(dbrx, None) == (0.0, "the model's config has no router_aux_loss_coef")
    assert coefficient(dbrx, 0.1) == (0.1, "")


def test_mixtures_without_a_balance_loss():
    """DeepSeek-V3 balances by a bias of its router; transformers has no loss of it."""
    deepseek = model_config("deepseek_v3", n_routed_experts=8)
    assert experts(deepseek) == 8
    assert coefficient(deepseek, None) == (0.0, "transformers has none of deepseek_v3")
    with pytest.raises(ConfigError, match="but transformers has no balance loss"):
        coefficient(deepseek, 0.1)


@pytest.mark.parametrize("family", WITHOUT)
def test_models_without_experts(family):
    config = model_config(family)
    assert experts(config) == 0
    assert coefficient(config, None) == coefficient(config, 0.0) == (0.0, "")
    with pytest.raises(ConfigError, match=r"router_aux_loss_coef: 0.1, but \w+ has no experts; leave"):
        coefficient(config, 0.1)


def test_joined_log_probs_have_no_balance_loss():
    """Several microbatches have one each, and none together."""
    batch = pack(groups()[:1])
    logps = replace(ResponseLogps.of(batch, torch.zeros(len(batch.target))), aux_loss=torch.ones(()))
    assert ResponseLogps.joined([logps, logps]).aux_loss is None
