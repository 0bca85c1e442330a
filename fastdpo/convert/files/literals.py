"""What a file of Python says in literals: its calls, and the values of its names, without running it."""

import ast
import operator
from collections.abc import Collection, Iterator
from typing import Any

from fastdpo.convert.draft import Unresolved

_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


def name_of(call: ast.Call) -> str:
    """What is called: `f` of f(...), x.f(...)."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """All but what stands under `if False:`."""
    yield node
    is_off = isinstance(node, ast.If) and isinstance(node.test, ast.Constant) and not node.test.value
    for child in node.orelse if is_off else ast.iter_child_nodes(node):  # type: ignore[attr-defined]
        yield from _walk(child)


class Code:
    """A file's calls in their order, and what its names are."""

    def __init__(self, tree: ast.Module):
        nodes = list(_walk(tree))
        self.calls = [node for node in nodes if isinstance(node, ast.Call)]
        self.calls.sort(key=lambda call: (call.lineno, call.col_offset))
        self.nodes = nodes
        self.values: dict[str, list[ast.expr | None]] = {}  # None: something that no one line says
        self.of_class: dict[tuple[str, str], list[ast.expr | None]] = {}
        for node in nodes:
            self._note(node)

    def _note(self, node: ast.AST) -> None:
        if isinstance(node, ast.ClassDef):
            for line in node.body:
                for target, value in _assigned(line):
                    self.of_class.setdefault((node.name, target), []).append(value)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = [call for call in self.calls if name_of(call) == node.name]
            for i, arg in enumerate(node.args.posonlyargs + node.args.args + node.args.kwonlyargs):
                for call in given:
                    by_name = {keyword.arg: keyword.value for keyword in call.keywords}
                    at = call.args[i] if i < len(call.args) else None
                    self.values.setdefault(arg.arg, []).append(by_name.get(arg.arg, at))
                if not given:
                    self.values.setdefault(arg.arg, []).append(None)
        for target, value in _assigned(node):
            self.values.setdefault(target, []).append(value)

    def value(self, node: ast.expr | None, *within: str) -> Any:
        """What an expression of literals, and of names for them, is; LookupError for any other."""
        if node is None:
            raise LookupError
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.List | ast.Tuple):
            return [self.value(one, *within) for one in node.elts]
        if isinstance(node, ast.Dict):
            keys = [self.value(key, *within) for key in node.keys]
            return dict(zip(keys, [self.value(one, *within) for one in node.values]))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -self.value(node.operand, *within)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            sides = self.value(node.left, *within), self.value(node.right, *within)
            if all(isinstance(side, int | float) for side in sides) and sides[1]:
                return _OPERATORS[type(node.op)](*sides)
        if isinstance(node, ast.Name) and node.id not in within:
            return self._agreed(self.values.get(node.id, ()), node.id, *within)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = node.value.id
            if owner == "torch":
                return node.attr
            classes = {self._class_of(owner)} if owner != "self" else {of for of, _ in self.of_class}
            nodes = [one for of in classes for one in self.of_class.get((of, node.attr), ())]
            return self._agreed(nodes, *within)
        raise LookupError

    def _agreed(self, nodes, *within: str) -> Any:
        again = lambda node: isinstance(node, ast.Name) and node.id in within  # as in f(beta=beta)
        found = [self.value(node, *within) for node in nodes if not again(node)]
        if not found or any(one != found[0] for one in found):
            raise LookupError
        return found[0]

    def _class_of(self, name: str) -> str:
        """The class that an object is of; a class's own name is itself."""
        nodes = self.values.get(name, ())
        made = {
            name_of(node) for node in nodes if isinstance(node, ast.Call) and not node.args + node.keywords
        }
        return made.pop() if len(made) == len(nodes) == 1 else name

    def said(self, calls: list[ast.Call], *first: str, leave_out: Collection[str] = ()) -> dict[str, Any]:
        """The arguments of calls; `first`: what the first ones without a name are. Where several calls do
        not agree it is open which one is meant."""
        found: list[dict[str, Any]] = []
        for call in calls:
            nodes = dict(zip(first, call.args))
            for keyword in call.keywords:
                nodes[keyword.arg or f"{name_of(call)}(**)"] = keyword.value
            found.append({key: self.or_text(node) for key, node in nodes.items() if key not in leave_out})
        out = {}
        for key in dict.fromkeys(key for one in found for key in one):
            values = [one.get(key) for one in found]
            same = all(value == values[0] for value in values)
            out[key] = (
                values[0]
                if same
                else Unresolved(" or ".join("unset" if value is None else str(value) for value in values))
            )
        return {key: value for key, value in out.items() if value is not None}

    def or_text(self, node: ast.expr) -> Any:
        try:
            return self.value(node)
        except (LookupError, TypeError, ArithmeticError):  # -[1], {[]: 1}, 1e400 / 3
            return Unresolved(ast.unparse(node))

    def made(self, node: ast.expr | None) -> list[ast.Call]:
        """The calls that an expression is, or that its name was assigned."""
        nodes = self.values.get(node.id, []) if isinstance(node, ast.Name) else [node]
        return [one for one in nodes if isinstance(one, ast.Call)]


def _assigned(node: ast.AST) -> Iterator[tuple[str, ast.expr | None]]:
    """(name, value) of an assignment; None where it takes more than a line to tell."""
    if isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, ast.Name):
                yield target.id, node.value
            else:
                yield from ((one.id, None) for one in ast.walk(target) if isinstance(one, ast.Name))
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        yield node.target.id, node.value
    elif isinstance(node, ast.AugAssign | ast.For | ast.NamedExpr):
        yield from ((one.id, None) for one in ast.walk(node.target) if isinstance(one, ast.Name))
