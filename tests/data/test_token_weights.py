"""Spans in conversations, through every template, and token weights given as numbers."""

from collections import Counter

import numpy as np
import pytest

from fastdpo.data.groups import Limits, to_group
from fastdpo.data.rows import RowProblem
from fastdpo.data.spans import Marks, weigh
from tests.data.shared_data import (
    CHATML,
    FOLDERS,
    WIDE,
    assistant,
    chat_row,
    decode,
    needs_shared,
    real_tokenizer,
    small_tokenizer,
    template,
    user,
)
from tests.data.span_rows import chat_spans, numbers_row, relevant, spans_row, weighted

HAND = "\U0001f44d\U0001f3fd"
END = {
    "chatml": "<|im_end|>",
    "llama-3-instruct": "<|eot_id|>",
    "mistral-instruct": "",
    "qwen2.5-instruct": "<|im_end|>",
    "zephyr": "",
}


# ---- conversations


def test_offsets_in_the_content():
    tokenizer = small_tokenizer()
    row = chat_spans([[5, 8]], [[0, 3]], chosen="gold old world", rejected="old")
    group, notes = weighted(row, tokenizer)
    assert not notes
    assert relevant(tokenizer, group.responses[0]) == [" old"]
    assert "".join(relevant(tokenizer, group.responses[1])) == "old"


@needs_shared
@pytest.mark.parametrize("template_name", END)
@pytest.mark.parametrize("name", FOLDERS)
def test_real_templates(name, template_name):
    """Templates that trim the content, put a space before it, or end turns otherwise: the span stays put."""
    tokenizer = real_tokenizer(name)
    tokenizer.chat_template = template(template_name)
    if tokenizer.bos_token is None and "bos_token" in tokenizer.chat_template:
        tokenizer.bos_token = "<|endoftext|>"
    content = f" \nIt {HAND} is not, is it? It is. "
    at = content.index("is it?")
    row = chat_spans([[at, at + 6], [len(content) - 4, len(content)]], chosen=content, rejected="No.")
    group, notes = weighted(row, tokenizer)
    response = group.responses[0]
    hits = np.flatnonzero(response.token_weight)
    runs = np.split(hits, np.flatnonzero(np.diff(hits) > 1) + 1)
    texts = [decode(tokenizer, response.ids[run]).strip() for run in runs]
    if "<" in texts[1]:  # the tokenizer does not know this template's end as a token, and merges with it
        assert END[template_name][0] == "<" and END[template_name] not in tokenizer.all_special_tokens
    assert (texts[0], texts[1].rstrip("< ")) == ("is it?", "is.")
    assert notes["span_unscored"] == 0 and not response.token_weight[-1]


def test_several_turns_need_the_turn():
    tokenizer = small_tokenizer()
    turns = [assistant("old gold"), user("old"), assistant("old world"), user("cut")]
    row = {"prompt": [user("good?")], "chosen": turns, "rejected": [assistant("no")], "rejected_spans": []}
    group, _ = weighted({**row, "chosen_spans": [[0, 3, 8], [2, 3, 4]]}, tokenizer)
    assert relevant(tokenizer, group.responses[0]) == [" gold", " world"]
    for spans, part in (
        ([[0, 3]], r"several assistant turns \(0, 2\): give \[turn, start, end\]"),
        ([[1, 0, 3]], r"turn 1 is none of the response's assistant turns \(0, 2\)"),
        ([[-1, 0, 3]], "turn -1 is none"),
        ([[0, 3, 9]], "end <= 8"),
    ):
        with pytest.raises(RowProblem, match=part) as caught:
            to_group({**row, "chosen_spans": spans}, 0, tokenizer, WIDE)
        assert (caught.value.reason, caught.value.field) == ("malformed_spans", "chosen_spans[0]")


@pytest.mark.parametrize("prompt", [None, "good?"])
def test_turns_count_in_the_row_s_own_list(prompt):
    """Whole conversations hold the prompt's turns too."""
    tokenizer = small_tokenizer()
    asked = [user("good?")]
    row = {
        "chosen": [*asked, assistant("old gold"), user("more"), assistant("old world")],
        "rejected": [*asked, assistant("gold old")],
        "chosen_spans": [[3, 3, 9]],
        "rejected_spans": [[4, 8]],
    }
    row |= {"prompt": prompt} if prompt else {}
    group, _ = weighted(row, tokenizer)
    assert relevant(tokenizer, group.responses[0]) == [" world"]
    assert relevant(tokenizer, group.responses[1]) == [" old"]
    with pytest.raises(RowProblem, match=r"turn 2 is none .* \(1, 3\)"):
        to_group({**row, "chosen_spans": [[2, 0, 1]]}, 0, tokenizer, WIDE)


def test_an_answer_that_the_template_changes_is_refused():
    loud = CHATML.replace("{{ m['content'] }}", "{{ m['content'] | upper }}")
    with pytest.raises(RowProblem, match="does not print the turn's content as it stands") as caught:
        to_group(chat_spans([[0, 3]]), 0, small_tokenizer(chat_template=loud), WIDE)
    assert (caught.value.reason, caught.value.field) == ("spans_not_found", "chosen_spans")
    group, _ = weighted(chat_spans([]), small_tokenizer(chat_template=loud))
    assert not group.responses[0].token_weight.any()


def test_an_answer_printed_twice_is_refused():
    """Behind other text nothing tells which one is meant; the first one after the header is."""
    tokenizer = small_tokenizer(chat_template=CHATML.replace("{{ m['content'] }}", "x{{ m['content'] * 2 }}"))
    with pytest.raises(RowProblem, match="as it stands, once"):
        to_group(chat_spans([[0, 3]]), 0, tokenizer, WIDE)
    tokenizer = small_tokenizer(chat_template=CHATML.replace("{{ m['content'] }}", "{{ m['content'] }} old"))
    group, _ = weighted(chat_spans([], [[0, 3]]), tokenizer)
    assert "".join(relevant(tokenizer, group.responses[1])) == "old"
    assert group.responses[1].token_weight[0] == 1


# ---- token_weights


@pytest.mark.parametrize(("given", "expected"), [([1, 0.5, 0.25], [1, 0.5, 0.25]), ([0, 0.5], [0, 0.5, 0])])
def test_one_number_a_token_with_or_without_the_end(given, expected):
    group, _ = weighted(numbers_row(given), small_tokenizer())
    assert group.responses[0].token_weight.tolist() == expected


@pytest.mark.parametrize("given", [[1], [1] * 4, []])
def test_a_wrong_length_names_both(given):
    with pytest.raises(RowProblem) as caught:
        to_group(numbers_row(given), 0, small_tokenizer(), WIDE)
    assert (caught.value.reason, caught.value.field) == ("token_weights_length", "chosen_token_weights")
    expected = f"{len(given)} numbers, where the response has 3 scored tokens (or 2, without the end of turn)"
    assert caught.value.message == expected


def test_numbers_are_for_scored_tokens_and_are_cut_with_them():
    tokenizer = small_tokenizer()
    turns = [assistant("old"), user("more"), assistant("gold")]
    row = {"prompt": [user("good?")], "chosen": turns, "rejected": [assistant("old")]}
    plain, _ = to_group(row, 0, tokenizer, WIDE)
    scored = [int(r.target_mask.sum()) for r in plain.responses]
    numbers = np.linspace(0.1, 1, scored[0], dtype=np.float32)
    row |= {"chosen_token_weights": numbers.tolist(), "rejected_token_weights": [1] * (scored[1] - 1)}
    group, _ = weighted(row, tokenizer)
    chosen, rejected = group.responses
    np.testing.assert_array_equal(chosen.token_weight[chosen.target_mask], numbers)
    assert rejected.token_weight.tolist() == [1] * (scored[1] - 1) + [0]
    row["chosen_token_weights"] = numbers[:-1].tolist()
    cut, _ = weighted(row, tokenizer, Limits(len(plain.prompt) + len(chosen.ids) - 1))
    np.testing.assert_array_equal(cut.responses[0].token_weight, chosen.token_weight[:-1])


def test_an_end_of_turn_of_several_tokens_may_be_left_out():
    """A template whose end the tokenizer does not know as one token."""
    tokenizer = small_tokenizer(chat_template=CHATML.replace("<|im_end|>", "<end>"))
    plain, _ = to_group(chat_row(), 0, tokenizer, WIDE)
    n = [int(r.target_mask.sum()) for r in plain.responses]
    end = len(tokenizer("<end>", add_special_tokens=False)["input_ids"])
    assert end > 1
    row = {**chat_row(), "chosen_token_weights": [1] * (n[0] - end), "rejected_token_weights": [1] * n[1]}
    group, _ = weighted(row, tokenizer)
    assert group.responses[0].token_weight.tolist() == [1] * (n[0] - end) + [0] * end
    with pytest.raises(RowProblem, match=f"{n[0] - 1} numbers"):
        to_group({**row, "chosen_token_weights": [1] * (n[0] - 1)}, 0, tokenizer, WIDE)


def test_numbers_and_spans_say_the_same():
    tokenizer = small_tokenizer()
    spans, _ = weighted(spans_row([[4, 10]], [[0, 5]], chosen=" old world", rejected=" gold"), tokenizer)
    numbers, _ = weighted(numbers_row([0, 1], [1]), tokenizer)
    for one, other in zip(spans.responses, numbers.responses):
        np.testing.assert_array_equal(one.token_weight, other.token_weight)


def test_weigh_counts_from_the_lead():
    marks = Marks("f", ((3, 5),), None, 9)
    places = lambda: (np.array([0, 2, 4]), np.array([2, 4, 9]))
    scored = np.array([False, True, True, True, True])
    assert weigh(marks, places, scored, 1, Counter()).tolist() == [0, 0, 1, 1, 0]
    assert weigh(marks, places, scored, 2, Counter()).tolist() == [0, 0, 0, 1, 1]


def test_a_span_that_the_template_stripped_is_noted():
    """Nothing is left of it, not even in a token that holds text of both sides."""
    notes, places = Counter(), lambda: (np.array([0, 2]), np.array([2, 9]))
    assert not weigh(Marks("f", ((4, 4),), None, 9), places, np.ones(2, bool), 0, notes).any()
    assert notes == {"span_unscored": 1}
