"""The search for what fits, with workers that only pretend; and the limit that real ones get."""

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch

from benchmarks.gpu.memory import DRY
from benchmarks.memory import run as memory
from benchmarks.memory.run import Room, Task, longest
from benchmarks.workers import ROOT, WorkerFailed

GB = 10**9


def search(peak, most=131_072, first=1024, precision=1.1, room=24 * GB):
    """(longest's answer, what it tried)."""
    tried = []

    def fits(n):
        tried.append(n)
        return None if peak(n) > room else int(peak(n))

    return longest(fits, first, most, room, precision), tried


@pytest.mark.parametrize("bytes_a_token", [2e5, 1e6, 4e6])
def test_longest_on_a_line(bytes_a_token):
    (low, high), tried = search(lambda n: 8 * GB + bytes_a_token * n)
    truth = 16 * GB / bytes_a_token
    assert low <= truth < high <= 1.1 * low and len(tried) <= 5


@pytest.mark.parametrize("power", [1.5, 2.0])
def test_longest_on_a_curve(power):
    (low, high), tried = search(lambda n: 4 * GB + 20 * GB * (n / 20_000) ** power)
    assert low <= 20_000 < high <= 1.1 * low and len(tried) <= 12 and len(set(tried)) == len(tried)


def test_longest_at_the_ends():
    assert search(lambda n: 30 * GB) == ((0, 1024), [1024])
    assert search(lambda n: 8 * GB + n)[0] == (131_072, None)
    assert search(lambda n: 8 * GB)[0] == (131_072, None)  # nothing to foretell from
    (low, high), _ = search(lambda n: 23.9 * GB + 1e5 * n, first=64)
    assert low <= 1000 < high <= 1.1 * low


class Pretender:
    """A worker that takes 1 MB a token, 10 or 20 GB for a model, and 5 more where it is not fastdpo."""

    started: list[dict] = []  # noqa: RUF012

    def __init__(self, module, environment, log):
        self.alive, self.room = True, int(environment["BENCH_BYTES"])
        Pretender.started.append({"module": module} | environment)

    def prepare(self, job, seconds):
        rows = json.loads(open(job["rows"]).read())
        assert [len(step) for step in rows] == [1, 1] and seconds > 0
        self.tokens = sum(len(rows[1][0][part]) for part in ("prompt_ids", "chosen_ids"))
        self.weights = {"Qwen2.5-0.5B": 10, "Llama-3.2-1B": 20}[job["model"]] * GB
        if "batch_size" in job["options"]:  # not fastdpo
            self.weights += 5 * GB

    def steps(self, n, seconds):
        assert n == 2
        if (peak := self.weights + self.tokens * 10**6) > self.room:
            self.alive = False
            raise WorkerFailed("memory", "no room")
        return {"peak_bytes": peak}

    def end(self):
        pass

    def stop(self):
        self.alive = False


LIMITS = replace(DRY, gigabytes=(24, 30), precision=1.1, most=8192, row=300)


@pytest.fixture
def pretend(monkeypatch):
    monkeypatch.setattr(memory, "Worker", Pretender)
    monkeypatch.setattr(Pretender, "started", [])


def test_every_question_is_answered(pretend, tmp_path, capsys):
    path = memory.run(LIMITS, minutes=60, out=tmp_path)
    record = json.loads(path.read_text())
    found = {(f["kind"], f["gigabytes"], f["contender"]): f for f in record["found"]}
    assert len(found) == 8 and not any("no_answer" in f for f in found.values())
    pair = found["pair", 24, "fastdpo"]
    assert pair["fits"] <= 4000 < pair["fails"] <= 1.1 * pair["fits"]
    assert found["pair", 24, "plain HF"]["fits"] is None and found["pair", 24, "plain HF"]["fails"] == 128
    assert found["pair", 30, "fastdpo"]["fits"] == 8192 and found["pair", 30, "fastdpo"]["fails"] is None
    model = found["model", 24, "plain HF"]
    assert (model["fits"], model["fails"]) == ("Qwen2.5-0.5B", "Llama-3.2-1B")
    assert [t["peak_bytes"] is None for t in model["trials"]] == [False, True]
    assert (found["model", 30, "plain HF"]["fits"], found["model", 30, "plain HF"]["fails"]) == (
        "Llama-3.2-1B",
        None,
    )
    assert Pretender.started[0]["BENCH_PEER"] == "benchmarks.peers.ours"
    assert "largest model, all weights, 30 GB" in capsys.readouterr().out


def test_a_second_run_goes_on(pretend, tmp_path):
    path = memory.run(LIMITS, minutes=-1, out=tmp_path)
    found = json.loads(path.read_text())["found"]
    assert [f["no_answer"] for f in found] == ["no time left"] * 8 and not Pretender.started
    memory.run(LIMITS, minutes=60, out=tmp_path)
    found, started = json.loads(path.read_text())["found"], len(Pretender.started)
    assert len(found) == 8 and not any("no_answer" in f for f in found)
    memory.run(LIMITS, minutes=60, out=tmp_path)
    assert json.loads(path.read_text())["found"] == found and len(Pretender.started) == started


def test_no_time_and_other_failures_are_no_answers(pretend, tmp_path, monkeypatch):
    first = memory.tasks(LIMITS)[0]
    assert first == Task("pair", "Llama-3.2-1B", 24, "fastdpo")
    assert memory.answer(LIMITS, first, until=0.0)["no_answer"] == "no time left"

    def absent(*_):
        raise WorkerFailed("absent", "no trl here")

    monkeypatch.setattr(Pretender, "prepare", absent)
    found = memory.answer(LIMITS, first, until=time.perf_counter() + 600)
    assert found["no_answer"] == "absent: no trl here" and found["trials"] == []


def test_room_is_waited_for():
    room, order = Room(10), []
    first, second = room.take(7), room.take(2)  # side by side
    wait_for = room.changed.wait_for

    def give_back():
        order.append("given back")
        for taken in (first, second):
            with room.back(taken):
                pass

    def waiting(enough):
        order.append("waits")
        giver.start()  # and cannot begin before this thread has let go of the lock
        return wait_for(enough)

    giver, room.changed.wait_for = threading.Thread(target=give_back), waiting
    assert room.take(100) == 10  # more than there is: all of it, when it is free
    order.append("taken")
    giver.join()
    assert order == ["waits", "given back", "taken"]


def test_the_limit_is_real():
    code = """
import torch
from benchmarks.memory.limited import limit
from benchmarks.peers.session import kind_of
limit(100 << 20, "cpu")
torch.ones(8 << 20)
try:
    torch.ones(64 << 20)
except Exception as error:
    print(kind_of(error))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "memory", done.stderr


def test_fastdpos_own_memory_errors_are_results_too():
    from benchmarks.peers.session import kind_of
    from fastdpo.data.packing import pack
    from fastdpo.errors import TrainingError
    from fastdpo.training.failures import memory_guard, update_guard
    from tests.tiny import group

    one = group(0, 5, [3, 2])
    for guard in (memory_guard(2, pack([one])), update_guard(2, lambda: pack([one]), False)):
        with pytest.raises(TrainingError) as caught, guard:
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert kind_of(caught.value) == "memory"


def test_a_case_that_fails_costs_no_other(monkeypatch, tmp_path):
    from benchmarks.memory import plan_accuracy

    def first_fails(case, calls=[]):  # noqa: B006
        calls.append(case)
        if len(calls) == 1:
            raise RuntimeError("a traceback\ntorch.OutOfMemoryError: no room\n")
        return case | {"measured": 100, "predicted": {"bytes": 98}, "error": -0.02}

    monkeypatch.setattr(plan_accuracy, "run", first_fails)
    monkeypatch.setattr("sys.argv", ["plan_accuracy", "--cases", "2", "--out", str(tmp_path)])
    plan_accuracy.main()
    record = json.loads(next(tmp_path.glob("plan_*.json")).read_text())
    assert record["worst"] == 0.02 and len(record["cases"]) == 1
    assert [case["why"] for case in record["failed"]] == ["torch.OutOfMemoryError: no room"]
