"""The stage with images: everybody has the same pixels and tokens, and what is told of a race."""

import json
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.gpu import images as stage
from benchmarks.inputs import FIRST_ID
from benchmarks.models import MODELS, tiny
from benchmarks.peers.towers import Waits
from benchmarks.pictures import draw_picture, picture_groups, picture_rows, processor, text_row
from benchmarks.results import result_of_today
from benchmarks.steps.contenders import fastdpo
from benchmarks.steps.images import SHAPE, contenders, record_of, trl
from benchmarks.steps.race import Entry, Race
from benchmarks.tables import __main__ as tables
from benchmarks.workers import WorkerFailed
from fastdpo.data.packing import Packing
from tests.benchmarks.test_results import CLAIM, MACHINE, put
from tests.benchmarks.test_steps import COURSE, recorded

NAMES = dict(stage.ORDER)


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_makes_as_many_tokens_as_asked(name, tmp_path):
    """Of the real shapes; the processor's words are numbers of tokens."""
    model, text = MODELS[name], SHAPE["prompt"] - SHAPE["image_tokens"] - 2
    rows = picture_rows(model, SHAPE["image_tokens"], text, SHAPE["response"], (1, 2), tmp_path, 0)
    (group,) = picture_groups(model, rows, first=7)
    assert (len(group.prompt), group.images[0].tokens, group.row) == (1100, 1024, 7)
    assert [len(response.ids) for response in group.responses] == [150] * 4
    assert [pair[:2] for pair in group.pairs] == [(0, 1), (2, 3)]
    assert group.prompt[-text:].tolist() == rows[1]["prompt_ids"] and min(rows[0]["prompt_ids"]) >= FIRST_ID
    words = processor(model).tokenizer([text_row(row)["rejected"] for row in rows])["input_ids"]
    assert words == [row["rejected_ids"] for row in rows]
    assert words[1] == group.responses[3].ids.tolist() != words[0]


@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_both_have_the_same_losses_and_other_pictures_have_others(tmp_path, name, pairs):
    model = tiny(MODELS[name])
    steps = [picture_rows(model, 4, 5, 6, (4 // pairs, pairs), tmp_path, seed) for seed in range(2)]
    (tmp_path / "rows.json").write_text(json.dumps([steps[0], *steps]))
    job = {"model": name, "rows": str(tmp_path / "rows.json"), "device": "cpu", "tiny": True}
    job["learning_rate"] = 1e-2
    ours = recorded(fastdpo(60), job)
    assert abs(ours.losses[0] - np.log(2)) < 1e-6 and min(ours.losses) < np.log(2) - 0.02  # it moves
    theirs = recorded(trl(2, 4), job)
    assert theirs.losses == pytest.approx(ours.losses, abs=2e-5)
    seen = [(told["images"], told["reference_images"]) for told in ours.told + theirs.told]
    assert seen == [(4 // pairs, 0)] * 4 + [(8, 8)] * 4
    assert ours.facts["reference"]["responses"] == 16 and not ours.facts["tower"]["kept"]
    assert all(told["wait_seconds"] > 0 for told in ours.told)
    for path in tmp_path.glob("*.jpg"):
        draw_picture(path, 2 * 2 * model.vision["patch_size"], seed=99)
    assert recorded(fastdpo(60), job).losses[1:] != pytest.approx(ours.losses[1:], abs=2e-5)


def test_waits_are_those_for_microbatches(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def make(part):
        clock[0] += part[0].seconds
        return part

    parts = [[Namespace(images=(), seconds=n)] for n in (1, 2, 4)]
    a_stage = Namespace(microbatches=lambda groups: Packing(groups, make))
    waits = Waits(a_stage)
    packing = a_stage.microbatches(parts)
    assert len(packing) == 3
    for _ in packing:
        clock[0] += 10
    assert waits.taken() == 7 and waits.taken() == 0


def a_race(plan, **trl_more):
    """fastdpo with steps of 2 s and a fill of 1 s a step; TRL with steps of 6 s."""
    field = contenders(plan.pairs, (4,), 8192)[:2]
    race = Race(COURSE, field, None, 1.0)
    memory = {"peak_bytes": 2e9, "resident_peak_bytes": 2e9}
    told = {"images": 16, "reference_images": 0}
    also = [told | {"idle_share": 0.9}] * plan.checks + [told | {"idle_share": 0.125}] * 2
    facts = {"reference": {"seconds": 2.0, "responses": 64, "once_seconds": 9.0}}
    ours = Entry("measured", losses=[0.7], memory=memory, set_number=0, turns=[[2.0, 2.0]], also=also)
    race.entries["fastdpo"] = replace(ours, facts=facts)
    also = [{"images": 32, "reference_images": 32, "collating_seconds": 1.5}] * (plan.checks + 2)
    theirs = replace(ours, memory=memory | {"peak_bytes": 4e9}, turns=[[6.0, 6.0]], also=also)
    race.entries[field[1].name] = replace(theirs, **trl_more)
    race.ours_turns = [ours.turns]
    return race


PLAN = replace(stage.GPU, model="Qwen3-VL-2B", mix="2 responses")


def test_a_record_tells_steps_with_the_reference_and_first_epochs():
    record = record_of(a_race(PLAN), PLAN, SHAPE | {"prompts": 16, "responses": 2})
    ours, theirs = record["summary"].values()
    assert ours["useful_tokens_per_second"] == 16 * (1100 + 2 * 150) / 2.0
    assert (ours["fill_seconds_a_step"], ours["idle_share"]) == (1.0, 0.125)
    assert ours["first_epoch_tokens_per_second"] == pytest.approx(16 * 1400 / 3.0)
    assert theirs["fastdpo_times_faster"] == 3.0 and theirs["fastest_of_family"]
    assert theirs["fastdpo_times_faster_in_a_first_epoch"] == pytest.approx(2.0)
    assert theirs["fastdpo_times_faster_with_trls_pixels"] == pytest.approx(3.75)
    assert (theirs["images"], theirs["reference_images"], record["asked"]) == (32, 32, 1.8)
    wrong = a_race(PLAN, state="disagrees", why="loss 0.8")
    found = record_of(wrong, PLAN, SHAPE | {"prompts": 16, "responses": 2})["summary"]["TRL 4 x 4"]
    assert found["why"] == "loss 0.8" and not any("faster" in key or "second" in key for key in found)


def test_the_block_says_what_the_record_says(tmp_path):
    shape = SHAPE | {"prompts": 16, "responses": 2}
    plan = {"plan": {"pairs": 16}}
    race = plan | record_of(a_race(PLAN), PLAN, shape)
    wrong = plan | record_of(a_race(PLAN, state="disagrees", why="loss 0.8"), PLAN, shape)
    mixes = {"2 responses": race, "4 responses": wrong}
    record = {"results": {"Qwen3-VL-2B": mixes, "other": {"2 responses": {"failed": "memory", "why": "?"}}}}
    assert not CLAIM.search(tables.block("images-gpu", tmp_path))
    put(tmp_path, "images_h200_2026-11-22", record | MACHINE)
    text = tables.block("images-gpu", tmp_path)
    for said in (
        "3.00x, 0.50x memory",
        "2.00x",
        "1.80x",
        "| 1 | 4 |",
        "12%",
        "11,200",
        "1,100 tokens",
        "16 pairs",
    ):
        assert said in text, (said, text)
    assert "No numbers for other, 2 responses: ?." in text
    assert "No numbers for Qwen3-VL-2B, 4 responses" in text
    put(tmp_path, "images_h200_2026-11-23", {"results": {"other": record["results"]["other"]}} | MACHINE)
    assert not CLAIM.search(tables.block("images-gpu", tmp_path))


def test_the_stage_goes_on_where_it_stopped(tmp_path, monkeypatch):
    args = Namespace(dry_run=False, minutes=8.0, out=tmp_path)
    raced = []

    def measure(plan, field, workers, keep):
        raced.append((plan.model, plan.mix))
        keep({"summary": {"fastdpo": {"state": "measured"}}})
        if len(raced) == 2:
            raise WorkerFailed("memory", "no room")
        if len(raced) == 3:
            raise KeyboardInterrupt  # as if it was killed
        return {"summary": {"fastdpo": {"state": "measured"}}}

    monkeypatch.setattr(stage, "measure_images", measure)
    monkeypatch.setattr(stage, "print_table", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        stage.run(args, None)
    assert raced == stage.ORDER[:3]
    stage.run(args, None)
    assert raced[3:] == [stage.ORDER[3], stage.ORDER[1]]  # what failed comes last
    args.minutes = 1.0
    (tmp_path / "later").mkdir()
    args.out = tmp_path / "later"
    stage.run(args, None)
    assert len(raced) == 5
    assert result_of_today("images", args.out)["no_time_for"] == [", ".join(each) for each in stage.ORDER]
