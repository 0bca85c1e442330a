"""How rows are read where the user says so: data_format, and LLaMA-Factory's dataset_info.json."""

import json
import os

import pytest
from datasets import Dataset

from fastdpo.data.formats.layouts import layout_of
from fastdpo.data.rows import RowProblem, parse_row
from fastdpo.data.sources import load_rows
from fastdpo.errors import ConfigError, DataError
from tests.data.shared_data import assistant, text_row, user, write_lines

TEXT = text_row()
OWN = {"q": "good?", "yes": "gold", "no": "old", "about": "S", "prompt": "never read", "label": 1}


def read(row, data_format):
    return parse_row(row, 0, layout_of(data_format))


def test_a_name_settles_what_columns_leave_open():
    row = {"prompt": "p", "question": "q", "system": "S", "chosen": "a", "rejected": "b"}
    assert read(row, "trl").prompt == "p"
    assert read(row, "prompt_pairs").prompt[1] == user("p")
    assert read(row, "intel").prompt == [{"role": "system", "content": "S"}, user("q")]


def test_columns_by_the_rows_own_names():
    """OpenRLHF's and NeMo's keys, Axolotl's user_defined."""
    parsed = read(OWN, {"prompt": "q", "chosen": "yes", "rejected": "no"})
    assert (parsed.format, parsed.prompt, parsed.responses) == ("trl", "good?", ("gold", "old"))
    parsed = read(OWN, {"prompt": "q", "chosen": "yes", "rejected": "no", "system": "about"})
    assert (parsed.format, parsed.prompt[0]["content"]) == ("prompt_pairs", "S")
    parsed = read(OWN, {"format": "intel", "question": "q", "chosen": "yes", "rejected": "no"})
    assert (parsed.format, parsed.prompt, parsed.label) == ("intel", [user("good?")], None)
    parsed = read(OWN, {"prompt": "q", "completion": "yes", "label": "label"})
    assert (parsed.format, parsed.label) == ("trl_unpaired", True)
    turns = {"turns": [user("good?")], "chosen": assistant("gold"), "rejected": assistant("old")}
    said = {"messages": "turns", "chosen": "chosen", "rejected": "rejected"}
    assert read(turns, said).responses[0] == [assistant("gold")]


def test_text_around_the_columns():
    """Axolotl's *_format: text, not a conversation, and braces in the data stay what they are."""
    said = {"prompt": "q", "chosen": "yes", "rejected": "no", "system": "about"}
    said |= {"prompt_format": "<s>{system}<u>{prompt}<a>{x}", "chosen_format": "{chosen}<e>"}
    parsed = read(OWN | {"q": "{chosen} {0}", "yes": "{prompt}"}, said)
    assert parsed.prompt == "<s>S<u>{chosen} {0}<a>{x}" and parsed.responses == ("{prompt}<e>", "old")
    with pytest.raises(RowProblem, match="missing or empty, and prompt_format has"):
        read(OWN | {"about": ""}, said)
    with pytest.raises(RowProblem, match="q: text is needed"):
        read(OWN | {"q": [user("x")], "yes": [assistant("a")], "no": [assistant("b")]}, said)


def test_a_missing_column_is_told_beside_the_rows_own():
    with pytest.raises(RowProblem) as caught:
        read(OWN | {"label": None}, {"prompt": "q", "chosen": "yess", "rejected": "no"})
    assert caught.value.field == "yess"
    assert "null (this row has: q, yes, no, about, prompt; a row is {prompt, chosen" in caught.value.message
    assert caught.value.message.endswith(
        "; data_format asks for it: name the rows' own columns there, or set it to null"
    )


def test_problems_name_the_rows_own_columns():
    said = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    for more, field in (
        ({"no": None}, "no"),
        ({"yes": 5}, "yes"),
        ({"q": " "}, "q"),
        ({"no": "gold"}, "yes and no"),
        ({"q": [user("x")], "yes": [{"role": "robot"}]}, "yes[0].role"),
    ):
        with pytest.raises(RowProblem) as caught:
            read(OWN | more, said)
        assert caught.value.field == field


@pytest.mark.parametrize(
    "data_format, message",
    [
        ("alpacca", "'alpacca' is not one of trl, .*Did you mean 'alpaca'"),
        ({"format": "nothing"}, "'nothing' is not one of"),
        ({"promt": "q"}, "'promt' is no column of ours. Did you mean 'prompt'"),
        ({"prompt": 3}, "prompt: a name is needed, not 3"),
        ({"prompt_format": "x {promt}"}, "has no {prompt} in it"),
    ],
)
def test_a_data_format_that_is_none(data_format, message):
    with pytest.raises(ConfigError, match=f"data_format: .*{message}"):
        layout_of(data_format)


def test_load_rows_keeps_the_layout(tmp_path):
    spec = write_lines(tmp_path / "d.jsonl", [OWN])
    rows = load_rows(spec, {"prompt": "q", "chosen": "yes", "rejected": "no"})
    assert parse_row(rows[0], 0, rows.layout).prompt == "good?"
    assert load_rows(spec).layout is None


# ---- dataset_info.json

ANSWERS = {"yes": "gold", "no": "old"}
ALPACA = {"prompt": "ask", "query": "more", "chosen": "yes", "rejected": "no"}
CONVERSATION = {
    "talk": [{"who": "me", "says": "hi"}, {"who": "it", "says": "yo"}, {"who": "me", "says": "good?"}],
    "yes": {"who": "it", "says": "gold"},
    "no": {"who": "it", "says": "old"},
}
TAGS = {"role_tag": "who", "content_tag": "says", "user_tag": "me", "assistant_tag": "it"}


@pytest.fixture
def folder(tmp_path):
    def write(rows, entry, name="set"):
        write_lines(tmp_path / "d.jsonl", rows)
        text = json.dumps({name: {"file_name": "d.jsonl"} | entry, "other": {"hf_hub_url": "a/b"}})
        (tmp_path / "dataset_info.json").write_text(text)
        return f"{tmp_path}:{name}"

    return write


def first(spec):
    rows = load_rows(spec)
    return parse_row(rows[0], 0, rows.layout)


def test_alpaca_columns(folder):
    row = {"ask": "a", "more": "b", "input": "never read", "sys": "S"} | ANSWERS
    columns = ALPACA | {"system": "sys"}
    parsed = first(folder([row], {"ranking": True, "columns": columns}))
    assert parsed.format == "alpaca" and parsed.responses[0] == [assistant("gold")]
    assert parsed.prompt == [{"role": "system", "content": "S"}, user("a\nb")]
    del columns["query"]  # a column that is not named is not read, as in LLaMA-Factory
    assert first(folder([row | {"sys": ""}], {"ranking": True, "columns": columns})).prompt == [user("a")]


def test_alpaca_without_columns(folder):
    row = {"instruction": "a", "input": "b", "chosen": "gold", "rejected": "old", "system": "not read"}
    assert first(folder([row], {"ranking": True})).prompt == [user("a\nb")]


def test_sharegpt_tags(folder):
    entry = {"formatting": "sharegpt", "ranking": True, "tags": TAGS}
    columns = {"messages": "talk", "chosen": "yes", "rejected": "no"}
    parsed = first(folder([CONVERSATION], entry | {"columns": columns}))
    assert parsed.format == "sharegpt"
    assert parsed.prompt == [user("hi"), assistant("yo"), user("good?")]
    assert parsed.responses == ([assistant("gold")], [assistant("old")])
    wrong = CONVERSATION | {"talk": [{"who": "them", "says": "x"}]}
    with pytest.raises(RowProblem, match=r"talk\[0\].who: unknown role 'them'"):
        first(folder([wrong], entry | {"columns": columns}))


def test_openai_and_kto(folder):
    row = {"messages": [user("x")], "chosen": assistant("gold"), "rejected": assistant("old")}
    entry = {"formatting": "openai", "ranking": True, "columns": {"messages": "messages"}}
    assert first(folder([row], entry)).prompt == [user("x")]
    row = {"messages": [user("x"), assistant("gold")], "good": False}
    entry = {"formatting": "openai", "columns": {"messages": "messages", "kto_tag": "good"}}
    parsed = first(folder([row], entry))
    assert (parsed.format, parsed.label) == ("messages_kto", False)


def test_alpaca_with_both_responses_in_one_list(folder):
    """As LLaMA-Factory had them before mid-2024."""
    columns = {"prompt": "ask", "response": "both"}
    parsed = first(folder([{"ask": "q", "both": ["gold", "old"]}], {"ranking": True, "columns": columns}))
    assert parsed.responses == ([assistant("gold")], [assistant("old")]) and parsed.prompt == [user("q")]
    for both in (["gold"], ["gold", "old", "lead"], "gold"):
        with pytest.raises(RowProblem, match="chosen"):
            first(folder([{"ask": "q", "both": both}], {"ranking": True, "columns": columns}))


def test_split_of_a_listed_data_set(folder, tmp_path):
    spec = folder([{"ask": str(i)} | ANSWERS for i in range(4)], {"ranking": True, "columns": ALPACA})
    assert [row["ask"] for row in load_rows(spec + "#train[1:3]")] == ["1", "2"]
    assert load_rows(spec).line(2) == "line 3 of d.jsonl"
    sub = tmp_path / "sub"
    sub.mkdir()
    write_lines(sub / "a_test.jsonl", [{"ask": "t"} | ANSWERS])
    write_lines(sub / "a_train.jsonl", [{"ask": "r"} | ANSWERS])
    entry = {"ranking": True, "columns": ALPACA, "file_name": "sub", "split": "test"}
    assert [row["ask"] for row in load_rows(folder([], entry))] == ["t"]
    assert [row["ask"] for row in load_rows(folder([], entry) + "#train")] == ["r"]


def test_a_hub_entry_says_what_to_load(folder, monkeypatch):
    import datasets

    asked = {}
    monkeypatch.setattr(
        datasets, "load_dataset", lambda **options: asked.update(options) or Dataset.from_list([TEXT])
    )
    entry = {"hf_hub_url": "org/name", "subset": "en", "split": "test", "revision": "r", "folder": "f"}
    load_rows(folder([], entry | {"ranking": True}))
    assert asked == {"path": "org/name", "name": "en", "split": "test", "revision": "r", "data_dir": "f"}


@pytest.mark.parametrize(
    "entry, message",
    [
        ({}, "neither ranking: true nor a kto_tag column"),
        ({"ranking": True, "columns": ALPACA | {"kto_tag": "x"}}, "both ranking and a kto_tag"),
        ({"ranking": True, "formatting": "chat"}, "formatting 'chat' is not one of alpaca, sharegpt, openai"),
        (
            {"ranking": True, "columns": ALPACA | {"videos": "i"}},
            "it has videos; sound and video are not read",
        ),
        ({"ranking": True, "num_samples": 5}, r"num_samples is not read .*#\[:5\]"),
        ({"ranking": True, "file_name": "gone.json"}, "gone.json' does not exist"),
    ],
)
def test_entries_that_cannot_be_read(folder, entry, message):
    with pytest.raises(DataError, match=message):
        load_rows(folder([TEXT], entry))


def test_entries_from_elsewhere(folder, tmp_path):
    spec = folder([TEXT], {"ranking": True})
    (tmp_path / "dataset_info.json").write_text(json.dumps({"set": {"script_url": "x", "ranking": True}}))
    with pytest.raises(DataError, match="script_url is not read; download it"):
        load_rows(spec)


def test_names_that_are_not_listed(folder, tmp_path):
    folder([TEXT], {"ranking": True})
    with pytest.raises(DataError, match=r"has no .sett.\. Did you mean .set.\? It lists set, other"):
        load_rows(f"{tmp_path}:sett")
    with pytest.raises(DataError, match=f"name one of its data sets: {tmp_path}:set, {tmp_path}:other"):
        load_rows(str(tmp_path))
    with pytest.raises(DataError, match="says how to read the rows; remove data_format"):
        load_rows(f"{tmp_path}:set", "alpaca")
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(DataError, match=r"cannot read .*dataset_info\.json"):
        load_rows(f"{tmp_path}:set")


def test_datasets_own_dataset_info_is_another_thing(tmp_path):
    Dataset.from_list([TEXT]).save_to_disk(tmp_path / "saved")
    assert os.path.exists(tmp_path / "saved/dataset_info.json")
    assert list(load_rows(str(tmp_path / "saved"))) == [TEXT]
    write_lines(tmp_path / "d.jsonl", [TEXT])
    (tmp_path / "dataset_info.json").write_text(json.dumps({"default": {"features": {}}, "version": "1"}))
    with pytest.raises(DataError, match="does not exist here"):
        load_rows(f"{tmp_path}:default")
