"""Another trainer's config and what it became: as YAML of ours, in the order of theirs and with a comment at
each key that changed or went, or both beside each other."""

import re
import textwrap
from collections import defaultdict
from typing import NamedTuple

import yaml
from rich import box
from rich.table import Column, Table
from rich.text import Text

from fastdpo.convert.draft import Draft, Fate, plain, spelled

_WIDTH = 100  # of a line of YAML; a longer comment stands above it
_COLOURS = {"refused": "red", "check": "yellow"}  # by the first word


class Place(NamedTuple):
    """What stands where a key of theirs stood: our keys, and what became of theirs besides."""

    ours: list[str]
    fates: list[Fate]


def as_yaml(values: dict, draft: Draft) -> str:
    """Ours where the first of their keys stood in `values`, and at the end what they left out."""
    values = _as_read(values, draft)
    lines = [f"# read as a config of {draft.tool.name}"]
    for key, place in _places(values, draft).items():
        if key is None:
            lines += ["", f"# what the config leaves out, as {draft.tool.name} has it"]
        elif not place.ours and not place.fates and not _is_read_elsewhere(key, draft):
            lines += _comment(f"{_with(key, values[key], ' ', draft)}: {_silent(values[key])}")
        for fate in place.fates:
            lines += _comment(fate.text)
        for ours in place.ours:
            lines += _line(ours, draft.ours[ours], _sources(ours, draft, given=key is not None))
    return "\n".join(lines) + "\n"


def side_by_side(values: dict, draft: Draft) -> Table:
    """A row a key of theirs: it, ours, and what became of it where that is more than another name."""
    values = _as_read(values, draft)
    columns = (("theirs", 30), ("ours", 23), ("what became of it", 23))
    table = Table(
        *(Column(name, overflow="fold", ratio=ratio) for name, ratio in columns),
        title=f"read as a config of {draft.tool.name}",
        title_justify="left",
        box=box.HORIZONTALS,
        show_lines=True,
        show_edge=False,
        pad_edge=False,
        expand=True,
    )
    for key, place in _places(values, draft).items():
        if key is not None:
            ours = [_shown(name, draft) for name in place.ours]
            _row(table, _with(key, values[key], ": ", draft), ours, _became(key, values[key], place, draft))
            continue
        for name in place.ours:
            _row(table, "", [_shown(name, draft)], _sources(name, draft, given=True))
        for fate in place.fates:
            _row(table, "", [], [fate.text])
    return table


def _as_read(values: dict, draft: Draft) -> dict:
    """Theirs in their order, what is within others as a key of its own where the tool reads it so."""
    out: dict = {}
    for key, value in values.items():
        within = {name: one for name, one in draft.theirs.items() if name.startswith(f"{key}.")}
        out |= within or {key: plain(value)}
    return out


def _shown(ours: str, draft: Draft) -> str:
    return f"{ours}: {spelled(draft.ours[ours])}"


def _row(table: Table, theirs: str, ours: list[str], notes: list[str]) -> None:
    told = Text("\n").join(Text(note, _COLOURS.get(note.split(":")[0], "")) for note in notes)
    table.add_row(Text(theirs), Text("\n".join(ours)), told)


def _places(values: dict, draft: Draft) -> dict[str | None, Place]:
    """By the key of theirs, in their order; None has what is at none of them."""
    order: dict[str | None, int] = {key: number for number, key in enumerate(values)}

    def first(keys) -> str | None:
        there = [key if key in order else key.split(".")[0] for key in keys]
        return min((key for key in there if key in order), key=order.__getitem__, default=None)

    places = {key: Place([], []) for key in [*values, None]}
    sources: dict[str, list[str]] = defaultdict(list)
    for fate in draft.fates:
        if fate.ours is None:
            places[first(fate.keys)].fates.append(fate)
        else:
            sources[fate.ours] += fate.keys
    for ours in draft.ours:
        places[first(sources[ours] or [ours])].ours.append(ours)
    if places[None] == Place([], []):
        del places[None]
    return places


def _sources(ours: str, draft: Draft, given: bool) -> list[str]:
    """Where the value of a key of ours comes from, as far as its line does not say it."""
    out, became = [], spelled(draft.ours[ours])
    for fate in draft.fates:
        if fate.ours != ours or not fate.text:
            continue
        said = fate.text.removesuffix(f" -> {ours} {became}")
        if not given:
            said = said.replace(f" ({draft.tool.name}'s default)", "")
        for key in fate.keys:  # their name is enough where the value is the same
            if same := re.fullmatch(rf"{re.escape(key)} {re.escape(became)}( \([^()]*\))?", said):
                said = key + (same[1] or "")
        if said != ours:
            out.append(said)
    return out


def _became(key: str, value, place: Place, draft: Draft) -> list[str]:
    """What is said of a key whose name and value stand beside it already."""
    if place == Place([], []):
        holders = [fate.ours for fate in draft.fates if key in _heads(fate) and fate.ours]
        return [f"in {', '.join(dict.fromkeys(holders))}"] if holders else [_silent(value)]
    itself = rf"{re.escape(key)}(:? {re.escape(spelled(value))})?"
    twice = re.compile(rf"^{itself}(, |: | |$)|, {itself}(?=$| \()")
    notes = []
    for fate in place.fates:
        check = "check: " if fate.text.startswith("check: ") else ""
        said = twice.sub("", fate.text.removeprefix(check), count=1)
        notes.append(f"{'refused: ' if fate.is_problem else check}{said}")
    for ours in place.ours:
        notes += filter(None, (twice.sub("", said, count=1) for said in _sources(ours, draft, given=True)))
    return notes


def _heads(fate: Fate) -> set[str]:
    return {*fate.keys, *(key.split(".")[0] for key in fate.keys)}


def _is_read_elsewhere(key: str, draft: Draft) -> bool:
    return any(key in _heads(fate) for fate in draft.fates)


def _with(key: str, value, between: str, draft: Draft) -> str:
    """A key and its value, unless that is shown in no note."""
    return key if value is None or draft.word(key) == key else f"{key}{between}{spelled(value)}"


def _silent(value) -> str:
    """Of a key that no other note names."""
    if value is None or value is False:
        return "left out, it is empty" if value is None else "left out, it is so here"
    return "read with the rest of the config"


def _line(ours: str, value, comments: list[str]) -> list[str]:
    """Our key and its value as YAML, with what is to be said of them."""
    text = _dumped(ours, value, flow=True)[1:-1]  # without { and }
    if "\n" in text or len(text) > _WIDTH:
        text = _dumped(ours, value, flow=False)
    comment = _printable("; ".join(comments))
    if not comment:
        return [text]
    if "\n" not in text and len(line := f"{text}  # {comment}") <= _WIDTH:
        return [line]
    return [*_comment(comment), text]


def _dumped(ours: str, value, flow: bool) -> str:
    text: str = yaml.safe_dump(
        {ours: value}, default_flow_style=flow, sort_keys=False, allow_unicode=True, width=10**6
    )
    return text.rstrip("\n")


def _comment(text: str) -> list[str]:
    return textwrap.wrap(
        _printable(text),
        _WIDTH,
        initial_indent="# ",
        subsequent_indent="#   ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _printable(text: str) -> str:
    """Without line ends and what else YAML allows in no comment."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
