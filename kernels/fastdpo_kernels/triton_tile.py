"""The GEMM over tiles of rows x vocabulary, and what each tile leaves behind.

A tile of logits z never reaches memory. It leaves, as the launch asks for:

- E = exp(z - r), with r one reference per row (its target's logit + 40 nats), and E's sum: all that
  a softmax and its gradient need, and the two gradient GEMMs run on E as it is (credit: QuACK's
  scaled-exp, which takes a reference per row and tile);
- dZ, when the logits are computed again in the backward;
- its own peak, and sums relative to it, for the statistics and for rows whose sum left the range.

Exponents and references are in bits (nats * log2 e): exp2 of one fma is the fewest roundings.
The target's column and those past the vocabulary's end are -inf in all of these, and add nothing.

Letters: M rows, N columns (a chunk of the vocabulary), D hidden.
"""

import triton
import triton.language as tl

# Slots of the partial results [slot, tile of the vocabulary, row].
SUM, PEAK, TOTAL, PLOGP, SQUARES, LOGITS = (tl.constexpr(i) for i in range(6))
BITS = tl.constexpr(1.4426950408889634)  # in a nat
NATS = tl.constexpr(0.6931471805599453)  # in a bit
LOWEST = tl.constexpr(-3.0e38)  # stands for -inf where -inf minus itself would be NaN

# What the model fixes: that a size is a multiple of 16, and where a matrix starts, makes its loads wide.
FIXED = set("D V x_ptr w_ptr z_ptr out_ptr sums_ptr stride_x stride_w stride_z stride_out".split())


def kernel(function):
    """triton.jit of a kernel that is compiled once: whatever else a step may change, to a 1, a multiple of 16
    or a slice's start, is no part of its key. (A number from 2^31 on is: it has 64 bits.)"""
    kept = FIXED | function.__annotations__.keys()  # and constants
    changing = [name for name in function.__code__.co_varnames if name not in kept]
    return triton.jit(function, do_not_specialize=changing)


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tiles of GROUP row blocks run down the vocabulary together, and share its weights in cache."""
    first = tile // (GROUP * tiles_n) * GROUP
    height = min(tiles_m - first, GROUP)
    within = tile % (GROUP * tiles_n)
    return first + within % height, within // height


@triton.jit
def _flagged(flags_ptr, blocks, which, STEP: tl.constexpr = 512):
    """(How many of the row blocks are flagged, and the one of them that has `which` before it.)"""
    count, found = 0, 0
    for first in range(0, blocks, STEP):
        m = first + tl.arange(0, STEP)
        flag = tl.load(flags_ptr + m, mask=m < blocks, other=0)
        number = count + tl.cumsum(flag, 0) - flag
        found += tl.sum(tl.where((flag != 0) & (number == which), m, 0), 0)
        count += tl.sum(flag, 0)
    return count, found


@triton.jit
def _product_of_descriptors(x, w, m0, n0, D, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, D, BK):
        acc = tl.dot(x.load([m0, k]), w.load([n0, k]).T, acc, input_precision="ieee")
    return acc


@triton.jit
def product_of_pointers(x_ptr, w_ptr, rows, cols, here, valid, stride_x, stride_w, D, BK: tl.constexpr):
    acc = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
    x_ptr += rows.to(tl.int64)[:, None] * stride_x
    w_ptr += cols.to(tl.int64)[None, :] * stride_w
    for k in range(0, D, BK):
        inner = k + tl.arange(0, BK)
        x = tl.load(x_ptr + inner[None, :], mask=here[:, None] & (inner < D)[None, :], other=0.0)
        w = tl.load(w_ptr + inner[:, None], mask=valid[None, :] & (inner < D)[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    return acc


@triton.jit
def finished(z, scale, softcap):
    """(The logit, and t: a softcap's slope is 1 - t^2), for `scale` and `softcap` of Head.ends."""
    t = z
    if scale is not None:
        z *= scale
    if softcap is not None:
        # -tanh is 2 / (2^z + 1) - 1, here by the square of a root's reciprocal, one instruction and right to
        # 2^-22: softcap * 2^-22 nats. exp2's inf and 0 give -1 and 1
        root = tl.rsqrt(tl.fma(tl.exp2(z), 0.5, 0.5))
        t = tl.fma(root, root, -1.0)
        z = t * -softcap
    return z, t


@triton.jit
def _row_sums(e, PARTS: tl.constexpr):
    """In fixed parts of the columns. A tile of fewer rows gives a row to more threads or warps, and then each
    part is in one of them, and sums to the same bits: benchmarks/head/aot.py looks."""
    OUTER: tl.constexpr = (PARTS + 1) // 2
    parts = tl.reshape(e, (e.shape[0], OUTER, PARTS // OUTER, e.shape[1] // PARTS))
    return tl.sum(tl.sum(tl.sum(parts, 3), 2), 1)


@triton.jit
def _leave_profile(partial_ptr, slot_stride, z, at, here, ENTROPY: tl.constexpr, SQUARED: tl.constexpr):
    """The tile's peak, and sums relative to it."""
    peak = tl.max(z, 1) * BITS
    peak = tl.where(peak > LOWEST, peak, LOWEST)
    bits = tl.fma(z, BITS, -peak[:, None])
    e = tl.exp2(bits)
    tl.store(partial_ptr + PEAK * slot_stride + at, peak, mask=here)
    tl.store(partial_ptr + TOTAL * slot_stride + at, tl.sum(e, 1), mask=here)
    if ENTROPY:
        plogp = tl.sum(e * tl.maximum(bits, LOWEST), 1) * NATS
        tl.store(partial_ptr + PLOGP * slot_stride + at, plogp, mask=here)
    if SQUARED:
        tl.store(partial_ptr + SQUARES * slot_stride + at, tl.sum(e * e, 1), mask=here)


@triton.jit
def _tile(
    z, rows, at, here, n0, N, v0, target_ptr, target_logit_ptr, reference_ptr, factor_ptr, by_logit_ptr,
    partial_ptr, slot_stride, scale, softcap,
    BN: tl.constexpr, TAIL: tl.constexpr, DIAGONAL: tl.constexpr, PARTS: tl.constexpr, EXP: tl.constexpr,
    SUMS: tl.constexpr, PROFILE: tl.constexpr, ENTROPY: tl.constexpr, SQUARED: tl.constexpr,
    MEAN: tl.constexpr,
):  # fmt: skip
    """Writes a tile's partial results, and returns the tile of E or dZ."""
    z, t = finished(z, scale, softcap)
    # within the tile, where columns are constants of the program and take no registers
    column = tl.arange(0, BN)[None, :]
    target = (tl.load(target_ptr + rows, mask=here, other=-1) - v0).to(tl.int32) - n0
    if MEAN:
        tl.store(partial_ptr + LOGITS * slot_stride + at, tl.sum(z, 1), mask=here)
    own = target[:, None] == column
    if SUMS and not DIAGONAL:
        # from the accumulator that the others come from
        mine = here & (target >= 0) & (target < BN)
        tl.store(target_logit_ptr + rows, tl.sum(tl.where(own, z, 0.0), 1), mask=mine)
        # The same comparison in other words: one kept from above would hold a register per column.
        own = column + n0 == (target + n0)[:, None]
    if TAIL:
        own |= column >= N - n0
    if PROFILE:
        z = tl.where(own, float("-inf"), z)
        _leave_profile(partial_ptr, slot_stride, z, at, here, ENTROPY, SQUARED)
    e = z
    if EXP:
        reference = tl.load(reference_ptr + rows, mask=here, other=0.0)
        bits = tl.fma(z, BITS, -reference[:, None])
        e = tl.exp2(bits)  # inf or NaN in a row make its sum so, and the row is done again
        if not PROFILE:  # after a softcap's long chain: comparisons kept over it are packed into bits
            e = tl.where(own, 0.0, e)
        if SUMS:
            tl.store(partial_ptr + SUM * slot_stride + at, _row_sums(e, PARTS), mask=here)
        if factor_ptr is not None:
            by = tl.load(factor_ptr + rows, mask=here, other=0.0)[:, None]
            if by_logit_ptr is not None:
                slope = tl.load(by_logit_ptr + rows, mask=here, other=0.0) * NATS
                by = tl.fma(tl.maximum(bits, LOWEST), slope[:, None], by)
                by = tl.where(e == 0, 0.0, by)
            e *= by
        if softcap is not None:
            e *= 1 - t * t
    return e


@kernel
def head_tiles(
    x_ptr,  # [M, D]
    w_ptr,  # [N, D]
    bias_ptr,  # [N] or None
    out_ptr,  # E or dZ [M, N], or None
    target_ptr,  # i64[M], in the whole vocabulary
    target_logit_ptr,  # f32[M], written with SUMS and without DIAGONAL
    reference_ptr,  # f32[M]: r in bits
    factor_ptr,  # f32[M] or None: dZ = E * (factor + by_logit * (z - r))
    by_logit_ptr,  # f32[M] or None: from a gradient through entropy
    partial_ptr,  # f32[slots, tiles of N, M] or None
    flags_ptr,  # i32[M + blocks of BM rows] or None: only the flagged rows are computed and written
    M, N, D,
    v0,  # where the chunk starts in the vocabulary
    stride_x, stride_w, stride_out, slot_stride, scale, softcap, programs,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, DESCRIPTORS: tl.constexpr,
    STEP: tl.constexpr, DIAGONAL: tl.constexpr, PARTS: tl.constexpr, SUMS: tl.constexpr,
    PROFILE: tl.constexpr, ENTROPY: tl.constexpr, SQUARED: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """A persistent program walks the tiles pid, pid + programs, ... of logits. With flags these are the
    tiles of flagged blocks alone, so that many are dealt to all programs, and with none nothing is done.
    STEP divides N. DIAGONAL: target_logit is known."""
    tl.assume(D > 0)  # else there is a second copy of what follows a loop over nothing
    N = N // STEP * STEP  # the same, but then the compiler knows, and stores without descriptors are wide
    TAIL: tl.constexpr = STEP < BN  # the last tile's columns may pass N
    slot_stride = tl.cast(slot_stride, tl.int64)  # a slot's number times it passes 32 bits first
    blocks, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    tiles_m = blocks if flags_ptr is None else _flagged(flags_ptr + M, blocks, 0)[0]
    if DESCRIPTORS:
        x = tl.make_tensor_descriptor(x_ptr, [M, D], [stride_x, 1], [BM, BK])
        w = tl.make_tensor_descriptor(w_ptr, [N, D], [stride_w, 1], [BN, BK])
        if out_ptr is not None:
            out = tl.make_tensor_descriptor(out_ptr, [M, N], [stride_out, 1], [BM, BN])
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, programs, flatten=DESCRIPTORS):
        m, n = _place(tile, tiles_m, tiles_n, GROUP)
        if flags_ptr is not None:
            m = _flagged(flags_ptr + M, blocks, m)[1]
        rows = m * BM + tl.arange(0, BM)
        here = rows < M if flags_ptr is None else tl.load(flags_ptr + rows, mask=rows < M, other=0) != 0
        cols = n * BN + tl.arange(0, BN)
        valid = cols < N
        if DESCRIPTORS:
            z = _product_of_descriptors(x, w, m * BM, n * BN, D, BM, BN, BK)
        else:
            z = product_of_pointers(x_ptr, w_ptr, rows, cols, here, valid, stride_x, stride_w, D, BK)
        if bias_ptr is not None:
            spot = bias_ptr + n * BN + tl.arange(0, BN)
            bias = tl.load(spot, mask=valid, other=0.0) if TAIL else tl.load(spot)
            z += bias.to(tl.float32)[None, :]
        e = _tile(
            z, rows, n.to(tl.int64) * M + rows, here, n * BN, N, v0, target_ptr, target_logit_ptr,
            reference_ptr, factor_ptr, by_logit_ptr, partial_ptr, slot_stride, scale, softcap, BN, TAIL,
            DIAGONAL, PARTS, SUMS or out_ptr is not None, SUMS, PROFILE, ENTROPY, SQUARED, MEAN,
        )  # fmt: skip
        if out_ptr is not None:
            if DESCRIPTORS:
                out.store([m * BM, n * BN], e.to(out_ptr.dtype.element_ty))
            else:
                spot = out_ptr + rows.to(tl.int64)[:, None] * stride_out + cols[None, :]
                tl.store(spot, e.to(out_ptr.dtype.element_ty), mask=here[:, None] & valid[None, :])
