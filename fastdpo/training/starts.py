"""What a stage starts with: its pairs, and the reference's log-probs, those of its start weights."""

from collections.abc import Callable

import numpy as np

from fastdpo.data.pairs import BY_GAP, flip_pairs, select_pairs
from fastdpo.model.policy import Policy
from fastdpo.reference.cache_file import cache_path
from fastdpo.reference.columns import reference_columns
from fastdpo.reference.fill import load_reference
from fastdpo.training.job import StageJob
from fastdpo.training.run import Run
from fastdpo.training.stage import Stage


def stage_groups(run: Run, job: StageJob, policy: Policy, groups, expected: str | None):
    """A stage's training rows with the pairs that it selects, and the noise that it asks for."""
    reference = lambda: compute_reference(run, policy, [groups], job.max_tokens, expected)
    groups, left_out = pairs_of_stage(job, groups, reference)
    facts = {"left_out": dict(left_out)} if left_out else {}
    if left_out:
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
        run.events.add("pairs", stage=run.place.stage, pairs=job.pairs, **facts)
    return groups


def pairs_of_stage(job: StageJob, groups, reference: Callable):
    """What `select_pairs` makes of a stage's rows; `reference()` gives the log-probs of all responses, where
    pairs are told by them."""
    if not job.by_logp:
        return select_pairs(groups, job.pairs)
    table = reference()
    ends = [np.cumsum([int(r.target_mask.sum()) for r in group.responses])[:-1] for group in groups]
    values = [table.of([group]).double().numpy() for group in groups]
    sums = [[part.sum() for part in np.split(*pair)] for pair in zip(values, ends)]
    return select_pairs(groups, job.pairs, sums)


def make_reference(run: Run, stage: Stage, expected: str | None):
    """The reference's log-probs, from the data's own columns, or looked up and computed, and then also the
    namespace of the start weights."""
    sets = stage.reference_sets()
    sums_do = not stage.objective.mismatched and "per-token reference" not in stage.objective.needs
    path = cache_path(run.job.reference_cache)
    if run.place.start is None and path and sums_do:  # the columns are of the model the run starts from
        columns = reference_columns(sets, run.console)
        if columns:
            run.events.add("reference", stage=run.place.stage, **columns.account)
            return columns, None
    table = compute_reference(run, stage.policy, sets, stage.job.max_tokens, expected)
    source = "computed" if table.account["file"] is None else "cache"
    run.events.add("reference", stage=run.place.stage, source=source, **table.account)
    return table, table.account["namespace"]


def compute_reference(run: Run, policy: Policy, sets, max_tokens: int, expected: str | None):
    """The reference of sets of groups, looked up and computed: the policy as it stands."""
    return load_reference(
        policy,
        sets,
        path=cache_path(run.job.reference_cache),
        fresh_lora=run.fresh_lora,
        max_tokens=max_tokens,
        console=run.console,
        check=run.stopping.check,
        expected_namespace=expected,
    )
