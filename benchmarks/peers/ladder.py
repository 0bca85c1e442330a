"""What each idea of fastdpo adds, as a worker: steps that have only some of them, one more on every rung.

Option `rung`: a name of RUNGS. All rungs compute the reference's log-probs in each step, by a frozen copy
of the model (under a LoRA: with the LoRA off); the rung above them is fastdpo itself, which stores them.
"""

import contextlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers.jobs import BETA, CLIP, Job
from benchmarks.peers.ours import ENDLESS, prepare
from benchmarks.peers.session import Session, serve
from fastdpo.data.packing import pack, split_step
from fastdpo.model.policy import Policy
from fastdpo.optim.optimizers import make_optimizer
from fastdpo.records import PackedGroups, PreferenceGroup, Response, ResponseLogps

Groups = list[PreferenceGroup]


@dataclass(frozen=True)
class Rung:
    """Which ideas a step has, beside scoring only the rows that predict a response's token."""

    fused_head: bool = False
    packed: bool = False  # without padding; every response with a prompt of its own
    shared: bool = False  # each prompt once


RUNGS = {
    "scored rows": Rung(),
    "+ fused head": Rung(fused_head=True),
    "+ packing": Rung(fused_head=True, packed=True),
    "+ shared prompt": Rung(fused_head=True, packed=True, shared=True),
}


def one_response_each(group: PreferenceGroup) -> Groups:
    """The group's responses as groups of their own, without pairs: packed, each has its own prompt."""
    return [replace(group, responses=(response,), pairs=()) for response in group.responses]


def with_own_prompts(group: PreferenceGroup) -> PreferenceGroup:
    """A group that takes as many places as `one_response_each`'s together: the further prompts ride in
    front of their responses. Only for split_step to count."""
    first, *others = group.responses
    mask = np.zeros(len(group.prompt), bool)
    longer = [
        Response(np.concatenate([group.prompt, r.ids]), np.concatenate([mask, r.target_mask])) for r in others
    ]
    return replace(group, responses=(first, *longer))


def pack_apart(groups: Groups) -> PackedGroups:
    """No padding and nothing shared: the batch of `pack(groups)`, its prompts once a response."""
    whole = pack(groups)
    apart = pack([alone for group in groups for alone in one_response_each(group)])
    tokens = ("input_ids", "position_ids", "layout", "score_row", "input_tokens")
    return replace(whole, **{name: getattr(apart, name) for name in tokens})


def microbatches(groups: Groups, rung: Rung, policy: Policy, max_tokens: int) -> Iterator[PackedGroups]:
    """One step's batches under the cap that fastdpo has."""
    limits = (max_tokens, policy.max_scored)
    if rung.shared or not rung.packed:
        for part in split_step(groups, *limits, share=rung.shared):
            yield pack(part, share=rung.shared)
        return
    by_row = {group.row: group for group in groups}
    for part in split_step([with_own_prompts(group) for group in groups], *limits):
        yield pack_apart([by_row[group.row] for group in part])


def token_logp(policy: Policy, batch: PackedGroups, rung: Rung) -> Tensor:
    """log pi of each scored token, f32[M]; without the fused head by torch, from the logits [M, V]."""
    if rung.fused_head:
        return policy.token_logp(batch)
    hidden = policy.hidden(batch)[batch.score_row]
    with policy.autocast():
        logits = policy.core.get_output_embeddings()(hidden)
    return logits.float().log_softmax(-1).gather(1, batch.target[:, None])[:, 0]


def loss_sum(policy: Policy, batch: PackedGroups, reference_logp: Tensor, rung: Rung) -> Tensor:
    """Rafailov et al. 2023, eq. 7, summed over the batch's pairs."""
    ratio = ResponseLogps.of(batch, token_logp(policy, batch, rung), reference_logp).log_ratio
    winner, loser = batch.pairs.T
    return -F.logsigmoid(BETA * (ratio[winner] - ratio[loser])).sum()


def reference_policy(job: Job, policy: Policy):
    """(the policy of the reference, a context in which it is the reference)."""
    if job.lora_rank is not None:
        return policy, policy.model.disable_adapter
    copy = Policy(job.build().requires_grad_(False), job.dtype)
    copy.set_sharing(policy.share)
    return copy, contextlib.nullcontext


def train(message: dict, session: Session) -> None:
    job = Job(**message)
    rung, ready = RUNGS[job.options["rung"]], prepare(job)
    policy = ready.policy
    if not rung.packed:
        policy.set_sharing(False)
    reference, as_reference = reference_policy(job, policy)
    optimizer, schedule = make_optimizer(policy, ready.config, ENDLESS)
    session.ready(max_tokens=ready.config.max_tokens)
    for groups in itertools.cycle(ready.steps):
        if not session.next_step():
            return
        losses = []
        for batch in microbatches(groups, rung, policy, ready.config.max_tokens):
            batch = batch.to(policy.device)
            with torch.no_grad(), as_reference():
                reference_logp = token_logp(reference, batch, rung)
            loss = loss_sum(policy, batch, reference_logp, rung) / len(groups)
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(policy.trained(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        session.done(lambda losses=losses: torch.stack(losses).sum())


if __name__ == "__main__":
    serve(train)
