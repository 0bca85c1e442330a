"""Which pairs train: Curry-DPO's stages, what is left out, and flipped pairs."""

import json
from collections import Counter

import numpy as np
import pytest

from fastdpo.data.groups import to_group
from fastdpo.data.pairs import RULES, flip_pairs, select_pairs
from fastdpo.data.store.facts import Facts
from fastdpo.data.store.shards import Shard, encoded
from fastdpo.data.store.stored import StoredGroups, facts_of
from fastdpo.errors import DataError
from fastdpo.records import Pair, PreferenceGroup, Response
from tests.data.shared_data import SHARED, WIDE, check, needs_shared, ranked_row, small_tokenizer
from tests.tiny import group as random_group

STAGES = ("easy", "medium", "hard")


def ranked(*scores, row=0, labels=None):
    """A group whose response i is the id 10 + i, with a pair wherever one score is higher."""
    responses = tuple(
        Response(np.array([10 + i, 2]), np.ones(2, bool), score, ref_logp=-float(i))
        for i, score in enumerate(scores)
    )
    several = range(len(scores))
    pairs = tuple(Pair(i, j, 0.25 * i, 1 + j) for i in several for j in several if scores[i] > scores[j])
    return PreferenceGroup(row, np.array([1, 5]), responses, pairs)


def unpaired(label, row=0):
    return PreferenceGroup(
        row, np.array([1, 5]), (Response(np.array([7, 2]), np.ones(2, bool), label=label),), ()
    )


def texts(group):
    """The (winner, loser) of each pair by id - 10: the places that they had in `ranked`."""
    first = lambda i: int(group.responses[i].ids[0]) - 10
    return [(first(pair.winner), first(pair.loser)) for pair in group.pairs]


def chosen_pairs(group, ref_logps=None):
    out = {}
    for rule in RULES[1:]:
        (kept,), _ = select_pairs([group], rule, None if ref_logps is None else np.array(ref_logps, float))
        assert len(kept.pairs) == 1 and len(kept.responses) == 2 and kept.row == group.row
        (out[rule],) = texts(kept)
    return out


@needs_shared
def test_curry_dpo_vectors():
    vectors = json.loads((SHARED / "research/vectors.json").read_text())["curry_dpo_pairs"]
    for prompt in vectors["prompts"]:
        found = chosen_pairs(ranked(*prompt["ratings"]))
        assert {stage: found[stage] for stage in STAGES} == {s: tuple(prompt[s][:2]) for s in STAGES}


@pytest.mark.parametrize(
    ("scores", "easy", "medium", "hard"),
    [
        ((5, 4, 3, 2), (0, 3), (0, 2), (0, 1)),
        ((4, 4.5, 1, 3), (1, 2), (1, 3), (1, 0)),
        ((2, 2, 2, 5), (3, 2), (3, 1), (3, 0)),  # equal losers keep their order
        ((3, 1, 2), (0, 1), (0, 2), (0, 2)),  # the middle of three is the second
        ((1, 3), (1, 0), (1, 0), (1, 0)),
        ((5, 4, 3, 2, 1), (0, 4), (0, 2), (0, 1)),
        ((6, 5, 4, 3, 2, 1), (0, 5), (0, 3), (0, 1)),
        ((5, 5, 3, 2), (0, 3), (0, 2), (0, 2)),  # a tie with R1 is no loser of it
        ((1, 5, 5), (1, 0), (1, 0), (1, 0)),
    ],
)
def test_stages(scores, easy, medium, hard):
    assert chosen_pairs(ranked(*scores)) == {"best_worst": easy, "easy": easy, "medium": medium, "hard": hard}


def test_by_the_reference_s_log_probs():
    """The best-rated response stays the winner; its widest gap, of either sign, is easy."""
    found = chosen_pairs(ranked(5, 4, 3, 2), ref_logps=[-10, -30, -11, -5])
    assert found == {"best_worst": (0, 3), "easy": (0, 1), "medium": (0, 3), "hard": (0, 2)}
    found = chosen_pairs(ranked(2, 5, 3, 4), ref_logps=[-7, -10, -13, -13])  # equal gaps go by rating
    assert found == {"best_worst": (1, 0), "easy": (1, 0), "medium": (1, 2), "hard": (1, 3)}
    found = chosen_pairs(ranked(5, 5, 3), ref_logps=[-10, -99, -11])
    assert found["easy"] == (0, 2)


def test_a_pair_keeps_its_offset_and_weight_and_responses_their_order():
    group = ranked(2, 1, 3, 0)
    (kept,), _ = select_pairs([group], "easy")
    assert kept.pairs == (Pair(0, 1, 0.5, 4),)  # of the pair (2, 3)
    assert [r.score for r in kept.responses] == [3, 0]
    assert kept.responses[0] is group.responses[2] and kept.prompt is group.prompt
    (kept,), _ = select_pairs([group], "medium")
    assert kept.pairs == (Pair(1, 0, 0.5, 2),) and [r.score for r in kept.responses] == [1, 3]


def test_all_is_every_pair():
    groups = [ranked(3, 2, 1), unpaired(True, 1)]
    kept, notes = select_pairs(groups, "all")
    assert all(a is b for a, b in zip(kept, groups)) and not notes


def test_what_is_left_out_is_counted():
    groups = [ranked(3, 2, 1), ranked(2, 1, row=1), unpaired(False, 2), ranked(2, 2, 2, 1, row=3)]
    kept, notes = select_pairs(groups, "hard")
    assert [g.row for g in kept] == [0, 1, 2, 3] and kept[2] is groups[2]
    assert notes == {"pairs": 4, "responses": 3, "one_loser": 2}
    assert [len(g.responses) for g in kept] == [2, 2, 1, 2]


@pytest.mark.parametrize("by_logp", [False, True])
@pytest.mark.parametrize("rule", RULES[1:])
def test_groups_together_are_as_each_alone(rule, by_logp):
    """Ranked rows of 1 to 6 responses with ties, plain and unpaired ones, in a list and read from a shard."""
    draw = np.random.default_rng(0)
    groups = [ranked(*draw.integers(1, 5, draw.integers(1, 7)).tolist(), row=row) for row in range(60)]
    groups += [unpaired(True, 60), random_group(61, 3, [4, 2]), ranked(1, 2, row=62)]
    logps = draw.normal(-20, 5, sum(len(g.responses) for g in groups)).round()
    ends = np.cumsum([len(g.responses) for g in groups])[:-1]
    alone = [
        select_pairs([g], rule, some if by_logp else None) for g, some in zip(groups, np.split(logps, ends))
    ]
    want, notes = [facts_of(some) for some, _ in alone], sum((told for _, told in alone), Counter())
    for some in (groups, StoredGroups([Shard(encoded(groups, {}))], [0])):
        kept, told = select_pairs(some, rule, logps if by_logp else None)
        assert told == notes
        for facts in (facts_of(kept), Facts.of(kept)):
            for name in ("row", "cu_resp", "length", "score", "cu_pairs", "pairs", "offset", "weight"):
                np.testing.assert_array_equal(getattr(facts, name), getattr(Facts.joined(want), name))


@pytest.mark.parametrize("rule", RULES)
def test_a_plain_row_keeps_its_pair_whatever_its_scores(rule):
    """Its columns say which is better; scores beside them may say otherwise, or be missing."""
    responses = ranked(1, 3).responses
    plain = PreferenceGroup(4, np.array([1]), responses, (Pair(0, 1),))
    unscored = random_group(5, 3, [4, 2])
    kept, _ = select_pairs([plain, unscored], rule)
    assert [g.pairs for g in kept] == [(Pair(0, 1),)] * 2
    assert [g.responses for g in kept] == [plain.responses, unscored.responses]


def test_a_duplicate_of_the_best_response_is_no_loser():
    """Pairs of equal tokens are gone before: R1 is then the best that beats another."""
    row = ranked_row((" old", 3), (" old", 2), (" gold", 1))
    group, _ = to_group(row, 0, small_tokenizer(), WIDE)
    (kept,), _ = select_pairs([group], "hard")
    check(kept)
    assert [r.score for r in kept.responses] == [3, 1]
    row = ranked_row((" old", 3), (" gold", 3), (" old", 1))
    group, _ = to_group(row, 0, small_tokenizer(), WIDE)
    for rule in RULES[1:]:
        (kept,), _ = select_pairs([group], rule)
        check(kept)
        assert [(r.score, p) for r, p in zip(kept.responses, kept.pairs)] == [(3, Pair(0, 1))]


def test_no_scores_and_no_rule():
    with pytest.raises(DataError, match="row 7: 3 responses and no scores"):
        select_pairs([random_group(7, 3, [4, 2, 5])], "easy")
    with pytest.raises(ValueError, match="'hardest' is not one of all, best_worst"):
        select_pairs([], "hardest")


# ---- flips


def many(n):
    return [ranked(4, 3, 2, 1, row=i) if i % 3 else unpaired(bool(i % 2), i) for i in range(n)]


def outcome(groups):
    return {g.row: (g.pairs, [r.label for r in g.responses]) for g in groups}


def test_flips_are_by_seed_and_row_alone():
    groups = many(60)
    flipped, rows = flip_pairs(groups, 0.3, 5)
    again, same = flip_pairs(groups[::-1], 0.3, 5)
    assert outcome(again) == outcome(flipped) and same == rows[::-1]
    some, _ = flip_pairs(groups[7:20], 0.3, 5)
    assert outcome(some).items() <= outcome(flipped).items()
    other, _ = flip_pairs(groups, 0.3, 6)
    assert outcome(other) != outcome(flipped)
    assert outcome(groups) == outcome(many(60))  # the groups given are as they were


def test_a_flip_swaps_winner_and_loser_or_turns_the_label():
    groups = many(40)
    flipped, rows = flip_pairs(groups, 1.0, 0)
    assert rows == list(range(40))
    for old, new in zip(groups, flipped):
        assert new.pairs == tuple(Pair(p.loser, p.winner, p.offset, p.weight) for p in old.pairs)
        assert [r.label for r in new.responses] == [
            None if r.label is None else not r.label for r in old.responses
        ]
        assert [r.score for r in new.responses] == [r.score for r in old.responses]
    kept, rows = flip_pairs(groups, 0.0, 0)
    assert not rows and all(a is b for a, b in zip(kept, groups))


def test_rows_told_are_those_changed():
    groups = many(90)
    flipped, rows = flip_pairs(groups, 0.2, 1)
    before, after = outcome(groups), outcome(flipped)
    assert rows == [row for row in before if before[row] != after[row]] and 0 < len(rows) < 90


def test_flips_of_groups_that_are_read_from_a_shard():
    groups = many(40)
    flipped, rows = flip_pairs(StoredGroups([Shard(encoded(groups, {}))], [0]), 0.4, 1)
    want, want_rows = flip_pairs(groups, 0.4, 1)
    assert rows == want_rows and outcome(flipped) == outcome(want)
    for name in ("label", "pairs", "offset", "weight"):
        np.testing.assert_array_equal(getattr(facts_of(flipped), name), getattr(Facts.of(want), name))


def test_pairs_of_a_row_are_drawn_each_on_its_own():
    groups = [ranked(4, 3, 2, 1, row=i) for i in range(300)]
    flipped, _ = flip_pairs(groups, 0.25, 3)
    hits = np.array([[p.winner > p.loser for p in g.pairs] for g in flipped])
    assert hits.shape == (300, 6)
    np.testing.assert_allclose(hits.mean(0), 0.25, atol=0.1)  # four standard errors
    correlation = np.corrcoef(hits.T)[~np.eye(6, dtype=bool)]
    assert np.abs(correlation).max() < 0.25


def test_a_larger_share_flips_the_same_pairs_and_more():
    groups = many(200)
    hits = []
    for share in (0.1, 0.3):
        _, rows = flip_pairs(groups, share, 2)
        hits.append(set(rows))
    assert hits[0] < hits[1]
