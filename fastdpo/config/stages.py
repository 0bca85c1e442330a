"""The stages of a config: each a set of keys that override those above them."""

import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import Any

from fastdpo.config.checks import said
from fastdpo.config.names import meant
from fastdpo.errors import ConfigError

STAGE_KEYS = (
    "objective objective_args beta label_smoothing router_aux_loss_coef pairs learning_rate warmup_steps "
    "lr_scheduler_type lr_scheduler_kwargs adam_beta1 adam_beta2 adam_epsilon weight_decay max_grad_norm "
    "batch_size max_tokens num_epochs max_steps eval_steps logging_steps save_steps"
).split()


def stages_of(config, coerced: Callable[[dict], tuple[dict, list[str]]], above: Collection[str] = ()) -> list:
    """One config a stage. Raises ConfigError with all that is wrong, but for problems that are known of the
    keys `above` them."""
    made: list = []
    found: list[str] = []
    for number, own in enumerate(config.stages, 1):
        where = f"stages: stage {number}"
        found += [f"{where} {text}" for text in _unsettable(own)]
        if isinstance(own, dict) and own:
            values, wrong = coerced({name: own[name] for name in own if name in STAGE_KEYS})
            wrong += said(_add_stage, made, config, values)
            inherited = "objective" not in own  # it is first made here
            for text in (text for text in wrong if text not in above):
                is_above = inherited and text.startswith("objective: ")
                found.append(text if is_above else f"{where}: {text}")
    if not found and len(made) == len(config.stages):
        found = list(_out_of_reach(config, made))
    if found:
        raise ConfigError(*dict.fromkeys(found))
    return made


def _unsettable(own) -> Iterator[str]:
    if not isinstance(own, dict) or not own:
        yield f"is not a set of keys: {own!r}"
        return
    for name in own:
        if name not in STAGE_KEYS:
            yield f"sets {name!r}. {meant(name, STAGE_KEYS)}A stage can set: {', '.join(STAGE_KEYS)}"


def _add_stage(made: list, above, own: dict[str, Any]) -> None:
    made.append(dataclasses.replace(above, stages=None, **_inherited(above, own)))


def _inherited(above, own: dict[str, Any]) -> dict[str, Any]:
    """A stage's own keys, and what is not as it stands above: objective_args go option by option, and options
    that its objective does not read are for the other stages."""
    from fastdpo.objectives.make import options_read  # late: it imports torch

    own_args = own.get("objective_args") or {}
    args = (above.objective_args or {}) | own_args
    read = options_read(own.get("objective", above.objective), args.get("base_loss"))
    dropped = {name: None for name in ("beta", "label_smoothing") if name not in read}
    args = {name: value for name, value in args.items() if name in read or name in own_args}
    return dropped | own | {"objective_args": args or None}


def _out_of_reach(config, stages: list) -> Iterator[str]:
    """Of options above the stages that none of them reads."""
    for name in ("beta", "label_smoothing"):
        if getattr(config, name) is not None and all(getattr(stage, name) is None for stage in stages):
            yield f"{name}: no stage's objective reads it"
    for name in config.objective_args or {}:
        if not any(name in (stage.objective_args or {}) for stage in stages):
            yield f"objective_args: no stage's objective reads {name!r}"
