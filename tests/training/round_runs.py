"""Short runs of rounds, and what they leave."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from safetensors.torch import load_file

from fastdpo.api import train
from fastdpo.config.keys import Config
from tests.tiny import rows, save_model, write_jsonl
from tests.training.killing import TIMED

SAMPLE = dict(prompts=8, responses=3, max_new_tokens=6)
REWARDS = """
import json, pathlib
def some(prompts, answers):
    return [sum(map(ord, answer)) % 97 for answer in answers]
def of_half(prompts, answers):  # the others are ties
    return [n if len(p) % 2 else 1.0 for p, n in zip(prompts, some(prompts, answers))]
def two_valued(prompts, answers):
    return [n % 2 for n in some(prompts, answers)]
def same(prompts, answers):
    return [0.25] * len(answers)
def told(prompts, answers):
    with pathlib.Path(__file__).with_name("told.jsonl").open("a") as file:
        file.writelines(json.dumps(both) + "\\n" for both in zip(prompts, answers))
    return some(prompts, answers)
calls = []
def quiet_at_first(prompts, answers):  # a call for the try, and one for a round of 24 answers
    calls.append(1)
    return same(prompts, answers) if len(calls) <= 2 else some(prompts, answers)
def quiet_after(prompts, answers):
    calls.append(1)
    return some(prompts, answers) if len(calls) == 2 else same(prompts, answers)
def quiet_at_last(prompts, answers):
    calls.append(1)
    return same(prompts, answers) if len(calls) == 3 else some(prompts, answers)
"""


def inputs_in(folder) -> dict[str, str]:
    """A model, rows and rewards."""
    (folder / "rewards.py").write_text(REWARDS)
    data = write_jsonl(folder / "rows.jsonl", rows(20))
    return dict(model=save_model(folder / "model"), data=data, reward=f"{folder}/rewards.py:some")


def config_of(inputs, folder, **keys) -> Config:
    """reward: the name of one of REWARDS, or any other; sample: over SAMPLE."""
    values = dict(output_dir=str(folder), learning_rate=1e-3, batch_size=4, max_length=64, logging_steps=1)
    values |= dict(rounds=2, samples=0, save_steps=None, dtype="fp32")
    values |= inputs | keys | dict(sample=SAMPLE | (keys.get("sample") or {}))
    if values["reward"] in REWARDS and values["reward"].isidentifier():
        values["reward"] = inputs["reward"].rpartition(":")[0] + f":{values['reward']}"
    return Config(**values)


def run(config: Config) -> str:
    """Trains; everything it printed."""
    console = Console(record=True, quiet=False, width=1000, file=open(os.devnull, "w"))
    train(config, console)
    return console.export_text()


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def events(config, name) -> list[dict]:
    return [line for line in lines_of(Path(config.output_dir) / "events.jsonl") if line["event"] == name]


def metrics(config, name) -> list:
    found = lines_of(Path(config.output_dir) / "metrics.jsonl")
    return [line[name] for line in found if name in line]


def round_lines(config, number) -> list[dict]:
    return lines_of(Path(config.output_dir) / f"rounds/round-{number}.jsonl")


def scores_of(line) -> list[float]:
    return [response["score"] for response in line["responses"]]


def weights(config) -> dict:
    (file,) = (Path(config.output_dir) / "model").glob("*.safetensors")
    return load_file(file)


def outcome(config) -> dict:
    """What has to be the same, bit by bit."""
    folder = Path(config.output_dir)
    untimed = [{k: v for k, v in m.items() if k not in TIMED} for m in lines_of(folder / "metrics.jsonl")]
    (file,) = (folder / "model").glob("*.safetensors")
    files = {path.name: path.read_bytes() for path in sorted((folder / "rounds").iterdir())}
    return {"metrics": untimed, "weights": file.read_bytes()} | files


def replaced(config, **keys) -> Config:
    """The same, with these keys; sample: over what it has."""
    if "sample" in keys:
        keys["sample"] = config.sample | keys["sample"]
    return Config(**asdict(config) | keys)
