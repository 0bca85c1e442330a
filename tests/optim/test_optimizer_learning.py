"""A small training by every optimizer ends where AdamW's does, beside what another order of the rows does."""

from dataclasses import replace

import torch

from benchmarks.learning.optimizers import ADAMW, ARMS, measure
from benchmarks.learning.train import QUICK
from tests.optim.optimizer_runs import eager as eager


def test_every_optimizer_learns_what_adamw_learns():
    torch.set_num_threads(1)
    sizes = replace(QUICK, texts=400, sft_steps=40, rows=128, held_out=48, steps=16)
    found = measure(sizes, ARMS, seeds=(0, 1, 2))
    for name, why in found["skipped"].items():
        assert "pip install 'fastdpo[quant]'" in why, name
    assert found["arms"].keys() | found["skipped"].keys() == ARMS.keys()
    for name, arm in found["arms"].items():
        assert arm["apart"] < found["spread"], name
        assert arm["losses"][-1] < arm["losses"][0] - 0.05, name
    for name in (ADAMW, "in backward", "offloaded"):
        assert found["arms"][name]["apart"] == found["arms"][name]["curve_apart"] == 0
    assert found["arms"]["pure_bf16"]["apart"] > 0 and found["arms"]["adafactor"]["apart"] > 0
