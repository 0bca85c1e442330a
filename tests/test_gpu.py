"""What only a CUDA device can show: the varlen backend, bf16 training, determinism."""

from importlib.util import find_spec

import pytest
import torch
from rich.console import Console

from fastdpo import api
from fastdpo.data.packing import pack
from fastdpo.model import attention, support
from tests.tiny import group, groups, policy
from tests.training.test_trainer import Run

pytestmark = pytest.mark.gpu
needs_datasets = pytest.mark.skipif(
    find_spec("datasets") is None, reason="needs datasets, which reads a run's rows: pip install datasets"
)


@pytest.fixture(autouse=True)
def no_ladder(monkeypatch):
    """Each process of the tests would compile a hundred kernels for it. `fastdpo doctor` climbs it once."""
    monkeypatch.setattr(api, "settle_backends", lambda console: None)


def attend(backend, dtype, window, heads=(4, 2), scale=1):
    """Output and gradients of one attention call, on fixed numbers."""
    shapes = [(40, [17, 1, 64]), (1, [9, 9]), (130, [5])]
    long = [group(i, scale * n, [scale * r for r in rs]) for i, (n, rs) in enumerate(shapes)]
    layout = pack(long).layout.to("cuda")
    draw = torch.Generator("cuda").manual_seed(0)
    make = lambda h: torch.randn(len(layout.seen_until), h, 64, device="cuda", generator=draw)
    q, k, v = (make(h).to(dtype).requires_grad_() for h in (heads[0], heads[1], heads[1]))
    out = attention.attend(q, k, v, layout, window=window, backend=backend)
    return out, *torch.autograd.grad(out.float().sin().sum(), (q, k, v))


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_varlen_against_the_dense_oracle(window, heads):
    """Error at most twice that of a bf16 dense attention, against the fp32 one."""
    truth = attend("dense", torch.float32, window, heads)
    baseline = attend("dense", torch.bfloat16, window, heads)
    ours = attend("varlen", torch.bfloat16, window, heads)
    for name, t, b, o in zip(("out", "dq", "dk", "dv"), truth, baseline, ours):
        limit = 2 * (b.float() - t).abs().max() + 1e-3
        assert (o.float() - t).abs().max() <= limit, name


@pytest.mark.parametrize("name", ["out", "dk", "dv"])
def test_attention_repeats_bit_by_bit(name):
    """Several blocks of keys, so that an atomic sum would show."""
    assert_same_bits(repeated(name))


def test_dq_repeats_up_to_its_rounding():
    """Flash attention sums dq by atomics in fp32 and rounds it to bf16 once: two orders of the sum may round
    to neighbours (a unit in the last place, 2^-7 of the value at most), and where its terms cancel they are
    roundings of the terms apart (2^-24 of each of some 24 blocks' sums, far below 1e-4 of the largest)."""
    one, *others = (dq.float() for dq in repeated("dq"))
    for other in others:
        assert ((other - one).abs() <= 2**-7 * one.abs() + 1e-4 * one.abs().max()).all()


def test_dq_repeats_bit_by_bit_where_torch_is_told_to(deterministic):
    assert_same_bits(repeated("dq"))


def repeated(name):
    """Five times the same output or gradient of one call."""
    place = ("out", "dq", "dk", "dv").index(name)
    return [attend("varlen", torch.bfloat16, None, scale=40)[place] for _ in range(5)]


def assert_same_bits(tensors):
    one, *others = tensors
    assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mistral"])
def test_shared_equals_separate_in_fp32(family):
    p = policy(family)
    p.model.cuda()
    p.device = torch.device("cuda")
    truth = torch.cat([support.stock_logp(p, g) for g in groups()])
    p.set_sharing(True)
    ours = p.token_logp(pack(groups()).to("cuda"))
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-4)


@needs_datasets
@pytest.mark.parametrize("keys", [{}, dict(lora_rank=4), dict(gradient_checkpointing=True)], ids=str)
def test_bf16_training_learns(tmp_path, keys):
    run = Run(tmp_path, dtype="bf16", learning_rate=3e-3, max_steps=40, **keys)
    assert run.evals[0]["eval_rewards/margins"] == 0
    assert run.evals[-1]["eval_rewards/accuracies"] > 0.8


@needs_datasets
@pytest.mark.parametrize("keys", [{}, dict(lora_rank=4)], ids=["full", "lora"])
def test_resume_on_cuda(tmp_path, keys, deterministic):
    """5 steps and then 8 are 8 at once: weights, and fused AdamW's state on the device."""
    keys = dict(dtype="bf16", save_steps=4, **keys)
    whole = Run(tmp_path, "whole", max_steps=8, **keys)
    Run(tmp_path, "cut", max_steps=5, **keys)
    cut = Run(tmp_path, "cut", max_steps=8, resume=True, **keys)
    files = [next((run.folder / "model").glob("*.safetensors")) for run in (whole, cut)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_supported_models_share_on_cuda(capsys):
    p = policy("llama")
    p.model.cuda()
    p.device, p.dtype = torch.device("cuda"), torch.bfloat16
    support.prepare(p, groups(), Console())
    assert p.share and capsys.readouterr().out == ""
