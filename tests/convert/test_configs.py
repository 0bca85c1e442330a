"""Real configs of other trainers, by their keys and values: each is read as it is, written by
`fastdpo convert`, read back, and trains two steps on a tiny model."""

import json
import math
import re
from collections import Counter

import pytest
import yaml
from rich.console import Console

from benchmarks.tables.configs import Collected, collected_table, collection, refused_table
from fastdpo.api import train
from fastdpo.config.keys import FIELDS, from_values
from fastdpo.convert.convert import TOOLS, converted
from fastdpo.convert.rules import Only
from tests.convert.some_rows import some_rows
from tests.tiny import save_model, write_jsonl

CONFIGS = collection()
ids = lambda config: re.sub(r"\W+", "-", config.name)
MODULES = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head embed_tokens".split()
NO_GPU = {  # what a machine without one has not, or what lies elsewhere
    **{"load_in_4bit": False, "activation_offloading": False, "optim": "adamw_torch_fused", "dtype": "fp32"},
    **{"adapter": None, "push_to_hub": None, "report_to": None, "router_aux_loss_coef": None},
}
SMALL = {"samples": 0, "max_steps": 2, "batch_size": 4, "logging_steps": 1, "warmup_steps": 0}
SMALL |= {"max_length": 256}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"))


def test_there_are_enough():
    assert len(CONFIGS) >= 40 and sum(not config.ignore for config in CONFIGS) >= 36
    for names in ([c.name for c in CONFIGS], [c.source for c in CONFIGS]):
        assert not [name for name, count in Counter(names).items() if count > 1]
    assert all(c.source.startswith("https://") for c in CONFIGS)


@pytest.mark.parametrize("config", CONFIGS, ids=ids)
def test_it_is_refused_by_no_more_keys_than_it_says(config):
    problems = [fate.keys for fate in config.draft(ignore=[]).fates if fate.is_problem]
    assert {key for keys in problems for key in keys} == {*config.ignore}
    assert config.draft().problems == []


@pytest.mark.parametrize("config", CONFIGS, ids=ids)
def test_it_trains_from_what_convert_writes(config: Collected, model, tmp_path, monkeypatch):
    monkeypatch.setattr("fastdpo.api.write_report", lambda *args: None)  # it takes most of so short a run
    draft = config.draft()
    text = converted(config.keys, draft)
    ours = yaml.safe_load(text)
    assert from_values(ours) == from_values(draft.ours)
    folder = train(ours, Console(quiet=True), **runnable(config, ours, model, tmp_path))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert all(record["grad_norm"] > 0 for record in records if "loss" in record)


def runnable(config: Collected, ours: dict, model: str, folder) -> dict:
    """What goes over a config so that a tiny model trains by it here, on rows of its own format."""
    said = ours.get("data_format")
    rows = some_rows(config.rows, 12, said if isinstance(said, dict) else {})
    data = write_jsonl(folder / "rows.jsonl", rows)
    over = SMALL | {name: value for name, value in NO_GPU.items() if ours.get(name)}
    over |= {"model": model, "data": data, "output_dir": str(folder / "run")}
    if ours.get("eval_data"):
        over["eval_data"] = data
    if str(ours.get("chat_template")).endswith(".jinja"):
        over["chat_template"] = None  # a file of theirs
    wanted = ours.get("lora_target_modules", "all-linear")
    if isinstance(wanted, list) and not {*wanted} <= {*MODULES}:
        over["lora_target_modules"] = "all-linear"  # names of other models' modules
    assert over.keys() <= FIELDS.keys()
    return over


def test_the_tables_of_the_documentation(tmp_path):
    keys = {"model_name_or_path": "m", "dataset_name": "me/rows", "use_peft": True, "lora_r": 4}
    keys |= {"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.5], "sync_ref_model": True, "bf16": True}
    config = {"name": "mine", "source": "https://x/(7B).yaml", "rows": "trl", "keys": keys}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump([config | {"ignore": ["sync_ref_model"]}]))
    text = collected_table(tmp_path)
    assert text.startswith("0 of 1 run as they are.")
    assert "| [mine](<https://x/(7B).yaml>) | TRL | sigmoid + sft, LoRA of rank 4, `me/rows` |" in text
    assert text.endswith("| `sync_ref_model` |")
    said = refused_table().splitlines()  # Unsloth's without TRL's, so any tool's row will do
    only = [(key, rule.fix) for tool in TOOLS for key, rule in tool.rules.items() if isinstance(rule, Only)]
    assert len(only) > 100
    missing = [key for key, why in only if not any(f"`{key}`" in row and why in row for row in said)]
    assert not missing
