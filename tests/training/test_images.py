"""Runs on prompts with images, from a file of rows to a saved model."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForImageTextToText

import fastdpo
from fastdpo.api import train
from fastdpo.config.keys import Config
from fastdpo.errors import Stopped
from tests import images
from tests.training.test_resume import stopped_in_step

KEYS = dict(
    optim="adamw_torch", learning_rate=1e-3, batch_size=2, max_tokens=120, max_length=200, dtype="fp32"
)
KEYS |= dict(max_steps=4, save_steps=2, logging_steps=1, samples=2, data_cache="off", eval_data=2)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Of each family a model, and rows whose images lie beside their file, one image or two each."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "pictures").mkdir()
    rows = []
    for n in range(8):
        names = [f"pictures/{n}-{k}.png" for k in range(1 + n % 2)]
        for k, name in enumerate(names):
            images.picture(10 * n + k).save(folder / name)
        asked = [{"type": "image"} for _ in names] + [{"type": "text", "text": "the old cat"}]
        row = {"prompt": [{"role": "user", "content": asked}], "images": names}
        answer = lambda text: [{"role": "assistant", "content": text}]
        rows.append(row | {"chosen": answer("sees a red bird"), "rejected": answer("near a blue house")})
    rows[-1] = {k: v for k, v in rows[-1].items() if k != "images"} | {
        "prompt": [{"role": "user", "content": "dog"}]
    }
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def made(inputs, run: Path, family: str, **keys) -> Config:
    model = inputs / family
    if not model.exists():
        images.save(model, family)
    return Config(model=str(model), data=str(inputs / "rows.jsonl"), output_dir=str(run), **(KEYS | keys))


def run(config: Config) -> str:
    console = Console(file=io.StringIO(), width=200)
    train(config, console)
    return console.file.getvalue()


def metrics(config: Config) -> list[dict]:
    lines = Path(config.output_dir, "metrics.jsonl").read_text().splitlines()
    timed = ("per_second", "memory", "idle", "seconds")
    return [{k: v for k, v in json.loads(line).items() if not any(t in k for t in timed)} for line in lines]


def weights(config: Config) -> dict[str, torch.Tensor]:
    return AutoModelForImageTextToText.from_pretrained(Path(config.output_dir) / "model").state_dict()


def test_rounds_answer_prompts_with_images_and_go_on_bit_by_bit(inputs, tmp_path):
    (tmp_path / "r.py").write_text(
        "def f(prompts, answers):\n    return [sum(map(ord, a)) % 97 for a in answers]\n"
    )
    sample = dict(prompts=4, responses=2, max_new_tokens=4, resets=0.5)
    keys = dict(rounds=2, sample=sample, reward=f"{tmp_path}/r.py:f", objective="rloo", max_steps=None)
    keys |= dict(eval_data=None, samples=0)
    whole, cut = (made(inputs, tmp_path / name, "qwen2_5_vl", **keys) for name in ("whole", "cut"))
    run(whole)
    with stopped_in_step(3):
        run(cut)
    run(replace(cut, resume=True))
    before, after = weights(whole), weights(cut)
    assert all(before[name].equal(after[name]) for name in before) and metrics(whole) == metrics(cut)
    lines = Path(cut.output_dir, "rounds/round-2.jsonl").read_text().splitlines()
    assert "<image>" in json.loads(lines[-1])["prompt"][0]["content"]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_killed_and_resumed_it_ends_bit_by_bit(inputs, tmp_path, family):
    keys = dict(reference_cache=str(tmp_path / "cache.sqlite"))
    whole, cut = (made(inputs, tmp_path / name, family, **keys) for name in ("whole", "cut"))
    said = run(whole)
    assert "prompts are not shared" not in said and "images in prompts" in said
    with stopped_in_step(3) as stop:
        run(cut)
    assert isinstance(stop.value, Stopped)
    again = run(Config(**{**vars(cut), "resume": True}))
    assert "going on from" in again and "nothing to compute" in again  # of the reference, which is kept
    assert metrics(cut) == metrics(whole)
    samples = [Path(config.output_dir, "samples.jsonl").read_bytes() for config in (cut, whole)]
    assert samples[0] == samples[1] and b"thumbnail" in samples[0]
    ours, theirs = weights(cut), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    start = AutoModelForImageTextToText.from_pretrained(whole.model).state_dict()
    moved = {name for name in start if not torch.equal(start[name], theirs[name])}
    assert moved and not any("vis" in name or "project" in name for name in moved)


def test_how_a_step_is_cut_changes_nothing(inputs, tmp_path):
    """Nor whether prompts are shared."""
    first = made(inputs, tmp_path / "a", "llava", max_tokens=4000, optim="sgd")
    other = made(inputs, tmp_path / "b", "llava", max_tokens=1, optim="sgd")
    run(first), run(other)
    ours, theirs = weights(first), weights(other)
    assert max(float((ours[n] - theirs[n]).abs().max()) for n in theirs) < 1e-5


def test_a_lora_is_on_the_language_model_and_its_samples_see_images(inputs, tmp_path):
    config = made(inputs, tmp_path / "run", "llava", lora_rank=2)
    run(config)
    settings = json.loads((tmp_path / "run/model/adapter_config.json").read_text())
    assert "vision" not in str(settings["target_modules"])
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4 and all("completion" in sample for sample in samples)
    for sample in samples:  # shown as they were, long after
        shown, (turn,) = sample.get("images", []), sample["turns"]
        assert sample["prompt"].count("<image>") == turn["content"].count("<image>") == len(shown)
        assert all(image["size"] == [32, 48] and image["tokens"] == 16 for image in shown)
    assert any("images" in sample for sample in samples)
    assert 'alt="image 1: 32x48, 16 tokens"' in (tmp_path / "run/report.html").read_text()
    assert (tmp_path / "run/model/processor_config.json").exists()


def test_an_evaluation_reads_them_too(inputs, tmp_path):
    """On all rows its loss is the run's own, and answers are sampled with images."""
    config = made(inputs, tmp_path / "run", "llava", eval_data=str(inputs / "rows.jsonl"), samples=0)
    run(config)
    found = fastdpo.evaluate(str(tmp_path / "run"), str(inputs / "rows.jsonl"), samples=3, max_new_tokens=4)
    logged = [line for line in metrics(config) if "eval_loss" in line][-1]
    assert found["numbers"]["model"]["loss"]["value"] == pytest.approx(logged["eval_loss"], rel=1e-4)
    assert len(found["answers"]) >= 3


def test_images_are_new_to_the_reference_where_their_pixels_are(inputs, tmp_path):
    """Another learning rate is a hit."""
    keys = dict(reference_cache=str(tmp_path / "cache.sqlite"), samples=0)
    assert "0 of 16 responses found" in run(made(inputs, tmp_path / "a", "llava", **keys))
    assert "16 of 16 responses found" in run(
        made(inputs, tmp_path / "b", "llava", **keys, learning_rate=2e-3)
    )
    images.picture(99).save(inputs / "pictures/0-0.png")
    assert "14 of 16 responses found" in run(made(inputs, tmp_path / "c", "llava", **keys))
