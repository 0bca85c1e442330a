"""`fastdpo report`: one run's page anew; several runs over each other, and when one is called better."""

import json
import re

import numpy as np
import pytest
from markupsafe import Markup

from fastdpo.cli import main
from fastdpo.report import beside
from fastdpo.report.history import read_run
from tests.report.test_report import (
    BROWSER,
    HOSTILE,
    STAGE,
    VERSIONS,
    eval_line,
    event,
    looked_at,
    page_of,
    train_line,
    words,
    write_run,
)

ROWS = {"training": "aa", "held-out": "bb"}
DIFFICULTY = np.random.default_rng(0).normal(0, 3, 40)  # of 40 held-out prompts, common to all runs


@pytest.fixture
def quick(monkeypatch):
    """Charts as empty pictures, for tests of the words around them."""
    for name in ("page.draw", "page.draw_lengths", "compare.draw"):
        monkeypatch.setattr(f"fastdpo.report.{name}", lambda *_: Markup("<svg></svg>"))


def add_held_out(run, step, **values):
    """A line of held_out.jsonl, and its means and errors at that step of metrics.jsonl."""
    line = {"eval_loss": 0.5, "eval_rewards/margins": 0.2}
    full = {"loss": "loss", "alone": "logps/accuracies", "over": "rewards/accuracies"}
    columns = {full[name]: list(map(float, column)) for name, column in values.items()}
    for name, column in columns.items():
        line |= {f"eval_{name}": float(np.mean(column))}
        line |= {f"eval_{name}_stderr": float(np.std(column, ddof=1)) / len(column) ** 0.5}
    (run / "metrics.jsonl").open("a").write(json.dumps({"stage": 0, "step": step, **line}) + "\n")
    (run / "held_out.jsonl").open("a").write(json.dumps({"stage": 0, "step": step, **columns}) + "\n")


def make_run(folder, rows=ROWS, ends=True, events=(), **config):
    lines = [train_line(0, step) for step in range(10, 101, 10)]
    lines += [eval_line(0, 0, 0.6931), eval_line(0, 50, 0.5)]
    told = [event(0, "start", versions=VERSIONS, device="GPU A", rows=rows), event(1, "stage", **STAGE)]
    told += [*events, *([event(30, "done", seconds=1800.0)] if ends else [])]
    return write_run(folder, lines, told, **config)


def sweep(folder, shift=(0.0, 0.5, 0.02), **keys):
    """Three runs whose losses differ by as much on every prompt, but for a little noise."""
    runs = []
    for i, more in enumerate(shift):
        own = {name: values[i] for name, values in keys.items()}
        runs.append(make_run(folder / f"run-{i}", **own))
        noise = np.random.default_rng(i + 1).normal(0, 0.2, 40)
        add_held_out(
            runs[-1], 100, loss=5 + DIFFICULTY + more + noise, alone=np.arange(40) < 20 + 9 * (i == 1)
        )
    return runs


def cells_of(runs):
    histories = [read_run(run) for run in runs]
    at = [beside.scored_at(history) for history in histories]
    parts = [beside.by_prompt(history, where) for history, where in zip(histories, at)]
    columns = beside.held_out(histories, at, parts, beside.settings(histories))
    return {column.title: column for column in columns}


def compared(runs, *options):
    assert main(["report", *map(str, runs), *map(str, options)]) == 0
    return (runs[0].parent / "comparison.html").read_text(encoding="utf-8")


def test_settings_that_differ_name_the_runs(tmp_path, quick):
    runs = sweep(tmp_path, beta=[0.05, 0.1, None], reference_cache=["a.sqlite", "b.sqlite", "c.sqlite"])
    text = words(compared(runs))
    assert "3 runs compared" in text and "beta 0.05" in text and "beta default" in text
    settings = text.partition("Settings that differ All other")[2].partition("Held-out numbers")[0]
    assert "beta 0.05 0.1 default" in settings and "reference_cache a.sqlite b.sqlite" in settings
    assert "output_dir" not in settings and "learning_rate" not in settings
    histories = [read_run(run) for run in runs]
    assert beside.names(histories, {}) == ["run-0", "run-1", "run-2"]
    many = {"beta": [1, 2, 3], "seed": [1, 2, 3], "batch_size": [1, 2, 3]}
    assert beside.names(histories, many) == ["run-0", "run-1", "run-2"]
    alike = [read_run(make_run(tmp_path / name / "dpo")) for name in ("a", "b")]
    assert beside.names(alike, {}) == ["a/dpo", "b/dpo"]


def test_stages_differ_by_what_each_has(tmp_path):
    sft = {"objective": "sft"}
    stages = [[sft, {"objective": "ipo", "beta": b}] for b in (0.1, 0.2)] + [[sft]]
    runs = [read_run(make_run(tmp_path / str(i), stages=s, seed=0)) for i, s in enumerate(stages)]
    assert beside.settings(runs[:2]) == {"stage 2: beta": [0.1, 0.2]}
    assert beside.settings(runs)["stages"] == [2, 2, 1]
    assert beside.settings(runs)["stage 2: objective"] == ["ipo", "ipo", None]
    plain = [read_run(make_run(tmp_path / f"p{seed}", seed=seed)) for seed in (0, 1)]
    assert beside.settings(plain) == {"seed": [0, 1]}


def test_better_is_only_what_is_more_than_chance_prompt_by_prompt(tmp_path, quick):
    runs = sweep(tmp_path)
    loss = cells_of(runs)["loss"]
    assert [cell.verdict for cell in loss.cells] == ["best", "worse", ""]
    assert 2 * float(loss.cells[0].error) > 0.5  # alone, none of these losses is known so well
    differences = np.array([json.loads((run / "held_out.jsonl").read_text())["loss"] for run in runs])
    error = np.std(differences[1] - differences[0], ddof=1) / 40**0.5
    change = differences[1].mean() - differences[0].mean()
    found = re.fullmatch(r"\+(.*) ± (.*)", loss.cells[1].apart)
    assert (float(found[1]), float(found[2])) == (
        pytest.approx(change, rel=0.01),
        pytest.approx(error, rel=0.05),
    )
    alone = cells_of(runs)["accuracy of the policy alone"]
    assert [cell.verdict for cell in alone.cells] == ["worse", "best", "worse"]
    assert alone.cells[1].text == "72.5%" and alone.cells[0].apart.startswith("−22.5 pp ± 6.7 pp")
    text = words(compared(runs))
    assert "over 40 prompts" in text and text.count(" best ") >= 2
    (runs[1] / "held_out.jsonl").unlink()
    assert cells_of(runs)["loss"].cells[1].apart.endswith("no error known")
    assert cells_of(runs)["loss"].cells[1].verdict == ""


def test_few_prompts_make_no_run_better(tmp_path, quick):
    """Two standard errors of a handful of differences are no bound of 95%."""
    for n, verdicts in ((19, ["", ""]), (20, ["best", "worse"])):
        runs = [make_run(tmp_path / f"{n}-{i}") for i in range(2)]
        for i, run in enumerate(runs):
            add_held_out(run, 100, loss=np.arange(n) * (1 + 0.01 * i) + i)
        column = cells_of(runs)["loss"]
        assert [cell.verdict for cell in column.cells] == verdicts
        assert (column.why_not == "19 held-out prompts are too few to tell; score 20 or more") == (n == 19)


def test_numbers_that_cannot_be_compared_are_not(tmp_path, quick):
    betas = cells_of(sweep(tmp_path / "betas", beta=[0.05, 0.1, 0.5]))
    assert betas["loss"].why_not == "it depends on beta, in which the runs differ"
    assert not any(cell.apart for cell in betas["loss"].cells)
    assert betas["accuracy of the policy alone"].cells[1].verdict == "best"
    other = [ROWS, ROWS | {"held-out": "cc"}, ROWS]
    runs = sweep(tmp_path / "rows", rows=other)
    assert all(not cell.apart for column in cells_of(runs).values() for cell in column.cells)
    assert "The runs were scored on different held-out rows" in words(compared(runs))
    runs = sweep(tmp_path / "unknown", rows=[ROWS, {}, ROWS])
    assert "do not say which held-out rows they have" in words(compared(runs))
    runs = sweep(tmp_path / "trained", rows=[ROWS, ROWS | {"training": "cc"}, ROWS])
    assert "trained on different rows" in words(compared(runs))
    assert cells_of(runs)["loss"].cells[0].verdict == "best"


def test_the_weights_that_were_kept_are_compared(tmp_path):
    best, last = (make_run(tmp_path / str(keep), load_best=keep, eval_data="e") for keep in (True, False))
    for run in (best, last):
        add_held_out(run, 100, loss=np.full(40, 0.9))
    assert beside.scored_at(read_run(best)) == (0, 50) and beside.scored_at(read_run(last)) == (0, 100)


def test_runs_that_go_on_were_killed_or_logged_nothing(tmp_path, quick):
    runs = sweep(tmp_path)
    going = make_run(tmp_path / "going", ends=False)
    fresh = write_run(tmp_path / "fresh", [], [event(0, "start", rows=ROWS)], [])
    (runs[0] / "metrics.jsonl").open("a").write('{"stage": 0, "st')
    text = words(compared([*runs, going, fresh]))
    assert "not ended" in text and "the last line is cut short, as by a kill" in text
    (runs[0] / "held_out.jsonl").open("a").write('{"stage": 0, "st')
    assert words(compared(runs)).count("held_out.jsonl: the last line is cut short") == 1
    (fresh / "metrics.jsonl").unlink()
    assert "metrics.jsonl is missing: nothing was logged yet" in words(compared([*runs, fresh]))


def test_all_runs_are_drawn_over_each_other(tmp_path):
    runs = [make_run(tmp_path / f"run-{i}", seed=i) for i in range(6)]
    page = compared(runs)
    assert page.count('role="img"') == page.count("<svg viewBox")
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    loss = page.partition('aria-label="On the held-out rows: Loss')[2].partition("</figure>")[0]
    for colour in ("train", "held-out", "chosen", "rejected"):
        assert f"stroke: var(--{colour})" in loss
    assert "stroke-dasharray" in loss and "#0072b2" not in page.partition("</style>")[2]
    assert page.partition('class="legend"')[2].partition("</ul>")[0].count("<li>") == 6
    assert "It is." in page and page.count("Yes, very.") == 6


def test_hostile_text_stays_text(tmp_path, quick):
    row = {"row": 1, "prompt": HOSTILE, "chosen": HOSTILE, "completion": HOSTILE, "stage": 0, "step": 0}
    runs = [
        write_run(
            tmp_path / f"<b>{i}",
            samples=[row | {"when": "start"}],
            model=HOSTILE,
            chat_template=f"{i}{HOSTILE}",
        )
        for i in range(2)
    ]
    page = compared(runs)
    assert "<script" not in page and "<img" not in page and "<b>" not in page and "49 }}" not in page
    assert page.count("&lt;script&gt;alert") >= 4


def test_what_is_no_run_is_said(tmp_path, quick, capsys):
    runs, empty = sweep(tmp_path / "runs"), tmp_path / "empty"
    empty.mkdir()
    mine = tmp_path / "mine.html"
    mine.write_text("notes")
    for given, said in [
        ([], "which run?"),
        ([empty], f"{empty} holds no run (none of config.yaml, metrics.jsonl, events.jsonl)\n"),
        ([tmp_path / "no"], f"{tmp_path / 'no'} does not exist\n"),
        ([tmp_path / "rums"], f"does not exist; did you mean '{tmp_path / 'runs'}'?"),
        ([mine], "holds no run"),
        ([tmp_path / "runs"], f"did you mean {runs[0]}, {runs[1]}, {runs[2]}?"),
        ([*runs, runs[0] / "../run-0"], "is named twice"),
        ([*runs, "--output", mine], f"{mine} exists and is no comparison of runs"),
        ([*runs, "--output", empty], "exists and is no comparison of runs"),
        ([*runs, "--output", mine / "x.html"], "report: cannot write"),
        ([runs[0], "--output", tmp_path / "x.html"], "--output is for a comparison"),
    ]:
        assert main(["report", *map(str, given)]) == 2
        assert said in capsys.readouterr().err
    assert mine.read_text() == "notes"
    fresh = [write_run(tmp_path / f"fresh-{i}", [], [event(0, "start")], []) for i in range(2)]
    assert main(["report", *map(str, fresh)]) == 2
    assert "none of these runs has logged a number yet" in capsys.readouterr().err
    many = [make_run(tmp_path / "many" / str(i)) for i in range(13)]
    assert main(["report", *map(str, many)]) == 2
    assert "13 runs, and a page tells 12 apart at most" in capsys.readouterr().err


def test_where_the_page_goes(tmp_path, quick, capsys, monkeypatch):
    runs = sweep(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    assert main(["report", "runs/run-0", "runs/run-1"]) == 0
    assert capsys.readouterr().out == "runs/comparison.html: open it in a browser\n"
    first = (tmp_path / "runs/comparison.html").read_text()
    assert main(["report", *sorted(map(str, (tmp_path / "runs").iterdir()))]) == 0  # as runs/* does
    assert "left out, as files are no run folders:" in capsys.readouterr().out
    assert (tmp_path / "runs/comparison.html").read_text() != first
    assert (
        main(["report", *map(str, runs), "--output", "here.html"]) == 0 and (tmp_path / "here.html").exists()
    )
    assert main(["report", "runs/run-0"]) == 0
    assert capsys.readouterr().out.endswith("runs/run-0/report.html: open it in a browser\n")
    assert (runs[0] / "report.html").exists()


def test_a_run_that_goes_on_reloads_its_page(tmp_path, quick):
    assert 'http-equiv="refresh"' in (going := page_of(make_run(tmp_path / "going", ends=False)))
    assert "anew at every checkpoint (each 100 steps)" in words(going)
    assert 'http-equiv="refresh"' not in page_of(make_run(tmp_path / "done"))


def test_a_report_has_the_errors_too(tmp_path, quick):
    run = make_run(tmp_path / "run")
    add_held_out(run, 100, loss=np.arange(40) / 40, over=np.arange(40) < 30)
    text = words(page_of(run))
    assert "0.4875 ± 0.046" in text and "75.0% ± 6.9 pp" in text


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome")
@pytest.mark.parametrize("size, dark", [("1280,3000", False), ("390,3000", False), ("1280,3000", True)])
def test_in_a_browser(tmp_path, size, dark):
    runs = sweep(tmp_path)
    compared(runs)
    dom = looked_at(tmp_path / "comparison.html", size, dark)
    for section in ("runs", "settings", "numbers", "charts", "samples"):
        assert f'<section id="{section}"' in dom
