"""What other tools are known to do to these rows, and fastdpo does not: one test each."""

import io

import pytest
from rich.console import Console

from fastdpo.data.groups import Limits, to_group
from fastdpo.data.load import load_groups
from fastdpo.data.rows import RowProblem, parse_row
from tests.data.shared_data import (
    WIDE,
    assistant,
    check,
    decode,
    scored_text,
    sequence,
    small_tokenizer,
    text_row,
    user,
    write_lines,
)

HISTORY = [user("hi"), assistant("yo"), user("good?")]
GOLD, OLD = assistant("gold"), assistant("old")
# prints tools and tool calls, as chat templates of tool models do
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>tools {{ tools[0].function.name }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments.x }}</call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def group_of(row, limits=WIDE, **tokenizer):
    tokenizer = small_tokenizer(**tokenizer)
    group, notes = to_group(row, 0, tokenizer, limits)
    check(group)
    return group, notes, tokenizer


@pytest.mark.parametrize("prompt", [{}, {"prompt": "hi"}, {"system": "", "prompt": "good?"}])
def test_axolotl_reads_two_turns_of_a_conversation(prompt):
    """argilla_chat and ultra take turns 0 and 1, whatever follows (axolotl issues 1645, 2647)."""
    group, _, tokenizer = group_of(prompt | {"chosen": [*HISTORY, GOLD], "rejected": [*HISTORY, OLD]})
    shown = decode(tokenizer, group.prompt)
    assert all(turn["content"] in shown for turn in HISTORY)
    assert [scored_text(tokenizer, r) for r in group.responses] == ["gold<|im_end|>", "old<|im_end|>"]


def test_axolotl_takes_nectar_s_worst_answers():
    """It sorts by rank and takes the end of the list, where the worst are: rank 1 is the best."""
    answers = [{"answer": text, "rank": rank} for text, rank in (("mid", 2), ("worst", 7), ("best", 1))]
    row = parse_row({"prompt": "\n\nHuman: x\n\nAssistant: ", "answers": answers}, 0)
    best = {row.responses[i][0]["content"] for i, _ in row.pairs if all(j != i for _, j in row.pairs)}
    assert best == {"best"} and len(row.pairs) == 3


def test_axolotl_drops_tools_and_tool_calls():
    """Its chat_template copies role and content only (axolotl issue 3824)."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": 5}}}
    row = {
        "messages": [user("good?")],
        "chosen": {"role": "assistant", "content": "", "tool_calls": [call]},
        "rejected": OLD,
        "tools": [{"type": "function", "function": {"name": "add"}}],
    }
    group, _, tokenizer = group_of(row, chat_template=TOOL_TEMPLATE)
    assert "tools add" in decode(tokenizer, group.prompt)
    assert scored_text(tokenizer, group.responses[0]) == "<call>add 5</call><|im_end|>"


@pytest.mark.parametrize("text", ["gold\n", "gold \n\n", "user", "assistant"])
def test_axolotl_strips_answers_and_finds_them_in_the_header(text):
    """Its chat_template searches the answer in the rendered text, where "user" is found in a header, and
    strips the end, with a template that ends turns in white space also the answer's."""
    group, _, tokenizer = group_of({"messages": "good?", "chosen": text, "rejected": "old"})
    assert scored_text(tokenizer, group.responses[0]) == text + "<|im_end|>"


def test_axolotl_s_user_defined_reads_a_prompt_column_anyway():
    """Without a system prompt it formats sample["prompt"], whatever field_prompt says."""
    from fastdpo.data.formats.layouts import layout_of

    said = {"prompt": "q", "chosen": "a", "rejected": "b", "prompt_format": "[{prompt}]"}
    row = {"q": "mine", "prompt": "other", "a": "gold", "b": "old", "chosen": "x", "rejected": "y"}
    parsed = parse_row(row, 0, layout_of(said))
    assert (parsed.prompt, parsed.responses) == ("[mine]", ("gold", "old"))


def test_axolotl_ends_the_run_at_a_row_without_prompt(tmp_path):
    rows = [{"question": "good?", "chosen": "gold", "rejected": "old"}]
    rows += [rows[0] | {"question": None}, rows[0] | {"chosen": ""}]
    spec = write_lines(tmp_path / "d.jsonl", rows)
    groups, report = load_groups(
        spec, small_tokenizer(), WIDE, strict=False, console=Console(file=io.StringIO())
    )
    assert len(groups) == 1
    assert {name: tally.examples for name, tally in report.dropped.items()} == {
        "empty_prompt": [1],
        "empty_response": [2],
    }


def test_llama_factory_adds_a_system_prompt_to_openai_rows():
    """Its converter appends "detailed thinking off" to every row."""
    for more in ({}, {"system": "S"}):
        row = parse_row({"messages": HISTORY, "chosen": GOLD, "rejected": OLD} | more, 0)
        assert [m for m in row.prompt if m["role"] == "system"] == (
            [{"role": "system", "content": "S"}] if more else []
        )
        assert "thinking" not in str(row)


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
def test_llama_factory_cuts_the_assistant_header(truncation):
    """It shares cutoff_len between prompt and response and cuts the prompt's end."""
    row = {"instruction": "good morning world", "chosen": "old gold world", "rejected": "old"}
    whole, _, tokenizer = group_of(row)
    limits = Limits(max(len(sequence(whole, i)) for i in (0, 1)) - 2, truncation)
    group, notes, _ = group_of(row, limits)
    assert notes["truncated"]
    assert decode(tokenizer, group.prompt).endswith("assistant\n")


def test_llama_factory_skips_rows_with_a_warning_each():
    """It wants user and assistant to take turns and leaves other rows out, uncounted; here the template
    says what it takes."""
    turns = [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]
    answer = lambda text: {"from": "gpt", "value": text}
    row = {"conversations": turns, "chosen": answer("gold"), "rejected": answer("old")}
    assert parse_row(row, 0).prompt == [user("a"), user("b")]
    with pytest.raises(RowProblem, match="conversations: it ends with an assistant turn"):
        parse_row(row | {"conversations": [*turns, answer("c")]}, 0)


def test_openrlhf_puts_a_space_before_eos_and_eos_over_the_last_token():
    row = text_row("good", " morning world", " old")
    whole, _, tokenizer = group_of(row)
    assert scored_text(tokenizer, whole.responses[0]) == " morning world</s>"
    group, notes, _ = group_of(row, Limits(len(sequence(whole)) - 1))
    assert notes["truncated"] and scored_text(tokenizer, group.responses[0]) == " morning world"


def test_openrlhf_counts_the_prompt_s_tokens_apart():
    """The prompt's length comes from the prompt alone, so a token that merges over the boundary shifts it."""
    group, notes, tokenizer = group_of(text_row("good wor", "ld.", "se"))
    assert notes["merged_boundary"] == 1  # "world" is one token
    assert decode(tokenizer, sequence(group)) == "<s>good world.</s>"
    assert scored_text(tokenizer, group.responses[0]) == ".</s>"


def test_nemo_raises_at_ties():
    completions = [{"rank": r, "completion": [assistant(t)]} for r, t in ((0, "a"), (0, "b"), (1, "c"))]
    row = parse_row({"context": [user("x")], "completions": completions}, 0)
    assert row.pairs == ((0, 2), (1, 2)) and row.ties == 1
    with pytest.raises(RowProblem, match="no response is preferred") as caught:
        parse_row({"context": [user("x")], "completions": completions[:2]}, 0)
    assert caught.value.reason == "no_pair"


def test_nemo_cuts_long_rows_to_a_stub(tmp_path):
    """It keeps them with weight 0; here they are dropped and counted."""
    completions = [{"rank": r, "completion": [assistant(t)]} for r, t in ((0, "gold"), (1, "old"))]
    rows = [{"context": [user("good " * n)], "completions": completions} for n in (1, 200)]
    spec, console = write_lines(tmp_path / "d.jsonl", rows), Console(file=io.StringIO())
    groups, report = load_groups(spec, small_tokenizer(), Limits(60), strict=False, console=console)
    assert [g.row for g in groups] == [0] and report.dropped["prompt_too_long"].examples == [1]


def test_ms_swift_drops_equal_answers_without_a_count():
    with pytest.raises(RowProblem) as caught:
        parse_row({"messages": [*HISTORY, GOLD], "rejected_response": "gold"}, 0)
    assert (caught.value.reason, caught.value.field) == ("identical", "messages and rejected_response")


def test_ultrafeedback_s_first_version_has_10_for_1():
    """2,628 responses; its authors told the wrong ones by a fine-grained score of at most 2."""
    score = lambda text, overall, fine: {
        "response": text,
        "overall_score": overall,
        "fine-grained_score": fine,
    }
    row = {"instruction": "x", "completions": [score("bad", 10, 1.75), score("good", 7, 4.25)]}
    with pytest.raises(RowProblem, match="1 was meant") as caught:
        parse_row(row, 0)
    assert (caught.value.reason, caught.value.field) == ("faulty_score", "completions[0].overall_score")
    from fastdpo.data.formats.layouts import layout_of

    parsed = parse_row(row, 0, layout_of("ultrafeedback_fine_grained"))
    assert parsed.pairs == ((1, 0),) and parsed.scores == (1.75, 4.25)
    corrected = [score("bad", 1, 1.75), score("good", 10, 4.25)]
    assert parse_row(row | {"completions": corrected}, 0).pairs == ((1, 0),)
