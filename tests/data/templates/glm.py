"""GLM-4.5: a newline and a thought belong to the answer, and nothing ends it but the next turn's header."""

from tests.data.templates.case import Expected, Template

CALL = "\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>"
GLM = {
    "eos": "<|endoftext|>",
    "special": (
        *("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    ),
}

TEMPLATES = {
    "glm4_5": Template(
        table={
            "plain": Expected(
                (("\n<think></think>\nParis.",), ("\n<think></think>\nLondon.",)), {"no_end_of_turn": 2}
            ),
            "system": Expected(
                (("\n<think></think>\nParis.",), ("\n<think></think>\nIt is Paris, I believe.",)),
                {"no_end_of_turn": 2},
            ),
            "turns": Expected(
                (("\n<think></think>\nParis.",), ("\n<think></think>\nLondon.",)), {"no_end_of_turn": 2}
            ),
            "two_answers": Expected(
                (
                    ("\n<think></think>\nParis.", "\n<think></think>\nRome."),
                    ("\n<think></think>\nLondon.", "\n<think></think>\nNo."),
                ),
                {"no_end_of_turn": 2},
            ),
            "call": Expected(  # a call ends with its own markup
                (("\n<think></think>" + CALL,), ("\n<think></think>\nIt rains.",)), {"no_end_of_turn": 1}
            ),
            "result": Expected(
                (
                    ("\n<think></think>" + CALL, "\n<think></think>\nIt rains."),
                    ("\n<think></think>\nIt rains.",),
                ),
                {"no_end_of_turn": 2},
            ),
            "after_result": Expected(
                (("\n<think></think>\nIt rains.",), ("\n<think></think>\nThe sun shines.",)),
                {"no_end_of_turn": 2},
            ),
            "reasoning": Expected(
                (("\n<think>Two and two make four.</think>\n4.",), ("\n<think>A guess.</think>\n5.",)),
                {"no_end_of_turn": 2},
            ),
            "thought": Expected(
                (("\n<think>Two and two make four.</think>\n4.",), ("\n<think>A guess.</think>\n5.",)),
                {"no_end_of_turn": 2},
            ),
        },
        **GLM,
    ),
    "glm4_5_no_thinking": Template(
        file="glm4_5",
        kwargs={"enable_thinking": False},
        # the generation prompt has the newline and the empty thought
        table={
            "plain": Expected((("\nParis.",), ("\nLondon.",)), {"no_end_of_turn": 2}),
            "system": Expected((("\nParis.",), ("\nIt is Paris, I believe.",)), {"no_end_of_turn": 2}),
            "turns": Expected((("\nParis.",), ("\nLondon.",)), {"no_end_of_turn": 2}),
            "two_answers": Expected((("\nParis.", "\nRome."), ("\nLondon.", "\nNo.")), {"no_end_of_turn": 2}),
            "call": Expected(((CALL,), ("\nIt rains.",)), {"no_end_of_turn": 1}),
            "result": Expected(((CALL, "\nIt rains."), ("\nIt rains.",)), {"no_end_of_turn": 2}),
            "after_result": Expected((("\nIt rains.",), ("\nThe sun shines.",)), {"no_end_of_turn": 2}),
            "reasoning": Expected(
                (("Two and two make four.</think>\n4.",), ("A guess.</think>\n5.",)),
                {"no_end_of_turn": 2, "template_not_prefix": 2},
            ),
            "thought": Expected(
                (("Two and two make four.</think>\n4.",), ("A guess.</think>\n5.",)),
                {"no_end_of_turn": 2, "template_not_prefix": 2},
            ),
        },
        **GLM,
    ),
}
