"""Rows with images, sound or video, which are refused: what would train is only the text beside them."""

from fastdpo.data.formats.layouts import Layout
from fastdpo.data.formats.turns import MEDIA_NAMES, refuse_media
from fastdpo.data.report import RowProblem

_PLACEHOLDERS = {  # by the columns, under the rows' own names, that hold what they stand for
    "<image>": ("images", "image"),
    "<video>": ("videos", "video"),
    "<audio>": ("audios", "audio"),
}


def placeholders(row: dict, layout: Layout) -> list[str]:
    """What in the row's prompt would stand for media. Raises RowProblem where a column holds some, unless the
    layout reads it as something else."""
    there = {name: row[name] for name in MEDIA_NAMES if name in row}
    for name, value in there.items():
        if name not in layout.columns.values():
            refuse_media(value, name)
    # <video> and <audio> are tags of HTML too, which an answer in code may quote
    return [
        text
        for text, names in _PLACEHOLDERS.items()
        if text == "<image>" or not there.keys().isdisjoint(names)
    ]


def refuse_placeholders(prompt: str | list[dict], field: str, standing_for_media: list[str]) -> None:
    texts = {field: prompt} if isinstance(prompt, str) else {}
    if isinstance(prompt, list):
        texts = {f"{field}, {turn['role']} turn {i}": turn["content"] for i, turn in enumerate(prompt)}
    for where, text in texts.items():
        for found in standing_for_media:
            if found in text:
                raise RowProblem(
                    "media", where, f"it holds the placeholder {found}; fastdpo trains on text only"
                )
