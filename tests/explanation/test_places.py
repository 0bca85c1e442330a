"""Where neurons are, what they write, and whether the residual stream is the sum of its parts."""

from dataclasses import replace

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fastdpo.errors import ModelError
from fastdpo.explanation.places import check_sum, find_places, folded, last_bias, neurons_of, value_vectors
from fastdpo.model.adapters import steady_dora
from fastdpo.model.policy import Policy
from tests import images, tiny
from tests.explanation.families import FAMILIES, MIXTURE, POST_NORM, far, hooks_on, limit, moved, policy_of


def packed(policy):
    return policy.pack(tiny.groups())


def with_lora(family, moves=True, **settings):
    """(a policy with a LoRA on all its projections, its places)"""
    policy, _ = policy_of(family)
    settings |= dict(fan_in_fan_out=family == "gpt2", task_type="CAUSAL_LM")
    lora = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", **settings)
    model = get_peft_model(policy.model, lora).double()
    policy = Policy(model.train(), torch.float64)
    if moves:
        moved(policy, 1)
    policy.set_sharing(True)
    return policy, find_places(policy)


# ---- the sum of the parts


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_final_residual_is_the_embedding_and_all_parts(family, share):
    policy, places = policy_of(family, share)
    before = hooks_on(policy)
    assert check_sum(policy, places, packed(policy)) <= 1e-10
    assert hooks_on(policy) == before
    assert not places.experts and len(places.layers) == 2
    assert places.scale == FAMILIES[family].get("residual_multiplier", 1)
    assert all((layer.post_norm is not None) == (family in POST_NORM) for layer in places.layers)


def test_a_norm_that_is_switched_off_is_none():
    policy, places = policy_of("hyperclovax", use_post_norm=False)
    assert places.layers[0].post_norm is None and check_sum(policy, places, packed(policy)) <= 1e-10
    m = torch.randn(7, neurons_of(places.layers[0])).double()
    wanted = places.scale * parts_of_an_mlp(policy, places.layers[0], m)
    assert far(m @ value_vectors(places.layers[0], places.scale), wanted) <= 1e-10


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_of_models_that_see_images_the_language_model_is_looked_at(family):
    policy = images.policy(family)
    places = find_places(policy)
    assert len(places.layers) == 2 and places.norm is policy.core.get_decoder().norm
    batch = policy.pack(images.groups(family))
    assert batch.images and check_sum(policy, places, batch) <= 1e-5  # in fp32


def test_a_mixture_of_experts_has_parts_and_no_neurons():
    policy, places = policy_of("mixtral", **MIXTURE)
    assert places.experts and all(layer.last is None for layer in places.layers)
    assert check_sum(policy, places, packed(policy)) <= 1e-10
    with pytest.raises(ModelError, match="mixture of experts"):
        value_vectors(places.layers[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rounding_is_no_reason_to_refuse_and_a_wrong_scale_is(dtype):
    policy, places = policy_of("granite", dtype=dtype)
    worst = check_sum(policy, places, packed(policy))
    assert worst <= 40 * torch.finfo(dtype).eps
    with pytest.raises(ModelError, match=r"GraniteForCausalLM.* 4 parts .*rows 0, 1, .*cannot be split"):
        check_sum(policy, replace(places, scale=0.4), packed(policy))


@pytest.mark.parametrize(
    "weight, where",
    [
        ("embed_tokens.weight", "embedding"),
        ("layers.0.self_attn.o_proj.weight", "layer 0: attention"),
        ("layers.1.mlp.up_proj.weight", "layer 1: mlp"),
    ],
)
def test_weights_that_are_no_numbers_are_no_other_residual_stream(weight, where):
    policy, places = policy_of("llama")
    policy.core.model.get_parameter(weight).data[:] = float("nan")
    with pytest.raises(ModelError, match=rf"LlamaForCausalLM: {where}: activations are not finite \(rows 0"):
        check_sum(policy, places, packed(policy))


def test_a_residual_stream_of_another_kind_cannot_be_split():
    policy, places = policy_of("bloom", share=False)  # its modules add the residual themselves
    with pytest.raises(ModelError, match=r"BloomForCausalLM.*cannot be split"):
        check_sum(policy, places, packed(policy))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_an_mlp_that_goes_on_after_its_last_projection_has_no_neurons(family):
    policy, places = policy_of(family)
    mlp = policy.core.model.layers[1].mlp
    stock = mlp.forward
    mlp.forward = lambda x: 2 * stock(x)
    with pytest.raises(ModelError, match=rf"{type(policy.core).__name__}: layer 1: its MLP gives something"):
        check_sum(policy, places, packed(policy))


def test_what_has_no_known_name_is_named():
    policy, _ = policy_of("llama")
    block = policy.core.model.layers[1]
    block.unheard, block.mlp = block.mlp, None
    with pytest.raises(ModelError, match=r"LlamaForCausalLM: layer 1: an MLP not found .*unheard"):
        find_places(policy)
    block.mlp = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(ModelError, match=r"layer 1: the MLP's last projection not found"):
        find_places(policy)
    policy.core.model.layers[1] = policy.core.model.layers[0]
    with pytest.raises(ModelError, match="one module"):
        find_places(policy)


# ---- what neurons write


def parts_of_an_mlp(policy, layer, m):
    """[n, D]: what goes into the residual for activations m [n, N], by the modules themselves."""
    with torch.no_grad():
        out = layer.last(m)
        return out if layer.post_norm is None else layer.post_norm(out)


def rms_of(layer, m):
    """What the post norm divides by."""
    eps = next(
        getattr(layer.post_norm, name)
        for name in ("eps", "variance_epsilon")
        if hasattr(layer.post_norm, name)
    )
    return (layer.last(m).square().mean(-1, keepdim=True) + eps).sqrt().detach()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_mlp_is_the_sum_of_its_value_vectors(family):
    policy, places = policy_of(family)
    for layer in places.layers:
        m = torch.randn(7, neurons_of(layer), dtype=torch.float64)
        v, bias = value_vectors(layer, places.scale), last_bias(layer, places.scale)
        assert v.shape == (m.shape[1], 64) and v.dtype == torch.float64
        ours = m @ v if bias is None else m @ v + bias
        ours = ours / rms_of(layer, m) if layer.post_norm is not None else ours
        assert far(ours, places.scale * parts_of_an_mlp(policy, layer, m)) <= limit(family)
    assert (bias is not None) == (family in ("gpt2", "phi", "gpt_neox", "opt"))


@pytest.mark.parametrize(
    "family, settings",
    [
        *(
            (family, settings)
            for family in ("llama", "gpt2", "gemma2")
            for settings in ({}, dict(use_dora=True))
        ),
        ("llama", dict(use_rslora=True)),
        ("gpt2", dict(lora_bias=True)),  # which peft has only where the base has a bias
    ],
)
def test_a_lora_counts_without_being_merged(family, settings):
    policy, places = with_lora(family, **settings)
    layer = places.layers[0]
    m = torch.randn(7, neurons_of(layer), dtype=torch.float64)

    def ours():
        bias = last_bias(layer)
        out = m @ value_vectors(layer) + (0 if bias is None else bias)
        return out / rms_of(layer, m) if layer.post_norm is not None else out

    base = layer.last.base_layer.weight.clone()
    on, whole = value_vectors(layer), ours()
    assert far(whole, parts_of_an_mlp(policy, layer, m)) <= limit(family)
    assert torch.equal(layer.last.base_layer.weight, base) and not layer.last.merged
    with policy.model.disable_adapter():
        assert far(value_vectors(layer), on) > 1e-2
        assert far(ours(), parts_of_an_mlp(policy, layer, m)) <= limit(family)
    policy.model.merge_adapter()
    assert far(ours(), whole) <= 1e-10
    policy.model.unmerge_adapter()
    assert check_sum(policy, places, packed(policy)) <= 1e-10


def test_our_dora_is_the_same():
    policy, places = with_lora("llama", use_dora=True)
    steady_dora(policy.model, fresh=False)
    layer, m = places.layers[0], torch.randn(7, 96, dtype=torch.float64)
    assert far(m @ value_vectors(layer), parts_of_an_mlp(policy, layer, m)) <= 1e-10


def test_other_adapters_are_refused_by_name():
    policy, _ = policy_of("llama")
    settings = IA3Config(
        target_modules=["down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    )
    policy = Policy(get_peft_model(policy.model, settings), torch.float64)
    with pytest.raises(ModelError, match="only LoRA's"):
        value_vectors(find_places(policy).layers[0])


@pytest.mark.parametrize("dora", [None, False, True])
def test_four_bits_are_dequantised(tmp_path, dora):
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'fastdpo[quant]'")
    plain = tiny.save_model(tmp_path, vocab_size=400)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=torch.float32)
    if dora is not None:
        lora = LoraConfig(r=3, target_modules=["down_proj"], use_dora=dora, task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    policy = Policy(model.train(), torch.float32)
    if dora is not None:
        for parameter in policy.trained():
            parameter.data += 0.05 * torch.randn_like(parameter)
    policy.set_sharing(True)
    places = find_places(policy)
    layer, m = places.layers[0], torch.randn(7, 96)
    assert isinstance(getattr(layer.last, "base_layer", layer.last), bnb.nn.Linear4bit)
    assert neurons_of(layer) == 96
    assert far(m.double() @ value_vectors(layer), layer.last(m).detach()) <= 1e-5  # it computes in fp32
    whole = AutoModelForCausalLM.from_pretrained(plain).model.layers[0].mlp.down_proj.weight.detach().T
    assert 1e-3 < far(value_vectors(layer), whole)  # so the 4 bits show
    assert check_sum(policy, places, policy.pack(tiny.groups())) <= 1e-5


# ---- norms


@pytest.mark.parametrize("width", [64, 65])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "olmo2", "cohere", "nemotron", "olmo"])
def test_folding_a_norm_into_a_direction(family, width):
    sizes = (
        dict(n_embd=width, n_head=1) if family == "gpt2" else dict(hidden_size=width, num_attention_heads=1)
    )
    sizes |= {} if family == "gpt2" else dict(num_key_value_heads=1, head_dim=64)
    _, places = policy_of(family, share=False, **sizes)
    x, p = torch.randn(9, width).double(), torch.randn(width).double()
    centred = family in ("gpt2", "cohere", "nemotron", "olmo")
    eps = (
        next(v for k, v in vars(places.norm).items() if k in ("eps", "variance_epsilon"))
        if family != "olmo"
        else 1e-5
    )
    own = x - x.mean(-1, keepdim=True) if centred else x
    rms = (own.square().mean(-1) + eps).sqrt()
    with torch.no_grad():
        wanted = (places.norm(x) - places.norm(0 * x)).double() @ p
    in_fp32 = family not in ("gpt2", "nemotron")
    assert far(x @ folded(places.norm, p) / rms, wanted) <= (1e-6 if in_fp32 else 1e-10)


def test_what_is_no_norm_is_refused():
    with pytest.raises(ModelError, match="Tanh is neither"):
        folded(nn.Tanh(), torch.randn(64))
