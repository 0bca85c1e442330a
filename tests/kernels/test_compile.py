"""torch.compile of the caller takes linear_logp in one graph, forward and backward."""

import pytest
import torch
from fastdpo_kernels import linear_dpo, linear_logp, tiles
from torch._dynamo.testing import CompileCounterWithBackend

from .cases import NAMES, budget, case
from .dpo_cases import batch, budget_for, parts


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


# what opcheck asks: the schema tells all that is changed, fakes have the real shapes and strides, the
# derivative is autograd's own business, and AOT's graphs give what eager calls give, for this M and any
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
CHECKS += ("test_aot_dispatch_static", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("stats", ("", "entropy"))
@pytest.mark.parametrize("name", ("forward", "frozen", "keep", "recompute"))
def test_opcheck_linear_logp(name, stats):
    wanted = {"forward": (), "frozen": ("hidden",)}.get(name, NAMES)
    c = case().to(torch.float32)
    inputs = [getattr(c, n).clone().requires_grad_(n in wanted) for n in NAMES]
    args = (*inputs, c.target, 0.5, c.scale, None, stats, name, 37, None)
    torch.library.opcheck(torch.ops.fastdpo.linear_logp, args, test_utils=CHECKS)
    if not wanted:
        return
    with torch.no_grad():
        logp, *saved = torch.ops.fastdpo.linear_logp(*args)
    entropy = saved.pop(0) if stats else None
    if name == "frozen":
        saved.pop()  # all that is asked of it without entropy
    need = [n in wanted for n in NAMES]
    inputs = [t.detach() for t in inputs]
    upstream = (torch.randn(7), None if entropy is None else torch.randn(7))
    args = (*upstream, *inputs, c.target, logp, entropy, saved, 0.5, c.scale, None, name, 37, None, need)
    torch.library.opcheck(torch.ops.fastdpo.linear_logp_backward, args, test_utils=CHECKS)


@pytest.mark.parametrize("plan_name", ("forward", "frozen", "keep", "parts", "recompute"))
def test_opcheck_linear_dpo(plan_name):
    b = batch(3)
    wanted = {"forward": (), "frozen": ("hidden",)}.get(plan_name, NAMES)
    rows = {"parts": max(b.groups), "recompute": 1}.get(plan_name, sum(b.groups))
    memory = budget_for(b, rows, torch.float32)
    ways = {name for name, _ in parts(b, memory, torch.float32)}
    assert plan_name not in ("keep", "parts", "recompute") or ("recompute" in ways) == (
        plan_name == "recompute"
    )
    head = b.head.to(torch.float32)
    leaves = [getattr(head, n).clone().requires_grad_(n in wanted) for n in NAMES]
    by_row = [b.extras[n].float() for n in ("ref_token_logp", "offset", "pair_weight", "token_weight")]
    tensors = (head.target, b.cu_resp, b.pairs, *by_row, torch.tensor(b.groups))
    options = ("sigmoid", 0.1, 0.1, 0.5, head.scale, None, memory, -100)
    args = (*leaves, *tensors, *options, "weight" in wanted, [n in wanted for n in NAMES])
    torch.library.opcheck(torch.ops.fastdpo.linear_dpo, args, test_utils=CHECKS)


@pytest.mark.parametrize("wanted", ((), ("hidden",), ("hidden", "weight")), ids=str)
@pytest.mark.parametrize("run", (linear_logp, linear_dpo))
def test_another_number_of_rows_compiles_nothing_again(run, wanted):
    weight = torch.randn(257, 16, requires_grad="weight" in wanted)
    pairs = (torch.tensor([0, 3, 7]), torch.tensor([[0, 1]])) if run is linear_dpo else ()
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def loss(hidden, target, *pairs):
        out = run(2 * hidden, weight, target, *pairs)
        return out.sum() if run is linear_logp else out[0]

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for M in (12, 30, 47):
        hidden, target = torch.randn(M, 16, requires_grad="hidden" in wanted), torch.randint(0, 257, (M,))
        bounds = (torch.tensor([0, 3, M]), *pairs[1:]) if pairs else ()
        for t in (hidden, target):
            torch._dynamo.mark_dynamic(t, 0)
        found = []
        for function in (compiled, loss):
            leaves = [t for t in (hidden, weight) if t.requires_grad]
            out = function(hidden, target, *bounds)
            grads = torch.autograd.grad(out, leaves) if leaves else ()
            found.append([out.detach(), *grads])
        for ours, plain in zip(*found, strict=True):
            assert torch.equal(ours, plain)
    assert counter.frame_count == 1


def test_an_exported_module_takes_any_number_of_rows():
    class Model(torch.nn.Module):
        def forward(self, hidden, weight, target):
            return linear_logp(hidden, weight, target)

    draw = lambda M: (torch.randn(M, 8), torch.randn(50, 8), torch.arange(M))
    sizes = ({0: torch.export.Dim.DYNAMIC}, None, {0: torch.export.Dim.DYNAMIC})
    made, inputs = torch.export.export(Model(), draw(7), dynamic_shapes=sizes), draw(11)
    assert torch.equal(made.module()(*inputs), linear_logp(*inputs))


def test_an_operators_results_are_not_scaled_by_its_backward():
    b = batch(3, lora=False, bias=False).head
    tensors = (None, None, None, b.target, torch.tensor([0, 3, len(b.target)]), torch.tensor([[0, 1]]))
    options = ("sigmoid", 0.1, 0.0, 1.0, 1.0, None, None, -100, False, [True, *[False] * 4])
    hidden = b.hidden.requires_grad_()
    out = torch.ops.fastdpo.linear_dpo(hidden, b.weight, *tensors, *[None] * 5, *options)
    before = out[4].clone()
    (first,) = torch.autograd.grad(3 * out[0], hidden, retain_graph=True)
    assert torch.equal(out[4], before) and torch.equal(first, 3 * before)
    assert torch.equal(torch.autograd.grad(out[0], hidden)[0], before)
