"""Which images a row has, and where in its prompt they stand.

A column `images` or `image` holds them, or parts of messages do ({type: image, ...}, {type: image_url, ...}).
They stand where the parts are, or `<image>` in the text (LLaMA-Factory, ms-swift), or, where neither is
there, before the first user's turn (TRL). What a source is, and how it is opened, is in opening.py.
"""

from typing import Any

from fastdpo.data.report import RowProblem

IMAGE = "\ufdd0"  # stands for an image in a prompt's text: a code point that is no character
PLACEHOLDER = "<image>"  # what stands for one in the rows of other tools
COLUMNS = ("images", "image")
_SOURCES = ("image", "image_url", "url", "path", "base64", "bytes")  # keys of a part, one of which has it


def is_nothing(value) -> bool:
    """Whether a column of media holds none."""
    if value is None or (isinstance(value, str | dict) and value in ("", "[]", {})):
        return True
    return isinstance(value, list | tuple) and all(item is None for item in value)


def listed(value) -> list:
    """A column's images: one alone is a list of one."""
    if is_nothing(value):
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def of_column(row: dict, named: dict[str, str]) -> tuple[list, str]:
    """(the images of the row's column, its name); `named`: the rows' own names of our columns. Raises
    RowProblem."""
    theirs = [named[name] for name in COLUMNS if name in named]
    names = theirs or [name for name in COLUMNS if name not in named.values()]
    there = {name: listed(row[name]) for name in names if name in row}
    filled = [name for name, images in there.items() if images]
    if len(filled) > 1:
        raise RowProblem("ambiguous_row", "images and image", "both hold images; leave one out")
    name = filled[0] if filled else next(iter(names), COLUMNS[0])
    for place, image in enumerate(there.get(name, ())):
        if image is None:
            raise RowProblem("image_missing", f"{name}[{place}]", "null, beside images that are there")
    return there.get(name, []), name


def of_part(part: dict) -> Any:
    """The image of a message's part; None where the row's column has it."""
    found = next((part[key] for key in _SOURCES if part.get(key) is not None), None)
    return found.get("url") if isinstance(found, dict) and "url" in found else found


def is_image(part: dict) -> bool:
    kind = part.get("type", "text" if "text" in part else next((k for k in _SOURCES[:2] if k in part), None))
    return kind in ("image", "image_url", "input_image")


def take_images(
    prompt: str | list[dict], responses: tuple, fields: tuple[str, ...], column: list, name: str
) -> tuple[Any, tuple]:
    """(the prompt with IMAGE where an image stands, the images in that order). `prompt` has IMAGE already
    where a part of a message was one, and the turn has the parts' images under "images". `column`: the row's
    own, of this name. Raises RowProblem."""
    for field, response in zip(fields, responses):
        if isinstance(response, list) and any(turn.get("images") for turn in response):
            raise RowProblem("image_in_response", field, "it holds an image; only a prompt can")
    if isinstance(prompt, str):
        prompt, images = _in_text(prompt, column, name), column
    else:
        parts = [image for turn in prompt for image in turn.get("images", ())]
        prompt = [{key: value for key, value in turn.items() if key != "images"} for turn in prompt]
        images = _filled(parts, column, name)
        if not parts:
            prompt = _in_turns(prompt, column, name)
    text = prompt if isinstance(prompt, str) else "".join(turn["content"] or "" for turn in prompt)
    if text.count(IMAGE) != len(images):
        raise RowProblem("image_count", "prompt", f"it holds the code point {IMAGE!r}, which is no text")
    return prompt, tuple(images)


def _filled(parts: list, column: list, name: str) -> list:
    """The images of parts, in which those that have none take the column's, one after the other."""
    if not parts:
        return column
    empty = sum(image is None for image in parts)
    if empty != len(column):
        message = f"{empty} part(s) of the messages are images that say no source; images: {len(column)}"
        raise RowProblem("image_count", name, message)
    rest = iter(column)
    return [next(rest) if image is None else image for image in parts]


def _in_text(text: str, column: list, name: str) -> str:
    if PLACEHOLDER not in text:
        return IMAGE * len(column) + text
    _check_count(text.count(PLACEHOLDER), column, name)
    return text.replace(PLACEHOLDER, IMAGE)


def _in_turns(prompt: list[dict], column: list, name: str) -> list[dict]:
    if count := sum((turn["content"] or "").count(PLACEHOLDER) for turn in prompt):
        _check_count(count, column, name)
        said = lambda turn: (turn["content"] or "").replace(PLACEHOLDER, IMAGE)
        return [{**turn, "content": said(turn)} for turn in prompt]
    if not column:
        return prompt
    first = next((i for i, turn in enumerate(prompt) if turn["role"] == "user"), None)
    if first is None:
        raise RowProblem("image_count", name, "no user's turn, before which they would stand")
    turn = {**prompt[first], "content": IMAGE * len(column) + (prompt[first]["content"] or "")}
    return [*prompt[:first], turn, *prompt[first + 1 :]]


def _check_count(count: int, column: list, name: str) -> None:
    if count != len(column):
        raise RowProblem(
            "image_count", name, f"{PLACEHOLDER} stands {count} time(s) in the prompt; images: {len(column)}"
        )
