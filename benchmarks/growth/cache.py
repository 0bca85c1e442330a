"""The reference cache: its file's size, how fast it is read and looked up, and what a fill pays for it.

    python -m benchmarks.growth.cache [--pairs 100000] [--forward-pairs 100] [--out DIR]

The rows are random ids with the lengths of two well-known data sets. Size, load and lookup are measured
on all of them, with random numbers in place of log-probs, since what a value is does not matter there;
the fill's overhead beside the real forward of a small model (vocabulary 49,152, hidden 256, 4 layers).
A GPU's forward is faster, so the table also says from how many tokens/s on the same work would be 3 % of
it, measured on all pairs. Everything in a fill but pack() and the forward counts as overhead: hashing
weights and rows, cutting packs, the look-ups, the commits and the progress bar.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.results import RESULTS, write_result
from fastdpo.model.policy import Policy
from fastdpo.records import Pair, PreferenceGroup, Response
from fastdpo.reference import fill as ref_fill

VOCAB, STEP_PAIRS, MAX_TOKENS, MAX_LENGTH = 49_152, 64, 8192, 1024
# name -> (median prompt, median response) in tokens; both log-normal with sigma 0.8, cut at MAX_LENGTH
LENGTHS = {"hh-rlhf": (110, 50), "ultrafeedback": (110, 280)}
LIMITS = {"size_over_raw": 1.3, "lookup_ms": 5.0, "overhead": 0.03}


def make_groups(n: int, name: str) -> list[PreferenceGroup]:
    """Plain pairs of random ids."""
    draw = np.random.default_rng(0)
    length = lambda median, most: int(min(most, max(1, draw.lognormal(np.log(median), 0.8))))
    median_prompt, median_response = LENGTHS[name]
    groups = []
    for row in range(n):
        prompt = draw.integers(0, VOCAB, length(median_prompt, MAX_LENGTH // 2))
        sizes = [length(median_response, MAX_LENGTH - len(prompt)) for _ in range(2)]
        responses = tuple(Response(draw.integers(0, VOCAB, size), np.ones(size, bool)) for size in sizes)
        groups.append(PreferenceGroup(row, prompt, responses, (Pair(0, 1),)))
    return groups


def make_policy() -> Policy:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    policy = Policy(Qwen2ForCausalLM(config), torch.float32)
    policy.set_sharing(True)
    return policy


def load(policy: Policy, groups, path: Path):
    console = Console(stderr=True)
    return ref_fill.load_reference(
        policy, [groups], path=path, fresh_lora=False, max_tokens=MAX_TOKENS, console=console
    )


def fill(policy: Policy, groups, path: Path) -> dict:
    """A fill's time in pack() and the forward, and beside them."""
    computed, forward = ref_fill._computed, []

    def timed(*args):
        start = time.perf_counter()
        out = computed(*args)
        forward.append(time.perf_counter() - start)
        return out

    ref_fill._computed = timed
    start = time.perf_counter()
    account = load(policy, groups, path).account
    beside = time.perf_counter() - start - sum(forward)
    ref_fill._computed = computed
    return {
        "pairs": len(groups),
        "packs": account["packs"],
        "tokens": account["tokens"],
        "forward_seconds": sum(forward),
        "beside_seconds": beside,
        "overhead": beside / sum(forward),
        "tokens_per_second_at_3_percent": 0.03 * account["tokens"] / beside,
    }


def stored_and_found(policy: Policy, groups, path: Path) -> dict:
    """File size, the time of a run that finds everything, and of the look-up of a step's rows."""
    raw = sum(4 * group.scored_tokens for group in groups)
    real, policy.token_logp = policy.token_logp, lambda batch: -torch.rand(len(batch.target))
    filled = fill(policy, groups, path)
    policy.token_logp = real
    start = time.perf_counter()
    table = load(policy, groups, path)
    found = time.perf_counter() - start
    assert table.account["misses"] == 0
    order, seconds = np.random.default_rng(1).permutation(len(groups)), []
    for first in range(0, min(len(groups), 200 * STEP_PAIRS), STEP_PAIRS):
        step = [groups[i] for i in order[first : first + STEP_PAIRS]]
        start = time.perf_counter()
        table.of(step)
        seconds.append(time.perf_counter() - start)
    return {
        "pairs": len(groups),
        "raw_mb": raw / 1e6,
        "file_mb": path.stat().st_size / 1e6,
        "size_over_raw": path.stat().st_size / raw,
        "fill": filled,
        "load_seconds": found,
        "lookup_ms": 1e3 * statistics.median(seconds),
        "lookup_ms_slowest": 1e3 * max(seconds),
    }


def print_table(results: dict) -> None:
    table = Table(title="The reference cache")
    for column in ("", *LENGTHS, "limit"):
        table.add_column(column, justify="left" if not column else "right")
    rows = {
        "pairs": ("stored", "pairs", "{:,}"),
        "raw fp32, MB": ("stored", "raw_mb", "{:.1f}"),
        "file, MB": ("stored", "file_mb", "{:.1f}"),
        "file over raw": ("stored", "size_over_raw", "{:.3f}"),
        "a run that finds everything, s": ("stored", "load_seconds", "{:.1f}"),
        f"look-up of {STEP_PAIRS} pairs, ms": ("stored", "lookup_ms", "{:.2f}"),
        "... the slowest, ms": ("stored", "lookup_ms_slowest", "{:.2f}"),
        "fill: pairs with a real forward": ("fill", "pairs", "{:,}"),
        "fill: forward, s": ("fill", "forward_seconds", "{:.1f}"),
        "fill: beside the forward": ("fill", "overhead", "{:.2%}"),
        "fill: beside it, of all pairs, s": ("fill of all", "beside_seconds", "{:.1f}"),
        "fill: 3 % of a forward at tokens/s": ("fill of all", "tokens_per_second_at_3_percent", "{:,.0f}"),
    }
    for what, (part, key, form) in rows.items():
        limit = form.format(LIMITS[key]) if key in LIMITS else ""
        table.add_row(what, *(form.format(results[name][part][key]) for name in LENGTHS), limit)
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--forward-pairs", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the JSON")
    args = parser.parse_args()
    policy, results = make_policy(), {}
    with tempfile.TemporaryDirectory() as folder:
        for name in LENGTHS:
            groups = make_groups(args.pairs, name)
            results[name] = {
                "fill": fill(policy, groups[: args.forward_pairs], Path(folder, f"{name}.fill")),
                "stored": stored_and_found(policy, groups, Path(folder, f"{name}.sqlite")),
            }
            results[name]["fill of all"] = results[name]["stored"].pop("fill")
    print_table(results)
    write_result("cache", {"limits": LIMITS, "results": results}, args.out)


if __name__ == "__main__":
    main()
