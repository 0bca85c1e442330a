"""A policy whose weights, gradients and optimizer states lie in parts on several ranks: FSDP2."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from fastdpo.distributed.world import World
from fastdpo.errors import ModelError
from fastdpo.model.activations import recomputable


class Root(nn.Module):
    """A policy's one entrance: all that reads a weight runs inside its forward, where FSDP2 has embeddings
    and lm_head whole. A causal LM's own forward would leave the lm_head in parts to whoever calls it
    later."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, call: Callable[[], Any]) -> Any:
        return call()


def shard(policy: Any, world: World) -> None:
    """Leaves a policy with this rank's part of its weights. They are gathered a layer at a time, as they are
    kept (fp32 of trained ones: the numbers are those of one GPU); embeddings, last norm and lm_head, tied or
    not, are the root's and stay whole from the forward to the backward. Gradients are sums over ranks, not
    FSDP2's means: a step's counts are those of all ranks already."""
    for layer in _layers(policy.core):
        fully_shard(layer, mesh=world.mesh)
    fully_shard(policy.root, mesh=world.mesh)
    for module in policy.root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no PREMUL_SUM
    policy.device, policy.world = next(policy.model.parameters()).device, world


def check_images(policy: Any, world: World) -> None:
    """Raises ModelError: a rank whose rows have no image would not gather its tower, and all would wait."""
    if world.sharded and policy.processor is not None:
        raise ModelError(
            f"shard: {type(policy.core).__name__} sees images, which is not known to work in shards yet; "
            "say shard: false"
        )


def _layers(core: nn.Module) -> list[nn.Module]:
    layers = recomputable(core)
    if not layers:
        raise ModelError(
            f"shard: {type(core).__name__} has no layers that can be sharded one by one; say shard: false"
        )
    return layers
