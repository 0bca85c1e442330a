"""What would make a config fit, and what it would cost."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from fastdpo.config import FIELDS, Config
from fastdpo.errors import ConfigError
from fastdpo.packing import places
from fastdpo.planning.microbatch import step_loads
from fastdpo.planning.prediction import Prediction, predict
from fastdpo.planning.step_time import Shape, StepTime, step_time
from fastdpo.planning.target import Target
from fastdpo.records import PreferenceGroup
from fastdpo.support import sharing_refusal

CHOSEN = ("max_tokens", "head_memory", "gradient_checkpointing", "activation_offloading", "tiled_mlp")
SURE = 0.05  # of a budget: how near a prediction from a few layers must not be for it to decide
_TIMED = 64  # groups that the step time is estimated over
# Ways to hold less of the forward, from quick to slow; none changes what is learnt.
_LEVELS = (
    {},
    {"gradient_checkpointing": "selective"},
    {"gradient_checkpointing": True},
    {"gradient_checkpointing": True, "tiled_mlp": True},
    {"gradient_checkpointing": True, "activation_offloading": True},
    {"gradient_checkpointing": True, "activation_offloading": True, "tiled_mlp": True},
)
_SMALL_HEAD = "64MiB"
# several microbatches a step would keep their gradients: updating in the backward wants one
_IN_BACKWARD = {"optimizer_in_backward": True, "max_grad_norm": 0.0, "batch_size": 1}
_LEAN = _IN_BACKWARD | {"pure_bf16": True, "optim": "adamw_8bit"}
# These change what is learnt, so that no run takes them by itself.
_OTHER_LEARNING = (
    _IN_BACKWARD,
    {"optim": "adamw_8bit"},
    {"pure_bf16": True},
    _LEAN,
    _LEAN | {"optim": "paged_adamw_8bit"},
    {"lora_rank": 16},
    {"lora_rank": 16, "load_in_4bit": True},
)


@dataclass(frozen=True)
class Option:
    """Some keys changed, and what comes of it."""

    changes: dict
    prediction: Prediction
    time: StepTime
    same_learning: bool
    exact: bool = False


@dataclass
class Planner:
    """A model, its rows and a target; `groups` as the objective sees them."""

    model_config: object
    groups: Sequence[PreferenceGroup]
    target: Target
    shape: Shape = field(init=False)

    def __post_init__(self):
        self.shape = Shape(self.model_config)
        share = sharing_refusal(self.model_config) is None
        self.longest = max(places(group, share) for group in self.groups)

    def predict(self, config: Config, exact: bool = False) -> Prediction:
        loads = step_loads(config, self.model_config, self.groups, self.target)
        return predict(config, self.model_config, loads, self.target, exact)

    def option(
        self, config: Config, changes: dict, same_learning: bool = True, exact: bool = False
    ) -> Option:
        changed = replace(config, **changes)
        time = step_time(changed, self.model_config, self.groups[:_TIMED], self.target, self.shape)
        return Option(changes, self.predict(changed, exact), time, same_learning, exact)

    def singles(self, config: Config) -> Iterator[Option]:
        """One change at a time, of those that leave the learning as it is."""
        lower = max(self.longest, config.max_tokens // 4)
        changes = [{"max_tokens": lower}] if lower < config.max_tokens else []
        changes += [{"head_memory": _SMALL_HEAD}, *_LEVELS[1:3]]
        changes += [_LEVELS[4], {"offload_optimizer": True}]
        yield from self._tried(config, changes, True)

    def fitting(self, config: Config, budget: int) -> Option | None:
        """The quickest combination of CHOSEN keys that fits, where they are at their defaults."""
        free = {name for name in CHOSEN if getattr(config, name) == FIELDS[name].default}
        found: list[Option] = []
        for level in _LEVELS:
            if not level.keys() <= free or (
                level == {"gradient_checkpointing": "selective"} and config.tiled_mlp
            ):
                continue
            option = self._lowered(config, level, budget, free)
            if option is not None:
                found.append(option)
                if option.changes.get("max_tokens", config.max_tokens) == config.max_tokens:
                    break  # whatever comes after only costs more
        return min(found, key=lambda option: option.time.seconds, default=None)

    def _lowered(self, config: Config, level: dict, budget: int, free: set) -> Option | None:
        """The level with the largest max_tokens that fits, and only then a smaller head."""
        fits = lambda changes: self.predict(replace(config, **changes)).total <= budget
        small = {"head_memory": _SMALL_HEAD} if "head_memory" in free else {}
        caps = list(self._lower_caps(config)) if "max_tokens" in free else []
        least = level | small | (caps[-1] if caps else {})
        try:
            if fits(level):
                return self.option(config, level)
            if not fits(least):
                return None
        except ConfigError:
            return None  # keys that do not go together
        changes = next((level | cap for cap in caps if fits(level | cap)), least)
        return self.option(config, changes)

    def _lower_caps(self, config: Config) -> Iterator[dict]:
        """Halvings of max_tokens, down to the longest group."""
        cap = config.max_tokens
        while cap > self.longest:
            cap = max(self.longest, cap // 2)
            yield {"max_tokens": cap}

    def checked(self, config: Config, found: Option, budget: int) -> Option | None:
        """The option simulated with all layers where a few leave it open; with a lower max_tokens where it
        then does not fit."""
        if found.prediction.total < (1 - SURE) * budget:
            return found
        while True:
            option = self.option(config, found.changes, found.same_learning, exact=True)
            if option.prediction.total <= budget:
                return option
            cap = option.changes.get("max_tokens", config.max_tokens)
            if cap <= self.longest or config.max_tokens != FIELDS["max_tokens"].default:
                return None
            found = replace(found, changes=found.changes | {"max_tokens": max(self.longest, cap // 2)})

    def least(self, config: Config) -> dict:
        """All that a run could choose to hold less, as far as the config leaves it open."""
        free = {name for name in CHOSEN if getattr(config, name) == FIELDS[name].default}
        everything = _LEVELS[-2] | {"head_memory": _SMALL_HEAD}
        if self.longest < config.max_tokens:
            everything["max_tokens"] = self.longest
        return {name: value for name, value in everything.items() if name in free}

    def other_learning(self, config: Config, budget: int) -> Iterator[Option]:
        """Changes of weights and optimizer: alone where that fits or takes a tenth off, and else with the
        quickest combination of CHOSEN keys that makes it fit."""
        now = self.predict(config).total
        for option in self._tried(config, _OTHER_LEARNING, False):
            fits = option.prediction.total <= budget
            more = None if fits else self.fitting(replace(config, **option.changes), budget)
            if more is not None:
                yield self.option(config, option.changes | more.changes, False)
            elif fits or option.prediction.total < 0.9 * now:
                yield option

    def _tried(self, config: Config, changes: Sequence[dict], same_learning: bool) -> Iterator[Option]:
        for change in changes:
            try:
                if any(getattr(config, name) != value for name, value in change.items()):
                    yield self.option(config, change, same_learning)
            except ConfigError:
                continue  # keys that do not go together
