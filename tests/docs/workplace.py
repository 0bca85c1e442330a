"""A folder in which the pages' code runs as it is written: what it names is there, but small."""

from pathlib import Path

from tests.tiny import rows, save_model, write_jsonl

MODELS = (
    "Qwen/Qwen2.5-0.5B-Instruct",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "runs/demo/sft/model",
    "runs/demo/start",
)
DATA = (
    "trl-lib/hh-rlhf-helpful-base/train.jsonl",
    "trl-lib/hh-rlhf-helpful-base/test.jsonl",
    "trl-lib/ultrafeedback_binarized/train.jsonl",
    "runs/demo/data/train.jsonl",
    "runs/demo/data/held_out.jsonl",
    "train.jsonl",
    "held_out.jsonl",
)


def furnish(folder: Path) -> None:
    for name in MODELS:
        save_model(folder / name, max_position_embeddings=4096)
    for name in DATA:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / name, rows(100))
