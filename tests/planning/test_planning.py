"""What a step is predicted to hold: against counts by hand, autograd's own saved tensors, and processes."""

import math
from dataclasses import replace

import fastdpo_kernels
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.flops import How, step_flops
from benchmarks.inputs import groups_of, random_rows
from benchmarks.lengths import PairLengths
from benchmarks.memory.plan_accuracy import LIMIT, SMALL, run
from benchmarks.models import MODELS
from fastdpo.config.keys import Config
from fastdpo.data.packing import pack
from fastdpo.data.store.shards import Shard, encoded
from fastdpo.data.store.stored import StoredGroups, facts_of
from fastdpo.errors import ModelError
from fastdpo.model import attention
from fastdpo.model.adapters import add_lora
from fastdpo.model.cards import CARDS, card_named
from fastdpo.model.policy import Policy
from fastdpo.planning.allocations import ATTENTION, GRADIENTS, SAVED, STATES, WEIGHTS
from fastdpo.planning.fake_model import head_policy
from fastdpo.planning.prediction import assumed_groups, predict, selected, step_loads
from fastdpo.planning.search import Planner
from fastdpo.planning.simulate import Load, simulate
from fastdpo.planning.step_time import Shape, step_time, trains_all
from fastdpo.planning.target import Target
from fastdpo.records import Pair
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


def test_a_plan_is_of_what_this_process_does_not_avoid(monkeypatch):
    hopper = Target(capability=(9, 0))
    on_head = head_policy(config(lora_rank=4, lora_target_modules=["lm_head"]), llama(), hopper)
    heads = lambda: (hopper.head_backend(torch.bfloat16), on_head.head_backend)
    for avoided, taken in {
        (): ("triton", "cublas"),
        ("triton",): ("triton", "cublas"),
        ("triton", "plain_triton"): ("cublas", "cublas"),
        ("triton", "plain_triton", "cublas"): ("torch", "torch"),
    }.items():
        fastdpo_kernels.avoid(*avoided)
        assert heads() == taken

    seen = []
    real = attention._segments
    monkeypatch.setattr(attention, "_segments", lambda *args: seen.append("segments") or real(*args))
    load = Load((group(0, 30, [20, 9]),), several=False)
    for avoided, installed, segments in (
        ((), False, False),
        (("varlen",), False, True),
        (("varlen",), True, False),
        (("varlen", "flash_attn"), True, True),
    ):
        seen.clear()
        attention.avoid(*avoided)
        monkeypatch.setattr(attention, "_has_flash_attn", lambda installed=installed: installed)
        simulate(config(), llama(), load, GPU)
        assert bool(seen) == segments, avoided


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


def test_a_plan_reads_only_the_groups_that_it_simulates(monkeypatch):
    some = [group(i, 10 + i % 9, [10 + i % 13, 3 + i % 5]) for i in range(300)]
    stored, read = StoredGroups([Shard(encoded(some, {}))], [0]), []
    group_of = Shard.group
    monkeypatch.setattr(Shard, "group", lambda *args: read.append(args[1]) or group_of(*args))
    keys = config(batch_size=16, max_tokens=200)
    planner = Planner(llama(), selected(keys, stored), CPU)
    loads = planner.loads(keys)
    assert sorted(read) == sorted(g.row for load in loads for g in load.groups) and len(read) < 40
    plain = step_loads(keys, llama(), some, CPU)
    assert [[g.row for g in load.groups] for load in loads] == [
        [g.row for g in load.groups] for load in plain
    ]
    assert planner.time(keys) == Planner(llama(), some, CPU).time(keys)
    planner.predict(keys)
    assert len(read) < 40  # and once


@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Llama-3.1-8B LoRA"])
def test_flops_are_the_benchmarks(name):
    model = MODELS[name]
    c = AutoConfig.for_model(model.model_type, **model.config)
    rows = [PairLengths(200, 150, 100), PairLengths(50, 400, 30)]
    keys = config(lora_rank=model.lora_rank, batch_size=2)
    time = step_time(keys, c, facts_of(groups_of(random_rows(rows, 1000))), GPU, Shape(c))
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


def test_gradients_of_a_smaller_microbatch_may_make_the_peak():
    """A step of two microbatches, each smaller than the largest step of one, has gradients when its second
    one begins."""
    c = llama(num_hidden_layers=4, hidden_size=128)
    some = [group(i, 40, [22, 22]) for i in range(6)] + [group(6 + i, 60, [31, 31]) for i in range(6)]
    keys = config(batch_size=2, max_tokens=170)
    loads = step_loads(keys, c, some, CPU)
    assert [(sum(g.input_tokens for g in load.groups), load.several) for load in loads] == [
        (164, False),
        (120, True),
    ]
    alone, later = (predict(keys, c, [load], CPU).total for load in loads)
    assert later > alone and predict(keys, c, loads, CPU).total == later
    more = step_loads(config(batch_size=12, max_tokens=170), c, some, CPU)
    assert [load.several for load in more] == [True]


def test_a_model_that_no_fake_step_runs_is_refused_in_words(caplog):
    """Torch's fake grouped products want rows of whole 16 bytes (and before torch 2.15 bf16)."""
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=33, head_dim=16)
    c = model_config("qwen3_moe", **experts)
    with pytest.raises(ModelError, match=r"qwen3_moe cannot be planned.*leave memory out"):
        simulate(config(), c, Load((group(0, 30, [20, 9]),), several=False), CPU)
    assert not caplog.records


def test_pairs_that_do_not_train_are_not_counted():
    ranked = [ranked_group(row) for row in range(4)]
    (all_pairs, *_), (one, *_) = (
        step_loads(keys, llama(), selected(keys, ranked), CPU)
        for keys in (config(), config(pairs="best_worst"))
    )
    assert sum(len(g.responses) for g in all_pairs.groups) == 16
    assert sum(len(g.responses) for g in one.groups) == 8
    by_logp = config(pairs="hard", pair_gap="logp")  # which of them train, only the reference can tell
    assert [len(g.responses) for g in selected(by_logp, ranked)] == [4] * 4


def ranked_group(row):
    plain = group(row, 10, [8, 8, 8, 8], pairs=[Pair(i, j) for i in range(4) for j in range(i + 1, 4)])
    scored = tuple(replace(r, score=float(-i)) for i, r in enumerate(plain.responses))
    return replace(plain, responses=scored)


def test_a_lora_on_the_head_caps_the_scored_tokens():
    """As Policy.max_scored of the real one does: that head keeps something for its backward."""
    c = llama(vocab_size=5000)
    on_head = config(lora_rank=4, lora_target_modules=["q_proj", "lm_head"], head_memory="8MiB")
    frozen = config(lora_rank=4, head_memory="8MiB")
    assert head_policy(frozen, c, CPU).max_scored is None
    real = Policy(add_lora(AutoModelForCausalLM.from_config(c), on_head), torch.float32, head_budget=8 << 20)
    assert head_policy(on_head, c, CPU).max_scored == real.max_scored is not None
    assert head_policy(on_head, c, Target(capability=(9, 0))).head_backend == "cublas"


def test_dtypes_are_those_of_the_run():
    """model.load_policy: pure_bf16 computes in bf16 on a CPU too, and auto is fp32 before sm_80."""
    assert CPU.dtype(config()) == torch.float32 and GPU.dtype(config()) == torch.bfloat16
    assert CPU.dtype(config(pure_bf16=True)) == torch.bfloat16
    assert Target(capability=(7, 5)).dtype(config()) == torch.float32
    c, load = llama(), Load((group(0, 30, [20, 9]),), several=True)
    peaks = simulate(config(pure_bf16=True), c, load, CPU)
    sizes = [2 * p.numel() for p in parameters(c)]
    assert at(peaks, "forward")[GRADIENTS] == in_blocks(*sizes)


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L40", None),
        ("NVIDIA RTX A1000 Laptop GPU", None),
        ("NVIDIA GH200 480GB", None),
    ],
)
def test_a_card_is_known_by_whole_words(name, card):
    assert card_named(name) == (card and CARDS[card])


def test_every_card_takes_the_triton_head_and_an_unknown_one_does_not():
    taken = {name: Target.of_card(name).head_backend(torch.bfloat16) for name in CARDS}
    assert taken == dict.fromkeys(CARDS, "triton")
    assert Target().head_backend(torch.bfloat16) == "cublas"


def test_a_model_that_is_an_adapter_trains_its_lora(tmp_path):
    """With DoRA's norms as the trainer takes them, and not timed as if all weights trained."""
    c = llama(num_hidden_layers=2)
    fresh = config(lora_rank=4, use_dora=True)
    AutoModelForCausalLM.from_config(c).save_pretrained(tmp_path / "base")
    lora = add_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), fresh)
    lora.save_pretrained(tmp_path / "adapter")
    started = replace(config(), model=str(tmp_path / "adapter"))
    assert trains_all(config()) and not trains_all(started) and not trains_all(fresh)
    load = Load((group(0, 30, [20, 9]),), several=True)
    same = lambda keys: max(peak.total for peak in simulate(keys, c, load, GPU))
    assert same(started) == same(fresh)


def test_layers_that_are_not_alike_are_refused_in_a_sentence():
    kinds = ["sliding_attention", "full_attention"]
    config = model_config("gemma4_text", hidden_size_per_layer_input=8, layer_types=kinds)
    with pytest.raises(ModelError, match="plan: the layers of gemma4_text are not all alike"):
        Planner(config, [group(0, 6, [5, 4])], Target(is_cpu=True))
