"""Stage `steps`: fastdpo's training steps on a GPU, with shared prompts and with separate rows.

Random weights in the shape of Qwen2.5-0.5B, lengths drawn around the published medians of HH-RLHF
(prompt 127, response 59 tokens; Wang and Hegde 2024, table 1). The peers' side is not written yet.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.process import provenance
from fastdpo import support
from fastdpo.config import Config
from fastdpo.metrics import Window
from fastdpo.model import Policy
from fastdpo.records import Pair, PreferenceGroup, Response
from fastdpo.ref_fill import load_reference
from fastdpo.stage import Stage, make_optimizer, step_groups

QWEN_05B = dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24)
QWEN_05B |= dict(num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True)


def make_groups(n: int, vocab: int) -> list[PreferenceGroup]:
    """Pairs of random tokens with log-normal lengths."""
    draw = np.random.default_rng(0)
    length = lambda median: max(4, int(draw.lognormal(np.log(median), 0.6)))

    def response():
        ids = draw.integers(10, vocab, length(59))
        return Response(ids, np.ones(len(ids), bool))

    return [
        PreferenceGroup(i, draw.integers(10, vocab, length(127)), (response(), response()), (Pair(0, 1),))
        for i in range(n)
    ]


def measure(stage: Stage, steps: list) -> dict:
    """Seconds of each step after the first two, and the peak of the allocator."""
    optimizer, _ = make_optimizer(stage.policy, stage.config, len(steps))
    cuda = torch.cuda.is_available()
    seconds = []
    for i, step in enumerate(steps, 1):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        stage.step(step, Window(), i)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    pairs = sum(len(g.pairs) for g in steps[0])
    peak = torch.cuda.max_memory_allocated() if cuda else None
    return {
        "pairs_per_second": pairs / statistics.median(seconds[2:]),
        "seconds": seconds,
        "peak_bytes": peak,
    }


def main() -> None:
    """Shared and separate rows in one process, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="a tiny model, nothing written")
    args = parser.parse_args()
    size = dict(QWEN_05B, vocab_size=151_936)
    if args.dry_run:
        size = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=1000)
        size |= dict(num_attention_heads=2, num_key_value_heads=1)
    steps, batch = (3, 4) if args.dry_run else (12, 64)
    groups = make_groups(steps * batch, size["vocab_size"])
    config = Config(model="random", data="random", batch_size=batch, max_tokens=16384)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = {}
    for name in ("shared prompts", "separate rows"):
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        policy = Policy(Qwen2ForCausalLM(Qwen2Config(**size)).to(device).train(), dtype)
        if name == "shared prompts":
            support.prepare(policy, groups, Console())
            assert policy.share
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        stage = Stage(config, policy, groups, [])
        options = dict(path=None, fresh_lora=False, max_tokens=config.max_tokens, console=Console())
        stage.reference = load_reference(policy, [groups], **options)
        results[name] = measure(stage, list(step_groups(stage.groups, config, steps)))
        print(name, results[name])
        del stage, policy
    if not args.dry_run:
        gate = args.out.parent / "gpu_gate.json"
        green = json.loads(gate.read_text())["passed"] if gate.exists() else None
        record = {"gate_passed": green, "results": results} | provenance()
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
