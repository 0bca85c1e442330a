"""examples/vision.yaml: the family that it names, but small, trains by it."""

import json
from pathlib import Path

import numpy as np
from rich.console import Console

import fastdpo
from examples.prior_exams.make import draw_study, pair, write
from tests import images

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/vision.yaml"


def test_the_example_trains(tmp_path):
    rng = np.random.default_rng(1)
    studies = [study for study in (draw_study(rng) for _ in range(24)) if study.edited != study.report.text]
    write(tmp_path, "train", studies, pair)
    keys = {"model": images.save(tmp_path / "model", "qwen2_5_vl"), "data": tmp_path / "train.jsonl"}
    keys |= {"eval_data": 0.2, "output_dir": tmp_path / "run", "max_length": 512, "batch_size": 4}
    keys |= {"reference_cache": "off", "data_cache": "off", "max_steps": 1, "samples": 0}
    run = fastdpo.train(EXAMPLE, Console(quiet=True), **keys)
    report = json.loads((run / "data_report.json").read_text())["data"]
    assert report["dropped"] == {} and report["notes"]["images"]["items"] == len(studies)
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert 0 < last["eval_loss"] < 1 and (run / "model/adapter_config.json").exists()
