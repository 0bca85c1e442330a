"""From a Row to text: what the model reads of each response, and which stretches of it are scored.

A completion ends with the template's end-of-turn text (<|im_end|>), which is scored. White space
that a template prints after it (Qwen's newline) is cut: generation stops before it, so no model
ever produces it. TRL scores that token; ours are one token shorter there.
"""

from collections import Counter
from dataclasses import dataclass

from fastdpo.data.report import RowProblem
from fastdpo.data.rows import Messages, Row
from fastdpo.data.spans import Marks, Relevance, mark, shared_start
from fastdpo.errors import DataError


@dataclass(frozen=True)
class Script:
    """One prompt + response as text, with the stretches [start, end) of it that are scored."""

    text: str
    spans: tuple[tuple[int, int], ...]
    marks: Marks | None = None  # which of it is relevant, where the row says so


@dataclass(frozen=True)
class Draft:
    """A row as text, before any tokenising."""

    row: Row
    scripts: tuple[Script, ...]  # one a response
    plain: bool  # not from a template: the tokenizer's BOS and EOS are ours to add
    notes: Counter

    def texts(self) -> set[str]:
        """All that must be tokenised: the scripts, and their beginnings up to each boundary."""
        beginnings = {s.text[:edge] for s in self.scripts for span in s.spans for edge in span}
        return beginnings | {s.text for s in self.scripts}


def write(row: Row, tokenizer) -> Draft:
    """Raises RowProblem where the chat template refuses the row."""
    notes = Counter(tie_pair=row.ties) if row.ties else Counter()
    if isinstance(row.prompt, str):
        texts = [row.prompt + response for response in row.responses]
        spans = [((len(row.prompt), len(text)),) for text in texts]
        told = zip(row.relevance, row.responses, spans, texts)
        marks = [mark(one, {0: response}, {0: span}, text) for one, response, (span,), text in told]
        return Draft(row, tuple(map(Script, texts, spans, marks)), True, notes)
    if not tokenizer.chat_template:
        raise DataError(
            f"row {row.number} is a conversation, and the tokenizer has no chat template.\n"
            "Name one in the config (chat_template: FILE.jinja), or give rows of plain text."
        )
    prompt = _render(row, tokenizer, row.prompt, to_answer=True)
    scripts = tuple(
        _script(row, tokenizer, prompt, turns, relevance, notes)
        for turns, relevance in zip(row.responses, row.relevance)
    )
    return Draft(row, scripts, False, notes)


def _script(
    row: Row, tokenizer, prompt: str, turns: Messages, relevance: Relevance | None, notes: Counter
) -> Script:
    """The text up to the end of the last assistant turn. Each assistant turn is scored from where
    the template would let the model answer to its end of turn; headers and other turns are not."""
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if answers[-1] + 1 < len(turns):
        notes["trailing_turns"] += len(turns) - answers[-1] - 1
    printed = _render(row, tokenizer, row.prompt + turns[: answers[-1] + 1])
    text = printed.rstrip()
    if text != printed and row.ref_logps[0] is not None:
        notes["ref_columns_white_space"] += 1
    content = turns[answers[-1]]["content"].rstrip()
    if content and text.endswith(content):
        notes["no_end_of_turn"] += 1  # the model is never shown where to stop
    stretches, faithful = {}, True
    for i in answers:
        before = row.prompt + turns[:i]
        opening = prompt if i == 0 else _render(row, tokenizer, before, to_answer=True)
        closing = text
        if i != answers[-1]:
            closing = _render(row, tokenizer, [*before, turns[i]]).rstrip()
        start, end = shared_start(opening, text), shared_start(closing, text)
        faithful &= (start, end) == (len(opening), len(closing))
        stretches[i] = start, end
    if not faithful:
        # The template prints a beginning otherwise when it stands alone (it drops old reasoning, or
        # ends generation prompts in a newline): what the two have in common is what is known.
        notes["template_not_prefix"] += 1
    spans = tuple((start, end) for start, end in stretches.values() if start < end)
    contents = {i: turns[i]["content"] for i in answers}
    return Script(text, spans, mark(relevance, contents, stretches, text))


def _render(row: Row, tokenizer, messages: Messages, to_answer: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages,
            tools=row.tools,
            tokenize=False,
            add_generation_prompt=to_answer,
            **row.chat_template_kwargs,
        )
    except Exception as error:  # a template is a program, and fails like one
        message = f"the chat template refuses these turns: {error}"
        raise RowProblem("template_error", "messages", message) from None
