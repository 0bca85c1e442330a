"""`fastdpo sample`: one round's prompts, answered and scored, to a file of ranked rows, and nothing is
trained."""

from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape

from fastdpo.config.keys import Config
from fastdpo.distributed.world import World, joined
from fastdpo.errors import ConfigError
from fastdpo.files import durable
from fastdpo.reference.fingerprint import reference_fingerprint
from fastdpo.sampling.calls import seed_of
from fastdpo.sampling.engine import check_engine
from fastdpo.sampling.rows import Answered, RoundFile, ask, places_of
from fastdpo.training.job import Around, job_of
from fastdpo.training.ranks import check_alike, quiet
from fastdpo.training.resume import rows_digest
from fastdpo.training.rounds import drawing_of, limit_of, with_room
from fastdpo.training.stopping import Stopping
from fastdpo.training.trainer import read, ready_policy, scorer_of


def sample(config: Config, output: Path, console: Console, around: Around) -> list[Answered]:
    """As fastdpo.api.sample."""
    with joined() as world:
        return _sample(config, output, console if world.first else quiet(), around, world)


def check_output(output: Path) -> None:
    """Raises ConfigError where no file can be written."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        is_new = not output.exists()
        output.open("a", encoding="utf-8").close()
        if is_new:
            output.unlink()
    except OSError as error:
        raise ConfigError(f"--output: cannot write {output}: {error.strerror}") from None


def _sample(config: Config, output: Path, console: Console, around: Around, world: World) -> list[Answered]:
    if config.rewards:
        raise ConfigError(f"objective: {config.objective} is of a reward model, which writes nothing")
    job = job_of(config)
    if world.first:
        check_output(output)
    check_engine(job.sample, job.model)
    scorer = scorer_of(job) if world.first else None
    check_alike(world)
    with Stopping(console, world) as stopping:
        job = replace(job, data=replace(job.data, prompts_only=True, eval_data=None))
        found = read(job, console, around, world, world.told(datetime.now))
        _, world, tokenizer, processor, groups, _, _ = found
        policy = ready_policy(job, groups, [], console, world, None, processor)
        policy.model.requires_grad_(False)
        groups, _ = with_room(groups, policy, job, console)
        count = min(job.sample.prompts, len(groups))
        namespace = reference_fingerprint(policy, fresh_lora=False).namespace
        limit = limit_of(policy, job)
        places = places_of(len(groups), count, 1, config.seed)
        asked = ask([groups[i] for i in places], job.sample, 1, config.seed, limit)
        key = durable.json_digest([namespace, rows_digest(groups), config.sample, config.seed, limit])
        file = RoundFile(output, key)
        if world.told(lambda: output.exists() and not file.is_own()):
            raise ConfigError(
                f"--output: {output} holds something else than samples of this config; name another"
            )
        stopping.saves = True  # what has been sampled is in the file
        drawing = replace(
            drawing_of(job, policy, tokenizer, groups, scorer, console, stopping.check), again=True
        )
        if there := world.told(lambda: len(file.read())):
            scored = "" if job.reward is None else "; all are scored anew"
            console.print(f"{output} has {there:,} of {count:,} prompts{scored}", highlight=False)
        out = drawing.draw(asked, seed_of("samples", config.seed, 1), file)
    if scores := [score for one in out for score in one.scores if score is not None]:
        console.print(f"{len(scores):,} samples, score {np.mean(scores):.3f} on average", highlight=False)
    console.print(f"[bold]written:[/] {escape(str(output))}", soft_wrap=True)
    return out
