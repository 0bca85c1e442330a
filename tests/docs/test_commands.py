"""Every command that README, CONTRIBUTING and docs/ show, in a block or in a sentence.

A page's blocks run in bash, in order, in a folder where what they name is there, but small. `fastdpo` runs
for real. What needs a network, or more time than a test has, is only taken down, and then looked at: the
target of `make`, the options of a module, the tests and extras that are named.
"""

import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from benchmarks.process import python_path
from fastdpo.cli import app
from fastdpo.config.keys import FIELDS
from tests.docs.snippets import ALL, ROOT
from tests.docs.workplace import furnish

TAKEN_DOWN = ("make", "pip", "python", "python3", "git", "bash", "docker", "pre-commit", "torchrun")
TAKEN_DOWN += (".venv/bin/python",)
SHORTER = {
    "--max_steps 20 ": "--max_steps 2 ",
    "--max_steps 2000": "--max_steps 1",
    "--max_steps 3000": "--max_steps 2",
    "train config.yaml --gpus 8": "train config.yaml --gpus 2",
}
FILE = re.compile(r"# (\S+\.(?:yaml|py))\n")
BLOCKS = {
    page: [s for s in ALL if s.page == page and s.language in ("bash", "yaml", "python")]
    for page in dict.fromkeys(s.page for s in ALL if s.language == "bash")
}
CONFIG = next(s.text for s in ALL if s.page == "training.md" and s.text.startswith("# config.yaml\n"))


def script(page: str, folder: Path) -> str:
    """The page's blocks as one script, with the files that they show."""
    lines = ["set -eu"]
    (folder / "config.yaml").write_text(CONFIG)
    for snippet in BLOCKS[page]:
        if snippet.language == "bash":
            lines.append(snippet.text)
        elif found := FILE.match(snippet.text):
            (folder / found[1]).parent.mkdir(exist_ok=True)
            (folder / found[1]).write_text(snippet.text)
    text = "\n".join(lines)
    for long, short in SHORTER.items():
        text = text.replace(long, short)
    return text


def stand_in(path: Path, what: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{what}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("page", BLOCKS)
def test_the_commands_of_a_page(page, tmp_path, monkeypatch):
    furnish(tmp_path)
    took = tmp_path / "taken_down"
    took.touch()
    for name in TAKEN_DOWN:
        path = tmp_path / (name if "/" in name else f"bin/{name}")
        stand_in(path, f"printf '%s\\n' {shlex.quote(Path(name).name)}\" $*\" >> {took}")
    real = f"exec {sys.executable} -c 'import sys; from fastdpo.cli import main; sys.exit(main())' \"$@\""
    stand_in(tmp_path / "bin/fastdpo", f'[ "$1" = push ] && exit 0  # tests/publish/test_hub.py\n{real}')
    (tmp_path / ".venv/bin/activate").parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / ".venv/bin/activate").touch()
    environment = os.environ | python_path()
    environment |= {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    command = ["/bin/bash", "-c", script(page, tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for command in took.read_text().splitlines():
        check(shlex.split(command), monkeypatch)


def test_the_readme_shows_the_example_as_it_is():
    (shown,) = (s.text for s in BLOCKS["README.md"] if s.language == "yaml")
    assert yaml.safe_load(shown) == yaml.safe_load((ROOT / FILE.match(shown)[1]).read_text())


def inline() -> list:
    """Commands in sentences."""
    begins = re.compile(r"(fastdpo|make|python|bash|pip|docker) \S")
    return sorted({s.text for s in ALL if s.language == "" and begins.match(s.text)})


@pytest.mark.parametrize("command", inline())
def test_a_command_in_a_sentence(command, monkeypatch):
    words = shlex.split(command)
    if words[0] == "fastdpo":
        check_fastdpo(words[1:])
    else:
        check(words, monkeypatch)


def check_fastdpo(words: list[str]) -> None:
    own = {name for argument in app[words[0]].assemble_argument_collection() for name in argument.names}
    flags = {word.partition("=")[0] for word in words[1:] if word.startswith("--")}
    assert flags <= own | {f"--{key}" for key in FIELDS} | {"--help"}


def check(words: list[str], monkeypatch) -> None:
    """What is not run: that it could be."""
    name, *words = words
    if name == "make":
        done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif name in ("python", "python3") and words[:1] == ["-m"]:
        check_module(words[1], words[2:], monkeypatch)
    elif name == "bash":
        assert (ROOT / words[0]).is_file()
        if words[0] == "benchmarks/gpu_all.sh":
            stages = re.findall(r"^#   ([a-z][a-z0-9-]*)  ", (ROOT / words[0]).read_text(), re.M)
            assert set(words[1:]) - {"--dry-run"} <= set(stages)
    elif name == "docker":
        found = re.findall(r"--build-arg (\w+)=", shlex.join(words))
        assert all(f"\nARG {arg}=" in (ROOT / "Dockerfile").read_text() for arg in found)
        if words[0] == "run":
            check_fastdpo(words[words.index("fastdpo") + 1 :])
        else:
            assert words[0] == "build" and words[-1] == "."
    elif name == "torchrun":
        own = {option for action in get_args_parser()._actions for option in action.option_strings}
        place = words.index("-m")
        assert {word for word in words[:place] if word.startswith("--")} <= own
        assert words[place + 1] == "fastdpo"
        check_fastdpo(words[place + 2 :])
    elif name == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = {extra for found in re.findall(r"\[(.*?)\]", " ".join(words)) for extra in found.split(",")}
        assert words[0] == "install" and named <= extras.keys()


def check_module(module: str, words: list[str], monkeypatch) -> None:
    assert module == "venv" or find_spec(module), module
    paths = [word for word in words if re.match(r"(tests|benchmarks|docs)/", word)]
    assert all((ROOT / path.partition("::")[0]).exists() for path in paths), paths
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    if module.startswith("benchmarks.") and flags:
        monkeypatch.setattr(sys, "argv", [module, *flags, "--help"])
        with pytest.raises(SystemExit) as stop:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        assert not stop.value.code
