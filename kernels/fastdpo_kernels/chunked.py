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


class _Target:
    """Where each row's target lies in a chunk. No device sync: the other rows point anywhere."""

    def __init__(self, target, v0, v1):
        self.here = ((target >= v0) & (target < v1))[None]
        self.index = (target - v0).clamp_(0, v1 - v0 - 1)[None]

    def get(self, block, otherwise):
        return torch.where(self.here, block.gather(0, self.index), otherwise)[0]

    def put(self, block, value):
        old = block.gather(0, self.index)
        block.scatter_(0, self.index, torch.where(self.here, value, old))


def scan(head, x, target, spans, *, accumulate, stats=(), kept=None, hidden_grad=None):
    """One pass over the vocabulary. x [M, D], target i64[M], accumulate: the dtype of logits and
    results.

    kept [V, M] is filled with E (times the softcap's slope, 0 at the target), each chunk relative
    to its own peak. hidden_grad gathers sum_v E_v W_v. Returns (Rows, stats by name, the chunks'
    peaks).
    """
    new = lambda value: torch.full((len(x),), value, dtype=accumulate, device=x.device)
    # not -inf: a chunk whose every logit is -inf (masked by bias) must leave 0, not -inf minus -inf
    peak = new(torch.finfo(accumulate).min)
    rest, target_logit, plogp, squares, logit_sum = (new(0.0) for _ in range(5))
    width = max(v1 - v0 for v0, v1 in spans)
    block = lambda: empty(width, len(x), dtype=accumulate, device=x.device)
    logits = None if kept is not None and kept.dtype == accumulate else block()
    capped = head.softcap is not None and (kept is not None or hidden_grad is not None)
    slope = block() if capped else None
    spare = block() if {"entropy", "log_sum_sq_probs"} & set(stats) else None
    xa, peaks = head.low_rank(x), []
    for v0, v1 in spans:
        z = kept[v0:v1] if logits is None else logits[: v1 - v0]
        temp = None if spare is None else spare[: v1 - v0]
        head.logits(x, xa, v0, v1, out=z)
        where = _Target(target, v0, v1)
        target_logit = where.get(z, target_logit)
        if "mean_logit" in stats:
            logit_sum += z.sum(0)
        if capped:
            head.slope(z, out=slope[: v1 - v0])
        before, peak = peak, torch.maximum(peak, z.amax(0))
        shrink = torch.exp(before - peak)
        z.sub_(peak).exp_()
        where.put(z, 0.0)
        if "entropy" in stats:  # sum of E log E; shrinking E by a factor moves log E by its logarithm
            plogp = shrink * (plogp + (before - peak) * rest)
            plogp -= torch.special.entr(z, out=temp).sum(0)
        if "log_sum_sq_probs" in stats:
            squares = squares * shrink**2 + torch.mul(z, z, out=temp).sum(0)
        rest = rest * shrink + z.sum(0)
        if capped:
            z.mul_(slope[: v1 - v0])
        if hidden_grad is not None:
            hidden_grad.rescale(shrink)
            hidden_grad.add(z.to(x.dtype), v0, v1)
        if kept is not None:
            peaks.append(peak)
            if logits is not None:
                kept[v0:v1].copy_(z)
    sums = {"plogp": plogp, "squares": squares, "mean_logit": logit_sum / len(head.weight)}
    return *_finish(peak, rest, target_logit, sums, stats), peaks


def _finish(peak, rest, target_logit, sums, stats):
    """Puts the target back into the sums that left it out."""
    gap = target_logit - peak
    e_target = torch.exp(gap)
    total = rest + e_target
    # log(total), without the 1 that swallows a small rest when the target itself is the peak
    logp = gap - torch.log1p(rest + torch.expm1(gap))
    out = {}
    if "entropy" in stats:
        plogp = sums["plogp"] - torch.special.entr(e_target)
        out["entropy"] = torch.log(total) - plogp / total
    if "log_sum_sq_probs" in stats:
        out["log_sum_sq_probs"] = torch.log(sums["squares"] + e_target**2) - 2 * torch.log(total)
    if "mean_logit" in stats:
        out["mean_logit"] = sums["mean_logit"]
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
    accumulate, device = rows.logp.dtype, x.device
    put = matmul if into is None else matmul_add
    out = Gradients.like(head, need, accumulate if wide else None) if into is None else into
    hidden_grad = None
    if need.hidden or need.lora_a:
        hidden_grad = HiddenGrad(head, x, accumulate, full=need.hidden)
    xa = head.low_rank(x)
    again = _Again(head, x, xa, rows, d_logp, d_entropy)
    width = max(v1 - v0 for v0, v1 in spans)
    block = empty(width, len(x), dtype=accumulate, device=device)
    at_target = target_coefficient(head, rows, d_logp, d_entropy)
    for i, (v0, v1) in enumerate(spans):
        dz = block[: v1 - v0]
        where = _Target(target, v0, v1)
        if kept is None or d_entropy is not None:
            again.write(dz, v0, v1)
            where.put(dz, 0.0)
        else:
            torch.mul(kept[v0:v1], again.factor * torch.exp(peaks[i] - rows.peak), out=dz)
        if hidden_grad is not None:
            hidden_grad.add(dz.to(x.dtype), v0, v1)
        where.put(dz, at_target)
        if need.bias:
            if into is None:
                out.bias[v0:v1] = dz.sum(1)
            else:
                out.bias[v0:v1] += dz.sum(1)
        dz = dz.to(x.dtype)
        if need.weight:
            put(dz, x, out.weight[v0:v1])
        if need.lora_b:
            put(dz, xa, out.lora_b[v0:v1])
    if hidden_grad is not None:
        hidden_grad.add_target(at_target, target)
        if need.lora_a:
            low = (head.lora_scale * hidden_grad.low).to(x.dtype)
            put(low.t(), x, out.lora_a)
        if need.hidden:
            out.hidden = hidden_grad.merged()
    return out


class _Again:
    """d Loss / d(logits before cap and scale) of a chunk, from logits computed again."""

    def __init__(self, head, x, xa, rows, d_logp, d_entropy):
        self.head, self.x, self.xa, self.rows, self.d_entropy = head, x, xa, rows, d_entropy
        d_logp = torch.zeros_like(rows.logp) if d_logp is None else d_logp
        self.factor = -head.scale * d_logp / rows.total
        if d_entropy is not None:
            # dH/dz = -p (log p + H) and log p = (z - peak) - log(total)
            self.by_logit = -head.scale * d_entropy / rows.total
            self.factor = self.factor + self.by_logit * (rows.entropy - torch.log(rows.total))

    def write(self, dz, v0, v1):
        self.head.logits(self.x, self.xa, v0, v1, out=dz)
        slope = None if self.head.softcap is None else self.head.slope(dz)
        dz.sub_(self.rows.peak)
        if self.d_entropy is None:
            dz.exp_().mul_(self.factor)
        else:
            e = dz.exp()
            # an entry of probability 0 may be at -inf
            dz.clamp_(min=torch.finfo(dz.dtype).min).mul_(self.by_logit).add_(self.factor).mul_(e)
        if slope is not None:
            dz.mul_(slope)


def target_coefficient(head, rows, d_logp, d_entropy=None):
    """d Loss / d(the target's logit before cap and scale), for upstream gradients; all [M]."""
    out = torch.zeros_like(rows.logp) if d_logp is None else d_logp * -torch.expm1(rows.logp)
    if d_entropy is not None:
        p = rows.logp.exp()
        out = out - d_entropy * (p * rows.entropy - torch.special.entr(p))
    if head.softcap is not None:
        out = out * head.slope(rows.target_logit)
    return out * head.scale
