"""reference.linear_dpo against published losses, computed elsewhere from sequence sums."""

import math

import pytest
import torch
from fastdpo_kernels import reference

from .cases import needs_vectors, vectors


def two_token_head(token_logp):
    """hidden, weight, target whose logp is token_logp: logits (x, log(1 - e^x)), target 0."""
    x = torch.tensor(token_logp, dtype=torch.float64)
    hidden = torch.stack((x, torch.log(-torch.expm1(x))), -1)
    return hidden, torch.eye(2, dtype=torch.float64), torch.zeros(len(x), dtype=torch.int64)


def sequences():
    """The published pairs as a batch: winners are responses 0..3, losers 4..7."""
    v = vectors()
    s = v["sequence_inputs"]
    lengths = s["chosen_lengths"] + s["rejected_lengths"]
    spread = lambda who: [
        total / n
        for total, n in zip(s[f"{who}_chosen_logps"] + s[f"{who}_rejected_logps"], lengths)
        for _ in range(n)
    ]
    cu_resp = torch.tensor([0, *lengths]).cumsum(0)
    pairs = torch.tensor([[i, i + 4] for i in range(4)], dtype=torch.int32)
    ref = torch.tensor(spread("reference"), dtype=torch.float64)
    return v["sequence_losses"], (*two_token_head(spread("policy")), cu_resp, pairs, ref)


@needs_vectors
@pytest.mark.parametrize(
    ("name", "options"),
    (
        ("dpo_beta0.1", {"beta": 0.1}),
        ("dpo_beta0.5", {"beta": 0.5}),
        ("cdpo_beta0.1_eps0.1", {"beta": 0.1, "label_smoothing": 0.1}),
        ("hinge_beta0.5", {"beta": 0.5, "loss": "hinge"}),
        ("ipo_avg_beta0.1", {"beta": 0.1, "loss": "ipo"}),
    ),
)
def test_published_losses(name, options):
    losses, batch = sequences()
    loss, stats = reference.linear_dpo(*batch, **options)
    each = losses[name]["per_pair_losses"]
    assert loss.item() == pytest.approx(sum(each), rel=1e-9)
    # one pair at a time through its weight, and the same loss as a callable of the margin
    one = torch.tensor([0.0, 0.0, 1.0, 0.0]).double()
    assert reference.linear_dpo(*batch, **options, pair_weight=one)[0].item() == pytest.approx(
        each[2], rel=1e-9
    )
    assert stats.margin.shape == (4,) and stats.logratio.shape == (8,)


@needs_vectors
def test_published_token_gradient():
    v = vectors()
    logits = torch.tensor(v["token_inputs"]["policy_logits"], dtype=torch.float64)
    labels = torch.tensor(v["token_inputs"]["labels"])[:, 1:]
    scored = labels >= 0
    hidden = logits.requires_grad_()
    ref = torch.tensor(v["token_logps"]["reference_per_token"], dtype=torch.float64)[scored]
    loss, stats = reference.linear_dpo(
        hidden[:, :-1][scored],
        torch.eye(5, dtype=torch.float64),
        labels[scored],
        torch.tensor([0, *scored.sum(1)]).cumsum(0),
        torch.tensor([[0, 2], [1, 3]]),
        ref,
        beta=0.5,
    )
    (loss / 2).backward()
    published = v["token_dpo_beta0.5"]
    assert loss.item() / 2 == pytest.approx(published["loss"], rel=1e-9)
    wanted = torch.tensor(published["grad_policy_logits"], dtype=torch.float64)
    torch.testing.assert_close(hidden.grad, wanted, rtol=0, atol=1e-10)
    policy = torch.tensor(v["token_logps"]["policy_per_token"], dtype=torch.float64)[scored]
    torch.testing.assert_close(stats.token_logp.detach(), policy, rtol=0, atol=1e-10)


def test_offset_token_weight_and_callable():
    # one pair of two-token responses; log-ratios -3 and -7, or by weight -1 and -4
    head = two_token_head([-1.0, -2.0, -3.0, -4.0])
    rest = (torch.tensor([0, 2, 4]), torch.tensor([[0, 1]]))
    dpo = lambda **options: reference.linear_dpo(*head, *rest, beta=0.5, **options)
    margin = lambda **options: dpo(**options)[1].margin.item()
    assert margin() == pytest.approx(0.5 * 4)
    assert margin(offset=torch.tensor([0.25])) == pytest.approx(0.5 * 4 - 0.25)
    assert margin(token_weight=torch.tensor([1.0, 0.0, 0.0, 1.0])) == pytest.approx(0.5 * 3)
    assert margin(ref_token_logp=torch.tensor([-1.0, 0.0, 0.0, 0.0])) == pytest.approx(0.5 * 5)
    assert dpo(loss=lambda m: m**3)[0].item() == pytest.approx(8.0)


def test_label_smoothing_is_the_sigmoid_losses_own():
    head = two_token_head([-1.0, -2.0])
    rest = (torch.tensor([0, 1, 2]), torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match="'hinge'"):
        reference.linear_dpo(*head, *rest, loss="hinge", label_smoothing=0.1)


def test_entropy_of_known_distributions():
    hidden = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -math.inf, -math.inf]]).double()
    weight = torch.eye(4, dtype=torch.float64)
    stats = ("entropy", "log_sum_sq_probs", "mean_logit", "is_top1")
    # the head adds 0 * -inf, so the second row goes in as a bias
    _, uniform = reference.linear_logp(hidden[:1], weight, torch.tensor([3]), stats=stats)
    _, masked = reference.linear_logp(hidden[:1], weight, torch.tensor([3]), hidden[1], stats=stats)
    assert uniform["entropy"].item() == pytest.approx(math.log(4))
    assert uniform["log_sum_sq_probs"].item() == pytest.approx(-math.log(4))
    assert uniform["is_top1"].item() == 1.0
    assert masked["entropy"].item() == pytest.approx(math.log(2))
    assert masked["log_sum_sq_probs"].item() == pytest.approx(-math.log(2))
    assert masked["is_top1"].item() == 0.0
