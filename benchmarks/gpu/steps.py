"""Stage `steps`: whole training steps, fastdpo beside TRL and plain Hugging Face, model after model.

    python -m benchmarks.gpu.steps [--dry-run] [--out DIR] [--minutes 7.5] [--short MODEL]

The first model and mix has every contender, with fastdpo's own ideas one by one; the others have the peers.
--short: one model on two mixes, fastdpo beside the likely best of each peer, in minutes. It goes on where an
earlier run of the same day and commit ended, and writes after everybody's first steps and after every turn.
Weights are random, in the shapes of benchmarks.models; row lengths follow published statistics,
benchmarks.lengths.
"""

import math
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.models import MODELS
from benchmarks.results import gpu_arguments, result_of_today, stage_parser, write_result
from benchmarks.steps.contenders import fastdpo, hf_plain, ladder, trl, trl_default, variants
from benchmarks.steps.race import Contender
from benchmarks.steps.steps import Plan, measure_steps, measured_ceilings, print_table
from benchmarks.workers import WorkerFailed, Workers

PAIRS = 64  # an optimizer step
MAX_TOKENS = 8192  # fastdpo's default
SMALLER = {"Llama-3.1-8B LoRA": 4096, "Qwen2.5-7B LoRA": 4096}  # what fits an 80 GB GPU beside the peers
SIZES = (4, 8, 2, 16, 1)  # TRL's pairs a microbatch, the likely best first
ORDER = [("Qwen2.5-0.5B", m) for m in ("HH-RLHF", "UltraFeedback", "TL;DR", "MetaMath-DPO", "Capybara")]
SHORT_MIXES = ("HH-RLHF", "UltraFeedback")
ORDER += [("Qwen2.5-1.5B", mix) for mix in SHORT_MIXES]
ORDER += [("Llama-3.2-1B", mix) for mix in ("HH-RLHF", "UltraFeedback", "TL;DR")]
ORDER += [("Qwen3-1.7B", mix) for mix in ("HH-RLHF", "UltraFeedback", "TL;DR")]
ORDER += [("Llama-3.1-8B LoRA", "HH-RLHF"), ("Qwen2.5-7B LoRA", "HH-RLHF"), ("Qwen2.5-0.5B", "hh real")]
LEAST_MINUTES = 2.5  # what a model and mix needs to say anything
GPU = Plan("", "", "cuda", pairs=PAIRS, turns=4, measured=2, minutes=0, warm=1, checks=3, distinct=4)
# Half as many pairs a step: with ten contenders in four minutes everybody is to have several turns.
SHORT = replace(GPU, pairs=32, turns=3, checks=2)
LEAST_SHORT_MINUTES = 1.0
# Below so many bytes the short field of models from 1B on is a smaller one, by arithmetic: 8 pairs of
# UltraFeedback a microbatch take TRL over 100 GB at 1.5B (about 64 GB at 0.5B), and each contender that waits
# holds 12 bytes a trained weight.
LARGE_CARD = 100e9
FROM_1B = 0.8e9  # without the embeddings
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


def short_contenders(model: str, pairs: int) -> list[Contender]:
    """fastdpo and who is likely to be the fastest of each peer; TRL at three sizes, to be sure, and at two
    where the card is small for the model."""
    peer = lambda size, label="", **more: trl(size, pairs, MODELS[model], "cuda", label, **more)
    grouped = dict(label=", lengths grouped", family="TRL, lengths grouped", grouped=True)
    ours = fastdpo(SMALLER.get(model, MAX_TOKENS))
    if MODELS[model].body_params > FROM_1B and card_bytes() < LARGE_CARD:
        best = peer(4)
        out = [ours, best, hf_plain(2, pairs), peer(2), peer(4, **grouped)]
        return [*out, peer(4, " + liger layers", options={"liger": True}), trl_default(4, pairs, best)]
    best = peer(8)
    out = [ours, best, peer(4), hf_plain(4, pairs), peer(16)]
    out += [peer(8, **grouped), peer(8, " + liger layers", options={"liger": True})]
    return [*out, trl_default(8, pairs, best), peer(16, **grouped), hf_plain(2, pairs)]


def card_bytes() -> float:
    """Of this GPU's memory; without one, of a card that is large enough."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else math.inf


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


def plan_of(args: Namespace, model: str, mix: str, minutes: float) -> Plan:
    rate = FULL_RATE if MODELS[model].lora_rank is None else LORA_RATE
    plan = replace(SHORT if args.short else GPU, learning_rate=rate)
    if args.dry_run:
        plan = replace(DRY, learning_rate=DRY_RATE)
    return replace(plan, model=model, mix=mix, minutes=minutes)


def to_do(results: dict, order: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Of `order` what has no results yet, and then what failed or had no time for all of its contenders."""
    cut = lambda race: "failed" in race or any(r["state"] == "time" for r in race["summary"].values())
    new = [(model, mix) for model, mix in order if mix not in results.get(model, {})]
    return new + [each for each in order if each not in new and cut(results[each[0]][each[1]])]


def measured(race: dict) -> int:
    """How many contenders have numbers."""
    return sum(r["state"] == "measured" for r in race.get("summary", {}).values())


def field_of(args: Namespace, model: str, mix: str) -> list[Contender]:
    if args.dry_run:
        return dry_contenders(model)
    if args.short:
        return short_contenders(model, SHORT.pairs)
    return contenders(model, PAIRS, (model, mix) == ORDER[0])


def run_races(
    what: str,
    order: list[tuple[str, str]],
    args: Namespace,
    race: Callable[[str, str, float, Callable[[dict], None]], dict],
    least: float,
    evenly: bool = False,
) -> None:
    """All of `order` that there is time for, at least so many minutes each; the JSON is written whenever
    something was measured. race(model, mix, minutes, keep): the record. evenly: each has its share."""
    began = time.perf_counter()
    left = lambda: args.minutes - (time.perf_counter() - began) / 60
    results, no_time = (result_of_today(what, args.out) or {}).get("results", {}), []
    order = order if args.dry_run else to_do(results, order)

    def keep(model: str, mix: str, earlier: dict, record: dict, quiet: bool = True) -> None:
        if measured(record) >= measured(earlier):  # done again, a race is not to end poorer than it was
            results.setdefault(model, {})[mix] = record
        write_result(what, {"results": results, "no_time_for": no_time}, args.out, quiet)

    for number, (model, mix) in enumerate(order):
        if left() < least and not args.dry_run:
            no_time.append(f"{model}, {mix}")
            continue
        minutes = (left() - 0.3) / (len(order) - number if evenly else 1)
        print(f"{model}, {mix}: {minutes:.1f} minutes", flush=True)
        told = partial(keep, model, mix, results.get(model, {}).get(mix, {}))
        try:
            record = race(model, mix, minutes, told)
        except WorkerFailed as failed:  # fastdpo itself: the news of this model, and the others go on
            record = {"failed": failed.kind, "why": failed.why}
        told(record, quiet=False)
    if no_time:
        print(f"no time for: {'; '.join(no_time)}")
        write_result(what, {"results": results, "no_time_for": no_time}, args.out)


def run(args: Namespace, workers: Workers) -> None:
    ceilings = measured_ceilings(small=args.dry_run)

    def race(model: str, mix: str, minutes: float, keep: Callable[[dict], None]) -> dict:
        plan, field = plan_of(args, model, mix, minutes), field_of(args, model, mix)
        told = lambda record: keep(record | {"ceilings": ceilings})
        record = measure_steps(plan, field, ceilings["gemm_tflops"], workers, told)
        print_table(f"{model}, {mix}: steps of {plan.pairs} pairs", record, Console(width=150))
        return record | {"ceilings": ceilings}

    if args.short:
        order, least = [(args.short, mix) for mix in SHORT_MIXES], LEAST_SHORT_MINUTES
    else:
        order, least = DRY_ORDER if args.dry_run else ORDER, LEAST_MINUTES
    run_races("steps", order, args, race, least, evenly=bool(args.short) and not args.dry_run)


def main() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument(
        "--short", metavar="MODEL", choices=dict(ORDER), help="this model alone, in a short field"
    )
    args = gpu_arguments(parser)
    with tempfile.TemporaryDirectory() as logs, Workers(Path(logs)) as workers:
        run(args, workers)


if __name__ == "__main__":
    main()
