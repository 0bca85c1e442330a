"""Weights in 4 bits: which, how many bytes, one at a time; as references; and checkpoints that hold them."""

import importlib.util
import json
import weakref

import pytest
import torch
import transformers.core_model_loading as loading
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from fastdpo.data.packing import pack
from fastdpo.errors import ConfigError, ModelError
from fastdpo.model.loading import load_model_config
from fastdpo.model.quantised import nf4_bytes, quantised_linears
from fastdpo.model.support import prepare, stock_logp
from fastdpo.reference.fingerprint import reference_fingerprint
from tests import tiny
from tests.model.test_qlora import NF4, config_of, linears, load
from tests.rounding import model_ulps
from tests.training.test_trainer import QUIET

bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'fastdpo[quant]'")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("base"), vocab_size=400)


# ---- what is quantised, and how large it is


@pytest.mark.parametrize("shape", [(64, 64), (96, 64), (7, 13), (1000, 333), (1, 64 * 256 + 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_of_a_weight(shape, dtype):
    options = dict(quant_type="nf4", compress_statistics=True)
    weight = bnb.nn.Params4bit(torch.randn(shape, dtype=dtype), requires_grad=False, **options).to("cpu")
    state = weight.quant_state
    held = [weight.data, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    known = {"absmax", "code", "offset", "state2", "shape", "dtype", "blocksize", "quant_type", "nested"}
    assert set(vars(state)) == known and set(vars(state.state2)) == known  # no tensor is left out
    assert nf4_bytes(*shape) == sum(t.nbytes for t in held)
    assert len({t.data_ptr() for t in held}) == 6


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2", "gemma2", "mixtral", "opt"])
def test_which_weights_are_quantised(tmp_path, model_type, tie):
    folder = tiny.save_model(tmp_path, model_type, tie_word_embeddings=tie)
    policy, said = load(folder)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(tiny.model_config(model_type, tie_word_embeddings=tie))
    sizes = quantised_linears(whole)
    found = linears(policy.core)
    assert sizes == {name: (m.out_features, m.in_features) for name, m in found.items()}
    for name, module in found.items():
        assert tuple(module.weight.quant_state.shape) == sizes[name]
    assert type(policy.head.module) is torch.nn.Linear
    stacked = "mlp.experts.gate_up_proj, which no linear layer holds"
    assert (stacked in said) == (model_type == "mixtral"), said
    assert f"NF4: {len(found)} matrices" in said


def test_everything_else_stays_in_the_compute_dtype(base):
    """Where peft's prepare_model_for_kbit_training would make it fp32."""
    policy, said = load(base, dtype="bf16")
    held = {id(module.weight) for module in linears(policy.core).values()}
    frozen = [p for p in policy.model.parameters() if not p.requires_grad and id(p) not in held]
    assert {p.dtype for p in frozen} == {torch.bfloat16} and "stay in bf16" in said
    assert {p.dtype for p in policy.trained()} == {torch.float32}
    assert all("lora_" in name for name, p in policy.model.named_parameters() if p.requires_grad)
    assert {m.compute_dtype for m in linears(policy.core).values()} == {torch.bfloat16}
    batch = pack(tiny.groups(), share=False)
    assert policy.hidden(batch).dtype == torch.bfloat16


def test_one_whole_weight_is_in_memory_at_a_time(base, monkeypatch):
    stock, alive, most = loading._materialize_copy, [], []

    def watched(*args, **keys):
        tensor = stock(*args, **keys)
        alive.append(weakref.ref(tensor))
        most.append(sum(ref() is not None and tuple(ref().shape) != (400, 64) for ref in alive))
        return tensor

    monkeypatch.setattr(loading, "_materialize_copy", watched)
    load(base)
    norms = 2 * 2 + 1
    assert len(alive) > 14 + norms
    assert max(most) <= norms + 2  # the one that is quantised, and the one that comes


# ---- the reference


def test_which_bases_share_a_reference(base):
    of = lambda **keys: reference_fingerprint(load(base, **keys)[0], fresh_lora=True).namespace
    first = of()
    assert of() == of(lora_rank=2) == of(use_dora=True, use_rslora=True, lora_alpha=1) == first
    assert of(lora_target_modules=["q_proj", "lm_head"]) == first
    assert len({first, of(load_in_4bit=False), of(dtype="bf16")}) == 3


@pytest.mark.parametrize("what", ["packed", "absmax", "nested", "offset", "quant_map", "nested_map"])
def test_every_part_of_a_4_bit_weight_counts(base, what):
    policy, _ = load(base)
    before = reference_fingerprint(policy, True)
    module = next(iter(linears(policy.core).values()))
    state = module.weight.quant_state
    part = {"packed": module.weight.data, "absmax": state.absmax, "nested": state.state2.absmax}
    part |= {"offset": state.offset, "quant_map": state.code, "nested_map": state.state2.code}
    if part[what].dtype == torch.uint8:
        part[what].view(-1)[-1] ^= 1
    else:
        part[what].view(-1)[-1] += 1e-3
    after = reference_fingerprint(policy, True)
    assert after.differs_from(before.parts) == ["weights"]


# ---- what is stored quantised


def save_quantised(base, folder, **settings):
    quantisation = BitsAndBytesConfig(**(NF4 | settings))
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantisation)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return str(folder)


def test_a_checkpoint_in_4_bits_is_known_without_the_key(base, tmp_path):
    folder = save_quantised(base, tmp_path / "4bit", bnb_4bit_compute_dtype=torch.bfloat16)
    policy, said = load(folder, load_in_4bit=False)
    assert "NF4: 14 matrices" in said
    assert {m.compute_dtype for m in linears(policy.core).values()} == {torch.float32}  # the run's
    ours, other = (p.token_logp(pack(tiny.groups(), p.share)) for p in (policy, load(base)[0]))
    assert torch.equal(ours, other)
    load(folder)  # with the key: the same
    with pytest.raises(
        ConfigError, match="is stored in 4 bits, so only a LoRA can train on it; set lora_rank"
    ):
        load_model_config(config_of(folder, load_in_4bit=False, lora_rank=None))


def test_a_quantised_head_is_written_out_aloud(base, tmp_path):
    folder = save_quantised(base, tmp_path / "4bit", llm_int8_skip_modules=["embed_tokens"])
    policy, said = load(folder, load_in_4bit=False)
    assert "the lm_head is stored in 4 bits: dequantised to fp32" in said
    assert type(policy.head.module) is torch.nn.Linear
    assert not torch.equal(
        policy.head.module.weight, AutoModelForCausalLM.from_pretrained(base).lm_head.weight
    )
    stored = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(stored.lm_head, bnb.nn.Linear4bit)
    group = tiny.groups()[0]
    ids = torch.tensor([[*group.prompt, *group.responses[0].ids]])
    with torch.no_grad():
        ours, theirs = policy.model(ids).logits, stored.train()(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=model_ulps(theirs))
    prepare(policy, tiny.groups(), QUIET)
    assert len(stock_logp(policy, group)) == len(policy.token_logp(pack([group], policy.share)))


STORED = {
    "gptq": dict(quant_method="gptq", bits=4),
    "awq": dict(quant_method="awq", bits=4),
    "bitsandbytes in 8 bits": dict(quant_method="bitsandbytes", load_in_8bit=True),
}


@pytest.mark.parametrize("name", STORED)
def test_other_quantised_checkpoints_are_refused(tmp_path, name):
    folder = tiny.save_model(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": STORED[name]}))
    with pytest.raises(ModelError, match=f"quantised by {name}; .* Give the model that it was made of"):
        load_model_config(config_of(folder))


def test_what_it_needs(base, monkeypatch):
    with pytest.raises(ConfigError, match=r"load_in_4bit: weights in 4 bits are frozen, .* set lora_rank"):
        load_model_config(config_of(base, lora_rank=None))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    with pytest.raises(ConfigError, match=r"needs bitsandbytes: pip install 'fastdpo\[quant\]'"):
        load_model_config(config_of(base))
