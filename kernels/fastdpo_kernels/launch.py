"""How each kernel is launched: its arguments, tile and programs. Compiling ahead of time for a chip
that is not here (benchmarks/head/aot.py) and launching read the same `Launch`.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton

from . import triton_chunk
from . import triton_finish as finish
from . import triton_rows as rows
from .triton_tile import head_tiles

SLOTS = 6  # of partial results, numbered in triton_tile.py; the first three settle rows out of range
REGISTERS = 65536  # of a multiprocessor, on every chip that Triton knows; a thread has 255 at most
MERGED = 16  # tiles whose sums are merged at a time
LANES = 1024  # columns of a chunk of logits that a program of the row kernels takes at a time


@dataclass(frozen=True)
class Launch:
    kernel: object
    arguments: dict  # tensors, numbers, None
    constants: dict
    programs: int
    warps: int = 4
    stages: int = 1
    fuse: bool = True  # products into sums; without, options that add outputs change no bits
    registers: int | None = None  # a thread may have; None: as many as the compiler thinks fit

    @property
    def options(self):
        return dict(
            num_warps=self.warps,
            num_stages=self.stages,
            enable_fp_fusion=self.fuse,
            maxnreg=self.registers,
        )

    def run(self):
        if not self.programs:
            return
        # Descriptors made on the device need scratch. The allocator is a context variable, which
        # autograd's backward thread does not inherit: so at each launch.
        triton.set_allocator(_scratch)
        self.kernel[(self.programs,)](**self.arguments, **self.constants, **self.options)


def _scratch(size, alignment, stream):
    return torch.empty(size, dtype=torch.int8, device="cuda")


@cache
def processors(device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def tile_pass(tile, head, x, target, span, state, *, out=None, partial=None, sums=False, profile=False,
              stats=(), factor=None, by_logit=None, listed=None):  # fmt: skip
    """The GEMM over the vocabulary's [v0, v1), leaving what is asked for; see triton_tile.py.

    partial f32[slots, tiles of `tile.columns`, M]; listed: (rows i32[M], count i32[1]) for these alone.
    """
    v0, v1 = span
    M, w = len(x), head.weight[v0:v1]
    for needs_registers in (profile or by_logit is not None, head.softcap is not None):
        tile = tile.half() if needs_registers else tile
    rows_ptr, count_ptr = (None, None) if listed is None else listed
    programs = min(processors(x.device), triton.cdiv(M, tile.rows) * triton.cdiv(v1 - v0, tile.columns))
    arguments = dict(
        x_ptr=x,
        w_ptr=w,
        bias_ptr=None if head.bias is None else head.bias[v0:v1],
        out_ptr=out,
        target_ptr=target,
        target_logit_ptr=state.target_logit,
        reference_ptr=state.reference,
        factor_ptr=factor,
        by_logit_ptr=by_logit,
        partial_ptr=partial,
        rows_ptr=rows_ptr,
        count_ptr=count_ptr,
        M=M,
        N=v1 - v0,
        D=x.shape[1],
        v0=v0,
        stride_x=x.stride(0),
        stride_w=w.stride(0),
        stride_out=0 if out is None else out.stride(0),
        slot_stride=0 if partial is None else partial.stride(0),
        scale=float(head.scale),
        softcap=None if head.softcap is None else float(head.softcap),
        programs=programs,
    )
    constants = dict(
        BM=tile.rows,
        BN=tile.columns,
        BK=tile.depth,
        GROUP=tile.group,
        DESCRIPTORS=tile.descriptors,
        SUMS=sums,
        PROFILE=profile,
        ENTROPY="entropy" in stats,
        SQUARED="log_sum_sq_probs" in stats,
        MEAN="mean_logit" in stats,
    )
    # One program a multiprocessor: registers that the compiler saves for a second one, at the price of
    # spills, are of no use.
    most = min(255, REGISTERS // (32 * tile.warps))
    return Launch(head_tiles, arguments, constants, programs, tile.warps, tile.stages, registers=most)


def start_rows(head, x, target, state):
    arguments = dict(
        x_ptr=x,
        w_ptr=head.weight,
        bias_ptr=head.bias,
        target_ptr=target,
        reference_ptr=state.reference,
        target_logit_ptr=state.target_logit,
        rest_ptr=state.rest,
        V=len(head.weight),
        D=x.shape[1],
        stride_x=x.stride(0),
        stride_w=head.weight.stride(0),
        scale=float(head.scale),
        softcap=None if head.softcap is None else float(head.softcap),
    )
    return Launch(rows.start_rows, arguments, dict(BLOCK=1024), len(x))


def merge_sums(partial, tiles, state, out_of_range):
    M = len(out_of_range)
    arguments = dict(partial_ptr=partial, rest_ptr=state.rest, out_of_range_ptr=out_of_range, M=M, T=tiles)
    return Launch(rows.merge_sums, arguments, dict(BM=32, BT=MERGED), triton.cdiv(M, 32))


def gather(out_of_range, listed):
    arguments = dict(
        out_of_range_ptr=out_of_range, rows_ptr=listed[0], count_ptr=listed[1], M=len(out_of_range)
    )
    return Launch(rows.gather, arguments, dict(BLOCK=1024), 1)


def settle(listed, partial, tiles, state, shrink):
    M = len(shrink)
    arguments = dict(
        rows_ptr=listed[0],
        count_ptr=listed[1],
        partial_ptr=partial,
        slot_stride=partial.stride(0),
        reference_ptr=state.reference,
        rest_ptr=state.rest,
        shrink_ptr=shrink,
        M=M,
        T=tiles,
    )
    return Launch(rows.settle, arguments, dict(BM=32, BT=MERGED), triton.cdiv(M, 32))


def rescale(listed, shrink, sums):
    programs = min(processors(sums.device), len(sums))
    arguments = dict(
        rows_ptr=listed[0],
        count_ptr=listed[1],
        shrink_ptr=shrink,
        sums_ptr=sums,
        D=sums.shape[1],
        programs=programs,
    )
    return Launch(rows.rescale, arguments, dict(BLOCK=1024), programs)


def finish_rows(state, total, logp):
    arguments = dict(
        reference_ptr=state.reference,
        rest_ptr=state.rest,
        target_logit_ptr=state.target_logit,
        total_ptr=total,
        logp_ptr=logp,
        M=len(logp),
    )
    return Launch(finish.finish_rows, arguments, dict(BLOCK=128), triton.cdiv(len(logp), 128))


def finish_stats(partial, tiles, V, target_logit, values):
    """values: {name: f32[M] to write} of the stats that were named."""
    M = len(target_logit)
    arguments = dict(
        partial_ptr=partial,
        slot_stride=partial.stride(0),
        target_logit_ptr=target_logit,
        entropy_ptr=values.get("entropy"),
        squares_ptr=values.get("log_sum_sq_probs"),
        mean_ptr=values.get("mean_logit"),
        top1_ptr=values.get("is_top1"),
        M=M,
        T=tiles,
        V=V,
    )
    return Launch(finish.finish_stats, arguments, dict(BM=32, BT=MERGED), triton.cdiv(M, 32))


def put_target(out, target, value, span):
    """out [M, v]: value f32[M] at each target within the chunk `span`."""
    arguments = dict(
        out_ptr=out,
        target_ptr=target,
        value_ptr=value,
        M=len(target),
        N=span[1] - span[0],
        v0=span[0],
        stride_out=out.stride(0),
    )
    return Launch(finish.put_target, arguments, dict(BLOCK=128), triton.cdiv(len(target), 128))


def hidden_gradient(sums, weight, target, factor, coefficient, out):
    arguments = dict(
        sums_ptr=sums,
        w_ptr=weight,
        target_ptr=target,
        factor_ptr=factor,
        coefficient_ptr=coefficient,
        out_ptr=out,
        V=len(weight),
        D=out.shape[1],
        stride_w=weight.stride(0),
    )
    return Launch(finish.hidden_gradient, arguments, dict(BLOCK=1024), len(out))


def chunk_sums(head, z, target, span, sums, peak, shrink, out=None):
    """z f32[M, v]: the product over the chunk `span`; sums: a chunk.Sums."""
    arguments = _chunk(head, z, target, span, out) | dict(
        target_logit_ptr=sums.target_logit,
        before_ptr=sums.peak,
        peak_ptr=peak,
        shrink_ptr=shrink,
        rest_ptr=sums.rest,
        plogp_ptr=sums.plogp,
        squares_ptr=sums.squares,
        logits_ptr=sums.logits,
    )
    return Launch(triton_chunk.chunk_sums, arguments, dict(BLOCK=LANES), len(z), fuse=False)


def chunk_gradient(head, z, target, span, peak, factor, by_logit, out):
    arguments = _chunk(head, z, target, span, out)
    arguments |= dict(peak_ptr=peak, factor_ptr=factor, by_logit_ptr=by_logit)
    return Launch(triton_chunk.chunk_gradient, arguments, dict(BLOCK=LANES), len(z), fuse=False)


def _chunk(head, z, target, span, out):
    v0, v1 = span
    assert z.stride(1) == 1 and (out is None or out.stride(1) == 1)
    return dict(
        z_ptr=z,
        out_ptr=out,
        bias_ptr=None if head.bias is None else head.bias[v0:v1],
        target_ptr=target,
        N=v1 - v0,
        v0=v0,
        stride_z=z.stride(0),
        stride_out=0 if out is None else out.stride(0),
        scale=float(head.scale),
        softcap=None if head.softcap is None else float(head.softcap),
    )
