"""What a visit to a machine survives: workers that die or hang, missing packages, an early end."""

import json
import sys
from argparse import Namespace

import pytest
import torch

from benchmarks import figures, process, results
from benchmarks.gpu import steps as gpu_steps
from benchmarks.head import other_heads, our_heads
from benchmarks.head import run as head
from benchmarks.lengths import PairLengths
from benchmarks.peers import tracing
from benchmarks.steps import race as race_module
from benchmarks.steps.contenders import fastdpo
from benchmarks.steps.race import Entry, Race
from benchmarks.steps.steps import Plan, record_of, told
from benchmarks.tables import blocks, learning_blocks
from benchmarks.workers import Worker, WorkerFailed
from tests.benchmarks.test_results import GPU_RECORDS, MACHINE
from tests.benchmarks.test_steps import COURSE, FakeDevice, FakeWorker, runner


def test_a_worker_that_died_while_it_waited_ends_in_peace(tmp_path):
    worker = Worker("tests.benchmarks.toy", {}, tmp_path / "log")
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


def test_patience_ends_with_the_time(monkeypatch):
    monkeypatch.setattr(race_module, "time", Namespace(perf_counter=lambda: 1000.0))
    race = Race(COURSE, [runner("ours")], FakeDevice(), seconds=400, say=print)
    assert race.patience(0.5) == 210 and race.patience() == 240
    race.deadline = 1000.0 - 60
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
    assert gpu_steps.to_do(done, gpu_steps.ORDER) == [*others, (model, mix)]
    failed = {model: {second: {"failed": "memory", "why": "?"}}}
    assert gpu_steps.to_do(failed, gpu_steps.ORDER)[-1] == (model, second)


def heads(tmp_path):
    return json.loads(results.result_path("head", tmp_path).read_text())


@pytest.fixture
def few_heads(monkeypatch):
    """One small shape, and of the peers torch."""
    monkeypatch.setattr(head, "SMALL", head.SMALL[:1])
    monkeypatch.setattr(other_heads, "MAKERS", {"torch": other_heads.MAKERS["torch"]})
    return str(head.SMALL[0])


def test_a_mode_is_kept_when_the_next_one_breaks(tmp_path, monkeypatch, few_heads):
    asked, broken = [], {"frozen"}

    def measure(inputs, mode, truth, turns, unfit):
        asked.append(mode)
        if mode in broken:
            raise torch.OutOfMemoryError("no room")
        return {"floor": {"median_s": 1.0}}, {}

    monkeypatch.setattr(head, "measure_mode", measure)
    monkeypatch.setattr(head, "draw", lambda *_: None)
    head.run(True, 60.0, tmp_path)
    found = heads(tmp_path)
    assert asked == list(head.MODES)
    assert [bool(measured) for measured, _ in found["results"][few_heads].values()] == [True, False, True]
    assert "no room" in found["results"][few_heads]["frozen"][1]["all"]
    broken.clear()
    head.run(True, 60.0, tmp_path)  # what has numbers is not measured again
    assert asked[3:] == ["frozen"] and heads(tmp_path)["results"][few_heads]["frozen"][0]


def test_the_truth_without_memory_ends_its_shape_only(tmp_path, monkeypatch):
    real, first = head.Truth, str(head.SMALL[0])

    def truth(inputs):
        if str(inputs.shape) == first:
            raise torch.OutOfMemoryError("no room")
        return real(inputs)

    monkeypatch.setattr(head, "Truth", truth)
    monkeypatch.setattr(head, "measure_mode", lambda *_: ({"floor": {"median_s": 1.0}}, {}))
    monkeypatch.setattr(head, "draw", lambda *_: None)
    head.run(True, 60.0, tmp_path)
    found = heads(tmp_path)["results"]
    assert "no room" in found[first]["forward"][1]["all"] and found[str(head.SMALL[1])]["trained"][0]


@pytest.mark.parametrize("late", [False, True])
def test_ours_that_fails_takes_no_others_numbers(tmp_path, monkeypatch, few_heads, late):
    run, modes = our_heads.CONTENDERS["linear_dpo"]
    calls = []

    def broken(inputs):
        calls.append(None)
        if late and len(calls) < 6:
            return run(inputs)
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(our_heads.CONTENDERS, "linear_dpo", (broken, modes))
    head.run(True, 60.0, tmp_path)
    for mode, (measured, absent) in heads(tmp_path)["results"][few_heads].items():
        if mode in modes:
            assert "no such kernel" in absent["linear_dpo"] and "linear_dpo" not in measured
        assert measured["torch"]["median_s"] > 0 and measured["linear_logp"]["median_s"] > 0


def test_who_makes_the_gpu_unusable_is_left_out(tmp_path, monkeypatch, few_heads):
    broken = []

    def torch_of_a_stranger(inputs):
        broken.append(None)
        raise RuntimeError("an illegal memory access")

    def synchronize():
        if broken:
            raise RuntimeError("an illegal memory access")

    begun = []

    def anew(minutes):
        begun.append(minutes)
        broken.clear()
        raise SystemExit

    monkeypatch.setattr(other_heads, "MAKERS", {"stranger": lambda inputs: torch_of_a_stranger})
    monkeypatch.setattr(head, "anew", anew)
    real = head.failed
    monkeypatch.setattr(head, "failed", lambda name, error: on_a_gpu(synchronize, real, name, error))
    with pytest.raises(SystemExit):
        head.run(True, 60.0, tmp_path)
    assert heads(tmp_path)["unfit"].keys() == {"stranger"} and 0 < begun[0] < 60
    head.run(True, 60.0, tmp_path)
    for measured, absent in heads(tmp_path)["results"][few_heads].values():
        assert "illegal" in absent["stranger"] and measured["linear_logp"]["median_s"] > 0


def on_a_gpu(synchronize, call, *args):
    """call(*args) where there seems to be a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "synchronize", synchronize)
        patch.setattr(torch.cuda, "empty_cache", lambda: None)
        return call(*args)


def test_the_same_command_begins_anew(monkeypatch):
    said = []
    monkeypatch.setattr(head.os, "execv", lambda path, command: said.append(command))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "benchmarks.gpu.head", "--minutes", "7"])
    head.anew(2.5)
    assert said == [
        [sys.executable, "-m", "benchmarks.gpu.head", "--minutes", "7", "--minutes", "2.50"],
    ]


def test_a_race_tells_of_itself_as_it_goes():
    told = []
    keep = lambda race: told.append({name: (e.state, len(e.turns)) for name, e in race.entries.items()})
    field = [runner("ours", 30, 20), runner("a"), runner("gone", fails=1), runner("large", held=90)]
    Race(COURSE, field, FakeDevice(), 60, lambda line: None, keep).run()
    news = [record for record, before in zip(told[1:], told) if record != before]
    assert told[0] == {"ours": ("measured", 0)} and news[0]["a"] == ("measured", 0)
    assert news[1]["gone"] == ("error", 0)
    assert [record["a"][1] for record in news[2:4]] == [1, 2] and "large" not in news[3]
    assert [record["large"][1] for record in news[4:]] == [1, 2]  # alone: a turn after the other


def test_a_record_of_a_race_that_goes_on():
    ours, peer, waiting = fastdpo(64), runner("a"), runner("b")
    race = Race(COURSE, [ours, peer, waiting], None, 1.0)
    memory = {"peak_bytes": 2e9, "resident_peak_bytes": 2e9}
    race.entries["fastdpo"] = Entry("measured", losses=[0.7], memory=memory, set_number=0)
    race.entries["a"] = Entry("measured", losses=[0.7], memory=memory, turns=[[1.0, 1.0]])  # alone
    plan = Plan("CPU", "hh real", "cpu", pairs=1, turns=2, measured=2, minutes=1)
    rows_of = {False: [[PairLengths(9, 5, 5)]], True: []}
    states = lambda: {n: r["state"] for n, r in record_of(race, rows_of, plan, 1.0)["summary"].items()}
    assert states() == {"fastdpo": "time", "a": "time", "b": "time"}
    race.entries["fastdpo"].turns.append([2.0, 2.0])
    race.ours_turns = [race.entries["fastdpo"].turns]
    record = record_of(race, rows_of, plan, 1.0)
    assert record["summary"]["a"]["fastdpo_times_faster"] == 0.5 and states()["b"] == "time"
    json.dumps(record)


def test_a_short_field_is_written_as_it_goes(tmp_path, monkeypatch):
    args = Namespace(dry_run=False, short="Qwen2.5-1.5B", minutes=8.0, out=tmp_path)
    monkeypatch.setattr(gpu_steps, "measured_ceilings", lambda small: {"gemm_tflops": 1.0})
    monkeypatch.setattr(gpu_steps, "print_table", lambda *_: None)
    monkeypatch.setattr(gpu_steps, "time", Namespace(perf_counter=lambda: 1000.0))
    plans, summary = [], {"fastdpo": {"state": "measured"}}

    def measure(plan, field, ceiling, workers, keep):
        plans.append(plan)
        keep({"summary": {"fastdpo": {"state": "time"}}})
        if plan.mix == "UltraFeedback":
            raise KeyboardInterrupt  # as if it was killed
        return {"summary": summary}

    monkeypatch.setattr(gpu_steps, "measure_steps", measure)
    results.write_result("steps", {"results": {"Qwen2.5-0.5B": {"HH-RLHF": {"summary": summary}}}}, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        gpu_steps.run(args, None)
    found = results.result_of_today("steps", tmp_path)["results"]["Qwen2.5-1.5B"]
    assert found["HH-RLHF"]["summary"] == summary and "UltraFeedback" in found
    other = results.result_of_today("steps", tmp_path)["results"]["Qwen2.5-0.5B"]  # an earlier visit's
    assert other == {"HH-RLHF": {"summary": summary}}
    assert [plan.mix for plan in plans] == ["HH-RLHF", "UltraFeedback"]
    assert [plan.minutes for plan in plans] == pytest.approx([3.85, 7.7])
    with pytest.raises(KeyboardInterrupt):  # only what was cut is run again
        gpu_steps.run(args, None)
    assert [plan.mix for plan in plans[2:]] == ["UltraFeedback"]
    assert {plan.pairs for plan in plans} == {32}
    names = [c.name for c in gpu_steps.field_of(args, "Qwen2.5-1.5B", "HH-RLHF")]
    assert len(set(names)) == len(names) and names[0] == "fastdpo"
    for name in ("TRL 4 x 8", "TRL 8 x 4", "TRL 16 x 2", "TRL default 8 x 4", "plain HF 4 x 8"):
        assert name in names


@pytest.mark.parametrize("gigabytes", [80, 141])
def test_the_short_field_fits_the_card(monkeypatch, gigabytes):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    card = Namespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    names = lambda model: [c.name for c in gpu_steps.short_contenders(model, 32)]
    whole = names("Qwen2.5-0.5B")
    assert {"TRL 4 x 8", "TRL 8 x 4", "TRL 16 x 2", "TRL, lengths grouped 8 x 4"} <= set(whole)
    assert len(whole) == 10 and "TRL default 8 x 4" in whole and "TRL + liger layers 8 x 4" in whole
    if gigabytes == 141:
        assert names("Qwen2.5-1.5B") == whole
        return
    sizes = {c.options.get("batch_size") for c in gpu_steps.short_contenders("Qwen2.5-1.5B", 32)[1:]}
    families = {c.family for c in gpu_steps.short_contenders("Qwen2.5-1.5B", 32)}
    assert sizes == {4, 2} and len(names("Qwen2.5-1.5B")) == 7
    assert families == {None, "TRL", "TRL, lengths grouped", "TRL default", "plain HF"}
    for model in ("Llama-3.2-1B", "Qwen3-1.7B", "Llama-3.1-8B LoRA"):
        assert names(model) == names("Qwen2.5-1.5B")


def test_a_race_done_again_does_not_end_poorer(tmp_path, monkeypatch):
    args = Namespace(dry_run=False, short="Qwen2.5-1.5B", minutes=8.0, out=tmp_path)
    monkeypatch.setattr(gpu_steps, "measured_ceilings", lambda small: {"gemm_tflops": 1.0})
    monkeypatch.setattr(gpu_steps, "print_table", lambda *_: None)
    summary = lambda *states: {"summary": {str(i): {"state": state} for i, state in enumerate(states)}}
    found = lambda: results.result_of_today("steps", tmp_path)["results"]["Qwen2.5-1.5B"]["HH-RLHF"]
    earlier = summary("measured", "measured", "time")
    whole = {"Qwen2.5-1.5B": {"HH-RLHF": earlier, "UltraFeedback": summary("measured")}}
    results.write_result("steps", {"results": whole}, tmp_path)

    def again(first, last=None):
        def measure(plan, field, ceiling, workers, keep):
            keep(first)
            assert found()["summary"] == earlier["summary"]
            if last is None:
                raise WorkerFailed("error", "it broke")
            return last

        monkeypatch.setattr(gpu_steps, "measure_steps", measure)
        gpu_steps.run(args, None)
        return found()["summary"]

    assert again(summary("measured")) == earlier["summary"]
    assert again(summary("measured"), summary("measured", "time")) == earlier["summary"]
    better = summary("measured", "measured", "disagrees")
    assert again(summary("measured"), better) == better["summary"]


def test_a_result_is_whole_or_the_one_before(tmp_path, monkeypatch):
    results.write_result("steps", {"a": 1}, tmp_path)
    monkeypatch.setattr(results.Path, "replace", lambda *_: 1 / 0)  # killed before
    with pytest.raises(ZeroDivisionError):
        results.write_result("steps", {"a": 2}, tmp_path)
    assert results.result_of_today("steps", tmp_path)["a"] == 1


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
    assert "different orders" not in learning_blocks.parity(parity | MACHINE, "")
    del attention["problems"][0]["results"]["padded sdpa"]
    assert "HH-RLHF" not in blocks.attention(attention | MACHINE, "")
    assert blocks.where({"gpu": None, "cpu": "", "threads": 2}).startswith("2 cores")


def test_numbers_do_not_wait_for_plots(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "rc_context", None)  # as it is without matplotlib
    assert figures.bars("rates", "Rates", "pairs a second", [figures.Bar("fastdpo", 1.0)], tmp_path) == []
    assert "matplotlib is not installed" in capsys.readouterr().out and not list(tmp_path.iterdir())
    monkeypatch.undo()
    monkeypatch.setenv("BENCH_NO_PLOTS", "1")
    assert figures.bars("rates", "Rates", "pairs a second", [figures.Bar("fastdpo", 1.0)], tmp_path) == []
    assert not capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_kernel_that_knows_no_peak(monkeypatch):
    monkeypatch.setattr(process.Path, "read_text", lambda self: "VmRSS:\t 5 kB\n")
    assert process.resident("VmRSS") == 5120 and process.resident("VmHWM") > 1 << 20


def test_our_heads_tiles_are_a_gemm():
    assert tracing.kind_of("head_tiles") == "GEMM" and tracing.kind_of("chunk_sums") == "other"
