"""The embedded engine: what a call's samples depend on, and that nothing else changes."""

from dataclasses import replace

import pytest
import torch
from rich.console import Console

from fastdpo.config.rounds import SampleSpec
from fastdpo.errors import ModelError
from fastdpo.model import support
from fastdpo.model.spec import ModelSpec
from fastdpo.sampling import engine
from fastdpo.sampling.engine import sample
from tests import images, tiny
from tests.distributed.processes import Ranks
from tests.distributed.steps import place

QUIET = Console(quiet=True)
SPEC = SampleSpec(responses=3, max_new_tokens=6)


def prompts(n=7):
    return [tiny.group(row, 3 + row, [2, 2], vocab=131) for row in range(n)]


def answered(policy, groups, tmp_path, spec=SPEC, **more):
    tokenizer = tiny.tokenizer()
    how = dict(spec=spec, seed=5, ends=[2], model=ModelSpec(model="none"), work=tmp_path, console=QUIET)
    return list(sample(policy, tokenizer, groups, **(how | more)))


def test_calls_are_in_order_and_depend_on_nothing_before_them(tmp_path):
    policy, groups = tiny.policy(), prompts()
    support.prepare(policy, groups, QUIET)
    random = torch.get_rng_state()
    calls = answered(policy, groups, tmp_path, at_once=6)
    assert torch.equal(torch.get_rng_state(), random) and policy.share and policy.model.training
    assert [first for first, _ in calls] == [0, 2, 4, 6] and sum(len(made) for _, made in calls) == 7
    answers = [some for _, made in calls for some in made]
    assert all(len(some) == 3 and len(set(map(tuple, some))) > 1 for some in answers)
    assert all(1 <= len(ids) <= 6 and 2 not in ids[:-1] for some in answers for ids in some)
    assert answered(policy, groups, tmp_path, at_once=6, first=4) == calls[2:]
    assert answered(policy, groups, tmp_path, at_once=6, first=7) == []
    assert answered(policy, groups, tmp_path, at_once=6, seed=6) != calls
    other = [*groups[:2], replace(groups[2], row=99), *groups[3:]]
    again = answered(policy, other, tmp_path, at_once=6)
    assert again[1] != calls[1] and [again[0], *again[2:]] == [calls[0], *calls[2:]]


def test_a_prompt_with_more_responses_than_a_call_has_sequences_is_one_call(tmp_path):
    spec = replace(SPEC, responses=5)
    calls = answered(tiny.policy(), prompts(2), tmp_path, spec, at_once=2)
    assert [(first, [len(some) for some in made]) for first, made in calls] == [(0, [5]), (1, [5])]


@pytest.mark.parametrize("narrow", [dict(top_p=1e-6), dict(temperature=1e-6)])
def test_top_p_and_temperature_are_those_of_the_spec(tmp_path, narrow):
    """Next to nothing of either leaves the likeliest token alone, which `generate` takes without sampling."""
    policy, groups = tiny.policy(), prompts(2)
    with torch.no_grad():
        for (_, [some]), group in zip(
            answered(policy, groups, tmp_path, replace(SPEC, **narrow), at_once=1), groups, strict=True
        ):
            ids = torch.tensor(group.prompt)[None]
            how = dict(do_sample=False, max_new_tokens=6, eos_token_id=2, pad_token_id=0)
            (greedy,) = policy.core.generate(ids, attention_mask=torch.ones_like(ids), **how)
            assert some == [greedy[len(group.prompt) :].tolist()] * 3


def test_no_room_is_told_before_anything_is_sampled(tmp_path):
    policy = tiny.policy(max_position_embeddings=14)
    assert answered(policy, prompts(6), tmp_path)  # 8 tokens and 6 new ones: just
    said = (
        r"no room for max_new_tokens: 6 behind the prompt of row 6 \(9 tokens\): the model has 14 positions"
    )
    with pytest.raises(ModelError, match=said):
        answered(policy, prompts(7), tmp_path, first=6)


def test_a_gpu_takes_as_many_as_a_quarter_of_its_free_memory_holds(monkeypatch):
    policy, groups = tiny.policy(), prompts()
    one = 2 * 2 * 2 * 16 * 15 * 4  # keys and values, layers, kv heads, head, 9 + 6 tokens, fp32
    assert engine.room_for(policy, groups, 6) == 64
    for free, fits in [(4 * one * 10, 10), (4 * one * 10 - 1, 9), (0, 1), (1 << 40, 256)]:
        monkeypatch.setattr(policy, "free_memory", lambda free=free: free)
        assert engine.room_for(policy, groups, 6) == fits


def test_prompts_with_images_are_answered_one_by_one(tmp_path):
    policy = images.policy("qwen2_vl")
    policy.processor = images.processor("qwen2_vl")
    groups = images.groups("qwen2_vl")[:2]
    calls = answered(policy, groups, tmp_path, replace(SPEC, responses=2, max_new_tokens=3))
    assert [first for first, _ in calls] == [0, 1] and all(len(made[0]) == 2 for _, made in calls)


def on_ranks(world, mode, folder, n):
    policy = place(tiny.policy(), world, mode)
    return answered(policy, prompts(n), folder, at_once=6)


@pytest.fixture(scope="module")
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("n", [2, 5])  # one call; three, of which the last is shorter and one rank's alone
@pytest.mark.parametrize("mode", ["replicate", "shard"])
def test_several_ranks_have_all_answers_of_one(two, mode, n, tmp_path):
    assert two(on_ranks, mode, tmp_path, n) == [answered(tiny.policy(), prompts(n), tmp_path, at_once=6)] * 2


def test_the_callers_end_tokens_end_answers(tmp_path):
    """Whatever the model's own are."""
    made = answered(tiny.policy(), prompts(2), tmp_path, ends=list(range(3, 131)))
    assert {len(ids) for _, some in made for one in some for ids in one} <= {1, 2}
