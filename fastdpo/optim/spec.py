"""What an optimizer is made from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class OptimSpec:
    """Which optimizer, when and where it steps; named and explained as the config's keys."""

    optim: str
    learning_rate: float
    lr_scheduler_type: str
    lr_scheduler_kwargs: dict | None
    warmup_steps: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    weight_decay: float
    max_grad_norm: float
    offload_optimizer: bool
    optimizer_in_backward: bool
    pure_bf16: bool
    seed: int  # of stochastic rounding
