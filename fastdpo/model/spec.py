"""What a policy is made from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSpec:
    """Which model, what of it is trained, and how it computes; named and explained as the config's keys."""

    model: str
    adapter: str | None = None
    chat_template: str | None = None
    max_length: int = 1024  # the longest row that it will see
    dtype: str = "auto"
    pure_bf16: bool = False
    load_in_4bit: bool = False
    freeze_vision: bool = True
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_target_modules: str | list[str] = "all-linear"
    use_dora: bool = False
    use_rslora: bool = False
    seed: int = 0  # of a fresh LoRA
    gradient_checkpointing: bool | int | str = False
    activation_offloading: bool = False
    tiled_mlp: bool = False
    head_memory: str | None = None
    rewards: bool = False  # a reward model: a classifier of one output
