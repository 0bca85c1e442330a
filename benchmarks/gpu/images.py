"""Stage `images`: whole training steps on prompts with pictures, fastdpo beside TRL's vision trainer.

Two and four responses of 150 tokens to about 1,024 tokens of a picture and some text. It goes on where an
earlier run of the same day and commit ended, and writes after everybody's first steps and after every turn.
Weights are random, in the shapes of benchmarks.models; towers are frozen, and no layer is computed twice.
"""

import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from benchmarks.gpu.steps import DRY_RATE, FULL_RATE, LORA_RATE, MAX_TOKENS, run_races
from benchmarks.models import MODELS
from benchmarks.results import gpu_arguments
from benchmarks.steps.images import PAIRS_A_PROMPT, contenders, measure_images, print_table
from benchmarks.steps.steps import Plan
from benchmarks.workers import Workers

ORDER = [(model, mix) for model in ("Qwen3-VL-2B", "Qwen2.5-VL-3B LoRA") for mix in PAIRS_A_PROMPT]
DRY_ORDER = [ORDER[1], ORDER[2]]
SIZES = (4, 8, 2)  # TRL's pairs a microbatch, the likely best first
LEAST_MINUTES = 2.5  # what a model and number of responses needs to say anything
GPU = Plan("", "", "cuda", pairs=16, turns=3, measured=2, minutes=0, warm=1, checks=3, distinct=2)
DRY = replace(GPU, device="cpu", pairs=4, turns=2, measured=1, checks=2, tiny=True)


def plan_of(args: Namespace, model: str, mix: str, minutes: float) -> Plan:
    rate = FULL_RATE if MODELS[model].lora_rank is None else LORA_RATE
    plan = replace(DRY, learning_rate=DRY_RATE) if args.dry_run else replace(GPU, learning_rate=rate)
    return replace(plan, model=model, mix=mix, minutes=minutes)


def run(args: Namespace, workers: Workers) -> None:
    def race(model: str, mix: str, minutes: float, keep: Callable[[dict], None]) -> dict:
        plan = plan_of(args, model, mix, minutes)
        sizes, cap = ((2,), 64) if args.dry_run else (SIZES, MAX_TOKENS)
        record = measure_images(plan, contenders(plan.pairs, sizes, cap), workers, keep)
        print_table(f"{model}, {mix}: steps of {plan.pairs} pairs", record, Console(width=150))
        return record

    run_races("images", DRY_ORDER if args.dry_run else ORDER, args, race, LEAST_MINUTES)


def main() -> None:
    args = gpu_arguments(__doc__)
    with tempfile.TemporaryDirectory() as logs, Workers(Path(logs)) as workers:
        run(args, workers)


if __name__ == "__main__":
    main()
