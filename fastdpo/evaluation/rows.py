"""What a model makes of preference rows: its numbers over all of them, and over the rows of each source."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from rich.console import Console

from fastdpo.console.formatting import all_ties
from fastdpo.console.progress import make_progress
from fastdpo.data.sources import sources_of
from fastdpo.data.store.facts import Facts
from fastdpo.data.store.stored import facts_of
from fastdpo.errors import ModelError
from fastdpo.evaluation.estimates import Estimate, estimate
from fastdpo.model.policy import Policy
from fastdpo.objectives import Objective, make_objective
from fastdpo.objectives.seam import Coupled, Decomposable
from fastdpo.records import Groups, ResponseLogps
from fastdpo.reference.fill import ReferenceTable
from fastdpo.training.accumulate import context_of
from fastdpo.training.held_out import Part, parts_of, prompts_of
from fastdpo.training.job import StageJob
from fastdpo.training.stage import Stage

MOST_SOURCES = 50  # that a table shows
NO_SOURCE = "(none)"


@dataclass(frozen=True)
class Rows:
    """The rows, and what is asked of them."""

    groups: Groups
    job: StageJob
    has_reference: bool
    sources: dict[str, np.ndarray] = field(default_factory=dict)  # name -> which groups, bool[G]

    @cached_property
    def facts(self) -> Facts:
        return facts_of(self.groups)

    @cached_property
    def prompt(self) -> torch.Tensor:
        """Of each response the number of its prompt, i64[R]."""
        return torch.from_numpy(prompts_of(self.groups))

    @cached_property
    def first_rows(self) -> np.ndarray:
        """Of each prompt the first row, i64[P]."""
        per_group = self.prompt.numpy()[self.facts.cu_resp[:-1]]
        return self.facts.row[np.unique(per_group, return_index=True)[1]]

    @cached_property
    def rewarded(self) -> Objective:
        """What the numbers of pairs are told by: the objective where it refers to the reference; else, beside
        a reference, DPO; and without one the log-probs alone."""
        own = self.job.objective
        if not self.has_reference:
            return replace(make_objective("sigmoid", {}), needs_reference=False, reward=None)
        if own.needs_reference and own.reward is not None:
            return own
        return make_objective("sigmoid", {"beta": own.beta} if own.beta else {})

    def stage(self, policy: Policy) -> Stage:
        """Where log-probs are computed, as in a run."""
        rewarded = self.rewarded
        job = replace(self.job, objective=replace(rewarded, only_chosen=False), router_aux_loss_coef=0.0)
        return Stage(job, policy, [], self.groups)


@dataclass(frozen=True)
class OfRows:
    """A model's numbers."""

    numbers: dict[str, Estimate]
    sources: dict[str, dict[str, Estimate]]
    margins: list[float]  # of each pair, over the reference; none without one
    ties: bool  # the model is its reference: no pair differs


@torch.no_grad()
def scored(rows: Rows, policy: Policy, reference: ReferenceTable | None, name: str, console: Console):
    """(the log-probs of all responses, on the CPU, beside the reference's; those of mismatched ones)."""
    stage = rows.stage(policy)
    stage.reference = reference
    parts = [stage.in_row_order(some) for some in (stage.eval_groups, stage.eval_mismatched)]
    seen: list[list[ResponseLogps]] = [[], []]
    with make_progress(console) as bar:
        task = bar.add_task(f"rows, {name}", total=sum(map(len, parts)), unit="packs", info="")
        for batches, found in zip(parts, seen):
            for batch in batches:
                try:
                    logps = stage.score(batch, rows.job.objective.stats)
                except torch.OutOfMemoryError:
                    tokens = batch.input_ids.numel()
                    raise ModelError(
                        f"{name}: out of GPU memory on a pack of {tokens} tokens (rows {batch.some_rows}); "
                        "lower max_length"
                    ) from None
                if not logps.token_logp.isfinite().all():
                    raise ModelError(
                        f"{name}: the log-probs of rows {batch.some_rows} are not numbers; its weights may "
                        "be broken"
                    )
                found.append(on_host(logps))
                bar.update(task, advance=1)
    return ResponseLogps.joined(seen[0]), seen[1]


def on_host(logps: ResponseLogps) -> ResponseLogps:
    tensors = {name: value for name, value in vars(logps).items() if isinstance(value, torch.Tensor)}
    values: dict[str, Any] = {name: value.cpu() for name, value in tensors.items()}
    values["token_stats"] = {name: value.cpu() for name, value in logps.token_stats.items()}
    return replace(logps, **values).kept()


def numbers(rows: Rows, logps: ResponseLogps, aside: list[ResponseLogps]) -> OfRows:
    """Of a model's log-probs, those of `scored`."""
    parts, whole = _parts(rows, logps, aside)
    over = parts.get("rewards/margins")
    ties = over is not None and all_ties(float(over[0].values.double().mean()))
    if ties:
        parts = {name: some for name, some in parts.items() if not name.startswith("rewards/acc")}
    made = _estimates(parts, rows.prompt)
    if whole is not None:
        made["loss"] = Estimate(whole)
    return OfRows(made, _by_source(rows, parts), over[0].values.tolist() if over else [], ties)


def reference_numbers(rows: Rows, logps: ResponseLogps) -> OfRows:
    """What the reference makes of the rows, by its log-probs beside another model's."""
    assert logps.ref_token_logp is not None
    alone = replace(logps, token_logp=logps.ref_token_logp)
    bare = replace(rows, job=replace(rows.job, objective=replace(rows.rewarded, reward=None)))
    parts, _ = _parts(bare, alone, [])
    parts = {name: some for name, some in parts.items() if name.startswith("logps/")}
    return OfRows(_estimates(parts, rows.prompt), _by_source(rows, parts), [], False)


def _by_source(rows: Rows, parts: dict[str, list[Part]]) -> dict[str, dict[str, Estimate]]:
    per_response = lambda here: torch.from_numpy(np.repeat(here, rows.facts.responses))
    return {name: _estimates(parts, rows.prompt, per_response(here)) for name, here in rows.sources.items()}


def _estimates(parts: dict[str, list[Part]], prompt, kept=None) -> dict[str, Estimate]:
    found = {name: estimate(some, prompt, kept) for name, some in parts.items()}
    return {name: one for name, one in found.items() if one is not None}


def _parts(rows: Rows, logps: ResponseLogps, aside: list[ResponseLogps]):
    """({number: what it is a mean of}, the loss where it is no such mean)."""
    own, rewarded = rows.job.objective, rows.rewarded
    context: dict[str, Any] = context_of(aside, "cpu") if own.mismatched else {}
    if isinstance(own, Coupled) and own.remember is not None and rows.has_reference:
        context |= own.remember(logps, {})  # as if these rows were all it had seen
    logps, whole = replace(logps, context=context), None
    of_pairs = replace(rewarded, terms=()) if isinstance(rewarded, Decomposable) else rewarded
    parts = parts_of(of_pairs, logps, kl=rows.has_reference)  # without its loss, which need not be the one
    if rows.has_reference or not own.needs_reference:
        if not isinstance(own, Decomposable):
            whole = float(own.whole(logps))
        elif loss := parts_of(own, logps, kl=False).get("loss"):
            parts["loss"] = loss
    chosen, rejected = logps.lengths[logps.winner], logps.lengths[logps.loser]
    for name in [name for name in parts if name.endswith("/accuracies")]:
        (pairs,) = parts[name]
        for which, here in (("longer", chosen > rejected), ("shorter", chosen < rejected)):
            parts[f"{name}_{which}"] = [Part(pairs.values[here], pairs.of[here])]
    return parts, whole


def won_by_length(rows: Rows) -> dict[str, Any]:
    """Of the data: the share of pairs whose chosen response has more scored tokens, ties half, and how many
    pairs each of the two accuracies is over."""
    winner, loser = rows.facts.of_pairs
    longer = np.sign(rows.facts.scored[winner].astype(np.int64) - rows.facts.scored[loser])
    part = Part(torch.from_numpy((longer + 1) / 2), torch.from_numpy(winner))
    counts = {"longer": int((longer > 0).sum()), "shorter": int((longer < 0).sum())}
    return {"share": estimate([part], rows.prompt), "pairs": len(winner), **counts}


def sources(data: str | Sequence[str], data_format, groups: Groups, console: Console):
    """({source: which groups, bool[G]} by the rows' column `source`, a note where it cannot serve). Empty
    where no row has it. The data are read once more for it, as rows and not as tokens."""
    facts, found = facts_of(groups), dict[int, str]()
    sets = [
        source.rows()
        for source in sources_of(data if isinstance(data, str) else list(data), data_format, "data")
    ]
    with make_progress(console) as bar:
        task = bar.add_task("reading the column source", total=sum(map(len, sets)), unit="rows", info="")
        for number, row in enumerate(row for rows in sets for row in rows):
            if isinstance(row, dict) and row.get("source") is not None:
                said = row["source"]
                found[number] = said if isinstance(said, str) else json.dumps(said, default=str)
            if number % 1000 == 999:
                bar.update(task, advance=1000)
    of_group = np.array([found.get(row, NO_SOURCE) for row in facts.row.tolist()])
    names, counts = np.unique(of_group, return_counts=True)
    if names.tolist() == [NO_SOURCE]:
        return {}, ""
    if len(names) > MOST_SOURCES:
        return {}, f"the column source has {len(names):,} values, too many for a table"
    return {str(names[i]): of_group == names[i] for i in np.argsort(-counts, kind="stable")}, ""
