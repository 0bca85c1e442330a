"""The reference model of a stage: the stage's start weights, through the policy's own code path."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from fastdpo.model import Policy
from fastdpo.records import PackedGroups


def make_reference(policy: Policy, fresh_lora: bool) -> Callable[[PackedGroups], Tensor]:
    """Call before the stage's first step. Returns batch -> reference token log-probs, f32[M].

    A fresh LoRA's start is the base model: adapters off, nothing copied. Otherwise (full fine-tuning,
    or a LoRA that an earlier stage has trained) the trained weights' start values are kept, one frozen
    copy, and swapped in for the reference's forward.
    """
    if fresh_lora:
        start_weights = policy.model.disable_adapter
    else:
        parameters = policy.trained()
        start = [p.detach().clone() for p in parameters]
        start_weights = lambda: _swapped(parameters, start)

    def reference(batch: PackedGroups) -> Tensor:
        if batch.ref_token_logp is not None:  # the cache has filled it
            return batch.ref_token_logp
        with torch.no_grad(), start_weights():
            return policy.token_logp(batch)

    return reference


@contextlib.contextmanager
def _swapped(parameters, values):
    """Exchanges the parameters' storage with `values`; no copy. No autograd graph may be alive."""

    def swap():
        for i, p in enumerate(parameters):
            p.data, values[i] = values[i], p.data

    swap()
    try:
        yield
    finally:
        swap()
