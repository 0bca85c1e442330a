"""Where each assistant turn of a response stands in the text of the whole conversation.

A turn is scored from where the model would begin to write (after the generation prompt, as far as the whole
conversation repeats it) to its own end of turn. With most templates the conversation up to a turn is printed
as the beginning of the whole, and both places are the lengths of such beginnings. A template may print a turn
otherwise where it is last, though (Qwen 3 an empty thought, gpt-oss another end token), or the prompt
otherwise where an answer follows (Mistral's system prompt): then both places are found from what the messages
around them say, which `Renderer.said` tells whatever the template.
"""

import re
from dataclasses import dataclass
from itertools import chain, islice, takewhile

from fastdpo.data.chat.pieces import holds, last_words, pieces, rename_tool, tool_texts
from fastdpo.data.chat.rendering import Renderer, unused
from fastdpo.data.report import RowProblem
from fastdpo.data.rows import Messages
from fastdpo.data.spans import shared_start

_TAG = re.compile(r"<[^<>\s]+>")  # <think>, which tokenizers know, but seldom as special
_LONGEST = 300  # characters of all tokens that end a text


@dataclass(frozen=True)
class Page:
    """A response, from its first assistant turn to its last one, behind its prompt in text."""

    messages: Messages  # the prompt's and the response's
    text: str  # up to the last turn's own end
    stretches: dict[int, tuple[int, int]]  # what is scored, by an assistant turn's place in the response
    cut: bool  # the template prints more: white space, an end of text
    begins_as_generated: bool  # each answer stands behind the very text that the model would go on from
    for_generation: bool = False  # the text is the prompt as printed for generation, and the answer after it


def lay_out(template: Renderer, prompt: str, turns: Messages) -> Page:
    """The response `turns`, whose last one is the assistant's; `prompt` is the row's, with the generation
    prompt. Raises RowProblem where the template refuses the turns, or no text has them as generated."""
    asked = template.row.prompt
    whole = asked + turns
    printed = template(whole)
    end = len(printed) if template.chat.rewards else end_of_last_turn(template, whole, printed)
    stretches, begins = {}, True
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    for i in answers:
        place = len(asked) + i
        opened = prompt if i == 0 else template(whole[:place], to_answer=True)
        start = start_of_turn(template, whole, place, printed, opened)
        stop = end if i == answers[-1] else end_of_turn(template, whole, place, printed, opened)
        stretches[i] = start, max(start, stop)
        _refuse_others_within(template, whole, place, printed, stretches[i])
        if printed.startswith(opened):
            continue
        begins = False
        if only := _only_for_generation(template, whole, place, opened, printed, start):
            if len(answers) > 1:
                message = (
                    f"the chat template prints the {only} only before the last answer, and here are several: "
                    "make it a row an answer"
                )
                raise RowProblem("no_rendering", "messages", message)
            text = opened + printed[start:end]
            return Page(whole, text, {i: (len(opened), len(text))}, end < len(printed), False, True)
    return Page(whole, printed[:end], stretches, end < len(printed), begins)


def _refuse_others_within(
    template: Renderer, whole: Messages, place: int, text: str, stretch: tuple[int, int]
) -> None:
    """Raises RowProblem where what follows the assistant's turn whole[place] stands within its stretch of the
    text: Gemma 4 prints a call, its result, and then what the turn says besides."""
    for after in takewhile(lambda i: whole[i]["role"] != "assistant", range(place + 1, len(whole))):
        words = whole[after]["content"].strip()
        if words and words in text[slice(*stretch)]:
            said = template.said(whole, after, text)
            if said and said[0] < stretch[1]:
                message = (
                    "the chat template prints a tool result amid the assistant's turn that called for it"
                )
                raise RowProblem("no_rendering", "messages", message)


def _only_for_generation(
    template: Renderer, whole: Messages, place: int, opened: str, printed: str, start: int
) -> str:
    """The kind of what others than the assistant say in `opened`, the turns before whole[place] with the
    generation prompt, and not in `printed`, the whole conversation, before `start`; "" where all is there."""
    (mark,), tools = unused(opened + printed), template.row.tools or []

    def is_lost(texts: tuple[str, ...], messages: Messages, tools: list | None = None) -> bool:
        """Whether the texts are fewer there, and not in another form: `messages` or `tools` have the mark."""
        if all(opened.count(text.strip()) <= printed.count(text.strip(), 0, start) for text in texts):
            return False
        other = template.differs(messages, tools=tools)
        if other is None:
            return not holds(printed[:start], texts)
        return mark not in other[: start + len(other) - len(printed)]

    for i, turn in enumerate(whole[:place]):
        for piece in pieces(turn) if turn["role"] != "assistant" else ():
            if is_lost(piece.texts, [*whole[:i], piece.fill(turn, mark), *whole[i + 1 :]]):
                return piece.kind.replace("_", " ")
    for i, texts in enumerate(tool_texts(tools)):
        if is_lost(texts, whole, [*tools[:i], rename_tool(tools[i], mark), *tools[i + 1 :]]):
            return "tools"
    return ""


def start_of_turn(template: Renderer, whole: Messages, place: int, text: str, opened: str) -> int:
    """Where whole[place] starts in `text`, the rendering of `whole`; `opened` is that of the turns before it,
    with the generation prompt. Raises RowProblem where the two have nothing to compare."""
    if text.startswith(opened):
        return len(opened)
    for before in reversed(range(place)):
        here, there = (
            template.said(whole, before, text),
            template.said(whole[:place], before, opened, to_answer=True),
        )
        if here and there:
            # its own words may go on like the generation prompt, which is not to be found in them
            own = template.said(whole, place, text) or (len(text), len(text))
            return here[1] + _end_of_header(template, opened[there[1] :], text[here[1] : own[0]])
    message = "the chat template prints no turn before a response both before it and for generation"
    raise RowProblem("no_rendering", "messages", message)


def _end_of_header(template: Renderer, header: str, rest: str) -> int:
    """Where in `rest` the generation prompt `header` ends, as far as it is repeated there: as a whole but for
    its beginning (Command R's has an instruction there), or up to where the two part."""
    shared = shared_start(header, rest)
    if shared in (len(header), len(rest)):
        return shared
    for match in template.special.finditer(header):
        if (found := rest.rfind(ending := header[match.start() :])) >= 0:
            return found + len(ending)
    for text in (header, rest):  # in whole special tokens and tags
        for pattern in (template.special, _TAG):
            cut = (m.start() for m in pattern.finditer(text) if m.start() < shared < m.end())
            shared = next(cut, shared)
    return shared


def end_of_last_turn(template: Renderer, whole: Messages, printed: str) -> int:
    """Where the last turn ends in `printed`, the rendering of `whole`: after its end of turn, and before what
    templates print there in any case: white space, a header after EOS, or EOS after another end (Phi-3's)."""
    text, eos = printed.rstrip(), template.tokenizer.eos_token or ""
    spoken = _end_of_words(template, whole, printed, text)
    if any_case := _after_any_answer(template, whole, text, spoken):
        text = text.removesuffix(any_case).rstrip()
    if eos and eos in text[spoken:]:
        text = text[: text.index(eos, spoken) + len(eos)]
    closing = [match.start() for match in template.special.finditer(text, _closing(template, text))]
    if len(closing) > 1 and closing[-1] > spoken:
        turn = text[: closing[-1]].rstrip()  # without what ends the conversation, if that does
        longer = template.differs([*whole, {"role": "user", "content": unused(text)[0]}])
        if longer is not None and longer.startswith(turn) and not longer.startswith(text):
            return len(turn)
    return len(text)


def _end_of_words(template: Renderer, whole: Messages, printed: str, text: str) -> int:
    """Where what the last turn says ends in its text."""
    closing = _closing(template, text)
    said = last_words(whole[-1])
    if said and text[:closing].rstrip().endswith(said):
        return closing
    found = template.said(whole, len(whole) - 1, printed)
    return min(found[1], len(text)) if found else closing


def ends_its_turn(template: Renderer, message: dict, text: str) -> bool:
    """Whether a text that ends with the message has more of it than its words: markup that ends the turn."""
    if words := last_words(message):
        return not text.endswith(words)
    tail = text[-_LONGEST:]
    found = chain(template.special.finditer(tail), _TAG.finditer(tail))
    return any(match.end() == len(tail) for match in found)


def _after_any_answer(template: Renderer, whole: Messages, printed: str, spoken: int) -> str:
    """What the template prints after the end of turn of an answer in place of the last turn's tool calls: for
    templates that end a call with nothing of its own. The calls end at `spoken` in the text."""
    eos = template.tokenizer.eos_token
    if not whole[-1].get("tool_calls") or len(template.special.findall(printed, spoken)) < 2 or not eos:
        return ""
    (mark,) = unused(printed)
    text = template.differs([*whole[:-1], {"role": "assistant", "content": mark}]) or ""
    return text.rstrip().partition(mark)[2].partition(eos)[2]


def _closing(template: Renderer, text: str) -> int:
    """Where the special tokens begin that end a text, with nothing but white space between them."""
    start = len(text)
    for match in reversed(list(template.special.finditer(text, max(0, start - _LONGEST)))):
        if text[match.end() : start].strip():
            break
        start = match.start()
    return start


def end_of_turn(template: Renderer, whole: Messages, place: int, text: str, opened: str) -> int:
    """Where whole[place], which others follow, ends in `text`: after the end of turn that it has there.
    `opened` is the rendering of the turns before it, with the generation prompt."""
    beginning = whole[: place + 1]
    alone = template(beginning)
    end = end_of_last_turn(template, beginning, alone)
    if text.startswith(alone[:end]):
        eos = template.tokenizer.eos_token or ""
        return end + len(eos) * text.startswith(eos, end)  # which some print only between turns
    here, there = template.said(whole, place, text), template.said(beginning, place, alone)
    if here is None or there is None:
        return 0  # nothing of it is printed
    closing, rest = alone[there[1] : end], text[here[1] :]
    if rest.startswith(closing):
        return here[1] + len(closing)
    # another end where others follow: as many tokens as when it is the last, if others end their turns so too
    asked = template.said(whole[:place], place - 1, opened, to_answer=True)
    other = asked and template.special.search(opened, asked[1])
    ends = list(islice(template.special.finditer(rest), len(template.special.findall(closing))))
    return here[1] + (ends[-1].end() if ends and other and ends[0][0] == other[0] else 0)
