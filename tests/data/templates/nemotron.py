"""Nemotron 3: every turn has a thought, an empty one without a newline, which the generation prompt has."""

from tests.data.templates.case import Expected, Template
from tests.data.templates.qwen import ANSWERS

CALL = (  # a newline stands before its end of turn
    "\n<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>\n"
    "<|im_end|>"
)
NEMOTRON = {
    "eos": "<|im_end|>",
    "special": ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"),
}

TEMPLATES = {
    "nemotron3": Template(
        table={
            "plain": Expected(
                (("</think>Paris.<|im_end|>",), ("</think>London.<|im_end|>",)), {"template_not_prefix": 2}
            ),
            "system": Expected(
                (("</think>Paris.<|im_end|>",), ("</think>It is Paris, I believe.<|im_end|>",)),
                {"template_not_prefix": 2},
            ),
            "turns": Expected(
                (("</think>Paris.<|im_end|>",), ("</think>London.<|im_end|>",)), {"template_not_prefix": 2}
            ),
            "two_answers": Expected(
                (
                    ("</think>Paris.<|im_end|>", "</think>Rome.<|im_end|>"),
                    ("</think>London.<|im_end|>", "</think>No.<|im_end|>"),
                ),
                {"template_not_prefix": 2},
            ),
            "call": Expected(
                (("</think>" + CALL,), ("</think>It rains.<|im_end|>",)), {"template_not_prefix": 2}
            ),
            "result": Expected(
                (("</think>" + CALL, "</think>It rains.<|im_end|>"), ("</think>It rains.<|im_end|>",)),
                {"template_not_prefix": 2},
            ),
            "after_result": Expected(
                (("</think>It rains.<|im_end|>",), ("</think>The sun shines.<|im_end|>",)),
                {"template_not_prefix": 2},
            ),
            "reasoning": (
                ("Two and two make four.\n</think>\n4.<|im_end|>",),
                ("A guess.\n</think>\n5.<|im_end|>",),
            ),
            "thought": (
                ("Two and two make four.\n</think>\n\n4.<|im_end|>",),
                ("A guess.\n</think>\n\n5.<|im_end|>",),
            ),
        },
        **NEMOTRON,
    ),
    "nemotron3_no_thinking": Template(
        file="nemotron3",
        kwargs={"enable_thinking": False},
        table={
            **{name: ANSWERS[name] for name in ("plain", "system", "turns", "two_answers")},
            "call": ((CALL,), ("It rains.<|im_end|>",)),
            "result": ((CALL, "It rains.<|im_end|>"), ("It rains.<|im_end|>",)),
            "after_result": (("It rains.<|im_end|>",), ("The sun shines.<|im_end|>",)),
            "reasoning": Expected(
                (
                    ("\nTwo and two make four.\n</think>\n4.<|im_end|>",),
                    ("\nA guess.\n</think>\n5.<|im_end|>",),
                ),
                {"template_not_prefix": 2},
            ),
            "thought": Expected(
                (
                    ("\nTwo and two make four.\n</think>\n\n4.<|im_end|>",),
                    ("\nA guess.\n</think>\n\n5.<|im_end|>",),
                ),
                {"template_not_prefix": 2},
            ),
        },
        **NEMOTRON,
    ),
}
