"""How far a result is from the truth, and how far it may be."""

import math
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

# What is allowed, in errors of a plain torch baseline in the same dtype. A fault of a kernel is as large as
# the values themselves; a baseline's largest error differs by a factor of 2 or so between orders of sums.
TIMES = 4
# and beside them, where a baseline is luckier than its dtype: of bf16 one rounding, of fp32 what
# exponents near 40 nats are rounded to, three times over
FLOOR = {torch.bfloat16: 2**-8, torch.float32: 1e-5}


class NotHere(Exception):
    """This way cannot be tried on this machine; the message says why. No fault."""


class Measured(NamedTuple):
    """One result of a check. Right is an error that is not above what is allowed; NaN is never right."""

    what: str
    error: float
    allowed: float

    @property
    def share(self) -> float:
        """Of what is allowed; infinite for NaN."""
        if not self.error <= self.allowed:
            return math.inf if math.isnan(self.error) else max(1.0, self.error / max(self.allowed, 1e-300))
        return self.error / self.allowed if self.allowed else 0.0

    @property
    def right(self) -> bool:
        return self.error <= self.allowed


def short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def error(got: Tensor, truth: Tensor) -> float:
    """The largest error, relative to the largest true value; NaN where anything is."""
    difference = (got.double() - truth.double()).abs().max()
    return (difference / truth.double().abs().max().clamp(min=1e-300)).item()


def beside(what: str, got: Tensor, truth: Tensor, baseline: Tensor, dtype: torch.dtype) -> Measured:
    """`got` measured, with the baseline's error of the same kind."""
    return Measured(what, error(got, truth), TIMES * error(baseline, truth) + FLOOR[dtype])


def all_beside(names, leaves, got, truth, baseline, dtype: torch.dtype) -> list[Measured]:
    """The output of `got`, a function of these tensors, and each one's gradient, by these names; `truth` is
    given them in fp64."""
    wide = [leaf.double() for leaf in leaves]
    results = (_results(got, leaves), _results(truth, wide), _results(baseline, leaves))
    return [beside(*one, dtype=dtype) for one in zip(names, *results)]


def _results(function: Callable[..., Tensor], leaves) -> tuple[Tensor, ...]:
    """The output and the gradients of sum(sin(output))."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    wide = torch.promote_types(out.dtype, torch.float32)
    return out.detach(), *torch.autograd.grad(out.to(wide).sin().sum(), leaves)


def poisoned():
    """Inside, memory that torch.empty and empty_like hand out is NaN: what nobody wrote shows."""

    def filled(make):
        def made(*args, **keys):
            out = make(*args, **keys)
            return out.fill_(math.nan) if out.dtype.is_floating_point else out

        return made

    return mock.patch.multiple(torch, empty=filled(torch.empty), empty_like=filled(torch.empty_like))
