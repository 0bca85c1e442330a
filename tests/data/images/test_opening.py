"""What a row may give as an image, and what is wrong with what it cannot: by name, and counted."""

import base64
import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PIL

from fastdpo.data.images.opening import Places, image_key, open_image
from fastdpo.data.report import RowProblem
from tests.images import picture


def stored(made, kind="PNG", **options) -> bytes:
    file = io.BytesIO()
    made.save(file, kind, **options)
    return file.getvalue()


def opened(source, folder=None, **options):
    return open_image(source, "images[0]", Places(folder), **options)


def problem(source, folder=None, named=None, **options) -> RowProblem:
    with pytest.raises(RowProblem) as caught:
        open_image(source, "images[0]", Places(folder, named), **options)
    assert caught.value.field == "images[0]"
    return caught.value


def test_every_source_is_one_image(tmp_path):
    """Its key too: bytes, the path they lie at, a data URL, a cell of Arrow, a picture."""
    data = stored(picture(0))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    sources = [data, bytearray(data), {"bytes": data, "path": "no.png"}, url, picture(0)]
    sources += ["in/a.png", {"bytes": None, "path": "in/a.png"}, str(tmp_path / "in/a.png")]
    sources += [f"file://{tmp_path}/in/a.png"]
    keys = {image_key(opened(source, tmp_path), "digest") for source in sources}
    assert keys == {image_key(picture(0), "digest")}
    assert image_key(picture(0), "other") not in keys and image_key(picture(1), "digest") not in keys


def test_pixels_are_upright_rgb_and_no_more_than_wanted():
    turned = PIL.Exif()
    turned[0x0112] = 6  # orientation: a quarter
    assert opened(stored(picture(0, (32, 48)), exif=turned)).size == (48, 32)
    for mode in ("L", "P", "LA", "RGBA", "1"):
        assert opened(stored(picture(0).convert(mode))).mode == "RGB"
    notes = Counter()
    small = opened(picture(0, (96, 64)), max_pixels=1536, notes=notes)
    assert small.size == (48, 32) and notes == {"image_resized": 1}
    assert opened(picture(0, (32, 48)), max_pixels=1536).size == (32, 48)
    one = opened(stored(picture(0).convert("CMYK"), "JPEG"), notes=notes)
    assert one.mode == "RGB" and notes["image_cmyk"] == 1


@pytest.mark.parametrize(
    "source, reason, said",
    [
        (b"no image", "image_unreadable", "no image that PIL can read"),
        (stored(picture(0))[:60], "image_unreadable", ""),
        ("data:image/png;base64,%%", "image_unreadable", "data:image/png;base64"),
        ("data:text/plain,abc", "image_unreadable", "in base64 is needed"),
        ("https://a.b/c.png", "image_url", "nothing is fetched"),
        ("none.png", "image_missing", "there is no file"),
        ("../secret.png", "image_outside", "media_dir"),
        ("/etc/passwd", "image_outside", "media_dir"),
        ("text.png", "image_unreadable", "text.png"),
        (7, "wrong_type", "a path, bytes"),
        ({"path": None, "bytes": None}, "wrong_type", "a path, bytes"),
    ],
)
def test_what_is_none(tmp_path, source, reason, said):
    (tmp_path / "text.png").write_text("hello")
    found = problem(source, tmp_path)
    assert found.reason == reason and said in found.message


def test_a_link_leads_no_further_than_a_path(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "a.png").write_bytes(stored(picture(0)))
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "a.png")
    assert problem("link.png", tmp_path / "data").reason == "image_outside"
    assert open_image("link.png", "x", Places(tmp_path / "data", tmp_path)).size == (32, 48)
    assert open_image("a.png", "x", Places(tmp_path / "data", tmp_path)).size == (32, 48)
    assert problem("a.png", None).message.endswith(
        "say media_dir: FOLDER if images are to be read from there"
    )


def test_a_snapshot_of_the_hub_holds_links_to_its_own_blobs(tmp_path):
    """In the layout of the hub's cache, and nowhere else."""
    picture(0).save(tmp_path / "a.png")

    def folder(cache, repository="datasets--me--set", revision="0a" * 20, own="data"):
        made, blobs = cache / repository / "snapshots" / revision / own, cache / repository / "blobs"
        made.mkdir(parents=True)
        blobs.mkdir(exist_ok=True)
        (blobs / "b1").write_bytes(stored(picture(0)))
        (made / "link.png").symlink_to("../" * len(Path(own).parts) + "../../blobs/b1")
        (made / "other.png").symlink_to(tmp_path / "a.png")
        (blobs / "b2").symlink_to(tmp_path / "a.png")
        (made / "further.png").symlink_to(blobs / "b2")
        return made

    one = folder(tmp_path / "one")
    (tmp_path / "home").symlink_to(one)
    for own in (one, folder(tmp_path / "two", "models--me--big", "1b" * 20, "."), tmp_path / "home"):
        assert opened("link.png", own).size == opened(str(own / "link.png"), own).size == (32, 48)
        for name in ("other.png", "further.png"):
            assert problem(name, own).reason == "image_outside"
    for odd in ({"repository": "set"}, {"revision": "main"}):
        assert problem("link.png", folder(tmp_path / str(odd), **odd)).reason == "image_outside"
    blobs = one.parents[2] / "blobs"
    (one / "theirs.png").symlink_to(tmp_path / "two/models--me--big/blobs/b1")
    assert problem("theirs.png", one).reason == "image_outside"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    assert problem("link.png", one).reason == "image_outside"


def test_frames_and_deep_pixels_are_refused(tmp_path):
    frames = stored(picture(0), "GIF", save_all=True, append_images=[picture(1)])
    assert problem(frames).reason == "image_animated" and "2 frames" in problem(frames).message
    deep = PIL.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 900)
    found = problem(stored(deep))
    assert found.reason == "image_mode" and "more than 8 bits" in found.message


def test_a_photo_of_several_views_is_one():
    views = stored(picture(0), "MPO", save_all=True, append_images=[picture(1)])
    assert opened(views).size == (32, 48)


def test_no_other_program_decodes_one(monkeypatch):
    postscript = stored(picture(0), "EPS")
    assert problem(postscript).reason == "image_unreadable"


def test_a_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(PIL, "MAX_IMAGE_PIXELS", 100)
    assert problem(stored(picture(0))).reason == "image_too_large"
