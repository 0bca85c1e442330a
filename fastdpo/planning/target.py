"""The device that a plan is for: what it computes with, and what it needs beside what a step allocates."""

from dataclasses import dataclass

import torch
from fastdpo_kernels import backend, tiles

from fastdpo.config.keys import Config
from fastdpo.model.cards import CARDS, Card, card_named

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
