"""Rows that say what an earlier row says: counted, and trained on all the same."""

import io

from rich.console import Console

from fastdpo.data.load import load_groups
from tests.data.shared_data import WIDE, ranked_row, small_tokenizer, text_row, write_lines


def load(tmp_path, rows, strict=False):
    spec, console = write_lines(tmp_path / "d.jsonl", rows), Console(file=io.StringIO())
    return load_groups(spec, small_tokenizer(), WIDE, strict=strict, console=console)


def test_duplicates_are_counted_and_kept(tmp_path):
    pair, judged = text_row(), {"prompt": "good", "completion": " gold", "label": True}
    rows = [pair, judged, pair, dict(reversed(pair.items())), judged]
    groups, report = load(tmp_path, rows, strict=True)
    assert len(groups) == 5
    assert report.notes.keys() == {"duplicate_row"}
    assert report.notes["duplicate_row"].to_dict() == {"rows": 3, "items": 3, "examples": [2, 3, 4]}


def test_rows_that_differ_are_no_duplicates(tmp_path):
    rows = [
        text_row("good", " gold", " old"),
        text_row("good", " old", " gold"),  # the other way round
        text_row("gold", " gold", " old"),
        text_row("good gold", " world", " old"),  # the same tokens, and another place where the prompt ends
        text_row("good gold", " world", " old world"),
        {"prompt": "good", "completion": " gold", "label": True},
        {"prompt": "good", "completion": " gold", "label": False},
        ranked_row((" gold", 2), (" old", 1), (" world", 0)),
        ranked_row((" gold", 2), (" old", 1), (" world", 1)),  # another pair fewer
    ]
    _, report = load(tmp_path, rows)
    assert "duplicate_row" not in report.notes and report.kept.rows == len(rows)
