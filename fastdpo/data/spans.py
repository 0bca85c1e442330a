"""From relevant characters of a response to relevant tokens: the token weights of weighted DPO.

A token is relevant (weight 1) where it shares at least one character with a span, and each piece of a
character that several tokens spell is. What the response's own text does not hold (headers, the end of turn,
EOS) and what is not scored has weight 0.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fastdpo.data.row_fields import Relevance, RowProblem

Places = tuple[np.ndarray, np.ndarray]  # i64[n]: each token's first character, and the one after its last


@dataclass(frozen=True)
class Marks:
    """A response's relevance, in the text that the model reads: one of spans and weights is None."""

    field: str  # of the row, for messages
    spans: tuple[tuple[int, int], ...] | None  # characters [start, end) of the text
    weights: tuple[float, ...] | None  # one a scored token
    end: int  # where the response's own text ends and its end of turn begins


def mark_text(relevance: Relevance | None, start: int, end: int) -> Marks | None:
    """The marks of a plain response that is text[start:end]."""
    if relevance is None:
        return None
    spans = relevance.spans and tuple((start + a, start + b) for _, a, b in relevance.spans)
    return Marks(relevance.field, spans, relevance.weights, end)


def mark_turns(
    relevance: Relevance | None, contents: dict[int, str], stretches: dict[int, tuple[int, int]], text: str
) -> Marks | None:
    """The marks of a conversation printed as `text`: per assistant turn its content, and the stretch of the
    text that is scored for it. Raises RowProblem where the template changed a turn that has spans."""
    if relevance is None:
        return None
    last = max(contents)
    at = {turn: _find(text, contents[turn], *stretches[turn]) for turn in contents}
    end = at[last][1] if at[last] else len(text)
    if relevance.spans is None:
        return Marks(relevance.field, None, relevance.weights, end)
    placed = []
    for turn, start, stop in relevance.spans:
        if at[turn] is None:
            message = (
                "the chat template does not print the turn's content as it stands, once: give token_weights"
            )
            raise RowProblem("spans_not_found", relevance.field, message)
        first, after, stripped = at[turn]
        shift = first - stripped
        placed.append((max(start + shift, first), min(stop + shift, after)))
    return Marks(relevance.field, tuple(placed), None, end)


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


def weigh(
    marks: Marks, places: Callable[[], Places | None], scored: np.ndarray, lead: int, notes: Counter
) -> np.ndarray:
    """f32[n], the weight of each token; `scored` tells those that are scored, bool[n]. The text's own tokens,
    which `places` can find, are those from `lead` on; any more are EOS."""
    weight = np.zeros(len(scored), np.float32)
    if marks.spans is None:
        which = np.flatnonzero(scored)[: _count(marks, places, scored, lead)]
        weight[which] = marks.weights
        return weight
    starts, ends = _known(places(), marks.field)
    own = scored[lead : lead + len(starts)]
    for start, end in marks.spans:
        within = (starts < end) & (ends > start) & own & (start < end)  # none where all of it was stripped
        weight[lead : lead + len(starts)][within] = 1
        if not within.any():
            notes["span_unscored"] += 1
    return weight


def _count(marks: Marks, places: Callable[[], Places | None], scored: np.ndarray, lead: int) -> int:
    """How many scored tokens the row's numbers are for: all, or all but the end of turn."""
    given, total = len(marks.weights), int(scored.sum())
    if given == total:
        return given
    starts, _ = _known(places(), marks.field)
    own = int(scored[lead : lead + len(starts)][starts < marks.end].sum())
    if given == own:
        return given
    end = f" (or {own}, without the end of turn)" if own < total else ""
    message = f"{given} numbers, where the response has {total} scored tokens{end}"
    raise RowProblem("token_weights_length", marks.field, message)


def _known(places: Places | None, field: str) -> Places:
    if places is None:
        message = "the tokenizer does not spell this row's text as it is, so characters have no tokens"
        raise RowProblem("spans_not_found", field, message)
    return places


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
        after = next((i for i, (a, b) in enumerate(zip(spelt, text)) if a != b), min(len(spelt), len(text)))
        unfinished = len(spelt) > after  # it ends in a piece of the next character
        starts.append(start)
        ends.append(min(max(after + unfinished, start + 1), len(text)))
        start = max(start, after)
    return np.array(starts, np.int64), np.array(ends, np.int64)
