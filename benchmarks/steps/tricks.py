"""What each trick that saves memory costs in speed: our own steps with one key after another.

All start from the same shapes and rows, take turns (race.py), and are told beside the plain run of
the same turns: weights in fp32 under autocast, all of them trained by torch's AdamW, nothing recomputed. Who
has paged optimizer states runs alone.
"""

import json
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, replace

import torch

from benchmarks.flops import USEFUL
from benchmarks.results import result_of_today, write_result
from benchmarks.steps.contenders import OURS
from benchmarks.steps.race import Contender
from benchmarks.steps.steps import Plan, even_steps, measure_steps, pool_of, rows_of_steps
from benchmarks.workers import WorkerFailed, Workers

PLAIN = "none"
LORA = {"lora_rank": 16}
OFFLOAD, RECOMPUTE = {"activation_offloading": True}, {"gradient_checkpointing": True}
TRICKS = {
    PLAIN: {},
    "gradient_checkpointing": RECOMPUTE,
    "activation_offloading": OFFLOAD,
    "gradient_checkpointing, activation_offloading": RECOMPUTE | OFFLOAD,
    "lora_rank: 16": LORA,
    "lora_rank: 16, load_in_4bit": LORA | {"load_in_4bit": True},
    "optimizer_in_backward": {"optimizer_in_backward": True, "max_grad_norm": 0.0},
    "pure_bf16": {"pure_bf16": True},
    "optim: paged_adamw_8bit": {"optim": "paged_adamw_8bit"},
    "offload_optimizer": {"offload_optimizer": True},
    "gradient_checkpointing: selective": {"gradient_checkpointing": "selective"},
    "gradient_checkpointing: 2": {"gradient_checkpointing": 2},
    "optim: adamw_8bit": {"optim": "adamw_8bit"},
    "tiled_mlp": {"tiled_mlp": True},
    "head_memory: 64MiB": {"head_memory": "64MiB"},
    "lora_rank: 16, use_dora": LORA | {"use_dora": True},
}
# So small a rate that weights of any precision keep the same loss, log 2 within the tolerance: a check that
# nothing is broken, and no more.
GPU = Plan(
    *("Llama-3.2-1B", "UltraFeedback", "cuda"),
    pairs=16,
    turns=3,
    measured=2,
    minutes=0,
    warm=1,
    checks=2,
    distinct=2,
    learning_rate=1e-7,
)
MAX_TOKENS = 8192  # fastdpo's default
HIDDEN_MINUTES = 1.0  # for the profiles at the end
BESIDE_PLAIN = {"speed": "pairs_per_second", "memory": "peak_gb"}


def is_paged(name: str) -> bool:
    return TRICKS[name].get("optim", "").startswith("paged_")


def contender(name: str, max_tokens: int) -> Contender:
    return Contender(name, OURS, {"max_tokens": max_tokens, "keys": TRICKS[name]}, USEFUL)


def row_of(measured: dict) -> dict:
    """Of a contender's numbers (steps.told) what the table needs, beside the plain run's."""
    if "pairs_per_second" not in measured:
        return {name: measured[name] for name in ("state", "why")}
    kept = ("pairs_per_second", "quartiles", "peak_gb", "process_peak_gb", "paged_gb", "interleaved")
    beside = {
        "speed": 1 / measured["fastdpo_times_faster"],  # Race's first contender is the plain run
        "memory": 1 / measured["fastdpo_memory_ratio"],
    }
    return {name: measured[name] for name in kept} | beside


def hidden(name: str, plan: Plan, max_tokens: int, workers: Workers) -> dict | None:
    """The copies of one step to and from the host: {"seconds", "hidden"}. None without a GPU, or where it
    fails."""
    rows = rows_of_steps(even_steps(pool_of(plan), plan.pairs, 1), plan.bench_model.vocab, 0)
    own = contender(name, max_tokens)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(json.dumps(rows))
        file.flush()
        job = {"model": plan.model, "rows": file.name, "device": plan.device, "tiny": plan.tiny}
        job |= {"learning_rate": plan.learning_rate, "options": own.options}
        worker = workers.get(name, own.module, own.environment)
        try:
            worker.prepare(job)
            worker.steps(1)
            trace = worker.profile()["trace"]
            worker.end()
        except WorkerFailed as failed:
            print(f"  no profile of {name}: {failed.why}")
            return None
    return trace["host_copies"]


def apart(name: str, max_tokens: int) -> Contender:
    """A contender with paged states, managed memory that CUDA's allocator does not know: more of it than is
    free can hang a GPU. So it has the GPU for itself, and leaves a fifth of that."""
    most = int(0.8 * torch.cuda.get_device_properties(0).total_memory)
    limit = {"BENCH_PEER": OURS, "BENCH_BYTES": str(most), "BENCH_DEVICE": "cuda"}
    return replace(contender(name, max_tokens), module="benchmarks.memory.limited", environment=limit)


def measure_apart(
    name: str, plan: Plan, max_tokens: int, workers: Workers, plain: dict, keep: Callable[[dict], None]
) -> None:
    """Tells keep(row) of a trick whose states are paged, beside the `plain` row of earlier turns."""
    if "pairs_per_second" not in plain:
        keep({"state": "time", "why": "the plain run has no numbers"})
        return
    workers.stop()  # who waits keeps memory

    def tell(record: dict) -> None:
        row = row_of(record["summary"][name])
        if "pairs_per_second" in row:
            row |= {of: row[key] / plain[key] for of, key in BESIDE_PLAIN.items()} | {"interleaved": False}
        keep(row)

    try:
        tell(measure_steps(plan, [apart(name, max_tokens)], 1.0, workers, tell))
    except WorkerFailed as failed:
        keep({"state": failed.kind, "why": failed.why})
    workers.stop()  # and with it what bitsandbytes keeps


def run(plan: Plan, names: tuple[str, ...], max_tokens: int, args: Namespace, workers: Workers) -> None:
    """Who has no numbers of today and this commit yet, beside the plain run; then the copies' profiles."""
    earlier = result_of_today("tricks", args.out) or {"rows": {}}
    done = {name: row for name, row in earlier["rows"].items() if "pairs_per_second" in row}
    old = set(done) - {PLAIN}
    alone = [name for name in names if name not in old and is_paged(name)]
    beside = [name for name in names if name not in old and name != PLAIN and not is_paged(name)]
    minutes = max(0.5, args.minutes - HIDDEN_MINUTES) / max(1, len(alone) + len(beside) + 1)
    plan_of = lambda n: replace(plan, minutes=n * minutes)

    def write(quiet: bool = True) -> None:
        told = {"plan": asdict(plan), "max_tokens": max_tokens, "tricks": TRICKS}
        rows = {name: done[name] for name in TRICKS if name in done}
        write_result("tricks", told | {"rows": rows}, args.out, quiet)

    def keep(rows: dict[str, dict]) -> None:
        done.update(rows)
        write()

    def keep_race(record: dict) -> None:
        keep({name: row_of(numbers) for name, numbers in record["summary"].items()})

    if beside or PLAIN not in done:
        race = [contender(name, max_tokens) for name in (PLAIN, *beside)]
        try:
            keep_race(measure_steps(plan_of(len(race)), race, 1.0, workers, keep_race))
        except WorkerFailed as failed:  # the plain run, which the others are beside
            keep({PLAIN: {"state": failed.kind, "why": failed.why}})
    for name in alone:
        tell = lambda row, name=name: keep({name: row})
        measure_apart(name, plan_of(1), max_tokens, workers, done[PLAIN], tell)
    for name, row in done.items():
        if TRICKS[name].get("activation_offloading") and "pairs_per_second" in row and "hidden" not in row:
            copies = hidden(name, plan, max_tokens, workers)
            row |= {"host_copies": copies, "hidden": copies and copies["hidden"]}
            write()
    write(quiet=False)
