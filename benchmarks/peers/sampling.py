"""The samples of a round, as a worker: a step is one call of an engine, and its loss the tokens it made.

Options: sample, fastdpo's key of that name (`engine` among it). After a round's last call the
next one begins.
"""

import importlib.util
import itertools
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from rich.console import Console

from benchmarks.inputs import sampled_groups
from benchmarks.peers.jobs import Job
from benchmarks.peers.session import Absent, Session, serve
from benchmarks.peers.trl_dpo import word_tokenizer
from fastdpo.config.keys import Config
from fastdpo.config.rounds import SampleSpec
from fastdpo.errors import ConfigError
from fastdpo.model.policy import Policy
from fastdpo.model.spec import ModelSpec
from fastdpo.records import PreferenceGroup
from fastdpo.sampling.engine import check_engine, sample
from fastdpo.training.job import part

WARM = 4  # tokens of a call before the first that counts, by an engine of this process
QUIET = Console(quiet=True)


class Round:
    """What a round asks, and of what."""

    def __init__(self, job: Job, folder: Path):
        self.spec, self.folder = SampleSpec(**job.options["sample"]), folder
        if self.spec.engine == "vllm" and importlib.util.find_spec("vllm") is None:
            raise Absent("vllm is not installed")
        self.policy = Policy(job.build(), job.dtype)
        self.tokenizer, name = word_tokenizer(), "random weights"
        if self.spec.engine == "vllm":  # it asks the files what the model is
            name = str(folder / "model")
            self.policy.core.save_pretrained(name)
            self.tokenizer.save_pretrained(name)
        self.model = part(ModelSpec, Config(model=name, data="random rows"))
        try:
            check_engine(self.spec, self.model)
        except ConfigError as error:
            raise Absent(str(error)) from None
        rows = sampled_groups(job.all_rows)
        prompts = [replace(group, responses=(), pairs=()) for group in rows]
        self.prompts = sorted(prompts, key=lambda group: (len(group.prompt), group.row))  # as a round does

    def calls(self, spec: SampleSpec, prompts: list[PreferenceGroup], seed: int) -> Iterator[list]:
        """The ids of each call's answers: a list a prompt of a list an answer. No token ends one."""
        how = dict(spec=spec, seed=seed, ends=[], model=self.model, work=self.folder, console=QUIET)
        return (made for _, made in sample(self.policy, self.tokenizer, prompts, **how))


def train(message: dict, session: Session) -> None:
    job = Job(**message)
    with tempfile.TemporaryDirectory() as folder:
        asked = Round(job, Path(folder))
        if asked.spec.engine == "transformers":
            list(asked.calls(replace(asked.spec, max_new_tokens=WARM), asked.prompts[:1], 0))
        session.ready(dtype=str(job.dtype), prompts=len(asked.prompts))
        rounds = (asked.calls(asked.spec, asked.prompts, seed) for seed in itertools.count(1))
        calls = itertools.chain.from_iterable(rounds)
        while session.next_step():
            made = next(calls)
            tokens = sum(len(ids) for some in made for ids in some)
            told = {"prompts": len(made), "answers": sum(map(len, made))}
            session.done(lambda tokens=tokens: tokens, also=lambda seconds, told=told: told)


if __name__ == "__main__":
    serve(train)
