"""Which tokens of a response are relevant: the token weights of weighted DPO.

A row says it in one of two forms a response:
    spans          [[start, end], ...]   the relevant characters: offsets in the response's own text
    token_weights  [1, 0.5, 0, ...]      a number in [0, 1] for each scored token (its end of turn or EOS may
                                         be left out: 0)
In a conversation, spans are offsets in the content of the response's one assistant turn; where it has
several, each span is [turn, start, end], turn being the place in the row's own list of messages. An empty
list of spans says that nothing is relevant.

A token is relevant (weight 1) where it shares at least one character with a span, and each piece of a
character that several tokens spell is. What the response's own text does not hold (headers, the end of turn,
EOS) and what is not scored has weight 0.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fastdpo.data.report import RowProblem, is_number, kind

Places = tuple[np.ndarray, np.ndarray]  # i64[n]: each token's first character, and the one after its last


@dataclass(frozen=True)
class Relevance:
    """Which of a response's tokens are relevant, as the row says it: one of the two is None."""

    field: str
    spans: tuple[tuple[int, int, int], ...] | None  # (turn of the response, start, end); turn 0 of a text
    weights: tuple[float, ...] | None  # one a scored token


@dataclass(frozen=True)
class Marks:
    """The same in the text that the model reads."""

    field: str  # of the row, for messages
    spans: tuple[tuple[int, int], ...] | None  # characters [start, end) of the text
    weights: tuple[float, ...] | None  # one a scored token
    end: int  # where the response's own text ends and its end of turn begins


# ---- from the row's columns


def read_relevance(columns: dict, prefix: str, where: str, response, before: int | None) -> Relevance | None:
    """What `columns` say of one response in {prefix}spans or {prefix}token_weights; None where nothing.

    `where` is what errors call the columns' place. `before` is how many messages of the row's own list come
    before the response (None: it is text, and the row's own text begins with the prompt).
    """
    spans, weights = columns.get(f"{prefix}spans"), columns.get(f"{prefix}token_weights")
    if spans is None and weights is None:
        return None
    field, weights_field = f"{where}{prefix}spans", f"{where}{prefix}token_weights"
    if spans is None:
        return Relevance(weights_field, None, _weights(weights, weights_field))
    if weights is not None:
        raise _bad_spans(field, f"the response has {weights_field} too; give one of the two")
    if before is None:
        raise _bad_spans(field, "offsets in a text need the prompt in a column of its own; add it")
    if not isinstance(spans, list):
        raise _bad_spans(field, f"a list of [start, end], not {kind(spans)}")
    placed = tuple(_span(span, f"{field}[{i}]", response, before) for i, span in enumerate(spans))
    return Relevance(field, placed, None)


def all_or_none(found: list[Relevance | None], missing: list[str]) -> tuple[Relevance | None, ...]:
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
    whole = lambda value: is_number(value) and isinstance(value, int)
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


# ---- to the text that the model reads


def mark(
    relevance: Relevance | None, contents: dict[int, str], stretches: dict[int, tuple[int, int]], text: str
) -> Marks | None:
    """The marks of a response in `text`: per assistant turn its content (a plain response is turn 0), and the
    stretch of the text scored for it. Raises RowProblem where the template changed one with spans."""
    if relevance is None:
        return None
    at = {turn: _find(text, contents[turn], *stretches[turn]) for turn in contents}
    last, placed = at[max(contents)], []
    for turn, start, stop in relevance.spans or ():
        if (found := at[turn]) is None:
            way_out = "give token_weights"
            message = f"the chat template does not print the turn's content as it stands, once: {way_out}"
            raise RowProblem("spans_not_found", relevance.field, message)
        first, after, stripped = found
        shift = first - stripped
        placed.append((max(start + shift, first), min(stop + shift, after)))
    spans = None if relevance.spans is None else tuple(placed)
    return Marks(relevance.field, spans, relevance.weights, last[1] if last else len(text))


def _find(text: str, content: str, start: int, end: int) -> tuple[int, int, int] | None:
    """(start, end, white space stripped in front) of a turn's content in its stretch of the text. None where
    it is not there, or may be in several places: then the first must follow the header at once."""
    for printed in (content, content.strip()):
        at = text.find(printed, start, end) if printed else -1
        if at < 0:
            continue
        if text[start:at].strip() and text.find(printed, at + 1, end) >= 0:
            return None
        return at, at + len(printed), content.index(printed)
    return None


# ---- to its tokens


def weigh(
    marks: Marks, places: Callable[[], Places | None], scored: np.ndarray, lead: int, notes: Counter
) -> np.ndarray:
    """f32[n], the weight of each token; `scored` tells those that are scored, bool[n]. The text's own tokens,
    which `places` can find, are those from `lead` on; any more are EOS."""
    weight = np.zeros(len(scored), np.float32)
    given, total = marks.weights, int(scored.sum())
    if given is not None and len(given) == total:
        weight[scored] = given
        return weight
    found = places()
    if found is None:
        message = "the tokenizer does not spell this row's text as it is, so characters have no tokens"
        raise RowProblem("spans_not_found", marks.field, message)
    starts, ends = found
    own = slice(lead, lead + len(starts))
    if given is not None:  # all but the end of turn, or a mistake
        before_end = scored[own] & (starts < marks.end)
        if len(given) != (count := int(before_end.sum())):
            fewer = f" (or {count}, without the end of turn)" if count < total else ""
            message = f"{len(given)} numbers, where the response has {total} scored tokens{fewer}"
            raise RowProblem("token_weights_length", marks.field, message)
        weight[own][before_end] = given
    for start, end in marks.spans or ():
        within = (starts < end) & (ends > start) & scored[own] & (start < end)  # none where all was stripped
        weight[own][within] = 1
        if not within.any():
            notes["span_unscored"] += 1
    return weight


def closed(starts: np.ndarray, ends: np.ndarray, text: str) -> Places | None:
    """A tokenizer's own offsets, if they hold every character of the text in order; some are trimmed of white
    space, some all 0. What a normaliser joined to the character before (NFC's accents) is that one's."""
    if not len(starts) or starts[0] != 0 or (np.diff(starts) < 0).any() or (starts >= ends).any():
        return None
    ends, following = ends.copy(), np.append(starts[1:], len(text))
    for last in np.flatnonzero(following > ends):
        if any(map(str.isspace, text[ends[last] : following[last]])):
            return None
        ends[ends == ends[last]] = following[last]
    return starts, ends


def places_by_decoding(ids: np.ndarray, text: str, decode: Callable[[np.ndarray], str]) -> Places | None:
    """Where each token of `text` lies, found by decoding ever longer beginnings of its ids: slow, and for any
    tokenizer that spells its text as it was. None where it does not."""
    if decode(ids) != text:
        return None
    starts, ends, start = [], [], 0
    for count in range(1, len(ids) + 1):
        spelt = decode(ids[:count])
        after = shared_start(spelt, text)
        unfinished = len(spelt) > after  # it ends in a piece of the next character
        starts.append(start)
        ends.append(min(max(after + unfinished, start + 1), len(text)))
        start = max(start, after)
    return np.array(starts, np.int64), np.array(ends, np.int64)


def shared_start(a, b) -> int:
    """How many leading items two texts (or two lists) share."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])
