"""All rows of a run: read, held-out ones set apart, every row accounted for."""

import math
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from fastdpo.data.chat.arguments import Chat
from fastdpo.data.groups import Limits, refuse
from fastdpo.data.images.reader import ImageReader
from fastdpo.data.packing import epoch_order
from fastdpo.data.report import DataReport
from fastdpo.data.rows import parse_row
from fastdpo.data.sources import Rows, Source, sources_of
from fastdpo.data.store.making import shards_of
from fastdpo.data.store.stored import StoredGroups, facts_of, taken
from fastdpo.data.store.work import Making
from fastdpo.errors import ConfigError, DataError
from fastdpo.preferences import Groups

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class DataSpec:
    """Which rows, and how they are read; named and explained as the config's keys."""

    data: str | list[str]
    eval_data: str | list[str] | float | None
    data_format: str | dict | None
    chat_template_kwargs: dict[str, Any] | None
    max_length: int
    truncation: str
    strict: bool
    seed: int  # of which rows a fraction holds out
    data_cache: str = "auto"
    image_max_pixels: int | None = None
    media_dir: str | None = None
    prompts_only: bool = False  # rows of a prompt alone are read too, as rounds need no other
    rewards: bool = False  # of a reward model, which is read where a row's text ends


def image_reader(spec: DataSpec, processor) -> ImageReader | None:
    """How the rows' images are read; None without a processor, of a model that reads none."""
    return processor and ImageReader(processor, spec.image_max_pixels, spec.media_dir)


def load_data(
    spec: DataSpec, tokenizer, console: Console, clock: datetime | None = None, processor=None
) -> tuple[Groups, Groups, dict]:
    """(training groups, evaluation groups, the account of every row for data_report.json). `clock` is the
    time that a chat template is told, None for now; `processor`, that of a model that reads images. Raises
    DataError, or ConfigError where a fraction leaves nothing to train on."""
    limits = Limits(spec.max_length, spec.truncation)
    chat = Chat(spec.chat_template_kwargs, clock or datetime.now(), spec.rewards)
    how: dict[str, Any] = dict(strict=spec.strict, data_format=spec.data_format, chat=chat)
    how |= dict(data_cache=spec.data_cache, images=image_reader(spec, processor))
    how |= dict(prompts_only=spec.prompts_only)

    def load(name: str | list[str], key: str = "data"):
        groups, report = load_groups(name, tokenizer, limits, console=console, key=key, **how)
        report.print(console)
        return groups, report.to_dict()

    if isinstance(spec.eval_data, str | list):  # it is the smaller one: what is wrong in it shows soon
        eval_groups, eval_report = load(spec.eval_data, "eval_data")
        groups, report = load(spec.data)
        return groups, eval_groups, {"data": report, "eval_data": eval_report}
    groups, report = load(spec.data)
    size, count = spec.eval_data or 0, len(groups)
    held = math.ceil(size * count) if size < 1 else min(int(size), count)
    order = epoch_order(count, spec.seed, epoch=2**31)  # a stream that no training reaches
    if held == count:
        raise ConfigError(f"eval_data: {spec.eval_data} of {held} groups leaves none to train on")
    eval_groups, groups = taken(groups, np.sort(order[:held])), taken(groups, np.sort(order[held:]))
    if held:
        console.print(f"eval_data: {held} of {count} groups split off by seed")
    split = {"split_off": held, "rows": facts_of(eval_groups).row.tolist()}
    return groups, eval_groups, {"data": report, "eval_data": split}


def load_groups(
    spec: str | list[str],
    tokenizer: "PreTrainedTokenizerBase",
    limits: Limits,
    *,
    strict: bool,
    console: Console,
    data_format: str | dict[str, str] | None = None,
    chat: Chat | None = None,
    key: str = "data",
    data_cache: str = "auto",
    images: ImageReader | None = None,
    prompts_only: bool = False,
) -> tuple[Groups, DataReport]:
    """All usable rows of a data source (see load_rows), or of several, one after the other, as groups, and
    the account of every row. `data_format` says how to read the rows, where their columns do not; `chat`,
    what the chat template is given besides; `key` is the config's, for errors about the source. `data_cache`,
    as in the config: where the tokenised rows are kept, and looked for. `images`: how those of prompts are
    read, where the model reads some; pixels are read again when a microbatch is made. `prompts_only`: rows of
    a prompt alone are read too, see `to_group`.

    Raises DataError when no row is left, or under `strict` at the first row that was dropped,
    truncated, identical or malformed.
    """
    making = Making(tokenizer, limits, chat or Chat(), images, prompts_only)
    shards, firsts, openers, names, first, report = [], [], [], [], 0, DataReport("")
    sources = sources_of(spec, data_format, key)
    # all are looked into first: none is tokenised in vain, if another cannot be read
    for source, made in [(one, shards_of(one, making, console, data_cache)) for one in sources]:
        names.append(f"{source.spec} (from row {first} on)" if first else source.spec)
        opener = _Reopened(source, images, first, prompts_only) if images else None
        for shard in made:
            if strict and shard.account["refused"]:
                refuse(shard.account["refused"], source.spec)
            report.add(shard.account, first)
            shards.append(shard)
            firsts.append(first)
            openers.append(opener)
        first = report.rows_read
    report.source = ", ".join(names)
    groups = StoredGroups(shards, firsts, openers)
    if not len(groups):
        raise DataError(f"{key}: none of the {first} rows of {spec!r} can be used.\n{report.losses()}")
    _note_duplicates(groups, report)
    report.keep(groups.facts)
    return groups, report


@dataclass(frozen=True)
class _Reopened:
    """The images of a source's rows, which are read from it again: nothing of them is kept beside tokens."""

    source: Source
    images: ImageReader
    first: int  # the number of its first row
    prompts_only: bool

    @cached_property
    def _rows(self) -> Rows:
        return self.source.rows()

    def __call__(self, row: int, place: int, key: bytes) -> Any:
        return self.images.reopened(row, place, key, partial(self._given, row - self.first))

    def _given(self, number: int) -> tuple[Any, Path | None]:
        rows = self._rows
        parsed = parse_row(rows[number], number, rows.layout, True, self.prompts_only)
        return parsed.images, rows.folder_of(number)


def _note_duplicates(groups: StoredGroups, report: DataReport) -> None:
    trained = groups.facts.trained
    _, firsts = np.unique(trained, return_index=True)
    again = np.ones(len(trained), bool)
    again[firsts] = False
    for row in groups.facts.row[again].tolist():
        report.note(row, {"duplicate_row": 1})
    report.notes = dict(sorted(report.notes.items(), key=lambda note: note[1].examples[0]))  # as they came up
