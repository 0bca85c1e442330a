"""The device that a plan is for: what it computes with, and what it needs beside what a step allocates."""

import re
from dataclasses import dataclass

import torch
from fastdpo_kernels import backend, tiles

from fastdpo.config.keys import Config

# What a process takes of a card that torch's allocator does not count: the context, loaded kernels.
# An assumption, not measured yet: 450 to 700 MB are usual with CUDA 12 and 13.
CONTEXT = 600 << 20
# cuBLAS's workspace, which torch's allocator does count: 32 MiB a handle from Hopper on, 8 MiB before
# (torch/aten/src/ATen/cuda/CublasHandlePool.cpp), and as much for cublasLt.
CUBLAS = {True: 64 << 20, False: 16 << 20}
# Memory that the allocator holds and cannot use, as a share of what comes and goes in a step (weights and
# states stay where they are). An assumption, not measured yet.
SLACK = 0.05


@dataclass(frozen=True)
class Card:
    """A GPU: dense bf16 tensor FLOP/s with fp32 accumulation, bytes/s of its memory, bytes of it,
    capability."""

    flops: float
    bandwidth: float
    memory: int
    capability: tuple[int, int]


# From NVIDIA's data sheets and architecture whitepapers (dense rates; the 30 and 40 series accumulate in
# fp32 at half of their rate for fp16).
CARDS = {
    "RTX 3090": Card(71e12, 936e9, 24 << 30, (8, 6)),
    "RTX 4090": Card(165.2e12, 1008e9, 24 << 30, (8, 9)),
    "RTX 5090": Card(209.5e12, 1792e9, 32 << 30, (12, 0)),
    "A10": Card(125e12, 600e9, 24 << 30, (8, 6)),
    "L4": Card(121e12, 300e9, 24 << 30, (8, 9)),
    "L40S": Card(362e12, 864e9, 48 << 30, (8, 9)),
    "A100": Card(312e12, 2039e9, 80 << 30, (8, 0)),
    "H100": Card(989e12, 3350e9, 80 << 30, (9, 0)),
    "H200": Card(989e12, 4800e9, 141 * 10**9, (9, 0)),
    "B200": Card(2250e12, 8000e9, 180 * 10**9, (10, 0)),
}


def card_named(name: str) -> Card | None:
    """The card whose name is part of a device's name, as in "NVIDIA H100 80GB HBM3"; as words of it, for an
    L40 is no L4."""
    found = [known for known in CARDS if re.search(rf"\b{known}\b", name, re.IGNORECASE)]
    return CARDS[max(found, key=len)] if found else None


@dataclass(frozen=True)
class Target:
    """What a step runs on. On a CPU it is simulated as the CPU runs it, without any stand-in."""

    is_cpu: bool = False
    card: Card | None = None
    capability: tuple[int, int] = (8, 7)  # where nothing is known: no Triton GEMM, small workspaces
    memory: int | None = None  # bytes that the GPU has, where that is known

    @classmethod
    def here(cls) -> "Target":
        """This machine's GPU, or an unknown one where there is none."""
        if not torch.cuda.is_available():
            return cls()
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        return cls(False, card_named(gpu.name), (gpu.major, gpu.minor), gpu.total_memory)

    @classmethod
    def of_card(cls, name: str) -> "Target | None":
        """A card by its name, or by enough of it: "4090"."""
        short = [known for known in CARDS if name.upper() in known]
        card = card_named(name) or (CARDS[short[0]] if len(short) == 1 else None)
        return cls(False, card, card.capability, card.memory) if card else None

    def dtype(self, config: Config) -> torch.dtype:
        """The compute dtype as model.load_policy takes it, for the target."""
        on_gpu = not self.is_cpu and self.capability >= (8, 0)
        bf16 = config.pure_bf16 or config.dtype == "bf16" or (config.dtype == "auto" and on_gpu)
        return torch.bfloat16 if bf16 else torch.float32

    def head_backend(self, dtype: torch.dtype, *, lora: bool = False) -> str:
        """fastdpo_kernels.backend, for a device that need not be here; without what this process avoids."""
        if self.is_cpu:
            return backend("cpu", dtype)
        if not lora and (self.capability, dtype) in tiles.TILES and not tiles.avoids("plain_triton"):
            return "triton"
        return "torch" if tiles.avoids("cublas") else "cublas"
