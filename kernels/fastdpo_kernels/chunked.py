"""The head over vocabulary chunks, by torch's GEMMs: the backend for all that has no tile (see head_pass.py).

Blocks of logits are [v, M]: the vocabulary is the outer dimension, so the kept [V, M] matrix is cut
into contiguous blocks. The softmax is online: E = exp(z - peak), where peak is the greatest logit
of the row so far.

The target's own entry is left out of E. Its part of the hidden gradient is added at the end, from
the row's log-prob: (1 - p_y) W_y is exact where the model is sure, W_y minus p_y W_y is not.

Letters: M scored rows, D hidden, V vocab, v a chunk of it; x the hidden rows as GEMM operand.
"""

import torch

from .chunk import Softmax, chunk_of
from .head import HiddenGrad
from .head_pass import NONE, Gradients, State, factors, target_coefficient
from .ops import matmul, matmul_add, operand
from .plan import spans


def forward(head, hidden, target, how, stats=()):
    """One pass over the vocabulary, results in float32 (float64 for float64): keep fills `kept` with E (times
    the softcap's slope, 0 at the target), each chunk relative to its own peak; frozen makes `sums`."""
    x, accumulate = operand(hidden.contiguous()), torch.promote_types(hidden.dtype, torch.float32)
    chunk, cuts = chunk_of(head, x, target, accumulate), spans(len(head.weight), how.width)
    softmax = Softmax.start(len(x), stats, torch.empty(0, dtype=accumulate, device=x.device))
    kept = peaks = entries = sums = narrow = None
    xa, width = head.low_rank(x), cuts[0][1]
    if how.name == "keep":
        kept, peaks = chunk.kept(hidden.dtype), softmax.peak.new_empty(len(cuts), len(x))
        entries = chunk.entries(kept)
    elif how.name == "frozen":
        sums = HiddenGrad(head, x, accumulate)
        if x.dtype != accumulate:
            narrow = chunk.block(width, x.dtype)  # E as GEMM operand
    logits = None if kept is not None and kept.dtype == accumulate else chunk.block(width)
    for i, (v0, v1) in enumerate(cuts):
        z = entries[v0:v1] if logits is None else logits[: v1 - v0]
        head.product(x, xa, v0, v1, out=z)
        e = z if narrow is None else narrow[: v1 - v0]
        if kept is not None and logits is not None:
            e = entries[v0:v1]
        shrink = chunk.reduce(z, (v0, v1), softmax, e if how.name in ("keep", "frozen") else None)
        if sums is not None:
            sums.rescale(shrink)
            sums.add(e, v0, v1)
        if kept is not None:
            peaks[i] = softmax.peak
    V, own = len(head.weight), softmax.peak
    if head.group is not None:
        V = head.group.merge(softmax, target)
        if sums is not None:
            sums.rescale(torch.exp(own - softmax.peak))
    state, values = _finish(softmax, stats, V)
    state.kept, state.peaks, state.sums = kept, peaks, sums
    return state, values


def _finish(softmax, stats, V):
    """Puts the target back into the sums that left it out: (State, stats by name)."""
    peak, rest, target_logit = softmax.peak, softmax.rest, softmax.target_logit
    gap = target_logit - peak
    e_target = torch.exp(gap)
    total = rest + e_target
    # log(total), without the 1 that swallows a small rest when the target itself is the peak
    logp = gap - torch.log1p(rest + torch.expm1(gap))
    out = {}
    if "entropy" in stats:
        plogp = softmax.plogp - torch.special.entr(e_target)
        out["entropy"] = torch.log(total) - plogp / total
    if "log_sum_sq_probs" in stats:
        out["log_sum_sq_probs"] = torch.log(softmax.squares + e_target**2) - 2 * torch.log(total)
    if "mean_logit" in stats:
        out["mean_logit"] = softmax.logits / V
    if "is_top1" in stats:
        out["is_top1"] = (target_logit >= peak).to(peak.dtype)
    return State(peak, total, target_logit, logp, out.get("entropy")), out


def gradients(head, hidden, target, how, state, need, d_logp, d_entropy=None, into=NONE, wide=False):
    """See head_pass.py; hidden's is of logp's dtype."""
    factor, by_logit = factors(head, state, d_logp, d_entropy)
    at_target = target_coefficient(head, state, d_logp, d_entropy)
    if state.sums is not None:
        state.sums.rescale(factor)
        state.sums.add_target(at_target, target)
        return Gradients(hidden=state.sums.merged())
    x, accumulate = operand(hidden.contiguous()), state.logp.dtype
    put = lambda name: matmul if getattr(into, name) is None else matmul_add
    out = Gradients.like(head, need, into, accumulate if wide else None)
    sums = HiddenGrad(head, x, accumulate, full=need.hidden) if need.hidden or need.lora_a else None
    xa, cuts = head.low_rank(x), spans(len(head.weight), how.width)
    chunk, width = chunk_of(head, x, target, accumulate), cuts[0][1]
    recompute = state.kept is None or d_entropy is not None
    logits = chunk.block(width) if recompute or x.dtype == accumulate else None
    block = logits if x.dtype == accumulate else chunk.block(width, x.dtype)
    entries = None if recompute else chunk.entries(state.kept)
    for i, (v0, v1) in enumerate(cuts):
        dz = block[: v1 - v0]
        if recompute:
            z = dz if block is logits else logits[: v1 - v0]
            head.product(x, xa, v0, v1, out=z)
            chunk.gradient(z, (v0, v1), state.peak, factor, by_logit, dz)
        else:
            torch.mul(entries[v0:v1], factor * torch.exp(state.peaks[i] - state.peak), out=dz)
        if sums is not None:
            sums.add(dz, v0, v1)
        chunk.put_target(dz, (v0, v1), at_target)
        if need.bias:
            total = dz.sum(1, dtype=accumulate)
            out.bias[v0:v1] = total if put("bias") is matmul else out.bias[v0:v1] + total
        if need.weight:
            put("weight")(dz, x, out.weight[v0:v1])
        if need.lora_b:
            put("lora_b")(dz, xa[:, : out.lora_b.shape[1]], out.lora_b[v0:v1])
    if sums is not None:
        sums.add_target(at_target, target)
        if need.lora_a:
            low = (head.lora_scale * sums.low).to(x.dtype)
            put("lora_a")(low.t(), x, out.lora_a)
        if need.hidden:
            out.hidden = sums.merged()
    return out
