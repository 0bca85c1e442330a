"""Loss, stats and every gradient of linear_dpo against the reference, for each plan and option."""

import itertools
import random

import pytest
import torch
from fastdpo_kernels import linear_dpo, plan, reference
from fastdpo_kernels.pair_losses import groups_of
from torch.utils.flop_counter import FlopCounterMode

from .cases import NAMES, many_chunks  # noqa: F401
from .dpo_cases import (
    FUNCTION,
    LOSSES,
    UPSTREAM,
    assert_as_good,
    batch,
    budget_for,
    named,
    parts,
    parts_budget,
)

pytestmark = pytest.mark.usefixtures("many_chunks")
SUBSETS = [s for n in range(6) for s in itertools.combinations(NAMES, n)]


def budgets(b, dtype=torch.float64):
    """One part; parts that keep and one group too large; one part again, recomputed."""
    several, again = parts_budget(b, max(b.groups), dtype), budget_for(b, min(b.groups), dtype) - 1
    assert [name for name, _ in parts(b, None, dtype)] == ["keep"]
    names = [name for name, _ in parts(b, several, dtype)]
    assert names.count("recompute") == b.groups.count(max(b.groups)) and len(names) > 1
    assert parts(b, again, dtype) == [("recompute", len(b.head.hidden))]
    return {"one": None, "several": several, "again": again}


@pytest.mark.parametrize("loss", LOSSES, ids=named)
@pytest.mark.parametrize("which", ("one", "several", "again"))
@pytest.mark.parametrize("wanted", (NAMES, ("hidden",), ()), ids=("trained", "frozen", "none"))
def test_every_loss(loss, which, wanted):
    b = batch()
    assert_as_good(b, torch.float64, wanted, memory_budget=budgets(b)[which], **loss)


@pytest.mark.parametrize("wanted", SUBSETS, ids="-".join)
@pytest.mark.parametrize("which", ("one", "several"))
def test_every_gradient_subset(wanted, which):
    b = batch(1, softcap=3.0)
    assert_as_good(b, torch.float64, wanted, memory_budget=budgets(b)[which])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("which", ("one", "several", "again"))
@pytest.mark.parametrize("loss", (LOSSES[0], LOSSES[3], LOSSES[4]), ids=named)
def test_dtypes(dtype, which, loss):
    b = batch(2, V=1001, D=5)  # few columns: dW in fp32, which parts of half heads need, is less than E
    assert_as_good(b, dtype, memory_budget=budgets(b, dtype)[which], **loss)
    assert_as_good(b, dtype, ("hidden",), **loss)


@pytest.mark.parametrize("missing", ("ref_token_logp", "token_weight", "offset", "pair_weight"))
def test_each_extra_may_be_missing(missing):
    b = batch(3)
    del b.extras[missing]
    assert_as_good(b, torch.float64, memory_budget=budgets(b)["several"])


# rows, vocabulary, hidden, chunks and pairs of any shape: what a generator of examples would try
@pytest.mark.parametrize("seed", range(60))
def test_random_shapes_and_options(seed):
    draw = random.Random(seed)
    pick = draw.choice
    b = batch(
        seed,
        pick((1, 2, 5, 12)),
        pick((1, 2, 37, 38, 500)),
        pick((1, 2, 17, 64)),
        pick((1, 3, 20)),
        extras=pick((True, False)),
        bias=pick((True, False)),
        lora=pick((True, False)),
        scale=pick((1.0, 0.25, 3.0)),
        softcap=pick((None, 2.0, 30.0)),
    )
    present = [n for n in NAMES if getattr(b.head, n) is not None]
    wanted = tuple(n for n in present if draw.random() < 0.7)
    groups = pick((None, b.groups, torch.tensor(b.groups)))
    budget = pick((None, 3000, 20000, budget_for(b, max(b.groups)), budget_for(b, min(b.groups))))
    dtype = pick((torch.float64, torch.float64, torch.float32, torch.bfloat16))
    assert_as_good(b, dtype, wanted, memory_budget=budget, groups=groups, **pick(LOSSES))


def test_loss_is_a_sum_over_pairs_and_backward_scales_it():
    b = batch(4)
    half = batch(4)
    half.extras["pair_weight"] = b.extras["pair_weight"] / 2
    whole, halved = b.run(linear_dpo), half.run(linear_dpo)
    assert halved["loss"].item() == pytest.approx(whole["loss"].item() / 2, rel=1e-12)
    hidden = b.head.hidden.requires_grad_()
    total, _ = linear_dpo(hidden, b.head.weight, b.head.target, b.cu_resp, b.pairs)
    (unit,) = torch.autograd.grad(total, hidden)
    total, _ = linear_dpo(hidden, b.head.weight, b.head.target, b.cu_resp, b.pairs)
    (UPSTREAM * total).backward()
    torch.testing.assert_close(hidden.grad, UPSTREAM * unit)


def test_groups_found_are_the_smallest_blocks():
    b = batch(5, 9)
    budget = budget_for(b, 1)
    given = b.run(linear_dpo, groups=b.groups, memory_budget=budget)
    found = b.run(linear_dpo, memory_budget=budget)
    for key, value in given.items():
        torch.testing.assert_close(value, found[key])
    # winners first, then losers, is one block: right, but never cut
    lengths = [2, 3, 4, 5]
    cu, pairs = torch.tensor([0, *lengths]).cumsum(0), torch.tensor([[0, 2], [1, 3]])
    assert groups_of(cu, pairs) == [14]
    assert groups_of(cu, pairs[:1]) == [9, 5]
    assert groups_of(cu, pairs[:0]) == lengths
    assert groups_of(cu[:1], pairs[:0]) == []


def test_a_loss_function_may_couple_the_pairs_of_a_group():
    b = batch(6)
    # the group of each pair; the loss is the square of a group's summed losses
    starts = torch.tensor([0, *b.groups]).cumsum(0)
    of_pair = torch.searchsorted(starts, b.cu_resp.long()[b.pairs[:, 0].long()], right=True) - 1
    together = (of_pair[:, None] == of_pair).double()

    def loss(margin):
        each = torch.nn.functional.softplus(-margin)
        return each * (together.to(each.dtype) @ each)

    assert_as_good(b, torch.float64, loss=loss, memory_budget=budgets(b)["several"])


def test_what_a_loss_function_sees():
    b = batch(6)
    budget, seen = budgets(b)["several"], []

    def loss(margin):
        seen.append(margin.detach().clone())
        return torch.relu(1 - margin)

    final = b.run(linear_dpo, loss=loss, memory_budget=budget)["margin"]
    sizes = [rows for _, rows in parts(b, budget)]
    assert len(seen) == len(sizes) + 1 and torch.equal(seen[-1], final)
    first_row = b.cu_resp[b.pairs.amin(1).long()]
    for margin, stop in zip(seen, torch.tensor(sizes).cumsum(0)):
        so_far = first_row < stop
        assert torch.equal(margin[so_far], final[so_far])
        torch.testing.assert_close(margin[~so_far], -b.extras["offset"][~so_far])


def test_same_bits_again_and_without_gradient():
    b = batch(7, softcap=5.0)
    for budget in budgets(b, torch.float32).values():
        first, second = (b.run(linear_dpo, NAMES, torch.float32, memory_budget=budget) for _ in range(2))
        for key, value in first.items():
            assert torch.equal(value, second[key]), key
        leaves = [t.float().requires_grad_() for t in (b.head.hidden, b.head.weight)]
        options = dict(memory_budget=budget, softcap=5.0)
        rest = (b.head.target, b.cu_resp, b.pairs)
        with_gradient = linear_dpo(*leaves, *rest, **options)
        with torch.no_grad():
            without = linear_dpo(*leaves, *rest, **options)
        assert torch.equal(with_gradient[0], without[0]) and not without[0].requires_grad
        for one, other in zip(with_gradient[1], without[1]):
            assert torch.equal(one, other) and not one.requires_grad


def test_margin_against_its_own_reference_is_zero():
    b = batch(8, extras=False)
    leaves = [t.float().requires_grad_() for t in (b.head.hidden, b.head.weight)]
    rest = (b.head.target, b.cu_resp, b.pairs)
    budget = budgets(b, torch.float32)["several"]
    with torch.no_grad():
        _, ref = linear_dpo(*leaves, *rest, memory_budget=budget)
    _, stats = linear_dpo(*leaves, *rest, ref.token_logp, memory_budget=budget)
    assert not stats.margin.any() and not stats.logratio.any()


def test_uninitialised_memory_is_never_read(monkeypatch):
    real = torch.empty

    def poisoned(*args, **kwargs):
        out = real(*args, **kwargs)
        return out.fill_(float("nan")) if out.dtype.is_floating_point else out

    b = batch(9, D=5, softcap=3.0)
    ways = list(itertools.product(budgets(b, torch.bfloat16).values(), ((), ("hidden",), NAMES)))
    monkeypatch.setattr(torch, "empty", poisoned)
    for budget, wanted in ways:
        assert_as_good(b, torch.bfloat16, wanted, memory_budget=budget)


def test_plans_pay_what_they_say():
    b = batch(10, bias=False, lora=False)
    (M, D), V = b.head.hidden.shape, len(b.head.weight)
    flops = lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]  # torch's own table lacks the in-place form
    large = max(b.groups)
    assert b.groups.count(large) == 1
    expected = {"one": 6 * M, "several": 6 * (M - large) + 8 * large, "again": 8 * M}
    for (which, budget), wanted in itertools.product(budgets(b).items(), (NAMES, ("hidden",), ())):
        told = plan(
            *(M, V, D),
            dtype=torch.float64,
            train_weight="weight" in wanted,
            groups=b.groups,
            memory_budget=budget,
            need_grad=bool(wanted),
        )
        mapping = {torch.ops.aten.addmm_: flops}
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            b.run(linear_dpo, wanted, memory_budget=budget)
        paid = {NAMES: expected[which], ("hidden",): 4 * M, (): 2 * M}[wanted]
        assert counter.get_total_flops() == told.flops == paid * V * D


def test_half_dW_is_summed_in_float32():
    # 200 equal parts: a bf16 sum stops growing at 256 times one part's share of the last bit
    lengths = [1] * 400
    b = batch(11, 1, 3, 4, extras=False, bias=False, lora=False, scale=1)
    b.head.hidden, b.head.target = b.head.hidden[:2].repeat(200, 1), b.head.target[:2].repeat(200)
    b.cu_resp = torch.tensor([0, *lengths]).cumsum(0)
    b.pairs = torch.arange(400).reshape(200, 2)
    b.groups = [2] * 200
    budget = parts_budget(b, 4, torch.bfloat16)
    assert len(parts(b, budget, torch.bfloat16)) == 200
    assert_as_good(b, torch.bfloat16, ("hidden", "weight"), memory_budget=budget)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64), ids=str)
def test_inside_nothing_runs_under_autocast(dtype):
    b = batch(12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = b.run(linear_dpo, NAMES, dtype, loss=FUNCTION)
    for key, value in b.run(linear_dpo, NAMES, dtype, loss=FUNCTION).items():
        assert torch.equal(value, inside[key]), key


def test_strided_hidden_and_a_tied_head():
    b = batch(13, bias=False, lora=False, scale=1)
    M = len(b.head.hidden)
    tokens = torch.randint(0, len(b.head.weight), (M,))
    budget = budgets(b)["several"]

    def gradient(function, **options):
        table = b.head.weight.clone().requires_grad_()
        hidden = torch.stack((torch.tanh(table[tokens]), table[tokens]), -1)[..., 0]
        assert not hidden.is_contiguous()
        function(hidden, table, b.head.target, b.cu_resp, b.pairs, **options)[0].backward()
        return table.grad

    torch.testing.assert_close(
        gradient(linear_dpo, memory_budget=budget), gradient(reference.linear_dpo), rtol=1e-9, atol=1e-12
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("loss", LOSSES, ids=named)
def test_on_a_gpu(dtype, loss, device="cuda"):
    b = batch(14, V=1001, D=8)
    several = budgets(b, dtype)["several"]
    b.head, b.cu_resp, b.pairs = b.head.on(device), b.cu_resp.to(device), b.pairs.to(device)
    b.extras = {name: t.to(device) for name, t in b.extras.items()}
    for budget, wanted in ((None, NAMES), (several, NAMES), (None, ("hidden",)), (None, ())):
        torch.cuda.set_sync_debug_mode("error" if loss.get("loss") is not FUNCTION else "default")
        try:
            b.head.to(dtype)
            b.run(linear_dpo, wanted, dtype, memory_budget=budget, groups=b.groups, **loss)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_as_good(b, dtype, wanted, memory_budget=budget, groups=b.groups, **loss)
