"""The gate is green on the code as it is, and names what was broken on purpose."""

import os
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from fastdpo_kernels import chunk, chunked, head, pair_losses

from benchmarks import process, results
from benchmarks.gate import run as gate
from benchmarks.gpu import gate as gpu_gate
from fastdpo.data import packing
from fastdpo.model import attention
from fastdpo.reference.fill import ReferenceTable


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_green(dtype):
    assert gate.check("cpu", dtype) == []


def louder(monkeypatch, owner, name, argument, factor=1.01):
    """Makes owner.name see one of its arguments, a tensor, `factor` times as large."""
    real = getattr(owner, name)

    def broken(*args, **kwargs):
        args = list(args)
        args[argument] = args[argument] * factor
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, broken)


def the_chunks_sum(monkeypatch):
    real = chunk.TorchChunk.reduce

    def broken(self, z, span, softmax, out=None):
        shrink = real(self, z, span, softmax, out)
        softmax.rest = softmax.rest * 1.001
        return shrink

    monkeypatch.setattr(chunk.TorchChunk, "reduce", broken)


def the_targets_part_of_d_hidden(monkeypatch):
    louder(monkeypatch, head.HiddenGrad, "add_target", 1)


def the_targets_part_of_d_weight(monkeypatch):
    louder(monkeypatch, chunk.TorchChunk, "put_target", 3)


def the_d_weight_product(monkeypatch):
    louder(monkeypatch, chunked, "matmul", 0)


def the_d_weight_sum_over_parts(monkeypatch):
    louder(monkeypatch, chunked, "matmul_add", 0)


def the_rows_of_the_softcap(monkeypatch):
    real = head.Head.slope
    monkeypatch.setattr(head.Head, "slope", lambda self, z, out=None: real(self, z, out).mul_(1.01))


def the_slope_of_ipo(monkeypatch):
    real = pair_losses.LOSSES["ipo"]

    def broken(margin, beta, e):
        value, slope = real(margin, beta, e)
        return value, 1.01 * slope

    monkeypatch.setitem(pair_losses.LOSSES, "ipo", broken)


def the_gather(monkeypatch):
    real = attention.gather_copies
    monkeypatch.setattr(attention, "gather_copies", lambda rows, layout: real(rows, layout).roll(1, 0))


def the_gathers_gradient(monkeypatch):
    """A prompt's keys hear of the first response alone."""

    def first_only(ctx, grad):
        return grad.index_select(0, ctx.layout.first_copy), None

    monkeypatch.setattr(attention._GatherCopies, "backward", staticmethod(first_only))


def the_positions(monkeypatch):
    """Responses begin at one position later than their prompt ends."""
    real = packing.shared_rows

    def broken(*args):
        flat = real(*args)
        later = flat["position_ids"][0].diff(prepend=torch.tensor([0])) < 0
        return flat | {"position_ids": flat["position_ids"] + later.cumsum(0)}

    monkeypatch.setattr(packing, "shared_rows", broken)


def the_reference(monkeypatch):
    real = ReferenceTable.of
    monkeypatch.setattr(ReferenceTable, "of", lambda self, groups: real(self, groups) * 1.01)


def the_learning_rate(monkeypatch):
    real = gate.make_optimizer

    def broken(policy, config, total):
        optimizer, schedule = real(policy, config, total)
        for group in optimizer.param_groups:
            group["lr"] *= 1.01
        return optimizer, schedule

    monkeypatch.setattr(gate, "make_optimizer", broken)


def anything_that_raises(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(attention, "attend", broken)


BREAKS = {
    the_chunks_sum: "linear_logp, forward: log-probs off",
    the_targets_part_of_d_hidden: "linear_logp, keep: the targets' part of the gradient of hidden off",
    the_targets_part_of_d_weight: "linear_dpo, ipo, grouped: the targets' part of the gradient of weight",
    the_d_weight_product: "linear_logp, recompute: the gradient of weight off",
    the_d_weight_sum_over_parts: "linear_dpo, sigmoid, grouped: the gradient of weight off",
    the_rows_of_the_softcap: "linear_logp, frozen, softcap and bias: the gradient of hidden off",
    the_slope_of_ipo: "linear_dpo, ipo, frozen: the gradient of hidden off",
    the_gather: "attention: the gathered keys are not those of the layout",
    the_gathers_gradient: "attention: the gradient of the gathered keys is not",
    the_positions: "shared prompt: log-probs off",
    the_reference: "trainer: the loss of step 1",
    the_learning_rate: "trainer: how 2 steps move the weights",
    anything_that_raises: "attention: cannot run: RuntimeError: no such kernel",
}


@pytest.mark.parametrize("broken", BREAKS, ids=lambda f: f.__name__)
def test_red_and_named(broken, monkeypatch):
    broken(monkeypatch)
    found = gate.check("cpu", torch.float32)
    assert any(BREAKS[broken] in line for line in found), found


def test_only_the_broken_part_is_named(monkeypatch):
    the_gathers_gradient(monkeypatch)
    assert not any(line.startswith("linear_") for line in gate.check("cpu", torch.float32))
    monkeypatch.undo()
    the_slope_of_ipo(monkeypatch)
    assert all(line.startswith("linear_dpo, ipo") for line in gate.check("cpu", torch.float32))


def test_verdict_travels_with_later_results(monkeypatch, tmp_path):
    """A result carries the verdict of the gate that ran before it in the same folder."""
    for failures in ([], ["head: wrong"]):
        monkeypatch.setattr(gate, "check", lambda device, dtype, found=failures: found)
        monkeypatch.setattr("sys.argv", ["gate", "--out", str(tmp_path)])
        assert gate.main() == bool(failures)
        results.write_result("steps", {}, tmp_path)
        assert results.newest("steps", folder=tmp_path)["gate_passed"] is not bool(failures)


def test_gpu_gate_runs_every_gpu_test():
    names = {path.rsplit("/", 1)[1] for path in gpu_gate.gpu_tests()}
    assert {"test_gpu.py", "test_gpu_head.py", "test_linear_dpo.py"} <= names
    assert "test_trl_parity.py" not in names
    assert 1 <= int(gpu_gate.TOGETHER[1]) <= os.cpu_count()


def test_gpu_gate_is_red_where_a_test_or_the_check_is(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["gpu_gate", "--dry-run", "--out", str(tmp_path)])
    for failures, code in (([], 0), ([], 1), (["head: wrong"], 0)):
        check = {"passed": not failures, "failures": failures, "seconds": 1.0}
        monkeypatch.setattr(gpu_gate, "own_check", lambda check=check: dict(check))
        monkeypatch.setattr(gpu_gate, "run_tests", lambda *_, code=code: (code, ["tests"], {}))
        red = bool(failures) or code != 0
        assert gpu_gate.main() == red
        assert results.newest("gate", folder=tmp_path)["passed"] is not red


A_GATE = """
import os, threading
print("gate: float32, head", flush=True)
{}
"""


@pytest.mark.parametrize(
    ("does", "seconds", "said"),
    [
        ("threading.Event().wait()", 1, "stopped after 1 s; its last line: gate: float32, head"),
        ("os._exit(7)", 300, "died with code 7; its last line: gate: float32, head"),
        ("1 / 0", 300, "died with code 1; its last line: ZeroDivisionError: division by zero"),
    ],
)
def test_a_check_that_hangs_or_dies_is_red_and_named(monkeypatch, tmp_path, does, seconds, said):
    heard = threading.Event()

    class HeardFirst(subprocess.Popen):
        def wait(self, timeout=None):
            heard.wait()  # its time begins with what it says, however busy the machine is before
            return super().wait(timeout)

    (tmp_path / "benchmarks/gate").mkdir(parents=True)
    (tmp_path / "benchmarks/__init__.py").touch()
    (tmp_path / "benchmarks/gate/run.py").write_text(A_GATE.format(does))
    monkeypatch.setattr(gpu_gate, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_gate, "CHECK_SECONDS", seconds)
    monkeypatch.setattr(gpu_gate, "print", lambda *line, **_: heard.set(), raising=False)
    monkeypatch.setattr(gpu_gate.subprocess, "Popen", HeardFirst)
    record = gpu_gate.own_check()
    assert record["failures"] == [f"the gate's own check {said}"] and not record["passed"]


def test_the_check_runs_in_a_process_of_its_own(monkeypatch, tmp_path):
    written = []

    def child(command, seconds):
        assert command[1:4] == ["-m", "benchmarks.gate.run", "--out"] and seconds == gpu_gate.CHECK_SECONDS
        results.write_result("gate", {"passed": False, "failures": ["x"], "seconds": 3.0}, Path(command[4]))
        written.append(command[4])
        return 1, []

    monkeypatch.setattr(gpu_gate, "run_child", child)
    assert gpu_gate.own_check() == {"passed": False, "failures": ["x"], "seconds": 3.0}
    assert not Path(written[0]).exists()


A_GPU = """
from tests.conftest import *

broken = []


def synchronize():
    if broken:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\\n")


torch.cuda.is_available, torch.cuda.synchronize = (lambda: True), synchronize
"""
ITS_TESTS = """
import threading
import pytest
from conftest import broken

pytestmark = pytest.mark.gpu
patient = pytest.mark.timeout(300)


@pytest.mark.parametrize("number", [pytest.param(n, marks=patient) if n != 4 else 4 for n in range(6)])
def test_number(number):
    assert not broken, "poisoned by a test before it"
    if number == 1:
        broken.append(number)  # and the test itself sees nothing of it
    if number == 4:
        threading.Event().wait()
"""


@pytest.fixture
def a_gpu(tmp_path, monkeypatch):
    """Six tests on what looks like a GPU: the second breaks it, the fifth hangs."""
    (tmp_path / "conftest.py").write_text(A_GPU)
    (tmp_path / "test_it.py").write_text(ITS_TESTS)
    monkeypatch.setattr(gpu_gate, "gpu_tests", lambda: [str(tmp_path / "test_it.py")])
    quick = [*gpu_gate.TOGETHER]
    quick[quick.index("-n") + 1], quick[quick.index("--timeout") + 1] = "1", "1"
    monkeypatch.setattr(gpu_gate, "TOGETHER", tuple(quick))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # of these tests
    for name, value in process.python_path().items():
        monkeypatch.setenv(name, value)


def test_a_broken_gpu_breaks_no_other_test(a_gpu, capfd):
    code, lines, outcomes = gpu_gate.run_tests(dry_run=False, seconds=500)
    said = capfd.readouterr().out
    assert code == 1 and "2 failed, 5 passed" in lines[-1], said  # the one that broke it passed before that
    red = " ".join(lines[:-1])
    assert "test_number[1]" in red and "test_number[4]" in red and said.count("crashed") >= 2
    assert "PASSED" in said  # the whole of it
    red = {node for node, outcome in outcomes.items() if outcome != "passed"}
    assert len(outcomes) == 6 and {node[-3:] for node in red} == {"[1]", "[4]"}


def test_a_gate_run_again_tries_what_was_not_green(a_gpu, monkeypatch, tmp_path):
    """The fourth, red at first; and those that there was no time for."""
    tests = tmp_path / "test_it.py"
    tests.write_text(ITS_TESTS.replace("number == 1", "False").replace("number == 4", "False"))
    first = tests.read_text().replace("assert not broken", "assert number != 4 ")
    second = tests.read_text()
    tests.write_text(first)
    monkeypatch.setattr(gpu_gate.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(results, "machine", lambda: "h200")
    monkeypatch.setattr(results, "provenance", lambda: {"git": "abc"})
    monkeypatch.setenv("BENCH_COMMIT", "abc")
    monkeypatch.setattr("sys.argv", ["gpu_gate", "--out", str(tmp_path)])
    checks = []
    check = {"passed": True, "failures": [], "seconds": 1.0}
    monkeypatch.setattr(gpu_gate, "own_check", lambda: checks.append(None) or dict(check))
    assert gpu_gate.main() == 1
    tests.write_text(second.replace("assert not", "assert number in (4, 5) and not"))  # the others would fail
    record = results.result_of_today("gate", tmp_path)
    ran_no_more = [node for node in record["outcomes"] if node.endswith("[5]")]
    del record["outcomes"][ran_no_more[0]]  # as if stopped before it
    results.write_result("gate", record, tmp_path)
    assert gpu_gate.main() == 0 and len(checks) == 1
    record = results.result_of_today("gate", tmp_path)
    assert (
        record["passed"] and len(record["outcomes"]) == 6 and set(record["outcomes"].values()) == {"passed"}
    )
    assert record["tests"][-1].startswith("4 tests were green before")
    tests.write_text("raise SystemError")
    assert gpu_gate.main() == 1  # what can no longer be collected is red
    tests.write_text(second.replace("assert not", "assert False and not"))
    assert gpu_gate.main() == 0  # nothing is left to run


def test_without_xdist_a_broken_gpu_ends_the_tests(a_gpu, monkeypatch):
    monkeypatch.setattr(gpu_gate, "TOGETHER", ())
    code, lines, _ = gpu_gate.run_tests(dry_run=False, seconds=500)
    assert code == 1 and "left the GPU unusable for this process: CUDA error" in lines[-1], lines


def test_gpu_tests_end_in_time(a_gpu, tmp_path):
    (tmp_path / "test_it.py").write_text("import threading\nthreading.Event().wait()")
    code, lines, _ = gpu_gate.run_tests(dry_run=False, seconds=2)
    assert code == 124 and "stopped after 2 s" in lines[-1]
