"""Values and every gradient of linear_logp against the reference, for each plan and option."""

import itertools

import pytest
import torch
from fastdpo_kernels import linear_logp, plan, reference
from torch.utils.flop_counter import FlopCounterMode

from .cases import (  # noqa: F401
    NAMES,
    STATS,
    assert_as_good,
    budget,
    case,
    error,
    many_chunks,
    needs_vectors,
    vectors,
)

pytestmark = pytest.mark.usefixtures("many_chunks")
SUBSETS = [s for n in range(6) for s in itertools.combinations(NAMES, n)]
PLAIN = {"bias": False, "lora": False, "scale": 1}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def flop_counter():
    # torch's own table lacks the in-place form
    flops = lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: flops})


# one row, fewer rows than a SIMD lane, more than one; a vocabulary inside one chunk, and with a
# short last chunk
@pytest.mark.parametrize("M", (1, 7, 65))
@pytest.mark.parametrize("V", (5, 257, 1001))
@pytest.mark.parametrize("D", (3, 33))
@pytest.mark.parametrize("name", ("keep", "recompute"))
def test_odd_shapes(M, V, D, name):
    c = case(M, V, D).to(torch.float32)
    assert_as_good(c, torch.float32, stats=STATS, memory_budget=budget(name, c))
    assert_as_good(c, torch.float32, wanted=("hidden",), stats=STATS)
    assert_as_good(c, torch.float32, wanted=(), stats=STATS)


@pytest.mark.parametrize("wanted", SUBSETS, ids="-".join)
@pytest.mark.parametrize("softcap", (None, 3.0))
@pytest.mark.parametrize("name", ("keep", "recompute"))
def test_every_gradient_subset(wanted, softcap, name):
    c = case(softcap=softcap)
    assert_as_good(c, torch.float64, wanted, memory_budget=budget(name, c))


@pytest.mark.parametrize("wanted", [s for s in SUBSETS if s], ids="-".join)
@pytest.mark.parametrize("softcap", (None, 3.0))
def test_entropy_gradient(wanted, softcap):
    # after a keep or frozen forward, whose own backward has no entropy in it
    assert_as_good(case(softcap=softcap, entropy=True), torch.float64, wanted, stats=("entropy",))


def test_entropy_gradient_alone():
    c = case(softcap=3.0)
    hidden = c.hidden.requires_grad_()
    grads = []
    for function in (linear_logp, reference.linear_logp):
        _, values = function(hidden, c.weight, c.target, softcap=3.0, stats=("entropy",))
        grads.append(torch.autograd.grad(values["entropy"].sum(), hidden)[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ("keep", "recompute"))
@pytest.mark.parametrize("options", ({}, PLAIN, {"softcap": 4.0}))
def test_dtypes(dtype, name, options):
    c = case(65, 1001, **options).to(dtype)
    assert_as_good(c, dtype, stats=STATS, memory_budget=budget(name, c))
    assert_as_good(c, dtype, wanted=("hidden",), stats=STATS)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_logp_is_float32_accurate(dtype):
    # twice plain torch's error would be 1e-2 nats: logits here are never rounded to half
    c = case(65, 1001, size=3).to(dtype)
    truth = c.to(torch.float64).run(reference.linear_logp, ())["logp"]
    assert (c.run(linear_logp, ())["logp"] - truth).abs().max() < 2e-5


@pytest.mark.parametrize("softcap", (None, 3.0))
@pytest.mark.parametrize("name", ("keep", "recompute"))
def test_gradcheck(softcap, name):
    c = case(3, 41, 4, softcap=softcap, scale=1.3)
    tensors = [getattr(c, n).requires_grad_() for n in NAMES]

    def function(hidden, weight, bias, a, b):
        options = dict(lora=(a, b, 0.5), softcap=softcap, scale=1.3, stats=("entropy",))
        options["memory_budget"] = budget(name, c)
        logp, values = linear_logp(hidden, weight, c.target, bias, **options)
        return logp, values["entropy"]

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("softcap", (None, 3.0))
def test_uninitialised_memory_is_never_read(softcap, monkeypatch):
    real = torch.empty

    def poisoned(*args, **kwargs):
        out = real(*args, **kwargs)
        return out.fill_(float("nan")) if out.dtype.is_floating_point else out

    monkeypatch.setattr(torch, "empty", poisoned)
    for name, wanted in itertools.product(("keep", "recompute"), ((), ("hidden",), NAMES)):
        c = case(softcap=softcap).to(torch.bfloat16)
        assert_as_good(c, c.hidden.dtype, wanted, stats=STATS, memory_budget=budget(name, c))


def test_shipped_chunk_sizes_and_a_tied_head(monkeypatch):
    # buffers large enough for huge pages; the head is the embedding too, and gets one gradient
    monkeypatch.undo()
    V, D = 80000, 16
    tokens, target = torch.randint(0, V, (2, 65))
    table = torch.randn(V, D)
    assert plan(65, V, D, dtype=table.dtype, train_weight=True).chunks > 1

    def gradient(function, dtype):
        weight = table.to(dtype, copy=True).requires_grad_()
        function(torch.tanh(weight[tokens]), weight, target).sum().backward()
        return weight.grad

    truth = gradient(reference.linear_logp, torch.float64)
    plain = error(gradient(reference.linear_logp, torch.float32), truth)
    assert error(gradient(linear_logp, torch.float32), truth) <= 2 * plain + 1e-6


@pytest.mark.parametrize(
    ("name", "wanted", "gemms"),
    (("forward", (), 1), ("frozen", ("hidden",), 2), ("keep", NAMES, 3), ("recompute", NAMES, 4)),
)
def test_plans_pay_what_they_say(name, wanted, gemms):
    c = case(bias=False, lora=False)
    (M, D), V = c.hidden.shape, len(c.weight)
    memory = budget(name, c) if name in ("keep", "recompute") else None
    told = plan(
        *(M, V, D),
        dtype=c.hidden.dtype,
        train_weight="weight" in wanted,
        need_grad=bool(wanted),
        memory_budget=memory,
    )
    with flop_counter() as counter:
        # naming entropy for its value alone must not cost a GEMM
        c.run(linear_logp, wanted, stats=STATS, memory_budget=memory)
    assert told.name == name
    assert counter.get_total_flops() == told.flops == gemms * 2 * M * V * D


def test_no_grad_costs_a_forward():
    c = case(bias=False, lora=False)
    weight = c.weight.requires_grad_()
    with torch.no_grad(), flop_counter() as counter:
        assert not linear_logp(c.hidden, weight, c.target).requires_grad
    assert counter.get_total_flops() == 2 * c.hidden.numel() * len(weight)


@pytest.mark.parametrize(("wanted", "gemms"), ((("a", "b", "hidden"), 2), (("a", "b"), 1), (("weight",), 2)))
def test_skips_gemms_nobody_needs(wanted, gemms):
    c = case()
    (M, D), V, r = c.hidden.shape, len(c.weight), len(c.a)
    with flop_counter() as counter:
        c.run(linear_logp, wanted)
    low_rank = 8 * 2 * M * (V + D) * r  # each of the LoRA's own GEMMs, with room
    assert gemms * 2 * M * V * D <= counter.get_total_flops() < gemms * 2 * M * V * D + low_rank


@pytest.mark.parametrize("name", ("keep", "recompute"))
@pytest.mark.parametrize("wanted", (("hidden",), NAMES), ids=("frozen", "trained"))
def test_same_bits_again(name, wanted):
    c = case(65, 1001, softcap=5.0).to(torch.float32)
    first, second = (c.run(linear_logp, wanted, STATS, memory_budget=budget(name, c)) for _ in range(2))
    for key, value in first.items():
        assert value is None or torch.equal(value, second[key]), key


def test_backward_twice_and_only_first_order():
    c = case()
    weight, hidden = c.weight.requires_grad_(), c.hidden.requires_grad_()
    logp = linear_logp(hidden, weight, c.target)
    logp.sum().backward(retain_graph=True)
    first = weight.grad.clone()
    logp.sum().backward()
    assert torch.equal(weight.grad, 2 * first)
    logp = linear_logp(hidden, weight, c.target)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(logp.sum(), hidden, create_graph=True)


def test_only_entropy_carries_a_gradient():
    c = case()
    options = dict(stats=STATS)
    logp, values = linear_logp(c.hidden.requires_grad_(), c.weight, c.target, **options)
    assert logp.requires_grad
    assert [name for name, value in values.items() if value.requires_grad] == ["entropy"]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64), ids=str)
def test_inside_nothing_runs_under_autocast(dtype):
    # neither tensors of autocast's own dtype, nor float64, which it leaves alone
    c = case(lora=True).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = c.run(linear_logp)
    for key, value in c.run(linear_logp).items():
        assert torch.equal(value, inside[key]), key


def test_strided_inputs():
    c = case(bias=False, lora=False, scale=1)
    wide = torch.stack((c.hidden, -c.hidden), -1)[..., 0]
    tall = c.weight.t().contiguous().t()
    assert not wide.is_contiguous() and not tall.is_contiguous()
    got = linear_logp(wide, tall, c.target)
    torch.testing.assert_close(got, linear_logp(c.hidden, c.weight, c.target))


@needs_vectors
@pytest.mark.parametrize("function", (linear_logp, reference.linear_logp))
def test_published_vectors(function):
    v = vectors()["fused_linear_logp"]
    exact = lambda name: torch.tensor(v[name], dtype=torch.float64)
    labels = torch.tensor(v["labels"])
    scored = labels >= 0  # linear_logp gets scored rows only; the vectors keep an ignored one
    hidden, weight, bias = (exact(n).requires_grad_() for n in ("hidden", "weight", "bias"))
    logp = function(hidden[scored], weight, labels[scored], bias)
    (logp * exact("upstream_grad")[scored]).sum().backward()
    near = dict(rtol=0, atol=1e-10)
    torch.testing.assert_close(logp.detach(), exact("per_token_logps")[scored], **near)
    torch.testing.assert_close(hidden.grad, exact("grad_hidden"), **near)
    torch.testing.assert_close(weight.grad, exact("grad_weight"), **near)
    torch.testing.assert_close(bias.grad, exact("grad_bias"), **near)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ("keep", "recompute"))
@pytest.mark.parametrize("softcap", (None, 4.0))
def test_on_a_gpu(dtype, name, softcap, device="cuda"):
    c = case(65, 1001, 32, softcap=softcap).on(device).to(dtype)
    assert_as_good(c, dtype, stats=STATS, memory_budget=budget(name, c))
    assert_as_good(c, dtype, wanted=("hidden",), stats=STATS)
    c.d_entropy = c.d_logp
    assert_as_good(c, dtype, stats=STATS)
