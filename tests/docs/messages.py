"""What fastdpo says when something is wrong, left out or done another way, read from its sources: the texts
of errors, of warnings, of what is printed in yellow or red, and the reasons that these give."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("fastdpo", "kernels/fastdpo_kernels")
STYLE = re.compile(r"\[(/|/?((bold|yellow|red|green|dim)\b ?)+)\]")  # rich's markup, which is not printed
COLOURED = re.compile(r"\[(bold )?(yellow|red)\]")
# Functions that make a message of what their callers give them, by the folder where they are called: which
# argument it is, by number or by keyword.
CARRIERS = {
    ("fastdpo/convert/", "refuse"): 2,
    ("fastdpo/convert/", "only"): "fix",
    ("fastdpo/data/", "RowProblem"): 2,
    ("fastdpo/data/", "expect"): 3,
    ("fastdpo/data/", "problem"): 1,
    ("fastdpo/data/", "_bad_spans"): 1,
    ("fastdpo/integrations/", "tell"): 0,
    ("fastdpo/reference/", "say"): 0,
}
# Functions that return the text of a message, or the reason that one gives.
RETURNED = {
    ("fastdpo/config/", "_one_by_one"),
    ("fastdpo/config/", "_together"),
    ("fastdpo/config/", "_memory"),
    ("fastdpo/config/", "_unsettable"),
    ("fastdpo/config/", "_out_of_reach"),
    ("fastdpo/config/", "_problem"),
    ("fastdpo/config/", "only_with_rounds"),
    ("fastdpo/config/", "sampling_problems"),
    ("fastdpo/convert/", "way_on"),
    ("fastdpo/data/", "_wrong"),
    ("fastdpo/doctor/", "kept"),
    ("fastdpo/doctor/", "no_gpu"),
    ("fastdpo/doctor/", "_speed"),
    ("fastdpo/integrations/", "head_refusal"),
    ("fastdpo/integrations/", "pack_rows"),
    ("fastdpo/integrations/", "refusal"),
    ("fastdpo/model/", "sharing_refusal"),
    ("fastdpo/model/", "_try_sharing"),
    ("fastdpo/objectives/", "_problems"),
    ("fastdpo/planning/", "_nothing_fits"),
    ("fastdpo/training/", "quiet_rounds"),
    ("fastdpo/training/", "way_on"),
}


class Message(NamedTuple):
    """A text. Empty is that of an error which passes on what it was given."""

    file: str
    line: int
    maker: str  # the error, or the function that is given the text or returns it
    function: str  # around it
    pieces: tuple[str, ...]  # the text, apart where values stand in it


class Source:
    """One file."""

    def __init__(self, path: Path):
        self.file = str(path.relative_to(ROOT))
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        self.parent = {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}

    def strings(self) -> Iterator[tuple[str, ...]]:
        """The pieces of every string that is no docstring."""
        nodes = (node for node in ast.walk(self.tree) if not isinstance(self.parent.get(node), ast.Expr))
        yield from filter(None, map(pieces, nodes))

    def messages(self) -> Iterator[Message]:
        for node in ast.walk(self.tree):
            for maker, text in self._made(node):
                function = getattr(self._function(node), "name", "")
                found = [pieces(one) for one in self._texts(text)]
                if not found and maker.endswith(("Error", "Problem")):
                    found = [pieces(text) if letters(pieces(text)) else ()]
                yield from (Message(self.file, node.lineno, maker, function, one) for one in found)

    def _made(self, node) -> Iterator[tuple[str, ast.expr]]:
        """(what makes a message here, the expression of its text)."""
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            is_error = name.endswith("Error") or isinstance(self.parent[node], ast.Raise)
            place = self._known(CARRIERS, name, 0 if is_error or name == "warn" else None)
            if isinstance(place, int):
                yield from ((name, text) for text in node.args[place : place + 1])
            elif place:
                yield from ((name, keyword.value) for keyword in node.keywords if keyword.arg == place)
        elif isinstance(node, ast.Return | ast.Yield) and node.value and (around := self._function(node)):
            if self._known(dict.fromkeys(RETURNED, True), around.name):
                yield around.name, node.value
        elif COLOURED.match(_begins(node)) and not isinstance(self.parent[node], ast.JoinedStr):
            yield "print", node

    def _known(self, table: dict, name: str, otherwise=None):
        here = (value for (place, of), value in table.items() if of == name and self.file.startswith(place))
        return next(here, otherwise)

    def _texts(self, node, seen: frozenset = frozenset()) -> Iterator[ast.expr]:
        """The strings of an expression that say something; where it says nothing itself, its names'."""
        parts = []
        if says_something(pieces(node)):
            yield node
        elif isinstance(node, ast.Name) and node.id not in seen:
            parts, seen = self._values(node), seen | {node.id}
        elif isinstance(node, ast.BinOp):
            parts = [node.left]  # a message is known by how it begins
        elif isinstance(node, ast.IfExp):
            parts = [node.body, node.orelse]
        elif isinstance(node, ast.Call):
            parts = [*node.args, *([node.func.value] if isinstance(node.func, ast.Attribute) else [])]
        elif isinstance(node, ast.FormattedValue):
            parts = [node.value]
        elif isinstance(node, ast.JoinedStr):
            parts = node.values
        for part in parts:
            yield from self._texts(part, seen)

    def _values(self, name: ast.Name) -> list[ast.expr]:
        """What is assigned to a name in the function around it, or else at the top of the file."""
        scope = self._function(name)
        places = [list(ast.walk(scope))] if scope else []
        if not scope or name.id not in (arg.arg for arg in (*scope.args.args, *scope.args.kwonlyargs)):
            places.append(self.tree.body)
        for place in places:
            assigned = (node for node in place if isinstance(node, ast.Assign))
            if found := [n.value for n in assigned if any(_names(t, name.id) for t in n.targets)]:
                return found
        return []

    def _function(self, node) -> ast.FunctionDef | None:
        while node := self.parent.get(node):
            if isinstance(node, ast.FunctionDef):
                return node


def _names(target: ast.expr, name: str) -> bool:
    return any(isinstance(node, ast.Name) and node.id == name for node in ast.walk(target))


def _begins(node) -> str:
    """How a string begins, as it stands in the source."""
    node = node.values[0] if isinstance(node, ast.JoinedStr) and node.values else node
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def pieces(node) -> tuple[str, ...]:
    """The literal text of a string, cut at its values; empty for what is no string."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    texts = (part.value for part in parts if isinstance(part, ast.Constant))
    return tuple(filter(None, (printed(text) for text in texts if isinstance(text, str))))


def printed(text: str) -> str:
    return re.sub(r"\s+", " ", STYLE.sub("", text))


def says_something(text: tuple[str, ...]) -> bool:
    """Whether a text has two words or more; `KEY: ` alone is what all messages of a key begin with."""
    return len(re.findall(r"[^\W\d]\w*", " ".join(text))) > 1


def letters(text) -> int:
    return len(re.findall(r"[^\W\d_]", "".join(text)))


def sources() -> list[Source]:
    return [Source(path) for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
