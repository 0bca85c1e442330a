"""benchmarks.steps.dropin: what is made of the answers, what is told of failures."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gpu import dropin as gpu_dropin
from benchmarks.steps import dropin
from benchmarks.tables import blocks
from benchmarks.workers import WorkerFailed

PLAN = replace(dropin.CPU, tiny=True, turns=3)


class FakeWorker:
    """Answers at once: losses 1, 2, 3, ...; patched is twice as fast, and keeps half the memory."""

    def __init__(self, name: str, fail_at: int | None = None, off: float = 0.0):
        self.speed = 2.0 if name.startswith("patched") else 1.0
        self.fail_at, self.off, self.asked = fail_at, off, []

    def prepare(self, job, seconds):
        self.asked.append((job["options"], seconds))

    def steps(self, n, seconds):
        self.asked.append((n, seconds))
        turn = len(self.asked) - 1
        if turn == self.fail_at:
            raise WorkerFailed("time", "no answer within 3 s")
        steps = [{"seconds": (9.0 if turn == 1 else 4.0) / self.speed, "loss": turn + self.off}] * n
        return {"steps": steps, "peak_bytes": 2e9 / self.speed}


@pytest.fixture
def fake(monkeypatch):
    """make(**FakeWorker's options of the patched one) -> the workers by name, as race() asks for them."""

    def make(**options):
        made = {}

        class FakeWorkers:
            def __init__(self, folder):
                pass

            def get(self, name, module, environment):
                assert environment == dropin.KEEP_MEMORY  # both of them: TRL's best
                made[name] = FakeWorker(name, **(options if name.startswith("patched") else {}))
                return made[name]

            __enter__ = lambda self: self
            __exit__ = lambda self, *_: None

        monkeypatch.setattr(dropin, "Workers", FakeWorkers)
        return made

    return make


def race(seconds=600.0):
    now = time.monotonic()
    return dropin.race(PLAN, Path("rows.json"), 8, now + seconds, now + 1000)


def test_turns_and_medians(fake):
    made = fake()
    found = race()
    stock, patched = found["stock"], found["patched"]
    assert stock["seconds"] == [4.0] * 3 and stock["losses"] == [1, 2, 3, 4]  # the first is warm
    assert (stock["pairs_per_second"], patched["pairs_per_second"]) == (2.0, 4.0)
    assert (stock["peak_bytes"], patched["peak_bytes"]) == (2e9, 1e9)
    assert [worker.asked[0][0] for worker in made.values()] == [{"batch_size": 8, "best": True}] * 2
    assert all(0 < seconds <= 1000 for worker in made.values() for _, seconds in worker.asked)


def test_no_turn_begins_when_the_time_is_over(fake):
    fake()
    assert len(race(seconds=-1.0)["stock"]["seconds"]) == 1


def test_failures_are_results(fake):
    fake(fail_at=2)
    assert race() == {"failed": "time", "why": "patched: no answer within 3 s"}
    fake(off=2e-3)
    assert race()["failed"] == "disagrees"
    fake(off=float("nan"))
    assert race()["failed"] == "disagrees"
    fake(off=5e-4)
    assert "failed" not in race()


def test_what_is_written_and_shown(fake, tmp_path):
    fake()
    record = dropin.measure([replace(PLAN, minutes=60)], (1, 8), tmp_path)
    assert dropin.complete(record) and dropin.table(record).row_count == 2
    (path,) = tmp_path.glob("dropin_*.json")
    assert '"hh real"' in path.read_text()
    machine = {"threads": 2, "cpu": "AMD EPYC", "gpu": None}
    text = blocks.dropin(record | machine, "[results](x)")
    row = "| hh real, batch size 8 | 2.00 (2.00 to 2.00) | 2.00 GB | 4.00 (4.00 to 4.00) | 1.00 GB "
    assert row + "| 2.0x faster, 0.50x memory |" in text and "2 cores of an AMD EPYC, fp32" in text
    fake(fail_at=1)
    record = dropin.measure([replace(PLAN, minutes=60)], (8,), tmp_path)
    assert not dropin.complete(record)
    text = blocks.dropin(record | machine, "")
    assert "No numbers for hh real, batch size 8: patched: no answer within 3 s." in text


def test_a_second_visit_measures_what_is_left(fake, tmp_path):
    plan = replace(PLAN, minutes=60)
    fake(fail_at=1)
    dropin.measure([plan], (1,), tmp_path)
    fake()
    first = dropin.measure([plan], (8,), tmp_path, resume=True)["results"]["hh real"]["sizes"]
    assert "failed" in first["1"] and "stock" in first["8"]
    made = fake()
    mixes = [plan, replace(plan, mix="TL;DR")]
    record = dropin.measure(mixes, (8, 1), tmp_path, resume=True)
    assert list(made) == ["stock 1", "patched 1", "stock 8", "patched 8"]  # failed before; the new mix
    assert made["stock 1"].asked and record["results"]["hh real"]["sizes"]["8"] == first["8"]
    assert dropin.complete(record) and dropin.table(record).row_count == 4
    made = fake()
    dropin.measure(mixes, (8, 1), tmp_path, resume=True)
    assert not made
    dropin.measure([plan], (8,), tmp_path)
    assert len(made) == 2


def test_the_gpu_stage_dry(fake, tmp_path, monkeypatch, capsys):
    made = fake()
    monkeypatch.setattr("sys.argv", ["gpu_dropin", "--dry-run", "--out", str(tmp_path)])
    assert gpu_dropin.main() == 0
    assert set(made) == {"stock 2", "patched 2"}
    assert "HH-RLHF" in (said := capsys.readouterr().out) and "TL;DR" in said
    assert len(list(tmp_path.glob("dropin_*.json"))) == 1
