"""linear_logp on a GPU in bfloat16: by the Triton kernels where the chip has a tile, else by torch."""

import math

import pytest
import torch
from fastdpo_kernels import Plan, linear_logp, reference, tiles
from fastdpo_kernels.head import Head
from fastdpo_kernels.head_pass import backend_for

from .cases import STATS, assert_as_good, budget, case, error, needs_into

pytestmark = pytest.mark.gpu
ALL = ("hidden", "weight", "bias")


def head_case(M=300, V=2049, D=64, **options):
    return case(M, V, D, lora=False, **options).on("cuda").to(torch.bfloat16)


@pytest.mark.parametrize("D", (64, 33), ids=("descriptors", "pointers"))
@pytest.mark.parametrize("softcap", (None, 4.0))
@pytest.mark.parametrize("name", ("keep", "recompute"))
def test_every_plan(D, softcap, name):
    c = head_case(D=D, softcap=softcap)
    assert_as_good(c, torch.bfloat16, ALL, STATS, memory_budget=budget(name, c))
    assert_as_good(c, torch.bfloat16, ("hidden",), STATS)
    c.d_entropy = c.d_logp
    assert_as_good(c, torch.bfloat16, ALL, STATS)


@pytest.mark.parametrize("lora", (False, True), ids=("triton", "cublas"))
@pytest.mark.parametrize("name", ("keep", "recompute"))
def test_a_gradient_that_is_added_to(name, lora):
    c = case(300, 2049, 64, lora=lora, entropy=name == "recompute").on("cuda")
    needs_into(c, torch.bfloat16, name, ALL)


@pytest.mark.parametrize("size", (1, 4))
def test_log_probs_in_nats(size):
    c = head_case(1000, 32000, 512, size=size)
    truth = c.to(torch.float64).run(reference.linear_logp, ())["logp"]
    nats = (c.run(linear_logp, ())["logp"] - truth).abs()
    assert nats.max() < 1e-4 and nats.median() < 2e-5


def test_gradients_beside_one_rounding():
    c = head_case(1000, 32000, 512)
    wanted = ("hidden", "weight")
    truth = c.to(torch.float64).run(reference.linear_logp, wanted)
    p = torch.log_softmax(c.scale * (c.hidden.double() @ c.weight.double().T + c.bias.double()), -1).exp()
    dz = -p
    dz[torch.arange(len(c.target)), c.target] += 1
    dz = (c.scale * c.d_logp[:, None] * dz).bfloat16()
    once = {"d_hidden": dz @ c.weight, "d_weight": dz.T @ c.hidden}
    for options in ({"memory_budget": 1 << 40}, {"memory_budget": 1 << 20}):
        got = c.run(linear_logp, wanted, **options)
        for name, times in (("d_hidden", 1.5), ("d_weight", 2.0)):
            assert error(got[name], truth[name]) <= times * error(once[name], truth[name]), name


@pytest.mark.parametrize("softcap", (None, 4.0))
def test_same_bits_with_and_without_gradient_and_statistics(softcap):
    c = head_case(3000, 20000, softcap=softcap)
    runs = [c.run(linear_logp, w, s)["logp"] for w in ((), ("hidden",), ALL) for s in ((), STATS)]
    runs += [c.run(linear_logp, ALL, memory_budget=1 << 20)["logp"] for _ in range(2)]
    assert all(torch.equal(runs[0], other) for other in runs)


@pytest.mark.parametrize("D", (512, 33), ids=("descriptors", "pointers"))
@pytest.mark.parametrize("softcap", (None, 4.0))
def test_the_diagonal_has_the_tiles_bits(D, softcap, monkeypatch):
    """Of the target's logit: else Tile.diagonal is to be False on this chip."""
    c = head_case(1000, 20000, D, softcap=softcap)
    tile, results = tiles.tile(c.hidden.device, c.hidden.dtype), []
    if tile is None:
        pytest.skip("no tile for this chip")
    head = Head(c.weight, c.bias, None, None, 1.0, c.scale, softcap)
    for diagonal in (True, False):
        monkeypatch.setattr(tiles, "tile", lambda *_, diagonal=diagonal: tile._replace(diagonal=diagonal))
        state, _ = backend_for(head, c.hidden).forward(
            head, c.hidden, c.target, Plan("forward", 0, 0, 1, 1000, 20000)
        )
        results.append(state.target_logit)
    assert torch.equal(*results), (results[0] - results[1]).abs().max()


def test_both_ends_of_the_range():
    c = head_case(300, 3000)
    c.hidden[::2] *= 60  # -95 nats and less
    c.hidden[7] = math.nan
    truth = c.to(torch.float64).run(reference.linear_logp, ("hidden",))
    assert (truth["logp"] < -200).any()
    got = c.run(linear_logp, ("hidden",))
    others = torch.arange(300, device="cuda") != 7
    torch.testing.assert_close(got["logp"][others].double(), truth["logp"][others], rtol=1e-5, atol=1e-4)
    assert got["logp"][7].isnan() and got["d_hidden"][7].isnan().all()
    assert error(got["d_hidden"][others], truth["d_hidden"][others]) < 1e-2


def test_one_graph():
    c = head_case(300, 3000)
    weight = c.weight.requires_grad_()
    compiled = torch.compile(linear_logp, fullgraph=True)
    grads = []
    for function in (compiled, linear_logp):
        weight.grad = None
        function(c.hidden, weight, c.target).sum().backward()
        grads.append(weight.grad)
    assert torch.equal(*grads)
