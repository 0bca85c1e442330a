"""Single fields of a preference row: scores, labels, reference sums, and which tokens are relevant.

Relevance (for weighted DPO) comes in one of two forms a response:
    spans          [[start, end], ...]   the relevant characters: offsets in the response's own text
    token_weights  [1, 0.5, 0, ...]      a number in [0, 1] for each scored token (its end of turn or EOS may
                                         be left out: 0)
In a conversation, spans are offsets in the content of the response's one assistant turn; where it has
several, each span is [turn, start, end], turn being the place in the row's own list of messages. An empty
list of spans says that nothing is relevant.
"""

import math
from dataclasses import dataclass

from fastdpo.errors import DataError

_ROUNDING = 0.01  # how far above 0 a sum of log-probs may come out


class RowProblem(DataError):
    """One row cannot be used: `reason` is what reports count by, `field` where in the row."""

    def __init__(self, reason: str, field: str, message: str):
        super().__init__(f"{field}: {message}")
        self.reason, self.field, self.message = reason, field, message


@dataclass(frozen=True)
class Relevance:
    """Which of a response's tokens are relevant, as the row says it: one of the two is None."""

    field: str
    spans: tuple[tuple[int, int, int], ...] | None  # (turn of the response, start, end); turn 0 of a text
    weights: tuple[float, ...] | None  # one a scored token


def kind(value) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def score(value, field: str) -> float | None:
    if value is None:
        return None
    if not is_number(value):
        raise RowProblem("wrong_type", field, f"a number, not {kind(value)}")
    if not math.isfinite(value):
        raise RowProblem("nan_score", field, f"a finite number, not {value}")
    return float(value)


def label(value, field: str) -> bool:
    """Whether an unpaired response is desirable: a bool, or 0 or 1."""
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise RowProblem("malformed_label", field, f"true or false (or 1 or 0), not {kind(value)}")
    return bool(value)


def ref_logps(row: dict) -> tuple[float | None, float | None]:
    """What a reference model gave (chosen, rejected): both sums, or None twice where the row has neither."""
    fields = []
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        old = name.replace("ref_", "reference_", 1)  # TRL's name for it until 0.11
        fields.append(old if name not in row and old in row else name)
    if not any(field in row for field in fields):
        return None, None
    problem = lambda field, message: RowProblem("malformed_ref_logps", field, message)
    for field in fields:
        value = row.get(field)
        if field not in row:
            raise problem(field, "missing or null, where the row has the other response's; give both or none")
        if not is_number(value):
            raise problem(field, f"a number, the sum over the response's tokens, not {kind(value)}")
        if not math.isfinite(value):
            raise problem(field, f"a finite number, not {value}")
        if value > _ROUNDING:
            raise problem(field, f"a log-probability is at most 0, not {value} (its sign may be turned)")
    return tuple(float(row[field]) for field in fields)


def relevance(columns: dict, prefix: str, where: str, response, before: int | None) -> Relevance | None:
    """What `columns` say of one response in {prefix}spans or {prefix}token_weights; None where nothing.

    `where` is what errors call the columns' place. `before` is how many messages of the row's own list come
    before the response (None: it is text, and the row's own text begins with the prompt).
    """
    spans_name, weights_name = f"{prefix}spans", f"{prefix}token_weights"
    spans, weights = columns.get(spans_name), columns.get(weights_name)
    if spans is None and weights is None:
        return None
    if spans is None:
        return Relevance(where + weights_name, None, _weights(weights, where + weights_name))
    field = where + spans_name
    if weights is not None:
        raise _bad_spans(field, f"the response has {where}{weights_name} too; give one of the two")
    if before is None:
        raise _bad_spans(field, "offsets in a text need the prompt in a column of its own; add it")
    if not isinstance(spans, list):
        raise _bad_spans(field, f"a list of [start, end], not {kind(spans)}")
    placed = tuple(_span(span, f"{field}[{i}]", response, before) for i, span in enumerate(spans))
    return Relevance(field, placed, None)


def all_or_none(found: list[Relevance | None], missing: tuple[str, ...]) -> tuple[Relevance | None, ...]:
    """Responses of one row are weighted together or not at all; `missing` names the column each may lack."""
    lacking = [name for name, one in zip(missing, found) if one is None]
    if lacking and len(lacking) < len(found):
        message = "missing or null, where the row's other response has it; give both ([]: none is relevant)"
        raise _bad_spans(lacking[0], message)
    return tuple(found)


def _bad_spans(field: str, message: str) -> RowProblem:
    return RowProblem("malformed_spans", field, message)


def _span(span, field: str, response, before: int) -> tuple[int, int, int]:
    """(turn of the response, start, end), within the text it is of."""
    whole = lambda value: isinstance(value, int) and not isinstance(value, bool)
    if not isinstance(span, list) or len(span) not in (2, 3) or not all(map(whole, span)):
        raise _bad_spans(field, f"[start, end] or [turn, start, end], whole numbers, not {kind(span)}")
    *turn, start, end = span
    if isinstance(response, str):
        if turn:
            raise _bad_spans(field, f"[start, end] in the text, which has no turns, not {span}")
        at, text = 0, response
    else:
        answers = [i for i, message in enumerate(response) if message["role"] == "assistant"]
        named = ", ".join(str(before + i) for i in answers)
        if not turn and len(answers) > 1:
            message = f"the response has several assistant turns ({named}): give [turn, start, end]"
            raise _bad_spans(field, message)
        at = turn[0] - before if turn else answers[0]
        if at not in answers:
            raise _bad_spans(field, f"turn {turn[0]} is none of the response's assistant turns ({named})")
        text = response[at]["content"]
    if not 0 <= start < end <= len(text):
        bounds = f"0 <= start < end <= {len(text)} (its characters)"
        raise _bad_spans(field, f"{bounds}, not {[start, end]}")
    return at, start, end


def _weights(weights, field: str) -> tuple[float, ...]:
    if not isinstance(weights, list):
        raise RowProblem("malformed_token_weights", field, f"a list of numbers, not {kind(weights)}")
    for i, weight in enumerate(weights):
        if not is_number(weight) or not 0 <= weight <= 1:
            message = f"a number from 0 (irrelevant) to 1 (relevant), not {kind(weight)}"
            raise RowProblem("malformed_token_weights", f"{field}[{i}]", message)
    return tuple(map(float, weights))
