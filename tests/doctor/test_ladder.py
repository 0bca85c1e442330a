"""The ladder: whatever a kernel does in its child, the run goes on by the next one, and says so."""

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import fastdpo_kernels
import pytest
import torch
from fastdpo_kernels import tiles
from rich.console import Console

from fastdpo import api
from fastdpo.config.keys import Config
from fastdpo.doctor import ladder, machine
from fastdpo.doctor.ladder import Choice, Ladder, choose, read_verdict, settle, verdict_path
from fastdpo.doctor.trials import Outcome
from fastdpo.errors import ModelError
from fastdpo.model import attention
from fastdpo.reference.cache_file import cache_path
from tests.doctor.test_trials import FAULTS, PLANTS
from tests.tiny import rows, save_model, write_jsonl

KEY = {"gpu": "Fake 100", "capability": "9.0", "torch": "2.13.0", "sources": "abc"}


# ---- which rung


def chosen(verdicts, *ladders):
    """What `choose` makes of {(ladder, rung): verdict}, and what it looked at."""
    looked = []

    def outcome_of(one, rung):
        looked.append((one.name, rung))
        return Outcome(verdicts.get((one.name, rung), "right"), "why")

    return choose(ladders, outcome_of), looked


A = Ladder("A", "", ("one", "two", "three"))
B = Ladder("B", "", ("two", "three"))


def test_the_first_right_rung_is_taken_and_no_other_is_tried():
    choice, looked = chosen({}, A, B)
    assert choice == Choice({"A": "one", "B": "two"}, {})
    assert looked == [("A", "one"), ("B", "two")]
    choice, _ = chosen({("A", "one"): "not here"}, A)
    assert choice == Choice({"A": "two"}, {})
    choice, _ = chosen({("A", "one"): "unknown"}, A)
    assert choice == Choice({"A": "one"}, {}, {"one": "why"})
    choice, _ = chosen({("A", "two"): "unknown", ("A", "one"): "failed", ("B", "two"): "inexact"}, A, B)
    assert choice == Choice({"A": "three", "B": "three"}, {"one": "failed: why", "two": "inexact: why"})
    choice, _ = chosen({("A", "one"): "failed", ("A", "two"): "inexact"}, A)
    assert choice == Choice({"A": "three"}, {"one": "failed: why", "two": "inexact: why"})


def test_a_rung_that_is_wrong_in_one_ladder_is_taken_in_none():
    choice, looked = chosen({("A", "one"): "failed", ("B", "two"): "inexact"}, A, B)
    assert choice.taken == {"A": "three", "B": "three"}
    assert len(looked) == len(set(looked))  # none is tried twice


def test_nothing_right():
    choice, _ = chosen({("B", "two"): "failed", ("B", "three"): "failed"}, A, B)
    assert choice.taken == {"A": "one", "B": None}


def test_rungs_are_known_where_they_are_left_out():
    """Every rung but a ladder's last is one that the kernels or the attention can do without."""
    for one in ladder.LADDERS:
        for rung in one.rungs[:-1]:
            (fastdpo_kernels.avoid if rung in tiles.RUNGS else attention.avoid)(rung)
        assert one.rungs[-1] in ("torch", "segments")


def test_without_bf16_its_ladders_are_not_climbed(monkeypatch):
    monkeypatch.setattr(machine, "has_bf16", lambda device: False)
    assert [one.name for one in ladder.ladders_of("cpu")] == [
        "lm_head, fp32 or LoRA",
        "attention, fp32 or softcap",
    ]


def test_the_attention_without_some_rungs(monkeypatch):
    q = SimpleNamespace(
        dtype=torch.bfloat16, device=torch.device("cuda"), is_cuda=True, shape=torch.Size([9, 4, 64])
    )
    for installed, left in ((False, "segments"), (True, "flash_attn")):
        monkeypatch.setattr(attention, "_has_flash_attn", lambda installed=installed: installed)
        attention.avoid()
        assert attention.pick_backend(q, q) == "varlen"
        assert attention.pick_backend(q, q, 30.0) == left
        attention.avoid("varlen")
        assert attention.pick_backend(q, q) == left
        attention.avoid("flash_attn")
        assert attention.pick_backend(q, q) == "varlen"
        assert attention.pick_backend(q, q, 30.0) == "segments"
        attention.avoid("varlen", "flash_attn")
        assert attention.pick_backend(q, q) == "segments"
    with pytest.raises(ValueError, match="varlen and flash_attn, got segments"):
        attention.avoid("segments")


# ---- a run on a GPU for the first time, and again


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """settle() on a GPU that is none; its ladders are plants under the real rungs' names."""
    monkeypatch.setattr(machine, "key", lambda device: dict(KEY))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def go(new_process=True, **becomes):
        head = ("triton", "plain_triton", "cublas", "torch")
        monkeypatch.setenv("PLANTED", json.dumps(becomes))
        if new_process:
            monkeypatch.setattr(ladder, "_known", {})
        ladders = (
            Ladder("lm_head", f"{PLANTS}:by_variable", head),
            Ladder("attention", f"{PLANTS}:by_variable", ("varlen", "segments")),
        )
        monkeypatch.setattr(ladder, "ladders_of", lambda device: ladders)
        console = Console(file=io.StringIO(), width=80)
        settle(console, "cpu")
        return console.file.getvalue()

    return go


@pytest.fixture
def quick(gpu, monkeypatch):
    """The same without processes: what a rung becomes is told, and how often it was asked is counted."""
    outcomes = {
        "right": Outcome("right"),
        "raises": Outcome("failed", "RuntimeError"),
        "out_of_memory": Outcome("unknown", "CUDA out of memory. Tried to allocate 2 GiB"),
        "hangs": Outcome("failed", "no answer within 5 s"),
        "has_no_process": Outcome("failed", "no further process starts: exit code 1"),
    }

    def try_check(children, check, arguments):
        gpu.asked.append(arguments["rung"])
        return outcomes[json.loads(os.environ["PLANTED"]).get(arguments["rung"], "right")]

    gpu.asked = []
    monkeypatch.setattr(ladder, "Children", contextlib.nullcontext)
    monkeypatch.setattr(ladder, "try_check", try_check)
    return gpu


def left_out():
    return set(tiles._avoided), set(attention._avoided)


def test_all_right_is_said_once_and_kept(gpu, tmp_path, monkeypatch):
    said = gpu()
    assert "first run on Fake 100" in said and said.count("\n") == 1
    assert left_out() == (set(), set())
    monkeypatch.setattr(ladder, "Children", None)  # no child is started
    assert gpu() == ""
    assert [p.name for p in (tmp_path / "fastdpo").iterdir()] == [verdict_path(KEY).name]


@pytest.mark.parametrize("fault", ["segfaults", "raises", "not_a_number"])
def test_a_faulty_kernel_is_left_out_aloud_now_and_later(gpu, monkeypatch, fault):
    told = []
    gpu_says = lambda: told.append(gpu(triton=fault, varlen="wrong")) or told[-1]
    said = gpu_says()
    why = FAULTS[fault]
    assert f"triton is left out on this GPU, {why[0]}: " in said and why[1] in said
    assert "varlen is left out on this GPU, inexact: gradient: 2.5e-01, 1.0e-03 allowed" in said
    assert "lm_head: by plain_triton; attention: by segments" in said and "`fastdpo doctor`" in said
    assert left_out() == ({"triton"}, {"varlen"})
    fastdpo_kernels.avoid()
    monkeypatch.setattr(ladder, "Children", None)
    again = gpu_says()
    assert left_out() == ({"triton"}, {"varlen"})
    assert said.endswith(again) and "first run" not in again and "remove it to try again" in again


def test_nothing_right_is_an_error_and_not_kept(gpu, tmp_path):
    faults = dict(triton="aborts", plain_triton="wrong", cublas="not_a_number", torch="wrong")
    with pytest.raises(ModelError, match=r"lm_head: no way .*torch inexact.*`fastdpo doctor`"):
        gpu(**faults)
    assert not (tmp_path / "fastdpo").exists()
    assert "first run" in gpu()


def test_another_machine_version_or_source_tries_again(quick, monkeypatch):
    quick()
    assert quick.asked == ["triton", "varlen"] and quick() == ""
    for name in KEY:
        monkeypatch.setattr(machine, "key", lambda device, name=name: KEY | {name: "another"})
        assert "first run" in quick()
        assert quick() == ""
    assert len(quick.asked) == 2 * (1 + len(KEY))


def test_sources_are_in_the_key(monkeypatch, tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/a.py").write_text("one")
    (tmp_path / "attention.py").write_text("two")
    monkeypatch.setattr(machine, "_SOURCES", (tmp_path / "kernels", tmp_path / "attention.py"))
    seen = {machine.sources_digest()}
    for path, text in (("kernels/a.py", "One"), ("attention.py", "Two"), ("kernels/b.py", "")):
        (tmp_path / path).write_text(text)
        seen.add(machine.sources_digest())
    assert len(seen) == 4
    monkeypatch.undo()
    real = {path.name for place in machine._SOURCES for path in [place, *place.glob("*.py")]}
    assert {"tiles.py", "triton_tile.py", "attention.py", "head_checks.py"} <= real


@pytest.mark.parametrize("damage", ["", "{", "null", "[]", '{"digest": 1}', "another rung", "a directory"])
def test_a_damaged_verdict_is_made_again(quick, tmp_path, damage):
    quick(triton="raises")
    (path,) = (tmp_path / "fastdpo").iterdir()
    text = path.read_text()
    path.unlink()
    if damage == "a directory":
        path.mkdir()
    else:
        path.write_text(text.replace('"triton"', '"cublas"') if damage == "another rung" else damage)
    fastdpo_kernels.avoid()
    said = quick(triton="raises")
    assert "is damaged, or cannot be read" in said and "first run" in said
    assert left_out()[0] == {"triton"}
    if damage != "a directory":
        assert path.read_text() == text


def test_a_folder_that_cannot_be_written(quick, tmp_path):
    (tmp_path / "fastdpo").write_text("")
    said = quick(triton="raises")
    assert said.count("cannot write") == 1 and "of this run alone" in said and "remove it" not in said
    assert left_out()[0] == {"triton"}


def test_memory_that_another_process_has_is_no_verdict_to_keep(quick, tmp_path):
    every = ("plain_triton", "cublas", "torch", "segments")
    said = quick(triton="out_of_memory", varlen="raises", **dict.fromkeys(every, "out_of_memory"))
    assert "another process may have the GPU's memory" in said
    assert "triton is taken as it is, untried: CUDA out of memory" in said
    assert "lm_head: by triton; attention: by segments" in said
    assert left_out() == (set(), {"varlen"}) and not (tmp_path / "fastdpo").exists()


@pytest.mark.parametrize("fault", ["hangs", "has_no_process"])
def test_no_answer_is_of_this_run_alone(quick, tmp_path, fault):
    for _ in range(2):
        said = quick(triton=fault)
        assert "triton is left out on this GPU, failed: no " in said and "of this run alone" in said
        assert left_out()[0] == {"triton"} and not (tmp_path / "fastdpo").exists()
    assert quick.asked == ["triton", "plain_triton", "varlen"] * 2


def test_a_process_tries_once_where_nothing_can_be_kept(quick, tmp_path):
    (tmp_path / "fastdpo").write_text("")
    quick(triton="raises")
    asked = list(quick.asked)
    said = quick(new_process=False)
    assert quick.asked == asked and "triton is left out" in said and left_out()[0] == {"triton"}
    quick()
    assert len(quick.asked) > len(asked)


def test_where_the_verdict_is_kept(monkeypatch, tmp_path):
    """Beside the cache that runs have by default, whatever cache this one has: the doctor keeps it there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert verdict_path(KEY).parent == cache_path("auto").parent == tmp_path / "fastdpo"
    assert read_verdict(tmp_path / "none", KEY) is None


def test_a_gpu_that_a_child_cannot_reach(monkeypatch, tmp_path):
    """Nothing is known then: the run goes on, aloud, and the next one tries again."""
    monkeypatch.setattr(machine, "key", lambda device: dict(KEY))
    console = Console(file=io.StringIO(), width=300)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(ladder, "ladders_of", lambda device: (A,))
    settle(console, "cuda:99")
    said = console.file.getvalue()
    assert "could not be tried" in said and "exit code 1" in said and "`fastdpo doctor`" in said
    assert not list(tmp_path.iterdir())


def test_what_the_user_avoids_stays_avoided(quick, monkeypatch):
    fastdpo_kernels.avoid("plain_triton")
    attention.avoid("flash_attn")
    quick()
    assert left_out() == ({"plain_triton"}, {"flash_attn"})
    quick(triton="raises", varlen="raises", new_process=False)  # as the process knows it: all is right
    assert left_out() == ({"plain_triton"}, {"flash_attn"})
    monkeypatch.setattr(machine, "key", lambda device: KEY | {"gpu": "another"})
    quick(triton="raises", varlen="raises")
    assert left_out() == ({"plain_triton", "triton"}, {"flash_attn", "varlen"})


# ---- the trainer


@pytest.fixture
def config(tmp_path):
    return Config(
        model=save_model(tmp_path / "model"),
        data=write_jsonl(tmp_path / "rows.jsonl", rows(4)),
        output_dir=str(tmp_path / "run"),
        max_length=64,
        max_steps=1,
    )


class Chosen(Exception):
    pass


@pytest.mark.parametrize("function", [api.train, api.fill_reference])
def test_a_run_on_a_gpu_climbs_before_its_plan_is_made(monkeypatch, config, gpu, function, tmp_path):
    def choose(*args, **more):
        raise Chosen(left_out())

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    told = []
    monkeypatch.setattr(ladder, "settle", lambda console: told.append(gpu(varlen="aborts")))
    monkeypatch.setattr(api, "choose", choose)
    own_cache = replace(config, reference_cache=str(tmp_path / "own/ref.sqlite"))
    with pytest.raises(Chosen) as stop:
        function(own_cache, Console(quiet=True))
    assert stop.value.args[0] == (set(), {"varlen"})
    assert "varlen is left out" in told[0] and verdict_path(KEY).exists()


@pytest.mark.parametrize("use_cpu", [False, True])
@pytest.mark.parametrize("cache", ["a/ref.sqlite", None])
def test_fast_dpo_trainer_climbs_before_trl_begins(monkeypatch, tmp_path, cache, use_cpu):
    """... but where it is told to train on the CPU."""
    trl = pytest.importorskip("trl")
    import fastdpo.integrations.trl_trainer as ours

    class Begun(Exception):
        pass

    def begin(*args, **keys):
        raise Begun

    told = []
    monkeypatch.setattr(ours, "settle_backends", lambda console: told.append(console.quiet))
    monkeypatch.setattr(trl.DPOTrainer, "__init__", begin)
    config = trl.DPOConfig(output_dir=str(tmp_path), use_cpu=use_cpu, bf16=False, report_to=[])
    with pytest.raises(Begun):
        ours.FastDPOTrainer("model", args=config, reference_cache=cache)
    assert told == ([] if use_cpu else [False])


def test_without_a_gpu_nothing_happens():
    script = "import sys, fastdpo.doctor; fastdpo.doctor.settle_backends(None); "
    script += "assert not [m for m in sys.modules if m.startswith('fastdpo.doctor.')]"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
