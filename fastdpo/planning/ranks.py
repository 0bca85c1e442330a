"""A config on several GPUs: what each rank holds in each mode, whether that fits, and how long a step takes.

The model: one GPU's simulated step, with the microbatches that a rank is dealt. `replicate` is that. Under
`shard` and `hybrid` a rank keeps 1/n of weights, gradients and optimizer states, and on top of what the step
allocates otherwise there are, from the forward to the backward's end,

    the root's weights (embedding, last norm, lm_head) whole, and two decoder layers (one ahead);
    in the backward whole fp32 gradients: the root's, one layer's, and the buffer that the last layer's are
    reduced from; when all is done, the root's and the buffer of these.

Copies of weights in the compute dtype that the backward wants are not sharded: whatever is gathered is cast,
and autograd keeps the cast one unless layers are recomputed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastdpo.config.keys import Config
from fastdpo.distributed.world import World
from fastdpo.errors import ConfigError, ModelError
from fastdpo.planning.allocations import ADAPTERS, GRADIENTS, STATES, WEIGHTS, Peak
from fastdpo.planning.collectives import (
    GRADIENT,
    HYBRID,
    REPLICATE,
    SHARD,
    Model,
    Ranks,
    Traffic,
    seconds,
    traffic,
)
from fastdpo.planning.fake_model import trains_all, units, with_head_memory
from fastdpo.planning.prediction import Prediction, highest, peaks_of, selected
from fastdpo.planning.sampling import SCORING
from fastdpo.planning.search import SURE, Planner
from fastdpo.planning.step_time import NOMINAL
from fastdpo.planning.target import Target
from fastdpo.records import Groups
from fastdpo.training.job import check_ranks
from fastdpo.values import as_bytes

GATHERED, WHOLE = "gathered weights", "whole gradients"
NO_IMAGES = "rows with images are not known to work in shards yet"
KEPT = (WEIGHTS, ADAPTERS, GRADIENTS, STATES)  # that are sharded


@dataclass(frozen=True)
class RankPlan:
    """One mode of a config: what a rank takes, and what a step does."""

    mode: str
    prediction: Prediction
    sent: float  # bytes a rank sends in a step, and as many that it receives
    seconds: float  # of a step
    speed: float  # times one GPU's, of the same step as if it fitted


def ranks_of(gpus: int | None, nodes: int) -> Ranks | None:
    """Of --gpus and --nodes; None without them. Raises ConfigError."""
    for flag, number in (("--gpus", gpus), ("--nodes", nodes)):
        if number is not None and number < 1:
            raise ConfigError(f"{flag}: {number} is below 1")
    if gpus is None and nodes > 1:
        raise ConfigError("--nodes: how many GPUs has a node? Give --gpus too")
    return None if gpus is None else Ranks(gpus, nodes)


def refusal(config: Config, mode: str, ranks: Ranks, images: bool = False) -> str | None:
    """Why a run of this config would not start in a mode. images: rows have some."""
    if images and mode != REPLICATE:
        return NO_IMAGES
    try:
        check_ranks(config, World(size=ranks.all), sharded=mode != REPLICATE)
    except ConfigError as error:
        return str(error)
    return None


def taken(config: Config, ranks: Ranks, fits: bool | None, images: bool = False) -> tuple[str, str]:
    """(the mode that the key `shard` takes, why). fits: whether one GPU could hold a replica, or None.
    images: rows have some."""
    if ranks.all == 1 or config.shard is False:
        return REPLICATE, "one GPU" if ranks.all == 1 else "shard: false"
    if config.shard == HYBRID:
        parts = SHARD if ranks.nodes == 1 else HYBRID if ranks.gpus > 1 else REPLICATE
        return parts, "shard: hybrid"
    if config.shard is True:
        return SHARD, "shard: true"
    if not trains_all(config):
        return REPLICATE, "shard: auto, as a LoRA trains"
    if fits is None:
        return REPLICATE, "shard: auto, as no memory is known"
    why = "as one GPU could hold a replica" if fits else "as one GPU could not hold a replica"
    if images and not fits:
        return REPLICATE, f"shard: auto, though one GPU could not hold a replica: {NO_IMAGES}"
    return (REPLICATE if fits else SHARD), f"shard: auto, {why}"


def replica_fits(config: Config, model_config, groups: Groups, processor: Any = None) -> bool | str:
    """Whether one GPU of this machine could hold a replica of every stage, its whole step's microbatches
    included; or why nothing is to be made of it. True on a CPU. groups: training rows. processor: the
    model's, where rows have images."""
    target = Target.here()
    if target.is_cpu:
        return True
    if processor is not None:
        return NO_IMAGES
    if target.memory is None:
        return "no GPU's memory is known"
    budget = target.memory
    if config.memory is not None:
        budget = min(budget, as_bytes("memory", config.memory))
    planner = lambda stage: Planner(model_config, selected(stage, groups), target)
    try:
        return all(_fits(planner(stage), stage, budget) for stage in config.per_stage())
    except ModelError as error:
        return str(error)


def _fits(planner: Planner, config: Config, budget: int) -> bool:
    total = planner.predict(config).total
    if abs(total / budget - 1) < SURE:
        total = planner.predict(config, exact=True).total
    return total <= budget


def rank_plans(planner: Planner, config: Config, ranks: Ranks, budget: int | None) -> list[RankPlan]:
    """One a mode that the config allows. Simulated with all layers where a few leave it open whether it
    fits."""
    layers = planner.model_config.get_text_config().num_hidden_layers
    model = Model(layers, *units(config, planner.model_config, planner.target))
    images = planner.processor is not None
    modes = [mode for mode in ranks.modes if refusal(config, mode, ranks, images) is None]
    return [_plan_of(planner, config, model, mode, ranks, budget) for mode in modes]


def _plan_of(
    planner: Planner, config: Config, model: Model, mode: str, ranks: Ranks, budget: int | None
) -> RankPlan:
    now = rank_bytes(planner, config, model, mode, ranks)
    if budget is not None and abs(now.total / budget - 1) < SURE:
        now = rank_bytes(planner, config, model, mode, ranks, exact=True)
    took, moved = step_seconds(planner, config, model, mode, ranks)
    one = planner.rank_time(config, 1, 1).seconds
    return RankPlan(mode, now, moved.sent, took, one / took)


def step_seconds(
    planner: Planner, config: Config, model: Model, mode: str, ranks: Ranks
) -> tuple[float, Traffic]:
    """(seconds of a step, what is sent in it)."""
    card, time = planner.target.card or NOMINAL, planner.rank_time(config, ranks.all, ranks.shards(mode))
    moved = traffic(mode, ranks, model, card, time.microbatches)
    return seconds(time, moved, card), moved


def rank_bytes(
    planner: Planner, config: Config, model: Model, mode: str, ranks: Ranks, exact: bool = False
) -> Prediction:
    """The highest peak of a rank."""
    n = ranks.shards(mode)
    if n > 1 and config.head_memory is None:
        config = with_head_memory(config, planner.model_config, planner.target, model.size // n)
    loads = planner.loads(config, ranks.all)
    peaks = peaks_of(config, planner.model_config, loads, planner.target, exact)
    peaks += planner.between(config, exact, parts=n)
    return highest(sharded(peaks, model, n) if n > 1 else peaks, planner.target)


def sharded(peaks: Sequence[Peak], model: Model, n: int) -> list[Peak]:
    """One GPU's peaks as those of one of n ranks, and one more at the backward's end."""
    layer, root = model.layer, model.root
    found = []
    for peak in peaks:
        sizes = {owner: math.ceil(size / n) if owner in KEPT else size for owner, size in peak.bytes.items()}
        in_backward = peak.where.startswith("backward")
        if peak.where not in ("before the step", "optimizer step", SCORING):
            sizes[GATHERED] = root.size + min(2, model.layers) * layer.size
        if in_backward:
            sizes[WHOLE] = GRADIENT * (root.trained + 2 * layer.trained)
        found.append(Peak(peak.where, sizes))
        if peak.where == "optimizer step":
            end = sizes | {GATHERED: root.size, WHOLE: GRADIENT * 2 * root.trained}
            found.append(Peak("reduction of the last gradients", end))
    return found
