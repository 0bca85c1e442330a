"""What is scored where a template or a tokenizer does something odd: each a fault that a trainer had."""

import json

import pytest
from tokenizers import normalizers

from fastdpo.data.groups import to_group
from fastdpo.data.report import RowProblem
from fastdpo.data.tokenizing import Encoder
from tests.data.shared_data import (
    WIDE,
    assistant,
    chat_row,
    check,
    decode,
    scored_text,
    sequence,
    small_tokenizer,
    text_row,
    user,
)
from tests.data.templates.case import CONVERSATIONS, Template, calls, says, system
from tests.data.test_templates import scored_turns, tokenizer_of

IM = ("<|im_start|>", "<|im_end|>")
HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CALL = "<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>"
CALLS = "{% for c in m.tool_calls %}" + CALL + "{% endfor %}"
PLAIN = HEAD + "{{ m.content }}<|im_end|>\n{% endfor %}" + OPEN  # knows neither tools nor reasoning
WITH_CALLS = (
    HEAD + "{{ m.content }}{% if m.tool_calls %}" + CALLS + "{% endif %}<|im_end|>\n{% endfor %}" + OPEN
)


def with_template(text: str, eos="<|im_end|>", special=IM, bos=None):
    return tokenizer_of(Template(eos=eos, special=special, table={}, bos=bos), text=text)


def turns_of(row: dict, tokenizer) -> tuple:
    group, notes = to_group(row, 0, tokenizer, WIDE)
    check(group)
    return tuple(scored_turns(tokenizer, response) for response in group.responses), dict(notes)


# ---- assistant turns that are printed otherwise where they are the last


def test_a_call_is_scored_where_the_last_turn_is_printed_with_an_empty_thought():
    empty = "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    tokenizer = with_template(WITH_CALLS.replace("{{ m.content }}", empty + "{{ m.content }}"))
    row = {key: CONVERSATIONS["result"][key] for key in ("prompt", "chosen", "rejected")}
    scored, notes = turns_of(row, tokenizer)
    assert scored == (
        ('<call>weather {"city": "Paris"}</call><|im_end|>', "<think>\n\n</think>\n\nIt rains.<|im_end|>"),
        ("<think>\n\n</think>\n\nIt rains.<|im_end|>",),
    )
    assert notes == {}


def test_an_answer_is_scored_to_its_own_end_where_the_last_one_ends_otherwise():
    end = "{{ '<|return|>' if loop.last else '<|end|>' }}"
    text = "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}" + end + "{% endfor %}"
    special = ("<|start|>", "<|message|>", "<|end|>", "<|return|>")
    opening = "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    # inference has ended the user's turn before it goes on
    text = text.replace("if loop.last", "if loop.last and m.role == 'assistant'") + opening
    scored, notes = turns_of(CONVERSATIONS["two_answers"], with_template(text, "<|return|>", special))
    assert scored == (
        ("<|message|>Paris.<|end|>", "<|message|>Rome.<|return|>"),
        ("<|message|>London.<|end|>", "<|message|>No.<|return|>"),
    )
    assert notes == {}


def test_an_end_that_only_stands_between_turns_is_scored_there():
    end = "{% if not loop.last %}</s>{% endif %}"
    text = "{% for m in messages %}{{ m.role }}: {{ m.content }}" + end + "{% endfor %}"
    opening = "{% if add_generation_prompt %}</s>assistant: {% endif %}"
    scored, notes = turns_of(CONVERSATIONS["two_answers"], with_template(text + opening, "</s>", ("</s>",)))
    assert scored == (("Paris.</s>", "Rome."), ("London.</s>", "No."))
    assert notes == {"no_end_of_turn": 2}


# ---- a system prompt that is printed only before the answer

MISTRAL = (
    "{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last and system %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def mistral():
    return with_template(MISTRAL, "</s>", ("<s>", "</s>", "[INST]", "[/INST]"), bos="<s>")


def test_a_system_prompt_that_only_generation_sees_is_trained_on_and_no_user_text_is_scored():
    tokenizer = mistral()
    prompt = [system("Speak like a pirate."), user("What is the capital of France?")]
    row = {"prompt": prompt, "chosen": [says("Paris, arr")], "rejected": [says("Paris")]}
    scored, notes = turns_of(row, tokenizer)
    assert scored == ((" Paris, arr</s>",), (" Paris</s>",))
    assert notes == {"prompt_as_for_generation": 2}
    group, _ = to_group(row, 0, tokenizer, WIDE)
    asked = "<s>[INST] Speak like a pirate.\n\nWhat is the capital of France?[/INST]"
    assert decode(tokenizer, sequence(group)) == asked + " Paris, arr</s>"
    assert decode(tokenizer, group.prompt) == asked
    del row["prompt"][0]
    assert turns_of(row, tokenizer) == (scored, {})


def test_several_answers_after_such_a_system_prompt_are_refused_by_name():
    row = {**CONVERSATIONS["two_answers"]}
    assert turns_of(row, mistral())[0][0] == (" Paris.</s>", " Rome.</s>")
    row["prompt"] = [system("Be brief."), *row["prompt"]]
    with pytest.raises(RowProblem, match="prints the system only before the last answer") as caught:
        to_group(row, 0, mistral(), WIDE)
    assert caught.value.reason == "no_rendering"


# ---- what the text does not contain


def test_a_response_of_which_the_template_prints_nothing_is_dropped():
    with pytest.raises(RowProblem, match="prints nothing of what a response says") as caught:
        to_group(CONVERSATIONS["call"], 0, with_template(PLAIN), WIDE)
    assert caught.value.reason == "content_not_printed"


@pytest.mark.parametrize(
    "row, notes",
    [
        ({"prompt": [system("Be brief."), user("Hello.")]}, {"system_not_printed": 1}),
        ({"prompt": [user("Hello.")], "tools": CONVERSATIONS["call"]["tools"]}, {"tools_not_printed": 1}),
        ({"prompt": [user("Hello."), calls("Paris"), user("Well?")]}, {"tool_call_not_printed": 1}),
        ({"prompt": [user("Hello."), {"role": "tool", "content": "9"}]}, {"tool_result_not_printed": 1}),
        (
            {"prompt": [user("Hello.")], "chosen": [says("gold", reasoning_content="It shines.")]},
            {"reasoning_not_printed": 1},
        ),
    ],
)
def test_what_a_template_leaves_out_is_counted_by_its_own_name(row, notes):
    printed = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>"
    known = "{% if m.role in ('user', 'assistant') %}" + printed + "{% endif %}"
    tokenizer = with_template("{% for m in messages %}" + known + "{% endfor %}" + OPEN)
    row = {"chosen": [says("gold")], "rejected": [says("old")]} | row
    assert turns_of(row, tokenizer) == ((("gold<|im_end|>",), ("old<|im_end|>",)), notes)


def test_a_form_of_its_own_is_no_loss():
    """A template may print a result as JSON, text in capitals, thoughts in other tags."""
    said = "{{ m.content | tojson if m.role == 'tool' else m.content | upper }}"
    tokenizer = with_template(PLAIN.replace("{{ m.content }}", said))
    prompt = [user("Hello."), says("hm"), {"role": "tool", "content": 'rain, "9" <b>\nwind'}]
    row = {"prompt": prompt, "chosen": [says("gold")], "rejected": [says("old")]}
    assert turns_of(row, tokenizer) == ((("GOLD<|im_end|>",), ("OLD<|im_end|>",)), {})


def test_a_call_is_printed_in_the_form_that_the_template_takes():
    """DeepSeek's public rules: only beside a content that is None, and arguments as JSON text."""
    call = "<call>{{ c.function.name + ' ' + c.function.arguments }}</call>"
    call = "{% for c in m.tool_calls %}" + call + "{% endfor %}"
    content = (
        "{% if m.content is not defined or m.content is none %}"
        + call
        + "{% else %}{{ m.content }}{% endif %}"
    )
    scored, notes = turns_of(
        {key: CONVERSATIONS["call"][key] for key in ("prompt", "chosen", "rejected")},
        with_template(PLAIN.replace("{{ m.content }}", content)),
    )
    assert scored == (('<call>weather {"city": "Paris"}</call><|im_end|>',), ("It rains.<|im_end|>",))
    assert notes == {}


# ---- after the end of turn


def test_a_newline_and_eos_after_the_end_of_turn_are_cut():
    """Phi-3's public rule: <|end|> and a newline after each turn, EOS after the conversation."""
    text = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    text += "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
    special = ("<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
    scored, notes = turns_of(CONVERSATIONS["two_answers"], with_template(text, "<|endoftext|>", special))
    assert scored == (("Paris.<|end|>", "Rome.<|end|>"), ("London.<|end|>", "No.<|end|>"))
    assert notes == {}


def test_markup_on_lines_of_its_own_belongs_to_the_turn():
    """A newline between two special tokens that others following does not take away."""
    tokenizer = with_template(
        WITH_CALLS.replace("</call>", "\n<|call_end|>\n"), special=(*IM, "<|call_end|>")
    )
    scored, _ = turns_of({k: CONVERSATIONS["call"][k] for k in ("prompt", "chosen", "rejected")}, tokenizer)
    assert scored[0] == ('<call>weather {"city": "Paris"}\n<|call_end|>\n<|im_end|>',)


# ---- a token that holds the prompt's end and the response's beginning


def test_all_after_a_character_composed_across_the_boundary_is_scored(monkeypatch):
    """e + combining accent is one character to a tokenizer with NFC: the prompt's; what follows is not."""
    tokenizer = small_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    monkeypatch.delattr(Encoder, "decode")  # one decoding a token took quadratic time
    row = text_row("good e", "\u0301 " + "gold old " * 50, "\u0301 old")
    group, notes = to_group(row, 0, tokenizer, WIDE)
    assert [scored_text(tokenizer, r) for r in group.responses] == [
        " " + "gold old " * 50 + "</s>",
        " old</s>",
    ]
    assert decode(tokenizer, group.prompt) == "<s>good é" and notes == {"merged_boundary": 2}


def test_pairs_that_differ_only_in_a_token_with_text_of_the_prompt_are_not_trained_on():
    row = text_row("good wor", "ld.", ".")
    with pytest.raises(RowProblem, match="same tokens") as caught:
        to_group({**row, "chosen": "ld.", "rejected": "d."}, 0, merging("world", "word"), WIDE)
    assert caught.value.reason == "identical"


def merging(*words: str):
    tokenizer = small_tokenizer()
    tokenizer.backend_tokenizer.add_tokens(list(words))
    return tokenizer


def test_arguments_in_nested_json_are_printed_once():
    arguments = {"where": {"city": "Paris", "near": ["Seine", 7]}, "unit": None}
    call = says(
        "", tool_calls=[{"type": "function", "function": {"name": "weather", "arguments": arguments}}]
    )
    row = {**chat_row(), "chosen": [call]}
    scored, _ = turns_of(row, with_template(WITH_CALLS))
    assert scored[0] == (f"<call>weather {json.dumps(arguments)}</call><|im_end|>",)
    assert scored[1] == (assistant("old")["content"] + "<|im_end|>",)
