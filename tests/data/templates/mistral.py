"""Mistral's instruct formats: 7B v0.1, v0.2 and v0.3, Nemo (v3-tekken), Small 3 (v7) and Small 3.2 (v13).

v0.3 and Nemo print the system prompt in the user turn that ends the conversation, and nowhere else: in a
finished conversation it is missing. The answer then stands behind the prompt as it is printed for generation.
"""

from tests.data.templates.case import Expected, Template

CALL_V3 = '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}]</s>'
CALL_V13 = '[TOOL_CALLS]weather[ARGS]{"city": "Paris"}</s>'
ANSWERS = {
    "plain": (("Paris.</s>",), ("London.</s>",)),
    "system": (("Paris.</s>",), ("It is Paris, I believe.</s>",)),
    "turns": (("Paris.</s>",), ("London.</s>",)),
    "two_answers": (("Paris.</s>", "Rome.</s>"), ("London.</s>", "No.</s>")),
    "reasoning": Expected((("4.</s>",), ("5.</s>",)), {"reasoning_not_printed": 2}),
    "thought": (
        ("<think>\nTwo and two make four.\n</think>\n\n4.</s>",),
        ("<think>\nA guess.\n</think>\n\n5.</s>",),
    ),
}
SPACED = {  # a space before the answer, which the generation prompt does not have
    "plain": ((" Paris.</s>",), (" London.</s>",)),
    "system": ((" Paris.</s>",), (" It is Paris, I believe.</s>",)),
    "turns": ((" Paris.</s>",), (" London.</s>",)),
    "two_answers": ((" Paris.</s>", " Rome.</s>"), (" London.</s>", " No.</s>")),
    "reasoning": Expected(((" 4.</s>",), (" 5.</s>",)), {"reasoning_not_printed": 2}),
    "thought": (
        (" <think>\nTwo and two make four.\n</think>\n\n4.</s>",),
        (" <think>\nA guess.\n</think>\n\n5.</s>",),
    ),
}
NO_TOOLS = {  # a tool's turn is refused
    "call": Expected("content_not_printed"),
    "result": Expected("template_error"),
    "after_result": Expected("template_error"),
}
MISTRAL = {"bos": "<s>", "eos": "</s>"}
MARKS = ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
V3 = (*MARKS, "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
V7 = (*V3, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")

TEMPLATES = {
    "mistral_v01": Template(  # no system prompt; a space after the EOS
        special=("<s>", "</s>"),
        table={
            **ANSWERS,
            **NO_TOOLS,
            "system": Expected("template_error"),
            "turns": Expected("template_error"),
        },
        **MISTRAL,
    ),
    "mistral": Template(special=("<s>", "</s>"), table={**SPACED, **NO_TOOLS}, **MISTRAL),  # v0.2's
    "mistral_v3": Template(  # tools before the last user turn
        special=V3,
        table={
            **SPACED,
            "system": Expected(
                ((" Paris.</s>",), (" It is Paris, I believe.</s>",)), {"prompt_as_for_generation": 2}
            ),
            "turns": Expected(((" Paris.</s>",), (" London.</s>",)), {"prompt_as_for_generation": 2}),
            "call": ((CALL_V3,), (" It rains.</s>",)),
            "result": ((CALL_V3, " It rains.</s>"), (" It rains.</s>",)),
            "after_result": ((" It rains.</s>",), (" The sun shines.</s>",)),
        },
        **MISTRAL,
    ),
    "mistral_nemo": Template(  # refuses a call without an id
        special=V3,
        table={
            **ANSWERS,
            "system": Expected(
                (("Paris.</s>",), ("It is Paris, I believe.</s>",)), {"prompt_as_for_generation": 2}
            ),
            "turns": Expected((("Paris.</s>",), ("London.</s>",)), {"prompt_as_for_generation": 2}),
            "call": Expected("template_error"),
            "result": Expected("template_error"),
            "after_result": Expected("template_error"),
        },
        **MISTRAL,
    ),
    "mistral_v7": Template(  # a system prompt of its own, with the date
        special=V7, kwargs={"today": "2026-01-01"}, table={**ANSWERS, **NO_TOOLS}, **MISTRAL
    ),
    "mistral_v13": Template(
        special=(*V7, "[ARGS]"),
        table={
            **ANSWERS,
            "call": ((CALL_V13,), ("It rains.</s>",)),
            "result": ((CALL_V13, "It rains.</s>"), ("It rains.</s>",)),
            "after_result": (("It rains.</s>",), ("The sun shines.</s>",)),
        },
        **MISTRAL,
    ),
}
