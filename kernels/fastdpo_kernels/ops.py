"""What differs by device and dtype, so that nothing else has to ask."""

import ctypes
import mmap
from contextlib import contextmanager

import torch

_HUGE = 4 << 20
_libc = ctypes.CDLL(None) if hasattr(mmap, "MADV_HUGEPAGE") else None


@contextmanager
def exact_on(like: torch.Tensor):
    """GEMMs of float32 in float32, whatever the caller allows: autocast, TF32, or bfloat16 on a CPU. And
    like's device is the current one, where Triton launches."""
    matmuls = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    lowered = [(m, m.fp32_precision) for m in matmuls if m.fp32_precision in ("tf32", "bf16")]
    with torch.autocast(like.device.type, enabled=False), torch.cuda.device_of(like):
        try:
            for matmul, _ in lowered:
                matmul.fp32_precision = "ieee"
            yield
        finally:
            for matmul, precision in lowered:
                matmul.fp32_precision = precision


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """torch.empty, backed by huge pages where Linux allows it.

    First touch of a fresh 155 MB matrix takes 60 ms in 4 KB pages and 9 ms in huge ones, against 85
    ms for the GEMM that fills it.
    """
    out = torch.empty(shape, dtype=dtype, device=device)
    if _libc is not None and out.device.type == "cpu" and out.nbytes >= _HUGE:
        start = -(-out.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = out.data_ptr() + out.nbytes - start
        # advice only: a kernel without huge pages refuses it and nothing changes
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return out


def aligned_rows(M: int, columns: int, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An uninitialised [M, columns or more] matrix, rows in whole 128 bytes: for descriptors and cuBLAS."""
    dtype = dtype or like.dtype
    step = 128 // dtype.itemsize
    return torch.empty(M, -(-columns // step) * step, dtype=dtype, device=like.device)


def operand(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as a GEMM reads it: half is widened on CPU, where half GEMMs give half results."""
    half = tensor.dtype in (torch.bfloat16, torch.float16)
    return tensor.float() if half and tensor.device.type == "cpu" else tensor


def matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """out = a @ b, accumulated at least in float32.

    out has the operands' dtype, or float32 over half operands on CUDA, or any dtype on CPU.
    """
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(a, b))


def matmul_add(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """out += a @ b in out's dtype: the operands' dtype, or on CUDA float32 over half operands."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


def scale_(tensor: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """tensor *= factor, which has no dimension, without rounding factor to a half tensor's dtype first,
    as CUDA does with numbers that are on the device."""
    return tensor.mul_(factor[None] if tensor.is_cuda else factor)
