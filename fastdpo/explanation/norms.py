"""What a norm does to the states that enter it, found by what it gives."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdpo.errors import ModelError

_FAR = 2.0**14  # so large that a norm's epsilon is below 1e-13 of its square


class Affine(NamedTuple):
    """A norm as norm(x) = factor * (x, less its mean where centred) / rms + bias."""

    factor: Tensor  # f64[D]
    bias: Tensor  # f64[D]
    centred: bool


@torch.no_grad()
def affine_of(norm: nn.Module, D: int) -> Affine:
    """What a norm of width D does, found by what it gives: families store w or 1 + w, and name it variously.
    A norm that computes in fp32 is found to fp32's rounding. Raises ModelError where it is no norm."""
    wide = {name: value.double().cpu() for name, value in norm.named_parameters()}
    give = lambda x: torch.func.functional_call(norm, wide, (x,)).double()
    x = torch.ones(D, dtype=torch.float64)
    x[1::2] = -1
    if D % 2:  # a mean of 0, and no entry of 0
        x[-3:] = torch.tensor([1.0, 1.0, -2.0])
    unit = x / x.square().mean().sqrt()
    bias, there = give(torch.zeros(1, D, dtype=torch.float64))[0], give(_FAR * x[None])[0]
    factor = (there - bias) / unit
    moved = give(_FAR * (x[None] + 1))[0]
    size = factor.abs().max()
    centred = bool((moved - there).abs().max() <= 1e-3 * size)
    expected = there if centred else bias + factor * (x + 1) / (x + 1).square().mean().sqrt()
    if not bool((moved - expected).abs().max() <= 1e-3 * size):
        raise ModelError(
            f"{type(norm).__name__} is neither an RMSNorm nor a LayerNorm; its factor is unknown"
        )
    return Affine(factor, bias, centred)


def folded(norm: nn.Module, p: Tensor) -> Tensor:
    """f64[D] of p [D]: g * p, with g the norm's factor; of a centring norm less its mean. So that, but for
    the norm's bias, norm(x) . p = x . folded / rms, with the rms of x, centred where the norm centres."""
    g, _, centred = affine_of(norm, len(p))
    out = g * p.double().cpu()
    return out - out.mean() if centred else out
