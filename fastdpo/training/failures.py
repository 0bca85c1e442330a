"""Why a run cannot go on, in words that name the rows and the way out."""

import contextlib
import math
from collections.abc import Callable

import torch

from fastdpo.distributed.shards import is_finite
from fastdpo.errors import DeadEndError, TrainingError
from fastdpo.model.policy import Policy
from fastdpo.records import PackedGroups

Explain = Callable[[PackedGroups], str]  # what is to be said of a microbatch that took too much memory
WAY_OUT = (
    "Start anew (--overwrite) with a lower learning_rate, more warmup_steps, or dtype: fp32; look at the "
    "rows with `fastdpo data`"
)


def memory_guard(step: int, batch: PackedGroups, explain: Explain | None = None):
    """Around the work on a microbatch: turns CUDA's out-of-memory error into one that names the microbatch,
    the way out, and what `explain` says of it."""
    where = lambda: (
        f"on a microbatch of {batch.input_ids.numel()} tokens (rows {batch.some_rows}). "
        "Lower max_tokens (or, if it is one group, max_length), set gradient_checkpointing: true, or train "
        "a LoRA (lora_rank)"
    )
    return _guard(step, where, lambda: batch, explain)


def update_guard(
    step: int, batch: Callable[[], PackedGroups], offloaded: bool, explain: Explain | None = None
):
    """The same around the update, in which the optimizer makes its states at first (in the host's memory
    where it is offloaded); `batch` packs any groups of the step, for what is said of the weights depends on
    none."""
    states = "an optimizer with smaller states (optim: adamw_8bit), set offload_optimizer: true, or train"
    ways = f"{'Train' if offloaded else f'Take {states}'} a LoRA (lora_rank)"
    where = lambda: f"in the optimizer's update. {ways}"
    return _guard(step, where, batch, explain)


@contextlib.contextmanager
def _guard(step: int, where: Callable[[], str], batch: Callable[[], PackedGroups], explain: Explain | None):
    try:
        yield
        return
    except torch.OutOfMemoryError:
        pass  # what the work held is freed when its traceback is
    text = f"step {step}: out of GPU memory {where()}"
    raise TrainingError(text if explain is None else f"{text}\n{explain(batch())}")


def not_finite(step: int, done, norm=None, updated: bool = False) -> DeadEndError:
    """Says which rows made the loss (an accumulate.StepLoss) or the gradient something else than a
    number. norm: None where no gradient was computed; updated: whether weights were, in the backward."""
    parts = torch.stack(done.parts).tolist()
    bad = [r for part, rows in zip(parts, done.rows) if not math.isfinite(part) for r in rows]
    where = f"in the microbatch of rows {', '.join(map(str, bad))}" if bad else "in the gradient"
    values = f"the loss is {float(done.loss)}"
    if norm is not None:
        values += f" and the gradient norm {float(norm)}"
    weights = "The weights of this step were not updated"
    if updated:
        weights = "optimizer_in_backward has updated weights by it: only the newest checkpoint is good"
    return DeadEndError(f"step {step}: {values}; not a number first {where}. {weights}. {WAY_OUT}")


def check_weights(policy: Policy) -> None:
    """Raises DeadEndError rather than let a broken model be saved; all ranks have to call it."""
    if policy.world.min(all(map(is_finite, policy.trained()))) < 1:
        raise DeadEndError(f"the trained weights are no longer numbers; nothing was saved. {WAY_OUT}")
