"""EXAONE 3.5 and 4, Jamba, and Metharme (Pygmalion)."""

from tests.data.templates.case import Expected, Template

CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>[|endofturn|]'
CALL_JAMBA = ' <tool_calls>[\n    {"name": "weather", "arguments": {"city": "Paris"}}\n]</tool_calls><|eom|>'
NOTHING_OF_TOOLS = {"tools_not_printed": 1, "tool_call_not_printed": 1, "tool_result_not_printed": 1}
ANSWERS = {
    "plain": (("Paris.[|endofturn|]",), ("London.[|endofturn|]",)),
    "system": (("Paris.[|endofturn|]",), ("It is Paris, I believe.[|endofturn|]",)),
    "turns": (("Paris.[|endofturn|]",), ("London.[|endofturn|]",)),
    "two_answers": (
        ("Paris.[|endofturn|]", "Rome.[|endofturn|]"),
        ("London.[|endofturn|]", "No.[|endofturn|]"),
    ),
    "reasoning": Expected((("4.[|endofturn|]",), ("5.[|endofturn|]",)), {"reasoning_not_printed": 2}),
}
EXAONE = {
    "bos": "[BOS]",
    "eos": "[|endofturn|]",
    "special": (
        *("[BOS]", "[|endofturn|]", "[|system|]", "[|user|]", "[|assistant|]", "[|tool|]"),
        *("<think>", "</think>", "<tool_call>", "</tool_call>"),
    ),
}

TEMPLATES = {
    "exaone3_5": Template(  # a user's turn ends with a newline alone
        table={
            **ANSWERS,
            "call": Expected("content_not_printed"),
            "result": Expected(
                (("It rains.[|endofturn|]",), ("It rains.[|endofturn|]",)),
                {"tools_not_printed": 1, "tool_call_not_printed": 1},
            ),
            "after_result": Expected(
                (("It rains.[|endofturn|]",), ("The sun shines.[|endofturn|]",)),
                {"tools_not_printed": 1, "tool_call_not_printed": 1},
            ),
            "thought": (
                ("<think>\nTwo and two make four.\n</think>\n\n4.[|endofturn|]",),
                ("<think>\nA guess.\n</think>\n\n5.[|endofturn|]",),
            ),
        },
        **EXAONE,
    ),
    "exaone4": Template(  # an empty thought in the generation prompt and in every answer
        table={
            **ANSWERS,
            "call": ((CALL,), ("It rains.[|endofturn|]",)),
            "result": ((CALL, "It rains.[|endofturn|]"), ("It rains.[|endofturn|]",)),
            "after_result": (("It rains.[|endofturn|]",), ("The sun shines.[|endofturn|]",)),
            "thought": Expected((("4.[|endofturn|]",), ("5.[|endofturn|]",)), {"reasoning_not_printed": 2}),
        },
        **EXAONE,
    ),
    "exaone4_thinking": Template(  # the generation prompt opens a thought; only the last turn has its own
        file="exaone4",
        kwargs={"enable_thinking": True, "skip_think": False},
        table={
            "plain": (
                ("\n</think>\n\nParis.[|endofturn|]",),
                ("\n</think>\n\nLondon.[|endofturn|]",),
            ),
            "system": (
                ("\n</think>\n\nParis.[|endofturn|]",),
                ("\n</think>\n\nIt is Paris, I believe.[|endofturn|]",),
            ),
            "turns": (
                ("\n</think>\n\nParis.[|endofturn|]",),
                ("\n</think>\n\nLondon.[|endofturn|]",),
            ),
            "two_answers": (
                ("\n</think>\n\nParis.[|endofturn|]", "\n</think>\n\nRome.[|endofturn|]"),
                ("\n</think>\n\nLondon.[|endofturn|]", "\n</think>\n\nNo.[|endofturn|]"),
            ),
            "call": (("\n</think>\n\n" + CALL,), ("\n</think>\n\nIt rains.[|endofturn|]",)),
            "result": (
                ("\n</think>\n\n" + CALL, "\n</think>\n\nIt rains.[|endofturn|]"),
                ("\n</think>\n\nIt rains.[|endofturn|]",),
            ),
            "after_result": (
                ("\n</think>\n\nIt rains.[|endofturn|]",),
                ("\n</think>\n\nThe sun shines.[|endofturn|]",),
            ),
            "reasoning": (
                ("Two and two make four.\n</think>\n\n4.[|endofturn|]",),
                ("A guess.\n</think>\n\n5.[|endofturn|]",),
            ),
            "thought": (
                ("Two and two make four.\n</think>\n\n4.[|endofturn|]",),
                ("A guess.\n</think>\n\n5.[|endofturn|]",),
            ),
        },
        **EXAONE,
    ),
    "jamba": Template(  # a header ends with a space, but for the generation prompt's
        bos="<|startoftext|>",
        eos="<|endoftext|>",
        special=(
            *("<|startoftext|>", "<|endoftext|>", "<|bom|>", "<|eom|>"),
            *("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"),
        ),
        table={
            "plain": ((" Paris.<|eom|>",), (" London.<|eom|>",)),
            "system": ((" Paris.<|eom|>",), (" It is Paris, I believe.<|eom|>",)),
            "turns": ((" Paris.<|eom|>",), (" London.<|eom|>",)),
            "two_answers": (
                (" Paris.<|eom|>", " Rome.<|eom|>"),
                (" London.<|eom|>", " No.<|eom|>"),
            ),
            "call": ((CALL_JAMBA,), (" It rains.<|eom|>",)),
            "result": ((CALL_JAMBA, " It rains.<|eom|>"), (" It rains.<|eom|>",)),
            "after_result": ((" It rains.<|eom|>",), (" The sun shines.<|eom|>",)),
            "reasoning": Expected(((" 4.<|eom|>",), (" 5.<|eom|>",)), {"reasoning_not_printed": 2}),
            "thought": (
                (" <think>\nTwo and two make four.\n</think>\n\n4.<|eom|>",),
                (" <think>\nA guess.\n</think>\n\n5.<|eom|>",),
            ),
        },
    ),
    "metharme": Template(  # an EOS ends the conversation; a turn before ends where the user's header begins
        bos="<s>",
        eos="</s>",
        special=("<s>", "</s>", "<|system|>", "<|user|>", "<|model|>"),
        table={
            "plain": (("Paris.</s>",), ("London.</s>",)),
            "system": (("Paris.</s>",), ("It is Paris, I believe.</s>",)),
            "turns": (("Paris.</s>",), ("London.</s>",)),
            "two_answers": Expected((("Paris.", "Rome.</s>"), ("London.", "No.</s>")), {"no_end_of_turn": 2}),
            "call": Expected("content_not_printed"),
            "result": Expected((("It rains.</s>",), ("It rains.</s>",)), NOTHING_OF_TOOLS),
            "after_result": Expected((("It rains.</s>",), ("The sun shines.</s>",)), NOTHING_OF_TOOLS),
            "reasoning": Expected((("4.</s>",), ("5.</s>",)), {"reasoning_not_printed": 2}),
            "thought": (
                ("<think>\nTwo and two make four.\n</think>\n\n4.</s>",),
                ("<think>\nA guess.\n</think>\n\n5.</s>",),
            ),
        },
    ),
}
