"""MLPs computed some thousand tokens at a time: what is as wide as an MLP never is as long as a row.

The forward computes tiles without a graph; the backward recomputes each tile with one, and sums the weights'
gradients over the tiles. After "TiledMLP" of Arctic Long Sequence Training (Bekman et al. 2025,
arXiv 2506.13996). Only the MLP's input is saved, and it is saved before anything is computed of it: a
checkpointed layer's recompute ends there where nothing after the MLP needs saving (Llama, Qwen, Mistral), so
that a tile is then computed twice, as the layer's MLP would be, and not three times.
"""

import inspect
import math
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

# A tile reads the weights, casts them, and adds its gradients to sums in fp32: some 38 bytes a trained fp32
# weight, beside 8 x TILE operations. At 8192 tokens that is about an eighth of the time by an H100's data
# sheet (3.35 TB/s; 700 of its 989 TFLOP/s); half the tile would double the share. A tile's intermediates,
# five or so of TILE x intermediate size, stay below what attention needs of a row of 32k tokens or more.
TILE = 8192

_MIXTURE = ("experts", "router", "gate")  # submodules that tell a mixture of experts

_inside = False


def is_inside() -> bool:
    """Whether a forward over tiles is going on, of which nothing is worth keeping."""
    return _inside


def tile_mlps(layers: list[nn.Module]) -> tuple[int, int]:
    """Makes the dense MLPs of decoder layers compute in tiles; returns how many, and how many layers have
    none that can: a mixture of experts, or no `mlp` that takes hidden states and nothing else."""
    dense: list[Any] = [layer.mlp for layer in layers if _is_dense(getattr(layer, "mlp", None))]
    for mlp in dense:
        mlp.untiled = mlp.forward
        mlp.forward = MethodType(_forward, mlp)
    return len(dense), len(layers) - len(dense)


def untile_mlps(layers: list[nn.Module]) -> None:
    """Undoes `tile_mlps`."""
    for layer in layers:
        mlp: Any = getattr(layer, "mlp", None)
        if mlp is not None and hasattr(mlp, "untiled"):
            mlp.forward = mlp.untiled
            del mlp.untiled


def _is_dense(mlp: nn.Module | None) -> bool:
    if mlp is None or len(inspect.signature(mlp.forward).parameters) != 1:
        return False
    names = {name.rpartition(".")[2] for name, _ in mlp.named_modules()}
    return not names.intersection(_MIXTURE)


def _forward(mlp: Any, x: Tensor) -> Tensor:
    """mlp(x), x [..., D]: as it stands up to TILE tokens, in tiles beyond."""
    if x.shape[:-1].numel() <= TILE:
        return mlp.untiled(x)
    weights = [p for p in mlp.parameters() if p.requires_grad]
    if not torch.is_grad_enabled() or not (x.requires_grad or weights):
        return _in_tiles(mlp, x)
    kept = _Kept.apply(torch.empty(0, requires_grad=True), x)
    return _Tiled.apply(mlp, (kept,), x, *weights)


def _tiles(x: Tensor) -> tuple[Tensor, ...]:
    """[..., D] -> views [1, n, D] of nearly equal length."""
    rows = x.reshape(1, -1, x.shape[-1])
    return rows.chunk(math.ceil(rows.shape[1] / TILE), dim=1)


def _in_tiles(mlp: Any, x: Tensor) -> Tensor:
    global _inside
    before, _inside = _inside, True
    try:
        tiles = _tiles(x)
        first = mlp.untiled(tiles[0])
        out = first.new_empty(1, x.shape[:-1].numel(), first.shape[-1])
        places = out.split([tile.shape[1] for tile in tiles], dim=1)
        places[0].copy_(first)
        del first
        for tile, place in zip(tiles[1:], places[1:]):
            place.copy_(mlp.untiled(tile))
    finally:
        _inside = before
    return out.view(*x.shape[:-1], -1)


class _Kept(torch.autograd.Function):
    """Saves x: whatever saved-tensor hooks are active see it now, as torch's checkpoint saves its inputs.
    torch frees what a node saved with the last tensor made by it (2.11 does, whoever holds the node)."""

    @staticmethod
    def forward(ctx, always, x):
        ctx.save_for_backward(x)
        return torch.empty(0)


class _Tiled(torch.autograd.Function):
    """mlp(x) by tiles. `kept`: the tensor whose node holds x, in a tuple, for autograd not to take it for an
    input. weights: the MLP's trained parameters."""

    @staticmethod
    def forward(ctx, mlp, kept, x, *weights):
        ctx.mlp, (ctx.kept,), ctx.device_type = mlp, kept, x.device.type
        ctx.autocast = (torch.is_autocast_enabled(ctx.device_type), torch.get_autocast_dtype(ctx.device_type))
        return _in_tiles(mlp, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.kept.grad_fn.saved_tensors
        ctx.kept = None
        mlp, needs_x = ctx.mlp, ctx.needs_input_grad[2]
        enabled, dtype = ctx.autocast
        grad_x: Any = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else None
        places: Any = _tiles(grad_x) if needs_x else None
        with (
            _summed(mlp) as (leaves, sums),
            torch.enable_grad(),
            torch.autocast(ctx.device_type, dtype=dtype, enabled=enabled, cache_enabled=False),
        ):
            for i, (tile, slope) in enumerate(zip(_tiles(x.detach()), _tiles(grad))):
                tile = tile.detach().requires_grad_(needs_x)
                out = torch.func.functional_call(mlp, leaves, (tile,))
                torch.autograd.backward(out, slope)
                if needs_x:
                    places[i].copy_(tile.grad)
        return None, None, grad_x, *(s.to(leaf.dtype) for s, leaf in zip(sums, leaves.values()))


@contextmanager
def _summed(mlp: nn.Module):
    """({name: a leaf that stands for the trained parameter}, the sums of their gradients in fp32 or wider).
    A leaf's gradient is freed as soon as it is added, so that there is one at a time."""
    trained = {name: p for name, p in mlp.named_parameters() if p.requires_grad}
    leaves = {name: p.detach().requires_grad_() for name, p in trained.items()}
    wide = lambda p: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
    sums = [wide(p) for p in leaves.values()]

    def add(total, leaf):
        total.add_(leaf.grad)
        leaf.grad = None

    hooked = zip(leaves.values(), sums)
    handles = [leaf.register_post_accumulate_grad_hook(partial(add, total)) for leaf, total in hooked]
    try:
        yield leaves, sums
    finally:
        for handle in handles:
            handle.remove()
