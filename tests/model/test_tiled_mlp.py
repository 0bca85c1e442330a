"""MLPs in tiles: the same sums, at a tile's memory, computed as often as promised."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdpo.config.keys import Config
from fastdpo.data.packing import pack
from fastdpo.model import activations, tiled_mlp
from tests.model.test_activations import in_4_bits, with_lora
from tests.model.test_shared_prompt import FAMILIES, assert_gradients_close, gradients
from tests.tiny import groups, policy

TILE = 20  # tokens; the batch below has 98 in five tiles


@pytest.fixture(autouse=True)
def short_tiles(monkeypatch):
    monkeypatch.setattr(tiled_mlp, "TILE", TILE)


def set_up(p, level=False, tiled=True):
    config = Config(model="m", data="d", gradient_checkpointing=level, tiled_mlp=tiled)
    return activations.set_up_activations(p.model, config)


def an_mlp(family="llama", dtype=torch.float64, **overrides):
    p = policy(family, dtype=dtype, **(FAMILIES[family] | overrides))
    layer = activations.decoder_layers(p.model)[0]
    return p, layer.mlp


def results(mlp, x, slope):
    """(the output, the input's gradient, the trained weights' gradients)"""
    x = x.clone().requires_grad_()
    out = mlp(x)
    out.backward(slope)
    return out.detach(), x.grad, gradients(mlp)


def numbers(*shape, dtype=torch.float64, seed=3):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


DENSE = [f for f in FAMILIES if f not in ("qwen3_moe", "mixtral", "opt")]


@pytest.mark.parametrize("family", DENSE)
def test_tiles_are_exact_in_fp64(family):
    """Gates, biases, Conv1D, fused gate and up; a batch of rows, whose length no tile divides."""
    p, mlp = an_mlp(family)
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, slope = numbers(2, 49, 64), numbers(2, 49, 64, seed=4)
    truth = results(mlp, x, slope)
    set_up(p)
    ours = results(mlp, x, slope)
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-12)
    assert len(ours[2]) >= 2
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), truth[0], rtol=0, atol=1e-13)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_adapters_in_tiles_are_exact(options):
    p = with_lora(policy("llama", dtype=torch.float64), **options).model.double()
    mlp = activations.decoder_layers(p)[0].mlp
    x, slope = numbers(1, 98, 64), numbers(1, 98, 64, seed=4)
    truth = results(mlp, x, slope)
    activations.set_up_activations(p, Config(model="m", data="d", tiled_mlp=True))
    ours = results(mlp, x, slope)
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-12)
    assert all("lora_" in name for name in ours[2]) and len(ours[2]) == 6 + 3 * bool(options)


def test_4_bit_weights_in_tiles():
    pytest.importorskip("bitsandbytes")
    p, mlp = an_mlp(dtype=torch.float32)
    in_4_bits(mlp)
    x, slope = numbers(1, 98, 64).float(), numbers(1, 98, 64, seed=4).float()
    truth = results(mlp, x, slope)
    set_up(p)
    ours = results(mlp, x, slope)
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)
    assert not ours[2]


def test_up_to_one_tile_is_the_plain_path(monkeypatch):
    p, mlp = an_mlp(dtype=torch.float32)
    x, slope = numbers(1, TILE, 64).float(), numbers(1, TILE, 64, seed=4).float()
    truth = results(mlp, x, slope)
    set_up(p)
    assert "untiled" in vars(mlp)
    monkeypatch.setattr(tiled_mlp, "_in_tiles", None)
    ours = results(mlp, x, slope)
    assert all(torch.equal(a, b) for a, b in zip(ours[:2], truth[:2]))
    assert all(torch.equal(ours[2][name], grad) for name, grad in truth[2].items())


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_half_precision_is_no_worse_than_untiled(kept, monkeypatch):
    """Autocast and bf16 weights, against fp64: a sum of 49 tiles in bf16 would lose its last terms."""
    monkeypatch.setattr(tiled_mlp, "TILE", 2)
    p, mlp = an_mlp()
    x, slope = numbers(1, 98, 64).abs(), numbers(1, 98, 64, seed=4).abs()
    truth = results(mlp, x, slope)
    mlp.to(kept)

    def error():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x16 = x.to(kept).requires_grad_()
            out = mlp(x16)
        out.backward(slope.to(out.dtype))
        both = {"x": x16.grad, **gradients(mlp)}
        return {
            name: float((grad - want).norm() / want.norm())
            for name, grad in both.items()
            for want in [truth[1] if name == "x" else truth[2][name]]
        }

    plain = error()
    set_up(p)
    tiled = error()
    for name, ours in tiled.items():
        assert ours < 1.2 * plain[name] < 0.05, name


class Rows(TorchDispatchMode):
    """The most rows that any tensor of a width has, and the dtypes of matrix products."""

    def __init__(self, width):
        super().__init__()
        self.width, self.most, self.products = width, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.products.add(out.dtype)
        is_weight = isinstance(out, torch.Tensor) and out.dim() == 2 and 64 in out.shape
        if isinstance(out, torch.Tensor) and out.dim() and out.shape[-1] == self.width and not is_weight:
            self.most = max(self.most, out.numel() // self.width)
        return out


def test_the_recompute_is_in_the_compute_dtype():
    """Autocast is off in a backward: the tiles must switch it on again."""
    p, mlp = an_mlp(dtype=torch.float32)
    set_up(p)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mlp(numbers(1, 98, 64).float().requires_grad_())
    with Rows(96) as rows:
        out.backward(numbers(1, 98, 64).bfloat16())
    assert rows.products == {torch.bfloat16}


@pytest.mark.parametrize("level", [False, True, "selective"])
def test_nothing_as_wide_as_an_mlp_is_as_long_as_a_row(level):
    p = policy("llama")
    p.set_sharing(True)
    batch = pack(groups())
    n = batch.input_ids.shape[1]
    for tiled, most in ((False, n), (True, -(-n // -(-n // TILE)))):
        set_up(p, level, tiled)
        with Rows(96) as rows:
            p.token_logp(batch).sum().backward()
        assert rows.most == most


@pytest.mark.parametrize("family, checkpointed", [("llama", 2), ("gemma2", 3)])
def test_how_often_a_tile_is_computed(family, checkpointed):
    """Gemma 2 has a norm after the MLP that must see its output again; Llama stops before."""
    p = policy(family, **FAMILIES[family])
    p.set_sharing(True)
    batch = pack(groups())
    tiles = -(-batch.input_ids.shape[1] // TILE)
    calls = []
    for layer in p.model.model.layers:
        layer.mlp.act_fn.register_forward_hook(lambda module, args, out: calls.append(out.shape[1]))
    for level, times in ((False, 2), (True, checkpointed), ("selective", checkpointed)):
        set_up(p, level)
        calls.clear()
        p.token_logp(batch).sum().backward()
        assert len(calls) == 2 * tiles * times and max(calls) <= TILE


def test_selective_keeps_nothing_of_a_tile(monkeypatch):
    p = policy("llama")
    p.set_sharing(True)
    kept, policy_of = [], activations._policy

    def spy(context, op, *args, **kwargs):
        choice = policy_of(context, op, *args, **kwargs)
        if choice is activations.CheckpointPolicy.MUST_SAVE and not context.is_recompute:
            kept.append(args[1].shape[-1])  # of a weight [D, width], or of keys
        return choice

    monkeypatch.setattr(activations, "_policy", spy)
    for tiled, wide in ((False, 2 * 2), (True, 0)):
        kept.clear()
        set_up(p, "selective", tiled)
        p.token_logp(pack(groups())).sum().backward()
        assert kept.count(96) == wide and len(kept) >= 2 * 4


def test_a_weights_gradient_arrives_once():
    """What an optimizer in the backward waits for."""
    p, mlp = an_mlp()
    set_up(p)
    arrived = Counter()
    for name, parameter in mlp.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.update([name]))
    mlp(numbers(1, 98, 64)).sum().backward()
    assert arrived == dict.fromkeys(["gate_proj.weight", "up_proj.weight", "down_proj.weight"], 1)


def test_mixtures_of_experts_are_left_alone_and_named():
    """And gradients are still those of the plain path."""
    p = policy("qwen3_moe", **FAMILIES["qwen3_moe"], mlp_only_layers=[0])
    p.set_sharing(True)
    logp = p.token_logp(pack(groups()))
    logp.sum().backward()
    truth = gradients(p.model)
    (line,) = set_up(p)
    assert line.startswith("1 MLPs are computed in tiles of tokens; 1 (mixtures of experts")
    p.token_logp(pack(groups())).sum().backward()
    assert_gradients_close(gradients(p.model), truth, 1e-5)
    with pytest.raises(activations.ConfigError, match="no dense MLP"):
        set_up(policy("mixtral", **FAMILIES["mixtral"]))


def test_switching_it_off_again():
    p, mlp = an_mlp()
    set_up(p)
    assert set_up(p, tiled=False) == [] and "untiled" not in vars(mlp)
    mlp.forward(numbers(1, 98, 64))
