"""Weights that are stepped through copies in fp32, a piece at a time: bf16 weights, with stochastic rounding,
and weights whose states are on the host.

An update of a bf16 weight w is lost where it is below 2^-9 |w|, which at DPO's learning rates nearly all
are; rounded up or down with probabilities that make the mean exact, they add up (Gupta et al. 2015, arXiv
1502.02551; as in torchao and Zamirai et al. 2020, arXiv 2010.06192).
"""

import hashlib
import math

import torch
from torch import Tensor

from fastdpo.optim.bytes import PIECE, QUANTISED
from fastdpo.optim.library import Library

_PER_TENSOR = ("qmap1", "qmap2", "exp_avg.qmap", "exp_avg_sq.qmap")  # the same in every piece


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """f32 -> bf16: up or down to a neighbour, so that the mean is the value; bf16's own values, infinities
    and NaN stay."""
    noise = torch.randint(
        0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator
    )
    rounded = noise.add_(values.view(torch.int32)).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(values.isnan(), values, rounded).bfloat16()  # a NaN's bits may carry over


def noise_seed(*numbers: int) -> int:
    """A generator's seed that is a function of these numbers, 63 bits."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def spans_of(numel: int) -> list[slice]:
    """A flat weight cut evenly into pieces of about PIECE elements at most. All but the last are whole
    blocks of the quantised states, and none is small, so that every piece has the states that the whole
    would have."""
    block = max(block for _, block in QUANTISED.values())
    size = math.ceil(numel / math.ceil(numel / PIECE) / block) * block
    return [slice(start, min(start + size, numel)) for start in range(0, numel, size)]


class Whole:
    """A weight that the library steps as it is."""

    def __init__(self, weight: torch.nn.Parameter, library: Library, weight_decay: float):
        self.weight, self.library, self.weight_decay = weight, library, weight_decay

    def update(self, gradient: Tensor, rate: float, seed: int) -> None:
        self.weight.grad = gradient
        self.library.step([([self.weight], self.weight_decay)], rate)
        self.weight.grad = None

    def tensors(self) -> dict[str, Tensor]:
        return self.library.tensors(self.weight)

    def load(self, saved: dict[str, Tensor]) -> None:
        self.library.load(self.weight, saved)


class Pieces:
    """A weight that is stepped in fp32 copies of one piece after the other, `where` or on its own device."""

    where: str | None = None

    def __init__(self, weight: torch.nn.Parameter, library: Library, weight_decay: float):
        weight.data = weight.data.contiguous()
        self.weight, self.library, self.weight_decay = weight, library, weight_decay
        self.device, numel = torch.device(self.where or weight.device), weight.numel()
        self.spans = spans_of(numel) if library.divides(numel) else [slice(0, numel)]
        self.pieces = [torch.nn.Parameter(torch.empty(0, device=self.device)) for _ in self.spans]

    def shaped(self, values: Tensor) -> Tensor:
        """A piece as the library must see it."""
        return values if self.library.elementwise else values.view(self.weight.shape)

    @torch.no_grad()
    def update(self, gradient: Tensor, rate: float, seed: int) -> None:
        """gradient: of the weight's shape, any float dtype, on any device. The random bits are a function of
        `seed` alone."""
        flat, gradient, generator = self.weight.detach().view(-1), gradient.reshape(-1), self.generator(seed)
        for piece, span in zip(self.pieces, self.spans):
            values = flat[span].to(self.device, torch.float32, copy=True)
            self.step_piece(piece, values, gradient[span].to(self.device, torch.float32), rate)
            self.put_back(flat[span], values, generator)

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.weight.device).manual_seed(seed)

    def step_piece(self, piece: torch.nn.Parameter, values: Tensor, gradient: Tensor, rate: float) -> None:
        """Updates `values` in place; nothing but states stays in memory."""
        piece.data, piece.grad = self.shaped(values), self.shaped(gradient)
        self.library.step([([piece], self.weight_decay)], rate)
        piece.data, piece.grad = torch.empty(0, device=self.device), None

    def put_back(self, place: Tensor, values: Tensor, generator: torch.Generator) -> None:
        values = values.view(-1).to(place.device, non_blocking=True)
        place.copy_(round_stochastically(values, generator) if place.dtype == torch.bfloat16 else values)

    def tensors(self) -> dict[str, Tensor]:
        """As `Whole` gives them."""
        parts = [self.library.tensors(piece) for piece in self.pieces]
        return {key: self._joined(key, [part[key] for part in parts]) for key in parts[0]}

    def _joined(self, key: str, values: list[Tensor]) -> Tensor:
        if values[0].ndim == 0 or key in _PER_TENSOR or not self.library.elementwise:
            return values[0]
        # of several, on the host: no second copy on the device
        joined = values[0] if len(values) == 1 else torch.cat([v.reshape(-1).cpu() for v in values])
        return joined.view(self.weight.shape) if joined.numel() == self.weight.numel() else joined

    def load(self, saved: dict[str, Tensor]) -> None:
        flat = {key: self._cut(key, value) for key, value in saved.items()}
        for i, (piece, span) in enumerate(zip(self.pieces, self.spans)):
            piece.data = self.shaped(torch.empty(span.stop - span.start, device=self.device))
            self.library.load(piece, {key: values[i] for key, values in flat.items()})
            piece.data = torch.empty(0, device=self.device)

    def _cut(self, key: str, value: Tensor) -> list[Tensor]:
        if value.ndim == 0 or key in _PER_TENSOR or not self.library.elementwise:
            return [value] * len(self.spans)
        value, numel = value.reshape(-1), self.weight.numel()
        per = 1 << (math.ceil(numel / len(value)) - 1).bit_length()  # elements of a value: a power of two
        return [value[span.start // per : math.ceil(span.stop / per)] for span in self.spans]
