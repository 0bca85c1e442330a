"""Data sets with images: tokens are kept, pixels are read again, and a changed image is never taken for what
it was."""

import io
import json

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PIL
from rich.console import Console

from fastdpo.data import load
from fastdpo.data.groups import Limits
from fastdpo.data.images.reader import ImageReader
from fastdpo.data.load import load_groups
from fastdpo.data.mismatched import mismatched
from fastdpo.data.show import show
from fastdpo.data.store import making, workers
from fastdpo.data.store.digests import prompt_key, response_keys
from fastdpo.data.store.facts import Facts
from fastdpo.data.store.stored import facts_of
from fastdpo.errors import DataError
from tests.data.store.doubles import take_as_others
from tests.images import picture, processor

ROW = {"chosen": " red", "rejected": " blue"}


def read(spec, cache="off", **options):
    how = dict(strict=False, console=Console(file=io.StringIO(), width=200), data_cache=cache)
    images = ImageReader(processor("llava"), **options)
    return load_groups(str(spec), images.processor.tokenizer, Limits(512), images=images, **how)


def written(folder, count=3, name="rows.jsonl"):
    """Rows with an image each, which lie beside the file."""
    (folder / "pictures").mkdir(parents=True)
    rows = []
    for n in range(count):
        picture(n).save(folder / f"pictures/{n}.png")
        rows.append({"prompt": f"cat {n}", "image": f"pictures/{n}.png"} | ROW)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def test_images_are_opened_when_they_are_asked_for(tmp_path):
    groups, report = read(written(tmp_path))
    assert report.notes["images"].items == 3 and facts_of(groups).images.tolist() == [1, 1, 1]
    console = Console(file=io.StringIO(), width=200)
    show(groups, report, processor("llava").tokenizer, console)
    said = console.file.getvalue()
    assert f"prompt, {len(groups[0].prompt)} tokens, 16 of them an image of 32 x 48" in said
    assert "<image>×16cat 0" in said and "<image><image>" not in said
    for n, group in enumerate(groups):
        (image,) = group.images
        assert image.open().tobytes() == picture(n).tobytes() and image.tokens == 16
        assert image.size == (32, 48)


def test_the_keys_of_stored_groups_are_those_of_the_groups(tmp_path):
    groups, _ = read(written(tmp_path))
    facts, again = facts_of(groups), Facts.of(list(groups))
    for name in ("digest", "trained", "prompt_key", "key", "images"):
        assert getattr(facts, name).tolist() == getattr(again, name).tolist(), name
    (tmp_path / "other").mkdir()
    moved = written(tmp_path / "other" / "place")
    picture(0).save(tmp_path / "other/place/pictures/0.png", compress_level=0)  # other bytes, the same pixels
    assert facts_of(read(moved)[0]).key.tolist() == facts.key.tolist()
    picture(9).save(tmp_path / "other/place/pictures/0.png")
    other = facts_of(read(moved)[0]).key
    assert (other != facts.key).tolist() == [True, True, False, False, False, False]
    first = groups[0]
    assert prompt_key(first) != prompt_key(read(moved)[0][0])
    assert response_keys(first) == [key.tobytes() for key in facts.key[:2]]


def test_arrow_holds_images_too(tmp_path):
    data = io.BytesIO()
    picture(0).save(data, "PNG")
    columns = {name: Value("string") for name in ("prompt", "chosen", "rejected")}
    rows = [{"prompt": "cat", "images": [{"bytes": data.getvalue(), "path": None}]} | ROW]
    table = Dataset.from_list(rows, features=Features(columns | {"images": List(Image())}))
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    assert pq.read_metadata(tmp_path / "rows.parquet").num_rows == 1
    for spec in (tmp_path / "rows.parquet", tmp_path / "saved"):
        groups, _ = read(spec)
        assert groups[0].images[0].open().tobytes() == picture(0).tobytes()


def test_tokens_are_found_again_and_a_changed_image_is_not(tmp_path, monkeypatch):
    spec, cache = written(tmp_path), str(tmp_path / "cache")
    first, _ = read(spec, cache)
    kept = facts_of(first).key.tolist()
    with monkeypatch.context() as patch:
        patch.setattr("fastdpo.data.store.work.shard_of", lambda *_: pytest.fail("it is made again"))
        assert facts_of(read(spec, cache)[0]).key.tolist() == kept
    picture(7, (64, 64)).save(tmp_path / "pictures/1.png")
    again, _ = read(spec, cache)
    assert facts_of(again).key.tolist()[:2] == kept[:2] and facts_of(again).key.tolist()[2:4] != kept[2:4]
    assert again[1].images[0].open().size == (64, 64)
    with pytest.raises(DataError, match=r"row 1: images\[0\] is not the image that was there"):
        first[1].images[0].open()
    (tmp_path / "pictures/1.png").unlink()
    with pytest.raises(DataError, match=r"row 1 cannot be read again: images\[0\]: there is no file"):
        first[1].images[0].open()


def test_an_image_that_was_missing_is_looked_for_again(tmp_path):
    spec, cache = written(tmp_path), str(tmp_path / "cache")
    (tmp_path / "pictures/2.png").unlink()
    assert len(read(spec, cache)[0]) == 2
    picture(2).save(tmp_path / "pictures/2.png")
    assert len(read(spec, cache)[0]) == 3


def test_a_copy_of_the_rows_beside_other_images_is_another_data_set(tmp_path):
    cache = str(tmp_path / "cache")
    here, there = (written(tmp_path / name) for name in ("here", "there"))
    read(here, cache)
    picture(5).save(tmp_path / "there/pictures/0.png")
    groups, _ = read(there, cache)
    assert groups[0].images[0].open().tobytes() == picture(5).tobytes()


def test_other_pixels_are_other_tokens_sets(tmp_path):
    spec, cache = written(tmp_path), str(tmp_path / "cache")
    large, small = read(spec, cache)[0], read(spec, cache, max_pixels=600)[0]
    assert small[0].images[0].open().size == (20, 30) != large[0].images[0].size
    assert small[0].images[0].key != large[0].images[0].key


def test_other_processes_tokenise_rows_with_images(tmp_path, monkeypatch):
    spec = written(tmp_path, 4)
    alone = facts_of(read(spec)[0])
    monkeypatch.setattr(making, "SHARD_ROWS", 2)
    monkeypatch.setattr(making, "_FEW", 0)
    monkeypatch.setattr(making, "cores", lambda: 2)
    monkeypatch.setattr(workers.Todo, "take", take_as_others)
    assert facts_of(read(spec, str(tmp_path / "cache"))[0]).key.tolist() == alone.key.tolist()


def test_several_sources_open_their_own_images(tmp_path):
    specs = [str(written(tmp_path / name, 2)) for name in ("a", "b")]
    picture(8).save(tmp_path / "b/pictures/1.png")
    images = ImageReader(processor("llava"))
    groups, _ = load.load_groups(
        specs, images.processor.tokenizer, Limits(512), images=images, strict=True,
        console=Console(quiet=True), data_cache="off",
    )  # fmt: skip
    assert groups[3].row == 3 and groups[3].images[0].open().tobytes() == picture(8).tobytes()


def test_bad_rows_are_counted_by_name(tmp_path):
    spec = written(tmp_path, 1)
    (tmp_path / "bad.png").write_bytes(b"none")
    PIL.new("I;16", (8, 8)).save(tmp_path / "deep.png")
    rows = [{"prompt": "cat", "image": name} | ROW for name in ("bad.png", "no.png", "../a.png", "deep.png")]
    rows.append({"prompt": "<image><image>", "image": "pictures/0.png"} | ROW)
    with spec.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    groups, report = read(spec)
    assert len(groups) == 1
    reasons = ["image_unreadable", "image_missing", "image_outside", "image_mode", "image_count"]
    assert list(report.dropped) == reasons
    told = report.dropped["image_missing"].message
    assert told.startswith("line 3 of rows.jsonl: images[0]: there is no file") and "no.png" in told


def test_another_rows_response_keeps_the_images_of_its_prompt(tmp_path):
    groups, _ = read(written(tmp_path))
    aside = mismatched(groups, 512)
    assert [group.images[0].key for group in aside] == [group.images[0].key for group in groups]
    assert facts_of(aside).images.tolist() == [1, 1, 1]
