"""Whether the text that the chat template made of a row says all that the row says."""

from fastdpo.data.chat.pieces import Piece, holds, pieces, tool_texts
from fastdpo.data.chat.rendering import Renderer, unused
from fastdpo.data.chat.stretches import Page
from fastdpo.data.report import RowProblem

Place = tuple[int, Piece]  # a message's, and what it says there


def unprinted_of_prompt(template: Renderer, page: Page) -> set[tuple[str, int]]:
    """(kind, number of the message or the tool) of all that the prompt says and the text before the response
    does not: the kinds of `pieces`, and tools."""
    row, before = template.row, page.text[: min(start for start, _ in page.stretches.values())]
    # what a call says often stands elsewhere too: in the tools, in the question
    sought = [
        (place, piece)
        for place, message in enumerate(row.prompt)
        for piece in pieces(message)
        if piece.kind == "tool_call" or not holds(before, piece.texts)
    ]
    lost = {(piece.kind, place) for place, piece in _unprinted(template, page, sought)}
    for i, (kind, names) in enumerate(tool_texts(row.tools)):
        if not names or not (holds(before, names) or _is_printed_tool(template, page, i)):
            lost.add((kind, i))
    return lost


def unprinted_of_response(template: Renderer, page: Page) -> tuple[set[tuple[str, int]], set[int]]:
    """The same of the response, whose assistant turns must say it where they are scored; and the assistant
    turns of which something is said. Raises RowProblem where there are none."""
    sought, said, asked = [], set(), len(template.row.prompt)
    for turn, message in enumerate(page.messages[asked:]):
        start, end = page.stretches.get(turn, (0, len(page.text)))
        for piece in pieces(message):
            if not any(map(str.strip, piece.texts)):
                continue
            if holds(page.text[start:end], piece.texts):
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
    return lost, said


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
    return [place for place, mark in zip(sought, marks) if text is None or mark not in text]


def _is_printed_tool(template: Renderer, page: Page, number: int) -> bool:
    (mark,), tools = unused(page.text), list(template.row.tools or ())
    tool = tools[number]
    function = {**tool.get("function", tool), "name": mark}
    tools[number] = {**tool, "function": function} if "function" in tool else function
    other = template.differs(page.messages, tools=tools)
    return other is not None and mark in other
