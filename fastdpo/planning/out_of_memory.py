"""What to say after an out-of-memory error: what was predicted, what was there, what to try next."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import torch

from fastdpo.config.keys import Config
from fastdpo.console.formatting import gigabytes
from fastdpo.errors import ConfigError
from fastdpo.planning import show
from fastdpo.planning.allocations import ATTENTION, BATCH, HEAD, LAYER, SAVED
from fastdpo.planning.prediction import Prediction, predict
from fastdpo.planning.simulate import Load
from fastdpo.planning.target import Target
from fastdpo.records import PackedGroups

# from the least cost in speed to the most; the first that is not in use is the next to try
_NEXT = (
    {"gradient_checkpointing": "selective"},
    {"gradient_checkpointing": True},
    {"tiled_mlp": True},
    {"activation_offloading": True},
    {"offload_optimizer": True},
)


def explain(config: Config, model_config, images: bool, batch: PackedGroups) -> str:
    """Some lines: the plan's view of the microbatch, the measured view, and the next thing to try. images:
    some rows of the run have some."""
    try:
        load = Load((), several=True, batch=batch.to("cpu"), images=images)
        target = Target.here() if torch.cuda.is_available() else Target(is_cpu=True)
        predicted = lambda keys: predict(keys, model_config, [load], target, exact=False)
        plan = predicted(config)
        next_ = _next_to_try(config, batch, plan, predicted)
    except Exception as error:  # whatever a plan may fail by, the run's own error is the one to tell
        return f"{measured()}\n(no plan of this microbatch: {type(error).__name__}: {error})"
    sizes = plan.peak.bytes | {"allocator slack": plan.slack, "CUDA context": plan.context}
    by_owner = ", ".join(f"{name} {gigabytes(size)}" for name, size in sizes.items() if size > 5e5)
    text = f"predicted for this microbatch: {gigabytes(plan.total)}, in the {plan.peak.where}:\n  {by_owner}"
    return f"{text}\n{measured()}\nnext: {next_}"


def measured() -> str:
    """What torch's allocator counted."""
    if not torch.cuda.is_available():
        return "measured: nothing, no GPU's allocator is in use"
    stats = torch.cuda.memory_stats()
    allocated, reserved = stats["allocated_bytes.all.peak"], stats["reserved_bytes.all.peak"]
    lost = stats["reserved_bytes.all.current"] - stats["allocated_bytes.all.current"]
    free, total = torch.cuda.mem_get_info()
    return (
        f"measured: at most {gigabytes(allocated)} allocated, {gigabytes(reserved)} reserved, "
        f"{gigabytes(lost)} reserved and unused now (fragments, if it is much: set "
        f"PYTORCH_ALLOC_CONF=expandable_segments:True); {gigabytes(free)} of {gigabytes(total)} free"
    )


def _next_to_try(
    config: Config, batch: PackedGroups, now: Prediction, predicted: Callable[[Config], Prediction]
) -> str:
    """The change of least cost in speed that is predicted to lower the peak by a tenth or more."""
    grows = sum(now.peak.bytes[owner] for owner in (SAVED, LAYER, ATTENTION, HEAD, BATCH))
    if len(batch.rows) > 1 and grows > 0.2 * now.total:
        half = batch.input_ids.numel() // 2
        return f"max_tokens: {half}; or memory: 24GB (what the card has), and the run chooses"
    for change in _NEXT:
        if all(getattr(config, name) == value for name, value in change.items()):
            continue
        if "gradient_checkpointing" in change and config.gradient_checkpointing is True:
            continue
        with suppress(ConfigError):
            after = predicted(replace(config, **change)).total
            if after < 0.9 * now.total:
                return f"{show.words(change)} (predicted: {gigabytes(after)})"
    return "a shorter max_length, load_in_4bit with lora_rank, or a larger card (`fastdpo plan` shows more)"
