"""Whole training steps on this CPU: fastdpo, its peers and its own ideas one by one, on the same rows.

    python -m benchmarks.cpu.steps [--minutes 7] [--out DIR] [--smoke]

The gate first: with a wrong kernel there is no timing. Then each contender in a process of its own, taking
turns, on rows with the token lengths of real HH-RLHF pairs. TRL 1.16 on a CPU scores prompt and padding
rows too; on a GPU it does not, so this is no GPU number. The model is Qwen2-shaped with random weights
(vocabulary 151,936, hidden 256, 4 layers): at DPO's lengths nearly all of its step is the lm_head, as in
small models with large vocabularies.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import figures
from benchmarks.gate.run import check
from benchmarks.models import MODELS
from benchmarks.results import RESULTS, write_result
from benchmarks.steps.contenders import fastdpo, hf_plain, ladder, trl
from benchmarks.steps.race import Contender
from benchmarks.steps.steps import KEEP_MEMORY, Plan, measure_steps, measured_ceilings, print_table
from benchmarks.workers import Workers

PAIRS = 4  # an optimizer step: as many as leave everybody time for several
MAX_TOKENS = 8192
PLAN = Plan("CPU", "hh real", "cpu", pairs=PAIRS, turns=5, measured=1, minutes=6.5)


def contenders(pairs: int) -> list[Contender]:
    """Batch sizes, and malloc as it comes or tuned; plain HF only tuned, its best. Where time runs out, it is
    for the last: larger batches, which are slower here."""
    model = MODELS["CPU"]
    tuned = dict(label=", tuned malloc", environment=KEEP_MEMORY)
    plain = lambda size: trl(size, pairs, model, "cpu")
    best = lambda size: trl(size, pairs, model, "cpu", family="TRL, tuned malloc", **tuned)
    hf = lambda size: hf_plain(size, pairs, **tuned)
    first = [fastdpo(MAX_TOKENS), best(1), hf(1), *ladder(MAX_TOKENS, pairs), plain(1)]
    return [*first, best(2), hf(2), plain(2), plain(pairs)]


def draw(record: dict, folder: Path) -> None:
    """Bars of pairs a second and of peak memory."""
    measured = {name: r for name, r in record["summary"].items() if "pairs_per_second" in r}
    rates, peaks = [], []
    for name, r in measured.items():
        ours = name == "fastdpo"
        rates.append(figures.Bar(name, r["pairs_per_second"], *r["quartiles"], ours=ours))
        peaks.append(figures.Bar(name, r["peak_gb"], ours=ours))
    figures.bars("steps_cpu_rate", "DPO steps on a CPU", "pairs a second", rates, folder)
    figures.bars("steps_cpu_memory", "DPO steps on a CPU", "peak memory, GB", peaks, folder)


def main() -> int:
    """Gate, race, table, JSON, plots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=PLAN.minutes, help="begin no turn after these")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of JSON and plots")
    parser.add_argument("--smoke", action="store_true", help="a tiny model: shows that all of it runs")
    args = parser.parse_args()
    if failures := check("cpu", torch.float32):
        print("the gate is red, so nothing is timed:", *failures, sep="\n  ")
        return 1
    ceilings = measured_ceilings(small=True)
    with tempfile.TemporaryDirectory() as logs, Workers(Path(logs)) as workers:
        plan = replace(PLAN, minutes=args.minutes)
        if args.smoke:
            plan = replace(plan, tiny=True, pairs=4, turns=2, learning_rate=1e-3)
        record = measure_steps(plan, contenders(plan.pairs), ceilings["gemm_tflops"], workers)
    record = {"gate_failures": [], "ceilings": ceilings} | record
    print_table(f"DPO steps of {plan.pairs} pairs on this CPU, fp32", record, Console(width=150))
    write_result("steps", record, args.out)
    draw(record, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
