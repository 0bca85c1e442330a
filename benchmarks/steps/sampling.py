"""How long a round's samples take by each engine, call by call, and how many tokens a second that is.

The model has random weights and no token ends an answer, so each has as many tokens as it may. vLLM is not
among the wheels that are carried: where it is not installed that is said in its place.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from benchmarks.inputs import sampled_rows
from benchmarks.lengths import draw_samples
from benchmarks.steps.rounds import MOST, RESPONSES
from benchmarks.steps.steps import Plan
from benchmarks.workers import Worker, WorkerFailed, Workers

MODULE = "benchmarks.peers.sampling"
ENGINES = ("transformers", "vllm")
ASKED = 180  # seconds
GRACE = 20  # seconds that the last call may come after the time is over


def measure_sampling(
    plan: Plan, workers: Workers, keep: Callable[[dict], None] = lambda record: None, most: int = MOST
) -> dict:
    """{"plan", "sample", "asked_seconds", "summary": {engine: numbers}} of plan.pairs prompts, RESPONSES
    answers each, of `most` tokens."""
    end = time.monotonic() + 60 * plan.minutes
    shape = {"prompts": plan.pairs, "responses": RESPONSES, "max_new_tokens": most}
    record = {"plan": asdict(plan), "sample": shape, "asked_seconds": ASKED, "summary": {}}
    lengths = draw_samples(plan.mix, plan.pairs, RESPONSES, most)
    if plan.tiny:
        lengths = [tuple(max(2, n // 10) for n in row) for row in lengths]
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        rows.write_text(json.dumps([sampled_rows(lengths, plan.bench_model.vocab)]))
        job = {"model": plan.model, "rows": str(rows), "device": plan.device, "tiny": plan.tiny}
        for engine in ENGINES:
            worker = workers.get(f"sampling {engine}", MODULE, {})
            options = {"sample": shape | {"engine": engine}}
            tell = lambda told, engine=engine: keep(record | {"summary": record["summary"] | {engine: told}})
            record["summary"][engine] = sampled(
                worker, job | {"learning_rate": 0.0, "options": options}, shape, end, tell
            )
            if worker.alive:
                worker.end()
            keep(record)
            print(f"  {engine}: {said(record['summary'][engine])}", flush=True)
    return record


def said(told: dict) -> str:
    """One engine's numbers, or why there are none."""
    rate = f"{told['tokens_per_second']:,.0f} tokens a second" if told["seconds"] else "no tokens"
    why = f"{told['state']}: {told['why']}; " if told["why"] else ""
    return f"{why}{told['prompts']} prompts in {sum(told['seconds']):.1f} s, {rate}"


def sampled(worker: Worker, job: dict, shape: dict, end: float, tell: Callable[[dict], None]) -> dict:
    """One engine's calls until all prompts have their answers, or the time is over."""
    left = lambda: max(1.0, end + GRACE - time.monotonic())
    told = {"state": "time", "why": "no time for all prompts", "seconds": [], "prompts": 0, "tokens": 0}
    try:
        told["facts"] = worker.prepare(job, left())["facts"]
        while told["prompts"] < shape["prompts"] and time.monotonic() < end:
            answer = worker.steps(1, left())
            (call,) = answer["steps"]
            told["seconds"].append(call["seconds"])
            told["prompts"] += call["prompts"]
            told["tokens"] += int(call["loss"])
            told["peak_gb"] = answer["peak_bytes"] / 1e9
            told["tokens_per_second"] = told["tokens"] / sum(told["seconds"])
            tell(told)
    except WorkerFailed as failed:
        return told | {"state": failed.kind, "why": failed.why}
    if told["prompts"] < shape["prompts"]:
        return told
    return told | {"state": "measured", "why": None, "round_seconds": sum(told["seconds"])}
