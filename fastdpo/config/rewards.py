"""What keys of a config a reward model refuses."""

from collections.abc import Iterator
from typing import Any

from fastdpo.errors import ConfigError

OBJECTIVE = "bradley_terry"  # in a config: what `fastdpo reward` trains
_REFUSED = {  # what they would need
    "objective_args": "it has no options",
    "beta": "it has none",
    "label_smoothing": "it has none",
    "rounds": "a reward model does not write",
    "sample": "a reward model does not write",
    "reward": "it is what is trained",
    "reference": "there is none",
    "stages": "run one after the other, each from the model of the one before",
    "router_aux_loss_coef": "its balance loss is that of a causal LM",
    "adapter": "merge it into its base first (`fastdpo merge`)",
    "load_in_4bit": "its weights are not known to train in 4 bits yet",
    "memory": "what it chooses is for causal LMs; lower max_tokens, or set gradient_checkpointing",
    "head_memory": "its head is one row",
}

_UNREAD = {"samples": "a reward model writes nothing", "reference_cache": "it has no reference"}


class MayTrainRewards:
    """What a config is of."""

    objective: Any

    @property
    def rewards(self) -> bool:
        """Whether it trains a reward model, not a policy."""
        return bool(self.objective == OBJECTIVE)


def unread_reward_keys(config) -> Iterator[str]:
    """What is said of keys that a reward model does not read, where they are set."""
    for name, why in _UNREAD.items():
        if getattr(config, name) != config.__dataclass_fields__[name].default:
            yield f"{name}: not read: {why}"


def check_reward_keys(config) -> None:
    """Raises ConfigError with all keys that a reward model's loss, Bradley and Terry's, does not go with."""
    if found := list(_problems(config)):
        raise ConfigError(*found)


def _problems(config) -> Iterator[str]:
    if config.objective not in ("sigmoid", OBJECTIVE):
        yield f"objective: {config.objective!r} is a policy's, and a reward model's is its own; leave it out"
    for name, why in _REFUSED.items():
        if getattr(config, name):
            yield f"{name}: not for a reward model: {why}"
    if config.pair_gap == "logp":
        yield "pair_gap: logp is not for a reward model, which has no reference to tell pairs by"
