"""linear_dpo over the Triton kernels, in Triton's interpreter: a process of its own, for the interpreter
is chosen when triton is imported."""

import os
import subprocess
import sys

import pytest

from benchmarks.process import ROOT, python_path

SCRIPT = """
import torch
from fastdpo_kernels import head_pass, launch, linear_dpo, reference, tiles, triton_head
from tests.kernels import cases
from tests.kernels.dpo_cases import batch, budget_for, parts

small = tiles.Tile(16, 32, 16, 2, 4, 1, False)
for module in (tiles, triton_head):
    module.tile = lambda device, dtype: small if dtype == torch.float32 else None
launch.processors = lambda device: 3
cases.plan_module.BLOCK_ELEMENTS, cases.plan_module.BLOCK_WIDTH = 1, 64
b = batch(1, 4, V=130, D=24, most=5, lora=False, softcap=3.0)
budget = budget_for(b, max(b.groups), torch.float32) - 1
assert {name for name, _ in parts(b, budget, torch.float32)} == {"keep", "recompute"}
real, passes = head_pass.head_pass, []
linear_dpo_module = __import__("sys").modules["fastdpo_kernels.linear_dpo"]
linear_dpo_module.head_pass = lambda *args: passes.append(real(*args)) or passes[-1]
for wanted in (("hidden", "weight", "bias"), ("hidden",), ()):
    got = b.run(linear_dpo, wanted, torch.float32, memory_budget=budget)
    for name, truth in b.run(reference.linear_dpo, wanted).items():
        if truth is None:
            assert got[name] is None
        else:
            assert cases.error(got[name], truth) < 3e-6, name
assert {type(p).__name__ for p in passes} == {"TritonPass"}
"""


def test_every_plan_in_the_interpreter():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"} | python_path()
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
