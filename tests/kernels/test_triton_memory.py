"""What the Triton kernels allocate is what `plan` promises. In bfloat16, the dtype they are for: its values
are wrong in the interpreter, its bytes are not."""

import gc

import pytest
import torch
from fastdpo_kernels import linear_logp, plan, tiles

from .cases import STATS, case
from .interpreted import SMALL, interpreted, small_tiles  # noqa: F401

if not interpreted:
    pytest.skip("test_interpreter.py runs this", allow_module_level=True)

from fastdpo_kernels import triton_head

from .test_plan import peak_of

WAYS = {"forward": (), "frozen": ("hidden",), "keep": ("hidden", "weight"), "recompute": ("hidden", "weight")}


@pytest.mark.parametrize("entropy", (False, True))
@pytest.mark.parametrize("name", WAYS)
def test_peak_bytes_is_a_bound(name, entropy, monkeypatch):
    monkeypatch.setattr(tiles, "tile", lambda device, dtype: SMALL._replace(columns=128))
    for product in ("matmul", "matmul_add"):  # cuBLAS takes half operands as they are, a CPU would widen them
        monkeypatch.setattr(triton_head, product, lambda a, b, out: out.zero_())
    M, V, D = 12, 9001, 8
    c = case(M, V, D, bias=False, lora=False, softcap=3.0).to(torch.bfloat16)
    budget = 2 * M * V - 1 if name == "recompute" else None
    train = dict(train_weight="weight" in WAYS[name], need_grad=bool(WAYS[name]))
    told = plan(M, V, D, dtype=torch.bfloat16, memory_budget=budget, backend="triton", **train)
    assert told.name == name
    hidden = c.hidden.requires_grad_("hidden" in WAYS[name])
    weight = c.weight.requires_grad_("weight" in WAYS[name])

    def run():
        logp, stats = linear_logp(hidden, weight, c.target, softcap=3.0, stats=STATS, memory_budget=budget)
        gc.collect()  # the interpreter holds a kernel's tensors in a cycle
        if WAYS[name]:
            (logp + stats["entropy"] if entropy else logp).sum().backward()

    handed_back = 4 * M * 5 + sum(t.nbytes for t in (hidden, weight) if t.requires_grad)
    # of so few columns a frozen head's chunk is all of them, and not the six that its plan allows
    assert told.peak_bytes / (6 if name == "frozen" else 3) <= peak_of(run) <= told.peak_bytes + handed_back


@pytest.mark.parametrize("M", (1, 12))
def test_the_gradient_of_a_bias_is_within_the_bound(M, monkeypatch):
    """Two fp32 columns of V beside a kept matrix of few rows."""
    monkeypatch.setattr(tiles, "tile", lambda device, dtype: SMALL._replace(columns=128))
    for product in ("matmul", "matmul_add"):
        monkeypatch.setattr(triton_head, product, lambda a, b, out: out.zero_())
    V, D = 9001, 8
    c = case(M, V, D, lora=False).to(torch.bfloat16)
    told = plan(M, V, D, dtype=torch.bfloat16, backend="triton", train_weight=True)
    assert told.name == "keep"
    leaves = [t.requires_grad_() for t in (c.hidden, c.weight, c.bias)]

    def run():
        logp = linear_logp(c.hidden, c.weight, c.target, c.bias)
        gc.collect()
        logp.sum().backward()

    assert peak_of(run) <= told.peak_bytes + 4 * M * 5 + sum(t.nbytes for t in leaves)
