"""GPUs by name, and what they can do at best."""

import functools
import re
from dataclasses import dataclass

_PCIE_4, _PCIE_5 = 32e9, 64e9  # bytes/s of 16 lanes, one way


@dataclass(frozen=True)
class Card:
    """A GPU: dense bf16 tensor FLOP/s with fp32 accumulation, bytes/s of its memory, bytes of it, capability,
    and bytes/s one way of its link to the other GPUs of a node."""

    flops: float
    bandwidth: float
    memory: int
    capability: tuple[int, int]
    link: float = _PCIE_4


# From NVIDIA's data sheets and architecture whitepapers (dense rates; the 30 and 40 series accumulate in
# fp32 at half of their rate for fp16). Links: the data sheets "NVIDIA A100 Tensor Core GPU" (NVLink 600 GB/s
# both ways), "H100" (900), "H200" (900), and "NVIDIA DGX B200" (1.8 TB/s), each the SXM board with NVSwitch
# and half of it one way; the others by PCIe (4.0 x16, of the RTX 5090 5.0 x16), as no data sheet of theirs
# but the RTX 3090's has an NVLink, which joins two cards only.
CARDS = {
    "RTX 3090": Card(71e12, 936e9, 24 << 30, (8, 6)),
    "RTX 4090": Card(165.2e12, 1008e9, 24 << 30, (8, 9)),
    "RTX 5090": Card(209.5e12, 1792e9, 32 << 30, (12, 0), _PCIE_5),
    "A10": Card(125e12, 600e9, 24 << 30, (8, 6)),
    "L4": Card(121e12, 300e9, 24 << 30, (8, 9)),
    "L40S": Card(362e12, 864e9, 48 << 30, (8, 9)),
    "A100": Card(312e12, 2039e9, 80 << 30, (8, 0), 300e9),
    "H100": Card(989e12, 3350e9, 80 << 30, (9, 0), 450e9),
    "H200": Card(989e12, 4800e9, 141 * 10**9, (9, 0), 450e9),
    "B200": Card(2250e12, 8000e9, 180 * 10**9, (10, 0), 900e9),
}


@functools.cache  # asked at each step
def card_named(name: str) -> Card | None:
    """The card whose name is part of a device's name, as in "NVIDIA H100 80GB HBM3"; as words of it, for an
    L40 is no L4."""
    found = [known for known in CARDS if re.search(rf"\b{known}\b", name, re.IGNORECASE)]
    return CARDS[max(found, key=len)] if found else None
