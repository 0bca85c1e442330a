"""linear_dpo: no pairs, no rows, NaN, torch.compile, a second backward, and what is refused."""

import gc
import math
import re
import weakref

import pytest
import torch
import torch.utils.checkpoint
from fastdpo_kernels import chunked, linear_dpo, plan, reference
from fastdpo_kernels.pair_losses import PairLoss
from torch.utils.flop_counter import FlopCounterMode

from .cases import NAMES, many_chunks  # noqa: F401
from .dpo_cases import assert_as_good, batch, budget_for, parts, parts_budget

pytestmark = pytest.mark.usefixtures("many_chunks")


def few(dtype=torch.float32):
    """hidden, weight, target, cu_resp, pairs of two groups, 3 + 4 and 2 + 1 rows."""
    torch.manual_seed(0)
    head = torch.randn(10, 3, dtype=dtype), torch.randn(50, 3, dtype=dtype), torch.randint(0, 50, (10,))
    return *head, torch.tensor([0, 3, 7, 9, 10]), torch.tensor([[0, 1], [3, 2]])


@pytest.mark.parametrize("wanted", ((), ("hidden",), NAMES), ids=("none", "frozen", "trained"))
@pytest.mark.parametrize("what", ("pairs", "rows", "responses"))
def test_nothing_of(what, wanted):
    b = batch(0)
    del b.extras["offset"], b.extras["pair_weight"]
    b.pairs = b.pairs[:0]
    if what != "pairs":
        b.head.hidden, b.head.target = b.head.hidden[:0], b.head.target[:0]
        b.cu_resp = torch.zeros(1 if what == "responses" else 3, dtype=torch.int32)
        b.extras = {name: t[:0] for name, t in b.extras.items()}
    got = b.run(linear_dpo, wanted)
    assert got["loss"] == 0 and got["margin"].shape == (0,)
    assert got["token_logp"].shape == (len(b.head.hidden),)
    assert got["logratio"].shape == (len(b.cu_resp) - 1,)
    for name in wanted:
        assert got[f"d_{name}"].shape == getattr(b.head, name).shape and not got[f"d_{name}"].any()


def test_empty_responses_count_nothing():
    hidden, weight, target, _, pairs = few(torch.float64)
    cu = torch.tensor([0, 0, 7, 7, 10])
    args = (hidden, weight, target, cu, pairs)
    for ours, truth in zip(linear_dpo(*args)[1], reference.linear_dpo(*args)[1]):
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("bad", (math.nan, math.inf))
@pytest.mark.parametrize("budget", (None, 1))
@pytest.mark.parametrize("wanted", (("hidden",), NAMES), ids=("frozen", "trained"))
def test_a_bad_row_stays_in_its_pairs(bad, budget, wanted):
    b = batch(1, extras=False)
    good = b.run(linear_dpo, wanted, memory_budget=budget)
    row = int(b.cu_resp[-2])  # of the last response
    b.head.hidden[row, 1] = bad
    got = b.run(linear_dpo, wanted, memory_budget=budget)
    touched = (b.pairs == len(b.cu_resp) - 2).any(1)
    assert touched.any() and not touched.all()
    assert torch.equal(got["margin"][~touched], good["margin"][~touched])
    assert got["margin"][touched].isnan().all() and got["loss"].isnan()
    start = sum(b.groups[:-1])
    assert torch.equal(got["d_hidden"][:start], good["d_hidden"][:start])
    assert got["d_hidden"][row].isnan().all()


def test_far_apart_pairs():
    # margins of +-2000 nats: the loss is exact, its slope 0 or 1
    args = (torch.eye(2), torch.zeros(8, dtype=torch.int64), torch.arange(0, 9, 4))
    rows = torch.tensor([[-500.0, 0.0]] * 4 + [[0.0, -500.0]] * 4)
    for pair in ([0, 1], [1, 0]):
        results = []
        for function, dtype in ((linear_dpo, torch.float32), (reference.linear_dpo, torch.float64)):
            hidden = rows.to(dtype, copy=True).requires_grad_()
            total, _ = function(hidden, args[0].to(dtype), *args[1:], torch.tensor([pair]), beta=1.0)
            total.backward()
            results.append((total.detach().double(), hidden.grad.double()))
        assert results[0][0].item() == (2000.0 if pair[0] == 0 else 0.0)
        for ours, truth in zip(*results):
            torch.testing.assert_close(ours, truth, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
@pytest.mark.parametrize("loss", ("sigmoid", "hinge", "ipo"))
@pytest.mark.parametrize("as_list", (True, False))
def test_compiled_caller_has_no_graph_break(backend, loss, as_list):
    torch._dynamo.reset()
    b = batch(2, softcap=5.0)
    budget = budget_for(b, max(b.groups), torch.float32) - 1
    assert len(parts(b, budget, torch.float32)) > 1
    groups = b.groups if as_list else torch.tensor(b.groups)
    b.extras = {name: t.float() for name, t in b.extras.items()}

    def caller(hidden, weight, **options):
        options.update(b.extras, groups=groups, loss=loss, memory_budget=budget)
        total, stats = linear_dpo(torch.tanh(hidden), weight, *rest, **options)
        return total / len(b.pairs), stats.margin

    rest = (b.head.target, b.cu_resp, b.pairs)
    results = []
    for function in (caller, torch.compile(caller, fullgraph=True, backend=backend)):
        leaves = [getattr(b.head, n).float().requires_grad_() for n in ("hidden", "weight")]
        total, margin = function(*leaves)
        total.backward()
        results.append((total.detach(), margin, *(t.grad for t in leaves)))
        with torch.no_grad():
            assert torch.equal(function(*leaves)[0], total)
    for eager, compiled in zip(*results):
        assert torch.equal(eager, compiled)


def test_compiled_caller_with_a_loss_function():
    torch._dynamo.reset()
    args = few()

    def caller(hidden):
        return linear_dpo(torch.tanh(hidden), *args[1:], loss=lambda m: torch.relu(1 - m))[0] / 2

    gradients = []
    for function in (caller, torch.compile(caller, backend="aot_eager")):
        hidden = args[0].clone().requires_grad_()
        function(hidden).backward()
        gradients.append(hidden.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("reentrant", (False, True))
def test_inside_a_checkpoint(reentrant):
    hidden, *rest = few()
    gradients = []
    for function in (lambda f, *x, **_: f(*x), torch.utils.checkpoint.checkpoint):
        leaves = [t.clone().requires_grad_() for t in (hidden, rest[0])]
        head = lambda h, w: linear_dpo(torch.tanh(h), w, *rest[1:], memory_budget=1)[0]
        function(head, *leaves, use_reentrant=reentrant).div(2).backward()
        gradients.append([t.grad for t in leaves])
    for plain, checkpointed in zip(*gradients):
        assert torch.equal(plain, checkpointed)


def test_one_backward_and_first_order_only():
    hidden, *rest = few()
    hidden.requires_grad_()
    total, _ = linear_dpo(hidden, *rest)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
    total, _ = linear_dpo(hidden, *rest)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(total, hidden, create_graph=True)


def test_what_does_not_hold_together_is_seen_without_looking():
    # what makes a device's loss NaN, where a CPU raises
    cu = torch.tensor([0, 3, 7, 7, 9, 10])
    nothing = dict.fromkeys(("ref_token_logp", "offset", "pair_weight", "token_weight"))
    options = dict(loss="sigmoid", beta=0.1, label_smoothing=0.0, **nothing)
    loss = lambda pairs, cu=cu: PairLoss(
        cu, torch.tensor(pairs), torch.zeros(10, dtype=torch.bool), **options
    )
    cut = lambda pairs, *bounds: loss(pairs).unsound(bounds).item()
    apart, within_one = [[0, 1], [4, 3]], [[0, 1], [4, 1]]
    assert not cut(apart) and not cut(apart, 7) and not cut(within_one)
    assert cut(apart, 3) and cut(apart, 7, 9) and cut(within_one, 7) and cut(within_one[::-1], 7)
    assert cut(apart, 8) and cut(apart, 5)  # inside a response
    assert not cut([[0, 2]], 7) and cut([[0, 2], [3, 0]], 7)  # an empty response is on either side
    assert cut([[0, -1]])
    for wrong in ([0, 3, 7, 7, 9, 11], [0, 3, 7, 7, 9, 9], [1, 3, 7, 7, 9, 10], [0, 7, 3, 7, 9, 10]):
        seen = loss(within_one, torch.tensor(wrong))
        assert seen.unsound(()).item() and seen.cu.max() <= 10, "nor is memory read that is not ours"


def test_no_grad_costs_a_forward():
    b = batch(3)
    hidden, weight = b.head.hidden.requires_grad_(), b.head.weight.requires_grad_()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        total, _ = linear_dpo(hidden, weight, b.head.target, b.cu_resp, b.pairs)
    assert total.grad_fn is None
    assert counter.get_total_flops() == 2 * hidden.numel() * len(weight)
    sizes = (len(hidden), *weight.shape)
    sized = dict(dtype=hidden.dtype, train_weight=True, groups=b.groups)
    assert plan(*sizes, **sized, need_grad=False).peak_bytes < plan(*sizes, **sized).peak_bytes


def test_a_part_is_gone_before_the_next(monkeypatch):
    real, states = chunked.forward, []

    def watched(*args):
        gc.collect()
        assert all(old() is None for old in states), "its kept matrix is still there"
        state, values = real(*args)
        states.append(weakref.ref(state))
        return state, values

    monkeypatch.setattr(chunked, "forward", watched)
    b = batch(5)
    budget = budget_for(b, max(b.groups)) - 1
    b.run(linear_dpo, memory_budget=budget)
    assert len(states) == len(parts(b, budget)) > 2


@pytest.mark.parametrize(
    ("change", "says"),
    (
        ({"hidden": torch.randn(10, 4)}, r"linear_dpo needs hidden.*hidden \(10, 4\).*weight \(50, 3\)"),
        ({"weight": torch.randn(50, 3).half()}, r"linear_dpo needs one float dtype.*float16"),
        ({"target": torch.zeros(9, dtype=torch.int64)}, r"target int64 \[10\] on cpu.*\(9,\)"),
        ({"target": torch.full((10,), 50)}, r"\[0, 50\).*got 50 to 50"),
        ({"cu_resp": torch.tensor([0.0, 10.0])}, r"cu_resp int32.*\(2,\) torch.float32"),
        ({"cu_resp": torch.tensor([0, 3, 7, 9, 9])}, r"rise from 0 to the 10 rows.*\[0, 3, 7, 9, 9\]"),
        ({"cu_resp": torch.tensor([0, 7, 3, 9, 10])}, r"rise from 0"),
        ({"cu_resp": torch.tensor([1, 3, 7, 9, 10])}, r"rise from 0"),
        ({"pairs": torch.tensor([[0, 1, 2]])}, r"pairs int32 or int64 \[P, 2\].*\(1, 3\)"),
        ({"pairs": torch.tensor([[0, 4]])}, r"responses 0 to 3, got 0 to 4"),
        ({"pairs": torch.tensor([[0, 1]]).to("meta")}, r"one device.*meta"),
        ({"ref_token_logp": torch.randn(9)}, r"ref_token_logp float \[M=10\].*\(9,\)"),
        ({"token_weight": torch.ones(10, dtype=torch.int64)}, r"token_weight float.*torch.int64"),
        ({"offset": torch.randn(3)}, r"offset float \[P=2\].*\(3,\)"),
        ({"pair_weight": torch.ones(2, requires_grad=True)}, r"no gradient for pair_weight"),
        ({"loss": "sigmoidal"}, r"sigmoid, hinge, ipo, or takes a function, got 'sigmoidal'"),
        ({"loss": "hinge", "label_smoothing": 0.1}, r"loss='hinge'"),
        ({"loss": lambda m: m.sum()}, r"one value per pair, \[2\], got \(\)"),
        ({"loss": lambda m: 3.0}, r"got float"),
        ({"beta": 0.0}, r"beta.*0.0"),
        ({"label_smoothing": 1.0}, r"label_smoothing.*1.0"),
        ({"softcap": -1.0}, r"softcap.*-1.0"),
        ({"groups": [7, 2]}, r"add up to M=10, got \[7, 2\], sum 9"),
        ({"groups": [3, 7]}, r"between the responses of a pair, at rows \[3\]"),
        ({"groups": torch.tensor([5, 5])}, r"inside a response.*at rows \[5\]"),
        ({"groups": torch.tensor([7, 3]).to("meta")}, r"Python ints or a CPU tensor.*meta"),
    ),
    ids=lambda x: re.sub(r"\W+", "-", str(x))[:40] if isinstance(x, str) else "",
)
def test_refusals_repeat_what_they_got(change, says):
    names = ("hidden", "weight", "target", "cu_resp", "pairs")
    arguments = dict(zip(names, few())) | change
    with pytest.raises(ValueError, match=says):
        linear_dpo(**arguments)


def test_reference_computed_with_the_same_groups_gives_the_very_bits():
    b = batch(4, V=1001, D=5)
    budget = parts_budget(b, max(b.groups), torch.bfloat16)
    assert len(parts(b, budget, torch.bfloat16)) > 1
    assert_as_good(b, torch.bfloat16, memory_budget=budget, groups=b.groups)
    frozen = [t.bfloat16() for t in (b.head.hidden, b.head.weight)]
    rest = dict(target=b.head.target, cu_resp=b.cu_resp, pairs=b.pairs, groups=b.groups, memory_budget=budget)
    trained = [t.clone().requires_grad_() for t in frozen]
    with torch.no_grad():
        ref = linear_dpo(*trained, **rest)[1].token_logp
    assert not linear_dpo(*trained, **rest, ref_token_logp=ref)[1].margin.any()
