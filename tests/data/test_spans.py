"""Relevant characters become token weights: which tokens, in every tokenizer, template and cut."""

import io

import numpy as np
import pytest
from rich.console import Console
from transformers import ByT5Tokenizer

from fastdpo.data.groups import Limits, to_group
from fastdpo.data.load import load_groups
from fastdpo.data.packing import pack
from fastdpo.data.report import DataReport
from fastdpo.data.rows import RowProblem
from fastdpo.data.show import show
from fastdpo.data.spans import places_by_decoding
from fastdpo.data.store.facts import Facts
from fastdpo.data.tokenizing import Encoder
from fastdpo.errors import DataError
from tests.data.shared_data import (
    FOLDERS,
    WIDE,
    decode,
    needs_shared,
    ranked_row,
    real_tokenizer,
    small_tokenizer,
    text_row,
    write_lines,
)
from tests.data.span_rows import numbers_row, relevant, spans_row, weighted

HAND, SKIN = "\U0001f44d\U0001f3fd", "\U0001f3fd"
REPORT = f"No change since prior. Caf\u00e9 cafe\u0301 \U0001f600{HAND} \u65e5\u672c\u8a9e.\n\nStable  lungs."


# ---- plain text


@pytest.mark.parametrize(
    ("span", "tokens"),
    [
        ([0, 1], [" old"]),  # a space alone is part of the word's token
        ([3, 4], [" old"]),
        ([4, 5], [" world"]),  # a token is not touched by a span that ends where it begins
        ([3, 5], [" old", " world"]),
        ([0, 10], [" old", " world"]),
    ],
)
def test_a_token_is_relevant_where_it_shares_a_character(span, tokens):
    tokenizer = small_tokenizer()
    row = spans_row([span], [], chosen=" old world", rejected=" gold")
    group, notes = weighted(row, tokenizer)
    assert not notes
    assert relevant(tokenizer, group.responses[0]) == tokens
    assert group.responses[1].token_weight.tolist() == [0] * len(group.responses[1].ids)  # []: nothing is


def test_several_spans_may_touch_and_overlap():
    tokenizer = small_tokenizer()
    row = spans_row([[1, 3], [11, 15], [0, 4]], [[0, 1]], chosen=" old world gold", rejected=" wor good")
    group, _ = weighted(row, tokenizer)
    assert relevant(tokenizer, group.responses[0]) == [" old", " gold"]
    assert relevant(tokenizer, group.responses[1]) == [" wor"]


@pytest.mark.parametrize("bos", [True, False])
def test_specials_are_never_relevant(bos):
    tokenizer = small_tokenizer(bos=bos)
    group, _ = weighted(spans_row([[0, 10]], [[0, 5]], chosen=" old world", rejected=" gold"), tokenizer)
    assert [r.token_weight.tolist() for r in group.responses] == [[1, 1, 0], [1, 0]]


def test_without_the_columns_there_are_no_weights():
    group, _ = to_group(text_row(), 0, small_tokenizer(), WIDE)
    assert [r.token_weight for r in group.responses] == [None, None]


def test_spans_change_nothing_else():
    tokenizer = small_tokenizer()
    group, _ = weighted(spans_row([[0, 3]], [[0, 3]]), tokenizer)
    plain, _ = to_group(text_row(), 0, tokenizer, WIDE)
    for one, other in zip((*group.responses, group), (*plain.responses, plain)):
        assert (one.prompt if one is group else one.ids).tolist() == (
            other.prompt if other is plain else other.ids
        ).tolist()


def test_a_span_on_a_merged_token_is_noted():
    """The merged token is not scored, so a span on it alone weights nothing; strict refuses it."""
    tokenizer = small_tokenizer()
    row = spans_row([[0, 2]], [[0, 3]], prompt="good wor", chosen="ld morning", rejected="ld old")
    group, notes = weighted(row, tokenizer)
    assert notes == {"merged_boundary": 2, "span_unscored": 1}
    assert relevant(tokenizer, group.responses[0]) == []
    assert relevant(tokenizer, group.responses[1]) == [" old"]


def test_strict_refuses_a_span_without_a_scored_token(tmp_path):
    row = spans_row([[0, 2]], [[0, 3]], prompt="good wor", chosen="ld morning", rejected="ld old")
    spec = write_lines(tmp_path / "d.jsonl", [row])
    with pytest.raises(DataError, match=r"row 0 of .*1 span\(s\) without a scored token"):
        load_groups(spec, small_tokenizer(), WIDE, strict=True, console=Console(file=io.StringIO()))


def test_truncation_cuts_weights_with_their_tokens():
    tokenizer = small_tokenizer()
    row = spans_row([[4, 10], [10, 15]], [[0, 4]], chosen=" old world gold", rejected=" wor world")
    whole, _ = weighted(row, tokenizer)
    assert whole.responses[0].token_weight.tolist() == [0, 1, 1, 0]
    for length in (1, 2, 3):
        group, notes = weighted(row, tokenizer, Limits(len(whole.prompt) + length))
        assert notes["truncated"] and notes["span_unscored"] == 0
        assert group.responses[0].token_weight.tolist() == [0, 1, 1, 0][:length]
    longest = len(whole.prompt) + 4
    group, _ = weighted(row, tokenizer, Limits(longest - 1, "keep_end"))
    assert len(group.prompt) == len(whole.prompt) - 1
    assert [r.token_weight.tolist() for r in group.responses] == [[0, 1, 1, 0], [1, 0, 0]]


def test_weights_reach_the_microbatch():
    tokenizer = small_tokenizer()
    first, _ = weighted(spans_row([[0, 4]], [[4, 9]], chosen=" old world", rejected=" wor good"), tokenizer)
    plain, _ = to_group(text_row(), 1, tokenizer, WIDE)
    weight = pack([first, plain]).token_weight
    assert weight[:6].tolist() == [1, 0, 0, 0, 1, 0] and weight[6:].isnan().all()


# ---- ranked and unpaired rows


def test_ranked_rows():
    tokenizer = small_tokenizer()
    row = ranked_row((" old", 1), (" gold world", 3), (" world", 0))
    marks = ({"spans": [[0, 4]]}, {"token_weights": [0, 0.5]}, {"spans": []})
    for response, mark in zip(row["responses"], marks):
        response.update(mark)
    group, _ = weighted(row, tokenizer)
    assert [r.token_weight.tolist() for r in group.responses] == [[1, 0], [0, 0.5, 0], [0, 0]]


def test_unpaired_rows():
    tokenizer = small_tokenizer()
    row = {"prompt": "good", "completion": " old world", "label": False, "spans": [[1, 2]]}
    group, _ = weighted(row, tokenizer)
    assert relevant(tokenizer, group.responses[0]) == [" old"]


# ---- every tokenizer: multi-byte characters, pieces of characters, normalisers


@needs_shared
@pytest.mark.parametrize("name", [*FOLDERS, "small"])
def test_own_offsets_and_decoding_agree(name):
    """The tokenizer's own offsets against those found by decoding beginnings, which know nothing of them."""
    tokenizer = small_tokenizer() if name == "small" else real_tokenizer(name)
    encoder = Encoder(tokenizer)
    for text in (
        REPORT.replace("e\u0301", "\u00e9"),
        " two  spaces",
        HAND,
        "a",
        "\u65e5\u672c\u8a9e",
        "x\n\n y",
    ):
        starts, ends = encoder.places(text)
        ids = encoder.encode([text])[text]
        slow = places_by_decoding(ids, text, encoder.decode)
        assert (starts.tolist(), ends.tolist()) == tuple(map(np.ndarray.tolist, slow))


@needs_shared
@pytest.mark.parametrize("name", FOLDERS)
def test_every_character_of_a_real_text(name):
    """The tokens of each one-character span spell that character, and all of them together the text."""
    tokenizer = real_tokenizer(name)
    encoder = Encoder(tokenizer)
    assert len(encoder.places(REPORT)[0]) == len(encoder.encode([REPORT])[REPORT])
    for at, character in enumerate(REPORT):
        row = spans_row([[at, at + 1]], [], prompt="Report:\n", chosen=REPORT, rejected="Nothing.")
        group, notes = weighted(row, tokenizer)
        response = group.responses[0]
        hit = np.flatnonzero(response.token_weight)
        assert not notes["span_unscored"] and hit[-1] - hit[0] == len(hit) - 1
        spelt = decode(tokenizer, response.ids[hit])
        spaced = spelt if not character.isspace() else spelt + " "
        composed = {"\u0301": "\u00e9", "e": "\u00e9"}.get(character, character)  # Qwen's NFC joins them
        assert character in spaced or (name == "qwen2.5" and composed in spelt)


@needs_shared
@pytest.mark.parametrize("name", FOLDERS)
def test_an_emoji_of_many_tokens_is_relevant_whole(name):
    tokenizer = real_tokenizer(name)
    text = f"So {HAND} it is"
    at = text.index(SKIN)
    group, _ = weighted(spans_row([[at, at + 1]], [], chosen=text, rejected="No"), tokenizer)
    response = group.responses[0]
    assert decode(tokenizer, response.ids[response.token_weight > 0]) == SKIN
    if name != "qwen2.5":
        assert int(response.token_weight.sum()) > 1


@needs_shared
def test_a_normaliser_that_joins_characters():
    tokenizer = real_tokenizer("qwen2.5")
    text = "A cafe\u0301 here"
    group, _ = weighted(spans_row([[6, 7]], [], chosen=text, rejected="No"), tokenizer)
    assert relevant(tokenizer, group.responses[0]) == [" caf\u00e9"]


def test_a_joined_character_of_several_tokens():
    from tokenizers import normalizers

    tokenizer = small_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    row = spans_row([[5, 6]], [], chosen=" cafe\u0301 old", rejected=" no")
    group, _ = weighted(row, tokenizer)
    response = group.responses[0]
    assert int(response.token_weight.sum()) == 2
    assert decode(tokenizer, response.ids[response.token_weight > 0]) == "\u00e9"


def test_a_slow_tokenizer():
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    row = spans_row([[1, 3]], [], prompt="good ", chosen=f"a\u00e9{HAND[0]}b", rejected="no")
    group, _ = weighted(row, tokenizer)
    response = group.responses[0]
    assert response.token_weight.tolist() == [0, 1, 1, 1, 1, 1, 1, 0, 0]
    assert decode(tokenizer, response.ids[response.token_weight > 0]) == "\u00e9" + HAND[0]


def test_offsets_that_are_wrong_are_not_used():
    """Trimmed offsets (a space that no token holds) send the search to decoding."""
    from tokenizers import processors

    tokenizer = small_tokenizer(bos=False)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    told = tokenizer.backend_tokenizer.encode(" old world", add_special_tokens=False)
    assert told.offsets == [(0, 4), (5, 10)]  # no token holds the second space
    starts, ends = Encoder(tokenizer).places(" old world")
    assert (starts.tolist(), ends.tolist()) == ([0, 4], [4, 10])


def test_a_tokenizer_that_changes_the_text_and_does_not_say_where():
    from tokenizers import normalizers, processors

    tokenizer = small_tokenizer(bos=False)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    with pytest.raises(RowProblem, match="does not spell this row's text") as caught:
        to_group(spans_row([[0, 4]], [], chosen=" OLD world", rejected=" no"), 0, tokenizer, WIDE)
    assert (caught.value.reason, caught.value.field) == ("spans_not_found", "chosen_spans")


# ---- faults

TEXT = text_row(chosen=" old world", rejected=" gold")
SPANS, WEIGHTS, NUMBERS = "malformed_spans", "malformed_token_weights", "chosen_token_weights"
FAULTS = {
    "one side": ({**TEXT, "chosen_spans": []}, SPANS, "rejected_spans", "give both"),
    "other side null": (
        {**TEXT, "chosen_spans": None, "rejected_spans": []},
        SPANS,
        "chosen_spans",
        "missing or null",
    ),
    "no list": (spans_row() | {"chosen_spans": "x"}, SPANS, "chosen_spans", "a list of [start, end]"),
    "flat": (spans_row([0, 3]), SPANS, "chosen_spans[0]", "whole numbers, not int '0'"),
    "float": (spans_row([[0, 1.0]]), SPANS, "chosen_spans[0]", "whole numbers"),
    "bool": (spans_row([[False, True]]), SPANS, "chosen_spans[0]", "whole numbers"),
    "short": (spans_row([[1]]), SPANS, "chosen_spans[0]", "[start, end]"),
    "turn in text": (spans_row([[0, 0, 1]]), SPANS, "chosen_spans[0]", "has no turns"),
    "empty span": (spans_row([[0, 1], [2, 2]]), SPANS, "chosen_spans[1]", "0 <= start < end <= 8"),
    "turned": (spans_row([[3, 1]]), SPANS, "chosen_spans[0]", "start < end"),
    "negative": (spans_row([[-1, 1]]), SPANS, "chosen_spans[0]", "0 <= start"),
    "beyond": (spans_row([], [[0, 11]]), SPANS, "rejected_spans[0]", "end <= 10 (its characters)"),
    "implicit prompt": (
        {"chosen": "a b c", "rejected": "a b d", "chosen_spans": [[0, 1]], "rejected_spans": []},
        SPANS,
        "chosen_spans",
        "need the prompt in a column",
    ),
    "both forms": (
        {**spans_row(), NUMBERS: [1]},
        SPANS,
        "chosen_spans",
        "chosen_token_weights too",
    ),
    "weights no list": (numbers_row([]) | {NUMBERS: 1}, WEIGHTS, NUMBERS, "a list of numbers"),
    "weights text": (numbers_row([1, "1"]), WEIGHTS, "chosen_token_weights[1]", "str '1'"),
    "weights true": (numbers_row([True]), WEIGHTS, "chosen_token_weights[0]", "bool"),
    "weights over 1": (numbers_row([1, 1.5]), WEIGHTS, "chosen_token_weights[1]", "from 0"),
    "weights NaN": (numbers_row([float("nan")]), WEIGHTS, "chosen_token_weights[0]", "nan"),
    "ranked": (
        {
            "prompt": "p",
            "responses": [{"text": "a", "score": 1, "spans": [[0, 2]]}, {"text": "b", "score": 0}],
        },
        SPANS,
        "responses[0].spans[0]",
        "end <= 1",
    ),
    "ranked one": (
        {
            "prompt": "p",
            "responses": [{"text": "a", "score": 1, "spans": [[0, 1]]}, {"text": "b", "score": 0}],
        },
        SPANS,
        "responses[1].spans",
        "give both",
    ),
    "unpaired": (
        {"prompt": "p", "completion": "c", "label": True, "spans": [[0, 2]]},
        SPANS,
        "spans[0]",
        "end <= 1",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults(name):
    row, reason, field, part = FAULTS[name]
    with pytest.raises(RowProblem) as caught:
        to_group(row, 0, small_tokenizer(), WIDE)
    assert (caught.value.reason, caught.value.field) == (reason, field)
    assert part in caught.value.message


# ---- what a person sees


def test_show_marks_relevant_tokens(tmp_path):
    rows = [text_row(), numbers_row([1, 0.5], [0]), spans_row([[0, 2]], [], chosen=" old", rejected=" no")]
    tokenizer, console = small_tokenizer(), Console(file=io.StringIO(), width=150)
    spec = write_lines(tmp_path / "d.jsonl", rows)
    groups, report = load_groups(spec, tokenizer, WIDE, strict=True, console=console)
    show(groups, report, tokenizer, console)
    text = console.file.getvalue()
    assert "4 responses have token weights: 3 relevant tokens" in text
    assert (report.to_dict()["weighted_responses"], report.to_dict()["relevant_tokens"]) == (4, 3)
    first, second = text.split("row 1, decoded")
    assert "row 0, decoded" in first and "【" not in first and "«scored»" in first
    assert "【scored and relevant】" in second and "«scored, irrelevant»" in second
    assert "【 old】【 world】×0.5«</s>»" in second and "« gold</s>»" in second
    assert "3 tokens, 3 scored, 2 relevant" in second and "row 2" not in second


@needs_shared
def test_show_keeps_the_spaces_between_runs():
    """A sentencepiece tokenizer spells a run of tokens alone without its first space."""
    tokenizer, console = real_tokenizer("stories260K"), Console(file=io.StringIO(), width=150)
    group, _ = weighted(spans_row([[5, 8]], [], chosen=" One day she was", rejected=" no"), tokenizer)
    report = DataReport("x", kinds={"trl, text": group.row})
    report.keep(Facts.of([group]))
    show([group], report, tokenizer, console)
    assert "«One»【 day】« she was</s>»" in console.file.getvalue()
