"""Values and gradients of linear_logp by the Triton kernels, against the reference in float64."""

import itertools

import pytest
import torch
from fastdpo_kernels import linear_logp, reference, tiles

from .cases import STATS, budget, error, needs_into, needs_vectors, vectors
from .interpreted import (  # noqa: F401
    SMALL,
    assert_right,
    head_case,
    interpreted,
    many_chunks,
    poison,
    small_tiles,
)

if not interpreted:
    pytest.skip("test_interpreter.py runs this", allow_module_level=True)

from fastdpo_kernels import Plan, launch, triton_head
from fastdpo_kernels.head import Head
from fastdpo_kernels.head_pass import Gradients

ALL = ("hidden", "weight", "bias")
PLANS = ("keep", "recompute")


@pytest.mark.parametrize("D", (36, 33), ids=("descriptors", "pointers"))
@pytest.mark.parametrize("softcap", (None, 3.0))
@pytest.mark.parametrize("name", PLANS)
def test_trained(D, softcap, name):
    c = head_case(70, D=D, softcap=softcap).to(torch.float32)
    assert_right(c, ALL, memory_budget=budget(name, c))


@pytest.mark.parametrize("D", (36, 33), ids=("descriptors", "pointers"))
@pytest.mark.parametrize("softcap", (None, 3.0))
@pytest.mark.parametrize("wanted", ((), ("hidden",)), ids=("forward", "frozen"))
def test_frozen_and_forward(D, softcap, wanted):
    assert_right(head_case(70, D=D, softcap=softcap), wanted)


@pytest.mark.parametrize("D", (36, 33), ids=("descriptors", "pointers"))
@pytest.mark.parametrize("options", (dict(diagonal=False), dict(parts=2), dict(parts=4)), ids=str)
def test_tiles_of_other_chips(D, options, monkeypatch):
    monkeypatch.setattr(tiles, "tile", lambda *_: SMALL._replace(**options))
    c = head_case(70, D=D, softcap=3.0).to(torch.float32)
    assert_right(c, ALL, STATS, memory_budget=budget("keep", c))
    assert_right(head_case(70, D=D), ("hidden",))


@pytest.mark.parametrize("D", (36, 33), ids=("descriptors", "pointers"))
@pytest.mark.parametrize("softcap", (None, 3.0))
@pytest.mark.parametrize("scale", (1, 0.7))
def test_whole_tiles(D, softcap, scale, many_chunks, monkeypatch):  # noqa: F811
    """Of the vocabulary, of which no column is masked; no chunk has a program of its own."""
    tails, real = [], launch.run
    tail_of = lambda STEP=None, BN=0, **_: None if STEP is None else STEP < BN
    seen = lambda kernel, *a, **k: tails.append(tail_of(**k)) or real(kernel, *a, **k)
    monkeypatch.setattr(launch, "run", seen)
    for V, tail in ((192, False), (200, True)):
        tails.clear()
        c = head_case(40, V, D=D, softcap=softcap, scale=scale).to(torch.float32)
        assert_right(c, ALL, STATS, memory_budget=budget("recompute", c))
        assert_right(c, ("hidden",))
        assert_right(c)  # all tiles in one pass
        assert set(tails) == {None, tail}


def test_a_span_that_ends_within_a_tile():
    c = head_case(7, 192, bias=False, scale=1).to(torch.float32)
    head = reference_head(c.weight)
    state, _ = triton_head.start(head, c.hidden, c.target)
    state.peak.zero_()
    out, partial = torch.empty(7, 100), torch.empty(1, 2, 7)
    launch.tile_pass(SMALL, head, c.hidden, c.target, (0, 100), state, out=out, partial=partial, sums=True)
    torch.testing.assert_close(partial[0].sum(0), out.sum(1))


def test_no_hidden_states():
    """The GEMM's loop runs once at least: where it would not, another backend is taken."""
    bias = torch.randn(70)
    got = linear_logp(torch.empty(3, 0), torch.empty(70, 0), torch.arange(3), bias)
    torch.testing.assert_close(got, bias.log_softmax(0)[:3])


@pytest.mark.parametrize("softcap", (None, 3.0))
@pytest.mark.parametrize("name", PLANS)
def test_stats_and_the_gradient_of_entropy(softcap, name):
    c = head_case(40, softcap=softcap, entropy=True).to(torch.float32)
    assert_right(c, ALL, STATS, memory_budget=budget(name, c))
    assert_right(c, ("hidden",), STATS)


@pytest.mark.parametrize("entropy", (False, True))
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.usefixtures("many_chunks")
def test_a_gradient_that_is_added_to(entropy, name):
    needs_into(head_case(40, softcap=3.0, entropy=entropy), torch.float32, name, ALL)
    needs_into(head_case(40), torch.float32, name, ())


@pytest.mark.parametrize("stat", STATS)
def test_each_statistic_alone(stat):
    assert_right(head_case(), ("hidden",), (stat,))


@pytest.mark.parametrize(("M", "V", "D"), ((1, 2, 3), (1, 257, 33), (65, 5, 16), (70, 65, 20)))
@pytest.mark.parametrize("name", PLANS)
def test_odd_shapes(M, V, D, name):
    c = head_case(M, V, D).to(torch.float32)
    assert_right(c, ALL, STATS, memory_budget=budget(name, c))
    assert_right(c, ("hidden",))


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("wanted", [s for n in (1, 2) for s in itertools.combinations(ALL, n)], ids="-".join)
def test_gradient_subsets(name, wanted):
    c = head_case().to(torch.float32)
    assert_right(c, wanted, memory_budget=budget(name, c))


@pytest.mark.parametrize("wanted", (("hidden",), ALL), ids=("frozen", "recompute"))
def test_chunks(wanted, many_chunks):  # noqa: F811
    c = head_case(40, 150, softcap=3.0).to(torch.float32)
    options = {"memory_budget": budget("recompute", c)} if "weight" in wanted else {}
    assert_right(c, wanted, STATS, **options)
    # a pass without gradient goes over the whole vocabulary at once, and has the same bits
    with_gradient, without = (c.run(linear_logp, w, **options)["logp"] for w in (wanted, ()))
    assert torch.equal(with_gradient, without)


@pytest.mark.parametrize("softcap", (None, 3.0))
def test_uninitialised_memory_is_never_read(softcap, monkeypatch):
    poison(monkeypatch)
    c = head_case(softcap=softcap).to(torch.float32)
    for wanted, name in itertools.product(((), ("hidden",), ALL), PLANS):
        assert_right(c, wanted, STATS, memory_budget=budget(name, c))


@pytest.mark.parametrize(("name", "wanted"), (("keep", ("hidden",)), ("keep", ALL), ("recompute", ALL)))
def test_same_bits_again(name, wanted):
    c = head_case(65, 130, softcap=5.0).to(torch.float32)
    first, second = (
        c.run(linear_logp, wanted, ("entropy",), memory_budget=budget(name, c)) for _ in range(2)
    )
    for key, value in first.items():
        assert value is None or torch.equal(value, second[key]), key


@pytest.mark.parametrize("name", PLANS)
def test_backward_twice(name):
    c = head_case().to(torch.float32)
    hidden, weight = c.hidden.requires_grad_(), c.weight.requires_grad_()
    logp = linear_logp(hidden, weight, c.target, memory_budget=budget(name, c))
    first, second = (torch.autograd.grad(logp.sum(), (hidden, weight), retain_graph=True) for _ in "12")
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("softcap", (None, 3.0))
def test_a_kept_matrix_is_read_only(softcap):
    """So backwards may share it, on streams of their own too. At the target it is E less the row's sum, and
    each of its rows adds up to 0 as a softmax's gradient does."""
    c = head_case(70, bias=False, scale=1, softcap=softcap).to(torch.float32)
    head, how = Head(c.weight, None, None, None, 1.0, 1.0, softcap), Plan("keep", 0, 0, 1, 70, 130)
    state, _ = triton_head.forward(head, c.hidden, c.target, how)
    kept = state.kept[:, :130]
    before = kept.clone()
    if softcap is None:
        assert (kept.sum(1).abs() <= 1e-6 * state.total).all()
    need = Gradients(hidden=True, weight=True)
    first, second = (
        triton_head.gradients(head, c.hidden, c.target, how, state, need, c.d_logp) for _ in range(2)
    )
    assert torch.equal(kept, before)
    assert torch.equal(first.weight, second.weight) and torch.equal(first.hidden, second.hidden)


def test_a_wrong_entry_at_the_target_costs_the_hidden_gradient_nothing(monkeypatch):
    """It is rounded to E's dtype, and what that lost is added in float32."""
    c = head_case(70, softcap=3.0).to(torch.float32)
    rounded = triton_head._own
    monkeypatch.setattr(triton_head, "_own", lambda *args: rounded(*args).bfloat16().float())
    truth = c.to(torch.float64).run(reference.linear_logp, ("hidden", "weight"))
    got = c.run(linear_logp, ("hidden", "weight"), memory_budget=budget("keep", c))
    assert error(got["d_hidden"], truth["d_hidden"]) < 2e-6 < 1e-4 < error(got["d_weight"], truth["d_weight"])


def test_strided_inputs_and_what_takes_torch():
    c = head_case(bias=False, scale=1).to(torch.float32)
    wide = torch.stack((c.hidden, -c.hidden), -1)[..., 0]
    rows = torch.stack((c.weight, c.weight), 1)[:, 0]
    same = linear_logp(c.hidden, c.weight, c.target)
    assert torch.equal(linear_logp(wide, rows, c.target), same)
    bias, every_other = torch.randn(130, 2), torch.stack((c.target, -c.target), 1)[:, 0]
    with_bias = linear_logp(c.hidden, c.weight, c.target, bias[:, 0].clone())
    assert torch.equal(linear_logp(c.hidden, c.weight, every_other, bias[:, 0]), with_bias)
    columns = c.weight.t().contiguous().t()
    takes_triton = lambda weight: tiles.backend_of(c.hidden, weight, False) == "triton"
    assert not takes_triton(columns) and takes_triton(rows)
    torch.testing.assert_close(linear_logp(c.hidden, columns, c.target), same)


def reference_head(weight):
    return Head(weight, None, None, None, 1.0, 1.0, None)


def test_no_rows():
    c = head_case(0).to(torch.float32)
    got = c.run(linear_logp, ALL, STATS)
    assert got["logp"].shape == got["entropy"].shape == (0,)
    assert not got["d_weight"].any() and not got["d_bias"].any()


@needs_vectors
def test_published_vectors():
    v = vectors()["fused_linear_logp"]
    exact = lambda name: torch.tensor(v[name])
    labels = torch.tensor(v["labels"])
    scored = labels >= 0
    for budget_ in (None, 1):
        hidden, weight, bias = (exact(n).requires_grad_() for n in ("hidden", "weight", "bias"))
        logp = linear_logp(hidden[scored], weight, labels[scored], bias, memory_budget=budget_)
        (logp * exact("upstream_grad")[scored]).sum().backward()
        near = dict(rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(logp.detach(), exact("per_token_logps")[scored], **near)
        for got, name in ((hidden, "hidden"), (weight, "weight"), (bias, "bias")):
            torch.testing.assert_close(got.grad, exact(f"grad_{name}"), **near)


def test_error_in_nats():
    c = head_case(70, size=3).to(torch.float32)
    truth = c.to(torch.float64).run(reference.linear_logp, ())["logp"]
    assert (c.run(linear_logp, ())["logp"] - truth).abs().max() < 2e-5


@pytest.mark.parametrize("seed", range(8))
def test_random_calls(seed):
    torch.manual_seed(seed)
    pick = lambda *choices: choices[torch.randint(len(choices), ()).item()]
    size = lambda most: torch.randint(1, most, ()).item()
    options = dict(bias=pick(True, False), scale=pick(1, 0.3), softcap=pick(None, 2.0, 30.0), size=pick(1, 4))
    c = head_case(size(90), size(200) + 1, size(50), entropy=pick(True, False), **options).to(torch.float32)
    wanted = [name for name in ALL if pick(True, False) and (name != "bias" or c.bias is not None)]
    stats = [name for name in STATS if pick(True, False) or (name == "entropy" and c.d_entropy is not None)]
    assert_right(c, tuple(wanted), tuple(stats), memory_budget=budget(pick(*PLANS), c))
