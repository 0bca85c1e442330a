"""What a stage starts with: its pairs, and the reference's log-probs, those of its start weights."""

from collections.abc import Callable
from typing import Any

from fastdpo.data.pairs import BY_GAP, flip_pairs, select_pairs
from fastdpo.data.store.stored import facts_of
from fastdpo.records import Groups
from fastdpo.reference.columns import reference_columns
from fastdpo.reference.fill import ReferenceTable
from fastdpo.training.job import StageJob
from fastdpo.training.run import Run
from fastdpo.training.stage import Stage

Fill = Callable[[list[Groups]], ReferenceTable]  # looks up and computes, under the policy as it stands


def stage_groups(run: Run, job: StageJob, fill: Fill) -> Groups:
    """A stage's training rows with the pairs that it selects, and the noise that it asks for."""
    groups, left_out = pairs_of_stage(job, run.groups, fill)
    facts: dict[str, Any] = {}
    if left_out:
        facts["left_out"] = dict(left_out)
        by = f" (by {job.pair_gap})" if job.pairs in BY_GAP else ""
        text = f"pairs: {job.pairs}{by} leaves out {left_out['pairs']:,} pairs and "
        text += f"{left_out['responses']:,} responses; in {left_out['one_loser']:,} rows the best response "
        run.console.print(f"{text}beats one only, which every rule takes", highlight=False, soft_wrap=True)
    if job.flip_pairs:
        groups, flipped = flip_pairs(groups, job.flip_pairs, job.seed)
        facts["flipped_rows"] = len(flipped)
        text = f"[yellow]flip_pairs: turned in {len(flipped):,} of {len(groups):,} rows, on purpose"
        run.console.print(text, highlight=False)
    if facts:
        run.event("pairs", stage=run.place.stage, pairs=job.pairs, **facts)
    return groups


def pairs_of_stage(job: StageJob, groups, fill: Fill):
    """What `select_pairs` makes of its rows, by the reference's log-probs where pairs are told by them."""
    if not job.by_logp:
        return select_pairs(groups, job.pairs)
    return select_pairs(groups, job.pairs, fill([groups]).sums(facts_of(groups)))


def make_reference(run: Run, stage: Stage, fill: Fill):
    """The reference's log-probs, from the data's own columns, or looked up and computed, and then also the
    namespace of the start weights."""
    sets = stage.reference_sets()
    sums_do = not stage.objective.mismatched and "per-token reference" not in stage.objective.needs
    kept = run.job.reference_cache != "off"
    if run.place.start is None and kept and sums_do:  # the columns are of the model the run starts from
        if columns := reference_columns(sets, run.console):
            run.event("reference", stage=run.place.stage, **columns.account)
            return columns, None
    table = fill(sets)
    source = "computed" if table.account["file"] is None else "cache"
    run.event("reference", stage=run.place.stage, source=source, **table.account)
    return table, table.account["namespace"]
