"""Llama 2, 3, 3.1, 3.2 and 4."""

from tests.data.templates.case import Expected, Template

CALL = '{"name": "weather", "parameters": {"city": "Paris"}}<|eot_id|>'
CALL_4 = '<|python_start|><|python_end|>{"name": "weather", "parameters": {"city": "Paris"}}<|eot|>'
ANSWERS = {
    "plain": (("Paris.<|eot_id|>",), ("London.<|eot_id|>",)),
    "system": (("Paris.<|eot_id|>",), ("It is Paris, I believe.<|eot_id|>",)),
    "turns": (("Paris.<|eot_id|>",), ("London.<|eot_id|>",)),
    "two_answers": (
        ("Paris.<|eot_id|>", "Rome.<|eot_id|>"),
        ("London.<|eot_id|>", "No.<|eot_id|>"),
    ),
    "reasoning": Expected((("4.<|eot_id|>",), ("5.<|eot_id|>",)), {"reasoning_not_printed": 2}),
    "thought": (
        ("<think>\nTwo and two make four.\n</think>\n\n4.<|eot_id|>",),
        ("<think>\nA guess.\n</think>\n\n5.<|eot_id|>",),
    ),
}
WITH_TOOLS = {
    **ANSWERS,
    "call": ((CALL,), ("It rains.<|eot_id|>",)),
    "result": ((CALL, "It rains.<|eot_id|>"), ("It rains.<|eot_id|>",)),
    "after_result": (("It rains.<|eot_id|>",), ("The sun shines.<|eot_id|>",)),
}
LLAMA_3 = {
    "bos": "<|begin_of_text|>",
    "eos": "<|eot_id|>",
    "special": (
        *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
        *("<|eot_id|>", "<|eom_id|>", "<|python_tag|>"),
    ),
}

TEMPLATES = {
    "llama2": Template(  # a space on both sides of an answer, a BOS before every user turn, no tools
        bos="<s>",
        eos="</s>",
        special=("<s>", "</s>"),
        table={
            "plain": ((" Paris. </s>",), (" London. </s>",)),
            "system": ((" Paris. </s>",), (" It is Paris, I believe. </s>",)),
            "turns": ((" Paris. </s>",), (" London. </s>",)),
            "two_answers": ((" Paris. </s>", " Rome. </s>"), (" London. </s>", " No. </s>")),
            "call": Expected("content_not_printed"),
            "result": Expected("template_error"),
            "after_result": Expected("template_error"),
            "reasoning": Expected(((" 4. </s>",), (" 5. </s>",)), {"reasoning_not_printed": 2}),
            "thought": (
                (" <think>\nTwo and two make four.\n</think>\n\n4. </s>",),
                (" <think>\nA guess.\n</think>\n\n5. </s>",),
            ),
        },
    ),
    "llama3": Template(  # prints a turn of any role, and no tools
        table={
            **ANSWERS,
            "call": Expected("content_not_printed"),
            "result": Expected(
                (("It rains.<|eot_id|>",), ("It rains.<|eot_id|>",)),
                {"tools_not_printed": 1, "tool_call_not_printed": 1},
            ),
            "after_result": Expected(
                (("It rains.<|eot_id|>",), ("The sun shines.<|eot_id|>",)),
                {"tools_not_printed": 1, "tool_call_not_printed": 1},
            ),
        },
        **LLAMA_3,
    ),
    "llama3_1": Template(table=WITH_TOOLS, **LLAMA_3),  # the tools stand in the first user turn
    "llama3_2": Template(table=WITH_TOOLS, kwargs={"date_string": "01 Jan 2026"}, **LLAMA_3),
    "llama4": Template(
        bos="<|begin_of_text|>",
        eos="<|eot|>",
        special=(
            *("<|begin_of_text|>", "<|end_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>"),
            *("<|python_start|>", "<|python_end|>"),
        ),
        table={
            "plain": (("Paris.<|eot|>",), ("London.<|eot|>",)),
            "system": (("Paris.<|eot|>",), ("It is Paris, I believe.<|eot|>",)),
            "turns": (("Paris.<|eot|>",), ("London.<|eot|>",)),
            "two_answers": (("Paris.<|eot|>", "Rome.<|eot|>"), ("London.<|eot|>", "No.<|eot|>")),
            "call": ((CALL_4,), ("It rains.<|eot|>",)),
            "result": ((CALL_4, "It rains.<|eot|>"), ("It rains.<|eot|>",)),
            "after_result": (("It rains.<|eot|>",), ("The sun shines.<|eot|>",)),
            "reasoning": Expected((("4.<|eot|>",), ("5.<|eot|>",)), {"reasoning_not_printed": 2}),
            "thought": (
                ("<think>\nTwo and two make four.\n</think>\n\n4.<|eot|>",),
                ("<think>\nA guess.\n</think>\n\n5.<|eot|>",),
            ),
        },
    ),
}
