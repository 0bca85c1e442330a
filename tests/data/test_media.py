"""Rows with images, sound or video: refused by name, as only the text beside them would train."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Audio, Features, Image, List, Value
from rich.console import Console

from fastdpo.data.formats.layouts import layout_of
from fastdpo.data.load import load_groups
from fastdpo.data.rows import RowProblem, parse_row
from fastdpo.data.sources import load_rows
from tests.data.shared_data import WIDE, assistant, chat_row, small_tokenizer, text_row, user, write_lines


def problem(row, data_format=None) -> RowProblem:
    with pytest.raises(RowProblem) as caught:
        parse_row(row, 0, layout_of(data_format))
    assert caught.value.reason == "media"
    assert "reads text only" in caught.value.message or "video are not read" in caught.value.message
    return caught.value


@pytest.mark.parametrize("column", ["images", "image", "videos", "video", "audios", "audio"])
def test_a_column_of_media(column):
    for value in (["a.png"], "a.png", {"bytes": b"x"}, [None, "a.png"]):
        assert problem(text_row() | {column: value}).field == column
        assert problem(chat_row() | {column: value}).field == column
    for nothing in (None, [], "", "[]", {}, [None]):
        assert parse_row(text_row() | {column: nothing}, 0).responses == (" morning", " old world")


@pytest.mark.parametrize("key", ["images", "image", "videos", "video", "audios", "audio"])
def test_a_key_of_a_message_with_media(key):
    """ms-swift's images of a turn, OpenAI's audio of an answer."""
    row = chat_row() | {"prompt": [user("a"), assistant("b"), user("c") | {key: ["a.png"]}]}
    assert problem(row).field == f"prompt[2].{key}"
    assert (
        problem(chat_row() | {"rejected": [assistant("b") | {key: {"id": "x"}}]}).field
        == f"rejected[0].{key}"
    )
    for nothing in (None, [], "", {}, [None]):
        row["prompt"][2][key] = nothing
        assert parse_row(row, 0).prompt[2]["content"] == "c"


def test_a_column_of_media_where_others_are_renamed():
    row = {"q": "good", "a": " gold", "b": " old", "images": ["a.png"], "image": "text of its own"}
    assert problem(row, {"prompt": "q", "chosen": "a", "rejected": "b"}).field == "images"
    row["images"] = []
    assert problem(row, {"prompt": "q", "chosen": "a", "rejected": "b"}).field == "image"
    parsed = parse_row(row, 0, layout_of({"prompt": "image", "chosen": "a", "rejected": "b"}))
    assert parsed.prompt == "text of its own"


PARTS = [
    {"type": "image"},
    {"type": "image_url", "image_url": {"url": "https://a/b.png"}},
    {"type": "video", "video": "a.mp4"},
    {"type": "input_audio", "input_audio": {"data": "x"}},
    {"type": "text", "text": "see", "image": "a.png"},
    {"image": "a.png"},
]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_not_text(part):
    said = {"type": "text", "text": "What is this?"}
    turn = {"role": "user", "content": [said, part]}
    assert problem(chat_row() | {"prompt": [turn]}).field == "prompt[0].content[1]"
    turns = [user("a"), assistant("b"), turn]
    row = {"messages": turns, "chosen": assistant("c"), "rejected": assistant("d")}
    assert problem(row).field == "messages[2].content[1]"


def test_a_placeholder_in_a_prompt():
    assert problem(text_row("good <image> what?")).field == "prompt"
    assert problem(chat_row("<image>\nWhat?")).field == "prompt, user turn 0"
    turns = [user("hi"), assistant("yo"), user("<image>?")]
    whole = {"chosen": [*turns, assistant("a")], "rejected": [*turns, assistant("b")]}
    assert problem(whole).field == "prompt, user turn 2"
    assert problem({"chosen": "see <image> a b", "rejected": "see <image> a c"}).field == "prompt"
    row = {"q": "<image>", "a": " gold", "b": " old"}
    assert problem(row, {"prompt": "q", "chosen": "a", "rejected": "b"}).field == "q"


def test_tags_of_html_are_no_placeholders():
    html = "Play <video> and <audio>."
    assert parse_row(text_row(html), 0).prompt == html
    assert parse_row(text_row(html, " <image>"), 0).responses[0] == " <image>"  # an answer's own words
    assert problem(text_row(html) | {"videos": []}).message.startswith("it holds the placeholder <video>")
    assert problem(text_row(html) | {"audio": None}).message.startswith("it holds the placeholder <audio>")
    assert parse_row(text_row(html) | {"images": []}, 0).prompt == html


def test_media_are_counted(tmp_path):
    rows = [chat_row(), chat_row() | {"images": ["a.png"]}, chat_row("<image>"), text_row()]
    spec, console = write_lines(tmp_path / "d.jsonl", rows), Console(file=io.StringIO())
    groups, report = load_groups(spec, small_tokenizer(), WIDE, strict=False, console=console)
    assert [group.row for group in groups] == [0, 3]
    assert report.dropped["media"].examples == [1, 2]
    assert report.dropped["media"].message.startswith("line 2 of d.jsonl: images: it is not empty")


def test_media_in_arrow_are_not_decoded(tmp_path):
    """So that they are refused by name without the libraries that decode them."""
    text = {name: Value("string") for name in ("prompt", "chosen", "rejected")}
    features = Features(text | {"images": List(Image()), "audio": Audio()})
    broken, nothing = {"bytes": b"x", "path": None}, {"images": [], "audio": None}
    rows = [text_row() | more for more in (nothing, {"images": [broken]}, {"audio": broken})]
    pq.write_table(pa.Table.from_pylist(rows, schema=features.arrow_schema), tmp_path / "d.parquet")
    good, *others = load_rows(str(tmp_path / "d.parquet"))
    assert parse_row(good, 0).prompt == "good"
    assert [problem(row).field for row in others] == ["images", "audio"]
