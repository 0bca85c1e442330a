"""Rows of other tools: how each format is told by its columns, and what it becomes."""

import json

import pytest

from fastdpo.data.formats.known import FORMATS, detect
from fastdpo.data.formats.layouts import layout_of
from fastdpo.data.rows import RowProblem, parse_row
from tests.data.shared_data import assistant, chat_row, text_row, user


def system(text):
    return {"role": "system", "content": text}


def gpt(text):
    return {"from": "gpt", "value": text}


PAIR = {"chosen": "gold", "rejected": "old"}
ASKED, GOLD, OLD = [user("good?")], [assistant("gold")], [assistant("old")]
LONGER = [user("hi"), assistant("yo"), user("good?")]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOLS = [{"type": "function", "function": {"name": "f"}}]
SHAREGPT = [{"from": "human", "value": "hi"}, gpt("yo"), {"from": "human", "value": "good?"}]

# (format, row, prompt, chosen, rejected)
PAIRED = {
    "trl text": ("trl", text_row(), "good", " morning", " old world"),
    "trl messages": ("trl", chat_row(), ASKED, GOLD, OLD),
    "argilla_chat": ("trl", {"chosen": LONGER + GOLD, "rejected": LONGER + OLD}, LONGER, GOLD, OLD),
    "ultra": (
        "ultra",
        {"system": "S", "prompt": "good?", "chosen": ASKED + GOLD, "rejected": ASKED + OLD},
        [system("S"), *ASKED],
        GOLD,
        OLD,
    ),
    "prompt_pairs": (
        "prompt_pairs",
        {"system": "S", "prompt": "good?"} | PAIR,
        [system("S"), *ASKED],
        GOLD,
        OLD,
    ),
    "prompt_pairs, null system": (
        "prompt_pairs",
        {"system": None, "prompt": "good?"} | PAIR,
        ASKED,
        GOLD,
        OLD,
    ),
    "system beside messages": (
        "prompt_pairs",
        {"system": "S"} | chat_row(),
        [system("S"), *ASKED],
        GOLD,
        OLD,
    ),
    "intel": ("intel", {"system": "S", "question": "good?"} | PAIR, [system("S"), *ASKED], GOLD, OLD),
    "icr": ("icr", {"system": "", "input": "good?", "generations": []} | PAIR, ASKED, GOLD, OLD),
    "argilla": (
        "argilla",
        {"instruction": "good?", "chosen_response": "gold", "rejected_response": "old"},
        ASKED,
        GOLD,
        OLD,
    ),
    "chat_template": (
        "messages",
        {"messages": LONGER, "chosen": GOLD[0], "rejected": OLD[0]},
        LONGER,
        GOLD,
        OLD,
    ),
    "messages, lists": ("messages", {"messages": LONGER, "chosen": GOLD, "rejected": OLD}, LONGER, GOLD, OLD),
    "messages, text": ("messages", {"messages": "good?"} | PAIR, ASKED, GOLD, OLD),
    "alpaca": ("alpaca", {"instruction": "good?", "input": ""} | PAIR, ASKED, GOLD, OLD),
    "alpaca, all": (
        "alpaca",
        {"instruction": "a", "input": "b", "history": [["hi", "yo"]], "system": "S"} | PAIR,
        [system("S"), user("hi"), assistant("yo"), user("a\nb")],
        GOLD,
        OLD,
    ),
    "sharegpt": (
        "sharegpt",
        {"conversations": SHAREGPT, "chosen": gpt("gold"), "rejected": gpt("old"), "system": "S"},
        [system("S"), *LONGER],
        GOLD,
        OLD,
    ),
    "swift": ("swift", {"messages": LONGER + GOLD, "rejected_response": "old"}, LONGER, GOLD, OLD),
    "swift, messages": (
        "swift",
        {"messages": LONGER + GOLD, "rejected_messages": [user("hi"), assistant("no"), user("good?"), *OLD]},
        [user("hi")],
        [assistant("yo"), user("good?"), *GOLD],
        [assistant("no"), user("good?"), *OLD],
    ),
    "nemo_aligner": (
        "nemo_aligner",
        {"prompt": "<user>good?<bot>", "chosen_response": "gold", "rejected_response": "old"},
        "<user>good?<bot>",
        "gold",
        "old",
    ),
    "openai": (
        "openai",
        {"input": {"messages": LONGER}, "preferred_output": GOLD, "non_preferred_output": OLD},
        LONGER,
        GOLD,
        OLD,
    ),
}


@pytest.mark.parametrize("name", PAIRED)
def test_paired(name):
    format, row, prompt, chosen, rejected = PAIRED[name]
    parsed = parse_row(row, 3)
    assert (parsed.format, parsed.prompt) == (format, prompt)
    assert parsed.responses == (chosen, rejected) and parsed.pairs == ((0, 1),)


# (format, row, prompt, [(response, score), ...]): one turn each
RANKED = {
    "ranked": (
        "ranked",
        {"prompt": "good", "responses": [{"text": " a", "score": 1}, {"text": " b", "score": 2}]},
        "good",
        [(" a", 1), (" b", 2)],
    ),
    "nectar": (
        "nectar",
        {
            "prompt": "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: good?\n\nAssistant: ",
            "answers": [{"answer": "gold", "rank": 1, "model": "m"}, {"answer": "old", "rank": 7}],
            "turns": 2,
        },
        LONGER,
        [("gold", -1), ("old", -7)],
    ),
    "nectar, bare": (
        "nectar",
        {"prompt": "good?", "answers": [{"answer": "gold", "rank": 2.5}, {"answer": "old", "rank": 3}]},
        ASKED,
        [("gold", -2.5), ("old", -3)],
    ),
    "nemo": (
        "nemo",
        {
            "context": LONGER,
            "completions": [{"rank": 1, "completion": OLD}, {"rank": 0, "completion": GOLD}],
            "task_name": "x",
        },
        LONGER,
        [("old", -1), ("gold", 0)],
    ),
    "ultrafeedback": (
        "ultrafeedback",
        {
            "instruction": "good?",
            "completions": [
                {"response": "old", "overall_score": 4.0, "fine-grained_score": 4.5, "critique": "x"},
                {"response": "gold", "overall_score": 8.5, "fine-grained_score": 3.5},
                {"response": "mid", "overall_score": 4.0, "fine-grained_score": 3.5},
            ],
            "correct_answers": ["x"],
        },
        ASKED,
        [("old", 4), ("gold", 8.5), ("mid", 4)],
    ),
}


@pytest.mark.parametrize("name", RANKED)
def test_ranked(name):
    format, row, prompt, answers = RANKED[name]
    parsed = parse_row(row, 0)
    assert (parsed.format, parsed.prompt) == (format, prompt)
    said = [r if isinstance(r, str) else r[0]["content"] for r in parsed.responses]
    assert list(zip(said, parsed.scores)) == answers
    better = {(said[i], said[j]) for i, j in parsed.pairs}
    assert better == {(a, b) for a, s in answers for b, t in answers if s > t}
    assert all(isinstance(r, str) or r[0]["role"] == "assistant" for r in parsed.responses)


JUDGED = {
    "trl_unpaired": {"prompt": [user("good?")], "completion": "gold", "label": True},
    "alpaca_kto": {"instruction": "good?", "input": "", "output": "gold", "kto_tag": True},
    "messages_kto": {"messages": ASKED + GOLD, "label": True},
    "sharegpt_kto": {"conversations": [{"from": "human", "value": "good?"}, gpt("gold")], "kto_tag": True},
}


@pytest.mark.parametrize("name", JUDGED)
def test_judged(name):
    parsed = parse_row(JUDGED[name], 0)
    assert (parsed.format, parsed.label, parsed.pairs) == (name, True, ())
    assert (parsed.prompt, parsed.responses) == (ASKED, (GOLD,))
    tag = "kto_tag" if "kto_tag" in JUDGED[name] else "label"
    assert parse_row(JUDGED[name] | {tag: False}, 0).label is False
    with pytest.raises(RowProblem, match=rf"{tag}: true or false"):
        parse_row(JUDGED[name] | {tag: "yes"}, 0)


def test_every_format_is_tested_and_told():
    """Each example fits its own format and no other, so that none of them shadows another."""
    rows = {format: row for format, row, *_ in (*PAIRED.values(), *RANKED.values())} | JUDGED
    untold = {"ultrafeedback_fine_grained", "axolotl", "prompt_only", "prompt_completion"}
    assert set(rows) | untold == set(FORMATS)
    for format, row in rows.items():
        assert detect(row) == format


# ---- tools


def test_tool_calls_as_text_become_calls():
    """Written as LLaMA-Factory's function_call or ms-swift's tool_call; calls in a row are one turn's."""
    text = json.dumps(CALL["function"])
    turns = [
        {"role": "user", "content": "good?"},
        {"role": "tool_call", "content": text},
        {"role": "tool_call", "content": text},
        {"role": "tool_response", "content": "1"},
    ]
    expected = [
        user("good?"),
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "1"},
    ]
    row = parse_row({"messages": turns, "tools": json.dumps(TOOLS)} | PAIR, 0)
    assert (row.prompt, row.tools) == (expected, TOOLS)
    answer = {"from": "function_call", "value": f"[{text}, {text}]"}
    row = parse_row({"conversations": "good?", "chosen": answer, "rejected": gpt("old")}, 0)
    assert row.responses[0] == [{"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}]


def test_tool_calls_in_openai_s_own_form():
    """Arguments are text on OpenAI's wire, and an object where chat templates print them."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    row = {
        "input": {"messages": ASKED, "tools": TOOLS},
        "preferred_output": [turn],
        "non_preferred_output": OLD,
    }
    parsed = parse_row(row, 0)
    assert parsed.tools == TOOLS
    assert parsed.responses[0] == [{"role": "assistant", "content": "", "tool_calls": [CALL | {"id": "1"}]}]


def test_scores_and_reference_log_probs_beside_any_pair():
    columns = {"score_chosen": 3, "score_rejected": 1, "ref_chosen_logps": -5.0, "ref_rejected_logps": -6.0}
    parsed = parse_row({"question": "q"} | PAIR | columns, 0)
    assert (parsed.scores, parsed.ref_logps) == ((3, 1), (-5, -6))
    rewards = PAIRED["nemo_aligner"][1] | {"chosen_reward": 2.5, "rejected_reward": 0}
    assert parse_row(rewards, 0).scores == (2.5, 0)
    names = ("prompt", "chosen_response", "rejected_response", "chosen_reward", "rejected_reward")
    renamed = {f"their_{name}": rewards[name] for name in names}
    said = layout_of({name: f"their_{name}" for name in names})
    assert parse_row(renamed, 0, said).scores == (2.5, 0)


def test_spans_count_in_the_response_of_any_pair():
    spans = {"chosen_spans": [[0, 2]], "rejected_spans": []}
    parsed = parse_row({"question": "q"} | PAIR | spans, 0)
    assert [one.spans for one in parsed.relevance] == [((0, 0, 2),), ()]
