"""How far a model is from its reference on its own answers: the exact KL over the whole vocabulary."""

import contextlib
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from fastdpo.console.progress import make_progress
from fastdpo.data.packing import in_row_order
from fastdpo.errors import ModelError
from fastdpo.model.policy import Policy
from fastdpo.records import Groups

_ROWS, _COLUMNS = 256, 1 << 14  # of logits at once; of the lm_head's weight that are fp32 at once


@torch.no_grad()
def sequence_kl(
    policy: Policy,
    reference: Policy | None,
    groups: Groups,
    *,
    max_tokens: int = 8192,
    console: Console | None = None,
) -> np.ndarray:
    """f64[R], in nats: of each response of the groups, in order, the sum over its scored tokens of
    KL(policy || reference) = sum over v of pi(v | prefix) (log pi(v | prefix) - log pi_ref(v | prefix)), over
    the whole vocabulary. `reference` None: the policy's own base, its adapter off.

    On responses that the policy sampled at temperature 1, their mean estimates the KL of the two
    distributions over whole responses (cut at the same length): by the chain rule (Cover and Thomas 2006,
    Elements of Information Theory, theorem 2.5.3) that is the expected sum of the steps' KLs. It is never
    negative, and varies less than the log-ratio of the samples.

    Packs of at most `max_tokens` tokens. Raises ModelError where the two do not have the same vocabulary.
    """
    other = policy if reference is None else reference
    sizes = [len(one.core.get_output_embeddings().weight) for one in (policy, other)]
    if sizes[0] != sizes[1]:
        text = f"one has {sizes[0]:,} logits a token, the other {sizes[1]:,}"
        raise ModelError(f"KL: the model and its reference are over different vocabularies ({text})")
    out = [np.zeros(0)]
    parts = in_row_order(groups, max_tokens, policy.share and other.share)
    with make_progress(console or Console(quiet=True)) as bar:
        task = bar.add_task("exact KL", total=len(parts), unit="packs", info="")
        for part in parts:
            ours, bounds = _hidden(policy, part)
            with policy.model.disable_adapter() if reference is None else contextlib.nullcontext():
                theirs, _ = _hidden(other, part)
                head = head_of(other)
            per_token = _per_token(ours, head_of(policy), theirs, head)
            out.append(torch.segment_reduce(per_token, "sum", offsets=bounds).cpu().numpy())
            bar.update(task, advance=1)
    return np.concatenate(out)


def _hidden(policy: Policy, part: Groups) -> tuple[Tensor, Tensor]:
    """(the hidden states of the scored tokens [M, D], cu_resp)."""
    batch = policy.pack(part).to(policy.device)
    return policy.hidden(batch)[batch.score_row].to(policy.dtype), batch.cu_resp


def head_of(policy: Policy) -> dict[str, Any]:
    return policy.head.tensors(policy.dtype) | dict(scale=policy.head.scale, softcap=policy.head.softcap)


def _per_token(ours: Tensor, head: dict, theirs: Tensor, reference_head: dict) -> Tensor:
    """f64[M]"""
    out = []
    for h, h_ref in zip(ours.split(_ROWS), theirs.split(_ROWS)):
        logp, ref = log_softmax(h, **head), log_softmax(h_ref, **reference_head)
        out.append((logp.exp() * (logp - ref)).sum(-1).double())
    return torch.cat(out)


def log_softmax(hidden: Tensor, weight: Tensor, bias, lora, scale: float, softcap: float | None) -> Tensor:
    """[m, V] of hidden [m, D], in fp32 (f64 of fp64)."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    hidden = hidden.to(wide)
    z = torch.cat([hidden @ some.to(wide).T for some in weight.split(_COLUMNS)], -1)
    if bias is not None:
        z += bias.to(wide)
    if lora is not None:
        a, b, s = lora
        z += s * (hidden @ a.to(wide).T) @ b.to(wide).T
    z *= scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z.log_softmax(-1)
