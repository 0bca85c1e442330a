"""Which pairs train: the curriculum of ranked rows, and flipped pairs to study noise.

Pure functions on PreferenceGroups; they return new groups and share the arrays of the old ones.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fastdpo.errors import DataError
from fastdpo.records import Pair, PreferenceGroup

BY_GAP = ("easy", "medium", "hard")
RULES = ("all", "best_worst", *BY_GAP)


def select_pairs(
    groups: Sequence[PreferenceGroup], rule: str, ref_logps: Sequence[Sequence[float]] | None = None
) -> tuple[list[PreferenceGroup], Counter]:
    """The groups with the pairs that `rule` names, and what it left out: pairs and responses (those that no
    kept pair needs are not computed), and `one_loser`, rows whose pair is the same under every rule.

    all         every pair; the groups as they are
    best_worst  R1 against the response with the lowest score
    easy, medium, hard   R1 against the last, the middle and the second response (Curry-DPO; Pattnaik et al.
                2024, arXiv 2403.07230), a stage of a curriculum each

    Responses rank by (score, highest first, then index), and R1 is the first. Those with R1's score are left
    out; of N that remain, R1 among them, the middle one is the one at N // 2 from 0: R3 of four, R2 of three.
    With `ref_logps` (per group [N], the reference's log-prob of each response) R1 stays, and its losers go
    by |log-prob of R1 - of the loser| in place of the score: the widest gap is easy, the narrowest hard;
    best_worst does not read it. A group with one pair keeps it, and unpaired rows stay as they are.
    """
    if rule not in RULES:
        raise ValueError(f"rule {rule!r} is not one of {', '.join(RULES)}")
    if rule == "all":
        return list(groups), Counter()
    selected: list[PreferenceGroup] = []
    notes: Counter[str] = Counter()
    for i, group in enumerate(groups):
        if group.pairs:
            by = None if ref_logps is None or rule == "best_worst" else ref_logps[i]
            ranked = _from_hard_to_easy(group, by)
            if len(ranked) == 1:
                notes["one_loser"] += 1
            place = {"hard": 0, "medium": (len(ranked) - 1) // 2, "easy": -1, "best_worst": -1}[rule]
            kept = _only(group, ranked[place])
            notes["pairs"] += len(group.pairs) - 1
            notes["responses"] += len(group.responses) - len(kept.responses)
            group = kept
        selected.append(group)
    return selected, +notes


def _from_hard_to_easy(group: PreferenceGroup, ref_logps: Sequence[float] | None) -> list[Pair]:
    """The pairs that R1 wins, by rank of the loser, or by how far the reference has them apart."""
    if len(group.pairs) == 1:  # the row says which is better, whatever the scores beside it
        return list(group.pairs)
    scores = [response.score for response in group.responses if response.score is not None]
    if len(scores) < len(group.responses):
        raise DataError(
            f"row {group.row}: {len(group.responses)} responses and no scores, so they have no order"
        )
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    best = min((pair.winner for pair in group.pairs), key=order.index)
    won = sorted((pair for pair in group.pairs if pair.winner == best), key=lambda p: order.index(p.loser))
    if ref_logps is not None:
        won.sort(key=lambda pair: abs(float(ref_logps[best]) - float(ref_logps[pair.loser])))
    return won


def _only(group: PreferenceGroup, pair: Pair) -> PreferenceGroup:
    """The group with one pair and its two responses, in their order."""
    kept = sorted((pair.winner, pair.loser))
    renumbered = pair._replace(winner=kept.index(pair.winner), loser=kept.index(pair.loser))
    return replace(group, responses=tuple(group.responses[i] for i in kept), pairs=(renumbered,))


def flip_pairs(
    groups: Sequence[PreferenceGroup], share: float, seed: int
) -> tuple[list[PreferenceGroup], list[int]]:
    """The groups with a share of their preferences wrong, and the numbers of the rows changed: the noise of
    Wu et al. 2024 (Dr. DPO, arXiv 2407.07880).

    Each pair has winner and loser swapped, and each unpaired label is turned, with probability `share` and
    on its own: the draw depends on seed, row number and place in the row only, so the other rows and their
    order change nothing, and what is flipped at 10 % is flipped at 20 % too. Scores stay with their texts.
    """
    flipped, rows = [], []
    for group in groups:
        hit = lambda i, row=group.row: np.random.default_rng([seed, row, i]).random() < share
        pairs = tuple(
            p._replace(winner=p.loser, loser=p.winner) if hit(i) else p for i, p in enumerate(group.pairs)
        )
        responses = tuple(
            replace(r, label=not r.label) if r.label is not None and hit(i) else r
            for i, r in enumerate(group.responses)
        )
        if pairs != group.pairs or responses != group.responses:
            rows.append(group.row)
            group = replace(group, responses=responses, pairs=pairs)
        flipped.append(group)
    return flipped, rows
