"""What a config is predicted to take: the microbatches that its peak can fall into, the peak by owner, and
all of the card."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, starmap

import numpy as np

from fastdpo.config.keys import Config
from fastdpo.data.dealing import deal_sizes
from fastdpo.data.packing import Size, epoch_steps, sizes_of
from fastdpo.data.pairs import BY_GAP, select_pairs
from fastdpo.data.store.stored import facts_of
from fastdpo.model.support import sharing_refusal
from fastdpo.planning.allocations import ADAPTERS, GRADIENTS, OWNERS, STATES, WEIGHTS, Peak
from fastdpo.planning.fake_model import head_policy, with_head_memory, with_layers
from fastdpo.planning.simulate import Load, simulate
from fastdpo.planning.target import CONTEXT, SLACK, Target
from fastdpo.records import Groups, Pair, PreferenceGroup, Response
from fastdpo.training.job import objective_of, total_steps


def selected(config: Config, groups: Groups) -> Groups:
    """A stage's training rows as its objective sees them. Where pairs go by the reference's log-probs, which
    nobody knows yet, with all their responses."""
    if config.pairs not in BY_GAP or config.pair_gap != "logp":
        groups, _ = select_pairs(groups, config.pairs)
    return objective_of(config).select(groups)


def assumed_groups(config: Config) -> Groups:
    """Where no data can be read: pairs whose rows are max_length, half of them the prompt; enough for two
    steps."""
    half = max(1, config.max_length // 2)
    ids = np.zeros(max(1, config.max_length - half), np.int64)
    response = Response(ids, np.ones(len(ids), bool))
    pair = PreferenceGroup(0, np.zeros(half, np.int64), (response, response), (Pair(0, 1),))
    return [replace(pair, row=row) for row in range(2 * config.batch_size)]


def step_loads(config: Config, model_config, groups: Groups, target: Target) -> list[Load]:
    """The microbatches of a stage's first epoch that its peak can fall into: with the most places, and with
    the most scored tokens, among those that are a step alone, and among those of steps of several. Without
    those that another one of them surpasses in all; the one with the most places first. groups: as
    `selected` gives them."""
    most_scored = head_policy(config, model_config, target).max_scored
    share = sharing_refusal(model_config) is None
    return largest_loads(config, groups, sizes_of(facts_of(groups)), most_scored, share)


def largest_loads(
    config: Config, groups: Groups, sizes: np.ndarray, most_scored: int | None, share: bool, ranks: int = 1
) -> list[Load]:
    """step_loads by the sizes of all groups; only groups of these microbatches are read. ranks: that the
    groups of a step are dealt to, a microbatch each at a time."""
    steps = min(total_steps(config, len(groups)), -(-len(groups) // config.batch_size))
    found: list[tuple[int, int, bool, np.ndarray]] = []  # (places, scored tokens, several, groups)
    for places in islice(epoch_steps(len(groups), config.batch_size, config.seed), steps):
        of_step = list(starmap(Size, sizes[places].tolist()))
        rounds = deal_sizes(of_step, ranks, config.max_tokens, most_scored, share)
        for part in filter(None, chain(*rounds)):
            tokens, scored = sum(of_step[i].places(share) for i in part), sum(of_step[i].scored for i in part)
            found.append((tokens, scored, len(rounds) > 1, places[part]))
    largest = []
    for several in (False, True):
        some = [one for one in found if one[2] is several]
        largest += [max(some, key=operator.itemgetter(*order)) for order in ((0, 1), (1, 0)) if some]
    kept: list[tuple] = []
    for one in sorted(largest, key=operator.itemgetter(0, 1, 2), reverse=True):
        if not any(all(map(operator.ge, other[:3], one[:3])) for other in kept):
            kept.append(one)
    return [Load(tuple(groups[i] for i in part), several) for *_, several, part in kept]


@dataclass(frozen=True)
class Prediction:
    """The highest peak of a step's places, and what comes on top of it."""

    peak: Peak
    slack: int  # held by the allocator and not usable
    context: int  # CUDA's own

    @property
    def total(self) -> int:
        """What the run takes of the card."""
        return self.peak.total + self.slack + self.context


def predict(
    config: Config, model_config, loads: Sequence[Load], target: Target, exact: bool = True
) -> Prediction:
    """The prediction for the largest of these microbatches. exact=False simulates a few layers only and goes
    on from there to all of them in a straight line, owner by owner: a second instead of many."""
    return highest(peaks_of(config, model_config, loads, target, exact), target)


def peaks_of(
    config: Config, model_config, loads: Sequence[Load], target: Target, exact: bool = True
) -> list[Peak]:
    """The peaks of each of these microbatches, place by place."""
    if config.head_memory is None:
        config = with_head_memory(config, model_config, target)
    of_load = simulate if exact else _from_few_layers
    return [peak for load in loads for peak in of_load(config, model_config, load, target)]


def highest(peaks: Sequence[Peak], target: Target) -> Prediction:
    """The highest of these peaks, and what comes on top of it."""
    top = max(peaks, key=lambda peak: peak.total)
    if target.is_cpu:
        return Prediction(top, 0, 0)
    staying = sum(top.bytes[owner] for owner in (WEIGHTS, ADAPTERS, GRADIENTS, STATES))
    return Prediction(top, math.ceil(SLACK * (top.total - staying)), CONTEXT)


def _from_few_layers(config: Config, model_config, load: Load, target: Target) -> list[Peak]:
    few = 4 if config.activation_offloading else 2  # offloading has a few tensors on their way
    level = config.gradient_checkpointing
    step = level if isinstance(level, int) and not isinstance(level, bool) else 1
    n, layers = few * step, model_config.get_text_config().num_hidden_layers
    if n + step >= layers:
        return simulate(config, model_config, load, target)

    def by_place(count: int) -> dict[str | None, dict[str, int]]:
        peaks = simulate(config, with_layers(model_config, count), load, target)
        return {_place(peak.where, count): peak.bytes for peak in peaks}

    less, more = by_place(n), by_place(n + step)
    times = (layers - n) / step
    line = lambda a, b: max(0, round(a + times * (b - a)))
    return [
        Peak(place.format(layers), {owner: line(less[place][owner], more[place][owner]) for owner in OWNERS})
        for place in less
        if place is not None and place in more
    ]


def _place(where: str, layers: int) -> str | None:
    """A place of a step of so many layers as one of any step: of the first or last layer, or of none."""
    head, of_layer, number = where.partition("of layer ")
    if not of_layer or number == "1":
        return where
    return f"{head}of layer {{}}" if int(number) == layers else None
