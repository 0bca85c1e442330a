"""gpt-oss: channels, another token at the end of the last answer, a call's recipient before its channel."""

from tests.data.templates.case import Template

CALL = ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>'
SPECIAL = (
    *("<|startoftext|>", "<|endoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>"),
    *("<|return|>", "<|call|>", "<|constrain|>"),
)
ANSWERS = {
    "plain": (
        ("<|channel|>final<|message|>Paris.<|return|>",),
        ("<|channel|>final<|message|>London.<|return|>",),
    ),
    "system": (
        ("<|channel|>final<|message|>Paris.<|return|>",),
        ("<|channel|>final<|message|>It is Paris, I believe.<|return|>",),
    ),
    "turns": (
        ("<|channel|>final<|message|>Paris.<|return|>",),
        ("<|channel|>final<|message|>London.<|return|>",),
    ),
    "two_answers": (
        ("<|channel|>final<|message|>Paris.<|end|>", "<|channel|>final<|message|>Rome.<|return|>"),
        ("<|channel|>final<|message|>London.<|end|>", "<|channel|>final<|message|>No.<|return|>"),
    ),
    "call": ((CALL,), ("<|channel|>final<|message|>It rains.<|return|>",)),
    "result": (
        (CALL, "<|channel|>final<|message|>It rains.<|return|>"),
        ("<|channel|>final<|message|>It rains.<|return|>",),
    ),
    "after_result": (
        ("<|channel|>final<|message|>It rains.<|return|>",),
        ("<|channel|>final<|message|>The sun shines.<|return|>",),
    ),
    "thought": (
        ("<|channel|>final<|message|><think>\nTwo and two make four.\n</think>\n\n4.<|return|>",),
        ("<|channel|>final<|message|><think>\nA guess.\n</think>\n\n5.<|return|>",),
    ),
}

TEMPLATES = {
    "gpt_oss": Template(
        eos="<|return|>",
        special=SPECIAL,
        kwargs={"date": "2026-01-01", "reasoning_effort": "low"},
        table={
            **ANSWERS,
            "reasoning": (  # a turn of two channels, the first of which ends with <|end|>
                (
                    "<|channel|>analysis<|message|>Two and two make four.<|end|>"
                    "<|start|>assistant<|channel|>final<|message|>4.<|return|>",
                ),
                (
                    "<|channel|>analysis<|message|>A guess.<|end|>"
                    "<|start|>assistant<|channel|>final<|message|>5.<|return|>",
                ),
            ),
        },
    ),
}
