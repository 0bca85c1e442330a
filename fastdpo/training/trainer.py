"""The trainer, top to bottom: job -> data -> model -> stages -> model folder."""

import contextlib
from contextlib import nullcontext
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from fastdpo.config.keys import Config
from fastdpo.config.rewards import unread_reward_keys
from fastdpo.data.load import load_data
from fastdpo.data.pairs import flip_pairs, select_pairs
from fastdpo.data.reading_end import read_at_end
from fastdpo.data.sources import NumberedRows
from fastdpo.data.store.stored import facts_of
from fastdpo.distributed.world import World, joined
from fastdpo.errors import ConfigError, ModelError
from fastdpo.files import durable
from fastdpo.model.experts import coefficient
from fastdpo.model.loading import check_stored, load_model_config, load_policy, load_tools
from fastdpo.model.policy import Policy
from fastdpo.model.saving import save_model
from fastdpo.model.support import prepare
from fastdpo.objectives import check_rows
from fastdpo.records import Groups
from fastdpo.reference.cache_file import CacheFile, cache_path
from fastdpo.reference.fill import load_reference
from fastdpo.reference.fingerprint import reference_fingerprint
from fastdpo.sampling.scorers import Scorer, make_scorer
from fastdpo.training import checkpoint
from fastdpo.training.failures import check_weights
from fastdpo.training.folder import free_folder, only_run_in, open_run, undone_if_refused
from fastdpo.training.job import Around, Job, job_of, resolve
from fastdpo.training.metrics import Progress
from fastdpo.training.ranks import agree, check_alike, check_same_rows, placed, quiet, tell_ranks
from fastdpo.training.resume import (
    check_same_run,
    check_start,
    clock_of,
    find_checkpoint,
    head_budget_of,
    rows_digest,
)
from fastdpo.training.rounds import run_rounds
from fastdpo.training.run import Place, Run
from fastdpo.training.stage import Stage
from fastdpo.training.starts import Fill, make_reference, pairs_of_stage, stage_groups
from fastdpo.training.stopping import Stopping
from fastdpo.training.trackers import check_trackers, open_trackers
from fastdpo.values import as_list


def train(config: Config, console: Console, around: Around) -> Path:
    """As fastdpo.api.train; around: what the other rooms do around a run."""
    with joined() as world:
        console = console if world.first else quiet()
        return _train(resolve(config, world), console, around, world)


def _train(job: Job, console: Console, around: Around, world: World) -> Path:
    for text in unread_reward_keys(job.config) if job.model.rewards else ():
        console.print(text, highlight=False)
    check_trackers(job.trackers)
    around.check_hub(job.push_to_hub)
    scorer = scorer_of(job) if world.first else None
    check_alike(world)
    folder = world.told(partial(free_folder, job))
    with Stopping(console, world) as stopping, only_run_in(folder) if world.first else nullcontext():
        found, passed = world.told(partial(find_checkpoint, folder, job, console))
        clock = world.told(partial(clock_of, found))
        rows = read(job, console, around, world, clock)
        job, world, tokenizer, processor, groups, eval_groups, reports = rows
        check_stages(job, groups, eval_groups)
        data = rows_digest(groups, eval_groups)
        check_same_rows(world, groups, eval_groups)
        check_same_run(found, job, data, len(groups), console)
        tell_ranks(found, world, console)
        budget = head_budget_of(found, job)
        policy = ready_policy(job, groups, eval_groups, console, world, budget, processor)
        if world.first:
            check_cache(job, console)
        with undone_if_refused(folder) if world.first else nullcontext():
            if world.first:
                open_run(folder, job, reports, found, passed, console)
            resumed_at = found.step if found else None
            named = job.trackers if world.first else []
            trackers = open_trackers(named, folder, job.settings, resumed_at, console)
            with contextlib.closing(trackers):
                run = Run(
                    folder=folder,
                    job=job,
                    console=console,
                    stopping=stopping,
                    around=around,
                    trackers=trackers,
                    policy=policy,
                    tokenizer=tokenizer,
                    groups=groups,
                    eval_groups=eval_groups,
                    data=data,
                    clock=clock,
                    scorer=scorer,
                )
                stopping.saves = True
                with run.told(found, passed):
                    run_stages(run, found)
                    check_weights(policy)
                    save(run)
    where = escape(f"the model is in {folder}/model; open {folder}/report.html to see what happened")
    console.print(f"[bold]done:[/] {where}", soft_wrap=True)
    if job.push_to_hub is not None and world.first:
        around.push(folder / "model", job.push_to_hub, console)
    return folder


def scorer_of(job: Job) -> Scorer | None:
    """What scores samples, tried."""
    if job.reward is None:
        return None
    return make_scorer(job.reward, "reward", NumberedRows(job.data.data, job.data.data_format))


def save(run: Run) -> None:
    """Writes the run's model."""
    final = run.folder / "model"
    with durable.new_folder(final) if run.world.first else nullcontext(durable.part_of(final)) as part:
        save_model(run.policy, run.tokenizer, part)
        if run.world.first:
            run.around.add_card(run.folder, part, run.console)


def read(job: Job, console: Console, around: Around, world: World, clock: datetime | None = None):
    """(the job with what `memory` chose, the world as the model will lie in it, the tokenizer, the processor
    of a model that sees images, the rows, the held-out rows, their account)."""
    model_config = load_model_config(job.model)  # what is wrong with it shows before the data is read
    check_stored(job.model)
    tokenizer, processor = load_tools(job.model, console)
    for stage in job.stages:
        coefficient(model_config, stage.router_aux_loss_coef)
    with world.first_then_others():  # who find what it has tokenised
        groups, eval_groups, reports = load_data(job.data, tokenizer, console, clock, processor=processor)
    if job.model.rewards:
        groups, eval_groups = (read_at_end(some, tokenizer.pad_token_id) for some in (groups, eval_groups))
    with world.first_then_others():
        around.settle_backends(console)  # what is left out changes the plan
    seen = processor if have_images(groups, eval_groups) else None
    fits = lambda: around.replica_fits(job.config, model_config, groups, seen)
    world = placed(world, job, fits, console)
    choose = lambda: around.choose(job.config, model_config, groups, console, processor=seen)
    job = job_of(world.told(choose))
    return job, world, tokenizer, processor, groups, eval_groups, reports


def have_images(*sets: Groups) -> bool:
    """Whether any row has images."""
    return any(facts_of(groups).images.any() for groups in sets)


def check_stages(job: Job, groups, eval_groups) -> None:
    """Raises DataError for a row that lacks what a stage's objective reads, also once pairs are flipped.
    Rounds train samples, so it is these that are asked."""
    for stage in job.stages:
        check_rows(stage.objective, eval_groups, "eval_data")
        if job.rounds is None:
            check_rows(stage.objective, groups)
        if stage.flip_pairs:
            flipped, _ = flip_pairs(select_pairs(groups, stage.pairs)[0], stage.flip_pairs, stage.seed)
            check_rows(stage.objective, flipped)


def ready_policy(
    job: Job, groups, eval_groups, console: Console, world: World, head_budget: int | None, processor
) -> Policy:
    """The policy at its start weights, compared with the model's own logits on some of these rows.
    head_budget: bytes that its head has, where they are known before."""
    seen = processor if have_images(groups, eval_groups) else None
    policy = load_policy(job.model, console, world, seen)
    policy.saved_processor = processor
    policy.head_budget = head_budget or policy.head_budget
    for some in (groups, eval_groups):
        check_vocabulary(policy, some)
    prepare(policy, groups, console)
    agree(policy)
    return policy


def check_vocabulary(policy: Policy, groups: Groups) -> None:
    size, facts = policy.core.get_input_embeddings().weight.shape[0], facts_of(groups)
    for place in np.flatnonzero(facts.largest >= size)[:1]:
        raise ModelError(
            f"row {facts.row[place]}: token id {facts.largest[place]}, but the model embeds only {size} ids: "
            "the tokenizer is of another model"
        )


def check_cache(job: Job, console: Console) -> None:
    """Raises ConfigError where the reference cache cannot be opened."""
    path = cache_path(job.reference_cache)
    if path is not None and any(stage.objective.needs_reference for stage in job.stages):
        with CacheFile(path, console) as cache:
            cache.run(lambda db: None)


def run_stages(run: Run, found: checkpoint.Checkpoint | None) -> None:
    """Each stage from where it stands: `found` is the checkpoint to go on from, or None."""
    if found is None:
        run.sample("start")
    else:
        run.place = Place(found.state["stage"], found.state["first"], found.state["start"])
        if run.place.start:
            start = run.world.told(partial(checkpoint.load, run.checkpoints / run.place.start))
            start.load_weights(run.policy)
    for number in range(run.place.stage, len(run.job.stages)):
        resumed = found if found and number == found.state["stage"] else None
        progress = (run_rounds if run.job.rounds else run_stage)(run, resumed)
        run.end_stage(progress)
    run.sample("end")


def run_stage(run: Run, resumed: checkpoint.Checkpoint | None) -> Progress:
    """Makes a stage's pairs and reference, while the policy stands at its start weights, and runs it."""
    place, policy, expected = run.place, run.policy, resumed.state["namespace"] if resumed else None
    job = run.job.stages[place.stage]
    run.log.stage = place.stage
    options: dict[str, Any] = dict(path=cache_path(run.job.reference_cache), fresh_lora=run.fresh_lora)
    options |= dict(max_tokens=job.max_tokens, console=run.console, check=run.stopping.check)
    options |= dict(source=_source(run.job, place.stage if place.start else 0))
    fill = partial(load_reference, policy, **options, expected_namespace=expected)
    seen = policy.processor is not None
    explain = partial(run.around.explain, run.job.config.per_stage()[place.stage], policy.core.config, seen)
    stage = Stage(job, policy, stage_groups(run, job, fill), run.eval_groups, explain)
    check_same_rows(run.world, stage.groups)
    place.total, place.namespace = stage.total, None
    if stage.objective.needs_reference:
        stage.reference, place.namespace = make_reference(run, stage, fill)
    if place.namespace is None:
        place.namespace = reference_fingerprint(policy, run.fresh_lora).namespace
        check_start(expected, place.namespace)
    run.event("stage", stage=place.stage, **run.log.announce(stage))
    return stage.run(run, resumed)


def fill_reference(config: Config, console: Console, around: Around) -> None:
    """As fastdpo.api.fill_reference."""
    with joined() as world:
        _fill_reference(job_of(config), console if world.first else quiet(), around, world)


def _fill_reference(job: Job, console: Console, around: Around, world: World) -> None:
    if job.rounds is not None:
        raise ConfigError(
            "rounds: what a round refers to is computed in it, of samples that are not there yet"
        )
    if not job.stages[0].objective.needs_reference:
        raise ConfigError(
            "objective: the first stage needs no reference, and what later stages refer to is not trained yet"
        )
    path = cache_path(job.reference_cache)
    if path is None:
        raise ConfigError("reference_cache: off leaves nothing to fill; name a file, or auto")
    check_alike(world)
    with Stopping(console, world) as stopping:
        clock = world.told(datetime.now)
        job, world, _, processor, groups, eval_groups, _ = read(job, console, around, world, clock)
        first = job.stages[0]
        check_rows(first.objective, groups)
        check_rows(first.objective, eval_groups, "eval_data")
        check_same_rows(world, groups, eval_groups)
        policy = ready_policy(job, groups, eval_groups, console, world, None, processor)
        stopping.saves = True
        options: dict[str, Any] = dict(path=path, max_tokens=first.max_tokens, check=stopping.check)
        options |= dict(console=console, fresh_lora=job.model.lora_rank is not None, source=_source(job))
        fill: Fill = partial(load_reference, policy, **options)
        groups, _ = pairs_of_stage(first, groups, fill)
        fill(Stage(first, policy, groups, eval_groups).reference_sets())


def _source(job: Job, stage: int = 0) -> dict:
    """What a reference is of, as the config names it; stage: how many have trained the model before."""
    named = as_list(job.data.data) + as_list(job.data.eval_data)
    data = [name for name in named if isinstance(name, str)]
    return {"model": job.model.model, "adapter": job.model.adapter, "stage": stage, "data": data}
