"""The trainer, top to bottom: config -> data -> model -> stages -> model folder."""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape

from fastdpo.config.keys import Config
from fastdpo.data.groups import Limits, load_groups
from fastdpo.data.packing import epoch_order
from fastdpo.data.pairs import BY_GAP, flip_pairs, select_pairs
from fastdpo.doctor import settle_backends
from fastdpo.errors import ConfigError, ModelError
from fastdpo.files import durable
from fastdpo.model.policy import Policy, load_model_config, load_policy, load_tokenizer, save_model
from fastdpo.model.support import prepare
from fastdpo.objectives import check_rows, make_objective
from fastdpo.optim.library import check_library
from fastdpo.optim.optimizers import check_schedule
from fastdpo.planning.choose import choose
from fastdpo.publish.hub import check_hub, push
from fastdpo.publish.model_card import add_card
from fastdpo.records import PreferenceGroup
from fastdpo.reference.cache_file import CacheFile, cache_path
from fastdpo.reference.columns import reference_columns
from fastdpo.reference.fill import load_reference
from fastdpo.reference.fingerprint import reference_fingerprint
from fastdpo.training import checkpoint
from fastdpo.training.failures import check_weights
from fastdpo.training.folder import RUN_FILES, clear, free_folder, only_run_in, open_run
from fastdpo.training.resume import check_same_run, check_start, find_checkpoint, rows_digest
from fastdpo.training.run import Place, Run
from fastdpo.training.stage import Stage
from fastdpo.training.stopping import Stopping
from fastdpo.training.trackers import check_trackers, open_trackers


def train(config: Config, console: Console | None = None) -> Path:
    """Runs a config's stages and returns the run folder; the trained model is in its `model/`.

    Raises Stopped after SIGINT or SIGTERM, with a checkpoint written once there was a step to save.
    """
    console = console or Console()
    for stage in config.per_stage():  # what is wrong shows before any work
        objective = make_objective(stage)
        if stage.flip_pairs and "ordered scores" in objective.needs:
            raise ConfigError(f"flip_pairs: flipped pairs contradict the scores that {objective.name} reads")
        check_schedule(stage)
        check_library(stage)
    if config.pair_gap == "logp" and all(stage.pairs not in BY_GAP for stage in config.per_stage()):
        raise ConfigError(f"pair_gap: logp is read only with pairs: {', '.join(BY_GAP)}")
    check_trackers(config.trackers)
    check_hub(config.push_to_hub)
    folder = free_folder(config)
    with Stopping(console) as stopping, only_run_in(folder):
        for place in (folder, folder / "checkpoints"):
            durable.recover(place)
        found, passed = find_checkpoint(folder, config, console)
        tokenizer = load_tokenizer(config)
        model_config = load_model_config(config)  # a wrong model or max_length shows before the data is read
        groups, eval_groups, reports = load_data(config, tokenizer, console)
        settle_backends(console)  # what is left out changes the plan
        config = choose(config, model_config, groups, console)
        for stage in config.per_stage():
            check_rows(make_objective(stage), groups)
            check_rows(make_objective(stage), eval_groups, "eval_data")
            if stage.flip_pairs:
                flipped, _ = flip_pairs(select_pairs(groups, stage.pairs)[0], stage.flip_pairs, stage.seed)
                check_rows(make_objective(stage), flipped)
        data = rows_digest(groups, eval_groups)
        check_same_run(found, config, data, len(groups))
        policy = load_policy(config, console)
        check_vocabulary(policy, groups + eval_groups)
        prepare(policy, groups, console)
        check_cache(config, console)
        checkpoint.set_aside(folder / "checkpoints", passed)
        with undone_if_refused(folder):
            open_run(folder, config, reports, found and found.state, console)
            trackers = open_trackers(config.trackers, folder, vars(config), found and found.step, console)
            with contextlib.closing(trackers):
                run = Run(folder, config, console, stopping, data, trackers)
                stopping.saves = True
                with run.told(found, passed):
                    run_stages(run, policy, tokenizer, groups, eval_groups, found)
                    check_weights(policy)
                    with durable.new_folder(folder / "model") as part:
                        save_model(policy, tokenizer, part)
                        add_card(folder, part, console)
    where = escape(f"the model is in {folder}/model, what happened in {folder}/report.html")
    console.print(f"[bold]done:[/] {where}", soft_wrap=True)
    if config.push_to_hub is not None:
        push(folder / "model", config.push_to_hub, console)
    return folder


def check_cache(config: Config, console: Console) -> None:
    """Raises ConfigError where the reference cache cannot be opened."""
    path = cache_path(config.reference_cache)
    if path is not None and any(make_objective(stage).needs_reference for stage in config.per_stage()):
        with contextlib.closing(CacheFile(path, console)) as cache:
            cache.run(lambda db: None)


@contextlib.contextmanager
def undone_if_refused(folder: Path):
    """A run that turns out to be misconfigured before its first checkpoint leaves no run behind."""
    try:
        yield
    except ConfigError:
        if not checkpoint.found(folder / "checkpoints"):
            clear(folder, set(RUN_FILES) - {"checkpoints"})
        raise


def run_stages(run: Run, policy: Policy, tokenizer, groups, eval_groups, found) -> None:
    """Each stage from where it stands: `found` is the checkpoint to go on from, or None."""
    shown = spread(eval_groups or groups, run.config.samples)
    if found is None:
        run.sample(policy, tokenizer, shown, "start")
    else:
        run.place = Place(found.state["stage"], found.state["first"], found.state["start"])
        if run.place.start:
            checkpoint.load(run.checkpoints / run.place.start).load_weights(policy)
    for number, config in enumerate(run.config.per_stage()):
        if number < run.place.stage:
            continue
        resumed = found if found and number == found.state["stage"] else None
        progress = run_stage(run, config, policy, groups, eval_groups, resumed)
        run.end_stage(policy, progress)
    run.sample(policy, tokenizer, shown, "end")


def spread(groups: list[PreferenceGroup], count: int) -> list[PreferenceGroup]:
    """At most `count` groups with different prompts, from all over the list."""
    different = list({group.prompt.tobytes(): group for group in reversed(groups)}.values())[::-1]
    return different[:: max(1, len(different) // max(1, count))][:count]


def run_stage(run: Run, config: Config, policy: Policy, groups, eval_groups, resumed):
    """Makes a stage's pairs and reference, while the policy stands at its start weights, and runs it."""
    place = run.place
    run.log.stage = place.stage
    expected = resumed.state["namespace"] if resumed else None
    groups = stage_groups(run, config, policy, groups, expected)
    stage = Stage(config, policy, groups, eval_groups)
    place.total, place.namespace = stage.total, None
    if stage.objective.needs_reference:
        stage.reference, place.namespace = make_reference(run, stage, expected)
    if place.namespace is None:
        place.namespace = reference_fingerprint(policy, run.fresh_lora).namespace
        check_start(expected, place.namespace)
    run.events.add("stage", stage=place.stage, **run.log.announce(stage))
    return stage.run(run, resumed)


def stage_groups(run: Run, config: Config, policy: Policy, groups, expected: str | None):
    """A stage's training rows with the pairs that its config selects, and the noise it asks for."""
    reference = lambda: compute_reference(run, policy, [groups], config.max_tokens, expected)
    groups, left_out = pairs_of_stage(config, groups, reference)
    facts = {"left_out": dict(left_out)} if left_out else {}
    if left_out:
        by = f" (by {config.pair_gap})" if config.pairs in BY_GAP else ""
        text = f"pairs: {config.pairs}{by} leaves out {left_out['pairs']:,} pairs and "
        text += f"{left_out['responses']:,} responses; in {left_out['one_loser']:,} rows the best response "
        run.console.print(f"{text}beats one only, which every rule takes", highlight=False, soft_wrap=True)
    if config.flip_pairs:
        groups, flipped = flip_pairs(groups, config.flip_pairs, config.seed)
        facts["flipped_rows"] = len(flipped)
        text = f"[yellow]flip_pairs: turned in {len(flipped):,} of {len(groups):,} rows, on purpose"
        run.console.print(text, highlight=False)
    if facts:
        run.events.add("pairs", stage=run.place.stage, pairs=config.pairs, **facts)
    return groups


def pairs_of_stage(config: Config, groups, reference: Callable):
    """What `select_pairs` makes of a config; `reference()` gives the log-probs of all responses, where the
    config tells pairs by them."""
    if config.pairs not in BY_GAP or config.pair_gap != "logp":
        return select_pairs(groups, config.pairs)
    table = reference()
    ends = [np.cumsum([int(r.target_mask.sum()) for r in group.responses])[:-1] for group in groups]
    values = [table.of([group]).double().numpy() for group in groups]
    sums = [[part.sum() for part in np.split(*pair)] for pair in zip(values, ends)]
    return select_pairs(groups, config.pairs, sums)


def make_reference(run: Run, stage: Stage, expected: str | None):
    """The reference's log-probs, from the data's own columns, or looked up and computed, and then also the
    namespace of the start weights."""
    sets = stage.reference_sets()
    sums_do = not stage.objective.mismatched and "per-token reference" not in stage.objective.needs
    path = cache_path(run.config.reference_cache)
    if run.place.start is None and path and sums_do:  # the columns are of the model the run starts from
        columns = reference_columns(sets, run.console)
        if columns:
            run.events.add("reference", stage=run.place.stage, **columns.account)
            return columns, None
    table = compute_reference(run, stage.policy, sets, stage.config.max_tokens, expected)
    source = "computed" if table.account["file"] is None else "cache"
    run.events.add("reference", stage=run.place.stage, source=source, **table.account)
    return table, table.account["namespace"]


def compute_reference(run: Run, policy: Policy, sets, max_tokens: int, expected: str | None):
    """The reference of sets of groups, looked up and computed: the policy as it stands."""
    return load_reference(
        policy,
        sets,
        path=cache_path(run.config.reference_cache),
        fresh_lora=run.fresh_lora,
        max_tokens=max_tokens,
        console=run.console,
        check=run.stopping.check,
        expected_namespace=expected,
    )


def fill_reference(config: Config, console: Console | None = None) -> None:
    """Computes the reference's log-probs of a config's first stage into the cache, and trains nothing."""
    console = console or Console()
    first = config.per_stage()[0]
    if not make_objective(first).needs_reference:
        raise ConfigError(
            "objective: the first stage needs no reference, and what later stages refer to is not trained yet"
        )
    path = cache_path(config.reference_cache)
    if path is None:
        raise ConfigError("reference_cache: off leaves nothing to fill; name a file, or auto")
    with Stopping(console) as stopping:
        tokenizer = load_tokenizer(config)
        model_config = load_model_config(config)
        groups, eval_groups, _ = load_data(config, tokenizer, console)
        settle_backends(console)  # what is left out changes the plan
        config = choose(config, model_config, groups, console)
        first = config.per_stage()[0]
        check_rows(make_objective(first), groups)
        check_rows(make_objective(first), eval_groups, "eval_data")
        policy = load_policy(config, console)
        check_vocabulary(policy, groups + eval_groups)
        prepare(policy, groups, console)
        stopping.saves = True
        fill = lambda sets: load_reference(
            policy,
            sets,
            path=path,
            fresh_lora=config.lora_rank is not None,
            max_tokens=first.max_tokens,
            console=console,
            check=stopping.check,
        )
        groups, _ = pairs_of_stage(first, groups, lambda: fill([groups]))
        fill(Stage(first, policy, groups, eval_groups).reference_sets())


def load_data(config: Config, tokenizer, console: Console):
    """(training groups, evaluation groups, the account of every row for data_report.json)."""
    limits = Limits(config.max_length, config.truncation)

    def load(spec):
        groups, report = load_groups(
            spec, tokenizer, limits, strict=config.strict, console=console, data_format=config.data_format
        )
        report.print(console)
        return groups, report.to_dict()

    groups, report = load(config.data)
    if isinstance(config.eval_data, str):
        eval_groups, eval_report = load(config.eval_data)
        return groups, eval_groups, {"data": report, "eval_data": eval_report}
    held = math.ceil((config.eval_data or 0) * len(groups))
    order = epoch_order(len(groups), config.seed, epoch=2**31)  # a stream that no training reaches
    eval_groups = [groups[i] for i in sorted(order[:held])]
    groups = [groups[i] for i in sorted(order[held:])]
    if not groups:
        raise ConfigError(f"eval_data: {config.eval_data} of {held} groups leaves none to train on")
    if held:
        console.print(f"eval_data: {held} of {held + len(groups)} groups split off by seed")
    split = {"split_off": held, "rows": [g.row for g in eval_groups]}
    return groups, eval_groups, {"data": report, "eval_data": split}


def check_vocabulary(policy: Policy, groups: list[PreferenceGroup]) -> None:
    size = policy.core.get_input_embeddings().weight.shape[0]
    for group in groups:
        largest = max(group.prompt.max(), *(r.ids.max() for r in group.responses))
        if largest >= size:
            raise ModelError(
                f"row {group.row}: token id {largest}, but the model embeds only {size} ids: "
                "the tokenizer is of another model"
            )
