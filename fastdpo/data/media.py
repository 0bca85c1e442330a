"""Rows with sound or video, or with images for a model that reads none, which are refused: what would train
is only the text beside them."""

from fastdpo.data.formats.layouts import Layout
from fastdpo.data.formats.turns import MEDIA_NAMES, not_read, refuse_media
from fastdpo.data.images.given import COLUMNS, PLACEHOLDER
from fastdpo.data.report import RowProblem

_PLACEHOLDERS = {  # by the columns, under the rows' own names, that hold what they stand for
    "<image>": ("images", "image"),
    "<video>": ("videos", "video"),
    "<audio>": ("audios", "audio"),
}


def placeholders(row: dict, layout: Layout, with_images: bool) -> list[str]:
    """What in the row's prompt would stand for media that are not read. Raises RowProblem where a column
    holds some, unless the layout reads it as something else."""
    there = {name: row[name] for name in MEDIA_NAMES if name in row}
    for name, value in there.items():
        if name not in layout.columns.values() and not (with_images and name in COLUMNS):
            refuse_media(value, name)
    # <video> and <audio> are tags of HTML too, which an answer in code may quote
    return [
        text
        for text, names in _PLACEHOLDERS.items()
        if (text == PLACEHOLDER and not with_images)
        or (text != PLACEHOLDER and not there.keys().isdisjoint(names))
    ]


def refuse_placeholders(prompt: str | list[dict], field: str, standing_for_media: list[str]) -> None:
    texts = {field: prompt} if isinstance(prompt, str) else {}
    if isinstance(prompt, list):
        texts = {f"{field}, {turn['role']} turn {i}": turn["content"] for i, turn in enumerate(prompt)}
    for where, text in texts.items():
        for found in standing_for_media:
            if found in text:
                raise RowProblem("media", where, f"it holds the placeholder {found}; {not_read(found)}")
