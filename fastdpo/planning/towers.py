"""A tower in a step without data: loops over images, lists of sizes and masks need what others do not.

A step's weights are tensors without data. The microbatch itself is real here, and so is whatever is made of
it until that meets a weight. Of layers that do not train each kind is run once: a window of an image is a
call of its own, and there are thousands.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_iter

from fastdpo.planning.allocations import Tracker

_aten: Any = torch.ops.aten
_SMALL = {  # what is made of numbers alone and looked at later
    *(_aten.arange.default, _aten.arange.start, _aten.arange.start_step, _aten.linspace.default),
    *(_aten.lift_fresh.default, _aten.scalar_tensor.default),
}


class RealInputs(TorchDispatchMode):
    """Enter it inside a FakeTensorMode and its Tracker."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is _aten.index.Tensor and (mask := _mask_of(*args)) is not None:
            return _chosen(args[0], mask)
        given = [tensor for tensor in tree_iter((args, kwargs)) if isinstance(tensor, Tensor)]
        real = bool(given) and not any(isinstance(tensor, FakeTensor) for tensor in given)
        if real or func in _SMALL:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _mask_of(tensor, indices) -> Tensor | None:
    """The one mask with data that a tensor without is indexed by."""
    if not isinstance(tensor, FakeTensor):
        return None
    mask, *others = indices
    is_mask = isinstance(mask, Tensor) and mask.dtype is torch.bool and not isinstance(mask, FakeTensor)
    return mask if is_mask and not others else None


def _chosen(tensor: Tensor, mask: Tensor) -> Tensor:
    """tensor[mask], by the places of what is true in it, which torch makes first."""
    with unset_fake_temporarily():
        count = int(mask.count_nonzero())
    places = torch.empty(count, mask.dim(), dtype=torch.int64)
    out = tensor.new_empty(count, *tensor.shape[mask.dim() :])
    del places
    return out


class Frozen:
    """What layers that do not train allocated, by their weights and arguments: those alike do so again."""

    def __init__(self, layers: Sequence[Any], tracker: Tracker, known: dict):
        """known: of a microbatch, a dtype and a way to recompute, for all such steps."""
        self.tracker, self._known = tracker, known
        for layer in layers:
            if not any(weight.requires_grad for weight in layer.parameters()):
                name = "_gradient_checkpointing_func" if layer.gradient_checkpointing else "forward"
                setattr(layer, name, self._once(layer, getattr(layer, name)))

    def _once(self, layer: Any, run: Callable) -> Callable:
        kind = type(layer), tuple((name, p.shape, p.dtype) for name, p in layer.named_parameters())

        def once(*args, **kwargs):
            given, form = tree_flatten((args, kwargs, getattr(args[0] if args else None, "keywords", None)))
            if any(isinstance(one, Tensor) and one.requires_grad for one in given):
                return run(*args, **kwargs)
            key = kind, str(form), *map(_described, given)
            if key in self._known:
                return self.tracker.again(*self._known[key])
            mark = self.tracker.mark()
            out = run(*args, **kwargs)
            if isinstance(out, Tensor) and (log := self.tracker.since(mark, out)) is not None:
                self._known[key] = log, partial(torch.empty, tuple(out.shape), dtype=out.dtype)
            return out

        return once


def _described(value: Any) -> Any:
    """An argument, as far as it decides what a layer allocates."""
    if not isinstance(value, Tensor):  # the layout of the language model's attention is one, and unused
        return value if isinstance(value, bool | int | float | str) else type(value).__name__
    shape = tuple(value.shape), value.dtype
    if isinstance(value, FakeTensor):
        return shape
    return *shape, value.reshape(-1).view(torch.uint8).cpu().numpy().tobytes()
