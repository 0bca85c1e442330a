"""Rows with spans and token weights, and how the tests look at what became of them."""

import numpy as np

from fastdpo.data.groups import to_group
from tests.data.shared_data import (
    WIDE,
    chat_row,
    check,
    decode,
    text_row,
)


def weighted(row, tokenizer, limits=WIDE):
    group, notes = to_group(row, 0, tokenizer, limits)
    check(group)
    for response in group.responses:
        assert response.token_weight.dtype == np.float32
        assert len(response.token_weight) == len(response.ids)
        assert not response.token_weight[~response.target_mask].any()
    return group, notes


def relevant(tokenizer, response) -> list[str]:
    """Each token with a weight above 0, as text."""
    return [decode(tokenizer, [i]) for i in response.ids[response.token_weight > 0]]


def spans_row(in_chosen=(), in_rejected=(), **texts):
    return {**text_row(**texts), "chosen_spans": list(in_chosen), "rejected_spans": list(in_rejected)}


def numbers_row(of_chosen, of_rejected=(0, 0)):
    row = text_row(chosen=" old world", rejected=" gold")
    return {**row, "chosen_token_weights": list(of_chosen), "rejected_token_weights": list(of_rejected)}


def chat_spans(in_chosen, in_rejected=(), **texts):
    return {**chat_row(**texts), "chosen_spans": list(in_chosen), "rejected_spans": list(in_rejected)}
