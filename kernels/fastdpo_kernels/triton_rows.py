"""Kernels over rows: the reference before the tiles, the sums after them. All fp32, in fixed order.

A row whose sum of E left the range is settled on the device: `merge_sums` flags such rows and the blocks
that have one, the flagged rows' tiles leave a profile, `settle` moves the reference to their peak, and the
tiles write their E again. With no such row each of these kernels ends at once, so nobody has to ask.

flags i32[M + blocks]: 1 for a row out of range, and from M on for a block of rows with such a row.

Letters: M rows, D hidden, T tiles of the vocabulary.
"""

import triton.language as tl

from .triton_tile import BITS, LOWEST, PEAK, TOTAL, finished, kernel, product_of_pointers

# E of the target is exp(-40): E reaches down to tokens 47 nats less probable and, by LIMIT, up to 95 nats
# more.
OFFSET = tl.constexpr(40.0)
# A sum past this makes a row out of range: its target is at -(40 + log 1e24) nats. The room up to 3e38 is
# for the GEMMs on E, which sum it times weights; the room down to 1e-38 for a row's slope over its sum.
LIMIT = tl.constexpr(1.0e24)


@kernel
def start_rows(
    x_ptr,  # [M, D]
    w_ptr,  # [V, D]
    bias_ptr,  # [V] or None
    target_ptr,  # i64[M]
    reference_ptr,  # f32[M], written: the target's logit + OFFSET, in bits
    target_logit_ptr,  # f32[M], written
    rest_ptr,  # f32[M], written: 0
    M, V, D, stride_x, stride_w, scale, softcap, BLOCK: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The target's logit is the diagonal of a tile of rows and the tokens they want. Tensor cores round
    otherwise than a dot product in fp32 does: this is the instruction and order of the other logits."""
    lane = tl.arange(0, BLOCK)
    rows = tl.program_id(0) * BLOCK + lane
    here = rows < M
    target = tl.load(target_ptr + rows, mask=here, other=-1)
    inside = (target >= 0) & (target < V)
    z = product_of_pointers(x_ptr, w_ptr, rows, target, here, inside, stride_x, stride_w, D, BK)
    z = tl.sum(tl.where(lane[:, None] == lane[None, :], z, 0.0), 1)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + target, mask=inside, other=0.0).to(tl.float32)
    z, _ = finished(z, scale, softcap)
    z = tl.where(inside, z, float("nan"))  # nobody waits for the device to refuse a target
    tl.store(reference_ptr + rows, (z + OFFSET) * BITS, mask=here)
    tl.store(target_logit_ptr + rows, z, mask=here)
    tl.store(rest_ptr + rows, 0.0, mask=here)


@kernel
def merge_sums(
    partial_ptr,  # f32[slots, T, M]; slot SUM is the first
    rest_ptr,  # f32[M]: grows by the chunk's sum, where that stays in range
    flags_ptr,  # i32[M + blocks of BM rows], written
    M, T, BM: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    here = rows < M
    before = tl.load(rest_ptr + rows, mask=here, other=0.0)
    total = before
    for t0 in range(0, T, BT):
        t = (t0 + tl.arange(0, BT)).to(tl.int64)[:, None]
        total += tl.sum(tl.load(partial_ptr + t * M + rows, mask=(t < T) & here[None, :], other=0.0), 0)
    fits = total <= LIMIT  # false for NaN
    flag = 1 - fits.to(tl.int32)
    tl.store(rest_ptr + rows, tl.where(fits, total, before), mask=here)
    tl.store(flags_ptr + rows, flag, mask=here)
    tl.store(flags_ptr + M + tl.program_id(0), tl.max(flag, 0))


@kernel
def settle(
    flags_ptr,  # i32[M + blocks of BM rows]
    partial_ptr, slot_stride,  # f32[slots, T, M]: the flagged rows' PEAK and TOTAL
    reference_ptr,  # f32[M]: raised to the chunk's peak
    rest_ptr,  # f32[M]: the sum so far, of the new reference
    sums_ptr,  # f32[M, D] or None: brought to the new reference
    M, T, D, BM: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    slot_stride = tl.cast(slot_stride, tl.int64)  # a slot's number times it passes 32 bits first
    if tl.load(flags_ptr + M + tl.program_id(0)) != 0:
        rows = tl.program_id(0) * BM + tl.arange(0, BM)
        here = tl.load(flags_ptr + rows, mask=rows < M, other=0) != 0
        before = tl.load(reference_ptr + rows, mask=here, other=0.0)
        peak = tl.where(before > LOWEST, before, LOWEST)
        rest = tl.load(rest_ptr + rows, mask=here, other=0.0) * tl.exp2(before - peak)
        for t0 in range(0, T, BT):
            t = (t0 + tl.arange(0, BT)).to(tl.int64)[:, None]
            spot, inside = partial_ptr + t * M + rows, (t < T) & here[None, :]
            peaks = tl.load(spot + PEAK * slot_stride, mask=inside, other=LOWEST)
            totals = tl.load(spot + TOTAL * slot_stride, mask=inside, other=0.0)
            higher = tl.maximum(peak, tl.max(peaks, 0))
            rest = rest * tl.exp2(peak - higher) + tl.sum(totals * tl.exp2(peaks - higher[None, :]), 0)
            peak = higher
        tl.store(reference_ptr + rows, peak, mask=here)
        tl.store(rest_ptr + rows, rest, mask=here)
        if sums_ptr is not None:
            shrink = tl.exp2(before - peak)[:, None]
            for k in range(0, D, BD):
                inner = (k + tl.arange(0, BD))[None, :]
                spot, inside = sums_ptr + rows.to(tl.int64)[:, None] * D + inner, here[:, None] & (inner < D)
                tl.store(spot, tl.load(spot, mask=inside, other=0.0) * shrink, mask=inside)
