"""From a Row to text: what the model reads of each response, and which stretches of it are scored.

A response's text is what the chat template prints for the whole conversation, up to the end of its last
assistant turn. That end is scored; white space that a template prints after it (Qwen's newline) is cut, as
generation stops before it and no model ever produces it. TRL scores that token; ours are one token shorter
there. Where the template prints all that a prompt says only for generation (Mistral's public rule: the system
prompt only if the user's turn is the last), the text is that prompt and the answer after it.
"""

import re
from collections import Counter
from dataclasses import dataclass

from fastdpo.data.chat.arguments import Chat, check_row_kwargs
from fastdpo.data.chat.pieces import last_words, pieces
from fastdpo.data.chat.printed import unprinted_of_prompt, unprinted_of_response
from fastdpo.data.chat.rendering import Renderer, call_forms, unused
from fastdpo.data.chat.stretches import Page, end_of_last_turn, ends_its_turn, lay_out
from fastdpo.data.images.reader import Pictures
from fastdpo.data.report import RowProblem
from fastdpo.data.rows import Messages, Row
from fastdpo.data.spans import Marks, Relevance, mark
from fastdpo.errors import DataError


@dataclass(frozen=True)
class Script:
    """One prompt + response as text, with the stretches [start, end) of it that are scored."""

    text: str
    spans: tuple[tuple[int, int], ...]
    marks: Marks | None = None  # which of it is relevant, where the row says so
    ending: str | None = None  # of a prompt alone: what would end a response; "": EOS


@dataclass(frozen=True)
class Draft:
    """A row as text, before any tokenising."""

    row: Row
    scripts: tuple[Script, ...]  # one a response
    plain: bool  # not from a template: the tokenizer's BOS and EOS are ours to add
    notes: Counter
    pictures: Pictures | None = None

    @property
    def kind(self) -> str:
        """What a report tells apart: the row's format, and what may go wrong in a way of its own."""
        row, weighted = self.row, any(self.row.relevance)
        if self.plain:
            return f"{row.format}, text" + ", token weights" * weighted + ", images" * bool(row.images)
        turns = [*row.prompt, *(turn for response in row.responses for turn in response)]
        said = {piece.kind for turn in turns for piece in pieces(turn)}
        special = {
            "system": "system" in said,
            "tools": bool(row.tools) or "tool_call" in said,
            "reasoning": "reasoning" in said,
            "several answers": any(len(script.spans) > 1 for script in self.scripts),
            "token weights": weighted,
            "images": bool(row.images),
        }
        return ", ".join([row.format, "messages", *(name for name, there in special.items() if there)])

    def texts(self) -> set[str]:
        """All that must be tokenised: the scripts, and their beginnings up to each boundary."""
        beginnings = {s.text[:edge] for s in self.scripts for span in s.spans for edge in span}
        return beginnings | {s.text for s in self.scripts} | {s.ending for s in self.scripts if s.ending}


def write(
    row: Row, tokenizer, special: re.Pattern, chat: Chat, pictures: Pictures | None, noted: Counter
) -> Draft:
    """`special` matches the tokenizer's special tokens; `chat` says what else its template is given;
    `pictures`, which images the prompt has, of a model that reads some; `noted`, what is noted of the row so
    far. Raises RowProblem where the chat template refuses the row or prints nothing of a response."""
    notes = Counter(noted, **({"tie_pair": row.ties} if row.ties else {}))
    if not row.responses:
        notes["prompt_only"] = 1
    if isinstance(row.prompt, str):
        prompt = pictures.plain(row.prompt) if pictures else row.prompt
        if not row.responses:
            return Draft(row, (Script(prompt, (), ending=""),), True, notes, pictures)
        texts = [prompt + response for response in row.responses]
        spans = [((len(prompt), len(text)),) for text in texts]
        told = zip(row.relevance, row.responses, spans, texts)
        marks = [mark(one, {0: response}, {0: span}, text) for one, response, (span,), text in told]
        return Draft(row, tuple(map(Script, texts, spans, marks)), True, notes, pictures)
    if not tokenizer.chat_template:
        raise DataError(
            f"row {row.number} is a conversation, and the tokenizer has no chat template.\n"
            "Name one in the config (chat_template: FILE.jinja), or give rows of plain text."
        )
    check_row_kwargs(row.chat_template_kwargs)
    templates = [Renderer(form, tokenizer, special, chat, pictures) for form in call_forms(row)]
    return _in_the_form_that_says_most(templates, notes)


def _in_the_form_that_says_most(templates: list[Renderer], notes: Counter) -> Draft:
    """Of a row with tool calls in several forms the first whose calls are printed, or else the first that the
    template takes at all."""
    drafts, problems = [], []
    for template in templates:
        try:
            drafts.append(_conversation(template, notes))
        except RowProblem as problem:
            problems.append(problem)
            continue
        if not drafts[-1].notes["tool_call_not_printed"]:
            return drafts[-1]
    if not drafts:
        raise problems[0]
    return drafts[0]


def _conversation(template: Renderer, notes: Counter) -> Draft:
    row, notes = template.row, Counter(notes)
    prompt = template(row.prompt, to_answer=True)
    lost: set[tuple[str, int]] = set()  # of the prompt: kinds, with the number of the turn or tool
    proven: set[str] = set()
    scripts = tuple(
        _script(template, prompt, turns, relevance, lost, proven, notes)
        for turns, relevance in zip(row.responses, row.relevance)
    ) or (_alone(template, prompt, lost, notes),)
    notes.update(f"{kind}_not_printed" for kind, _ in sorted(lost))
    return Draft(row, scripts, False, notes, template.pictures)


def _alone(template: Renderer, prompt: str, lost: set, notes: Counter) -> Script:
    """A prompt as it is printed for generation, which any answer follows, and what the template ends one
    with; adds to `lost` what of the prompt is not printed."""
    (mark,) = unused(prompt)
    whole = [*template.row.prompt, {"role": "assistant", "content": mark}]
    printed = template(whole)
    if mark not in printed:
        raise RowProblem("content_not_printed", "messages", "the chat template prints nothing of an answer")
    ending = printed[: end_of_last_turn(template, whole, printed)].rpartition(mark)[2]
    if not ending:
        notes["no_end_of_turn"] += 1
    text = prompt + mark + ending
    page = Page(whole, text, {0: (len(prompt), len(text))}, False, printed.startswith(prompt))
    lost |= unprinted_of_prompt(template, page, set())
    return Script(prompt, (), ending=ending)


def _script(
    template: Renderer,
    prompt: str,
    turns: Messages,
    relevance: Relevance | None,
    lost: set,
    proven: set,
    notes: Counter,
) -> Script:
    """A response's text and what is scored of it; adds to `lost` what of the prompt it does not print, and to
    `proven` as unprinted_of_prompt does."""
    last = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
    if last + 1 < len(turns):
        notes["trailing_turns"] += len(turns) - last - 1
    page = lay_out(template, prompt, turns[: last + 1])
    if page.cut and template.row.ref_logps[0] is not None:
        notes["ref_columns_white_space"] += 1
    if page.for_generation:
        notes["prompt_as_for_generation"] += 1
    elif not page.begins_as_generated:
        notes["template_not_prefix"] += 1
    ends = {turn: end for turn, (_, end) in page.stretches.items() if turn == last or last_words(turns[turn])}
    if not all(ends_its_turn(template, turns[turn], page.text[:end]) for turn, end in ends.items()):
        notes["no_end_of_turn"] += 1  # the model is never shown where to stop
    lost |= unprinted_of_prompt(template, page, proven)
    unprinted, said = unprinted_of_response(template, page)
    notes.update(f"{kind}_not_printed" for kind, _ in sorted(unprinted))
    spans = tuple(stretch for turn, stretch in page.stretches.items() if turn in said)
    contents = {i: turns[i]["content"] or "" for i in page.stretches}
    return Script(page.text, spans, mark(relevance, contents, page.stretches, page.text))
