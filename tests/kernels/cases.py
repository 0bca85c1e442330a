"""Heads of a few sizes, and how the tests compare: against float64, next to plain torch."""

import importlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from fastdpo_kernels import linear_logp, plan, reference

# the function `plan` hides the module of that name
plan_module = importlib.import_module("fastdpo_kernels.plan")

NAMES = ("hidden", "weight", "bias", "a", "b")
VECTORS = Path(__file__).resolve().parents[3] / "shared" / "research" / "vectors.json"
needs_vectors = pytest.mark.skipif(not VECTORS.exists(), reason=f"needs {VECTORS}")
STATS = ("entropy", "log_sum_sq_probs", "mean_logit", "is_top1")


def vectors():
    """The published input and output values, by topic."""
    return json.loads(VECTORS.read_text())


@dataclass
class Case:
    hidden: torch.Tensor
    weight: torch.Tensor
    target: torch.Tensor
    bias: torch.Tensor | None = None
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    d_logp: torch.Tensor | None = None  # upstream gradients, fp64 [M]
    d_entropy: torch.Tensor | None = None

    def to(self, dtype):
        tensors = {n: getattr(self, n) for n in NAMES}
        return replace(self, **{n: t.to(dtype) for n, t in tensors.items() if t is not None})

    def on(self, device):
        tensors = {n: t for n, t in vars(self).items() if isinstance(t, torch.Tensor)}
        return replace(self, **{n: t.to(device) for n, t in tensors.items()})

    def run(self, function, wanted=NAMES, stats=(), **options):
        """{name: value} of logp, the stats, and the gradient of each wanted tensor."""
        leaves = {n: getattr(self, n) for n in NAMES if getattr(self, n) is not None}
        leaves = {n: t.detach().clone().requires_grad_(n in wanted) for n, t in leaves.items()}
        lora = (leaves["a"], leaves["b"], 0.5) if self.a is not None else None
        options.update(scale=self.scale, softcap=self.softcap, lora=lora, stats=stats)
        out = function(leaves["hidden"], leaves["weight"], self.target, leaves.get("bias"), **options)
        logp, values = out if stats else (out, {})
        if logp.requires_grad:
            loss = (logp * self.d_logp).sum()
            if self.d_entropy is not None:
                loss = loss + (values["entropy"] * self.d_entropy).sum()
            loss.backward()
        got = {"logp": logp, **values} | {f"d_{n}": t.grad for n, t in leaves.items()}
        return {n: None if t is None else t.detach() for n, t in got.items()}


def case(M=7, V=257, D=33, *, bias=True, lora=True, scale=0.7, softcap=None, entropy=False, size=1):
    """A random head in float64; its logits are a few nats (times `size`) wide."""
    normal = lambda *shape: torch.randn(*shape, dtype=torch.float64)
    made = Case(normal(M, D), size * normal(V, D) * 2 / D**0.5, torch.randint(0, V, (M,)))
    made.scale, made.softcap, made.d_logp = scale, softcap, normal(M)
    if bias:
        made.bias = normal(V)
    if lora:
        made.a, made.b = normal(3, D) / D**0.5, normal(V, 3)
    if entropy:
        made.d_entropy = normal(M)
    return made


def budget(name, c):
    """A memory_budget that puts a trained head on the plan `name`."""
    (M, D), V = c.hidden.shape, len(c.weight)
    chosen = {"keep": 1 << 40, "recompute": M * V * c.hidden.dtype.itemsize - 1}[name]
    sizes = dict(dtype=c.hidden.dtype, train_weight=True, memory_budget=chosen)
    assert plan(M, V, D, **sizes).name == name
    return chosen


@pytest.fixture
def many_chunks(monkeypatch):
    """Chunks of 37 tokens: 257 is six of them and a short one."""
    monkeypatch.setattr(plan_module, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(plan_module, "BLOCK_WIDTH", 37)


def error(got, truth, least=1e-300):
    """The largest error, relative to the largest true value, or to `least` where all are smaller."""
    return ((got.double() - truth).abs().max() / truth.abs().max().clamp(min=least)).item()


def least_of(name):
    """A mean of logits of some nats, which cancel, is rounded as they are: not by its own size, which for a
    single row is anything."""
    return 1.0 if name == "mean_logit" else 1e-300


def assert_as_good(c, dtype, wanted=NAMES, stats=(), **options):
    """Every result of linear_logp errs at most twice as much as plain torch's in `dtype`."""
    c = c.to(dtype)
    truth = c.to(torch.float64).run(reference.linear_logp, wanted, stats)
    plain = c.run(reference.linear_logp, wanted, stats)
    got = c.run(linear_logp, wanted, stats, **options)
    assert got.keys() == truth.keys()
    for name, value in truth.items():
        if value is None:
            assert got[name] is None, f"{name}: nobody asked for it"
            continue
        is_gradient = name.startswith("d_")
        wide = torch.promote_types(dtype, torch.float32)
        assert got[name].dtype == (dtype if is_gradient else wide), name
        # a gradient in half is one rounding away; a sum over 28 chunks rounds 28 times where torch does
        # once or twice (13 units at most, sums in random order); in float64 plain torch is the truth itself
        roundings = 1 if is_gradient and dtype.itemsize == 2 else 32 if dtype.itemsize < 8 else 256
        eps = roundings * torch.finfo(got[name].dtype).eps
        ours, theirs = (error(values[name], value, least_of(name)) for values in (got, plain))
        assert ours <= 2 * theirs + eps, f"{name}: {ours:.2e}, plain torch {theirs:.2e}"


def needs_into(c, dtype, name, wanted):
    """Two calls of linear_logp into one gradient of weight, which is there before: the sum is right and has
    the same bits every time, and the other gradients are those of calls without."""
    c = c.to(dtype)
    stats = () if c.d_entropy is None else ("entropy",)
    halves = slice(0, len(c.hidden) // 2 or 1), slice(len(c.hidden) // 2 or 1, None)
    by_row = ("hidden", "target", "d_logp", "d_entropy")
    cut = lambda rows: {n: getattr(c, n)[rows] for n in by_row if getattr(c, n) is not None}
    parts = [replace(c, **cut(rows)) for rows in halves]
    wide = torch.promote_types(dtype, torch.float32)
    start = torch.randn(*c.weight.shape, dtype=wide, device=c.weight.device)
    sums = []
    for _ in range(2):
        into = start.clone()
        for part in parts:
            options = {"memory_budget": budget(name, part)}
            got = part.run(linear_logp, wanted, stats, grad_into=into, **options)
            plain = part.run(linear_logp, {*wanted, "weight"}, stats, **options)
            plain["d_weight"] = None
            for n, value in plain.items():
                assert got[n] is None if value is None else torch.equal(got[n], value), n
        sums.append(into)
    assert torch.equal(*sums)
    truth, torchs = start.double(), start.clone()
    for part in parts:
        truth += part.to(torch.float64).run(reference.linear_logp, ("weight",), stats)["d_weight"]
        torchs += part.run(reference.linear_logp, ("weight",), stats)["d_weight"]
    ours, theirs = (error(value, truth) for value in (sums[0], torchs))
    assert ours <= 2 * theirs + 32 * torch.finfo(wide).eps, f"{ours:.2e}, plain torch {theirs:.2e}"
