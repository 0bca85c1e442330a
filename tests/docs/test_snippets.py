"""Every block of Python, YAML and JSON that the pages show works; test_commands.py runs the shell's."""

import json
import re

import pytest
import yaml

from fastdpo.config.keys import from_values
from fastdpo.data.rows import parse_row
from tests.docs.snippets import ALL, ROOT, Snippet
from tests.docs.workplace import furnish

# (page, heading): where a block is run whose names are other tests' affair
RUN_BY = {
    ("drop_ins.md", "TRL 1.15 and 1.16"): "integrations/test_trl.py",
    ("drop_ins.md", "Axolotl 0.19"): "integrations/test_axolotl.py",
    ("drop_ins.md", "Unsloth 2026.10.9 with TRL 1.15"): "integrations/test_unsloth.py",
    ("own_loop.md", "The loss alone"): "docs/test_own_loop.py",
    ("own_loop.md", "Labels with -100, autocast, modules"): "docs/test_own_loop.py",
    ("own_loop.md", "In Hugging Face's Trainer"): "integrations/test_hf_trainer.py",
}
WRITTEN_FOR_THE_SHELL = re.compile(r"# (\S+\.yaml)\n")  # test_commands.py writes and uses it


def of(language: str) -> list:
    found = [s for s in ALL if s.language == language]
    assert found
    return [pytest.param(s, id=f"{s.page}-{s.heading}-{n}") for n, s in enumerate(found)]


def here(snippet: Snippet) -> bool:
    test = RUN_BY.get((snippet.page, snippet.heading))
    if test is None:
        return True
    text = (ROOT / "tests" / test).read_text()
    assert f'"{snippet.page}", "{snippet.heading}"' in text, f"{test} does not read it"
    return False


@pytest.mark.parametrize("snippet", of("python"))
def test_python_runs(snippet, tmp_path, monkeypatch):
    if here(snippet):
        furnish(tmp_path)
        monkeypatch.chdir(tmp_path)
        exec(snippet.text, {"__name__": "snippet"})


@pytest.mark.parametrize("snippet", of("yaml"))
def test_yaml_is_a_config(snippet):
    if here(snippet) and not WRITTEN_FOR_THE_SHELL.match(snippet.text):
        values = {"model": "m", "data": "d"} | yaml.safe_load(snippet.text)
        assert from_values(values).per_stage()


@pytest.mark.parametrize("snippet", of("json"))
def test_json_is_rows(snippet):
    for number, line in enumerate(snippet.text.splitlines()):
        assert parse_row(json.loads(line), number, prompts_only=True)


def test_no_other_language():
    """A block in a language that no test knows would be run by none."""
    known = {"", "python", "yaml", "json", "bash", "text", "{eval-rst}", "{toctree}"}
    assert {s.language for s in ALL} <= known
    assert {(s.page, s.heading) for s in ALL} >= RUN_BY.keys()
