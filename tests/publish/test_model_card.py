"""README.md beside the weights: valid metadata, the run's settings and metrics, and nothing private."""

import getpass
import json
import os
import re
import shutil
import socket

import pytest
import yaml
from huggingface_hub import ModelCard
from rich.console import Console

from fastdpo.publish.merge import merge
from fastdpo.publish.model_card import add_card
from fastdpo.report.history import read_run
from tests import tiny
from tests.training.test_trainer import QUIET, Run


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr("fastdpo.api.write_report", lambda *args, **keys: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two stages that trains all weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdpo.api.write_report", lambda *args, **keys: None)
        stages = [{"objective": "sft", "max_steps": 2}, {"objective": {"sigmoid": 0.8, "sft": 0.2}}]
        folder = tmp_path_factory.mktemp("whole")
        template = folder / "secret" / "chat.jinja"
        template.parent.mkdir()
        template.write_text(tiny.CHATML)
        return Run(folder, "my-dpo", stages=stages, beta=None, max_steps=3, chat_template=str(template))


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdpo.api.write_report", lambda *args, **keys: None)
        return Run(tmp_path_factory.mktemp("lora"), "my-lora", lora_rank=12, max_steps=3)


def card_of(folder) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def with_config(run, tmp_path, **values):
    """A copy of a run whose config.yaml says something else, its card made again."""
    copy = shutil.copytree(run.folder, tmp_path / "copy")
    config = yaml.safe_load((copy / "config.yaml").read_text()) | values
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    add_card(copy, copy / "model", QUIET)
    return card_of(copy / "model")


def test_metadata_of_whole_weights(whole):
    data = card_of(whole.folder / "model").data.to_dict()
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["fastdpo", "sft", "dpo"],
    }


def test_metadata_of_an_adapter(lora):
    data = card_of(lora.folder / "model").data
    assert data.library_name == "peft" and data.tags == ["fastdpo", "dpo", "lora"]
    assert data.base_model is None  # a local folder is no name on the hub, and the hub refuses it as one


def test_hub_names_become_metadata_and_links(lora, tmp_path):
    path = lora.folder / "model/adapter_config.json"
    before = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(before) | {"base_model_name_or_path": "org/base-7B"}))
        card = with_config(lora, tmp_path, data="org/rows:part#train[:9]", model="org/base-7B")
    finally:
        path.write_text(before)
    assert card.data.base_model == "org/base-7B" and card.data.datasets == ["org/rows"]
    assert "[org/base-7B](https://huggingface.co/org/base-7B) and a LoRA of rank 12" in card.text
    assert "[org/rows](https://huggingface.co/datasets/org/rows)" in card.text
    assert 'AutoPeftModelForCausalLM.from_pretrained("PATH_OR_REPOSITORY")' in card.text
    assert "vllm serve org/base-7B --enable-lora --max-lora-rank 16" in card.text


def test_the_repository_s_name_is_used_where_there_is_one(lora, tmp_path):
    card = with_config(lora, tmp_path, push_to_hub="me/dpo-of-mine")
    assert (
        card.text.startswith("\n# dpo-of-mine\n") and 'from_pretrained(base, "me/dpo-of-mine")' in card.text
    )


def test_nothing_private(whole, lora, tmp_path):
    """In no text file of a model folder but for the adapter's own note of its base, which peft needs."""
    merged = merge(lora.folder, tmp_path / "merged", console=QUIET)
    looked = 0
    for folder in (whole.folder / "model", lora.folder / "model", merged):
        for path in folder.iterdir():
            if path.suffix == ".safetensors" or path.name == "adapter_config.json":
                continue
            text, looked = path.read_text(), looked + 1
            for word in (str(whole.folder.parent), str(lora.folder.parent), str(tmp_path), "secret"):
                assert word not in text, (path, word)
            if path.name == "README.md":
                assert not re.search(r"(?<![\w/.])[/~]\w+/", text.replace("https://", "")), text
                names = {socket.gethostname(), os.path.expanduser("~")} | {getpass.getuser()} - {"root"}
                assert not any(name in text for name in names), text
    assert looked > 10
    assert "`train.jsonl`" in card_of(whole.folder / "model").text


def test_settings_are_those_that_differ(whole):
    text = card_of(whole.folder / "model").text
    table = dict(re.findall(r"^\| `([\w ]+)` \| `(.*)` \|$", text, re.M))
    assert table == {
        "chat_template": "chat.jinja",
        "learning_rate": "0.001",
        "lr_scheduler_type": "constant",
        "batch_size": "4",
        "max_steps": "3",
        "max_length": "64",
        "dtype": "fp32",
        "stage 1": "objective: sft, max_steps: 2",
        "stage 2": "objective: {'sigmoid': 0.8, 'sft': 0.2}",
    }
    assert (
        "Stage 1: `sft`, 2 steps" in text
        and "24 rows of the data" in text
        and "held out: `eval.jsonl`" in text
    )
    assert "https://arxiv.org/abs/2305.18290" in text


def test_a_bar_does_not_break_the_table(lora, tmp_path):
    text = with_config(lora, tmp_path, lora_target_modules="model.*(q_proj|k_proj)$").text
    assert "| `lora_target_modules` | `model.*(q_proj\\|k_proj)$` |" in text


def test_metrics_are_the_run_s_by_trl_s_names(whole, lora):
    history = read_run(lora.folder)
    table = re.search(r"## Held-out metrics\n\n(.*?)\n\n", card_of(lora.folder / "model").text, re.S)[1]
    head, _, *rows = table.splitlines()
    assert head == "| metric | step 0 | step 3 |"
    found = {name: cells for name, *cells in (re.findall(r"[^| `]+(?: ties)?", row) for row in rows)}
    for name in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen"):
        for cell, step in zip(found[name], (0, 3)):
            assert float(cell.replace("−", "-")) == pytest.approx(history.series(name).at(step), rel=1e-3)
    assert float(found["eval_rewards/accuracies"][1][:-1]) / 100 == pytest.approx(
        history.series("eval_rewards/accuracies").at(3), abs=1e-3
    )
    assert {"eval_rewards/chosen", "eval_rewards/rejected", "eval_logps/rejected"} <= found.keys()
    assert card_of(whole.folder / "model").text.count("## Held-out metrics, stage") == 2


def test_load_best_is_told(lora, tmp_path):
    assert "lowest held-out loss" not in card_of(lora.folder / "model").text
    assert "lowest held-out loss" in with_config(lora, tmp_path, load_best=True).text


def test_without_held_out_rows_it_says_so(tmp_path):
    run = Run(tmp_path, eval_data=None, max_steps=2)
    text = card_of(run.folder / "model").text
    assert "## Metrics on the training rows" in text and "| `loss` |" in text and "eval_" not in text


def test_the_snippet_runs(whole, lora, tmp_path, monkeypatch):
    for run in (whole, lora):
        code = re.search(r"```python\n(.*?)```", card_of(run.folder / "model").text, re.S)[1]
        code = code.replace("PATH_OR_REPOSITORY", str(run.folder / "model"))
        monkeypatch.chdir(run.folder.parent)  # where the base lies that the card calls "model"
        names = {}
        exec(code.replace(f'"{run.folder.parent.name}/model"', '"model"'), names)
        assert names["model"].device.type == "cpu" and names["tokenizer"].chat_template


@pytest.mark.parametrize(
    "given, shown",
    [("chatml", "chatml"), ("default:x/a.jinja", "a.jinja"), ("{{ 'me/x' }}\n|", "Jinja text")],
)
def test_a_chat_template_of_a_name_or_of_text(whole, tmp_path, given, shown):
    assert f"| `chat_template` | `{shown}` |" in with_config(whole, tmp_path, chat_template=given).text


def test_a_merged_model_s_card(lora, tmp_path):
    card = card_of(merge(lora.folder, tmp_path / "merged", dtype="bf16", console=QUIET))
    assert card.data.library_name == "transformers" and "lora" not in card.data.tags
    assert "merged into the weights, in bfloat16" in card.text and "LoRA of rank 12" in card.text
    assert "PeftModel" not in card.text and "| `eval_loss` |" in card.text


def test_a_base_in_4_bits_is_told(lora, tmp_path):
    """Its metrics are not those of what the card lies beside: a base, or a merged model, in whole weights."""
    assert "4 bits" not in card_of(lora.folder / "model").text
    assert "The base was in 4 bits (NF4) while" in with_config(lora, tmp_path, load_in_4bit=True).text
    merged = merge(tmp_path / "copy", tmp_path / "merged", console=QUIET)
    assert "The base was in 4 bits (NF4) while" in card_of(merged).text


def test_a_merged_adapter_of_others(lora, tmp_path):
    theirs = shutil.copytree(lora.folder / "model", tmp_path / "theirs")
    card = card_of(merge(theirs, console=QUIET))
    assert "# theirs, merged" in card.text and "## Training" not in card.text


def test_a_card_that_fails_costs_no_model(lora, tmp_path, monkeypatch):
    def broken(*args):
        raise ValueError("no [card]")

    monkeypatch.setattr("fastdpo.publish.model_card.model_card", broken)
    console = Console(record=True, width=200)
    folder = shutil.copytree(lora.folder / "model", tmp_path / "model")
    add_card(lora.folder, folder, console)
    assert "the model card, was not written: ValueError: no [card]" in console.export_text()
    assert not (folder / "README.md").exists()  # peft's own would name local paths
