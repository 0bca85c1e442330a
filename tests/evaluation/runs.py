"""Tiny runs to evaluate, and rows with a source."""

import pytest

import fastdpo
from tests import tiny
from tests.training.test_samples import silent
from tests.training.test_trainer import Run

WHERE = ("odd", "even")


def make_place(folder):
    """(a folder, a LoRA run and a full one on its base model): rows.jsonl has two rows of one prompt."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdpo.api.write_report", lambda *_, **__: None)
        lora = Run(folder, "lora", lora_rank=4, learning_rate=1e-2, max_steps=4)
        full = Run(folder, "full", beta=0.3, max_steps=4)
    rows = tiny.rows(30, seed=3)
    for number, row in enumerate(rows):
        row["source"] = WHERE[number % 2]
    rows[4] |= {"prompt": rows[3]["prompt"]}
    tiny.write_jsonl(folder / "rows.jsonl", rows)
    return folder, lora, full


def evaluated(place, model="lora", data="rows.jsonl", **keys):
    """An evaluation of what lies there, by the names of its folders."""
    folder = place[0]
    for name in ("reference", "versus"):
        if name in keys and (folder / keys[name]).exists():
            keys[name] = folder / keys[name]
    keys = {"output": folder / "out", "overwrite": True} | keys
    return fastdpo.evaluate(folder / model, str(folder / data), console=silent(), **keys)
