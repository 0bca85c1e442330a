"""report.html, comparisons and model cards of runs with rounds: what their events say, and no more."""

import json

import numpy as np
import pytest
from markupsafe import Markup
from rich.console import Console

from fastdpo.publish.model_card import model_card
from fastdpo.report.charts import description
from fastdpo.report.compare import render
from fastdpo.report.history import read_run
from fastdpo.report.plots import draw
from fastdpo.report.rounds import extremes, kl_unknown, round_charts, round_table, rounds_of
from fastdpo.training.log import RunLog
from tests.report.test_report import HOSTILE, STAGE, event, page_of, train_line, words, write_run


@pytest.fixture
def quick(monkeypatch):
    """Charts as empty pictures, for tests of the words around them."""
    for name in ("page.draw", "page.draw_lengths", "compare.draw"):
        monkeypatch.setattr(f"fastdpo.report.{name}", lambda *_: Markup("<svg></svg>"))


def round_event(minute, number, step, score, text="Yes.", **values):
    shown = lambda what, score: {
        "row": 10 * number,
        "prompt": [{"role": "user", "content": f"Round {number}?"}],
        "text": f"{text} ({what})",
        "score": score,
    }
    numbers = {"objective/scores": score, "objective/scores_std": 1.5, "objective/scores_stderr": 0.125}
    numbers |= {"val/contain_eos_token": 0.75, "completions/mean_length": 20.0 + number}
    numbers |= {"completions/max_length": 40, "prompts": 24, "responses": 96, "truncated": 24}
    numbers |= {"tied_pairs": 31, "no_signal": 7, "resets": 5, "forced_tokens": 50}
    ends = {"best": shown("best", 4.0), "worst": shown("worst", -1.0)}
    return event(minute, "round", round=number, step=step, **numbers, **ends, **values)


def of_rounds(folder, scores=(1.0, 1.5, 2.0, 3.25), kl=True, events=None, text="Yes.", **config):
    """A finished run of four rounds, two steps each."""
    made = [
        round_event(n, n, 2 * n - 2, score, text, **({"objective/kl": 0.5 * (n - 1)} if kl else {}))
        for n, score in enumerate(scores, 1)
    ]
    lines = [train_line(0, step) for step in range(1, 9)]
    config = (
        dict(rounds=4, reward="judge/reward.py:score", lora_rank=8 if kl else None, max_length=512) | config
    )
    config.setdefault("sample", {"prompts": 24, "responses": 4, "max_new_tokens": 40})
    events = events or [event(0, "start"), made[0], event(1, "stage", **STAGE), *made[1:]]
    return write_run(folder, lines, [*events, event(30, "done", seconds=9.0)], **config)


def test_a_page_of_rounds_says_how_they_scored(tmp_path, quick):
    page = page_of(of_rounds(tmp_path / "run"))
    text = words(page)
    for said in (
        "4 rounds of 24 prompts, 4 samples each, scored by judge/reward.py:score.",
        *("Score 3.250 ± 0.12 from 1.000 (+2.25)", "KL from the start 1.500 in round 4"),
        *("Length, tokens 24.00 from 21.00 (+3.00)", "Samples that ended 75.0%"),
        "2 2 1.500 ± 0.12 1.50 0.5000 22.0 75.0% 17 of 24 31 5",
        *("Round 1, its best and its worst sample", "Round 3, its", "Round 4, its"),
        *("Best: 4.000 (row 10) user: Round 1? Yes. (best)", "Worst: −1.000 (row 40) user: Round 4?"),
        "round 4: score 3.250 ± 0.12 over 96 samples, 7 prompts without a signal",
        "The reference is each round's start, so what is over it begins anew in each",
    ):
        assert said in text, said
    assert "Round 2, its" not in text and "What this report lacks" not in text
    tiles = words(page.partition('class="tiles"')[2].partition("</ul>")[0])
    assert "ccuracy" not in tiles  # over a reference that moves it says little


def test_no_number_of_a_moving_reference_is_called_better(tmp_path, quick):
    numbers = page_of(of_rounds(tmp_path / "run")).partition('id="numbers"')[2].partition("</section>")[0]
    assert "loss" in numbers and "better" not in numbers and "worse" not in numbers


def test_an_unknown_kl_is_said_and_has_no_column(tmp_path, quick):
    text = words(page_of(of_rounds(tmp_path / "run", kl=False)))
    assert "The KL to the start is not known: all weights train" in text
    assert "the drift from the start is unbounded" in text
    assert "1 0 1.000 ± 0.12 1.50 21.0 75.0% 17 of 24 31 5" in text
    lora = read_run(of_rounds(tmp_path / "free", kl=False, lora_rank=8))
    assert "the objective refers to nothing" in kl_unknown(lora)
    assert not kl_unknown(read_run(of_rounds(tmp_path / "known"))) and not kl_unknown(
        read_run(write_run(tmp_path / "dpo"))
    )


def test_the_last_event_of_a_round_counts(tmp_path):
    events = [event(0, "start"), round_event(1, 1, 0, 1.0), round_event(2, 2, 2, 9.0), event(3, "stopped")]
    events += [event(4, "resume", step=2), round_event(5, 2, 2, 1.5)]
    found = rounds_of(read_run(of_rounds(tmp_path / "run", events=events)))
    assert [(one["round"], one["objective/scores"]) for one in found] == [(1, 1.0), (2, 1.5)]


def test_rounds_behind_the_checkpoint_are_forgotten(tmp_path):
    events = [event(0, "start"), *(round_event(n, n, 2 * n - 2, n) for n in (1, 2, 3))]
    events += [event(4, "resume", step=2)]
    run = of_rounds(tmp_path / "run", events=events)
    assert [one["round"] for one in rounds_of(read_run(run))] == [1, 2]


def test_what_a_model_wrote_stays_text(tmp_path, quick):
    page = page_of(of_rounds(tmp_path / "run", text=HOSTILE + "x" * 7000))
    assert "<script" not in page and "<img" not in page and "49 }}" not in page
    assert "more characters in rounds/round-1.jsonl]" in page


def test_charts_of_rounds(tmp_path):
    history = read_run(of_rounds(tmp_path / "run"))
    made = {chart.name: chart for chart in round_charts(history)}
    assert list(made) == ["round_score", "round_kl", "round_length", "round_ended"]
    score = made["round_score"]
    assert description(score) == "Score, rounds 1 to 4: samples from 1.000 to 3.250."
    np.testing.assert_array_equal(score.curves[0].error.value, [0.125] * 4)
    assert "fill-opacity: 0.18" in draw(score, [], None)  # the band
    assert "fill-opacity: 0.18" not in draw(made["round_kl"], [], None)
    assert "In the last round 25.0% were cut there." in made["round_length"].note


def test_a_band_is_where_the_error_is_known(tmp_path):
    made = [round_event(n, n, n, float(n)) for n in (1, 2, 3)]
    made[1]["objective/scores_stderr"] = None  # of a single prompt
    chart, *_ = round_charts(read_run(of_rounds(tmp_path / "run", events=[event(0, "start"), *made])))
    assert chart.curves[0].error.step.tolist() == [1, 3] and len(chart.curves[0].series) == 3
    assert "<svg" in draw(chart, [], None)


def test_samples_and_temperature_are_told(tmp_path):
    sample = {"temperature": 0.7, "missing_eos_penalty": 1.0}
    history = read_run(of_rounds(tmp_path / "run", sample=sample))
    notes = {chart.name: chart.note for chart in round_charts(history)}
    assert "has lost 1 of it" in notes["round_score"] and "it has a bias" in notes["round_kl"]


def test_one_round_alone(tmp_path, quick):
    events = [event(0, "start"), round_event(1, 1, 0, 1.0)]
    history = read_run(of_rounds(tmp_path / "run", events=events))
    assert [one["round"] for one in extremes(history)] == [1] and len(round_table(history)) == 1
    assert "Score 1.000 ± 0.12 in round 1" in words(page_of(history.run))


def test_a_damaged_round_costs_its_part_alone(tmp_path, quick):
    text = words(page_of(of_rounds(tmp_path / "run", events=[event(0, "start"), event(1, "round", round=1)])))
    assert "The part 'rounds' of this report could not be made" in text and "Charts" in text


def test_a_run_without_rounds_has_nothing_of_them(tmp_path, quick):
    run = write_run(tmp_path / "run")
    page = page_of(run)
    assert "#rounds" not in page and 'id="rounds"' not in page and "samples each" not in page
    assert not round_charts(read_run(run)) and not extremes(read_run(run))


def test_runs_of_rounds_over_each_other(tmp_path, quick):
    runs = [of_rounds(tmp_path / "a"), of_rounds(tmp_path / "b", (2.0, 2.0, 2.0, 2.5), kl=False)]
    page = render([read_run(run) for run in (*runs, write_run(tmp_path / "c"))])
    text = words(page)
    assert "a 3.250 ± 0.12 from 1.000 1.500 24.00 from 21.00" in text
    assert "b 2.500 ± 0.12 from 2.000 not known 24.00" in text
    assert "Of each round's samples" in text
    assert 'aria-label="Score, rounds 1 to 4: a from 1.000 to 3.250; b from 2.000 to 2.500.' in page
    plain = words(render([read_run(write_run(tmp_path / f"d{i}", beta=0.1 * i)) for i in (1, 2)]))
    assert "before it trained" not in plain and "Of each round" not in plain


def test_the_card_says_how_the_model_was_sampled_and_scored(tmp_path):
    sample = {"prompts": 24, "responses": 4, "max_new_tokens": 40, "resets": 0.5, "missing_eos_penalty": 1.0}
    run = of_rounds(tmp_path / "run", sample=sample, reward="/home/me/secret/reward.py:score")
    card = model_card(read_run(run), run / "model")
    for said in (
        "- 4 rounds: each took up to 24 prompts of the data, sampled 4 responses to each",
        "- reward: `reward.py:score`, less 1 where a response did not end in time\n",
        "- reference: the model as each round found it\n",
        "- resets: a share of 0.5 of the prompts",
        "| 4 | 6 | 3.250 ± 0.12 | 1.500 | 24.0 | 75.0% |",
    ):
        assert said in card, said
    assert "secret" not in card and "`sample`" not in card
    start = of_rounds(tmp_path / "start", reference="start", reward="org/reward-model", kl=True)
    card = model_card(read_run(start), start / "model")
    assert "- reference: the model that the run started from\n" in card
    assert "- reward: [org/reward-model](https://huggingface.co/org/reward-model)\n" in card
    full = of_rounds(tmp_path / "full", kl=False)
    card = model_card(read_run(full), full / "model")
    assert "How far the model is from its start was not measured." in card and "objective/kl" not in card
    dpo = write_run(tmp_path / "dpo")
    assert "round" not in model_card(read_run(dpo), dpo / "model")


def test_the_line_of_a_round(tmp_path, capsys):
    log = RunLog(tmp_path, Console(width=200), type("", (), {"log": lambda *_: None})())
    numbers = {
        k: v for k, v in round_event(1, 1, 0, 1.0).items() if k not in ("time", "event", "step", "round")
    }
    log.round(2, 4, 6, numbers | {"objective/kl": -0.001})
    out = capsys.readouterr().out
    assert out.startswith("round 2 of 4: score 1.000 ± 0.125 · KL 0.00 · 75% ended · 21 tokens")
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line["round"] == 2 and line["objective/kl"] == -0.001 and "best" not in line
