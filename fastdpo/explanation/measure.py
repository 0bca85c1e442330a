"""One pass of a model, as it is or patched, over the rows that patches are tried on: log-probs, projections
and the hidden states that a KL is computed from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fastdpo_kernels import linear_logp
from torch import Tensor, nn

from fastdpo.evaluation.kl import head_of
from fastdpo.explanation.hooks import FINAL, hooks
from fastdpo.explanation.patch import Patch, patched, recorded
from fastdpo.explanation.places import Places
from fastdpo.model.policy import Policy
from fastdpo.records import Groups, PackedGroups

_NOTHING = Patch()


@dataclass(frozen=True)
class Pass:
    """What it gave, on the CPU."""

    token_logp: Tensor  # f32[M]
    projection: Tensor  # f64[R]: sum over the response's scored tokens of the final residual on the direction
    hidden: Tensor  # [K, D]: normed final states of the tokens that the KL is computed on


@dataclass(frozen=True)
class Ends:
    """What turns a final residual into log-probs: another model's, where everything is patched."""

    norm: nn.Module
    head: dict[str, Any]


@torch.no_grad()
def measure(
    policy: Policy,
    places: Places,
    parts: Sequence[Groups],
    direction: Tensor,
    at: Tensor,
    *,
    patch: Patch = _NOTHING,
    records: Sequence[Path] = (),
    ends: Ends | None = None,
    each: Callable[[], object] = lambda: None,
) -> Pass:
    """parts: as the packer cuts the rows; direction: f64[D], unit; at: i64[K], scored tokens of all parts,
    rising; records: a file of `patch.record` each part, where the patch takes recorded values. `each` is
    called after each part."""
    logps, projections, hiddens, first = [], [], [], 0
    direction = direction.to(policy.device)
    for number, part in enumerate(parts):
        batch = policy.pack(part).to(policy.device)
        values = recorded(records[number]) if records else None
        residual, hidden = _forward(policy, places, batch, patch, values)
        if ends is not None:
            with policy.autocast():
                hidden = ends.norm(residual)
        hidden = hidden.to(policy.dtype)
        head = head_of(policy) if ends is None else ends.head
        logps.append(linear_logp(hidden, target=batch.target, memory_budget=policy.head_budget, **head).cpu())
        along = residual.double() @ direction
        projections.append(torch.segment_reduce(along, "sum", offsets=batch.cu_resp).cpu())
        own = at[(at >= first) & (at < first + len(hidden))] - first
        hiddens.append(hidden[own.to(policy.device)].cpu())
        first += len(hidden)
        each()
    return Pass(torch.cat(logps), torch.cat(projections), torch.cat(hiddens))


def _forward(
    policy: Policy, places: Places, batch: PackedGroups, patch: Patch, values
) -> tuple[Tensor, Tensor]:
    """Of the scored rows what enters the final norm, and what leaves it; [M, D]."""
    entering: list[Tensor] = []
    with patched(places, patch, rows=batch.score_row, recorded=values), hooks() as on:
        on.before(places.norm, FINAL, lambda x: entering.append(x[batch.score_row]))
        hidden = policy.hidden(batch)[batch.score_row]
    return entering[-1], hidden
