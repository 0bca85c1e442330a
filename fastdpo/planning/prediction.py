"""What a config is predicted to take: the peak by owner, and all of the card."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastdpo.config.keys import Config
from fastdpo.planning.allocations import ADAPTERS, GRADIENTS, OWNERS, STATES, WEIGHTS, Peak
from fastdpo.planning.fake_model import with_layers
from fastdpo.planning.simulate import Load, simulate
from fastdpo.planning.target import SLACK, Target

_STAYING = (WEIGHTS, ADAPTERS, GRADIENTS, STATES)


@dataclass(frozen=True)
class Prediction:
    """The highest peak of a step's places, and what comes on top of it."""

    peak: Peak
    slack: int  # held by the allocator and not usable
    context: int  # CUDA's own

    @property
    def allocated(self) -> int:
        """What torch.cuda.max_memory_allocated would say."""
        return self.peak.total

    @property
    def total(self) -> int:
        """What the run takes of the card."""
        return self.peak.total + self.slack + self.context


def predict(
    config: Config, model_config, loads: Sequence[Load], target: Target, exact: bool = True
) -> Prediction:
    """The prediction for the largest of these microbatches. exact=False simulates a few layers only and goes
    on from there to all of them in a straight line, owner by owner: a second instead of many."""
    peaks = [
        peak
        for load in loads
        for peak in (simulate if exact else _from_few_layers)(config, model_config, load, target)
    ]
    top = max(peaks, key=lambda peak: peak.total)
    moving = top.total - sum(top.bytes[owner] for owner in _STAYING)
    return Prediction(top, 0 if target.is_cpu else math.ceil(SLACK * moving), target.context)


def _from_few_layers(config: Config, model_config, load: Load, target: Target) -> list[Peak]:
    few = 4 if config.activation_offloading else 2  # offloading has a few tensors on their way
    level = config.gradient_checkpointing
    step = level if isinstance(level, int) and not isinstance(level, bool) else 1
    n, layers = few * step, model_config.get_text_config().num_hidden_layers
    if n + step >= layers:
        return simulate(config, model_config, load, target)
    less, more = (
        {
            _place(peak.where, count): peak
            for peak in simulate(config, with_layers(model_config, count), load, target)
        }
        for count in (n, n + step)
    )
    out = []
    for place in less.keys() & more.keys():
        if place is not None:
            out.append(Peak(place.format(layers), _line(less[place], more[place], (layers - n) / step)))
    return out


def _place(where: str, layers: int) -> str | None:
    """A place of a step of so many layers as one of any step: of the first or last layer, or of none."""
    head, of_layer, number = where.partition("of layer ")
    if not of_layer or number == "1":
        return where
    return f"{head}of layer {{}}" if int(number) == layers else None


def _line(less: Peak, more: Peak, times: float) -> dict[str, int]:
    slope = {owner: more.bytes[owner] - less.bytes[owner] for owner in OWNERS}
    return {owner: max(0, round(less.bytes[owner] + times * slope[owner])) for owner in OWNERS}
