"""The stage of on-policy rounds: everybody trains the same samples, what is counted, and what is told."""

import json
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.gpu import rounds as stage
from benchmarks.inputs import pair_rows, sampled_groups, sampled_rows
from benchmarks.lengths import draw, draw_samples
from benchmarks.peers.jobs import RoundJob
from benchmarks.results import result_of_today
from benchmarks.steps import rounds as race_of_rounds
from benchmarks.steps.race import Entry, Race
from benchmarks.steps.rounds import (
    FASTDPO,
    MOST,
    OFFLINE,
    RESPONSES,
    SUMMED,
    TASKS,
    contenders,
    online,
    ours,
    plain,
    record_of,
    rows_of,
    unrolled,
)
from benchmarks.steps.sampling import measure_sampling
from benchmarks.tables import __main__ as tables
from benchmarks.workers import WorkerFailed
from tests.benchmarks.test_results import CLAIM, MACHINE, put
from tests.benchmarks.test_steps import COURSE, Recorder, recorded, run_race, runner

LENGTHS = [(9, 5, 4, 7, 2), (3, 2, 7, 1, 6), (20, 1, 3, 3, 9), (6, 6, 1, 4, 4)]


def test_samples_are_the_prompts_of_a_mix_with_more_responses():
    rows, pairs = draw_samples("UltraFeedback", 200, 5, 256), draw("UltraFeedback", 200)
    assert [row[0] for row in rows] == [pair.prompt for pair in pairs]
    assert [row[1:3] for row in rows] == [tuple(min(256, n) for n in pair[1:]) for pair in pairs]
    assert {len(row) for row in rows} == {6} and max(n for row in rows for n in row[1:]) == 256
    assert len({row[1:] for row in rows}) > 150 and rows == draw_samples("UltraFeedback", 200, 5, 256)


def test_a_job_is_a_rounds_groups_and_their_pairs_as_rows(tmp_path):
    rows = sampled_rows(LENGTHS, 1000)
    (tmp_path / "rows.json").write_text(json.dumps([rows, rows]))
    job = lambda **options: RoundJob("CPU", str(tmp_path / "rows.json"), "cpu", 1e-3, options=options)
    whole, two, offline = (
        job(pairs="all"),
        job(pairs="best_worst"),
        job(pairs="best_worst", offline=True),
    )
    assert [group.row for step in whole.groups for group in step] == list(range(8))
    for row, group, best in zip(rows, whole.groups[0], two.groups[0]):
        scores = row["scores"]
        assert [r.score for r in group.responses] == scores and len(group.pairs) == 6
        assert all(scores[pair.winner] > scores[pair.loser] for pair in group.pairs)
        kept = {tuple(r.ids) for r in best.responses}
        assert kept == {tuple(row["responses"][at(scores)]) for at in (np.argmax, np.argmin)}
    assert (len(whole.steps[0]), len(two.steps[0])) == (24, 4)
    assert two.steps[0][0]["chosen_ids"] == rows[0]["responses"][np.argmax(rows[0]["scores"])]
    assert pair_rows(offline.groups[0]) == two.steps[0] and offline.groups[0][0].responses[0].score is None


def test_tokens_are_counted_as_said():
    groups = sampled_groups(sampled_rows(LENGTHS, 1000))
    each, prompts = sum(sum(row[1:]) for row in LENGTHS), sum(row[0] for row in LENGTHS)
    found = {name: task.counts(groups) for name, task in TASKS.items()}
    assert found["all pairs"] == {"response_tokens": each, "trl_tokens": 12 * prompts + 3 * each}
    assert found["rloo"] == {"response_tokens": each, "trl_tokens": 4 * prompts + each}
    best = found["best and worst"]
    assert best["response_tokens"] < each and best["trl_tokens"] == 2 * prompts + best["response_tokens"]


@pytest.fixture(params=["Qwen2.5-0.5B", "Llama-3.1-8B LoRA"])
def job(request, tmp_path):
    rows = sampled_rows(LENGTHS, 1000)
    (tmp_path / "rows.json").write_text(json.dumps([rows[:2], rows[:2], rows[2:]]))
    found = {"model": request.param, "rows": str(tmp_path / "rows.json"), "device": "cpu", "tiny": True}
    return found | {"learning_rate": 1e-2 if "LoRA" in request.param else 1e-3}


@pytest.mark.parametrize("task", TASKS)
def test_fastdpos_losses_are_plain_torchs(job, task):
    truth = recorded(plain(task, 1), job).losses
    mine = recorded(ours(task, 60), job)
    assert mine.losses == pytest.approx(truth, abs=1e-5 if task != "rloo" else 1e-4)
    assert abs(truth[1] - truth[0]) > 0.02  # it moves
    assert recorded(plain(task, 2), job).losses == pytest.approx(truth, abs=1e-5)
    a_prompt = 2 if task == "best and worst" else 4
    assert mine.facts["reference"]["responses"] == 4 * a_prompt and mine.facts["reference"]["seconds"] > 0


def test_trls_losses_are_plain_torchs(job):
    truths = {task: recorded(plain(task, 1), job).losses for task in ("all pairs", "best and worst")}
    whole = online(2, 2)
    for contender, task in (
        (whole, "best and worst"),
        (unrolled("best and worst", 1, 2), "best and worst"),
        (unrolled("all pairs", 3, 2), "all pairs"),
        (unrolled("all pairs", 4, 2, stored=True), "all pairs"),
        (
            replace(
                ours("best and worst", 60), options=ours("best and worst", 60).options | {"offline": True}
            ),
            "best and worst",
        ),
    ):
        assert recorded(contender, job).losses == pytest.approx(truths[task], abs=2e-5), contender.name
    # OnlineDPOTrainer 1.16 does not divide by the microbatches of a step: only the clip knows
    assert recorded(online(1, 2), job).losses == pytest.approx(truths["best and worst"], abs=5e-3)


def test_the_online_trainer_computes_its_reference_and_samples_nothing(job, monkeypatch):
    trl_online = pytest.importorskip("benchmarks.peers.trl_online", reason="needs trl")
    seen = []
    forward = trl_online.GivenTrainer._forward

    def spied(self, model, prompt_ids, *more):
        seen.append((torch.is_grad_enabled(), len(prompt_ids)))
        return forward(self, model, prompt_ids, *more)

    monkeypatch.setattr(trl_online.GivenTrainer, "_forward", spied)
    recorded(online(1, 2), job)
    assert seen == [(True, 2), (False, 2)] * 8  # two completions a prompt, four steps of two microbatches


def test_a_field_has_the_truths_before_those_that_need_them():
    for sizes, everything in (((8, 16, 4), True), ((4, 8), False), ((2,), False)):
        names = []
        for contender in contenders(16, sizes, 8192, everything):
            assert contender.like in (None, contender.name, *names), contender.name
            names.append(contender.name)
        assert len(set(names)) == len(names) and names[0] == FASTDPO[0]
        assert {OFFLINE, *FASTDPO} <= set(names)
    found = {c.name: c for c in contenders(16, (8, 16, 4), 8192, True)}
    assert found["TRL DPO, all pairs 8 x 12"].like == "plain torch, all pairs"
    assert found["fastdpo, rloo"].tolerance == SUMMED and found["TRL online 8 x 2"].like is None


def test_who_must_have_anothers_losses():
    truth = runner("truth", loss=(1, 1.0))
    truth = replace(truth, like="truth", checks_only=True)
    same, other = (
        replace(runner(n, loss=(1, more)), like="truth") for n, more in (("same", 1.0), ("other", 0.0))
    )
    near = replace(runner("near", loss=(1, 1.015)), like="truth", tolerance=2.0)
    lost = replace(runner("lost"), like="nobody")
    race, _ = run_race(runner("ours"), truth, same, other, near, lost)
    states = {name: entry.state for name, entry in race.entries.items()}
    assert states == {
        **dict.fromkeys(("ours", "same", "near"), "measured"),
        **{"truth": "checked", "other": "disagrees", "lost": "disagrees"},
    }
    assert not race.entries["truth"].turns and race.entries["same"].turns
    assert race.entries["other"].why == "loss 1.00000 in step 1, truth's is 2.00000"
    assert race.entries["lost"].why == "nobody has no losses to compare with"


PLAN = replace(stage.GPU, model="Qwen2.5-0.5B", mix="UltraFeedback")
COUNTS = {
    "best and worst": {"response_tokens": 100.0, "trl_tokens": 150.0},
    "all pairs": {"response_tokens": 200.0, "trl_tokens": 900.0},
    "rloo": {"response_tokens": 200.0, "trl_tokens": 300.0},
}


def a_race(plan=PLAN, gate="checked"):
    """fastdpo with steps of 1 s of two responses, 2 s of four, and a fill of a quarter of that; TRL online
    with steps of 4 s, all pairs as rows of 12 s."""
    field = contenders(plan.pairs, (8,), 8192, False)
    race = Race(COURSE, field, None, 1.0)
    memory = {"peak_bytes": 2e9, "resident_peak_bytes": 2e9}
    one = Entry("measured", losses=[0.7], memory=memory, set_number=0)
    for contender in field:
        seconds = 1.0 if "best and worst" in contender.name or contender.name == OFFLINE else 2.0
        facts = {"reference": {"seconds": seconds, "responses": 32 * 4 * seconds}}
        race.entries[contender.name] = replace(one, turns=[[seconds] * 2], facts=facts)
        if contender.checks_only:
            race.entries[contender.name] = replace(one, state="checked", turns=[])
        if "TRL" in contender.name:
            long = {"TRL online": 4.0, "TRL DPO, all pairs": 12.0}.get(contender.family, 5.0)
            mine = replace(one, turns=[[long] * 2], memory=memory | {"peak_bytes": 4e9})
            race.entries[contender.name] = mine
    race.entries["plain torch, best and worst"].state = gate
    race.ours_turns = [[[1.0, 1.0]]]
    return race


def test_a_record_counts_the_references_part():
    record = record_of(a_race(), PLAN, COUNTS)
    mine, pairs = record["summary"][FASTDPO[0]], record["summary"]["fastdpo, all pairs"]
    assert (mine["fill_seconds_a_step"], pairs["fill_seconds_a_step"]) == (0.25, 0.5)
    assert mine["response_tokens_per_second"] == 100 / 1.25
    assert pairs["trl_tokens_per_second"] == 900 / 2.5 and pairs["memory_beside_offline"] == 1.0
    theirs = record["summary"]["TRL online 8 x 2"]
    assert theirs["response_tokens_per_second"] == 25.0 and theirs["fastest_of_family"]
    assert theirs["over"]["fastdpo, all pairs"] == {
        "response_tokens": pytest.approx(80 / 25),
        "trl_tokens": pytest.approx((900 / 2.5) / (150 / 4)),
        "memory": 0.5,
    }
    rows = record["summary"]["TRL DPO, all pairs 8 x 12"]["over"]["fastdpo, all pairs"]
    assert rows["response_tokens"] == rows["trl_tokens"] == pytest.approx(12 / 2.5)
    assert list(record["gate"].values()) == ["checked"] * 3
    lora = replace(PLAN, model="Llama-3.1-8B LoRA")  # two references, of all samples
    assert record_of(a_race(lora), lora, COUNTS)["summary"][FASTDPO[0]]["fill_seconds_a_step"] == 1.0


def test_nothing_is_fast_where_the_gate_is_red():
    record = record_of(a_race(gate="disagrees"), PLAN, COUNTS)
    assert {r["state"] for r in record["summary"].values()} == {"disagrees"}
    assert not any("second" in key or "over" in key for r in record["summary"].values() for key in r)
    begun = a_race()
    begun.entries = {FASTDPO[0]: begun.entries[FASTDPO[0]]}
    assert "not there yet" in record_of(begun, PLAN, COUNTS)["summary"][FASTDPO[0]]["why"]


class FakeSampler:
    """A worker whose calls answer two prompts in half a second."""

    alive = True

    def __init__(self, fails=None):
        self.fails = fails

    def prepare(self, job, seconds):
        if self.fails:
            raise WorkerFailed("absent", self.fails)
        return {"facts": {}}

    def steps(self, n, seconds):
        return {"steps": [{"seconds": 0.5, "loss": 64.0, "prompts": 2}], "peak_bytes": 3e9}

    def end(self):
        pass


def sampled_record(minutes=1.0, prompts=8):
    found = {"sampling transformers": FakeSampler(), "sampling vllm": FakeSampler("vllm is not installed")}
    workers = Namespace(get=lambda name, module, environment: found[name])
    plan = replace(stage.DRY, model="Qwen2.5-0.5B", mix="UltraFeedback", pairs=prompts, minutes=minutes)
    return measure_sampling(plan, workers, most=8)


def test_sampling_is_told_call_by_call():
    kept = sampled_record()["summary"]
    assert kept["transformers"]["state"] == "measured" and kept["transformers"]["round_seconds"] == 2.0
    assert kept["transformers"]["tokens_per_second"] == 128.0
    assert (kept["vllm"]["state"], kept["vllm"]["why"]) == ("absent", "vllm is not installed")
    short = sampled_record(minutes=0.0)["summary"]["transformers"]
    assert short["state"] == "time" and "round_seconds" not in short


def test_a_worker_samples_round_after_round(tmp_path):
    worker = pytest.importorskip("benchmarks.peers.sampling", reason="needs trl")
    (tmp_path / "rows.json").write_text(json.dumps([sampled_rows(LENGTHS, 1000)]))
    sample = {"prompts": 4, "responses": 2, "max_new_tokens": 3}
    job = {"model": "Qwen2.5-0.5B", "rows": str(tmp_path / "rows.json"), "device": "cpu", "tiny": True}
    job |= {"learning_rate": 0.0, "options": {"sample": sample}}
    recorder = Recorder(2)
    worker.train(job, recorder)
    assert recorder.losses == [4 * 2 * 3] * 2
    assert recorder.told == [{"prompts": 4, "answers": 8}] * 2
    job["options"] = {"sample": sample | {"engine": "vllm"}}
    with pytest.raises(worker.Absent, match="vllm is not installed"):
        worker.train(job, Recorder(1))


def test_the_block_says_what_the_record_says(tmp_path):
    told = {"plan": {"pairs": 16, "mix": "UltraFeedback"}}
    race = told | record_of(a_race(), PLAN, COUNTS)
    red = told | record_of(a_race(gate="disagrees"), PLAN, COUNTS)
    sampling = sampled_record()
    mixes = {"UltraFeedback": race, "sampling": sampling, "TL;DR": red}
    record = {"results": {"Qwen2.5-0.5B": mixes, "other": {"TL;DR": {"failed": "memory", "why": "?"}}}}
    assert not CLAIM.search(tables.block("rounds-gpu", tmp_path))
    put(tmp_path, "rounds_h200_2026-11-22", record | MACHINE)
    text = tables.block("rounds-gpu", tmp_path)
    for said in (
        "all pairs | 80 | 360 | 2.0 GB | 1.00x | 3.20x (9.60x), 0.50x memory | 4.80x (4.80x), 0.50x memory |",
        "| Qwen2.5-0.5B, UltraFeedback: rloo | 80 |",
        "steps of 16 prompts with 4 sampled",
        "asked: 2.50x",
        "Qwen2.5-0.5B, 8 prompts, 4 answers each of 8 tokens",
        "By transformers: 2.00 s, 128 tokens a second",
        "62% of a round",  # 8 prompts are half a step of 2.5 s
        "By vllm no numbers: vllm is not installed.",
        "No numbers for other, TL;DR: ?.",
        "No numbers for Qwen2.5-0.5B, TL;DR: the gate",
    ):
        assert said in text, (said, text)
    put(tmp_path, "rounds_h200_2026-11-23", {"results": {"other": record["results"]["other"]}} | MACHINE)
    assert not CLAIM.search(tables.block("rounds-gpu", tmp_path))


def test_the_stage_goes_on_where_it_stopped(tmp_path, monkeypatch):
    args = Namespace(dry_run=False, minutes=8.0, out=tmp_path)
    raced = []

    def measure(plan, *more):
        raced.append((plan.model, plan.mix, plan.minutes))
        if len(raced) == 3:
            raise KeyboardInterrupt  # as if it was killed
        return {"summary": {FASTDPO[0]: {"state": "measured"}}}

    monkeypatch.setattr(stage, "measure_rounds", measure)
    monkeypatch.setattr(stage, "measure_sampling", lambda plan, *more: measure(replace(plan, mix="sampling")))
    monkeypatch.setattr(stage, "print_table", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        stage.run(args, None)
    assert [each[:2] for each in raced] == stage.ORDER[:3]
    assert raced[0][2] == stage.MOST_MINUTES < 7 < raced[1][2]  # a race leaves some for sampling
    stage.run(args, None)
    assert [each[:2] for each in raced[3:]] == stage.ORDER[2:]
    assert list(result_of_today("rounds", tmp_path)["results"]["Qwen2.5-0.5B"]) == [
        "UltraFeedback",
        "sampling",
        "TL;DR",
    ]


def test_every_step_has_the_same_work():
    plan = replace(stage.GPU, model="Qwen2.5-0.5B", mix="UltraFeedback")
    steps = rows_of(plan)
    tokens = [sum(len(ids) for row in step for ids in row["responses"]) for step in steps]
    assert [len(step) for step in steps] == [16, 16] and max(tokens) < 1.1 * min(tokens)
    assert max(len(ids) for step in steps for row in step for ids in row["responses"]) <= MOST
    assert {len(row["responses"]) for step in steps for row in step} == {RESPONSES}
    assert len(race_of_rounds.COUNTED) == 2
