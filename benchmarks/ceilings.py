"""What this machine can do at best: the numbers that utilisation is measured against.

python -m benchmarks.ceilings [--small]
"""

import argparse
import json
import statistics

import torch

from fastdpo.doctor.speed import seconds_of
from fastdpo.model.loading import resolve_dtype

# M x K times K x N: decoder layers of 0.5B to 8B models, an lm_head's chunk, and a large square
SHAPES = ((8192, 896, 4864), (8192, 2048, 8192), (8192, 4096, 14336), (8192, 2048, 32768), (8192, 8192, 8192))
SMALL_SHAPES = ((256, 256, 1024), (512, 512, 512))
COPY_BYTES, SMALL_COPY_BYTES = 1 << 30, 1 << 25


def gemm_tflops(shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of one product [M, K] @ [K, N] with normal numbers (zeros would run faster)."""
    M, K, N = shape
    draw = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(*s, generator=draw, device=device, dtype=dtype) for s in ((M, K), (N, K)))
    out = torch.empty(M, N, device=device, dtype=dtype)
    times = seconds_of(lambda: torch.mm(a, b.t(), out=out), device)
    return 2 * M * K * N / statistics.median(times) / 1e12


def copy_gb_per_second(n_bytes: int, device: torch.device) -> float:
    """GB/s read and written by a copy within the device's memory."""
    source = torch.empty(n_bytes, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    times = seconds_of(lambda: target.copy_(source), device)
    return 2 * n_bytes / statistics.median(times) / 1e9


def measure(device: str | torch.device, small: bool = False) -> dict:
    """{"dtype", "gemm_tflops": the most of all shapes, "gemms": {"MxKxN": TFLOP/s}, "copy_gb_s"}.

    The dtype is the one that training takes here: bf16 on a GPU, fp32 (never TF32) on a CPU."""
    device = torch.device(device)
    dtype = resolve_dtype("auto") if device.type == "cuda" else torch.float32
    shapes = SMALL_SHAPES if small else SHAPES
    gemms = {"x".join(map(str, shape)): gemm_tflops(shape, device, dtype) for shape in shapes}
    copy = copy_gb_per_second(SMALL_COPY_BYTES if small else COPY_BYTES, device)
    dtype = str(dtype).removeprefix("torch.")
    return {"dtype": dtype, "gemm_tflops": max(gemms.values()), "gemms": gemms, "copy_gb_s": copy}


def main() -> None:
    """Prints them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="small shapes: what a CPU does in a second")
    args = parser.parse_args()
    print(json.dumps(measure("cuda" if torch.cuda.is_available() else "cpu", args.small), indent=1))


if __name__ == "__main__":
    main()
