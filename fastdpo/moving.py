"""Copies between the host and a GPU that the host does not wait for.

A copy is asynchronous only from, or to, pinned memory. Taking that from the system makes the host wait, so it
comes from torch's caching host allocator: after the first steps there is always a block, and none is given
out again before the copies from it, which torch records, have ended.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

ALIGNED = 128  # bytes: where a tensor begins in a common buffer; whole lines, as in an allocation of its own


def to_device(tensors: Sequence[Tensor], device) -> list[Tensor]:
    """The tensors on a device. From the host to a GPU they go together, by one copy out of pinned memory that
    the host does not wait for, and come out as views of one buffer, contiguous."""
    device = torch.device(device)
    ours = [t for t in tensors if t.device.type == "cpu"]
    if device.type != "cuda" or not ours:
        return [t.to(device) for t in tensors]
    if len(ours) < len(tensors):  # pixels may be there already
        moved = iter(to_device(ours, device))
        return [next(moved) if t.device.type == "cpu" else t.to(device) for t in tensors]
    starts = list(accumulate((-(-t.nbytes // ALIGNED) * ALIGNED for t in tensors), initial=0))
    host = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True)
    views = lambda buffer: [
        buffer[start : start + t.nbytes].view(t.dtype).view(t.shape) for t, start in zip(tensors, starts)
    ]
    for tensor, place in zip(tensors, views(host)):
        place.copy_(tensor)
    return views(host.to(device, non_blocking=True))


def to_host(tensor: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """(a GPU's tensor in pinned memory, under way on the current stream; what waits until it is there). A
    tensor of the host's own is copied at once."""
    if not tensor.is_cuda:
        return tensor.clone(), lambda: None
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    return copy, torch.cuda.current_stream(tensor.device).record_event().synchronize
