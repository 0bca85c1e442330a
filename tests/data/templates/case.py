"""What the corpus of chat templates is made of, and the conversations that every template is tried with.

A template is a file of ours, NAME.jinja beside this one (or the one that the key chat_template knows by that
name), written after the public behaviour of a model family. Its entry in a family's file says what the
tokenizer has, and by the name of a conversation the exact text that must be scored: per response a tuple, per
assistant turn of it a string, from where the model would begin to write to the turn's own end as it stands in
the whole conversation. A str in place of the tuples is the reason that the row is dropped for.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent

Scored = tuple[str, ...]


@dataclass(frozen=True)
class Expected:
    """Of one conversation under one template: (chosen, rejected), or the reason it is dropped for."""

    scored: tuple[Scored, Scored] | str
    notes: dict[str, int] = field(default_factory=dict)  # all of them, as to_group counts them


@dataclass(frozen=True)
class Template:
    """One chat template, its tokenizer's special tokens (EOS and BOS among them), and what must be scored."""

    eos: str
    special: tuple[str, ...]
    table: dict[str, Expected | tuple[Scored, Scored]]
    bos: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)  # of apply_chat_template
    file: str | None = None  # another template's, where only kwargs differ


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def says(text: str, **more: Any) -> dict:
    return {"role": "assistant", "content": text, **more}


def calls(city: str) -> dict:
    function = {"name": "weather", "arguments": {"city": city}}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def result(text: str) -> dict:
    return {"role": "tool", "name": "weather", "content": text}


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Which city."}},
            "required": ["city"],
        },
    },
}
CAPITAL, RAIN, SUM = "What is the capital of France?", "Does it rain in Paris?", "What is 2 + 2?"

CONVERSATIONS: dict[str, dict] = {
    "plain": {"prompt": [user(CAPITAL)], "chosen": [says("Paris.")], "rejected": [says("London.")]},
    "system": {
        "prompt": [system("Be brief."), user(CAPITAL)],
        "chosen": [says("Paris.")],
        "rejected": [says("It is Paris, I believe.")],
    },
    "turns": {  # several turns before the response
        "prompt": [system("Be brief."), user("Hello."), says("Good day."), user(CAPITAL)],
        "chosen": [says("Paris.")],
        "rejected": [says("London.")],
    },
    "two_answers": {  # a response with a user turn in it
        "prompt": [user(CAPITAL)],
        "chosen": [says("Paris."), user("And of Italy?"), says("Rome.")],
        "rejected": [says("London."), user("Are you sure?"), says("No.")],
    },
    "call": {
        "prompt": [user(RAIN)],
        "chosen": [calls("Paris")],
        "rejected": [says("It rains.")],
        "tools": [WEATHER],
    },
    "result": {  # the call is the whole preference
        "prompt": [user(RAIN)],
        "chosen": [calls("Paris"), result("rain, 9 degrees"), says("It rains.")],
        "rejected": [says("It rains.")],
        "tools": [WEATHER],
    },
    "after_result": {
        "prompt": [user(RAIN), calls("Paris"), result("rain, 9 degrees")],
        "chosen": [says("It rains.")],
        "rejected": [says("The sun shines.")],
        "tools": [WEATHER],
    },
    "reasoning": {
        "prompt": [user(SUM)],
        "chosen": [says("4.", reasoning_content="Two and two make four.")],
        "rejected": [says("5.", reasoning_content="A guess.")],
    },
    "thought": {  # the same, written into the content
        "prompt": [user(SUM)],
        "chosen": [says("<think>\nTwo and two make four.\n</think>\n\n4.")],
        "rejected": [says("<think>\nA guess.\n</think>\n\n5.")],
    },
}
