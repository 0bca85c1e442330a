"""Results are found by their names, the pages hold their numbers and no others, the stages run on."""

import json
import re
from dataclasses import replace

import pytest
import torch
from fastdpo_kernels import Plan

from benchmarks import figures, process, results
from benchmarks.figures import Band, Bar, Line
from benchmarks.head import model
from benchmarks.learning import parity
from benchmarks.tables import __main__ as tables
from benchmarks.tables import blocks

PAGES = {page: page.read_text(encoding="utf-8") for page in tables.PAGES}


def test_a_gpus_short_name():
    names = {
        "NVIDIA H200": "h200",
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA A100-SXM4-80GB": "a100-sxm4-80gb",
    }
    assert {name: results.short_name(name) for name in names} == names


def put(folder, name, record):
    (folder / f"{name}.json").write_text(json.dumps(record))


def test_the_newest_by_date_and_machine(tmp_path):
    for name in ("steps_h200_2026-11-20", "steps_cpu_2026-12-01", "steps_h100_2026-11-21", "steps_cpu_old"):
        put(tmp_path, name, {"name": name})
    put(tmp_path, "steps_more_h200_2027-01-01", {})
    found = {m: results.newest("steps", m, tmp_path) for m in (None, "gpu", "h200", "cpu", "b200")}
    dates = {m: record and record["name"][-10:] for m, record in found.items()}
    wanted = {
        None: "2026-12-01",
        "gpu": "2026-11-21",
        "h200": "2026-11-20",
        "cpu": "2026-12-01",
        "b200": None,
    }
    assert dates == wanted


def test_a_result_says_where_it_comes_from(tmp_path, monkeypatch):
    path = results.write_result("head", {"x": 1}, tmp_path)
    record = json.loads(path.read_text())
    assert path == results.result_path("head", tmp_path) and record["x"] == 1
    assert record["gate_passed"] is None and record["versions"]["torch"] and record["python"]
    monkeypatch.setenv("BENCH_COMMIT", "abc")  # a copy of the tree without .git
    assert process.commit() == {"git": "abc", "git_dirty": None}
    monkeypatch.delenv("BENCH_COMMIT")
    monkeypatch.setenv("PATH", "")  # no git there at all
    assert process.commit() == {"git": None, "git_dirty": None}


def test_a_visit_over_midnight_keeps_its_date(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_DATE", "2026-01-02")
    assert results.write_result("head", {"x": 1}, tmp_path).name.endswith("_2026-01-02.json")
    assert results.result_of_today("head", tmp_path)["x"] == 1
    for wrong in ("2026-1-2", "20260102", "2026-02-30", "today", "2026-01-02T00"):
        monkeypatch.setenv("BENCH_DATE", wrong)
        with pytest.raises(ValueError, match=f"BENCH_DATE={wrong} is no date"):
            results.today()
    monkeypatch.setenv("BENCH_DATE", "")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", results.today())


def test_a_dry_run_names_its_folder(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["stage", "--dry-run"])
    with pytest.raises(SystemExit):
        results.stage_arguments("A stage.")
    monkeypatch.setattr("sys.argv", ["stage", "--dry-run", "--out", str(tmp_path), "--minutes", "2"])
    args = results.stage_arguments("A stage.")
    assert (args.dry_run, args.out, args.minutes) == (True, tmp_path, 2)


def test_the_pages_hold_the_newest_results_and_every_block():
    assert {page: tables.rendered(page) for page in PAGES} == PAGES, "python -m benchmarks.tables"
    named = [found["name"] for text in PAGES.values() for found in tables.BLOCK.finditer(text)]
    assert sorted(named) == sorted({*blocks.BLOCKS, *tables.TABLES, "standing"})


# a number and a unit of speed or memory; k, M, G and μ before the bytes, seconds and FLOPs
UNIT = r"(?:[kMGT]i?B|B/s|[munμ]s|min|TFLOP|[kMG]?FLOP/s|(?:pairs|tokens|rows|steps)(?: a |/)s(?:econd)?)\b"
FASTER = r"(?:x|×|times)[ -](?:faster|slower|less|more|the|as|memory|smaller|larger)"
CLAIM = re.compile(rf"\d[\d,.]*\s?(?:{UNIT}|%|{FASTER})")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_number_of_speed_or_memory_outside_the_blocks(page):
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", tables.BLOCK.sub("", PAGES[page]), flags=re.DOTALL)
    assert [found[0] for found in CLAIM.finditer(prose)] == []


@pytest.mark.parametrize(
    "text", ["1.7 ms", "4.1 pairs/s", "10.2x faster", "1.73 GB", "0.9 %", "45% of", "3 MiB"]
)
def test_what_counts_as_such_a_number(text):
    assert CLAIM.search(f"It takes {text} here.")


MACHINE = {"gpu": "NVIDIA H200", "cpu": "AMD EPYC", "threads": 16, "gate_passed": True}
RACER = {
    "pairs_per_second": 80.0,
    "quartiles": [79.0, 81.0],
    "peak_gb": 20.0,
    "flop_utilisation": 0.5,
    "flop_ratio": 2.4,
    "fastdpo_times_faster": 3.25,
    "fastdpo_memory_ratio": 0.45,
    "family": "TRL",
    "fastest_of_family": True,
}
RACE = {
    "plan": {"model": "Qwen3-1.7B", "mix": "HH-RLHF", "pairs": 64},
    "summary": {
        "fastdpo": RACER | {"family": None},
        "TRL 4 x 16": RACER,
        "TRL 8 x 8": {"state": "memory", "why": "OutOfMemoryError: CUDA", "family": "TRL"},
    },
}
GPU_RECORDS = {
    "steps": {"results": {"Qwen3-1.7B": {"HH-RLHF": RACE, "TL;DR": {"failed": "memory", "why": "?"}}}},
    "head": {
        "dtype": "torch.bfloat16",
        "results": {
            "8192 x 4096 x 128256": {
                mode: [
                    {
                        "floor": {"median_s": 0.01},
                        "linear_dpo": {"median_s": 0.0125, "peak_bytes": 1e9, "nats_max": 2e-5},
                    },
                    {"quack": "ImportError"},
                ]
                for mode in ("forward", "frozen", "trained")
            }
        },
    },
    "memory": {
        "limits": {"contenders": ["fastdpo", "TRL"]},
        "found": [
            {"kind": "pair", "of": "Llama", "gigabytes": 24, "contender": "fastdpo", "fits": 65432},
            {"kind": "pair", "of": "Llama", "gigabytes": 24, "contender": "TRL", "no_answer": "no time left"},
            {"kind": "model", "of": "LoRA", "gigabytes": 80, "contender": "TRL", "fits": None},
        ],
    },
    "attention": {
        "tokens": 16384,
        "problems": [
            {
                "mix": "HH-RLHF",
                "model": "Qwen3-1.7B",
                "results": {
                    "shared, fastdpo": {"median_s": {"forward": 1e-3, "forward + backward": 3.21e-3}},
                    "padded sdpa": {"median_s": {"forward": 3e-3, "forward + backward": 9.63e-3}},
                },
            }
        ],
    },
    "growth": {
        "series": {
            "tokens": {
                "x": "tokens a microbatch",
                "lines": {"step": [{"x": 1024, "seconds": 1.0}, {"x": 65536, "seconds": 64.0}]},
                "slopes": {"step": {"seconds": 1.04, "peak_bytes": 0.97}},
            }
        }
    },
    "parity": {
        "results": {
            "bf16": {
                "dtype": "bfloat16",
                "model": "Qwen2ForCausalLM of 494.0 M weights",
                "settings": {"steps": 50, "pairs": 8},
                "largest_difference": 1.2e-3,
                "mean_difference": 4e-4,
                "mean_difference_between_orders": 3e-2,
                "fell_by": 0.31,
                "seeds": {"0": {"first_margin": 0.0, "trl_first_margin": 1e-3}},
            }
        }
    },
}
SAID = {
    "steps": ("3.25x (FLOPs 2.40x), 0.45x memory", "Qwen3-1.7B, HH-RLHF", "50%", "64 pairs"),
    "head": ("12.5 ms, 1.00 GB", "2e-05", "bfloat16"),
    "memory": ("65,432", "no answer", "nothing", "24 GB"),
    "attention": ("3.00x", "padded sdpa", "16,384"),
    "growth": ("1,024 to 65,536", "1.04", "0.97"),
    "parity": ("1e-03", "0.31", "494.0 M"),
}


@pytest.mark.parametrize("what", GPU_RECORDS)
def test_a_block_says_what_the_record_says(what, tmp_path):
    name = f"{what}-gpu"
    assert not CLAIM.search(tables.block(name, tmp_path)) and "Not measured" in tables.block(name, tmp_path)
    put(tmp_path, f"{what}_h200_2026-11-22", GPU_RECORDS[what] | MACHINE)
    text = tables.block(name, tmp_path)
    assert all(said in text for said in (*SAID[what], "NVIDIA H200", f"{what}_h200_2026-11-22.json")), text
    put(tmp_path, f"{what}_h200_2026-11-23", GPU_RECORDS[what] | MACHINE | {"gate_passed": False})
    assert not CLAIM.search(tables.block(name, tmp_path)) and "red" in tables.block(name, tmp_path)


def test_the_heads_shapes_are_predicted_until_they_are_measured(tmp_path):
    said = tables.block("head-shapes", tmp_path, up="../")
    assert "Predicted by a model, not measured" in said and "(../benchmarks/head/model.py)" in said
    assert said.count("\n| ") == 14 and "4096 x 896 x 151936, trained" in said
    assert f"{model.epilogue('E'):g} epilogue instructions" in said
    put(tmp_path, "head_h200_2026-11-22", GPU_RECORDS["head"] | MACHINE)
    said = tables.block("head-shapes", tmp_path)
    assert "redicted" not in said and "8192 x 4096 x 128256, frozen | 10.0 | | 12.5 | 0.80 |" in said


def test_the_model_of_the_head(tmp_path, monkeypatch):
    """Beside the numbers of a review of the disassembly, in milliseconds: within 7 % of it."""
    reviewed = {  # sums, keep, recompute
        (8192, 4096, 128256): (12.6, 37.7, 49.6),
        (4096, 896, 151936): (2.05, 5.7, 7.5),
        (4096, 1536, 151936): (3.15, 8.9, 11.7),
        (4096, 2048, 151936): (4.03, 11.7, 15.3),
    }
    counted = model.epilogue
    monkeypatch.setattr(model, "epilogue", model.EPILOGUE.get)  # as that review read it
    for (M, D, V), wanted in reviewed.items():
        ways = [Plan(name, 0, 0, 1, M, V) for name in ("forward", "keep", "recompute")]
        assert [1e3 * model.seconds(how, D, V) for how in ways] == pytest.approx(wanted, rel=0.07)
        parts = Plan("grouped", 0, 0, 1, M, V, (replace(ways[1], rows=M // 2),) * 2)
        dw = 2 * 8 * V * D + 6 * V * D  # added up in fp32 and rounded
        assert model.seconds(parts, D, V) > model.seconds(ways[1], D, V) + dw / model.BANDWIDTH
    row = {"kernels": {"sm_90 bfloat16": {"E": {"epilogue": 8.0}, "dZ": {}}}}
    for version, found in (("3.9.0", {"kernels": {"sm_90 bfloat16": {}}}), ("3.10.0", row)):
        put(tmp_path, f"aot_triton_{version}", found)
    assert (counted("E", tmp_path), counted("dZ", tmp_path)) == (8.0, 9.8)


def test_where_it_stands_says_what_was_measured_and_what_not(tmp_path):
    said = tables.block("standing", tmp_path)
    assert "Nothing has been measured on a GPU yet" in said and said.count("not measured yet") == 6
    put(tmp_path, "steps_h200_2026-11-22", GPU_RECORDS["steps"] | MACHINE)
    said = tables.block("standing", tmp_path, up="../")
    assert "Nothing" not in said and said.count("not measured yet") == 5
    assert "3.2x faster, 0.45x memory, one NVIDIA H200 ([results](../benchmarks/results/steps_h200_" in said
    put(tmp_path, "steps_h200_2026-11-23", GPU_RECORDS["steps"] | MACHINE | {"gate_passed": False})
    said = tables.block("standing", tmp_path)
    assert not CLAIM.search(said) and "no numbers: the gate was red" in said


@pytest.mark.parametrize("stored", [None, True, False])
def test_the_newest_gate_of_the_commit_counts(tmp_path, stored):
    """Whatever the gate said when the numbers were written; another commit's or machine's says nothing."""
    red = lambda: not CLAIM.search(tables.block("head-gpu", tmp_path))
    put(tmp_path, "head_h200_2026-11-22", GPU_RECORDS["head"] | MACHINE | {"git": "a", "gate_passed": stored})
    for name, git in (("gate_h200_2026-11-29", "b"), ("gate_h100_2026-11-29", "a")):
        put(tmp_path, name, {"git": git, "passed": bool(stored is False)})
    assert red() is (stored is False)
    for date, passed in ((23, False), (24, True), (25, False)):
        put(tmp_path, f"gate_h200_2026-11-{date}", {"git": "a", "passed": passed})
        assert red() is not passed


def test_readme_differs_when_a_number_does(tmp_path):
    path = results.newest_path("steps", "cpu")
    record = json.loads(path.read_text())
    (tmp_path / path.name).write_text(json.dumps(record))
    before = tables.block("steps-cpu", tmp_path)
    record["summary"]["fastdpo"]["pairs_per_second"] *= 1.5
    (tmp_path / path.name).write_text(json.dumps(record))
    assert tables.block("steps-cpu", tmp_path) != before


def test_figures_are_the_same_bytes_every_time(tmp_path):
    for folder in (tmp_path / "a", tmp_path / "b"):
        figures.bars("bars", "Bars", "pairs a second", [Bar("fastdpo", 4, 3, 5, True), Bar("TRL", 1)], folder)
        figures.loglog("growth", "Growth", "tokens", "ms", [Line("ours", [1, 2, 4], [3, 6, 12])], folder)
        figures.curves("loss", "Loss", "step", "loss", [Band("ours", [[0.7, 0.6], [0.7, 0.5]])], folder)
    for path in (tmp_path / "a/plots").glob("*.svg"):
        assert path.read_bytes() == (tmp_path / "b/plots" / path.name).read_bytes()
        assert (tmp_path / "a/plots" / path.name).with_suffix(".png").stat().st_size > 5000
    svg = (tmp_path / "a/plots/growth.svg").read_text()
    assert "ours (slope 1.00)" in svg and ">tokens<" in svg
    assert figures.slope([1, 10, 100], [5, 500, 50_000]) == pytest.approx(2)


def orders(*curves):
    """Comparisons by seed, each (ours, TRL's) losses."""
    keys = dict(first_margin=0.0, trl_first_margin=0.0)
    return {seed: dict(losses=a, trl_losses=b, **keys) for seed, (a, b) in enumerate(curves)}


@pytest.mark.parametrize(
    ("dtype", "curves", "same"),
    [
        (torch.float32, [([0.7, 0.6], [0.7, 0.60005])], True),
        (torch.float32, [([0.7, 0.6], [0.7, 0.6])] * 2 + [([0.7, 0.6], [0.7, 0.6002])], False),
        (torch.float32, [([0.7, 0.69], [0.7, 0.69])], False),  # nothing was learned
        (torch.bfloat16, [([0.7, 0.61], [0.7, 0.60]), ([0.7, 0.56], [0.7, 0.55])], True),
        (torch.bfloat16, [([0.7, 0.67], [0.7, 0.60]), ([0.7, 0.62], [0.7, 0.55])], False),
        (torch.bfloat16, [([0.7, 0.6], [0.7, 0.6])], None),  # of one order there is no spread
        (torch.bfloat16, [([0.7, 0.69], [0.7, 0.69])], False),  # but nothing was learned
    ],
)
def test_what_counts_as_learning_the_same(dtype, curves, same, monkeypatch, tmp_path):
    setting = parity.Setting(torch.nn.Linear(1, 1), None, dtype, 1e-4, 2)
    setting.model.device = torch.device("cpu")
    result = parity.summarise(setting, orders(*curves))
    assert result["same"] is same
    run = result["seeds"]["0"] | {"weights_difference": 0.0}
    monkeypatch.setattr(parity, "curves", lambda *_: None)
    assert parity.write({"it": result | {"seeds": {"0": run}}}, tmp_path) == (same is False)
