"""What a model answers by itself: the papers' way to choose the tokens that neurons are looked at on."""

from functools import partial

import numpy as np
import torch
from rich.console import Console

from fastdpo.console.progress import make_progress
from fastdpo.data.store.stored import facts_of
from fastdpo.model.policy import Policy
from fastdpo.records import Groups, PreferenceGroup, Response
from fastdpo.sampling.generate import batches, end_tokens, generate, generating
from fastdpo.training.run import spread

TOKENS = 20  # as 2411.06424
_AT_ONCE = 64  # prompts a call


@torch.no_grad()
def own_answers(
    policy: Policy, tokenizer, groups: Groups, console: Console, whose: str
) -> list[PreferenceGroup]:
    """Each different prompt with the model's greedy answer, cut after 20 tokens, all of them scored."""
    prompts = spread(groups, len(groups))
    ends, out = end_tokens(policy, tokenizer, groups), list[PreferenceGroup]()
    in_order = sorted(prompts, key=lambda group: len(group.prompt))
    with generating(policy, tokenizer, ends, do_sample=False), make_progress(console) as bar:
        task = bar.add_task(f"answers, {whose}", total=len(prompts), unit="prompts", info="")
        for start in range(0, len(in_order), _AT_ONCE):
            for some, room in batches(policy, in_order[start : start + _AT_ONCE], TOKENS):
                found = policy.inside(partial(generate, policy, some, room))
                out += [_answered(group, ids, ends) for group, ids in zip(some, found)]
            bar.update(task, completed=len(out))
    place = {row: i for i, row in enumerate(facts_of(prompts).row.tolist())}
    return sorted(out, key=lambda group: place[group.row])


def _answered(group: PreferenceGroup, ids: list[int], ends: list[int]) -> PreferenceGroup:
    count = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
    response = Response(np.array(ids[:count], np.int64), np.ones(count, bool))
    return PreferenceGroup(group.row, group.prompt, (response,), ())
