"""CSV files: text is text, numbers are numbers where a column means one, and every fault has its line."""

import csv

import pytest

from fastdpo.data.report import RowProblem
from fastdpo.data.rows import parse_row
from fastdpo.data.sources import load_rows
from fastdpo.errors import DataError
from tests.data.shared_data import pieces, write_lines  # noqa: F401

pytestmark = pytest.mark.usefixtures("pieces")


def rows_of(tmp_path, text: str, data_format=None):
    (tmp_path / "d.csv").write_bytes(text.encode())
    return load_rows(str(tmp_path / "d.csv"), data_format)


def test_text_that_looks_like_something_else_is_text(tmp_path):
    cells = ["42", "007", "None", "1e5", "true", "-0", "NaN", " 3 ", "null", ""]
    text = "prompt,chosen,rejected\n" + "".join(f"{cell},{cell},5\n" for cell in cells)
    expected = [{"prompt": cell, "chosen": cell, "rejected": "5"} for cell in cells]
    assert list(rows_of(tmp_path, text)) == expected


def test_columns_that_mean_numbers_are_numbers(tmp_path):
    text = "prompt,chosen,rejected,score_chosen,score_rejected,ref_chosen_logps,reference_rejected_logps\n"
    first, second = rows_of(tmp_path, text + "1,2,3,4,-1.5,-1e1,\n1,2,3,,high,1_0, -7 \n")
    assert first == {
        "prompt": "1",
        "chosen": "2",
        "rejected": "3",
        "score_chosen": 4,
        "score_rejected": -1.5,
        "ref_chosen_logps": -10.0,
        "reference_rejected_logps": None,
    }
    assert list(second.values()) == ["1", "2", "3", None, "high", "1_0", -7]
    with pytest.raises(RowProblem, match="score_rejected: a number, not str 'high'"):
        parse_row(second | {"ref_chosen_logps": -1}, 0)


_LABELS = {"true": True, "False": False, "TRUE": True, "1": 1, "0.0": 0}


@pytest.mark.parametrize("cell, label", _LABELS.items())
def test_labels(tmp_path, cell, label):
    (row,) = rows_of(tmp_path, f"prompt,completion,label\ntrue,1,{cell}\n")
    assert row == {"prompt": "true", "completion": "1", "label": label}
    assert parse_row(row, 0).label is bool(label)


def test_numbers_are_told_by_our_names_for_the_columns(tmp_path):
    names = {"prompt": "q", "completion": "score_chosen", "label": "good"}
    (row,) = rows_of(tmp_path, "q,score_chosen,good,label\n1,2,0,3\n", names)
    assert row == {"q": "1", "score_chosen": "2", "good": 0, "label": "3"}
    parsed = parse_row(row, 0, load_rows(str(tmp_path / "d.csv"), names).layout)
    assert (parsed.prompt, parsed.responses, parsed.label) == ("1", ("2",), False)


def test_rows_keep_their_lines(tmp_path):
    text = '\ufeffprompt,chosen,rejected\r\n"a\nb, ""c""",x,y\r\n\r\np,"x\r\n\n",y\r\nq,x,y'
    rows = rows_of(tmp_path, text)
    assert [row["prompt"] for row in rows] == ['a\nb, "c"', "p", "q"]
    assert rows[1]["chosen"] == "x\r\n\n"
    assert [rows.line(i) for i in range(3)] == [f"line {n} of d.csv" for n in (2, 5, 8)]


def test_a_cell_may_be_long(tmp_path):
    before, long = csv.field_size_limit(), "a" * 200_000
    (row,) = rows_of(tmp_path, f"prompt,chosen,rejected\n{long},x,y\n")
    assert row["prompt"] == long and csv.field_size_limit() == before


def test_a_row_of_other_cells_than_the_header_is_dropped(tmp_path):
    rows = list(rows_of(tmp_path, "prompt,chosen,rejected\na,b\nc,d,e\nf,g,h,i\n"))
    assert rows[1] == {"prompt": "c", "chosen": "d", "rejected": "e"}
    assert [str(rows[i]) for i in (0, 2)] == [
        "line 2: 2 cells, where the header has 3; quote cells with commas",
        "line 4: 4 cells, where the header has 3; quote cells with commas",
    ]
    assert rows[0].reason == rows[2].reason == "cell_count"


@pytest.mark.parametrize(
    "rows, line",
    [
        ('a,b,c\nd,"e,f\ng,h,i\n', 3),  # to the file's end
        ('a,b,c\nd,"e,f\ng,"h",i\n', 3),  # to the next quote
        ('"a\nb",c,d\n"e\nf","g\n""h",i\n"j,k,l\n', 7),
        ('"a\nb","c,d\n', 3),
        ('a,6" tall,c\nd,"e" and f,g\n', 3),
        ('a,b,c\r\nd,"e,f\r\n', 3),
    ],
)
def test_an_unclosed_quote_has_its_line(tmp_path, rows, line):
    match = rf"d\.csv: the quote that opens on line {line} is not closed where its cell ends"
    with pytest.raises(DataError, match=match):
        rows_of(tmp_path, "prompt,chosen,rejected\n" + rows)


@pytest.mark.parametrize("by, name", [(";", "semicolons"), ("|", "bars"), ("\t", "tabs")])
def test_other_separators_are_told_by_name(tmp_path, by, name):
    text = f"prompt{by}chosen{by}rejected\na, b{by}c{by}d\n"
    with pytest.raises(DataError, match=rf"d\.csv is separated by {name}, not commas. Save it with commas"):
        rows_of(tmp_path, text)


def test_a_column_has_one_name(tmp_path):
    with pytest.raises(DataError, match="several columns of the name 'chosen'; rename"):
        rows_of(tmp_path, "prompt,chosen,chosen\na,b,c\n")


@pytest.mark.parametrize("text", ["", "\n", "prompt,chosen,rejected\n"])
def test_a_csv_without_rows(tmp_path, text):
    with pytest.raises(DataError, match="has no rows"):
        rows_of(tmp_path, text)


def test_json_in_a_cell_stays_text(tmp_path):
    cell = '[{"role": "user", "content": "x"}]'
    quoted = '"' + cell.replace('"', '""') + '"'
    (row,) = rows_of(tmp_path, f"prompt,chosen,rejected\n{quoted},a,b\n")
    assert row["prompt"] == cell
    with pytest.raises(RowProblem, match="messages written as text"):
        parse_row(row, 0)


def test_a_folder_of_csv_files(tmp_path):
    for i in (1, 2):
        write_lines(tmp_path / f"part{i}.csv", ["prompt,chosen,rejected", f"{i},a,b"])
    rows = load_rows(str(tmp_path))
    assert [row["prompt"] for row in rows] == ["1", "2"]
    assert rows.line(1) == "line 2 of part2.csv"
