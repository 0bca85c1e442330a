"""The committed pictures say what a fresh drawing says, to everybody, and their words do not overlap."""

import json
import re
from itertools import combinations
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.textpath import TextPath
from matplotlib.transforms import Bbox

from benchmarks.results import newest_path
from docs.pictures import ladder, packing
from docs.pictures.__main__ import FOLDER, PICTURES
from docs.pictures.canvas import WIDTH
from fastdpo.data.packing import split_step

SVG = "{http://www.w3.org/2000/svg}"
NUMBER = re.compile(r"\d[\d,.]*\d|\d")
PLANNED = 0.01  # predictions of memory may differ by so much under another torch


def committed(name: str) -> ElementTree.Element:
    return ElementTree.parse(FOLDER / f"{name}.svg").getroot()


def words(root: ElementTree.Element) -> str:
    return "\n".join(e.text for e in root.iter() if e.tag in (f"{SVG}text", f"{SVG}title", f"{SVG}desc"))


def numbers(text: str) -> list[float]:
    return [float(found.replace(",", "")) for found in NUMBER.findall(text)]


@pytest.mark.parametrize("name", PICTURES)
def test_what_is_committed_is_what_would_be_drawn(name):
    """Otherwise: make pictures."""
    old, new = words(committed(name)), words(ElementTree.fromstring(PICTURES[name]()))
    assert NUMBER.sub("#", old) == NUMBER.sub("#", new)
    tolerance = PLANNED if name == "memory" else 0
    assert numbers(old) == pytest.approx(numbers(new), rel=tolerance, abs=0)


def test_every_script_has_its_picture():
    assert {path.stem for path in FOLDER.glob("*.svg")} == PICTURES.keys()


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_small_and_told_to_those_who_cannot_see_them(name):
    root = committed(name)
    assert (FOLDER / f"{name}.svg").stat().st_size < 30_000
    told = [root.find(f"{SVG}{tag}") for tag in ("title", "desc")]
    assert root.get("role") == "img"
    assert root.get("aria-labelledby").split() == [element.get("id") for element in told]
    title, description = (element.text for element in told)
    assert title in [e.text for e in root.iter(f"{SVG}text")] and len(description) > 2 * len(title)


@pytest.mark.parametrize("name", PICTURES)
def test_words_lie_apart_and_inside(name):
    """In DejaVu Sans, which is wider than what most readers see."""
    assert_apart_and_inside(committed(name))


def assert_apart_and_inside(root: ElementTree.Element) -> None:
    height = float(root.get("viewBox").split()[3])
    boxes = {(e.text, e.get("x"), e.get("y")): room(e) for e in root.iter(f"{SVG}text")}
    for key, box in boxes.items():
        assert 0 < box.x0 and box.x1 < WIDTH - 8 and 0 < box.y0 and box.y1 < height - 6, key
    overlapping = [(a, b) for (a, one), (b, other) in combinations(boxes.items(), 2) if one.overlaps(other)]
    assert not overlapping


def room(element: ElementTree.Element) -> Bbox:
    size, x, y = (float(element.get(name)) for name in ("font-size", "x", "y"))
    prop = {"family": "DejaVu Sans", "weight": element.get("font-weight")}
    box = TextPath((0, 0), element.text, size=size, prop=prop, usetex=False).get_extents()
    left = x - box.x1 * {"start": 0, "middle": 0.5, "end": 1}[element.get("text-anchor")]
    return Bbox([[left, y - box.y1], [left + box.x1, y - box.y0]])


def test_the_packing_shows_what_it_tells_of():
    """Prompts repeated, padding, several groups in a microbatch, and more responses than two."""
    groups = packing.groups()
    parts = split_step(groups, packing.MAX_TOKENS)
    assert len(parts) > 1 and all(len(part) > 1 for part in parts)
    assert {len(group.responses) for group in groups} == {2, 3}
    assert len({len(g.prompt) + len(r.ids) for g in groups for r in g.responses}) > 2
    root = committed("packing")
    dots = len(root.findall(f"{SVG}circle"))
    assert dots == sum(group.scored_tokens for group in groups)
    colours = np.array([e.get("fill") for e in root.iter(f"{SVG}rect") if e.get("height") == "20"])
    prompts = sum(len(group.prompt) for group in groups)
    assert (colours == packing.PROMPT).sum() == prompts
    assert len(colours) == sum(group.input_tokens for group in groups)


def test_a_gpu_takes_the_ladder_once_it_was_measured(tmp_path):
    path = newest_path("steps", "cpu")
    cpu = json.loads(path.read_text())
    (tmp_path / path.name).write_text(json.dumps(cpu))
    race = {name: cpu.pop(name) for name in ("plan", "summary", "lengths", "entries")}
    race["summary"] = {
        name.replace("tuned malloc", "lengths grouped"): r for name, r in race["summary"].items()
    }
    other = race | {"summary": {"fastdpo": race["summary"]["fastdpo"]}}
    failed = race | {"summary": {"TRL 4 x 1": race["summary"]["TRL 4 x 1"]}}
    results = {"Qwen3-1.7B": {"Capybara": failed, "TL;DR": other}, "Qwen2.5-0.5B": {"HH-RLHF": race}}
    gpu = cpu | {"gpu": "NVIDIA H100 80GB HBM3", "gate_passed": True, "results": results}
    (tmp_path / "steps_h100_2020-01-01.json").write_text(json.dumps(gpu))
    drawn = ElementTree.fromstring(ladder.draw(tmp_path))
    text = words(drawn)
    said = ("on a GPU", "H100", "HH-RLHF", "+ packing", "lengths grouped", "bf16")
    assert [each for each in said if each not in text] == []
    assert "CPU" not in text and "malloc" not in text and "glibc" not in text
    assert_apart_and_inside(drawn)
    (tmp_path / "steps_h100_2020-01-02.json").write_text(json.dumps(gpu | {"gate_passed": False}))
    assert "on a CPU" in words(ElementTree.fromstring(ladder.draw(tmp_path)))
