"""Whole training steps on this CPU: fastdpo and TRL, the same model, rows and pairs a step.

    python -m benchmarks.bench_cpu [--rounds 2] [--steps 2] [--out FILE.json]

Each contender runs in a process of its own, in the order A B C A B C, with its reference precomputed.
TRL 1.16 on a CPU scores prompt and padding rows too; on a GPU it does not, so this is no GPU number.
The model is Qwen2-shaped with random weights (vocabulary 151,936, hidden 256, 4 layers): at DPO's
lengths nearly all of its step is the lm_head, as in small models with large vocabularies.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from benchmarks.process import provenance

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared/data"
PAIRS = 8  # an optimizer step
# glibc gives every large temporary back to the kernel and faults it in again; TRL on a CPU makes many,
# and runs up to twice as fast without (7.7 million page faults a step become 0.2). Both are shown.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
# name -> (module, its arguments, its environment)
OURS, TRL = "benchmarks.peers.ours", "benchmarks.peers.trl_dpo"
CONTENDERS = {
    "fastdpo": (OURS, ["--batch-size", "8"], {}),
    "TRL 1 x 8": (TRL, ["--batch-size", "1", "--accumulation", "8"], {}),
    "TRL 2 x 4": (TRL, ["--batch-size", "2", "--accumulation", "4"], {}),
    "TRL 8 x 1": (TRL, ["--batch-size", "8", "--accumulation", "1"], {}),
    "TRL 1 x 8, tuned malloc": (TRL, ["--batch-size", "1", "--accumulation", "8"], KEEP_MEMORY),
    "TRL 2 x 4, tuned malloc": (TRL, ["--batch-size", "2", "--accumulation", "4"], KEEP_MEMORY),
}


def make_inputs(folder: Path) -> dict[str, str]:
    """The model's folder, and real rows and tokenizer where ../shared has them, else the demo's."""
    if SHARED.is_dir():
        tokenizer, rows = SHARED / "tokenizers/qwen2.5", SHARED / "pref/hh_rlhf_train.jsonl"
        source = "hh-rlhf rows, Qwen2.5 tokenizer"
    else:
        from fastdpo.demo import make_model, write_data

        write_data(folder / "data")
        make_model(folder / "start")
        tokenizer, rows = folder / "start", folder / "data/train.jsonl"
        source = "the demo's rows and tokenizer"
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder / "model")
    paths = {"--model": folder / "model", "--tokenizer": tokenizer, "--rows": rows}
    return {"source": source, "args": [str(x) for pair in paths.items() for x in pair]}


def run(name: str, inputs: dict, steps: int, folder: Path) -> dict:
    """One contender once, in its own process."""
    module, extra, environment = CONTENDERS[name]
    out = folder / "result.json"
    command = [sys.executable, "-m", module, *inputs["args"], *extra]
    command += ["--steps", str(steps), "--out", str(out)]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | environment)
    return json.loads(out.read_text())


def summarise(runs: dict[str, list[dict]]) -> dict[str, dict]:
    """Per contender: median pairs/s over the timed steps of all rounds, their spread, peak memory."""
    out = {}
    for name, results in runs.items():
        seconds = [s for r in results for s in r["seconds"][1:]]
        out[name] = {
            "pairs_per_second": PAIRS / statistics.median(seconds),
            "slowest_and_fastest": [PAIRS / max(seconds), PAIRS / min(seconds)],
            "peak_gb": statistics.median(r["peak_bytes"] for r in results) / 1e9,
        }
    ours = out["fastdpo"]
    for result in out.values():
        result["fastdpo_times_faster"] = ours["pairs_per_second"] / result["pairs_per_second"]
        result["fastdpo_memory_ratio"] = ours["peak_gb"] / result["peak_gb"]
    return out


def print_table(summary: dict[str, dict], source: str) -> None:
    table = Table(title=f"DPO steps of {PAIRS} pairs on this CPU, fp32 ({source})")
    for column in ("", "pairs/s", "(slowest to fastest)", "peak GB", "fastdpo is", "and takes"):
        table.add_column(column, justify="left" if not column else "right")
    for name, r in summary.items():
        spread = "{:.2f} to {:.2f}".format(*r["slowest_and_fastest"])
        ratios = (
            f"{r['fastdpo_times_faster']:.1f}x faster",
            f"{r['fastdpo_memory_ratio']:.2f}x memory",
        )
        if name == "fastdpo":
            ratios = ("", "")
        table.add_row(name, f"{r['pairs_per_second']:.2f}", spread, f"{r['peak_gb']:.2f}", *ratios)
    Console(width=110).print(table)


def main() -> None:
    """Rounds of all contenders, then the table and one JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="timed steps a run; even: two batches")
    today = time.strftime("%Y-%m-%d")
    parser.add_argument("--out", type=Path, default=ROOT / f"benchmarks/results/cpu_steps_{today}.json")
    args = parser.parse_args()
    runs = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        inputs = make_inputs(folder)
        for round_ in range(args.rounds):
            for name in CONTENDERS:
                print(f"round {round_ + 1} of {args.rounds}: {name}", flush=True)
                runs[name].append(run(name, inputs, args.steps, folder))
    summary = summarise(runs)
    print_table(summary, inputs["source"])
    record = {"inputs": inputs["source"], "summary": summary, "runs": runs} | provenance()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
