"""Rows over max_length."""

import numpy as np
import pytest

from fastdpo.data.groups import Limits, to_group
from fastdpo.data.rows import RowProblem, parse_row
from fastdpo.errors import ConfigError
from tests.data.shared_data import (
    DATA,
    WIDE,
    assistant,
    chat_row,
    check,
    decode,
    needs_shared,
    ranked_row,
    read_lines,
    real_tokenizer,
    sequence,
    small_tokenizer,
    text_row,
    user,
)

LONG = text_row("good old world", " morning gold old", " wor world")


def long_lengths(tokenizer):
    group, _ = to_group(LONG, 0, tokenizer, WIDE)
    return len(group.prompt), *(len(r.ids) for r in group.responses)


def test_a_row_that_fits_exactly_is_left_alone():
    tokenizer = small_tokenizer()
    prompt, chosen, rejected = long_lengths(tokenizer)
    whole, _ = to_group(LONG, 0, tokenizer, WIDE)
    for truncation in ("keep_start", "keep_end", "drop"):
        limits = Limits(prompt + max(chosen, rejected), truncation)
        group, notes = to_group(LONG, 0, tokenizer, limits)
        assert not notes and sequence(group, 0) == sequence(whole, 0)


def test_keep_start_cuts_the_response_s_end():
    tokenizer = small_tokenizer()
    prompt, chosen, rejected = long_lengths(tokenizer)
    assert chosen > rejected
    whole, _ = to_group(LONG, 0, tokenizer, WIDE)
    group, notes = to_group(LONG, 0, tokenizer, Limits(prompt + chosen - 1))
    check(group)
    assert notes == {"truncated": 1}
    assert sequence(group, 0) == sequence(whole, 0)[:-1]  # no EOS at a cut
    assert sequence(group, 1) == sequence(whole, 1)
    group, notes = to_group(LONG, 0, tokenizer, Limits(prompt + 1))
    assert notes == {"truncated": 2} and [len(r.ids) for r in group.responses] == [1, 1]
    with pytest.raises(RowProblem, match="leave no room for a response") as caught:
        to_group(LONG, 0, tokenizer, Limits(prompt))
    assert (caught.value.reason, caught.value.field) == ("prompt_too_long", "prompt")


def test_keep_start_cuts_within_a_header():
    """A cut that ends in unscored tokens goes back to the last scored one."""
    tokenizer = small_tokenizer()
    row = {**chat_row(), "chosen": [assistant("old"), user("more"), assistant("gold")]}
    whole, _ = to_group(row, 0, tokenizer, WIDE)
    mask = whole.responses[0].target_mask
    header = int(np.flatnonzero(~mask)[2])
    limits = Limits(len(whole.prompt) + header)
    group, notes = to_group({**row, "rejected": [assistant("gold")]}, 0, tokenizer, limits)
    check(group)
    assert notes["truncated"] == 1
    assert decode(tokenizer, group.responses[0].ids) == "old<|im_end|>"


def test_keep_end_cuts_the_prompt_s_start():
    tokenizer = small_tokenizer(bos=False)
    prompt, chosen, _ = long_lengths(tokenizer)
    whole, _ = to_group(LONG, 0, tokenizer, WIDE)
    group, notes = to_group(LONG, 0, tokenizer, Limits(prompt + chosen - 1, "keep_end"))
    check(group)
    assert notes == {"truncated": 2}
    assert group.prompt.tolist() == whole.prompt[1:].tolist()
    for i in (0, 1):
        assert group.responses[i].ids.tolist() == whole.responses[i].ids.tolist()
    group, _ = to_group(LONG, 0, tokenizer, Limits(chosen + 1, "keep_end"))
    assert group.prompt.tolist() == whole.prompt[-1:].tolist()
    with pytest.raises(RowProblem, match="does not fit: raise max_length") as caught:
        to_group(LONG, 0, tokenizer, Limits(chosen, "keep_end"))
    assert (caught.value.reason, caught.value.field) == ("response_too_long", "responses")


def test_keep_end_keeps_bos():
    tokenizer = small_tokenizer()
    prompt, chosen, _ = long_lengths(tokenizer)
    whole, _ = to_group(LONG, 0, tokenizer, WIDE)
    group, _ = to_group(LONG, 0, tokenizer, Limits(prompt + chosen - 1, "keep_end"))
    assert group.prompt.tolist() == [tokenizer.bos_token_id, *whole.prompt[2:].tolist()]
    group, _ = to_group(LONG, 0, tokenizer, Limits(chosen + 1, "keep_end"))
    assert group.prompt.tolist() == [tokenizer.bos_token_id]


def test_drop():
    tokenizer = small_tokenizer()
    prompt, chosen, _ = long_lengths(tokenizer)
    with pytest.raises(RowProblem, match=f"{prompt + chosen} tokens, over max_length") as caught:
        to_group(LONG, 0, tokenizer, Limits(prompt + chosen - 1, "drop"))
    assert (caught.value.reason, caught.value.field) == ("too_long", "row")


def test_identical_after_truncation():
    tokenizer = small_tokenizer()
    row = text_row("good", " old gold", " old world")
    whole, _ = to_group(row, 0, tokenizer, WIDE)
    with pytest.raises(RowProblem, match="raise max_length") as caught:
        to_group(row, 0, tokenizer, Limits(len(whole.prompt) + 1))
    assert caught.value.reason == "identical_after_truncation"
    row = ranked_row((" old gold", 3), (" old world", 2), (" gold", 1))
    group, notes = to_group(row, 0, tokenizer, Limits(len(whole.prompt) + 1))
    check(group)
    assert notes["identical_pair"] == 1 and notes["truncated"] >= 2
    assert [(p.winner, p.loser) for p in group.pairs] == [(0, 2), (1, 2)]


def test_nothing_scored_after_truncation():
    tokenizer = small_tokenizer()
    row = text_row("good wor", "ld morning", " old")  # the first response's first token is merged
    whole, _ = to_group(row, 0, tokenizer, WIDE)
    with pytest.raises(RowProblem, match="no scored token left") as caught:
        to_group(row, 0, tokenizer, Limits(len(whole.prompt) + 1))
    assert caught.value.reason == "nothing_scored"


@pytest.mark.parametrize("arguments", [(1,), (10, "keep"), (10, None)])
def test_limits_are_checked(arguments):
    with pytest.raises(ConfigError, match=r"max_length: 2 at least|truncation: one of keep_start"):
        Limits(*arguments)


@needs_shared
@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
def test_no_sequence_is_longer_than_the_limit(truncation):
    tokenizer, limits, cut = real_tokenizer("qwen2.5"), Limits(160, truncation), 0
    for number, row in enumerate(read_lines(DATA / "pref/hh_rlhf_test.jsonl")[:150]):
        try:
            group, notes = to_group(row, number, tokenizer, limits)
        except RowProblem as problem:
            assert problem.reason in (
                "prompt_too_long",
                "response_too_long",
                "identical_after_truncation",
            )
            continue
        check(group)
        longest = max(len(sequence(group, i)) for i in (0, 1))
        assert longest == 160 if notes else longest <= 160
        cut += bool(notes)
    assert cut > 20


def test_a_parsed_row_will_do():
    tokenizer = small_tokenizer()
    from_dict, _ = to_group(text_row(), 3, tokenizer, WIDE)
    from_row, _ = to_group(parse_row(text_row(), 3), 3, tokenizer, WIDE)
    assert sequence(from_dict) == sequence(from_row) and from_row.row == 3
