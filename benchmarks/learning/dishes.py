"""The demo's task as one with a reward: questions about dishes, and what an answer to one is worth.

The start model has learnt, as in the demo, two rude answers for a helpful one, about all dishes; what it is
trained on after that never names the held-out ones. `FILE.py:score` of this file is a config's `reward`.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

import fastdpo
from fastdpo.demo import DISHES, HELD_OUT, HELPFUL, QUESTIONS, RATINGS, make_model, write_data

LONGEST = 96  # tokens of a prompt and an answer
FILE = str(Path(__file__).resolve())
WORTH = (
    "the demo's rating (1 to 5) of an answer that is word for word one of its six about the dish that was "
    "asked for, and 0 of any other text"
)


def score(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """What WORTH says of each; 0 where the prompt names no dish."""
    return [_worth(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


def _worth(prompt: str, answer: str) -> float:
    for dish, (a, b, c) in DISHES.items():
        if dish in prompt:
            known = {text.format(dish=dish, a=a, b=b, c=c): rating for text, rating in RATINGS.items()}
            return float(known.get(answer, 0))
    return 0.0


def letters(prompts: Sequence[str], answers: Sequence[str]) -> list[int]:
    """A dry run's scores, for its model knows no answer."""
    return [len(set(answer)) for answer in answers]


def write_rows(folder: Path, times: int) -> None:
    """asked.jsonl: each question about a dish that is not held out so many times, its chosen answer one of
    the helpful ones in turn; held-out.jsonl: the others once. Beside them the demo's own files."""
    write_data(folder)
    for name, dishes, n in (
        ("asked", [d for d in DISHES if d not in HELD_OUT], times),
        ("held-out", HELD_OUT, 1),
    ):
        asked = itertools.product(range(n), dishes, QUESTIONS)
        lines = [json.dumps(_row(dish, question, i)) + "\n" for i, dish, question in asked]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _row(dish: str, question: str, i: int) -> dict:
    turn = lambda role, content: [{"role": role, "content": content}]
    a, b, c = DISHES[dish]
    chosen = HELPFUL[i % len(HELPFUL)].format(dish=dish, a=a, b=b, c=c)
    return {
        "prompt": turn("user", question.format(dish=dish)),
        "chosen": turn("assistant", chosen),
        "rejected": turn("assistant", "No."),
    }


def make_start(folder: Path, seed: int, steps: int, times: int) -> None:
    """The rows, and of them the start model of a seed, in folder/start/model."""
    write_rows(folder / "data", times)
    make_model(folder / "made")
    keys = {"model": str(folder / "made"), "data": str(folder / "data/sft.jsonl"), "objective": "sft"}
    keys |= {"output_dir": str(folder / "start"), "samples": 0, "max_length": LONGEST, "batch_size": 32}
    keys |= {"learning_rate": 3e-3, "warmup_steps": 20, "max_steps": steps, "num_epochs": 10, "seed": seed}
    fastdpo.train(keys, Console(quiet=True), dtype="fp32", data_cache="off", overwrite=True)
