"""Whether rows have what an objective reads: told before training, by row."""

from collections.abc import Sequence

from fastdpo.errors import DataError
from fastdpo.objectives.catalogue import CATALOGUE
from fastdpo.objectives.seam import Objective
from fastdpo.records import Pair, PreferenceGroup


def check_rows(objective: Objective, groups: Sequence[PreferenceGroup], name: str = "") -> None:
    """Raises DataError naming the first row that lacks what the objective needs. `name`: of a held-out set,
    which may hold responses of one kind only where training needs both."""
    where = f"{name}: " if name else ""
    for group in groups:
        for need in sorted(objective.needs & _ROW_CHECKS.keys()):
            problem = _ROW_CHECKS[need](group)
            if problem:
                raise DataError(f"{where}row {group.row}: {problem} (objective {objective.name}).")
        if objective.only_chosen and not group.chosen:
            text = "no chosen response: each is labelled undesirable, or worse than another one"
            way_out = "Leave the row out, or flip_pairs where that turned it."
            raise DataError(f"{where}row {group.row}: {text} (objective {objective.name}). {way_out}")
    if "judged" in objective.needs and groups and not name:
        for good, label in ((True, "desirable (label: true)"), (False, "undesirable (label: false)")):
            if not any(group.judged(good) for group in groups):
                text = f"no response is {label}, and objective {objective.name} needs both kinds"
                raise DataError(f"{where}{text}.")


def _has_pairs(group: PreferenceGroup) -> str | None:
    if group.pairs:
        return None
    if any(response.label is not None for response in group.responses):
        return f"an unpaired row, and this needs chosen and rejected; {_takes_unpaired()} take unpaired rows"
    return "no pair of responses to tell apart"


def _is_judged(group: PreferenceGroup) -> str | None:
    if group.pairs or any(response.label is not None for response in group.responses):
        return None
    return "neither a label nor a pair; add a label (true or false), or chosen and rejected"


def _has_scores(group: PreferenceGroup) -> str | None:
    for pair in group.pairs:
        for side, index in (("chosen", pair.winner), ("rejected", pair.loser)):
            if group.responses[index].score is None:
                return (
                    f"response {index} ({side}) has no score; add score_chosen and score_rejected, or a "
                    "score to each of the responses"
                )
    return None


def _has_ordered_scores(group: PreferenceGroup) -> str | None:
    def contradicts(pair: Pair) -> str | None:
        good, bad = _scores(group, pair)
        if good >= bad:
            return None
        return f"the winner's score {good:g} is below the loser's {bad:g}; swap them or leave the row out"

    return _has_scores(group) or next(filter(None, map(contradicts, group.pairs)), None)


def _has_positive_scores(group: PreferenceGroup) -> str | None:
    missing = _has_scores(group)
    low = [] if missing else [s for pair in group.pairs for s in _scores(group, pair) if s <= 0]
    return f"score {low[0]:g} is not above 0, as scaling: log_difference needs" if low else missing


def _has_token_weights(group: PreferenceGroup) -> str | None:
    for pair in group.pairs:
        for side, index in (("chosen", pair.winner), ("rejected", pair.loser)):
            if group.responses[index].token_weight is None:
                return (
                    f"response {index} ({side}) has no token weights, which gamma needs; add {side}_spans or "
                    f"{side}_token_weights (in ranked rows: spans or token_weights)"
                )
    return None


def _has_no_offsets(group: PreferenceGroup) -> str | None:
    if any(pair.offset for pair in group.pairs):
        return "a pair has an offset, which this does not read"
    return None


def _scores(group: PreferenceGroup, pair: Pair) -> tuple[float, float]:
    return group.responses[pair.winner].score, group.responses[pair.loser].score


def _takes_unpaired() -> str:
    return ", ".join(name for name, entry in CATALOGUE.items() if "judged" in entry.needs) + " and sft"


_ROW_CHECKS = {
    "pairs": _has_pairs,
    "judged": _is_judged,
    "scores": _has_scores,
    "ordered scores": _has_ordered_scores,
    "positive scores": _has_positive_scores,
    "token weights": _has_token_weights,
    "no offsets": _has_no_offsets,
}
