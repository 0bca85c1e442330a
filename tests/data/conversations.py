"""Random conversations in which every message says a word of its own, to be looked for in a text."""

import random
from itertools import count

from tests.data.templates.case import WEATHER, says, system, user

_LETTERS = "bcdfghjklmnpqrstvwxz"
_AROUND = ("", "", " ", "\n", "\n\n")  # white space that some templates strip


class Words:
    """Words that no template prints of its own, each once."""

    def __init__(self, seed: int):
        self.random, self.numbers = random.Random(seed), count(seed * 1000)

    def __call__(self) -> str:
        number = next(self.numbers)
        word = "".join(_LETTERS[number // 20**i % 20] for i in range(5))
        extra = self.random.choice(("", " é", " 日本", " x < y & z", ' "so"', " \U0001f600"))
        return self.random.choice(_AROUND) + f"say {word}{extra}." + self.random.choice(_AROUND)


def random_row(seed: int) -> dict:
    """{prompt, chosen, rejected} as messages, with or without system, tools, reasoning and several turns."""
    words = Words(seed)
    pick = words.random.random
    tools = [WEATHER] if pick() < 0.4 else None

    def answer() -> dict:
        return says(words(), **({"reasoning_content": words()} if pick() < 0.2 else {}))

    def call_and_result(number: int) -> list[dict]:
        function = {
            "name": "weather",
            "arguments": {"city": words().strip(), "days": words.random.randint(10, 99)},
        }
        call = {
            "id": f"call{number:05}",
            "type": "function",
            "function": function,
        }  # nine characters: Mistral's
        asked = says("", tool_calls=[call])
        return [asked, {"role": "tool", "name": "weather", "tool_call_id": call["id"], "content": words()}]

    def response(number: int) -> list[dict]:
        turns = call_and_result(number) if tools and pick() < 0.6 else []
        turns.append(answer())
        for _ in range(words.random.choice((0, 0, 0, 1, 2))):
            turns += [user(words()), answer()]
        return turns

    prompt = [system(words())] if pick() < 0.5 else []
    for number in range(words.random.choice((0, 0, 1, 2))):
        prompt += [user(words()), *(call_and_result(number) if tools and pick() < 0.3 else []), answer()]
    row = {"prompt": [*prompt, user(words())], "chosen": response(10), "rejected": response(20)}
    return row | ({"tools": tools} if tools else {})
