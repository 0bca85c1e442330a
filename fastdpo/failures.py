"""Why a run cannot go on, in words that name the rows and the way out."""

import contextlib
import math

import torch

from fastdpo.errors import TrainingError
from fastdpo.model import Policy
from fastdpo.records import PackedGroups

WAY_OUT = "Try a lower learning_rate, more warmup_steps, or dtype: fp32; look at the rows with `fastdpo data`"


@contextlib.contextmanager
def memory_guard(step: int, batch: PackedGroups):
    """Turns CUDA's out-of-memory error into one that names the microbatch and the way out."""
    try:
        yield
    except torch.OutOfMemoryError:
        rows = ", ".join(map(str, batch.rows[:8])) + (", ..." if len(batch.rows) > 8 else "")
        size = f"{batch.input_ids.numel()} tokens (rows {rows})"
        raise TrainingError(
            f"step {step}: out of GPU memory on a microbatch of {size}. "
            "Lower max_tokens (or, if it is one group, max_length), set gradient_checkpointing: true, "
            "or train a LoRA (lora_rank)"
        ) from None


def not_finite(step: int, done, norm) -> TrainingError:
    """Says which rows made the loss (a fastdpo.accumulate.StepLoss) or the gradient something else than a
    number."""
    parts = torch.stack(done.parts).tolist()
    bad = [r for part, rows in zip(parts, done.rows) if not math.isfinite(part) for r in rows]
    where = f"in the microbatch of rows {', '.join(map(str, bad))}" if bad else "in the gradient"
    return TrainingError(
        f"step {step}: the loss is {float(done.loss)} and the gradient norm {float(norm)}; "
        f"not a number first {where}. The weights of this step were not updated. {WAY_OUT}"
    )


def check_weights(policy: Policy) -> None:
    """Raises TrainingError rather than let a broken model be saved."""
    if not all(bool(p.isfinite().all()) for p in policy.trained()):
        raise TrainingError(f"the trained weights are no longer numbers; nothing was saved. {WAY_OUT}")
