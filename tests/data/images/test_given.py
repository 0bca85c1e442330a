"""Where a row says that its images are, and what does not fit together."""

import pytest

from fastdpo.data.formats.layouts import layout_of
from fastdpo.data.images.given import IMAGE
from fastdpo.data.report import RowProblem
from fastdpo.data.rows import parse_row

ANSWERS = {key: [{"role": "assistant", "content": key}] for key in ("chosen", "rejected")}
TEXT = {"prompt": "what?", "chosen": " a", "rejected": " b"}


def user(content):
    return {"role": "user", "content": content}


def text(said):
    return {"type": "text", "text": said}


def parsed(row, data_format=None):
    return parse_row(row, 0, layout_of(data_format), with_images=True)


def problem(row, reason, data_format=None) -> RowProblem:
    with pytest.raises(RowProblem) as caught:
        parsed(row, data_format)
    assert caught.value.reason == reason, caught.value
    return caught.value


@pytest.mark.parametrize("column", ["image", "images"])
def test_a_column_beside_a_text(column):
    assert parsed(TEXT | {column: ["a.png"]}).images == ("a.png",)
    assert parsed(TEXT | {column: "a.png"}).prompt == IMAGE + "what?"
    marked = parsed(TEXT | {"prompt": "see <image> and <image>", column: ["a.png", "b.png"]})
    assert marked.prompt == f"see {IMAGE} and {IMAGE}" and marked.images == ("a.png", "b.png")
    for nothing in (None, [], "", "[]", {}, [None]):
        assert parsed(TEXT | {column: nothing}).images == ()


def test_a_column_beside_messages():
    turns = [
        {"role": "system", "content": "s"},
        user("one"),
        {"role": "assistant", "content": "x"},
        user("two"),
    ]
    row = parsed({"prompt": turns, "images": ["a.png", "b.png"]} | ANSWERS)
    assert [turn["content"] for turn in row.prompt] == ["s", IMAGE * 2 + "one", "x", "two"]
    turns = [user("<image>one"), {"role": "assistant", "content": "x"}, user("two <image>")]
    row = parsed({"prompt": turns, "images": ["a.png", "b.png"]} | ANSWERS)
    assert [turn["content"] for turn in row.prompt] == [f"{IMAGE}one", "x", f"two {IMAGE}"]


def test_parts_of_messages_hold_images_or_take_the_columns():
    turn = user([text("see"), {"type": "image", "image": "a.png"}, text("?"), {"type": "image"}])
    row = parsed({"prompt": [turn], "images": ["b.png"]} | ANSWERS)
    assert row.prompt == [user(f"see{IMAGE}?{IMAGE}")] and row.images == ("a.png", "b.png")
    for part in (
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image", "url": "a.png"},
        {"type": "image", "path": "a.png"},
        {"image": "a.png"},
    ):
        assert parsed({"prompt": [user([part, text("?")])]} | ANSWERS).images == ("a.png",)


def test_whole_conversations_have_their_images_in_common():
    turn = user([{"type": "image"}, text("?")])
    row = {
        "chosen": [turn, *ANSWERS["chosen"]],
        "rejected": [turn, *ANSWERS["rejected"]],
        "images": ["a.png"],
    }
    assert parsed(row).prompt == [user(f"{IMAGE}?")] and parsed(row).images == ("a.png",)


def test_a_prompt_of_text_is_one_of_the_turns_whatever_images_are_in_it():
    turn = user([{"type": "image"}, text("what?")])
    whole = {key: [turn, *answer] for key, answer in ANSWERS.items()}
    assert parsed(whole | {"prompt": "what?", "image": "a"}).prompt == [user(f"{IMAGE}what?")]


def test_columns_by_other_names():
    row = {"q": "<image> what?", "a": " a", "b": " b", "pics": ["a.png"], "image": "of something else"}
    names = {"prompt": "q", "chosen": "a", "rejected": "b", "images": "pics"}
    assert parsed(row, names).images == ("a.png",)
    assert parsed(row | {"image": "b.png", "pics": None}, names | {"images": "image"}).images == ("b.png",)


def test_what_does_not_fit():
    assert (
        "<image> stands 2 time(s)"
        in problem(TEXT | {"prompt": "<image><image>", "image": "a"}, "image_count").message
    )
    problem(TEXT | {"prompt": "<image>"}, "image_count")
    problem({"prompt": [user("<image>")]} | ANSWERS, "image_count")
    problem({"prompt": [user([{"type": "image"}, text("?")])]} | ANSWERS, "image_count")
    problem({"prompt": [user([{"type": "image", "image": "a"}])], "image": "b"} | ANSWERS, "image_count")
    problem({"prompt": [{"role": "system", "content": "s"}], "image": "a"} | ANSWERS, "image_count")
    problem(TEXT | {"prompt": f"a {IMAGE}"}, "image_count")
    assert problem(TEXT | {"images": ["a", None]}, "image_missing").field == "images[1]"
    problem(TEXT | {"images": ["a"], "image": "b"}, "ambiguous_row")
    answer = {"role": "assistant", "content": [{"type": "image", "image": "a"}]}
    row = {"prompt": [user("q")], "chosen": [answer], "rejected": ANSWERS["rejected"]}
    assert problem(row, "image_in_response").field == "chosen"
    problem({"prompt": [user("q") | {"images": ["a"]}]} | ANSWERS, "media")


@pytest.mark.parametrize("column", ["videos", "video", "audios", "audio"])
def test_video_and_sound_are_refused_for_every_model(column):
    assert "sound and video are not read" in problem(TEXT | {column: ["a.mp4"]}, "media").message
    problem({"prompt": [user([{"type": column, column: "a"}])]} | ANSWERS, "media")
