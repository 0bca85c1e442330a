"""The linear map under the softmax and its transpose, a chunk of the vocabulary at a time.

Letters: M scored rows, D hidden, V vocab, v a chunk of it, r the LoRA rank; x the hidden rows as
GEMM operand.
"""

import math
from dataclasses import dataclass

import torch

from .ops import matmul, matmul_add, operand
from .parallel import VocabGroup


@dataclass(frozen=True)
class Head:
    """z = softcap(scale * (h W^T + bias + lora_scale (h A^T) B^T))."""

    weight: torch.Tensor  # [V, D]
    bias: torch.Tensor | None  # [V]
    lora_a: torch.Tensor | None  # [r, D]
    lora_b: torch.Tensor | None  # [V, r]
    lora_scale: float
    scale: float
    softcap: float | None
    group: VocabGroup | None = None  # where this is a slice of the vocabulary: targets count from its start

    @property
    def ends(self):
        """(scale, softcap) as the kernels take them: no scale of 1, and under a softcap the scale that makes
        z / softcap bits of exp(2 z / softcap), of which tanh is made."""
        if self.softcap is None:
            return None if self.scale == 1 else self.scale, None
        return 2 / math.log(2) * self.scale / self.softcap, self.softcap

    def bias_of(self, span):
        return None if self.bias is None else self.bias[slice(*span)]

    def low_rank(self, x):
        """lora_scale * x A^T [M, r], or None. Of half operands [M, 2 r]: rounded to them, and beside it
        what that lost, so that logits keep their float32."""
        if self.lora_a is None:
            return None
        a, wide = operand(self.lora_a), torch.promote_types(x.dtype, torch.float32)
        out = torch.empty(len(x), len(a), dtype=wide, device=x.device)
        matmul(x, a.t(), out)
        out.mul_(self.lora_scale)
        if x.dtype == wide:
            return out
        high = out.to(x.dtype)
        return torch.cat((high, (out - high).to(x.dtype)), 1)

    def product(self, x, xa, v0, v1, out):
        """Writes h W^T and the LoRA's part of the vocabulary chunk [v0, v1) to out [v, M]."""
        matmul(operand(self.weight[v0:v1]), x.t(), out)
        if xa is not None:
            b = operand(self.lora_b[v0:v1])
            matmul_add(b if xa.shape[1] == b.shape[1] else torch.cat((b, b), 1), xa.t(), out)

    def finish_logits(self, out, v0, v1):
        """Turns the product into the final logits."""
        if self.bias is not None:
            out.add_(self.bias[v0:v1, None])
        if self.scale != 1:
            out.mul_(self.scale)
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)

    def slope(self, z, out=None):
        """dz / d(logit before the cap) = 1 - (z / c)^2, for a head with a softcap."""
        return torch.mul(z, z, out=out).mul_(-1 / self.softcap**2).add_(1)


class HiddenGrad:
    """sum_v dz_v W_v for every row, over the chunks: [M, D], and its LoRA part before A: [M, r]."""

    def __init__(self, head, x, accumulate, full=True):
        self.head = head
        zeros = lambda width: torch.zeros(len(x), width, dtype=accumulate, device=x.device)
        self.full = zeros(x.shape[1]) if full else None
        self.low = zeros(len(head.lora_a)) if head.lora_a is not None else None
        parts = ((self.full, head.weight), (self.low, head.lora_b))
        self.parts = [(part, matrix) for part, matrix in parts if part is not None]

    def rescale(self, factor):
        for part, _ in self.parts:
            part.mul_(factor[:, None])

    def add(self, dz, v0, v1):
        for part, matrix in self.parts:
            matmul_add(dz.t(), operand(matrix[v0:v1]), part)

    def add_target(self, coefficient, target):
        group = self.head.group
        if group is not None:
            coefficient, target = group.own(coefficient, target)
        for part, matrix in self.parts:
            part.addcmul_(coefficient[:, None], matrix[target].to(part.dtype))
            if group is not None:
                group.sum(part)

    def merged(self):
        """The gradient of hidden [M, D], the LoRA part included."""
        if self.low is not None:
            a = self.head.lora_a.to(self.low.dtype)
            self.full.addmm_(self.low, a, alpha=self.head.lora_scale)
        return self.full
