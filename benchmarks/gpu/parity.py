"""Stage `parity`: learning beside TRL, in fp32 on a small model and in bf16 on one of real size."""

import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.learning.parity import Setting, demo_start, measure, record, small_setting, write
from benchmarks.models import MODELS, build, tiny
from benchmarks.results import stage_arguments

MODEL, RATE, STEPS, ORDERS = "Qwen2.5-0.5B", 3e-6, 50, 3
FP32_SHARE = 0.25  # of the minutes: one order is enough there, and bf16 says nothing without a second


def main() -> int:
    """Both, one JSON. A dry run: two steps, tiny models, bf16 too."""
    args = stage_arguments(__doc__)
    device = "cuda" if torch.cuda.is_available() and not args.dry_run else "cpu"
    steps, orders = (2, 2) if args.dry_run else (STEPS, ORDERS)
    began, seconds = time.monotonic(), 60 * args.minutes
    with tempfile.TemporaryDirectory() as folder:
        small = small_setting(Path(folder), device, torch.float32, steps)
        _, tokenizer = demo_start(Path(folder))
    results = {}
    keep = lambda name: lambda result: record(results | {name: result}, args.out, quiet=True)
    results["fp32"] = measure(small, orders, began + FP32_SHARE * seconds, keep("fp32"))
    model = tiny(MODELS[MODEL]) if args.dry_run else MODELS[MODEL]
    large = Setting(build(model, device, torch.float32), tokenizer, torch.bfloat16, RATE, steps)
    results["bf16"] = measure(large, orders, began + seconds, keep("bf16"))
    code = write(results, args.out)
    return 0 if args.dry_run else code  # of two steps nothing can be said


if __name__ == "__main__":
    sys.exit(main())
