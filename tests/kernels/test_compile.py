"""torch.compile of the caller takes linear_logp in one graph, forward and backward."""

from functools import partial

import pytest
import torch
from fastdpo_kernels import linear_logp, tiles

from .cases import budget, case


@pytest.mark.parametrize("wanted", ((), ("hidden",), ("hidden", "weight", "b")), ids=str)
@pytest.mark.parametrize("name", ("keep", "recompute"))
def test_one_graph(wanted, name):
    c = case(softcap=3.0, entropy=True).to(torch.float32)

    def loss_of(hidden, weight, b):
        logp, stats = linear_logp(
            2 * hidden,
            weight,
            c.target,
            c.bias,
            scale=c.scale,
            softcap=c.softcap,
            lora=(c.a, b, 0.5),
            stats=("is_top1", "entropy"),
            memory_budget=budget(name, c),
        )
        return logp * stats["is_top1"] + stats["entropy"] * 2 + logp

    def gradients(function):
        leaves = {n: getattr(c, n).clone().requires_grad_(n in wanted) for n in ("hidden", "weight", "b")}
        out = function(*leaves.values())
        if wanted:
            out.sum().backward()
        return [out.detach(), *(leaf.grad for leaf in leaves.values())]

    torch._dynamo.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    for ours, plain in zip(gradients(compiled), gradients(loss_of), strict=True):
        assert (ours is None and plain is None) or torch.equal(ours, plain)


def test_looking_for_a_chip_is_no_part_of_the_graph(monkeypatch):
    def tile(device, dtype):
        torch._dynamo.graph_break()  # as a query of the CUDA driver would be
        return None

    monkeypatch.setattr(tiles, "tile", tile)
    c = case(lora=False).to(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(linear_logp, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(c.hidden, c.weight, c.target), linear_logp(c.hidden, c.weight, c.target))


def test_operators_keep_their_word():
    """Their fakes have the real shapes and strides, and no input is changed."""
    c = case(lora=False).to(torch.float32)
    inputs = (c.hidden, c.weight, c.bias, None, None, c.target)
    options = (1.0, 1.0, None)
    check = partial(torch.library.opcheck, test_utils=("test_schema", "test_faketensor"))
    for name in ("forward", "frozen", "keep", "recompute"):
        args = (*inputs, *options, "entropy", name, 3)
        torch.library.opcheck(
            torch.ops.fastdpo.linear_logp, args, test_utils=("test_schema", "test_faketensor")
        )
        if name == "forward":
            continue
        logp, entropy, *saved = torch.ops.fastdpo.linear_logp(*args)
        for d_entropy in (None, entropy.clone()):
            if name == "frozen" and d_entropy is None:
                continue
            upstream = (logp.clone(), d_entropy, *inputs, logp, entropy, saved)
            need = [True, True, True, False, False]
            check(torch.ops.fastdpo.linear_logp_backward, (*upstream, *options, name, 3, need))
