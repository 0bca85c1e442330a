"""Whether the text that the chat template made of a row says all that the row says."""

from collections.abc import Iterable
from itertools import chain

from fastdpo.data.chat.pieces import Piece, holds, pieces, rename_tool, tool_texts
from fastdpo.data.chat.rendering import Renderer, unused
from fastdpo.data.chat.stretches import Page
from fastdpo.data.report import RowProblem

Place = tuple[int, Piece]  # a message's, and what it says there


def unprinted_of_prompt(template: Renderer, page: Page, proven: set[str]) -> set[tuple[str, int]]:
    """(kind, number of the message or the tool) of all that the prompt says and the text before the response
    does not: the kinds of `pieces`, and tools. `proven` are texts before the row's other responses that say
    all of it without a doubt; another such text joins them."""
    row, before = template.row, page.text[: min(start for start, _ in page.stretches.values())]
    if before in proven:
        return set()
    said = [(place, piece) for place, message in enumerate(row.prompt) for piece in pieces(message)]
    told = _told(piece for _, piece in said)
    sought = [(place, piece) for place, piece in said if not _surely_printed(piece, before, told)]
    lost = {(piece.kind, place) for place, piece in _unprinted(template, page, sought)}
    names = tool_texts(row.tools)
    if not all(len(known) > 1 and holds(before, known) for known in names):
        lost |= {("tools", i) for i in _unprinted_tools(template, page, names)}
    elif not sought:
        proven.add(before)
    return lost


def unprinted_of_response(template: Renderer, page: Page) -> tuple[set[tuple[str, int]], set[int]]:
    """The same of the response, whose assistant turns must say it where they are scored; and those of them of
    which something is printed, or which say nothing. Raises RowProblem where nothing is printed of any."""
    sought, said, asked, silent = [], set(), len(template.row.prompt), set()
    for turn, message in enumerate(page.messages[asked:]):
        start, end = page.stretches.get(turn, (0, len(page.text)))
        own = list(pieces(message))
        told = _told(own if turn in page.stretches else chain.from_iterable(map(pieces, page.messages)))
        if turn in page.stretches and not told.strip("\0 \n\t"):
            silent.add(turn)
        for piece in own:
            if not any(map(str.strip, piece.texts)):
                continue
            if _surely_printed(piece, page.text[start:end], told):
                said.add(turn)
            else:
                sought.append((asked + turn, piece))
    unprinted = _unprinted(template, page, sought)
    said.update(place - asked for place, piece in sought if (place, piece) not in unprinted)
    lost = {(piece.kind, place - asked) for place, piece in unprinted}
    if not said & page.stretches.keys():
        kinds = " and ".join(sorted({kind.replace("_", " ") for kind, _ in lost})) or "text"
        problem = f"the chat template prints nothing of what a response says (its {kinds}); use one that does"
        raise RowProblem("content_not_printed", "responses", problem)
    return lost, said | silent


def _told(some: Iterable[Piece]) -> str:
    """All that they say."""
    return "\0".join(text for piece in some for text in piece.texts)


def _surely_printed(piece: Piece, text: str, told: str) -> bool:
    """Whether a text has a piece as often as `told`, all that messages say. That tells nothing of
    results, which may be short, nor of thoughts and calls, whose words the answer has too."""
    said = [one for one in map(str.strip, piece.texts) if one]
    if piece.kind in ("reasoning", "tool_call", "tool_result"):
        return not said
    return all(text.count(one) >= told.count(one) for one in said)


def _unprinted(template: Renderer, page: Page, sought: list[Place]) -> list[Place]:
    """Those of the pieces that the template prints in no form: where it says something else, the text does
    not say that either."""
    if not sought:
        return []
    marks = unused(page.text, len(sought))
    messages = list(page.messages)
    for (place, piece), mark in zip(sought, marks):
        messages[place] = piece.fill(messages[place], mark)
    text = template.differs(messages)
    if text is None and len(sought) > 1:  # a template that refuses one of them may take the others
        return [place for one in sought for place in _unprinted(template, page, [one])]
    if text is None:
        return [one for one in sought if not holds(page.text, one[1].texts)]
    found = [one for one, mark in zip(sought, marks) if mark in text]
    # some rows give one thought under two names, of which a template prints one
    thoughts = {(place, piece.texts) for place, piece in found if piece.kind == "reasoning"}
    lost = [one for one in sought if one not in found]
    return [(at, one) for at, one in lost if one.kind != "reasoning" or (at, one.texts) not in thoughts]


def _unprinted_tools(template: Renderer, page: Page, names: list[tuple[str, ...]]) -> list[int]:
    """The numbers of the tools that the template does not print, found as in `_unprinted`."""
    marks = unused(page.text, len(names))
    text = template.differs(page.messages, tools=list(map(rename_tool, template.row.tools or (), marks)))
    if text is None:
        return [i for i, known in enumerate(names) if not known or not holds(page.text, known)]
    return [i for i, mark in enumerate(marks) if mark not in text]
