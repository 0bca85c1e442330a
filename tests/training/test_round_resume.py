"""A run of rounds that stops goes on exactly, and samples nothing twice; or it says why it cannot."""

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest

from fastdpo.errors import ConfigError, DeadEndError
from fastdpo.reference import tables
from fastdpo.reference.cache import RefCache
from fastdpo.sampling import draw
from fastdpo.sampling.draw import Drawing
from fastdpo.sampling.rows import RoundFile
from fastdpo.training.stage import Stage
from tests.training.round_runs import config_of, inputs_in, outcome, replaced, run
from tests.training.test_resume import stopped_in_step

KEYS = dict(rounds=3, num_epochs=2, lora_rank=2, objective="rloo", reference="start")
KEYS |= dict(sample=dict(resets=0.5), save_steps=3)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return inputs_in(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr("fastdpo.api.write_report", lambda *args, **keys: None)


@pytest.fixture(autouse=True, scope="module")
def small_calls():
    """Two prompts a call of the engine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdpo.sampling.engine.ON_CPU", 6)
        yield


@pytest.fixture
def make(inputs, tmp_path):
    return lambda name="run", **keys: config_of(inputs, tmp_path / name, **KEYS | keys)


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """A run that nothing disturbed: its config; copies of its folder stand for runs that ended there."""
    config = config_of(inputs, tmp_path_factory.mktemp("whole") / "run", **KEYS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdpo.api.write_report", lambda *args, **keys: None)
        run(config)
    return config


@pytest.fixture
def asked(monkeypatch):
    """How often each prompt has been given to the engine, by its ids."""
    counted, sample = Counter(), draw.sample

    def counting(policy, tokenizer, prompts, *, first, **rest):
        for place, some in sample(policy, tokenizer, prompts, first=first, **rest):
            counted.update(tuple(one.prompt.tolist()) for one in prompts[place : place + len(some)])
            yield place, some

    monkeypatch.setattr(draw, "sample", counting)
    return counted


WHERE = {
    "the first round's samples": (2, (RoundFile, "add")),
    "samples": (6, (RoundFile, "add")),
    "scores": (2, (Drawing, "scored")),
    "tables": (2, (tables, "save")),
    "those of the start, while the LoRA is off": (3, (RefCache, "add")),
    "a step": (6, (Stage, "step")),
    "a round's last step": (4, (Stage, "step")),
}


@pytest.mark.parametrize("name", WHERE)
def test_a_stopped_run_goes_on_bit_by_bit_and_samples_nothing_twice(make, whole, asked, name):
    n, where = WHERE[name]
    config = make()
    with stopped_in_step(n, where=where):
        run(config)
    assert not (Path(config.output_dir) / "model").exists()
    run(replaced(config, resume=True))
    assert outcome(config) == outcome(whole)
    assert asked.total() == 24


def ended_in(whole, folder, step):
    """The whole run as it stood at a checkpoint, with all that it has written to `rounds` since."""
    to = folder / "run"
    shutil.copytree(whole.output_dir, to)
    shutil.rmtree(to / "model")
    for path in (to / "checkpoints").iterdir():
        if path.name != f"step-{step}":
            shutil.rmtree(path)
    return replaced(whole, output_dir=str(to), resume=True)


@pytest.mark.parametrize("kind", ["jsonl", "safetensors"])
@pytest.mark.parametrize("high", [False, True])
def test_a_damaged_file_of_the_round_that_trains_ends_the_run(whole, tmp_path, kind, high):
    config = ended_in(whole, tmp_path, 9)
    path = Path(config.output_dir) / f"rounds/round-3.{kind}"
    flip(path, 1 << 7 if high else 1)
    with pytest.raises(DeadEndError, match=rf"round-3\.{kind} is not there as it was written.*--overwrite"):
        run(config)


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= bit
    path.write_bytes(data)


def test_a_lost_one_too(whole, tmp_path):
    config = ended_in(whole, tmp_path, 9)
    (Path(config.output_dir) / "rounds/round-3.safetensors").unlink()
    with pytest.raises(DeadEndError, match=r"round-3\.safetensors is not there as it was written"):
        run(config)


def test_what_is_damaged_in_a_later_round_is_made_again(whole, tmp_path, asked):
    """From the call of the engine on that the damage is in."""
    config = ended_in(whole, tmp_path, 6)
    for kind in ("jsonl", "safetensors"):
        flip(Path(config.output_dir) / f"rounds/round-3.{kind}", 1)
    run(config)
    assert outcome(config) == outcome(whole)
    assert 0 < asked.total() < 8


def test_samples_of_another_run_in_the_folder_are_not_taken(make, whole, tmp_path, asked):
    config = make(seed=1, resume=True)
    shutil.copytree(Path(whole.output_dir) / "rounds", tmp_path / "run/rounds")
    run(config)
    assert asked.total() == 24 and outcome(config)["round-1.jsonl"] != outcome(whole)["round-1.jsonl"]


@pytest.mark.parametrize(
    "keys",
    [dict(seed=1), dict(reward="length"), dict(sample=dict(temperature=0.5)), dict(num_epochs=1)],
    ids=lambda keys: next(iter(keys)),
)
def test_another_config_is_refused(whole, tmp_path, keys):
    config = replaced(ended_in(whole, tmp_path, 9), **keys)
    with pytest.raises(ConfigError, match=f"{next(iter(keys))}: the run in output_dir was started with"):
        run(config)


def test_a_path_that_is_written_otherwise_is_no_other_run(whole, tmp_path):
    config = ended_in(whole, tmp_path, 9)
    run(replaced(config, data=os.path.relpath(config.data)))
    assert outcome(config) == outcome(whole)


def test_what_another_number_of_rounds_has_sampled_is_sampled_again(whole, tmp_path, asked):
    """The learning rate of the steps before it was another. Not that of the round that trains."""
    said = run(replaced(ended_in(whole, tmp_path, 9), rounds=4))
    assert asked.total() == 8
    run(replaced(ended_in(whole, tmp_path / "none", 0), rounds=4))
    assert asked.total() == 8 + 32
    assert "the run had rounds: 3, now 4: the learning rate follows from here on" in said


def test_rounds_can_be_raised_and_not_undone(whole, tmp_path, make, asked):
    keys = dict(lr_scheduler_type="constant")
    short, long = make("short", rounds=2, **keys), make("long", **keys)
    run(short), run(long)
    asked.clear()
    run(replaced(short, rounds=3, resume=True))
    assert asked.total() == 8 and outcome(short)["weights"] == outcome(long)["weights"]
    with pytest.raises(ConfigError, match="rounds: 2, but step-12 is in round 3 already"):
        run(replaced(short, rounds=2, resume=True))


def test_a_reward_that_fails_loses_no_samples(make, tmp_path, inputs, asked):
    reward = tmp_path / "rewards.py"
    body = "def f(prompts, answers):\n    return [{} if len(answers) > 1 else 1 for answer in answers]\n"
    reward.write_text(body.format("1 / 0"))
    config = make(reward=f"{reward}:f")
    with pytest.raises(ConfigError, match="it raised ZeroDivisionError"):
        run(config)
    assert asked.total() == 8
    reward.write_text(Path(inputs["reward"].partition(":")[0]).read_text().replace("def some", "def f"))
    run(replaced(config, resume=True))
    assert asked.total() == 24
