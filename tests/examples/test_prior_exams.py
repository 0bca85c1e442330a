"""examples/prior_exams: what it makes holds together, the pixels included."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from transformers import AutoModelForImageTextToText, AutoProcessor

import fastdpo
from examples.prior_exams import pictures, reports
from examples.prior_exams.make import Sizes, make
from examples.prior_exams.measure import counted, measure
from examples.prior_exams.model import write_reports
from fastdpo.data.spans import read_relevance

ROOT = Path(__file__).resolve().parents[2]
TINY = Sizes(reports=40, pairs=12, eval_pairs=4, held_out=24, tower_steps=2, report_steps=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prior_exams")
    make(folder, seed=3, sizes=TINY)
    return folder


def rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def findings(picture: Image.Image) -> dict[str, str]:
    """What a ruler finds: how bright the film is where each finding would be."""
    film = np.asarray(picture.convert("L"), np.float32)
    bright = lambda row, column, half=2: film[row - half : row + half + 1, column - half : column + half + 1]
    at = lambda row, column: float(bright(row, column).mean())
    device = "pacemaker" if at(*pictures.PACEMAKER) > 200 else "none"
    device = "central line" if bright(10, 20, 3).max(1).min() < 220 < bright(10, 20, 3).max() else device
    moves = [(a, b) for a in range(-3, 4) for b in range(-3, 4)]
    brightest = lambda row, column: max(at(row + a, column + b) for a, b in moves)
    zones = {zone: brightest(*place) for zone, place in pictures.NODULE.items()}
    zone = max(zones, key=zones.get)
    sides = {side: at(pictures.FLOOR + 2, column) for side, column in pictures.LUNGS.items()}
    side = max(sides, key=sides.get)
    return {
        "device": device,
        "heart": "enlarged" if bright(60, 34, 1).mean() > 120 else "normal",
        "effusion": side if sides[side] > 180 else "none",
        "nodule": zone if zones[zone] > 166 else "none",
    }


def test_every_finding_is_in_the_pixels():
    rng = np.random.default_rng(5)
    for _ in range(300):
        truth = reports.draw_report(rng).findings
        assert findings(pictures.draw(truth, rng)) == truth


def test_an_edit_takes_out_priors_and_nothing_else():
    rng = np.random.default_rng(6)
    for _ in range(500):
        report = reports.draw_report(rng)
        edited, was, now = reports.without_priors(report.text)
        assert reports.read(report.text) == reports.read(edited) == report.findings
        assert not any(map(reports.speaks_of_prior, edited.split("\n")))
        lines = report.text.split("\n")
        assert [report.text[a:b] for a, b in was] == [line for line in lines if reports.speaks_of_prior(line)]
        assert {edited[a:b] for a, b in now} <= set(edited.split("\n"))
        kept = [line for line in lines if not reports.speaks_of_prior(line)]
        assert [line for line in edited.split("\n") if line in kept] == kept


@pytest.mark.parametrize("plain", [line.format("left") for line in reports.PLAIN.values()])
def test_each_way_to_speak_of_a_prior_is_edited_back(plain):
    for line in reports.with_prior(plain):
        assert reports.speaks_of_prior(line) and reports.without_priors(line)[0] == plain


def test_rows_have_their_pictures_and_spans(made):
    for name, count in (("train", TINY.pairs), ("eval", TINY.eval_pairs)):
        found = rows(made, name)
        assert len(found) == count
        for row in found:
            (image,) = row["images"]
            shown = findings(Image.open(made / image))
            assert [part["type"] for part in row["prompt"][0]["content"]] == ["image", "text"]
            for side in ("chosen", "rejected"):
                assert reports.read(row[side][0]["content"]) == shown
                assert read_relevance(row, f"{side}_", "", row[side], 1).spans is not None
            assert row["rejected_spans"] and row["chosen"] != row["rejected"]
    assert len({row["images"][0] for name in ("train", "eval", "held_out") for row in rows(made, name)}) == 40
    assert all(findings(Image.open(made / r["images"][0])) == r["findings"] for r in rows(made, "held_out"))


def test_the_start_model_loads_and_writes(made):
    found = measure(made / "start", made / "held_out.jsonl")
    assert found["lines"] >= 0 and 0 <= found["findings"] <= 1
    processor = AutoProcessor.from_pretrained(made / "start")
    model = AutoModelForImageTextToText.from_pretrained(made / "start").eval()
    row = rows(made, "train")[0]
    text = row["rejected"][0]["content"]
    tokenizer = processor.tokenizer
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text and tokenizer.unk_token not in text
    asked = processor.apply_chat_template(row["prompt"], add_generation_prompt=True)
    inputs = processor(images=[Image.open(made / row["images"][0])], text=[asked], return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == model.config.image_seq_length
    black = Image.new("RGB", (pictures.SIZE,) * 2)
    other = processor(images=[black], text=[asked], return_tensors="pt")
    with torch.no_grad():
        assert not torch.equal(model(**inputs).logits, model(**other).logits)
    assert write_reports(model, processor, [black], [row["prompt"]], sample=True)[0]


def test_what_is_counted():
    truth = {"device": "none", "heart": "enlarged", "effusion": "left", "nodule": "none"}
    text = "No device is seen.\nThe heart remains enlarged.\nNo pleural effusion is seen.\nNo change since."
    found = counted([text, "The heart is enlarged."], [truth, truth])
    assert (found["lines"], found["reports"]) == (1, 0.5)
    assert (found["device"], found["heart"], found["effusion"], found["nodule"]) == (0.5, 1, 0, 0)
    assert found["findings"] == 1.5 / 4


def test_the_pairs_train(made, tmp_path):
    """By the example's own config, but for a step: every row is kept, with its relevant tokens."""
    config = yaml.safe_load((ROOT / "examples/prior_exams/train.yaml").read_text())
    paths = {"model": made / "start", "data": made / "train.jsonl", "eval_data": made / "eval.jsonl"}
    rest = {"output_dir": tmp_path / "run", "reference_cache": "off", "data_cache": "off", "max_steps": 1}
    run = fastdpo.train(config | paths | rest, Console(quiet=True))
    report = json.loads((run / "data_report.json").read_text())["data"]
    assert (report["dropped"], report["notes"]["images"]["items"]) == ({}, TINY.pairs)
    marked = [
        row[side][0]["content"][start:end]
        for row in rows(made, "train")
        for side in ("chosen", "rejected")
        for start, end in row[f"{side}_spans"]
    ]
    assert report["relevant_tokens"] == sum(len(re.findall(r"\w+|[.,]", line)) for line in marked)
    found = measure(run / "model", made / "held_out.jsonl", sample=True)
    assert 0 <= found["findings"] <= 1
