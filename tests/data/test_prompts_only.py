"""Rows of a prompt alone: as rounds read them, the prompt is the very one of the row with responses; nowhere
else are they read."""

import io

import pytest
from rich.console import Console

from fastdpo.cli import main
from fastdpo.config.keys import from_values
from fastdpo.data.groups import Limits, to_group
from fastdpo.data.load import load_groups
from fastdpo.data.report import RowProblem
from fastdpo.data.rows import parse_row
from fastdpo.data.show import show
from fastdpo.data.store.facts import Facts
from fastdpo.errors import DataError
from fastdpo.training.job import job_of
from tests.data.shared_data import (
    WIDE,
    assistant,
    check,
    decode,
    small_tokenizer,
    text_row,
    user,
    write_lines,
)
from tests.data.test_formats import JUDGED, PAIRED, RANKED
from tests.data.test_templates import TEMPLATES, row_of, tokenizer_of
from tests.tiny import save_model

ASKED, GOLD = [user("good?")], [assistant("gold")]
LONGER = [user("hi"), assistant("yo"), user("good?")]
SYSTEM = {"role": "system", "content": "S"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
ALONE = {  # row -> its prompt
    "text": ({"prompt": "good "}, "good "),
    "messages in prompt": ({"prompt": LONGER}, LONGER),
    "null responses": ({"prompt": "good", "chosen": None, "rejected": None}, "good"),
    "with what a scorer reads": ({"prompt": "good", "answer": "4", "label": "4"}, "good"),
    "text beside a system column": ({"prompt": "good?", "system": "S"}, [SYSTEM, *ASKED]),
    "messages": ({"messages": LONGER}, LONGER),
    "messages after a tool's": (
        {"messages": [*ASKED, CALL, {"role": "tool", "content": "9"}]},
        [
            *ASKED,
            CALL | {"tool_calls": [{"type": "function", "function": CALL["tool_calls"][0]["function"]}]},
            {"role": "tool", "content": "9"},
        ],
    ),
    "sharegpt": ({"conversations": [{"from": "human", "value": "good?"}], "system": "S"}, [SYSTEM, *ASKED]),
    "alpaca": (
        {"instruction": "good", "input": "gold", "history": [["hi", "yo"]]},
        [*LONGER[:2], user("good\ngold")],
    ),
    "question": ({"question": "good?"}, ASKED),
    "input": ({"input": "good?"}, ASKED),
    "openai": ({"input": {"messages": ASKED}}, ASKED),
    "nemo": ({"context": ASKED}, ASKED),
}
ANSWERED = {  # row -> its prompt and its answer
    "text": ({"prompt": "good", "completion": " gold"}, "good", " gold"),
    "messages": ({"prompt": ASKED, "completion": GOLD}, ASKED, GOLD),
    "whole": ({"messages": LONGER + GOLD}, LONGER, GOLD),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "good?"}, {"from": "gpt", "value": "gold"}]},
        ASKED,
        GOLD,
    ),
    "alpaca": ({"instruction": "good?", "input": "", "output": "gold"}, ASKED, GOLD),
}


def read(tmp_path, rows, limits=WIDE, tokenizer=None, **how):
    console = Console(file=io.StringIO(), width=200)
    how = dict(strict=False, console=console, prompts_only=True) | how
    spec = write_lines(tmp_path / "rows.jsonl", rows)
    return *load_groups(spec, tokenizer or small_tokenizer(), limits, **how), console


@pytest.mark.parametrize("name", ALONE)
def test_a_prompt_alone(name):
    given, prompt = ALONE[name]
    row = parse_row(given, 3, prompts_only=True)
    assert (row.format, row.prompt, row.responses, row.pairs) == ("prompt_only", prompt, (), ())
    with pytest.raises(RowProblem, match=r"or with rounds a prompt alone|its last turn must be"):
        parse_row(given, 3)


@pytest.mark.parametrize("name", ANSWERED)
def test_a_prompt_and_an_answer_which_resets_begin_with(name):
    given, prompt, answer = ANSWERED[name]
    row = parse_row(given, 3, prompts_only=True)
    assert (row.format, row.prompt, row.responses) == ("prompt_completion", prompt, (answer,))
    assert row.pairs == () and row.label is None
    with pytest.raises(RowProblem):
        parse_row(given, 3)
    group, _ = to_group(given, 3, small_tokenizer(), WIDE, prompts_only=True)
    assert group.chosen == (0,) and Facts.of([group]).resettable.tolist() == [True]


def test_rows_with_judged_responses_stay_as_they_are():
    for _, row, *_ in (*PAIRED.values(), *RANKED.values(), *((name, row) for name, row in JUDGED.items())):
        assert parse_row(row, 3, prompts_only=True) == parse_row(row, 3)


def test_what_is_no_prompt_alone():
    for given, said in (
        ({"prompt": "good", "messages": ASKED}, r"prompts in several columns \(prompt, messages\); say in"),
        ({"prompt": [*ASKED, *GOLD]}, "it ends with an assistant turn"),
        ({"prompt": " "}, "there is none"),
        ({"prompt": "good", "chosen": "gold"}, "rejected: the column is missing"),
        ({"prompt": "good", "responses": []}, "two at least"),
        ({"text": "good"}, "the column is missing"),
    ):
        with pytest.raises(RowProblem, match=said):
            parse_row(given, 0, prompts_only=True)


@pytest.mark.parametrize("named", ["prompt_only", "prompt_completion"])
def test_the_formats_by_their_names(tmp_path, named):
    rows = [{"messages": LONGER + GOLD}] if named == "prompt_completion" else [{"messages": LONGER}]
    groups, report, _ = read(tmp_path, rows, data_format=named)
    assert report.formats == {named: 1} and len(groups) == 1
    with pytest.raises(DataError, match=f"{named} rows are read with rounds, which answer them"):
        read(tmp_path, rows, data_format=named, prompts_only=False)


def test_columns_of_other_names(tmp_path):
    rows = [{"ask": "good", "prompt": "x", "chosen": "y", "rejected": "z"}]
    groups, _, _ = read(tmp_path, rows, data_format={"prompt": "ask"})
    assert decode(small_tokenizer(), groups[0].prompt) == "<s>good"


def prompt_of(row):
    return {name: value for name, value in row.items() if name not in ("chosen", "rejected")}


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("prompt", ["good", "good\n", "<s>good wor", "world,"])
def test_text_has_the_prompt_of_the_row_with_responses_and_eos(bos, prompt):
    tokenizer, row = small_tokenizer(bos=bos), text_row(prompt)
    group, notes = to_group(prompt_of(row), 5, tokenizer, WIDE, prompts_only=True)
    check(group)
    assert group.row == 5 and group.pairs == () and notes["prompt_only"] == 1
    assert group.prompt.tolist() == to_group(row, 5, tokenizer, WIDE)[0].prompt.tolist()
    (response,) = group.responses
    assert response.ids.tolist() == [tokenizer.eos_token_id] and response.score is None
    assert Facts.of([group]).resettable.tolist() == [False]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_has_the_prompt_of_the_row_with_responses_and_its_end_of_turn(name):
    """Under every template of the corpus; where one prints the prompt otherwise before an answer, it is the
    prompt as printed for generation."""
    tokenizer = tokenizer_of(TEMPLATES[name], name)
    for conversation in TEMPLATES[name].table:
        row = row_of(name, conversation)
        try:
            whole, noted = to_group(row, 0, tokenizer, WIDE)
            group, _ = to_group(prompt_of(row), 0, tokenizer, WIDE, prompts_only=True)
        except RowProblem:
            continue
        check(group)
        (response,) = group.responses
        assert len(response.ids) == 1
        if not noted["no_end_of_turn"]:
            assert response.ids[0] in [some.ids[-1] for some in whole.responses], conversation
        if noted["template_not_prefix"]:
            told = {"tools": row.get("tools"), "tokenize": False, **row["chat_template_kwargs"]}
            opened = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **told)
            assert decode(tokenizer, group.prompt) == opened
        else:
            assert group.prompt.tolist() == whole.prompt.tolist(), conversation


def test_a_prompt_beyond_max_length(tmp_path):
    groups, report, _ = read(tmp_path, [{"prompt": "good " * 9}, {"prompt": "good"}], Limits(8))
    assert report.dropped["prompt_too_long"].examples == [0] and len(groups) == 1
    kept, _, _ = read(tmp_path, [{"prompt": "good " * 9}], Limits(8, "keep_end"))
    assert len(kept[0].prompt) == 7 and kept[0].prompt[0] == small_tokenizer().bos_token_id


def test_the_account_and_what_is_shown(tmp_path):
    rows = [{"prompt": "good"}, {"messages": ASKED}, {"prompt": "good", "completion": " gold"}, text_row()]
    groups, report, console = read(tmp_path, rows)
    assert (report.notes["prompt_only"].rows, report.notes["prompt_only"].examples) == (2, [0, 1])
    told = report.to_dict()
    assert (told["groups"], told["responses"], told["pairs"], told["paired_rows"]) == (4, 3, 1, 1)
    whole = [sum(len(r.ids) for r in group.responses) for group in groups]
    assert told["response_tokens"] == told["scored_tokens"] == sum(whole) - 2
    show(groups, report, small_tokenizer(), console)
    said = console.file.getvalue()
    assert "rows of a prompt alone" in said and "row 1, decoded: prompt_only, messages" in said
    assert "prompt only: responses are sampled, and <|im_end|> ends one" in said
    assert "and </s> ends one" in said and said.count("response 0 (chosen)") == 2


def test_an_image_in_a_prompt_alone(tmp_path):
    from fastdpo.data.images.reader import ImageReader
    from tests.images import picture, processor

    picture(0).save(tmp_path / "0.png")
    images, row = ImageReader(processor("llava")), {"prompt": "cat", "image": str(tmp_path / "0.png")}
    pair = row | {"chosen": " red", "rejected": " blue"}
    how = dict(tokenizer=images.processor.tokenizer, limits=Limits(512), images=images, folder=tmp_path)
    alone = to_group(row, 0, **how, prompts_only=True)[0]
    assert alone.prompt.tolist() == to_group(pair, 0, **how)[0].prompt.tolist() and len(alone.images) == 1
    groups, _, _ = read(tmp_path, [row], Limits(512), images.processor.tokenizer, images=images)
    assert groups[0].images[0].open().tobytes() == picture(0).tobytes()


def test_they_are_read_where_rounds_are_set():
    keys = {"model": "m", "data": "rows.jsonl"}
    rounds = keys | {"rounds": 2, "reward": "length"}
    assert [job_of(from_values(some)).data.prompts_only for some in (keys, rounds)] == [False, True]


def test_tokens_of_other_rounds_are_not_taken(tmp_path):
    """What is kept on disk for a training on pairs lacks the prompts alone."""
    rows, cache = [text_row(), {"prompt": "good"}], str(tmp_path / "cache")
    for prompts_only, kept in ((False, 1), (True, 2), (False, 1), (True, 2)):
        assert len(read(tmp_path, rows, data_cache=cache, prompts_only=prompts_only)[0]) == kept


def test_the_command_reads_them_where_rounds_are_set(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "m")
    data = write_lines(tmp_path / "rows.jsonl", [{"messages": ASKED}])
    words = ["data", "--model", str(tmp_path / "m"), "--data", data, "--data_cache", "off"]
    assert main([*words, "--rounds", "2", "--reward", "length"]) == 0
    assert "prompt only: responses are sampled" in capsys.readouterr().out
    assert main(words) == 1
    assert "or with rounds a prompt alone" in capsys.readouterr().err
