"""bf16 weights learn by stochastic rounding: unbiased, a function of the seed, and needed."""

from contextlib import closing

import pytest
import torch
from rich.console import Console

from fastdpo.config.keys import Config
from fastdpo.model.loading import load_policy
from fastdpo.optim.pieces import noise_seed, round_stochastically
from tests.optim.optimizer_runs import OPTIMIZERS, make, one_step, stepped, weights
from tests.optim.optimizer_runs import eager as eager
from tests.tiny import save_model


def rounded(values, seed=0):
    return round_stochastically(values, torch.Generator().manual_seed(seed))


def neighbours(values):
    """The two bf16 values around each f32 one, lower magnitude first."""
    bits = values.view(torch.int32) & -(1 << 16)
    return bits.view(torch.float32), (bits + (1 << 16)).view(torch.float32)


@pytest.mark.parametrize("value", [1.0 + 2**-9, 1.0 + 2**-7 * 0.9, -3.1415927, 1e-3 / 3, 5e-39, -7e30])
def test_the_mean_of_many_roundings_is_the_value(value):
    """A share of q of them away from zero: within 4 standard errors of the exact q."""
    n = 1 << 18
    values = torch.full((n,), value)
    near, far = neighbours(values[:1])
    q = float((values[0].double() - near.double()) / (far.double() - near.double()))
    got = rounded(values).float()
    assert ((got == near) | (got == far)).all() and 0 < q < 1
    share = float((got == far).double().mean())
    assert abs(share - q) < 4 * (q * (1 - q) / n) ** 0.5


def test_what_bf16_has_stays():
    values = torch.randn(1000).bfloat16().float()
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-40])
    special[-1] = special[-1].bfloat16().float()
    for some in (values, special):
        for seed in range(5):
            assert torch.equal(rounded(some, seed).float().view(torch.int32), some.view(torch.int32))


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1])
def test_nan_stays_nan(bits):
    """0x7FFFFFFF is the NaN that CUDA computes: random bits added to it would make it -0."""
    values = torch.full((64,), bits, dtype=torch.int32).view(torch.float32)
    assert rounded(values).isnan().all()


def test_it_is_a_function_of_the_seed():
    values = torch.randn(10_000)
    assert torch.equal(rounded(values, 1), rounded(values, 1))
    assert not torch.equal(rounded(values, 1), rounded(values, 2))
    seeds = {noise_seed(seed, step, number) for seed in range(9) for step in range(9) for number in range(9)}
    assert len(seeds) == 9**3 and all(0 <= seed < 2**63 for seed in seeds)


def pushed(steps, rate=1e-6):
    """(start, weights) after AdamW steps at a DPO learning rate with one gradient, always the same."""
    torch.manual_seed(1)
    start = torch.rand(64, 512) + 0.5
    some = [torch.nn.Parameter(start.bfloat16())]
    start, gradient = some[0].detach().float(), torch.ones(64, 512)
    with closing(make(some, pure_bf16=True, learning_rate=rate, weight_decay=0.0)) as optimizer:
        for _ in range(steps):
            some[0].grad = gradient.bfloat16()
            optimizer.step()
            optimizer.zero_grad()
    return start, some[0].detach()


def test_rounding_to_nearest_would_lose_every_update_of_a_dpo_run():
    """AdamW moves each weight by 1e-6 a step; between bf16's neighbours of 0.5 lie 2e-3. After 50 steps
    the weights moved by 5e-5 in the mean, and to the nearest not one of them would have moved."""
    start, weight = pushed(50)
    to_nearest = start.bfloat16()
    for _ in range(50):
        to_nearest = (to_nearest.float() - 1e-6).bfloat16()
    assert torch.equal(to_nearest.float(), start)
    moved = float((weight.float() - start).double().mean())
    spread = (50e-6 * 2**-7 / weight.numel()) ** 0.5  # at most: a jump of 2^-7 with probability 5e-5 / 2^-7
    assert abs(moved + 50e-6) < 4 * spread and spread < 4e-6


def test_steps_and_weights_draw_their_own_bits():
    shape = (64, 128)
    some = [torch.nn.Parameter(torch.ones(shape).bfloat16()) for _ in range(2)]
    drawn = []
    with closing(make(some, pure_bf16=True, optim="sgd", learning_rate=2**-9)) as optimizer:
        for _ in range(2):
            for p in some:
                with torch.no_grad():
                    p.fill_(1.0)
                p.grad = torch.ones_like(p)
            optimizer.step()
            drawn += [p.detach().clone() for p in some]
    different = [not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i]]
    assert len(different) == 6 and all(different)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_it_follows_fp32_weights(optim):
    """Each optimizer keeps no state in bf16, and the weights stay within bf16's steps of fp32's."""
    full, _ = stepped(6, optim=optim)
    start = weights()
    some, states = stepped(6, optim=optim, pure_bf16=True)
    assert all(p.dtype == torch.bfloat16 for p in some)
    assert all(v.dtype != torch.bfloat16 for v in states.values())
    again, _ = stepped(6, optim=optim, pure_bf16=True)
    assert all(torch.equal(a, b) for a, b in zip(some, again))
    for p, q, s in zip(some, full, start):
        moved = (q - s).norm()
        assert (p.float() - q).norm() < 0.25 * moved + 2**-8 * q.norm() * 6**0.5


def test_a_transposed_weight_is_stepped_too():
    base = torch.randn(128, 64).bfloat16()
    some, plain = [torch.nn.Parameter(base.t())], [torch.nn.Parameter(base.t().contiguous())]
    for weight in (some, plain):
        with closing(make(weight, pure_bf16=True)) as optimizer:
            one_step(optimizer, weight, 0)
    assert torch.equal(some[0], plain[0])


def test_a_policy_is_loaded_in_bf16(tmp_path):
    folder = save_model(tmp_path / "model")
    quiet = Console(quiet=True)
    for keys, dtype in ((dict(pure_bf16=True), torch.bfloat16), ({}, torch.float32)):
        loaded = load_policy(Config(model=folder, data="d", max_length=64, **keys), quiet)
        assert {p.dtype for p in loaded.trained()} == {dtype} and loaded.dtype == dtype
