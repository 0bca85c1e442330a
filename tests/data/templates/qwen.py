"""Qwen 2, 2.5, and 3 as it answers at once: ChatML with a call as JSON, and results inside a user's turn."""

from tests.data.templates.case import Expected, Template

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'
ANSWERS = {  # where an answer is printed as it is
    "plain": (("Paris.<|im_end|>",), ("London.<|im_end|>",)),
    "system": (("Paris.<|im_end|>",), ("It is Paris, I believe.<|im_end|>",)),
    "turns": (("Paris.<|im_end|>",), ("London.<|im_end|>",)),
    "two_answers": (("Paris.<|im_end|>", "Rome.<|im_end|>"), ("London.<|im_end|>", "No.<|im_end|>")),
    "reasoning": Expected((("4.<|im_end|>",), ("5.<|im_end|>",)), {"reasoning_not_printed": 2}),
    "thought": (
        ("<think>\nTwo and two make four.\n</think>\n\n4.<|im_end|>",),
        ("<think>\nA guess.\n</think>\n\n5.<|im_end|>",),
    ),
}
CALLS = {
    "call": (
        (CALL,),
        ("It rains.<|im_end|>",),
    ),
    "result": (
        (
            CALL,
            "It rains.<|im_end|>",
        ),
        ("It rains.<|im_end|>",),
    ),
    "after_result": (("It rains.<|im_end|>",), ("The sun shines.<|im_end|>",)),
}
NO_CALLS = {  # ChatML's: the call and the tools vanish, the result is a turn of its own role
    "call": Expected("content_not_printed"),
    "result": Expected(
        (("It rains.<|im_end|>",), ("It rains.<|im_end|>",)),
        {"tools_not_printed": 1, "tool_call_not_printed": 1},
    ),
    "after_result": Expected(
        (("It rains.<|im_end|>",), ("The sun shines.<|im_end|>",)),
        {"tools_not_printed": 1, "tool_call_not_printed": 1},
    ),
}
QWEN = {"eos": "<|im_end|>", "special": ("<|im_start|>", "<|im_end|>", "<|endoftext|>")}

TEMPLATES = {
    "qwen2": Template(table=ANSWERS | NO_CALLS, **QWEN),  # a default system prompt
    "qwen2_5": Template(table=ANSWERS | CALLS, **QWEN),  # the same
    "qwen3_instruct": Template(table=ANSWERS | CALLS, **QWEN),  # of 2507: no system prompt, no thoughts
    "qwen3": Template(
        # The last turn has a thought, be it empty, which the model would write itself. Turns before the last
        # question have none, nor has a call that others follow.
        table={
            "plain": (
                ("<think>\n\n</think>\n\nParis.<|im_end|>",),
                ("<think>\n\n</think>\n\nLondon.<|im_end|>",),
            ),
            "system": (
                ("<think>\n\n</think>\n\nParis.<|im_end|>",),
                ("<think>\n\n</think>\n\nIt is Paris, I believe.<|im_end|>",),
            ),
            "turns": (
                ("<think>\n\n</think>\n\nParis.<|im_end|>",),
                ("<think>\n\n</think>\n\nLondon.<|im_end|>",),
            ),
            "two_answers": (
                ("Paris.<|im_end|>", "<think>\n\n</think>\n\nRome.<|im_end|>"),
                ("London.<|im_end|>", "<think>\n\n</think>\n\nNo.<|im_end|>"),
            ),
            "call": (
                ("<think>\n\n</think>\n\n" + CALL,),
                ("<think>\n\n</think>\n\nIt rains.<|im_end|>",),
            ),
            "result": (
                (
                    CALL,
                    "<think>\n\n</think>\n\nIt rains.<|im_end|>",
                ),
                ("<think>\n\n</think>\n\nIt rains.<|im_end|>",),
            ),
            "after_result": (
                ("<think>\n\n</think>\n\nIt rains.<|im_end|>",),
                ("<think>\n\n</think>\n\nThe sun shines.<|im_end|>",),
            ),
            "reasoning": (
                ("<think>\nTwo and two make four.\n</think>\n\n4.<|im_end|>",),
                ("<think>\nA guess.\n</think>\n\n5.<|im_end|>",),
            ),
            "thought": (
                ("<think>\nTwo and two make four.\n</think>\n\n4.<|im_end|>",),
                ("<think>\nA guess.\n</think>\n\n5.<|im_end|>",),
            ),
        },
        **QWEN,
    ),
    "qwen3_no_thinking": Template(
        file="qwen3",
        kwargs={"enable_thinking": False},
        # The generation prompt has the empty thought. A turn printed without it starts where they part.
        table={
            "plain": (("Paris.<|im_end|>",), ("London.<|im_end|>",)),
            "system": (("Paris.<|im_end|>",), ("It is Paris, I believe.<|im_end|>",)),
            "turns": (("Paris.<|im_end|>",), ("London.<|im_end|>",)),
            "two_answers": Expected(
                (("Paris.<|im_end|>", "Rome.<|im_end|>"), ("London.<|im_end|>", "No.<|im_end|>")),
                {"template_not_prefix": 2},
            ),
            "call": CALLS["call"],
            "result": Expected(CALLS["result"], {"template_not_prefix": 1}),
            "after_result": CALLS["after_result"],
            "reasoning": Expected(
                (
                    ("Two and two make four.\n</think>\n\n4.<|im_end|>",),
                    ("A guess.\n</think>\n\n5.<|im_end|>",),
                ),
                {"template_not_prefix": 2},
            ),
            "thought": Expected(
                (
                    ("Two and two make four.\n</think>\n\n4.<|im_end|>",),
                    ("A guess.\n</think>\n\n5.<|im_end|>",),
                ),
                {"template_not_prefix": 2},
            ),
        },
        **QWEN,
    ),
}
