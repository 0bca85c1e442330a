"""Whether rows have what an objective reads: told before training, by row."""

from collections.abc import Callable, Iterator

import numpy as np

from fastdpo.data.store.facts import Facts
from fastdpo.data.store.stored import facts_of
from fastdpo.errors import DataError
from fastdpo.objectives.catalogue import CATALOGUE
from fastdpo.objectives.seam import Objective
from fastdpo.records import Groups, PreferenceGroup, Response


def check_rows(objective: Objective, groups: Groups, name: str = "") -> None:
    """Raises DataError naming the first row that lacks what the objective needs. `name`: of a held-out set,
    which may hold responses of one kind only where training needs both."""
    where, of = f"{name}: " if name else "", f"objective {objective.name}"
    facts = facts_of(groups)
    for place in np.flatnonzero(_lacking(facts, objective))[:1].tolist():
        group = facts.outline(place)
        for problem in _problems(group, objective.needs):
            raise DataError(f"{where}row {group.row}: {problem} ({of}).")
        text = "no chosen response: each is labelled undesirable, or worse than another one"
        way_out = "Leave the row out, or flip_pairs where that turned it."
        raise DataError(f"{where}row {group.row}: {text} ({of}). {way_out}")
    if "judged" in objective.needs and len(groups) and not name:
        for good, label in ((True, "desirable (label: true)"), (False, "undesirable (label: false)")):
            if not len(facts.pairs) and not (facts.label == good).any():
                raise DataError(f"no response is {label}, and {of} needs both kinds.")


def _lacking(facts: Facts, objective: Objective) -> np.ndarray:
    """Which groups lack something, bool[G]: what `_problems` says in words."""
    group_of = np.repeat(np.arange(len(facts)), np.diff(facts.cu_pairs))
    per_pair = lambda wrong: np.bincount(group_of[wrong], minlength=len(facts)) > 0
    unpaired = np.diff(facts.cu_pairs) == 0
    winner, loser = facts.of_pairs
    good, bad = facts.score[winner], facts.score[loser]
    wrong: dict[str, Callable[[], np.ndarray]] = {
        "judged": lambda: unpaired & (facts.per_group(facts.label >= 0) == 0),
        "no offsets": lambda: per_pair(facts.offset != 0),
        "pairs": lambda: unpaired,
        "scores": lambda: per_pair(np.isnan(good + bad)),
        "ordered scores": lambda: per_pair(~(good >= bad)),
        "positive scores": lambda: per_pair(~(np.minimum(good, bad) > 0)),
        "response scores": lambda: (facts.responses < 2) | (facts.per_group(np.isnan(facts.score)) > 0),
        "token weights": lambda: per_pair((facts.relevant[winner] < 0) | (facts.relevant[loser] < 0)),
    }
    found = [wrong[need]() for need in objective.needs if need in wrong]
    if objective.only_chosen:
        found.append(facts.per_group(facts.chosen) == 0)
    return np.any([np.zeros(len(facts), bool), *found], axis=0)


def _problems(group: PreferenceGroup, needs: frozenset[str]) -> Iterator[str]:
    """What a group lacks of what an objective needs, as `Objective.needs` has it."""
    is_labelled = any(response.label is not None for response in group.responses)
    if "judged" in needs and not group.pairs and not is_labelled:
        yield "neither a label nor a pair; add a label (true or false), or chosen and rejected"
    if "no offsets" in needs and any(pair.offset for pair in group.pairs):
        yield "a pair has an offset, which this does not read"
    if "pairs" in needs and not group.pairs:
        judged = ", ".join(name for name, entry in CATALOGUE.items() if entry.unit == "judged response")
        unpaired = f"an unpaired row, and this needs chosen and rejected; {judged} and sft take unpaired rows"
        yield unpaired if is_labelled else "no pair of responses to tell apart"
    for index, side, response in _in_pairs(group) if "scores" in needs else ():
        if response.score is None:
            yield (
                f"response {index} ({side}) has no score; add score_chosen and score_rejected, or a score to "
                "each of the responses"
            )
    for pair in group.pairs if "ordered scores" in needs else ():
        good, bad = (group.responses[index].score for index in (pair.winner, pair.loser))
        assert good is not None and bad is not None  # or "scores" has said so
        if not good >= bad:
            yield f"the winner's score {good:g} is below the loser's {bad:g}; swap them or leave the row out"
    for _, _, response in _in_pairs(group) if "positive scores" in needs else ():
        assert response.score is not None
        if response.score <= 0:
            yield f"score {response.score:g} is not above 0, as scaling: log_difference needs"
    if "response scores" in needs:
        yield from _unscored(group)
    for index, side, response in _in_pairs(group) if "token weights" in needs else ():
        if response.token_weight is None:
            yield (
                f"response {index} ({side}) has no token weights, which gamma needs; add {side}_spans or "
                f"{side}_token_weights (in ranked rows: spans or token_weights)"
            )


def _unscored(group: PreferenceGroup) -> Iterator[str]:
    """What keeps its responses from being compared by their scores."""
    if len(group.responses) < 2:
        yield "a single response, and this compares a prompt's samples with each other: 2 or more"
    for index, response in enumerate(group.responses):
        if response.score is None:
            yield f"response {index} has no score, and this learns from the scores of all samples"


def _in_pairs(group: PreferenceGroup) -> Iterator[tuple[int, str, Response]]:
    """(its index, chosen or rejected, the response) of both in each pair."""
    for pair in group.pairs:
        for side, index in (("chosen", pair.winner), ("rejected", pair.loser)):
            yield index, side, group.responses[index]
