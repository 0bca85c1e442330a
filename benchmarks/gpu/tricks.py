"""Stage `tricks`: the cost of each trick that saves memory.

Run again on the same day it measures what is left.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.results import gpu_arguments
from benchmarks.steps.tricks import GPU, MAX_TOKENS, PLAIN, TRICKS, run
from benchmarks.workers import Workers

DRY = replace(GPU, device="cpu", mix="HH-RLHF", pairs=4, turns=1, measured=1, warm=0, tiny=True)
# Each once takes minutes on two cores; tests/benchmarks/test_fit.py runs them all.
DRY_TRICKS = (
    PLAIN,
    "gradient_checkpointing, activation_offloading",
    "optimizer_in_backward",
    "lora_rank: 16, load_in_4bit",
)


def main() -> None:
    """One race, and what is left of the one before."""
    args = gpu_arguments(__doc__)
    how = (DRY, DRY_TRICKS, 256) if args.dry_run else (GPU, tuple(TRICKS), MAX_TOKENS)
    with tempfile.TemporaryDirectory() as logs, Workers(Path(logs)) as workers:
        run(*how, args, workers)


if __name__ == "__main__":
    main()
