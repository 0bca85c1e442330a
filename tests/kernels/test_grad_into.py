"""linear_logp(grad_into=...): weight's gradient is added to a main gradient by the GEMM, and nowhere else."""

import sys

import pytest
import torch
from fastdpo_kernels import linear_logp, reference

from .cases import NAMES, budget, case, error, many_chunks, needs_into, plan_module  # noqa: F401
from .test_plan import largest_of

PLANS = ("keep", "recompute")


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("entropy", (False, True))
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.usefixtures("many_chunks")
def test_two_microbatches_add_up(dtype, entropy, name):
    needs_into(case(40, softcap=3.0, entropy=entropy), dtype, name, NAMES)


@pytest.mark.parametrize("wanted", ((), ("hidden",), ("bias",), ("a", "b"), ("hidden", "weight")), ids=str)
def test_whatever_else_is_trained(wanted):
    needs_into(case(), torch.float32, "keep", wanted)


def leaves_of(c):
    return c.hidden.clone().requires_grad_(), c.weight.clone().requires_grad_()


def test_a_second_backward_adds_again():
    c = case(lora=False).to(torch.float32)
    hidden, weight = leaves_of(c)
    into = torch.zeros_like(weight)
    logp = linear_logp(hidden, weight, c.target, c.bias, grad_into=into)
    logp.sum().backward(retain_graph=True)
    once = into.clone()
    logp.sum().backward()
    assert once.abs().max() > 0
    torch.testing.assert_close(into, 2 * once)


@pytest.mark.parametrize("name", PLANS)
def test_without_a_gradient_nothing_is_added(name):
    c = case(lora=False).to(torch.float32)
    hidden, weight = leaves_of(c)
    into = torch.full_like(weight, 3.0)
    options = {"grad_into": into, "memory_budget": budget(name, c)}
    with torch.no_grad():
        value = linear_logp(hidden, weight, c.target, **options)
    logp, stats = linear_logp(hidden, weight, c.target, stats=("mean_logit",), **options)
    assert torch.equal(logp, value) and not value.requires_grad
    (logp.detach() + hidden.sum() + 0 * stats["mean_logit"]).sum().backward()
    linear_logp(hidden[:0], weight, c.target[:0], **options).sum().backward()
    assert (into == 3).all()


def test_it_may_change_between_forward_and_backward():
    """As where several microbatches are scored before the first backward."""
    c = case(lora=False).to(torch.float32)
    into = torch.zeros_like(c.weight)
    parts = [
        linear_logp(h, c.weight, t, grad_into=into).sum()
        for h, t in zip(c.hidden.split(4), c.target.split(4))
    ]
    for part in parts:
        part.backward()
    whole = torch.zeros_like(into)
    linear_logp(c.hidden, c.weight, c.target, grad_into=whole).sum().backward()
    torch.testing.assert_close(into, whole)


def test_hooks_and_copies_of_weight_see_nothing():
    c = case(lora=False).to(torch.float32)
    weight = torch.nn.Parameter(c.weight)
    weight.register_hook(lambda grad: pytest.fail("brought a gradient"))
    into = torch.zeros_like(c.weight)
    copy = weight.to(torch.bfloat16)
    linear_logp(c.hidden.bfloat16(), copy, c.target, grad_into=into).sum().backward()
    assert weight.grad is None and into.abs().max() > 0


@pytest.mark.parametrize("wanted", ((), ("hidden",)), ids=str)
def test_under_torch_compile_it_is_out_of_the_graph(wanted, monkeypatch):
    c = case(lora=False).to(torch.float32)
    for operator in ("operator", "backward_operator"):
        monkeypatch.setattr(sys.modules[linear_logp.__module__], operator, None)

    def run(function):
        into = torch.ones_like(c.weight)
        hidden = c.hidden.clone().requires_grad_("hidden" in wanted)
        for factor in (1.0, 2.0):  # what is compiled for one tensor is not bound to it
            function(hidden, factor, into).sum().backward()
        return into, hidden.grad

    def loss_of(hidden, factor, into):
        logp, stats = linear_logp(2 * hidden, c.weight, c.target, c.bias, stats=("entropy",), grad_into=into)
        return factor * logp + stats["entropy"]

    torch._dynamo.reset()
    for ours, plain in zip(run(torch.compile(loss_of, backend="aot_eager")), run(loss_of), strict=True):
        assert (ours is None and plain is None) or torch.equal(ours, plain)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", PLANS)
def test_nothing_of_its_size_is_made_beside_it(dtype, name, monkeypatch):
    monkeypatch.setattr(plan_module, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(plan_module, "BLOCK_WIDTH", 512)
    c = case(16, 9001, 48, lora=False, bias=False).to(dtype)
    options = {"memory_budget": budget(name, c)}
    into = torch.zeros(c.weight.shape)

    def largest(**more):
        hidden, weight = leaves_of(c)
        loss = linear_logp(hidden, weight, c.target, **options, **more).sum()
        return largest_of(loss.backward)

    assert largest(grad_into=into) < c.weight.nbytes / 2
    assert largest() >= c.weight.nbytes


def test_refusals():
    c = case(lora=False).to(torch.bfloat16)
    V, D = c.weight.shape
    good = torch.zeros(V, D)
    wrong = (good.bfloat16(), good.double(), good[:-1], torch.zeros(D, V).t(), good.to("meta"))
    for into in (*wrong, torch.zeros(V, D, requires_grad=True)):
        with pytest.raises(ValueError, match=r"needs grad_into torch.float32 \(257, 33\) on cpu, contiguous"):
            linear_logp(c.hidden, c.weight, c.target, grad_into=into)


@pytest.mark.parametrize(("name", "least"), (("keep", 4), ("recompute", 1000)))
def test_eight_microbatches_in_half_are_nearer_to_the_truth(name, least):
    """Than eight gradients of weight's copy in half, each rounded to it before it is added. What is left with
    a kept matrix is that matrix's rounding."""
    c = case(64, V=130, lora=False, bias=False).to(torch.bfloat16)
    main, truth = torch.zeros(130, 33), torch.zeros(130, 33, dtype=torch.float64)
    weight, memory = torch.nn.Parameter(c.weight.float()), {"memory_budget": {"keep": 1 << 30}.get(name, 1)}
    for hidden, target in zip(c.hidden.split(8), c.target.split(8)):
        linear_logp(hidden, weight.bfloat16(), target, grad_into=main, **memory).sum().backward()
        linear_logp(hidden, weight.bfloat16(), target, **memory).sum().backward()
        exact = c.weight.double().requires_grad_()
        reference.linear_logp(hidden.double(), exact, target).sum().backward()
        truth += exact.grad
    assert least * error(main, truth) < error(weight.grad, truth)
