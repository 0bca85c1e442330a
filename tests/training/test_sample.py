"""`fastdpo sample`: one round's prompts, answered and scored, in a file that rows are read from."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoTokenizer

import fastdpo
from fastdpo.cli import main
from fastdpo.data.groups import Limits
from fastdpo.data.load import load_groups
from fastdpo.errors import ConfigError
from fastdpo.sampling import draw, engine
from tests.tiny import rows, save_model, write_jsonl

SAMPLE = dict(prompts=6, responses=3, max_new_tokens=5)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    data = write_jsonl(folder / "rows.jsonl", rows(12))
    (folder / "judge.py").write_text(
        "def f(prompts, answers):\n    return [sum(map(ord, a)) for a in answers]\n"
    )
    shared = dict(model=str(save_model(folder / "model")), data=str(data), max_length=64, dtype="fp32")
    return shared | dict(reward=f"{folder}/judge.py:f")


def sample(inputs, output, **keys):
    keys = dict(sample=SAMPLE) | keys
    console = Console(file=io.StringIO(), width=200)
    return fastdpo.sample(inputs, output, console, **keys), console.file.getvalue()


def test_the_file_is_what_is_returned_and_ranked_rows(inputs, tmp_path):
    found, said = sample(inputs, tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in line.items() if k != "digest"} for line in lines] == found
    assert len(found) == 6 and len({one["row"] for one in found}) == 6
    for one in found:
        assert [r["score"] for r in one["responses"]] == [sum(map(ord, r["text"])) for r in one["responses"]]
    mean = sum(r["score"] for one in found for r in one["responses"]) / 18
    assert f"18 samples, score {mean:.3f} on average" in said
    quiet = Console(quiet=True)
    tokenizer = AutoTokenizer.from_pretrained(inputs["model"])
    groups, report = load_groups(
        str(tmp_path / "out.jsonl"), tokenizer, Limits(64), strict=False, console=quiet, data_cache="off"
    )
    assert len(groups) and set(report.formats) == {"ranked"}


def test_without_a_reward_nothing_is_scored(inputs, tmp_path):
    found, said = sample(inputs, tmp_path / "out.jsonl", reward=None)
    assert all(r["score"] is None for one in found for r in one["responses"])
    assert "on average" not in said


def test_a_file_that_was_not_finished_goes_on(inputs, tmp_path, monkeypatch):
    """Within a call, too: what is there of that one is sampled again."""
    monkeypatch.setattr(engine, "ON_CPU", 6)  # two prompts a call
    whole, _ = sample(inputs, tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "part.jsonl").write_text("".join(lines[:3]) + lines[3][:50])
    begun, real = [], draw.sample
    monkeypatch.setattr(draw, "sample", lambda *a, **k: begun.append(k["first"]) or real(*a, **k))
    assert sample(inputs, tmp_path / "part.jsonl")[0] == whole and begun == [2]
    assert (tmp_path / "part.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_what_is_there_is_scored_anew(inputs, tmp_path, monkeypatch):
    before, _ = sample(inputs, tmp_path / "out.jsonl", reward=None)
    monkeypatch.setattr(draw, "sample", lambda *args, **keys: [])  # nothing more
    judge = tmp_path / "judge.py"
    for value in (1.0, 2.0):
        judge.write_text(f"def f(prompts, answers):\n    return [{value}] * len(answers)\n")
        after, said = sample(inputs, tmp_path / "out.jsonl", reward=f"{judge}:f")
        assert {r["score"] for one in after for r in one["responses"]} == {value}
        assert "has 6 of 6 prompts" in said
    assert [[r["ids"] for r in one["responses"]] for one in after] == [
        [r["ids"] for r in one["responses"]] for one in before
    ]


def test_a_file_that_cannot_be_written_is_told_first(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("fastdpo.training.sample.read", None)
    with pytest.raises(ConfigError, match=r"--output: cannot write .*: Is a directory"):
        sample(inputs, tmp_path)


@pytest.mark.parametrize("other", [dict(seed=1), dict(sample=SAMPLE | {"temperature": 0.5})], ids=str)
def test_a_file_of_something_else_is_left_alone(inputs, tmp_path, other):
    sample(inputs, tmp_path / "out.jsonl")
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="holds something else than samples of this config; name another"):
        sample(inputs, tmp_path / "out.jsonl", **other)
    (tmp_path / "mine.txt").write_text("a poem\n")
    with pytest.raises(
        ConfigError, match=re.escape(f"--output: {tmp_path / 'mine.txt'} holds something else")
    ):
        sample(inputs, tmp_path / "mine.txt")
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert (tmp_path / "mine.txt").read_text() == "a poem\n"


def test_prompts_alone_are_answered(inputs, tmp_path):
    data = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"say {word}"} for word in "abc"])
    found, _ = sample(inputs, tmp_path / "out.jsonl", data=str(data))
    assert sorted(one["row"] for one in found) == [0, 1, 2]


def test_the_command(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [f"--{key}={value}" for key, value in inputs.items()]
    assert main(["sample", *flags, f"--sample={json.dumps(SAMPLE)}"]) == 0
    assert len(Path("samples.jsonl").read_text().splitlines()) == 6
    assert "written: samples.jsonl" in capsys.readouterr().out
