"""ChatML, which knows no tools and no reasoning."""

from tests.data.templates.case import Expected, Template

TEMPLATES = {
    "chatml": Template(
        eos="<|im_end|>",
        special=("<|im_start|>", "<|im_end|>"),
        table={
            "plain": (("Paris.<|im_end|>",), ("London.<|im_end|>",)),
            "system": (("Paris.<|im_end|>",), ("It is Paris, I believe.<|im_end|>",)),
            "turns": (("Paris.<|im_end|>",), ("London.<|im_end|>",)),
            "two_answers": (
                ("Paris.<|im_end|>", "Rome.<|im_end|>"),
                ("London.<|im_end|>", "No.<|im_end|>"),
            ),
            "call": Expected(
                "content_not_printed"
            ),  # the call vanishes: chosen would be an end of turn alone
            "result": Expected(
                (("It rains.<|im_end|>",), ("It rains.<|im_end|>",)),
                {"tools_not_printed": 1, "tool_call_not_printed": 1},
            ),
            "after_result": Expected(
                (("It rains.<|im_end|>",), ("The sun shines.<|im_end|>",)),
                {"tools_not_printed": 1, "tool_call_not_printed": 1},
            ),
            "reasoning": Expected((("4.<|im_end|>",), ("5.<|im_end|>",)), {"reasoning_not_printed": 2}),
            "thought": (
                ("<think>\nTwo and two make four.\n</think>\n\n4.<|im_end|>",),
                ("<think>\nA guess.\n</think>\n\n5.<|im_end|>",),
            ),
        },
    ),
}
