"""What every loss must keep: limits that are another loss bit for bit, any pair graph, its offsets."""

import math
from dataclasses import replace

import pytest
import torch

from fastdpo.objectives import batch, dpo, make, shifted, tokens
from fastdpo.objectives.catalogue import BASES, CATALOGUE
from tests.objectives.losses import bits, of_sums, of_tokens, random_logps

PAIR_LOSSES = [name for name, entry in CATALOGUE.items() if entry.unit == "pair" and entry.kind == "terms"]


def assert_bitwise(one, other, logps, token_logp):
    for a, b in zip(bits(one, logps, token_logp), bits(other, logps, token_logp)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "name, options",
    [
        ("odpo", dict(alpha=0)),
        ("odpo", dict(alpha=0, scaling="log_difference")),
        ("dpop", dict(dpop_lambda=0)),
        ("rdpo", dict(length_alpha=0)),
        ("rpo", dict(rpo_alpha=0)),
        ("robust", dict(label_smoothing=0)),
        ("sigmoid", dict(gamma=1)),
        ("sigmoid", dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0)),
    ],
)
def test_limits_that_are_dpo_bit_for_bit(name, options, dtype):
    logps, token_logp = random_logps(dtype=dtype, graph=True)
    assert_bitwise(make(name, **options), make("sigmoid"), logps, token_logp)


def test_odpo_without_effect_takes_rows_without_scores():
    logps, token_logp = random_logps()
    logps = replace(logps, score=torch.full_like(logps.score, torch.nan))
    assert_bitwise(make("odpo", alpha=0), make("sigmoid"), logps, token_logp)


@pytest.mark.parametrize("name", BASES)
def test_ld_alpha_1_is_the_loss_without_it(name):
    logps, token_logp = random_logps(graph=True)
    for a, b in zip(
        bits(make(name, ld_alpha=1), logps, token_logp), bits(make(name), logps, token_logp), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_z0_is_the_mean_log_ratio_but_never_below_0():
    for policy, want in (([1.0, 2.0], 1.5), ([1.0, -2.0], 0.0)):
        logps, _ = of_sums(policy[:1], policy[1:], [0.0], [0.0])
        z0 = batch.kto_z0(logps)
        assert float(z0) == pytest.approx(want, abs=1e-12) and not z0.requires_grad


def test_kto_with_z0_of_0_is_apo_zero_unpaired():
    logps, token_logp = random_logps()
    logps = replace(logps, context={"z0": torch.tensor(0.0)})
    assert_bitwise(make("kto"), make("apo_zero_unpaired"), logps, token_logp)


def test_apo_zero_is_twice_its_mean_over_judged_responses():
    logps, _ = random_logps()
    torch.testing.assert_close(make("apo_zero").whole(logps), 2 * make("apo_zero_unpaired").whole(logps))


def test_bco_without_shift_is_half_of_bco_pair():
    logps, _ = random_logps()
    torch.testing.assert_close(
        2 * make("bco").whole(replace(logps, context={})), make("bco_pair").whole(logps)
    )


def test_drdpo_limits():
    logps, token_logp = random_logps(dtype=torch.float64)
    mean, gradient = bits(make("sigmoid"), logps, token_logp)
    far, far_gradient = bits(make("drdpo", beta_prime=1e9), logps, token_logp)
    torch.testing.assert_close(far, mean, rtol=0, atol=1e-7)
    torch.testing.assert_close(far_gradient, gradient, rtol=1e-6, atol=1e-12)
    smallest = make("sigmoid").terms[0].losses(logps).min().detach()
    near, _ = bits(make("drdpo", beta_prime=1e-6), logps, token_logp)
    torch.testing.assert_close(near, smallest, rtol=0, atol=1e-4)
    for beta_prime in (0.1, 1.0, 10.0):
        assert make("drdpo", beta_prime=beta_prime).whole(logps) < mean


def test_drdpo_of_one_pair_is_its_loss():
    logps, _ = random_logps(n_pairs=1)
    torch.testing.assert_close(make("drdpo", beta_prime=0.3).whole(logps), make("sigmoid").whole(logps))


def test_drdpo_is_symmetric_in_the_margin():
    """beta' = 1: pairs at +z and -z have the same gradient, sg(z) sg(-z)."""
    for h in (0.5, 3.0, 20.0):
        logps, token_logp = of_sums([h, -h], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0])
        _, gradient = bits(make("drdpo", beta=1.0), logps, token_logp)
        right, wrong = logps.per_response(gradient)[:2]
        torch.testing.assert_close(right, wrong, rtol=1e-12, atol=0)
        assert right < 0


def test_drdpo_does_not_underflow():
    """The authors' log(mean(exp(-l / beta'))) is -inf here."""
    losses = torch.tensor([200.0, 300.0], requires_grad=True)
    loss = batch.drdpo(losses, torch.ones(2), beta_prime=1.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(200 + math.log(2), rel=1e-6)
    assert losses.grad.tolist() == pytest.approx([1, 0], abs=1e-30)


def test_drdpo_scope_of_the_whole_step_is_the_batch():
    logps, token_logp = random_logps()
    rescaled, coupled = make("drdpo", beta_prime=0.5), make("drdpo", beta_prime=0.5, scope=6)
    for a, b in zip(bits(rescaled, logps, token_logp), bits(coupled, logps, token_logp)):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("base", BASES)
def test_drdpo_over_any_base_loss(base):
    logps, _ = random_logps()
    options = dict(use_weighting=True, ld_alpha=0.5)
    losses = make(base, beta=0.2, **options).terms[0].losses(logps)
    got = make("drdpo", base_loss=base, beta=0.2, beta_prime=0.7, **options).whole(logps)
    torch.testing.assert_close(got, -0.7 * (-losses / 0.7).exp().mean().log())


def test_odpo_margins():
    """A tie in log scaling has no loss and no gradient; a gap of 1 is DPO; wider gaps ask for more."""
    logps, token_logp = of_sums([1.0] * 4, [0.5] * 4, [0.0] * 4, [0.0] * 4)
    score = lambda *good: torch.tensor([*good, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    losses = shifted.odpo(replace(logps, score=score(1.0, 2.0, 3.0, 1.5)))
    plain = dpo.sigmoid(logps)
    assert losses[0] == 0 and losses[1] == plain[1] and losses[2] > plain[2] and losses[3] < plain[3]
    losses.sum().backward()
    gradient = logps.per_response(token_logp.grad)
    assert gradient[0] == 0 and gradient[4] == 0 and (gradient[1:4] < 0).all()


def test_reward_rpo_is_least_where_the_margin_is_the_gap():
    gap = torch.tensor([2.0, 1.0]).double()
    logps, token_logp = of_sums([0.7 / 0.5], [0.0], [0.0], [0.0], score=gap)
    loss, gradient = bits(make("reward_rpo", beta=0.5, eta=0.7), logps, token_logp)
    assert abs(float(loss)) < 1e-12 and gradient.abs().max() < 1e-12


@pytest.mark.parametrize("name", ["sigmoid", "simpo", "cpo", "odpo", "drdpo", "rpo", "dpop", "rdpo", "hinge"])
def test_a_pairs_offset_is_subtracted(name):
    """As much as another reference makes of it, for the losses that are functions of beta h."""
    logps, _ = random_logps(n_pairs=1, spread=0.05)
    moved = make(name, beta=1.0).whole(replace(logps, offset=torch.tensor([0.4])))
    plain = make(name, beta=1.0).whole(logps)
    assert moved > plain
    if name in ("sigmoid", "drdpo", "hinge"):
        other = replace(
            logps, ref_token_logp=logps.ref_token_logp + (0.4 / logps.lengths[0]) * first_of(logps)
        )
        torch.testing.assert_close(make(name, beta=1.0).whole(other), moved, rtol=1e-6, atol=0)


def first_of(logps):
    return (torch.arange(len(logps.token_logp)) < logps.cu_resp[1]).double()


def alone(logps, pair):
    """One pair as a row of its own."""
    some = slice(pair, pair + 1)
    tokens_of_both = int(logps.lengths[logps.pairs[pair]].sum())
    own = tokens.apart(replace(logps, pairs=logps.pairs[some], paired_tokens=tokens_of_both))
    return replace(own, offset=logps.offset[some], weight=logps.weight[some])


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_any_pair_graph_is_its_pairs_alone(name):
    """With the token options too, for which a response means something else in every pair."""
    for seed in range(3):
        logps, token_logp = random_logps(seed, n_pairs=3, graph=True)
        draw = torch.Generator().manual_seed(seed)
        weight = torch.rand(len(logps.pairs), generator=draw).double()
        offset = torch.randn(len(logps.pairs), generator=draw).double()
        logps = replace(logps, weight=weight, offset=offset)
        options = dict(ld_alpha=0.3, gamma=0.6, use_weighting=True) if name in BASES else {}
        losses = make(name, **options).terms[0].losses
        together = losses(logps)
        one_by_one = torch.cat([losses(alone(logps, pair)) for pair in range(len(logps.pairs))])
        torch.testing.assert_close(together, one_by_one, rtol=1e-12, atol=1e-14)
        slopes = [
            torch.autograd.grad(x.sum(), token_logp, retain_graph=True)[0] for x in (together, one_by_one)
        ]
        torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-14)


def test_ld_alpha_by_hand():
    """Response 0 wins once against a shorter and once against a longer response."""
    policy = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0], dtype=torch.float64)
    logps = of_tokens([3, 1, 4], policy, torch.zeros(8).double(), pairs=[(0, 1), (0, 2)])
    ratios = tokens.length_desensitised(logps, 0.5).log_ratio
    assert ratios.tolist() == [1 + 0.5 * (2 + 4), 8, 1 + 2 + 4, 16 + 32 + 64 + 0.5 * 128]


def test_bco_remembers_the_mean_of_all_rewards():
    objective = make("bco", beta=0.3)
    first, second = random_logps(1, n_pairs=2)[0].detached(), random_logps(2, n_pairs=5)[0].detached()
    memory = objective.remember(second, objective.remember(first, {}))
    rewards = torch.cat([0.3 * logps.log_ratio for logps in (first, second)])
    assert memory == pytest.approx({"sum": float(rewards.sum()), "count": 14})
    at_mean = replace(second, context=memory)
    delta = rewards.mean()
    ratios = 0.3 * second.log_ratio
    want = torch.cat([-(ratios[:5] - delta).sigmoid().log(), -(delta - ratios[5:]).sigmoid().log()]).mean()
    torch.testing.assert_close(objective.whole(at_mean), want)


def test_a_loss_with_a_reference_does_not_go_without():
    logps, _ = random_logps()
    with pytest.raises(ValueError, match="needs reference"):
        make("sigmoid").whole(replace(logps, ref_token_logp=None))
