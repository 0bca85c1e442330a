"""What a config is predicted to take: the microbatches that its peak can fall into, the peak by owner, and
all of the card."""

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice, starmap
from typing import Any, NamedTuple

import numpy as np

from fastdpo.config.keys import Config
from fastdpo.config.rounds import sample_spec
from fastdpo.data.dealing import deal_sizes
from fastdpo.data.packing import Size, epoch_steps, sizes_of
from fastdpo.data.pairs import BY_GAP, select_pairs
from fastdpo.data.store.facts import Facts
from fastdpo.data.store.stored import facts_of
from fastdpo.planning.allocations import ADAPTERS, GRADIENTS, OWNERS, REWARD, STATES, WEIGHTS, Peak
from fastdpo.planning.fake_model import FakePolicy, head_policy, with_head_memory, with_layers
from fastdpo.planning.rounds import in_a_step, stand_ins
from fastdpo.planning.simulate import Load, Step, simulate
from fastdpo.planning.target import CONTEXT, SLACK, Target
from fastdpo.records import Groups, Pair, PreferenceGroup, Response
from fastdpo.training.job import objective_of, total_steps


def selected(config: Config, groups: Groups) -> Groups:
    """A stage's training rows as its objective sees them. Where pairs go by the reference's log-probs, which
    nobody knows yet, with all their responses. With rounds, groups like the largest that samples make of
    them."""
    if config.rounds is not None:
        groups = stand_ins(config, groups)
    if config.pairs not in BY_GAP or config.pair_gap != "logp":
        groups, _ = select_pairs(groups, config.pairs)
    return objective_of(config).select(groups)


def assumed_groups(config: Config) -> Groups:
    """Where no data can be read: pairs whose rows are max_length, half of them the prompt (with rounds, all
    but what is sampled); enough for two steps."""
    half = max(1, config.max_length // 2)
    if config.rounds is not None:
        half = config.max_length - sample_spec(config.sample).max_new_tokens
    ids = np.zeros(max(1, config.max_length - half), np.int64)
    response = Response(ids, np.ones(len(ids), bool))
    pair = PreferenceGroup(0, np.zeros(half, np.int64), (response, response), (Pair(0, 1),))
    return [replace(pair, row=row) for row in range(2 * config.batch_size)]


def step_loads(
    config: Config, model_config, groups: Groups, target: Target, processor: Any = None
) -> list[Load]:
    """The microbatches of a stage's first epoch that its peak can fall into: with the most places, with the
    most scored tokens, with the most of images, and with the most of both places and images, among those that
    are a step alone, and among those of steps of several. Without those that another one of them surpasses in
    all; the one with the most places first. groups: as `selected` gives them. processor: the model's, where
    rows have images."""
    policy, facts = head_policy(config, model_config, target, processor=processor), facts_of(groups)
    return largest_loads(config, groups, facts, policy)


def largest_loads(
    config: Config, groups: Groups, facts: Facts, policy: FakePolicy, ranks: int = 1
) -> list[Load]:
    """step_loads by the facts of all groups and what the head of a policy tells; only groups of these
    microbatches are read, and their images packed. ranks: that the groups of a step are dealt to, a
    microbatch each at a time. With rounds the steps are those of `stand_ins`."""
    sizes, share, most_scored = sizes_of(facts), policy.share, policy.max_scored
    images = facts.image_tokens if share else facts.image_tokens * facts.responses
    found: list[_Cut] = []
    for places in _steps(config, len(groups)):
        of_step = list(starmap(Size, sizes[places].tolist()))
        rounds = deal_sizes(of_step, ranks, config.max_tokens, most_scored, share)
        for part in filter(None, chain(*rounds)):
            tokens, scored = sum(of_step[i].places(share) for i in part), sum(of_step[i].scored for i in part)
            of_images = int(images[places[part]].sum())
            found.append(_Cut(tokens, scored, of_images, len(rounds) > 1, places[part]))
    kept: list[_Cut] = []
    encoded = (lambda cut: _encoded(cut, groups, facts)) if share else (lambda cut: cut.images)
    for one in sorted(_largest(found, encoded), key=operator.itemgetter(0, 1, 2, 3), reverse=True):
        if not any(all(map(operator.ge, other[:4], one[:4])) for other in kept):
            kept.append(one)
    seen = bool(facts.images.any())
    return [_load(tuple(groups[i] for i in cut.groups), cut.several, seen, policy) for cut in kept]


def _steps(config: Config, groups: int) -> Iterator[np.ndarray]:
    """The places of each step's groups, of a first epoch at most."""
    if config.rounds is not None:
        size = in_a_step(config, groups)
        return (np.arange(start, start + size) for start in range(0, groups, size))
    steps = min(total_steps(config, groups), -(-groups // config.batch_size))
    return islice(epoch_steps(groups, config.batch_size, config.seed), steps)


class _Cut(NamedTuple):
    """A microbatch by what is counted of it."""

    tokens: int
    scored: int
    images: int  # tokens that stand for them
    several: bool
    groups: np.ndarray


def _largest(cuts: Sequence[_Cut], encoded: Callable[[_Cut], int]) -> Iterator[_Cut]:
    """encoded: a microbatch's image tokens, of an image that several of its prompts have once."""
    tokens, images = max(cut.tokens for cut in cuts), max(cut.images for cut in cuts)
    orders: list[Callable[[_Cut], Any]] = [operator.itemgetter(0, 1), operator.itemgetter(1, 0)]
    if images:
        orders.append(lambda cut: cut.tokens / tokens + cut.images / images)
    for several in (False, True):
        if not (some := [cut for cut in cuts if cut.several is several]):
            continue
        largest = [max(some, key=order) for order in orders]
        if images:
            largest = [cut._replace(images=encoded(cut)) for cut in [*largest, _most_encoded(some, encoded)]]
        yield from largest


def _most_encoded(cuts: Sequence[_Cut], encoded: Callable[[_Cut], int]) -> _Cut:
    """Of a few alone it is asked, where all their images differ."""
    in_order = sorted(cuts, key=operator.itemgetter(2, 0), reverse=True)
    most, best = -1, in_order[0]
    for cut in in_order:
        if cut.images <= most:
            break
        if (size := encoded(cut)) > most:
            most, best = size, cut
    return best


def _encoded(cut: _Cut, groups: Groups, facts: Facts) -> int:
    with_images = cut.groups[facts.images[cut.groups] > 0]
    return sum({image.key: image.tokens for i in with_images for image in groups[i].images}.values())


def _load(groups: tuple[PreferenceGroup, ...], several: bool, images: bool, policy: FakePolicy) -> Load:
    """With its images read: each step that is simulated would read them again."""
    as_it_is = any(group.images for group in groups) or not policy.share
    return Load(groups, several, policy.pack(groups) if as_it_is else None, images)


@dataclass(frozen=True)
class Prediction:
    """The highest peak of a step's places, and what comes on top of it."""

    peak: Peak
    slack: int  # held by the allocator and not usable
    context: int  # CUDA's own
    phases: dict[str, int] = field(default_factory=dict)  # the highest peak of each, the rest on top of it

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
    config: Config,
    model_config,
    loads: Sequence[Load],
    target: Target,
    exact: bool = True,
    run: Callable[[Step], list[Peak]] = Step.run,
) -> list[Peak]:
    """The peaks of each of these microbatches, place by place; run: see simulate."""
    if config.head_memory is None:
        config = with_head_memory(config, model_config, target)
    of_load = simulate if exact else _from_few_layers
    return [peak for load in loads for peak in of_load(config, model_config, load, target, run)]


def highest(peaks: Sequence[Peak], target: Target) -> Prediction:
    """The highest of these peaks, and what comes on top of it."""
    alone = [_with_slack(peak, target) for peak in peaks]
    phases: dict[str, int] = {}
    for one in alone:
        phase = one.peak.where.partition(" ")[0]
        phases[phase] = max(one.total, phases.get(phase, 0))
    return replace(alone[max(range(len(peaks)), key=lambda i: peaks[i].total)], phases=phases)


def _with_slack(peak: Peak, target: Target) -> Prediction:
    if target.is_cpu:
        return Prediction(peak, 0, 0)
    staying = sum(peak.bytes[owner] for owner in (WEIGHTS, ADAPTERS, GRADIENTS, STATES, REWARD))
    return Prediction(peak, math.ceil(SLACK * (peak.total - staying)), CONTEXT)


def _from_few_layers(
    config: Config, model_config, load: Load, target: Target, run: Callable[[Step], list[Peak]]
) -> list[Peak]:
    few = 4 if config.activation_offloading else 2  # offloading has a few tensors on their way
    level = config.gradient_checkpointing
    step = level if isinstance(level, int) and not isinstance(level, bool) else 1
    n, layers = few * step, model_config.get_text_config().num_hidden_layers
    if n + step >= layers:
        return simulate(config, model_config, load, target, run)

    def by_place(count: int) -> dict[str | None, dict[str, int]]:
        peaks = simulate(config, with_layers(model_config, count), load, target, run)
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
