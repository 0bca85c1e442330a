"""A chat template that prints the date: a run that goes on tomorrow has the rows and losses of today."""

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from transformers.utils import chat_template_utils

from fastdpo.config.keys import Config
from fastdpo.errors import ConfigError
from fastdpo.training import checkpoint, resume
from fastdpo.training.checkpoint import Checkpoint
from fastdpo.training.resume import clock_of
from tests.data.test_chat import DATED
from tests.tiny import rows, save_model, write_jsonl
from tests.training.test_resume import events, outcome, run, stopped_in_step

FIRST, NEXT = datetime(2026, 11, 28, 23, 59, 59, 5), datetime(2026, 11, 29, 8)


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr("fastdpo.api.write_report", lambda *args, **keys: None)


@pytest.fixture
def make(tmp_path):
    turn = lambda role, text: [{"role": role, "content": text}]
    talks = [
        {
            "prompt": turn("user", row["prompt"]),
            "chosen": turn("assistant", row["chosen"]),
            "rejected": turn("assistant", row["rejected"]),
        }
        for row in rows(6)
    ]
    (tmp_path / "dated.jinja").write_text(DATED)
    values = dict(
        model=save_model(tmp_path / "model"),
        data=write_jsonl(tmp_path / "rows.jsonl", talks),
        chat_template=str(tmp_path / "dated.jinja"),
        eval_data=0.4,
        batch_size=2,
        max_length=128,
        max_steps=2,
        learning_rate=1e-3,
        logging_steps=1,
        samples=2,
        dtype="fp32",
        stages=[dict(objective="sft"), dict(objective="sigmoid")],
        reference_cache=str(tmp_path / "cache.sqlite"),
    )
    return lambda name, **keys: Config(**values | {"output_dir": str(tmp_path / name)} | keys)


def set_clock(monkeypatch, time):
    """Whoever looks at the clock, transformers and a starting run, finds this time."""

    class Then(datetime):
        @classmethod
        def now(cls, tz=None):
            return time

    for module in (chat_template_utils, resume):
        monkeypatch.setattr(module, "datetime", Then)


def last_state(config):
    return checkpoint.found(Path(config.output_dir) / "checkpoints")[-1].joinpath("state.json").read_text()


@pytest.mark.parametrize("n", [1, 3])
def test_a_run_resumed_tomorrow_is_the_undisturbed_one(make, monkeypatch, n):
    """Stopped in its first and in its second stage."""
    set_clock(monkeypatch, FIRST)
    whole, cut = make("whole"), make("cut")
    run(whole)
    with stopped_in_step(n):
        run(cut)
    set_clock(monkeypatch, NEXT)
    assert "prints the date (28 Nov 2026)" in run(replace(cut, resume=True))
    assert outcome(cut) == outcome(whole)
    assert samples(cut) == samples(whole) and "Today Date: 28 Nov 2026" in samples(cut)
    assert [events(cut, name)[0]["clock"] for name in ("start", "resume")] == [
        "2026-11-28T23:59:59.000005"
    ] * 2
    account = json.loads((Path(cut.output_dir) / "data_report.json").read_text())
    assert account["data"]["dates"] == ["28 Nov 2026"]


def samples(config):
    return (Path(config.output_dir) / "samples.jsonl").read_text()


def test_another_run_of_tomorrow_has_tomorrows_rows(make, monkeypatch):
    """So that the test above could fail; and a date_string makes the two days one."""
    states = []
    for name, kwargs in (("dated", None), ("fixed", {"date_string": "26 Jul 2024"})):
        for day, time in (("one", FIRST), ("two", NEXT)):
            set_clock(monkeypatch, time)
            config = make(f"{name}-{day}", chat_template_kwargs=kwargs, stages=None, max_steps=1, samples=0)
            run(config)
            states.append(json.loads(last_state(config))["state"]["data"])
    dated, later, fixed, same = states
    assert dated != later and fixed == same


def test_other_arguments_are_another_run(make):
    config = make("run", stages=None, max_steps=1, samples=0, chat_template_kwargs={"date_string": "1 May"})
    run(config)
    other = replace(config, resume=True, max_steps=2, chat_template_kwargs={"date_string": "2 May"})
    with pytest.raises(ConfigError, match=r"chat_template_kwargs: the run .* was started with .*1 May"):
        run(other)
    run(replace(config, resume=True, max_steps=2))


def test_a_checkpoint_from_before_there_was_a_clock(monkeypatch):
    set_clock(monkeypatch, NEXT)
    assert clock_of(Checkpoint(Path("step-1"), {})) == clock_of(None) == NEXT
