"""Trainings that are killed: `python -m tests.training.killing --kills 12 --seed 0`.

Each trial forks a training, which is killed at a random moment of a random phase, sometimes damages
what it left, resumes it, perhaps kills it again, and at last compares weights, metrics and samples with
a run that nothing disturbed, bit by bit. The parent forks and never computes, so forks are safe.
"""

import argparse
import functools
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import traceback
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import datasets  # noqa: F401  (once, and not in every fork)
import torch
from rich.console import Console

from fastdpo import api
from fastdpo.config.keys import Config
from fastdpo.reference import cache as ref_cache
from fastdpo.reference import tables
from fastdpo.sampling import draw
from fastdpo.sampling import rows as sampled
from fastdpo.training import checkpoint, run, stage, trainer
from tests.tiny import rows, save_model, write_jsonl

PHASES = {  # what a run calls when it enters one
    "fill": (ref_cache.RefCache, "add"),
    "sample": (sampled.RoundFile, "add"),
    "score": (draw.Drawing, "scored"),
    "scored": (sampled.RoundFile, "write"),
    "tables": (tables, "save"),
    "step": (stage.Stage, "step"),
    "checkpoint": (checkpoint, "save"),
    "report": (api, "write_report"),
    "model": (trainer, "save_model"),
}
OF_ROUNDS = {"sample", "score", "scored", "tables"}
LONGEST = {
    "sample": 0.02,
    "score": 0.002,
    "scored": 0.002,
    "tables": 0.002,
    "fill": 0.01,
    "step": 0.03,
    "checkpoint": 0.03,
    "report": 0.5,
    "model": 0.05,
}  # seconds, about
TIMED = {"tokens_per_second", "pairs_per_second", "peak_memory_gb", "tflops_per_second"}
TIMED |= {"idle_share", "seconds_left"}
SHARED = dict(
    eval_data=0.2,
    learning_rate=1e-3,
    batch_size=4,
    max_length=64,
    max_tokens=120,
    logging_steps=3,
    eval_steps=4,
    save_steps=2,
    samples=1,
    dtype="fp32",
)
KINDS = {
    "dpo": dict(max_steps=9),
    "stages": dict(load_best=True, stages=[dict(objective="sft", max_steps=5), dict(max_steps=6)]),
    "rounds": dict(
        rounds=3,
        sample=dict(prompts=8, responses=3, max_new_tokens=6, resets=0.5),
        lora_rank=2,
    ),
    "lora": dict(max_steps=7, lora_rank=2, stages=[dict(max_steps=4), dict(max_steps=3, beta=0.3)]),
}


@dataclass
class Trial:
    """One run in its own folder, with its own cache."""

    config: Config
    seed: int

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    def go(self, resume: bool, kill: tuple[str, int, float] | None) -> bool:
        """Runs in a fork; kill = (phase, how often it is entered, seconds after). Whether it finished."""
        pid = os.fork()
        if pid == 0:
            child(replace(self.config, resume=resume), kill)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            return False
        assert os.waitstatus_to_exitcode(status) == 0, f"the run failed: {self.config.output_dir}"
        return True

    def result(self) -> dict:
        """Everything that must be the same, bit by bit."""
        folder = self.folder
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        untimed = [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in lines]
        (weights,) = (folder / "model").glob("*.safetensors")
        return {
            "metrics": untimed,
            "samples": (folder / "samples.jsonl").read_text(),
            "held_out": (folder / "held_out.jsonl").read_text(),
            "weights": weights.read_bytes(),
        }


def child(config: Config, kill: tuple[str, int, float] | None):
    """The training process: trains, and is gone. Drawing takes longer than these trainings, so it draws only
    where it may be killed at it."""
    ref_cache.COMMIT_SECONDS = 0.0
    run.complete = functools.partial(run.complete, max_new_tokens=8)
    if kill:
        phase, count, delay = kill
        plant(*PHASES[phase], count, delay)
    if not kill or phase != "report":
        api.write_report = lambda *_: None
    try:
        api.train(config, Console(quiet=True))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def plant(owner, attribute: str, count: int, delay: float) -> None:
    """Kills this process some time after the count-th call. By a timer, which no busy machine makes late, and
    whose signal ends a process like SIGKILL: at once."""
    inner, calls = getattr(owner, attribute), itertools.count(1)

    def outer(*args, **kwargs):
        if next(calls) == count:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, max(delay, 1e-6))
        return inner(*args, **kwargs)

    setattr(owner, attribute, outer)


def damage(trial: Trial, draw: random.Random) -> bool:
    """Truncates or flips a byte of the newest checkpoint, of the cache, or of both; whether the checkpoint
    was among them."""
    folders = checkpoint.found(trial.folder / "checkpoints")
    victims = [draw.choice(sorted(folders[-1].iterdir()))] if folders else []
    cache = Path(trial.config.reference_cache)
    victims += [cache] if cache.exists() and cache.stat().st_size else []
    hit = False
    for path in draw.sample(victims, draw.randint(min(1, len(victims)), len(victims))):
        data = bytearray(path.read_bytes())
        place = draw.randrange(len(data))
        if draw.random() < 0.5:
            data[place] ^= 1 << draw.randrange(8)
        else:
            del data[place:]
        path.write_bytes(data)
        hit |= path != cache
    return hit


def attempt(trial: Trial, killed: Counter) -> None:
    """Runs a trial to its end through at least one kill, and checks where each resumed run goes on."""
    draw, expected = random.Random(trial.seed), None
    while True:
        possible = PHASES.keys() - (set() if trial.config.rounds else OF_ROUNDS)
        phase = draw.choice(sorted(possible - killed.keys() or possible))
        times = {"step": 9, "model": 1, "fill": 3} | dict.fromkeys(OF_ROUNDS, 3)
        count = draw.randint(1, times.get(phase, 5))
        kills = expected is None or draw.random() < 0.5
        kill = (phase, count, draw.uniform(0, LONGEST[phase])) if kills else None
        finished = trial.go(expected is not None, kill)
        if expected:
            check_start(trial, expected)
        if finished and expected:
            return
        if finished:  # it ran through: once more, from the start
            trial.config = replace(trial.config, output_dir=trial.config.output_dir + "x")
            continue
        killed[phase] += 1
        found = [path.name for path in checkpoint.found(trial.folder / "checkpoints")]
        damaged = draw.random() < 0.4 and damage(trial, draw)
        # where a killed prune or a damage may have taken more than one, any older one will do
        expected = {*found[:-1], "the beginning"} if damaged else {found[-1] if found else "the beginning"}


def check_start(trial: Trial, expected: set[str]) -> None:
    """The last start of a trial was from one of the expected checkpoints."""
    path = trial.folder / "events.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    starts = [event for event in events if event["event"] in ("start", "resume")]
    if starts:
        assert starts[-1].get("checkpoint", "the beginning") in expected, (starts[-1], expected)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        killed, expected, trial_number = Counter(), {}, 0
        shared = SHARED | dict(
            model=save_model(folder / "model"), data=write_jsonl(folder / "rows.jsonl", rows(20))
        )
        judge = folder / "judge.py"
        judge.write_text("def f(prompts, answers):\n    return [sum(map(ord, a)) % 97 for a in answers]\n")
        KINDS["rounds"]["reward"] = f"{judge}:f"
        while killed.total() < options.kills or set(killed) != set(PHASES):
            kind = sorted(KINDS)[trial_number % len(KINDS)]
            names = dict(
                output_dir=str(folder / f"run{trial_number}"),
                reference_cache=str(folder / f"{trial_number}.db"),
            )
            trial = Trial(Config(**shared | KINDS[kind] | names), options.seed * 100003 + trial_number)
            if kind not in expected:
                assert trial.go(resume=False, kill=None)
                expected[kind] = trial.result()
                trial.config = replace(
                    trial.config, overwrite=False, output_dir=f"{folder}/first{trial_number}"
                )
                Path(trial.config.reference_cache).unlink()
            attempt(trial, killed)
            got = trial.result()
            for name, value in expected[kind].items():
                assert got[name] == value, f"{kind}, trial {trial_number}: {name} differ after a kill"
            trial_number += 1
            print(f"{kind}: same bits; {killed.total()} kills so far", flush=True)
    where = ", ".join(f"{count} at {phase}" for phase, count in sorted(killed.items()))
    print(f"{killed.total()} kills ({where}), {trial_number} runs")
    print("weights, metrics and samples bitwise equal")


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
