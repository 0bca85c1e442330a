"""Means of neurons and parts over scored rows, against plain loops over a model's own modules."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from fastdpo.errors import ModelError
from fastdpo.explanation.capture import Sums, capture, capturing, see
from fastdpo.explanation.places import find_places, value_vectors
from fastdpo.model import tiled_mlp
from tests import tiny
from tests.explanation.families import FAMILIES, MIXTURE, POST_NORM, far, hooks_on, limit, moved, policy_of
from tests.explanation.test_places import with_lora


def scored_rows(group, response):
    """The places of [*prompt, *response] whose states predict a scored token."""
    return len(group.prompt) - 1 + torch.from_numpy(response.target_mask).nonzero().flatten()


def by_loops(policy, last, norm_after=None):
    """f64[M, .]: what enters the modules `last` and leaves the norms after them, in turn, on each scored row;
    and the embeddings. One row a response, through the stock model."""
    entering, leaving, out = {}, {}, {"m": {}, "rms": {}, "embedding": []}
    handles = [
        module.register_forward_pre_hook(lambda _, args, i=i: entering.__setitem__(i, args[0]))
        for i, module in enumerate(last)
    ]
    handles += [
        module.register_forward_hook(lambda _, args, y, i=i: leaving.__setitem__(i, y))
        for i, module in enumerate(last)
    ]
    with policy.stock() as model, torch.no_grad():
        for group in tiny.groups():
            for response in group.responses:
                ids = torch.tensor([[*group.prompt, *response.ids]])
                states = model(ids, output_hidden_states=True).hidden_states
                rows = scored_rows(group, response)
                out["embedding"].append(states[0][0, rows])
                for i in entering:
                    out["m"].setdefault(i, []).append(entering[i].view(ids.shape[1], -1)[rows].double())
                    y = leaving[i].view(ids.shape[1], -1)[rows]
                    out["rms"].setdefault(i, []).append((y.square().mean(-1, keepdim=True) + 1e-6).sqrt())
    for handle in handles:
        handle.remove()
    joined = lambda some: [torch.cat(some[i]) for i in sorted(some)]
    return joined(out["m"]), joined(out["rms"]), torch.cat(out["embedding"])


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_means_are_those_of_plain_loops(family, share):
    policy, places = policy_of(family, share, **(dict(rms_norm_eps=1e-6) if family in POST_NORM else {}))
    m, rms, embedding = by_loops(policy, [layer.last for layer in places.layers])
    captured, _ = capture(policy, places, tiny.groups(), max_tokens=40)
    assert captured.rows == len(embedding) == 43
    assert far(captured.embedding, embedding.mean(0)) <= 1e-10
    for ours, own, divisor in zip(captured.neurons, m, rms, strict=True):
        # the norms before the MLP compute in fp32, and there the order of sums differs between the two
        near = 1e-10 if family in ("gpt2", "phi", "gpt_neox", "opt") else 1e-5
        assert far(ours.mean, own.mean(0)) <= near
        assert far(ours.size, own.abs().mean(0)) <= near
        assert torch.equal(ours.firing, (own > 0).double().mean(0))
        if family in POST_NORM:
            assert far(ours.through, (own / divisor).mean(0)) <= 1e-5
        else:
            assert ours.through is ours.mean
        assert all(some.dtype == torch.float64 for some in vars(ours).values())


def assert_parts_sum(places, captured, near):
    total = captured.embedding + captured.attention.sum(0) + captured.mlp.sum(0)
    assert far(total, captured.final) <= 1e-10
    for layer, neurons, bias, part in zip(places.layers, captured.neurons, captured.bias, captured.mlp):
        assert far(neurons.through @ value_vectors(layer, places.scale) + bias, part) <= near


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_sum_to_mlps_and_parts_to_the_residual(family, share):
    policy, places = policy_of(family, share)
    captured, _ = capture(policy, places, tiny.groups(), max_tokens=40)
    assert_parts_sum(places, captured, limit(family))
    assert bool(captured.bias.any()) == (family in ("gpt2", "phi", "gpt_neox", "opt"))


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_norms_after_the_mlp_that_keep_fp64(norm):
    """To 1e-10 what families' own norms round to fp32; and of LayerNorms their mean and their bias."""
    policy, _ = policy_of("olmo2")
    for block in policy.core.model.layers:
        block.post_feedforward_layernorm = norm(64, eps=0.3, dtype=torch.float64)
    moved(policy, 3)
    places = find_places(policy)
    captured, _ = capture(policy, places, tiny.groups(), max_tokens=40)
    assert_parts_sum(places, captured, 1e-10)
    assert bool(captured.bias.any()) == (norm is nn.LayerNorm)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_with_a_lora_on_and_off(family, dora):
    policy, places = with_lora(family, use_dora=dora)
    on, _ = capture(policy, places, tiny.groups(), max_tokens=40)
    assert_parts_sum(places, on, limit(family))
    with policy.model.disable_adapter():
        off, _ = capture(policy, places, tiny.groups(), max_tokens=40)
        assert_parts_sum(places, off, limit(family))
    assert far(off.final, on.final) > 1e-2


@pytest.mark.parametrize("share", [True, False])
def test_a_mixture_has_parts_alone(share):
    policy, places = policy_of("mixtral", share, **MIXTURE)
    captured, _ = capture(policy, places, tiny.groups(), max_tokens=40)
    assert captured.neurons is None and not captured.bias.any()
    total = captured.embedding + captured.attention.sum(0) + captured.mlp.sum(0)
    assert far(total, captured.final) <= 1e-10


# ---- what was seen


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama", "granite"])
def test_seen_is_what_the_policy_gives(family, share):
    policy, places = policy_of(family, share)
    captured, seen = capture(policy, places, tiny.groups(), max_tokens=10**6)
    batch = policy.pack(tiny.groups())
    with torch.no_grad():
        hidden = policy.hidden(batch)[batch.score_row]
        assert torch.equal(seen.hidden, hidden)
        assert torch.equal(seen.token_logp, policy.token_logp(batch))
        assert torch.equal(seen.cu_resp, batch.cu_resp)
        bounds = batch.cu_resp.tolist()
        assert seen.state.shape == seen.residual.shape == (12, 64)
        for r, (first, end) in enumerate(pairwise(bounds)):
            assert far(seen.state[r], hidden[first:end].mean(0)) <= 1e-6  # stored in fp32
    weights = batch.cu_resp.diff().double()
    assert far(weights @ seen.residual.double() / weights.sum(), captured.final) <= 1e-6
    again = policy.core.get_decoder().get_submodule("ln_f" if family == "gpt2" else "norm")
    assert places.norm is again


@pytest.mark.parametrize("share", [True, False])
def test_packs_change_nothing(share):
    policy, places = policy_of("qwen2", share)
    whole, seen = capture(policy, places, tiny.groups(), max_tokens=10**6)
    for max_tokens in (1, 30, 60):
        cut, also = capture(policy, places, tiny.groups(), max_tokens=max_tokens)
        assert torch.equal(also.cu_resp, seen.cu_resp) and cut.rows == whole.rows
        assert far(also.hidden, seen.hidden) <= 1e-6 and far(also.residual, seen.residual) <= 1e-6
        assert far(cut.mlp, whole.mlp) <= 1e-6 and far(cut.final, whole.final) <= 1e-6  # its norms are fp32


def test_sums_of_half_precision_are_fp64():
    """The exact mean of bf16 numbers: a sum in bf16, or in fp32, would not be."""
    policy, places = policy_of("llama", dtype=torch.bfloat16)
    rows, last = [], places.layers[1].last
    batch = policy.pack(tiny.groups())
    handle = last.register_forward_pre_hook(lambda _, args: rows.append(args[0][0, batch.score_row]))
    captured, seen = capture(policy, places, tiny.groups(), max_tokens=10**6)
    handle.remove()
    assert rows[0].dtype == seen.hidden.dtype == torch.bfloat16
    exact = rows[0].double().mean(0)
    assert far(captured.neurons[1].mean, exact) <= 1e-14
    assert far(rows[0].mean(0), exact) > 1e-4


# ---- what goes wrong


@pytest.mark.parametrize(
    "weight, where",
    [
        ("layers.1.mlp.up_proj.weight", "layer 1: neurons"),
        ("layers.1.self_attn.o_proj.weight", "layer 1: attention"),
        ("layers.0.mlp.down_proj.weight", "layer 0: mlp"),
        ("embed_tokens.weight", "embedding"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_named(weight, where, value):
    policy, places = policy_of("llama")
    policy.core.model.get_parameter(weight).data[:] = value
    before = hooks_on(policy)
    text = rf"LlamaForCausalLM: {where}: activations are not finite \(rows 0, 1\)"
    with pytest.raises(ModelError, match=text):
        capture(policy, places, tiny.groups()[:2])
    assert hooks_on(policy) == before


def test_padding_and_prompts_may_be_anything():
    """Only scored rows count: a prompt token whose embedding is no number is not in them, where nothing of it
    reaches them."""
    policy, places = policy_of("llama", share=False)
    captured, _ = capture(policy, places, tiny.groups())
    padded = policy.pack(tiny.groups())
    assert bool((padded.attention_mask == 0).any())
    sums = Sums(policy, places)
    junk = torch.where(padded.attention_mask == 0, 5, padded.input_ids)
    with torch.no_grad(), capturing(places, sums):
        sums.begin(padded)
        policy.hidden(replace(padded, input_ids=junk))
        sums.end(padded)
    again = sums.means()
    assert torch.equal(again.mlp, captured.mlp) and torch.equal(
        again.neurons[0].mean, captured.neurons[0].mean
    )


def test_hooks_are_off_again_whatever_happens():
    policy, places = policy_of("gemma2")
    before = hooks_on(policy)
    sums = Sums(policy, places)
    with pytest.raises(ZeroDivisionError), capturing(places, sums):
        assert hooks_on(policy) > before + 8
        raise ZeroDivisionError
    assert hooks_on(policy) == before
    capture(policy, places, tiny.groups())
    see(policy, places, policy.pack(tiny.groups()))
    assert hooks_on(policy) == before


def test_no_rows_are_refused():
    policy, places = policy_of("llama")
    with pytest.raises(ModelError, match="no rows"):
        capture(policy, places, [])


def test_mlps_in_tiles_are_refused_and_not_miscounted(monkeypatch):
    policy, places = policy_of("llama")
    monkeypatch.setattr(tiled_mlp, "TILE", 16)
    tiled_mlp.tile_mlps(list(policy.core.model.layers))
    with pytest.raises(ModelError, match=r"layer 0: neurons has .* max_tokens"):
        capture(policy, places, tiny.groups())
    small, _ = capture(policy, places, [tiny.group(0, 3, [2])])
    tiled_mlp.untile_mlps(list(policy.core.model.layers))
    assert torch.equal(small.mlp, capture(policy, places, [tiny.group(0, 3, [2])])[0].mlp)
