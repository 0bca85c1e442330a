"""`memory: 24GB` in a run's config: the keys that a run chooses by it."""

import io
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from rich.console import Console

from fastdpo.config.keys import Config
from fastdpo.console.formatting import gigabytes
from fastdpo.errors import ConfigError
from fastdpo.planning import show
from fastdpo.planning.fake_model import with_head_memory
from fastdpo.planning.prediction import Prediction, selected
from fastdpo.planning.search import CHOSEN, SURE, Planner, at_default
from fastdpo.planning.target import Target
from fastdpo.values import as_bytes


def choose(
    config: Config,
    model_config,
    groups,
    console: Console,
    target: Target | None = None,
    processor: Any = None,
) -> Config:
    """The config with max_tokens, head_memory, gradient_checkpointing, activation_offloading and tiled_mlp
    such that each stage is predicted to fit `memory`; keys that are not at their defaults stay, and those
    that a stage sets. Prints what it chose and why. The same config, rows and device give the same choice.
    Raises ConfigError, with the predicted bytes by owner, where nothing fits."""
    if config.memory is None:
        return config
    target = target or (Target.here() if torch.cuda.is_available() else Target(is_cpu=True))
    budget = budget_of(config, target, console)
    assert budget is not None  # for config.memory is not
    say = partial(console.print, highlight=False, soft_wrap=True)
    chosen: dict = {}
    for own, stage in zip(config.stages or [{}], config.per_stage()):
        free = at_default(stage) - own.keys()
        # what an earlier stage needed holds for all of the run, but where this one has its own
        stage = replace(stage, **{name: value for name, value in chosen.items() if name not in own})
        planner = Planner(model_config, selected(stage, groups), target, free, processor)
        now = planner.predict(stage)
        if abs(now.total / budget - 1) < SURE:
            now = planner.predict(stage, exact=True)
        if now.total <= budget:
            say(f"memory: {show.verdict(now, budget)}, predicted")
            continue
        say("memory: it does not fit as configured: what would is searched for, which takes a while")
        found = planner.fitting(stage, budget)
        found = found and planner.checked(stage, found, budget)
        if found is None:
            raise ConfigError(_nothing_fits(planner, stage, now, budget))
        why = f"as configured {show.verdict(now, budget)} (peak in the {now.peak.where}, predicted)"
        left, total = budget - found.prediction.total, gigabytes(found.prediction.total)
        words = f"[bold]{show.words(found.changes)}[/]: {total} predicted, {gigabytes(left)} left"
        say(f"memory: {why}. Chosen: {words}")
        chosen |= found.changes
    config = replace(config, **chosen)
    # as predicted, where a run of its own would ask what is free, and one resumed on another card the first
    return config if config.head_memory else with_head_memory(config, model_config, target)


def budget_of(config: Config, target: Target, console: Console) -> int | None:
    """Bytes that a run may take: `memory`, but never more than the GPU has, which is said; without it all
    that the GPU has, or None where that is not known."""
    if config.memory is None:
        return target.memory
    budget = as_bytes("memory", config.memory)
    if target.memory is None or budget <= target.memory:
        return budget
    text = f"[yellow]memory: {config.memory} is more than the GPU has: {gigabytes(target.memory)} it is"
    console.print(text, highlight=False, soft_wrap=True)
    return target.memory


def _nothing_fits(planner: Planner, config: Config, now: Prediction, budget: int) -> str:
    """The table, as text, and what to do."""
    console = Console(width=100, record=True, file=io.StringIO(), color_system=None)
    console.print(show.owners_table(now, planner.target))
    options = [*planner.offloaded(config, budget), *planner.other_learning(config, budget)]
    if options:
        console.print(show.options_table(options, planner.time(config), budget, planner.target))
    kept = ", ".join(name for name in CHOSEN if name not in planner.left_open(config))
    kept = f" (with {kept} as the config sets them)" if kept else ""
    way_out = f"No change that was tried fits: take {show.way_out(now)}"
    if any(option.prediction.total <= budget for option in options):
        way_out = "Take one of the changes above that fit, or a shorter max_length"
    return (
        f"memory: no choice of {', '.join(CHOSEN)} fits {config.model} in {gigabytes(budget)}{kept}.\n"
        f"{console.export_text()}{way_out}"
    )
