"""linear_dpo over the Triton kernels, in Triton's interpreter: a process of its own, for the interpreter
is chosen when triton is imported."""

import os
import subprocess
import sys

import pytest

from benchmarks.process import ROOT, python_path

SCRIPT = """
import torch
from fastdpo_kernels import launch, linear_dpo, reference, tiles, triton_head
from tests.kernels import cases
from tests.kernels.dpo_cases import batch, budget_for, parts

small = tiles.Tile(16, 32, 16, 2, 4, 1, False)
tiles.tile = lambda device, dtype: small if dtype == torch.float32 else None
launch.processors = lambda device: 3
cases.plan_module.BLOCK_ELEMENTS, cases.plan_module.BLOCK_WIDTH = 1, 64
b = batch(1, 4, V=130, D=24, most=5, lora=False, softcap=3.0)
budget = budget_for(b, max(b.groups), torch.float32) - 1
assert {name for name, _ in parts(b, budget, torch.float32)} == {"keep", "recompute"}
real, plans = triton_head.forward, []
triton_head.forward = lambda *args: plans.append(args[3].name) or real(*args)
every = ("hidden", "weight", "bias")
for wanted, budget in ((every, budget), (every, 1), (("hidden",), budget), ((), budget)):
    got = b.run(linear_dpo, wanted, torch.float32, memory_budget=budget)
    for name, truth in b.run(reference.linear_dpo, wanted).items():
        if truth is None:
            assert got[name] is None
        else:
            assert cases.error(got[name], truth) < 3e-6, name
assert set(plans) == {"keep", "recompute", "frozen", "forward"}
"""


def test_every_plan_in_the_interpreter():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"} | python_path()
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
