"""load_groups over whole files: what is kept, dropped and counted, and how it is shown."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

import fastdpo.data.report
from fastdpo.data.groups import Limits
from fastdpo.data.load import load_groups
from fastdpo.data.report import DataReport, RowProblem
from fastdpo.data.show import show
from fastdpo.errors import DataError
from tests.data.shared_data import (
    DATA,
    WIDE,
    assistant,
    chat_row,
    needs_shared,
    ranked_row,
    read_lines,
    real_tokenizer,
    small_tokenizer,
    text_row,
    user,
    write_lines,
)


def load(spec, tokenizer=None, limits=WIDE, strict=False):
    console = Console(file=io.StringIO())
    return load_groups(str(spec), tokenizer or small_tokenizer(), limits, strict=strict, console=console)


def printed(report, **options) -> str:
    console = Console(file=io.StringIO(), width=150, **options)
    report.print(console)
    report.print_lengths(console)
    return console.file.getvalue()


GOOD = text_row()
SAME = text_row(rejected=GOOD["chosen"])
LONG = text_row("good old world", " morning gold old " + "gold " * 40, " wor world")
MIXED = [
    GOOD,
    SAME,
    chat_row(),
    {"prompt": "p"},
    "not json",
    ranked_row((" old", 2), (" gold", 1), (" wor", 1)),
    ranked_row((" old", 2), (" old", 1), (" wor", 0)),
    SAME,
    LONG,
    text_row("good wor", "ld morning", "ld old"),
]


def test_every_row_is_accounted_for(tmp_path):
    groups, report = load(write_lines(tmp_path / "d.jsonl", MIXED), limits=Limits(40))
    assert [g.row for g in groups] == [0, 2, 5, 6, 8, 9]
    out = json.loads(json.dumps(report.to_dict()))
    assert (out["rows"], out["kept"]["rows"], out["groups"]) == (10, 6, 6)
    assert {name: (d["rows"], d["examples"]) for name, d in out["dropped"].items()} == {
        "identical": (2, [1, 7]),
        "missing_column": (1, [3]),
        "invalid_json": (1, [4]),
    }
    assert out["dropped"]["invalid_json"]["message"].startswith("line 5 of d.jsonl: not JSON")
    notes = {name: (d["rows"], d["items"], d["examples"]) for name, d in out["notes"].items()}
    assert notes == {
        "tie_pair": (1, 1, [5]),
        "identical_pair": (1, 1, [6]),
        "truncated": (1, 1, [8]),
        "merged_boundary": (1, 2, [9]),
    }
    assert out["responses"] == sum(len(g.responses) for g in groups) == 14
    assert out["pairs"] == sum(len(g.pairs) for g in groups) == 8


def test_totals_add_up(tmp_path):
    groups, report = load(write_lines(tmp_path / "d.jsonl", MIXED))
    prompt = sum(len(g.prompt) for g in groups)
    lengths = [len(g.prompt) + len(r.ids) for g in groups for r in g.responses]
    out = report.to_dict()
    assert out["prompt_tokens"] == prompt
    assert out["response_tokens"] == sum(len(r.ids) for g in groups for r in g.responses)
    assert out["scored_tokens"] == sum(int(r.target_mask.sum()) for g in groups for r in g.responses)
    assert out["prompts"] == len({g.prompt.tobytes() for g in groups})
    assert out["shared_forward_tokens"] == prompt + out["response_tokens"] - out["responses"]
    assert out["separate_rows_tokens"] == sum(lengths)
    assert sum(out["lengths"]["counts"]) == len(lengths)
    assert out["lengths"]["max"] == max(lengths)
    for start, end, count in zip(
        out["lengths"]["edges"], out["lengths"]["edges"][1:], out["lengths"]["counts"]
    ):
        assert count == sum(start <= length < end for length in lengths)


def test_five_examples_and_no_more(tmp_path):
    rows = [GOOD, *[SAME] * 9]
    _, report = load(write_lines(tmp_path / "d.jsonl", rows))
    assert report.dropped["identical"].examples == [1, 2, 3, 4, 5]
    assert report.dropped["identical"].rows == 9
    assert "1, 2, 3, 4, 5, ..." in printed(report)


def test_rows_in_several_tokenizer_calls_keep_their_order(tmp_path):
    rows = [text_row(chosen=f" {i}") if i % 7 else SAME for i in range(600)]
    groups, report = load(write_lines(tmp_path / "d.jsonl", rows))
    assert [g.row for g in groups] == [i for i in range(600) if i % 7]
    assert report.rows == 600
    last = groups[-1].responses[0].ids
    assert small_tokenizer().decode(last.tolist()) == " 599</s>"


def test_the_first_dropped_row_is_told_by_its_file_and_line(tmp_path):
    write_lines(tmp_path / "a.jsonl", [MIXED[0]] * 2)
    write_lines(tmp_path / "b.jsonl", [MIXED[0], "{", SAME, SAME])
    _, report = load(str(tmp_path))
    told = {name: (tally.examples, tally.message) for name, tally in report.dropped.items()}
    assert told == {
        "invalid_json": (
            [3],
            "line 2 of b.jsonl: not JSON: Expecting property name enclosed in double quotes (character 2)",
        ),
        "identical": (
            [4, 5],
            "line 3 of b.jsonl: chosen and rejected: they are the same: nothing to prefer",
        ),
    }


def test_no_row_left(tmp_path):
    with pytest.raises(DataError) as caught:
        load(write_lines(tmp_path / "d.jsonl", [SAME, {"a": 1}, SAME]))
    text = str(caught.value)
    assert "none of the 3 rows" in text and "identical: 2 (rows 0, 2)" in text
    assert "missing_column: 1 (rows 1); the first: line 2 of d.jsonl: chosen:" in text


@pytest.mark.parametrize(
    ("bad", "parts"),
    [
        (SAME, ("chosen and rejected: they are the same",)),
        ("{", ("line 4: not JSON",)),
        ({"prompt": "p", "chosen": "c"}, ("rejected: the column is missing",)),
        ({**chat_row(), "chosen": [user("x")]}, ("chosen: a response starts with an assistant",)),
        (LONG, ("responses: 1 response(s) cut at max_length", "raise max_length")),
        (
            ranked_row((" old", 2), (" old", 1), (" wor", 0)),
            ("1 pair(s) of responses",),
        ),
        (
            ranked_row((" old", 2), (" old!", float("nan"))),
            ("responses[1].score: a finite",),
        ),
    ],
)
def test_strict_stops_at_the_first_bad_row(tmp_path, bad, parts):
    spec = write_lines(tmp_path / "d.jsonl", [GOOD, "", GOOD, bad, SAME])
    with pytest.raises(DataError) as caught:
        load(spec, limits=Limits(40), strict=True)
    text = str(caught.value)
    assert text.startswith(f"row 2 of {spec} (line 4 of d.jsonl): ")
    for part in (*parts, "Correct or remove the row, or set strict: false"):
        assert part in text


@pytest.mark.parametrize("limits", [Limits(40, "drop"), Limits(9)])
def test_strict_stops_at_a_dropped_row(tmp_path, limits):
    spec = write_lines(tmp_path / "d.jsonl", [chat_row(), LONG])
    with pytest.raises(DataError, match=r"row [01] of .*max_length="):
        load(spec, limits=limits, strict=True)


def test_strict_lets_the_rest_pass(tmp_path):
    rows = [GOOD, chat_row(), ranked_row((" old", 2), (" gold", 1), (" wor", 1))]
    groups, report = load(write_lines(tmp_path / "d.jsonl", rows), strict=True)
    assert len(groups) == 3 and report.notes["tie_pair"].rows == 1


def test_print_names_everything(tmp_path):
    _, report = load(write_lines(tmp_path / "d[bold].jsonl", MIXED), limits=Limits(40))
    text = printed(report)
    assert "d[bold].jsonl" in text  # brackets in a name are no markup
    for part in ("6 of 10", "dropped: identical", "1, 7", "invalid_json", "tie_pair", "truncated"):
        assert part in text
    assert "14 responses, 8 pairs" in text and "█" in text
    assert "with each prompt once" in text and "\x1b" not in text


def test_an_empty_report_prints():
    assert "0 of 0" in printed(DataReport("nothing"))


def test_every_reason_is_named_in_one_place():
    """So that "why was my row dropped" begins in report.py, which says the file that raises each reason."""
    folder = Path(fastdpo.data.report.__file__).parent
    source = "".join(file.read_text() for file in folder.rglob("*.py"))
    table = RowProblem.__doc__.split("\n\n")[1]
    named = re.findall(r"\w+", re.sub(r"[\w/]+\.py|formats/|images/", "", table))
    assert sorted(named) == sorted(set(re.findall(r'RowProblem\(\s*"(\w+)"', source)))


def test_histogram_edges():
    report = DataReport("x", lengths=[1, 11, 12, 13, 13])
    edges, counts = report.histogram()
    assert edges[0] == 0 and edges[-1] > 13 and sum(counts) == 5
    assert counts[13 // (edges[1] - edges[0])] == 3  # 12, 13, 13 with bins of two
    assert report.length_percentiles() == {"p50": 12, "p90": 13, "p99": 13, "max": 13}


@pytest.mark.parametrize("color", [None, "truecolor"])
def test_show_tells_scored_tokens_by_marks_and_colour(tmp_path, color):
    row = {
        "prompt": [user("good [old]?")],
        "chosen": [assistant("gold"), user("more"), assistant("world")],
        "rejected": [assistant("old")],
    }
    tokenizer = small_tokenizer()
    groups, report = load(write_lines(tmp_path / "d.jsonl", [row]), tokenizer)
    options = {"force_terminal": True, "color_system": color} if color else {}
    console = Console(file=io.StringIO(), width=150, **options)
    show(groups, report, tokenizer, console)
    text = console.file.getvalue()
    if color:
        assert "\x1b[1;32m«gold<|im_end|>»\x1b[0m" in text and "\x1b[33m⟦" in text
    text = re.sub(r"\x1b\[[\d;]*m", "", text)
    answers = ["gold<|im_end|>", "world<|im_end|>", "old<|im_end|>"]
    assert re.findall("«(.*?)»", text) == ["scored", *answers]
    assert re.findall("⟦(.*?)⟧", text, re.S) == [
        "read, not scored",
        "\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n",
    ]
    assert "<|im_start|>user\ngood [old]?<|im_end|>" in text
    assert "response 0 (chosen)" in text and "response 1 (rejected)" in text
    assert "row 0, decoded" in text and "1 of 1" in text


def test_rows_of_one_prompt_are_counted(tmp_path):
    prompts = ["good old ", "good wor ", "good old ", "good old ", "gold "]
    rows = [text_row(prompt, "old morning", "wor") for prompt in prompts]
    _, report = load(write_lines(tmp_path / "d.jsonl", rows))
    assert report.to_dict()["prompts"] == 3
    assert "3 different prompts: 2 rows share theirs with an earlier row" in printed(report)
    _, report = load(write_lines(tmp_path / "d.jsonl", rows[:2]))
    assert report.to_dict()["prompts"] == 2 and "different prompts" not in printed(report)


@needs_shared
def test_the_whole_of_hh_rlhf_test():
    path = DATA / "pref/hh_rlhf_test.jsonl"
    tokenizer = real_tokenizer("qwen2.5")
    groups, report = load(path, tokenizer, Limits(4096), strict=True)
    assert len(groups) == report.counts["pairs"] == 500 and not report.dropped and not report.notes
    turns = [row[n][0]["content"] for row in read_lines(path)[::10] for n in ("chosen", "rejected")]
    answers = sum(len(tokenizer(turn)["input_ids"]) + 1 for turn in turns)
    assert answers == sum(g.scored_tokens for g in groups[::10])
    counts = report.counts
    assert counts["scored_tokens"] == counts["response_tokens"] == 48378
    assert (counts["prompt_tokens"], counts["shared_forward_tokens"]) == (76866, 124244)
    assert counts["separate_rows_tokens"] == 202110


@needs_shared
def test_a_short_max_length_drops_and_cuts_what_it_should():
    path = DATA / "pref/hh_rlhf_test.jsonl"
    tokenizer = real_tokenizer("qwen2.5")
    whole, _ = load(path, tokenizer, Limits(4096))
    longest = [len(g.prompt) + max(len(r.ids) for r in g.responses) for g in whole]
    groups, report = load(path, tokenizer, Limits(200, "drop"))
    assert report.dropped["too_long"].rows == sum(n > 200 for n in longest)
    groups, report = load(path, tokenizer, Limits(200))
    too_long = sum(len(g.prompt) >= 200 for g in whole)
    assert report.dropped["prompt_too_long"].rows == too_long
    others = report.dropped["identical_after_truncation"].rows if len(report.dropped) > 1 else 0
    assert len(groups) == 500 - too_long - others
    assert report.notes["truncated"].rows == sum(n > 200 for n in longest) - too_long - others


@needs_shared
def test_the_whole_of_the_ranked_rows():
    path = DATA / "ranked/ranked_responses.jsonl"
    groups, report = load(path, real_tokenizer("gpt2"), Limits(8192))
    rows = read_lines(path)
    assert report.kept.rows == 464
    assert report.counts["responses"] == sum(len(r["responses"]) for r in rows)
    scores = [[response["score"] for response in row["responses"]] for row in rows]
    assert report.counts["pairs"] == sum(a > b for some in scores for a in some for b in some) == 12627
    ties = sum(some[i] == some[j] for some in scores for i in range(len(some)) for j in range(i))
    assert report.notes["tie_pair"].items == ties == 1
    assert [[r.score for r in g.responses] for g in groups] == scores
