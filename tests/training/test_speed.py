"""What a run says of its speed: FLOPs by the planner's formula, idle time by fake events, the time left."""

import contextlib
import io
import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from fastdpo import Config, train
from fastdpo.data.packing import pack
from fastdpo.data.store.stored import facts_of
from fastdpo.model import support
from fastdpo.model.adapters import add_lora
from fastdpo.model.flops import Counted
from fastdpo.model.policy import Policy
from fastdpo.model.spec import ModelSpec
from fastdpo.planning.step_time import Shape, step_time
from fastdpo.planning.target import Target
from fastdpo.training import log, metrics, speed
from fastdpo.training.job import part
from fastdpo.training.log import RunLog
from fastdpo.training.metrics import Window
from fastdpo.training.speed import Idle, Pace
from tests import tiny


@pytest.mark.parametrize(
    "keys", [{}, {"lora_rank": 4, "lora_target_modules": "all-linear"}], ids=["full", "lora"]
)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_flops_are_the_planners(model_type, keys):
    config = Config(model="m", data="d", batch_size=8, max_tokens=1000, **keys)
    model = AutoModelForCausalLM.from_config(tiny.model_config(model_type))
    if keys:
        model = add_lora(model, part(ModelSpec, config))
    policy, groups = Policy(model, torch.float32), tiny.groups()
    support.prepare(policy, groups, Console(quiet=True))
    shape = Shape(policy.core.config)
    planned = step_time(config, policy.core.config, facts_of(groups), Target(is_cpu=True), shape).flops
    counted = Counted.of(policy)
    assert (counted.N, counted.A) == (shape.body, shape.lora(config))
    assert counted.flops(pack(groups, policy.share)) == planned
    assert counted.flops(pack(groups, False)) > planned


OTHER_LAYERS = {  # experts, head sizes that differ by layer, recurrent layers
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16),
    "gemma4_text": dict(hidden_size_per_layer_input=8, layer_types=["sliding_attention", "full_attention"]),
    "qwen3_5_text": dict(head_dim=16, layer_types=["linear_attention", "full_attention"]),
}


@pytest.mark.parametrize("model_type", OTHER_LAYERS)
def test_what_a_place_goes_through_is_not_one_number(model_type):
    assert Counted.of(tiny.policy(model_type, **OTHER_LAYERS[model_type])) is None


def test_a_tower_for_pictures_is_not_counted():
    text = tiny.model_config("gemma3_text", head_dim=16)
    tower = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    both = AutoConfig.for_model("gemma3", text_config=text.to_dict(), vision_config=tower)
    count = lambda config: Counted.of(Policy(AutoModelForCausalLM.from_config(config), torch.float32))
    assert count(both) == count(text)


class Event:
    """Of a device that says when each was reached, in ms."""

    def __init__(self, device):
        self.device, self.at = device, device.now

    def query(self):
        return self.at <= self.device.passed

    def elapsed_time(self, later):
        assert self.query() and later.query(), "it would wait"
        return later.at - self.at


@pytest.fixture
def device(monkeypatch):
    device = SimpleNamespace(now=0.0, passed=1e9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(speed, "_event", lambda: Event(device))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    return device


def work(device, idle, *times):
    for start, end in times:
        device.now = start
        with idle.busy(contextlib.nullcontext()):
            device.now = end


def test_a_gpus_idle_share_is_the_gaps(device):
    first = Idle()
    work(device, first, (0, 100), (150, 300), (300, 900))
    assert first.share(1.0) == pytest.approx(0.05)
    later = first.next()
    work(device, later, (1000, 2000))
    assert later.share(1.0) == pytest.approx(0.1)  # since the window before
    device.passed = 0
    work(device, later, (2500, 2600))
    assert later.share(1.0) == pytest.approx(0.1)  # not reached yet, and not waited for
    device.passed = 1e9
    assert later.share(1.0) == pytest.approx(0.6)
    assert Idle.restored(10.0, 4.0).share(20.0) == pytest.approx(0.2)


def test_what_is_paused_is_not_idle(device, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(
        speed, "time", SimpleNamespace(perf_counter=lambda: clock.now, process_time=lambda: 0.0)
    )
    idle = Idle()
    with idle.paused():  # held-out rows before the first step
        clock.now += 50
    work(device, idle, (0, 100))
    with idle.paused():
        clock.now += 0.7
    work(device, idle, (1000, 1100))
    assert idle.share(1.0) == pytest.approx(0.2)


def test_a_cpus_idle_share_is_its_threads(monkeypatch):
    clock = SimpleNamespace(cpu=5.0)
    monkeypatch.setattr(
        speed, "time", SimpleNamespace(perf_counter=lambda: 0.0, process_time=lambda: clock.cpu)
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    idle = Idle()
    clock.cpu += 15
    assert idle.share(10.0) == pytest.approx(0.25)
    with idle.paused():
        clock.cpu += 100
    assert idle.share(10.0) == pytest.approx(0.25)
    assert Idle.restored(10.0, 4.0).share(20.0) == pytest.approx(0.7)  # 4 of 10, then 10 without work


def test_mfu_is_over_the_cards_rate(device, monkeypatch):
    clock = SimpleNamespace(perf_counter=lambda: 10.0)
    monkeypatch.setattr(metrics, "time", clock)
    window = Window(start=0.0, flops=int(989e12 * 4))
    said = window.throughput()
    assert said["mfu"] == 0.4 and said["tflops_per_second"] == pytest.approx(395.6)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA GeForce GTX 1080")
    assert "mfu" not in window.throughput()
    assert "tflops_per_second" not in Window(start=0.0).throughput()


def test_a_window_of_a_checkpoint_that_knows_no_idle_time():
    state = Window(num_tokens=7).state()
    del state["idle_seconds"], state["counts"]["flops"]
    again = Window.restored(state, "cpu")
    assert (again.num_tokens, again.flops) == (7, 0) and 0 <= again.throughput()["idle_share"] <= 1


def pace_of(*spent):
    ends = itertools.accumulate(spent)
    now = iter([at for end, one in zip(ends, spent) for at in (end - one, end)])
    pace = Pace(clock=lambda: next(now))
    for _ in spent:
        pace.begin()
        pace.stepped()
    return pace


def test_the_time_left_counts_what_has_a_known_cost():
    pace = pace_of(60)
    assert pace.left(10, held_out=3, checkpoint=1) == 600
    pace.last |= {"held_out": 20.0}
    assert pace.left(10, held_out=3, checkpoint=1) == 660
    later = replace(pace_of(60, 10, 12), last={"checkpoint": 5.0})
    assert later.left(10, held_out=3, checkpoint=1) == 115  # the first step warmed up


def estimates(*spent, total=100, stages=1):
    console = Console(file=io.StringIO(), width=200)
    one = RunLog(Path(), console, None, stages)
    for step in range(1, len(spent) + 1):
        pace = pace_of(*spent[:step])
        one.estimate(step, total - step, pace, pace.left(total - step))
    return console.file.getvalue().splitlines()


def test_the_first_step_tells_how_long_it_will_take(monkeypatch):
    now = log.datetime(2026, 3, 4, 17, 0)
    monkeypatch.setattr(log, "datetime", SimpleNamespace(now=lambda: now))
    (line,) = estimates(12, total=1001)
    assert line == "step 1 took 12 s: about 3 h 20 min for the 1,000 steps to come, until 20:20"
    first, better = estimates(40, *[10.0] * 9)
    assert first.startswith("step 1 took 40 s: about 1 h 5 min for the 99 steps to come")
    assert better == "steps 2 to 6 took 10 s each: about 16 min for the 94 steps to come, until 17:15"
    (same,) = estimates(*[10.0] * 9)
    assert same.startswith("step 1 took 10 s")
    assert estimates(0.1) == []
    assert estimates(60, stages=3)[0].endswith("for the 99 steps to come of stage 1 of 3, until 18:39")
    assert estimates(3600)[0].endswith("until Sun 20:00")
    assert estimates(7200)[0].endswith("until 12 Mar")


def test_a_run_logs_them(tmp_path):
    data, model = (
        tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows(20)),
        tiny.save_model(tmp_path / "model"),
    )
    keys = dict(max_steps=3, max_length=128, batch_size=4, logging_steps=1, samples=0, reference_cache="off")
    run = train(Config(model=model, data=data, output_dir=str(tmp_path / "run"), **keys), Console(quiet=True))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in (line for line in lines if "loss" in line):
        assert 0 <= line["idle_share"] <= 1 and line["tflops_per_second"] > 0 and "mfu" not in line
    assert lines[-1]["seconds_left"] == 0
    assert "idle" in (run / "report.html").read_text()
