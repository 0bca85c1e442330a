"""The trainings behind benchmarks.learning.run: start models with ranked responses, and runs from them.

Everything is fastdpo's own path (Config, select_pairs, flip_pairs, load_reference, Stage, step_groups)
without run folders. One thread a process, so that a run gives the same numbers whatever runs beside it.
"""

import copy
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from benchmarks.learning import world
from fastdpo.config.keys import Config
from fastdpo.data.pairs import flip_pairs, select_pairs
from fastdpo.model.policy import Policy
from fastdpo.optim.optimizers import make_optimizer
from fastdpo.records import PreferenceGroup
from fastdpo.reference.fill import ReferenceTable, load_reference
from fastdpo.training.job import stage_job
from fastdpo.training.metrics import Sums, add_pair_metrics
from fastdpo.training.stage import Progress, Stage, step_groups

Groups = list[PreferenceGroup]
QUIET = Console(quiet=True)
MAX_TOKENS = 16384


@dataclass(frozen=True)
class Sizes:
    """How much of everything. `steps` are optimizer steps of a training."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    texts: int = 2000  # reviews the start model learns from
    sft_steps: int = 200
    rows: int = 768  # training prompts with ranked samples
    responses: int = 4  # samples a prompt
    held_out: int = 256  # prompts
    sampled: int = 2  # samples a held-out prompt, to measure reward and KL
    steps: int = 108
    betas: tuple[float, ...] = (0.1, 0.5, 2.0, 10.0)


FULL = Sizes()
QUICK = Sizes((0, 1), 200, sft_steps=10, rows=48, held_out=12, sampled=1, steps=3, betas=(0.1, 1.0))


@dataclass(frozen=True)
class Base:
    """What the runs of one seed start from: a model, ranked responses, and its log-probs of them."""

    policy: Policy
    groups: Groups
    held_out: Groups  # ranked responses to prompts that no pair is of
    reference: ReferenceTable
    prompts: np.ndarray | None = None  # held-out prompts to sample from, [B, PROMPT]
    rewards: np.ndarray | None = None  # of a sample of the start model for each of them, [B]

    def start(self) -> Policy:
        """A copy of the start model, to train."""
        with self.policy.stock() as model:
            policy = Policy(copy.deepcopy(model), self.policy.dtype)
        policy.set_sharing(True)
        return policy


@dataclass(frozen=True)
class Run:
    """One training from a base, and when it is measured."""

    study: str
    arm: str
    config: Config  # with stages, pairs and flip_pairs as in a user's YAML
    marks: tuple[int, ...]  # optimizer steps, over all stages, after which to measure
    measures: tuple[str, ...]  # of MEASURES
    base: str = "reviews"
    rows: int | None = None  # the first so many training rows
    responses: int | None = None  # of each row the first so many responses
    keep_reference: bool = False  # every stage refers to the start model, not to its own start

    @property
    def seed(self) -> int:
        return self.config.seed


def settings(**keys) -> Config:
    """The config that all trainings share, with some keys of its own."""
    common = dict(model="made here", data="made here", reference_cache="off", dtype="fp32")
    common |= dict(batch_size=16, learning_rate=5e-4, warmup_steps=5, max_tokens=MAX_TOKENS)
    return Config(**common | keys)


def make_base(sizes: Sizes, seed: int) -> Base:
    """The start model of a seed: SFT on reviews, then ranked samples of its own."""
    policy = world.make_policy(seed)
    policy.set_sharing(True)
    learn = settings(
        objective="sft",
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=sizes.sft_steps // 10,
        batch_size=64,
        max_steps=sizes.sft_steps,
        seed=seed,
    )
    for _ in train(
        policy, Stage(stage_job(learn), policy, world.sft_groups(world.reviews(sizes.texts, seed)), [])
    ):
        pass
    n, k = sizes.rows + sizes.held_out, sizes.responses
    others = world.reviews(2 * n, 1000 + seed)  # not the SFT's; each of their openings once
    openings = {text[: world.PROMPT].tobytes(): text[: world.PROMPT] for text in others}
    prompts = np.stack(list(openings.values())[:n])
    found, _ = world.sample(policy, prompts.repeat(k, 0), seed)
    groups = [world.ranked_group(i, p, found[i * k : (i + 1) * k]) for i, p in enumerate(prompts)]
    held_out = prompts[sizes.rows :].repeat(sizes.sampled, 0)
    before, _ = world.sample(policy, held_out, 8000 + seed)
    return Base(
        policy,
        *(groups[: sizes.rows], groups[sizes.rows :]),
        reference(policy, groups),
        held_out,
        np.array([world.reward(ids) for ids in before]),
    )


def reference(policy: Policy, groups: Groups) -> ReferenceTable:
    """The log-probs of these rows under the policy as it stands."""
    options = dict(path=None, fresh_lora=False, max_tokens=MAX_TOKENS, console=QUIET)
    return load_reference(policy, [groups], **options)


def train(policy: Policy, stage: Stage) -> Iterator[int]:
    """Trains a stage to its end; yields after each optimizer step."""
    optimizer, schedule = make_optimizer(policy, stage.job.optim, stage.total)
    progress = Progress()
    for number, groups in enumerate(step_groups(stage.groups, stage.job, stage.total), 1):
        stage.step(groups, progress, number)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        yield number


def training_rows(run: Run, base: Base) -> Groups:
    """The run's rows; those without a pair (equal scores) are left out before they are counted."""
    groups, count = base.groups, run.responses
    if count is not None:
        within = lambda group: tuple(p for p in group.pairs if max(p.winner, p.loser) < count)
        groups = [replace(g, responses=g.responses[:count], pairs=within(g)) for g in groups]
    groups = [group for group in groups if group.pairs]
    if run.rows is not None and len(groups) < run.rows:
        raise ValueError(f"{run.study}: {len(groups)} rows have a pair, {run.rows} are wanted")
    return groups[: run.rows]


def execute(run: Run, base: Base) -> list[dict]:
    """Trains, and measures after each of the run's marks."""
    policy, rows, steps, found = base.start(), training_rows(run, base), 0, []
    for number, config in enumerate(run.config.per_stage()):
        groups, _ = select_pairs(rows, config.pairs)
        groups, _ = flip_pairs(groups, config.flip_pairs, config.seed)
        stage = Stage(stage_job(config), policy, groups, [])
        starts = number == 0 or run.keep_reference
        stage.reference = base.reference if starts else reference(policy, stage.groups)
        for _ in train(policy, stage):
            steps += 1
            if steps in run.marks:
                measured = [MEASURES[name](policy, base) for name in run.measures]
                found.append({"step": steps} | {k: v for part in measured for k, v in part.items()})
    return found


def sampled(policy: Policy, base: Base) -> dict:
    """On samples for held-out prompts: mean reward, KL to the start model, how often the reward is above that
    of the start model's own sample (equal ones count half), mean length in tokens."""
    completions, logps = world.sample(policy, base.prompts, seed=7000)
    kl = world.sequence_kl(logps, base.prompts, completions, base.policy)
    rewards = np.array([world.reward(ids) for ids in completions])
    wins = (rewards > base.rewards).mean() + (rewards == base.rewards).mean() / 2
    lengths = [len(ids) for ids in completions]
    values = {"reward": rewards.mean(), "kl": kl.mean(), "win": wins, "length": np.mean(lengths)}
    return {name: float(value) for name, value in values.items()}


@torch.no_grad()
def accuracies(policy: Policy, base: Base) -> dict:
    """Held-out accuracy, the share of pairs where the log-ratio to the start model is higher for the better
    response: of all pairs, and of each row's best against its worst (easy) and its second (hard)."""
    out = {}
    for name, rule in (("accuracy", "all"), ("accuracy_easy", "easy"), ("accuracy_hard", "hard")):
        groups, _ = select_pairs([group for group in base.held_out if group.pairs], rule)
        stage, sums = Stage(stage_job(settings()), policy, [], groups), Sums()
        stage.reference = base.reference
        for batch in stage.in_row_order(groups):
            add_pair_metrics(sums, stage.score(batch), stage.objective.reward)
        out[name] = sums.means()["rewards/accuracies"]
    return out


MEASURES = {"samples": sampled, "accuracies": accuracies}


def in_processes(function, arguments: Sequence[tuple], workers: int, console: Console) -> list:
    """[function(*a) for a in arguments], by so many processes of one thread each; by none, in this one."""
    shown = partial(track, total=len(arguments), description=function.__name__, console=console)
    if not workers:
        return list(shown(function(*a) for a in arguments))
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(shown(pool.map(function, *zip(*arguments))))


def save_base(make, sizes: Sizes, seed: int, path: Path) -> None:
    torch.save(make(sizes, seed), path)


def execute_from(run: Run, path: Path) -> list[dict]:
    return execute(run, torch.load(path, weights_only=False))
