"""What a step is predicted to hold: against counts by hand, autograd's own saved tensors, and processes."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.flops import How, step_flops
from benchmarks.inputs import groups_of, random_rows
from benchmarks.lengths import PairLengths
from benchmarks.models import MODELS
from benchmarks.plan_accuracy import LIMIT, SMALL, run
from fastdpo.config import Config
from fastdpo.model import Policy
from fastdpo.packing import pack
from fastdpo.planning.allocations import ATTENTION, GRADIENTS, SAVED, STATES, WEIGHTS
from fastdpo.planning.microbatch import assumed_groups, step_loads
from fastdpo.planning.prediction import predict
from fastdpo.planning.simulate import Load, simulate
from fastdpo.planning.step_time import Shape, step_time
from fastdpo.planning.target import Target, card_named
from tests.tiny import group, model_config

CPU, GPU = Target(is_cpu=True), Target()
SIZES = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4)


def llama(**keys):
    return model_config("llama", **SIZES | {"num_key_value_heads": 4, "tie_word_embeddings": False} | keys)


def config(**keys):
    return Config(model="random", data="none", **keys)


def at(peaks, where):
    return next(peak.bytes for peak in peaks if peak.where == where)


def parameters(c):
    with torch.device("meta"):
        return list(AutoModelForCausalLM.from_config(c).parameters())


def in_blocks(*sizes, block=64):
    return sum(-(-size // block) * block for size in sizes)


def test_weights_gradients_and_states_by_arithmetic():
    c = llama()
    peaks = simulate(config(), c, Load((group(0, 30, [20, 9]),), several=False), CPU)
    sizes = [4 * p.numel() for p in parameters(c)]
    buffers = in_blocks(*[4 * 8] * 2)  # the rotary embedding's frequencies, twice
    end = at(peaks, "optimizer step")
    assert end[WEIGHTS] == in_blocks(*sizes) + buffers
    assert end[GRADIENTS] == in_blocks(*sizes)
    assert end[STATES] == in_blocks(*[2 * size for size in sizes])
    before = at(peaks, "forward")
    assert before[GRADIENTS] == 0
    several = simulate(config(), c, Load((group(0, 30, [20, 9]),), several=True), CPU)
    assert at(several, "forward")[GRADIENTS] == in_blocks(*sizes)


def test_a_tied_head_is_one_weight():
    load = Load((group(0, 30, [20, 9]),), several=False)
    tied, apart = (
        at(simulate(config(), llama(tie_word_embeddings=tie), load, CPU), "forward")[WEIGHTS]
        for tie in (True, False)
    )
    assert apart - tied == in_blocks(4 * 131 * 64)


def test_saved_activations_by_hand():
    """One prompt with one response: no copies of keys, one segment. In units of T tokens of fp32."""
    c, one = llama(), group(0, 100, [57])
    T, D, inner, heads, layers = one.input_tokens, 64, 192, 4, 2
    assert T == 156
    norm = 3 * D + 1  # its input, the normalised rows, the result, 1 / root mean square
    attention = 3 * D + heads + 2 * D  # q, k, v, log-sum-exp, the output, and its copy for o_proj
    mlp = 4 * inner  # gate, silu(gate), up, their product
    per_token = layers * (2 * norm + attention + mlp) + norm + 2 * 16  # the last norm, cos and sin
    saved = at(simulate(config(), c, Load((one,), several=False), CPU), "head")[SAVED]
    assert saved == pytest.approx(4 * T * per_token, rel=0.01)


def test_checkpointed_layers_keep_their_inputs():
    c, one = llama(), group(0, 100, [57])
    T, D, layers = one.input_tokens, 64, 2
    keys = config(gradient_checkpointing=True)
    saved = at(simulate(keys, c, Load((one,), several=False), CPU), "head")[SAVED]
    assert saved == pytest.approx(4 * T * (layers * D + 3 * D + 1 + 2 * 16), rel=0.01)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gpt2"])
def test_saved_activations_are_those_that_autograd_saves(family):
    """The storages that a real forward of real tensors hands to autograd, once each."""
    c = model_config(family)
    some = (group(0, 30, [20, 9]), group(1, 7, [5, 16, 3]))
    policy = Policy(AutoModelForCausalLM.from_config(c).train(), torch.float32)
    policy.set_sharing(True)
    own = {t.untyped_storage()._cdata for t in (*policy.model.parameters(), *policy.model.buffers())}
    batch, saved = pack(some), {}

    def see(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor  # alive, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda t: t):
        policy.hidden(batch)
    kept = [t for key, t in saved.items() if key not in own and t.is_floating_point()]
    real = sum(t.untyped_storage().nbytes() for t in kept)
    ours = at(simulate(config(), c, Load(some, several=False), CPU), "head")[SAVED]
    assert ours == pytest.approx(real, rel=0.08, abs=4096)


def test_attention_on_a_gpu_gathers_what_shared_prompts_need():
    """bf16 keys and values of both segments, [K, Hk d] each, a layer; no masks."""
    c, pair = llama(), group(0, 300, [50, 50])
    keys = 300 + 49 + 300 + 49
    end = at(simulate(config(), c, Load((pair,), several=False), GPU), "head")
    assert end[ATTENTION] == 2 * 2 * in_blocks(2 * keys * 64, block=512)


def test_offloading_keeps_little_on_a_gpu():
    c = llama(num_hidden_layers=8, hidden_size=256)
    load = Load(tuple(group(i, 400, [300, 300]) for i in range(4)), several=False)
    stays = at(simulate(config(), c, load, GPU), "head")[SAVED]
    goes = at(simulate(config(activation_offloading=True), c, load, GPU), "head")[SAVED]
    assert goes < stays / 5


def test_optimizer_in_backward_frees_each_gradient():
    c, load = llama(num_hidden_layers=6), Load((group(0, 30, [20, 9]),), several=False)
    lean = config(optimizer_in_backward=True, max_grad_norm=0.0)
    largest = max(peak.bytes[GRADIENTS] for peak in simulate(lean, c, load, GPU))
    assert largest < max(peak.bytes[GRADIENTS] for peak in simulate(config(), c, load, GPU)) / 4


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": 2},
        {"lora_rank": 4, "gradient_checkpointing": "selective"},
        {"lora_rank": 4, "load_in_4bit": True},
        {"activation_offloading": True, "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_a_few_layers_tell_of_all(keys):
    c = llama(num_hidden_layers=9, hidden_size=128)
    loads = [Load(tuple(group(i, 100, [80, 60]) for i in range(4)), several=False)]
    exact = predict(config(**keys), c, loads, GPU)
    assert predict(config(**keys), c, loads, GPU, exact=False).total == pytest.approx(exact.total, rel=0.01)


def test_the_largest_microbatch_is_found():
    c = llama()
    some = [group(i, 10, [10, 10]) for i in range(8)] + [group(8, 90, [40, 40])]
    keys = {"batch_size": 9, "max_tokens": 100}
    (load, *_) = step_loads(config(**keys), c, some, CPU)
    assert [g.row for g in load.groups] == [8]
    assert load.several
    rows = assumed_groups(config(max_length=128))
    assert {len(g.prompt) + len(g.responses[0].ids) for g in rows} == {128}


@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Llama-3.1-8B LoRA"])
def test_flops_are_the_benchmarks(name):
    model = MODELS[name]
    c = AutoConfig.for_model(model.model_type, **model.config)
    rows = [PairLengths(200, 150, 100), PairLengths(50, 400, 30)]
    keys = config(lora_rank=model.lora_rank, batch_size=2)
    time = step_time(keys, c, groups_of(random_rows(rows, 1000)), GPU, Shape(c))
    assert time.flops == pytest.approx(step_flops(model, rows, How())["total"], rel=0.01)
    assert card_named("NVIDIA H100 80GB HBM3").flops == pytest.approx(989e12)
    assert math.isfinite(time.seconds)


@pytest.mark.parametrize(
    "keys", [{}, {"lora_rank": 16}, {"gradient_checkpointing": True}], ids=["full", "lora", "checkpointing"]
)
def test_within_5_percent_of_a_real_process(keys):
    model = {"model_type": "llama", **SMALL, "vocab_size": 8000, "tie_word_embeddings": not keys}
    done = run({"name": "wide", "model": model, "lengths": "mixed", "keys": keys})
    assert abs(done["error"]) < LIMIT, done
