"""Odd rows and tokenizers under chat templates: right values by hand, as in test_scored_text.py."""

import pytest
from transformers import PreTrainedTokenizerFast

from fastdpo.data.groups import to_group
from fastdpo.data.report import RowProblem
from tests.data.shared_data import WIDE, decode, user
from tests.data.templates.case import CONVERSATIONS, calls, result, says, system
from tests.data.test_scored_text import CALLS, HEAD, OPEN, PLAIN, WITH_CALLS, mistral, turns_of, with_template
from tests.data.test_templates import TEMPLATES, tokenizer_of

TOOL = {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}


def ends(chosen: str, rejected: str = "old") -> tuple:
    return (f"{chosen}<|im_end|>",), (f"{rejected}<|im_end|>",)


def row_of(chosen: dict, **more) -> dict:
    return {"prompt": [user("Hello.")], "chosen": [chosen], "rejected": [says("old")]} | more


def test_special_tokens_that_the_tokenizer_has_no_name_for_end_turns():
    """Phi-3 as published names its EOS alone; <|end|> is special among the added tokens."""
    text = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    text += "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
    special = ("<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
    backend = with_template(text, "<|endoftext|>", special).backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    tokenizer.chat_template = text
    scored, notes = turns_of(CONVERSATIONS["two_answers"], tokenizer)
    assert scored == (("Paris.<|end|>", "Rome.<|end|>"), ("London.<|end|>", "No.<|end|>"))
    assert notes == {}


def test_private_characters_of_a_row_are_text_like_any_other():
    """Those are what texts are searched with."""
    odd = "\ue000 \ue001"
    prompt = [system(odd), user(odd)]
    group, notes = to_group(row_of(says("\ue002"), prompt=prompt), 0, mistral(), WIDE)
    assert decode(mistral(), group.prompt) == f"<s>[INST] {odd}\n\n{odd}[/INST]"
    assert notes == {"prompt_as_for_generation": 2}
    tokenizer = tokenizer_of(TEMPLATES["command_r_tools"], "command_r_tools")
    answers = [calls(odd), result("fine"), says("gold")]
    (call, answer), _ = turns_of(row_of(says(""), prompt=[user(odd)]) | {"chosen": answers}, tokenizer)[0]
    assert call.endswith('"parameters": {"city": "\ue000 \ue001"}\n    }\n]```')
    assert answer == "gold<|END_OF_TURN_TOKEN|>"


def test_a_result_that_is_printed_amid_the_turn_of_its_call_is_never_scored():
    """Gemma 4's public rule: the call, its result, and then what the turn says besides."""
    call = calls("Rome") | {"content": "I look."}
    row = row_of(says("old")) | {"chosen": [call, result("Rome"), says("Sunny.")], "rejected": [says("old")]}
    with pytest.raises(RowProblem, match="prints a tool result amid the assistant's turn") as caught:
        to_group(row, 0, tokenizer_of(TEMPLATES["gemma4"], "gemma4"), WIDE)
    assert caught.value.reason == "no_rendering"
    scored, _ = turns_of(row, with_template(WITH_CALLS))
    assert scored[0] == ('I look.<call>weather {"city": "Rome"}</call><|im_end|>', "Sunny.<|im_end|>")


def test_a_turn_whose_end_is_not_found_is_counted():
    """Three ends of turn: the user's, an answer's, and the last answer's."""
    text = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'user' %}<|eou|>"
    text += "{% else %}{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}{% endfor %}"
    text += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    special = ("<|user|>", "<|assistant|>", "<|eou|>", "<|end|>", "<|return|>")
    row = CONVERSATIONS["two_answers"] | {"rejected": [says("No.")]}
    scored, notes = turns_of(row, with_template(text, "<|return|>", special))
    assert scored == (("Paris.", "Rome.<|return|>"), ("No.<|return|>",))
    assert notes == {"no_end_of_turn": 1}


# ---- what is lost, and its words stand elsewhere


def test_a_call_is_lost_though_the_answer_names_its_tool_and_arguments():
    answer = calls("Paris") | {"content": "I look up the weather in Paris."}
    scored = ends("I look up the weather in Paris.")
    assert turns_of(row_of(answer), with_template(PLAIN)) == (scored, {"tool_call_not_printed": 1})


def test_reasoning_is_lost_though_the_answer_has_its_words():
    answer = says("It is Paris.", reasoning_content="Paris")
    notes = {"reasoning_not_printed": 1}
    assert turns_of(row_of(answer), with_template(PLAIN)) == (ends("It is Paris."), notes)


def test_a_result_is_lost_though_the_text_has_its_letters():
    prompt = [user("Hello."), calls("Paris"), {"role": "tool", "content": "use"}]
    known = "{% if m.role != 'tool' %}" + HEAD.partition("%}")[2] + "{{ m.content }}<|im_end|>{% endif %}"
    tokenizer = with_template("{% for m in messages %}" + known + "{% endfor %}" + OPEN)
    notes = {"tool_call_not_printed": 1, "tool_result_not_printed": 1}
    assert turns_of(row_of(says("gold"), prompt=prompt), tokenizer) == (ends("gold"), notes)


@pytest.mark.parametrize("question", ["Hello.", "Hello. Why?", "Why? Hello.", "Hello"])
def test_a_system_prompt_that_only_generation_sees_and_the_user_repeats(question):
    row = row_of(says("gold"), prompt=[system("Hello."), user(question)])
    group, notes = to_group(row, 0, mistral(), WIDE)
    assert decode(mistral(), group.prompt) == f"<s>[INST] Hello.\n\n{question}[/INST]"
    assert notes == {"prompt_as_for_generation": 2}


@pytest.mark.parametrize("question", ["Be brief.", "Be brief. Why?", "Why? Be brief."])
def test_a_system_prompt_is_lost_though_the_user_says_the_same(question):
    text = "{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endif %}"
    tokenizer = with_template("{% for m in messages %}" + text + "{% endfor %}" + OPEN)
    row = row_of(says("gold"), prompt=[system("Be brief."), user(question)])
    assert turns_of(row, tokenizer) == (ends("gold"), {"system_not_printed": 1})


@pytest.mark.parametrize("shown", ["gold", "old"])
def test_a_system_prompt_that_only_one_of_two_responses_has_before_it(shown):
    told = f"m.role != 'system' or messages[-1].content == '{shown}'"
    text = f"{{% if {told} %}}<|im_start|>{{{{ m.role }}}}\n{{{{ m.content }}}}<|im_end|>{{% endif %}}"
    tokenizer = with_template("{% for m in messages %}" + text + "{% endfor %}" + OPEN)
    _, notes = turns_of(row_of(says("gold"), prompt=[system("Be brief."), user("Hello.")]), tokenizer)
    assert notes["system_not_printed"] == 1


def test_a_tool_is_lost_though_the_question_has_its_name():
    row = row_of(says("gold"), prompt=[user("Please search.")], tools=[TOOL])
    assert turns_of(row, with_template(PLAIN)) == (ends("gold"), {"tools_not_printed": 1})


# ---- what is printed, and must not be called lost


def test_tools_without_a_name_are_found_where_they_are_printed():
    tools = [{"type": "code_interpreter"}, {"name": "weather", "parameters": {}}]
    text = "{{ tools | tojson if tools }}" + PLAIN
    assert turns_of(row_of(says("gold"), tools=tools), with_template(text)) == (ends("gold"), {})


def test_the_name_of_a_call_is_printed_where_its_id_is():
    """Kimi K2's public rule: functions.NAME:0 is the id, and all that is printed of the name."""
    function = {"name": "weather", "arguments": {"city": "Rome"}}
    call = {"id": "functions.weather:0", "type": "function", "function": function}
    text = WITH_CALLS.replace("c.function.name", "c.id")
    scored = ends('<call>functions.weather:0 {"city": "Rome"}</call>')
    assert turns_of(row_of(says("", tool_calls=[call])), with_template(text)) == (scored, {})
    call["id"] = "call-1"
    scored = ends('<call>call-1 {"city": "Rome"}</call>')
    lost = {"tool_call_not_printed": 1}
    assert turns_of(row_of(says("", tool_calls=[call])), with_template(text)) == (scored, lost)


def test_one_thought_under_two_names_is_printed_once():
    thought = "<think>{{ m.reasoning }}</think>"
    text = PLAIN.replace("{{ m.content }}", "{% if m.reasoning %}" + thought + "{% endif %}{{ m.content }}")
    answer = says("gold", reasoning="It shines.", reasoning_content="It shines.")
    scored = ends("<think>It shines.</think>gold")
    assert turns_of(row_of(answer), with_template(text)) == (scored, {})


def test_a_template_that_takes_known_tools_alone_has_printed_a_call():
    known = "{% for c in m.tool_calls %}{% if c.function.name != 'weather' %}{{ raise_exception('?') }}"
    text = WITH_CALLS.replace(CALLS, known + "{% endif %}{% endfor %}" + CALLS)
    scored = ends('<call>weather {"city": "Paris"}</call>')
    assert turns_of(row_of(calls("Paris")), with_template(text)) == (scored, {})


def test_a_turn_that_says_nothing_ends_all_the_same():
    row = row_of(says("gold")) | {"chosen": [says("gold"), user("More?"), says("")]}
    scored, notes = turns_of(row, with_template(PLAIN))
    assert scored == (("gold<|im_end|>", "<|im_end|>"), ("old<|im_end|>",)) and notes == {}
