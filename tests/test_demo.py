"""The demo stopped, and what it shows; that it learns is seen where it is installed, in test_wheel.py."""

import io
import json
import signal

import pytest
from rich.console import Console

from fastdpo import demo as demos
from fastdpo.demo import demo
from fastdpo.errors import Stopped
from fastdpo.training.run import spread
from tests import tiny


def test_a_stopped_demo_says_how_to_go_on(tmp_path, monkeypatch):
    def stopped(config, console):
        raise Stopped(signal.SIGTERM, "stopped; the same command with --resume goes on")

    monkeypatch.setattr("fastdpo.demo.train", stopped)
    with pytest.raises(Stopped, match="stopped by SIGTERM; the same command starts it over") as caught:
        demo(tmp_path / "demo")
    assert "--resume" not in str(caught.value)
    with pytest.raises(Stopped):  # and it does
        demo(tmp_path / "demo")


def test_the_model_is_rude_at_first_and_no_pair_is_about_a_held_out_dish(tmp_path):
    demos.write_data(tmp_path / "data")
    lines = {file.stem: file.read_text().splitlines() for file in (tmp_path / "data").iterdir()}
    right = {answer for dish in demos.DISHES for answer in demos.helpful_answers(dish)}
    chosen = [json.loads(line)["chosen"][0]["content"] in right for line in lines["sft"]]
    assert sum(chosen) * 3 == len(chosen)
    assert not any(dish in line for dish in demos.HELD_OUT for line in lines["train"])
    assert all(any(dish in line for dish in demos.HELD_OUT) for line in lines["held_out"])


def test_the_result_counts_only_answers_that_are_right(tmp_path, monkeypatch):
    """What is merely not rude, such as no words at all, is not helpful."""
    turn, console = (
        {"role": "user", "content": "How do I make curry?"},
        Console(file=io.StringIO(), width=200),
    )
    samples = [{"when": when, "turns": [turn], "completion": when} for when in ("start", "end")]
    metrics = [{"eval_loss": 0.7, "eval_logps/accuracies": 0.25, "eval_rewards/margins": 0.0}]
    metrics += [{"loss": 0.6}, {"eval_loss": 0.5, "eval_logps/accuracies": 1.0, "eval_rewards/margins": 2.0}]
    (tmp_path / "dpo").mkdir()
    for name, records in (("samples", samples), ("metrics", metrics)):
        (tmp_path / f"dpo/{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))

    def complete(folder, questions):
        if folder == tmp_path / "sft/model":
            return ["amoleamole"] * len(questions)
        return [demos.helpful_answers(dish)[1] for dish in demos.HELD_OUT for _ in demos.QUESTIONS]

    monkeypatch.setattr(demos, "complete", complete)
    result = demos.show_result(tmp_path, console)
    assert (result["helpful_before"], result["helpful_after"]) == (0.0, 1.0)
    said = console.file.getvalue()
    assert "0% -> 100% of 24" in said and "25% -> 100%" in said and "0 -> +2.00" in said
    assert "How do I make curry? │ start" in said


@pytest.mark.parametrize("count", [1, 3, 4, 5, 7, 9])
def test_samples_are_from_all_over_the_list(count):
    groups = [tiny.group(row, 3 + row, [2, 2]) for row in range(7)]
    rows = [group.row for group in spread(groups, count)]
    assert len(rows) == min(count, 7) and rows == sorted(set(rows)) and rows[0] == 0
    assert count < 3 or rows[-1] >= 4
    assert spread(groups, 0) == []
