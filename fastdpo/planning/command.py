"""`fastdpo plan CONFIG [--memory 24GB]`: will it fit, before any weight is loaded."""

from rich.console import Console
from transformers import ProcessorMixin

from fastdpo.config.keys import Config
from fastdpo.data.load import load_data
from fastdpo.errors import DataError, ModelError
from fastdpo.model.cards import CARDS
from fastdpo.model.loading import load_model_config, load_tools
from fastdpo.model.spec import ModelSpec
from fastdpo.planning import show
from fastdpo.planning.choose import budget_of
from fastdpo.planning.collectives import Ranks
from fastdpo.planning.prediction import assumed_groups, selected
from fastdpo.planning.ranks import rank_plans, ranks_of, taken
from fastdpo.planning.search import SURE, Option, Planner
from fastdpo.planning.target import Target
from fastdpo.training.job import check_stepping, job_of, part, stage_job
from fastdpo.values import not_one_of

WIDTH = 100


def plan(
    config: Config,
    card: str | None,
    device: str,
    console: Console | None = None,
    gpus: int | None = None,
    nodes: int = 1,
) -> bool:
    """Prints the plan of each stage, and of how several GPUs would run it; False where one does not fit, and
    nothing that leaves its learning as it is would make it. Raises ConfigError and ModelError."""
    console, ranks = console or Console(width=WIDTH), ranks_of(gpus, nodes)
    target = _target(card, device)
    stages = config.per_stage()
    for stage in stages:
        check_stepping(stage_job(stage))
    model_config = load_model_config(part(ModelSpec, config))
    groups, processor = _rows(config, console)
    budget = budget_of(config, target, console)
    fits = []
    for number, stage in enumerate(stages, 1):
        if len(stages) > 1:
            console.rule(f"stage {number}")
        fits.append(plan_stage(stage, model_config, groups, target, budget, console, ranks, processor))
    return all(fits)


def plan_stage(
    config: Config,
    model_config,
    groups,
    target: Target,
    budget,
    console,
    ranks: Ranks | None = None,
    processor: ProcessorMixin | None = None,
) -> bool:
    """Prints one stage's plan; whether it fits, or would. groups: its rows, or None where there are none to
    read. processor: what their images are read with."""
    assumed = groups is None
    rows = assumed_groups(config) if assumed else groups
    planner = Planner(model_config, selected(config, rows), target, processor=processor)
    now = planner.option(config, {})
    if budget is None or abs(now.prediction.total / budget - 1) < SURE:  # else a few layers tell enough
        now = planner.option(config, {}, exact=True)
    console.print(show.owners_table(now.prediction, target))
    lines = [show.load_line(config, planner.loads(config), assumed), show.verdict(now.prediction, budget)]
    rounds = config.rounds is not None
    lines += show.phase_lines(config, now.prediction) if rounds else []
    for line in (*lines, show.time_line(now.time, target, rounds)):
        console.print(line, highlight=False, soft_wrap=True)
    fits = None if budget is None else now.prediction.total <= budget
    would_fit = fits is not False or _search(planner, config, now, budget, console)
    if ranks is None:
        return would_fit
    return _on_ranks(planner, config, ranks, budget, fits, console) or would_fit


def _search(planner: Planner, config: Config, now: Option, budget: int, console: Console) -> bool:
    """Prints what would make it fit; whether a change that leaves the learning as it is would."""
    console.print("it does not fit: each setting that saves memory is tried, which takes a while")
    options = list(planner.singles(config))
    found = planner.fitting(config, budget)
    if found is not None:
        options = [option for option in options if option.changes != found.changes]
        found = planner.checked(config, found, budget)
    options = [option for option in options if option.prediction.total < 0.98 * now.prediction.total]
    options += [found] if found else planner.offloaded(config, budget)
    options += planner.other_learning(config, budget)
    if options:
        console.print(show.options_table(options, now.time, budget, planner.target))
    advice = _advice(options, found, budget, config.memory, now)
    console.print(f"[bold]next:[/] {advice}", highlight=False, soft_wrap=True)
    return any(option.same_learning and option.prediction.total <= budget for option in options)


def _on_ranks(
    planner: Planner, config: Config, ranks: Ranks, budget: int | None, replica: bool | None, console: Console
) -> bool:
    """Prints what each rank takes; whether it fits in the mode that the config takes. replica: whether one
    GPU could hold it all."""
    plans = rank_plans(planner, config, ranks, budget)
    console.print(show.ranks_table(plans, ranks, budget, planner.target))
    images = planner.processor is not None
    mode, why = taken(config, ranks, replica, images)
    for line in show.ranks_lines(config, ranks, mode, why, planner.target, images):
        console.print(line, highlight=False, soft_wrap=True)
    return any(plan.mode == mode and (budget is None or plan.prediction.total <= budget) for plan in plans)


def _advice(options: list[Option], found: Option | None, budget: int, memory: str | None, now: Option) -> str:
    if found is not None and memory is not None:
        return f"train: by memory: {memory} a run takes {show.words(found.changes)} by itself"
    if found is not None:
        return f"{show.words(found.changes)} (memory: in the config lets a run choose it)"
    fitting = [option for option in options if option.prediction.total <= budget]
    if not fitting:
        return f"nothing tried fits: {show.way_out(now.prediction)}"
    best = min(fitting, key=show.order)
    cost = "nothing that leaves the learning as it is fits; at the cost of another result: "
    return f"{'' if best.same_learning else cost}{show.words(best.changes)}"


def _target(card: str | None, device: str) -> Target:
    if device == "cpu":
        return Target(is_cpu=True)
    if target := Target.here() if card is None else Target.of_card(card):
        return target
    raise not_one_of("--card", card, CARDS)


def _rows(config: Config, console: Console):
    """(the training rows, the processor of a model that sees images), or None, said aloud, where they or the
    tokenizer cannot be read."""
    try:
        job = job_of(config)
        tokenizer, processor = load_tools(job.model, console)
        return load_data(job.data, tokenizer, console, processor=processor)[0], processor
    except (DataError, ModelError) as error:
        text = f"[yellow]the data was not read ({error}): rows of max_length without images are assumed"
        console.print(text, highlight=False, soft_wrap=True)
        return None, None
