"""A stage's held-out rows: their loss and metrics."""

import itertools
import math
from dataclasses import replace

import torch
from torch import Tensor

from fastdpo.data.packing import Packing
from fastdpo.distributed.turns import Turns
from fastdpo.errors import DeadEndError
from fastdpo.model.experts import mean_of
from fastdpo.records import ResponseLogps
from fastdpo.training.accumulate import context_of, of_ranks
from fastdpo.training.failures import WAY_OUT, memory_guard
from fastdpo.training.held_out import by_prompt
from fastdpo.training.metrics import EVAL_STATS, Progress, Sums, add_token_metrics


@torch.no_grad()
def evaluate(stage, batches: Packing, run, progress: Progress) -> None:
    """Loss and metrics of a stage's held-out rows (`batches`) as one batch, the vocabulary-wide ones too;
    after a signal they stay due. Ranks take turns at the packs."""
    sums, step = Sums(), run.place.first + progress.steps
    seen: list[ResponseLogps] = []
    stage.policy.model.eval()
    aside = stage.in_row_order(stage.eval_mismatched)
    n = len(batches)
    turns = Turns([*batches.parts, *aside.parts], stage.world)
    stopped = False
    for number, part in run.log.track(turns, len(turns), "held-out"):
        if stopped := bool(run.stopping.requested()):
            break
        batch = stage.packed(part)
        with memory_guard(step, batch, stage.explain):
            logps = stage.score(batch, EVAL_STATS).kept()
        if number is not None and number < n:
            stage.add_metrics(sums, logps)
            if logps.token_stats:  # a reward model has none
                add_token_metrics(sums, batch, logps.token_stats)
        mine = [] if number is None else [logps]
        seen += itertools.chain(*of_ranks(stage.world, mine, stage.policy.device))
    stage.policy.model.train()
    progress.evaluated = not (n and stopped)
    if not n or not progress.evaluated:
        return
    sums.all_to_first(stage.world)
    context: dict[str, Tensor | float] = {**progress.memory}
    if stage.objective.mismatched:
        context |= context_of(seen[n:], stage.policy.device)
    logps = replace(ResponseLogps.joined(seen[:n]), context=context)
    loss = stage.objective.whole(logps)
    if stage.balance:
        sums.add("aux_loss", aux_loss := mean_of(seen[:n]))
        loss = loss + stage.balance.coef * aux_loss
    sums.add("loss", loss)
    if "z0" in context:
        sums.add("z0", context["z0"])
    kl = bool(stage.reference and stage.reference.per_token)
    run.log.held_out(step, sums, by_prompt(stage.objective, logps, stage.eval_groups, kl))
    value = float(loss.double())
    progress.eval_loss = stage.world.told(lambda: value)  # which checkpoint is best hangs on its last bit
    if not math.isfinite(progress.eval_loss):
        raise DeadEndError(f"step {step}: the held-out loss is {progress.eval_loss}; {WAY_OUT}")
