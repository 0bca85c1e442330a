"""Stage `rounds`: on-policy rounds, their training part beside TRL's trainers, and how long sampling takes.

Four sampled responses a prompt, of 256 tokens at most. It goes on where an earlier run of the same day and
commit ended, and writes after everybody's first steps, after every turn and after every call that samples.
Weights are random, in the shapes of benchmarks.models; lengths follow published statistics,
benchmarks.lengths.
"""

import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from benchmarks.gpu.steps import DRY_RATE, FULL_RATE, LORA_RATE, MAX_TOKENS, SMALLER, run_races
from benchmarks.models import MODELS
from benchmarks.results import gpu_arguments
from benchmarks.steps.race import Contender
from benchmarks.steps.rounds import OFFLINE, contenders, measure_rounds, print_table, task_of
from benchmarks.steps.sampling import measure_sampling
from benchmarks.steps.steps import Plan
from benchmarks.workers import Workers

SAMPLING, PROMPTS = "sampling", 512  # of a round that is sampled
LARGE = "Llama-3.1-8B LoRA"
ORDER = [("Qwen2.5-0.5B", mix) for mix in ("UltraFeedback", SAMPLING)]
ORDER += [(LARGE, "UltraFeedback"), ("Qwen2.5-0.5B", "TL;DR")]
DRY_ORDER = ORDER[:3]
SIZES, LARGE_SIZES = (8, 16, 4), (4, 8)  # of TRL's microbatches, the likely best first
LEAST_MINUTES = 2.5  # what each needs to say anything
MOST_MINUTES = 5.0  # of a race, so that a visit has some left to sample
GPU = Plan("", "", "cuda", pairs=16, turns=3, measured=2, minutes=0, warm=1, checks=3, distinct=2)
DRY = replace(GPU, device="cpu", pairs=4, turns=2, measured=1, checks=2, tiny=True)


def plan_of(args: Namespace, model: str, mix: str, minutes: float) -> Plan:
    rate = FULL_RATE if MODELS[model].lora_rank is None else LORA_RATE
    plan = replace(DRY, learning_rate=DRY_RATE) if args.dry_run else replace(GPU, learning_rate=rate)
    return replace(plan, model=model, mix=mix, minutes=minutes)


def field_of(args: Namespace, model: str, plan: Plan) -> list[Contender]:
    if args.dry_run:  # every module once, and under a LoRA the shortest field
        field = contenders(plan.pairs, (2,), 128, everything=False)
        short = [c for c in field if task_of(c) == "best and worst" and c.name != OFFLINE]
        return short if model == LARGE else field
    sizes = LARGE_SIZES if model == LARGE else SIZES
    cap = SMALLER.get(model, MAX_TOKENS)
    return contenders(plan.pairs, sizes, cap, everything=(model, plan.mix) == ORDER[0])


def run(args: Namespace, workers: Workers) -> None:
    def race(model: str, mix: str, minutes: float, keep: Callable[[dict], None]) -> dict:
        if mix == SAMPLING:
            plan = plan_of(args, model, "UltraFeedback", minutes)
            prompts, most = (4, 8) if args.dry_run else (PROMPTS, 256)
            return measure_sampling(replace(plan, pairs=prompts), workers, keep, most)
        plan = plan_of(args, model, mix, minutes if args.dry_run else min(minutes, MOST_MINUTES))
        record = measure_rounds(plan, field_of(args, model, plan), workers, keep)
        print_table(f"{model}, {mix}: steps of {plan.pairs} prompts", record, Console(width=170))
        return record

    run_races("rounds", DRY_ORDER if args.dry_run else ORDER, args, race, LEAST_MINUTES)


def main() -> None:
    args = gpu_arguments(__doc__)
    with tempfile.TemporaryDirectory() as logs, Workers(Path(logs)) as workers:
        run(args, workers)


if __name__ == "__main__":
    main()
