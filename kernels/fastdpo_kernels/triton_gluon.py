"""triton_tile.py's E pass for sm_90, warp-specialised, in Triton's Gluon: off until a GPU run is committed.

Of a head without bias and softcap, whose targets' logits are known (Tile.diagonal): E and its sums, or the
sums alone. Three groups of warps share a persistent program: one loads by TMA into a ring of stages, two form
the upper and the lower half of each tile. Both halves read the same weights, but the lower one stays LAG
steps behind, so that the tensor cores have one half's products to do while the other is in its epilogue (the
idea is that of CUTLASS's ping-pong kernels, whose halves have a tile each: here they would load the weights
twice).

Names and results as in triton_tile.py: the same products in the same order, the same exponents, the same
sums. H is half a tile's rows, a step is BK of D.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .triton_tile import BITS, _place

# Both as Triton 3.8 calls them; before, they had another name.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
place = gluon.jit(_place.fn)

# Of 65,536 registers 384 threads begin with 168 each; the two halves then take 240, and the loads keep 24.
HALF_REGISTERS, LOAD_REGISTERS = gl.constexpr(240), gl.constexpr(24)
# LAG < STAGES, or the upper half waits for a stage that the lower one, which waits for it, has not left.
OPTIONS = dict(STAGES=4, LAG=2, warps=4, registers=168)


@gluon.jit
def _load(
    x, w, ring, sizes,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fills the stages in turn, each as soon as both halves have left it."""
    x_ring, w_ring, ready, empty = ring
    tiles_m, tiles_n, D, programs = sizes
    H: gl.constexpr = BM // 2
    step = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, programs):
        m, n = place(tile, tiles_m, tiles_n, GROUP)
        for k in range(0, D, BK):
            stage = step % STAGES
            # the first round finds the barriers at phase 0, and waits for the phase before: for nothing
            last = (step // STAGES & 1) ^ 1
            mbarrier.wait(empty.index(stage), last)
            mbarrier.wait(empty.index(STAGES + stage), last)
            mbarrier.expect(ready.index(stage), (BM + BN) * BK * 2)
            async_load(x, [m * BM, k], ready.index(stage), x_ring.index(2 * stage))
            async_load(x, [m * BM + H, k], ready.index(stage), x_ring.index(2 * stage + 1))
            async_load(w, [n * BN, k], ready.index(stage), w_ring.index(stage))
            step += 1


@gluon.jit
def _product(z, ring, step, D, LOWER: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr):
    """A half tile's logits, and the number of the next step. One product is in flight while the next is
    issued, and a stage is left when its product is done."""
    x_ring, w_ring, ready, empty = ring
    mine: gl.constexpr = LOWER * STAGES
    for k in range(0, D, BK):
        stage = step % STAGES
        mbarrier.wait(ready.index(stage), step // STAGES & 1)
        x, w = x_ring.index(2 * stage + LOWER), w_ring.index(stage).permute((1, 0))
        z = warpgroup_mma(x, w, z, is_async=True)
        z = warpgroup_mma_wait(1, deps=(z,))
        mbarrier.arrive(empty.index(mine + (step + STAGES - 1) % STAGES), pred=k > 0)
        step += 1
    z = warpgroup_mma_wait(0, deps=(z,))
    mbarrier.arrive(empty.index(mine + (step + STAGES - 1) % STAGES))
    return z, step


@gluon.jit
def _half(
    ring, store, by_row, sizes, M, N, v0, scale,
    LOWER: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr,
    STAGES: gl.constexpr, LAG: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """The upper or the lower half of every tile, and what it leaves behind. store: (descriptor of E, shared
    memory for half of a half's columns), or empty."""
    target_ptr, reference_ptr, partial_ptr = by_row
    tiles_m, tiles_n, D, programs = sizes
    gl.assume(D > 0)
    H: gl.constexpr = BM // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    along: gl.constexpr = gl.SliceLayout(1, layout)
    column = gl.arange(0, BN, gl.SliceLayout(0, layout))[None, :]
    if LOWER:  # what keeps the halves apart from then on: neither can be faster than the other
        _, _, _, empty = ring
        mbarrier.wait(empty.index(min(LAG, gl.cdiv(D, BK)) - 1), 0)
    step = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, programs):
        m, n = place(tile, tiles_m, tiles_n, GROUP)
        first = m * BM + LOWER * H
        rows = first + gl.arange(0, H, along)
        here = rows < M
        target = gl.cast(gl.load(target_ptr + rows, mask=here, other=-1) - v0, gl.int32) - n * BN
        reference = gl.load(reference_ptr + rows, mask=here, other=0.0)
        z = gl.zeros([H, BN], gl.float32, layout)
        z, step = _product(z, ring, step, D, LOWER, BK, STAGES)
        if scale is not None:
            z *= scale
        own = target[:, None] == column
        if TAIL:
            own = own | (column >= N - n * BN)
        e = gl.where(own, 0.0, gl.exp2(gl.fma(z, BITS, -reference[:, None])))
        left, right = gl.split(e.reshape([H, 2, BN // 2]).permute((0, 2, 1)))
        # in triton_tile.py's order: two halves of the columns
        total = gl.convert_layout(gl.sum(left, 1) + gl.sum(right, 1), along)
        gl.store(partial_ptr + gl.cast(n, gl.int64) * M + rows, total, mask=here)
        if len(store) > 0:
            _store(store, left, first, n * BN)
            _store(store, right, first, n * BN + BN // 2)
    if len(store) > 0:
        tma.store_wait(0)


@gluon.jit
def _store(store, e, m0, n0):
    """By way of shared memory for half of the columns: for all of them it has not the room beside the
    stages. It waits until what lay there has been read."""
    out, staged = store
    tma.store_wait(0)
    staged.store(e.to(out.dtype))
    fence_async_shared()
    async_store(out, [m0, n0], staged)


@gluon.jit(do_not_specialize=("M", "N", "D", "v0", "stride_x", "stride_w", "stride_out", "programs"))
def e_tiles(
    x_ptr,  # [M, D]
    w_ptr,  # [N, D]
    out_ptr,  # E [M, N], or None
    target_ptr,  # i64[M], in the whole vocabulary
    reference_ptr,  # f32[M]: r in bits
    partial_ptr,  # f32[1, tiles of N, M], written: the sums of E
    M, N, D,  # D > 0
    v0,  # where the chunk starts in the vocabulary
    stride_x, stride_w, stride_out,
    scale,  # or None for 1
    programs,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    LAG: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """A persistent program walks the tiles pid, pid + programs, ..., of which there is at least one. TAIL: N
    is no multiple of BN. With 4 warps."""
    H: gl.constexpr = BM // 2
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    x_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([H, BK], dtype)
    w_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, BK], dtype)
    out_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([H, BN // 2], dtype)
    # Before the descriptors, whose scratch may otherwise lie in the ring: Triton then fences every step.
    x_ring = gl.allocate_shared_memory(dtype, [2 * STAGES, H, BK], x_layout)
    w_ring = gl.allocate_shared_memory(dtype, [STAGES, BN, BK], w_layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    for i in gl.static_range(2 * STAGES):
        mbarrier.init(empty.index(i), count=1)
    x = tma.make_tensor_descriptor(x_ptr, [M, D], [stride_x, 1], [H, BK], x_layout)
    w = tma.make_tensor_descriptor(w_ptr, [N, D], [stride_w, 1], [BN, BK], w_layout)
    if out_ptr is not None:
        out = tma.make_tensor_descriptor(out_ptr, [M, N], [stride_out, 1], [H, BN // 2], out_layout)
        upper = (out, gl.allocate_shared_memory(dtype, [H, BN // 2], out_layout))
        lower = (out, gl.allocate_shared_memory(dtype, [H, BN // 2], out_layout))
    else:
        upper = ()  # type: ignore[assignment]
        lower = ()  # type: ignore[assignment]
    ring = (x_ring, w_ring, ready, empty)
    by_row = (target_ptr, reference_ptr, partial_ptr)
    sizes = (gl.cdiv(M, BM), gl.cdiv(N, BN), D, programs)
    gl.warp_specialize(
        [
            (_half, (ring, upper, by_row, sizes, M, N, v0, scale, 0, BM, BN, BK, GROUP, STAGES, LAG, TAIL)),
            (_half, (ring, lower, by_row, sizes, M, N, v0, scale, 1, BM, BN, BK, GROUP, STAGES, LAG, TAIL)),
            (_load, (x, w, ring, sizes, BM, BN, BK, GROUP, STAGES)),
        ],
        [4, 1],
        [HALF_REGISTERS, LOAD_REGISTERS],
    )
