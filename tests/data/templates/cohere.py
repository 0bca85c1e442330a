"""Cohere's Command R, R with tools, R7B and A."""

from tests.data.templates.case import Expected, Template

THOUGHT, GUESS = "<think>\nTwo and two make four.\n</think>\n\n4.", "<think>\nA guess.\n</think>\n\n5."
COMMAND_R = {
    "plain": (("Paris.<|END_OF_TURN_TOKEN|>",), ("London.<|END_OF_TURN_TOKEN|>",)),
    "system": (("Paris.<|END_OF_TURN_TOKEN|>",), ("It is Paris, I believe.<|END_OF_TURN_TOKEN|>",)),
    "turns": (("Paris.<|END_OF_TURN_TOKEN|>",), ("London.<|END_OF_TURN_TOKEN|>",)),
    "two_answers": (
        ("Paris.<|END_OF_TURN_TOKEN|>", "Rome.<|END_OF_TURN_TOKEN|>"),
        ("London.<|END_OF_TURN_TOKEN|>", "No.<|END_OF_TURN_TOKEN|>"),
    ),
}
ACTION = (  # ends with a newline alone, which is cut
    '\nAction:\n```json\n[\n    {\n        "tool_name": "weather",\n        "parameters": {"city": "Paris"}\n'
    "    }\n]```"
)
ACTION_A = (
    "<|START_THINKING|><|END_THINKING|><|START_ACTION|>[\n"
    '    {"tool_call_id": "0", "tool_name": "weather", "parameters": {"city": "Paris"}}\n'
    "]<|END_ACTION|><|END_OF_TURN_TOKEN|>"
)
RAINS_A = "<|START_RESPONSE|>It rains.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"
COHERE = {
    "bos": "<BOS_TOKEN>",
    "eos": "<|END_OF_TURN_TOKEN|>",
    "special": (
        *("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        *("<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
        *("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_THINKING|>", "<|END_THINKING|>"),
        *("<|START_ACTION|>", "<|END_ACTION|>", "<|START_TOOL_RESULT|>", "<|END_TOOL_RESULT|>"),
    ),
}

TEMPLATES = {
    "command_r": Template(
        # user and assistant take turns or it raises: a tool's turn is neither
        table={
            **COMMAND_R,
            "call": Expected("content_not_printed"),
            "result": Expected("template_error"),
            "after_result": Expected("template_error"),
            "reasoning": Expected(
                (("4.<|END_OF_TURN_TOKEN|>",), ("5.<|END_OF_TURN_TOKEN|>",)), {"reasoning_not_printed": 2}
            ),
            "thought": ((THOUGHT + "<|END_OF_TURN_TOKEN|>",), (GUESS + "<|END_OF_TURN_TOKEN|>",)),
        },
        **COHERE,
    ),
    "command_r_tools": Template(
        # Its last word is an instruction, before a generation prompt and after a finished answer. An answer
        # stands right behind the turn before it, with its header, which the model does not write.
        # The generation prompt parts from the conversation before the assistant's header: the header is
        # not scored for that.
        table={
            **{name: Expected(scored, {"template_not_prefix": 2}) for name, scored in COMMAND_R.items()},
            "call": Expected(
                ((ACTION,), ("It rains.<|END_OF_TURN_TOKEN|>",)),
                {"template_not_prefix": 2, "no_end_of_turn": 1},
            ),
            "result": Expected(
                ((ACTION, "It rains.<|END_OF_TURN_TOKEN|>"), ("It rains.<|END_OF_TURN_TOKEN|>",)),
                {"template_not_prefix": 2},
            ),
            "after_result": Expected(
                (("It rains.<|END_OF_TURN_TOKEN|>",), ("The sun shines.<|END_OF_TURN_TOKEN|>",)),
                {"template_not_prefix": 2},
            ),
            "reasoning": Expected(
                (("4.<|END_OF_TURN_TOKEN|>",), ("5.<|END_OF_TURN_TOKEN|>",)),
                {"template_not_prefix": 2, "reasoning_not_printed": 2},
            ),
            "thought": Expected(
                ((THOUGHT + "<|END_OF_TURN_TOKEN|>",), (GUESS + "<|END_OF_TURN_TOKEN|>",)),
                {"template_not_prefix": 2},
            ),
        },
        **COHERE,
    ),
    "command_r7b": Template(
        # the generation prompt opens the response
        table={
            "plain": (
                ("Paris.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",),
                ("London.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",),
            ),
            "system": (
                ("Paris.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",),
                ("It is Paris, I believe.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",),
            ),
            "turns": (
                ("Paris.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",),
                ("London.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",),
            ),
            "two_answers": (
                (
                    "Paris.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
                    "Rome.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
                ),
                (
                    "London.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
                    "No.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
                ),
            ),
            "call": Expected("content_not_printed"),
            "result": Expected("template_error"),
            "after_result": Expected("template_error"),
            "reasoning": Expected(
                (("4.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",), ("5.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",)),
                {"reasoning_not_printed": 2},
            ),
            "thought": (
                (THOUGHT + "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",),
                (GUESS + "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",),
            ),
        },
        **COHERE,
    ),
    "command_a": Template(
        # the model opens its response, and a header is printed after every conversation, asked for or not
        table={
            "plain": (
                ("<|START_RESPONSE|>Paris.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",),
                ("<|START_RESPONSE|>London.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",),
            ),
            "system": (
                ("<|START_RESPONSE|>Paris.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",),
                ("<|START_RESPONSE|>It is Paris, I believe.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",),
            ),
            "turns": (
                ("<|START_RESPONSE|>Paris.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",),
                ("<|START_RESPONSE|>London.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",),
            ),
            "two_answers": (
                (
                    "<|START_RESPONSE|>Paris.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
                    "<|START_RESPONSE|>Rome.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
                ),
                (
                    "<|START_RESPONSE|>London.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
                    "<|START_RESPONSE|>No.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
                ),
            ),
            "call": ((ACTION_A,), (RAINS_A,)),
            "result": ((ACTION_A, RAINS_A), (RAINS_A,)),
            "after_result": (
                (RAINS_A,),
                ("<|START_RESPONSE|>The sun shines.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",),
            ),
            "reasoning": Expected(
                (
                    ("<|START_RESPONSE|>4.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",),
                    ("<|START_RESPONSE|>5.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",),
                ),
                {"reasoning_not_printed": 2},
            ),
            "thought": (
                ("<|START_RESPONSE|>" + THOUGHT + "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",),
                ("<|START_RESPONSE|>" + GUESS + "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",),
            ),
        },
        **COHERE,
    ),
}
