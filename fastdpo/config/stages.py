"""The configs of a run's stages: what each sets, over what stands above them all."""

import dataclasses

from fastdpo.errors import ConfigError
from fastdpo.values import as_type, nearest

STAGE_KEYS = (
    "objective objective_args beta label_smoothing pairs learning_rate warmup_steps lr_scheduler_type "
    "weight_decay max_grad_norm batch_size max_tokens num_epochs max_steps eval_steps logging_steps "
    "save_steps"
).split()


def stages_of(config) -> list:
    """One config a stage; of a config without `stages`, itself. Raises ConfigError."""
    if not config.stages:
        return [config]
    kinds = {f.name: f.type for f in dataclasses.fields(config)}
    out = []
    for number, overrides in enumerate(config.stages, 1):
        if not isinstance(overrides, dict) or not overrides:
            raise ConfigError(f"stages: stage {number} is not a set of keys: {overrides!r}")
        for name in overrides:
            if name not in STAGE_KEYS:
                raise ConfigError(
                    f"stages: stage {number} sets {name!r}. {nearest(name, STAGE_KEYS)}"
                    f"A stage can set: {', '.join(STAGE_KEYS)}"
                )
        try:
            values = {name: as_type(name, value, kinds[name]) for name, value in overrides.items()}
            out.append(dataclasses.replace(config, stages=None, **_inherited(config, values)))
        except ConfigError as error:
            raise ConfigError(f"stages: stage {number}: {error}") from None
    _check_options_reach(config, out)
    return out


def _inherited(above, own: dict) -> dict:
    """A stage's own keys, and what is not as it stands above: objective_args go option by option, and options
    that its objective does not read are for the other stages."""
    from fastdpo.objectives.make import options_read  # late: it imports torch

    own_args = own.get("objective_args") or {}
    args = (above.objective_args or {}) | own_args
    read = options_read(own.get("objective", above.objective), args.get("base_loss"))
    dropped = {name: None for name in ("beta", "label_smoothing") if name not in read}
    args = {name: value for name, value in args.items() if name in read or name in own_args}
    return dropped | own | {"objective_args": args or None}


def _check_options_reach(config, stages: list) -> None:
    """Raises ConfigError for an option above the stages that none of them reads."""
    for name in ("beta", "label_smoothing"):
        if getattr(config, name) is not None and all(getattr(stage, name) is None for stage in stages):
            raise ConfigError(f"{name}: no stage's objective reads it")
    for name in config.objective_args or {}:
        if not any(name in (stage.objective_args or {}) for stage in stages):
            raise ConfigError(f"objective_args: no stage's objective reads {name!r}")
