"""DeepSeek V2 to V3.1, R1 and its distillations. Headers and tool markup are tokens, but not special ones."""

from tests.data.templates.case import Expected, Scored, Template

CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"
    '```json\n{"city": "Paris"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>'
)
CALL_3_1 = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜>'
    "<｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
)
PARIS, LONDON = "Paris.<｜end▁of▁sentence｜>", "London.<｜end▁of▁sentence｜>"
I_BELIEVE = "It is Paris, I believe.<｜end▁of▁sentence｜>"
ROME, NO = "Rome.<｜end▁of▁sentence｜>", "No.<｜end▁of▁sentence｜>"
RAINS, SHINES = "It rains.<｜end▁of▁sentence｜>", "The sun shines.<｜end▁of▁sentence｜>"
FOUR, FIVE = "4.<｜end▁of▁sentence｜>", "5.<｜end▁of▁sentence｜>"

ANSWERS: dict[str, tuple[Scored, Scored]] = {
    "plain": ((PARIS,), (LONDON,)),
    "system": ((PARIS,), (I_BELIEVE,)),
    "turns": ((PARIS,), (LONDON,)),
    "two_answers": ((PARIS, ROME), (LONDON, NO)),
}
WITHOUT_THOUGHTS = {  # they are cut out of the content, and what follows them stays with its white space
    "reasoning": Expected(((FOUR,), (FIVE,)), {"reasoning_not_printed": 2}),
    "thought": Expected((("\n\n" + FOUR,), ("\n\n" + FIVE,)), {"reasoning_not_printed": 2}),
}
# R1's generation prompt opens a thought that no finished conversation has: an answer starts after the header.
R1 = {name: Expected(scored, {"template_not_prefix": 2}) for name, scored in ANSWERS.items()} | {
    name: Expected(kept.scored, {"reasoning_not_printed": 2, "template_not_prefix": 2})
    for name, kept in WITHOUT_THOUGHTS.items()
}
DEEPSEEK = {
    "bos": "<｜begin▁of▁sentence｜>",
    "eos": "<｜end▁of▁sentence｜>",
    "special": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"),
}

TEMPLATES = {
    "deepseek_v2": Template(  # knows no tools: the result vanishes too
        table={
            **ANSWERS,
            "call": Expected("content_not_printed"),
            "result": Expected(
                ((RAINS,), (RAINS,)),
                {"tools_not_printed": 1, "tool_call_not_printed": 1, "tool_result_not_printed": 1},
            ),
            "after_result": Expected(
                ((RAINS,), (SHINES,)),
                {"tools_not_printed": 1, "tool_call_not_printed": 1, "tool_result_not_printed": 1},
            ),
            "reasoning": WITHOUT_THOUGHTS["reasoning"],
            "thought": (
                ("<think>\nTwo and two make four.\n</think>\n\n4.<｜end▁of▁sentence｜>",),
                ("<think>\nA guess.\n</think>\n\n5.<｜end▁of▁sentence｜>",),
            ),
        },
        **DEEPSEEK,
    ),
    "deepseek_v3": Template(  # an answer after a result has the results' end for its header
        table={
            **ANSWERS,
            "call": ((CALL,), (RAINS,)),
            "result": ((CALL, RAINS), (RAINS,)),
            "after_result": ((RAINS,), (SHINES,)),
            **WITHOUT_THOUGHTS,
        },
        **DEEPSEEK,
    ),
    "deepseek_r1": Template(  # takes a call's arguments as text
        table={
            **R1,
            "call": Expected(((CALL,), (RAINS,)), {"tools_not_printed": 1, "template_not_prefix": 2}),
            "result": Expected(((CALL, RAINS), (RAINS,)), {"tools_not_printed": 1, "template_not_prefix": 2}),
            "after_result": Expected(((RAINS,), (SHINES,)), {"tools_not_printed": 1}),
        },
        **DEEPSEEK,
    ),
    "deepseek_r1_distill": Template(  # a lone call is not closed, and no EOS ends it
        table={
            **R1,
            "call": Expected(
                (
                    (
                        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"
                        '```json\n{"city": "Paris"}\n```<｜tool▁call▁end｜>',
                    ),
                    (RAINS,),
                ),
                {"tools_not_printed": 1, "template_not_prefix": 2},
            ),
            "result": Expected(
                (
                    (
                        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"
                        '```json\n{"city": "Paris"}\n```<｜tool▁call▁end｜>',
                        RAINS,
                    ),
                    (RAINS,),
                ),
                {"tools_not_printed": 1, "template_not_prefix": 2},
            ),
            "after_result": Expected(((RAINS,), (SHINES,)), {"tools_not_printed": 1}),
        },
        **DEEPSEEK,
    ),
    "deepseek_v3_1": Template(  # an answer after a result has no header at all
        table={
            **ANSWERS,
            "call": ((CALL_3_1,), (RAINS,)),
            "result": ((CALL_3_1, RAINS), (RAINS,)),
            "after_result": ((RAINS,), (SHINES,)),
            **WITHOUT_THOUGHTS,
        },
        **DEEPSEEK,
    ),
    "deepseek_v3_1_thinking": Template(
        file="deepseek_v3_1",
        kwargs={"thinking": True},
        # The generation prompt ends in <think>, and every finished turn begins with </think>.
        table={
            "plain": Expected(
                (("</think>Paris.<｜end▁of▁sentence｜>",), ("</think>London.<｜end▁of▁sentence｜>",)),
                {"template_not_prefix": 2},
            ),
            "system": Expected(
                (
                    ("</think>Paris.<｜end▁of▁sentence｜>",),
                    ("</think>It is Paris, I believe.<｜end▁of▁sentence｜>",),
                ),
                {"template_not_prefix": 2},
            ),
            "turns": Expected(
                (("</think>Paris.<｜end▁of▁sentence｜>",), ("</think>London.<｜end▁of▁sentence｜>",)),
                {"template_not_prefix": 2},
            ),
            "two_answers": Expected(
                (
                    ("</think>Paris.<｜end▁of▁sentence｜>", "</think>Rome.<｜end▁of▁sentence｜>"),
                    ("</think>London.<｜end▁of▁sentence｜>", "</think>No.<｜end▁of▁sentence｜>"),
                ),
                {"template_not_prefix": 2},
            ),
            "call": Expected(
                (("</think>" + CALL_3_1,), ("</think>It rains.<｜end▁of▁sentence｜>",)),
                {"template_not_prefix": 2},
            ),
            "result": Expected(
                (("</think>" + CALL_3_1, RAINS), ("</think>It rains.<｜end▁of▁sentence｜>",)),
                {"template_not_prefix": 2},
            ),
            "after_result": ((RAINS,), (SHINES,)),
            "reasoning": Expected(
                (("</think>4.<｜end▁of▁sentence｜>",), ("</think>5.<｜end▁of▁sentence｜>",)),
                {"reasoning_not_printed": 2, "template_not_prefix": 2},
            ),
            "thought": Expected(
                (("</think>\n\n4.<｜end▁of▁sentence｜>",), ("</think>\n\n5.<｜end▁of▁sentence｜>",)),
                {"reasoning_not_printed": 2, "template_not_prefix": 2},
            ),
        },
        **DEEPSEEK,
    ),
}
