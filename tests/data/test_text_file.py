"""Files that are not UTF-8: told by name, by line, and with what to do."""

import io
import json
import re
import shlex

import pytest
from rich.console import Console

from fastdpo.data.load import load_groups
from fastdpo.data.sources import load_rows
from fastdpo.errors import DataError
from tests.data.shared_data import WIDE, pieces, small_tokenizer, text_row  # noqa: F401

pytestmark = pytest.mark.usefixtures("pieces")
QUIET = Console(file=io.StringIO())
TEXT = {
    "jsonl": "".join(json.dumps(text_row(chosen=f" g {i}")) + "\n" for i in range(2)),
    "json": json.dumps([text_row()]),
    "csv": "prompt,chosen,rejected\ngood, morning, old world\n",
}


@pytest.mark.parametrize("kind", TEXT)
@pytest.mark.parametrize(
    "encoding, name",
    [
        ("utf-16", "UTF-16"),
        ("utf-32", "UTF-32"),
        ("utf-16-le", "UTF-16LE"),
        ("utf-16-be", "UTF-16BE"),
        ("utf-32-le", "UTF-32LE"),
        ("utf-32-be", "UTF-32BE"),
    ],
)
def test_utf_16_and_32_are_told_by_name(tmp_path, kind, encoding, name):
    path = tmp_path / f"d.{kind}"
    path.write_bytes(TEXT[kind].encode(encoding))
    old, new = shlex.quote(str(path)), shlex.quote(f"{tmp_path}/d_utf8.{kind}")
    way_out = f"Save it as UTF-8, or: iconv -f {name} -t UTF-8 {old} > {new}"
    with pytest.raises(DataError, match=re.escape(f"{path} is {name}, not UTF-8. {way_out}")):
        load_rows(str(path))


@pytest.mark.parametrize("kind", TEXT)
def test_a_bom_of_utf_8_is_no_part_of_the_text(tmp_path, kind):
    path = tmp_path / f"d.{kind}"
    path.write_text(TEXT[kind], encoding="utf-8-sig")
    assert load_rows(str(path))[0]["prompt"] == "good"


def test_a_line_that_is_not_utf_8_is_dropped_and_counted(tmp_path):
    first, second = TEXT["jsonl"].encode().splitlines(keepends=True)
    (tmp_path / "d.jsonl").write_bytes(first + b'{"prompt": "caf\xe9"}\n' + second)
    spec = str(tmp_path / "d.jsonl")
    groups, report = load_groups(spec, small_tokenizer(), WIDE, strict=False, console=QUIET)
    assert [group.row for group in groups] == [0, 2]
    (dropped,) = report.dropped.items()
    why = "line 2 of d.jsonl: byte 0xe9 is not UTF-8; correct it, or save the file as UTF-8"
    assert (dropped[0], dropped[1].examples, dropped[1].message) == ("not_utf8", [1], why)
    (tmp_path / "d.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    with pytest.raises(DataError, match="has no line that is JSON: line 1: byte 0xe9 is not UTF-8"):
        load_rows(spec)


@pytest.mark.parametrize(
    "name, raw",
    [
        ("d.json", b'[{},\n\n{"a": "caf\xe9"}]'),
        ("d.json", b'[{} {},\n\n{"a": "caf\xe9"}]'),  # whatever else is wrong before it
        ("d.csv", b"prompt,chosen\na,b\nc,caf\xe9\n"),
        ("d.csv", b'prompt,prompt\na,"b" b\nc,caf\xe9\n'),
    ],
)
def test_an_array_and_a_csv_have_to_be_utf_8_as_a_whole(tmp_path, name, raw):
    (tmp_path / name).write_bytes(raw)
    match = rf"{name}: byte 0xe9 on line 3 is not UTF-8. Correct it; or, .*: iconv -f CP1252 -t UTF-8 "
    with pytest.raises(DataError, match=match + re.escape(shlex.quote(f"{tmp_path}/{name}"))):
        load_rows(str(tmp_path / name))


def test_the_command_that_mends_a_file_holds_for_any_name(tmp_path):
    path = tmp_path / "my rows.v1.csv"
    path.write_bytes("a,b".encode("utf-16"))
    with pytest.raises(DataError) as caught:
        load_rows(str(path))
    names = f"'{tmp_path}/my rows.v1.csv' > '{tmp_path}/my rows.v1_utf8.csv'"
    assert str(caught.value).endswith(f"or: iconv -f UTF-16 -t UTF-8 {names}")
