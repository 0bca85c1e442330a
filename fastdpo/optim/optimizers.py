"""The optimizer of a stage and the schedule of its learning rate."""

import math

import torch
from torch.optim.lr_scheduler import LambdaLR

from fastdpo.errors import ConfigError
from fastdpo.model.policy import Policy
from fastdpo.optim.spec import OptimSpec
from fastdpo.optim.stepping import InBackward, WeightOptimizer
from fastdpo.values import not_one_of

# Tried by the tests. transformers' schedules come late: peft, torchao and bitsandbytes come with them, and a
# wrong key or model would be told a second later.
_KNOWN = ("linear", "cosine", "constant", "constant_with_warmup")


def make_optimizer(policy: Policy, spec: OptimSpec, total: int) -> tuple[WeightOptimizer, LambdaLR]:
    """The optimizer with transformers' defaults, decaying matrices only, and a transformers
    schedule. close() the optimizer when no step follows."""
    from transformers import get_scheduler

    parameters = policy.trained()
    grouped = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": spec.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = (InBackward if spec.optimizer_in_backward else WeightOptimizer)(grouped, spec)
    return optimizer, get_scheduler(*_schedule(spec, optimizer, total))


def _schedule(spec: OptimSpec, optimizer, total: int) -> tuple:
    """What get_scheduler is given."""
    return spec.lr_scheduler_type, optimizer, warmup(spec, total), total, spec.lr_scheduler_kwargs


def warmup(spec: OptimSpec, total: int) -> int:
    """Warm-up steps; below 1 it is a share of all steps, as transformers reads it."""
    steps = spec.warmup_steps
    return math.ceil(steps * total) if steps < 1 else int(steps)


def set_schedule(schedule: LambdaLR, steps: int) -> None:
    """Puts a fresh schedule where `steps` calls of its step() would have: it is a function of the step."""
    schedule.last_epoch = steps
    schedule._last_lr = [base * factor(steps) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas)]
    for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr):
        group["lr"] = rate


def check_schedule(spec: OptimSpec) -> None:
    """Raises ConfigError for a schedule that cannot be made or stepped, by trying one on no model."""
    if spec.lr_scheduler_type in _KNOWN and not spec.lr_scheduler_kwargs:
        return
    from transformers import SchedulerType, get_scheduler

    names = [kind.value for kind in SchedulerType]
    if spec.lr_scheduler_type not in names:
        raise not_one_of("lr_scheduler_type", spec.lr_scheduler_type, names)
    try:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.1)
        schedule = get_scheduler(*_schedule(spec, optimizer, 100))
        if not isinstance(schedule, LambdaLR):
            raise ValueError("it is no function of the step, so a run could not go on after a stop")
        optimizer.step()
        schedule.step()
    except (ValueError, TypeError) as error:
        name, given = spec.lr_scheduler_type, spec.lr_scheduler_kwargs or {}
        raise ConfigError(f"lr_scheduler_type: {name!r} with lr_scheduler_kwargs {given}: {error}") from None
