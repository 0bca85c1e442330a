"""Models whose weights are split among processes (FSDP, ZeRO-3), as another trainer wraps them."""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FlatParameter
from torch.distributed.tensor import DTensor, Partial
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled


def is_split(model: nn.Module) -> bool:
    """Whether a forward of this model waits for other processes, layer by layer."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    kinds = (DTensor, FlatParameter)
    return is_deepspeed_zero3_enabled() or any(
        isinstance(p, kinds) or hasattr(p, "_fsdp_flattened") for p in model.parameters()
    )


def same_everywhere(model: nn.Module, mine: Any) -> Any:
    """`mine`; of a model that is split, the first process's, on each process, or None unless each brings one.

    For what decides how many forwards follow: each has to run as many, or all would wait for one another.
    """
    if not is_split(model):
        return mine
    theirs = [None] * dist.get_world_size()
    dist.all_gather_object(theirs, mine)
    return None if any(one is None for one in theirs) else theirs[0]


def whole(weight: Tensor | None) -> Any:
    """A weight that was found split, gathered. Its gradient is then the processes' mean, as everywhere under
    FSDP, which full_tensor() alone would leave each process's own."""
    if not isinstance(weight, DTensor):
        return weight
    mesh = weight.device_mesh
    gathered = weight.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if gathered.requires_grad:
        gathered.register_hook(lambda gradient: gradient / mesh.size())
    return gathered
