"""The seam between backends: each is a module with two functions, and here is what goes between them.

    forward(head, hidden, target, how, stats=()) -> (State, {stat: [M]})
    gradients(head, hidden, target, how, state, need, d_logp, d_entropy=None, into=Gradients(), wide=False)
        -> Gradients

of hidden [M, D] and target i64[M], as `how` says: a Plan without parts. Log-probs come first, gradients once
the loss knows how much of each it wants:

d_logp, d_entropy   [M], the upstream gradients; d_logp may be a number, d_entropy None
need                a Gradients of booleans
into                wide Gradients of the parameters: where it has one, this call's is added to it
wide                the parameters' gradients in the dtype of logp, instead of their own

A kept matrix serves any number of backwards, a frozen head's sums serve one. A gradient through entropy
computes the logits again, whatever is kept.

Letters: M scored rows, D hidden, V vocab.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Generic, TypeVar

import torch

from .head import Head, HiddenGrad
from .ops import empty
from .tiles import backend_of

T = TypeVar("T")


@dataclass
class State:
    """What a forward leaves for the gradients. Of each row [M]: p = exp(z - peak) / total, but Triton's
    kernels have the peak in bits, and not the greatest logit."""

    peak: torch.Tensor
    total: torch.Tensor
    target_logit: torch.Tensor
    logp: torch.Tensor
    entropy: torch.Tensor | None = None  # where it was named
    # plan keep: E, [V, M] by torch, else row by row [M, V and padding], at the target 0 or, by Triton, E less
    # the total; and, where each chunk of E is relative to a peak of its own, those: [chunks, M]
    kept: torch.Tensor | None = None
    peaks: torch.Tensor | None = None
    # plan frozen: sum over v of E_v W_v without the target, f32[M, D] by Triton
    sums: torch.Tensor | HiddenGrad | None = None


@dataclass
class Gradients(Generic[T]):
    """Of hidden, weight, bias, and the LoRA's A and B; None where nobody asked."""

    hidden: T | None = None
    weight: T | None = None
    bias: T | None = None
    lora_a: T | None = None
    lora_b: T | None = None

    @staticmethod
    def like(
        head: Head, need: "Gradients[bool]", into: "Gradients[torch.Tensor]", dtype: torch.dtype | None = None
    ) -> "Gradients[torch.Tensor]":
        """For the head's parameters of `need`: those of `into`, and where it has none uninitialised ones, in
        the parameters' dtypes or in `dtype`."""
        new = lambda p: empty(*p.shape, dtype=dtype or p.dtype, device=p.device)
        names = [name for name in ("weight", "bias", "lora_a", "lora_b") if getattr(need, name)]
        there = {name: getattr(into, name) for name in names}
        return Gradients(**{n: new(getattr(head, n)) if t is None else t for n, t in there.items()})


NONE: Gradients[torch.Tensor] = Gradients()


def backend_for(head: Head, hidden: torch.Tensor) -> ModuleType:
    """The module that takes these tensors."""
    if backend_of(hidden, head.weight, head.lora_a is not None) == "triton":
        from . import triton_head  # needs triton

        return triton_head
    from . import chunked

    return chunked


def factors(head, state, d_logp, d_entropy):
    """(factor, by_logit or None), [M]: dZ = exp(z - peak) * (factor + by_logit * (z - peak))."""
    factor = -head.scale * d_logp / state.total
    if d_entropy is None:
        return factor, None
    # dH/dz = -p (log p + H) and log p = (z - peak) - log(total)
    by_logit = -head.scale * d_entropy / state.total
    return factor + by_logit * (state.entropy - torch.log(state.total)), by_logit


def target_coefficient(head, state, d_logp, d_entropy=None):
    """d Loss / d(the target's logit before cap and scale), for upstream gradients; all [M]."""
    out = d_logp * -torch.expm1(state.logp)
    if d_entropy is not None:
        p = state.logp.exp()
        out = out - d_entropy * (p * state.entropy - torch.special.entr(p))
    if head.softcap is not None:
        out = out * head.slope(state.target_logit)
    return out * head.scale
