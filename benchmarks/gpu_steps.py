"""Stage `steps`: whole training steps, fastdpo beside TRL and plain Hugging Face, model after model.

    python -m benchmarks.gpu_steps [--dry-run] [--out DIR] [--minutes 7.5]

The first model and mix has every contender, with fastdpo's own ideas one by one; the others have the peers.
A visit goes on where the last one of the same day and commit ended. Weights are random, in the shapes of
benchmarks.models; row lengths follow published statistics, benchmarks.lengths.
"""

import json
import sys
import tempfile
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.contenders import fastdpo, hf_plain, ladder, trl, trl_default, variants
from benchmarks.models import MODELS
from benchmarks.process import commit
from benchmarks.race import Contender
from benchmarks.results import result_path, stage_arguments, write_result
from benchmarks.steps import Plan, measure_steps, measured_ceilings, print_table
from benchmarks.workers import WorkerFailed, Workers

PAIRS = 64  # an optimizer step
MAX_TOKENS = 8192  # fastdpo's default
SMALLER = {"Llama-3.1-8B LoRA": 4096, "Qwen2.5-7B LoRA": 4096}  # what fits an 80 GB GPU beside the peers
SIZES = (4, 8, 2, 16, 1)  # TRL's pairs a microbatch, the likely best first
ORDER = [("Qwen2.5-0.5B", m) for m in ("HH-RLHF", "UltraFeedback", "TL;DR", "MetaMath-DPO", "Capybara")]
ORDER += [("Llama-3.2-1B", mix) for mix in ("HH-RLHF", "UltraFeedback", "TL;DR")]
ORDER += [("Qwen3-1.7B", mix) for mix in ("HH-RLHF", "UltraFeedback", "TL;DR")]
ORDER += [("Llama-3.1-8B LoRA", "HH-RLHF"), ("Qwen2.5-7B LoRA", "HH-RLHF"), ("Qwen2.5-0.5B", "hh real")]
LEAST_MINUTES = 2.5  # what a model and mix needs to say anything
GPU = Plan("", "", "cuda", pairs=PAIRS, turns=4, measured=2, minutes=0, warm=1, checks=3, distinct=4)
FULL_RATE, LORA_RATE = 3e-6, 1e-4  # so that a second look at the same rows has another loss
DRY_ORDER = [("Qwen2.5-0.5B", "HH-RLHF"), ("Llama-3.1-8B LoRA", "HH-RLHF")]
DRY = Plan("", "", "cpu", pairs=4, turns=2, measured=1, minutes=0, warm=1, checks=2, tiny=True)
DRY_RATE = 1e-3


def contenders(model: str, pairs: int, everything: bool) -> list[Contender]:
    """Peers first: an early end takes the ladder's last rungs, not TRL."""
    cap = SMALLER.get(model, MAX_TOKENS)
    peer = lambda size, label="", **more: trl(size, pairs, MODELS[model], "cuda", label, **more)
    grouped = dict(label=", lengths grouped", family="TRL, lengths grouped", grouped=True)
    out = [fastdpo(cap), *(peer(size) for size in (SIZES if everything else SIZES[:4]))]
    out += [peer(size, **grouped) for size in (8, 16, 4)]
    out += [peer(size, " + liger layers", options={"liger": True}) for size in (8, 4)]
    out += [peer(size, " + flash-attn", options={"flash": True}) for size in (8, 4)]
    out += [trl_default(8, pairs, out[1]), *(hf_plain(size, pairs) for size in (2, 4, 1)[: 2 + everything])]
    if everything:
        larger = replace(fastdpo(2 * cap), name=f"fastdpo, max_tokens {2 * cap}")
        out += [larger, *variants(cap), *ladder(cap, cap // 400)]
    return out


def dry_contenders(model: str) -> list[Contender]:
    """Every module and option once."""
    peer = lambda label="", **more: trl(2, 4, MODELS[model], "cpu", label, **more)
    out = [fastdpo(128), peer(), hf_plain(2, 4)]
    if MODELS[model].lora_rank is None:
        grouped = peer(", lengths grouped", family="TRL, lengths grouped", grouped=True)
        rungs = ladder(128, 2)
        out += [grouped, trl_default(2, 4, out[1]), peer(" + flash-attn", options={"flash": True})]
        out += [*variants(128, backend="eager"), rungs[0], rungs[2]]
    return out


def plan_of(model: str, mix: str, minutes: float, dry: bool) -> Plan:
    rate = DRY_RATE if dry else (FULL_RATE if MODELS[model].lora_rank is None else LORA_RATE)
    return replace(DRY if dry else GPU, model=model, mix=mix, minutes=minutes, learning_rate=rate)


def earlier(out: Path) -> dict:
    """The results of today's visits with this very commit: {model: {mix: record}}."""
    path = result_path("steps", out)
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    return found["results"] if found["git"] == commit()["git"] else {}


def to_do(results: dict) -> list[tuple[str, str]]:
    """Of ORDER what has no results yet, and then what failed or had no time for all of its contenders."""
    cut = lambda race: "failed" in race or any(r["state"] == "time" for r in race["summary"].values())
    new = [(model, mix) for model, mix in ORDER if mix not in results.get(model, {})]
    return new + [each for each in ORDER if each not in new and cut(results[each[0]][each[1]])]


def run(args: Namespace, workers: Workers) -> None:
    """All of ORDER that there is time for; the JSON is written after each."""
    began = time.perf_counter()
    left = lambda: args.minutes - (time.perf_counter() - began) / 60
    results, no_time = ({} if args.dry_run else earlier(args.out)), []
    order = DRY_ORDER if args.dry_run else to_do(results)
    ceilings = measured_ceilings(small=args.dry_run)
    for model, mix in order:
        if left() < LEAST_MINUTES and not args.dry_run:
            no_time.append(f"{model}, {mix}")
            continue
        print(f"{model}, {mix}: {left():.1f} minutes left", flush=True)
        plan = plan_of(model, mix, left() - 0.3, args.dry_run)
        field = dry_contenders(model) if args.dry_run else contenders(model, PAIRS, (model, mix) == ORDER[0])
        try:
            record = measure_steps(plan, field, ceilings["gemm_tflops"], workers)
        except WorkerFailed as failed:  # fastdpo itself: the news of this model, and the others go on
            record = {"failed": failed.kind, "why": failed.why}
        else:
            print_table(f"{model}, {mix}: steps of {plan.pairs} pairs", record, Console(width=150))
        results.setdefault(model, {})[mix] = record | {"ceilings": ceilings}
        write_result("steps", {"results": results, "no_time_for": no_time}, args.out)
    if no_time:
        print(f"no time for: {'; '.join(no_time)}")
        write_result("steps", {"results": results, "no_time_for": no_time}, args.out)


def main() -> None:
    args = stage_arguments(__doc__)
    if not args.dry_run and not torch.cuda.is_available():
        sys.exit("no GPU here: --dry-run --out DIR shows that all of it runs")
    with tempfile.TemporaryDirectory() as logs, Workers(Path(logs)) as workers:
        run(args, workers)


if __name__ == "__main__":
    main()
