"""Extreme logits, NaN and inf, masked tokens, no rows, and what is refused."""

import math

import pytest
import torch
from fastdpo_kernels import linear_logp, reference

from .cases import NAMES, STATS, assert_as_good, budget, case, many_chunks  # noqa: F401

pytestmark = pytest.mark.usefixtures("many_chunks")
PLANS = ("keep", "recompute")


def logits_case(logits, target):
    """A head whose logits are the rows given: hidden picks columns of weight."""
    c = case(len(logits), len(logits[0]), len(logits), bias=False, lora=False, scale=1)
    c.hidden = torch.eye(len(logits), dtype=torch.float64)
    c.weight = torch.tensor(logits).double().t()
    c.target = torch.tensor(target)
    return c


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("first", (True, False))
def test_extreme_logits(name, first):
    V = 80  # three chunks: the greatest logit comes before the target's chunk, or after it
    target = 2 if not first else V - 2
    peak = V - 1 if not first else 0
    sure, beaten, wide, equal = ([0.0] * V for _ in range(4))
    sure[target] = 90.0
    beaten[target], beaten[peak] = -500.0, 500.0
    wide[target], wide[peak], wide[V // 2] = 1e4, -1e4, 9999.0
    c = logits_case([sure, beaten, wide, equal], [target] * 4).to(torch.float32)
    got = c.run(linear_logp, memory_budget=budget(name, c))
    assert got["logp"][0].item() == pytest.approx(-(V - 1) * math.exp(-90.0), rel=1e-5)
    assert got["logp"][1].item() == -1000.0
    assert got["logp"][2].item() == pytest.approx(-math.log1p(math.exp(-1)), rel=1e-6)
    assert got["logp"][3].item() == pytest.approx(-math.log(V), rel=1e-6)
    assert_as_good(c, torch.float32, stats=STATS, memory_budget=budget(name, c))
    assert_as_good(c, torch.float32, wanted=("hidden",), stats=STATS)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", PLANS)
def test_gradient_of_a_sure_row_does_not_cancel(name, dtype):
    # 1 - p = 1e-5: a p rounded to bf16 would leave nothing of it
    row = [0.0] * 80
    row[50] = math.log(79 / 1e-5)
    c = logits_case([row, row], [50, 50]).to(dtype)
    c.d_logp = torch.ones(2, dtype=torch.float64)
    truth = c.to(torch.float64).run(reference.linear_logp)
    tolerance = dict(rtol=4 * torch.finfo(dtype).eps, atol=0)
    for wanted in (NAMES, ("hidden",)):
        got = c.run(linear_logp, wanted, memory_budget=budget(name, c))
        own = got["d_hidden"].diagonal().double()
        torch.testing.assert_close(own, truth["d_hidden"].diagonal(), **tolerance)
        if "weight" in wanted:
            torch.testing.assert_close(got["d_weight"][50].double(), truth["d_weight"][50], **tolerance)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("wanted", (("hidden",), NAMES), ids=("frozen", "trained"))
@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("entropy", (False, True))
def test_a_bad_row_stays_alone(name, wanted, bad, entropy):
    c = case(entropy=entropy).to(torch.float32)
    good = c.run(linear_logp, wanted, STATS, memory_budget=budget(name, c))
    c.hidden[3, 1] = bad
    got = c.run(linear_logp, wanted, STATS, memory_budget=budget(name, c))
    others = [i for i in range(7) if i != 3]
    for key in ("logp", *STATS, "d_hidden"):
        assert torch.equal(got[key][others], good[key][others]), key
    assert got["logp"][3].isnan()
    assert got["d_hidden"][3].isnan().all()


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("wanted", (("hidden",), ("hidden", "weight")), ids=("frozen", "trained"))
@pytest.mark.parametrize("entropy", (False, True))
def test_tokens_masked_by_bias(name, wanted, entropy):
    # the whole first chunk and then some; the others must be as if those tokens did not exist
    c = case(lora=False, entropy=entropy)
    c.target = c.target.clamp(min=50)
    small = case(lora=False)
    small.__dict__.update(c.__dict__)
    small.weight, small.bias, small.target = c.weight[50:], c.bias[50:], c.target - 50
    c.bias[:50] = -math.inf
    stats = tuple(s for s in STATS if s != "mean_logit")
    got = c.run(linear_logp, wanted, stats, memory_budget=budget(name, c))
    truth = small.run(reference.linear_logp, wanted, stats)
    for key, value in truth.items():
        if key == "d_weight" and value is not None:
            assert (got[key][:50] == 0).all()
            torch.testing.assert_close(got[key][50:], value)
        elif value is not None:
            torch.testing.assert_close(got[key], value)


@pytest.mark.parametrize("wanted", ((), ("hidden",), NAMES), ids=("none", "hidden", "all"))
@pytest.mark.parametrize("entropy", (False, True))
def test_no_rows(wanted, entropy):
    c = case(0, entropy=entropy)
    got = c.run(linear_logp, wanted, STATS)
    assert got["logp"].shape == got["entropy"].shape == (0,)
    for n in wanted:
        assert got[f"d_{n}"].shape == getattr(c, n).shape
        assert not got[f"d_{n}"].any(), "no rows: no gradient"


def test_no_rows_backward_needs_a_graph():
    hidden = torch.empty(0, 3, requires_grad=True)
    linear_logp(hidden, torch.randn(5, 3), torch.empty(0, dtype=torch.int64)).sum().backward()
    assert hidden.grad.shape == (0, 3)


H, W, T = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 4])


@pytest.mark.parametrize(
    ("args", "options", "says"),
    (
        ((H[0], W, T), {}, r"hidden \(3,\)"),
        ((H, W[None], T), {}, r"weight \(1, 5, 3\)"),
        ((H, torch.randn(5, 2), T), {}, r"hidden \(4, 3\).*weight \(5, 2\)"),
        ((H, W[:0], T), {}, r"weight \(0, 3\)"),
        ((H, W, T, torch.randn(4)), {}, r"bias \(4,\)"),
        ((H, W, T), {"lora": (torch.randn(2, 4), torch.randn(5, 2), 1.0)}, r"lora A \(2, 4\)"),
        ((H, W, T), {"lora": (torch.randn(2, 3), torch.randn(5, 1), 1.0)}, r"lora B \(5, 1\)"),
        ((H, W, T), {"lora": (torch.randn(2, 3), torch.randn(4, 2), 1.0)}, r"lora B \(4, 2\)"),
        ((H, W.bfloat16(), T), {}, r"cast.*torch.float32.*torch.bfloat16"),
        ((H.long(), W.long(), T), {}, r"float dtype.*torch.int64"),
        ((H, W.to("meta"), T), {}, r"one device.*meta"),
        ((H, W, T[:3]), {}, r"int64 \[4\].*\(3,\)"),
        ((H, W, T[None]), {}, r"\(1, 4\)"),
        ((H, W, T.int()), {}, r"torch.int32"),
        ((H, W, T.to("meta")), {}, r"target int64 \[4\] on cpu.*meta"),
        ((H, W, T + 1), {}, r"\[0, 5\).*got 1 to 5"),
        ((H, W, T - 99), {}, r"\[0, 5\).*got -99 to -95"),
        ((H, W, T), {"stats": ("entropy", "entropie")}, r"entropy, log_sum.*got \['entropie'\]"),
        ((H, W, T), {"softcap": 0.0}, r"softcap.*0.0"),
        ((H, W, T), {"softcap": math.nan}, r"softcap.*nan"),
    ),
)
def test_refusals_repeat_what_they_got(args, options, says):
    with pytest.raises(ValueError, match=says):
        linear_logp(*args, **options)
