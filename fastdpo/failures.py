"""Why a run cannot go on, in words that name the rows and the way out."""

import math

from fastdpo.errors import TrainingError
from fastdpo.model import Policy
from fastdpo.records import PackedGroups

WAY_OUT = "Try a lower learning_rate, more warmup_steps, or dtype: fp32; look at the rows with `fastdpo data`"


def out_of_memory(step: int, batch: PackedGroups) -> TrainingError:
    rows = ", ".join(map(str, batch.rows[:8])) + (", ..." if len(batch.rows) > 8 else "")
    return TrainingError(
        f"step {step}: out of GPU memory on a microbatch of {batch.input_ids.numel()} tokens (rows {rows}). "
        "Lower max_tokens (or, if it is one group, max_length), set gradient_checkpointing: true, "
        "or train a LoRA (lora_rank)"
    )


def not_finite(step: int, losses, rows, norm) -> TrainingError:
    """Says which rows made the loss or gradient something else than a number."""
    bad = [r for loss, group in zip(losses.tolist(), rows) if not math.isfinite(loss) for r in group]
    where = f"in the microbatch of rows {', '.join(map(str, bad))}" if bad else "in the gradient"
    return TrainingError(
        f"step {step}: the loss is {float(losses.sum())} and the gradient norm {float(norm)}; "
        f"not a number first {where}. The weights of this step were not updated. {WAY_OUT}"
    )


def check_weights(policy: Policy) -> None:
    """Raises TrainingError rather than let a broken model be saved."""
    if not all(bool(p.isfinite().all()) for p in policy.trained()):
        raise TrainingError(f"the trained weights are no longer numbers; nothing was saved. {WAY_OUT}")
