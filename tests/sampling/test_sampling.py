"""Samples are of the model's own distribution, by seed, and leave everything as it was."""

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from fastdpo.errors import ModelError
from fastdpo.model import support
from fastdpo.sampling.sampled import sampled
from tests import tiny
from tests.training.test_samples import silent


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def policy_of(tokenizer, **overrides):
    policy = tiny.policy(vocab_size=len(tokenizer), **overrides)
    support.prepare(policy, tiny.groups(vocab=len(tokenizer)), silent())
    return policy


def ids(groups):
    return [[response.ids.tolist() for response in group.responses] for group in groups]


def test_a_seed_gives_the_same_samples_and_nothing_changes(tokenizer):
    policy, groups = policy_of(tokenizer), tiny.groups(vocab=len(tokenizer))
    narrow = GenerationConfig(do_sample=False, top_k=1, repetition_penalty=2.0)
    policy.core.generation_config = narrow
    random = torch.get_rng_state()
    how = dict(per_prompt=3, max_new_tokens=9, at_once=4)
    first = sampled(policy, tokenizer, groups, seed=5, **how)
    assert torch.equal(torch.get_rng_state(), random)
    assert policy.core.generation_config is narrow and policy.share and policy.model.training
    assert ids(sampled(policy, tokenizer, groups, seed=5, **how)) == ids(first)
    assert ids(sampled(policy, tokenizer, groups, seed=6, **how)) != ids(first)
    for group, answered in zip(groups, first, strict=True):
        assert answered.row == group.row and answered.prompt is group.prompt and answered.pairs == ()
        assert len(answered.responses) == 3 and len(set(map(tuple, ids([answered])[0]))) > 1
        assert all(1 <= len(r.ids) <= 9 and r.target_mask.all() for r in answered.responses)


def test_the_first_token_is_distributed_as_the_model_says(tokenizer):
    """2000 samples of one prompt beside the softmax of its own logits, by a chi-square over likely tokens."""
    policy, (group,) = policy_of(tokenizer), tiny.groups(vocab=len(tokenizer))[:1]
    (answered,) = sampled(
        policy, tokenizer, [group], per_prompt=2000, max_new_tokens=1, temperature=2.0, at_once=500
    )
    with torch.no_grad(), policy.stock() as model:
        logits = model(input_ids=torch.tensor(group.prompt)[None]).logits[0, -1]
    expected = 2000 * (logits / 2.0).softmax(-1).double().numpy()
    counts = np.bincount([int(r.ids[0]) for r in answered.responses], minlength=len(expected))
    likely = expected >= 5
    pool = lambda values: np.append(values[likely], values[~likely].sum())
    chi_square = ((pool(counts) - pool(expected)) ** 2 / pool(expected)).sum()
    free = likely.sum()
    assert free > 20 and abs(chi_square - free) < 4 * np.sqrt(2 * free)


def test_a_response_ends_with_its_end_token(tokenizer):
    """Nothing behind it, though other prompts of the call go on."""
    policy, groups = policy_of(tokenizer, tie_word_embeddings=False), tiny.groups(vocab=len(tokenizer))
    end = tokenizer.eos_token_id
    answered = sampled(policy, tokenizer, groups, per_prompt=64, max_new_tokens=60, temperature=1.5)
    responses = [r.ids.tolist() for group in answered for r in group.responses]
    ends = {2, end}  # the model's and the tokenizer's
    assert all(not ends & set(r[:-1]) for r in responses)
    ended = [r for r in responses if r[-1] in ends]
    assert ended and len(ended) < len(responses) and all(len(r) == 60 or r[-1] in ends for r in responses)


def test_a_prompt_near_the_models_last_position_is_answered_shorter(tokenizer):
    policy = policy_of(tokenizer, max_position_embeddings=32)
    groups = [tiny.group(0, 5, [2, 2]), tiny.group(1, 30, [2, 2])]
    short, long = sampled(policy, tokenizer, groups, per_prompt=2, max_new_tokens=8)
    assert max(len(r.ids) for r in short.responses) > 2
    assert all(len(r.ids) <= 2 for r in long.responses)


def test_a_model_that_cannot_generate_is_told_with_its_row(tokenizer, monkeypatch):
    policy = policy_of(tokenizer)
    monkeypatch.setattr(policy.core, "generate", lambda **_: 1 / 0)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM cannot generate \(row 1\): ZeroDivisionError"):
        sampled(policy, tokenizer, tiny.groups(vocab=len(tokenizer)))
