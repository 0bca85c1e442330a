"""From rows to PreferenceGroups: token ids, what is scored, the shared prompt, truncation."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastdpo.data.chat.arguments import Chat
from fastdpo.data.chat.scripts import Draft, write
from fastdpo.data.formats.columns import score
from fastdpo.data.formats.layouts import Layout
from fastdpo.data.images.reader import File, ImageReader
from fastdpo.data.one_row import problem_of, refuse_lone_surrogates
from fastdpo.data.report import NOT_PRINTED, DataReport, RowProblem
from fastdpo.data.rows import Row, parse_row
from fastdpo.data.sources import Rows
from fastdpo.data.tokenizing import Encoder, Tokens, shared_length, tokenize
from fastdpo.errors import ConfigError, DataError
from fastdpo.preferences import Pair, PreferenceGroup, Response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 256  # rows a tokenizer call: one call a row is slower, more than this gains nothing
_SERIOUS = {  # notes on kept rows that stop a strict run
    "trailing_turns": "{} turn(s) after a response's last assistant turn; remove them",
    "truncated": "{} response(s) cut at max_length; raise max_length, or shorten the row",
    "identical_pair": "{} pair(s) of responses with the same tokens; remove the duplicate",
    "span_unscored": "{} span(s) without a scored token; correct them",
} | {name: f"{{}} {meaning}; use another template, or remove them" for name, meaning in NOT_PRINTED.items()}


@dataclass(frozen=True)
class Limits:
    """How long prompt + response may be in tokens, and what happens to longer ones:
    keep_start cuts the response's end, keep_end the prompt's start, drop leaves the row out."""

    max_length: int
    truncation: str = "keep_start"

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ConfigError(f"max_length: 2 at least (a prompt and a response), not {self.max_length}")
        if self.truncation not in ("keep_start", "keep_end", "drop"):
            raise ConfigError(f"truncation: one of keep_start, keep_end, drop, not {self.truncation!r}")


Outcome = tuple[PreferenceGroup, Counter[str]] | RowProblem


class Given(NamedTuple):
    """A row of a data set."""

    number: int
    row: Any
    folder: Path | None = None  # where its paths begin


class Tools(NamedTuple):
    """What rows become groups by."""

    encoder: Encoder
    limits: Limits
    chat: Chat
    images: ImageReader | None = None  # of a model that reads some
    prompts_only: bool = False  # rows of a prompt alone are read too


def to_group(
    row: dict[str, Any] | Row,
    number: int,
    tokenizer: "PreTrainedTokenizerBase",
    limits: Limits,
    chat: Chat | None = None,
    images: ImageReader | None = None,
    folder: Path | None = None,
    prompts_only: bool = False,
) -> tuple[PreferenceGroup, Counter[str]]:
    """One row -> (PreferenceGroup, notes); notes count what was worth saying about it. `chat` says what else
    the chat template is given; without it, the time. `images`: how those of the prompt are read, where the
    model reads some, and `folder`, where their paths begin. `prompts_only`: a row may be a prompt alone; its
    group has the token that would end a response as its only one, and no pairs.

    Raises RowProblem when the row cannot be used.
    """
    one, chat = [Given(number, row, folder)], chat or Chat()
    tools = Tools(Encoder(tokenizer), limits, chat, images, prompts_only)
    (outcome,) = _outcomes(one, tools, None, DataReport("one row"))
    if isinstance(outcome, RowProblem):
        raise outcome
    return outcome


def shard_of(
    rows: Rows, numbers: range, given: Iterator[Given], tools: Tools
) -> tuple[list[PreferenceGroup], dict[str, Any]]:
    """(the groups of these of a data set's rows, the account of these rows as JSON), all numbered as they are
    in the data set: what a process of its own makes, whatever the other rows are. `given`: the rows, read a
    few at a time; images are not held by the groups. `refused` of it is the first row that `strict` does not
    let pass, and why.
    """
    chat = replace(tools.chat)  # which keeps what is told from here on
    tools = tools._replace(chat=chat)
    report, groups, refused = DataReport(rows.source, rows_read=len(numbers)), [], None
    while some := list(islice(given, _CHUNK)):
        for (number, _, _), outcome in zip(some, _outcomes(some, tools, rows.layout, report)):
            refused = refused or _refused(outcome, rows, number)
            if isinstance(outcome, RowProblem):
                report.drop(number, outcome, rows.told(number, outcome))
            else:
                group, notes = outcome
                groups.append(_without_pixels(group))
                report.note(number, +notes)
    report.dates = chat.dates
    return groups, report.account() | {"refused": refused, "told": chat.told}


def _without_pixels(group: PreferenceGroup) -> PreferenceGroup:
    """The same group, which keeps no bytes of its images: they are opened by what stores it."""
    images = tuple(replace(image, open=_unread) for image in group.images)
    return replace(group, images=images) if images else group


def _unread() -> Any:
    raise NotImplementedError


def _refused(outcome: Outcome, rows: Rows, number: int) -> dict[str, Any] | None:
    """What `strict` does not let pass, as `refuse` needs it."""
    problem: object = outcome
    if not isinstance(outcome, RowProblem):
        notes = outcome[1]
        found = [text.format(notes[name]) for name, text in _SERIOUS.items() if notes[name]]
        if not found:
            return None
        problem = f"responses: {'; '.join(found)}"
    return {"row": number, "line": rows.line(number), "problem": str(problem)}


def refuse(refused: dict[str, Any], source: str) -> None:
    """Raises DataError for a row that `strict` does not let pass."""
    line = f" ({refused['line']})" if refused["line"] else ""
    way_out = "Correct or remove the row, or set strict: false to go on without such rows, counted."
    raise DataError(f"row {refused['row']} of {source}{line}: {refused['problem']}\n{way_out}")


def _outcomes(
    chunk: Sequence[Given], tools: Tools, layout: Layout | None, report: DataReport
) -> Iterator[Outcome]:
    """Per numbered row its (group, notes) or its RowProblem, in order; tells the report formats, kinds and
    the files of images."""
    encoder = tools.encoder
    drafts: list[Draft | RowProblem] = []
    for given in chunk:
        try:
            drafts.append(_draft(given, tools, layout, report.image_files))
        except Exception as error:
            drafts.append(problem_of(error))
    written = [draft for draft in drafts if isinstance(draft, Draft)]
    report.formats.update(draft.row.format for draft in written)
    ids = _encoded(drafts, encoder)
    for draft in drafts:
        if isinstance(draft, RowProblem):
            yield draft
            continue
        try:
            outcome = _group(draft, ids, encoder, tools.limits)
            report.kinds.setdefault(draft.kind, draft.row.number)
            yield outcome
        except Exception as error:
            yield problem_of(error)


def _draft(given: Given, tools: Tools, layout: Layout | None, files: list[File]) -> Draft:
    n, row, folder = given
    images, notes = tools.images, Counter[str]()
    refuse_lone_surrogates(row)
    parsed = row if isinstance(row, Row) else parse_row(row, n, layout, bool(images), tools.prompts_only)
    parsed = replace(parsed, margin=score(parsed.margin, "margin") if tools.chat.rewards else None)
    pictures = images.read(parsed.images, folder, notes, files) if images else None
    return write(parsed, tools.encoder.tokenizer, tools.encoder.special, tools.chat, pictures, notes)


def _encoded(drafts: list[Draft | RowProblem], encoder: Encoder) -> dict[str, np.ndarray]:
    """The ids of the drafts' texts. A draft that the tokenizer fails on becomes its row's problem."""
    written = [draft for draft in drafts if isinstance(draft, Draft)]
    try:
        return encoder.encode(set().union(*(draft.texts() for draft in written)))
    except Exception as error:
        problem_of(error)  # raises what is no row's
    ids: dict[str, np.ndarray] = {}
    for i, draft in enumerate(drafts):
        if isinstance(draft, Draft):
            try:
                ids |= encoder.encode(draft.texts())
            except Exception as error:
                drafts[i] = problem_of(error)
    return ids


def _group(
    draft: Draft, ids: dict[str, np.ndarray], encoder: Encoder, limits: Limits
) -> tuple[PreferenceGroup, Counter[str]]:
    """(group, notes) of a row whose texts are tokenised."""
    row, notes = draft.row, Counter(draft.notes)
    sequences = [tokenize(script, draft.plain, ids, encoder, notes) for script in draft.scripts]
    if pictures := draft.pictures:
        sequences = [tokens.repeated(pictures.repeats(tokens.ids)) for tokens in sequences]
    shared = min(int(tokens.scored.argmax()) for tokens in sequences)
    for tokens in sequences[1:]:
        shared = shared_length(sequences[0].ids[:shared], tokens.ids[:shared])
    if shared == 0:
        message = "no token comes before the responses that could predict their first token"
        raise RowProblem("empty_prompt", "prompt", message)
    free = shared  # tokens before the prompt's first image
    if pictures and pictures.images:
        free = int((sequences[0].ids[:shared] == pictures.expander.token_id).argmax())
        added = encoder.tokenizer.added_tokens_decoder.keys()
        while free and int(sequences[0].ids[free - 1]) in added:  # what opens an image belongs to it
            free -= 1
    prompt, tails = _cut(sequences, shared, limits, encoder.tokenizer.bos_token_id, free, notes)
    pairs = _differing_pairs(row, tails, notes)
    ref_logps = _whole_ref_logps(row, tails, notes)
    responses = tuple(
        Response(tail.ids, tail.scored, score, ref_logp, row.label, tail.weight)
        for tail, score, ref_logp in zip(tails, row.scores, ref_logps)
    )
    images = pictures.images if pictures else ()
    return PreferenceGroup(row.number, prompt, responses, pairs, images=images), notes


def _cut(
    sequences: list[Tokens], shared: int, limits: Limits, bos: int | None, free: int, notes: Counter[str]
) -> tuple[np.ndarray, list[Tokens]]:
    """(the shared prompt, per response what follows it), within the limits; `free`: how many of the prompt's
    tokens may go, those before its first image."""
    longest, limit = max(len(tokens.ids) for tokens in sequences), limits.max_length
    prompt, truncated = sequences[0].ids[:shared], sum(len(tokens.ids) > limit for tokens in sequences)
    if truncated and limits.truncation == "drop":
        message = f"{longest} tokens, over max_length={limit}; raise it, or let truncation cut"
        raise RowProblem("too_long", "row", message)
    if truncated and limits.truncation == "keep_end":
        prompt = _prompt_end(prompt, longest - limit, bos, free, limit)
        limit = longest  # nothing is cut from the responses
        truncated = len(sequences)  # the one prompt of all of them is shorter
    elif truncated and shared >= limit:
        of_images = f" ({shared - free} from its first image on)" if free < shared else ""
        message = f"{shared} tokens{of_images} leave no room for a response: raise max_length={limit}"
        raise RowProblem("prompt_too_long", "prompt", message)
    tails = [tokens.tail(shared, limit) for tokens in sequences]
    if not all(len(tail.ids) for tail in tails):
        message = f"a response has no scored token left: raise max_length={limit}"
        raise RowProblem("nothing_scored", "responses", message)
    if truncated:
        notes["truncated"] = truncated
    return prompt.copy(), tails


def _prompt_end(prompt: np.ndarray, excess: int, bos: int | None, free: int, limit: int) -> np.ndarray:
    """The prompt without `excess` tokens of its start; a BOS stays, models are lost without it."""
    kept = prompt[:1] if prompt[0] == bos else prompt[:0]
    if len(prompt) - excess < 1:
        message = f"the longest response alone does not fit: raise max_length={limit}"
        raise RowProblem("response_too_long", "responses", message)
    if len(kept) + excess > free:
        message = f"{excess} tokens too many, and an image after {free}: raise max_length={limit}"
        raise RowProblem("images_too_long", "prompt", message)
    return np.concatenate([kept, prompt[len(kept) + excess :]])


def _differing_pairs(row: Row, tails: list[Tokens], notes: Counter[str]) -> tuple[Pair, ...]:
    """The pairs whose responses differ as tokens; equal ones have margin 0 whatever is learnt. So have those
    that differ only in a token merged with the prompt, which is not scored. None of an unpaired row."""
    said = [tail.ids[tail.scored] if notes["merged_boundary"] else tail.ids for tail in tails]
    pairs = tuple(Pair(i, j, row.margin or 0.0) for i, j in row.pairs if not np.array_equal(said[i], said[j]))
    if row.pairs and not pairs:
        if notes["truncated"]:
            message = "within max_length the responses have the same tokens; raise max_length"
            raise RowProblem("identical_after_truncation", "responses", message)
        raise RowProblem("identical", "responses", "they have the same tokens: nothing to prefer")
    if len(pairs) < len(row.pairs):
        notes["identical_pair"] = len(row.pairs) - len(pairs)
    return pairs


def _whole_ref_logps(row: Row, tails: list[Tokens], notes: Counter[str]) -> tuple[float | None, ...]:
    """The row's reference log-probs, which are sums over all tokens of whole responses after the whole
    prompt: None where that is not what we score."""
    if row.ref_logps[0] is None:
        return row.ref_logps
    other = ("truncated", "trailing_turns", "merged_boundary", "prompt_as_for_generation")
    if any(notes[name] for name in other) or not all(tail.scored.all() for tail in tails):
        notes["ref_columns_unusable"] = len(row.ref_logps)
        return (None,) * len(row.ref_logps)
    notes["ref_columns"] = len(row.ref_logps)
    return row.ref_logps
