"""Unpaired rows, {prompt, completion, label}: alone, beside paired ones, and against TRL's own reading."""

import io
import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from fastdpo.data.groups import Limits, to_group
from fastdpo.data.load import load_groups
from fastdpo.data.packing import pack
from fastdpo.data.rows import RowProblem, parse_row
from fastdpo.data.show import show
from tests.data.shared_data import (
    DATA,
    WIDE,
    assistant,
    chat_row,
    check,
    decode,
    needs_shared,
    ranked_row,
    read_lines,
    real_tokenizer,
    scored_text,
    sequence,
    small_tokenizer,
    text_row,
    user,
    write_lines,
)


def unpaired_row(label=True, completion=" old gold", prompt="good"):
    return {"prompt": prompt, "completion": completion, "label": label}


@pytest.mark.parametrize("label", [True, False, 1, 0, 1.0])
def test_text(label):
    tokenizer = small_tokenizer()
    group, notes = to_group(unpaired_row(label), 3, tokenizer, WIDE)
    check(group)
    (response,) = group.responses
    assert not notes and group.pairs == () and group.row == 3
    assert response.label is bool(label)
    assert decode(tokenizer, group.prompt) == "<s>good"
    assert scored_text(tokenizer, response) == " old gold</s>" and response.target_mask.all()
    paired, _ = to_group(text_row(chosen=" old gold"), 0, tokenizer, WIDE)
    assert sequence(group) == sequence(paired)


@pytest.mark.parametrize("prompt", ["good?", [user("good?")]])
@pytest.mark.parametrize("completion", ["gold", [assistant("gold")]])
def test_conversations(prompt, completion):
    """A list on either side makes the row a conversation."""
    tokenizer = small_tokenizer()
    group, notes = to_group(unpaired_row(False, completion, prompt), 0, tokenizer, WIDE)
    check(group)
    (response,) = group.responses
    assert not notes and response.label is False
    if isinstance(prompt, str) and isinstance(completion, str):
        assert decode(tokenizer, sequence(group)) == "<s>good?gold</s>"
    else:
        paired, _ = to_group(chat_row(), 0, tokenizer, WIDE)
        assert sequence(group) == sequence(paired)
        assert scored_text(tokenizer, response) == "gold<|im_end|>"


def test_several_turns_and_truncation():
    tokenizer = small_tokenizer()
    turns = [assistant("old"), user("more"), assistant("gold"), user("cut")]
    whole, notes = to_group(unpaired_row(True, turns, [user("good?")]), 0, tokenizer, WIDE)
    assert notes == {"trailing_turns": 1}
    assert scored_text(tokenizer, whole.responses[0]) == "old<|im_end|>gold<|im_end|>"
    length = len(sequence(whole))
    group, notes = to_group(unpaired_row(True, turns, [user("good?")]), 0, tokenizer, Limits(length - 1))
    check(group)
    assert notes["truncated"] == 1 and sequence(group) == sequence(whole)[:-1]
    with pytest.raises(RowProblem) as caught:
        to_group(unpaired_row(True, turns, [user("good?")]), 0, tokenizer, Limits(5))
    assert caught.value.reason == "prompt_too_long"


def test_pairs_columns_beside_a_completion_only():
    """Without a label, a completion column beside a pair is one more column, as before."""
    row = parse_row({**text_row(), "completion": "x"}, 0)
    assert row.pairs == ((0, 1),) and row.label is None
    row = parse_row({**text_row(), "label": "x"}, 0)
    assert row.pairs == ((0, 1),) and row.label is None


FAULTS = {
    "label missing": (
        {"prompt": "p", "completion": "c"},
        "missing_column",
        "label",
        "{prompt, completion, lab",
    ),
    "label null": (unpaired_row(None), "missing_column", "label", "missing or null"),
    "label text": (unpaired_row("true"), "malformed_label", "label", "str 'true'"),
    "label 2": (unpaired_row(2), "malformed_label", "label", "true or false (or 1 or 0), not int '2'"),
    "label 0.5": (unpaired_row(0.5), "malformed_label", "label", "0.5"),
    "label list": (unpaired_row([True]), "malformed_label", "label", "list"),
    "no prompt": ({"completion": "c", "label": True}, "missing_column", "prompt", "missing"),
    "empty prompt": (unpaired_row(prompt=" "), "empty_prompt", "prompt", "white space"),
    "empty": (unpaired_row(completion=" "), "empty_response", "completion", "no text"),
    "empty turn": (unpaired_row(completion=[assistant("")]), "empty_response", "completion", "no text"),
    "number": (unpaired_row(completion=5), "wrong_type", "completion", "int '5'"),
    "whole conversation": (
        unpaired_row(completion=[user("good"), assistant("old")]),
        "response_start",
        "completion",
        "the turns before it belong into the prompt",
    ),
    "both": ({**text_row(), **unpaired_row()}, "ambiguous_row", "row", "make it two rows"),
    "ranked too": (
        {**ranked_row(("a", 1), ("b", 0)), **unpaired_row()},
        "ambiguous_row",
        "row",
        "make it two rows",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults(name):
    row, reason, field, part = FAULTS[name]
    with pytest.raises(RowProblem) as caught:
        parse_row(row, 0)
    assert (caught.value.reason, caught.value.field) == (reason, field)
    assert part in caught.value.message


MIXED = [
    text_row(),
    unpaired_row(True),
    unpaired_row(False, " wor"),
    ranked_row((" old", 2), (" gold", 1), (" wor", 0)),
    unpaired_row("yes"),
    unpaired_row(0, [assistant("old")]),
]


def load(path, rows):
    console = Console(file=io.StringIO())
    spec = write_lines(path, rows)
    return load_groups(spec, small_tokenizer(), WIDE, strict=False, console=console)


def test_mixed_kinds_are_counted(tmp_path):
    groups, report = load(tmp_path / "d.jsonl", MIXED)
    assert [g.row for g in groups] == [0, 1, 2, 3, 5]
    assert [[r.label for r in g.responses] for g in groups] == [
        [None, None],
        [True],
        [False],
        [None, None, None],
        [False],
    ]
    out = json.loads(json.dumps(report.to_dict()))
    assert (out["paired_rows"], out["unpaired_rows"], out["kept"]["rows"]) == (2, 3, 5)
    assert (out["desirable"], out["undesirable"], out["pairs"], out["responses"]) == (1, 2, 4, 8)
    assert out["dropped"]["malformed_label"]["examples"] == [4]
    console = Console(file=io.StringIO(), width=150)
    show(groups, report, small_tokenizer(), console)
    text = console.file.getvalue()
    assert "3 unpaired rows (1 desirable, 2 undesirable), 2 rows of pairs" in text
    assert "row 0, decoded" in text and "row 1, decoded" in text and "row 2, decoded" not in text
    assert "response 0 (desirable), 3 tokens, 3 scored" in text and "response 1 (rejected)" in text


def test_a_report_without_unpaired_rows_does_not_name_them(tmp_path):
    groups, report = load(tmp_path / "d.jsonl", MIXED[:1])
    console = Console(file=io.StringIO(), width=150)
    show(groups, report, small_tokenizer(), console)
    assert "unpaired row" not in console.file.getvalue() and "relevant" not in console.file.getvalue()
    assert report.to_dict()["unpaired_rows"] == 0


def test_null_columns_of_a_mixed_parquet_file(tmp_path):
    from datasets import Dataset

    rows = [text_row(), unpaired_row(True), unpaired_row(False, " wor")]
    spec = str(tmp_path / "d.parquet")
    names = ("prompt", "chosen", "rejected", "completion", "label")
    Dataset.from_list([{name: row.get(name) for name in names} for row in rows]).to_parquet(spec)
    console = Console(file=io.StringIO())
    groups, report = load_groups(spec, small_tokenizer(), WIDE, strict=True, console=console)
    assert [len(g.pairs) for g in groups] == [1, 0, 0] and report.counts["desirable"] == report.counts[
        "undesirable"
    ] == 1


def test_packed_with_pairs(tmp_path):
    groups, _ = load(tmp_path / "d.jsonl", MIXED[:3])
    batch = pack(groups)
    assert batch.pairs.tolist() == [[0, 1]]
    assert (batch.desirable.tolist(), batch.undesirable.tolist()) == ([0, 2], [1, 3])
    assert batch.chosen.tolist() == [0, 2]


def kto_rows(tokenizer, rows: list[dict]):
    """TRL's own preparation of an unpaired data set, without a model."""
    from datasets import Dataset
    from trl.trainer.kto_trainer import KTOTrainer

    trainer = SimpleNamespace(_tokenizer=tokenizer, _is_vlm=False, calculate_KL=False)
    args = SimpleNamespace(dataset_num_proc=None, max_length=None)
    return KTOTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, args, "train")


@needs_shared
@pytest.mark.peer
@pytest.mark.parametrize("conversational", [True, False])
def test_trl_s_tokens(conversational):
    """TRL's unpaired rows made from pairs are ours, but for the newline after Qwen's end of turn."""
    tokenizer = real_tokenizer("qwen2.5")
    rows = []
    for row in read_lines(DATA / "pref/hh_rlhf_test.jsonl")[:20]:
        for name in ("chosen", "rejected"):
            prompt, completion = row["prompt"], row[name]
            if not conversational:
                prompt = "\n".join(turn["content"] for turn in prompt) + "\n"
                completion = "A: " + completion[0]["content"]
            rows.append(unpaired_row(name == "chosen", completion, prompt))
    extra = tokenizer("\n")["input_ids"] if conversational else []
    theirs = kto_rows(tokenizer, rows)
    assert len(theirs) == len(rows) == 40
    for number, (row, their) in enumerate(zip(rows, theirs)):
        group, _ = to_group(row, number, tokenizer, WIDE)
        (response,) = group.responses
        assert group.prompt.tolist() == their["prompt_ids"]
        assert response.ids.tolist() + extra == their["completion_ids"]
        assert response.label == their["label"] and response.target_mask.all()
