"""Gemma 1 and 2 (no system prompt), Gemma 3 (merged into the first user turn) and Gemma 4."""

from tests.data.templates.case import Expected, Template

TABLE = {
    "plain": (("Paris.<end_of_turn>",), ("London.<end_of_turn>",)),
    "system": (("Paris.<end_of_turn>",), ("It is Paris, I believe.<end_of_turn>",)),
    "turns": (("Paris.<end_of_turn>",), ("London.<end_of_turn>",)),
    "two_answers": (
        ("Paris.<end_of_turn>", "Rome.<end_of_turn>"),
        ("London.<end_of_turn>", "No.<end_of_turn>"),
    ),
    "call": Expected("content_not_printed"),
    "result": Expected("template_error"),  # a tool's turn where the user's must be
    "after_result": Expected("template_error"),
    "reasoning": Expected((("4.<end_of_turn>",), ("5.<end_of_turn>",)), {"reasoning_not_printed": 2}),
    "thought": (
        ("<think>\nTwo and two make four.\n</think>\n\n4.<end_of_turn>",),
        ("<think>\nA guess.\n</think>\n\n5.<end_of_turn>",),
    ),
}
# The model writes <|tool_response> and stops; the result follows, and then the answer, in the same turn.
CALL_4 = '<|tool_call>call:weather{city:<|"|>Paris<|"|>}<tool_call|><|tool_response>'
TABLE_4 = {
    "plain": (("Paris.<turn|>",), ("London.<turn|>",)),
    "system": (("Paris.<turn|>",), ("It is Paris, I believe.<turn|>",)),
    "turns": (("Paris.<turn|>",), ("London.<turn|>",)),
    "two_answers": (("Paris.<turn|>", "Rome.<turn|>"), ("London.<turn|>", "No.<turn|>")),
    "call": ((CALL_4,), ("It rains.<turn|>",)),
    "result": ((CALL_4, "It rains.<turn|>"), ("It rains.<turn|>",)),
    "after_result": (("It rains.<turn|>",), ("The sun shines.<turn|>",)),
    "reasoning": (
        ("<|channel>thought\nTwo and two make four.\n<channel|>4.<turn|>",),
        ("<|channel>thought\nA guess.\n<channel|>5.<turn|>",),
    ),
    "thought": (
        ("<think>\nTwo and two make four.\n</think>\n\n4.<turn|>",),
        ("<think>\nA guess.\n</think>\n\n5.<turn|>",),
    ),
}
GEMMA = {"bos": "<bos>", "eos": "<eos>", "special": ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")}
GEMMA_4 = {
    "bos": "<bos>",
    "eos": "<eos>",
    "special": (
        *("<bos>", "<eos>", "<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>", '<|"|>'),
        *("<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"),
    ),
}

TEMPLATES = {
    "gemma2": Template(
        table={**TABLE, "system": Expected("template_error"), "turns": Expected("template_error")}, **GEMMA
    ),
    "gemma": Template(table=TABLE, **GEMMA),  # as Gemma 3 has it
    "gemma4": Template(table=TABLE_4, **GEMMA_4),
    "gemma4_thinking": Template(  # after a result a thought is opened for the model
        file="gemma4",
        kwargs={"enable_thinking": True},
        table={
            **TABLE_4,
            "result": Expected(
                ((CALL_4, "It rains.<turn|>"), ("It rains.<turn|>",)), {"template_not_prefix": 1}
            ),
            "after_result": Expected(
                (("It rains.<turn|>",), ("The sun shines.<turn|>",)), {"template_not_prefix": 2}
            ),
        },
        **GEMMA_4,
    ),
}
