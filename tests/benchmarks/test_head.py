"""The head benchmark measures what it says, on shapes too small to time."""

import pytest
import torch
from fastdpo_kernels import reference

from benchmarks.head import other_heads, our_heads
from benchmarks.head import run as head
from benchmarks.head import table as head_table
from benchmarks.head.inputs import Inputs, Shape, Truth
from benchmarks.results import newest

TINY = Shape(16, 8, 67, 4, softcap=20.0, budget=4000)


@pytest.fixture(scope="module")
def inputs():
    return Inputs.make(TINY, torch.float32, "cpu")


def test_truth_is_the_references(inputs):
    leaves = inputs.leaves("trained")
    hidden, weight = (t.detach().double().requires_grad_() for t in (leaves.hidden, leaves.weight))
    rest = (inputs.target, inputs.cu_resp, inputs.pairs, inputs.ref.double())
    loss, stats = reference.linear_dpo(hidden, weight, *rest, softcap=TINY.softcap)
    loss.backward()
    truth = Truth(inputs, rows=5)
    torch.testing.assert_close(truth.logp, stats.token_logp.detach())
    torch.testing.assert_close(truth.d_hidden, hidden.grad)
    torch.testing.assert_close(truth.d_weight, weight.grad)


@pytest.mark.parametrize("mode", head.MODES)
def test_every_column_of_every_mode(inputs, mode, tmp_path, monkeypatch, capsys):
    makers = {name: other_heads.MAKERS[name] for name in ("torch", "liger DPO")}
    monkeypatch.setattr(other_heads, "MAKERS", makers)
    measured, absent = head.measure_mode(inputs, mode, Truth(inputs), 2, {})
    ours = {name for name, (_, modes) in our_heads.CONTENDERS.items() if mode in modes}
    assert set(measured) == {"floor", "torch"} | ours and set(absent) == {"liger DPO"}
    for name, numbers in measured.items():
        if name == "floor":
            continue
        assert len(numbers["seconds"]) == 2 and numbers["same_bits"]
        assert numbers["nats_max"] < 1e-4
        assert ("d_hidden" in numbers, "d_weight" in numbers) == (mode != "forward", mode == "trained")
        if mode == "trained":
            assert max(numbers["d_hidden"], numbers["d_weight"]) < 1e-4
        if name in ours:
            assert 0 < numbers["peak_bytes"] <= numbers["promised_bytes"]
    if mode == "trained":
        plans = {name: measured[name]["plan"] for name in ours}
        wanted = {"linear_logp": "recompute", "linear_logp with room": "keep", "linear_dpo": "grouped"}
        assert plans == wanted
    results = {str(TINY): {mode: (measured, absent)}}
    head_table.print_table(results, head.Console(width=130))
    assert "liger DPO" in capsys.readouterr().out
    head.write(tmp_path, results, [], "float32", {})
    assert newest("head", folder=tmp_path)["results"][str(TINY)][mode][1] == absent
