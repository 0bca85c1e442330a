"""The forward and backward of `linear_logp` as two functions of tensors, and as two opaque operators for
torch.compile, which cannot look into either backend.

Letters: M scored rows, D hidden, V vocab, r the LoRA rank.
"""

from typing import NamedTuple

import torch

from . import chunked
from .chunk import chunk_of
from .chunked import Gradients, Rows
from .head import Head, HiddenGrad
from .ops import exact_on, operand
from .plan import Plan, spans
from .tiles import backend_of, padded, takes_triton


class Saved(NamedTuple):
    """What the backward needs of the forward, beside its inputs and logp; None where it does not."""

    peak: torch.Tensor  # [M], as are the next three: see chunked.Rows
    total: torch.Tensor
    target_logit: torch.Tensor
    kept: torch.Tensor | None  # keep: [V, M], or by Triton's kernels [M, V and padding]
    peaks: torch.Tensor | None  # keep by chunks of logits: [chunks, M]
    row_grad: torch.Tensor | None  # frozen: d logp / d hidden [M, D]


def forward_pass(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    target: torch.Tensor,
    lora_scale: float,
    scale: float,
    softcap: float | None,
    stats: str,
    plan: str,
    chunks: int,
) -> list[torch.Tensor]:
    """[logp [M], the stats in order, then those of Saved that the plan, by name, has]. stats: their
    names with a comma between (an operator takes no list of names)."""
    stats = tuple(stats.split(",")) if stats else ()
    head, how = Head(weight, bias, a, b, lora_scale, scale, softcap), _how(plan, chunks, hidden)
    run = _forward_triton if takes_triton(head, hidden) else _forward_torch
    with exact_on(hidden):
        rows, values, *saved = run(head, hidden.contiguous(), target, how, stats)
    out = [rows.logp, *(values[name] for name in stats)]
    if plan != "forward":
        saved = Saved(rows.peak, rows.total, rows.target_logit, *saved)
        out += [t for t in saved if t is not None]
    return out


def backward_pass(
    d_logp: torch.Tensor | None,
    d_entropy: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    target: torch.Tensor,
    logp: torch.Tensor,
    entropy: torch.Tensor | None,
    saved: list[torch.Tensor],
    lora_scale: float,
    scale: float,
    softcap: float | None,
    plan: str,
    chunks: int,
    need: list[bool],
) -> list[torch.Tensor]:
    """The gradients of hidden, weight, bias, A and B that are in need, for the saved of forward_pass."""
    head, how = Head(weight, bias, a, b, lora_scale, scale, softcap), _how(plan, chunks, hidden)
    peak, total, target_logit, *rest = saved
    rows = Rows(peak, total, target_logit, logp, entropy)
    upstream = dict(d_logp=d_logp, d_entropy=d_entropy)
    run = _backward_triton if takes_triton(head, hidden) else _backward_torch
    kept = rest if plan == "keep" else []
    with exact_on(hidden):
        out = run(head, hidden.contiguous(), target, how, rows, Gradients(*need), kept, upstream)
    parts = (out.hidden, out.weight, out.bias, out.lora_a, out.lora_b)
    return [part.to(hidden.dtype) for part, wanted in zip(parts, need) if wanted]


def _how(name, chunks, hidden):
    return Plan(name, 0, 0, chunks, len(hidden))


def _forward_torch(head, hidden, target, how, stats):
    x = operand(hidden)
    accumulate = torch.promote_types(hidden.dtype, torch.float32)
    kept = sums = unit = None
    storage = None
    if how.name == "keep":
        storage, kept = chunk_of(head, x, target, accumulate).kept(dtype=hidden.dtype)
    elif how.name == "frozen":
        sums = HiddenGrad(head, x, accumulate)
    rows, values, peaks = chunked.scan(
        *(head, x, target, spans(len(head.weight), how.chunks)),
        accumulate=accumulate,
        stats=stats,
        kept=kept,
        hidden_grad=sums,
    )
    if sums is not None:
        sums.rescale(-head.scale / rows.total)
        sums.add_target(chunked.target_coefficient(head, rows, torch.ones_like(rows.logp)), target)
        # Rounded to hidden's dtype like the gradient it becomes: one more rounding of the size of that
        # one, for half the memory.
        unit = sums.merged().to(hidden.dtype)
    return rows, values, storage, torch.stack(peaks) if peaks else None, unit


def _backward_torch(head, hidden, target, how, rows, need, saved, upstream):
    x, kept, peaks = operand(hidden), None, None
    if saved:
        storage, peaks = saved
        _, kept = chunk_of(head, x, target, rows.logp.dtype).kept(storage)
    cuts = spans(len(head.weight), how.chunks)
    return chunked.gradients(head, x, target, cuts, rows, need, kept=kept, peaks=peaks, **upstream)


def _forward_triton(head, hidden, target, how, stats):
    from .triton_pass import TritonPass  # only here and below is triton needed

    run = TritonPass(head, hidden, target, how, stats)
    unit = (
        None if run.sums is None else run.gradients(Gradients(hidden=True), torch.ones_like(run.logp)).hidden
    )
    return run.rows, run.stats, run.padded, None, unit


def _backward_triton(head, hidden, target, how, rows, need, saved, upstream):
    from . import triton_head

    tile = triton_head.tile_for(head, hidden)
    kept = saved[0][:, : len(head.weight)] if saved else None
    cuts = triton_head.spans(len(head.weight), how, tile)
    return triton_head.gradients(head, hidden, target, cuts, tile, rows, need, kept=kept, **upstream)


compiled_forward = torch.library.custom_op("fastdpo::linear_logp", forward_pass, mutates_args=())
compiled_backward = torch.library.custom_op("fastdpo::linear_logp_backward", backward_pass, mutates_args=())


@compiled_forward.register_fake
def _(hidden, weight, bias, a, b, target, lora_scale, scale, softcap, stats, plan, chunks):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    M, V = len(hidden), len(weight)
    new = lambda *shape, dtype=wide: hidden.new_empty(shape, dtype=dtype)
    out = [new(M) for _ in range(1 + len(stats.split(",")) if stats else 1)]
    if plan != "forward":
        out += [new(M), new(M), new(M)]
    if plan == "keep":
        backend = backend_of(hidden, weight, a is not None)
        by_row = (M, padded(V, hidden.dtype))
        out.append(new(*((V, M) if backend == "torch" else by_row), dtype=hidden.dtype))
        if backend != "triton":
            out.append(new(len(spans(V, chunks)), M))
    elif plan == "frozen":
        out.append(new(*hidden.shape, dtype=hidden.dtype))
    return out


@compiled_backward.register_fake
def _(d_logp, d_entropy, hidden, weight, bias, a, b, *rest):
    return [t.new_empty(t.shape) for t, wanted in zip((hidden, weight, bias, a, b), rest[-1]) if wanted]
