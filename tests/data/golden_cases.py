"""Rows of every kind that the tests know: cases of golden_rows.py."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import ByT5Tokenizer

from tests.data.conversations import random_row
from tests.data.every_format import calling, rows_with
from tests.data.shared_data import (
    CHATML,
    assistant,
    chat_row,
    ranked_row,
    small_tokenizer,
    text_row,
    user,
    write_lines,
)
from tests.data.span_rows import chat_spans, numbers_row, spans_row
from tests.data.templates.case import CONVERSATIONS
from tests.data.test_formats import JUDGED, PAIRED, RANKED
from tests.data.test_formats_layouts import ALPACA, CONVERSATION, OWN, TAGS
from tests.data.test_fuzz_rows import GOOD, broken
from tests.data.test_templates import TEMPLATES, tokenizer_of


@dataclass(frozen=True)
class Case:
    """`write` puts files into a folder and says what `data` is there; `keys` are DataSpec's."""

    write: Callable[[Path], str | list[str]]
    tokenizer: Callable[[], Any] = small_tokenizer
    keys: dict[str, Any] = field(default_factory=dict)  # FOLDER in a text is the folder's path
    needs_shared: bool = False


def lines(rows: list, name: str = "d.jsonl") -> Callable[[Path], str]:
    return lambda folder: write_lines(folder / name, rows)


def text(content: str, name: str, encoding: str = "utf-8") -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / name).write_bytes(content.encode(encoding))
        return str(folder / name)

    return write


# ---- rows


def rows_of_formats() -> Iterator[tuple[str, Case]]:
    """Each format whole, and broken by chance."""
    for name, rows in GOOD.items():
        chance = random.Random(name)
        odd = [broken(chance.choice(rows), chance) for _ in range(25)]
        yield f"format {name}", Case(lines([*rows, *odd, *rows]))
    told = [row for _, row, *_ in (*PAIRED.values(), *RANKED.values())]
    yield "formats together", Case(lines([*told, *JUDGED.values()]))
    tools = [{"type": "function", "function": {"name": "f"}}]
    call = calling({"x": None, "y": [1, 2.0]}, reasoning_content="so")
    rows = rows_with([user("weather?"), assistant("old"), user("world?")], call).values()
    rows = [*rows, *(row | {"tools": tools} for row in rows)]
    yield "calls", Case(lines(rows), partial(tokenizer_of, TEMPLATES["hermes_tools"], "hermes_tools"))
    chance = random.Random(0)
    odd = [broken(chance.choice([row for some in GOOD.values() for row in some]), chance) for _ in range(400)]
    yield "odd rows", Case(lines([text_row(), *odd]))


def rows_of_templates() -> Iterator[tuple[str, Case]]:
    for name, one in TEMPLATES.items():
        rows = [row | {"chat_template_kwargs": one.kwargs} for row in CONVERSATIONS.values()]
        rows += [random_row(seed) for seed in range(6)]
        yield f"template {name}", Case(lines(rows), partial(tokenizer_of, one, name))
    dated = "{{ date_string or strftime_now('%d %b %Y') }}{{ strftime_now('%H') }}" + CHATML
    with_date = partial(small_tokenizer, chat_template=dated)
    row = chat_row() | {"chat_template_kwargs": {"date_string": "long ago"}}
    yield "date", Case(lines([chat_row(), row, chat_row("old?"), row, chat_row("x")]), with_date)
    given = {"chat_template_kwargs": {"date_string": "now"}}
    yield "date that is given", Case(lines([chat_row()]), with_date, given)


def rows_of_tokenizers() -> Iterator[tuple[str, Case]]:
    rows = [
        text_row(),
        chat_row(),
        text_row("good wor", "ld morning", "ld old"),
        text_row("good ", "  old", " gold"),
        text_row("x", "é 日本 👍🏽", "<s></s>"),
    ]
    yield "tokenizer with no bos", Case(lines(rows), partial(small_tokenizer, bos=False))
    yield "tokenizer with no eos", Case(lines(rows[1:2]), partial(small_tokenizer, eos=False))
    yield "tokenizer with no eos, text", Case(lines(rows), partial(small_tokenizer, eos=False))
    yield "tokenizer with no template", Case(lines(rows[2:]), partial(small_tokenizer, chat_template=None))
    yield "tokenizer with no template, chat", Case(lines(rows), partial(small_tokenizer, chat_template=None))
    yield "tokenizer of Python", Case(lines([rows[0], *rows[2:]]), ByT5Tokenizer)


def rows_of_lengths() -> Iterator[tuple[str, Case]]:
    words = ["old", "gold", "world", "good", "morning", "wor"]
    chance = random.Random(1)
    some = lambda most: "".join(f" {chance.choice(words)}" for _ in range(chance.randint(1, most)))
    rows: list[dict] = [text_row(some(30), some(30), some(30)) for _ in range(60)]
    rows += [ranked_row(*[(some(20), chance.randint(0, 3)) for _ in range(4)]) for _ in range(20)]
    texts = lambda: {"prompt": some(9), "chosen": some(30), "rejected": some(9)}
    rows += [spans_row([[0, 4]], [[0, 1]], **texts()) for _ in range(20)]
    rows += [chat_row(some(30), some(30), some(30)) for _ in range(20)]
    for how in ("keep_start", "keep_end", "drop"):
        for most in (6, 12, 30):
            yield f"{how} of {most}", Case(lines(rows), keys={"max_length": most, "truncation": how})


def rows_of_kinds() -> Iterator[tuple[str, Case]]:
    logps = {"ref_chosen_logps": -12.5, "ref_rejected_logps": -7.25}
    old = {"reference_chosen_logps": -1, "reference_rejected_logps": -2.0}
    rated = {"score_chosen": 2.5, "score_rejected": 1}
    trailing = chat_row() | {"chosen": [assistant("gold"), user("cut")]}
    rows = [text_row() | logps, chat_row() | logps | rated, text_row() | old | {"margin": 3}]
    rows += [trailing | logps, text_row("good wor", "ld morning", "ld old") | logps, text_row() | rated]
    rows += [text_row() | logps | {"ref_chosen_logps": float("nan")}, text_row() | {"ref_chosen_logps": -1.0}]
    yield "reference columns", Case(lines(rows))
    judged = lambda label, said=" old gold": {"prompt": "good", "completion": said, "label": label}
    rows = [judged(True), judged(0), judged("x"), judged(None), judged(False, [assistant("old")]), text_row()]
    yield "unpaired beside paired", Case(lines([*rows, judged(True, " ")]))
    rows = [ranked_row((" old", 2), (" gold", 1), (" wor", 1), (" old", 0)), ranked_row((" a", 1), (" b", 1))]
    rows += [ranked_row((" old", 2), (" old", 1), (" wor", 0.5)), ranked_row((" a", 2**60), (" b", -1e-3))]
    yield "ranked", Case(lines([*rows, ranked_row((" a", 1)), ranked_row((" a", 1), (" b", float("inf")))]))
    turns = [assistant("old gold"), user("old"), assistant("old world")]
    rows = [spans_row([[0, 1], [4, 9]], []), numbers_row([0, 0.5], [1]), numbers_row([0.25] * 2, [0])]
    rows += [
        numbers_row([0.1, 2], [0]),
        spans_row([[3, 99]], []),
        spans_row([[0, 2]], [[0, 3]], prompt="wor"),
    ]
    rows += [chat_spans([[0, 3]], [[1, 2]]), {**chat_spans([[2, 4, 9]]), "chosen": turns}, text_row()]
    rows += [spans_row([[0, 2]], [[0, 3]], prompt="good wor", chosen="ld morning", rejected="ld old")]
    yield "spans and weights", Case(lines(rows))
    same = text_row(rejected=" morning")
    yield "twice", Case(lines([text_row(), chat_row(), text_row(), text_row(), same, chat_row()] * 2))
    rows = [chat_row() | {"images": ["a"]}, text_row("<image> x"), text_row() | {"audio": None}, chat_row()]
    yield "media", Case(lines(rows))


def rows_of_layouts() -> Iterator[tuple[str, Case]]:
    said: dict[str, Any] = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    rows = [OWN, OWN | {"no": None}, OWN | {"q": " "}, OWN | {"yes": [assistant("a")]}, OWN | {"about": ""}]
    styled = said | {
        "system": "about",
        "prompt_format": "<s>{system}<u>{prompt}",
        "chosen_format": "{chosen}<e>",
    }
    judged = {"prompt": "q", "completion": "yes", "label": "label"}
    for name, how in {"columns": said, "text around": styled, "label": judged, "intel": "intel"}.items():
        known = [{"question": "good?", "system": "S", "prompt": "p", "chosen": "a", "rejected": "b"}]
        yield f"data_format {name}", Case(lines([*rows, *known]), keys={"data_format": how})
    alpaca = {"ranking": True, "columns": ALPACA}
    talk = {"formatting": "sharegpt", "ranking": True, "tags": TAGS}
    talk |= {"columns": {"messages": "talk", "chosen": "yes", "rejected": "no"}}

    def listed(folder: Path) -> list[str]:
        write_lines(folder / "a.jsonl", [{"ask": "a", "more": "b", "yes": "gold", "no": "old"}] * 6)
        write_lines(
            folder / "b.jsonl", [CONVERSATION, CONVERSATION | {"talk": [{"who": "them", "says": "x"}]}]
        )
        info = {"one": alpaca | {"file_name": "a.jsonl"}, "two": talk | {"file_name": "b.jsonl"}}
        (folder / "dataset_info.json").write_text(json.dumps(info))
        return [f"{folder}:one#train[1:]", f"{folder}:two"]

    yield "dataset_info.json", Case(listed)


PARTS = (
    rows_of_formats,
    rows_of_templates,
    rows_of_tokenizers,
    rows_of_lengths,
    rows_of_kinds,
    rows_of_layouts,
)
