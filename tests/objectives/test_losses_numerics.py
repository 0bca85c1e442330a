"""Exact zeros at equal models, finite gradients far out, gradients against differences, fp32 against fp64."""

import math
from dataclasses import replace

import pytest
import torch

from fastdpo.objectives import dpo, make, reference_free
from fastdpo.objectives.catalogue import NAMES
from tests.objectives.losses import bits, of_sums, of_tokens, random_logps


def test_equal_models_give_exactly_log_2():
    """|log pi| of 5,000 a response in fp32: differences are taken a token first."""
    lengths = [3000, 1500, 2900, 1]
    logp = (-2 * torch.rand(sum(lengths))).requires_grad_()
    logps = of_tokens(lengths, logp, logp.detach().clone())
    assert logps.log_ratio.tolist() == [0] * 4
    two = float(torch.tensor(2.0).log())
    for name in ("sigmoid", "sigmoid_norm", "robust", "dpop", "aot", "aot_unpaired"):
        got = make(name).whole(logps).detach()
        assert float(got) == pytest.approx(two, abs=2e-7 if name == "robust" else 0), name
    assert float(make("bco_pair").whole(logps).detach()) == 2 * two
    for kind in ("forward_kl", "js_divergence", "alpha_divergence"):
        assert float(make("sigmoid", f_divergence_type=kind).whole(logps).detach()) == two


def test_cpo_subtracts_large_sums_exactly():
    """One token apart after 10,000 nats in fp32."""
    same = torch.full((2, 1000), -10.0)
    same[1, -1] -= 1e-3
    logps = of_tokens([1000, 1000], same.flatten())
    want = -math.log(1 / (1 + math.exp(-0.1 * float(same[0, -1] - same[1, -1]))))
    assert float(reference_free.cpo(logps, beta=0.1)) == pytest.approx(want, rel=1e-6)


def far_apart(dtype):
    """Pairs with h = 1e4, -1e4, and both log-ratios 5,000 up or down."""
    sums = [5000.0, -5000.0, -5000.0, -10000.0], [-5000.0, 5000.0, -5000.0, -10000.0]
    zeros = [0.0] * 4
    return of_sums(*sums, zeros, zeros, dtype=dtype, score=torch.tensor([3.0, 2, 2, 2, 1, 1, 1, 1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "name", [name for name in NAMES if name not in ("simpo", "cpo", "orpo", "slic", "sft")]
)
def test_gradients_are_finite_far_out(name, dtype):
    logps, token_logp = far_apart(dtype)
    stats = {"log_sum_sq_probs": torch.full_like(logps.token_logp, -1.0).detach()}
    logps = replace(logps, token_stats=stats, context={"z0": torch.tensor(0.5, dtype=dtype)})
    kinds = ["reverse_kl", "js_divergence", "alpha_divergence"] if name in ("sigmoid", "hinge") else [None]
    for kind in kinds:
        if name == "wpo":  # its weight is that of log-probs, which are never above 0
            logps = replace(logps, token_stats={"log_sum_sq_probs": logps.token_logp.detach()})
        loss, gradient = bits(make(name, **({"f_divergence_type": kind} if kind else {})), logps, token_logp)
        assert torch.isfinite(loss) and torch.isfinite(gradient).all(), kind


@pytest.mark.parametrize("name", ["simpo", "cpo", "orpo", "slic", "sft"])
@pytest.mark.parametrize("sums", [(-1e4, -1.0), (-1.0, -1e4), (-1e4, -1e4), (0.0, -3.0), (-1e-30, -3.0)])
def test_gradients_without_a_reference_are_finite_far_out(name, sums):
    for dtype in (torch.float32, torch.float64):
        logps, token_logp = of_sums(*([s] for s in sums), [0.0], [0.0], dtype=dtype)
        loss, gradient = bits(make(name), logps, token_logp)
        assert torch.isfinite(loss) and torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_kl_of_a_loser_that_vanished(dtype):
    """exp(-b) overflows where the loss is flat: no loss, no gradient. A winner's: an infinite loss."""
    make_pair = lambda a, b: of_sums([a], [b], [0.0], [0.0], dtype=dtype)
    logps, token_logp = make_pair(0.0, -1e4)
    loss, gradient = bits(make("sigmoid", f_divergence_type="forward_kl"), logps, token_logp)
    assert loss == 0 and not gradient.any()
    logps, token_logp = make_pair(-1e4, 0.0)
    assert make("sigmoid", f_divergence_type="forward_kl").whole(logps) == math.inf


def test_discopop_is_its_equation_where_that_is_finite():
    logps, _ = random_logps(spread=3.0)
    z = 0.3 * (logps.log_ratio[logps.winner] - logps.log_ratio[logps.loser])
    m = torch.sigmoid(z / 0.2)
    want = (1 - m) * -z.sigmoid().log() + m * (-z).exp()
    torch.testing.assert_close(dpo.discopop(logps, beta=0.3, discopop_tau=0.2), want, rtol=1e-12, atol=0)


def test_log1mexp():
    x = torch.tensor([-1e-30, -1e-12, -0.1, -0.69, -0.7, -1.0, -50.0, -1e4], dtype=torch.float64)
    want = [math.log(-math.expm1(v)) if v > -40 else -math.exp(v) for v in x.tolist()]
    torch.testing.assert_close(
        reference_free.log1mexp(x), torch.tensor(want, dtype=torch.float64), rtol=1e-13, atol=0
    )


@pytest.mark.parametrize("name", NAMES)
def test_gradients_agree_with_differences(name):
    """fp64, away from kinks; the running mean of BCO, WPO's weights and RLOO's KL have no gradient."""
    logps, token_logp = random_logps(11, n_pairs=3)
    objective = make(name, kl_coef=0.0 if name == "rloo" else None)
    at = token_logp.detach().clone()

    def loss(values):
        fixed = replace(logps, token_logp=values)
        if name == "wpo":  # keep the weight what it was
            drift = (values - at).detach()
            fixed = replace(
                fixed, token_stats={"log_sum_sq_probs": logps.token_stats["log_sum_sq_probs"] + drift}
            )
        return objective.whole(fixed)

    assert torch.autograd.gradcheck(loss, (token_logp,), eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_fp32_is_fp64_up_to_rounding(name):
    double, _ = random_logps(5)
    single, _ = random_logps(5, dtype=torch.float32)
    got = make(name).whole(single)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), make(name).whole(double), rtol=2e-5, atol=1e-6)
