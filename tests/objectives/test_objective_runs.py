"""Every objective through `train` on small data: finite metrics, its own start, errors before any work."""

import json
import math
import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fastdpo.api import fill_reference, train
from fastdpo.config.keys import Config
from fastdpo.data.store.facts import Facts
from fastdpo.errors import ConfigError, DataError
from fastdpo.objectives import make
from fastdpo.objectives.catalogue import NAMES
from fastdpo.reference.fill import ReferenceTable
from fastdpo.reference.values import Values
from fastdpo.training.job import stage_job
from fastdpo.training.starts import pairs_of_stage
from tests.tiny import group, rows, save_model, sentence, write_jsonl
from tests.training.test_resume import outcome, stopped_in_step

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Paired rows with scores and spans, ranked rows, unpaired rows, and a model."""
    folder = tmp_path_factory.mktemp("inputs")
    draw = random.Random(0)
    paired = [
        row | {"score_chosen": 4.0, "score_rejected": 1.5, "chosen_spans": [[1, 4]], "rejected_spans": []}
        for row in rows(16)
    ]
    word = lambda score: " cat" if score > 2 else " dog"
    ranked = [
        {
            "prompt": sentence(draw, 5),
            "responses": [
                {"text": f" {sentence(draw, 3)}{word(score)}", "score": score} for score in (1, 2, 3, 4)
            ],
        }
        for _ in range(12)
    ]
    unpaired = [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
        for i, row in enumerate(rows(16))
    ]
    desirable = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in rows(16)]
    return {
        "model": save_model(folder / "model"),
        **{
            name: write_jsonl(folder / f"{name}.jsonl", data)
            for name, data in dict(
                paired=paired, ranked=ranked, unpaired=unpaired, desirable=desirable
            ).items()
        },
    }


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr("fastdpo.api.write_report", lambda *args, **keys: None)


@pytest.fixture
def run(inputs, tmp_path):
    def run(data="paired", console=QUIET, **keys):
        values = dict(
            model=inputs["model"],
            data=inputs.get(data, data),
            eval_data=0.25,
            output_dir=str(tmp_path / "run"),
            learning_rate=1e-3,
            batch_size=6,
            max_steps=2,
            max_tokens=60,
            max_length=64,
            logging_steps=1,
            samples=0,
            dtype="fp32",
        )
        folder = train(Config(**values | keys), console)
        return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]

    return run


@pytest.mark.parametrize("name", [name for name in NAMES if name != "rloo"])  # which trains on samples
def test_every_objective_trains(run, name):
    needs_smoothing = {"label_smoothing": 0.01} if name == "exo_pair" else {}
    lines = run(objective=name, **needs_smoothing)
    losses = [line[key] for line in lines for key in ("loss", "eval_loss") if key in line]
    assert len(losses) == 4 and all(map(math.isfinite, losses))
    objective = make(name, **needs_smoothing)
    if objective.needs_reference:
        start = lines[0]
        assert start["eval_rewards/margins"] == 0
        want = {"sigmoid": math.log(2), "drdpo": math.log(2), "kto": 0.5, "bco": math.log(2), "hinge": 1.0}
        assert start["eval_loss"] == pytest.approx(want.get(name, start["eval_loss"]), abs=1e-6)


@pytest.mark.parametrize("name", ["kto", "bco", "apo_zero_unpaired"])
def test_unpaired_rows_train(run, name):
    lines = run("unpaired", objective=name)
    last = [line for line in lines if "loss" in line][-1]
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen"} <= last.keys()
    assert "rewards/accuracies" not in last
    assert ("z0" in last) == ("eval_z0" in lines[0]) == (name == "kto") and ("first_pass_tokens" in last) == (
        name != "apo_zero_unpaired"
    )


def test_several_objectives_with_weights(run):
    lines = run(objective={"sigmoid": 1.0, "sft": 0.5}, objective_args={"ld_alpha": 0.5}, beta=0.2)
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)


def test_curry_dpo_is_three_stages(run, inputs, tmp_path):
    """Easy, medium and hard: each stage computes two responses a prompt, starts from the stage before, and
    refers to it: its margin starts at 0."""
    stages = [{"pairs": name} for name in ("easy", "medium", "hard")]
    lines = run("ranked", stages=stages)
    starts = [line for line in lines if "eval_loss" in line][::2]
    assert [line["stage"] for line in starts] == [0, 1, 2]
    assert all(line["eval_rewards/margins"] == 0 for line in starts)
    trained = [line for line in lines if "loss" in line]
    assert len(trained) == 6 and all(line["responses_computed"] % 2 == 0 for line in trained)
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert [e["pairs"] for e in events if e["event"] == "pairs"] == ["easy", "medium", "hard"]
    assert [e["responses"] for e in events if e["event"] == "stage"] == [18, 18, 18]


def test_pairs_by_what_the_reference_finds_far_apart(run, tmp_path):
    lines = run("ranked", pairs="easy", pair_gap="logp")
    assert [line["responses_computed"] for line in lines if "loss" in line] == [12, 6]


@pytest.mark.parametrize("rule, loser", [("easy", 2), ("medium", 1), ("hard", 3)])
def test_the_gap_is_of_whole_responses_log_probs(rule, loser):
    """The best response stands at -1; the others 4, 9 and 2 nats away, whatever their ratings."""
    some = group(0, 3, [2, 1, 5, 3])
    sums = np.array([-1.0, -5.0, -10.0, 1.0])
    responses = [replace(r, score=float(4 - i)) for i, r in enumerate(some.responses)]
    some = replace(some, responses=tuple(responses))
    facts = Facts.of([some])
    values = Values(np.unique(facts.key), None)
    values.add(facts.key, facts.scored, np.repeat(sums / facts.scored, facts.scored))
    table = ReferenceTable(values, {})
    config = Config(model="m", data="d", pairs=rule, pair_gap="logp")
    (kept,), _ = pairs_of_stage(stage_job(config), [some], lambda sets: table)
    (pair,) = kept.pairs
    assert kept.responses[pair.winner] is responses[0] and kept.responses[pair.loser] is responses[loser]


def test_kto_on_one_prompt_has_no_reference_point_and_says_so(inputs, run, tmp_path):
    lines = [json.loads(line) for line in Path(inputs["unpaired"]).read_text().splitlines()]
    data = write_jsonl(tmp_path / "one.jsonl", [line | {"prompt": lines[0]["prompt"]} for line in lines])
    console = Console(record=True, width=250, file=open(os.devnull, "w"))
    metrics = run(console=console, data=data, objective="kto")
    assert "all rows have one prompt" in console.export_text()
    assert [line["z0"] for line in metrics if "z0" in line] == [0, 0]


@pytest.mark.parametrize("pair_gap", ["rating", "logp"])
def test_ref_computes_what_the_pairs_of_the_first_stage_need(run, inputs, tmp_path, pair_gap):
    """KTO's mismatched responses too, which depend on the pairs."""
    cache = str(tmp_path / "cache.sqlite")
    keys = dict(objective="kto", pairs="medium", pair_gap=pair_gap, reference_cache=cache)
    values = dict(model=inputs["model"], data=inputs["ranked"], eval_data=0.25, max_length=64, dtype="fp32")
    fill_reference(Config(**values, **keys), QUIET)
    run("ranked", **keys)
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert [e["misses"] for e in events if e["event"] == "reference"] == [0]


def test_ref_refuses_rows_that_training_would(inputs, tmp_path):
    cache = tmp_path / "cache.sqlite"
    config = Config(inputs["model"], data=inputs["unpaired"], max_length=64, reference_cache=str(cache))
    with pytest.raises(DataError, match="row 0: an unpaired row"):
        fill_reference(config, QUIET)
    assert not cache.exists()


def test_flipped_pairs_are_said_and_only_trained_on(run, tmp_path):
    lines = run(flip_pairs=1.0, objective="sft", max_steps=1)
    clean = run(output_dir=str(tmp_path / "clean"), objective="sft", max_steps=1)
    assert lines[0]["eval_loss"] == clean[0]["eval_loss"]  # held-out rows stay as they are
    assert lines[1]["loss"] != clean[1]["loss"]
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert [e["flipped_rows"] for e in events if e["event"] == "pairs"] == [12]


@pytest.mark.parametrize(
    "data, keys, error, says",
    [
        ("paired", dict(objective="dpoo"), ConfigError, "'dpoo' is not one of"),
        (
            "paired",
            dict(objective="ipo", label_smoothing=0.1),
            ConfigError,
            "label_smoothing: ipo does not read",
        ),
        ("paired", dict(objective="sft", beta=0.1), ConfigError, "beta: sft does not read"),
        ("paired", dict(objective_args={"alhpa": 1}, objective="odpo"), ConfigError, "Did you mean 'alpha'"),
        ("unpaired", dict(objective="sigmoid"), DataError, "unpaired row"),
        ("ranked", dict(objective_args={"gamma": 0.5}), DataError, "no token weights"),
        ("unpaired", dict(objective="sft"), DataError, "undesirable"),
        ("paired", dict(objective="odpo", flip_pairs=0.2), ConfigError, "flip_pairs"),
        ("desirable", dict(objective="sft", flip_pairs=0.5), DataError, "no chosen response"),
        ("ranked", dict(objective="sft", flip_pairs=0.5), DataError, "no chosen response"),
        (
            "ranked",
            dict(pair_gap="logp", pairs="best_worst"),
            ConfigError,
            "pair_gap: logp is read only with",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_training(run, tmp_path, data, keys, error, says):
    with pytest.raises(error, match=says):
        run(data, **keys)
    assert not (tmp_path / "run/metrics.jsonl").exists() and not (tmp_path / "run/model").exists()


@pytest.mark.parametrize(
    "data, keys",
    [
        ("unpaired", dict(objective="bco")),
        ("unpaired", dict(objective="kto")),
        ("paired", dict(objective="drdpo", max_tokens=40)),
        ("ranked", dict(stages=[{"pairs": "easy"}, {"pairs": "hard", "objective": "odpo"}], pair_gap="logp")),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value.get("objective", "stages")),
)
@pytest.mark.parametrize("n", [2, 5])
def test_a_stopped_run_goes_on_exactly(inputs, tmp_path, data, keys, n):
    """BCO's running mean, KTO's reference point, a stage's pairs: the same bits after a stop in step n."""
    config = lambda name, **more: Config(
        **dict(
            model=inputs["model"],
            data=inputs[data],
            eval_data=0.25,
            output_dir=str(tmp_path / name),
            learning_rate=1e-3,
            batch_size=4,
            max_steps=3 if "stages" in keys else 6,
            max_length=64,
            logging_steps=4,
            samples=0,
            dtype="fp32",
            reference_cache="off",
        )
        | keys
        | more
    )
    train(config("whole"), QUIET)
    with stopped_in_step(n):
        train(config("stopped"), QUIET)
    train(config("stopped", resume=True), QUIET)
    assert outcome(config("stopped")) == outcome(config("whole"))
