"""Gemma 1 and 2 (no system prompt) and Gemma 3 (merged into the first user turn)."""

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
GEMMA = {"bos": "<bos>", "eos": "<eos>", "special": ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")}

TEMPLATES = {
    "gemma2": Template(
        table={**TABLE, "system": Expected("template_error"), "turns": Expected("template_error")}, **GEMMA
    ),
    "gemma3": Template(table=TABLE, **GEMMA),
}
