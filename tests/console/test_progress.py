"""Long phases speak where nothing can be drawn over; time passes as the tests say."""

import io
import itertools
import re

import pytest
from rich.console import Console

from fastdpo import Config, train
from fastdpo.console.formatting import about
from fastdpo.console.progress import Lines, make_progress
from fastdpo.data.store import making
from tests import tiny


class Clock:
    def __init__(self, tick=0.0):
        self.now, self.tick = 0.0, tick

    def __call__(self):
        self.now += self.tick
        return self.now


def file_console(clock, **keys):
    return Console(file=io.StringIO(), get_time=clock, width=300, **keys)


def said(total, seconds_each, **keys):
    """[(when, line)] of a task of so many packs."""
    clock, out = Clock(), []
    console = file_console(clock)
    with make_progress(console) as lines:
        task = lines.add_task("reference", total=total, unit="packs", info="", **keys)
        for _ in range(total):
            clock.now += seconds_each
            lines.advance(task)
            if text := console.file.getvalue():
                out.append((clock.now, text.rstrip("\n")))
                console.file.truncate(0)
                console.file.seek(0)
    return out, console.file.getvalue()


def test_what_is_short_says_nothing():
    assert said(50, 0.1) == ([], "")
    assert said(1, 500) == ([], "")  # it is over: what comes of it is said by whoever asked


def test_how_far_and_how_long():
    lines, _ = said(800, 1.0)
    assert lines[0] == (10, "reference: 10 of 800 packs, 10 s, about 13 min left")
    assert lines[1] == (40, "reference: 40 of 800 packs, 40 s, about 13 min left")
    assert lines[-1][1].startswith("reference: 737 of 800 packs, 12 min 17 s, about 1 min left")


@pytest.mark.parametrize(("hours", "most"), [(1, 45), (24, 140)])
def test_long_work_writes_few_lines_and_is_never_silent_for_long(hours, most):
    lines, _ = said(hours * 3600, 1.0)
    times = [0, *(when for when, _ in lines), hours * 3600]
    silences = [(later - before, before) for before, later in itertools.pairwise(times)]
    assert len(lines) < most
    assert all(silence <= 30 or silence <= before / 10 + 1 for silence, before in silences)
    assert max(silences)[0] <= 900


def test_steps_that_take_minutes_have_an_estimate():
    lines, _ = said(10, 400.0)
    assert [text.rpartition(", ")[2] for _, text in lines[:3]] == [
        f"about {n} left" for n in ("1 h", "53 min", "47 min")
    ]


def test_where_a_bar_is_drawn_and_where_not():
    bar = lambda **keys: not isinstance(make_progress(Console(file=io.StringIO(), **keys)), Lines)
    assert bar(force_terminal=True, _environ={"TERM": "xterm"})
    assert not bar(force_terminal=True, _environ={"TERM": "dumb"})
    assert not bar(force_jupyter=True)
    assert not bar()


def test_each_phase_of_a_run_speaks(tmp_path, monkeypatch):
    """As if every look at the clock took 12 s."""
    monkeypatch.setattr(making, "SHARD_ROWS", 200)
    data = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows(600))
    keys = dict(
        max_steps=3,
        max_tokens=400,
        eval_data=0.2,
        reference_cache="off",
        samples=0,
        batch_size=4,
        max_length=128,
    )
    model = tiny.save_model(tmp_path / "model")
    console = file_console(Clock(12))
    train(Config(model=model, data=data, output_dir=str(tmp_path / "run"), **keys), console)
    text = console.file.getvalue()
    for phase, unit in [
        ("reading rows", "rows"),
        ("reference", "packs"),
        ("held-out", "packs"),
        ("sigmoid", "steps"),
    ]:
        assert re.search(rf"^{phase}: [\d,]+ of [\d,]+ {unit}, .* left\b", text, re.M), phase
    assert "━" not in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1, "10 s"),
        (44, "40 s"),
        (99, "1 min 40 s"),
        (136, "2 min 30 s"),
        (725, "12 min"),
        (11111, "3 h 5 min"),
        (200_000, "2 d 8 h"),
    ],
)
def test_about(seconds, text):
    assert about(seconds) == f"about {text}"


def test_no_number_gives_way_on_a_narrow_terminal():
    """A bar, with what a run shows beside it, fits the 80 columns that most terminals have."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None, get_time=Clock())
    with make_progress(console) as bars:
        info = "133.9 pairs/s · 12,981 tokens/s · 0.8 GB"
        bars.add_task("sigmoid", total=42, completed=4, unit="steps", info=info)
    shown = console.file.getvalue()
    assert info in shown and "4/42" in shown and "…" not in shown
