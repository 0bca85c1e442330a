"""Conversations as token ids: templates, turns, ends of turns."""

import pytest

from fastdpo.data.groups import to_group
from fastdpo.data.rows import RowProblem
from fastdpo.errors import DataError
from tests.data.shared_data import (
    CHATML,
    DATA,
    FOLDERS,
    WIDE,
    assistant,
    chat_row,
    check,
    decode,
    needs_shared,
    read_lines,
    real_tokenizer,
    scored_text,
    sequence,
    small_tokenizer,
    template,
    trl_rows,
    user,
)

TEMPLATES = ("chatml", "llama-3-instruct", "mistral-instruct", "qwen2.5-instruct", "zephyr")
END = {  # what each template ends a turn with; None is the tokenizer's EOS
    "chatml": "<|im_end|>",
    "llama-3-instruct": "<|eot_id|>",
    "mistral-instruct": None,
    "qwen2.5-instruct": "<|im_end|>",
    "zephyr": None,
}


def test_conversation():
    tokenizer = small_tokenizer()
    group, notes = to_group(chat_row(), 0, tokenizer, WIDE)
    check(group)
    assert not notes
    expected = "<|im_start|>user\ngood?<|im_end|>\n<|im_start|>assistant\n"
    assert decode(tokenizer, group.prompt) == expected  # no BOS: the template prints none
    assert [scored_text(tokenizer, r) for r in group.responses] == [
        "gold<|im_end|>",
        "old<|im_end|>",
    ]
    assert all(r.target_mask.all() for r in group.responses)


def test_bos_of_the_template_is_not_doubled():
    tokenizer = small_tokenizer(chat_template="{{ bos_token }}" + CHATML)
    group, _ = to_group(chat_row(), 0, tokenizer, WIDE)
    assert sequence(group).count(tokenizer.bos_token_id) == 1 and group.prompt[0] == tokenizer.bos_token_id


def test_common_beginning_of_responses_stays_scored():
    tokenizer = small_tokenizer()
    group, _ = to_group(chat_row("good?", "old gold", "old world"), 0, tokenizer, WIDE)
    texts = [scored_text(tokenizer, r) for r in group.responses]
    assert texts == ["old gold<|im_end|>", "old world<|im_end|>"]


def test_multi_turn_scores_assistant_turns_only():
    tokenizer = small_tokenizer()
    tool = {"role": "tool", "content": "world"}
    row = {
        "prompt": [user("good?")],
        "chosen": [assistant("old"), tool, assistant("gold"), user("more"), assistant("morning")],
        "rejected": [assistant("world"), user("no"), assistant("wor")],
    }
    group, notes = to_group(row, 0, tokenizer, WIDE)
    check(group)
    assert not notes
    chosen, rejected = group.responses
    assert decode(tokenizer, chosen.ids) == (
        "old<|im_end|>\n<|im_start|>tool\nworld<|im_end|>\n<|im_start|>assistant\ngold<|im_end|>\n"
        "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\nmorning<|im_end|>"
    )
    assert scored_text(tokenizer, chosen) == "old<|im_end|>gold<|im_end|>morning<|im_end|>"
    assert scored_text(tokenizer, rejected) == "world<|im_end|>wor<|im_end|>"


def test_turns_after_the_last_answer_are_cut():
    tokenizer = small_tokenizer()
    row = chat_row()
    row["chosen"] = [*row["chosen"], user("more good")]
    longer, _ = to_group(row, 0, tokenizer, WIDE)
    plain, _ = to_group(chat_row(), 0, tokenizer, WIDE)
    assert sequence(longer) == sequence(plain)


def test_end_of_turn_that_is_only_white_space_is_noted():
    lines = "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"
    tokenizer = small_tokenizer(chat_template=lines)
    group, notes = to_group(chat_row(), 0, tokenizer, WIDE)
    assert notes == {"no_end_of_turn": 2}
    assert [scored_text(tokenizer, r) for r in group.responses] == ["gold", "old"]
    # the newline between turns is another token's; the answer before it stays scored, it does not
    row = {**chat_row(), "chosen": [assistant("old"), user("more"), assistant("gold")]}
    group, _ = to_group(row, 0, tokenizer, WIDE)
    assert scored_text(tokenizer, group.responses[0]) == "oldgold"


def test_prompt_printed_otherwise_when_alone():
    """A generation prompt with a thought in it, which finished turns do not have."""
    odd = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    tokenizer = small_tokenizer(chat_template=odd)
    group, notes = to_group(chat_row(), 0, tokenizer, WIDE)
    check(group)
    assert notes == {"template_not_prefix": 2}
    assert decode(tokenizer, group.prompt).endswith("<|im_start|>assistant\n")
    assert [scored_text(tokenizer, r) for r in group.responses] == [
        "gold<|im_end|>",
        "old<|im_end|>",
    ]


def test_an_earlier_turn_printed_otherwise_when_it_is_not_the_last():
    """Each turn is scored as the whole conversation has it."""
    thought = "{% if loop.last and m['role'] == 'assistant' %}<think>{% endif %}"
    odd = CHATML.replace("{{ m['content'] }}", thought + "{{ m['content'] }}")
    tokenizer = small_tokenizer(chat_template=odd)
    row = {**chat_row(), "chosen": [assistant("old"), user("more"), assistant("gold")]}
    group, notes = to_group(row, 0, tokenizer, WIDE)
    check(group)
    assert not notes
    assert scored_text(tokenizer, group.responses[0]) == "old<|im_end|><think>gold<|im_end|>"


def test_template_error_is_the_row_s_problem():
    row = {
        **chat_row(),
        "chosen": [assistant("a"), {"role": "tool", "content": "refuse"}, assistant("b")],
    }
    with pytest.raises(RowProblem, match="refuses these turns: no such tool") as caught:
        to_group(row, 0, small_tokenizer(), WIDE)
    assert (caught.value.reason, caught.value.field) == ("template_error", "messages")


def test_no_chat_template_is_refused():
    with pytest.raises(DataError, match=r"no chat template(.|\n)*chat_template: FILE\.jinja"):
        to_group(chat_row(), 0, small_tokenizer(chat_template=None), WIDE)


def test_tools_and_arguments_reach_the_template():
    seen = "{% if tools %}{{ tools[0]['name'] }}{% endif %}{{ mood }}"
    tokenizer = small_tokenizer(chat_template=seen + CHATML)
    row = {**chat_row(), "tools": '[{"name": "gold"}]', "chat_template_kwargs": {"mood": "good"}}
    group, _ = to_group(row, 0, tokenizer, WIDE)
    assert decode(tokenizer, group.prompt).startswith("goldgood<|im_start|>")


@needs_shared
@pytest.mark.parametrize("template_name", TEMPLATES)
@pytest.mark.parametrize("name", FOLDERS)
def test_real_tokenizers_with_every_template(name, template_name):
    tokenizer = real_tokenizer(name)
    tokenizer.chat_template = template(template_name)
    if tokenizer.bos_token is None and "bos_token" in tokenizer.chat_template:
        tokenizer.bos_token = "<|endoftext|>"  # Qwen has none, and mistral's adds it to a string
    row = {
        "prompt": [user("Is it late?"), assistant("No."), user("Why?")],
        "chosen": [assistant("The sun is up.")],
        "rejected": [assistant("Go away")],
    }
    group, notes = to_group(row, 0, tokenizer, WIDE)
    check(group)
    end = END[template_name] or tokenizer.eos_token
    for response, content in zip(group.responses, ("The sun is up.", "Go away")):
        scored = scored_text(tokenizer, response)
        # Mistral has no header: the space before an answer is the answer's own
        assert (scored.lstrip() if template_name == "mistral-instruct" else scored) == content + end
    whole = tokenizer.apply_chat_template(row["prompt"] + row["chosen"], tokenize=False)
    expected = tokenizer(whole.rstrip(), add_special_tokens=False)["input_ids"]
    assert sequence(group) == expected
    assert "no_end_of_turn" not in notes


@needs_shared
def test_stories260k_s_own_template_has_no_end_of_turn():
    tokenizer = real_tokenizer("stories260K")
    group, notes = to_group(chat_row("Hi.", "Yes, he is.", "No."), 0, tokenizer, WIDE)
    assert notes == {"no_end_of_turn": 2}
    assert group.prompt[0] == tokenizer.bos_token_id and 1 not in group.prompt[1:]
    assert [scored_text(tokenizer, r).strip() for r in group.responses] == ["Yes, he is.", "No."]


@needs_shared
def test_an_end_of_turn_merged_with_white_space_is_not_scored():
    """Qwen has a token for ".\\n"; the last turn's newline is cut before it can merge."""
    tokenizer = real_tokenizer("qwen2.5")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"
    row = {**chat_row(), "chosen": [assistant("It is."), user("more"), assistant("So be it.")]}
    group, _ = to_group(row, 0, tokenizer, WIDE)
    check(group)
    assert scored_text(tokenizer, group.responses[0]) == "It isSo be it."


@needs_shared
def test_qwen_tool_calls():
    tokenizer = real_tokenizer("qwen2.5")
    call = {"function": {"name": "clock", "arguments": {"zone": "UTC"}}}
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
    row = {
        "prompt": [user("What time is it?")],
        "chosen": [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "12:00"},
            assistant("Noon."),
        ],
        "rejected": [assistant("No idea.")],
        "tools": tools,
    }
    group, notes = to_group(row, 0, tokenizer, WIDE)
    check(group)
    assert not notes and '"name": "clock"' in decode(tokenizer, group.prompt)
    scored = scored_text(tokenizer, group.responses[0])
    assert scored.startswith("<tool_call>") or scored.startswith("\n<tool_call>")
    assert scored.endswith("</tool_call><|im_end|>Noon.<|im_end|>") and "12:00" not in scored


@needs_shared
@pytest.mark.parametrize("name", ["qwen2.5", "gpt2"])
def test_scored_tokens_are_the_answer_and_its_end(name):
    """On every real row: nothing of the prompt or a header is scored, and nothing is left out."""
    tokenizer = real_tokenizer(name)
    for number, row in enumerate(read_lines(DATA / "pref/hh_rlhf_test.jsonl")[:250]):
        group, notes = to_group(row, number, tokenizer, WIDE)
        check(group)
        assert not notes
        for response, turns in zip(group.responses, (row["chosen"], row["rejected"])):
            space = "" if name == "qwen2.5" else " "  # gpt2's generation prompt leaves it to the answer
            text = space + turns[0]["content"] + tokenizer.eos_token
            assert scored_text(tokenizer, response) == text


@needs_shared
@pytest.mark.peer
def test_conversations_give_trl_s_tokens_but_for_the_newline():
    tokenizer = real_tokenizer("qwen2.5")
    rows = read_lines(DATA / "pref/hh_rlhf_test.jsonl")[:60]
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    newline = tokenizer("\n")["input_ids"]
    for row, theirs in zip(rows, trl_rows(tokenizer, rows)):
        group, _ = to_group(row, 0, tokenizer, WIDE)
        assert group.prompt.tolist() == theirs["prompt_ids"]
        for response, name in zip(group.responses, ("chosen_ids", "rejected_ids")):
            assert response.ids.tolist() + newline == theirs[name]
