"""fastdpo's training step, measured as `trl_dpo` measures TRL's: same rows, same arguments, same JSON.

    python -m benchmarks.peers.ours --model DIR --tokenizer DIR --rows FILE.jsonl \\
        --batch-size 8 --steps 4 --out result.json
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console
from transformers import AutoTokenizer

from benchmarks.process import peak_bytes, restart_peak, versions
from fastdpo.config import Config
from fastdpo.groups import Limits, load_groups
from fastdpo.metrics import Window
from fastdpo.model import load_policy
from fastdpo.ref_fill import load_reference
from fastdpo.stage import Stage, make_optimizer, step_groups
from fastdpo.support import prepare


def measure(args: argparse.Namespace) -> dict:
    """One warm-up step and args.steps timed ones, over the first args.num_rows rows."""
    console = Console(stderr=True)
    config = Config(
        model=str(args.model),
        data=f"{args.rows}#train[:{args.num_rows}]",
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        max_length=args.max_length,
        max_tokens=args.max_tokens,
        max_steps=args.steps + 1,
        dtype="fp32",
    )
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    limits = Limits(config.max_length)
    groups, report = load_groups(config.data, tokenizer, limits, strict=True, console=console)
    policy = load_policy(config, console)
    prepare(policy, groups, console)
    stage = Stage(config, policy, groups, [])
    steps = list(step_groups(stage.groups, config, config.max_steps))
    options = dict(path=None, fresh_lora=False, max_tokens=config.max_tokens, console=console)
    stage.reference = load_reference(policy, [stage.used_groups()], **options)  # once, as the peer does
    optimizer, schedule = make_optimizer(policy, config, config.max_steps)
    before = restart_peak()
    seconds, losses = [], []
    for i, step in enumerate(steps, 1):
        start, window = time.perf_counter(), Window()
        stage.step(step, window, i)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        seconds.append(time.perf_counter() - start)
        losses.append(window.sums.means()["loss"])
    pairs = sum(len(g.pairs) for g in steps[1])
    return {
        "pairs_per_second": pairs / statistics.median(seconds[1:]),
        **peak_bytes(),
        "bytes_before_training": before,
        "seconds": seconds,
        "losses": losses,
        "tokens": {"input": report.shared_tokens, "scored": report.scored_tokens},
        "settings": {"max_tokens": config.max_tokens, "threads": torch.get_num_threads()},
        "head": policy.head_plan(list(stage.microbatches(steps[0]))),
        "versions": versions(),
    }


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("--model", "--tokenizer", "--rows", "--out"):
        parser.add_argument(name, type=Path, required=True)
    numbers = {"--batch-size": 8, "--steps": 4, "--num-rows": 16, "--max-tokens": 8192}
    numbers |= {"--max-length": 1024, "--learning-rate": 1e-5, "--threads": os.cpu_count()}
    for name, default in numbers.items():
        parser.add_argument(name, type=type(default), default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.write_text(json.dumps(measure(args), indent=1) + "\n")


if __name__ == "__main__":
    main()
