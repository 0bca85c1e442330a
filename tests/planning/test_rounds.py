"""The plan of rounds: what samples could be at most, generation beside a real one, the phases."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
)

from fastdpo.config.keys import Config
from fastdpo.data.packing import pack, split_step
from fastdpo.data.store.shards import Shard, encoded
from fastdpo.data.store.stored import StoredGroups
from fastdpo.errors import ConfigError, DataError, ModelError
from fastdpo.model.generation_cache import cache_bytes
from fastdpo.model.policy import Policy
from fastdpo.planning import command
from fastdpo.planning.allocations import (
    CACHE,
    CPU_BLOCK,
    GRADIENTS,
    LOGITS,
    REWARD,
    SAVED,
    STATES,
    WEIGHTS,
    Tracker,
)
from fastdpo.planning.choose import choose
from fastdpo.planning.collectives import Model, Ranks
from fastdpo.planning.fake_model import units
from fastdpo.planning.out_of_memory import explain
from fastdpo.planning.prediction import assumed_groups, selected
from fastdpo.planning.ranks import GATHERED, rank_bytes, rank_plans
from fastdpo.planning.rounds import stand_ins
from fastdpo.planning.sampling import LAST, PROMPTS, SCORING, sequences
from fastdpo.planning.search import Planner
from fastdpo.planning.simulate import simulate
from fastdpo.planning.target import CONTEXT, Target
from fastdpo.records import Pair
from tests import images
from tests.planning.test_planning import at, llama
from tests.tiny import group, model_config, save_model

CPU, GPU = Target(is_cpu=True), Target()
SAMPLE = {"prompts": 32, "responses": 3, "max_new_tokens": 20}


def config(sample=SAMPLE, **keys):
    given = {"batch_size": 4, "max_length": 128, "max_tokens": 400, "rounds": 3, "reward": "length"} | keys
    return Config(model="random", data="none", sample=sample, **given)


def rows(n=40):
    return [group(i, 5 + 7 * i % 90, [12, 9]) for i in range(n)]


def planner(keys, c=None, target=CPU, some=None):
    return Planner(c or llama(), selected(keys, some or rows()), target)


def console():
    return Console(file=io.StringIO(), width=100)


def test_stand_ins_are_the_longest_samples_of_prompts_that_leave_room():
    some = [*rows(), group(40, 109, [5, 4]), group(41, 108, [5, 4])]
    (longest, *more), size = stand_ins(config(), some), 4
    assert (longest.row, len(longest.prompt)) == (41, 108)  # 109 + 20 are more than max_length
    assert len(more) + 1 == 3 * size and all(len(g.prompt) <= 108 for g in more)
    assert sorted(len(g.prompt) for g in more[-size:]) == sorted(len(g.prompt) for g in some)[:size]
    for one in (longest, *more):
        assert [len(r.ids) for r in one.responses] == [20] * 3 and one.scored_tokens == 60
        assert len({r.score for r in one.responses}) == 3
        assert one.pairs == (Pair(0, 1), Pair(0, 2), Pair(1, 2))
    with pytest.raises(DataError, match="20 has no room behind any of 1 prompts within max_length: 128"):
        stand_ins(config(), [group(0, 109, [5, 4])])


def test_resets_make_prompts_longer_as_far_as_there_is_room():
    """By all but the last token of the chosen response; a rejected one is never forced."""
    some = [group(0, 30, [12, 40]), group(1, 100, [12, 9]), group(2, 60, [1, 50])]
    lengths = lambda keys: {g.row: len(g.prompt) for g in stand_ins(keys, some)}
    assert lengths(config()) == {0: 30, 1: 100, 2: 60}
    assert lengths(config(SAMPLE | {"resets": 0.5})) == {0: 41, 1: 108, 2: 60}


def test_only_pairs_that_train_are_planned():
    (longest, *_) = selected(config(pairs="best_worst"), rows())
    assert longest.pairs == (Pair(0, 1),) and [r.score for r in longest.responses] == [3.0, 1.0]
    assert len(selected(config(objective="sft"), rows())[0].responses) == 1


def test_groups_are_not_read(monkeypatch):
    stored = StoredGroups([Shard(encoded(rows(), {}))], [0])
    plain = planner(config()).loads(config())
    monkeypatch.setattr(Shard, "group", lambda *args: pytest.fail("a group was read"))
    assert [[g.row for g in load.groups] for load in planner(config(), some=stored).loads(config())] == [
        [g.row for g in load.groups] for load in plain
    ]


@pytest.mark.parametrize("cap", [150, 300, 2000])
def test_no_round_has_a_microbatch_much_larger(cap):
    """Of random prompts and samples of any lengths: at most what is left free in the planned one, less than
    a tenth of it."""
    keys = config(max_tokens=cap, batch_size=8)
    planned = max(sum(g.input_tokens for g in load.groups) for load in planner(keys).loads(keys))
    some, draw = rows(), np.random.default_rng(0)
    for number in range(200):
        chosen = draw.choice(len(some), 8, replace=False)
        step = [group(int(i), len(some[i].prompt), draw.integers(1, 21, 3).tolist()) for i in chosen]
        found = max(sum(g.input_tokens for g in part) for part in split_step(step, cap))
        assert found <= 1.1 * planned, number
    if cap == 2000:  # one microbatch: of the longest
        lengths = sorted(len(one.prompt) for one in some)[-8:]
        assert planned == sum(lengths) + 8 * 3 * 19


def test_the_step_is_that_of_real_samples():
    """What autograd keeps of the longest prompts with samples that end as late as they may."""
    c, keys = llama(), config()
    some = sorted(rows(), key=lambda one: -len(one.prompt))[:2]
    real = [group(one.row, len(one.prompt), [20, 20, 20]) for one in some]
    policy = Policy(AutoModelForCausalLM.from_config(c).train(), torch.float32)
    policy.set_sharing(True)
    own = {t.untyped_storage()._cdata for t in (*policy.model.parameters(), *policy.model.buffers())}
    saved = {}

    def see(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor  # alive, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda t: t):
        policy.hidden(pack(real))
    kept = [t for key, t in saved.items() if key not in own and t.is_floating_point()]
    size = sum(t.untyped_storage().nbytes() for t in kept)
    (load, *_) = planner(replace(keys, batch_size=2)).loads(replace(keys, batch_size=2))
    assert [g.row for g in load.groups] == [g.row for g in real]
    assert at(simulate(keys, c, load, CPU), "head")[SAVED] == pytest.approx(size, rel=0.08)


@pytest.mark.parametrize(("family", "new"), [("llama", 1), ("llama", 20), ("gpt2", 20), ("gemma3_text", 20)])
def test_sampling_allocates_what_a_real_call_does(family, new):
    """transformers' own generate on real tensors, with prompts of two lengths; all tokens and the first."""
    more = {"sliding_window": 16, "head_dim": 16} if family == "gemma3_text" else {}
    c = model_config(family, vocab_size=3000, **more)
    keys = config({"max_new_tokens": new, "top_p": 0.9, "temperature": 0.7})
    longest = [group(0, 90, [3, 2])]
    peaks = planner(keys, c, some=longest).between(keys, exact=True)
    assert [peak.where for peak in peaks] == ([PROMPTS, LAST] if new > 1 else [PROMPTS])
    ours = max(peak.total - peak.bytes[STATES] for peak in peaks)
    assert all(peak.bytes[GRADIENTS] == peak.bytes[SAVED] == 0 < peak.bytes[STATES] for peak in peaks)

    model = AutoModelForCausalLM.from_config(c).eval()
    how = dict(do_sample=True, top_p=0.9, temperature=0.7, top_k=0, max_new_tokens=new, min_new_tokens=None)
    model.generation_config = GenerationConfig(pad_token_id=0, use_cache=True, **how)
    ids = torch.randint(3, 3000, (64, 90))
    mask = torch.ones_like(ids)
    mask[::2, :5] = 0
    with Tracker(CPU_BLOCK) as real:
        for weight in (*model.parameters(), *model.buffers()):
            real.add(weight, WEIGHTS)
        model.generate(input_ids=ids, attention_mask=mask)
    assert ours == pytest.approx(max(peak.total for peak in real.peaks()), rel=0.05)


def test_the_cache_and_the_logits_are_named():
    keys, c = config(), llama(vocab_size=20_000)
    (_, last) = planner(keys, c).between(keys, exact=True)
    longest = max(len(one.prompt) for one in rows())
    cache = 64 * cache_bytes(c, longest + 19, 4)  # of the last layer's there is an older copy for a while
    assert 0.98 * cache <= last.bytes[CACHE] <= 1.6 * cache
    logits = 64 * 20_000 * 4  # the model's, generate's copy, probabilities
    assert last.bytes[LOGITS] == pytest.approx(3 * logits, rel=0.01)
    nucleus = replace(keys, sample=SAMPLE | {"top_p": 0.9})
    (_, last) = planner(keys, c).between(nucleus, exact=True)
    assert last.bytes[LOGITS] > 5 * logits


def test_a_few_layers_tell_of_all_when_sampling():
    keys, c = config(), llama(num_hidden_layers=9)
    for target in (CPU, GPU):
        few, all_ = (planner(keys, c, target).between(keys, exact=exact) for exact in (False, True))
        assert [a.total for a in few] == pytest.approx([b.total for b in all_], rel=0.01)


def test_sequences_of_a_call():
    c, keys = llama(), config()
    one = cache_bytes(c, 100 + 20, 2)
    given = lambda target, keys=keys: sequences(keys, c, 100, 10**6, target)
    assert given(CPU) == 64 and given(GPU) == 256 == given(Target(memory=10**12))
    assert given(Target(memory=CONTEXT + 10**6 + 4 * 9 * one)) == 9
    assert given(GPU, config(memory=f"{CONTEXT + 10**6 + 4 * 9 * one}B")) == 9
    assert given(Target(memory=CONTEXT)) == 1


@pytest.fixture
def reward(tmp_path):
    c = llama(num_labels=1, hidden_size=128)
    AutoModelForSequenceClassification.from_config(c).save_pretrained(tmp_path / "reward")
    return str(tmp_path / "reward")


def test_a_reward_model_is_weights_while_it_scores(reward):
    keys = config(reward=reward)
    scoring = planner(keys, target=GPU).between(keys)[-1]
    model = AutoModelForSequenceClassification.from_pretrained(reward)
    size = 2 * sum(p.numel() for p in model.parameters())  # in bf16 there
    assert scoring.where == SCORING and scoring.bytes[REWARD] == size and scoring.bytes[GRADIENTS] == 0
    assert planner(keys, target=GPU).predict(keys).peak.bytes[REWARD] in (0, size)
    on_cpu = planner(keys).predict(keys)  # in the memory of the process from the start
    assert on_cpu.peak.bytes[REWARD] == 2 * size
    for function in ("vader", "length", "mine.py:score"):
        other = config(SAMPLE | {"engine": "vllm"}, reward=function)
        assert planner(other, target=GPU).between(other) == []
    with pytest.raises(ModelError, match=r"reward: '.*none' does not exist here"):
        planner(missing := config(reward=f"{reward}/none")).between(missing)


def test_vllm_samples_elsewhere():
    keys = config(SAMPLE | {"engine": "vllm"})
    assert planner(keys).between(keys) == []
    assert "sampling" not in planner(keys).predict(keys).phases


def test_without_rounds_nothing_is_sampled():
    keys = Config(model="random", data="none", batch_size=4)
    one = Planner(llama(), selected(keys, rows()), CPU)
    assert one.between(keys) == [] and "sampling" not in one.predict(keys).phases


def test_a_run_with_rounds_chooses_what_fits():
    """With less memory fewer sequences are sampled at once, so that only training has to change."""
    long = SAMPLE | {"max_new_tokens": 60}
    keys = config(long, max_tokens=4096, batch_size=32, head_memory="64MiB", memory=f"{CONTEXT + 5 * 10**7}B")
    now = planner(keys, target=GPU).predict(keys, exact=True)
    assert now.total > CONTEXT + 5 * 10**7 > now.phases["sampling"]
    said = console()
    chosen = choose(keys, llama(), rows(), said, GPU)
    assert chosen != keys and "Chosen" in said.file.getvalue()
    assert planner(chosen, target=GPU).predict(chosen, exact=True).total <= CONTEXT + 5 * 10**7


def test_too_little_for_sampling_says_so():
    keys, wide = config(SAMPLE | {"max_new_tokens": 2}), llama(vocab_size=200_000, hidden_size=32)
    some = [group(0, 3, [2, 2])]
    now = planner(keys, wide, some=some).predict(keys, exact=True)
    assert now.peak.where.startswith("sampling") and max(now.phases, key=now.phases.get) == "sampling"
    with pytest.raises(ConfigError) as caught:
        choose(replace(keys, memory=f"{now.total // 2}B"), wide, some, console(), CPU)
    assert "in the sampling" in str(caught.value) and "engine: vllm" in str(caught.value)


def test_the_command_shows_the_phases(tmp_path):
    save_model(tmp_path / "model")
    keys = replace(config(), model=str(tmp_path / "model"), data=str(tmp_path / "none.jsonl"))
    said = console()
    assert command.plan(keys, None, "cpu", said)
    words = " ".join(said.file.getvalue().split())
    for word in ("phases of a round: sampling", "lengths are the worst case", "(20)", "is not estimated"):
        assert word in words, word
    (one, *_) = assumed_groups(keys)
    assert len(one.prompt) == 128 - 20
    said = console()
    command.plan(replace(keys, sample=SAMPLE | {"engine": "vllm"}), None, "cpu", said)
    assert "takes what is left" in said.file.getvalue() and "round: forward" in said.file.getvalue()


def test_a_rank_samples_with_its_part_of_the_weights():
    keys, c = config(SAMPLE | {"max_new_tokens": 2}), llama(vocab_size=60_000)
    one = planner(keys, c, GPU, [group(0, 3, [2, 2])])
    parts = rank_bytes(one, keys, Model(2, *units(keys, c, GPU)), "shard", Ranks(4))
    whole = one.predict(keys)
    assert "sampling" in parts.phases and parts.phases["sampling"] < whole.phases["sampling"]
    assert GATHERED in parts.peak.bytes
    assert [plan.mode for plan in rank_plans(one, keys, Ranks(2), None)] == ["replicate", "shard"]


def test_out_of_memory_in_a_rounds_step_is_explained():
    text = explain(config(), llama(), False, pack(selected(config(), rows())[:2]))
    assert "predicted for this microbatch" in text and "sampling" not in text


def test_images_are_planned_one_sequence_at_a_time():
    c, some = images.config("llava"), images.groups("llava")
    keys = config(max_length=400)
    one = Planner(c, selected(keys, some), CPU, processor=images.processor("llava"))
    with_images = [load for load in one.loads(keys) if any(g.images for g in load.groups)]
    assert with_images and all(load.batch is not None for load in with_images)
    lengths = max(len(g.prompt) for g in some)
    (_, last) = one.between(keys)
    assert last.bytes[CACHE] <= 2 * cache_bytes(c, lengths + 20, 4)
    assert "sampling" in one.predict(keys).phases
