"""How cost grows: with tokens a microbatch, the vocabulary, responses a prompt, and pairs in the cache.

    python -m benchmarks.growth.run [--small] [--out DIR]     gpu/growth.py is the same on a GPU

Every series keeps all sizes but one. Each point is the median of a few turns, its peak memory beside it; a
line's slope is the power k of the fit y = c x^k: 1 is proportional. --small: sizes for a CPU in a minute.
"""

import argparse
import gc
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from benchmarks.attention.run import microbatch
from benchmarks.figures import Line, loglog, slope
from benchmarks.growth import cache
from benchmarks.head import our_heads
from benchmarks.head.inputs import BETA, Inputs, Shape
from benchmarks.head.other_heads import torch_logits
from benchmarks.head.run import once, peak_of, timed
from benchmarks.inputs import FIRST_ID, groups_of, random_rows
from benchmarks.models import MODELS, BenchModel, build, tiny
from benchmarks.results import RESULTS, result_path, write_result
from fastdpo.data.packing import pack
from fastdpo.model.loading import resolve_dtype
from fastdpo.model.policy import Policy
from fastdpo.records import Pair, PreferenceGroup, Response, ResponseLogps


@dataclass(frozen=True)
class Sizes:
    """What the series run over, and what they hold fixed."""

    model: BenchModel
    tokens: Sequence[int]
    mix: str
    head: tuple[int, int, int]  # scored rows, hidden, rows a response
    budget: int | None  # bytes that the head may hold; see fastdpo_kernels.plan
    vocabularies: Sequence[int]
    responses: Sequence[int]  # a prompt
    group: tuple[int, int, int]  # groups, prompt tokens, tokens a response
    pairs: Sequence[int]
    turns: int


GPU = Sizes(
    model=MODELS["Qwen2.5-0.5B"],
    tokens=tuple(1024 << i for i in range(7)),
    mix="HH-RLHF",
    head=(8192, 2048, 256),
    budget=None,
    vocabularies=(32_768, 65_536, 131_072, 262_144),
    responses=(2, 4, 8, 16),
    group=(4, 512, 128),
    pairs=(1000, 10_000, 100_000),
    turns=5,
)
SMALL = Sizes(
    model=tiny(MODELS["CPU"]),
    tokens=(512, 1024, 2048, 4096),
    mix="HH-RLHF",
    head=(256, 128, 32),
    budget=8 << 20,
    vocabularies=(8192, 16_384, 32_768),
    responses=(2, 4, 8, 16),
    group=(2, 128, 32),
    pairs=(1000, 3000, 10_000),
    turns=3,
)
DRY = Sizes(
    model=tiny(MODELS["CPU"]),
    tokens=(64, 512),
    mix="HH-RLHF",
    head=(16, 8, 4),
    budget=1 << 20,
    vocabularies=(64, 128),
    responses=(2, 3),
    group=(1, 8, 4),
    pairs=(4, 8),
    turns=1,
)


@dataclass(frozen=True)
class Point:
    """One line's next measurement."""

    line: str
    x: int
    call: Callable[[], object]


def make_policy(model: BenchModel, device: str) -> Policy:
    """As it trains: fp32 weights, the compute dtype by autocast, layers recomputed in the backward."""
    built = build(model, device, torch.float32).train()
    built.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(built, resolve_dtype("auto"))
    policy.set_sharing(True)
    return policy


def step(policy: Policy, batch) -> None:
    """Forward and backward of a microbatch, with DPO's loss against a reference of zeros."""
    logp = ResponseLogps.of(batch, policy.token_logp(batch)).logp
    winner, loser = batch.pairs.T
    (-F.logsigmoid(BETA * (logp[winner] - logp[loser])).mean()).backward()
    policy.model.zero_grad(set_to_none=True)  # at the end: the peak of the next call then has them in it


def over_tokens(sizes: Sizes, device: str) -> Iterator[Point]:
    """Microbatches of more and more pairs of a length mix. The peak has all gradients in it."""
    policy = make_policy(sizes.model, device)
    for tokens in sizes.tokens:
        rows = random_rows(microbatch(sizes.mix, tokens), sizes.model.vocab)
        batch = pack(groups_of(rows)).to(device)
        yield Point("forward and backward", batch.input_tokens, lambda b=batch: step(policy, b))


def over_vocabularies(sizes: Sizes, device: str) -> Iterator[Point]:
    """The lm_head alone, trained: fastdpo's and plain torch's."""
    M, D, response = sizes.head
    dtype = resolve_dtype("auto")
    for V in sizes.vocabularies:
        inputs = Inputs.make(Shape(M, D, V, response, budget=sizes.budget), dtype, device)
        ours, _ = our_heads.CONTENDERS["linear_logp"]
        for line, run in (("linear_logp", ours), ("torch", torch_logits(inputs))):
            yield Point(line, V, lambda run=run, i=inputs: once(run, i.leaves("trained"), "trained"))


def wide_group(row: int, n: int, prompt: int, length: int, vocab: int) -> PreferenceGroup:
    """One prompt and n responses of random tokens, the first of which beats the others."""
    draw = np.random.Generator(np.random.PCG64([row, n]))
    ids = lambda size: draw.integers(FIRST_ID, vocab, size)
    responses = tuple(Response(ids(length), np.ones(length, bool)) for _ in range(n))
    return PreferenceGroup(row, ids(prompt), responses, tuple(Pair(0, i) for i in range(1, n)))


def over_responses(sizes: Sizes, device: str) -> Iterator[Point]:
    """More responses a prompt, computed once or once for each response."""
    policy = make_policy(sizes.model, device)
    count, prompt, length = sizes.group
    for n in sizes.responses:
        groups = [wide_group(row, n, prompt, length, sizes.model.vocab) for row in range(count)]
        for line, share in (("shared prompt", True), ("separate rows", False)):
            policy.set_sharing(share)
            batch = pack(groups, share).to(device)
            yield Point(line, n, lambda b=batch: step(policy, b))


SERIES = {
    "tokens": ("tokens a microbatch", over_tokens),
    "vocabulary": ("vocabulary", over_vocabularies),
    "responses": ("responses a prompt", over_responses),
}


def measure(points: Iterator[Point], turns: int, over: Callable[[], bool]) -> tuple[dict, list[str]]:
    """({line: [{"x", "seconds", "peak_bytes"} or {"x", "failed"}]}, what there was no time for)."""
    lines, left = {}, []
    for point in points:
        rows = lines.setdefault(point.line, [])
        if over():
            left.append(f"{point.line}, {point.x}")
            continue
        try:
            point.call()  # warm-up
            peak = peak_of(point.call)
            seconds = statistics.median(timed(point.call) for _ in range(turns))
            rows.append({"x": point.x, "seconds": seconds, "peak_bytes": peak})
        except torch.OutOfMemoryError:
            rows.append({"x": point.x, "failed": "out of memory"})
        gc.collect()
        print(point.line, rows[-1], flush=True)
    return lines, left


def over_pairs(sizes: Sizes, over: Callable[[], bool]) -> tuple[dict, list[str]]:
    """The reference cache: a fill beside its forward, a run that finds all, a step's look-up; bytes of
    the file in place of a peak."""
    policy, lines, left = cache.make_policy(), {}, []
    with tempfile.TemporaryDirectory() as folder:
        for pairs in sizes.pairs:
            if over():
                left.append(f"cache, {pairs}")
                continue
            groups = cache.make_groups(pairs, "hh-rlhf")
            found = cache.stored_and_found(policy, groups, Path(folder, f"{pairs}.sqlite"))
            times = {
                "fill, beside the forward": found["fill"]["beside_seconds"],
                "a run that finds all": found["load_seconds"],
                f"look-up of {cache.STEP_PAIRS} pairs": found["lookup_ms"] / 1e3,
            }
            for line, seconds in times.items():
                row = {"x": pairs, "seconds": seconds, "file_bytes": round(found["file_mb"] * 1e6)}
                lines.setdefault(line, []).append(row)
            print("cache", pairs, times, flush=True)
    return lines, left


def slopes(rows: list[dict]) -> dict[str, float]:
    """The fitted power of each measured column, where there are two points."""
    done = [row for row in rows if "seconds" in row]
    columns = [key for key in (done[0] if len(done) > 1 else ()) if key != "x"]
    return {key: slope([r["x"] for r in done], [r[key] for r in done]) for key in columns}


def run(sizes: Sizes, minutes: float, out: Path) -> Path:
    """All series while there is time, a table, a figure each, and one JSON."""
    started, series, left = time.perf_counter(), {}, []
    over = lambda: time.perf_counter() - started > 60 * minutes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    record = {"model": sizes.model.name, "mix": sizes.mix, "head": sizes.head, "group": sizes.group}
    record |= {"series": series, "no_time_for": left}

    def add(name: str, label: str, lines: dict) -> Path:
        """Takes a series over and writes it down: what is measured stays, whatever comes next."""
        powers = {line: slopes(rows) for line, rows in lines.items()}
        series[name] = {"x": label, "lines": lines, "slopes": powers}
        return write_result("growth", record, out)

    for name, (label, points) in SERIES.items():
        lines, missed = measure(points(sizes, device), sizes.turns, over)
        left += [f"{name}: {what}" for what in missed]
        add(name, label, lines)
        gc.collect()
    lines, missed = over_pairs(sizes, over)
    left += missed
    path = add("cache", "pairs in the cache", lines)
    print_table(series, Console(width=130))
    draw_figures(series, out)
    return path


def draw_figures(series: dict, out: Path) -> None:
    """Seconds and peak bytes of each series over its size."""
    stem = result_path("growth", out).stem
    labels = {"seconds": "seconds", "peak_bytes": "peak bytes"}
    for (name, found), (column, label) in itertools.product(series.items(), labels.items()):
        drawn = {
            line: [(row["x"], row[column]) for row in rows if column in row]
            for line, rows in found["lines"].items()
        }
        drawn = [Line(line, *zip(*points)) for line, points in drawn.items() if len(points) > 1]
        if drawn:
            title = f"How {label} grow with {found['x']}"
            loglog(f"{stem}_{name}_{column}", title, found["x"], label, drawn, out)


def print_table(series: dict, console: Console) -> None:
    """From the first to the last point of each line, and the slopes."""
    table = Table(title="How cost grows (slope 1: in proportion)")
    for column in ("", "line", "from", "to", "seconds", "slope", "peak MB", "slope"):
        table.add_column(column, justify="left" if column in ("", "line") else "right")
    for found in series.values():
        for line, rows in found["lines"].items():
            done, power = [row for row in rows if "seconds" in row], found["slopes"][line]
            if not done:
                continue
            ends = (done[0], done[-1])
            span = lambda key, form, ends=ends: " to ".join(form(end[key]) for end in ends if key in end)
            show = lambda key, power=power: f"{power[key]:.2f}" if key in power else ""
            cells = [f"{end['x']:,}" for end in ends] + [span("seconds", "{:.4f}".format), show("seconds")]
            peaks = span("peak_bytes", lambda n: f"{n / 1e6:.1f}")
            table.add_row(found["x"], line, *cells, peaks, show("peak_bytes"))
    console.print(table)


def main() -> None:
    """On whatever is here."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="what a CPU does in a minute")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the JSON and plots/")
    args = parser.parse_args()
    if not (args.small or torch.cuda.is_available()):
        parser.error("no GPU here: --small has sizes for a CPU")
    run(SMALL if args.small else GPU, minutes=7.5, out=args.out)


if __name__ == "__main__":
    main()
