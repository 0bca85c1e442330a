"""`fastdpo doctor`: its checks find what is wrong, and its text says so."""

import io
import json
import math
import os
import re
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from fastdpo_kernels import chunk, chunked
from rich.console import Console

from benchmarks.process import python_path
from fastdpo.cli import main
from fastdpo.doctor import (
    attention_checks,
    child,
    command,
    head_checks,
    head_problem,
    machine,
    other_checks,
    show,
    speed,
)
from fastdpo.doctor.ladder import Ladder, read_verdict, verdict_path
from fastdpo.doctor.measuring import Measured, NotHere, beside, error, poisoned
from fastdpo.doctor.trials import Children, NotStarted
from fastdpo.errors import ModelError
from fastdpo.model import attention, offloading

PLANTS = "tests.doctor.doctor_plants"
CHECKS = {
    "head": lambda: head_checks.check_bf16("cpu", "torch"),
    "other heads": lambda: head_checks.check_others("cpu", "torch"),
    "attention": lambda: attention_checks.check_bf16("cpu", "segments"),
    "other attention": lambda: attention_checks.check_others("cpu", "segments"),
    "offloading": lambda: other_checks.check_offloading("cpu"),
    "4 bits": lambda: other_checks.check_4bit("cpu"),
}


def wrong(check):
    """What a check finds wrong."""
    return [m.what for m in CHECKS[check]() if not m.right]


# ---- the checks


@pytest.mark.parametrize("name", CHECKS)
def test_all_is_right_on_this_cpu(name):
    if name == "4 bits":
        pytest.importorskip("bitsandbytes")
    results = CHECKS[name]()
    assert results and all(m.right for m in results), [m for m in results if not m.right]
    assert all(m.share < 0.8 for m in results), "too near to its bound for another machine"


def test_a_measurement():
    assert Measured("", 1e-3, 1e-3).right and Measured("", 0, 0).right
    for off in (math.nan, math.inf, 2e-3):
        assert not Measured("", off, 1e-3).right and Measured("", off, 1e-3).share > 1
    assert not Measured("", 1, 0).right
    truth = torch.tensor([1.0, -4.0])
    assert error(truth + torch.tensor([0.0, 0.5]), truth) == 0.125
    assert math.isnan(error(torch.tensor([1.0, math.nan]), truth))
    off, baseline = truth * 1.01, truth * 1.005
    assert beside("", off, truth, baseline, torch.float32).right
    assert not beside("", truth * 1.03, truth, baseline, torch.float32).right
    assert not beside("", off, truth, truth, torch.float32).right


def test_poison():
    before = torch.empty
    with poisoned():
        assert torch.empty(3).isnan().all() and torch.empty_like(torch.zeros(2, 2)).isnan().all()
        assert torch.empty(2, dtype=torch.int64).shape == (2,)
    assert torch.empty is before


def break_target(monkeypatch):
    real = chunked.target_coefficient
    monkeypatch.setattr(chunked, "target_coefficient", lambda *args: real(*args) * 1.1)


def break_one_logit(monkeypatch):
    real = chunk.TorchChunk.reduce

    def reduce(self, z, span, softmax, out=None):
        z[-1, 0] += 2.0  # one token of one row
        return real(self, z, span, softmax, out)

    monkeypatch.setattr(chunk.TorchChunk, "reduce", reduce)


def leave_unwritten(monkeypatch):
    real = chunked.matmul
    only_first = lambda a, b, out: None if out.storage_offset() else real(a, b, out)
    monkeypatch.setattr(chunked, "matmul", only_first)


def round_logits(monkeypatch):
    real = chunk.TorchChunk.reduce
    rounded = lambda self, z, *args: real(self, z.copy_(z.bfloat16()), *args)
    monkeypatch.setattr(chunk.TorchChunk, "reduce", rounded)


HEAD_FAULTS = {
    break_target: {"head": "d hidden", "other heads": "d weight"},
    break_one_logit: {"head": "log-probs", "other heads": "log-probs"},
    round_logits: {"head": "log-probs", "other heads": "log-probs"},
}


@pytest.mark.parametrize("fault", HEAD_FAULTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ("head", "other heads"))
def test_a_wrong_head_is_found(monkeypatch, fault, name):
    fault(monkeypatch)
    found = wrong(name)
    assert any(HEAD_FAULTS[fault][name] in what for what in found), found


def test_heads_are_checked_on_poisoned_memory(monkeypatch):
    seen = {}
    for name in ("linear_logp", "linear_dpo"):
        real = getattr(head_checks, name)

        def spied(*args, real=real, name=name, **keys):
            seen.setdefault(name, set()).add(torch.empty(4).isnan().all().item())
            return real(*args, **keys)

        monkeypatch.setattr(head_checks, name, spied)
    assert wrong("other heads") == []
    assert seen == {"linear_logp": {True}, "linear_dpo": {True}}


def test_what_nobody_wrote_is_found(monkeypatch):
    from tests.kernels.cases import plan_module

    monkeypatch.setattr(plan_module, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(plan_module, "BLOCK_WIDTH", 256)  # several chunks
    assert wrong("other heads") == []
    leave_unwritten(monkeypatch)
    assert any("d weight" in what for what in wrong("other heads"))


def test_another_rung_than_asked_for_is_not_here():
    for check in (head_checks.check_bf16, head_checks.check_others):
        with pytest.raises(NotHere, match="no GPU"):
            check("cpu", "cublas")
    for rung in ("varlen", "flash_attn"):
        with pytest.raises(NotHere, match="no GPU"):
            attention_checks.check_bf16("cpu", rung)


def test_the_baseline_of_a_head_is_one_rounding_away():
    c = head_problem.head_case("cpu", torch.bfloat16, [9, 4, 7], 101, 24, softcap=4.0, bias=True, lora=True)
    exact = head_problem.rounded_once(c, torch.float64, c.d_logp)
    truth = head_problem.run_logp(head_checks.reference.linear_logp, c, torch.float64, True)
    rounded = head_problem.rounded_once(c, torch.bfloat16, c.d_logp)
    assert exact.keys() == {"hidden", "weight", "bias", "a", "b"}
    for name, value in exact.items():
        torch.testing.assert_close(value, truth[name], rtol=1e-10, atol=1e-12)
        assert rounded[name].dtype == torch.bfloat16
        assert 1e-5 < error(rounded[name], truth[name]) < 2**-7


def window_off_by_one(monkeypatch):
    real = attention._segments
    off = lambda q, k, v, layout, scale, window, cap: real(q, k, v, layout, scale, window and window + 1, cap)
    monkeypatch.setattr(attention, "_segments", off)


def no_softcap(monkeypatch):
    real = attention._segments
    monkeypatch.setattr(attention, "_segments", lambda *args: real(*args[:-1], args[-1] and 2 * args[-1]))


def one_copy_of_a_key(monkeypatch):
    monkeypatch.setattr(
        attention._GatherCopies,
        "backward",
        staticmethod(lambda ctx, grad: (grad.index_select(0, ctx.layout.first_copy), None)),
    )


@pytest.mark.parametrize(
    "fault, name, what",
    [
        (window_off_by_one, "attention", "output (bf16, 4 heads on 4 of 64, window 7)"),
        (no_softcap, "other attention", "output (fp32, 4 heads on 2 of 64, softcap)"),
        (one_copy_of_a_key, "attention", "dk (bf16, 4 heads on 2 of 64)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_wrong_attention_is_found(monkeypatch, fault, name, what):
    fault(monkeypatch)
    assert what in wrong(name)


def test_wrong_offloading_is_found(monkeypatch):
    real = offloading.Moves._bring

    def bring(self, moved):
        real(self, moved)
        moved.device.view(torch.int32)[5] ^= 1  # one bit

    monkeypatch.setattr(offloading.Moves, "_bring", bring)
    assert wrong("offloading") == ["gradient entries that differ from those without"]
    monkeypatch.setattr(offloading.Moves, "_is_worth_it", lambda self, tensor: False)
    assert wrong("offloading") == ["layers whose activations stayed"]


def test_wrong_4_bits_are_found(monkeypatch):
    bnb = pytest.importorskip("bitsandbytes")
    real = bnb.nn.Linear4bit.forward
    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", lambda self, x: real(self, x) * 1.05)
    assert {"output (bf16)", "d input (fp32)"} <= set(wrong("4 bits"))
    monkeypatch.undo()
    real_params = bnb.nn.Params4bit
    fp4 = lambda *args, **keys: real_params(*args, **(keys | {"quant_type": "fp4"}))
    monkeypatch.setattr(bnb.nn, "Params4bit", fp4)
    assert any("rounding to 4 bits" in what for what in wrong("4 bits"))


# ---- speed: what is timed is what is said


def test_attended_pairs():
    layout = attention_checks.layout_of(((5, (3, 1)), (2, (4,))))
    place = torch.arange(len(layout.seen_until))
    mask = (place[None] <= place[:, None]) & (place[:, None] < layout.seen_until[None])
    assert speed.attended(layout) == mask.sum()


def test_speed_runs_on_small_sizes(monkeypatch):
    """On a CPU, so that a typo shows; nothing is timed here that anyone should believe."""
    monkeypatch.setattr(speed, "M", 40)
    monkeypatch.setattr(speed, "D", 16)
    monkeypatch.setattr(speed, "V", 64)
    monkeypatch.setattr(speed, "SHAPES", ((5, (3, 1)),))
    monkeypatch.setattr(speed, "CASE", attention_checks.Case(2, 1, 8))
    found = speed.measure("cpu", ["triton", "varlen"])
    assert [run["how"] for run in found.values()] == ["cuBLAS", "keep by torch", "segments"]
    assert all(run["tflops"] > 0 and run["milliseconds"] > 0 for run in found.values())
    work = {"GEMM": 2 * 40 * 16 * 64, "lm_head": 6 * 40 * 16 * 64, "attention": 12 * 2 * 8 * 28}
    for name, run in found.items():
        assert run["tflops"] * run["milliseconds"] * 1e9 == pytest.approx(work[name])


# ---- the command


def doctor(monkeypatch, ladders, others=(), device="cpu", width=80):
    """(exit code, what it printed) of the command with these checks in place of its own."""
    monkeypatch.setattr(command, "ladders_of", lambda device: ladders)
    monkeypatch.setattr(command, "OTHERS", tuple((name, f"{PLANTS}:{plant}") for name, plant in others))
    console = Console(file=io.StringIO(), width=width)
    return command.doctor(console), console.file.getvalue()


def planted(monkeypatch, **becomes):
    monkeypatch.setenv("PLANTED", json.dumps(becomes))
    return (Ladder("lm_head, bf16", f"{PLANTS}:by_variable", ("triton", "plain_triton", "cublas", "torch")),)


def test_what_is_wrong_is_left_out_and_reported(monkeypatch):
    ladders = planted(monkeypatch, triton="segfaults", plain_triton="wrong", cublas="is_not_here")
    code, said = doctor(
        monkeypatch, ladders, [("activation_offloading", "raises"), ("load_in_4bit", "right")]
    )
    assert code == 0
    table, _, text = said.partition("For a bug report:")
    assert re.search(r"triton +│ failed +│ the process died of", table)
    assert re.search(r"torch \* +│ right +│ 2.0e-04, 1.0e-03", table)
    assert "plain_triton is left out: inexact: gradient: 2.5e-01, 1.0e-03 allowed" in " ".join(table.split())
    assert "do not train with activation_offloading here" in table
    assert "all that a run here stands on (*) is right" in table
    assert all(len(line) <= 80 for line in table.splitlines())
    assert "lm_head, bf16 by triton: failed (the process died of SIGSEGV)" in text
    assert "in segfaults" in text and "a compiler's words" in text  # where it was, and what it said


def test_nothing_right_is_exit_code_1(monkeypatch):
    ladders = planted(monkeypatch, triton="raises", plain_triton="wrong", cublas="wrong", torch="wrong")
    code, said = doctor(monkeypatch, ladders)
    assert code == 1
    assert "nothing is right for lm_head, bf16: do not train on this machine" in said
    assert "(*) is right" not in said


@pytest.fixture
def fake_gpu(monkeypatch):
    """A GPU for the parent; its children run on the CPU."""
    chip = {"name": "Fake 100", "capability": "9.0", "memory": "80.0 GB", "SMs": "132"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(machine, "gpu", lambda device: chip)
    monkeypatch.setattr(machine, "driver", lambda: "580.65.06")
    monkeypatch.setattr(command, "Children", lambda device: Children("cpu"))
    monkeypatch.setattr(command, "SPEED", f"{PLANTS}:speed")


def test_on_a_gpu_speed_and_a_verdict_for_the_next_runs(monkeypatch, fake_gpu):
    ladders = planted(monkeypatch, triton="wrong")
    code, said = doctor(monkeypatch, ladders)
    assert code == 0
    assert "Fake 100, compute capability 9.0, 80.0 GB, 132 SMs" in said and "580.65.06" in said
    assert re.search(r"lm_head +│ keep by triton +│ 3.60 +│ +455.0 +│ +65%", said)
    assert "attention by triton: 3.60 ms, 301.0 TFLOP/s" in said  # was told what is left out
    key = machine.key("cuda:0")
    choice = read_verdict(verdict_path(key), key)
    assert choice.taken == {"lm_head, bf16": "plain_triton"} and set(choice.left_out) == {"triton"}
    assert "kept for the next runs" in said


def test_a_verdict_for_want_of_memory_is_not_kept(monkeypatch, fake_gpu):
    code, said = doctor(monkeypatch, planted(monkeypatch, triton="out_of_memory"))
    key = machine.key("cuda:0")
    said = " ".join(said.split())
    assert "will try the kernels again: another process may have" in said
    assert "nothing is known of triton: MemoryError: CUDA out of memory" in said
    assert code == 1 and "not all that a run here stands on (*) could be tried" in said
    assert not verdict_path(key).exists()


def test_a_crash_while_timing_costs_the_timing(monkeypatch, fake_gpu):
    monkeypatch.setattr(command, "SPEED", f"{PLANTS}:no_such_function")
    code, said = doctor(monkeypatch, planted(monkeypatch))
    assert code == 0 and "speed: not measured: AttributeError" in said


def test_what_the_doctor_knows_is_shown_where_no_second_child_starts(monkeypatch, fake_gpu):
    real = Children._start

    def start(self):
        if self.started:
            raise NotStarted("exit code 1: the GPU is gone")
        real(self)

    monkeypatch.setattr(Children, "_start", start)
    monkeypatch.setattr(command, "SPEED", f"{PLANTS}:speed")
    code, said = doctor(monkeypatch, planted(monkeypatch, torch="aborts"))
    assert code == 0 and "lm_head, bf16 by cublas: right" in said
    assert "speed: not measured: no further process starts: exit code 1: the GPU is gone" in said
    code, said = doctor(monkeypatch, planted(monkeypatch, triton="aborts"))
    assert code == 1 and "by triton: failed (the process died of SIGABRT)" in said
    assert "by cublas: failed (no further process starts: exit code 1: the GPU is gone)" in said


KILLED = """
from fastdpo.doctor import command
from fastdpo.doctor.ladder import Ladder

plant = "tests.doctor.doctor_plants:by_variable"
command.ladders_of = lambda device: (Ladder("head", plant, ("one", "two")),)
command.doctor()
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="looks into /proc, and a child dies with us on Linux alone"
)
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGKILL, -9)], ids=["TERM", "KILL"])
def test_a_doctor_that_is_killed_has_told_what_it_knew_and_leaves_no_child(number, code):
    environment = os.environ | {"PLANTED": '{"two": "hangs"}', "CUDA_VISIBLE_DEVICES": ""}
    command_line = [sys.executable, "-c", KILLED]
    process = subprocess.Popen(command_line, stdout=subprocess.PIPE, env=environment, text=True)
    with process:
        late = threading.Timer(300, process.kill)
        late.start()
        told = next((line for line in process.stdout if line.startswith("head by one: right (")), None)
        late.cancel()
        assert told, "nothing was told before the end"
        (begun,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        child = os.pidfd_open(int(begun))
        process.send_signal(number)
        assert process.wait(300) == code
    assert select.select([child], [], [], 300)[0], "the child goes on"
    os.close(child)


def test_a_child_is_on_its_device(monkeypatch):
    """synchronize waits for the current one."""
    done = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(("current", device)))
    monkeypatch.setattr(torch, "zeros", lambda *size, device: done.append(("used", device)))
    child.reach("cuda:1")
    child.reach("cpu")
    assert done == [("current", "cuda:1"), ("used", "cuda:1"), ("used", "cpu")]


def test_no_child_is_an_error(monkeypatch):
    monkeypatch.setattr(command, "Children", lambda device: Children("cuda:99"))
    with pytest.raises(ModelError, match=r"does not start: .*exit code 1"):
        doctor(monkeypatch, planted(monkeypatch))


def test_usage(capsys):
    assert main(["doctor", "--help"]) == 0 and "Usage: fastdpo doctor" in capsys.readouterr().out
    assert main(["doctor", "now"]) == 2 and "unexpected argument 'now'" in capsys.readouterr().err
    assert main(["doctor", "--json"]) == 2 and "--json" in capsys.readouterr().err


def test_begins_where_transformers_is_broken():
    script = "import sys, fastdpo.doctor.command; assert 'transformers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ahead_of_time():
    assert "plain torch" in show.ahead_of_time(None)
    told = show.ahead_of_time("9.9")
    assert "triton 9.9, on a GPU of compute capability 8.0, 8.6, 8.9, 9.0, 10.0, 10.3, 12.0, " in told
    assert "not measured" in told


ABSENT = """
import importlib.machinery, sys

class Without(importlib.machinery.PathFinder):
    names = ({names})

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in cls.names else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, context=None):
        return [] if context.name in cls.names else importlib.machinery.PathFinder.find_distributions(context)

sys.meta_path[:] = [Without if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
"""


@pytest.mark.parametrize("absent", [(), ("triton", "bitsandbytes")], ids=["all", "without some"])
def test_on_this_machine(tmp_path, absent):
    (tmp_path / "sitecustomize.py").write_text(ABSENT.format(names="".join(f"{n!r}, " for n in absent)))
    environment = os.environ | python_path(tmp_path) | {"COLUMNS": "80", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "fastdpo.cli", "doctor"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    said = " ".join(done.stdout.split())
    assert "no GPU: " in said and "(*) is right" in said
    assert "attention, bf16 by segments: right (" in said and "lm_head, bf16 by torch: right (" in said
    assert "lm_head, bf16 by triton: not here (no GPU)" in said
    assert "activation_offloading: right (the same bits)" in said
    if absent:
        assert "triton: not installed" in said and "triton is not installed: on a GPU" in said
        assert "load_in_4bit: not here (bitsandbytes is not installed)" in said
    elif "bitsandbytes: not installed" not in said:
        assert "load_in_4bit: right (" in said
    lines = done.stdout.partition("For a bug report")[0].splitlines()
    assert all(len(line) <= 80 or line.startswith("checks: ") for line in lines)  # how far a slow one is
