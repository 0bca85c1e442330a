"""How near the plan's peak is to the measured one: real steps of the trainer, each in its own process.

    python -m benchmarks.memory.plan_accuracy [--gpu] [--cases N] [--out DIR]

On a CPU the measure is the growth of the resident set (VmHWM) over what the process had before the model,
with malloc told to give freed memory back; on a GPU torch.cuda.max_memory_allocated. Neither knows of the
tracker that predicts.
"""

import argparse
import ctypes
import gc
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from benchmarks.inputs import Pixels, groups_of, random_rows
from benchmarks.lengths import PairLengths
from benchmarks.models import MODELS, BenchModel
from benchmarks.process import ROOT, resident, restart_peak
from benchmarks.results import RESULTS, write_result
from fastdpo.config.keys import Config
from fastdpo.model.activations import set_up_activations
from fastdpo.model.adapters import add_lora
from fastdpo.model.lm_head import named_budget
from fastdpo.model.loading import resolve_dtype, switch_off_dropout
from fastdpo.model.policy import Policy
from fastdpo.model.source import auto_class, sees_images
from fastdpo.model.towers import freeze_vision
from fastdpo.optim.optimizers import make_optimizer
from fastdpo.planning.fake_model import with_layers
from fastdpo.planning.prediction import predict, step_loads
from fastdpo.planning.target import Target
from fastdpo.records import PreferenceGroup
from fastdpo.training.job import stage_job
from fastdpo.training.stage import Progress, Stage

LIMIT = 0.05
# glibc maps blocks from 64 KiB on by themselves and unmaps them when they are freed: the resident set then
# follows what is allocated
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
MALLOC |= {"MALLOC_MMAP_MAX_": "1000000", "MALLOC_ARENA_MAX": "1"}
SMALL = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4)
SMALL |= dict(num_key_value_heads=2, max_position_embeddings=8192)
TOWER: dict = {"model_type": "llava", "image_token_index": 3, "vision_feature_layer": -1}
TOWER["text_config"] = {"model_type": "llama", **SMALL, "vocab_size": 8000}
TOWER["vision_config"] = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=6)
TOWER["vision_config"] |= dict(num_attention_heads=4, image_size=224, patch_size=14)
TOWER["vision_config"] |= {"model_type": "clip_vision_model"}
LENGTHS = {
    "short": [PairLengths(40, 60, 50)] * 10,
    "mixed": [PairLengths(200, 150, 100), PairLengths(50, 400, 30), PairLengths(300, 20, 200)],
    "long": [PairLengths(900, 300, 300)],
}


def cpu_cases() -> list[dict]:
    """Models wide and deep, with small and large vocabularies; what trains; lengths; checkpointing."""
    wide = {"model_type": "llama", **SMALL, "vocab_size": 8000, "tie_word_embeddings": False}
    deep = {"model_type": "qwen3", **SMALL, "num_hidden_layers": 12, "vocab_size": 8000}
    deep |= {"tie_word_embeddings": True, "head_dim": 64}
    vocab = {"model_type": "qwen2", **SMALL, "vocab_size": 60_000, "tie_word_embeddings": True}
    out = []
    for (name, model), lengths in itertools.product(
        {"wide": wide, "deep": deep, "vocabulary": vocab}.items(), LENGTHS
    ):
        for keys in ({}, {"lora_rank": 16}, {"gradient_checkpointing": True}):
            out.append({"name": name, "model": model, "lengths": lengths, "keys": keys})
    more = ({"max_tokens": 600}, {"head_memory": "16MiB"}, {"lora_rank": 8, "gradient_checkpointing": True})
    out = out[:17] + [{"name": "wide", "model": wide, "lengths": "mixed", "keys": keys} for keys in more]
    sees = ({}, {"freeze_vision": False}, {"lora_rank": 16}, {"gradient_checkpointing": True})
    tower = {"name": "tower", "model": TOWER, "lengths": "mixed", "images": 2}
    return out + [tower | {"keys": keys} for keys in sees]


def gpu_cases() -> list[dict]:
    """What the 5 % are promised for: all weights, LoRA; sizes; lengths; checkpointing."""
    lengths = {"short": [PairLengths(120, 180, 160)] * 16, "long": [PairLengths(3000, 1000, 1000)] * 2}
    out = []
    for name, kind in itertools.product(("Qwen2.5-0.5B", "Llama-3.2-1B", "Qwen3-1.7B"), lengths):
        for keys in ({}, {"gradient_checkpointing": True}):
            out.append({"name": name, "lengths": lengths[kind], "keys": keys})
    for name, kind in itertools.product(("Llama-3.1-8B LoRA", "Qwen2.5-7B LoRA"), lengths):
        for keys in ({}, {"gradient_checkpointing": True}):
            rank = {"lora_rank": MODELS[name].lora_rank}
            out.append({"name": name, "lengths": lengths[kind], "keys": keys | rank})
    return out


def config_of(case: dict) -> Config:
    keys = {"model": "random", "data": "none", "max_length": 8192, "batch_size": 16}
    return Config(**keys | case["keys"])


def parts_of(case: dict):
    """(transformers config, groups) of a case."""
    lengths = case["lengths"]
    lengths = [PairLengths(*row) for row in (LENGTHS[lengths] if isinstance(lengths, str) else lengths)]
    if "model" in case:
        model_config = AutoConfig.for_model(**case["model"])
    else:
        bench: BenchModel = MODELS[case["name"]]
        model_config = AutoConfig.for_model(bench.model_type, **bench.config)
    switch_off_dropout(model_config)
    return model_config, groups_in(case, model_config, lengths)


def groups_in(case: dict, model_config, lengths: list[PairLengths]) -> list[PreferenceGroup]:
    """Random rows, with the case's images in front."""
    groups = groups_of(random_rows(lengths, model_config.get_text_config().vocab_size))
    processor = processor_of(case, model_config)
    return [processor.in_front(g, case["images"]) for g in groups] if processor else groups


def processor_of(case: dict, model_config):
    return Pixels(model_config) if case.get("images") else None


class _NoReference:
    """Zeros in the place of the reference's log-probs."""

    per_token = True

    def of(self, groups):
        return torch.zeros(sum(group.scored_tokens for group in groups))


def measured(case: dict) -> int:
    """Peak bytes of the second optimizer step of a real run, weights and states included."""
    model_config, groups = parts_of(case)
    if case.get("gpu"):
        train(case, model_config, groups)
        return torch.cuda.max_memory_allocated()
    small = with_layers(model_config, 1)
    small.get_text_config().vocab_size = 64
    train(case, small, groups_in(case, small, [PairLengths(8, 8, 8)]))  # imports, the libraries' buffers
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = restart_peak()
    train(case, model_config, groups)
    return resident("VmHWM") - before


def train(case: dict, model_config, groups) -> None:
    """Two optimizer steps of the trainer's own code; the peak of both measures starts at the second."""
    gpu, config = case.get("gpu", False), config_of(case)
    device, dtype = ("cuda", resolve_dtype("auto")) if gpu else ("cpu", torch.float32)
    kept = dtype if config.lora_rank else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model = auto_class(model_config).from_config(model_config, dtype=kept)
    model = add_lora(model, config) if config.lora_rank else model
    if sees_images(model_config) and config.freeze_vision:
        freeze_vision(model)
    model.train()
    set_up_activations(model, config)
    policy = Policy(model, dtype, head_budget=named_budget(config.head_memory))
    policy.set_sharing(True)
    policy.processor = processor_of(case, model_config)
    stage = Stage(stage_job(config), policy, groups, [])
    stage.reference = _NoReference()
    optimizer, _ = make_optimizer(policy, config, 10)
    for _ in range(2):
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            restart_peak()
        stage.step(groups, Progress(), 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def predicted(case: dict) -> dict:
    """{"bytes", "where", "owners"} of the plan."""
    config, target = config_of(case), Target.here() if case.get("gpu") else Target(is_cpu=True)
    model_config, groups = parts_of(case)
    loads = step_loads(config, model_config, groups, target, processor_of(case, model_config))
    peak = predict(config, model_config, loads, target).peak
    return {"bytes": peak.total, "where": peak.where, "owners": peak.bytes}


def run(case: dict) -> dict:
    """A case with its measured and predicted bytes; each measure is taken in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory.plan_accuracy", "--measured", json.dumps(case)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | MALLOC, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case}: {done.stderr}")
    out = case | {"measured": int(done.stdout.splitlines()[-1]), "predicted": predicted(case)}
    out["error"] = out["predicted"]["bytes"] / out["measured"] - 1
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="real models on a GPU")
    parser.add_argument("--cases", type=int, help="only the first so many")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the JSON")
    parser.add_argument("--measured", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measured:
        print(measured(json.loads(args.measured)))
        return
    cases = [case | {"gpu": True} for case in gpu_cases()] if args.gpu else cpu_cases()
    rows, failed = [], []
    for case in cases[: args.cases]:
        try:
            rows.append(run(case))
        except Exception as error:  # the other cases go on: one that a smaller GPU has no room for, say
            why = (str(error).strip().splitlines() or [repr(error)])[-1]
            failed.append(case | {"why": why})
            print("failed", case["name"], case["keys"], why, flush=True)
            continue
        print(f"{rows[-1]['error']:+.1%}", case["name"], case["keys"], flush=True)
    table = Table(title="The plan's peak beside the measured one")
    for column in ("model", "lengths", "keys", "measured, MB", "predicted, MB", "error"):
        table.add_column(column)
    for row in rows:
        lengths = row["lengths"] if isinstance(row["lengths"], str) else f"{len(row['lengths'])} pairs"
        sizes = [f"{row['measured'] / 1e6:.1f}", f"{row['predicted']['bytes'] / 1e6:.1f}"]
        keys = ", ".join(f"{k}: {v}" for k, v in row["keys"].items())
        table.add_row(row["name"], lengths, keys, *sizes, f"{row['error']:+.1%}")
    Console(width=110).print(table)
    worst = max((abs(row["error"]) for row in rows), default=None)
    write_result("plan", {"limit": LIMIT, "worst": worst, "cases": rows, "failed": failed}, args.out)


if __name__ == "__main__":
    main()
