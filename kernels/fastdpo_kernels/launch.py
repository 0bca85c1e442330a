"""How a kernel is launched. Compiling ahead of time for a chip that is not here records the very `Launch`es
that a pass would run (benchmarks/head/aot.py).
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton

from . import tiles
from .triton_finish import put_target as put_target_kernel
from .triton_tile import head_tiles

REGISTERS = 65536  # of a multiprocessor, on every chip that Triton knows; a thread has 255 at most


@dataclass(frozen=True)
class Launch:
    kernel: Any
    arguments: dict  # tensors, numbers, None; and the kernel's constants
    programs: int
    warps: int = 4
    stages: int = 1
    fuse: bool = True  # products into sums; without, options that add outputs change no bits
    registers: int | None = None  # a thread may have; None: as many as the compiler thinks fit

    @property
    def options(self):
        fixed = dict(enable_fp_fusion=self.fuse, maxnreg=self.registers)
        return dict(num_warps=self.warps, num_stages=self.stages, **fixed)

    def run(self):
        if self.programs:
            # Descriptors made on the device need scratch. The allocator is a context variable, which
            # autograd's backward thread does not inherit: so at each launch.
            triton.set_allocator(lambda size, *_: torch.empty(size, dtype=torch.int8, device="cuda"))
            self.kernel[(self.programs,)](**self.arguments, **self.options)


@cache
def processors(device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def run(kernel, programs, *arguments, warps=4, stages=1, fuse=True, registers=None, **named):
    """Launches the kernel with its arguments in order, or by name; constants by name. See Launch."""
    by_name = dict(zip(kernel.arg_names, arguments)) | named
    Launch(kernel, by_name, programs, warps, stages, fuse, registers).run()


def tile_pass(tile, head, x, target, span, state, *, out=None, partial=None, sums=False, profile=False,
              stats=(), factor=None, by_logit=None, flags=None):  # fmt: skip
    """The GEMM over the vocabulary's [v0, v1), leaving what is asked for; see triton_tile.py.

    partial f32[slots, tiles of `tile.columns`, M]; flags i32[M + blocks of `tile.rows`]: for these rows
    alone, by this very tile, whatever it leaves.
    """
    (v0, v1), M = span, len(x)
    w = head.weight[v0:v1]
    for needs_registers in (profile or by_logit is not None, head.softcap is not None):
        tile = tile.half() if needs_registers and flags is None else tile
    programs = min(processors(x.device), triton.cdiv(M, tile.rows) * triton.cdiv(v1 - v0, tile.columns))
    by_row = (target, state.target_logit, state.peak, factor, by_logit, partial, flags)
    strides = [0 if matrix is None else matrix.stride(0) for matrix in (x, w, out, partial)]
    sizes = (M, v1 - v0, x.shape[1], v0, *strides, *head.ends, programs)
    constants = dict(BM=tile.rows, BN=tile.columns, BK=tile.depth, GROUP=tile.group)
    # by the whole vocabulary, so that all its spans run one program
    step = math.gcd(tile.columns, len(head.weight), v0, v1)
    if sums and not profile and tiles.takes_gluon(tile, head, x):
        from . import triton_gluon as gluon  # experimental in Triton: where nobody asks, it is not looked at

        few = (target, state.peak, partial, *sizes[:4], *strides[:3], head.ends[0], programs)
        constants |= dict(TAIL=step < tile.columns, **gluon.OPTIONS)
        return run(gluon.e_tiles, programs, x, w, out, *few, **constants)
    constants |= dict(STEP=step, DESCRIPTORS=tile.descriptors, DIAGONAL=tile.diagonal, PARTS=tile.parts)
    constants |= dict(SUMS=sums, PROFILE=profile, ENTROPY="entropy" in stats)
    constants |= dict(SQUARED="log_sum_sq_probs" in stats, MEAN="mean_logit" in stats)
    # One program a multiprocessor: registers that the compiler saves for a second one, at the price of
    # spills, are of no use.
    registers = min(255, REGISTERS // (32 * tile.warps))
    options = dict(warps=tile.warps, stages=tile.stages, registers=registers)
    run(head_tiles, programs, x, w, head.bias_of(span), out, *by_row, *sizes, **constants, **options)


def put_target(out, target, value, span):
    """out [M, v]: value f32[M] at each target within the chunk `span`."""
    M, (v0, v1) = len(target), span
    programs, sizes = triton.cdiv(M, 128), (M, v1 - v0, v0, out.stride(0))
    run(put_target_kernel, programs, out, target, value, *sizes, BLOCK=128)
