"""Which kernels run a call, and the tile they run with. Needs no triton, so that asking needs none."""

import importlib.util
from functools import cache
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    rows: int
    columns: int
    depth: int
    group: int  # row blocks that go down the vocabulary together
    warps: int
    stages: int
    descriptors: bool  # TMA

    def half(self) -> "Tile":
        """Of the rows, for results that need more registers. Row sums are of the same columns."""
        return self._replace(rows=self.rows // 2)

    def plain(self) -> "Tile":
        """Without descriptors: for rows listed by number, or tensors that descriptors cannot take."""
        return self._replace(rows=min(self.rows, 128), descriptors=False)


# (capability, dtype) -> the tile of the GEMM. Chosen by registers and shared memory alone until
# benchmarks/tune_tiles.py has run on the chip.
TILES = {
    ((8, 0), torch.bfloat16): Tile(128, 128, 64, 8, 8, 3, False),
    ((9, 0), torch.bfloat16): Tile(256, 128, 64, 8, 8, 3, True),
    ((10, 0), torch.bfloat16): Tile(256, 128, 64, 8, 8, 3, True),
}


@cache
def tile(device: torch.device, dtype: torch.dtype) -> Tile | None:
    """The TILES row for tensors on this device, or None."""
    if device.type != "cuda" or torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return None
    return TILES.get((torch.cuda.get_device_capability(device), dtype))


def padded(columns: int, dtype: torch.dtype) -> int:
    """Columns in whole 128 bytes, for descriptors and cuBLAS."""
    step = 128 // dtype.itemsize
    return -(-columns // step) * step


def backend(device: torch.device | str, dtype: torch.dtype) -> str:
    """ "triton" or "torch": what runs the head on tensors of this device and dtype.

    Triton needs a CUDA device and a dtype in TILES: bfloat16 only, whose range holds E (float16
    overflows 11 nats away). Everything else, and a head with a LoRA or with strided weights, takes
    chunks of fp32 logits by torch.mm. On a CPU torch has the same plans.
    """
    return "torch" if tile(torch.device(device), dtype) is None else "triton"


def takes_triton(head, x: torch.Tensor) -> bool:
    """Whether this call's tensors go to the Triton kernels."""
    plain = head.lora_a is None and head.weight.stride(1) == 1
    return plain and tile(x.device, x.dtype) is not None
