"""The formats and the faults of rows that parse_row knows."""

import json

import pytest

from fastdpo.data.rows import RowProblem, parse_row
from fastdpo.data.sources import load_rows
from tests.data.shared_data import DATA, assistant, needs_shared, ranked_row, user

TEXT = {"prompt": "Say hi.", "chosen": " Hi!", "rejected": " No."}
CHAT = {"prompt": [user("Say hi.")], "chosen": [assistant("Hi!")], "rejected": [assistant("No.")]}
RANKED = {
    "prompt": "Say hi.",
    "responses": [{"text": t, "score": s} for t, s in zip("abc", (2, 1, 1))],
}


# ---- formats


def test_explicit_text():
    row = parse_row(TEXT, 7)
    assert (row.number, row.prompt, row.responses) == (7, "Say hi.", (" Hi!", " No."))
    assert (row.pairs, row.scores, row.ties) == (((0, 1),), (None, None), 0)


def test_explicit_messages():
    row = parse_row(CHAT, 0)
    assert row.prompt == CHAT["prompt"]
    assert row.responses == (CHAT["chosen"], CHAT["rejected"])


def test_ultrafeedback_binarized():
    row = {
        "prompt": "Say hi.",
        "chosen": [user("Say hi."), assistant("Hi!")],
        "rejected": [user("Say hi."), assistant("No.")],
        "score_chosen": 8.5,
        "score_rejected": 3,
    }
    parsed = parse_row(row, 0)
    assert parsed.prompt == [user("Say hi.")]
    assert parsed.responses == ([assistant("Hi!")], [assistant("No.")])
    assert parsed.scores == (8.5, 3.0)


def test_text_prompt_beside_answers_as_messages():
    parsed = parse_row({**CHAT, "prompt": "Say hi."}, 0)
    assert parsed.prompt == [user("Say hi.")] and parsed.responses == (
        CHAT["chosen"],
        CHAT["rejected"],
    )


def test_implicit_messages_share_their_first_turns():
    turns = [user("a"), assistant("b"), user("c")]
    row = {"chosen": [*turns, assistant("d")], "rejected": [*turns, assistant("e"), user("f")]}
    parsed = parse_row(row, 0)
    assert parsed.prompt == turns
    assert parsed.responses == ([assistant("d")], [assistant("e"), user("f")])


def test_implicit_messages_one_the_beginning_of_the_other():
    longer = [user("a"), assistant("b"), user("c"), assistant("d")]
    parsed = parse_row({"chosen": longer, "rejected": longer[:2]}, 0)
    assert parsed.prompt == [user("a")]
    assert parsed.responses == (longer[1:], [assistant("b")])


@pytest.mark.peer
@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("The sky is blue.", "The sky is green."),  # the space goes to the responses
        ("Q: x\nA: yes", "Q: x\nA: no"),
        ("Q: x\nA: yes  b", "Q: x\nA: yes  c"),
        ("Q: x\n\nyes", "Q: x\n\nno"),  # a line's end stays
        ("ab cd", "ab ef"),
    ],
)
def test_implicit_text_is_split_as_trl_does(chosen, rejected):
    from trl import extract_prompt

    expected = extract_prompt({"chosen": chosen, "rejected": rejected})
    parsed = parse_row({"chosen": chosen, "rejected": rejected}, 0)
    assert parsed.prompt == expected["prompt"]
    assert parsed.responses == (expected["chosen"], expected["rejected"])


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is black.", "The sky is"),  # TRL: "The sky is bl"
        ("The cat sat.", "The car sat.", "The"),
        ("the car is", "the cars are", "the"),
        ("Q: x\nA: yes", "Q: x\nA: yes, indeed", "Q: x\nA:"),  # one begins the other
    ],
)
def test_implicit_text_is_never_split_inside_a_word(chosen, rejected, prompt):
    parsed = parse_row({"chosen": chosen, "rejected": rejected}, 0)
    assert parsed.prompt == prompt
    assert parsed.responses == (chosen[len(prompt) :], rejected[len(prompt) :])


def test_ranked_gives_every_pair_with_a_difference():
    parsed = parse_row(RANKED, 0)
    assert parsed.pairs == ((0, 1), (0, 2)) and parsed.ties == 1
    assert parsed.scores == (2.0, 1.0, 1.0) and parsed.responses == ("a", "b", "c")


def test_ranked_in_any_order():
    responses = [{"text": t, "score": s} for t, s in zip("abcd", (0.5, 3, -1, 3))]
    parsed = parse_row({"prompt": "p", "responses": responses}, 0)
    assert set(parsed.pairs) == {(0, 2), (1, 0), (1, 2), (3, 0), (3, 2)} and parsed.ties == 1


def test_ranked_text_after_a_conversation_is_one_assistant_turn():
    responses = [{"text": "b", "score": 1}, {"text": [assistant("c")], "score": 0}]
    parsed = parse_row({"prompt": [user("a")], "responses": responses}, 0)
    assert parsed.responses == ([assistant("b")], [assistant("c")])


def test_tools_and_template_arguments_pass_through():
    tools = [{"type": "function", "function": {"name": "f"}}]
    for given in (tools, json.dumps(tools)):
        row = parse_row({**CHAT, "tools": given, "chat_template_kwargs": {"x": 1}}, 0)
        assert row.tools == tools
        assert row.chat_template_kwargs == {"x": 1}
    assert parse_row({**CHAT, "tools": []}, 0).tools is None


def test_nulls_of_a_message_are_absent_keys():
    turn = {**assistant("Hi!"), "tool_calls": None}
    assert parse_row({**CHAT, "chosen": [turn], "tools": None}, 0).responses[0] == [assistant("Hi!")]


def test_a_tool_call_needs_no_content():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    parsed = parse_row({**CHAT, "chosen": [call]}, 0)
    assert parsed.responses[0][0]["content"] == "" and parsed.responses[0][0]["tool_calls"]


# ---- faults: (row, reason, field, part of the message)

FAULTS = {
    "no columns": ({"text": "x"}, "missing_column", "chosen", "has: text"),
    "no rejected": ({"prompt": "p", "chosen": "c"}, "missing_column", "rejected", "missing or null"),
    "spaces": (
        {"prompt": "p", " chosen": "c", "rejected ": "r"},
        "missing_column",
        "chosen",
        "' chosen', 'rej",
    ),
    "null chosen": ({**TEXT, "chosen": None}, "missing_column", "chosen", "missing or null"),
    "not an object": ([1], "wrong_type", "row", "JSON object"),
    "number": ({**TEXT, "chosen": 5}, "wrong_type", "chosen", "int '5'"),
    "number prompt": ({**TEXT, "prompt": 5}, "wrong_type", "prompt", "int '5'"),
    "mixed": ({**TEXT, "chosen": [assistant("x")]}, "wrong_type", "rejected", "all text or all messages"),
    "message as text": ({**CHAT, "chosen": ["Hi!"]}, "wrong_type", "chosen[0]", "role and a content"),
    "content a list": (
        {**CHAT, "rejected": [{"role": "assistant", "content": {"type": "text"}}]},
        "wrong_type",
        "rejected[0].content",
        "text, not dict",
    ),
    "no content": ({**CHAT, "chosen": [{"role": "tool"}]}, "wrong_type", "chosen[0].content", "nothing"),
    "role": (
        {**CHAT, "prompt": [{"role": "robot", "content": "x"}]},
        "unknown_role",
        "prompt[0].role",
        "known are system",
    ),
    "starts with user": ({**CHAT, "chosen": [user("x")]}, "response_start", "chosen", "leave out the prompt"),
    "ends with assistant": (
        {**CHAT, "prompt": [user("x"), assistant("y")]},
        "prompt_end",
        "prompt",
        "ends with an assistant turn",
    ),
    "empty prompt": ({**TEXT, "prompt": " \n"}, "empty_prompt", "prompt", "white space"),
    "no turns": ({**CHAT, "prompt": []}, "empty_prompt", "prompt", "no turn"),
    "nothing in common": ({"chosen": "abc", "rejected": "xyz"}, "empty_prompt", "prompt", "none"),
    "empty text": ({**TEXT, "rejected": ""}, "empty_response", "rejected", "no text"),
    "empty list": ({**CHAT, "rejected": []}, "empty_response", "rejected", "no text"),
    "empty turn": ({**CHAT, "chosen": [assistant(" ")]}, "empty_response", "chosen", "no text"),
    "identical text": ({**TEXT, "rejected": " Hi!"}, "identical", "chosen and rejected", "same"),
    "identical turns": ({**CHAT, "rejected": CHAT["chosen"]}, "identical", "chosen and rejected", "same"),
    "identical implicit": ({"chosen": "a b", "rejected": "a b"}, "identical", "chosen and rejected", "same"),
    "another prompt": (
        {
            "prompt": "q",
            "chosen": [user("p"), assistant("a")],
            "rejected": [user("p"), assistant("b")],
        },
        "prompt_mismatch",
        "prompt",
        "none of the turns",
    ),
    "ranked without prompt": ({"responses": RANKED["responses"]}, "missing_column", "prompt", "missing"),
    "ranked no list": ({**RANKED, "responses": "x"}, "wrong_type", "responses", "list of"),
    "ranked texts": ({**RANKED, "responses": ["a", "b"]}, "wrong_type", "responses[0]", "text and score"),
    "ranked one": (
        {**RANKED, "responses": RANKED["responses"][:1]},
        "too_few_responses",
        "responses",
        "got 1",
    ),
    "ranked ties": ({**RANKED, "responses": RANKED["responses"][1:]}, "no_pair", "responses", "equal"),
    "ranked no score": (
        {**RANKED, "responses": [{"text": "a", "score": 1}, {"text": "b"}]},
        "missing_column",
        "responses[1].score",
        "missing",
    ),
    "huge": ({**TEXT, "score_chosen": 10**400}, "nan_score", "score_chosen", "a finite number, not 1000"),
    "ranked NaN": (ranked_row(("a", 1), ("b", float("nan"))), "nan_score", "responses[1].score", "nan"),
    "ranked text score": (ranked_row(("a", "1"), ("b", 0)), "wrong_type", "responses[0].score", "a number"),
    "ranked true": (ranked_row(("a", True), ("b", 0)), "wrong_type", "responses[0].score", "a number"),
    "ranked duplicates": (
        {**RANKED, "responses": [{"text": "a", "score": 1}, {"text": "a", "score": 0}]},
        "identical",
        "responses[0].text and responses[1].text",
        "same",
    ),
    "tools": ({**CHAT, "tools": "{"}, "wrong_type", "tools", "not JSON"),
    "tools object": ({**CHAT, "tools": {"a": 1}}, "wrong_type", "tools", "a list"),
    "arguments": ({**CHAT, "chat_template_kwargs": "x"}, "wrong_type", "chat_template_kwargs", "object"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults(name):
    row, reason, field, part = FAULTS[name]
    with pytest.raises(RowProblem) as caught:
        parse_row(row, 3)
    problem = caught.value
    assert (problem.reason, problem.field) == (reason, field)
    assert part in problem.message and str(problem) == f"{field}: {problem.message}"


@needs_shared
def test_every_shared_row_is_known():
    files = ("pref/hh_rlhf_test.jsonl", "ranked/ranked_responses.jsonl")
    for file, count, pairs in zip(files, (500, 464), (500, 12627)):
        rows = [parse_row(row, i) for i, row in enumerate(load_rows(str(DATA / file)))]
        assert len(rows) == count and sum(len(row.pairs) for row in rows) == pairs
