"""A combination lock: the reward is that of all steps right, and only resets show a policy what is.

12 steps of 4 actions; the start policy is right with .3 a step, so with 5e-7 in all. What is learned is a
table of each step's actions, so that nothing learned of one step helps at another.
"""

import math

import numpy as np
import pytest
import torch

from fastdpo.objectives import make
from fastdpo.sampling.resets import reset_length
from tests.objectives.losses import of_tokens

STEPS, ACTIONS, GROUPS, SAMPLES = 12, 4, 32, 4
TOKENS = 60_000  # generated in all
GROUP = torch.arange(GROUPS).repeat_interleave(SAMPLES)


def success(logits):
    """The probability of the whole lock, exactly; action 0 is right."""
    return float(logits.detach().softmax(-1)[:, 0].prod())


def trained(objective, share, resets_from, seed):
    """The policy's success after TOKENS generated tokens: 32 groups of 4 samples a step, each group from one
    state: k right steps given, k in {resets_from .. 11}."""
    rng, torch_rng = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    logits = torch.zeros(STEPS, ACTIONS, dtype=torch.float64)
    logits[:, 0] = math.log(0.3 / (0.7 / (ACTIONS - 1)))
    optimizer = torch.optim.Adam([logits.requires_grad_()], lr=0.15)
    mask, step, generated = np.arange(STEPS) >= resets_from, torch.arange(STEPS), 0
    while generated < TOKENS:
        given = torch.tensor([reset_length(mask, share, rng) for _ in range(GROUPS)])[GROUP]
        logp = logits.log_softmax(-1)
        chances = logp.detach().exp()
        actions = torch.multinomial(chances, len(GROUP), replacement=True, generator=torch_rng).T
        sampled = step >= given[:, None]  # bool[R, STEPS]
        score = ((actions == 0) | ~sampled).all(1).double()
        token_logp = logp[step.expand_as(sampled)[sampled], actions[sampled]]
        generated += len(token_logp)
        logps = of_tokens(
            sampled.sum(1).tolist(),
            token_logp,
            token_logp.detach(),
            best_worst(score),
            score=score,
            group=GROUP,
        )
        if len(logps.pairs) or "pairs" not in objective.needs:
            optimizer.zero_grad()
            objective.whole(logps).backward()
            optimizer.step()
    return success(logits)


def best_worst(score):
    """A pair of each group whose scores differ."""
    of = score.view(GROUPS, SAMPLES)
    best, worst = of.argmax(1), of.argmin(1)
    return [
        (g * SAMPLES + int(best[g]), g * SAMPLES + int(worst[g]))
        for g in range(GROUPS)
        if of[g].any() and not of[g].all()
    ]


OBJECTIVES = {"rloo": make("rloo", kl_coef=0), "pairs": make("sigmoid")}


def spread(name, share, resets_from):
    return [trained(OBJECTIVES[name], share, resets_from, seed) for seed in range(3)]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_without_resets_nothing_is_learned(name):
    assert max(spread(name, 0.0, 0)) < 5e-5


@pytest.mark.parametrize("name, least", [("rloo", 0.95), ("pairs", 0.8)])
def test_with_resets_the_lock_opens(name, least):
    assert min(spread(name, 1.0, 0)) > least


@pytest.mark.parametrize("name", OBJECTIVES)
def test_where_the_first_token_is_always_given_it_is_never_learned(name):
    """The paper's draw, from 1: success stays the start policy's chance of the first step."""
    found = spread(name, 1.0, 1)
    assert 0.25 < min(found) and max(found) < 0.35


def test_a_share_of_resets_from_1_is_enough_for_the_first_token_too():
    assert max(spread("rloo", 0.5, 1)) > 0.9
