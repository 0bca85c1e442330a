"""Stage `dropin`: TRL stock and patched on a GPU, at several batch sizes, on short and on long prompts.

Run again on the same day it goes on where it stopped, and with what failed.
"""

import sys
from dataclasses import replace

from rich.console import Console

from benchmarks.results import gpu_arguments
from benchmarks.steps.dropin import complete, measure, table
from benchmarks.steps.steps import Plan

MIXES = ("HH-RLHF", "TL;DR")
SIZES = (8, 4, 16, 1)  # pairs a microbatch, the likely best first
GPU = Plan("Qwen2.5-0.5B", "", "cuda", pairs=64, turns=5, measured=2, minutes=0, learning_rate=3e-6)
DRY = Plan("Qwen2.5-0.5B", "", "cpu", pairs=4, turns=2, measured=1, minutes=0, tiny=True, learning_rate=1e-3)


def main() -> int:
    """Both mixes, one JSON."""
    args = gpu_arguments(__doc__)
    plan = replace(DRY if args.dry_run else GPU, minutes=args.minutes)
    sizes = (2,) if args.dry_run else SIZES
    plans = [replace(plan, mix=mix) for mix in MIXES]
    record = measure(plans, sizes, args.out, resume=not args.dry_run)
    Console(width=120).print(table(record))
    return int(not complete(record))


if __name__ == "__main__":
    sys.exit(main())
