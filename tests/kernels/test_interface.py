"""linear_logp and linear_dpo as those call them who know Liger's, CCE's or torch's cross-entropy: -100, any
leading shape, autocast. DTensors: test_dtensor.py; the operators: test_compile.py; modules: test_modules.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from fastdpo_kernels import linear_dpo, linear_logp, reference

from . import dpo_cases
from .cases import NAMES, STATS, assert_as_good, budget, case, many_chunks  # noqa: F401

pytestmark = pytest.mark.usefixtures("many_chunks")
IGNORED = [0, 3, 4]
COUNTED = [1, 2, 5, 6]
WANTED = ((), ("hidden",), NAMES)


def with_ignored(index=-100, **options):
    c = case(**options)
    c.target[IGNORED] = index
    return c


@pytest.mark.parametrize("wanted", WANTED, ids=("none", "hidden", "all"))
@pytest.mark.parametrize("entropy", (False, True))
@pytest.mark.parametrize("name", ("keep", "recompute"))
def test_ignore_index(name, entropy, wanted):
    c = with_ignored(entropy=entropy, softcap=3.0)
    memory = budget(name, c)
    assert_as_good(c, torch.float64, wanted, STATS, memory_budget=memory)
    got = c.run(linear_logp, wanted, STATS, memory_budget=memory)
    for key in ("logp", *STATS, *(("d_hidden",) if wanted else ())):
        assert not got[key][IGNORED].any(), key
    # the others are as without them
    few = case()
    few.__dict__.update(c.__dict__)
    few.hidden, few.target, few.d_logp = c.hidden[COUNTED], c.target[COUNTED], c.d_logp[COUNTED]
    few.d_entropy = c.d_entropy[COUNTED] if entropy else None
    for key, value in few.run(reference.linear_logp, wanted, STATS).items():
        if value is not None:
            by_row = key in ("logp", *STATS, "d_hidden")
            torch.testing.assert_close(got[key][COUNTED] if by_row else got[key], value)


def test_ignore_index_is_any_number_as_in_cross_entropy():
    c = with_ignored(index=5, bias=False, lora=False, scale=1)
    weight = c.weight.requires_grad_()
    for index in (5, -1):
        target = c.target.where(c.target != 5, index)
        theirs = F.cross_entropy(c.hidden @ weight.T, target, ignore_index=index, reduction="sum")
        ours = -linear_logp(c.hidden, weight, target, ignore_index=index).sum()
        torch.testing.assert_close(ours, theirs)
        grads = [torch.autograd.grad(loss, weight)[0] for loss in (ours, theirs)]
        torch.testing.assert_close(*grads)
    with pytest.raises(ValueError, match=r"\[0, 257\) or ignore_index: got -1"):
        linear_logp(c.hidden, weight, target)


@pytest.mark.parametrize("function", (linear_logp, reference.linear_logp))
def test_ignore_index_on_every_row(function):
    c = with_ignored()
    c.target[:] = -100
    for key, value in c.run(function).items():
        assert not value.any(), key


@pytest.mark.parametrize("wanted", WANTED[1:], ids=("hidden", "all"))
@pytest.mark.parametrize("bad", (math.nan, math.inf))
def test_ignore_index_over_a_bad_row(bad, wanted):
    c = with_ignored()
    good = c.run(linear_logp, wanted, STATS)
    c.hidden[3, 1] = bad
    got = c.run(linear_logp, wanted, STATS)
    others = [i for i in range(7) if i != 3]
    for key in ("logp", *STATS):  # 0, whatever hidden is
        assert torch.equal(got[key], good[key]), key
    assert torch.equal(got["d_hidden"][others], good["d_hidden"][others])


@pytest.mark.parametrize("options", dpo_cases.LOSSES, ids=dpo_cases.named)
@pytest.mark.parametrize("wanted", WANTED, ids=("none", "hidden", "all"))
@pytest.mark.parametrize("parts", (False, True))
def test_ignore_index_in_linear_dpo(parts, wanted, options):
    b = dpo_cases.batch(2)
    whole, cu = b.head.target.clone(), b.cu_resp
    first = cu[:-1][cu.diff() > 1].long()  # a row of each response that has another
    b.head.target[first] = -100
    b.extras["ref_token_logp"][first] = math.nan
    memory = dpo_cases.budget_for(b, max(b.groups)) if parts else 1 << 40
    dpo_cases.assert_as_good(b, torch.float64, wanted, memory_budget=memory, **options)
    got = b.run(linear_dpo, wanted, memory_budget=memory, **options)
    assert not got["token_logp"][first].any() and not (wanted and got["d_hidden"][first].any())
    # the same batch without those rows
    counted = b.head.target != -100
    number = counted.long().cumsum(0)
    few = dpo_cases.batch(2)
    few.head.hidden, few.head.target = few.head.hidden[counted], whole[counted]
    few.cu_resp = torch.cat((cu[:1], number[cu[1:].long() - 1].int()))
    for name in ("ref_token_logp", "token_weight"):
        few.extras[name] = few.extras[name][counted]
    for key, value in few.run(reference.linear_dpo, wanted, **options).items():
        if value is not None:
            by_row = key in ("token_logp", "d_hidden")
            torch.testing.assert_close(got[key][counted] if by_row else got[key], value)


@pytest.mark.parametrize("shape", ((), (7,), (2, 3), (2, 1, 4), (3, 0)), ids=str)
@pytest.mark.parametrize("wanted", WANTED, ids=("none", "hidden", "all"))
def test_any_leading_shape(shape, wanted):
    c = case(math.prod(shape), entropy=True)
    flat = c.run(linear_logp, wanted, STATS)
    of_rows = ("hidden", "target", "d_logp", "d_entropy")
    c.__dict__.update({n: getattr(c, n).reshape(shape + getattr(c, n).shape[1:]) for n in of_rows})
    for key, value in c.run(linear_logp, wanted, STATS).items():
        if value is None:
            continue
        assert value.shape == (shape if key in ("logp", *STATS) else getattr(c, key[2:]).shape), key
        assert torch.equal(value.reshape(flat[key].shape), flat[key]), key


def test_a_shape_for_each_next_token():
    """[B, T - 1, D] as a slice, which lies in memory with gaps."""
    hidden, weight = torch.randn(2, 5, 8), torch.randn(11, 8)
    labels = torch.randint(0, 11, (2, 5))
    got = linear_logp(hidden[:, :-1], weight, labels[:, 1:])
    logits = hidden.double() @ weight.double().T
    truth = logits.log_softmax(-1)[:, :-1].gather(-1, labels[:, 1:, None])[..., 0]
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", (linear_logp, linear_dpo))
@pytest.mark.parametrize("half", (torch.bfloat16, torch.float16), ids=str)
def test_autocast_casts_as_linear_does(function, half):
    """All that meets in a GEMM, from mixed dtypes; gradients come back in each tensor's own."""
    c = case(8).to(torch.float32)
    leaves = [getattr(c, n) for n in NAMES]
    leaves[0], leaves[3] = leaves[0].to(half), leaves[3].double().float()
    pairs = (torch.tensor([0, 3, 8]), torch.tensor([[0, 1]]))

    def run(leaves, **autocast):
        hidden, weight, bias, a, b = leaves = [t.detach().requires_grad_() for t in leaves]
        options = dict(bias=bias, lora=(a, b, 0.5))
        with torch.autocast("cpu", **autocast):
            if function is linear_logp:
                out = linear_logp(hidden, weight, c.target, **options)
            else:
                out = linear_dpo(hidden, weight, c.target, *pairs, **options)[0]
        return out, torch.autograd.grad(out.sum(), leaves)

    got, grads = run(leaves, dtype=half)
    want, narrow = run([t.to(half) for t in leaves], enabled=False)
    assert got.dtype == torch.float32 and torch.equal(got, want)
    for leaf, grad, truth in zip(leaves, grads, narrow, strict=True):
        assert grad.dtype == leaf.dtype and torch.equal(grad, truth.to(leaf.dtype))
    with pytest.raises(ValueError, match="cast hidden or the head first"):
        run(leaves, enabled=False)


def test_autocast_leaves_float64_alone():
    h, w, target = torch.randn(4, 3).double(), torch.randn(5, 3), torch.arange(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear_logp(h, w.double(), target).dtype == torch.float64
        with pytest.raises(ValueError, match="one float dtype"):  # as torch's linear
            linear_logp(h, w, target)
        with pytest.raises(RuntimeError):
            F.linear(h, w)


def test_linear_dpo_takes_rows_alone():
    h = torch.randn(1, 4, 3)
    with pytest.raises(ValueError, match=r"hidden \[M, D\], got hidden \(1, 4, 3\)"):
        linear_dpo(
            h, torch.randn(5, 3), torch.zeros(1, 4).long(), torch.tensor([0, 4]), torch.zeros(0, 2).long()
        )
