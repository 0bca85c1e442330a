"""What losses are called elsewhere: in papers and in TRL, LLaMA-Factory, Axolotl."""

import re
from collections.abc import Iterable

from fastdpo.errors import ConfigError
from fastdpo.values import not_one_of

SAME = {  # the very same loss by another name
    "dpo": "sigmoid",
    "dpo_norm": "sigmoid_norm",
    "length_normalized_dpo": "sigmoid_norm",
    "robust_dpo": "robust",
    "dpo_positive": "dpop",
    "slic_hf": "slic",
    "aot_pair": "aot",
    "reinforce_leave_one_out": "rloo",
}
_NOT_HERE = "a loss that fastdpo does not have; `fastdpo objectives` lists all"
_CRITIC = "a loss that fastdpo does not have; rloo, with rounds, also learns from scored samples of the model"
_MEANING = {  # what takes more than a name, or is not here
    "cdpo": "sigmoid with label_smoothing: 0.1",
    "conservative_dpo": "sigmoid with label_smoothing: 0.1",
    "length_normalised_dpo": "sigmoid_norm",
    "rso": "hinge, on pairs that RSO draws",
    "ld_dpo": "sigmoid with objective_args: {ld_alpha: 0.5}",
    "f_dpo": "sigmoid with objective_args: {f_divergence_type: js_divergence}",
    "cpo_simpo": "objective: {simpo: 1, sft: 1}",
    "curry_dpo": "sigmoid with pairs: easy, then medium, then hard, as stages",
    "apo": "apo_zero or apo_down",
    "online_dpo": "sigmoid with rounds and reward",
    "dr_po": "rloo with rounds, reward and sample: {resets: 1}",
    "sppo": "sppo_hard",
    "nll": "sft",
    "kto_pair": "an older loss of TRL that is neither kto nor here; kto reads pairs, too",
    **dict.fromkeys(("tdpo", "beta_dpo", "dpo_shift", "cal_dpo", "mdpo", "gdpo"), _NOT_HERE),
    **dict.fromkeys(("ppo", "grpo"), _CRITIC),
}
_TWO = "said of two losses: robust (a known share of pairs is flipped) and rdpo (R-DPO, by length)"
NOTE = (
    "other names: case, dashes and underscores do not matter, and "
    f"{', '.join(f'{name} is {ours}' for name, ours in SAME.items())}"
)


def spelled(name) -> str:
    """A name without what is spelled one way or another: case, dashes, underscores, spaces."""
    return re.sub(r"[\W_]+", "", str(name)).lower()


def same(name, known: Iterable[str]) -> str | None:
    """Which of the known objectives another name is of, if it is one's."""
    names = SAME | {one: one for one in known}
    found = {spelled(other): one for other, one in names.items()}
    return found.get(spelled(name)) if isinstance(name, str) else None


def ours(name, known: Iterable[str]) -> str:
    """As `same`. Raises ConfigError where it is none's."""
    if name == "rDPO":
        raise ConfigError(f"objective: {name!r} is {_TWO}")
    if found := same(name, known):
        return found
    for other, meaning in _MEANING.items():
        if spelled(other) == spelled(name):
            raise ConfigError(f"objective: {name!r} is {meaning}")
    raise not_one_of("objective", name, known, SAME)
