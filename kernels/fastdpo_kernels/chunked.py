"""The head over vocabulary chunks in plain torch: one pass for log-probs, one for gradients.

Blocks of logits are [v, M]: the vocabulary is the outer dimension, so the kept [V, M] matrix is cut
into contiguous blocks. The softmax is online: E = exp(z - peak), where peak is the greatest logit
of the row so far.

The target's own entry is left out of E. Its part of the hidden gradient is added at the end, from
the row's log-prob: (1 - p_y) W_y is exact where the model is sure, W_y minus p_y W_y is not.

Letters: M scored rows, D hidden, V vocab, v a chunk of it; x the hidden rows as GEMM operand.
"""

from dataclasses import dataclass

import torch

from .chunk import Sums, chunk_of
from .head import HiddenGrad
from .ops import empty, matmul, matmul_add

STATS = ("entropy", "log_sum_sq_probs", "mean_logit", "is_top1")


@dataclass(frozen=True)
class Rows:
    """What the gradient needs to know of each row, [M] each: p = exp(z - peak) / total."""

    peak: torch.Tensor
    total: torch.Tensor
    target_logit: torch.Tensor
    logp: torch.Tensor
    entropy: torch.Tensor | None


def scan(head, x, target, spans, *, accumulate, stats=(), kept=None, hidden_grad=None):
    """One pass over the vocabulary. x [M, D], target i64[M], accumulate: the dtype of logits and
    results.

    kept [V, M] is filled with E (times the softcap's slope, 0 at the target), each chunk relative
    to its own peak. hidden_grad gathers sum_v E_v W_v. Returns (Rows, stats by name, the chunks'
    peaks).
    """
    chunk = chunk_of(head, x, target, accumulate)
    sums = Sums.start(len(x), stats, torch.empty(0, dtype=accumulate, device=x.device))
    width = max(v1 - v0 for v0, v1 in spans)
    chunk.prepare(width, sums, leaves_e=kept is not None or hidden_grad is not None)
    logits = None if kept is not None and kept.dtype == accumulate else chunk.block(width)
    narrow = None  # E as GEMM operand
    if hidden_grad is not None and x.dtype != accumulate:
        narrow = chunk.block(width, x.dtype)
    xa, peaks = head.low_rank(x), []
    for v0, v1 in spans:
        z = kept[v0:v1] if logits is None else logits[: v1 - v0]
        head.product(x, xa, v0, v1, out=z)
        e = z if hidden_grad is not None else None
        if narrow is not None:
            e = narrow[: v1 - v0]
        if kept is not None:
            e = z if logits is None else kept[v0:v1]
        shrink = chunk.reduce(z, (v0, v1), sums, e)
        if hidden_grad is not None:
            hidden_grad.rescale(shrink)
            hidden_grad.add(e, v0, v1)
        if kept is not None:
            peaks.append(sums.peak)
    return *_finish(sums, stats, len(head.weight)), peaks


def _finish(sums, stats, V):
    """Puts the target back into the sums that left it out."""
    peak, rest, target_logit = sums.peak, sums.rest, sums.target_logit
    gap = target_logit - peak
    e_target = torch.exp(gap)
    total = rest + e_target
    # log(total), without the 1 that swallows a small rest when the target itself is the peak
    logp = gap - torch.log1p(rest + torch.expm1(gap))
    out = {}
    if "entropy" in stats:
        plogp = sums.plogp - torch.special.entr(e_target)
        out["entropy"] = torch.log(total) - plogp / total
    if "log_sum_sq_probs" in stats:
        out["log_sum_sq_probs"] = torch.log(sums.squares + e_target**2) - 2 * torch.log(total)
    if "mean_logit" in stats:
        out["mean_logit"] = sums.logits / V
    if "is_top1" in stats:
        out["is_top1"] = (target_logit >= peak).to(peak.dtype)
    return Rows(peak, total, target_logit, logp, out.get("entropy")), out


@dataclass
class Gradients:
    """Of hidden, weight, bias, and the LoRA's A and B; None where nobody asked."""

    hidden: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    lora_a: torch.Tensor | None = None
    lora_b: torch.Tensor | None = None

    @classmethod
    def like(cls, head, need, dtype=None):
        """Uninitialised, for the head's parameters of `need`, in their dtypes or in `dtype`."""
        new = lambda p: empty(*p.shape, dtype=dtype or p.dtype, device=p.device)
        names = ("weight", "bias", "lora_a", "lora_b")
        return cls(**{name: new(getattr(head, name)) for name in names if getattr(need, name)})


def gradients(
    head,
    x,
    target,
    spans,
    rows,
    need,
    *,
    d_logp,
    d_entropy=None,
    kept=None,
    peaks=None,
    into=None,
    wide=False,
):
    """The Gradients for upstream gradients d_logp, d_entropy [M] (None: zero), in the parameters'
    dtypes (hidden's is the accumulator's, and so are all with `wide`). need: a Gradients of booleans.
    kept, peaks: from `scan`; without them, and for d_entropy always, the logits are computed again.
    into: wide Gradients of other rows, to which the parameters' are added instead.
    """
    accumulate = rows.logp.dtype
    put = matmul if into is None else matmul_add
    out = Gradients.like(head, need, accumulate if wide else None) if into is None else into
    hidden_grad = None
    if need.hidden or need.lora_a:
        hidden_grad = HiddenGrad(head, x, accumulate, full=need.hidden)
    xa = head.low_rank(x)
    chunk = chunk_of(head, x, target, accumulate)
    factor, by_logit = _factors(head, rows, d_logp, d_entropy)
    width = max(v1 - v0 for v0, v1 in spans)
    recompute = kept is None or d_entropy is not None
    logits = chunk.block(width) if recompute or x.dtype == accumulate else None
    block = logits if x.dtype == accumulate else chunk.block(width, x.dtype)
    at_target = target_coefficient(head, rows, d_logp, d_entropy)
    for i, (v0, v1) in enumerate(spans):
        dz = block[: v1 - v0]
        if recompute:
            z = dz if block is logits else logits[: v1 - v0]
            head.product(x, xa, v0, v1, out=z)
            chunk.gradient(z, (v0, v1), rows.peak, factor, by_logit, dz)
        else:
            torch.mul(kept[v0:v1], factor * torch.exp(peaks[i] - rows.peak), out=dz)
        if hidden_grad is not None:
            hidden_grad.add(dz, v0, v1)
        chunk.put_target(dz, (v0, v1), at_target)
        _add_parameters(out, need, dz, x, xa, (v0, v1), accumulate, put)
    if hidden_grad is not None:
        hidden_grad.add_target(at_target, target)
        if need.lora_a:
            low = (head.lora_scale * hidden_grad.low).to(x.dtype)
            put(low.t(), x, out.lora_a)
        if need.hidden:
            out.hidden = hidden_grad.merged()
    return out


def _add_parameters(out, need, dz, x, xa, span, accumulate, put):
    """The chunk's rows of the parameters' gradients; put: matmul, or matmul_add to what is there."""
    v0, v1 = span
    if need.bias:
        total = dz.sum(1, dtype=accumulate)
        out.bias[v0:v1] = total if put is matmul else out.bias[v0:v1] + total
    if need.weight:
        put(dz, x, out.weight[v0:v1])
    if need.lora_b:
        put(dz, xa[:, : out.lora_b.shape[1]], out.lora_b[v0:v1])


def _factors(head, rows, d_logp, d_entropy):
    """(factor, by_logit or None), [M]: dZ = exp(z - peak) * (factor + by_logit * (z - peak))."""
    d_logp = torch.zeros_like(rows.logp) if d_logp is None else d_logp
    factor = -head.scale * d_logp / rows.total
    if d_entropy is None:
        return factor, None
    # dH/dz = -p (log p + H) and log p = (z - peak) - log(total)
    by_logit = -head.scale * d_entropy / rows.total
    return factor + by_logit * (rows.entropy - torch.log(rows.total)), by_logit


def target_coefficient(head, rows, d_logp, d_entropy=None):
    """d Loss / d(the target's logit before cap and scale), for upstream gradients; all [M]."""
    out = torch.zeros_like(rows.logp) if d_logp is None else d_logp * -torch.expm1(rows.logp)
    if d_entropy is not None:
        p = rows.logp.exp()
        out = out - d_entropy * (p * rows.entropy - torch.special.entr(p))
    if head.softcap is not None:
        out = out * head.slope(rows.target_logit)
    return out * head.scale
