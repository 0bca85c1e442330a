"""The attention benchmark gives every contender the same numbers, and knows a wrong one."""

import json

import pytest
import torch

from benchmarks.attention import run as attention
from benchmarks.attention.inputs import FORMS, AttentionInputs, Heads, Truth
from benchmarks.lengths import PairLengths
from fastdpo.model.attention import attend

ROWS = [PairLengths(5, 3, 7), PairLengths(1, 2, 1), PairLengths(9, 1, 4)] * 4


@pytest.fixture(scope="module")
def inputs():
    return AttentionInputs.make(ROWS, Heads(4, 2, 8), torch.float32, "cpu")


def test_truth_is_attention_on_shared_prompts(inputs):
    given = {k: inputs.source[k].double().requires_grad_() for k in "qkv"}
    out = attend(*given.values(), inputs.shared, backend="dense")
    out.backward(inputs.source["grad"].double())
    assert max(Truth(inputs).errors("shared", out.detach(), given).values()) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_forms_hold_the_same_rows(inputs, form):
    rows = inputs.form(form)
    for key in ("q", "v"):
        assert torch.equal(inputs.as_separate(form, rows[key]), inputs.source[key][inputs.copy_of])
    assert torch.equal(inputs.as_shared(form, rows["grad"]), inputs.source["grad"].double())
    sizes = {"shared": sum(map(sum, ROWS)) - 2 * len(ROWS)}
    sizes["separate"] = sum(2 * P + C + R - 2 for P, C, R in ROWS)
    sizes["padded"] = 16 * 12 + 8 * 12  # the longest rows have 9 + 4 tokens, or 5 + 7, less the last
    assert len(rows["q"]) == sizes[form]


def test_work_by_hand():
    one = AttentionInputs.make([PairLengths(3, 2, 4)], Heads(2, 1, 8), torch.float32, "cpu")
    assert one.flops == 4 * 8 * 2 * (6 + (3 + 1) + (9 + 6))
    assert one.flops_of_separate == 4 * 8 * 2 * (10 + 21)
    assert one.least_bytes("forward") == 4 * 8 * 7 * (2 + 1 + 1 + 2)
    assert one.least_bytes("forward+backward") == 4 * 8 * 7 * (6 + (2 + 1 + 1 + 2 + 2) + (2 + 1 + 1))


def test_measure(inputs, monkeypatch):
    wrong = ("shared", lambda inputs: lambda *qkv: attend(*qkv, inputs.separate, backend="dense"))
    blind = ("padded", lambda inputs: lambda q, k, v: v.repeat_interleave(2, 1) * 1.0)
    monkeypatch.setattr(attention, "CONTENDERS", attention.CONTENDERS | {"crash": wrong, "blind": blind})
    results, absent = attention.measure(inputs, turns=2)
    here = {
        "shared, dense mask",
        "separate rows, SDPA each",
        "padded, SDPA causal",
        "padded, SDPA with a mask",
    }
    assert set(results) == here | {attention.OURS}
    assert (
        "wrong" in absent["blind"]
        and "Error" in absent["crash"]
        and "CUDA" in absent["separate rows, varlen"]
    )
    for numbers in results.values():
        assert (
            set(numbers["errors"]) == {"out", "d_q", "d_k", "d_v"} and max(numbers["errors"].values()) < 1e-5
        )
        for mode in attention.MODES:
            assert len(numbers["seconds"][mode]) == 2 and numbers["peak_bytes"][mode] > 0


def test_ours_wrong_is_an_error(inputs, monkeypatch):
    contenders = attention.CONTENDERS | {attention.OURS: ("shared", lambda i: lambda q, k, v: q * 1.0)}
    monkeypatch.setattr(attention, "CONTENDERS", contenders)
    with pytest.raises(attention.CannotRunError, match="wrong"):
        attention.measure(inputs, turns=1)


def test_a_microbatch_fills_its_tokens():
    rows, drawn = attention.microbatch("HH-RLHF", 4096), attention.draw("HH-RLHF", 100)
    used = sum(sum(row) - 2 for row in rows)
    assert 3900 < used <= 4096 and rows[:8] == drawn[:8] and set(rows) <= set(drawn)
    assert attention.microbatch("Capybara", 16) == [min(attention.draw("Capybara", 16), key=sum)]


def test_the_whole_run(tmp_path, capsys):
    path = attention.run(attention.TOY[:1], tokens=64, turns=1, minutes=60, out=tmp_path)
    record = json.loads(path.read_text())
    assert record["no_time_for"] == [] and record["git"] and record["problems"][0]["model"] == "CPU"
    assert attention.OURS in capsys.readouterr().out
    none = attention.run(attention.TOY, tokens=64, turns=1, minutes=-1, out=tmp_path)
    assert len(json.loads(none.read_text())["no_time_for"]) == 2
