"""What would make a config fit, and what it would cost."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from fastdpo.config.keys import FIELDS, Config
from fastdpo.data.packing import places
from fastdpo.errors import ConfigError
from fastdpo.model.support import sharing_refusal
from fastdpo.planning.microbatch import step_loads
from fastdpo.planning.prediction import Prediction, predict
from fastdpo.planning.step_time import Shape, StepTime, step_time, trains_all
from fastdpo.planning.target import Target
from fastdpo.records import PreferenceGroup

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
_LEAN = {"pure_bf16": True, "optimizer_in_backward": True, "max_grad_norm": 0.0}
# These change what is learnt, so that no run takes them by itself.
_QLORA = {"load_in_4bit": True, "lora_rank": 16}
_OF_ALL_WEIGHTS = (
    {"optim": "adamw_8bit"},
    _LEAN | {"optim": "adamw_8bit"},
    _LEAN | {"optim": "paged_adamw_8bit"},
    {"lora_rank": 16},
    _QLORA,
)
_OF_A_LORA = ({"load_in_4bit": True},)  # its states and gradients are small
_BESIDE = {"gradient_checkpointing": True}


@dataclass(frozen=True)
class Option:
    """Some keys changed, and what comes of it."""

    changes: dict
    prediction: Prediction
    time: StepTime
    same_learning: bool


@dataclass
class Planner:
    """A model, its rows and a target; `groups` as the objective sees them."""

    model_config: object
    groups: Sequence[PreferenceGroup]
    target: Target
    free: frozenset[str] | None = None  # of CHOSEN, what may be chosen; None: what is at its default
    shape: Shape = field(init=False)
    _known: dict[str, Prediction] = field(default_factory=dict, init=False)

    def __post_init__(self):
        self.shape = Shape(self.model_config)
        share = sharing_refusal(self.model_config) is None
        self.longest = max(places(group, share) for group in self.groups)

    def left_open(self, config: Config) -> frozenset[str]:
        """Those of CHOSEN that may be chosen."""
        return at_default(config) if self.free is None else self.free

    def predict(self, config: Config, exact: bool = False) -> Prediction:
        loads = step_loads(config, self.model_config, self.groups, self.target)
        rows = [(tuple(group.row for group in load.groups), load.several) for load in loads]
        key = repr((replace(config, max_tokens=1), rows, exact))  # the cap shows in the microbatches alone
        if key not in self._known:
            self._known[key] = predict(config, self.model_config, loads, self.target, exact)
        return self._known[key]

    def time(self, config: Config, changes: dict) -> StepTime:
        changed = replace(config, **changes)
        return step_time(changed, self.model_config, self.groups[:_TIMED], self.target, self.shape)

    def option(
        self, config: Config, changes: dict, same_learning: bool = True, exact: bool = False
    ) -> Option:
        prediction = self.predict(replace(config, **changes), exact)
        return Option(changes, prediction, self.time(config, changes), same_learning)

    def singles(self, config: Config) -> Iterator[Option]:
        """One change at a time, of those that leave the learning as it is."""
        lower = max(self.longest, config.max_tokens // 4)
        changes = [{"max_tokens": lower}] if lower < config.max_tokens else []
        if "head" in self.predict(config).peak.where:
            changes.append({"head_memory": _SMALL_HEAD})
        changes += [*_LEVELS[1:3], _LEVELS[4]]
        changes += [{"offload_optimizer": True}] if trains_all(config) else []
        yield from self._tried(config, changes, True)

    def offloaded(self, config: Config, budget: int) -> list[Option]:
        """The first level that fits with the optimizer's states on the host, for where none does without."""
        if config.offload_optimizer:
            return []
        changes = [level | {"offload_optimizer": True} for level in (*_LEVELS[1:3], self.least(config))]
        tried = self._tried(config, changes, True)
        return next(([option] for option in tried if option.prediction.total <= budget), [])

    def fitting(self, config: Config, budget: int) -> Option | None:
        """The quickest combination of CHOSEN keys that fits, where they are at their defaults."""
        free = self.left_open(config)
        try:
            if self.predict(replace(config, **self.least(config))).total > budget:
                return None
        except ConfigError:
            pass  # keys that do not go together; the levels say which do
        best: Option | None = None
        for level in _LEVELS:
            if not level.keys() <= free or _weaker(level, config):
                continue
            try:
                if best is not None and self.time(config, level).seconds >= best.time.seconds:
                    continue
                found = self._lowered(config, level, budget, free)
            except ConfigError:
                continue
            if found is not None and (best is None or found.time.seconds < best.time.seconds):
                best = found
        return best

    def _lowered(self, config: Config, level: dict, budget: int, free: set) -> Option | None:
        """The level with the largest max_tokens that fits, and only then a smaller head."""
        fits = lambda changes: self.predict(replace(config, **changes)).total <= budget
        small = {"head_memory": _SMALL_HEAD} if "head_memory" in free else {}
        caps = list(self._lower_caps(config)) if "max_tokens" in free else []
        least = level | small | (caps[-1] if caps else {})
        if fits(level):
            return self.option(config, level)
        if not fits(least):
            return None
        return self.option(config, next((level | cap for cap in caps if fits(level | cap)), least))

    def _lower_caps(self, config: Config) -> Iterator[dict]:
        """Halvings of max_tokens, down to the longest group."""
        cap = config.max_tokens
        while cap > self.longest:
            cap = max(self.longest, cap // 2)
            yield {"max_tokens": cap}

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
        free = self.left_open(config)
        everything = _LEVELS[-1] | {"head_memory": _SMALL_HEAD}
        if self.longest < config.max_tokens:
            everything["max_tokens"] = self.longest
        return {name: value for name, value in everything.items() if name in free}

    def other_learning(self, config: Config, budget: int) -> Iterator[Option]:
        """Changes of weights and optimizer: alone where that fits or takes a tenth off, else with recomputed
        layers, or with all that holds less, where that makes it fit."""
        now = self.predict(config).total
        all_weights = trains_all(config)
        for option in self._tried(config, _OF_ALL_WEIGHTS if all_weights else _OF_A_LORA, False):
            besides = [_BESIDE | option.changes, self.least(config) | option.changes]
            fits = lambda o: o.prediction.total <= budget
            more = [] if fits(option) else list(filter(fits, self._tried(config, besides[1:], False)))
            more = more and [*filter(fits, self._tried(config, besides[:1], False)), *more]
            if more:
                yield more[0]
            elif fits(option) or option.prediction.total < 0.9 * now:
                yield option

    def _tried(self, config: Config, changes: Sequence[dict], same_learning: bool) -> Iterator[Option]:
        for change in changes:
            try:
                if any(getattr(config, name) != value for name, value in change.items()):
                    yield self.option(config, change, same_learning)
            except ConfigError:
                continue  # keys that do not go together


def at_default(config: Config) -> frozenset[str]:
    """Those of CHOSEN that a config leaves at their defaults."""
    return frozenset(name for name in CHOSEN if getattr(config, name) == FIELDS[name].default)


def _weaker(level: dict, config: Config) -> bool:
    """Whether a level recomputes less than a config does already, as an earlier stage needed."""
    return config.gradient_checkpointing is True and level.get("gradient_checkpointing") == "selective"
