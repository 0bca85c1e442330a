"""SmolLM 2 and 3, LFM2 and Granite 3."""

from tests.data.templates.case import Expected, Template
from tests.data.templates.qwen import ANSWERS, NO_CALLS

TOOLS_NO_CALLS = {  # the tools are printed, a call is not
    "call": Expected("content_not_printed"),
    "result": Expected((("It rains.<|im_end|>",), ("It rains.<|im_end|>",)), {"tool_call_not_printed": 1}),
    "after_result": Expected(
        (("It rains.<|im_end|>",), ("The sun shines.<|im_end|>",)), {"tool_call_not_printed": 1}
    ),
}
GRANITE_ANSWERS = {
    "plain": (("Paris.<|end_of_text|>",), ("London.<|end_of_text|>",)),
    "system": (("Paris.<|end_of_text|>",), ("It is Paris, I believe.<|end_of_text|>",)),
    "turns": (("Paris.<|end_of_text|>",), ("London.<|end_of_text|>",)),
    "two_answers": (
        ("Paris.<|end_of_text|>", "Rome.<|end_of_text|>"),
        ("London.<|end_of_text|>", "No.<|end_of_text|>"),
    ),
    "reasoning": Expected((("4.<|end_of_text|>",), ("5.<|end_of_text|>",)), {"reasoning_not_printed": 2}),
    "thought": (
        ("<think>\nTwo and two make four.\n</think>\n\n4.<|end_of_text|>",),
        ("<think>\nA guess.\n</think>\n\n5.<|end_of_text|>",),
    ),
}
SMOL = {"eos": "<|im_end|>", "special": ("<|im_start|>", "<|im_end|>", "<|endoftext|>")}
LFM = {
    "eos": "<|im_end|>",
    "bos": "<|startoftext|>",
    "special": (
        *("<|startoftext|>", "<|im_start|>", "<|im_end|>", "<|tool_list_start|>", "<|tool_list_end|>"),
        *("<|tool_call_start|>", "<|tool_call_end|>", "<|tool_response_start|>", "<|tool_response_end|>"),
    ),
}
GRANITE = {
    "eos": "<|end_of_text|>",
    "special": ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
}

TEMPLATES = {
    "smollm2": Template(table=ANSWERS | NO_CALLS, **SMOL),  # a default system prompt
    "smollm3": Template(  # a system turn in any case, which is closed only where there are tools
        kwargs={"date": "01 January 2026"}, table=ANSWERS | TOOLS_NO_CALLS, **SMOL
    ),
    "smollm3_no_thinking": Template(  # an empty thought, in the generation prompt and in every answer
        file="smollm3",
        kwargs={"date": "01 January 2026", "enable_thinking": False},
        table=ANSWERS | TOOLS_NO_CALLS,
        **SMOL,
    ),
    "lfm2": Template(table=ANSWERS | TOOLS_NO_CALLS, **LFM),
    "lfm2_calls": Template(  # a call in Python's words
        file="lfm2",
        kwargs={"prints_calls": True},
        table={
            **ANSWERS,
            "call": (
                ("<|tool_call_start|>[weather(city='Paris')]<|tool_call_end|><|im_end|>",),
                ("It rains.<|im_end|>",),
            ),
            "result": (
                (
                    "<|tool_call_start|>[weather(city='Paris')]<|tool_call_end|><|im_end|>",
                    "It rains.<|im_end|>",
                ),
                ("It rains.<|im_end|>",),
            ),
            "after_result": (("It rains.<|im_end|>",), ("The sun shines.<|im_end|>",)),
        },
        **LFM,
    ),
    "granite3": Template(
        table={
            **GRANITE_ANSWERS,
            "call": (
                ('<|tool_call|> {"name": "weather", "arguments": {"city": "Paris"}}<|end_of_text|>',),
                ("It rains.<|end_of_text|>",),
            ),
            "result": (
                (
                    '<|tool_call|> {"name": "weather", "arguments": {"city": "Paris"}}<|end_of_text|>',
                    "It rains.<|end_of_text|>",
                ),
                ("It rains.<|end_of_text|>",),
            ),
            "after_result": (("It rains.<|end_of_text|>",), ("The sun shines.<|end_of_text|>",)),
        },
        **GRANITE,
    ),
    "granite3_3": Template(  # prints a turn's content alone
        kwargs={"date": "January 01, 2026", "thinking": True},
        table={
            **GRANITE_ANSWERS,
            "call": Expected("content_not_printed"),
            "result": Expected(
                (("It rains.<|end_of_text|>",), ("It rains.<|end_of_text|>",)), {"tool_call_not_printed": 1}
            ),
            "after_result": Expected(
                (("It rains.<|end_of_text|>",), ("The sun shines.<|end_of_text|>",)),
                {"tool_call_not_printed": 1},
            ),
        },
        **GRANITE,
    ),
}
