"""RLOO against its definition, the research vectors, and what it must leave alone."""

import json
from dataclasses import replace

import pytest
import torch

from fastdpo.data.packing import pack
from fastdpo.objectives import make
from fastdpo.objectives.on_policy import advantages, rloo
from fastdpo.objectives.tokens import apart
from fastdpo.records import ResponseLogps
from tests.data.shared_data import SHARED, needs_shared
from tests.objectives.losses import bits, of_tokens
from tests.tiny import groups as tiny_groups


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def of_groups(sizes, lengths, seed=0):
    """(ResponseLogps, its token log-probs) of groups of so many responses; the old policy is a third one."""
    draw = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    rand = lambda n: torch.rand(n, generator=draw, dtype=torch.float64)
    token_logp = (-3 * rand(total)).requires_grad_()
    ref, old = (token_logp.detach() + spread * (rand(total) - 0.5) for spread in (1.0, 0.8))
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    fields = dict(score=rand(len(lengths)), group=group, old_token_logp=old, pairs=[])
    return of_tokens(lengths, token_logp, ref, **fields), token_logp


SIZES, LENGTHS = (2, 4, 3), (3, 1, 5, 2, 7, 4, 1, 6, 2)


def defined(logps, clip, kl_coef):
    """The losses by their equations, response by response and token by token."""
    tokens, refs = (some.split(logps.lengths.tolist()) for some in (logps.token_logp, logps.ref_token_logp))
    olds = refs if logps.old_token_logp is None else logps.old_token_logp.split(logps.lengths.tolist())
    reward = [
        float(score) - kl_coef * (float(token.detach().sum()) - float(ref.sum()))
        for score, token, ref in zip(logps.score, tokens, refs)
    ]
    out = []
    for i, own in enumerate(logps.group.tolist()):
        others = [reward[j] for j, other in enumerate(logps.group.tolist()) if other == own and j != i]
        gain = reward[i] - sum(others) / len(others)
        loss = -gain * tokens[i].sum()
        if clip:
            ratios = [(token - old).exp() for token, old in zip(tokens[i], olds[i])]
            loss = sum(-min(r * gain, r.clamp(1 - clip, 1 + clip) * gain) for r in ratios)
        out.append(loss)
    return torch.stack(out)


@pytest.mark.parametrize("has_old", [True, False])
@pytest.mark.parametrize("clip, kl_coef", [(0.0, 0.0), (0.0, 0.3), (0.2, 0.05), (0.05, 0.0), (0.5, 1.0)])
def test_losses_and_gradients_are_the_definitions(clip, kl_coef, has_old):
    logps, token_logp = of_groups(SIZES, LENGTHS)
    logps = logps if has_old else replace(logps, old_token_logp=None)
    got, want = rloo(logps, clip=clip, kl_coef=kl_coef), defined(logps, clip, kl_coef)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    slopes = [torch.autograd.grad(x.sum(), token_logp, retain_graph=True)[0] for x in (got, want)]
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-12)


def test_one_group_by_hand():
    """Rewards (.98, .21, -.55), advantages (1.15, -.005, -1.145)."""
    token_logp, ref = f64(-3, -4, -2).requires_grad_(), f64(-3.2, -3.9, -2.5)
    logps = of_tokens([1, 1, 1], token_logp, ref, pairs=[], score=f64(1, 0.2, -0.5))
    loss, gradient = bits(make("rloo", clip=0, kl_coef=0.1), logps, token_logp)
    assert float(loss) == pytest.approx(0.38, abs=1e-12)
    torch.testing.assert_close(-3 * gradient, f64(1.15, -0.005, -1.145), rtol=0, atol=1e-12)


def test_advantages_add_up_to_nothing_in_each_group():
    reward, group = torch.randn(9).double(), of_groups(SIZES, LENGTHS)[0].group
    sums = torch.zeros(3).double().index_add(0, group, advantages(reward, group))
    assert sums.abs().max() < 1e-12 and advantages(reward, group).abs().min() > 1e-3


@pytest.mark.parametrize("clip", [0.0, 0.2])
@pytest.mark.parametrize("score", [0.1, -7.3, 1e6 / 3])
def test_equal_scores_train_nothing(score, clip):
    """Exactly, in groups of any size."""
    logps, token_logp = of_groups((2, 3, 10), [2] * 15)
    logps = replace(logps, score=torch.full((15,), score))
    _, gradient = bits(make("rloo", clip=clip, kl_coef=0), logps, token_logp)
    assert not gradient.any()


def test_at_the_old_policy_the_clip_changes_no_gradient():
    """Also where the reference stands in for it."""
    logps, token_logp = of_groups(SIZES, LENGTHS)
    own = token_logp.detach()
    here = (replace(logps, old_token_logp=own), replace(logps, old_token_logp=None, ref_token_logp=own))
    for at_old in here:
        _, want = bits(make("rloo", clip=0), at_old, token_logp)
        _, got = bits(make("rloo"), at_old, token_logp)
        assert want.abs().max() > 1e-3
        torch.testing.assert_close(got, want, rtol=1e-14, atol=0)


def test_beyond_the_clip_only_what_leads_back_trains():
    """A token of a good response that is likelier by more than the clip, and one of a bad response that is
    rarer, have no gradient; the other way round they have."""
    for moved, trains in ((f64(0.3, -0.3), [False, False]), (f64(-0.3, 0.3), [True, True])):
        token_logp = (f64(-1, -1) + moved).requires_grad_()
        logps = of_tokens([1, 1], token_logp, f64(-1, -1), pairs=[], score=f64(1, 0))
        _, gradient = bits(make("rloo", kl_coef=0), logps, token_logp)
        assert (gradient != 0).tolist() == trains


def fixed_point(score, ref, kl_coef, clip, start):
    """Where gradient steps of rloo's expected loss lead: over all groups of two samples of the policy."""
    logits = start.log().requires_grad_()
    pick = torch.cartesian_prod(*[torch.arange(len(score))] * 2)  # i64[G, 2]
    group = torch.arange(len(pick)).repeat_interleave(2)
    for _ in range(3000):
        logp = logits.log_softmax(0)
        token_logp = logp[pick.flatten()]
        own = {"score": score[pick.flatten()], "group": group, "old_token_logp": token_logp.detach()}
        logps = of_tokens([1] * len(group), token_logp, ref.log()[pick.flatten()], pairs=[], **own)
        losses = rloo(logps, clip=clip, kl_coef=kl_coef).view(-1, 2).mean(1)
        likely = logp.detach()[pick].sum(1).exp()
        (slope,) = torch.autograd.grad((likely * losses).sum(), logits)
        logits.data -= slope / kl_coef
    return logits.detach().softmax(0)


@pytest.mark.parametrize("clip", [0.0, 0.2])
def test_in_expectation_it_ends_at_the_reference_tilted_by_the_scores(clip):
    """pi proportional to ref exp(Q / kl_coef)."""
    found = fixed_point(f64(1, 0, 0.5), f64(0.5, 0.3, 0.2), 0.5, clip, f64(0.2, 0.5, 0.3))
    want = f64(0.814098262981, 0.066105731402, 0.119796005618)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)


def npg_step(score, start, ref, eta, lam):
    """argmin of -<Q, p> + lam KL(p || ref) + KL(p || start) / eta, which is rloo's fixed point where the pull
    of the start is in the scores."""
    return fixed_point(score + (start.log() - ref.log()) / eta, ref, lam + 1 / eta, 0.0, start)


def test_a_step_of_natural_policy_gradient():
    found = npg_step(f64(1, 0, 0.5), f64(0.4, 0.4, 0.2), f64(0.5, 0.3, 0.2), 1.0, 0.5)
    want = f64(0.566374202051, 0.245258589071, 0.188367208878)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)


@needs_shared
def test_the_step_of_dr_pos_analysis():
    of = json.loads((SHARED / "research/vectors.json").read_text())["drpo_npg_closed_form"]
    found = npg_step(f64(*of["Q"]), f64(*of["pi_t"]), f64(*of["pi_sft"]), of["eta"], of["lam"])
    torch.testing.assert_close(found, f64(*of["pi_next"]), rtol=0, atol=1e-12)


@needs_shared
def test_the_clipped_loss_is_dr_pos():
    """Its authors' mean over sampled tokens, each token here a response of one group: advantages that add up
    to nothing are those of scores (n - 1) / n times as large."""
    of = json.loads((SHARED / "research/vectors.json").read_text())["drpo_ppo"]
    new, old, gain = (f64(*of[name]).flatten() for name in ("new_logps", "old_logps", "whitened_advantages"))
    logps = of_tokens([1] * 8, new, old, pairs=[], score=gain * 7 / 8)
    losses = rloo(logps, clip=of["cliprange"], kl_coef=0)
    sampled = ~torch.tensor(of["rollin_mask"]).flatten().bool()
    assert float(losses[sampled].mean()) == pytest.approx(of["policy_loss_masked"], abs=1e-11)


def test_groups_and_old_log_probs_go_where_responses_go():
    """Packed, joined, kept, moved, and response by response."""
    some = tiny_groups()
    parts = [pack(some[:2]), pack(some[2:])]
    old = [torch.rand(len(part.target)) for part in parts]
    made = [ResponseLogps.of(replace(part, old_token_logp=one), 2 * one) for part, one in zip(parts, old)]
    joined = ResponseLogps.joined(made).kept().to("cpu")
    assert torch.equal(joined.group, pack(some).group)
    assert joined.group.tolist() == [0, 0, 1, 1, 2, 2, 2, 2, 3, 4, 4, 4]
    assert torch.equal(joined.old_token_logp, torch.cat(old))
    own = apart(joined)
    assert torch.equal(own.group, joined.group[joined.pairs.flatten()])
    assert torch.equal(2 * own.old_token_logp, own.token_logp)
