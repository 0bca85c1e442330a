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
from fastdpo.sampling.engine import check_engine
from fastdpo.sampling.rows import Answered, RoundFile, ask, places_of, seed_of
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


def _sample(config: Config, output: Path, console: Console, around: Around, world: World) -> list[Answered]:
    job = job_of(config)
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
        places = places_of(len(groups), count, 1, config.seed)
        asked = ask([groups[i] for i in places], job.sample, 1, config.seed, limit_of(policy, job))
        namespace = reference_fingerprint(policy, fresh_lora=False).namespace
        key = durable.json_digest([namespace, rows_digest(groups), config.sample, config.seed, config.reward])
        file = RoundFile(output, key)
        if world.told(lambda: output.exists() and not file.is_own()):
            raise ConfigError(
                f"--output: {output} holds something else than samples of this config; name another"
            )
        stopping.saves = True  # what has been sampled is in the file
        drawing = drawing_of(job, policy, tokenizer, groups, scorer, console, stopping.check)
        out = drawing.draw(asked, seed_of("samples", config.seed, 1), file)
    if scores := [score for one in out for score in one.scores if score is not None]:
        console.print(f"{len(scores):,} samples, score {np.mean(scores):.3f} on average", highlight=False)
    console.print(f"[bold]written:[/] {escape(str(output))}", soft_wrap=True)
    return out
