"""OLMo 2 and OLMo 3, without and with thinking.

OLMo 3 ends the last turn with the EOS and the turns before it with <|im_end|>.
"""

from tests.data.templates.case import Expected, Template

CALL = '<function_calls>weather(city="Paris")</function_calls>'
NOTHING_OF_TOOLS = {"tools_not_printed": 1, "tool_call_not_printed": 1, "tool_result_not_printed": 1}
ANSWERS = {
    "plain": (("Paris.<|endoftext|>",), ("London.<|endoftext|>",)),
    "system": (("Paris.<|endoftext|>",), ("It is Paris, I believe.<|endoftext|>",)),
    "turns": (("Paris.<|endoftext|>",), ("London.<|endoftext|>",)),
    "reasoning": Expected((("4.<|endoftext|>",), ("5.<|endoftext|>",)), {"reasoning_not_printed": 2}),
    "thought": (
        ("<think>\nTwo and two make four.\n</think>\n\n4.<|endoftext|>",),
        ("<think>\nA guess.\n</think>\n\n5.<|endoftext|>",),
    ),
}
TWO_ENDS = (("Paris.<|im_end|>", "Rome.<|endoftext|>"), ("London.<|im_end|>", "No.<|endoftext|>"))
OLMO_3 = {"eos": "<|endoftext|>", "special": ("<|endoftext|>", "<|im_start|>", "<|im_end|>")}

TEMPLATES = {
    "olmo2": Template(  # headers are plain text, EOS is BOS
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        special=("<|endoftext|>",),
        table={
            **ANSWERS,
            "two_answers": (
                ("Paris.<|endoftext|>", "Rome.<|endoftext|>"),
                ("London.<|endoftext|>", "No.<|endoftext|>"),
            ),
            "call": Expected("content_not_printed"),
            "result": Expected((("It rains.<|endoftext|>",), ("It rains.<|endoftext|>",)), NOTHING_OF_TOOLS),
            "after_result": Expected(
                (("It rains.<|endoftext|>",), ("The sun shines.<|endoftext|>",)), NOTHING_OF_TOOLS
            ),
        },
    ),
    "olmo3": Template(
        table={
            **ANSWERS,
            "two_answers": TWO_ENDS,
            "call": ((CALL + "<|endoftext|>",), ("It rains.<|endoftext|>",)),
            "result": ((CALL + "<|im_end|>", "It rains.<|endoftext|>"), ("It rains.<|endoftext|>",)),
            "after_result": (("It rains.<|endoftext|>",), ("The sun shines.<|endoftext|>",)),
        },
        **OLMO_3,
    ),
    "olmo3_think": Template(  # the generation prompt opens a thought, which an answer need not have
        table={
            "plain": Expected(
                (("Paris.<|endoftext|>",), ("London.<|endoftext|>",)), {"template_not_prefix": 2}
            ),
            "system": Expected(
                (("Paris.<|endoftext|>",), ("It is Paris, I believe.<|endoftext|>",)),
                {"template_not_prefix": 2},
            ),
            "turns": Expected(
                (("Paris.<|endoftext|>",), ("London.<|endoftext|>",)), {"template_not_prefix": 2}
            ),
            "two_answers": Expected(TWO_ENDS, {"template_not_prefix": 2}),
            "call": Expected("content_not_printed"),
            "result": Expected(
                (("It rains.<|endoftext|>",), ("It rains.<|endoftext|>",)),
                {"template_not_prefix": 2, **NOTHING_OF_TOOLS},
            ),
            "after_result": Expected(
                (("It rains.<|endoftext|>",), ("The sun shines.<|endoftext|>",)),
                {"template_not_prefix": 2, **NOTHING_OF_TOOLS},
            ),
            "reasoning": Expected(
                (("4.<|endoftext|>",), ("5.<|endoftext|>",)),
                {"template_not_prefix": 2, "reasoning_not_printed": 2},
            ),
            "thought": (  # the thought is open already
                ("\nTwo and two make four.\n</think>\n\n4.<|endoftext|>",),
                ("\nA guess.\n</think>\n\n5.<|endoftext|>",),
            ),
        },
        **OLMO_3,
    ),
}
