"""Families whose headers are plain text: Zephyr (and TinyLlama), Vicuna, Alpaca, Falcon; and Falcon-H1."""

from tests.data.templates.case import Expected, Template
from tests.data.templates.mistral import ANSWERS, NO_TOOLS, SPACED

NOTHING_OF_TOOLS = {"tools_not_printed": 1, "tool_call_not_printed": 1, "tool_result_not_printed": 1}
LEAVES_OUT = {  # a call is an empty answer, and a tool's turn is nothing
    "call": Expected("content_not_printed"),
    "result": Expected((("It rains.</s>",), ("It rains.</s>",)), NOTHING_OF_TOOLS),
    "after_result": Expected((("It rains.</s>",), ("The sun shines.</s>",)), NOTHING_OF_TOOLS),
}
LLAMA = {"bos": "<s>", "eos": "</s>", "special": ("<s>", "</s>")}

TEMPLATES = {
    "zephyr": Template(table={**ANSWERS, **LEAVES_OUT}, **LLAMA),
    "vicuna": Template(table={**SPACED, **NO_TOOLS}, **LLAMA),  # "ASSISTANT:" asks, "ASSISTANT: " answers
    "alpaca": Template(table={**ANSWERS, **LEAVES_OUT}, **LLAMA),
    "falcon": Template(  # turns end with a newline, and the last one with nothing
        eos="<|endoftext|>",
        special=("<|endoftext|>",),
        table={
            "plain": Expected(((" Paris.",), (" London.",)), {"no_end_of_turn": 2}),
            "system": Expected(((" Paris.",), (" It is Paris, I believe.",)), {"no_end_of_turn": 2}),
            "turns": Expected(((" Paris.",), (" London.",)), {"no_end_of_turn": 2}),
            "two_answers": Expected(((" Paris.", " Rome."), (" London.", " No.")), {"no_end_of_turn": 2}),
            "call": Expected("content_not_printed"),
            "result": Expected(  # the result is printed, under no name
                ((" It rains.",), (" It rains.",)),
                {"no_end_of_turn": 2, "tools_not_printed": 1, "tool_call_not_printed": 1},
            ),
            "after_result": Expected(
                ((" It rains.",), (" The sun shines.",)),
                {"no_end_of_turn": 2, "tools_not_printed": 1, "tool_call_not_printed": 1},
            ),
            "reasoning": Expected(((" 4.",), (" 5.",)), {"no_end_of_turn": 2, "reasoning_not_printed": 2}),
            "thought": Expected(
                (
                    (" <think>\nTwo and two make four.\n</think>\n\n4.",),
                    (" <think>\nA guess.\n</think>\n\n5.",),
                ),
                {"no_end_of_turn": 2},
            ),
        },
    ),
    "falcon_h1": Template(  # prints the tools, in a system turn that it leaves open, and no calls
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        special=("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"),
        table={
            "plain": (("Paris.<|im_end|>",), ("London.<|im_end|>",)),
            "system": (("Paris.<|im_end|>",), ("It is Paris, I believe.<|im_end|>",)),
            "turns": (("Paris.<|im_end|>",), ("London.<|im_end|>",)),
            "two_answers": (
                ("Paris.<|im_end|>", "Rome.<|im_end|>"),
                ("London.<|im_end|>", "No.<|im_end|>"),
            ),
            "call": Expected("content_not_printed"),
            "result": Expected(
                (("It rains.<|im_end|>",), ("It rains.<|im_end|>",)), {"tool_call_not_printed": 1}
            ),
            "after_result": Expected(
                (("It rains.<|im_end|>",), ("The sun shines.<|im_end|>",)), {"tool_call_not_printed": 1}
            ),
            "reasoning": Expected((("4.<|im_end|>",), ("5.<|im_end|>",)), {"reasoning_not_printed": 2}),
            "thought": (
                ("<think>\nTwo and two make four.\n</think>\n\n4.<|im_end|>",),
                ("<think>\nA guess.\n</think>\n\n5.<|im_end|>",),
            ),
        },
    ),
}
