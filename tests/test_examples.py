"""The examples for one card: each trains by its own code path, on a toy, and can be planned."""

import json
from pathlib import Path

import pytest

from fastdpo.api import train
from fastdpo.cli import main
from tests import tiny
from tests.config.command_line import load_config
from tests.training.test_trainer import QUIET

EXAMPLES = ("full_500m_8gb", "full_1b_16gb", "qlora_8b_16gb", "lora_8b_24gb", "full_8b_24gb")
pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'fastdpo[quant]'")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Flags that put a toy in the place of the model and the rows."""
    folder = tmp_path_factory.mktemp("toy")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in tiny.rows(12)))
    model = tiny.save_model(folder / "model", vocab_size=400)
    small = {"model": model, "data": rows, "eval_data": 0.2, "max_length": 64, "batch_size": 4, "samples": 0}
    return [f"--{name}={value}" for name, value in (small | {"max_tokens": 40}).items()]


def example(name, toy, *flags):
    path = Path(__file__).resolve().parents[1] / "examples" / f"{name}.yaml"
    text = path.read_text()
    paged = ["--optim=adamw_8bit"] if "optim: paged" in text else []  # paging needs a GPU
    return [str(path), *toy, *paged, *flags]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_trains(name, toy, tmp_path):
    flags = [f"--output_dir={tmp_path / 'run'}", "--max_steps=2", "--reference_cache=off"]
    folder = train(load_config(example(name, toy, *flags)), QUIET)
    last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-1]
    assert 0 < last["eval_loss"] < 1 and (folder / "model").is_dir()


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_can_be_planned(name, toy, capsys):
    assert main(["plan", *example(name, toy), "--card=RTX 4090"]) == 0
    out = capsys.readouterr().out
    for text in ("Predicted peak", "weights", "optimizer states", "fits in"):
        assert text in out
