"""Rows of other tools that cannot be read: columns that fit several formats or none, and wrong values."""

import pytest

from fastdpo.data.rows import RowProblem, parse_row
from tests.data.shared_data import text_row
from tests.data.test_formats import ASKED, GOLD, OLD, PAIR, RANKED, system, user

CLASHES = {
    "two questions": ({"prompt": "p", "question": "q"} | PAIR, ("trl", "intel")),
    "prompt and instruction": ({"prompt": "p", "instruction": "q"} | PAIR, ("trl", "alpaca")),
    "prompt and messages": ({"prompt": "p", "messages": ASKED} | PAIR, ("trl", "messages")),
    "messages that are not the conversation": (
        {"messages": [user("other")], "chosen": ASKED + GOLD, "rejected": ASKED + OLD},
        ("trl", "messages"),
    ),
    "argilla and aligner": (
        {"prompt": "p", "instruction": "q", "chosen_response": "a", "rejected_response": "b"},
        ("argilla", "nemo_aligner"),
    ),
    "two ranked ones": (
        {"prompt": "p", "answers": [], "responses": []},
        ("ranked", "nectar"),
    ),
}


@pytest.mark.parametrize("name", CLASHES)
def test_ambiguous_columns_are_an_error_that_names_the_formats(name):
    row, formats = CLASHES[name]
    with pytest.raises(RowProblem) as caught:
        parse_row(row, 0)
    assert caught.value.reason == "ambiguous_row"
    assert f"fit the formats {' and '.join(formats)}: name one in data_format" in caught.value.message


@pytest.mark.parametrize(
    "more",
    [
        {"question": "x"},
        {"messages": ASKED + GOLD},
        {"messages": ASKED},
        {"conversation": []},
        {"input": "x"},
    ],
)
def test_whole_conversations_hold_the_question(more):
    """So other columns that repeat it (ultrafeedback_binarized, orpo-dpo-mix) make nothing ambiguous."""
    row = {"chosen": ASKED + GOLD, "rejected": ASKED + OLD}
    for prompt in ({}, {"prompt": "good?"}):
        parsed = parse_row(row | more | prompt, 0)
        assert (parsed.format, parsed.prompt, parsed.responses) == ("trl", ASKED, (GOLD, OLD))


FAULTS = {
    "no format": ({"context": "c"} | PAIR, "unknown_format", "row", "together (context, chosen, rejected)"),
    "history beside TRL's": (
        text_row() | {"history": [["a", "b"]]},
        "unknown_format",
        "row",
        "say in data_format",
    ),
    "system without prompt": ({"system": "S"} | PAIR, "unknown_format", "row", "system"),
    "two system prompts": (
        {"system": "S", "prompt": [system("T"), *ASKED]} | PAIR,
        "ambiguous_row",
        "system",
        "another system prompt",
    ),
    "system a list": ({"system": ["S"], "question": "q"} | PAIR, "wrong_type", "system", "text"),
    "question a list": ({"question": ["q"]} | PAIR, "wrong_type", "question", "text"),
    "no question": ({"question": " "} | PAIR, "empty_prompt", "question", "no turn"),
    "no instruction": (
        {"instruction": None, "chosen_response": "a"},
        "missing_column",
        "chosen",
        "or another known format",
    ),
    "role": (
        {"conversations": [{"from": "robot", "value": "x"}]} | PAIR,
        "unknown_role",
        "conversations[0].from",
        "'robot'; known are",
    ),
    "no role": ({"messages": [{"content": "x"}]} | PAIR, "wrong_type", "messages[0]", "role or from"),
    "two roles": (
        {"messages": [{"role": "user", "from": "gpt"}]} | PAIR,
        "ambiguous_row",
        "messages[0]",
        "both",
    ),
    "a text in a list": ({"messages": ["x"]} | PAIR, "wrong_type", "messages[0]", "a message"),
    "a number": ({"messages": 5} | PAIR, "wrong_type", "messages", "list of messages"),
    "call that is no JSON": (
        {"conversations": [{"from": "function_call", "value": "{"}]} | PAIR,
        "wrong_type",
        "conversations[0].value",
        "must be JSON",
    ),
    "call without name": (
        {"conversations": [{"from": "function_call", "value": "{}"}]} | PAIR,
        "wrong_type",
        "conversations[0].value",
        "a name and arguments",
    ),
    "swift without answer": (
        {"messages": ASKED, "rejected_response": "a"},
        "prompt_end",
        "messages",
        "last turn",
    ),
    "swift both": (
        {"messages": ASKED + GOLD, "rejected_response": "a", "rejected_messages": ASKED + OLD},
        "ambiguous_row",
        "rejected_messages",
        "leave one out",
    ),
    "ends with the assistant": (
        {"messages": ASKED + GOLD} | PAIR,
        "prompt_end",
        "messages",
        "assistant turn",
    ),
    "empty conversations": ({"conversations": []} | PAIR, "empty_prompt", "conversations", "no turn"),
    "nectar's open end": (
        RANKED["nectar"][1] | {"prompt": "\n\nHuman: hi"},
        "prompt_end",
        "prompt",
        "open Assistant",
    ),
    "nectar without rank": (
        {"prompt": "p", "answers": [{"answer": "a", "rank": 1}, {"answer": "b"}]},
        "missing_column",
        "answers[1].rank",
        "missing",
    ),
    "rank in words": (
        {"prompt": "p", "answers": [{"answer": "a", "rank": "1"}, {"answer": "b", "rank": 2}]},
        "wrong_type",
        "answers[0].rank",
        "a number",
    ),
    "nemo alone": ({"context": ASKED, "completions": []}, "too_few_responses", "completions", "got 0"),
    "ultrafeedback without score": (
        {"instruction": "i", "completions": [{"response": "a", "overall_score": None}]},
        "missing_column",
        "completions[0].overall_score",
        "missing or null",
    ),
    "openai's input": (
        {"input": "x", "preferred_output": GOLD, "non_preferred_output": OLD},
        "wrong_type",
        "input",
        "an object with messages",
    ),
    "history": (
        {"instruction": "i", "history": [["a"]]} | PAIR,
        "wrong_type",
        "history[0]",
        "[question, answer]",
    ),
}


def test_a_prompt_column_beside_whole_conversations_settles_it():
    row = {"prompt": "good?", "messages": [user("other")]}
    assert parse_row(row | {"chosen": ASKED + GOLD, "rejected": ASKED + OLD}, 0).format == "trl"


@pytest.mark.parametrize("name", FAULTS)
def test_faults(name):
    row, reason, field, part = FAULTS[name]
    with pytest.raises(RowProblem) as caught:
        parse_row(row, 0)
    assert (caught.value.reason, caught.value.field) == (reason, field)
    assert part in caught.value.message
