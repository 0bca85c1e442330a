"""A GEMM for sm_90 of one row of tiles, as a Launch: with its columns past the end masked as head_tiles
masks them, or under a condition, which makes ptxas serialise its products."""

import torch
import triton
import triton.language as tl
from fastdpo_kernels.launch import Launch


@triton.jit
def one_gemm(x_ptr, w_ptr, out_ptr, N, D, BM: tl.constexpr, BN: tl.constexpr, BRANCH: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [BM, D], [D, 1], [BM, 64])
    w = tl.make_tensor_descriptor(w_ptr, [N, D], [D, 1], [BN, 64])
    out = tl.make_tensor_descriptor(out_ptr, [BM, N], [N, 1], [BM, BN])
    column = tl.arange(0, BN)[None, :]
    for n0 in tl.range(tl.program_id(0) * BN, N, 132 * BN, flatten=True):
        z = tl.zeros((BM, BN), tl.float32)
        for k in range(0, D, 64):
            z = tl.dot(x.load([0, k]), w.load([n0, k]).T, z)
        if BRANCH:
            if N - n0 < BN:
                z = tl.where(column >= N - n0, float("-inf"), z)
        else:
            z = tl.where(column >= N - n0, float("-inf"), z)
        out.store([0, n0], tl.exp2(z).to(tl.bfloat16))


def launch(branch: bool) -> Launch:
    new = lambda *shape: torch.empty(*shape, dtype=torch.bfloat16, device="meta")
    rows, columns, depth = 256, 4096, 1024
    arguments = dict(x_ptr=new(rows, depth), w_ptr=new(columns, depth), out_ptr=new(rows, columns))
    arguments |= dict(N=columns, D=depth, BM=rows, BN=128, BRANCH=branch)
    return Launch(one_gemm, arguments, 32, warps=8, stages=3)
