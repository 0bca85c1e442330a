"""Other tools' rows and configs through the command: the report names formats, `convert` writes ours."""

import io
import json

import pytest
import yaml
from rich.console import Console

from fastdpo.cli import main
from fastdpo.data.load import load_groups
from fastdpo.errors import ConfigError
from tests.config.command_line import load_config
from tests.data.shared_data import WIDE, small_tokenizer, text_row, write_lines

INTEL = {"system": "S", "question": "good?", "chosen": "gold", "rejected": "old"}
ULTRA = {
    "instruction": "good?",
    "completions": [{"response": t, "overall_score": s} for t, s in (("gold", 5), ("old", 3), ("wor", 3))],
}


def load(spec, data_format=None):
    console = Console(file=io.StringIO(), width=150)
    options = dict(strict=False, console=console, data_format=data_format)
    groups, report = load_groups(spec, small_tokenizer(), WIDE, **options)
    report.print(console)
    return groups, report, console.file.getvalue()


def test_the_report_names_the_formats(tmp_path):
    clash = INTEL | {"prompt": "p"}
    spec = write_lines(tmp_path / "d.jsonl", [INTEL, ULTRA, text_row(), ULTRA, clash, "{"])
    groups, report, text = load(spec)
    assert [len(group.pairs) for group in groups] == [1, 2, 1, 2]
    assert report.to_dict()["formats"] == {"intel": 1, "ultrafeedback": 2, "trl": 1}
    assert "format: ultrafeedback (2 rows), intel (1 rows), trl (1 rows)" in text
    assert report.dropped["ambiguous_row"].examples == [4]
    assert json.dumps(report.to_dict())


def test_data_format_reaches_the_rows(tmp_path):
    spec = write_lines(tmp_path / "d.jsonl", [INTEL | {"prompt": "p"}])
    groups, report, _ = load(spec, {"prompt": "question", "chosen": "rejected", "rejected": "chosen"})
    assert report.formats == {"trl": 1} and len(groups) == 1


THEIRS = """
model_name_or_path: m
dataset_name: d.jsonl
per_device_train_batch_size: 2
gradient_accumulation_steps: 4
warmup_ratio: 0.1
loss_type: ipo
"""


@pytest.fixture
def theirs(tmp_path):
    path = tmp_path / "theirs.yaml"
    path.write_text(THEIRS)
    return str(path)


def test_a_config_of_theirs_trains_as_ours(theirs, capsys):
    config = load_config([theirs, "--beta", "0.3", "--num_train_epochs", "2", "--optim=adamw_torch"])
    assert (config.batch_size, config.objective, config.beta, config.num_epochs) == (8, "ipo", 0.3, 2)
    assert (config.warmup_steps, config.optim) == (0.1, "adamw_torch_fused")
    notes = capsys.readouterr().err
    assert (
        "per_device_train_batch_size 2, gradient_accumulation_steps 4 (of one device) -> batch_size 8"
        in notes
    )


def test_convert(theirs, tmp_path, capsys):
    assert main(["convert", theirs]) == 0
    text = capsys.readouterr().out
    ours = tmp_path / "ours.yaml"
    assert main(["convert", theirs, "--output", str(ours)]) == 0
    assert ours.read_text() == text and yaml.safe_load(text)["batch_size"] == 8
    assert load_config([str(ours)]) == load_config([theirs])
    assert main(["convert", theirs, "--output", str(ours)]) == 2
    assert main(["convert", str(ours)]) == 2 and main(["convert"]) == 2
    assert "all its keys are fastdpo's own already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("data_format", "alpacca", "data_format: 'alpacca' is not one of trl"),
        ("data_format", "{promt: q}", "data_format: 'promt' is no column of ours"),
        ("warmup_steps", "2.5", "warmup_steps: 2.5 is neither a whole number nor a share below 1"),
        ("sync_ref_model", "true", "sync_ref_model: true: the reference does not move here"),
    ],
)
def test_wrong_values(theirs, key, value, message):
    with pytest.raises(ConfigError, match=message):
        load_config([theirs, f"--{key}", value])


def test_a_share_of_warm_up_steps():
    from fastdpo.config.keys import Config
    from fastdpo.optim.optimizers import warmup

    steps = lambda value, total: warmup(Config(model="m", data="d", warmup_steps=value), total)
    assert [steps(0.1, 25), steps(0.5, 3), steps(0, 9), steps(1, 9), steps(7.0, 9)] == [3, 2, 0, 1, 7]
