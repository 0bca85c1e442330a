"""What is wrong with one row is that row's alone, and counted; what is printed is printable."""

import io
from types import SimpleNamespace

import pytest
from datasets import Dataset
from rich.console import Console

from fastdpo.data import groups as groups_module
from fastdpo.data.groups import to_group
from fastdpo.data.load import load_data, load_groups
from fastdpo.data.report import RowProblem
from fastdpo.data.show import show, show_data
from fastdpo.data.sources import Rows, load_rows
from fastdpo.errors import DataError, ModelError
from tests.data.shared_data import WIDE, chat_row, small_tokenizer, text_row, user, write_lines

GOOD, HALF = text_row(), "\ud83d"
DEEP: list = []
for _ in range(100_000):
    DEEP = [DEEP]


def load(spec, tokenizer=None, strict=False):
    console = Console(file=io.StringIO(), width=400)
    return *load_groups(spec, tokenizer or small_tokenizer(), WIDE, strict=strict, console=console), console


@pytest.mark.parametrize(
    "row, field",
    [
        (text_row(prompt="good " + HALF), "prompt"),
        (text_row(rejected=HALF), "rejected"),
        (text_row() | {"note": {"a": ["x", {"b": "é" + HALF}]}}, "note.a[1].b"),
        (text_row() | {HALF: 1}, "\\ud83d"),
        (chat_row(chosen="\udd25 gold"), "chosen[0].content"),
        (chat_row() | {"prompt": [user("x") | {"k" + HALF: None}]}, "prompt[0].k\\ud83d"),
        ('"\\ud83d"', "row"),
    ],
)
def test_half_a_character_drops_its_row(tmp_path, row, field):
    groups, report, _ = load(write_lines(tmp_path / "d.jsonl", [GOOD, row, GOOD]))
    assert [group.row for group in groups] == [0, 2]
    ((reason, tally),) = report.dropped.items()
    why = f"{field}: half a character (a lone surrogate, as of an emoji cut in two); remove it"
    assert (reason, tally.examples, tally.message) == ("lone_surrogate", [1], f"line 2 of d.jsonl: {why}")


def test_a_whole_character_in_two_escapes_is_none(tmp_path):
    line = r'{"prompt": "\ud83d\ude00", "chosen": "a", "rejected": "b"}'
    (group,), report, _ = load(write_lines(tmp_path / "d.jsonl", [line]))
    assert small_tokenizer().decode(group.prompt) == "<s>😀" and not report.dropped


def test_a_file_of_bad_rows_alone_says_so(tmp_path):
    spec = write_lines(
        tmp_path / "d.jsonl", [text_row(prompt=HALF), "[" * 100_000, GOOD | {"chosen": "\x1b[2J"}]
    )
    _, report, _ = load(spec)
    assert report.kept.rows == 1
    spec = write_lines(
        tmp_path / "e.jsonl", [text_row(prompt=HALF), {f"\x1b[31m{HALF}\n": 1}, {"\x1b]0;x\x07": 1}]
    )
    with pytest.raises(DataError, match=r"none of the 3 rows of .* can be used") as caught:
        load(spec)
    lines = str(caught.value).split("\n")
    assert len(lines) == 3 and all(line.isprintable() for line in lines)
    assert r"row has: \x1b]0;x\x07" in lines[2]


@pytest.mark.parametrize(
    "more, why",
    [
        ({"tools": DEEP}, "RecursionError: maximum recursion depth exceeded"),
    ],
)
def test_any_fault_of_a_row_is_that_rows(more, why):
    with pytest.raises(RowProblem) as caught:
        to_group(GOOD | more, 1, small_tokenizer(), WIDE)
    assert caught.value.reason == "faulty_row"
    assert str(caught.value).startswith(f"row: reading it failed with {why}")


@pytest.mark.parametrize("error", [TypeError("\x1b[31m"), KeyError("x"), RecursionError(), IndexError()])
@pytest.mark.parametrize("where", ["parse_row", "write", "_group"])
def test_wherever_a_row_fails_the_others_are_read(tmp_path, monkeypatch, where, error):
    real = getattr(groups_module, where)

    def fail(row, *rest):
        if "old world" in str(row):
            raise error
        return real(row, *rest)

    monkeypatch.setattr(groups_module, where, fail)
    rows = [text_row(rejected=" old"), GOOD, text_row(rejected=" wor"), GOOD]
    groups, report, _ = load(write_lines(tmp_path / "d.jsonl", rows))
    assert [group.row for group in groups] == [0, 2] and report.rows == 4
    ((reason, tally),) = report.dropped.items()
    assert (reason, tally.examples) == ("faulty_row", [1, 3])
    assert tally.message.startswith(
        f"line 2 of d.jsonl: row: reading it failed with {type(error).__name__}: "
    )
    assert tally.message.isprintable()


class Failing:
    """A tokenizer's backend that fails on some texts, and on every call that holds one."""

    def __init__(self, backend, error):
        self.backend, self.error = backend, error

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def encode_batch_fast(self, texts, **options):
        if any("wor" in text for text in texts):
            raise self.error
        return self.backend.encode_batch_fast(texts, **options)


class PanicException(BaseException):
    """As pyo3 raises it where Rust's code panics."""


def test_a_panic_of_the_tokenizer_is_its_rows(tmp_path, monkeypatch):
    tokenizer = small_tokenizer()
    failing = Failing(tokenizer.backend_tokenizer, PanicException("index out of bounds"))
    monkeypatch.setattr(type(tokenizer), "backend_tokenizer", failing)
    groups, report, _ = load(
        write_lines(tmp_path / "d.jsonl", [text_row(rejected=" wor"), text_row(rejected=" old")]), tokenizer
    )
    assert [group.row for group in groups] == [1]
    ((reason, tally),) = report.dropped.items()
    assert (reason, tally.examples) == ("faulty_row", [0])
    assert "the tokenizer panicked: index out of bounds" in tally.message
    with pytest.raises(KeyboardInterrupt):  # what stops a run still does
        failing.error = KeyboardInterrupt()
        load(write_lines(tmp_path / "d.jsonl", [text_row(rejected=" wor")]), tokenizer)


@pytest.mark.parametrize("error", [ValueError("no such bytes"), TypeError("\x1b[31m")])
def test_the_row_that_the_tokenizer_fails_on_is_found(tmp_path, monkeypatch, error):
    tokenizer = small_tokenizer()
    monkeypatch.setattr(type(tokenizer), "backend_tokenizer", Failing(tokenizer.backend_tokenizer, error))
    rows = [text_row(rejected=" old"), text_row(rejected=" wor"), text_row(rejected=" old"), chat_row()]
    groups, report, _ = load(write_lines(tmp_path / "d.jsonl", rows), tokenizer)
    assert [group.row for group in groups] == [0, 2, 3]
    ((reason, tally),) = report.dropped.items()
    assert (reason, tally.examples) == ("faulty_row", [1])
    assert tally.message.startswith(
        f"line 2 of d.jsonl: row: reading it failed with {type(error).__name__}: "
    )
    assert tally.message.isprintable()


@pytest.mark.parametrize(
    "error, options, raised",
    [
        (MemoryError(), {}, MemoryError),
        (ModelError("broken"), {}, ModelError),
        (None, {"eos": False}, ModelError),
        (None, {"chat_template": None}, DataError),
    ],
)
def test_what_is_no_rows_fault_ends_the_run(tmp_path, monkeypatch, error, options, raised):
    tokenizer = small_tokenizer(**options)
    if error is not None:
        monkeypatch.setattr(type(tokenizer), "backend_tokenizer", Failing(tokenizer.backend_tokenizer, error))
    with pytest.raises(raised) as caught:
        load(write_lines(tmp_path / "d.jsonl", [text_row("good wor"), chat_row()]), tokenizer)
    assert type(caught.value) is raised and "can be used" not in str(caught.value)


def test_a_row_that_a_data_set_cannot_give_is_dropped(monkeypatch):
    class Broken(list):
        def range(self, start, stop):
            for number in range(start, stop):
                if number in (1, 2):
                    raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
                yield self[number]

    rows = list(Rows("x", [Broken([GOOD] * 5)]))
    assert [row == GOOD for row in rows] == [True, False, False, True, True]
    assert [row.reason for row in rows[1:3]] == ["faulty_row", "faulty_row"]


def test_a_decoded_row_sends_no_escapes(tmp_path):
    row = text_row("good\tone\nab\x1b[2J", " morning\x07\x9b31m", " old\r\u202e world é😀\u200d")
    groups, report, console = load(write_lines(tmp_path / "d.jsonl", [row]))
    show(groups, report, small_tokenizer(), console)
    shown = console.file.getvalue()
    assert all(text in shown for text in (r"ab\x1b[2J", r"morning\x07\x9b31m", r"old\r\u202e world é😀"))
    assert not set(shown) & set("\x1b\x07\x9b\r\u202e") and "one\nab" in shown


def test_errors_about_eval_data_say_so(tmp_path):
    good = write_lines(tmp_path / "d.jsonl", [GOOD])
    bad = write_lines(tmp_path / "e.jsonl", [{"prompt": "x"}])
    (tmp_path / "f.csv").write_text("a;b\n")
    console = Console(file=io.StringIO())

    def error(**sources) -> str:
        about = dict(data_format=None, max_length=99, truncation="drop", strict=False, seed=0)
        spec = SimpleNamespace(
            chat_template_kwargs=None, data_cache="off", rewards=False, prompts_only=False, **about, **sources
        )
        messages = []
        for function in (load_data, show_data):
            with pytest.raises(DataError) as caught:
                function(spec, small_tokenizer(), console)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
        return messages[0]

    assert error(data=good, eval_data=bad).startswith("eval_data: none of the 1 rows of")
    assert error(data=good, eval_data="/no/such").startswith("eval_data: '/no/such' does not exist here.")
    assert error(data=good, eval_data=f"{tmp_path}/f.csv").startswith(
        f"eval_data: {tmp_path}/f.csv is separated"
    )
    assert error(data=good, eval_data=good + "#test").startswith(f"eval_data: '{good}#test': Unknown split")
    assert error(data=bad, eval_data=good).startswith("data: none of the 1 rows of")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("split", ["train[100:]", "train[3:]", "train[2:1]", "train[9:]+train[3:4]"])
def test_a_split_past_the_end_says_what_there_is(tmp_path, kind, split):
    path, data = tmp_path / f"d.{kind}", Dataset.from_list([GOOD] * 3)
    {"jsonl": data.to_json, "csv": data.to_csv, "parquet": data.to_parquet}[kind](path)
    with pytest.raises(DataError, match=r"takes none of the rows\. There is: train \(3 rows\)\."):
        load_rows(f"{path}#{split}")
    assert len(load_rows(f"{path}#train[9:]+train[1:9]")) == 2
