"""Both ends of the range, NaN and inf, and masked tokens, by the Triton kernels."""

import importlib
import math

import pytest
import torch
from fastdpo_kernels import linear_logp, reference, tiles

from .cases import STATS, budget, error
from .interpreted import (
    SMALL,
    assert_right,
    fma_loses,
    fma_rounded_twice,
    head_case,
    interpreted,
    many_chunks,  # noqa: F401
    small_tiles,  # noqa: F401
    use_fma,
)
from .test_edges import logits_case as strided_logits_case

if not interpreted:
    pytest.skip("test_interpreter.py runs this", allow_module_level=True)

from fastdpo_kernels import triton_head

ALL = ("hidden", "weight", "bias")
WAYS = {"forward": (), "frozen": ("hidden",), "keep": ALL, "recompute": ALL}


def logits_case(logits, target):
    c = strided_logits_case(logits, target).to(torch.float32)
    c.weight = c.weight.contiguous()  # strided weights take torch
    return c


def options_of(name, c):
    return {"memory_budget": budget(name, c)} if name in ("keep", "recompute") else {}


def extremes(V, target):
    """Rows whose target is sure, hopeless, out of range both ways, and like all others."""
    rows = {name: [0.0] * V for name in ("sure", "surest", "low", "lower", "lowest", "wide", "equal")}
    other, third = (target + V // 2) % V, (target + 1) % V
    rows["sure"][target], rows["surest"][target] = 40.0, 95.0
    for name, gap in (("low", 90.0), ("lower", 130.0), ("lowest", 1000.0)):
        rows[name][target], rows[name][other] = -gap / 2, gap / 2
    rows["wide"][target], rows["wide"][other], rows["wide"][third] = 1e4, -1e4, 9999.0
    rows["deep"] = [-1e4] * V
    rows["deep"][other] = 1e4
    return list(rows.values())


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("target", (2, 137))
def test_extreme_logits(name, target, many_chunks):  # noqa: F811
    # the target in the first chunk or in the last; frozen and recompute go by chunks
    c = logits_case(extremes(140, target), [target] * 8)
    got = c.run(linear_logp, WAYS[name], **options_of(name, c))["logp"]
    truth = c.to(torch.float64).run(reference.linear_logp, ())["logp"]
    truth[0] = -139 * math.exp(-40)  # float64 has no digits for it beside 1
    truth[1] = 0.0
    torch.testing.assert_close(got.double(), truth, rtol=5e-6, atol=1e-37)
    assert truth[4] == -1000 and truth[7] == -2e4
    assert_right(c, WAYS[name], STATS, **options_of(name, c))


def test_an_exponent_is_one_fma(monkeypatch):
    """r is rounded as a number of z's size, and so would be z * log2 e: at 1e4 nats to 5e-4 bits. An fma
    keeps what both lose, so only the difference is rounded, and logits as large as these cost nothing. The
    interpreter before triton 3.9 rounds the product, and is off by as much as this says; no GPU does."""
    assert fma_loses() == 0
    c = logits_case([[1e4, 9999.0, -1e4] + [0.0] * 137] * 2, [0, 0])
    truth = c.to(torch.float64).run(reference.linear_logp, ())["logp"]
    error = lambda: (c.run(linear_logp, ())["logp"].double() - truth).abs().max().item()
    half_a_place = 2.0**-11 * math.log(2)  # of a float32 near 1e4 * log2 e, in nats
    assert error() < 5e-6
    use_fma(monkeypatch, fma_rounded_twice)
    assert fma_loses() == 2.0**-24
    assert 1e-5 < error() < half_a_place


@pytest.mark.parametrize("name", ("frozen", "keep", "recompute"))
def test_gradients_of_rows_out_of_range_beside_others(name, many_chunks):  # noqa: F811
    # most of the even rows lose their target by more than 95 nats, to tokens of any chunk
    c = head_case(70, 150)
    c.hidden[::2] *= 40
    z = c.to(torch.float64).run(reference.linear_logp, ())["logp"]
    assert (z[::2] < -96).sum() > 10 and (z[1::2] > -94).all()
    assert_right(c, WAYS[name], **options_of(name, c))
    got, truth = (
        c.to(dtype).run(function, ("hidden",))["d_hidden"].double()
        for dtype, function in ((torch.float32, linear_logp), (torch.float64, reference.linear_logp))
    )
    torch.testing.assert_close(got, truth, rtol=2e-4, atol=2e-5)


def test_a_small_slope_over_a_large_sum_is_no_denormal():
    """A row's slope over its sum goes onto its hidden state, for dW: at a sum of 9e31 that would be 1e-42
    here, which has 10 bits in float32, and none in bfloat16."""
    gap = 40 + math.log(9e31 / 69)
    c = logits_case([[-gap] + [0.0] * 69], [0])
    c.hidden = torch.cat((c.hidden, torch.full((1, 1), 1e-7)), 1)
    c.weight = torch.cat((c.weight, torch.zeros(70, 1)), 1)
    c.d_logp = torch.full((1,), 1e-3)
    truth = c.to(torch.float64).run(reference.linear_logp, ALL[:2])["d_weight"][:, -1]
    got = c.run(linear_logp, ALL[:2], **options_of("keep", c))["d_weight"][:, -1]
    assert error(got, truth) < 5e-6


@pytest.mark.parametrize("name", ("frozen", "keep", "recompute"))
@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
def test_a_bad_row_stays_alone(name, bad, many_chunks):  # noqa: F811
    c = head_case(7, 130).to(torch.float32)
    run = lambda: c.run(linear_logp, WAYS[name], ("entropy", "mean_logit"), **options_of(name, c))
    good = run()
    c.hidden[3, 1] = bad
    got = run()
    others = [i for i in range(7) if i != 3]
    for key in ("logp", "entropy", "mean_logit", "d_hidden"):
        assert torch.equal(got[key][others], good[key][others]), key
    assert got["logp"][3].isnan() and got["entropy"][3].isnan()
    assert got["d_hidden"][3].isnan().all()


@pytest.mark.parametrize("name", ("frozen", "keep", "recompute"))
def test_tokens_masked_by_bias(name, many_chunks):  # noqa: F811
    # the whole first tile and then some; the others must be as if those tokens did not exist
    stats = ("entropy", "log_sum_sq_probs", "is_top1")
    c = head_case(7, 150, entropy=True).to(torch.float32)
    c.target = c.target.clamp(min=80)
    small = head_case(7, 150)
    small.__dict__.update(c.to(torch.float64).__dict__)
    small.weight, small.bias = small.weight[80:], small.bias[80:]
    small.target = c.target - 80
    c.bias[:80] = -math.inf
    got = c.run(linear_logp, WAYS[name], stats, **options_of(name, c))
    truth = small.run(reference.linear_logp, WAYS[name], stats)
    for key, value in truth.items():
        if value is None:
            continue
        if key in ("d_weight", "d_bias"):
            assert (got[key][:80] == 0).all()
            got[key] = got[key][80:]
        torch.testing.assert_close(got[key].double(), value, rtol=2e-5, atol=2e-5)


def test_a_masked_target_is_minus_infinity():
    c = head_case(3, 70)
    c.bias[c.target] = -math.inf
    got = c.to(torch.float32).run(linear_logp, ())["logp"]
    assert (got == -math.inf).all()


@pytest.mark.parametrize("target", (-1, 70))
def test_a_target_outside_the_vocabulary_is_nan(target, monkeypatch):
    # on a device, where looking would wait for it
    monkeypatch.setattr(
        importlib.import_module("fastdpo_kernels.linear_logp"), "check_target_values", lambda target, V: None
    )
    c = head_case(3, 70).to(torch.float32)
    good = c.run(linear_logp, ("hidden",))
    c.target[1] = target
    got = c.run(linear_logp, ("hidden",))
    assert got["logp"][1].isnan() and got["d_hidden"][1].isnan().all()
    assert torch.equal(got["logp"][::2], good["logp"][::2])
    assert torch.equal(got["d_hidden"][::2], good["d_hidden"][::2])


def test_the_targets_logit_is_the_accumulators(monkeypatch):
    # as if the diagonal and the tile differed by 0.01: only the reference may notice
    monkeypatch.setattr(tiles, "tile", lambda device, dtype: SMALL._replace(diagonal=False))
    c = head_case(7, 130).to(torch.float32)
    right = c.run(linear_logp, ALL)
    start = triton_head.start

    def off(head, x, target):
        state, rest = start(head, x, target)
        state.target_logit.add_(0.01)
        state.peak.add_(0.01)
        return state, rest

    monkeypatch.setattr(triton_head, "start", off)
    for key, value in c.run(linear_logp, ALL).items():
        if value is not None:
            torch.testing.assert_close(value, right[key], rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(tiles, "tile", lambda device, dtype: SMALL)
    assert (c.run(linear_logp, ())["logp"] - right["logp"]).min() > 0.005, "the diagonal's stands"


def test_a_row_whose_every_logit_is_minus_infinity_is_nan():
    """inf in a dimension that all tokens weigh negatively: NaN as in torch, 0 would be the best of all."""
    c = head_case(3, 130, bias=False, scale=1).to(torch.float32)
    c.weight[:, 0] = -c.weight[:, 0].abs()
    c.hidden[1, 0] = math.inf
    assert c.run(reference.linear_logp, ())["logp"][1].isnan()
    assert c.run(linear_logp, ())["logp"][1].isnan()
