"""A head whose vocabulary lies in slices on the ranks of a process group.

Each rank runs its slice as if it were a whole vocabulary; what its rows need of the others is here. A forward
has two collectives of a few [M] each, by Triton three, or five with stats; hidden's gradient has one of fp32
[M, D], A's one of [M, r], in the forward where the head is frozen. All ranks must ask for the same results,
have a token of the vocabulary at least, and have frozen heads or trained ones; the slices begin at token 0.
Sums over another number of ranks have another order, and so other bits. Credit: Megatron-LM's
vocabulary-parallel cross-entropy (Shoeybi et al. 2019), which reduces the same; CCE's VocabParallelOptions.

Letters: M scored rows, V tokens of this rank's slice, T tiles of it.
"""

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from .checks import check_owners


class VocabGroup:
    """A rank's slice of V tokens, from whose first on target i64[M] counts. group: its name, as in operators
    that are torch's own collectives. frozen: the plan is."""

    def __init__(self, group, weight, frozen=False):
        self.process_group, self.V = distributed_c10d._resolve_process_group(group), len(weight)
        self.frozen = frozen

    def sum(self, tensor, op=dist.ReduceOp.SUM):
        """The tensor of all ranks added up, in place; where op says so, the greatest."""
        dist.all_reduce(tensor, op, group=self.process_group)
        return tensor

    def own(self, value, target):
        """(value [M] where the target is in this slice, else 0; a token of this slice in any case)."""
        inside = target.clamp(0, self.V - 1)
        return torch.where(target == inside, value, 0), inside

    def merge(self, softmax, target, nats=1.0):
        """Makes chunk.py's Softmax of a slice, [M] or by its tiles [T, M], the one of the whole vocabulary.
        Returns how many tokens that has, [M]. nats: in a unit of `peak`.

        Raises ValueError on a CPU for a target that no slice or several have, and where only some ranks have
        a frozen head, whose collectives are others; elsewhere the rows are NaN."""
        peaks = torch.atleast_2d(softmax.peak)
        softmax.peak = self.sum(peaks.amax(0), dist.ReduceOp.MAX)
        step = (peaks - softmax.peak) * nats
        shrink = step.exp()
        sums = {"rest": softmax.rest * shrink}
        if softmax.plogp is not None:
            sums["plogp"] = shrink * (softmax.plogp + step * softmax.rest)
        if softmax.squares is not None:
            sums["squares"] = softmax.squares * shrink**2
        if softmax.logits is not None:
            sums["logits"] = torch.atleast_2d(softmax.logits)
        logit, ones = self.own(softmax.target_logit, target)[0], torch.ones_like(softmax.target_logit)
        kind = self.own(ones, target)[0], self.frozen * ones, (not self.frozen) * ones
        mine = (logit, *kind, self.V * ones, *(each.sum(0) for each in sums.values()))
        logit, owners, frozen, others, V, *whole = self.sum(torch.stack(mine))
        alike = (frozen == 0) | (others == 0)
        if target.device.type == "cpu":
            check_owners(owners, alike)
        softmax.target_logit = torch.where((owners == 1) & alike, logit, float("nan"))
        for name, value in zip(sums, whole):
            setattr(softmax, name, value)
        return V
