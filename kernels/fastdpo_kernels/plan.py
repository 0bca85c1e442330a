"""What a call of `linear_logp` or `linear_dpo` will cost, and which way it takes.

The vocabulary is cut into chunks: a [chunk, M] block of logits stays in cache, the head is read once
per pass however many rows there are, and each chunk's rows of dW are written once, so dW needs no
fp32 accumulator. Only "grouped" cuts the rows too, where a group of responses needs nothing of the
others: each part keeps its own matrix, and dW is summed over the parts in fp32.

Letters: M scored rows, D hidden, V vocab.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

MEMORY_BUDGET = 512 << 20  # bytes of width V held at once: the kept matrix and the chunk
# A chunk has about BLOCK_ELEMENTS logits: 2^18 to 2^22 run alike on idle CPUs, and on busy ones every
# operation waits for its slowest thread, so few large ones win. It is not narrower than BLOCK_WIDTH,
# for GPUs with many rows, where narrow chunks would be bound by launches (not measured yet).
BLOCK_ELEMENTS = 1 << 22
BLOCK_WIDTH = 4096
ALIGNED = 64  # tokens that chunks begin at multiples of, if they are no narrower: GPUs read whole lines
# What the Triton kernels hold beside E, of 128 tokens of a row: fp32 sums to settle it with and, for
# statistics, its profile (triton_head.SLOTS). Their chunks are of whole merges of tiles (triton_head.MERGED):
# that keeps the order of sums the same however many chunks there are, so a pass without gradient gives the
# same log-probs.
SETTLE_BYTES, PROFILE_BYTES, TILE, NARROWEST = 3 * 4, 6 * 4, 128, 2048
# linear_dpo's vectors of a number per row, response or pair, beside the head's own: log-ratios and
# their sums in fp64, response numbers, slopes
PAIR_VECTORS = 16


@dataclass(frozen=True)
class Plan:
    """One way to run the head.

    name        forward (no gradient), frozen (of hidden only), keep or recompute (head trained),
                grouped (head trained, by parts that keep or recompute)
    flops       of the GEMMs, forward and backward; hidden and weight both get gradients if trained
    peak_bytes  at most this is allocated beyond the inputs, the results and the gradients. Where there
                are several parts and half weights, dW's fp32 accumulator counts as a gradient.
    chunks      the vocabulary is cut into this many (by the part that cuts it most)
    rows        M
    width       tokens of a chunk, the last one's aside
    parts       the Plans of consecutive rows, whole groups each; () where all rows go at once
    """

    name: str
    flops: int
    peak_bytes: int
    chunks: int
    rows: int
    width: int
    parts: tuple["Plan", ...] = ()


def plan(
    M: int,
    V: int,
    D: int,
    *,
    dtype: torch.dtype,
    train_weight: bool,
    groups: Sequence[int] | None = None,
    memory_budget: int | None = None,
    need_grad: bool = True,
    backend: str = "torch",
) -> Plan:
    """The Plan for M rows of a [V, D] head whose tensors have `dtype`, run by `backend`: what
    `fastdpo_kernels.backend(device, dtype)` says, torch's being the CPU's.

    train_weight: some head parameter (weight, bias, LoRA) wants a gradient. need_grad=False:
    nothing does, or no_grad. groups: scored rows of each group, in order, where the loss is known to
    be a sum over them (`linear_dpo`'s); a trained head then goes by parts of whole groups, as many as
    the budget lets keep their matrix, and a group too large for that recomputes alone.

    memory_budget: bytes, MEMORY_BUDGET when None. It bounds what has width V; the [M, D] rows come on
    top. A budget too small for a chunk of one token gets that chunk all the same, and peak_bytes says
    so. Raises ValueError for a negative size, an empty vocabulary, a dtype that is not a float, or
    groups that do not add up to M.
    """
    if M < 0 or D < 0 or V < 1:
        raise ValueError(f"plan needs M >= 0, V >= 1 and D >= 0, got M={M}, V={V}, D={D}")
    if not dtype.is_floating_point:
        raise ValueError(f"plan needs a float dtype, got {dtype}")
    if backend not in ("triton", "cublas", "torch"):
        raise ValueError(f"plan knows the backends triton, cublas and torch, got {backend!r}")
    budget = MEMORY_BUDGET if memory_budget is None else memory_budget
    how = (V, D, dtype, budget, backend, train_weight)
    whole = _whole(M, *how, need_grad)
    if groups is None:
        return whole
    if min(groups, default=0) < 0 or sum(groups) != M:
        few = f"{list(groups[:8])}{'...' if len(groups) > 8 else ''}"
        raise ValueError(
            f"groups must be rows of each group and add up to M={M}, got {few}, sum {sum(groups)}"
        )
    extra = M * PAIR_VECTORS * 8
    if not train_weight:
        return replace(whole, peak_bytes=whole.peak_bytes + extra)
    # cut as if for a gradient in any case: the same rows then have the same bits without one
    keeps = lambda rows: _whole(rows, *how, need_grad=True).name == "keep"
    parts = tuple(_whole(rows, *how, need_grad) for rows in _whole_groups(groups, keeps))
    return Plan(
        "grouped" if need_grad else "forward",
        sum(part.flops for part in parts),
        max(part.peak_bytes for part in parts) + extra,
        max(part.chunks for part in parts),
        M,
        min(part.width for part in parts),
        parts,
    )


def _whole(
    M: int, V: int, D: int, dtype: torch.dtype, budget: int, backend: str, train_weight: bool, need_grad: bool
) -> Plan:
    """The Plan that sends all rows through the head at once."""
    wide = max(4, dtype.itemsize)  # logits are float32, or float64 for float64
    half = dtype.itemsize < wide
    if backend == "torch":
        # per vocabulary entry of a chunk: logits, softcap slope and one temporary; for half inputs on
        # CPU also the entry's fp32 weights and fp32 gradient
        column = 3 * M * wide + (2 * D * wide if half else 0)
    elif backend == "cublas":
        column = M * (wide + (dtype.itemsize if half else 0))  # logits, and E or dZ in half
    else:
        # six entries of E or dZ in half: chunks are of five, partial results take some of the sixth
        column = 3 * M * wide
    column = max(1, column)
    width = min(V, max(BLOCK_WIDTH, BLOCK_ELEMENTS // max(M, 1)))
    # Half of the budget is for the kept matrix in any case: a chunk that took all of it would send
    # the fewest rows, whose chunks are the widest, to the recompute plan. A pass without gradient has
    # the same chunks, so that a reference computed by it has the policy's very bits.
    width = max(1, min(width, budget // (2 * column)))
    if ALIGNED < width < V:
        width = width // ALIGNED * ALIGNED
    kept = V * M * dtype.itemsize
    # Triton's kernels write E where it is kept, with no chunk of logits beside it
    fits = kept + (0 if backend == "triton" else width * column) <= budget
    if not need_grad:
        name, gemms = "forward", 1
    elif not train_weight:
        name, gemms = "frozen", 2
    else:
        name, gemms = ("keep", 3) if fits else ("recompute", 4)
    chunks = -(-V // width)
    even = -(-V // chunks)
    width = even if even <= ALIGNED else min(V, -(-even // ALIGNED) * ALIGNED)
    blocks = width * column + (kept if name == "keep" else 0)
    if backend == "cublas" and name == "keep":
        blocks += M * ALIGNED * 2  # at the end of its rows
    if backend == "triton":
        blocks = _triton_blocks(M, V, dtype, name, width * column)
        width = V if name in ("forward", "keep") else _whole_merges(5 * even)
    # hidden made contiguous or wider, and for a gradient its accumulator and the target's rows of
    # the head; 32 vectors of row statistics, and one row of maxima per kept chunk
    vectors = (D if name == "forward" else 4 * D) + 32 + (chunks if name == "keep" else 0)
    peak_bytes = blocks + M * wide * vectors
    return Plan(name, gemms * 2 * M * V * D, peak_bytes, -(-V // width), M, width)


def _triton_blocks(M: int, V: int, dtype: torch.dtype, name: str, chunk: int) -> int:
    """Bytes of width V or of a chunk that the Triton kernels hold."""
    tiles, narrowest = M * -(-V // TILE), M * min(V + ALIGNED, NARROWEST) * dtype.itemsize
    sums = tiles * (SETTLE_BYTES + PROFILE_BYTES)
    if name == "forward":
        return sums
    if name == "keep":  # a gradient through entropy makes dZ in chunks, after the sums are gone
        return M * (V + ALIGNED) * dtype.itemsize + max(sums, narrowest)
    return max(chunk, narrowest + SETTLE_BYTES * M * NARROWEST // TILE) + tiles * PROFILE_BYTES


def _whole_merges(width: int) -> int:
    return max(NARROWEST, width // NARROWEST * NARROWEST)


def spare_width(V: int, dtype: torch.dtype) -> int:
    """Columns of a chunk as large as the sums of all tiles that the Triton kernels hold in the forward."""
    return _whole_merges(-(-V // TILE) * (SETTLE_BYTES + PROFILE_BYTES) // dtype.itemsize)


def _whole_groups(groups: Iterable[int], keeps: Callable[[int], bool]) -> list[int]:
    """Rows of each part: consecutive groups together while `keeps(rows)`, at least one group."""
    parts: list[int] = []
    room = False
    for rows in groups:
        if room and keeps(parts[-1] + rows):
            parts[-1] += rows
        elif rows:
            parts.append(rows)
            room = keeps(rows)
    return parts or [0]


def spans(V: int, width: int) -> list[tuple[int, int]]:
    """[start, stop) of each of the cuts of the vocabulary; all but the last have this width."""
    return [(v, min(v + width, V)) for v in range(0, V, width)]
