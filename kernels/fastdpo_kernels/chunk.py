"""What happens to one chunk of fp32 logits between its GEMMs, here in plain torch; RowKernels does the
same by one Triton kernel each way, where `chunk_of` finds a chip for it.

`reduce` adds a chunk to the rows' online softmax and may leave E = exp(z - peak) (times the softcap's
slope, 0 at the target) for the gradient's GEMMs; `gradient` leaves dZ, 0 at the target.

Blocks of logits are [v, M], and come as the GEMM left them: before bias, scale and softcap. Torch's lie
in memory as written, so that a chunk of the kept [V, M] matrix is contiguous; the kernels' lie row by
row, the rows of one token's logits together.

Letters: M scored rows, V vocab, v a chunk of it.
"""

import math
from dataclasses import dataclass

import torch

from . import tiles
from .ops import aligned_rows, empty

LANES = 1024  # columns of a chunk that a program of the row kernels takes at a time


@dataclass
class Softmax:
    """Of each row over the vocabulary so far, [M]: relative to peak, the target left out. None where no
    statistic needs it."""

    peak: torch.Tensor
    rest: torch.Tensor  # of E
    target_logit: torch.Tensor
    plogp: torch.Tensor | None = None  # of E log E
    squares: torch.Tensor | None = None  # of E^2
    logits: torch.Tensor | None = None  # of z, the target's too

    @classmethod
    def start(cls, M, stats, like):
        new = lambda value, needed=True: like.new_full((M,), value) if needed else None
        # not -inf: a chunk whose every logit is -inf (masked by bias) must leave 0, not -inf minus -inf
        return cls(
            peak=new(torch.finfo(like.dtype).min),
            rest=new(0.0),
            target_logit=new(float("nan")),  # a target outside the vocabulary is in no chunk
            plogp=new(0.0, "entropy" in stats),
            squares=new(0.0, "log_sum_sq_probs" in stats),
            logits=new(0.0, "mean_logit" in stats),
        )


def chunk_of(head, x, target, accumulate):
    """TorchChunk or RowKernels for x [M, D], whose logits are of the dtype `accumulate`."""
    takes = tiles.takes_row_kernels(x.device) and accumulate == torch.float32
    return (RowKernels if takes else TorchChunk)(head, x, target, accumulate)


class TorchChunk:
    """The definition. The first chunk that it reduces is the widest, by which scratch is sized."""

    def __init__(self, head, x, target, accumulate):
        self.head, self.target, self.like = head, target, torch.empty(0, dtype=accumulate, device=x.device)
        self.slope = self.spare = None

    def block(self, width, dtype=None):
        """An uninitialised [width, M] block."""
        like = self.like
        return empty(width, len(self.target), dtype=dtype or like.dtype, device=like.device)

    def kept(self, dtype):
        """An uninitialised matrix for E of the whole vocabulary."""
        return self.block(len(self.head.weight), dtype)

    def entries(self, kept):
        """What `kept` made, which another pass may have kept, as [V, M]."""
        return kept

    def reduce(self, z, span, softmax, out=None):
        """Adds the chunk `span` with the product z to softmax, and writes E to out (which may be z itself).
        Returns by what the new peak makes the E of earlier chunks smaller, [M]. z is lost."""
        v = len(z)
        if self.spare is None and (softmax.plogp is not None or softmax.squares is not None):
            self.spare = self.block(v)
        if self.slope is None and self.head.softcap is not None and out is not None:
            self.slope = self.block(v)
        temp = None if self.spare is None else self.spare[:v]
        self.head.finish_logits(z, *span)
        where = _Target(self.target, *span)
        softmax.target_logit = where.get(z, softmax.target_logit)
        if softmax.logits is not None:
            softmax.logits += z.sum(0)
        if self.slope is not None:
            self.head.slope(z, out=self.slope[:v])
        before, softmax.peak = softmax.peak, torch.maximum(softmax.peak, z.amax(0))
        shrink = torch.exp(before - softmax.peak)
        z.sub_(softmax.peak).exp_()
        where.put(z, 0.0)
        if softmax.plogp is not None:  # shrinking E by a factor moves log E by its logarithm
            softmax.plogp = shrink * (softmax.plogp + (before - softmax.peak) * softmax.rest)
            softmax.plogp -= torch.special.entr(z, out=temp).sum(0)
        if softmax.squares is not None:
            softmax.squares = softmax.squares * shrink**2 + torch.mul(z, z, out=temp).sum(0)
        softmax.rest = softmax.rest * shrink + z.sum(0)
        if self.slope is not None:
            z.mul_(self.slope[:v])
        if out is not None and out is not z:
            out.copy_(z)
        return shrink

    def gradient(self, z, span, peak, factor, by_logit, out):
        """Writes dZ = E * (factor + by_logit * (z - peak)), factor and by_logit [M], to out, which may be
        z itself; by_logit may be None. z is lost."""
        self.head.finish_logits(z, *span)
        slope = None if self.head.softcap is None else self.head.slope(z)
        z.sub_(peak)
        if by_logit is None:
            z.exp_().mul_(factor)
        else:
            e = z.exp()
            # an entry masked by bias is at -inf, where 0 * -inf is NaN; E is 0 long before -1e4
            z.clamp_(min=-1e4).mul_(by_logit).add_(factor).mul_(e)
        if slope is not None:
            z.mul_(slope)
        self.put_target(z, span, 0.0)
        if out is not z:
            out.copy_(z)

    def put_target(self, block, span, value):
        """Sets each target's entry that lies in the chunk to value [M] (or a number)."""
        _Target(self.target, *span).put(block, value)


class _Target:
    """Where each row's target lies in a chunk. No device sync: the other rows point anywhere."""

    def __init__(self, target, v0, v1):
        self.here = ((target >= v0) & (target < v1))[None]
        self.index = (target - v0).clamp_(0, v1 - v0 - 1)[None]

    def get(self, block, otherwise):
        return torch.where(self.here, block.gather(0, self.index), otherwise)[0]

    def put(self, block, value):
        old = block.gather(0, self.index)
        block.scatter_(0, self.index, torch.where(self.here, value, old).to(block.dtype))


class RowKernels:
    """TorchChunk's methods by triton_chunk.py: the chunk is read from memory once, written at most once."""

    def __init__(self, head, x, target, accumulate):
        from . import launch, triton_chunk  # needs triton

        self.launch, self.kernels = launch, triton_chunk
        self.head, self.x, self.target, self.dtype = head, x, target, accumulate

    def block(self, width, dtype=None):
        return aligned_rows(len(self.x), width, self.x, dtype or self.dtype)[:, :width].t()

    def kept(self, dtype):
        return aligned_rows(len(self.x), len(self.head.weight), self.x, dtype)

    def entries(self, kept):
        return kept[:, : len(self.head.weight)].t()

    def reduce(self, z, span, softmax, out=None):
        so_far, softmax.peak = softmax.peak, torch.empty_like(softmax.peak)
        shrink = torch.empty_like(so_far)
        sums = (softmax.rest, softmax.plogp, softmax.squares, softmax.logits)
        by_row = (softmax.target_logit, so_far, softmax.peak, shrink, *sums)
        self._run(self.kernels.chunk_sums, z, span, out, *by_row)
        return shrink

    def gradient(self, z, span, peak, factor, by_logit, out):
        self._run(self.kernels.chunk_gradient, z, span, out, peak, factor, by_logit)

    def _run(self, kernel, z, span, out, *by_row):
        z, out, (v0, v1) = z.t(), None if out is None else out.t(), span
        assert z.stride(1) == 1 and (out is None or out.stride(1) == 1)
        tensors = (z, out, self.head.bias_of(span), self.target, *by_row)
        sizes = (v1 - v0, v0, z.stride(0), 0 if out is None else out.stride(0))
        # by the whole vocabulary, so that all its chunks run one program
        step = math.gcd(16, len(self.head.weight), v0, v1)
        self.launch.run(kernel, len(z), *tensors, *sizes, *self.head.ends, STEP=step, BLOCK=LANES, fuse=False)

    def put_target(self, block, span, value):
        self.launch.put_target(block.t(), self.target, value, span)
