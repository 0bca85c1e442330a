"""The optimizer of a stage and the schedule of its learning rate."""

import math

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from fastdpo.config.keys import Config
from fastdpo.errors import ConfigError
from fastdpo.model.policy import Policy
from fastdpo.objectives import make_objective
from fastdpo.objectives.seam import Rescaled
from fastdpo.optim.bytes import state_bytes
from fastdpo.optim.stepping import InBackward, WeightOptimizer

__all__ = ["check_schedule", "make_optimizer", "set_schedule", "state_bytes", "warmup"]


def make_optimizer(policy: Policy, config: Config, total: int) -> tuple[WeightOptimizer, LambdaLR]:
    """The config's optimizer with transformers' defaults, decaying matrices only, and a transformers
    schedule. close() the optimizer when no step follows."""
    parameters = policy.trained()
    grouped = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = (InBackward if config.optimizer_in_backward else WeightOptimizer)(grouped, config)
    return optimizer, get_scheduler(config.lr_scheduler_type, optimizer, warmup(config, total), total)


def warmup(config: Config, total: int) -> int:
    """Warm-up steps; below 1 it is a share of all steps, as transformers reads it."""
    steps = config.warmup_steps
    return math.ceil(steps * total) if steps < 1 else int(steps)


def set_schedule(schedule: LambdaLR, steps: int) -> None:
    """Puts a fresh schedule where `steps` calls of its step() would have: it is a function of the step."""
    schedule.last_epoch = steps
    schedule._last_lr = [base * factor(steps) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas)]
    for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr):
        group["lr"] = rate


def check_schedule(config: Config) -> None:
    """Raises ConfigError for a way of stepping that the objective does not allow, and for a schedule that
    cannot be made or stepped, by trying one on no model."""
    objective = make_objective(config)
    if config.optimizer_in_backward and isinstance(objective, Rescaled):
        raise ConfigError(
            f"optimizer_in_backward: {objective.name} rescales the gradient after the last microbatch, when "
            "the weights would be updated already; give it a scope (objective_args: {scope: N}) or leave "
            "the key out"
        )
    try:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.1)
        schedule = get_scheduler(config.lr_scheduler_type, optimizer, warmup(config, 100), 100)
        optimizer.step()
        schedule.step()
        if not isinstance(schedule, LambdaLR):
            raise ValueError("it is no function of the step, so a run could not go on after a stop")
    except (ValueError, TypeError) as error:
        raise ConfigError(f"lr_scheduler_type: {config.lr_scheduler_type!r}: {error}") from None
