"""What a call of `linear_logp` or `linear_dpo` will cost, and which way it takes.

The vocabulary is cut into chunks: a [chunk, M] block of logits stays in cache, the head is read once
per pass however many rows there are, and each chunk's rows of dW are written once, so dW needs no
fp32 accumulator. Only "grouped" cuts the rows too, where a group of responses needs nothing of the
others: each part keeps its own matrix, and dW is summed over the parts in fp32.

Letters: M scored rows, D hidden, V vocab.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

MEMORY_BUDGET = 512 << 20  # bytes of width V held at once, see default_budget
CHUNK_BYTES = MEMORY_BUDGET // 2  # of a chunk, at most
# A chunk has about BLOCK_ELEMENTS logits: 2^18 to 2^22 run alike on idle CPUs, and on busy ones every
# operation waits for its slowest thread, so few large ones win. It is not narrower than BLOCK_WIDTH,
# for GPUs with many rows, where narrow chunks would be bound by launches (not measured yet).
BLOCK_ELEMENTS = 1 << 22
BLOCK_WIDTH = 4096
ALIGNED = 64  # tokens that chunks begin at multiples of, if they are no narrower: GPUs read whole lines
# What the Triton kernels hold beside E, of 128 tokens of a row: fp32 sums to settle it with and, for
# statistics, its profile (triton_head.SLOTS). Their chunks are of whole merges of tiles (triton_head.MERGED):
# that keeps the order of sums the same however many chunks there are, so a pass without gradient gives the
# same log-probs (but of rows out of E's range, which are settled chunk by chunk, to rounding).
SETTLE_BYTES, PROFILE_BYTES, TILE, NARROWEST = 3 * 4, 6 * 4, 128, 2048
# linear_dpo's vectors of a number per row, response or pair, beside the head's own: log-ratios and
# their sums in fp64, response numbers, slopes
PAIR_VECTORS = 16
Held = tuple[str, int, int]  # a Plan's name ("trained" became keep or recompute), width, its blocks' bytes


@dataclass(frozen=True)
class Plan:
    """One way to run the head.

    name        forward (no gradient), frozen (of hidden only), keep or recompute (head trained),
                grouped (head trained, by parts that keep or recompute)
    flops       of the GEMMs, forward and backward; hidden and weight both get gradients if trained
    peak_bytes  at most this is allocated beyond the inputs (with autocast's copies), the results and the
                gradients
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


def default_budget(V: int, D: int, train_weight: bool) -> int:
    """Bytes, where nobody names memory_budget: 512 MiB; for a trained [V, D] head this or an fp32 dW, if that
    is more, and one such dW (4VD) on top, which parts need to add theirs up in and a single part may have."""
    return max(MEMORY_BUDGET, 4 * V * D) + 4 * V * D if train_weight else MEMORY_BUDGET


def plan(
    M: int, V: int, D: int, *, dtype: torch.dtype, train_weight: bool, groups: Sequence[int] | None = None,
    memory_budget: int | None = None, need_grad: bool = True, backend: str = "torch"
) -> Plan:  # fmt: skip
    """The Plan for M rows of a [V, D] head whose tensors have `dtype`, run by `backend`: what
    `fastdpo_kernels.backend(device, dtype)` says, torch's being the CPU's.

    train_weight: some head parameter (weight, bias, LoRA) wants a gradient. need_grad=False:
    nothing does, or no_grad. groups: scored rows of each group, in order, where the loss is known to
    be a sum over them (`linear_dpo`'s); a trained head whose matrix does not fit then goes by parts of
    whole groups, as few as keep theirs and as even, and groups too large for that recompute.

    memory_budget: bytes, `default_budget` when None. It bounds what has width V, the fp32 dW of several
    parts of a half head included; the [M, D] rows come on top, and by Triton's kernels sums of E (a tenth
    of it; with statistics a seventh). A budget too small for the narrowest chunk gets that chunk all the
    same, and peak_bytes says so. Raises ValueError for a negative size, an empty vocabulary, a dtype that
    is not a float, or groups that do not add up to M.
    """
    if M < 0 or D < 0 or V < 1:
        raise ValueError(f"plan needs M >= 0, V >= 1 and D >= 0, got M={M}, V={V}, D={D}")
    if not dtype.is_floating_point:
        raise ValueError(f"plan needs a float dtype, got {dtype}")
    if backend not in BACKENDS:
        raise ValueError(f"plan knows the backends triton, cublas and torch, got {backend!r}")
    budget = default_budget(V, D, train_weight) if memory_budget is None else memory_budget
    of = lambda rows, budget, need: _whole(rows, V, D, dtype, budget, backend, train_weight, need)
    whole = of(M, budget, need_grad)
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
    rows, summed = [M], 0
    if of(M, budget, True).name != "keep":
        accumulator = 4 * V * D if dtype.itemsize < 4 else 0  # else dW itself is added to
        recomputes = lambda m: of(m, budget - accumulator, True).name != "keep"
        rows = _parts(groups, bisect_left(range(1, M + 1), True, key=recomputes))
        summed = accumulator if len(rows) > 1 else 0
    parts = tuple(of(m, budget - summed, need_grad) for m in rows)
    flops, peak_bytes = sum(part.flops for part in parts), max(part.peak_bytes for part in parts) + extra
    chunks, width = max(part.chunks for part in parts), min(part.width for part in parts)
    name, summed = ("grouped", summed) if need_grad else ("forward", 0)
    return Plan(name, flops, peak_bytes + summed, chunks, M, width, parts)


def _whole(
    M: int, V: int, D: int, dtype: torch.dtype, budget: int, backend: str, train_weight: bool, need_grad: bool
) -> Plan:
    """The Plan that sends all rows through the head at once."""
    name = "forward" if not need_grad else "trained" if train_weight else "frozen"
    name, width, blocks = BACKENDS[backend](name, M, V, D, dtype, budget)
    gemms = {"forward": 1, "frozen": 2, "keep": 3, "recompute": 4}[name]
    chunks = -(-V // width)
    # hidden made contiguous or wider, and for a gradient its accumulator and the target's rows of
    # the head; 32 vectors of row statistics, and one row of maxima per kept chunk
    vectors = (D if name == "forward" else 4 * D) + 32 + (chunks if name == "keep" else 0)
    peak_bytes = blocks + M * max(4, dtype.itemsize) * vectors
    return Plan(name, gemms * 2 * M * V * D, peak_bytes, chunks, M, width)


def _torch(name: str, M: int, V: int, D: int, dtype: torch.dtype, budget: int) -> Held:
    # of a token: logits, softcap slope and one temporary; for half inputs also its fp32 weights and gradient
    half = dtype.itemsize < 4
    return _by_chunks(name, M, V, dtype, budget, 3 * M * max(4, dtype.itemsize) + (2 * D * 4 if half else 0))


def _cublas(name: str, M: int, V: int, D: int, dtype: torch.dtype, budget: int) -> Held:
    # of a token: logits, and E or dZ in half; rows of E are padded
    column = M * (6 if dtype.itemsize < 4 else dtype.itemsize)
    name, width, held = _by_chunks(name, M, V, dtype, budget, column)
    return name, width, held + (M * ALIGNED * 2 if name == "keep" else 0)


def _by_chunks(name: str, M: int, V: int, dtype: torch.dtype, budget: int, column: int) -> Held:
    """Of logits, `column` bytes a token. A chunk may take half of the budget, whatever else is held: the same
    rows have the same chunks with and without gradient, so that a reference has the policy's very bits."""
    share, column, kept = min(budget // 2, CHUNK_BYTES), max(1, column), M * V * dtype.itemsize
    wanted = min(V, max(BLOCK_WIDTH, BLOCK_ELEMENTS // max(M, 1)))
    width = max(1, min(wanted, share // column))
    if ALIGNED < width < V:
        width = width // ALIGNED * ALIGNED
    even = -(-V // -(-V // width))
    width = even if width < ALIGNED else min(V, _up(even, ALIGNED))
    if name == "trained":
        name = "keep" if kept + max(column, min(share, wanted * column)) <= budget else "recompute"
    return name, width, width * column + (kept if name == "keep" else 0)


def _triton(name: str, M: int, V: int, D: int, dtype: torch.dtype, budget: int) -> Held:
    row, width = M * dtype.itemsize, V  # bytes of a token
    if name == "trained":
        name = "keep" if V * row <= budget else "recompute"
    if name in ("frozen", "recompute"):
        widest = _whole_merges(min(budget, CHUNK_BYTES) // max(row, 1))
        width = min(V, _up(-(-V // -(-V // widest)), NARROWEST))
    sums = M * (_up(width, TILE) * SETTLE_BYTES + _up(V, TILE) * PROFILE_BYTES) // TILE
    block = row * _up(width, ALIGNED)
    if name == "keep":  # once the sums are gone, entropy's gradient makes dZ in chunks, a bias' has columns
        return name, width, block + max(sums, row * min(V + ALIGNED, NARROWEST), 12 * V)
    return name, width, {"forward": sums, "frozen": block + sums, "recompute": max(block, sums)}[name]


BACKENDS = {"triton": _triton, "cublas": _cublas, "torch": _torch}


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


def _whole_merges(width: int) -> int:
    return max(NARROWEST, width // NARROWEST * NARROWEST)


def spare_width(V: int, dtype: torch.dtype) -> int:
    """Columns of a chunk as large as the sums of all tiles that the Triton kernels hold in the forward."""
    return _whole_merges(-(-V // TILE) * (SETTLE_BYTES + PROFILE_BYTES) // dtype.itemsize)


def _parts(groups: Sequence[int], most: int) -> list[int]:
    """Rows of each part, if `most` of them keep their matrix: the fewest parts, and of those the evenest."""
    fewest = len(_cut(groups, most, most))
    least = bisect_left(range(most), True, key=lambda rows: len(_cut(groups, most, rows)) == fewest)
    return _cut(groups, most, least)


def _cut(groups: Sequence[int], most: int, limit: int) -> list[int]:
    """Consecutive groups together up to `limit` rows; and those that cannot keep their matrix alone."""
    parts, kept = [0], True
    for rows in groups:
        if kept == (rows <= most) and (not kept or not parts[-1] or parts[-1] + rows <= limit):
            parts[-1] += rows
        elif rows:
            parts.append(rows)
            kept = rows <= most
    return [rows for rows in parts if rows] or [0]


def spans(V: int, width: int) -> list[tuple[int, int]]:
    """[start, stop) of each of the cuts of the vocabulary; all but the last have this width."""
    return [(v, min(v + width, V)) for v in range(0, V, width)]
