"""The head over some rows in two steps, by the Triton kernels: log-probs now, gradients once the loss
knows how much of each it wants.

Letters: M scored rows, D hidden, V vocab.
"""

import torch

from .chunked import Gradients
from .triton_head import buffer, frozen_gradient, gradients, scan, spans, tile_for


class TritonPass:
    """hidden [M, D], target i64[M] as `how` says: a Plan without parts."""

    def __init__(self, head, hidden, target, how, stats=()):
        self.head, self.x, self.target = head, hidden.contiguous(), target
        self.tile = tile_for(head, self.x)
        self.spans = spans(len(head.weight), how, self.tile)
        self.padded = self.kept = self.sums = None
        if how.name == "keep":
            self.padded = buffer(len(self.x), len(head.weight), self.x)
            self.kept = self.padded[:, : len(head.weight)]
        elif how.name == "frozen":
            self.sums = torch.zeros(self.x.shape, dtype=torch.float32, device=self.x.device)
        self.rows, self.stats = scan(
            *(head, self.x, target, self.spans, self.tile), stats=stats, kept=self.kept, sums=self.sums
        )
        self.logp = self.rows.logp  # f32[M]

    def gradients(self, need, d_logp, into=None, wide=False) -> Gradients:
        """Of sum(d_logp * logp), d_logp f32[M]; see `triton_head.gradients`."""
        if self.sums is None:
            return gradients(
                *(self.head, self.x, self.target, self.spans, self.tile, self.rows, need),
                d_logp=d_logp,
                kept=self.kept,
                into=into,
                wide=wide,
            )
        out = torch.empty_like(self.x)
        frozen_gradient(self.head, self.x, self.target, self.rows, self.sums, d_logp, out)
        return Gradients(hidden=out)
