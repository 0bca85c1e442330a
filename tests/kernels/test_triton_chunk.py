"""Chunks of fp32 logits reduced by Triton's row kernels, against the reference in float64: what a CUDA
device without a tile, a LoRA or strided weights take. The GEMMs are torch's."""

import gc
import importlib
import itertools
import math

import pytest
import torch
from fastdpo_kernels import linear_logp, plan, reference, tiles

from . import dpo_cases
from .cases import NAMES, STATS, assert_as_good, budget, case, many_chunks, needs_into, plan_module  # noqa: F401
from .interpreted import interpreted

if not interpreted:
    pytest.skip("test_interpreter.py runs this", allow_module_level=True)

from fastdpo_kernels import chunk, launch
from fastdpo_kernels.chunk import RowKernels, Softmax, TorchChunk
from fastdpo_kernels.head import Head

from .test_edges import logits_case
from .test_plan import peak_of
from .test_triton_range import extremes

pytestmark = pytest.mark.usefixtures("many_chunks")
WAYS = {"forward": (), "frozen": ("hidden",), "keep": NAMES, "recompute": NAMES}


@pytest.fixture(autouse=True)
def row_kernels(monkeypatch):
    """Every fp32 chunk goes to the kernels, by 32 lanes: a chunk of 37 tokens is a turn and five."""
    monkeypatch.setattr(tiles, "row_kernels", lambda device: True)
    monkeypatch.setattr(chunk, "LANES", 32)
    launched, real = [], launch.run
    seen = lambda kernel, *a, **k: launched.append(kernel.__name__) or real(kernel, *a, **k)
    monkeypatch.setattr(launch, "run", seen)
    yield
    assert {"chunk_sums", "chunk_gradient"} & set(launched), "took torch"


def options_of(name, c):
    return {"memory_budget": budget(name, c)} if name in ("keep", "recompute") else {}


def assert_right(c, name, stats=(), wanted=None):
    c = c.to(torch.float32)
    wanted = [n for n in WAYS[name] if getattr(c, n) is not None] if wanted is None else wanted
    assert_as_good(c, torch.float32, wanted, stats, **options_of(name, c))


@pytest.mark.parametrize("name", ("keep", "recompute"))
def test_a_gradient_that_is_added_to(name):
    needs_into(case(3, 80, softcap=3.0, entropy=True), torch.float32, name, NAMES)
    needs_into(case(3, 80, lora=False), torch.float32, name, ())


@pytest.mark.parametrize("softcap", (None, 3.0))
@pytest.mark.parametrize("name", WAYS)
def test_every_plan(name, softcap):
    assert_right(case(3, 80, softcap=softcap, entropy=name != "forward"), name, STATS)
    assert_right(case(3, 80, softcap=softcap, bias=False, lora=False, scale=1), name)


@pytest.mark.parametrize("stat", STATS)
def test_each_statistic_alone(stat):
    assert_right(case(3, 80), "frozen", (stat,))


@pytest.mark.parametrize("shape", ((1, 2, 3), (1, 75, 33), (9, 5, 16), (3, 37, 20), (3, 38, 7)))
@pytest.mark.parametrize("name", ("frozen", "keep", "recompute"))
def test_odd_shapes(shape, name):
    assert_right(case(*shape), name, STATS)


@pytest.mark.parametrize(
    "wanted", [s for n in (1, 2) for s in itertools.combinations(NAMES, n)], ids="-".join
)
def test_gradient_subsets(wanted):
    assert_right(case(2, 40), "recompute", wanted=wanted)


@pytest.mark.parametrize("dtype", (torch.float16, torch.float64), ids=str)
def test_other_dtypes(dtype):
    # half results; float64 takes torch
    c = case(3, 80, softcap=3.0, entropy=True).to(dtype)
    for name in ("frozen", "keep"):
        assert_as_good(c, dtype, WAYS[name], STATS, **options_of(name, c))
    assert_right(case(1, 20), "forward")


@pytest.mark.parametrize("name", WAYS)
def test_uninitialised_memory_is_never_read(name, monkeypatch):
    def poisoned(real):
        def empty(*args, **kwargs):
            out = real(*args, **kwargs)
            return out.fill_(float("nan")) if out.dtype.is_floating_point else out

        return empty

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    for softcap in (None, 3.0):
        assert_right(case(3, 80, softcap=softcap), name, STATS)


@pytest.mark.parametrize(("name", "target"), zip(WAYS, (2, 77, 2, 77)))
def test_extreme_logits(name, target):
    c = logits_case(extremes(80, target), [target] * 8).to(torch.float32)
    got = c.run(linear_logp, WAYS[name], **options_of(name, c))["logp"]
    truth = c.to(torch.float64).run(reference.linear_logp, ())["logp"]
    truth[0], truth[1] = -79 * math.exp(-40), -79 * math.exp(-95)  # float64 has no digits for them beside 1
    torch.testing.assert_close(got.double(), truth, rtol=2e-6, atol=1e-42)
    assert truth[4] == -1000 and truth[7] == -2e4
    assert_right(c, name, STATS)


@pytest.mark.parametrize("name", ("frozen", "keep", "recompute"))
@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
def test_a_bad_row_stays_alone(name, bad):
    c = case(3, 50, entropy=True).to(torch.float32)
    run = lambda: c.run(linear_logp, WAYS[name], STATS, **options_of(name, c))
    good = run()
    c.hidden[1, 1] = bad
    got = run()
    for key in ("logp", *STATS, "d_hidden"):
        assert torch.equal(got[key][::2], good[key][::2]), key
    assert got["logp"][1].isnan() and got["entropy"][1].isnan() and got["d_hidden"][1].isnan().all()


@pytest.mark.parametrize("name", ("frozen", "keep", "recompute"))
def test_tokens_masked_by_bias(name):
    # the whole first chunk and then some; the others must be as if those tokens did not exist
    c = case(3, 80, lora=False, entropy=True).to(torch.float32)
    c.d_entropy, c.target = c.d_entropy * 100, c.target.clamp(min=50)
    small = case(3, 80, lora=False)
    small.__dict__.update(c.to(torch.float64).__dict__)
    small.weight, small.bias, small.target = small.weight[50:], small.bias[50:], small.target - 50
    c.bias[:50] = -math.inf
    stats, wanted = ("entropy", "log_sum_sq_probs", "is_top1"), [n for n in WAYS[name] if n in NAMES[:3]]
    got = c.run(linear_logp, wanted, stats, **options_of(name, c))
    for key, value in small.run(reference.linear_logp, wanted, stats).items():
        if value is not None and key in ("d_weight", "d_bias"):
            assert (got[key][:50] == 0).all()
            got[key] = got[key][50:]
        if value is not None:
            torch.testing.assert_close(got[key].double(), value, rtol=2e-5, atol=5e-4)


@pytest.mark.parametrize("name", WAYS)
def test_same_bits_again_and_without_gradient(name):
    c = case(3, 50, softcap=5.0).to(torch.float32)
    options = options_of(name, c)
    first, second = (c.run(linear_logp, WAYS[name], ("entropy",), **options) for _ in range(2))
    for key, value in first.items():
        assert value is None or torch.equal(value, second[key]), key
    assert torch.equal(first["logp"], c.run(linear_logp, (), **options)["logp"])


def test_which_calls_come_here(monkeypatch):
    c = case(3, 20).to(torch.float32)
    x, weight, lora = c.hidden, c.weight, (c.a, c.b, 0.5)
    columns = weight.t().contiguous().t()
    assert tiles.backend_of(x, weight, False) == "cublas"
    assert tiles.backend_of(x.double(), weight.double(), False) == "torch"
    monkeypatch.setattr(tiles, "tile", lambda device, dtype: tiles.Tile(16, 16, 16, 1, 4, 1, False))
    assert tiles.backend_of(x, weight, False) == "triton"
    assert tiles.backend_of(x, weight, True) == tiles.backend_of(x, columns, False) == "cublas"
    same = linear_logp(x, columns, c.target, lora=lora)
    torch.testing.assert_close(linear_logp(x, weight, c.target, lora=lora), same)
    monkeypatch.setattr(tiles, "row_kernels", lambda device: False)
    assert tiles.backend_of(x, columns, False) == "torch"


def test_target_and_bias_with_strides():
    c = case(3, 80, lora=False).to(torch.float32)
    target, bias = (torch.stack((t, t + 1), 1)[:, 0] for t in (c.target, c.bias))
    same = linear_logp(c.hidden, c.weight, c.target, c.bias)
    assert torch.equal(linear_logp(c.hidden, c.weight, target, bias), same)


@pytest.mark.parametrize("target", (-1, 20))
def test_a_target_outside_the_vocabulary_is_nan(target, monkeypatch):
    # on a device, where looking would wait for it
    module = importlib.import_module("fastdpo_kernels.linear_logp")
    monkeypatch.setattr(module, "check_target_values", lambda target, V: None)
    c = case(3, 20).to(torch.float32)
    good = c.run(linear_logp, ())["logp"]
    c.target[1] = target
    got = c.run(linear_logp, ())["logp"]
    assert got[1].isnan() and torch.equal(got[::2], good[::2])


@pytest.mark.parametrize("leaves_e", (False, True))
@pytest.mark.parametrize("softcap", (None, 3.0))
def test_both_sides_of_the_seam(leaves_e, softcap):
    """E and dZ in half, as GEMM operands of a GPU, and nothing written beside them."""
    c = case(6, 90, softcap=softcap, size=3).to(torch.float32)
    head = Head(c.weight, c.bias, None, None, 1.0, c.scale, softcap)
    x, target, results = c.hidden, c.target, []
    factor, by_logit = torch.randn(2, 6)
    for side in (TorchChunk, RowKernels):
        one = side(head, x, target, torch.float32)
        softmax = Softmax.start(6, STATS, torch.empty(0))
        for v0, v1 in ((0, 50), (50, 90)):
            z, dz = one.block(50)[: v1 - v0], one.block(50, torch.float16)
            head.product(x, None, v0, v1, out=z)
            dz.fill_(7.0)
            e = dz[: v1 - v0] if leaves_e else None
            results.append(one.reduce(z, (v0, v1), softmax, e))
            results.append(dz.clone())
            head.product(x, None, v0, v1, out=z)
            one.gradient(z, (v0, v1), softmax.peak, factor, by_logit, dz[: v1 - v0])
            results.append(dz.clone())
            one.put_target(dz[: v1 - v0], (v0, v1), factor)
            results.append(dz)
        results += vars(softmax).values()
    for ours, theirs in zip(results[len(results) // 2 :], results):
        torch.testing.assert_close(
            ours, theirs, rtol=2e-3 if ours.dtype == torch.float16 else 2e-6, atol=1e-6
        )


def test_the_operator_is_what_the_compiler_is_told():
    c = case(2, 40).to(torch.float32)
    args = (c.hidden, c.weight, c.bias, c.a, c.b, c.target, 0.5, 0.7, None, "entropy", "keep", 20, None)
    torch.library.opcheck(torch.ops.fastdpo.linear_logp, args, test_utils="test_faketensor")


@pytest.mark.parametrize("wanted", (NAMES, ("hidden",)), ids=("grouped", "frozen"))
def test_linear_dpo(wanted):
    b = dpo_cases.batch(1, 3, V=60, D=12, most=3, softcap=3.0)
    least = dpo_cases.budget_for(b, max(b.groups), torch.float32) - 1
    assert {name for name, _ in dpo_cases.parts(b, least, torch.float32)} == {"keep", "recompute"}
    dpo_cases.assert_as_good(b, torch.float32, wanted, memory_budget=least, groups=b.groups)


@pytest.mark.parametrize("name", WAYS)
def test_peak_bytes_is_a_bound(name, monkeypatch):
    monkeypatch.setattr(chunk, "LANES", 1024)
    monkeypatch.setattr(plan_module, "BLOCK_WIDTH", 4096)
    M, V, D = 12, 3001, 8
    c = case(M, V, D, bias=False, lora=False, softcap=3.0).to(torch.float32)
    budget_ = 4 * M * V - 1 if name == "recompute" else None
    train = dict(train_weight="weight" in WAYS[name], need_grad=bool(WAYS[name]))
    told = plan(M, V, D, dtype=torch.float32, memory_budget=budget_, backend="cublas", **train)
    assert told.name == name
    hidden = c.hidden.requires_grad_("hidden" in WAYS[name])
    weight = c.weight.requires_grad_("weight" in WAYS[name])

    def run():
        logp, _ = linear_logp(hidden, weight, c.target, softcap=3.0, stats=STATS, memory_budget=budget_)
        gc.collect()  # the interpreter holds a kernel's tensors in a cycle
        if WAYS[name]:
            logp.sum().backward()

    handed_back = 4 * M * 5 + sum(t.nbytes for t in (hidden, weight) if t.requires_grad)
    assert told.peak_bytes / 3 <= peak_of(run) <= told.peak_bytes + handed_back
