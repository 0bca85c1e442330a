"""Whole runs over one reference cache: what is computed, what is found, and what never is believed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastdpo.api import fill_reference, train
from fastdpo.cli import main
from fastdpo.config.keys import Config
from fastdpo.errors import ConfigError, TrainingError
from tests.rounding import is_tie, model_ulps
from tests.tiny import rows, save_model, write_jsonl

QUIET = Console(quiet=True)
ROUNDING = model_ulps(torch.tensor(6.0))  # nats; a token of this vocabulary has about 6


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr("fastdpo.api.write_report", lambda *args, **keys: None)


@pytest.fixture
def make(tmp_path):
    model = save_model(tmp_path / "model")
    data = write_jsonl(tmp_path / "rows.jsonl", rows(20))

    def make(name, **keys):
        values = dict(eval_data=0.2, max_steps=4, batch_size=4, max_length=64, dtype="fp32", samples=0)
        values |= dict(model=model, data=data, output_dir=str(tmp_path / name), logging_steps=1)
        values["reference_cache"] = str(tmp_path / "reference.sqlite")
        return Config(**values | keys)

    return make


def run(config):
    """Trains; (the reference events, the metrics)."""
    folder = train(config, QUIET)
    read = lambda name: [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [e for e in read("events.jsonl") if e["event"] in ("reference", "drift")], read("metrics.jsonl")


def test_a_sweep_computes_the_reference_once(make):
    """Another beta, learning rate, LoRA rank, batch size, row order, token cap: no forward at all."""
    (first, _), _ = run(make("first"))
    assert first["source"] == "cache" and first["hits"] == 0 and first["misses"] == 40
    others = [
        dict(beta=0.5, learning_rate=1e-4),
        dict(lora_rank=2),
        dict(lora_rank=4, batch_size=3, max_steps=6),
        dict(seed=3, eval_data=0.3, max_tokens=50),
    ]
    for number, keys in enumerate(others):
        (event, _), _ = run(make(f"run{number}", **keys))
        assert (event["hits"], event["misses"], event["packs"], event["tokens"]) == (40, 0, 0, 0), keys


def test_the_step_0_margin_is_exactly_0_with_the_same_packs(make):
    """Held-out rows are packed as the cache packs them; training rows are, where each goes alone. From
    other packs the margin is of the size of rounding, and the run says how large the drift is."""
    for name, keys in (("first", {}), ("again", {}), ("lora", dict(lora_rank=2))):
        _, metrics = run(make(name, **keys))
        assert metrics[0]["eval_rewards/margins"] == 0 and metrics[0]["eval_kl"] == 0
    alone = dict(max_tokens=1, reference_cache="off")
    events, metrics = run(make("alone", **alone))
    assert metrics[1]["rewards/margins"] == 0 and events[1]["max_nats"] == 0
    events, metrics = run(make("other", max_tokens=1))
    assert events[1]["max_nats"] < ROUNDING and is_tie(metrics[1])  # 0 where a GEMM's rows do not depend on M


def test_only_the_rows_that_the_steps_visit_are_computed(make):
    (event, _), _ = run(make("short", max_steps=1, batch_size=3, eval_data=None))
    assert event["misses"] == 6
    (event, _), _ = run(make("longer", max_steps=3, batch_size=3, eval_data=None))
    assert event["hits"] == 6 and event["misses"] == 12


def test_a_later_stage_refers_to_its_own_start(make):
    stages = [dict(objective="sft", max_steps=3), dict(max_steps=3), dict(max_steps=2, beta=0.3)]
    events, _ = run(make("one", stages=stages, learning_rate=1e-3))
    first, second = (e for e in events if e["event"] == "reference")
    assert first["stage"] == 1 and second["stage"] == 2
    assert first["misses"] and second["misses"] and first["namespace"] != second["namespace"]
    events, metrics = run(make("two", stages=stages, learning_rate=1e-3))
    assert all(e["misses"] == 0 for e in events if e["event"] == "reference")  # the same bits were trained
    starts = [m for m in metrics if "eval_loss" in m and m["step"] in (3, 6) and m["stage"] == m["step"] // 3]
    assert [m["eval_rewards/margins"] for m in starts] == [0, 0]


def test_ref_fills_and_trains_nothing(make, tmp_path, capsys):
    config = make("run")
    fill_reference(config, QUIET)
    assert not Path(config.output_dir).exists()
    (event, _), _ = run(config)
    assert event["misses"] == 0
    flags = ["--model", config.model, "--data", config.data, "--reference_cache", str(tmp_path / "new.db")]
    assert main(["ref", *flags, "--dtype", "fp32", "--max_length", "64"]) == 0
    assert "0 of 40 responses found, 40 computed" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "keys, text",
    [
        (dict(objective="sft"), "the first stage needs no reference"),
        (dict(reference_cache="off"), "nothing to fill"),
    ],
)
def test_ref_says_when_there_is_nothing_to_fill(make, keys, text):
    with pytest.raises(ConfigError, match=text):
        fill_reference(make("run", **keys), QUIET)


def test_reference_columns_need_no_forward_and_train_alike(make, tmp_path):
    """Columns with the sums that the model itself gives."""
    from fastdpo.data.groups import Limits
    from fastdpo.data.load import load_groups
    from fastdpo.model.loading import load_policy, load_tokenizer
    from fastdpo.model.support import prepare, stock_logp

    config = make("run", eval_data=None)
    groups, _ = load_groups(config.data, load_tokenizer(config), Limits(64), strict=True, console=QUIET)
    policy = load_policy(config, QUIET)
    prepare(policy, groups, QUIET)
    data = []
    for row, group in zip(rows(20), groups):
        lengths = [int(r.target_mask.sum()) for r in group.responses]
        sums = [float(s.detach().sum()) for s in stock_logp(policy, group).split(lengths)]
        data.append(row | {"ref_chosen_logps": sums[0], "ref_rejected_logps": sums[1]})
    columns = replace(
        config, data=write_jsonl(tmp_path / "columns.jsonl", data), output_dir=str(tmp_path / "c")
    )
    events, with_columns = run(columns)
    assert events[0]["source"] == "columns" and events[1]["max_nats"] < ROUNDING
    assert "kl" not in with_columns[0]
    _, computed = run(config)
    for ours, theirs in zip(with_columns, computed):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)

    def shifted(by):
        rows = [row | {"ref_chosen_logps": row["ref_chosen_logps"] - by} for row in data]
        path = write_jsonl(tmp_path / f"{by}.jsonl", rows)
        return replace(config, data=path, output_dir=str(tmp_path / f"{by}"))

    console = Console(record=True, width=250)
    train(shifted(0.5), console)
    assert "more than rounding explains" in console.export_text()
    with pytest.raises(TrainingError, match=r"it is another model's.*--reference_cache off"):
        train(shifted(50), QUIET)
    (event, _), _ = run(replace(shifted(50), reference_cache="off", resume=True))
    assert event["source"] == "computed"
