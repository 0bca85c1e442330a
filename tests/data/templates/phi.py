"""Phi-3 as it was first and later, Phi-3.5, Phi-4, Phi-4 reasoning and mini; StarChat, of the same form."""

from tests.data.templates.case import Expected, Template

ANSWERS = {
    "plain": (("Paris.<|end|>",), ("London.<|end|>",)),
    "system": (("Paris.<|end|>",), ("It is Paris, I believe.<|end|>",)),
    "turns": (("Paris.<|end|>",), ("London.<|end|>",)),
    "two_answers": (("Paris.<|end|>", "Rome.<|end|>"), ("London.<|end|>", "No.<|end|>")),
    "call": Expected("content_not_printed"),
    "reasoning": Expected((("4.<|end|>",), ("5.<|end|>",)), {"reasoning_not_printed": 2}),
    "thought": (
        ("<think>\nTwo and two make four.\n</think>\n\n4.<|end|>",),
        ("<think>\nA guess.\n</think>\n\n5.<|end|>",),
    ),
}
NOTHING_OF_TOOLS = {"tools_not_printed": 1, "tool_call_not_printed": 1, "tool_result_not_printed": 1}
TABLE = {  # no tools, and a tool's turn is left out
    **ANSWERS,
    "result": Expected((("It rains.<|end|>",), ("It rains.<|end|>",)), NOTHING_OF_TOOLS),
    "after_result": Expected((("It rains.<|end|>",), ("The sun shines.<|end|>",)), NOTHING_OF_TOOLS),
}
TABLE_4 = {
    "plain": (("Paris.<|im_end|>",), ("London.<|im_end|>",)),
    "system": (("Paris.<|im_end|>",), ("It is Paris, I believe.<|im_end|>",)),
    "turns": (("Paris.<|im_end|>",), ("London.<|im_end|>",)),
    "two_answers": (
        ("Paris.<|im_end|>", "Rome.<|im_end|>"),
        ("London.<|im_end|>", "No.<|im_end|>"),
    ),
    "call": Expected("content_not_printed"),
    "result": Expected((("It rains.<|im_end|>",), ("It rains.<|im_end|>",)), NOTHING_OF_TOOLS),
    "after_result": Expected((("It rains.<|im_end|>",), ("The sun shines.<|im_end|>",)), NOTHING_OF_TOOLS),
    "reasoning": Expected((("4.<|im_end|>",), ("5.<|im_end|>",)), {"reasoning_not_printed": 2}),
    "thought": (
        ("<think>\nTwo and two make four.\n</think>\n\n4.<|im_end|>",),
        ("<think>\nA guess.\n</think>\n\n5.<|im_end|>",),
    ),
}
PHI = {
    "eos": "<|endoftext|>",
    "special": ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
}
PHI_4 = {"eos": "<|im_end|>", "special": ("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>")}

TEMPLATES = {
    "phi3_first": Template(bos="<s>", table=TABLE, **PHI),  # the assistant's header ends the user's turn
    "phi3": Template(table=TABLE, **PHI),  # as later, without the EOS that those print after the last turn
    "phi3_5": Template(table=TABLE, **PHI),  # after the last turn a newline and the EOS, which are cut
    "phi4": Template(table=TABLE_4, **PHI_4),
    "phi4_reasoning": Template(  # a system prompt of its own in place of the row's
        table={
            **TABLE_4,
            "system": Expected(
                (("Paris.<|im_end|>",), ("It is Paris, I believe.<|im_end|>",)), {"system_not_printed": 1}
            ),
            "turns": Expected((("Paris.<|im_end|>",), ("London.<|im_end|>",)), {"system_not_printed": 1}),
        },
        **PHI_4,
    ),
    # After the last turn's <|end|> stands an EOS, with no white space between, which no turn before it
    # has and generation stops before, as with Phi-3: the EOS is cut, though rule 3 would score both tokens.
    "phi4_mini": Template(  # tools only where the system message holds them
        eos="<|endoftext|>",
        special=(*PHI["special"], "<|tool|>", "<|/tool|>"),
        table={
            **ANSWERS,
            "result": Expected(
                (("It rains.<|end|>",), ("It rains.<|end|>",)),
                {"tools_not_printed": 1, "tool_call_not_printed": 1},
            ),
            "after_result": Expected(
                (("It rains.<|end|>",), ("The sun shines.<|end|>",)),
                {"tools_not_printed": 1, "tool_call_not_printed": 1},
            ),
        },
    ),
    "starchat": Template(table=TABLE, **PHI),  # a system turn in any case, be it empty
}
