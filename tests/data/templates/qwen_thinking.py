"""Qwen models whose generation prompt opens a thought: 3 of 2507, QwQ and 3.5."""

from tests.data.templates.case import Expected, Template
from tests.data.templates.qwen import ANSWERS, CALL, CALLS, QWEN

CALL_3_5 = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n"
    "</function>\n</tool_call><|im_end|>"
)
THOUGHTS = (  # written to the end of what the generation prompt opens
    ("Two and two make four.\n</think>\n\n4.<|im_end|>",),
    ("A guess.\n</think>\n\n5.<|im_end|>",),
)
EMPTY_THOUGHTS = {  # a turn without a thought ends the one that the generation prompt opens
    "plain": (("\n</think>\n\nParis.<|im_end|>",), ("\n</think>\n\nLondon.<|im_end|>",)),
    "system": (
        ("\n</think>\n\nParis.<|im_end|>",),
        ("\n</think>\n\nIt is Paris, I believe.<|im_end|>",),
    ),
    "turns": (("\n</think>\n\nParis.<|im_end|>",), ("\n</think>\n\nLondon.<|im_end|>",)),
    "two_answers": Expected(
        (
            ("Paris.<|im_end|>", "\n</think>\n\nRome.<|im_end|>"),
            ("London.<|im_end|>", "\n</think>\n\nNo.<|im_end|>"),
        ),
        {"template_not_prefix": 2},
    ),
}

TEMPLATES = {
    "qwen3_thinking": Template(
        file="qwen3",
        kwargs={"only_thinks": True},
        # The empty thought of the last turn is scored from where the generation prompt leaves off. A turn
        # without a thought starts where they part.
        table={
            **EMPTY_THOUGHTS,
            "call": (
                ("\n</think>\n\n" + CALL,),
                ("\n</think>\n\nIt rains.<|im_end|>",),
            ),
            "result": Expected(
                (
                    (
                        CALL,
                        "\n</think>\n\nIt rains.<|im_end|>",
                    ),
                    ("\n</think>\n\nIt rains.<|im_end|>",),
                ),
                {"template_not_prefix": 1},
            ),
            "after_result": (
                ("\n</think>\n\nIt rains.<|im_end|>",),
                ("\n</think>\n\nThe sun shines.<|im_end|>",),
            ),
            "reasoning": THOUGHTS,
            "thought": THOUGHTS,
        },
        **QWEN,
    ),
    "qwq": Template(
        # An answer without a thought is printed without one, and reasoning_content is not known. A call
        # begins like the thought, with "<t": its tag is not cut.
        table={
            "plain": Expected(ANSWERS["plain"], {"template_not_prefix": 2}),
            "system": Expected(ANSWERS["system"], {"template_not_prefix": 2}),
            "turns": Expected(ANSWERS["turns"], {"template_not_prefix": 2}),
            "two_answers": Expected(ANSWERS["two_answers"], {"template_not_prefix": 2}),
            "call": Expected(CALLS["call"], {"template_not_prefix": 2}),
            "result": Expected(CALLS["result"], {"template_not_prefix": 2}),
            "after_result": Expected(CALLS["after_result"], {"template_not_prefix": 2}),
            "reasoning": Expected(
                (("4.<|im_end|>",), ("5.<|im_end|>",)), {"reasoning_not_printed": 2, "template_not_prefix": 2}
            ),
            "thought": THOUGHTS,
        },
        **QWEN,
    ),
    "qwen3_5": Template(
        # Every turn after the last question has a thought, a call that others follow too.
        table={
            **EMPTY_THOUGHTS,
            "call": (("\n</think>\n\n" + CALL_3_5,), ("\n</think>\n\nIt rains.<|im_end|>",)),
            "result": (
                ("\n</think>\n\n" + CALL_3_5, "\n</think>\n\nIt rains.<|im_end|>"),
                ("\n</think>\n\nIt rains.<|im_end|>",),
            ),
            "after_result": (
                ("\n</think>\n\nIt rains.<|im_end|>",),
                ("\n</think>\n\nThe sun shines.<|im_end|>",),
            ),
            "reasoning": THOUGHTS,
            "thought": THOUGHTS,
        },
        **QWEN,
    ),
    "qwen3_5_no_thinking": Template(
        file="qwen3_5",
        kwargs={"enable_thinking": False},
        table={
            "plain": ANSWERS["plain"],
            "system": ANSWERS["system"],
            "turns": ANSWERS["turns"],
            "two_answers": Expected(ANSWERS["two_answers"], {"template_not_prefix": 2}),
            "call": ((CALL_3_5,), ("It rains.<|im_end|>",)),
            "result": ((CALL_3_5, "It rains.<|im_end|>"), ("It rains.<|im_end|>",)),
            "after_result": (("It rains.<|im_end|>",), ("The sun shines.<|im_end|>",)),
            "reasoning": Expected(THOUGHTS, {"template_not_prefix": 2}),
            "thought": Expected(THOUGHTS, {"template_not_prefix": 2}),
        },
        **QWEN,
    ),
}
