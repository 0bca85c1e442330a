"""All rows of a run: read, held-out ones set apart, every row accounted for."""

import math
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rich.console import Console

from fastdpo.data.chat.arguments import Chat
from fastdpo.data.groups import Limits, load_groups
from fastdpo.data.packing import epoch_order
from fastdpo.errors import ConfigError
from fastdpo.records import PreferenceGroup

Rows = list[PreferenceGroup]


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


def load_data(
    spec: DataSpec, tokenizer, console: Console, clock: datetime | None = None
) -> tuple[Rows, Rows, dict]:
    """(training groups, evaluation groups, the account of every row for data_report.json). `clock` is the
    time that a chat template is told, None for now. Raises DataError, or ConfigError where a fraction leaves
    nothing to train on."""
    limits = Limits(spec.max_length, spec.truncation)
    chat = Chat(spec.chat_template_kwargs, clock or datetime.now())
    how: dict[str, Any] = dict(strict=spec.strict, data_format=spec.data_format, chat=chat)

    def load(name: str | list[str], key: str = "data"):
        groups, report = load_groups(name, tokenizer, limits, console=console, key=key, **how)
        report.print(console)
        return groups, report.to_dict()

    if isinstance(spec.eval_data, str | list):  # it is the smaller one: what is wrong in it shows soon
        eval_groups, eval_report = load(spec.eval_data, "eval_data")
        groups, report = load(spec.data)
        return groups, eval_groups, {"data": report, "eval_data": eval_report}
    groups, report = load(spec.data)
    size = spec.eval_data or 0
    held = math.ceil(size * len(groups)) if size < 1 else min(int(size), len(groups))
    order = epoch_order(len(groups), spec.seed, epoch=2**31)  # a stream that no training reaches
    eval_groups = [groups[i] for i in sorted(order[:held])]
    groups = [groups[i] for i in sorted(order[held:])]
    if not groups:
        raise ConfigError(f"eval_data: {spec.eval_data} of {held} groups leaves none to train on")
    if held:
        console.print(f"eval_data: {held} of {held + len(groups)} groups split off by seed")
    split = {"split_off": held, "rows": [g.row for g in eval_groups]}
    return groups, eval_groups, {"data": report, "eval_data": split}
