"""One training by the real trainer (Config, stages, reference cache, run folder), and what is measured."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastdpo
from benchmarks.learning.real import sentiment
from benchmarks.learning.real.start import QUIET, policy_of, tokenizer_of
from fastdpo.evaluation.kl import sequence_kl
from fastdpo.sampling.sampled import sampled
from fastdpo.training import checkpoint

COMMON = {"lora_rank": 16, "batch_size": 8, "warmup_steps": 4, "max_tokens": 8192, "samples": 0}
HELD_OUT = "held-out.jsonl"  # the prompts that trained models answer
NUMBERS = ("rewards/accuracies", "logps/accuracies", "rewards/margins", "loss")


@dataclass(frozen=True)
class Training:
    """What is trained, and when it is measured."""

    study: str
    arm: str
    seed: int
    data: str  # a file in the work folder
    keys: dict[str, Any] = field(hash=False)  # the config's, over COMMON
    marks: tuple[int, ...] = ()  # optimizer steps after which the model is sampled
    eval_data: str | None = None  # held-out rows that the trained model is evaluated on

    @property
    def name(self) -> str:
        """Of its run folder, and of it in the record."""
        text = f"{self.study} {self.arm} {self.seed}"
        return "".join(c if c.isalnum() or c in ".-" else "-" for c in text.lower())


@dataclass(frozen=True)
class Place:
    """Where the trainings of a grid are, and what they start from."""

    work: Path
    model: str
    prompts: int  # of a seed
    answers: int  # to each
    held_out: int  # prompts that a trained model answers

    def config(self, training: Training) -> dict[str, Any]:
        """Its keys as a user would write them."""
        keys = COMMON | {
            "model": self.model,
            "data": str(self.work / training.data),
            "output_dir": str(self.work / "runs" / training.name),
            "reference_cache": str(self.work / "reference.sqlite"),
            "data_cache": str(self.work / "tokens"),
            "seed": training.seed,
            "resume": True,
        }
        if training.marks:
            keys |= {"save_steps": math.gcd(*training.marks), "save_total_limit": len(training.marks) + 1}
        return keys | training.keys


def execute(place: Place, training: Training) -> dict:
    """Trains (or goes on where it was stopped), and measures: against the start model, whichever reference
    the last stage had."""
    torch.compiler.set_stance("force_eager")  # torchao's optimizers: minutes of C++ for the same formula
    run = fastdpo.train(place.config(training), QUIET)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    tokens = {line["stage"]: line["num_tokens"] for line in trained}  # the last of each stage
    out: dict[str, Any] = {"loss": [line["loss"] for line in trained], "tokens": sum(tokens.values())}
    if training.eval_data:
        rows = str(place.work / training.eval_data)
        found = fastdpo.evaluate(run, rows, console=QUIET, overwrite=True)["numbers"]["model"]
        out["held_out"] = {name: found[name] for name in NUMBERS if name in found}
    if training.marks:
        policy = policy_of(place.model, COMMON["lora_rank"])
        for step in training.marks:
            checkpoint.load(run / "checkpoints" / f"step-{step}").load_weights(policy)
            out.setdefault("marks", []).append({"step": step} | measured(place, training.seed))
    return out


def measured(place: Place, seed: int) -> dict[str, float]:
    """Of the model's own answers to the held-out prompts: mean reward and exact KL to the start model in
    nats, each with its standard error over prompts, and how long they are."""
    policy, tokenizer = policy_of(place.model, COMMON["lora_rank"]), tokenizer_of(place.model)
    prompts = sentiment.prompt_groups(place.work / HELD_OUT, place.model)
    answered = sampled(policy, tokenizer, prompts, seed=1000 + seed, **sentiment.SAMPLING)
    kl = sequence_kl(policy, None, answered)
    ids = [group.responses[0].ids for group in answered]
    rewards = sentiment.rewards([sentiment.text_of(place.model, some) for some in ids])
    return {
        "reward": float(rewards.mean()),
        "reward_stderr": _stderr(rewards),
        "kl": float(kl.mean()),
        "kl_stderr": _stderr(kl),
        "length": float(np.mean([len(some) for some in ids])),
    }


def start(place: Place, seed: int) -> dict[str, float]:
    """The same of the start model."""
    policy = policy_of(place.model, COMMON["lora_rank"])
    untrain(policy)
    return measured(place, seed)


@torch.no_grad()
def untrain(policy) -> None:
    """Makes a LoRA change nothing."""
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.zero_()


def _stderr(values: Sequence[float] | np.ndarray) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))
