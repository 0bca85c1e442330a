"""Text rows and ranked rows as token ids: BOS, EOS, and where the score starts."""

import pytest

from fastdpo.data.groups import to_group
from fastdpo.data.rows import RowProblem
from fastdpo.data.tokenizing import Encoder
from fastdpo.errors import ModelError
from tests.data.shared_data import (
    DATA,
    FOLDERS,
    WIDE,
    check,
    decode,
    needs_shared,
    ranked_row,
    read_lines,
    real_tokenizer,
    scored_text,
    sequence,
    small_tokenizer,
    text_row,
    trl_rows,
)

# ---- plain text: BOS, EOS, the boundary


@pytest.mark.parametrize("bos", [True, False])
def test_text_gets_bos_and_eos_once(bos):
    tokenizer = small_tokenizer(bos=bos)
    group, notes = to_group(text_row(), 5, tokenizer, WIDE)
    check(group)
    assert group.row == 5 and not notes
    assert sequence(group) == [*tokenizer("good morning")["input_ids"], tokenizer.eos_token_id]
    assert (group.prompt[0] == tokenizer.bos_token_id) == bos
    assert [scored_text(tokenizer, r) for r in group.responses] == [
        " morning</s>",
        " old world</s>",
    ]


def test_text_that_spells_bos_and_eos_gets_no_second():
    tokenizer = small_tokenizer()
    plain, _ = to_group(text_row(), 0, tokenizer, WIDE)
    row = text_row("<s>good", " morning</s>", " old world</s>")
    spelt, _ = to_group(row, 0, tokenizer, WIDE)
    for i in (0, 1):
        assert sequence(spelt, i) == sequence(plain, i)
        assert spelt.responses[i].target_mask.tolist() == plain.responses[i].target_mask.tolist()


def test_a_tokenizer_that_adds_eos_itself():
    from tokenizers import processors

    tokenizer = small_tokenizer()
    special = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    both = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = both
    group, _ = to_group(text_row(), 0, tokenizer, WIDE)
    plain, _ = to_group(text_row(), 0, small_tokenizer(), WIDE)
    assert sequence(group) == sequence(plain) and sequence(group).count(tokenizer.eos_token_id) == 1


def test_no_eos_is_refused():
    with pytest.raises(ModelError, match=r"no EOS token(.|\n)*Set eos_token"):
        to_group(text_row(), 0, small_tokenizer(eos=False), WIDE)


def test_merge_across_the_boundary_is_not_scored():
    tokenizer = small_tokenizer()
    assert len(tokenizer("wor")["input_ids"]) == len(tokenizer("world")["input_ids"]) == 2
    row = text_row("good wor", "ld morning", "ld old")
    group, notes = to_group(row, 0, tokenizer, WIDE)
    check(group)
    assert notes == {"merged_boundary": 2}
    assert decode(tokenizer, group.prompt) == "<s>good world"
    assert [scored_text(tokenizer, r) for r in group.responses] == [" morning</s>", " old</s>"]


def test_merge_in_one_response_only():
    """The one that merges keeps its own first token, unscored; the other's is scored."""
    tokenizer = small_tokenizer()
    group, notes = to_group(text_row("good wor", "ld morning", " old"), 0, tokenizer, WIDE)
    check(group)
    assert notes == {"merged_boundary": 1}
    assert decode(tokenizer, group.prompt) == "<s>good"
    merged, clean = group.responses
    assert decode(tokenizer, merged.ids) == " world morning</s>"
    assert merged.target_mask.tolist() == [False] + [True] * (len(merged.ids) - 1)
    assert decode(tokenizer, clean.ids) == " wor old</s>"
    assert scored_text(tokenizer, clean) == " old</s>"


def test_a_response_wholly_merged_with_text_of_the_prompt_is_refused():
    """Only its EOS would be scored: the one token of the other side holds the prompt's text."""
    with pytest.raises(RowProblem, match="no token of its own") as caught:
        to_group(text_row("good wor", "ld", " morning"), 0, small_tokenizer(), WIDE)
    assert caught.value.reason == "nothing_scored"


def test_a_token_that_merged_with_the_prompt_s_space_is_the_response_s():
    """Otherwise both responses of one word would be an EOS alone. The prompt's tokens lack the space."""
    tokenizer = small_tokenizer()
    tokenizer.backend_tokenizer.add_tokens([" blue", " red"])
    group, notes = to_group(text_row("good ", "blue", "red"), 0, tokenizer, WIDE)
    assert decode(tokenizer, group.prompt) == "<s>good" and notes == {"merged_white_space": 2}
    assert [scored_text(tokenizer, r) for r in group.responses] == [" blue</s>", " red</s>"]


def test_no_token_before_the_response():
    with pytest.raises(RowProblem, match="no token comes before") as caught:
        to_group(text_row("wor", "ld good", " old"), 0, small_tokenizer(bos=False), WIDE)
    assert caught.value.reason == "empty_prompt"
    group, _ = to_group(text_row("wor", "ld good", " old"), 0, small_tokenizer(), WIDE)
    assert decode(small_tokenizer(), group.prompt) == "<s>"


def test_responses_that_differ_as_text_but_not_as_tokens():
    from tokenizers import normalizers

    tokenizer = small_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    row = text_row("good", " caf\u00e9", " cafe\u0301")
    with pytest.raises(RowProblem) as caught:
        to_group(row, 0, tokenizer, WIDE)
    assert caught.value.reason == "identical"


@needs_shared
@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "scored"),
    [
        ("Hello", " there", " you", [" there", " you"]),
        ("Hello ", "there", "you", [" there", " you"]),  # one token, which the prompt does not have
        ("Hello wor", "ld, yes", "king, no", [", yes", ", no"]),
        ("Hello", "\n\nyes", "\n\nno", ["\n\nyes", "\n\nno"]),
        ("Hello\n\n", "yes", "no", ["yes", "no"]),  # two newlines are one token only when alone
        ("Q: \u00e9", "\u00e8 a", "\u00e7 b", ["\u00e8 a", "\u00e7 b"]),  # two bytes a letter
    ],
)
def test_gpt2_boundaries(prompt, chosen, rejected, scored):
    tokenizer = real_tokenizer("gpt2")
    group, notes = to_group(text_row(prompt, chosen, rejected), 0, tokenizer, WIDE)
    check(group)
    expected = [text + "<|endoftext|>" for text in scored]
    assert [scored_text(tokenizer, r) for r in group.responses] == expected
    for i, response in enumerate((chosen, rejected)):
        assert decode(tokenizer, sequence(group, i)) == prompt + response + "<|endoftext|>"
    assert notes.total() == (2 if scored[0] != chosen else 0)


@needs_shared
@pytest.mark.parametrize("name", FOLDERS)
def test_real_tokenizers_bos_and_eos(name):
    tokenizer = real_tokenizer(name)
    group, _ = to_group(text_row("Once upon a time", " there was.", " no."), 0, tokenizer, WIDE)
    check(group)
    expected = [*tokenizer("Once upon a time there was.")["input_ids"], tokenizer.eos_token_id]
    assert sequence(group) == expected
    assert all(r.ids[-1] == tokenizer.eos_token_id for r in group.responses)
    bos = [tokenizer.bos_token_id] if name == "stories260K" else []
    assert group.prompt[: len(bos)].tolist() == bos
    assert tokenizer.bos_token_id is None or sequence(group)[:-1].count(tokenizer.bos_token_id) == len(bos)


@needs_shared
@pytest.mark.peer
@pytest.mark.parametrize("name", FOLDERS)
def test_text_rows_give_trl_s_tokens(name):
    tokenizer = real_tokenizer(name)
    rows = []
    for row in read_lines(DATA / "pref/hh_rlhf_test.jsonl")[:60]:
        prompt = "".join(f"\n\n{t['role']}: {t['content'].strip()}" for t in row["prompt"])
        chosen, rejected = (" " + row[n][0]["content"].strip() for n in ("chosen", "rejected"))
        rows.append(text_row(prompt + "\n\nassistant:", chosen, rejected))
    compared = 0
    for number, (row, theirs) in enumerate(zip(rows, trl_rows(tokenizer, rows))):
        group, _ = to_group(row, number, tokenizer, WIDE)
        for i, name in enumerate(("chosen_ids", "rejected_ids")):
            response = group.responses[i]
            assert sequence(group, i) == theirs["prompt_ids"] + theirs[name]
            assert response.ids[response.target_mask].tolist() == theirs[name]
            compared += 1
    assert compared == 120


# ---- ranked rows


def test_ranked():
    row = ranked_row((" old", 1), (" gold", 3), (" world", 1))
    group, notes = to_group(row, 4, small_tokenizer(), WIDE)
    check(group)
    assert notes == {"tie_pair": 1}
    assert [(p.winner, p.loser, p.offset, p.weight) for p in group.pairs] == [
        (1, 0, 0, 1),
        (1, 2, 0, 1),
    ]
    assert [r.score for r in group.responses] == [1.0, 3.0, 1.0] and group.chosen == (1,)


def test_ranked_duplicates_lose_their_pair_only():
    row = ranked_row((" old", 3), (" old", 2), (" gold", 1))
    group, notes = to_group(row, 0, small_tokenizer(), WIDE)
    check(group)
    assert notes == {"identical_pair": 1}
    assert [(p.winner, p.loser) for p in group.pairs] == [(0, 2), (1, 2)]


@needs_shared
@pytest.mark.parametrize("name", FOLDERS)
def test_texts_taken_apart_at_special_tokens_keep_their_ids(name):
    tokenizer = real_tokenizer(name)
    encoder = Encoder(tokenizer)
    assert encoder.seams
    special = tokenizer.eos_token
    texts = [
        f"a {special} b{special}\n c",
        special,
        f" {special}{special}d  ",
        "e",
        "\u00e9\u0301\n",
    ]
    texts += [
        " ".join(t["content"] for t in row["prompt"]) + special + "x"
        for row in read_lines(DATA / "pref/hh_rlhf_test.jsonl")[:50]
    ]
    ids = encoder.encode(texts)
    for text in texts:
        assert ids[text].tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_special_token_that_takes_white_space_along_is_no_seam():
    from tokenizers import AddedToken

    tokenizer = small_tokenizer()
    assert Encoder(tokenizer).seams
    tokenizer.add_special_tokens({"sep_token": AddedToken("<sep>", rstrip=True)})
    encoder = Encoder(tokenizer)
    assert encoder.seams is None
    text = "good<sep>  world<|im_end|>old"
    assert encoder.encode([text])[text].tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_tokenizer_s_own_truncation_and_padding_are_not_used():
    tokenizer = small_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    group, _ = to_group(text_row(), 0, tokenizer, WIDE)
    plain, _ = to_group(text_row(), 0, small_tokenizer(), WIDE)
    assert sequence(group) == sequence(plain)
