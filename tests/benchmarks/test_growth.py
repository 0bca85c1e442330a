"""The growth benchmark: each series changes one size, and slopes are fitted to what was measured."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.growth import run as growth


def test_slopes_are_the_powers():
    rows = [{"x": x, "seconds": 3.0 * x**2, "peak_bytes": 5 * x} for x in (1, 2, 4, 8)]
    assert growth.slopes(rows) == pytest.approx({"seconds": 2.0, "peak_bytes": 1.0})
    assert growth.slopes([*rows, {"x": 16, "failed": "out of memory"}])["seconds"] == pytest.approx(2.0)
    assert growth.slopes(rows[:1]) == {} == growth.slopes([{"x": 1, "failed": "out of memory"}])


def test_points_are_measured_and_memory_may_run_out():
    calls = []

    def fail():
        raise torch.OutOfMemoryError("no room")

    points = [
        growth.Point("a", 1, lambda: calls.append(torch.ones(1000))),
        growth.Point("b", 1, lambda: None),
        growth.Point("a", 2, fail),
    ]
    lines, left = growth.measure(iter(points), turns=3, over=lambda: False)
    assert len(calls) == 5 and left == []  # a warm-up, one for the peak, three turns
    (first, second), (other,) = lines["a"], lines["b"]
    assert first["x"] == 1 and first["seconds"] > 0 and first["peak_bytes"] >= 4000
    assert second == {"x": 2, "failed": "out of memory"} and other["peak_bytes"] == 0
    assert growth.measure(iter(points), turns=1, over=lambda: True)[1] == ["a, 1", "b, 1", "a, 2"]


def test_each_series_changes_its_size(monkeypatch):
    seen = []
    monkeypatch.setattr(growth, "step", lambda policy, batch: seen.append((policy.share, batch)))
    for point in (tokens := list(growth.over_tokens(growth.SMALL, "cpu"))):
        point.call()
    assert [p.x for p in tokens] == [batch.input_tokens for _, batch in seen]
    assert all(0.8 * size < p.x <= size for p, size in zip(tokens, growth.SMALL.tokens))
    seen.clear()
    lines = {}
    for point in growth.over_responses(growth.DRY, "cpu"):
        point.call()
        lines.setdefault(point.line, []).append((point.x, *seen[-1]))
    for line, share in (("shared prompt", True), ("separate rows", False)):
        assert [(n, s, len(b.pairs)) for n, s, b in lines[line]] == [(2, share, 1), (3, share, 2)]
    heads = [(p.line, p.x) for p in growth.over_vocabularies(growth.DRY, "cpu")]
    assert heads == [(line, V) for V in growth.DRY.vocabularies for line in ("linear_logp", "torch")]


def test_the_peak_of_a_step_has_all_gradients_in_it():
    policy = growth.make_policy(growth.DRY.model, "cpu")
    batch = growth.pack([growth.wide_group(0, 3, 8, 4, 1000)])
    size = sum(p.nbytes for p in policy.trained())
    for _ in range(2):  # and again: a call does not begin with the gradients of the last one
        assert growth.peak_of(lambda: growth.step(policy, batch)) >= size


def test_the_whole_run(tmp_path, capsys, monkeypatch):
    drawn = {}
    monkeypatch.setattr(growth, "loglog", lambda name, *rest: drawn.update({name: rest}))
    sizes = replace(growth.DRY, tokens=(256, 600))
    path = growth.run(sizes, minutes=60, out=tmp_path)
    record = json.loads(path.read_text())
    assert set(record["series"]) == {*growth.SERIES, "cache"} and record["no_time_for"] == []
    for found in record["series"].values():
        for line, rows in found["lines"].items():
            assert len(rows) == 2 and found["slopes"][line]["seconds"] is not None
    wanted = {f"{path.stem}_{name}_seconds" for name in record["series"]}
    assert set(drawn) == wanted | {f"{path.stem}_{name}_peak_bytes" for name in growth.SERIES}
    *_, lines, folder = drawn[f"{path.stem}_responses_seconds"]
    assert [(line.label, line.x) for line in lines] == [("shared prompt", (2, 3)), ("separate rows", (2, 3))]
    assert folder == tmp_path
    assert "shared prompt" in capsys.readouterr().out
    growth.run(sizes, minutes=-1, out=tmp_path)
    assert len(json.loads(path.read_text())["no_time_for"]) == 2 + 4 + 4 + 2
