"""What the Triton tiles do not take on a GPU: float16, float32, a LoRA, strided weights. And what holds of
every way: no wait for the device, the same bits again, no TF32, no memory that nobody wrote. The bodies run
on the CPU too, with a GPU's roundings."""

from contextlib import contextmanager

import pytest
import torch
from fastdpo_kernels import linear_dpo, linear_logp, ops, reference, tiles

from .cases import NAMES, STATS, budget, case, error
from .dpo_cases import batch
from .gpu_arithmetic import device, gpu_arithmetic  # noqa: F401

PLAIN = dict(lora=False)
FULL = dict(lora=False, softcap=4.0)
LORA = dict(bias=False)
# dtype, what the head has, whether its weight is stored by columns
WAYS = {
    "bf16": (torch.bfloat16, FULL, False),
    "bf16 lora": (torch.bfloat16, LORA, False),
    "bf16 lora softcap": (torch.bfloat16, dict(softcap=4.0), False),
    "bf16 strided": (torch.bfloat16, PLAIN, True),
    "fp16": (torch.float16, FULL, False),
    "fp16 lora": (torch.float16, LORA, False),
    "fp32": (torch.float32, FULL, False),
    "fp32 lora": (torch.float32, LORA, False),
    "fp32 strided": (torch.float32, PLAIN, True),
}
PLANS = ("frozen", "keep", "recompute")
every_way = pytest.mark.parametrize("way", WAYS)
every_plan = pytest.mark.parametrize("name", PLANS)


def head_of(way, device, M=65, V=1001, D=64, **options):  # noqa: F811
    dtype, has, by_columns = WAYS[way]
    c = case(M, V, D, **(has | options)).on(device).to(dtype)
    if by_columns:
        c.weight = c.weight.t().contiguous().t()
    return c


def run(c, name, stats=(), function=linear_logp):
    """By the plan `name`; with gradients of hidden, or of all there is."""
    wanted = ["hidden"] if name == "frozen" else [n for n in NAMES if getattr(c, n) is not None]
    options = {"memory_budget": budget(name, c)} if name != "frozen" and function is linear_logp else {}
    return c.run(function, wanted, stats, **options)


def assert_near(c, got, truth, nats):
    """Log-probs within `nats`, statistics and fp32 gradients within 1e-5, half gradients within two of
    their roundings of the largest."""
    dtype = c.hidden.dtype
    gradient = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for key, value in truth.items():
        if value is None:
            assert got[key] is None, key
        elif key == "logp":
            assert (got[key] - value).abs().max() < nats
        else:
            bound = gradient if key.startswith("d_") else 1e-5
            assert error(got[key], value) < bound, f"{key}: {error(got[key], value):.1e}"


@contextmanager
def no_wait(device):  # noqa: F811
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@contextmanager
def tf32_allowed():
    torch.set_float32_matmul_precision("high")
    try:
        yield
        assert torch.get_float32_matmul_precision() == "high", "as the caller left it"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


@every_way
@every_plan
@pytest.mark.parametrize("entropy", (False, True))
def test_values_and_gradients(way, name, entropy, device):  # noqa: F811
    c = head_of(way, device, entropy=entropy)
    stats = STATS if entropy else ()
    truth = run(c.to(torch.float64), name, stats, reference.linear_logp)
    assert_near(c, run(c, name, stats), truth, nats=2e-5)


@pytest.mark.gpu
@every_way
def test_values_of_a_real_size(way):
    c = head_of(way, "cuda", 700, 32000, 1024)
    for name in PLANS:
        assert_near(c, run(c, name), run(c.to(torch.float64), name, (), reference.linear_logp), nats=1e-4)


@every_way
@every_plan
def test_no_wait_for_the_device_and_the_same_bits_again(way, name, device):  # noqa: F811
    c = head_of(way, device)
    first = run(c, name, ("entropy",))  # and compiles the kernels, which waits
    with no_wait(device):
        second = run(c, name, ("entropy",))
    for key, value in first.items():
        assert value is None or torch.equal(value, second[key]), key


@every_way
@pytest.mark.parametrize("wanted", (NAMES, ("hidden",), ()), ids=("trained", "frozen", "none"))
def test_linear_dpo(way, wanted, device):  # noqa: F811
    dtype, has, _ = WAYS[way]
    b = batch(3, V=501, D=32, **has)
    b.head = b.head.to(dtype).to(torch.float64).on(device)
    b.cu_resp, b.pairs = b.cu_resp.to(device), b.pairs.to(device)
    b.extras = {key: t.to(device) for key, t in b.extras.items()}
    wanted = [n for n in wanted if getattr(b.head, n) is not None]
    given = dict(groups=b.groups, memory_budget=1 << 17)
    first = b.run(linear_dpo, wanted, dtype, **given)
    b.head = b.head.to(dtype)
    with no_wait(device), tf32_allowed():
        second = b.run(linear_dpo, wanted, dtype, **given)
    b.head = b.head.to(torch.float64)
    for key, value in b.run(reference.linear_dpo, wanted).items():
        if value is None:
            assert first[key] is None, key
            continue
        assert torch.equal(first[key], second[key]), key
        bound = 3 * torch.finfo(dtype).eps if key.startswith("d_") and dtype.itemsize == 2 else 2e-5
        assert error(first[key], value) < bound, f"{key}: {error(first[key], value):.1e}"


@every_way
@every_plan
def test_uninitialised_memory_is_never_read(way, name, device, monkeypatch):  # noqa: F811
    c = head_of(way, device)
    good = run(c, name, STATS)
    for maker in ("empty", "empty_like"):
        real = getattr(torch, maker)

        def poisoned(*args, real=real, **kwargs):
            out = real(*args, **kwargs)
            return out.fill_(float("nan")) if out.dtype.is_floating_point else out

        monkeypatch.setattr(torch, maker, poisoned)
    for key, value in run(c, name, STATS).items():
        assert value is None or torch.equal(value, good[key]), key


@every_way
def test_target_and_bias_with_strides(way, device):  # noqa: F811
    c = head_of(way, device)
    good = run(c, "keep")
    apart = lambda t: None if t is None else torch.stack((t, torch.zeros_like(t)), 1)[:, 0]
    bias = None if c.bias is None else apart(c.bias)
    lora = None if c.a is None else (c.a, c.b, 0.5)
    options = dict(scale=c.scale, softcap=c.softcap, lora=lora, memory_budget=budget("keep", c))
    weight = c.weight.detach().requires_grad_()
    got = linear_logp(c.hidden, weight, apart(c.target), bias, **options)
    assert torch.equal(got.detach(), good["logp"])


@every_plan
@pytest.mark.parametrize("way", ("fp32", "fp32 lora", "bf16 lora"))
def test_tf32_is_not_taken(way, name, device):  # noqa: F811
    c = head_of(way, device)
    good = run(c, name)
    with tf32_allowed():
        got = run(c, name)
    for key, value in good.items():
        assert value is None or torch.equal(value, got[key]), key


def test_float32_is_float32_inside_and_as_before_outside():
    matmuls = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    now = lambda: [matmul.fp32_precision for matmul in matmuls]
    for allowed, inside in (("highest", ["ieee", "ieee"]), ("high", ["ieee"] * 2), ("medium", ["ieee"] * 2)):
        torch.set_float32_matmul_precision(allowed)
        try:
            before = now()
            with pytest.raises(ZeroDivisionError), ops.exact_on(torch.empty(0)):
                assert now() == inside
                raise ZeroDivisionError
            assert now() == before and torch.get_float32_matmul_precision() == allowed
        finally:
            torch.set_float32_matmul_precision("highest")


def test_a_loss_is_scaled_without_rounding_the_factor(device):  # noqa: F811
    # of a half tensor and a number on the device, CUDA rounds the number to half first
    grad = torch.randn(1000, device=device).bfloat16()
    factor = torch.tensor(1 / 48, device=device)
    wanted = (grad.float() * factor).bfloat16()
    assert torch.equal(ops.scale_(grad, factor), wanted)


@pytest.mark.gpu
def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for way in WAYS:
        here, there = (run(head_of(way, place), "keep") for place in ("cuda:0", "cuda:1"))
        torch.testing.assert_close(there["logp"].cpu(), here["logp"].cpu())


@pytest.mark.gpu
def test_which_kernels_these_are():
    c = head_of("bf16 lora", "cuda")
    capability = torch.cuda.get_device_capability()
    assert tiles.backend_of(c.hidden, c.weight, True) == ("cublas" if capability >= (8, 0) else "torch")
