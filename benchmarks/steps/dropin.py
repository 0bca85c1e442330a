"""TRL's DPOTrainer, stock and after one line of ours, on the same rows: pairs a second and peak memory.

    python -m benchmarks.steps.dropin [--minutes 8] [--out DIR] [--smoke]

On a CPU: the model and the row lengths of `make bench-cpu`, steps of 8 pairs, as 8 microbatches of 1 and as
1 of 8. Stock and patched live in a process of their own for each batch size and take turns; both have a
stored reference, no gradient checkpointing and a malloc that keeps its memory, which is TRL's fastest way.
Losses that differ are an error. On a GPU: gpu/dropin.py.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.lengths import summary
from benchmarks.results import RESULTS, result_of_today, write_result
from benchmarks.steps.steps import KEEP_MEMORY, TOLERANCE, Plan, even_steps, pool_of, rows_of_steps
from benchmarks.workers import WorkerFailed, Workers

MODULES = {"stock": "benchmarks.peers.trl_dpo", "patched": "benchmarks.peers.trl_patched"}
CPU = Plan("CPU", "hh real", "cpu", pairs=8, turns=5, measured=1, minutes=8)
CPU_SIZES = (1, 8)  # pairs a microbatch
GRACE = 40  # seconds that the last answer may come after the time is over


def measure(plans: list[Plan], sizes: tuple[int, ...], out: Path, resume: bool = False) -> dict:
    """Each plan's mix at each batch size: {"plan", "results": {mix: {"lengths", "sizes"}}}. The JSON is
    written after each; a failure is a result, with its reason. `resume`: only what today's result of the
    same commit has no numbers of."""
    end = time.monotonic() + 60 * plans[0].minutes
    earlier = (result_of_today("dropin", out) if resume else None) or {}
    results: dict[str, dict] = earlier.get("results", {})
    record = {"plan": asdict(plans[0]), "results": results}
    has = lambda plan, size: "stock" in results.get(plan.mix, {}).get("sizes", {}).get(str(size), {})
    todo = [(plan, [size for size in sizes if not has(plan, size)]) for plan in plans]
    left = sum(len(missing) for _, missing in todo)
    for plan, missing in todo:
        steps = even_steps(pool_of(plan), plan.pairs, plan.distinct)
        told = {"lengths": summary([row for step in steps for row in step]), "sizes": {}}
        results.setdefault(plan.mix, told)
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "rows.json"
            rows.write_text(json.dumps(rows_of_steps(steps, plan.bench_model.vocab, 0)))
            for size in missing:
                until = time.monotonic() + max(0.0, end - time.monotonic()) / left
                found = race(plan, rows, size, until, end + GRACE)
                results[plan.mix]["sizes"][str(size)] = found
                left -= 1
                write_result("dropin", record, out)
    return record


def race(plan: Plan, rows: Path, size: int, until: float, latest: float) -> dict:
    """{"stock", "patched": numbers} or {"failed", "why"}, by turns of which none begins after `until`
    but the first."""
    job = {"model": plan.model, "rows": str(rows), "device": plan.device, "tiny": plan.tiny}
    job |= {"learning_rate": plan.learning_rate, "options": {"batch_size": size, "best": True}}
    patience = lambda: max(1.0, latest - time.monotonic())
    environment = KEEP_MEMORY if plan.device == "cpu" else {}
    answers: dict[str, list[dict]] = {name: [] for name in MODULES}
    with Workers(rows.parent) as workers:
        racing = {
            name: workers.get(f"{name} {size}", module, environment) for name, module in MODULES.items()
        }
        try:
            for name, worker in racing.items():
                at = name
                worker.prepare(job, patience())
            for turn in range(1 + plan.turns):  # the first one is warm, and not timed
                began = time.monotonic()
                for name, worker in racing.items():
                    at = name
                    answers[name].append(worker.steps(plan.measured, patience()))
                if turn and 2 * time.monotonic() - began > until:
                    break
        except WorkerFailed as failed:
            return {"failed": failed.kind, "why": f"{at}: {failed.why}"}
    out = {name: told(answer, plan) for name, answer in answers.items()}
    return disagreement(out, plan) or out


def told(answers: list[dict], plan: Plan) -> dict:
    """Of one contender's answers, the first one its warm steps."""
    seconds = [step["seconds"] for answer in answers[1:] for step in answer["steps"]]
    low, high = np.quantile(seconds, (0.25, 0.75)).tolist()
    return {
        "seconds": seconds,
        "pairs_per_second": plan.pairs / statistics.median(seconds),
        "quartiles": [plan.pairs / high, plan.pairs / low],
        "peak_bytes": max(answer["peak_bytes"] for answer in answers),
        "losses": [step["loss"] for answer in answers for step in answer["steps"]],
    }


def disagreement(of: dict[str, dict], plan: Plan) -> dict | None:
    """A failure, where stock and patched do not have the same losses."""
    for number, (stock, patched) in enumerate(zip(of["stock"]["losses"], of["patched"]["losses"]), 1):
        if not abs(stock - patched) <= TOLERANCE[plan.device]:
            why = f"loss {stock:.5f} of stock TRL in step {number}, {patched:.5f} patched"
            return {"failed": "disagrees", "why": why}
    return None


def table(record: dict) -> Table:
    """A line a mix and batch size."""
    out = Table("mix", "batch", "pairs/s stock", "patched", "times", "peak GB stock", "patched", "of stock")
    for mix, found in record["results"].items():
        for size, of in found["sizes"].items():
            if "failed" in of:
                out.add_row(mix, size, of["failed"], of["why"])
                continue
            stock, patched = of["stock"], of["patched"]
            rates = [r["pairs_per_second"] for r in (stock, patched)]
            peaks = [r["peak_bytes"] / 1e9 for r in (stock, patched)]
            cells = [*(f"{rate:.3g}" for rate in rates), f"{rates[1] / rates[0]:.2f}x"]
            cells += [*(f"{peak:.2f}" for peak in peaks), f"{peaks[1] / peaks[0]:.2f}x"]
            out.add_row(mix, size, *cells)
    return out


def complete(record: dict) -> bool:
    return not any("failed" in of for found in record["results"].values() for of in found["sizes"].values())


def main() -> int:
    """Measures, prints, writes; 1 where something has no numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=CPU.minutes, help="begin no turn after these")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the JSON")
    parser.add_argument("--smoke", action="store_true", help="a tiny model: shows that all of it runs")
    args = parser.parse_args()
    plan = replace(CPU, minutes=args.minutes)
    if args.smoke:
        plan = replace(plan, tiny=True, turns=2, learning_rate=1e-3)
    record = measure([plan], CPU_SIZES, args.out)
    Console(width=120).print(table(record))
    return int(not complete(record))


if __name__ == "__main__":
    sys.exit(main())
