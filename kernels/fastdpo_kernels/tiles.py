"""Which kernels run a call, and the tile they run with. Needs no triton, so that asking needs none."""

import importlib.util
import sys
from functools import cache
from typing import NamedTuple

import torch

from .head import Head


class Tile(NamedTuple):
    rows: int
    columns: int
    depth: int
    group: int  # row blocks that go down the vocabulary together
    warps: int
    stages: int
    descriptors: bool  # TMA
    parts: int = 1  # of a row's columns, each summed for itself: 1, 2 or 4, see triton_tile._row_sums
    diagonal: bool = True  # the target's logit is start_rows' and not that of the tile which has it

    def half(self) -> "Tile":
        """Of the rows, for results that need more registers. Row sums are of the same columns, and come to
        the same bits."""
        return self._replace(rows=self.rows // 2, warps=min(self.warps, max(4, self.rows // 16)))

    def plain(self) -> "Tile":
        """Without descriptors: for rows out of range, or tensors that descriptors cannot take."""
        return self._replace(rows=min(self.rows, 128), descriptors=False)


# (capability, dtype) -> the tile of the GEMM, of plan.TILE columns. Chosen by compiling alone (no spills,
# shared memory within the chip's) until benchmarks/head/tune_tiles.py has run on the chip. Capabilities that
# nothing was compiled for, as 8.7 or 12.1, have none.
# mma.sync, within 99 KB: E passes through what the stages held. By TMA (12.0 has it) E would have no place.
_MMA = Tile(128, 128, 64, 8, 8, 3, False)
_WGMMA = Tile(256, 128, 64, 8, 8, 3, True, parts=2)  # within 227 KB
_TCGEN05 = _WGMMA._replace(parts=4)
TILES = {(chip, torch.bfloat16): _MMA for chip in ((8, 0), (8, 6), (8, 9), (12, 0))}
TILES[(9, 0), torch.bfloat16] = _WGMMA
TILES |= {(chip, torch.bfloat16): _TCGEN05 for chip in ((10, 0), (10, 3))}

RUNGS = ("triton", "plain_triton", "cublas", "torch")  # ways to run the head, the one to like best first
UNPROVEN = ("gluon",)  # above those, once a GPU has shown them right and faster; until then see `allow`
_avoided: frozenset[str] = frozenset()
_allowed: frozenset[str] = frozenset()


def avoid(*rungs: str) -> None:
    """From now on no head in this process runs by these; what only an earlier call named is allowed again.
    For a chip or a Triton on which a kernel does not compile, or is wrong: `avoid("triton", "plain_triton")`.
    Call it before anything is computed: a backward expects what is allowed to be as its forward met it.

    triton        the Triton GEMM with tensor descriptors (TMA); plain_triton, without, then takes its place
    plain_triton  that GEMM in any form: with descriptors too it is what rows out of range are computed by
    cublas        the row kernels over logits by torch.mm
    torch         cannot be avoided: plain torch is what is left

    `backend` says what is taken then. Raises ValueError for other names.
    """
    global _avoided
    if unknown := set(rungs) - set(RUNGS[:-1]):
        raise ValueError(f"avoid knows {', '.join(RUNGS[:-1])}, got {', '.join(sorted(map(str, unknown)))}")
    before, _avoided = _avoided, frozenset(rungs)
    if _avoided != before and "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # what is compiled holds what `_backend` said as a constant


def allow(*rungs: str) -> None:
    """From now on heads in this process run by these where they can, though no GPU has shown them right;
    by what only an earlier call named no longer. `allow()` takes all of them back.

    gluon         a warp-specialised kernel (triton_gluon.py) for the forward's pass over a head without bias,
                  softcap and statistics, on sm_90

    Raises ValueError for other names.
    """
    global _allowed
    if unknown := set(rungs) - set(UNPROVEN):
        raise ValueError(f"allow knows {', '.join(UNPROVEN)}, got {', '.join(sorted(map(str, unknown)))}")
    _allowed = frozenset(rungs)


def takes_gluon(tile: Tile, head: Head, x: torch.Tensor) -> bool:
    """Whether a pass that leaves E and its sums, or the sums, goes by triton_gluon.py."""
    # what its registers and shared memory were counted for, and as it sums
    fits = tile[:3] == (256, 128, 64) and tile.parts == 2
    plain = head.bias is None and head.softcap is None and tile.descriptors and tile.diagonal
    return "gluon" in _allowed and fits and plain and _capability(x.device) == (9, 0)


def avoids(rung: str) -> bool:
    return rung in _avoided


def _capability(device: torch.device) -> tuple[int, int]:
    """(0, 0) where Triton does not run."""
    if device.type != "cuda" or torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return 0, 0
    return torch.cuda.get_device_capability(device)


@cache
def tile(device: torch.device, dtype: torch.dtype) -> Tile | None:
    """The TILES row for tensors on this device, or None."""
    return TILES.get((_capability(device), dtype))


@cache
def row_kernels(device: torch.device) -> bool:
    """Whether fp32 logits on this device are reduced by triton_chunk.py's kernels."""
    return _capability(device) >= (8, 0)  # Triton's own limit


def takes_row_kernels(device: torch.device) -> bool:
    return "cublas" not in _avoided and row_kernels(device)


def backend(device: torch.device | str, dtype: torch.dtype, *, lora: bool = False) -> str:
    """What runs the head on tensors of this device and dtype: "triton", "cublas" or "torch". lora: whether
    the head has one.

    triton   a CUDA device and dtype in TILES: bfloat16 only, whose range holds E (float16 overflows
             11 nats away). A head with a LoRA or with strided weights takes cublas all the same.
    cublas   chunks of fp32 logits by torch.mm, reduced by Triton kernels: any other CUDA device from
             sm_80 on, and any dtype but float64
    torch    the same chunks in plain torch: CPUs and whatever is left

    `avoid` takes some of them away.
    """
    return _backend(torch.device(device), dtype, not lora)


def _backend(device: torch.device, dtype: torch.dtype, plain: bool) -> str:
    if plain and "plain_triton" not in _avoided and tile(device, dtype) is not None:
        return "triton"
    return "cublas" if dtype.itemsize <= 4 and takes_row_kernels(device) else "torch"


# The compiler shall not look for a chip. This is torch.compiler.assume_constant_result(_backend), which
# would import the whole of dynamo, and numpy, with this package.
_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def backend_of(x: torch.Tensor, weight: torch.Tensor, lora: bool) -> str:
    """`backend` for a call with these hidden states and this head."""
    return _backend(x.device, x.dtype, not lora and weight.stride(1) == 1 and weight.shape[1] > 0)
