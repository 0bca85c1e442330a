"""The largest microbatches of a run: those that its peak can fall into."""

import operator
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fastdpo.config.keys import Config
from fastdpo.data.packing import places, split_step
from fastdpo.data.pairs import BY_GAP, select_pairs
from fastdpo.model.support import sharing_refusal
from fastdpo.planning.fake_model import head_policy
from fastdpo.planning.simulate import Load
from fastdpo.planning.target import Target
from fastdpo.records import Pair, PreferenceGroup, Response
from fastdpo.training.job import objective_of, total_steps
from fastdpo.training.stage import step_groups


def step_loads(config: Config, model_config, groups: Sequence[PreferenceGroup], target: Target) -> list[Load]:
    """The microbatches of a stage's first epoch that its peak can fall into: with the most places, and with
    the most scored tokens, among those that are a step alone, and among those of steps of several. Without
    those that another one of them surpasses in all; the one with the most places first. groups: the stage's
    training rows, as the objective sees them."""
    share = sharing_refusal(model_config) is None
    most_scored = head_policy(config, model_config, target).max_scored
    found: dict[tuple, tuple] = {}
    steps = min(total_steps(config, len(groups)), -(-len(groups) // config.batch_size))
    for step in step_groups(groups, config, steps):
        parts = split_step(step, config.max_tokens, most_scored, share)
        several = len(parts) > 1
        for part in parts:
            size = sum(places(group, share) for group in part), sum(group.scored_tokens for group in part)
            for order in (size, size[::-1]):
                key = order is size, several
                if key not in found or order > found[key][0]:
                    found[key] = order, (*size, several), Load(tuple(part), several)
    kept: list[tuple] = []
    for _, size, load in sorted(found.values(), key=lambda entry: entry[1], reverse=True):
        if not any(all(map(operator.ge, other, size)) for other, _ in kept):
            kept.append((size, load))
    return [load for _, load in kept]


def selected(config: Config, groups: Sequence[PreferenceGroup]) -> list[PreferenceGroup]:
    """A stage's training rows as its objective sees them. Where pairs go by the reference's log-probs, which
    nobody knows yet, with all their responses."""
    if config.pairs not in BY_GAP or config.pair_gap != "logp":
        groups, _ = select_pairs(groups, config.pairs)
    objective = objective_of(config)
    return [objective.select(group) for group in groups]


def assumed_groups(config: Config) -> list[PreferenceGroup]:
    """Where no data can be read: pairs whose rows are max_length, half of them the prompt; enough for two
    steps."""
    half = max(1, config.max_length // 2)
    ids = np.zeros(max(1, config.max_length - half), np.int64)
    response = Response(ids, np.ones(len(ids), bool))
    pair = PreferenceGroup(0, np.zeros(half, np.int64), (response, response), (Pair(0, 1),))
    return [replace(pair, row=row) for row in range(2 * config.batch_size)]
