"""The house: which room may look into which, and no circle anywhere, counting imports that come late or are
for type checkers alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from fastdpo.moved import MOVED

ROOT = Path(__file__).resolve().parents[1]
GROUND = {"errors", "preferences", "records", "moving", "values", "console", "files", "distributed"}
PATH = {  # from a row to an updated weight: a house of its own, which looks into no other room
    "data": GROUND,
    "objectives": GROUND | {"data"},
    "config": GROUND | {"data", "objectives"},
    "model": GROUND | {"data"},
    "sampling": GROUND | {"config", "data", "model"},
    "optim": GROUND | {"model"},
    "reference": GROUND | {"data", "model"},
    "training": GROUND | {"config", "data", "objectives", "model", "sampling", "optim", "reference"},
}
HOUSE = GROUND | PATH.keys()
FASTDPO = (
    {room: GROUND for room in GROUND}
    | PATH
    | {
        "doctor": GROUND | {"data", "model", "reference"},
        "report": HOUSE,
        "publish": HOUSE | {"report"},
        "evaluation": HOUSE | {"report"},
        "explanation": HOUSE | {"evaluation", "report"},
        "planning": HOUSE,
        "convert": GROUND | {"config", "objectives"},
        "integrations": HOUSE | {"doctor"},
        "api": HOUSE | {"convert", "doctor", "evaluation", "explanation", "planning", "publish", "report"},
        "demo": HOUSE | {"api"},
        "flags": GROUND | {"config", "convert"},
        "moved": set(),
    }
)
FASTDPO["commands"] = FASTDPO.keys() | set()
FASTDPO["cli"] = FASTDPO.keys() | {"fastdpo"}  # __version__
FASTDPO["__main__"] = {"cli"}
# what is named at the top comes when it is asked for; the imports are for type checkers alone
FASTDPO["fastdpo"] = GROUND | {"moved", "api", "config", "data", "model"}
TOOLS = {"process", "results", "lengths", "models", "inputs", "flops", "ceilings", "figures", "workers"}
TOOLS |= {"frontiers", "pictures"}
BENCHMARKS = {tool: TOOLS for tool in TOOLS} | {
    "gate": TOOLS,
    "tables": TOOLS | {"head"},
    "peers": TOOLS,
    "steps": TOOLS,
    "head": TOOLS,
    "attention": TOOLS | {"head"},
    "memory": TOOLS | {"peers", "tables"},
    "learning": TOOLS | {"peers", "tables"},
    "growth": TOOLS | {"attention", "head"},
    "rows": TOOLS,
    "cpu": TOOLS | {"gate", "steps"},
    "gpu": TOOLS | {"attention", "growth", "head", "learning", "memory", "steps"},
}


def modules(package: str) -> dict[str, Path]:
    paths = {path.relative_to(ROOT): path for path in (ROOT / package).rglob("*.py")}
    return {".".join(name.with_suffix("").parts).removesuffix(".__init__"): p for name, p in paths.items()}


def imports(package: str) -> dict[str, set[str]]:
    """{module: the package's own modules that it imports, wherever in it}"""
    known = modules(package)
    found: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{name}: a relative import"
                named = [f"{node.module}.{alias.name}" for alias in node.names]
                named = [full if full in known else node.module for full in named]
            else:
                continue
            found[name] |= {other for other in named if other in known}
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


@pytest.mark.parametrize(("package", "table"), [("fastdpo", FASTDPO), ("benchmarks", BENCHMARKS)])
def test_rooms_look_only_into_those_that_they_may(package, table):
    arrows = {(room(a), room(b), a, b) for a, others in imports(package).items() for b in others}
    rooms = {room(module) for module in modules(package)} - {package}
    assert rooms == table.keys() - {package}, "a new room wants a line in this table"
    forbidden = [
        f"{a} imports {b}" for one, other, a, b in arrows if one != other and other not in table[one]
    ]
    assert not sorted(forbidden)


@pytest.mark.parametrize("package", ["fastdpo", "benchmarks"])
def test_no_circles(package):
    """Each module comes after all that it imports."""
    left = imports(package)
    while left:
        free = {name for name, others in left.items() if not others & left.keys() - {name}}
        assert free, f"in a circle, or above one: {sorted(left)}"
        left = {name: others for name, others in left.items() if name not in free}


def test_the_path_of_a_row_imports_nothing_beside_it():
    """Training looks into no room that reports, plans, publishes, converts or serves others."""
    left, reached = ["fastdpo.training.trainer"], set()
    arrows = imports("fastdpo")
    while left:
        module = left.pop()
        reached.add(module)
        left += arrows[module] - reached
    assert {room(module) for module in reached} <= HOUSE


@pytest.mark.parametrize(
    ("old", "new"), [*MOVED.items(), ("fastdpo.model.Policy", "fastdpo.model.policy.Policy")]
)
def test_old_paths_work_and_say_where_things_are(old, new):
    script = f"import pkgutil; pkgutil.resolve_name({old!r})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and f"FutureWarning: {old} is {new} now" in done.stderr
