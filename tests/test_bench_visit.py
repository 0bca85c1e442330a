"""What a visit to a machine survives: workers that die or hang, missing packages, an early end."""

import json
import time

import pytest
from fastdpo_kernels import MEMORY_BUDGET

from benchmarks import blocks, figures, gpu_steps, head, process, results
from benchmarks.contenders import fastdpo
from benchmarks.lengths import PairLengths
from benchmarks.peers import tracing
from benchmarks.race import Entry, Race
from benchmarks.steps import Plan, told
from benchmarks.workers import Worker, WorkerFailed
from tests.test_bench_results import GPU_RECORDS, MACHINE
from tests.test_bench_steps import COURSE, FakeDevice, FakeWorker, runner


def test_a_worker_that_died_while_it_waited_ends_in_peace(tmp_path):
    worker = Worker("tests.bench_toy", {}, tmp_path / "log")
    worker.prepare({"fails": None})
    worker.process.kill()
    worker.process.wait()
    worker.end()
    assert not worker.alive


@pytest.mark.parametrize(
    ("program", "kind", "why"),
    [
        ("import a_package_that_is_missing", "absent", "a_package_that_is_missing"),
        ("print('Welcome!')", "error", "Welcome"),
        ("1 / 0", "error", "ZeroDivisionError"),
    ],
)
def test_a_worker_that_never_greets(tmp_path, program, kind, why):
    (tmp_path / "program.py").write_text(program)
    worker = Worker("program", process.python_path(tmp_path), tmp_path / "log")
    with pytest.raises(WorkerFailed, match=why) as failed:
        worker.prepare({})
    assert failed.value.kind == kind and not worker.alive
    worker.end()


def test_a_later_set_that_breaks_takes_nothing_with_it(monkeypatch):
    prepare, prepared = FakeWorker.prepare, []

    def once(worker, job, seconds):
        if worker.name == "ours" and prepared:
            raise WorkerFailed("memory", "ours, the second time")
        prepared.append(worker.name)
        return prepare(worker, job, seconds)

    monkeypatch.setattr(FakeWorker, "prepare", once)
    field = [runner("ours", 30, 20), runner("a", 30, 20), runner("big", held=75, idle=70)]
    race = Race(COURSE, field, FakeDevice(), seconds=60, say=lambda line: None)
    race.run()
    assert race.sets == [["ours", "a"]] and len(race.entries["a"].turns) == 2
    assert race.entries["big"].state == "time"


def test_fastdpo_that_fails_in_a_later_turn_ends_the_turns():
    field = [runner("ours", fails=6), runner("a")]  # the first step, a turn of three, and then
    race = Race(COURSE, field, FakeDevice(), seconds=60, say=lambda line: None)
    race.run()
    assert [len(race.entries[name].turns) for name in ("ours", "a")] == [1, 1]
    with pytest.raises(WorkerFailed, match="broke"):  # before it there is nothing to compare with
        Race(COURSE, [runner("ours", fails=3), runner("a")], FakeDevice(), 60, lambda line: None).run()


def test_patience_ends_with_the_time():
    race = Race(COURSE, [runner("ours")], FakeDevice(), seconds=400, say=print)
    assert 205 < race.patience(0.5) <= 210 and race.patience() == 240
    race.deadline = time.perf_counter() - 60
    assert race.patience() == 1


def test_an_entry_without_a_turn_says_so():
    race = Race(COURSE, [ours := fastdpo(64)], None, 1.0)
    race.entries = {"fastdpo": Entry("measured", losses=[0.7])}
    plan = Plan("CPU", "hh real", "cpu", pairs=1, turns=1, measured=1, minutes=1)
    found = told(ours, race, {False: [[PairLengths(9, 5, 5)]]}, plan, 1.0)
    assert found["state"] == "time" and "pairs_per_second" not in found


def test_what_was_cut_short_comes_last():
    whole, cut = ({"summary": {"TRL": {"state": state}}} for state in ("measured", "time"))
    (model, mix), (_, second), *others = gpu_steps.ORDER
    done = {model: {mix: cut, second: whole}}
    assert gpu_steps.to_do(done) == [*others, (model, mix)]
    assert gpu_steps.to_do({model: {second: {"failed": "memory", "why": "?"}}})[-1] == (model, second)


def test_a_mode_is_kept_when_the_next_one_breaks(tmp_path, monkeypatch):
    def measure(inputs, mode, truth, turns):
        if mode == "frozen":
            raise RuntimeError("an illegal memory access")
        return {"floor": {"median_s": 1.0}}, {}

    monkeypatch.setattr(head, "measure_mode", measure)
    with pytest.raises(RuntimeError, match="illegal"):
        head.run(True, 1.0, tmp_path)
    found = json.loads(results.result_path("head", tmp_path).read_text())
    assert found["results"][str(head.SMALL[0])]["forward"][0] and found["memory_budget"] == MEMORY_BUDGET


def test_another_commits_gate_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_COMMIT", "abc")
    results.write_result("gate", {"passed": True}, tmp_path)
    read = lambda: json.loads(results.write_result("head", {}, tmp_path).read_text())["gate_passed"]
    assert read() is True
    monkeypatch.setenv("BENCH_COMMIT", "def")
    assert read() is None


def test_blocks_of_partial_results():
    parity, attention = (json.loads(json.dumps(GPU_RECORDS[what])) for what in ("parity", "attention"))
    parity["results"]["bf16"]["mean_difference_between_orders"] = None  # one order
    assert "different orders" not in blocks.parity(parity | MACHINE, "")
    del attention["problems"][0]["results"]["padded sdpa"]
    assert "HH-RLHF" not in blocks.attention(attention | MACHINE, "")
    assert blocks.where({"gpu": None, "cpu": "", "threads": 2}).startswith("2 cores")


def test_numbers_do_not_wait_for_plots(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "rc_context", None)  # as it is without matplotlib
    assert figures.bars("rates", "Rates", "pairs a second", [figures.Bar("fastdpo", 1.0)], tmp_path) == []
    assert "matplotlib is not installed" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_kernel_that_knows_no_peak(monkeypatch):
    monkeypatch.setattr(process.Path, "read_text", lambda self: "VmRSS:\t 5 kB\n")
    assert process.resident("VmRSS") == 5120 and process.resident("VmHWM") > 1 << 20


def test_our_heads_tiles_are_a_gemm():
    assert tracing.kind_of("head_tiles") == "GEMM" and tracing.kind_of("chunk_sums") == "other"
