"""Objectives against hand-computed numbers, and against how a step may be cut."""

import json
import math
from dataclasses import replace

import pytest
import torch

from fastdpo.config import Config
from fastdpo.errors import ConfigError
from fastdpo.objectives import dpo_sigmoid, make_objective, sft
from fastdpo.packing import pack
from fastdpo.records import ResponseLogps
from tests.shared_data import SHARED, needs_shared
from tests.tiny import group, groups


def config(**values):
    return Config(model="m", data="d", **values)


def of_sums(policy_w, policy_l, ref_w, ref_l):
    """ResponseLogps of pairs whose responses are two tokens each, summing to the given values (fp64)."""
    batch = pack([group(i, 2, [2, 2]) for i in range(len(policy_w))])

    def tokens(winners, losers):
        sums = torch.tensor([winners, losers], dtype=torch.float64).T.flatten()
        return torch.stack([0.25 * sums, 0.75 * sums], 1).flatten()

    policy = tokens(policy_w, policy_l).requires_grad_()
    return ResponseLogps.of(batch, policy, tokens(ref_w, ref_l)), policy


def test_dpo_by_hand():
    """One pair, h = 1.5, beta = 0.1: -log sigmoid(0.15) and its gradient -beta * sigmoid(-0.15)."""
    logps, token_logp = of_sums([-12.0], [-14.0], [-13.0], [-13.5])
    loss = dpo_sigmoid(logps, beta=0.1)
    assert float(loss) == pytest.approx(math.log1p(math.exp(-0.15)), abs=1e-7)
    loss.sum().backward()
    g = 0.1 / (1 + math.exp(0.15))
    torch.testing.assert_close(token_logp.grad, torch.tensor([-g, -g, g, g]).double(), rtol=1e-6, atol=0)


@needs_shared
@pytest.mark.parametrize(
    "name, beta, eps",
    [("dpo_beta0.1", 0.1, 0), ("dpo_beta0.5", 0.5, 0), ("cdpo_beta0.1_eps0.1", 0.1, 0.1)],
)
def test_dpo_vectors(name, beta, eps):
    vectors = json.loads((SHARED / "research/vectors.json").read_text())
    inputs, want = vectors["sequence_inputs"], vectors["sequence_losses"][name]
    sides = ["policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected"]
    logps, token_logp = of_sums(*(inputs[f"{side}_logps"] for side in sides))
    losses = dpo_sigmoid(logps, beta, eps)
    torch.testing.assert_close(
        losses.double(), torch.tensor(want["per_pair_losses"]).double(), rtol=0, atol=2e-7
    )
    losses.mean().backward()
    grad = token_logp.grad[::2]  # each response's first token carries its sequence's gradient
    for side, got in (("chosen", grad[::2]), ("rejected", grad[1::2])):
        expected = torch.tensor(want[f"grad_policy_{side}_logps"]).double()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


def test_offset_shifts_and_weight_scales():
    logps, _ = of_sums([-12.0], [-14.0], [-13.0], [-13.5])
    shifted = replace(logps, offset=torch.tensor([0.4]))
    assert float(dpo_sigmoid(shifted, 0.1)) == pytest.approx(math.log1p(math.exp(0.25)), abs=1e-7)
    objective = make_objective(config())
    double = objective.loss_sum(replace(logps, weight=torch.tensor([2.0])))
    assert float(double) == pytest.approx(2 * float(objective.loss_sum(logps)), rel=1e-6)


def test_equal_models_give_exactly_log_2():
    """Differences are taken a token first: a sum of 3,000 large log-probs cancels to exactly 0."""
    batch = pack([group(0, 2, [3000, 1500])])
    logp = -100 * torch.rand(len(batch.target))
    logps = ResponseLogps.of(batch, logp, logp.clone())
    assert logps.log_ratio.tolist() == [0, 0]
    assert float(dpo_sigmoid(logps, 0.1)) == float(torch.tensor(2.0).log())


def test_response_sums_are_accurate():
    batch = pack([group(0, 2, [3000, 1500])])
    logp = -100 * torch.rand(len(batch.target))
    logps = ResponseLogps.of(batch, logp)
    bound = int(batch.cu_resp[1])
    truth = torch.stack([logp[:bound].double().sum(), logp[bound:].double().sum()])
    torch.testing.assert_close(logps.logp, truth.float(), rtol=1e-7, atol=0)
    assert logps.lengths.tolist() == batch.cu_resp.diff().tolist()


def test_objective_without_reference_is_an_error():
    batch = pack(groups())
    with pytest.raises(ValueError, match="needs reference"):
        dpo_sigmoid(ResponseLogps.of(batch, torch.zeros(len(batch.target))), 0.1)


def test_sft_scores_the_chosen_tokens_only():
    objective = make_objective(config(objective="sft"))
    selected = [objective.select(g) for g in groups()]
    assert [len(g.responses) for g in selected] == [1] * 5  # the others are not even computed
    batch = pack(selected)
    logp = -torch.rand(len(batch.target))
    logps = ResponseLogps.of(batch, logp)
    torch.testing.assert_close(sft(logps).sum(), -logp.sum())
    assert sum(objective.count(g) for g in selected) == len(batch.target)


@pytest.mark.parametrize("name", ["sigmoid", "sft"])
def test_any_cut_of_a_step_gives_the_same_sum(name):
    objective = make_objective(config(objective=name))
    selected = [objective.select(g) for g in groups() if g.pairs or name == "sft"]

    def total(parts):
        out = 0.0
        for part in parts:
            batch = pack(part)
            seeds = batch.target.double().sin()
            out += float(objective.loss_sum(ResponseLogps.of(batch, -seeds.abs(), seeds.cos())))
        return out

    assert total([[g] for g in selected]) == pytest.approx(total([selected]), rel=1e-6)


def test_unknown_objective():
    with pytest.raises(ConfigError, match="not one of sigmoid, sft"):
        make_objective(config(objective="dpoo"))
