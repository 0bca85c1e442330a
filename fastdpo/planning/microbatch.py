"""The largest microbatches of a run: those that its peak can fall into."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fastdpo.config import Config
from fastdpo.objectives import make_objective
from fastdpo.packing import places, split_step
from fastdpo.planning.fake_model import head_policy
from fastdpo.planning.simulate import Load
from fastdpo.planning.target import Target
from fastdpo.records import Pair, PreferenceGroup, Response
from fastdpo.stage import step_groups, total_steps
from fastdpo.support import sharing_refusal


def step_loads(config: Config, model_config, groups: Sequence[PreferenceGroup], target: Target) -> list[Load]:
    """The microbatch of a stage's first epoch with the most places, and the one with the most scored tokens
    where that is another. groups: the stage's training rows, as the objective sees them."""
    share = sharing_refusal(model_config) is None
    most_scored = head_policy(config, model_config, target).max_scored
    found: dict[str, tuple[int, Load]] = {}
    sizes = {
        "places": lambda part: sum(places(group, share) for group in part),
        "scored": lambda part: sum(group.scored_tokens for group in part),
    }
    steps = min(total_steps(config, len(groups)), -(-len(groups) // config.batch_size))
    for step in step_groups(groups, config, steps):
        parts = split_step(step, config.max_tokens, most_scored, share)
        for part in parts:
            for name, size in sizes.items():
                key = (size(part), len(parts) > 1)
                if name not in found or key > found[name][0]:
                    found[name] = key, Load(tuple(part), len(parts) > 1)
    loads = [load for _, load in found.values()]
    same = loads[0].groups == loads[-1].groups and loads[0].several == loads[-1].several
    return loads[:1] if same else loads


def selected(config: Config, groups: Sequence[PreferenceGroup]) -> list[PreferenceGroup]:
    """A stage's training rows as its objective sees them."""
    objective = make_objective(config)
    return [objective.select(group) for group in groups]


def assumed_groups(config: Config) -> list[PreferenceGroup]:
    """Where no data can be read: pairs whose rows are max_length, half of them the prompt; enough for two
    steps."""
    half = max(1, config.max_length // 2)
    ids = np.zeros(max(1, config.max_length - half), np.int64)
    response = Response(ids, np.ones(len(ids), bool))
    pair = PreferenceGroup(0, np.zeros(half, np.int64), (response, response), (Pair(0, 1),))
    return [replace(pair, row=row) for row in range(2 * config.batch_size)]
