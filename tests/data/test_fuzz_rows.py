"""Rows of every format, broken by chance: each is kept or counted, and nothing else comes of it."""

import copy
import io
import json
import random

import pytest
from rich.console import Console

from fastdpo.data.formats.known import FORMATS
from fastdpo.data.load import load_groups
from fastdpo.data.show import show
from fastdpo.errors import DataError
from tests.data.shared_data import WIDE, assistant, small_tokenizer, text_row, user

_FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}}
_TURNS = [user("good?"), assistant("old"), user("world")]
_THEIRS = [{"from": "human", "value": "good?"}]
_PAIR = {"chosen": "gold", "rejected": "old"}
_SPANS = {"chosen_spans": [[0, 2]], "rejected_spans": [[1, 3]]}
_LOGPS = {"ref_chosen_logps": -3.0, "ref_rejected_logps": -4.5}
_RATED = [{"response": text, "overall_score": n, "fine-grained_score": n} for n, text in enumerate("ab", 3)]
GOOD = {
    "trl": [
        text_row(),
        text_row() | _SPANS | {"score_chosen": 2, "score_rejected": 1.5} | _LOGPS,
        {"prompt": _TURNS, "chosen": [assistant("gold")], "rejected": [assistant("old")]}
        | {"tools": [{"type": "function", "function": _FUNCTION}], "chat_template_kwargs": {"a": 1}},
        {"chosen": [*_TURNS, assistant("gold")], "rejected": [*_TURNS, assistant("old")]},
    ],
    "trl_unpaired": [{"prompt": "good", "completion": " gold", "label": True}],
    "ranked": [{"prompt": "good", "responses": [{"text": " a", "score": 2}, {"text": " b", "score": 1}]}],
    "prompt_pairs": [{"system": "old", "prompt": "good"} | _PAIR],
    "ultra": [{"system": "old", "chosen": [*_TURNS, assistant("a")], "rejected": [*_TURNS, assistant("b")]}],
    "intel": [{"question": "good"} | _PAIR],
    "icr": [{"input": "good"} | _PAIR],
    "argilla": [{"instruction": "good", "chosen_response": "gold", "rejected_response": "old"}],
    "nectar": [{"prompt": "good", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]}],
    "messages": [{"messages": _TURNS, "chosen": assistant("gold"), "rejected": assistant("old")}],
    "messages_kto": [{"messages": [user("x"), assistant("gold")], "label": False}],
    "alpaca": [{"instruction": "good", "input": "x", "history": [["a", "b"]]} | _PAIR],
    "alpaca_kto": [{"instruction": "good", "output": "gold", "kto_tag": 1}],
    "sharegpt": [{"conversations": _THEIRS, "chosen": {"from": "gpt", "value": "a"}, "rejected": "b"}],
    "sharegpt_kto": [{"conversations": [*_THEIRS, {"from": "gpt", "value": "a"}], "kto_tag": False}],
    "swift": [{"messages": [user("x"), assistant("gold")], "rejected_response": "old"}],
    "nemo": [{"context": _TURNS, "completions": [{"rank": n, "completion": t} for n, t in enumerate("ab")]}],
    "nemo_aligner": [{"prompt": "x", "chosen_response": "a", "rejected_response": "b", "chosen_reward": 1}],
    "openai": [
        {
            "input": {"messages": _TURNS, "tools": []},
            "preferred_output": [assistant("a")],
            "non_preferred_output": [assistant("b")],
        }
    ],
    "ultrafeedback": [{"instruction": "good", "completions": _RATED}],
}
_NESTED: list = []
for _ in range(400):
    _NESTED = [_NESTED]
_BAD = [
    None, True, 0, -1, 10**400, -(10**30), 1e308, float("nan"), float("inf"), "", " ", "\n", "x", "\ud83d",
    "é\udd25", "\x1b[2J\x07", "\x00", "<|im_end|>", "<s></s>", [], {}, [[]], [None], [{}], [""], [1, 2],
    {"role": "user"}, {"role": ["user"], "content": "x"}, {"role": {"a": 1}, "content": 2},
    {"from": ["gpt"], "value": "x"}, {"\x1b[31m": "\x9b"}, {"\udfff": "\ud800"}, {"": ""}, [[0, 10**30]],
    [user("x"), assistant(None)], [assistant("a") | {"tool_calls": [{"function": None}]}],
    [assistant("") | {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], _NESTED,
]  # fmt: skip
_NAMES = [
    "\x1b]0;title\x07",
    "a\nb",
    "half \ud83d",
    "\u202enesohc",
    "system",
    "tools",
    "history",
    "images",
    "",
]


def places(value, path=()):
    """Every place in a row, as the keys that lead to it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def broken(row: dict, random: random.Random) -> dict:
    """The row with one or two places changed, removed, renamed or added."""
    row = copy.deepcopy(row)
    for _ in range(random.choice([1, 1, 2])):
        found = list(places(row))
        if not found:
            return row
        *path, key = random.choice(found)
        parent = row
        for step in path:
            parent = parent[step]
        how = random.choice(["change", "change", "change", "remove", "rename", "add", "double"])
        bad = copy.deepcopy(random.choice(_BAD))
        if how == "change":
            parent[key] = bad
        elif how == "remove":
            del parent[key]
        elif isinstance(parent, list):
            parent.append(parent[key] if how == "double" else bad)
        elif how == "rename":
            parent[random.choice(_NAMES)] = parent.pop(key)
        else:
            parent[random.choice(_NAMES)] = parent[key] if how == "double" else bad
    return row


def test_every_format_is_here():
    named = {"ultrafeedback_fine_grained", "axolotl"}  # by data_format alone
    of_rounds = {"prompt_only", "prompt_completion"}
    assert GOOD.keys() == FORMATS.keys() - named - of_rounds


@pytest.mark.parametrize("seed", range(3))
def test_broken_rows_are_kept_or_counted(tmp_path, seed):
    chance = random.Random(seed)
    good = [row for rows in GOOD.values() for row in rows]
    rows = [*good, *(broken(chance.choice(good), chance) for _ in range(300))]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    console, tokenizer = Console(file=io.StringIO(), width=300), small_tokenizer()
    groups, report = load_groups(str(path), tokenizer, WIDE, strict=False, console=console)
    dropped = {name: tally.rows for name, tally in report.dropped.items()}
    assert len(groups) + sum(dropped.values()) == report.rows == len(rows)
    assert [group.row for group in groups][: len(good)] == [*range(len(good))]
    assert len(groups) > 60 and dropped["lone_surrogate"] > 5 and len(dropped) > 8
    show(groups, report, tokenizer, console)
    console.print(report.losses(), markup=False)
    for group in groups:  # each as `fastdpo data` shows one
        show([group], report, tokenizer, console) if group.row % 20 == 0 else None
    assert all(line.isprintable() for line in console.file.getvalue().split("\n"))


def test_a_file_of_one_broken_row_says_why(tmp_path):
    chance, unusable = random.Random(9), 0
    tokenizer, console = small_tokenizer(), Console(file=io.StringIO())
    for _ in range(200):
        row = broken(chance.choice(GOOD[chance.choice(list(GOOD))]), chance)
        (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n")
        try:
            load_groups(str(tmp_path / "d.jsonl"), tokenizer, WIDE, strict=False, console=console)
        except DataError as error:
            unusable += 1
            first, *reasons = str(error).split("\n")
            assert "none of the 1 rows" in first and len(reasons) == 1
            assert str(error).replace("\n", "").isprintable()
    assert unusable > 50
