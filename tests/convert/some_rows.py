"""Rows of every format, for configs whose own data is elsewhere."""

import random

from tests.data.every_format import rows_with
from tests.data.shared_data import assistant, user
from tests.tiny import sentence


def some_rows(format: str, n: int, data_format: dict[str, str]) -> list[dict]:
    """So many rows of a format of docs/data.md, under the names that data_format has for their columns;
    text where it puts text around them."""
    draw = random.Random(0)
    as_text = {"trl": "text", "trl_unpaired": "text_unpaired"} if _has_texts(data_format) else {}
    rows = [_row(as_text.get(format, format), draw, number) for number in range(n)]
    rows = [{"system": "S"} | row if "system" in data_format else row for row in rows]
    return [{data_format.get(name, name): value for name, value in row.items()} for row in rows]


def _has_texts(data_format: dict[str, str]) -> bool:
    return any(name.endswith("_format") for name in data_format)


def _row(format: str, draw: random.Random, number: int) -> dict:
    asked, chosen, rejected = sentence(draw, 4), f"{sentence(draw, 5)} cat", f"{sentence(draw, 3)} dog"
    pair, likes = {"chosen": chosen, "rejected": rejected}, number % 2 == 0
    responses = {"chosen_response": chosen, "rejected_response": rejected}
    rated = lambda name: [{"response": chosen, name: 5}, {"response": rejected, name: 2}]
    texts = {
        "text": {"prompt": asked} | pair,
        "text_unpaired": {"prompt": asked, "completion": chosen if likes else rejected, "label": likes},
        "intel": {"system": "", "question": asked} | pair,
        "icr": {"system": "", "input": asked} | pair,
        "prompt_pairs": {"system": "", "prompt": asked} | pair,
        "argilla": {"system": "", "instruction": asked} | responses,
        "alpaca": {"instruction": asked, "input": ""} | pair,
        "alpaca_kto": {"instruction": asked, "output": chosen if likes else rejected, "kto_tag": likes},
        "ultrafeedback": {"instruction": asked, "completions": rated("overall_score")},
        "ultrafeedback_fine_grained": {"instruction": asked, "completions": rated("fine-grained_score")},
    }
    if format in texts:
        return texts[format]
    answer = chosen if likes or not format.endswith(("_kto", "_unpaired")) else rejected
    if format == "sharegpt_kto":
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
        return {"conversations": turns, "kto_tag": likes}
    row = rows_with([user(asked)], assistant(answer))[format]
    return row | {"label": likes} if "label" in row else row
