"""What an optimizer's states take, by each library's own rule, before any of them is made."""

import math

from fastdpo.optim.spec import OptimSpec

# (bits, elements that share a scale) of quantised states; torchao quantises whole blocks only
QUANTISED = {"adamw_8bit": (8, 256), "adamw_torch_8bit": (8, 256), "adamw_torch_4bit": (4, 128)}
SMALL = 4096  # both libraries keep 32-bit states of tensors with fewer elements
PAGED_FROM = 100_000  # bitsandbytes pages states of so many elements
PIECE = 1 << 23  # elements of a weight that are stepped at once where a copy in fp32 is needed
_FP32 = 4


def state_bytes(
    spec: OptimSpec, numel: int, dtype_bytes: int = 4, shape: tuple[int, ...] | None = None
) -> int:
    """Bytes on the device that the states of a trained weight take: 0 under offload_optimizer.

    Paged states (paged_adamw_*) count as none, for they leave when the device is full. Left out: an
    optimizer's 8 KB of tables and a step number a weight. dtype_bytes: the weight's own, which torch's AdamW
    takes for its states where that is more than fp32. shape: only adafactor's depend on it.
    """
    return 0 if spec.offload_optimizer else _forms(spec.optim, numel, dtype_bytes, shape)[0]


def host_state_bytes(spec: OptimSpec, numel: int, dtype_bytes: int = 4, shape=None) -> int:
    """Bytes of those states that lie, or can be moved, in the host's memory."""
    fixed, paged = _forms(spec.optim, numel, dtype_bytes, shape)
    return fixed + paged if spec.offload_optimizer else paged


def step_bytes(spec: OptimSpec, numel: int, dtype_bytes: int = 4) -> int:
    """Bytes on the device, beside weight, gradient and states, while the largest weight (of so many elements)
    is stepped: fp32 copies and the random bits of stochastic rounding, a piece at a time."""
    temporary = {"adafactor": 3, "rmsprop": 2}.get(spec.optim, 0)  # fp32 copies that the library itself makes
    if not (spec.pure_bf16 or spec.offload_optimizer):
        return temporary * max(_FP32, dtype_bytes) * numel
    piece = numel if spec.optim == "adafactor" else min(numel, PIECE)
    rounding = 4 if spec.pure_bf16 else 0  # random bits, NaN mask and two results
    stepping = 1 if spec.offload_optimizer else 2 + temporary  # the new weights, or weights and gradient
    return (stepping + rounding) * _FP32 * piece


def _forms(optim: str, numel: int, dtype_bytes: int, shape) -> tuple[int, int]:
    """(bytes that stay where the step is, bytes that are paged)."""
    if optim == "sgd":
        return 0, 0
    if optim == "rmsprop":
        return max(_FP32, dtype_bytes) * numel, 0
    if optim == "adafactor":
        shape = shape or (numel,)
        factored = len(shape) > 1
        return _FP32 * (numel // shape[-1] + numel // shape[-2] if factored else numel), 0
    scales, states = 0, 2 * _FP32 * numel
    if optim == "adamw_torch_fused":
        states = 2 * max(_FP32, dtype_bytes) * numel
    bits, block = QUANTISED.get(optim.removeprefix("paged_"), (32, 1))
    if bits < 32 and numel >= SMALL and not ("torch" in optim and numel % block):
        scales, states = 2 * _FP32 * math.ceil(numel / block), 2 * numel * bits // 8
    paged = optim.startswith("paged_") and numel >= PAGED_FROM
    return (scales, states) if paged else (scales + states, 0)
