"""Kimi K2, Hermes 2 with tools, ERNIE 4.5 and Hunyuan."""

from tests.data.templates.case import Expected, Template
from tests.data.templates.qwen import ANSWERS, CALLS

KIMI_CALL = (
    '<|tool_calls_section_begin|><|tool_call_begin|><|tool_call_argument_begin|>{"city": "Paris"}'
    "<|tool_call_end|><|tool_calls_section_end|><|im_end|>"
)
HUNYUAN_CALL = '<tool_calls>[{"name": "weather", "arguments": {"city": "Paris"}}]</tool_calls><|eos|>'
HUNYUAN_ANSWERS = {
    "plain": (("Paris.<|eos|>",), ("London.<|eos|>",)),
    "system": (("Paris.<|eos|>",), ("It is Paris, I believe.<|eos|>",)),
    "turns": (("Paris.<|eos|>",), ("London.<|eos|>",)),
    "two_answers": (("Paris.<|eos|>", "Rome.<|eos|>"), ("London.<|eos|>", "No.<|eos|>")),
    "call": ((HUNYUAN_CALL,), ("Assistant: It rains.<|eos|>",)),
    "result": ((HUNYUAN_CALL, "Assistant: It rains.<|eos|>"), ("Assistant: It rains.<|eos|>",)),
    "after_result": (("Assistant: It rains.<|eos|>",), ("Assistant: The sun shines.<|eos|>",)),
}
HUNYUAN = {
    "eos": "<|eos|>",
    "bos": "<|startoftext|>",
    "special": ("<|startoftext|>", "<|eos|>", "<|extra_0|>", "<|extra_4|>"),
}

TEMPLATES = {
    "kimi_k2": Template(
        eos="<|im_end|>",
        special=(
            *("<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>"),
            *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
            *("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
        ),
        # A call's function stands in its id alone, and these calls have none.
        # The arguments are printed and scored, but of whose call they are the turn does not say.
        table={
            **ANSWERS,
            "call": Expected(((KIMI_CALL,), ("It rains.<|im_end|>",)), {"tool_call_not_printed": 1}),
            "result": Expected(
                ((KIMI_CALL, "It rains.<|im_end|>"), ("It rains.<|im_end|>",)), {"tool_call_not_printed": 1}
            ),
            "after_result": Expected(CALLS["after_result"], {"tool_call_not_printed": 1}),
        },
    ),
    "hermes_tools": Template(
        eos="<|im_end|>",
        bos="<|begin_of_text|>",
        special=("<|begin_of_text|>", "<|im_start|>", "<|im_end|>", "<|end_of_text|>"),
        # A result has a newline more where it is not the last.
        # The generation prompt parts from the conversation there, before the assistant's header: the
        # result's end and the header are not scored for that.
        table={
            **ANSWERS,
            "call": CALLS["call"],
            "result": Expected(CALLS["result"], {"template_not_prefix": 1}),
            "after_result": Expected(CALLS["after_result"], {"template_not_prefix": 2}),
        },
    ),
    "ernie4_5": Template(  # headers are words; the header's space belongs to it; no tools, no results
        eos="</s>",
        bos="<|begin_of_sentence|>",
        special=("<|begin_of_sentence|>", "</s>", "<|end_of_sentence|>"),
        table={
            "plain": (("Paris.</s>",), ("London.</s>",)),
            "system": (("Paris.</s>",), ("It is Paris, I believe.</s>",)),
            "turns": (("Paris.</s>",), ("London.</s>",)),
            "two_answers": (("Paris.</s>", "Rome.</s>"), ("London.</s>", "No.</s>")),
            "call": Expected("content_not_printed"),
            "result": Expected(
                (("It rains.</s>",), ("It rains.</s>",)),
                {"tools_not_printed": 1, "tool_call_not_printed": 1, "tool_result_not_printed": 1},
            ),
            "after_result": Expected(
                (("It rains.</s>",), ("The sun shines.</s>",)),
                {"tools_not_printed": 1, "tool_call_not_printed": 1, "tool_result_not_printed": 1},
            ),
            "reasoning": Expected((("4.</s>",), ("5.</s>",)), {"reasoning_not_printed": 2}),
            "thought": (
                ("<think>\nTwo and two make four.\n</think>\n\n4.</s>",),
                ("<think>\nA guess.\n</think>\n\n5.</s>",),
            ),
        },
    ),
    "hunyuan": Template(  # no generation prompt: beside tools the model writes "Assistant: " itself
        table={
            **HUNYUAN_ANSWERS,
            "reasoning": Expected((("4.<|eos|>",), ("5.<|eos|>",)), {"reasoning_not_printed": 2}),
            "thought": (
                ("<think>\nTwo and two make four.\n</think>\n\n4.<|eos|>",),
                ("<think>\nA guess.\n</think>\n\n5.<|eos|>",),
            ),
        },
        **HUNYUAN,
    ),
    "hunyuan_no_thinking": Template(
        file="hunyuan",
        kwargs={"enable_thinking": False},
        # an empty thought after every conversation, a finished one too
        table={
            **{
                name: Expected(scored, {"template_not_prefix": 2}) for name, scored in HUNYUAN_ANSWERS.items()
            },
            "reasoning": Expected(
                (("4.<|eos|>",), ("5.<|eos|>",)), {"reasoning_not_printed": 2, "template_not_prefix": 2}
            ),
            # The content begins as the empty thought does: all of the content is the answer's.
            "thought": Expected(
                (
                    ("<think>\nTwo and two make four.\n</think>\n\n4.<|eos|>",),
                    ("<think>\nA guess.\n</think>\n\n5.<|eos|>",),
                ),
                {"template_not_prefix": 2},
            ),
        },
        **HUNYUAN,
    ),
}
