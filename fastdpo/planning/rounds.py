"""What trains in a round, before anything is sampled: groups like the largest that samples could make."""

from dataclasses import replace

import numpy as np

from fastdpo.config.keys import Config
from fastdpo.config.rounds import SampleSpec, sample_spec
from fastdpo.data.store.facts import Facts
from fastdpo.data.store.stored import facts_of
from fastdpo.errors import DataError
from fastdpo.records import Groups, Pair, PreferenceGroup, Response


def stand_ins(config: Config, groups: Groups) -> list[PreferenceGroup]:
    """Groups of the data's prompts with sample.responses responses of max_new_tokens tokens each, all of them
    scored; the responses' scores differ, so that all make pairs. With resets, prompts go on with as much of
    their longest chosen response as leaves room.

    A few steps of them, one after the other, of `in_a_step` groups each: the longest prompts, prompts of all
    lengths (of which microbatches can be filled best), the shortest (with the most scored tokens), and where
    rows have images those with the most of them. Only groups with images are read. Raises DataError where no
    prompt leaves room for a sample.
    """
    spec, facts = sample_spec(config.sample), facts_of(groups)
    room = config.max_length - spec.max_new_tokens
    fitting = np.flatnonzero(facts.prompt <= room)
    if not len(fitting):
        raise DataError(
            f"sample: max_new_tokens: {spec.max_new_tokens} has no room behind any of {len(facts)} prompts "
            f"within max_length: {config.max_length}; raise that, or sample fewer"
        )
    lengths = facts.prompt.astype(np.int64)
    if spec.resets:
        lengths = np.minimum(lengths + _forced(facts), room)
    order = fitting[np.argsort(-lengths[fitting], kind="stable")]
    size = in_a_step(config, len(order))
    steps = [order[:size]]
    if size < len(order):
        steps += [order[np.linspace(0, len(order) - 1, size).astype(np.int64)], order[-size:]]
        if facts.images.any():
            steps.append(order[np.argsort(-facts.image_tokens[order], kind="stable")[:size]])
    return [_stand_in(groups, facts, int(i), int(lengths[i]), spec) for step in steps for i in step]


def in_a_step(config: Config, prompts: int) -> int:
    """Groups of a round's step, of so many prompts."""
    return min(config.batch_size, sample_spec(config.sample).prompts, prompts)


def _forced(facts: Facts) -> np.ndarray:
    """The most tokens of a chosen response that a reset puts behind its prompt, i64[G]: all but one."""
    most = np.zeros(len(facts), np.int64)
    np.maximum.at(most, facts.group_of[facts.chosen], facts.length[facts.chosen] - 1)
    return most


def _stand_in(groups: Groups, facts: Facts, place: int, length: int, spec: SampleSpec) -> PreferenceGroup:
    """Of a prompt of this length. Ids are zeros, but of a prompt with images."""
    N, row = spec.responses, int(facts.row[place])
    ids, scored = np.zeros(spec.max_new_tokens, np.int64), np.ones(spec.max_new_tokens, bool)
    responses = tuple(Response(ids, scored, score=float(N - i)) for i in range(N))
    pairs = tuple(Pair(i, j) for i in range(N) for j in range(i + 1, N))
    prompt = PreferenceGroup(row, np.zeros(length, np.int64), responses, pairs)
    if not facts.images[place]:
        return prompt
    own = groups[place]
    last = own.prompt[-1:] if not own.chosen else own.responses[own.chosen[0]].ids[:1]  # of no image
    more = last.repeat(length - len(own.prompt))
    return replace(prompt, prompt=np.concatenate([own.prompt, more]), images=own.images)
