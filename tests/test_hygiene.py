"""Rules about the tree itself: imports go one way, files stay readable, the documented tree is true."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.process import python_path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path for folder in ("kernels", "fastdpo", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    """kernels <- fastdpo <- benchmarks, tests."""
    forbidden = {"tests"}
    top = path.relative_to(ROOT).parts[0]
    if top in ("kernels", "fastdpo"):
        forbidden |= {"benchmarks", "trl", "liger_kernel"}
    if "integrations" in path.parts:  # each knows its own trainer, and nothing else imports it
        forbidden -= {"trl"}
    if top == "kernels":
        forbidden |= {"fastdpo", "transformers", "datasets", "peft"}
    assert not forbidden & set(imported(path))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_readable(path):
    text = path.read_text()
    assert text.count("\n") <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_children_find_packages_that_are_carried(tmp_path, monkeypatch):
    """PYTHONPATH is never replaced: process.python_path puts folders first, and nothing else sets it
    (but test_aot and what makes children of ours, to all of sys.path)."""
    for name in ("first", "carried"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"only_{name}.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "carried"))
    script = "import only_first, only_carried, fastdpo_kernels, benchmarks.process"
    environment = os.environ | python_path(tmp_path / "first")
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=tmp_path)
    assert done.returncode == 0
    files = (*SOURCES, *(ROOT / "tests").rglob("*.py"))
    found = {path.name for path in files if re.search(r"['\"]PYTHONPATH", path.read_text())}
    children = {"trials.py", "workers.py", "engine_vllm.py"}
    assert found == children | {"process.py", "test_aot.py", "test_hygiene.py"}


CLOCKS = {"sleep", "time", "monotonic", "perf_counter", "process_time", "Timer"}
WITH_A_CLOCK = {
    "golden.py": "prints how long a run took",
    "test_doctor.py": "kills what hangs after minutes",
    "test_dropin.py": "a time limit that is far",
    "test_fit.py": "time limits that are far",
    "test_memory.py": "a time limit that is far",
    "test_resume.py": "looks for a line, however long it takes",
    "test_steps.py": "parts are not longer than the whole",
    "toy.py": "a step of at least so long",
}


def test_no_test_depends_on_how_busy_the_machine_is():
    """A sleep that hopes and a limit that an idle machine keeps fail on a busy one. Wait for what happens (a
    line, a file, a lock), count calls instead of seconds, or give the code a clock that stands still."""
    found = set()
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in CLOCKS:
                if ast.unparse(node.value) in ("time", "threading"):
                    found.add(path.name)
            elif isinstance(node, ast.ImportFrom) and node.module in ("time", "threading"):
                found.add(path.name)
    assert found == set(WITH_A_CLOCK)


def test_the_documented_tree_names_what_is_there():
    tree = re.search(r"## The tree\n+```text\n(.*?)```", (ROOT / "docs/architecture.md").read_text(), re.S)[1]
    named = set(re.findall(r"\w+\.(?:py|sh|yaml|md)\b|\b\w+/", tree))
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    names = {Path(f).name for f in files.split()}
    names |= {f"{folder}/" for f in files.split() for folder in Path(f).parts[:-1]}
    assert named <= names, named - names
    missing = {p.name for p in SOURCES} - named - {"__init__.py"}
    assert not missing


def test_what_make_is_said_to_make_it_makes():
    """A target that is only .PHONY is "nothing to be done" for make, with status 0."""
    makefile = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"(?m)^\.PHONY:(.*)$", makefile)[1].split())
    for target in phony:
        rule = re.search(rf"(?m)^{target}:(.*)\n(\t.+)?", makefile)
        assert rule and (rule[1].strip() or rule[2]), f"make {target} does nothing"


def test_public_names_load_when_asked_for():
    script = "import sys, fastdpo.cli; fastdpo.cli.main(['--help']); assert 'torch' not in sys.modules; "
    script += "import fastdpo; [getattr(fastdpo, name) for name in fastdpo.__all__]"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
