"""Tensors that lie in parts on several ranks (DTensor): whole again, or a rank's part of a whole one.

FSDP2 cuts along the first dimension, as torch.chunk does: of d rows over n ranks each has ceil(d / n), the
last ones fewer or none.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every rank; collective where it lies in parts."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def cut_of(tensor: Tensor) -> tuple[int, int]:
    """(which part this rank holds, of how many); (0, 1) of what is whole on every rank. Of replicated parts
    (HSDP) the copies have the same number."""
    if isinstance(tensor, DTensor):
        for dim, placement in enumerate(tensor.placements):
            if isinstance(placement, Shard):
                assert placement.dim == 0, placement
                return tensor.device_mesh.get_local_rank(dim), tensor.device_mesh.size(dim)
    return 0, 1


def bounds_of(rows: int, number: int, of: int) -> tuple[int, int]:
    """The rows of a part."""
    each = -(-rows // of)
    return min(number * each, rows), min((number + 1) * each, rows)


def like(tensor: Tensor, read: Callable[[int | None, int | None], Tensor]) -> Tensor:
    """A whole tensor of the same shape cut as `tensor` is, on its device. read(first, last) gives its rows,
    or all of it for None."""
    if not isinstance(tensor, DTensor):
        return read(None, None)
    first, last = bounds_of(tensor.shape[0], *cut_of(tensor))
    mine = read(first, last).to(tensor.to_local().device)
    mesh, placements = tensor.device_mesh, tensor.placements
    return DTensor.from_local(mine, mesh, placements, shape=tensor.shape, stride=tensor.stride())


def is_finite(tensor: Tensor) -> bool:
    """Whether what this rank holds of it are numbers."""
    return bool(torch.isfinite(part(tensor)).all())
