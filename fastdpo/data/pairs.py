"""Which pairs train: the curriculum of ranked rows, and flipped pairs to study noise.

Pure functions on groups, by what is known of them without their tokens.
"""

from collections import Counter
from dataclasses import replace

import numpy as np

from fastdpo.data.store.facts import Facts
from fastdpo.data.store.stored import altered, facts_of
from fastdpo.errors import DataError
from fastdpo.preferences import Groups

BY_GAP = ("easy", "medium", "hard")
RULES = ("all", "best_worst", *BY_GAP)


def select_pairs(groups: Groups, rule: str, ref_logps: np.ndarray | None = None) -> tuple[Groups, Counter]:
    """The groups with the pairs that `rule` names, and what it left out: pairs and responses (those that no
    kept pair needs are not computed), and `one_loser`, rows whose pair is the same under every rule.

    all         every pair; the groups as they are
    best_worst  R1 against the response with the lowest score
    easy, medium, hard   R1 against the last, the middle and the second response (Curry-DPO; Pattnaik et al.
                2024, arXiv 2403.07230), a stage of a curriculum each

    Responses rank by (score, highest first, then index), and R1 is the first. Those with R1's score are left
    out; of N that remain, R1 among them, the middle one is the one at N // 2 from 0: R3 of four, R2 of three.
    With `ref_logps` (f64[R], the reference's log-prob of each response) R1 stays, and its losers go by
    |log-prob of R1 - of the loser| in place of the score: the widest gap is easy, the narrowest hard;
    best_worst does not read it. A group with one pair keeps it, and unpaired rows stay as they are.
    """
    if rule not in RULES:
        raise ValueError(f"rule {rule!r} is not one of {', '.join(RULES)}")
    if rule == "all":
        return groups, Counter()
    facts = facts_of(groups)
    picked, won = _picked(facts, rule, None if rule == "best_worst" else ref_logps)
    paired = np.diff(facts.cu_pairs) > 0
    kept = np.repeat(~paired, facts.responses)
    kept[np.concatenate([ends[picked] for ends in facts.of_pairs])] = True
    winner, loser = facts.pairs[picked].T
    notes = {
        "one_loser": (won == 1).sum(),
        "pairs": len(facts.pairs) - len(picked),
        "responses": (~kept).sum(),
    }
    selected = replace(
        facts.only(kept),
        cu_pairs=np.append(0, paired.cumsum()),
        pairs=np.stack([winner > loser, winner < loser], 1).astype(np.int32),  # in their order before
        offset=facts.offset[picked],
        weight=facts.weight[picked],
    )
    return altered(groups, kept, selected), +Counter({name: int(n) for name, n in notes.items()})


def _picked(facts: Facts, rule: str, ref_logps: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(the pair that the rule takes, of each group that has pairs; how many of them R1 wins there)."""
    sizes = np.diff(facts.cu_pairs)
    group_of = np.repeat(np.arange(len(facts)), sizes)
    _check_scores(facts, sizes)
    winner, loser = facts.of_pairs
    rank = np.empty(len(facts.score), np.int64)
    rank[np.lexsort((-facts.score, facts.group_of))] = np.arange(len(rank))  # stable: then by index
    starts = facts.cu_pairs[:-1][sizes > 0]
    best = np.minimum.reduceat(rank[winner], starts) if len(starts) else starts
    won = np.flatnonzero(rank[winner] == np.repeat(best, sizes[sizes > 0]))
    by = [rank[loser[won]]]
    if ref_logps is not None:
        by.append(np.abs(ref_logps[winner[won]] - ref_logps[loser[won]]))
    won = won[np.lexsort((*by, group_of[won]))]  # of each group from hard to easy
    counts = np.bincount(group_of[won], minlength=len(facts))[sizes > 0]
    place = {"hard": 0 * counts, "medium": (counts - 1) // 2}.get(rule, counts - 1)
    return won[counts.cumsum() - counts + place], counts


def _check_scores(facts: Facts, sizes: np.ndarray) -> None:
    """Raises DataError for the first row whose responses have no order."""
    unscored = facts.per_group(np.isnan(facts.score)) > 0
    for place in np.flatnonzero(unscored & (sizes > 1))[:1]:
        raise DataError(
            f"row {facts.row[place]}: {facts.responses[place]} responses and no scores, so they have no order"
        )


def flip_pairs(groups: Groups, share: float, seed: int) -> tuple[Groups, list[int]]:
    """The groups with a share of their preferences wrong, and the numbers of the rows changed: the noise of
    Wu et al. 2024 (Dr. DPO, arXiv 2407.07880).

    Each pair has winner and loser swapped, and each unpaired label is turned, with probability `share` and
    on its own: the draw depends on seed, row number and place in the row only, so the other rows and their
    order change nothing, and what is flipped at 10 % is flipped at 20 % too. Scores stay with their texts.
    """
    facts = facts_of(groups)
    hit = lambda bounds: _drawn(facts.row, bounds, seed) < share
    swapped, turned = hit(facts.cu_pairs), hit(facts.cu_resp) & (facts.label >= 0)
    pairs = np.where(swapped[:, None], facts.pairs[:, ::-1], facts.pairs)
    labels = np.where(turned, 1 - facts.label, facts.label).astype(np.int8)
    swaps = np.append(0, swapped.cumsum())
    changed = facts.per_group(turned) + swaps[facts.cu_pairs[1:]] - swaps[facts.cu_pairs[:-1]]
    rows = facts.row[changed > 0].tolist()
    flipped = altered(groups, np.ones(len(labels), bool), replace(facts, pairs=pairs, label=labels))
    return flipped, rows


def _drawn(rows: np.ndarray, bounds: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) for each place in each row: a stream a place, in which a row's is at its number."""
    numbers, sizes = np.empty(bounds[-1]), np.diff(bounds)
    for place in range(sizes.max(initial=0)):
        at = np.flatnonzero(sizes > place)
        stream = np.random.default_rng([seed, place]).random(rows[at].max() + 1)
        numbers[bounds[at] + place] = stream[rows[at]]
    return numbers
