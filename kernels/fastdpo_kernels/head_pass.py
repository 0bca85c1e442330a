"""The head over some rows, in two steps: their log-probs now, their gradients once the loss knows how
much of each it wants.

This is the seam between backends: each is a class with `logp` and `gradients`, chosen in `head_pass`.
"""

import torch

from .chunk import chunk_of
from .chunked import Gradients, gradients, scan, target_coefficient
from .head import Head, HiddenGrad
from .ops import operand
from .plan import Plan, spans
from .tiles import takes_triton


class TorchPass:
    """By chunks of logits (chunked.py), as `how` says: a Plan without parts."""

    def __init__(self, head: Head, hidden: torch.Tensor, target: torch.Tensor, how: Plan):
        self.head, self.target, self.name = head, target, how.name
        self.x = operand(hidden.contiguous())
        self.cuts = spans(len(head.weight), how.chunks)
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        self.kept = self.row_grad = None
        if how.name == "keep":
            _, self.kept = chunk_of(head, self.x, target, accumulate).kept(dtype=hidden.dtype)
        elif how.name == "frozen":
            self.row_grad = HiddenGrad(head, self.x, accumulate)
        self.rows, _, self.peaks = scan(
            *(head, self.x, target, self.cuts),
            accumulate=accumulate,
            kept=self.kept,
            hidden_grad=self.row_grad,
        )
        self.logp = self.rows.logp  # [M], float32, or float64 for float64

    def gradients(self, need: Gradients, d_logp, into: Gradients | None = None, wide=False) -> Gradients:
        """Of sum(d_logp * logp), d_logp [M]; see `chunked.gradients`. The hidden's is new in any case."""
        if self.name != "frozen":
            return gradients(
                *(self.head, self.x, self.target, self.cuts, self.rows, need),
                d_logp=d_logp,
                kept=self.kept,
                peaks=self.peaks,
                into=into,
                wide=wide,
            )
        self.row_grad.rescale(-self.head.scale * d_logp / self.rows.total)
        self.row_grad.add_target(target_coefficient(self.head, self.rows, d_logp), self.target)
        return Gradients(hidden=self.row_grad.merged())


def head_pass(head: Head, hidden: torch.Tensor, target: torch.Tensor, how: Plan):
    """hidden [M, D], target i64[M] through the head, by the Triton kernels where they take such tensors."""
    if takes_triton(head, hidden):
        from .triton_pass import TritonPass  # needs triton

        return TritonPass(head, hidden, target, how)
    return TorchPass(head, hidden, target, how)
