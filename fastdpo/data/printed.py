"""Whether the text that the chat template made of a row says all that the row says."""

from fastdpo.data.pieces import Piece, holds, pieces, tool_texts
from fastdpo.data.rendering import Renderer, unused
from fastdpo.data.report import RowProblem
from fastdpo.data.stretches import Page


def unprinted_of_prompt(template: Renderer, page: Page) -> set[tuple[str, int]]:
    """(kind, place of the message or the tool) of all that the prompt says and the text before the response
    does not: the kinds of `pieces`, and tools."""
    row, before = template.row, page.text[: min(start for start, _ in page.stretches.values())]
    lost = {
        (piece.kind, place)
        for place, message in enumerate(row.prompt)
        for piece in pieces(message)
        if not (holds(before, piece.texts) or _changes(template, page, place, piece))
    }
    for i, (kind, names) in enumerate(tool_texts(row.tools)):
        if not names or not (holds(before, names) or _changes_with_tool(template, page, i)):
            lost.add((kind, i))
    return lost


def unprinted_of_response(template: Renderer, page: Page) -> tuple[set[tuple[str, int]], set[int]]:
    """The same of the response, whose assistant turns must say it where they are scored; and the assistant
    turns of which something is said. Raises RowProblem where there are none."""
    lost, said = set(), set()
    asked = len(template.row.prompt)
    for place, message in enumerate(page.messages[asked:]):
        start, end = page.stretches.get(place, (0, len(page.text)))
        for piece in pieces(message):
            printed = holds(page.text[start:end], piece.texts) or (
                start < end and _changes(template, page, asked + place, piece)
            )
            if not printed:
                lost.add((piece.kind, place))
            if printed and place in page.stretches and any(map(str.strip, piece.texts)):
                said.add(place)
    if not said:
        kinds = " and ".join(sorted({kind.replace("_", " ") for kind, _ in lost})) or "text"
        message = f"the chat template prints nothing of what a response says (its {kinds}); use one that does"
        raise RowProblem("content_not_printed", "responses", message)
    return lost, said


def _changes(template: Renderer, page: Page, place: int, piece: Piece) -> bool:
    """Whether the template prints something else where the message says something else: it may print the
    piece in a form of its own."""
    mark, messages = unused(page.text), page.messages
    other = template.differs([*messages[:place], piece.other(mark), *messages[place + 1 :]])
    return other is not None and mark in other


def _changes_with_tool(template: Renderer, page: Page, number: int) -> bool:
    mark, tools = unused(page.text), list(template.row.tools or ())
    tool = tools[number]
    function = {**tool.get("function", tool), "name": mark}
    tools[number] = {**tool, "function": function} if "function" in tool else function
    other = template.differs(page.messages, tools=tools)
    return other is not None and mark in other
