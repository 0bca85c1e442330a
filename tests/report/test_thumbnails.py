"""The images of samples on the pages of one run and of several."""

import json

import numpy as np
import pytest
from markupsafe import Markup
from PIL import Image

from fastdpo.data.images.shown import thumbnail
from tests.report.test_compare import compared
from tests.report.test_report import BROWSER, HOSTILE, data_report, looked_at, page_of, words, write_run


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name in ("page.draw", "page.draw_lengths", "compare.draw"):
        monkeypatch.setattr(f"fastdpo.report.{name}", lambda *_: Markup("<svg></svg>"))


def told(colour, size=(640, 480), tokens=1024):
    small = thumbnail(Image.new("RGB", size, colour))
    return {"size": list(size), "tokens": tokens, "thumbnail": small}


def samples(*images, row=3):
    one = {"stage": 0, "row": row, "prompt": "<image>" * len(images) + "Why?", "chosen": "So."}
    one |= {"images": list(images)} if images else {}
    return [
        one | {"when": when, "step": step, "completion": when} for when, step in (("start", 0), ("end", 9))
    ]


def run_of(folder, *images, **config):
    return write_run(folder, samples=samples(*images) + samples(row=4), **config)


def test_a_sample_has_its_images(tmp_path):
    run = run_of(tmp_path / "run", told("red"), told("blue", (30, 90), 1))
    page = page_of(run)
    assert page.count("<img ") == 2 and page.count('<ul class="images">') == 1  # once for before and after
    for number, said in ((1, "640x480, 1,024 tokens"), (2, "30x90, 1 token")):
        assert f'alt="image {number}: {said}"' in page
    assert told("red")["thumbnail"] in page and "<image><image>Why?" in words(page)


def test_what_is_no_image_of_ours_stays_text(tmp_path):
    page = page_of(run_of(tmp_path / "run", told("red") | {"thumbnail": f'"{HOSTILE}', HOSTILE: HOSTILE}))
    assert page.count("<img ") == 1 and "<script" not in page and 'src="data:image/jpeg;base64,&#34;' in page
    for wrong in ({"size": HOSTILE}, {"size": [HOSTILE, 1]}, {"tokens": HOSTILE}, {"size": None}):
        page = page_of(run_of(tmp_path / "run", told("red") | wrong))
        assert "<img" not in page and "<script" not in page
        assert "The part 'samples' of this report could not be made" in words(page)


def test_runs_with_the_same_images_and_with_others(tmp_path):
    """Runs that resize images see the same one in another size."""
    large, small = told("red"), told("red", (320, 240), 256)
    runs = [run_of(tmp_path / name, large, seed=n) for n, name in enumerate("ab")]
    page = compared(runs)
    assert page.count("<img ") == 1 and page.index("<img ") < page.index("Before, all runs")
    page = compared([runs[0], run_of(tmp_path / "c", small, seed=2)])
    assert page.count("<img ") == 2
    assert page.index("Before, all runs") < page.index("640x480") < page.index("320x240")


def test_which_weights_are_trained_is_said(tmp_path):
    report = data_report()
    report["data"]["notes"]["images"] = {"rows": 3, "items": 3, "examples": [0, 1, 2]}
    for keys, said in (
        ({}, "all weights of the language model, with"),
        ({"freeze_vision": False}, "all weights, with"),
        ({"lora_rank": 4}, "LoRA of rank 4, with"),
    ):
        run = run_of(tmp_path / "run", **keys)
        assert said.replace(" of the language model", "") in words(page_of(run))  # without images
        (run / "data_report.json").write_text(json.dumps(report))
        assert said in words(page_of(run))


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome")
@pytest.mark.parametrize("size, dark", [("1200,2400", False), ("400,4200", True)])
def test_in_a_browser(tmp_path, size, dark):
    """All are drawn, none cut off at the side."""
    colours = [(230, 20, 220), (20, 230, 30), (240, 160, 20), (20, 20, 240)]
    run = run_of(tmp_path / "run", *(told(colour, (800, 400)) for colour in colours))
    page = tmp_path / "run/report.html"
    page_of(run)
    looked_at(page, size, dark)
    with Image.open(page.with_name("shot.png")) as shot:
        pixels = np.asarray(shot.convert("RGB"), int)
    for colour in colours:
        there = (np.abs(pixels - colour) < 12).all(-1)
        assert there.sum() > 0.9 * 158 * 79 and there.any(0).sum() > 150 and there.any(1).sum() > 75
