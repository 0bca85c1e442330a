"""The benchmark of rows: the same rows for both, processes and their memory watched, units measured once."""

import json
import os
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace
from xml.etree import ElementTree

import datasets
import pytest
from transformers import AutoTokenizer

from benchmarks.lengths import draw
from benchmarks.rows import contenders, run, text, watch
from benchmarks.tables.__main__ import block
from docs.pictures import rows as picture
from tests.docs.test_pictures import assert_apart_and_inside, words

PLAN = run.Plan(sizes=(4, 40), trl_most=4, one_core_most=4, often=4, resumed=(4,), turns=2, second=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows") / "model"
    assert "made-up" in text.make_model(folder, None)
    return folder


def test_rows_have_the_lengths_and_fewer_are_the_beginning_of_more(model, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK", 8)
    tokenizer = AutoTokenizer.from_pretrained(model)
    known = text.words_of(tokenizer)
    counts = {n: text.write_rows(tmp_path / str(n), "UltraFeedback", n, known) for n in (5, 20)}
    few, many = ((tmp_path / str(n)).read_text().splitlines() for n in counts)
    assert few == many[:5] and len(set(many)) == 20
    wanted = [row for block in range(3) for row in draw("UltraFeedback", 8, seed=block)][:20]
    said = [[json.loads(line)[part][0] for part in ("prompt", "chosen", "rejected")] for line in many]
    assert [[len(one["content"].split()) for one in row] for row in said] == [list(row) for row in wanted]
    assert counts[20] == sum(map(sum, wanted))
    assert [one["role"] for one in said[0]] == ["user", "assistant", "assistant"]
    assert all(len(tokenizer.encode(f" {word}")) == 1 for word in known)


def test_a_tree_is_watched_and_stays_on_its_cores(tmp_path, monkeypatch):
    """A process whose child has the memory, until it has been seen."""
    monkeypatch.setattr(watch, "EVERY", 0)
    monkeypatch.setattr(watch, "SHARE", 0)
    pipe, size, seen = tmp_path / "pipe", 64 << 20, []
    os.mkfifo(pipe)
    child = f"x = b'x' * {size}; open({str(pipe)!r}).read()"
    parent = "import os, subprocess, sys; print(len(os.sched_getaffinity(0))); "
    parent += f"subprocess.run([sys.executable, '-c', {child!r}]); sys.exit(3)"

    def poll(process, seconds):
        seen.append(watch.memory(process.pid)[1] > size)
        if seen[-1] and sum(seen) == 2:  # it waits: after the first look that saw it
            with pipe.open("w"):
                pass

    ours = os.sched_getaffinity(0)
    watched = watch.watch([sys.executable, "-c", parent], 1, {}, tmp_path / "log", poll)
    pss, own = watched.peak()
    assert pss >= own > size and watched.code == 3 and watched.cpu_seconds > 0
    assert watched.peak(until=watched.began - 1) == (0, 0)
    assert (tmp_path / "log").read_text() == "1\n" and os.sched_getaffinity(0) == ours


def test_what_it_started_ends_with_an_interrupted_watch(tmp_path):
    children = []

    def poll(process, seconds):
        children.extend(watch._family(process.pid))
        if children:
            raise KeyboardInterrupt

    child = "import signal; signal.pause()"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with pytest.raises(KeyboardInterrupt):
        watch.watch([sys.executable, "-c", script], 1, {}, tmp_path / "log", poll)
    children[0].wait(60)
    assert not children[0].is_running()


def test_units():
    plan = replace(run.Plan(), sizes=(20, 300), one_core_most=20, often=20, turns=2)
    found = [(unit.rows, unit.cores, unit.turn) for unit in run.units(plan, 6)]
    assert found == [(20, n, turn) for n in (6, 4, 2, 1) for turn in (0, 1)] + [(300, 6, 0)]
    assert [unit.cores for unit in run.units(plan, 1)] == [1, 1, 1]


def test_both_make_the_same_tokens_of_the_same_rows(model, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "rows.jsonl"
    text.write_rows(path, "UltraFeedback", 6, text.words_of(AutoTokenizer.from_pretrained(model)))
    order = {"data": str(path), "model": str(model), "max_length": 4096, "cores": 1, "folder": str(tmp_path)}
    for who in (contenders.ours, contenders.trl):
        marks = []
        found = who(order, marks.append)
        assert marks == ["imported", "ready", "loaded"] and found["groups"] == 6
        order.setdefault("first", found["first"])
        assert order["first"] == found["first"]
    path.write_text(path.read_text().replace('"content": "', '"content": "not ', 1))
    assert contenders.ours(order, marks.append)["first"] != order["first"]


class Machine:
    """Processes that answer at once; `fails` says in which start."""

    def __init__(self, monkeypatch):
        self.started, self.fails, self.first = [], None, {}
        monkeypatch.setattr(run, "watch", self.watch)
        monkeypatch.setattr(run, "Resumed", lambda *_: SimpleNamespace(again=self.again))
        monkeypatch.setattr(run.os, "sync", lambda: None)
        monkeypatch.setattr(run.os, "sched_getaffinity", lambda _: {0, 1})

    def watch(self, command, cores, environment, log):
        who, order, answer = command[-3:]
        self.started.append((who, cores))
        watched = watch.Watched(0.0, looks=[(3.0, 4_000_000_000, 3_000_000_000)], seconds=9.0)
        if len(self.started) == self.fails:
            log.write_text("no memory")
            watched.code = -9
            return watched
        with open(order) as file:
            data = json.load(file)["data"]
        with open(data) as file:
            n = sum(1 for _ in file)
        mark = lambda at: {"at": at, "cpu_seconds": 2 * at, "largest_bytes": 5}
        seconds = n / cores * (1 if who == "ours" else 3)
        marks = {"imported": mark(1.0), "ready": mark(2.0), "loaded": mark(2.0 + seconds)}
        found = {"groups": n, "tokens": 900 * n, "first": self.first.get(who, "same"), "marks": marks}
        with open(answer, "w") as file:
            json.dump(found, file)
        return watched

    def again(self):
        return {"stage_seconds": 2.5, "step_seconds": 3.5, "peak_bytes": 10**9, "peak_own_bytes": 10**8}


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, monkeypatch):
    machine, work = Machine(monkeypatch), tmp_path / "work"
    machine.fails = 9  # the third unit's third start
    with pytest.raises(RuntimeError, match="ours ended with code -9: no memory"):
        run.run(PLAN, work, None, tmp_path)
    assert not work.exists()
    before, machine.fails = machine.started[:-3], None
    path = run.run(PLAN, work, None, tmp_path)
    pairs = lambda cores, starts: [("ours", cores), ("trl", cores)] * starts
    whole = [*pairs(2, 2), ("trl", 2), ("ours", 2), *pairs(1, 2), ("trl", 1), ("ours", 1)]
    whole += [("ours", 2), ("ours", 2), ("fill", 2)]  # of 40 rows only ours; then the resumed ones' cache
    record = json.loads(path.read_text())
    measured = [(one["who"], one["cores"]) for one in record["runs"]]
    assert measured == whole[:-1]
    assert before + machine.started[len(before) + 3 :] == whole
    run.run(PLAN, work, None, tmp_path)
    assert machine.started[-1] == ("fill", 2) and json.loads(path.read_text())["runs"] == record["runs"]
    assert [one["objective"] for one in record["resumed"]] == ["simpo", "sigmoid"]
    assert not work.exists()


def test_other_tokens_are_no_result(tmp_path, monkeypatch):
    Machine(monkeypatch).first["trl"] = "other"
    with pytest.raises(RuntimeError, match="did not make the same token ids"):
        run.run(PLAN, tmp_path / "work", None, tmp_path)


def test_what_has_no_room_is_told(tmp_path, monkeypatch):
    Machine(monkeypatch)
    room = 40 * (run.DISK["data"] + run.DISK["ours"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=room - 1))
    path = run.run(PLAN, tmp_path / "work", None, tmp_path)
    assert {one["rows"] for one in json.loads(path.read_text())["runs"]} == {4}
    assert "Left out: 40 rows take 0.0 GB of disk, and 0.0 GB are free." in block("rows-cpu", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=room))
    run.run(PLAN, tmp_path / "work", None, tmp_path)
    assert "Left out" not in block("rows-cpu", tmp_path)


def test_the_table_and_the_picture_say_what_was_measured(tmp_path, monkeypatch):
    Machine(monkeypatch)
    run.run(PLAN, tmp_path / "work", None, tmp_path)
    said = block("rows-cpu", tmp_path)
    assert "| 4 rows, first start | 2.00 / 6.00 | 3.00x | 4.00 / 12.0 | 4.00 / 4.00 | 3.00 / 3.00 |" in said
    assert "| 40 rows, second start | 20.0 / not run | |" in said
    assert "| 4 rows | 1.00 / 0.333 | 2.00 / 0.667 |" in said
    assert "| 40 rows | not run | 2.00 / not run |" in said
    assert "| 4 rows, sigmoid, reference: all in the cache | 2.50 | 3.50 | 1.00 GB |" in said
    assert "900 tokens a row" in said
    drawn = ElementTree.fromstring(picture.draw(tmp_path))
    assert_apart_and_inside(drawn)
    told = words(drawn)
    assert "TRL 1.16, second start: 4 rows 6.00 s. " in told and "40 rows 20.0 s; " in told
    assert "ours, 2 cores: 2.00" in told
    empty = ElementTree.fromstring(picture.draw(tmp_path / "none"))
    assert_apart_and_inside(empty)
    assert "Not measured yet" in words(empty)


def test_quick_has_a_folder_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run", "--quick"])
    with pytest.raises(SystemExit):
        run.main()
    assert "--quick needs --out" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_of_it(tmp_path):
    record = json.loads(run.run(run.QUICK, tmp_path / "work", None, tmp_path).read_text())
    assert [(one["who"], one["start"]) for one in record["runs"]] == [
        (who, start) for start in ("first", "second") for who in ("ours", "trl")
    ]
    assert all(one["peak_bytes"] > one["before_bytes"] / 2 > 0 for one in record["runs"])
    assert all(0 < one["stage_seconds"] < one["step_seconds"] for one in record["resumed"])
    assert len(record["resumed"]) == 2 and not (tmp_path / "work").exists()
