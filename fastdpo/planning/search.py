"""What would make a config fit, and what it would cost."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from transformers.configuration_utils import PreTrainedConfig

from fastdpo.config.keys import FIELDS, Config
from fastdpo.data.packing import places_of, sizes_of
from fastdpo.data.store.stored import facts_of
from fastdpo.errors import ConfigError, ModelError
from fastdpo.planning.allocations import Peak
from fastdpo.planning.fake_model import head_policy, trains_all
from fastdpo.planning.prediction import Prediction, highest, largest_loads, peaks_of
from fastdpo.planning.sampling import beside, peaks_between, without_training
from fastdpo.planning.simulate import Load
from fastdpo.planning.step_time import Shape, StepTime, step_time
from fastdpo.planning.target import Target
from fastdpo.records import Groups

CHOSEN = ("max_tokens", "head_memory", "gradient_checkpointing", "activation_offloading", "tiled_mlp")
SURE = 0.05  # of a budget: how near a prediction from a few layers must not be for it to decide
_TIMED = 64  # groups that the step time is estimated over
# Ways to hold less of the forward, from quick to slow; none changes what is learnt.
_RECOMPUTED: dict[str, Any] = {"gradient_checkpointing": True}
_LEVELS: tuple[dict[str, Any], ...] = (
    {},
    {"gradient_checkpointing": "selective"},
    _RECOMPUTED,
    _RECOMPUTED | {"tiled_mlp": True},
    _RECOMPUTED | {"activation_offloading": True},
    _RECOMPUTED | {"activation_offloading": True, "tiled_mlp": True},
)
_SMALL_HEAD = {"head_memory": "64MiB"}
_ON_HOST = {"offload_optimizer": True}
# These change what is learnt, so that no run takes them by itself.
_LEAN = {"pure_bf16": True, "optimizer_in_backward": True, "max_grad_norm": 0.0}
_OF_ALL_WEIGHTS = (
    {"optim": "adamw_8bit"},
    _LEAN | {"optim": "adamw_8bit"},
    _LEAN | {"optim": "paged_adamw_8bit"},
    {"lora_rank": 16},
    {"load_in_4bit": True, "lora_rank": 16},
)
_OF_A_LORA = ({"load_in_4bit": True},)  # its states and gradients are small


@dataclass(frozen=True)
class Option:
    """Some keys changed, and what comes of it."""

    changes: dict
    prediction: Prediction
    time: StepTime

    @property
    def same_learning(self) -> bool:
        return self.changes.keys() <= {*CHOSEN, *_ON_HOST}


@dataclass
class Planner:
    """A model, its rows and a target; `groups` as the objective sees them."""

    model_config: PreTrainedConfig
    groups: Groups
    target: Target
    free: frozenset[str] | None = None  # of CHOSEN, what may be chosen; None: what is at its default
    processor: Any = None  # the model's, where it sees images
    _known: dict[str, Prediction] = field(default_factory=dict, init=False)
    _between: dict[str, list[Peak]] = field(default_factory=dict, init=False)
    _loads: dict[tuple, list[Load]] = field(default_factory=dict, init=False)  # by what cuts a step

    def __post_init__(self):
        # one layer is simulated for all of them
        if getattr(self.model_config.get_text_config(), "is_heterogeneous", False):
            raise ModelError(
                f"plan: the layers of {self.model_config.model_type} are not all alike, and what such layers "
                "take is not predicted; leave memory out, and lower max_tokens where a run does not fit"
            )
        self.facts = facts = facts_of(self.groups)
        self.processor = self.processor if facts.images.any() else None
        self.shape = Shape(self.model_config, self.processor)
        self.timed = facts.taken(np.arange(len(facts))[:_TIMED])
        self.longest = int(places_of(sizes_of(facts), self.shape.share).max())

    def left_open(self, config: Config) -> frozenset[str]:
        """Those of CHOSEN that may be chosen."""
        return at_default(config) if self.free is None else self.free

    def loads(self, config: Config, ranks: int = 1) -> list[Load]:
        """See step_loads; of a rank, where the groups of a step are dealt to several."""
        policy = head_policy(config, self.model_config, self.target, processor=self.processor)
        if (cut := (config.batch_size, config.max_tokens, policy.max_scored, ranks)) not in self._loads:
            self._loads[cut] = largest_loads(config, self.groups, self.facts, policy, ranks)
        return self._loads[cut]

    def predict(self, config: Config, exact: bool = False) -> Prediction:
        loads = self.loads(config)
        rows = [(tuple(group.row for group in load.groups), load.several) for load in loads]
        key = repr((replace(config, max_tokens=1), rows, exact))  # the cap shows in the microbatches alone
        if key not in self._known:
            peaks = peaks_of(config, self.model_config, loads, self.target, exact)
            peaks = beside(peaks, self.between(config, exact), self.target)
            self._known[key] = highest(peaks, self.target)
        return self._known[key]

    def between(self, config: Config, exact: bool = False, parts: int = 1) -> list[Peak]:
        """See peaks_between; nothing without rounds."""
        if config.rounds is None:
            return []
        key = repr((without_training(config), exact, parts))
        if key not in self._between:
            given = int(self.facts.prompt.max()), self.processor is not None, self.target, exact, parts
            self._between[key] = peaks_between(config, self.model_config, *given)
        return self._between[key]

    def fits(self, config: Config, changes: dict, budget: int) -> bool:
        return self.predict(replace(config, **changes)).total <= budget

    def time(self, config: Config) -> StepTime:
        return step_time(config, self.model_config, self.timed, self.target, self.shape)

    def rank_time(self, config: Config, ranks: int, shards: int) -> StepTime:
        """See step_time; over whole steps, however many groups these have."""
        facts, step = self.facts, config.batch_size
        few = facts.taken(np.arange(min(len(facts), max(step, _TIMED // step * step))))
        return step_time(config, self.model_config, few, self.target, self.shape, ranks, shards)

    def option(self, config: Config, changes: dict, exact: bool = False) -> Option:
        changed = replace(config, **changes)
        return Option(changes, self.predict(changed, exact), self.time(changed))

    def _tried(self, config: Config, changes: Sequence[dict]) -> Iterator[Option]:
        for change in changes:
            with suppress(ConfigError):  # keys that do not go together
                if any(getattr(config, name) != value for name, value in change.items()):
                    yield self.option(config, change)

    def singles(self, config: Config) -> Iterator[Option]:
        """One change at a time, of those that leave the learning as it is."""
        lower = max(self.longest, config.max_tokens // 4)
        changes: list[dict] = [{"max_tokens": lower}] if lower < config.max_tokens else []
        changes += [_SMALL_HEAD] if "head" in self.predict(config).peak.where else []
        changes += [*_LEVELS[1:3], _LEVELS[4]]
        changes += [_ON_HOST] if trains_all(config) else []
        yield from self._tried(config, changes)

    def offloaded(self, config: Config, budget: int) -> list[Option]:
        """The first level that fits with the optimizer's states on the host, for where none does without."""
        if config.offload_optimizer:
            return []
        levels = [level | _ON_HOST for level in (*_LEVELS[1:3], self.least(config))]
        tried = self._tried(config, levels)
        return next(([option] for option in tried if option.prediction.total <= budget), [])

    def fitting(self, config: Config, budget: int) -> Option | None:
        """The quickest combination of CHOSEN keys that fits, where they are at their defaults."""
        with suppress(ConfigError):  # keys that do not go together; the levels say which do
            if not self.fits(config, self.least(config), budget):
                return None
        best: Option | None = None
        for level in _LEVELS:
            # a config may recompute whole layers already, as an earlier stage needed
            weaker = config.gradient_checkpointing is True and level == _LEVELS[1]
            if weaker or not level.keys() <= self.left_open(config):
                continue
            with suppress(ConfigError):
                if best is None or self.time(replace(config, **level)).seconds < best.time.seconds:
                    found = self._lowered(config, level, budget)
                    if found is not None and (best is None or found.time.seconds < best.time.seconds):
                        best = found
        return best

    def _lowered(self, config: Config, level: dict, budget: int) -> Option | None:
        """The level with the largest max_tokens that fits, by halvings down to the longest group, and only
        then a smaller head."""
        free, caps, cap = self.left_open(config), [], config.max_tokens
        while "max_tokens" in free and cap > self.longest:
            cap = max(self.longest, cap // 2)
            caps.append({"max_tokens": cap})
        least = level | (_SMALL_HEAD if "head_memory" in free else {}) | (caps[-1] if caps else {})
        if self.fits(config, level, budget):
            return self.option(config, level)
        if not self.fits(config, least, budget):
            return None
        lowered = (level | cap for cap in caps if self.fits(config, level | cap, budget))
        return self.option(config, next(lowered, least))

    def checked(self, config: Config, found: Option, budget: int) -> Option | None:
        """The option simulated with all layers where a few leave it open; where it then does not fit, one
        that leaves more room."""
        if found.prediction.total < (1 - SURE) * budget:
            return found
        option = self.option(config, found.changes, exact=True)
        if option.prediction.total <= budget:
            return option
        return self.fitting(config, int((1 - SURE) * budget))

    def least(self, config: Config) -> dict:
        """All that a run could choose to hold less, as far as the config leaves it open."""
        everything = _LEVELS[-1] | _SMALL_HEAD
        if self.longest < config.max_tokens:
            everything["max_tokens"] = self.longest
        return {name: value for name, value in everything.items() if name in self.left_open(config)}

    def other_learning(self, config: Config, budget: int) -> Iterator[Option]:
        """Changes of weights and optimizer: alone where that fits or takes a tenth off, else with recomputed
        layers, or with all that holds less, where that makes it fit."""
        now = self.predict(config).total
        fits = lambda option: option.prediction.total <= budget
        for option in self._tried(config, _OF_ALL_WEIGHTS if trains_all(config) else _OF_A_LORA):
            lower, lowest = _RECOMPUTED | option.changes, self.least(config) | option.changes
            if not fits(option) and any(map(fits, self._tried(config, [lowest]))):
                yield next(filter(fits, self._tried(config, [lower, lowest])))
            elif fits(option) or option.prediction.total < 0.9 * now:
                yield option


def at_default(config: Config) -> frozenset[str]:
    """Those of CHOSEN that a config leaves at their defaults."""
    return frozenset(name for name in CHOSEN if getattr(config, name) == FIELDS[name].default)
