"""benchmarks.learning.online and .real.rounds: what an answer is worth, arms, tables."""

import json
from dataclasses import replace

import pytest
from rich.console import Console

from benchmarks.learning import dishes, online
from benchmarks.learning.real import rounds
from benchmarks.learning.real.training import Place
from benchmarks.tables import online_blocks
from fastdpo.convert.convert import config_of
from fastdpo.demo import RATINGS, make_model

SIZES = online.Sizes()
MACHINE = {"threads": 2, "cpu": "CPU", "gpu": None}


def test_an_answer_is_worth_its_rating_about_the_dish_that_was_asked_for():
    a, b, c = dishes.DISHES["pesto"]
    known = {text.format(dish="pesto", a=a, b=b, c=c): rating for text, rating in RATINGS.items()}
    asked = ["user\nWhat goes into pesto?\nassistant"] * len(known)
    assert dishes.score(asked, list(known)) == list(known.values())
    assert set(dishes.score([text.replace("pesto", "curry") for text in asked], list(known))) == {0}
    assert dishes.score(["Hello.", asked[0]], [next(iter(known)), "basil"]) == [0, 0]


def test_arms_have_the_same_prompts_and_steps_and_refer_to_the_start(tmp_path):
    for arm in SIZES.arms:
        config = config_of(online.keys(tmp_path, SIZES, arm, 1e-3, 1), {})
        if arm == online.GIVEN:
            assert config.max_steps == SIZES.steps
            continue
        assert config.rounds * config.sample["prompts"] == 72 * SIZES.times == SIZES.steps * config.batch_size
        assert config.reference == "start" and config.sample["responses"] == online.RESPONSES
        assert ("resets" in config.sample) == arm.startswith("DR-PO")
    assert online.keys(tmp_path, SIZES, "online DPO, a round a step", 1e-3, 1)["rounds"] == SIZES.steps


def test_an_arm_gets_its_best_rate_once_all_are_tried(tmp_path):
    first, second = "online DPO, 6 rounds", "rloo, 6 rounds"
    study = online.Study(replace(SIZES, arms=(first, second), seeds=(0,)), tmp_path, tmp_path, 1, 0.0)
    assert [job[1] for job in study.jobs()] == [*SIZES.rates] * 2
    for rate, reward in zip(SIZES.rates, (2.0, 3.0, 1.0, 0.0)):
        study.add((first, rate, online.UNREPORTED), {"reward": reward})
    jobs = list(study.jobs())
    assert jobs[0] == (first, 1e-3, 0) and {job[0] for job in jobs[1:]} == {second}
    study.add(jobs[0], {"reward": 2.5})
    assert next(study.jobs())[0] == second
    assert [rate for _, rate, _ in online.tries(SIZES, online.GIVEN)] == [r / 2 for r in SIZES.rates]


def test_an_arm_is_trained_and_measured(tmp_path):
    sizes = replace(online.DRY, sft_steps=1)
    dishes.make_start(tmp_path, 0, sizes.sft_steps, sizes.times)
    asked = [json.loads(line) for line in (tmp_path / "data/asked.jsonl").open()]
    assert len(asked) == 72 and not any(dish in str(asked) for dish in dishes.HELD_OUT)
    found = online.trained(tmp_path, sizes, "DR-PO (rloo, resets), 6 rounds", 1e-3, 0)
    assert found["steps"] == len(found["scores"]) == 6 and found["prompts"] == 72
    assert found["kl"] > 0 and found["reward"] == 0 and found["unknown"] == 1
    assert online.measured(tmp_path, sizes, None, 0)["kl"] == 0


def test_a_table_of_arms_and_what_they_gain_over_offline():
    numbers = lambda reward: dict(reward=reward, kl=0.5, helpful=0.25, unknown=0.0, learning_rate=2e-3)
    arms = {
        online_blocks.OFFLINE: {"0": numbers(2.0), "1": numbers(3.0)},
        "online": {"0": numbers(2.5), "1": numbers(4.0)},
    }
    sizes = {"steps": 18, "batch_size": 12, "responses": 4, "measured": 16, "rates": [1e-3, 2e-3]}
    record = {"arms": arms, "start": numbers(1.0), "sizes": sizes, "common": {"lora_rank": 16}, "worth": "w"}
    text = online_blocks.online(record | MACHINE, "[results](x/online_cpu.json)")
    assert "216 prompts, 4 answers" in text and "(x/plots/online_cpu.svg)" in text
    assert f"| {online_blocks.OFFLINE} | 0.002 | 2.500 ± 0.707 (2) | | 0.500" in text
    assert "| online | 0.002 | 3.250 ± 1.061 (2) | +0.750 ± 0.354 (2) |" in text


def test_rounds_on_an_assistant_are_told_and_drawn(tmp_path):
    pytest.importorskip("vaderSentiment", reason="pip install 'fastdpo[learn]'")
    make_model(tmp_path / "model")
    sizes = rounds.DRY
    place = Place(tmp_path / "work", str(tmp_path / "model"), sizes.prompts, sizes.responses, sizes.held_out)
    found = rounds.run(sizes, place, Console(quiet=True))
    assert [one["round"] for one in found["rounds"]] == [1, 2] and found["end"]["step"] == 2
    assert found["rounds"][0]["objective/kl"] == 0 and found["start"]["kl"] == 0
    record = {"sizes": rounds.about(sizes)} | found | MACHINE
    text = online_blocks.assistant(record, "[results](x/rounds_real_cpu.json)")
    assert "Rounds of 128 prompts were meant" in text and "2 rounds of 4 prompts, 2 answers" in text
    assert "(x/plots/rounds_real_cpu_kl.svg)" in text
    drawn = rounds.draw("x", record, tmp_path)
    assert {path.name for path in drawn} >= {"x_scores.svg", "x_kl.svg"}
