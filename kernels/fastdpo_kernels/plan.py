"""What a call of `linear_logp` will cost, and which of its four ways it takes.

The vocabulary is cut into chunks, never the rows: a [chunk, M] block of logits stays in cache, the
head is read once per pass however many rows there are, and each chunk's rows of dW are written
once, so dW needs no fp32 accumulator.

Letters: M scored rows, D hidden, V vocab.
"""

from dataclasses import dataclass

import torch

MEMORY_BUDGET = 512 << 20  # bytes of width V held at once: the kept matrix and the chunk
# A chunk has about BLOCK_ELEMENTS logits: 2^18 to 2^22 run alike on idle CPUs, and on busy ones every
# operation waits for its slowest thread, so few large ones win. It is not narrower than BLOCK_WIDTH,
# for GPUs with many rows, where narrow chunks would be bound by launches (not measured yet).
BLOCK_ELEMENTS = 1 << 22
BLOCK_WIDTH = 4096


@dataclass(frozen=True)
class Plan:
    """One way to run the head.

    name        forward (no gradient), frozen (of hidden only), keep or recompute (head trained)
    flops       of the GEMMs, forward and backward; hidden and weight both get gradients if trained
    peak_bytes  at most this is allocated beyond the inputs, the results and the gradients
    chunks      the vocabulary is cut into this many
    """

    name: str
    flops: int
    peak_bytes: int
    chunks: int


def plan(
    M: int,
    V: int,
    D: int,
    *,
    dtype: torch.dtype,
    train_weight: bool,
    need_grad: bool = True,
    memory_budget: int | None = None,
) -> Plan:
    """The Plan for M rows of a [V, D] head whose tensors have `dtype`.

    train_weight: some head parameter (weight, bias, LoRA) wants a gradient. need_grad=False:
    nothing does, or no_grad. memory_budget: bytes, MEMORY_BUDGET when None. It bounds what has
    width V; the [M, D] rows come on top. A budget too small for a chunk of one token gets that
    chunk all the same, and peak_bytes says so. Raises ValueError for a negative size, an empty
    vocabulary or a dtype that is not a float.
    """
    if M < 0 or D < 0 or V < 1:
        raise ValueError(f"plan needs M >= 0, V >= 1 and D >= 0, got M={M}, V={V}, D={D}")
    if not dtype.is_floating_point:
        raise ValueError(f"plan needs a float dtype, got {dtype}")
    budget = MEMORY_BUDGET if memory_budget is None else memory_budget
    wide = max(4, dtype.itemsize)  # logits are float32, or float64 for float64
    half = dtype.itemsize < wide
    # per vocabulary entry of a chunk: logits, softcap slope and one temporary; for half inputs on
    # CPU also the entry's fp32 weights and fp32 gradient
    column = 3 * M * wide + (2 * D * wide if half else 0)
    width = min(V, max(BLOCK_WIDTH, BLOCK_ELEMENTS // max(M, 1)))
    kept = V * M * dtype.itemsize
    if not need_grad:
        name, gemms, kept = "forward", 1, 0
    elif not train_weight:
        name, gemms, kept = "frozen", 2, 0
    elif kept + width * column <= budget:
        # with a full chunk beside it, so that the chunks are those of the same rows' forward plan: a
        # reference computed without gradient then has the policy's very bits
        name, gemms = "keep", 3
    else:
        name, gemms, kept = "recompute", 4, 0
    width = max(1, min(width, (budget - kept) // max(column, 1)))
    chunks = -(-V // width)
    width = -(-V // chunks)  # what `spans` makes of it
    # hidden made contiguous or wider, and for a gradient its accumulator and the target's rows of
    # the head; 32 vectors of row statistics, and one row of maxima per kept chunk
    rows = M * wide * ((D if name == "forward" else 4 * D) + 32 + (chunks if name == "keep" else 0))
    return Plan(name, gemms * 2 * M * V * D, kept + width * column + rows, chunks)


def spans(V: int, chunks: int) -> list[tuple[int, int]]:
    """[start, stop) of each of the cuts of the vocabulary; all but the last have one width."""
    width = -(-V // chunks)
    return [(v, min(v + width, V)) for v in range(0, V, width)]
